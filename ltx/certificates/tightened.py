"""What slots are off in front of later activations, each by a pass of its own back to the image.

What goes back from the outputs takes every slot's deviation in front of an activation at its worst, as the forward pass
bounds it. A backward pass from that slot bounds it better: what cancels in front of it does so here too.

There are as many slots as channels times pixels. But behind convolutions that keep the image's size, a pixel that is
further from the border than their reach sees what any other such pixel sees of a shifted image, and the box holds the
shifted image too where its ends are the same at every pixel. So one pass bounds all of them, and one each those near a
border or a corner. None of these passes needs the whole image: one that is as small as can be with a pixel that far
from the border has a pixel that sees the same for each of theirs.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ltx.certificates.backwards import Backwards
from ltx.certificates.forwards import Forwards
from ltx.graph import Graph, Node, leading_to
from ltx.intervals import Interval
from ltx.ticket import Ticket

MOST = 100_000_000_000  # products that an activation's passes take, in some ten seconds; more are not worth their time
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
    read, reaches = ticket.read_channels(), _reaches(target)
    for node in ticket.graph:
        name = node.inputs[0] if node.inputs else ""
        if node.op != "activation" or walk.slots[node.name].copies is not None or name in known:
            continue
        slots = walk.slots[name]
        if slots.image:
            continue
        border = reaches[slots.target]
        live = read[name][slots.labels[read[name]] >= 0]
        if not len(live) or math.isinf(border) or slots.linear is not None or slots.off.low.shape[1:] != shape[1:]:
            continue
        sides = [min(size, 2 * int(border) + 1) for size in shape[1:]]
        pixels = math.prod(sides)
        passes = len(live) * pixels
        if passes * pixels * _products(walk, name) > MOST:
            continue
        small = _in_front(walk, name, sides, known)
        y, x = (_in_small(size, side) for size, side in zip(shape[1:], sides, strict=True))
        known[name] = _bounds(small, name, live)[:, y[:, None], x]
    return known


def _products(walk: Forwards, name: str) -> int:
    """That a pass back from a node takes at each pixel."""
    count = 0
    for node in leading_to(walk.ticket.graph, [name]):
        rows = walk.slots[node.name]
        if node.op == "layer" and rows.copies is None:
            taps = walk.target.layers[rows.target].weight[0, 0].numel()
            count += len(rows.labels) * len(walk.slots[node.inputs[0]].labels) * taps
    return count


def _in_front(walk: Forwards, name: str, sides: list[int], known: dict[str, Interval]) -> Forwards:
    """A walk to one node of the ticket, over images of `sides` (H, W), with what is known of nodes on the way."""
    nodes = leading_to(walk.ticket.graph, [name])
    theirs = leading_to(walk.target.nodes, [walk.slots[node.name].target for node in nodes])
    box = walk.channels["input"]
    y, x = (_in_large(size, side) for size, side in zip(box.low.shape[1:], sides, strict=True))
    there = {node.name: known[node.name][:, y[:, None], x] for node in nodes if node.name in known}
    small = Forwards(replace(walk.ticket, graph=nodes), Graph(theirs), box[:, y[:, None], x], True, there)
    small.run()
    return small


def _bounds(walk: Forwards, name: str, live: Tensor) -> Interval:
    """Bounds of the live slots' deviations at every pixel; of the others none."""
    off = walk.slots[name].off
    low, high = torch.full_like(off.low, -torch.inf), torch.full_like(off.low, torch.inf)
    pixels = torch.cartesian_prod(*(torch.arange(size) for size in low.shape[1:]))
    every = torch.cartesian_prod(live, torch.arange(len(pixels)))
    back = Backwards(walk, repeated=True)
    for some in every.split(AT_ONCE):
        slot, (y, x) = some[:, 0], pixels[some[:, 1]].unbind(1)
        form = torch.zeros(len(some), *off.low.shape, dtype=torch.float64)
        form[torch.arange(len(some)), slot, y, x] = 1.0
        found = back.of(name, form)
        low[slot, y, x], high[slot, y, x] = found.low, found.high
    return Interval(low, high)


def _in_small(size: int, side: int) -> Tensor:
    """For each position along an edge the one of a shorter edge that is as near to either end, or in the middle."""
    at = torch.arange(size)
    return torch.maximum(at.clamp_max(side // 2), at - (size - side))


def _in_large(size: int, side: int) -> Tensor:
    """For each position along the shorter edge the one of the longer that is as near to the end next to it."""
    at = torch.arange(side)
    return at + (at > side // 2) * (size - side)


def _reaches(graph: Graph) -> dict[str, float]:
    """Node -> by how many pixels it sees beyond its own; infinity where pixels are not shifted alone on the way."""
    found: dict[str, float] = {}
    for node in graph.nodes:
        found[node.name] = max((found[other] for other in node.inputs), default=0) + _further(node)
    return found


def _further(node: Node) -> float:
    if node.layer is not None:
        layer = node.layer
        same = layer.kind == "conv" and layer.stride == (1, 1) and all(
            2 * p == d * (k - 1)
            for k, p, d in zip(layer.weight.shape[2:], layer.padding, layer.dilation, strict=True)
        )  # fmt: skip
        return max(layer.padding) if same else math.inf
    return 0 if node.op in ("input", "activation", "batch_norm", "add") else math.inf
