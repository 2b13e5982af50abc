"""A proven bound on how far a ticket is from its target, from the parameters that it keeps.

One pass through the ticket's network, with intervals that are rounded outwards. For every slot, at every pixel, two
intervals are carried: what its channel of the target can be, X, and how far the slot can be off, d. A row that keeps
w_s of the slots s of channel j at a tap where the target has W is off by

    sum over s of w_s d_s  +  (sum over s of w_s - W) X,

and both sums are known. So an error of the parameters counts for itself, and a deviation counts with the entries that
are really kept: |w_1| + |w_2|, and not |w_1 + w_2|. Behind an activation a deviation is multiplied by at most its
Lipschitz constant, or, where that is less, is what the ranges of slot and channel leave.

In a two-for-one pair the copies phi(lambda_n Y) of a channel are functions of the one slot Y = X + d that they read.
With phi linear on either side of 0 their sum is A_+ Y for Y > 0 and A_- Y below, exactly, which is off by

    W d  +  (A_+- - W) Y  [+ the error of the linearisation, by Assumption 2.3]:

the deviation counts as in the target, however large the entries are. That is why 2L tickets of deep networks work,
and L+1 tickets do not (section 6 of the paper's Appendix counts N_l parameters for both, see `ltx.theory`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ltx import operations
from ltx.activations import ACTIVATIONS, Activation, from_attributes
from ltx.errors import LtxError
from ltx.graph import Graph, Node, fold_batch_norm
from ltx.intervals import UNIT, Interval, node_intervals
from ltx.source import SourceLayer
from ltx.ticket import DEAD, Ticket, TicketNode


@dataclass(frozen=True)
class NodeBound:
    """What is proven of one activation of the target, over its slots that are read."""

    node: str
    deviation: float  # no slot is off by more
    span: float  # the widest range of a channel: a larger deviation says nothing


@dataclass(frozen=True)
class Certificate:
    """Bounds over all inputs in a box."""

    outputs: Interval  # f_eps - f_t, (O,)
    nodes: tuple[NodeBound, ...]

    @property
    def bound(self) -> Tensor:
        """Of |f_eps - f_t|, (O,) float64."""
        return self.outputs.magnitude

    @property
    def largest(self) -> float:
        return float(self.bound.max())


@torch.no_grad()
def certify(ticket: Ticket, target: Graph, low: Tensor, high: Tensor, *, sharp: bool = True) -> Certificate:
    """Bound the deviation of a ticket's outputs over all images between `low` and `high`.

    Args:
        ticket: one that `ltx.verification.verify` finds in order.
        target: the graph that it was made for.
        low, high: (C, H, W), the least and largest value of each element; any float type, exactly taken.
        sharp: whether the copies in a pair are treated as functions of the slot that they read, and not as slots with
            deviations of their own; and whether a second pass goes back from the outputs.

    Returns:
        a bound for the networks in exact arithmetic; float32 adds its own rounding when they are run.

    Raises:
        LtxError: a box without images, or a ticket whose network cannot be followed.
    """
    if low.shape != high.shape or low.ndim != 3 or not bool((low <= high).all()):
        raise LtxError(f"low and high must be images (C, H, W) with low <= high, not {tuple(low.shape)}")
    if not any(node.op == "batch_norm" for node in ticket.graph):
        target = fold_batch_norm(target)
    return _Walk(ticket, target, Interval(low.double().cpu(), high.double().cpu()), sharp).run()


@dataclass(frozen=True)
class _Slots:
    """The channels of a node of the ticket; one without a label stands for a channel that is 0."""

    target: str  # the target's node that they stand for
    labels: Tensor  # (C,) the target's channel, negative for none
    off: Interval  # slot - channel
    own: Interval  # slot
    copies: _Copies | None = None


@dataclass(frozen=True)
class _Copies:
    """Between the two layers of a pair: copy n is phi(entry[n] * slot column[n]), or phi(bias[n]) where there is none."""

    column: Tensor  # (n,) slot that is read; -1: none
    entry: Tensor  # (n,) float64
    bias: Tensor  # (n,) float64
    phi: Activation = ACTIVATIONS["identity"]


class _Walk:
    """The forward pass; what it finds at every node is kept for the way back."""

    def __init__(self, ticket: Ticket, target: Graph, box: Interval, sharp: bool):
        self.ticket, self.target, self.sharp = ticket, target, sharp
        self.channels = node_intervals(target, box)
        self.slots: dict[str, _Slots] = {}

    def run(self) -> Certificate:
        bounds, read = [], self.ticket.read_channels()
        for node in self.ticket.graph:
            found = self.slots[node.name] = self._node(node, [self.slots[name] for name in node.inputs])
            if node.op == "activation" and found.copies is None:
                mine = read[node.name][found.labels[read[node.name]] >= 0]
                if len(mine):
                    off, span = found.off[mine].magnitude, self.channels[found.target].width
                    bounds.append(NodeBound(node.name, float(off.max()), float(span.max())))
        outputs = self.slots[self.ticket.graph[-1].name].off
        if self.sharp:
            outputs = outputs.within(_Backwards(self).run())
        return Certificate(outputs, tuple(bounds))

    def _node(self, node: TicketNode, inside: list[_Slots]) -> _Slots:
        if node.op == "input":
            box = self.channels["input"]
            return _Slots("input", torch.arange(len(box.low)), Interval.exactly(torch.zeros_like(box.low)), box)
        before = inside[0]
        if node.op == "output":
            rows = torch.tensor(node.attributes["rows"], dtype=torch.int64)
            return replace(before, off=before.off[rows].map(torch.flatten))
        if node.op == "flatten":
            return before  # its channels keep their taps beside them
        if node.op == "layer":
            layer = self.ticket.layer(node.attributes["layer"])
            if layer.role == "copies":
                return self._copied(layer, before)
        if node.op in ("layer", "given"):
            return self._rows(node, before)
        if before.copies is not None:
            return replace(before, copies=replace(before.copies, phi=from_attributes(node.attributes)))
        return self._elementwise(node, inside)

    def _elementwise(self, node: TicketNode, inside: list[_Slots]) -> _Slots:
        before = inside[0]
        labels, off, own = before.labels, before.off, before.own
        if node.op == "activation":
            phi = from_attributes(node.attributes)
            theirs, own = self.theirs(before).through(phi), own.through(phi)
            off = (off * self.slopes(node, before)).within(own - theirs)
        elif node.op == "batch_norm":
            scale, shift, *apart = self.norms(node, before)
            off = off.scaled(scale, torch.zeros_like(shift)) + self.theirs(before).scaled(*apart)
            own = own.scaled(scale, shift)
        elif node.op == "add":
            off, own = off + inside[1].off, own + inside[1].own
            labels = torch.where(labels == inside[1].labels, labels, DEAD)
        elif node.op == "max_pool":
            off, own = off.maximum(node.attributes), own.maximum(node.attributes)
        else:
            off, own = off.average(node.attributes), own.average(node.attributes)
        return _Slots(node.name, labels, off.where(labels >= 0, own), own)

    def slopes(self, node: TicketNode, before: _Slots) -> Interval:
        """Of an activation between what a slot and its channel can be."""
        reach = before.own.joined(self.theirs(before))
        return Interval(*from_attributes(node.attributes).slopes(reach.low, reach.high))

    def norms(self, node: TicketNode, before: _Slots) -> tuple[Tensor, ...]:
        """Scale and shift of a given batch norm, and by how much they differ from the channel's, (C,) each."""
        scale, shift = (self.ticket.given[f"{node.name}.{part}"].double() for part in ("weight", "bias"))
        norm = self.target[node.name].batch_norm
        assert norm is not None
        same = before.labels.clamp_min(0)
        return scale, shift, scale - norm.scale.double()[same], shift - norm.shift.double()[same]

    def target_channels(self, slots: _Slots) -> Interval:
        """What the target's channels can be where slots stand for them, in the shape of the slots."""
        channels = self.channels[slots.target]  # perhaps flattened already, which the ticket is not yet
        return channels.map(lambda end: end.view(-1, *slots.own.low.shape[1:]))

    def theirs(self, slots: _Slots) -> Interval:
        """What the channel of each slot can be; 0 for a slot that stands for none."""
        return _chosen(self.target_channels(slots), slots.labels)

    def _copied(self, layer: SourceLayer, before: _Slots) -> _Slots:
        rows, offsets, values = self.ticket.kept(layer.name)
        column = torch.full((layer.shape[0],), -1, dtype=torch.int64)
        entry = torch.zeros(layer.shape[0], dtype=torch.float64)
        column[rows], entry[rows] = offsets, values.double()
        return replace(before, copies=_Copies(column, entry, self.ticket.bias(layer.name).double()))

    def _rows(self, node: TicketNode, before: _Slots) -> _Slots:
        """Rows (R,) that sum slots, or copies of slots, beside those of a layer of the target that they stand for."""
        rows = self.layer(node, before)
        parts = [part.x.affine(part.weight, rows.how, terms=part.terms) for part in self.parts(rows, before)]
        off = parts[0]
        for part in parts[1:]:
            off = off + part
        off = off.scaled(torch.ones(len(rows.labels)), rows.bias)
        return _Slots(rows.target, rows.labels, off, _chosen(self.channels[rows.target], rows.labels) + off)

    def layer(self, node: TicketNode, before: _Slots) -> _Rows:
        """A layer's rows, random or given."""
        if node.op == "given":
            weight, bias = (self.ticket.given[f"{node.name}.{part}"].double() for part in ("weight", "bias"))
            name, taps, labels, kernel, how = node.attributes["target"], node.attributes["taps"], None, (), ()
            row, offsets = weight.nonzero(as_tuple=True)
            values, labels = weight[row, offsets], torch.arange(len(weight))
        else:
            layer = self.ticket.layer(node.attributes["layer"])
            name, taps, labels, kernel = layer.target, layer.taps, self.ticket.slots[layer.name], layer.shape[2:]
            how, bias = (layer.stride, layer.padding, layer.dilation), self.ticket.bias(layer.name).double()
            row, offsets, values = self.ticket.kept(layer.name)
        target, channels = self.target.layers[name], len(self.target_channels(before).low)
        wanted = target.weight.double().reshape(len(target.weight), channels, -1)  # (C_out, C, K)
        wanted = torch.where(labels[:, None, None] >= 0, wanted[labels.clamp_min(0)], 0.0)
        bias = bias - torch.where(labels >= 0, target.bias.double()[labels.clamp_min(0)], 0.0)
        return _Rows(name, labels, wanted, bias, kernel, how, row, offsets // taps, offsets % taps, values.double())

    def parts(self, rows: _Rows, before: _Slots) -> Iterator[_Part]:
        """What makes rows deviate: layers (R, C, K) on intervals, whose values add up."""
        if before.copies is not None:
            yield from self._pair(rows, before, before.copies)
            return
        theirs, channels = before.labels[rows.channel], self.target_channels(before)
        yield rows.part("off", rows.dense(rows.value, rows.channel, len(before.labels)), before.off)
        sums, terms = (rows.dense(part, theirs, len(channels.low)) for part in (rows.value, rows.value.abs()))
        yield rows.part("theirs", sums - rows.wanted, channels, terms + rows.wanted.abs())

    def _pair(self, rows: _Rows, before: _Slots, copies: _Copies) -> Iterator[_Part]:
        phi, many, wanted = copies.phi, len(before.labels), rows.wanted
        slot, entry = copies.column[rows.channel], copies.entry[rows.channel]  # that an entry reads, -1: none
        # of every channel one slot takes the target's weights on it; those of a channel without one are missing
        first = _first(before.labels, slot[slot >= 0].unique(), wanted.shape[1])
        mine = torch.zeros(len(wanted), many, wanted.shape[2], dtype=torch.float64)
        mine[:, first[first >= 0]] = wanted[:, first >= 0]
        yield rows.part("theirs", torch.where(first[None, :, None] >= 0, 0.0, -wanted), self.target_channels(before))
        above, below = (
            rows.dense(rows.value * entry * torch.where(entry > 0, *slopes), slot, many)
            for slopes in ((phi.slope_pos, phi.slope_neg), (phi.slope_neg, phi.slope_pos))
        )
        terms = rows.dense((rows.value * entry).abs() * phi.lipschitz, slot, many)
        x = before.own
        if self.sharp:
            yield rows.part("off", mine, before.off)
        else:  # every copy deviates on its own
            there = before.labels >= 0
            x = self.theirs(before).where(there, x)
            off = _chosen(before.off, torch.where(there, torch.arange(many), -1)).magnitude
            yield rows.part("", terms, Interval(-off, off))
        terms = terms + mine.abs()
        if torch.equal(above, below) or not bool((x.low < 0).any()):
            yield rows.part("own", above - mine, x, terms)
        else:
            yield rows.part("", above - mine, x.positive, terms)
            yield rows.part("", below - mine, x.negative, terms)
        constant = rows.value * torch.where(slot >= 0, phi.offset, phi.fn(copies.bias)[rows.channel])
        ones, nowhere = torch.ones_like(x.low[:1]), torch.zeros_like(slot)
        sums, sizes = (rows.dense(part, nowhere, 1) for part in (constant, constant.abs()))
        yield rows.part("", sums, Interval(ones, ones), sizes)
        if not phi.exact:
            reach = before.own.magnitude[copies.column.clamp_min(0)]
            error = phi.linear_error(reach * copies.entry.abs().view(-1, *[1] * (reach.ndim - 1)))
            yield rows.part("", rows.dense(rows.value, rows.channel, len(copies.entry)), Interval(-error, error))


@dataclass(frozen=True)
class _Part:
    """A layer on numbers that are known up to an interval.

    of: which: `off` and `own` of the slots in front, `theirs` of the channels there, or none of these.
    """

    of: str
    weight: Tensor  # (R, C, kernel...) or (R, n)
    x: Interval  # (C, H, W) or (n,)
    terms: Tensor


@dataclass(frozen=True)
class _Rows:
    """Rows of a layer of the ticket, and their entries: row, channel that is read, tap and value, (n,) each."""

    target: str
    labels: Tensor  # (R,)
    wanted: Tensor  # (R, C, K), the target's weights of the channel that a row stands for
    bias: Tensor  # (R,), less the target's
    kernel: tuple[int, ...]
    how: tuple  # stride, padding, dilation
    row: Tensor
    channel: Tensor
    tap: Tensor
    value: Tensor  # float64

    def dense(self, value: Tensor, column: Tensor, columns: int) -> Tensor:
        """(R, columns, K): the values (n,) of the entries added up at their rows, `column` (n,) and taps; -1: nowhere."""
        there, taps = column >= 0, self.wanted.shape[2]
        index = (self.row[there] * columns + column[there]) * taps + self.tap[there]
        flat = torch.zeros(len(self.labels) * columns * taps, dtype=torch.float64)
        return flat.index_add_(0, index, value[there]).view(len(self.labels), columns, taps)

    def part(self, of: str, weight: Tensor, x: Interval, terms: Tensor | None = None) -> _Part:
        shape = (*weight.shape[:2], *self.kernel) if self.kernel else (len(weight), -1)
        terms = weight.abs() if terms is None else terms
        x = x if self.kernel else x.map(torch.flatten)
        return _Part(of, weight.reshape(shape), x, terms.reshape(shape))


class _Backwards:
    """From the outputs back to the image: each output's deviation as a linear form of what is in front of a node.

    Bounds that are formed layer by layer take each slot at its worst. A linear form keeps what cancels between slots,
    pixels and layers: where an activation's slope lies between s - r and s + r, a deviation d becomes s d, which is
    followed, and at most r |d|, which is not.
    """

    def __init__(self, walk: _Walk):
        self.walk = walk
        nodes = walk.ticket.graph
        self.off: dict[str, Tensor] = {}  # ticket's node -> (O, C, ...) of its slots' deviations
        self.theirs: dict[str, Tensor] = {}  # target's node -> the same of its channels
        many = len(nodes[-1].attributes["rows"]) * walk.slots[nodes[-1].name].off.low.numel()
        self.sum = Interval.exactly(torch.zeros(walk.slots[nodes[-1].name].off.low.numel()))
        assert many

    def run(self) -> Interval:
        """Bounds of the outputs' deviations, (O,)."""
        walk, nodes = self.walk, self.walk.ticket.graph
        last = nodes[-1]
        before = walk.slots[last.inputs[0]].off.low
        rows = torch.tensor(last.attributes["rows"], dtype=torch.int64)
        form = torch.zeros(len(self.sum.low), *before.shape, dtype=torch.float64)
        form[:, rows] = torch.eye(len(self.sum.low), dtype=torch.float64).view(-1, *before[rows].shape)
        self.off[last.inputs[0]] = form
        for node in reversed(nodes[:-1]):
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
            self._follow(self.off, node.inputs[0], form)
            return
        there = mine.labels >= 0  # the others' values are known
        self._known(form[:, ~there], mine.off[~there])
        form = form * there.view(-1, *[1] * (form.ndim - 2))
        before = walk.slots[node.inputs[0]]
        if node.op == "activation":
            slopes = walk.slopes(node, before)
            slope = (slopes.low + slopes.high) / 2
            rest = (before.off * Interval(slopes.low - slope, slopes.high - slope).widened())
            other = mine.off - before.off * Interval.exactly(slope)
            self._known(form, rest.within(other))
            self._follow(self.off, node.inputs[0], form * slope, before.off)
        elif node.op == "batch_norm":
            scale, _, apart, shift = (part.view(-1, *[1] * (form.ndim - 2)) for part in walk.norms(node, before))
            self._known(form, Interval.exactly(shift.expand(mine.off.low.shape)))
            self._follow(self.off, node.inputs[0], form * scale, before.off)
            self._channels(before, form * apart)
        elif node.op == "add":
            for name in node.inputs:
                self._follow(self.off, name, form)
        elif node.op == "avg_pool":
            self._follow(self.off, node.inputs[0], _pulled(
                lambda x: operations.OPERATIONS["avg_pool"]([x], node.attributes), before.off.low, form), before.off)
        elif node.op == "max_pool":
            self._known(form, mine.off)
        else:
            name = node.inputs[0]
            while walk.slots[name].copies is not None:  # a pair: what its copies read
                name = next(n for n in walk.ticket.graph if n.name == name).inputs[0]
            rows = walk.layer(node, walk.slots[node.inputs[0]])
            self._known(form, Interval.exactly(rows.bias.view(-1, *[1] * (form.ndim - 2)).expand(mine.off.low.shape)))
            for part in walk.parts(rows, walk.slots[node.inputs[0]]):
                self._part(part, rows, form, name)

    def _part(self, part: _Part, rows: _Rows, form: Tensor, name: str) -> None:
        walk, before = self.walk, self.walk.slots[name]
        found = _pulled(lambda x: operations.affine(x, part.weight, None, *rows.how), part.x.low, form)
        gamma = 4 * (part.weight.numel() + 16) * UNIT
        size = form.abs().view(*form.shape[:2], -1).sum(2) @ part.terms.flatten(1).sum(1) * part.x.magnitude.max() * gamma
        self.sum = self.sum.widened(size)
        if part.of == "":
            self._known(found, part.x)
            return
        found = found.view(len(found), -1, *before.off.low.shape[1:])
        if part.of in ("off", "own"):
            self._follow(self.off, name, found)
        if part.of == "own":
            found = found[:, before.labels >= 0]
            theirs = torch.zeros(len(found), len(walk.target_channels(before).low), *found.shape[2:], dtype=found.dtype)
            self._channels(before, theirs.index_add_(1, before.labels[before.labels >= 0], found))
        elif part.of == "theirs":
            self._channels(before, found)

    def _channels(self, before: _Slots, form: Tensor) -> None:
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
            self._known(form, Interval.exactly(
                layer.bias.view(-1, *[1] * (form.ndim - 2)).expand(mine.low.shape)))
            found = _pulled(lambda x: operations.affine(x, layer.weight.double(), None, *how), before.low, form)
            gamma = 4 * (layer.weight.numel() + 16) * UNIT
            rows = layer.weight.double().abs().flatten(1).sum(1)
            self.sum = self.sum.widened(form.abs().view(*form.shape[:2], -1).sum(2) @ rows * before.magnitude.max() * gamma)
            self._follow(self.theirs, name, found)
        elif node.activation is not None:
            chord, rest = _chord(node.activation, before)
            self._known(form, rest)
            self._follow(self.theirs, name, form * chord, before)
        elif node.batch_norm is not None:
            scale, shift = (p.double().view(-1, *[1] * (form.ndim - 2))
                            for p in (node.batch_norm.scale, node.batch_norm.shift))
            self._known(form, Interval.exactly(shift.expand(mine.low.shape)))
            self._follow(self.theirs, name, form * scale, before)
        elif node.op == "add":
            for name in node.inputs:
                self._follow(self.theirs, name, form)
        elif node.op == "avg_pool":
            self._follow(self.theirs, name, _pulled(
                lambda x: operations.OPERATIONS["avg_pool"]([x], node.attributes), before.low, form), before)
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
            size = form.abs().flatten(1).sum(1) * x.magnitude.max() * (form[0].numel() + 16) * UNIT
            self.sum = self.sum.widened(size)
        forms[name] = forms[name] + form if name in forms else form


def _pulled(function: Callable[[Tensor], Tensor], x: Tensor, form: Tensor) -> Tensor:
    """The form (O, C, ...) of x for which a linear function's is `form`."""
    with torch.enable_grad():
        inside = torch.zeros(len(form), *x.shape, dtype=torch.float64, requires_grad=True)
        outside = function(inside)
    return torch.autograd.grad(outside, inside, form.reshape(outside.shape))[0]


def _chord(phi: Activation, x: Interval) -> tuple[Tensor, Interval]:
    """A slope a, and bounds of phi(x) - a x over each interval.

    The difference is looked at in 100 places; between them it differs by at most the slopes' reach times half a step.
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
    rest = Interval(least, largest).widened(steep * width / 200 + 8 * UNIT * (1 + chord.abs()) * (1 + x.magnitude))
    return chord, rest


def _chosen(channels: Interval, labels: Tensor) -> Interval:
    """Of channels (C, ...) those of the labels, 0 where a label is none."""
    found = channels[labels.clamp_min(0)]
    return found.where(labels >= 0, Interval.exactly(torch.zeros_like(found.low)))


def _first(labels: Tensor, slots: Tensor, channels: int) -> Tensor:
    """The first of `slots` that stands for each channel, (channels,); -1: none."""
    found = torch.full((channels,), -1, dtype=torch.int64)
    for slot in slots.flip(0).tolist():
        if labels[slot] >= 0:
            found[labels[slot]] = slot
    return found
