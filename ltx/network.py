"""A ticket as an nn.Module: its graph, run on the masked random parameters of the channels that are read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ltx.activations import from_attributes
from ltx.sparse_conv import SparseConvolution
from ltx.ticket import Ticket, TicketNode

SPARSE_BELOW = 0.05  # density under which the sparse convolution beats the dense one on a CPU


class TicketNetwork(nn.Module):
    """Runs a ticket on images (N, C, H, W).

    Rows that nothing reads are left out; what is read has exactly the source's values. Convolutions are dense
    on a GPU, and on a CPU sparse where that is faster.
    """

    def __init__(self, ticket: Ticket):
        super().__init__()
        self.graph = ticket.graph
        self._layers = {layer.name: layer for layer in ticket.layers}
        self._sparse: dict[str, SparseConvolution] = {}
        # a tensor without channels is more than torch can convolve: keep one where nothing is read
        self._read = {n: c if len(c) else torch.zeros(1, dtype=torch.int64) for n, c in ticket.read_channels().items()}
        self._keys = {node.name: f"node{position}" for position, node in enumerate(ticket.graph)}
        image: set[str] = set()  # nodes before the first layer, which have all of the image's channels
        for node in ticket.graph:
            if node.op == "input" or (node.op not in ("layer", "given") and node.inputs[0] in image):
                image.add(node.name)
            elif node.op == "layer":
                self._add_layer(ticket, node, whole=node.inputs[0] in image)
            elif node.op == "given":
                weight = ticket.given[f"{node.name}.weight"]
                weight = weight.view(len(weight), -1, node.attributes["taps"])[:, self._read[node.inputs[0]]]
                self._hold(node.name, weight.flatten(1), ticket.given[f"{node.name}.bias"])

    def _add_layer(self, ticket: Ticket, node: TicketNode, *, whole: bool) -> None:
        """Hold the rows of a source layer that are read, its columns renumbered to the channels that are there."""
        layer = self._layers[node.attributes["layer"]]
        out = self._read[node.name]
        inside = torch.arange(layer.row_size // layer.taps) if whole else self._read[node.inputs[0]]
        rows, offsets, values = ticket.kept(layer.name)
        there = torch.isin(rows, out)
        rows, values = torch.searchsorted(out, rows[there]), values[there]
        channel, tap = offsets[there] // layer.taps, offsets[there] % layer.taps
        offsets = torch.searchsorted(inside, channel) * layer.taps + tap
        bias = ticket.bias(layer.name)[out]
        dense = torch.zeros(len(out), len(inside) * layer.taps)
        dense[rows, offsets] = values
        shape = (len(out), len(inside), *layer.shape[2:]) if layer.kind == "conv" else dense.shape
        self._hold(node.name, dense.view(shape), bias)
        if layer.kind == "conv" and len(values) < SPARSE_BELOW * dense.numel():
            self._sparse[node.name] = SparseConvolution(
                rows, offsets, values, bias, channels=len(inside), kernel=layer.shape[2:],  # type: ignore[arg-type]
                stride=layer.stride, padding=layer.padding, dilation=layer.dilation,  # type: ignore[arg-type]
            )  # fmt: skip

    def _hold(self, name: str, weight: Tensor, bias: Tensor) -> None:
        key = self._keys[name]
        self.register_buffer(f"{key}_weight", weight)
        self.register_buffer(f"{key}_bias", bias)

    def forward(self, images: Tensor) -> Tensor:
        values: dict[str, Tensor] = {}
        for node in self.graph:
            values[node.name] = images if node.op == "input" else self._run(node, values[node.inputs[0]])
        return values[self.graph[-1].name]

    def _run(self, node: TicketNode, x: Tensor) -> Tensor:
        if node.op in ("layer", "given"):
            return self._apply_layer(node, x)
        if node.op == "activation":
            return from_attributes(node.attributes).fn(x)
        if node.op == "flatten":
            return x.flatten(1)
        if node.op == "max_pool":
            return nn.functional.max_pool2d(
                x, node.attributes["kernel_size"], node.attributes["stride"], node.attributes["padding"]
            )
        if node.op == "output":
            rows = torch.tensor(node.attributes["rows"])
            x = x[:, torch.searchsorted(self._read[node.inputs[0]], rows)]
            return x.flatten(1) if node.attributes.get("flatten") else x
        raise ValueError(f"node '{node.name}': operation '{node.op}' is not known")

    def _apply_layer(self, node: TicketNode, x: Tensor) -> Tensor:
        sparse = self._sparse.get(node.name)
        if sparse is not None and x.device.type == "cpu" and x.dtype == torch.float32 and not x.requires_grad:
            return sparse(x)
        key = self._keys[node.name]
        weight, bias = self.get_buffer(f"{key}_weight"), self.get_buffer(f"{key}_bias")
        if weight.ndim == 2:
            return nn.functional.linear(x, weight, bias)
        layer = self._layers[node.attributes["layer"]]
        return nn.functional.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation)
