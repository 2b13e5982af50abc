"""A ticket under construction: layers, streams and nodes are added front to back, what nothing reads is pruned."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ltx import source
from ltx.activations import Activation
from ltx.constructions.calibration import Calibration
from ltx.constructions.feedback import FeedbackSolver, Read
from ltx.constructions.layout import Constants
from ltx.constructions.rows import BaseSets, Problems, RowSolver
from ltx.constructions.streams import Stream, Writer
from ltx.errors import ConstructionError
from ltx.graph import BatchNorm, Layer
from ltx.liveness import read_channels
from ltx.source import SourceLayer
from ltx.subset_sum import MAX_BASE_SET_SIZE
from ltx.ticket import DEAD, Ticket, TicketNode


@dataclass(frozen=True)
class Plan:
    """The settings of a construction."""

    base_set_size: int  # m
    epsilon: float
    seed: int
    law: str = "uniform"
    selection: str = "smallest"
    scaling: str = "unit"
    device: str = "cpu"
    pair_kernel: int = 1  # of the first layer of a pair
    pair_stride: str = "second"  # which layer of a pair has the target's stride
    within: float = math.nan  # of its target value a subset has to be; infinite with feedback and no bound


@dataclass(frozen=True)
class Place:
    """A node of the ticket's network as those behind it see it."""

    node: str
    target: str  # the target's node
    stream: Stream | None  # None: the image itself
    behind: tuple[str, ...]  # layers whose rows a slot needs to be alive here
    bound: float  # no element is larger in magnitude
    nonnegative: bool = False
    vector: bool = False  # one number per channel: the output of a linear layer
    flat: str | None = None  # images that the target has flattened, by this node; the ticket does where it must
    constant: Callable[[Tensor], Tensor] | None = None  # constant slots -> their values here

    @property
    def flattened(self) -> bool:
        """Whether the target sees flattened images here; the ticket still has them whole."""
        return self.flat is not None and not self.vector

    def take(self, read: Tensor, copies: int, constants: int) -> Taken:
        """Live slots of the channels that a layer reads.

        Args:
            read: (C_in, entries) bool: which of its entries, by the channel that they read.
        """
        channels = torch.arange(len(read))
        if self.stream is None:
            none = torch.empty(0, dtype=torch.int64)
            return Taken(channels[:, None], none, none.double())
        wanted = read.any(1).nonzero().flatten()
        taken, fixed = self.stream.take(self.behind, wanted, copies, constants)
        slots = torch.zeros(len(read), copies, dtype=torch.int64)
        slots[wanted] = taken
        return Taken(slots, fixed, self.constant(fixed) if self.constant else torch.zeros(len(fixed)).double())

    def entries(self, layer: Layer) -> Tensor:
        """A layer's weight by the channels here: (C_out, C_in, K)."""
        weight = layer.weight
        if layer.kind == "conv" or self.stream is None or self.vector:
            return weight.flatten(2) if layer.kind == "conv" else weight[:, :, None]
        return weight.view(len(weight), self.stream.width, -1)


@dataclass(frozen=True)
class Taken:
    """The slots that a layer reads."""

    slots: Tensor  # (C_in, copies) int64; 0 where a channel is not read
    constants: Tensor  # (n,) int64
    constant_values: Tensor  # (n,) float64


@dataclass(frozen=True)
class Step:
    """A target layer that is to be approximated, and where."""

    name: str
    target: Layer
    place: Place  # what it reads
    stream: Stream  # what it writes
    slots: int  # of each channel there that are read
    first: bool  # whether it is the first to write there
    biased: bool  # whether it reads constants
    constants: Constants | None  # how the constant slots of its stream are made
    beside: Mapping[str, str]  # nodes of the target that the ticket has already -> the ticket's


@dataclass
class _Draft:
    """A source layer whose width is not known yet."""

    layer: SourceLayer
    inputs: Stream | int  # what it reads: a stream, or so many channels
    stream: Stream | None  # what it writes; None: rows of its own, which are `fixed`
    fixed: tuple[Tensor, Tensor, Tensor] | None = None  # labels, and rows and offsets of what is kept


