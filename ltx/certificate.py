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

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ltx.activations import ACTIVATIONS, Activation, from_attributes
from ltx.errors import LtxError
from ltx.graph import Graph, fold_batch_norm
from ltx.intervals import Interval, node_intervals
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
def certify(ticket: Ticket, target: Graph, low: Tensor, high: Tensor, *, shared: bool = True) -> Certificate:
    """Bound the deviation of a ticket's outputs over all images between `low` and `high`.

    Args:
        ticket: one that `ltx.verification.verify` finds in order.
        target: the graph that it was made for.
        low, high: (C, H, W), the least and largest value of each element; any float type, exactly taken.
        shared: whether the copies in a pair are treated as functions of the slot that they read; as slots with
            deviations of their own otherwise.

    Returns:
        a bound for the networks in exact arithmetic; float32 adds its own rounding when they are run.

    Raises:
        LtxError: a box without images, or a ticket whose network cannot be followed.
    """
    if low.shape != high.shape or low.ndim != 3 or not bool((low <= high).all()):
        raise LtxError(f"low and high must be images (C, H, W) with low <= high, not {tuple(low.shape)}")
    if not any(node.op == "batch_norm" for node in ticket.graph):
        target = fold_batch_norm(target)
    return _Walk(ticket, target, Interval(low.double().cpu(), high.double().cpu()), shared).run()


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
    def __init__(self, ticket: Ticket, target: Graph, box: Interval, shared: bool):
        self.ticket, self.target, self.shared = ticket, target, shared
        self.channels = node_intervals(target, box)
        self.slots: dict[str, _Slots] = {}
        self.read = ticket.read_channels()

    def run(self) -> Certificate:
        bounds = []
        last = {name: n for n, node in enumerate(self.ticket.graph) for name in node.inputs}
        for position, node in enumerate(self.ticket.graph):
            inside = [self.slots[name] for name in node.inputs]
            found = self._node(node, inside)
            self.slots[node.name] = found
            if node.op == "activation" and found.copies is None and node.name in self.channels:
                mine = self.read[node.name][found.labels[self.read[node.name]] >= 0]
                if len(mine):
                    span = self.channels[node.name].width
                    off = float(found.off[mine].magnitude.max())
                    bounds.append(NodeBound(node.name, off, float(span.max())))
            for name in node.inputs:
                if last[name] == position:
                    self.slots.pop(name, None)
        return Certificate(self.slots[self.ticket.graph[-1].name].off, tuple(bounds))

    def _node(self, node: TicketNode, inside: list[_Slots]) -> _Slots:
        if node.op == "input":
            box = self.channels["input"]
            return _Slots("input", torch.arange(len(box.low)), Interval.exactly(torch.zeros_like(box.low)), box)
        before = inside[0]
        if node.op == "layer":
            layer = self.ticket.layer(node.attributes["layer"])
            return self._copied(layer, before) if layer.role == "copies" else self._layer(layer, before)
        if node.op == "given":
            return self._given(node, before)
        if node.op == "output":
            rows = torch.tensor(node.attributes["rows"], dtype=torch.int64)
            off = before.off[rows]
            return replace(before, off=off.map(torch.flatten) if node.attributes.get("flatten") else off)
        if before.copies is not None:
            if node.op == "activation":
                return replace(before, copies=replace(before.copies, phi=from_attributes(node.attributes)))
            return before  # flattened, between the layers of a pair
        if node.op == "flatten":
            return before  # its channels keep their taps beside them
        return self._elementwise(node, inside)

    def _elementwise(self, node: TicketNode, inside: list[_Slots]) -> _Slots:
        before = inside[0]
        labels, off, own = before.labels, before.off, before.own
        theirs = self._theirs(before)  # of the channel in front of the node
        if node.op == "activation":
            phi = from_attributes(node.attributes)
            own = own.through(phi)
            off = off.times(phi.least_slope, phi.lipschitz).within(own - theirs.through(phi))
        elif node.op == "batch_norm":
            scale, shift = (self.ticket.given[f"{node.name}.{part}"].double() for part in ("weight", "bias"))
            norm = self.target[node.name].batch_norm
            if norm is None:
                raise LtxError(f"batch norm {node.name}: the target has none of that name; run ltx verify")
            same = labels.clamp_min(0)
            apart = scale - norm.scale.double()[same], shift - norm.shift.double()[same]
            off = off.scaled(scale, torch.zeros_like(shift)) + theirs.scaled(*apart)
            own = own.scaled(scale, shift)
        elif node.op == "add":
            off, own = off + inside[1].off, own + inside[1].own
            labels = torch.where(labels == inside[1].labels, labels, DEAD)
        elif node.op == "max_pool":
            off, own = off.maximum(node.attributes), own.maximum(node.attributes)
        else:
            off, own = off.average(node.attributes), own.average(node.attributes)
        return _Slots(node.name, labels, off.where(labels >= 0, own), own)

    def _target_channels(self, slots: _Slots) -> Interval:
        """What the target's channels can be where slots stand for them, in the shape of the slots."""
        channels = self.channels[slots.target]  # perhaps flattened already, which the ticket is not yet
        return channels.map(lambda end: end.view(-1, *slots.own.low.shape[1:]))

    def _theirs(self, slots: _Slots) -> Interval:
        """What the channel of each slot can be; 0 for a slot that stands for none."""
        return _chosen(self._target_channels(slots), slots.labels)

    def _copied(self, layer: SourceLayer, before: _Slots) -> _Slots:
        rows, offsets, values = self.ticket.kept(layer.name)
        column = torch.full((layer.shape[0],), -1, dtype=torch.int64)
        entry = torch.zeros(layer.shape[0], dtype=torch.float64)
        if len(rows.unique()) < len(rows) or layer.taps != 1:
            raise LtxError(f"layer {layer.name}: a copy reads more than one channel; run ltx verify")
        column[rows], entry[rows] = offsets, values.double()
        return replace(before, copies=_Copies(column, entry, self.ticket.bias(layer.name).double()))

    def _layer(self, layer: SourceLayer, before: _Slots) -> _Slots:
        rows, offsets, values = self.ticket.kept(layer.name)
        kept = _Kept(rows, offsets // layer.taps, offsets % layer.taps, values.double())
        how = (layer.stride, layer.padding, layer.dilation)
        bias = self.ticket.bias(layer.name).double()
        return self._sum(layer.target, kept, layer.shape[2:], how, self.ticket.slots[layer.name], bias, before)

    def _given(self, node: TicketNode, before: _Slots) -> _Slots:
        weight = self.ticket.given[f"{node.name}.weight"].double()
        taps = node.attributes["taps"]
        rows, offsets = weight.nonzero(as_tuple=True)
        kept = _Kept(rows, offsets // taps, offsets % taps, weight[rows, offsets])
        bias = self.ticket.given[f"{node.name}.bias"].double()
        return self._sum(node.attributes["target"], kept, (), (), torch.arange(len(weight)), bias, before)

    def _sum(
        self, name: str, kept: _Kept, kernel: tuple[int, ...], how: tuple, labels: Tensor, bias: Tensor, before: _Slots
    ) -> _Slots:  # fmt: skip
        """Rows (R,) that sum slots, or copies of slots, beside those of a layer of the target that they stand for."""
        target, channels = self.target.layers[name], self._target_channels(before)
        many = len(channels.low)
        wanted = target.weight.double().reshape(len(target.weight), many, -1)  # (C_out, C, K), of flattened images too
        wanted = torch.where(labels[:, None, None] >= 0, wanted[labels.clamp_min(0)], 0.0)  # (R, C, K)
        total = _Sum(kept, len(labels), wanted.shape[2], kernel, how)
        if before.copies is None:
            self._direct(total, wanted, channels, before)
        else:
            self._pair(total, wanted, channels, before, before.copies)
        apart = bias - torch.where(labels >= 0, target.bias.double()[labels.clamp_min(0)], 0.0)
        off = total.value.scaled(torch.ones(len(labels)), apart)
        return _Slots(name, labels, off, _chosen(self.channels[name], labels) + off)

    def _direct(self, total: _Sum, wanted: Tensor, channels: Interval, before: _Slots) -> None:
        many, values = wanted.shape[1], total.kept.value
        total.add(total.dense(values, total.kept.channel, len(before.labels)), before.off)
        theirs = before.labels[total.kept.channel]
        sums, terms = (total.dense(part, theirs, many) for part in (values, values.abs()))
        total.add(sums - wanted, channels, terms + wanted.abs())

    def _pair(self, total: _Sum, wanted: Tensor, channels: Interval, before: _Slots, copies: _Copies) -> None:
        kept, phi, many = total.kept, copies.phi, len(before.labels)
        slot = copies.column[kept.channel]  # that an entry reads, -1: none
        worth = kept.value * copies.entry[kept.channel]
        # of every channel one slot takes the target's weights on it, of a channel without one they are missing
        first = _first(before.labels, slot[slot >= 0].unique(), wanted.shape[1])
        mine = torch.zeros(len(wanted), many, wanted.shape[2], dtype=torch.float64)
        mine[:, first[first >= 0]] = wanted[:, first >= 0]
        total.add(torch.where(first[None, :, None] >= 0, 0.0, -wanted), channels)
        rising = copies.entry[kept.channel] > 0
        slopes = [torch.where(rising, a, b) for a, b in ((phi.slope_pos, phi.slope_neg), (phi.slope_neg, phi.slope_pos))]
        above, below = (total.dense(worth * slope, slot, many) for slope in slopes)
        terms = total.dense(worth.abs() * phi.lipschitz, slot, many) + mine.abs()
        if self.shared:
            x = before.own
            total.add(mine, before.off)
        else:
            x = self._theirs(before).where(before.labels >= 0, before.own)
            off = before.off.magnitude.where(before.labels.view(-1, *[1] * (x.low.ndim - 1)) >= 0, torch.zeros(()))
            total.add(terms, Interval(-off, off))
        if torch.equal(above, below):
            total.add(above - mine, x, terms)
        else:
            total.add(above - mine, x.positive, terms)
            total.add(below - mine, x.negative, terms)
        constant = torch.where(slot >= 0, phi.offset, phi.fn(copies.bias)[kept.channel])
        ones = torch.ones_like(x.low[:1])
        total.add(
            total.dense(kept.value * constant, torch.zeros_like(slot), 1), Interval(ones, ones),
            total.dense((kept.value * constant).abs(), torch.zeros_like(slot), 1),
        )  # fmt: skip
        if not phi.exact:
            reach = before.own.magnitude[copies.column.clamp_min(0)]
            reach = reach * copies.entry.abs().view(-1, *[1] * (reach.ndim - 1))
            error = phi.linear_error(reach)
            total.add(total.dense(kept.value, kept.channel, len(copies.entry)), Interval(-error, error))


@dataclass(frozen=True)
class _Kept:
    """Entries of a layer: row, channel that is read, tap and value, (n,) each."""

    row: Tensor
    channel: Tensor
    tap: Tensor
    value: Tensor  # float64


class _Sum:
    """Layers on intervals, added up."""

    def __init__(self, kept: _Kept, rows: int, taps: int, kernel: tuple[int, ...], how: tuple):
        self.kept, self.rows, self.taps, self.kernel, self.how = kept, rows, taps, kernel, how
        self.value: Interval

    def dense(self, value: Tensor, column: Tensor, columns: int) -> Tensor:
        """(R, columns, K): the values (n,) of the entries added up at their rows, `column` (n,) and taps; -1: nowhere."""
        there = column >= 0
        index = (self.kept.row[there] * columns + column[there]) * self.taps + self.kept.tap[there]
        flat = torch.zeros(self.rows * columns * self.taps, dtype=torch.float64)
        return flat.index_add_(0, index, value[there]).view(self.rows, columns, self.taps)

    def add(self, weight: Tensor, x: Interval, terms: Tensor | None = None) -> None:
        """weight (R, C, K) on x (C, ...)."""
        shape = (len(weight), weight.shape[1], *self.kernel) if self.kernel else (len(weight), -1)
        x = x if self.kernel else x.map(torch.flatten)
        found = x.affine(weight.reshape(shape), self.how, terms=None if terms is None else terms.reshape(shape))
        self.value = self.value + found if hasattr(self, "value") else found


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
