"""From the outputs back to the image: each output's deviation as a linear form of what is in front of a node.

Bounds that are formed layer by layer take each slot at its worst. A linear form keeps what cancels between slots,
pixels and layers: where an activation's slope lies between s - r and s + r, a deviation d becomes s d, which is
followed, and at most r |d|, which is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from ltx import operations
from ltx.activations import Activation, from_attributes
from ltx.certificates.forwards import Forwards, Part, Rows, Slots
from ltx.certificates.together import together
from ltx.graph import Node
from ltx.intervals import TINY, UNIT, Interval
from ltx.ticket import TicketNode


class Backwards:
    """The forms that are still to be followed, and the sum of what is known."""

    def __init__(self, walk: Forwards, *, repeated: bool = False):
        """repeated: whether so many passes are made that what each needs of the nodes on its way is worth keeping."""
        self.walk = walk
        self._kept: dict[tuple[str, str], tuple] | None = {} if repeated else None
        self.off: dict[str, Tensor] = {}  # ticket's node -> (O, C, ...) of its slots' deviations
        self.theirs: dict[str, Tensor] = {}  # target's node -> the same of its channels
        self.sum = Interval.exactly(torch.zeros(0))

    def run(self) -> Interval:
        """Bounds of the outputs' deviations, (O,)."""
        last = self.walk.ticket.graph[-1]
        many = self.walk.slots[last.name].off.low.numel()
        before = self.walk.slots[last.inputs[0]].off.low
        rows = torch.tensor(last.attributes["rows"], dtype=torch.int64)
        form = torch.zeros(many, *before.shape, dtype=torch.float64)
        form[:, rows] = torch.eye(many, dtype=torch.float64).view(-1, *before[rows].shape)
        return self.of(last.inputs[0], form)

    def of(self, name: str, form: Tensor) -> Interval:
        """Bounds of forms (O, C, ...) of the deviations at a node of the ticket, (O,)."""
        walk, nodes = self.walk, self.walk.ticket.graph
        self.sum = Interval.exactly(torch.zeros(len(form)))
        self.off[name] = form
        for node in reversed(nodes[: [node.name for node in nodes].index(name) + 1]):
            if node.name in self.off:
                self._ticket(node, self.off.pop(node.name))
        for node in reversed(walk.target.nodes):
            if node.name in self.theirs:
                self._target(node, self.theirs.pop(node.name))
        return self.sum

    def _ticket(self, node: TicketNode, form: Tensor) -> None:
        walk = self.walk
        mine = walk.slots[node.name]
        if node.op == "input":
            return  # the image itself, which is not off
        if node.op == "flatten":
            before = walk.slots[node.inputs[0]].off.low
            self._follow(self.off, node.inputs[0], form.view(len(form), *before.shape))
            return
        there = mine.labels >= 0  # the others' values are known
        if not bool(there.all()):
            self._known(form[:, ~there], mine.off[~there])
            form = form * there.view(-1, *[1] * (form.ndim - 2))
        before = walk.slots[node.inputs[0]]
        if (
            node.op == "activation"
            and before.linear is not None
            and math.isfinite(from_attributes(node.attributes).curvature)
        ):
            slope, rest = together(walk, node, form)
            self.sum = self.sum + rest
            self._follow(self.off, node.inputs[0], form * slope, before.off)
        elif node.op == "activation":
            slope, beside = self._once(("ticket", node.name), lambda: self._slope(node))
            self._known(form, beside)
            self._follow(self.off, node.inputs[0], form * slope, before.off)
        elif node.op == "batch_norm":
            scale, _, apart, shift = (part.view(-1, *[1] * (form.ndim - 2)) for part in walk.norms(node, before))
            self._known(form, Interval.exactly(shift.expand(mine.off.low.shape)))
            self._follow(self.off, node.inputs[0], form * scale, before.off)
            self._channels_of(before, form * apart)
        elif node.op == "add":
            for name in node.inputs:  # of which one may be broadcast
                off = walk.slots[name].off
                self._follow(self.off, name, form.sum_to_size(len(form), *off.low.shape), off)
        elif node.op in operations.AVERAGES:
            self._follow(
                self.off,
                node.inputs[0],
                _pulled(lambda x: operations.OPERATIONS[node.op]([x], node.attributes), before.off.low, form),
                before.off,
            )
        elif node.op == "max_pool":
            self._known(form, mine.off)
        else:
            name = node.inputs[0]
            while walk.slots[name].copies is not None:  # a pair: what its copies read
                name = next(n for n in walk.ticket.graph if n.name == name).inputs[0]
            rows, parts = self._once(("ticket", node.name), lambda: self._layer(node))
            self._known(form, Interval.exactly(rows.bias.view(-1, *[1] * (form.ndim - 2)).expand(mine.off.low.shape)))
            there = _SomeRows.of(form)
            for part in parts if len(there.which) else ():
                self._part(part, self._back(there, part.weight, part.terms, rows.how, part.x), name)

    def _slope(self, node: TicketNode) -> tuple[Tensor, Interval]:
        slope = self.walk.slope(node)
        return slope, self.walk.beside(node, slope)

    def _layer(self, node: TicketNode) -> tuple[Rows, Iterable[Part]]:
        before = self.walk.slots[node.inputs[0]]
        rows = self.walk.layer(node, before)
        parts = self.walk.parts(rows, before)  # one at a time, since they are wide
        return rows, parts if self._kept is None else list(parts)

    def _once(self, node: tuple[str, str], make: Callable[[], tuple]) -> tuple:
        """What a node (of which network, its name) needs for a pass; made anew where passes are not repeated."""
        if self._kept is None:
            return make()
        if node not in self._kept:
            self._kept[node] = make()
        return self._kept[node]

    def _back(self, rows: _SomeRows, weight: Tensor, terms: Tensor, how: tuple, x: Interval) -> Tensor:
        """A form of what a layer reads, x, from that of its rows; its rounding is added to the sum."""
        gamma = 4 * (weight.numel() + 16) * UNIT
        size = rows.sizes @ terms[rows.which].flatten(1).sum(1)
        self.sum = self.sum.widened((size * gamma + TINY) * x.magnitude.max())
        return _through(weight[rows.which], how, x.low, rows.form)

    def _part(self, part: Part, found: Tensor, name: str) -> None:
        """Add a form of what a part of a layer reads."""
        before = self.walk.slots[name]
        if part.of == "":
            self._known(found, part.x)
            return
        found = found.view(len(found), -1, *before.off.low.shape[1:])
        if part.of in ("off", "own"):
            self._follow(self.off, name, found)
        if part.of == "own":
            self._channels_of(before, found)
        elif part.of == "theirs":
            self._channels(before, found)

    def _channels_of(self, before: Slots, form: Tensor) -> None:
        """A form of the channels that the slots in front stand for."""
        there = before.labels >= 0
        many = len(self.walk.target_channels(before).low)
        theirs = torch.zeros(len(form), many, *form.shape[2:], dtype=form.dtype)
        self._channels(before, theirs.index_add_(1, before.labels[there], form[:, there]))

    def _channels(self, before: Slots, form: Tensor) -> None:
        """A form of the target's channels in front."""
        self._follow(self.theirs, before.target, form.reshape(len(form), *self.walk.channels[before.target].low.shape))

    def _target(self, node: Node, form: Tensor) -> None:
        walk, mine = self.walk, self.walk.channels[node.name]
        if node.op == "input" or node.op == "max_pool":
            self._known(form, mine)
            return
        name = node.inputs[0]
        before = walk.channels[name]
        if node.layer is not None:
            layer = node.layer
            how = (layer.stride, layer.padding, layer.dilation)
            self._known(form, Interval.exactly(layer.bias.view(-1, *[1] * (form.ndim - 2)).expand(mine.low.shape)))
            there, weight = _SomeRows.of(form), layer.weight.double()
            if len(there.which):
                self._follow(self.theirs, name, self._back(there, weight, weight.abs(), how, before))
        elif node.activation is not None:
            phi = node.activation
            chord, rest = self._once(("target", node.name), lambda: _chord(phi, before))
            self._known(form, rest)
            self._follow(self.theirs, name, form * chord, before)
        elif node.batch_norm is not None:
            scale, shift = (
                p.double().view(-1, *[1] * (form.ndim - 2)) for p in (node.batch_norm.scale, node.batch_norm.shift)
            )
            self._known(form, Interval.exactly(shift.expand(mine.low.shape)))
            self._follow(self.theirs, name, form * scale, before)
        elif node.op == "add":
            for name in node.inputs:
                summand = walk.channels[name]
                self._follow(self.theirs, name, form.sum_to_size(len(form), *summand.low.shape), summand)
        elif node.op in operations.AVERAGES:
            self._follow(
                self.theirs,
                name,
                _pulled(lambda x: operations.OPERATIONS[node.op]([x], node.attributes), before.low, form),
                before,
            )
        else:
            self._follow(self.theirs, name, form.view(len(form), *before.low.shape))

    def _known(self, form: Tensor, x: Interval) -> None:
        """Add a form of numbers that are known up to an interval."""
        if not form.numel():
            return
        flat, low, high = form.flatten(1), x.low.flatten(), x.high.flatten()
        found = Interval(low, high).affine(flat)
        self.sum = self.sum + found

    def _follow(self, forms: dict[str, Tensor], name: str, form: Tensor, x: Interval | None = None) -> None:
        """Add a form of what is at a node; x: its values, where the form was rounded."""
        if x is not None:
            size = form.abs().flatten(1).sum(1) * (form[0].numel() + 16) * UNIT
            self.sum = self.sum.widened((size + TINY) * x.magnitude.max())
        forms[name] = forms[name] + form if name in forms else form


