"""What slots are off in front of later activations, each by a pass of its own back to the image.

What goes back from the outputs takes every slot's deviation in front of an activation at its worst, as the forward pass
bounds it. A backward pass from that slot bounds it better: what cancels in front of it does so here too.

There are as many slots as channels times pixels. But behind convolutions that keep the image's size, a pixel that is
further from the border than their reach sees what any other such pixel sees of a shifted image, and the box holds the
shifted image too where its ends are the same at every pixel. So one pass bounds all of them, and one each those near a
border or a corner.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ltx.certificates.backwards import Backwards
from ltx.certificates.forwards import Forwards
from ltx.graph import Graph
from ltx.intervals import Interval
from ltx.ticket import Ticket

MAX_FORMS = 2048  # backward passes for an activation; more are not worth their time
AT_ONCE = 32


def tightened(ticket: Ticket, target: Graph, low: Tensor, high: Tensor) -> dict[str, Interval]:
    """Node in front of an activation -> better bounds of its slots' deviations, where that is possible.

    Args:
        low, high: (C, H, W) float64, a box that is taken as wide as its widest pixel.
    """
    shape, known = low.shape, {}
    ends = (part.view(-1, 1, 1).expand(shape).contiguous() for part in (low.amin((1, 2)), high.amax((1, 2))))
    box = Interval(*ends)
    walk = Forwards(ticket, target, box, True)
    walk.run()
    read = ticket.read_channels()
    for node in ticket.graph:
        name = node.inputs[0] if node.inputs else ""
        if node.op != "activation" or walk.slots[node.name].copies is not None or name in known:
            continue
        slots = walk.slots[name]
        if slots.image:
            continue
        border = _reach(target, slots.target)
        live = read[name][slots.labels[read[name]] >= 0]
        if not len(live) or border is None or slots.linear is not None or slots.off.low.shape[1:] != shape[1:]:
            continue
        rows, columns = (_classes(size, border) for size in shape[1:])
        if len(live) * len(rows.unique()) * len(columns.unique()) > MAX_FORMS:
            continue
        known[name] = _bounds(walk, name, live, rows, columns)
        walk = Forwards(ticket, target, box, True, known)
        walk.run()
    return known


def _bounds(walk: Forwards, name: str, live: Tensor, rows: Tensor, columns: Tensor) -> Interval:
    off = walk.slots[name].off
    low, high = torch.full_like(off.low, -torch.inf), torch.full_like(off.low, torch.inf)
    pixels = torch.cartesian_prod(rows.unique(), columns.unique())
    every = torch.cartesian_prod(live, torch.arange(len(pixels)))
    back = Backwards(walk, repeated=True)
    for some in every.split(AT_ONCE):
        slot, (y, x) = some[:, 0], pixels[some[:, 1]].unbind(1)
        form = torch.zeros(len(some), *off.low.shape, dtype=torch.float64)
        form[torch.arange(len(some)), slot, y, x] = 1.0
        found = back.of(name, form)
        low[slot, y, x], high[slot, y, x] = found.low, found.high
    where = torch.arange(len(low))[:, None, None], rows[:, None], columns
    return Interval(low[where], high[where])


def _classes(size: int, border: int) -> Tensor:
    """For each position along an edge one that sees the same of a shifted image, (size,)."""
    at = torch.arange(size)
    inner = (at >= border) & (at < size - border)
    return torch.where(inner, min(border, size - 1), at)


def _reach(graph: Graph, name: str) -> int | None:
    """By how many pixels a node sees beyond its own; None where pixels are not shifted alone on the way."""
    node = graph[name]
    if node.op == "input":
        return 0
    before = [_reach(graph, other) for other in node.inputs]
    if any(reach is None for reach in before):
        return None
    largest = max(reach for reach in before if reach is not None)
    if node.layer is not None:
        layer = node.layer
        same = layer.kind == "conv" and layer.stride == (1, 1) and all(
            2 * p == d * (k - 1)
            for k, p, d in zip(layer.weight.shape[2:], layer.padding, layer.dilation, strict=True)
        )  # fmt: skip
        return largest + max(layer.padding) if same else None
    return largest if node.op in ("activation", "batch_norm", "add") else None
