"""A ticket as an nn.Module: its graph, run on the masked random parameters of the channels that are read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ltx import operations
from ltx.activations import Activation, from_attributes
from ltx.defaults import usual_defaults
from ltx.source import SourceLayer
from ltx.sparse_conv import SparseConvolution
from ltx.ticket import Ticket, TicketNode

SPARSE_BELOW = 0.25  # density under which the sparse convolution beats the dense one on a CPU


class TicketNetwork(nn.Module):
    """Runs a ticket on images (N, C, H, W).

    Rows that nothing reads are left out; what is read has exactly the source's values, in buffers of its own, which may
    be changed. Convolutions are dense on a GPU, and on a CPU sparse where that is faster and nothing but a value is
    asked for: with gradients, tangents, `torch.func`, `torch.compile` and exporters they are dense. Entries that were
    zero are noticed by the sparse ones unless they are written past PyTorch, in place (`.data`, NumPy).
    """

    @usual_defaults()
    def __init__(self, ticket: Ticket, *, dense: bool = False):
        """Args: dense: never take the sparse convolutions."""
        super().__init__()
        self._dense = dense
        self.graph = ticket.graph
        self._activations = _activations(ticket.graph)
        self._layers = {layer.name: layer for layer in ticket.layers}
        self._sparse: dict[str, _Sparse] = {}  # made when they are used
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
        there = torch.isin(rows, out)
        rows, values = torch.searchsorted(out, rows[there]), values[there]
        channel, tap = offsets[there] // layer.taps, offsets[there] % layer.taps
        offsets = torch.searchsorted(inside, channel) * layer.taps + tap
        bias = ticket.bias(layer.name)[out]
        dense = torch.zeros(len(out), len(inside) * layer.taps)
        dense[rows, offsets] = values
        shape = (len(out), len(inside), *layer.shape[2:]) if layer.kind == "conv" else dense.shape
        self._hold(node.name, dense.view(shape), bias)

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
        if not (self._dense or bias is None) and _value_alone(x, weight, bias) and _fits(x, weight, bias, layer):
            sparse = self._sparse.get(node.name)
            if sparse is None or not sparse.is_of(weight):
                self._sparse[node.name] = sparse = _Sparse.of(weight, layer)
            if sparse.convolution is not None:
                return sparse.convolution(x, weight.reshape(-1)[sparse.places], bias)
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


def _activations(graph: Sequence[TicketNode]) -> dict[str, Activation]:
    return {node.name: from_attributes(node.attributes) for node in graph if node.op == "activation"}


@dataclass(frozen=True)
class _Sparse:
    """Where a convolution's weight is not zero."""

    state: tuple
    storage: torch.UntypedStorage  # held, so that no other one comes to lie in its place
    places: Tensor  # flat
    convolution: SparseConvolution | None  # None where too much is kept

    @classmethod
    def of(cls, weight: Tensor, layer: SourceLayer) -> _Sparse:
        places = weight.reshape(-1).nonzero()[:, 0]
        convolution, row_size = None, weight[0].numel()
        if len(places) < SPARSE_BELOW * weight.numel():
            convolution = SparseConvolution(
                places // row_size, places % row_size, shape=weight.shape[:2], kernel=weight.shape[2:],  # type: ignore[arg-type]
                stride=layer.stride, padding=layer.padding, dilation=layer.dilation,  # type: ignore[arg-type]
            )  # fmt: skip
        return cls(cls._state(weight), weight.untyped_storage(), places, convolution)

    def is_of(self, weight: Tensor) -> bool:
        return self.state == self._state(weight)

    @staticmethod
    def _state(weight: Tensor) -> tuple:
        """What changes with the weight."""
        return weight.data_ptr(), weight.shape, weight.stride(), weight._version


def _value_alone(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether these are numbers in memory, and nothing but an output in float32 is asked of them."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _get_current_dispatch_mode():  # type: ignore[attr-defined]
        return False
    if weight.requires_grad or bias.requires_grad or (x.requires_grad and torch.is_grad_enabled()):
        return False  # fused optimisers change parameters uncounted
    return not weight.is_inference() and all(  # nor are changes of inference tensors counted
        t.device.type == "cpu" and t.dtype == torch.float32 and _in_memory(t)
        and forward_ad.unpack_dual(t).tangent is None
        for t in (x, weight, bias)
    )  # fmt: skip


def _in_memory(tensor: Tensor) -> bool:
    """Not so within `torch.func` or among fake tensors."""
    if torch._is_functional_tensor(tensor):  # type: ignore[attr-defined]
        return False
    try:
        tensor.detach().numpy()
    except RuntimeError:
        return False
    return True


def _fits(x: Tensor, weight: Tensor, bias: Tensor, layer: SourceLayer) -> bool:
    """Whether there is a convolution of these shapes; what is wrong with others PyTorch says."""
    return (
        x.ndim == weight.ndim == 4 and x.shape[1] == weight.shape[1]
        and bias.shape == weight.shape[:1] and weight.numel() > 0
        and all(
            size + 2 * padding > dilation * (kernel - 1)
            for size, padding, dilation, kernel in zip(
                x.shape[2:], layer.padding, layer.dilation, weight.shape[2:], strict=True
            )
        )
    )  # fmt: skip
