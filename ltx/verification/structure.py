"""Is a ticket a subnetwork of the source that its seed defines? Nothing of the target is needed to tell."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ltx.activations import from_attributes
from ltx.errors import LtxError
from ltx.subset_sum.limits import MAX_BASE_SET_SIZE
from ltx.ticket import CONSTANT, Ticket


def structure(ticket: Ticket) -> Iterator[str]:
    """Violations of: indices in range, sorted, unique; widths that fit each other; a source of layers 0, 1, ..."""
    if bool(ticket.feedback) != (ticket.selection == "feedback"):
        yield f"selection '{ticket.selection}' {'with' if ticket.feedback else 'without'} settings of feedback"
    if ticket.construction not in ("2L", "L+1") or ticket.selection not in ("smallest", "best", "feedback"):
        yield f"construction '{ticket.construction}' or selection '{ticket.selection}' is not known"
    if not (0 <= ticket.seed < 2**64 and 1 <= ticket.base_set_size <= MAX_BASE_SET_SIZE):
        size = f"base_set_size {ticket.base_set_size} not from 1 to {MAX_BASE_SET_SIZE}"
        yield f"seed {ticket.seed} is not below 2**64, or {size}"
        return
    for names in ([layer.name for layer in ticket.layers], [node.name for node in ticket.graph]):
        if len(set(names)) < len(names):
            yield f"graph: several nodes or layers have one name: {sorted({n for n in names if names.count(n) > 1})}"
            return
    for name, tensor in ticket.given.items():
        if tensor.dtype != torch.float32:
            yield f"given.{name}: must be float32, is {tensor.dtype}"
        elif not bool(tensor.isfinite().all()):
            yield f"given.{name}: has NaN or infinite entries"
    if not (math.isfinite(ticket.epsilon) and ticket.epsilon > 0):
        yield f"epsilon {ticket.epsilon} is not a positive number"
    if not (math.isfinite(ticket.input_low) and ticket.input_low < ticket.input_high < math.inf):
        yield f"input range {ticket.input_low} to {ticket.input_high} is none"
    for position, layer in enumerate(ticket.layers):
        if not (math.isfinite(layer.sigma) and layer.sigma > 0):
            yield f"layer {layer.name}: sigma {layer.sigma} is not a positive number"
        elif torch.tensor(layer.sigma).item() != layer.sigma:
            yield f"layer {layer.name}: sigma {layer.sigma} is not exact in float32"
        if (
            layer.kind not in ("conv", "linear")
            or layer.opposite not in ("none", "rows", "columns")
            or layer.role not in ("copies", "pair", "direct")
        ):
            yield f"layer {layer.name}: kind, opposite or role ({layer.kind}, {layer.opposite}, {layer.role}) not known"
        if len(layer.shape) != (4 if layer.kind == "conv" else 2) or min(*layer.shape, layer.taps) < 1:
            yield f"layer {layer.name}: shape {layer.shape} with {layer.taps} taps is none"
            return
        if layer.row_size % layer.taps or (layer.kind == "conv" and layer.taps != math.prod(layer.shape[2:])):
            yield f"layer {layer.name}: a channel is read by other than {layer.taps} entries of shape {layer.shape}"
            return
        if (
            any(len(two) != 2 for two in (layer.stride, layer.padding, layer.dilation))
            or min(*layer.stride, *layer.dilation, *(n + 1 for n in layer.padding)) < 1
        ):
            how = f"stride {layer.stride}, padding {layer.padding} or dilation {layer.dilation}"
            yield f"layer {layer.name}: {how} is none"
            return
        if layer.index != position:
            yield f"layer {layer.name}: index {layer.index}, but it is layer {position} of the source"
        if layer.bias != (position == 0):
            yield f"layer {layer.name}: only the first layer of a source has biases, and it has them"
        size = layer.shape[0] * layer.row_size
        claims = ticket.errors.get(layer.name)
        if claims is not None and claims.shape != (layer.shape[0],):
            yield f"{layer.name}.error: has shape {tuple(claims.shape)}, not ({layer.shape[0]},)"
        if claims is not None and bool(claims.isinf().any()):
            yield f"{layer.name}.error: claims an infinite error"
        if ticket.feedback and layer.role != "copies" and claims is None:
            yield f"layer {layer.name}: claims no errors of its rows, as a ticket with feedback does"
        yield from _indices(f"{layer.name}.mask", ticket.masks[layer.name], size)
        if layer.name in ticket.bias_masks:
            size = layer.shape[0] if layer.bias else 0
            yield from _indices(f"{layer.name}.bias_mask", ticket.bias_masks[layer.name], size)
        slots = ticket.slots[layer.name]
        if slots.shape != (layer.shape[0],) or slots.dtype != torch.int64:
            yield f"{layer.name}.slots: has shape {tuple(slots.shape)}, {slots.dtype}, not ({layer.shape[0]},), int64"
        elif int(ticket.slots[layer.name].min()) < CONSTANT:
            yield f"{layer.name}.slots: {int(ticket.slots[layer.name].min())} is no label"
    yield from _graph(ticket)


def _graph(ticket: Ticket) -> Iterator[str]:
    """Violations of: known operations on earlier nodes; the source's layers in order; widths that fit."""
    widths: dict[str, int | None] = {}  # node -> channels; None: the image
    names = [layer.name for layer in ticket.layers]
    used = []
    for node in ticket.graph:
        needs = _ATTRIBUTES.get(node.op)
        if needs is None or not all(a in node.attributes for a in needs):
            yield f"graph: node '{node.name}' has operation '{node.op}' with {sorted(node.attributes)}, not known"
            return
        if node.op == "activation":
            try:
                from_attributes(node.attributes)
            except LtxError as error:
                yield f"graph: node '{node.name}': {error}"
                return
        reads = {"input": 0, "add": 2}.get(node.op, 1)
        if len(node.inputs) != reads or any(name not in widths for name in node.inputs):
            yield f"graph: node '{node.name}' reads {list(node.inputs)}, which are not there before it"
            return
        before = widths[node.inputs[0]] if node.inputs else None
        widths[node.name] = before
        if node.op == "layer":
            used.append(node.attributes["layer"])
            if used[-1] not in names:
                break
            layer = ticket.layer(used[-1])
            if ticket.construction == "2L" and layer.role == "direct":
                yield f"layer {layer.name}: stands alone, in 2L there are pairs"
            if ticket.construction == "L+1" and layer.role == "copies" and before is not None:
                yield f"layer {layer.name}: is of a pair, in L+1 they are in front of the image alone"
            if before is not None and layer.row_size != before * layer.taps:
                yield f"layer {layer.name}: reads {layer.row_size // layer.taps} channels, there are {before}"
            widths[node.name] = layer.shape[0]
        elif node.op == "given":
            weight = ticket.given.get(f"{node.name}.weight")
            bias = ticket.given.get(f"{node.name}.bias")
            if weight is None or bias is None or before is None:
                yield f"graph: node '{node.name}' has no given parameters"
                return
            if weight.ndim != 2 or bias.shape != (len(weight),):
                yield f"node {node.name}: its given parameters have shapes {tuple(weight.shape)}, {tuple(bias.shape)}"
                return
            if weight.shape[1] != before * node.attributes["taps"]:
                yield f"node {node.name}: its given weight reads {weight.shape[1]} values, there are others"
            widths[node.name] = len(weight)
        elif node.op == "batch_norm":
            parts = [ticket.given.get(f"{node.name}.{part}") for part in ("weight", "bias")]
            if before is None or any(part is None or part.shape != (before,) for part in parts):
                yield f"graph: batch norm '{node.name}' has not one given scale and shift for each of its channels"
                return
        elif node.op == "add" and (before is None or before != widths[node.inputs[1]]):
            yield f"graph: node '{node.name}' adds {before} channels and {widths[node.inputs[1]]}"
            return
        elif node.op == "output" and not all(0 <= r < (before or 0) for r in node.attributes["rows"]):
            yield f"output: its rows lie outside the {before} that there are"
    if [node.op for node in ticket.graph].count("output") != 1 or ticket.graph[-1].op != "output":
        yield "graph: must have one output, as its last node"
    if used != names:
        yield f"graph: applies the layers {used}, the source has {names}"


_ATTRIBUTES = {
    "input": (), "layer": ("layer",), "given": ("target", "taps"), "activation": ("function",), "flatten": (),
    "max_pool": ("kernel_size", "stride", "padding"), "avg_pool": ("kernel_size", "stride"), "output": ("rows",),
    "batch_norm": (), "add": (), "adaptive_avg_pool": ("output_size",),
}  # fmt: skip


def _indices(name: str, mask: Tensor, size: int) -> Iterator[str]:
    if mask.dtype != torch.int64 or mask.ndim != 1:
        yield f"{name}: must be int64 and one-dimensional, is {mask.dtype} {tuple(mask.shape)}"
    elif len(mask) and not (int(mask.min()) >= 0 and int(mask.max()) < size):
        yield f"{name}: index {int(mask.min() if mask.min() < 0 else mask.max())} lies outside 0 to {size - 1}"
    elif len(mask) > 1 and not (mask[1:] > mask[:-1]).all():
        at = int((mask[1:] <= mask[:-1]).nonzero()[0])
        yield f"{name}: not sorted or not unique at position {at + 1} ({int(mask[at])}, {int(mask[at + 1])})"
