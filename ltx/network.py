"""A ticket as an nn.Module: its graph, run on the masked random parameters of the channels that are read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from ltx import operations
from ltx.activations import Activation, from_attributes
from ltx.defaults import usual_defaults
from ltx.errors import LtxError
from ltx.source import SourceLayer
from ltx.sparse_conv import SPARSE_BELOW, KeptPlaces, SparseConvolution, numbers_alone, serves
from ltx.ticket import Ticket, TicketNode


class TicketNetwork(nn.Module):
    """Runs a ticket on images (N, C, H, W).

    Rows that nothing reads are left out; what is read has exactly the source's values, in buffers of its own, which may
    be changed. Convolutions are dense on a GPU, and on a CPU sparse where that is faster and nothing but a value is
    asked for: with gradients, tangents, `torch.func`, `torch.compile` and exporters they are dense. Entries that were
    zero are noticed by the sparse ones unless they are written past PyTorch's count of changes, in place (`.data`,
    NumPy, DLPack, storages). NaN or infinity in a channel that no kept entry reads is not read: dense, 0 NaN is NaN.
    """

    @usual_defaults()
    def __init__(self, ticket: Ticket, *, dense: bool = False):
        """Args: dense: never take the sparse convolutions."""
        super().__init__()
        self._dense = dense
        self.graph = ticket.graph
        self._activations = _activations(ticket.graph)
        self._layers = {layer.name: layer for layer in ticket.layers}
        self._sparse: dict[str, KeptPlaces] = {}  # made when they are used
        # a tensor without channels is more than torch can convolve: keep one where nothing is read
        self._read = {n: c if len(c) else torch.zeros(1, dtype=torch.int64) for n, c in ticket.read_channels().items()}
        self._keys = {node.name: f"node{position}" for position, node in enumerate(ticket.graph)}
        self._image = image = set[str]()  # nodes before the first layer, which have all of the image's channels
        for node in ticket.graph:
            if node.op == "input" or (node.op not in ("layer", "given") and node.inputs[0] in image):
                image.add(node.name)
            elif node.op == "layer":
                self._add_layer(ticket, node, whole=node.inputs[0] in image)
            elif node.op == "given":
                weight = ticket.given[f"{node.name}.weight"]
                weight = weight.view(len(weight), -1, node.attributes["taps"])[:, self._read[node.inputs[0]]]
                self._hold(node.name, weight.flatten(1), ticket.given[f"{node.name}.bias"].clone())
            elif node.op == "batch_norm":
                scale, shift = (ticket.given[f"{node.name}.{part}"] for part in ("weight", "bias"))
                self._hold(node.name, scale[self._read[node.name]], shift[self._read[node.name]])
            if (
                node.inputs
                and node.op not in ("layer", "given")
                and (node.op == "output" or node.inputs[0] not in image)
            ):
                self._add_narrowing(node)
        self._last_use = {name: n for n, node in enumerate(ticket.graph) for name in node.inputs}

    def _add_layer(self, ticket: Ticket, node: TicketNode, *, whole: bool) -> None:
        """Hold the rows of a source layer that are read, its columns renumbered to the channels that are there."""
        layer = self._layers[node.attributes["layer"]]
        out = self._read[node.name]
        inside = torch.arange(layer.row_size // layer.taps) if whole else self._read[node.inputs[0]]
        rows, offsets, values = ticket.kept(layer.name)
        rows = _positions(out, layer.shape[0])[rows]
        there = rows >= 0
        rows, offsets, values = rows[there], offsets[there], values[there]
        channel = _positions(inside, layer.row_size // layer.taps)[offsets // layer.taps]
        offsets = channel * layer.taps + offsets % layer.taps
        bias = ticket.bias(layer.name)[out]
        inside_shape = (len(inside), *layer.shape[2:]) if layer.kind == "conv" else (len(inside) * layer.taps,)
        shape = torch.Size((len(out), *inside_shape))
        self._hold_entries(node.name, layer, shape, (rows, offsets, values), bias)

    def _hold_entries(
        self, name: str, layer: SourceLayer, shape: torch.Size, entries: tuple[Tensor, Tensor, Tensor], bias: Tensor
    ) -> None:
        """A layer whose entries (rows, offsets, values) are not zero."""
        rows, offsets, values = entries
        dense = torch.zeros(shape)
        dense.flatten(1)[rows, offsets] = values
        self._hold(name, dense, bias)

    def _add_narrowing(self, node: TicketNode) -> None:
        """Hold which of its inputs' channels a node takes, where not all."""
        rows = node.attributes.get("rows")
        wanted = self._read[node.name] if rows is None else torch.tensor(rows, dtype=torch.int64)
        for position, name in enumerate(node.inputs):
            read = self._read[name]
            if not torch.equal(read, wanted):
                index = torch.searchsorted(read, wanted).clamp_max(len(read) - 1)
                self.register_buffer(f"{self._keys[node.name]}_take{position}", index)

    def _hold(self, name: str, weight: Tensor, bias: Tensor) -> None:
        key = self._keys[name]
        self.register_buffer(f"{key}_weight", weight)
        self.register_buffer(f"{key}_bias", bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.run(images)[self.graph[-1].name]

    def run(self, images: Tensor, *, keep: Collection[str] = ()) -> dict[str, Tensor]:
        """The output's value and those of the nodes `keep`, each of the channels that are read."""
        values: dict[str, Tensor] = {}
        for position, node in enumerate(self.graph):
            values[node.name] = images if node.op == "input" else self._run(node, [values[n] for n in node.inputs])
            for name in node.inputs:  # wide tensors: none is held longer than it is read
                if self._last_use[name] == position and name not in keep:
                    values.pop(name, None)
        return values

    def channels(self, node: str) -> Tensor:
        """The channels of a node that are read: those that its tensor here has."""
        return self._read[node]

    def _run(self, node: TicketNode, inputs: list[Tensor]) -> Tensor:
        x = inputs[0]
        if node.op in ("layer", "given"):
            return self._apply_layer(node, x)
        if node.op == "output":
            x = self._narrow(x, node, 0)
            return x.flatten(1) if node.attributes.get("flatten") else x
        if node.inputs[0] not in self._image:
            inputs = [self._narrow(x, node, position) for position, x in enumerate(inputs)]
            x = inputs[0]
        if node.op == "activation":
            return self._activation(node, x)
        if node.op == "batch_norm":
            return operations.scale_and_shift(x, *self._held(node.name))
        return operations.OPERATIONS[node.op](inputs, node.attributes)

    def _activation(self, node: TicketNode, x: Tensor) -> Tensor:
        return self._activations[node.name].fn(x)

    def _narrow(self, x: Tensor, node: TicketNode, position: int) -> Tensor:
        """Of an input of a node the channels that the node takes."""
        key = f"{self._keys[node.name]}_take{position}"
        if not hasattr(self, key):
            return x
        if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):  # and so it stays
            return x.permute(0, 2, 3, 1)[..., self.get_buffer(key)].permute(0, 3, 1, 2)
        return x[:, self.get_buffer(key)]

    def _held(self, name: str) -> tuple[Tensor, Tensor]:
        """Buffers, or parameters that have taken their place."""
        key = self._keys[name]
        return getattr(self, f"{key}_weight"), getattr(self, f"{key}_bias")

    def _apply_layer(self, node: TicketNode, x: Tensor) -> Tensor:
        weight, bias = self._held(node.name)
        if node.op == "given":
            return operations.affine(x, weight, bias)
        layer = self._layers[node.attributes["layer"]]
        if weight.requires_grad and node.name in self._sparse:  # trained, maybe by a fused optimiser, then frozen
            del self._sparse[node.name]
        if not self._dense and serves(x, weight, bias):
            known = self._sparse.get(node.name)
            if known is None or not known.are_of(weight):
                self._sparse[node.name] = known = KeptPlaces.of(weight, layer)
            if known.convolution is not None and known.convolution.takes(x):
                return known.convolution(x, weight.reshape(-1)[known.places], bias)
        return operations.affine(x, weight, bias, layer.stride, layer.padding, layer.dilation)

    def __getstate__(self) -> dict:
        """Without sparse convolutions, for a copy has buffers of its own, and functions: they are made again."""
        return {**self.__dict__, "_sparse": {}, "_activations": {}}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._activations = _activations(self.graph)

    def _apply(self, fn: Callable, recurse: bool = True) -> TicketNetwork:
        """The storage of weights that move elsewhere is let go."""
        self._sparse.clear()
        return super()._apply(fn, recurse)


