"""A ticket: a seed and a 0/1 mask. Whoever has the file and `ltx.source` can rebuild every parameter."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ltx import source
from ltx.checks import one_of
from ltx.defaults import usual_defaults
from ltx.errors import CheckpointError, LtxError
from ltx.feedback import Feedback
from ltx.files import read_tensors, write_tensors
from ltx.liveness import read_channels
from ltx.source import SourceLayer

if TYPE_CHECKING:
    from ltx.network import TicketNetwork

FORMAT = "ltx-ticket/1"
DEAD, CONSTANT = -1, -2  # labels of rows that stand for no target channel


@dataclass(frozen=True)
class TicketNode:
    """One operation of the ticket's network.

    `op` is input, layer (random parameters under the mask), given (a linear layer taken from the target), batch_norm
    (given too, one scale and shift for each channel), activation, add, flatten, max_pool, avg_pool, adaptive_avg_pool
    or output;
    `attributes` are JSON values.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    attributes: dict


@dataclass(frozen=True, eq=False)  # comparisons of tensors have no truth value
class Ticket:
    """A subnetwork of the source network, and what it was made for.

    masks: per source layer the sorted flat indices (o * C_in + i) * K + k of the kept weights, int64.
    bias_masks: per source layer the sorted output channels whose bias is kept, int64.
    slots: per source layer and output channel the target channel that it stands for, DEAD or CONSTANT.
    given: tensors that are not random (batch norm, a kept head), named `NODE.weight`, `NODE.bias`.
    input_low, input_high: the range of input elements that it was made for.
    feedback, errors: of `selection=feedback`, else empty: JSON of its settings and of the calibration images, and per
        source layer the root mean square error of each row on them, behind batch norm and the sum of a residual block,
        float32; NaN where it is not claimed.
    """

    seed: int
    law: str  # of all its layers, one of `ltx.source.LAWS`
    construction: str
    base_set_size: int
    epsilon: float
    selection: str
    activation: str
    target_sha256: str
    input_low: float
    input_high: float
    layers: tuple[SourceLayer, ...]
    graph: tuple[TicketNode, ...]
    masks: Mapping[str, Tensor]
    bias_masks: Mapping[str, Tensor]
    slots: Mapping[str, Tensor]
    given: Mapping[str, Tensor]
    errors: Mapping[str, Tensor] = field(default_factory=dict)
    feedback: str = ""

    def __post_init__(self):
        one_of("law", self.law, source.LAWS)
        for layer in self.layers:
            if layer.law != self.law:
                raise LtxError(f"layer {layer.name}: its law is {layer.law}, the ticket's {self.law}")

    @property
    def within(self) -> float:
        """How far a sum may be from a target's parameter: epsilon, or with feedback its bound, infinite for none."""
        if not self.feedback:
            return self.epsilon
        bound = json.loads(self.feedback)["bound"]
        return math.inf if bound is None else float(bound)

    @property
    def largest_subset(self) -> int | None:
        """How many entries a sum has at most; None: refined feedback, whose entries are of no parameter alone."""
        if not self.feedback:
            return self.base_set_size
        return None if math.isinf(self.within) else int(json.loads(self.feedback)["max_subset"])

    @property
    def parameters(self) -> int:
        """Random parameters that are kept; given ones are not counted."""
        return sum(len(m) for m in (*self.masks.values(), *self.bias_masks.values()))

    @property
    def source_parameters(self) -> int:
        """Random parameters of the source network at the width that the construction used up."""
        return sum(layer.parameters for layer in self.layers)

    def layer(self, name: str) -> SourceLayer:
        """A source layer.

        Raises:
            LtxError: there is none of that name.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise LtxError(f"the ticket has no layer '{name}'; there are {', '.join(layer.name for layer in self.layers)}")

    def kept(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (n,), offsets i * K + k (n,) and values (n,) float32 of the kept weights of a source layer."""
        layer, mask = self.layer(name), self.masks[name]
        rows = mask.div(layer.row_size, rounding_mode="floor")
        offsets = mask - rows * layer.row_size
        return rows, offsets, source.weights(layer, self.seed, rows, offsets)

    @usual_defaults()
    def weight(self, name: str) -> Tensor:
        """The masked weight of a source layer, dense, (C_out, C_in, kernel...), float32."""
        layer = self.layer(name)
        dense = torch.zeros(layer.shape[0] * layer.row_size)
        dense[self.masks[name]] = self.kept(name)[2]
        return dense.view(layer.shape)

    @usual_defaults()
    def bias(self, name: str) -> Tensor:
        """The masked bias of a source layer, (C_out,), float32; zeros where the source has none."""
        layer = self.layer(name)
        dense = torch.zeros(layer.shape[0])
        if name in self.bias_masks:
            rows = self.bias_masks[name]
            dense[rows] = source.biases(layer, self.seed, rows)
        return dense

    @usual_defaults()
    def read_channels(self) -> dict[str, Tensor]:
        """Node -> sorted channels that anything behind it reads."""

        def columns(name: str, read: Tensor) -> Tensor:
            layer, mask = self.layer(name), self.masks[name]
            keep = torch.zeros(layer.shape[0], dtype=torch.bool)
            keep[read] = True
            mask = mask[keep[mask // layer.row_size]]
            return mask % layer.row_size // layer.taps

        return read_channels(self.graph, self.given, columns)

    @usual_defaults()
    def node_labels(self) -> dict[str, Tensor | None]:
        """Node -> the target channel that each of its channels stands for, DEAD or CONSTANT; None: as in the image."""
        labels: dict[str, Tensor | None] = {}
        for node in self.graph:
            if node.op == "layer":
                labels[node.name] = self.slots[node.attributes["layer"]]
            elif node.op == "given":
                labels[node.name] = torch.arange(len(self.given[f"{node.name}.bias"]))
            elif node.op == "add":
                one, other = (labels[name] for name in node.inputs)
                assert one is not None
                assert other is not None
                labels[node.name] = torch.where(one == other, one, DEAD)
            else:
                labels[node.name] = labels[node.inputs[0]] if node.inputs else None
        return labels

    @usual_defaults()
    def to_module(self, *, device: str = "cpu", dense: bool = False, outputs_only: bool = False) -> TicketNetwork:
        """The ticket as an nn.Module that needs nothing of the target's code.

        Of a ticket in which `ltx.verify` finds violations it may be another network than the graph's, or an error.

        Args:
            dense: never take the sparse convolutions that are faster on a CPU (`ltx.network.TicketNetwork`).
            outputs_only: nothing else is asked of it, so that on a CPU it need hold no more of a convolution than the
                kept entries (`ltx.network.SparseNetwork`), unless it is dense.
        """
        from ltx.network import SparseNetwork, TicketNetwork

        if outputs_only and not dense and torch.device(device).type == "cpu":
            return SparseNetwork(self)
        return TicketNetwork(self, dense=dense).to(device)

    def save(self, path: Path) -> None:
        """Write the ticket; the same ticket always gives the same bytes."""
        tensors = {f"{name}.mask": mask for name, mask in self.masks.items()}
        tensors |= {f"{name}.bias_mask": mask for name, mask in self.bias_masks.items()}
        tensors |= {f"{name}.slots": slots for name, slots in self.slots.items()}
        tensors |= {f"given.{name}": tensor for name, tensor in self.given.items()}
        tensors |= {f"{name}.error": tensor for name, tensor in self.errors.items()}
        metadata = {name: str(getattr(self, name)) for name in _SCALARS}
        metadata |= {"feedback": self.feedback} if self.feedback else {}
        metadata["format"] = FORMAT
        metadata["layers"] = json.dumps([_entry(layer) for layer in self.layers])
        metadata["graph"] = json.dumps(
            [{"name": n.name, "op": n.op, "inputs": n.inputs, **n.attributes} for n in self.graph]
        )
        write_tensors(path, tensors, metadata)

    @classmethod
    @usual_defaults()
    def load(cls, path: Path) -> Ticket:
        """Read a ticket file.

        Raises:
            CheckpointError: missing, truncated, or not a ticket of this format. What the masks hold is for
                `ltx.verification.verify` to judge.
        """
        path = Path(path)
        if path.is_dir():
            raise CheckpointError(f"ticket {path}: is a folder; name the file in it, ticket.safetensors")
        if not path.is_file():
            raise CheckpointError(f"ticket {path}: no such file; make one with: ltx construct")
        from safetensors import SafetensorError

        try:
            tensors, metadata = read_tensors(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"ticket {path}: cannot be read ({error}); is it whole?") from error
        if metadata.get("format") != FORMAT:
            raise CheckpointError(
                f"ticket {path}: format '{metadata.get('format')}' is not {FORMAT}; name the ticket.safetensors that "
                "ltx construct has written, not a target or an export"
            )
        try:
            return cls._parse(metadata, tensors)
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError, LtxError) as error:
            raise CheckpointError(f"ticket {path}: damaged metadata ({type(error).__name__}: {error})") from error

    @classmethod
    def _parse(cls, metadata: dict[str, str], tensors: dict[str, Tensor]) -> Ticket:
        types = {f.name: f.type for f in fields(cls)}
        scalars = {n: {"int": int, "float": float, "str": str}[str(types[n])](metadata[n]) for n in _SCALARS}
        layers = tuple(_layer(entry, scalars["law"]) for entry in json.loads(metadata["layers"]))
        graph = tuple(_node(entry) for entry in json.loads(metadata["graph"]))

        def part(suffix: str) -> dict[str, Tensor]:
            return {
                layer.name: tensors[f"{layer.name}.{suffix}"] for layer in layers if f"{layer.name}.{suffix}" in tensors
            }

        given = {n.removeprefix("given."): t for n, t in tensors.items() if n.startswith("given.")}
        ticket = cls(
            **scalars, layers=layers, graph=graph, masks=part("mask"), bias_masks=part("bias_mask"),
            slots=part("slots"), given=given, errors=part("error"), feedback=metadata.get("feedback", ""),
        )  # fmt: skip
        if ticket.feedback:
            said = json.loads(ticket.feedback)
            Feedback(**{f.name: said[f.name] for f in fields(Feedback)}).check()
            if not (_is(said["images"], int) and said["images"] >= 1 and _is(said["images_sha256"], str)):
                raise ValueError(f"feedback {ticket.feedback}")
        for layer in layers:
            if layer.name not in ticket.masks or layer.name not in ticket.slots:
                raise KeyError(f"no '{layer.name}.mask' or '{layer.name}.slots'")
        return ticket


_KINDS = {"int": int, "tuple[int, ...]": int, "float": (int, float), "str": str, "bool": bool}
_ATTRIBUTES = {"rows": list, "layer": str, "function": str, "target": str, "taps": int}


def _entry(layer: SourceLayer) -> dict:
    """A layer for JSON, without its law, which the ticket's metadata say once."""
    return {name: value for name, value in asdict(layer).items() if name != "law"}


def _layer(entry: dict, law: str) -> SourceLayer:
    """A layer from its JSON; TypeError where a value is of another type than its field."""
    if _is(entry.get("sigma"), int):
        entry = {**entry, "sigma": float(entry["sigma"])}
    layer = SourceLayer(**{k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}, law=law)  # type: ignore[arg-type]
    for f in fields(layer):
        value, kind = getattr(layer, f.name), _KINDS[str(f.type)]
        several = value if str(f.type).startswith("tuple") else (value,)
        if not isinstance(several, tuple) or any(not _is(v, kind) for v in several):
            raise TypeError(f"layer {layer.name}: {f.name} {value!r}")
    return layer


def _node(entry: dict) -> TicketNode:
    """A node from its JSON; TypeError where a value is of a type that it cannot have."""
    name, op, inputs = entry.pop("name"), entry.pop("op"), entry.pop("inputs")
    names = all(isinstance(each, str) for each in (name, op, *inputs)) and isinstance(inputs, list)
    wrong = [k for k, v in entry.items() if k in _ATTRIBUTES and not _is(v, _ATTRIBUTES[k])]
    if not names or wrong or any(not _is(row, int) for row in entry.get("rows", [])):
        raise TypeError(f"node {name!r}: {op!r} of {inputs!r} with {entry}")
    return TicketNode(name, op, tuple(inputs), entry)


def _is(value: object, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and isinstance(value, bool) == (kind is bool)


_SCALARS = (
    "seed", "law", "construction", "base_set_size", "epsilon", "selection", "activation", "target_sha256",
    "input_low", "input_high",
)  # fmt: skip