class _SomeRows(NamedTuple):
    """A form of those rows of a layer that it has, few where a pass has just begun."""

    which: Tensor  # (r,)
    form: Tensor  # (O, r, ...)
    sizes: Tensor  # (O, r), of magnitudes the sum

    @classmethod
    def of(cls, form: Tensor) -> _SomeRows:
        """Of a form (O, R, ...) of all of them."""
        sizes = form.abs().view(*form.shape[:2], -1).sum(2)
        which = sizes.any(0).nonzero().flatten()
        return cls(which, form, sizes) if len(which) == form.shape[1] else cls(which, form[:, which], sizes[:, which])


def _through(weight: Tensor, how: tuple, x: Tensor, form: Tensor) -> Tensor:
    """The form (O, C, ...) of x for which that of a layer's rows is `form`."""
    if weight.ndim == 2:
        return (form.flatten(1) @ weight).view(len(form), *x.shape)
    stride, padding, dilation = how
    return conv2d_input((len(form), *x.shape), weight, form, stride, padding, dilation)


def _pulled(function: Callable[[Tensor], Tensor], x: Tensor, form: Tensor) -> Tensor:
    """The form (O, C, ...) of x for which a linear function's is `form`."""
    with torch.enable_grad():
        inside = torch.zeros(len(form), *x.shape, dtype=torch.float64, requires_grad=True)
        outside = function(inside)
    return torch.autograd.grad(outside, inside, form.reshape(outside.shape))[0]


def _chord(phi: Activation, x: Interval) -> tuple[Tensor, Interval]:
    """A slope a, and bounds of phi(x) - a x over each interval.

    The difference is looked at in 100 places; between them it differs by at most the slopes' reach times half a step,
    and by a jump.
    """
    ends = phi.fn(x.low), phi.fn(x.high)
    width = (x.high - x.low).clamp_min(1e-12)
    chord = (ends[1] - ends[0]) / width
    least = largest = ends[0] - chord * x.low
    for step in range(1, 101):
        at = x.low + (x.high - x.low) * (step / 100)
        value = phi.fn(at) - chord * at
        least, largest = torch.minimum(least, value), torch.maximum(largest, value)
    slopes = phi.slopes(x.low, x.high)
    steep = torch.maximum((slopes[0] - chord).abs(), (slopes[1] - chord).abs())
    slack = 8 * UNIT * (1 + chord.abs()) * (1 + x.magnitude) + phi.fall(x.low, x.high)
    return chord, Interval(least, largest).widened(steep * width / 200 + slack)
