"""From the image to the outputs: what every slot of a ticket can be off, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ltx.activations import ACTIVATIONS, Activation, from_attributes
from ltx.errors import LtxError
from ltx.graph import Graph, Layer
from ltx.intervals import UNIT, Interval, node_intervals
from ltx.source import SourceLayer
from ltx.ticket import DEAD, Ticket, TicketNode
from ltx.verification.pairs import taps_read, without_padding


@dataclass(frozen=True)
class NodeBound:
    """What is proven of one activation of the target, over its slots that are read."""

    node: str
    deviation: float  # no slot is off by more
    span: float  # the widest range of a channel: a larger deviation says nothing


@dataclass(frozen=True)
class Slots:
    """The channels of a node of the ticket; one without a label stands for a channel that is 0."""

    target: str  # the target's node that they stand for
    labels: Tensor  # (C,) the target's channel, negative for none
    off: Interval  # slot - channel
    own: Interval  # slot
    image: bool = False  # no layer in front, so that they are the target's channels
    copies: Copies | None = None
    linear: Linear | None = None  # in the image, where they are


@dataclass(frozen=True)
class Linear:
    """Deviations as a convolution of the image, and what is left."""

    weight: Tensor  # (R, C, kernel...)
    how: tuple  # stride, padding, dilation
    rest: Interval  # (R, ...)


@dataclass(frozen=True)
class Copies:
    """Between the two layers of a pair: copy n is phi(entry[n] * slot column[n]), or phi(bias[n])."""

    column: Tensor  # (n,) slot that is read; -1: none
    entry: Tensor  # (n,) float64
    bias: Tensor  # (n,) float64
    tap: Tensor  # (n,) of their layer's kernel
    layer: SourceLayer
    phi: Activation = ACTIVATIONS["identity"]


class Forwards:
    """The forward pass; what it finds at every node is kept for the way back."""

    def __init__(
        self, ticket: Ticket, target: Graph, box: Interval, sharp: bool, known: Mapping[str, Interval] | None = None
    ):
        """known: what is proven already of the deviations at nodes of the ticket."""
        self.ticket, self.target, self.sharp, self.known = ticket, target, sharp, known or {}
        try:
            self.channels = node_intervals(target, box)
        except RuntimeError as error:
            raise LtxError(f"images {tuple(box.low.shape)} do not fit the network: {error}") from error
        self.slots: dict[str, Slots] = {}
        self._slopes: dict[str, tuple[Interval, Tensor]] = {}  # of activations, and by how much these may be off them

    def run(self) -> list[NodeBound]:
        """Go through the ticket; the bounds behind its activations."""
        bounds, read = [], self.ticket.read_channels()
        for node in self.ticket.graph:
            found = self._node(node, [self.slots[name] for name in node.inputs])
            if node.name in self.known:
                found = replace(found, off=found.off.within(self.known[node.name]))
            self.slots[node.name] = found
            if node.op == "activation" and found.copies is None and not found.image:
                mine = read[node.name][found.labels[read[node.name]] >= 0]
                if len(mine):
                    off, span = found.off[mine].magnitude, self.channels[found.target].width
                    bounds.append(NodeBound(node.name, float(off.max()), float(span.max())))
        return bounds

    @property
    def outputs(self) -> Interval:
        return self.slots[self.ticket.graph[-1].name].off

    def _node(self, node: TicketNode, inside: list[Slots]) -> Slots:
        if node.op == "input":
            box = self.channels["input"]
            every = torch.arange(len(box.low))
            return Slots("input", every, Interval.exactly(torch.zeros_like(box.low)), box, image=True)
        before = inside[0]
        if node.op == "output":
            rows = torch.tensor(node.attributes["rows"], dtype=torch.int64)
            return replace(before, off=before.off[rows].map(torch.flatten))
        if node.op == "flatten":
            if before.image:  # its elements are channels of their own to the linear layer that reads them
                off, own = (part.map(torch.flatten) for part in (before.off, before.own))
                return replace(before, labels=torch.arange(len(own.low)), off=off, own=own)
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

    def _elementwise(self, node: TicketNode, inside: list[Slots]) -> Slots:
        before = inside[0]
        labels, off, own = before.labels, before.off, before.own
        if node.op == "activation":
            phi = from_attributes(node.attributes)
            theirs, own = self.theirs(before).through(phi), own.through(phi)
            reach = before.own.joined(self.theirs(before))  # what a slot and its channel can be
            slopes, fall = Interval(*phi.slopes(reach.low, reach.high)), phi.fall(reach.low, reach.high)
            self._slopes[node.name] = slopes, fall
            off = (off * slopes).widened(fall).within(own - theirs)
        elif node.op == "batch_norm":
            scale, shift, *apart = self.norms(node, before)
            off = off.scaled(scale, torch.zeros_like(shift)) + self.theirs(before).scaled(*apart)
            own = own.scaled(scale, shift)
        elif node.op == "add":
            off, own = off + inside[1].off, own + inside[1].own
            labels = torch.where(labels == inside[1].labels, labels, DEAD)
        elif node.op == "max_pool":
            # max(x + d) - max(x) lies between the least and the largest d of a window
            theirs, own = self.theirs(before).maximum(node.attributes), own.maximum(node.attributes)
            least = (-off).maximum(node.attributes).high
            off = Interval(-least, off.maximum(node.attributes).high).within(own - theirs)
        else:
            off, own = (part.average(node.op, node.attributes) for part in (off, own))
        image = all(slots.image for slots in inside)
        return Slots(node.name, labels, off.where(labels >= 0, own), own, image=image)

    def slope(self, node: TicketNode) -> Tensor:
        """The middle of what an activation's slope can be at each slot."""
        slopes, _ = self._slopes[node.name]
        return (slopes.low + slopes.high) / 2

    def fall(self, node: TicketNode) -> Tensor:
        """By how much an activation may be off what its slopes say of each slot."""
        return self._slopes[node.name][1]

    def beside(self, node: TicketNode, slope: Tensor) -> Interval:
        """What an activation's slots are off beside a slope times what those in front are off."""
        (slopes, fall), off = self._slopes[node.name], self.slots[node.inputs[0]].off
        rest = (off * Interval(slopes.low - slope, slopes.high - slope).widened()).widened(fall)
        return rest.within(self.slots[node.name].off - off * Interval.exactly(slope))

    def norms(self, node: TicketNode, before: Slots) -> tuple[Tensor, ...]:
        """Scale and shift of a given batch norm, and by how much they differ from the channel's, (C,) each."""
        scale, shift = (self.ticket.given[f"{node.name}.{part}"].double() for part in ("weight", "bias"))
        norm = self.target[node.name].batch_norm
        assert norm is not None
        same = before.labels.clamp_min(0)
        return scale, shift, scale - norm.scale.double()[same], shift - norm.shift.double()[same]

    def target_channels(self, slots: Slots) -> Interval:
        """What the target's channels can be where slots stand for them, in the shape of the slots."""
        channels = self.channels[slots.target]  # perhaps flattened already, which the ticket is not yet
        return channels.map(lambda end: end.view(-1, *slots.own.low.shape[1:]))

    def theirs(self, slots: Slots) -> Interval:
        """What the channel of each slot can be; 0 for a slot that stands for none."""
        return _chosen(self.target_channels(slots), slots.labels)

    def _copied(self, layer: SourceLayer, before: Slots) -> Slots:
        rows, offsets, values = self.ticket.kept(layer.name)
        column = torch.full((layer.shape[0],), -1, dtype=torch.int64)
        entry = torch.zeros(layer.shape[0], dtype=torch.float64)
        column[rows], entry[rows] = offsets // layer.taps, values.double()
        tap = torch.full((layer.shape[0],), layer.taps // 2)  # of a bias, which no tap reads
        tap[rows] = offsets % layer.taps
        return replace(before, copies=Copies(column, entry, self.ticket.bias(layer.name).double(), tap, layer))

    def _rows(self, node: TicketNode, before: Slots) -> Slots:
        """Rows (R,) that sum slots, or copies of slots, beside those of a layer of the target that they stand for."""
        rows = self.layer(node, before)
        parts = list(self.parts(rows, before))
        known = [part.x.affine(part.weight, rows.how, terms=part.terms) for part in parts]
        off = _total(known).scaled(torch.ones(len(rows.labels)), rows.bias)
        own = _chosen(self.channels[rows.target], rows.labels) + off
        linear = self._linear(rows, parts, known) if before.target == "input" and rows.kernel else None
        return Slots(rows.target, rows.labels, off, own, linear=linear)

    def _linear(self, rows: Rows, parts: list[Part], known: list[Interval]) -> Linear | None:
        """Of rows that read the image: what of their deviations is a convolution of it."""
        of_image = [part.of in ("own", "theirs") for part in parts]
        if not any(of_image) or not self.sharp:
            return None
        image = [part for part, mine in zip(parts, of_image, strict=True) if mine]
        others = [found for part, found in zip(parts, known, strict=True) if part.of == ""]  # `off` of the image is 0
        zero = Interval.exactly(torch.zeros_like(known[0].low))
        rest = _total([zero, *others]).scaled(torch.ones(len(rows.labels)), rows.bias)
        weight = torch.stack([part.weight for part in image]).sum(0)
        sizes = torch.stack([part.terms.flatten(1).sum(1) * part.x.magnitude.max() for part in image]).sum(0)
        slack = 4 * (weight[0].numel() + 16) * UNIT * sizes
        return Linear(weight, rows.how, rest.widened(slack.view(-1, *[1] * (rest.low.ndim - 1))))

    def layer(self, node: TicketNode, before: Slots) -> Rows:
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
        channel, tap = offsets // taps, offsets % taps
        target, channels = self.target.layers[name], len(self.target_channels(before).low)
        wanted = target.weight.double().reshape(len(target.weight), channels, -1)  # (C_out, C, K)
        wanted = torch.where(labels[:, None, None] >= 0, wanted[labels.clamp_min(0)], 0.0)
        bias = bias - torch.where(labels >= 0, target.bias.double()[labels.clamp_min(0)], 0.0)
        if before.copies is not None and kernel:
            tap = self._together(before.copies, self.ticket.layer(node.attributes["layer"]), target, channel, tap)
            kernel, how = tuple(target.weight.shape[2:]), (target.stride, target.padding, target.dilation)
        return Rows(name, labels, wanted, bias, kernel, how, row, channel, tap, values.double())

    def _together(self, copies: Copies, layer: SourceLayer, target: Layer, channel: Tensor, tap: Tensor) -> Tensor:
        """The target's taps that entries of a pair read; of constants any, which are the same everywhere."""
        read = taps_read(copies.layer, layer, target)
        assert isinstance(read, Tensor)  # of a ticket that is in order
        found = read[copies.tap[channel], tap]
        inner = without_padding(target).nonzero().flatten()  # empty where no constant may be read
        return torch.where(copies.column[channel] < 0, inner[:1].sum(), found)

    def parts(self, rows: Rows, before: Slots) -> Iterator[Part]:
        """What makes rows deviate: layers (R, C, K) on intervals, whose values add up."""
        if before.copies is not None:
            yield from self._pair(rows, before, before.copies)
            return
        theirs, channels = before.labels[rows.channel], self.target_channels(before)
        yield rows.part("off", rows.dense(rows.value, rows.channel, len(before.labels)), before.off)
        sums, terms = (rows.dense(part, theirs, len(channels.low)) for part in (rows.value, rows.value.abs()))
        yield rows.part("theirs", sums - rows.wanted, channels, terms + rows.wanted.abs())

    def _pair(self, rows: Rows, before: Slots, copies: Copies) -> Iterator[Part]:
        phi, many, wanted = copies.phi, len(before.labels), rows.wanted
        slot, entry = copies.column[rows.channel], copies.entry[rows.channel]  # that an entry reads, -1: none
        # of every channel one slot takes the target's weights on it; those of a channel without one are missing
        first = _first(before.labels, slot[slot >= 0].unique(), wanted.shape[1])
        mine = torch.zeros(len(wanted), many, wanted.shape[2], dtype=torch.float64)
        mine[:, first[first >= 0]] = wanted[:, first >= 0]
        yield rows.part("theirs", torch.where(first[None, :, None] >= 0, 0.0, -wanted), self.target_channels(before))
        above, below = (
            rows.dense(rows.value * entry * torch.where(entry > 0, *(_exact(slope) for slope in slopes)), slot, many)
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
class Part:
    """A layer on numbers that are known up to an interval.

    of: which: `off` and `own` of the slots in front, `theirs` of the channels there, or none of these.
    """

    of: str
    weight: Tensor  # (R, C, kernel...) or (R, n)
    x: Interval  # (C, H, W) or (n,)
    terms: Tensor


@dataclass(frozen=True)
class Rows:
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

    @cached_property
    def most(self) -> int:
        """No entry of a dense layer is a sum of more."""
        return int(self.row.bincount(minlength=1).max())

    def dense(self, value: Tensor, column: Tensor, columns: int) -> Tensor:
        """(R, columns, K): values (n,) of the entries, added up at their rows, `column` (n,) and taps; -1: nowhere."""
        there, taps = column >= 0, self.wanted.shape[2]
        index = (self.row[there] * columns + column[there]) * taps + self.tap[there]
        flat = torch.zeros(len(self.labels) * columns * taps, dtype=torch.float64)
        return flat.index_add_(0, index, value[there]).view(len(self.labels), columns, taps)

    def part(self, of: str, weight: Tensor, x: Interval, terms: Tensor | None = None) -> Part:
        shape = (*weight.shape[:2], *self.kernel) if self.kernel else (len(weight), -1)
        terms = weight.abs() if terms is None else terms
        terms = terms * max(1.0, self.most / weight[0].numel())  # of sums that are longer than a row
        x = x if self.kernel else x.map(torch.flatten)
        return Part(of, weight.reshape(shape), x, terms.reshape(shape))


def _total(parts: list[Interval]) -> Interval:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _exact(value: float) -> Tensor:
    """A number as float64, which torch.where would take as float32."""
    return torch.tensor(value, dtype=torch.float64)


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