class SparseNetwork(TicketNetwork):
    """The same outputs on a CPU, in float32, of kept entries: kernels that are mostly empty are nowhere as a whole.

    In L+1 those of wide networks are gigabytes. Anything but outputs (gradients, tangents, `torch.compile`,
    other types and devices) is refused when it is run, as an LtxError.
    """

    def __init__(self, ticket: Ticket):
        self._convolutions: dict[str, SparseConvolution] = {}
        super().__init__(ticket)

    def _hold_entries(
        self, name: str, layer: SourceLayer, shape: torch.Size, entries: tuple[Tensor, Tensor, Tensor], bias: Tensor
    ) -> None:
        rows, offsets, values = entries
        if layer.kind == "linear" or len(rows) >= SPARSE_BELOW * shape.numel():
            super()._hold_entries(name, layer, shape, entries, bias)
            return
        self._convolutions[name] = SparseConvolution.of(layer, shape, rows, offsets)
        self.register_buffer(f"{self._keys[name]}_values", values)
        self.register_buffer(f"{self._keys[name]}_bias", bias)

    def _apply_layer(self, node: TicketNode, x: Tensor) -> Tensor:
        convolution, key = self._convolutions.get(node.name), self._keys[node.name]
        if convolution is None:
            return super()._apply_layer(node, x)
        values, bias = getattr(self, f"{key}_values"), getattr(self, f"{key}_bias")
        if not numbers_alone(x, values, bias):
            raise LtxError(
                f"node '{node.name}': this module gives outputs alone, in float32 on the CPU, without gradients "
                "(torch.no_grad()) and not compiled; use ticket.to_module()"
            )
        return convolution(x, values, bias)


def _positions(channels: Tensor, many: int) -> Tensor:
    """Where each of so many channels is among `channels`; -1: nowhere."""
    found = torch.full((many,), -1)
    found[channels] = torch.arange(len(channels))
    return found


def _activations(graph: Sequence[TicketNode]) -> dict[str, Activation]:
    return {node.name: from_attributes(node.attributes) for node in graph if node.op == "activation"}