class TicketBuilder:
    """Collects source layers with their masks, and the nodes of the ticket's network."""

    def __init__(self, plan: Plan, calibration: Calibration | None = None):
        self.plan, self.calibration = plan, calibration
        self.nodes: list[TicketNode] = []
        self.bias_masks: dict[str, Tensor] = {}
        self._drafts: list[_Draft] = []
        self._norms: dict[str, tuple[Stream, BatchNorm, int]] = {}
        self._heads: dict[str, tuple[Stream | None, Layer, Tensor, Tensor]] = {}
        self._flattened: dict[str, str] = {}

    def add_node(self, name: str, op: str, inputs: tuple[str, ...], **attributes) -> str:
        if any(node.name == name for node in self.nodes):
            raise ConstructionError(f"two nodes are called '{name}'; rename a module of the network")
        self.nodes.append(TicketNode(name, op, inputs, attributes))
        if self.calibration:
            self.calibration.add_node(self.nodes[-1])
        return name

    def add_activation(self, name: str, node: str, phi: Activation) -> str:
        return self.add_node(name, "activation", (node,), **phi.attributes)

    def add_batch_norm(self, name: str, place: Place, norm: BatchNorm, *, constant: int) -> str:
        """A given batch norm; every slot has that of its channel, constant ones that of channel `constant`."""
        assert place.stream is not None
        self._norms[name] = (place.stream, norm, constant)
        if self.calibration:
            self.calibration.norms[name] = partial(_norm, place.stream, norm, constant)
        return self.add_node(name, "batch_norm", (place.node,))

    def add_head(self, name: str, place: Place, layer: Layer, weight: Tensor, slots: Tensor) -> str:
        """A linear layer that is taken from the target: weight (C_out, C_in, K), a slot (C_in,) for each channel."""
        self._heads[name] = (place.stream, layer, weight, slots)
        return self.add_node(name, "given", (self.flattened(place),), target=name, taps=weight.shape[2])

    def flattened(self, place: Place) -> str:
        """The node that a linear layer behind `place` reads."""
        if not place.flattened:
            return place.node
        assert place.flat is not None
        if place.node not in self._flattened:
            taken = {node.name for node in self.nodes}
            name = place.flat if place.flat not in taken else f"{place.node}.flatten"
            self._flattened[place.node] = self.add_node(name, "flatten", (place.node,))
        return self._flattened[place.node]

    def copies(self, stream: Stream) -> int:
        """How many slots of each channel of a stream a layer reads: m, with feedback more where channels are few."""
        m = self.plan.base_set_size
        if self.calibration is None or not self.calibration.settings.spread:
            return m
        layers = self.calibration.graph.layers.values()
        widths = [len(layer.weight) for layer in layers if layer.kind == "conv"]
        widest = max(widths or [len(layer.weight) for layer in layers])
        return min(MAX_BASE_SET_SIZE, max(m, round(m * (widest / stream.width) ** self.calibration.settings.spread)))

    @property
    def depth(self) -> int:
        """How many layers the source has so far: the index of the next one."""
        return len(self._drafts)

    def add_copies(
        self, layer: SourceLayer, node: str, inputs: Stream | int, labels: Tensor, rows: Tensor, offsets: Tensor
    ) -> str:
        """A layer with rows of its own that keep one entry each: what they stand for, and the entries i * K + k."""
        self._drafts.append(_Draft(layer, inputs, None, (labels, rows, offsets)))
        if self.calibration:
            column = torch.full((len(labels),), -1, dtype=torch.int64)
            column[rows] = offsets // layer.taps
            entry = source.biases(layer, self.plan.seed, torch.arange(len(labels))) if layer.bias else torch.zeros(1)
            entry = entry.expand(len(labels)).clone()
            entry[rows] = source.weights(layer, self.plan.seed, rows, offsets)
            self.calibration.add_copies(layer, column, entry)
        return self.add_node(layer.name, "layer", (node,), layer=layer.name)

    def add_writer(
        self, layer: SourceLayer, node: str, inputs: Stream | int, step: Step, problems: list[Problems],
        bases: BaseSets,
    ) -> str:  # fmt: skip
        """A layer whose rows are the slots of the step's stream; they are solved when somebody reads them."""
        plan, calibration = self.plan, self.calibration
        solver = RowSolver(
            layer, problems, bases, seed=plan.seed, epsilon=plan.epsilon, device=plan.device,
            selection="best" if calibration else plan.selection,
        )  # fmt: skip
        if calibration:
            read = Read(node, step.place.target, calibration.behind(step.name, step.beside), step.slots)
            solver = FeedbackSolver(solver, layer, problems, bases, read, calibration)
        step.stream.add(layer.name, Writer(layer, problems, bases, solver, plan.within, plan.scaling))
        self._drafts.append(_Draft(layer, inputs, step.stream))
        return self.add_node(layer.name, "layer", (node,), layer=layer.name)

    @property
    def problems(self) -> int:
        """Subset-sum problems solved, those of failed rows included."""
        return int(sum(writer.asked.sum() for writer in self._writers()))

    @property
    def failures(self) -> int:
        """How many of them had no subset within epsilon."""
        return int(sum(writer.missed.sum() for writer in self._writers()))

    @property
    def rows(self) -> int:
        """Source rows that were tried."""
        return sum(writer.tried for writer in self._writers())

    @property
    def given_up(self) -> int:
        """How many of them keep nothing."""
        return sum(writer.given_up for writer in self._writers())

    def _writers(self) -> list[Writer]:
        return [draft.stream.writers[draft.layer.name] for draft in self._drafts if draft.stream is not None]

    def finish(self, **metadata) -> Ticket:
        """Set the widths, prune what nothing reads, back to front, and name the result."""
        layers, masks, slots, errors = [], {}, {}, {}
        for draft in self._drafts:
            layer, labels, mask = _with_width(draft)
            layers.append(layer)
            masks[layer.name], slots[layer.name] = mask, labels
            if self.calibration and draft.stream is not None:
                errors[layer.name] = draft.stream.writers[layer.name].errors(len(labels))
        given = {f"{name}.{part}": tensor for name in self._norms for part, tensor in self._norm(name).items()}
        given |= {f"{name}.{part}": tensor for name in self._heads for part, tensor in self._head(name).items()}
        by_name = {layer.name: layer for layer in layers}

        def prune(name: str, read: Tensor) -> Tensor:
            """Empty the rows that are not read; the input channels that the others read."""
            layer = by_name[name]
            keep = torch.zeros(layer.shape[0], dtype=torch.bool)
            keep[read] = True
            mask = masks[name] = masks[name][keep[masks[name] // layer.row_size]]
            if name in self.bias_masks:
                bias = self.bias_masks[name]
                self.bias_masks[name] = bias[keep[bias]]
            slots[name] = torch.where(keep, slots[name], DEAD)
            if name in errors:
                errors[name] = errors[name].where(keep, math.nan)
            return mask % layer.row_size // layer.taps

        read_channels(self.nodes, given, prune)
        return Ticket(
            seed=self.plan.seed, law=self.plan.law, base_set_size=self.plan.base_set_size,
            epsilon=self.plan.epsilon, selection=self.plan.selection, layers=tuple(layers), graph=tuple(self.nodes),
            masks=masks, bias_masks=self.bias_masks, slots=slots, given=given, errors=errors,
            feedback=json.dumps(self.calibration.describe()) if self.calibration else "", **metadata,
        )  # fmt: skip

    def _norm(self, name: str) -> dict[str, Tensor]:
        stream, norm, constant = self._norms[name]
        if not len(stream.channels):
            return {"weight": norm.scale[:1], "bias": norm.shift[:1]}  # a layer has rows even where nothing reads it
        return dict(zip(("weight", "bias"), _norm(stream, norm, constant), strict=True))

    def _head(self, name: str) -> dict[str, Tensor]:
        stream, layer, weight, slots = self._heads[name]
        width = weight.shape[1] if stream is None else _width(stream)
        wide = torch.zeros(len(weight), width, weight.shape[2])
        read = weight.ne(0).any(2).any(0)
        wide[:, slots[read]] = weight[:, read]
        return {"weight": wide.flatten(1), "bias": layer.bias}


def _norm(stream: Stream, norm: BatchNorm, constant: int, slots: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and shift of slots, of all where none are named; constant slots have those of channel `constant`."""
    channels = stream.channels if slots is None else stream.channels[slots]
    channels = torch.where(channels < 0, constant, channels)
    return norm.scale[channels], norm.shift[channels]


def _width(inputs: Stream | int) -> int:
    """Channels of a stream; a layer has rows even where nothing reads it."""
    return inputs if isinstance(inputs, int) else max(1, len(inputs.channels))


def _with_width(draft: _Draft) -> tuple[SourceLayer, Tensor, Tensor]:
    """A source layer as wide as it was used up, what its rows stand for, and the flat indices of what is kept."""
    layer = draft.layer
    if draft.stream is None:
        assert draft.fixed is not None
        labels, rows, offsets = draft.fixed
    else:
        labels = draft.stream.labels(layer.name)
        rows, offsets = draft.stream.writers[layer.name].entries()
    if not len(labels):
        labels = torch.full((1,), DEAD, dtype=torch.int64)
    inside = _width(draft.inputs)
    shape = (
        (len(labels), inside * layer.taps) if layer.kind == "linear" else (len(labels), inside, *layer.shape[2:])
    )  # fmt: skip
    layer = replace(layer, shape=shape)
    return layer, labels, (rows * layer.row_size + offsets).sort().values


def source_layer(builder: TicketBuilder, name: str, target: Layer, taps: int, **attributes) -> SourceLayer:
    """A source layer for `target` with its kernel, stride and padding, the next one of the source."""
    return SourceLayer(
        name, builder.depth, target.kind, (0, 0, *target.weight.shape[2:]), taps,
        stride=target.stride, padding=target.padding, dilation=target.dilation, target=name, law=builder.plan.law,
        **attributes,
    )  # fmt: skip


def constant_row(step: Step, base: int, tap: int) -> Problems:
    """The problems of a constant slot's row: where this layer makes them, to sum those of base set `base` to 1."""
    if step.constants is None or not step.constants.sums or not step.first:
        none = torch.empty(0, dtype=torch.int64)
        return Problems(none, none, none.double())
    return Problems(torch.tensor([base]), torch.tensor([tap]), torch.ones(1, dtype=torch.float64))
