"""The target and the ticket under construction side by side on calibration images."""

from __future__ import annotations

import hashlib
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltx import operations
from ltx.activations import from_attributes
from ltx.errors import ConstructionError
from ltx.feedback import Feedback
from ltx.graph import Graph, Node, evaluate
from ltx.source import SourceLayer
from ltx.sparse_conv import SparseConvolution
from ltx.ticket import TicketNode

# values at a position need those there alone (of layers: their rows' outputs are stored, or copies)
_ELEMENTWISE = ("layer", "activation", "batch_norm", "add")


def images_sha256(images: Tensor) -> str:
    """By which a ticket names its calibration images."""
    return hashlib.sha256(images.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class Behind:
    """Where a row's error is measured: behind batch norm, and behind a sum whose other side is there already.

    node: of the target. scale (C,): of the layer's outputs until there. others: the ticket's nodes whose deviations
    are added, each with the name of the target's node and its scale (C,).
    """

    node: str
    scale: Tensor
    others: tuple[tuple[str, str, Tensor], ...]


class Calibration:
    """Activations of the target, as it is walked through, and of the slots of the ticket.

    Args:
        images: (n, C, H, W) float32.
    """

    def __init__(self, graph: Graph, images: Tensor, settings: Feedback, *, seed: int, device: str):
        settings.check()
        fits = images.ndim == 4 and len(images) > 0 and images.is_floating_point()
        if not fits or not bool(torch.isfinite(images).all()):
            raise ConstructionError(
                f"calibration images {tuple(images.shape)} {images.dtype}: must be (n, C, H, W), floating point, finite"
            )
        self.settings = Feedback(**{name: _plain(value) for name, value in asdict(settings).items()})
        self.seed, self.device = seed, device
        self.images = images.detach().to(device, torch.float32)
        self.graph = graph
        self.target: dict[str, Tensor] = {}
        self.nodes: dict[str, TicketNode] = {}
        self._last = {name: n for n, node in enumerate(graph.nodes) for name in node.inputs}
        self._position = {node.name: n for n, node in enumerate(graph.nodes)}
        self._image: set[str] = set()  # nodes before the first layer
        self._broadcast: set[str] = set()  # sums of images and of numbers that each channel of an image gets
        self._rows: dict[str, _Rows] = {}
        self._copies: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.norms: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {}  # slots -> their scale and shift

    def describe(self) -> dict:
        """What a ticket says of it."""
        return {**asdict(self.settings), "images": len(self.images), "images_sha256": images_sha256(self.images)}

    def advance(self, node: Node) -> None:
        """Run the target's next node."""
        position = self._position[node.name]
        with torch.no_grad():
            inputs = [self.target[name] for name in node.inputs]
            try:
                self.target[node.name] = self.images if node.op == "input" else evaluate(node, inputs)
            except RuntimeError as error:
                raise ConstructionError(
                    f"calibration images {tuple(self.images.shape)} do not fit the network: '{node.name}': {error}"
                ) from error
        if node.op == "add" and inputs[0].shape != inputs[1].shape:
            self._broadcast.add(node.name)
        for name in [n for n in self.target if self._last.get(n, position) < position]:
            del self.target[name]

    def add_node(self, node: TicketNode) -> None:
        """A node of the ticket."""
        self.nodes[node.name] = node
        if node.op == "input" or (node.op not in ("layer", "given") and node.inputs[0] in self._image):
            self._image.add(node.name)

    def add_copies(self, layer: SourceLayer, column: Tensor, entry: Tensor) -> None:
        """A layer each of whose rows is `entry` (R,) times an input channel, or where `column` (R,) is -1 constant."""
        self._copies[layer.name] = (column, entry.to(self.device, torch.float32), column < 0)

    def add_rows(self, name: str, slots: Tensor, values: Tensor) -> None:
        """Outputs (n, len(slots), ...) of rows of a layer."""
        self._rows.setdefault(name, _Rows()).add(slots, values)

    def release(self, layers: Sequence[str]) -> None:
        """Free the outputs of layers: nothing will ask for them any more."""
        for name in layers:
            self._rows.pop(name, None)

    def at(self, name: str, slots: Tensor, samples: Tensor | None = None) -> Tensor:
        """The values of slots at a node of the ticket, (images, len(slots), ...); NaN where a row was not solved.

        Args:
            samples: (N,) flat positions (image, pixel) there: of these alone, (1, len(slots), N).
        """
        node = self.nodes[name]
        if samples is not None and (node.op not in _ELEMENTWISE or name in self._broadcast):
            return gather(self.at(name, slots), samples)[None]
        if node.op == "input":
            return self.images[:, slots.to(self.device)]
        if node.op == "flatten" and name in self._image:
            every = torch.arange(self.images.shape[1])
            return self.at(node.inputs[0], every).flatten(1)[:, slots.to(self.device)]
        if node.op == "layer" and node.attributes["layer"] in self._copies:
            column, entry, constant = self._copies[node.attributes["layer"]]
            x = self.at(node.inputs[0], column[slots].clamp_min(0), samples)
            shape = (-1, *[1] * (x.ndim - 2))
            fixed = constant[slots].to(self.device).view(shape)
            return entry[slots.to(self.device)].view(shape) * torch.where(fixed, 1.0, x)
        if node.op == "layer":
            return self._rows[node.attributes["layer"]].at(slots, samples)
        # of a sum what takes longer first, so that hundreds of megabytes do not wait for it at every block
        order = sorted(node.inputs, key=self._depth, reverse=True)
        values = {before: self.at(before, slots, samples) for before in order}
        inputs = [values.pop(before) if node.inputs.count(before) == 1 else values[before] for before in node.inputs]
        if node.op == "activation":
            return from_attributes(node.attributes).fn(inputs[0])
        if node.op == "batch_norm":
            scale, shift = (t.to(self.device) for t in self.norms[name](slots))
            return operations.scale_and_shift(inputs[0], scale, shift)
        if node.op == "add":
            one, other = inputs if not self._held(inputs[0]) else reversed(inputs)
            return one + other if self._held(one) or name in self._broadcast else one.add_(other)
        # behind a layer the slots of a flatten are the channels of the images in front of it
        return inputs[0] if node.op == "flatten" else operations.OPERATIONS[node.op](inputs, node.attributes)

    def _depth(self, name: str) -> int:
        """How many operations there are since the layers behind a node."""
        node = self.nodes[name]
        return 0 if node.op in ("input", "layer", "given") else 1 + max(map(self._depth, node.inputs))

    def _held(self, values: Tensor) -> bool:
        return values is self.images or any(values is rows.values for rows in self._rows.values())

    def behind(self, name: str, places: Mapping[str, str]) -> Behind:
        """Where the error of the rows of layer `name` is measured.

        Args:
            places: nodes of the target that the ticket has already -> the ticket's.
        """
        layer = self.graph.layers[name]
        node, scale, others = name, torch.ones(len(layer.weight)), []
        while len(after := self.graph.readers(node)) == 1:
            if after[0].batch_norm is not None:
                factor = after[0].batch_norm.scale
                scale = scale * factor
                others = [(ours, theirs, by * factor) for ours, theirs, by in others]
            elif after[0].op == "add" and (beside := [n for n in after[0].inputs if n != node]):
                if beside[0] not in places or self.target[beside[0]].shape != self.target[name].shape:
                    break
                others.append((places[beside[0]], beside[0], torch.ones_like(scale)))
            else:
                break
            node = after[0].name
        return Behind(node, scale, tuple(others))


def _plain(value: Any) -> Any:
    """The value; a number of another type, NumPy's say, as Python's own."""
    if isinstance(value, numbers.Real):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    return value


class _Rows:
    """Outputs of the rows of a layer that were solved."""

    def __init__(self):
        self._where = torch.empty(0, dtype=torch.int64)
        self.values: Tensor | None = None

    def add(self, slots: Tensor, values: Tensor) -> None:
        have = 0 if self.values is None else self.values.shape[1]
        if len(slots) and int(slots.max()) >= len(self._where):
            more = torch.full((int(slots.max()) + 1 - len(self._where),), -1)
            self._where = torch.cat([self._where, more])
        self._where[slots] = torch.arange(have, have + len(slots))
        self.values = values if self.values is None else torch.cat([self.values, values], 1)

    def at(self, slots: Tensor, samples: Tensor | None = None) -> Tensor:
        """Of all positions, or as `Calibration.at` of some."""
        assert self.values is not None
        known = slots < len(self._where)
        where = torch.where(known, self._where[slots.where(known, 0)], -1)
        if samples is None and torch.equal(where, torch.arange(self.values.shape[1])):
            return self.values
        where = where.to(self.values.device)
        found = self.values[:, where] if samples is None else gather(self.values, samples, where)[None]
        if bool((where < 0).any()):
            found[:, where < 0] = math.nan
        return found


@dataclass(frozen=True)
class Samples:
    """Positions of a layer's output, and the elements of its input that are read there.

    output (N,): flat (image, y, x). inputs (K, N): the same of the input, for each tap; -1 in the zero padding.
    """

    output: Tensor
    inputs: Tensor

    @classmethod
    def draw(cls, layer: SourceLayer, inputs: torch.Size, outputs: torch.Size, samples: int, *, seed: int) -> Samples:
        """Random positions, without repetition.

        Args:
            inputs, outputs: shapes (n, C, H, W) or (n, C) of the target's values.
        """
        images = outputs[0]
        if layer.kind == "linear":  # one position for each image; the taps are the pixels
            image = torch.arange(images)
            return cls(image, image * layer.taps + torch.arange(layer.taps)[:, None])
        high, wide = outputs[2:]
        total = images * high * wide
        order = np.random.default_rng([seed, 1, layer.index]).permutation(total)[: min(samples, total)]
        output = torch.from_numpy(order).sort().values
        image, y, x = output // (high * wide), output // wide % high, output % wide
        a, b = torch.meshgrid(*(torch.arange(size) for size in layer.shape[2:]), indexing="ij")
        row = y * layer.stride[0] - layer.padding[0] + a.flatten()[:, None] * layer.dilation[0]
        column = x * layer.stride[1] - layer.padding[1] + b.flatten()[:, None] * layer.dilation[1]
        inside = (row >= 0) & (row < inputs[2]) & (column >= 0) & (column < inputs[3])
        return cls(output, torch.where(inside, (image * inputs[2] + row) * inputs[3] + column, -1))


def gather(values: Tensor, index: Tensor, channels: Tensor | None = None) -> Tensor:
    """Elements (C, N) of values (n, C, ...) at flat positions `index` (N,) over images and pixels; 0 where it is -1.

    Args:
        channels: which ones, (C,) on the device of the values; all in their order where none are named.
    """
    flat = values.flatten(2) if values.ndim > 2 else values[:, :, None]
    index = index.to(values.device)
    image, pixel = index.clamp_min(0) // flat.shape[2], index.clamp_min(0) % flat.shape[2]
    found = flat[image, :, pixel].T if channels is None else flat[image, channels[:, None], pixel]
    return torch.where(index >= 0, found, 0.0)


def apply_rows(
    layer: SourceLayer, rows: Tensor, offsets: Tensor, values: Tensor, many: int, x: Tensor
) -> Tensor:  # fmt: skip
    """Outputs (n, many, ...) of masked rows on x (n, C, ...): entry (rows, offsets i * K + k) has `values`."""
    channels = x.shape[1]
    device = x.device
    if layer.kind == "conv" and device.type == "cpu":
        order = rows.argsort(stable=True)
        convolve = SparseConvolution(
            rows[order], offsets[order], shape=(many, channels), kernel=layer.shape[2:],  # type: ignore[arg-type]
            stride=layer.stride, padding=layer.padding, dilation=layer.dilation,  # type: ignore[arg-type]
        )  # fmt: skip
        return convolve(x, values[order].float(), torch.zeros(many))
    dense = torch.zeros(many, channels * layer.taps, device=device)
    dense[rows.to(device), offsets.to(device)] = values.to(device)
    if layer.kind == "linear":
        return x.flatten(1) @ dense.T
    weight = dense.view(many, channels, *layer.shape[2:])
    return operations.affine(x, weight, None, layer.stride, layer.padding, layer.dilation)
