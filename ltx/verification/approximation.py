"""Do the sums over the kept subsets approximate the target's parameters, and is nothing else kept?

The labels of the slots are the ticket's claim; a wrong label is a violation like any other, because the sums do not
come out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ltx import source
from ltx.activations import ACTIVATIONS, Activation, from_attributes
from ltx.graph import Graph
from ltx.source import SourceLayer
from ltx.ticket import CONSTANT, DEAD, Ticket, TicketNode
from ltx.verification.pairs import taps_read, without_padding
from ltx.verification.sums import Entries, Sums

ROUNDING = 1e-12  # the sums here are formed in another order than the solver's, in float64


@dataclass(frozen=True)
class _Copied:
    range: tuple[float, float]  # of what is copied
    tap: Tensor  # (rows,) through which a row reads it; -1: none


class Approximation:
    """Walks the ticket's graph, which `topology` found to be the target's, beside the target's parameters."""

    def __init__(self, ticket: Ticket, target: Graph):
        self.ticket, self.target = ticket, target
        self.compared = 0
        self.outputs = self._channels(next(node for node in target.nodes if node.op == "output").inputs[0])
        self.worst = 0.0
        # per node: labels of its channels, and the value of each that is constant (NaN elsewhere)
        self.labels: dict[str, Tensor | None] = {}
        self.constants: dict[str, Tensor] = {}
        self.copies: dict[str, tuple[TicketNode, SourceLayer]] = {}  # node behind a 1x1 layer -> that layer
        self.copied: dict[str, _Copied] = {}  # layer of copies -> what it copies
        # node -> the least and largest value that its elements can have, whatever the parameters before it
        self.range: dict[str, tuple[float, float]] = {}

    def _channels(self, name: str) -> int:
        """Channels of a node of the target: those of the layer that writes it."""
        node = self.target[name]
        return len(node.layer.weight) if node.layer is not None else self._channels(node.inputs[0])

    def run(self) -> Iterator[str]:
        """Violations of the first layer that has any: what is behind it cannot be judged."""
        for node in self.ticket.graph:
            found: list[str] = []
            if node.op == "input":
                self.labels[node.name], self.constants[node.name] = None, torch.empty(0, dtype=torch.float64)
                self.range[node.name] = self.ticket.input_low, self.ticket.input_high
            elif node.op == "layer":
                found = list(self._layer(node))
            elif node.op == "given":
                found = list(self._given(node))
            elif node.op == "output":
                found = list(self._output(node))
            elif node.op == "add":
                self._add(node)
            elif node.op == "batch_norm":
                found = list(self._batch_norm(node))
            else:
                self._pass(node)
            yield from found
            if found:
                return

    def _pass(self, node: TicketNode) -> None:
        """Operations that keep the channels."""
        before = node.inputs[0]
        self.labels[node.name] = self.labels[before]
        self.constants[node.name] = self.constants[before]
        self.range[node.name] = self.range[before]
        if node.op == "activation":
            phi = from_attributes(node.attributes)
            self.constants[node.name] = phi.fn(self.constants[before])
            self.range[node.name] = phi.bounds(*self.range[before])
        if before in self.copies:
            self.copies[node.name] = (
                node if node.op == "activation" else self.copies[before][0],
                self.copies[before][1],
            )

    def _add(self, node: TicketNode) -> None:
        """A sum of two streams stands for a channel where both do; elsewhere nothing may read it."""
        one, other = (self.labels[name] for name in node.inputs)
        assert one is not None
        assert other is not None
        self.labels[node.name] = torch.where(one == other, one, DEAD)
        self.constants[node.name] = self.constants[node.inputs[0]] + self.constants[node.inputs[1]]
        (low, high), (other_low, other_high) = (self.range[name] for name in node.inputs)
        self.range[node.name] = low + other_low, high + other_high

    def _batch_norm(self, node: TicketNode) -> Iterator[str]:
        """A given batch norm: a slot has that of its channel, a constant one that of any channel."""
        before = node.inputs[0]
        labels = self.labels[before]
        norm = self.target[node.name].batch_norm
        assert labels is not None
        assert norm is not None  # topology has compared the names
        scale, shift = (self.ticket.given[f"{node.name}.{part}"] for part in ("weight", "bias"))
        live = labels >= 0
        same = (scale[live] == norm.scale[labels[live]]) & (shift[live] == norm.shift[labels[live]])
        for slot in live.nonzero().flatten()[~same][:1].tolist():
            yield f"batch norm {node.name}: slot {slot} has not that of its channel {int(labels[slot])}"
        constant = (labels == CONSTANT).nonzero().flatten()
        some = ((scale[constant, None] == norm.scale) & (shift[constant, None] == norm.shift)).any(1)
        for slot in constant[~some][:1].tolist():
            yield f"batch norm {node.name}: slot {slot} has that of no channel"
        self.labels[node.name] = labels
        self.constants[node.name] = self.constants[before] * scale.double() + shift.double()
        reach = max(map(abs, self.range[before]))
        high = float((norm.scale.abs() * reach + norm.shift.abs()).nan_to_num(nan=math.inf, posinf=math.inf).max())
        self.range[node.name] = -high, high

    def _layer(self, node: TicketNode) -> Iterator[str]:
        layer = self.ticket.layer(node.attributes["layer"])
        labels = self.ticket.slots[layer.name]
        rows, offsets, values = self.ticket.kept(layer.name)
        dead = rows[labels[rows] == DEAD]
        if len(dead):
            yield f"layer {layer.name}: row {int(dead[0])} is labelled as pruned and keeps parameters"
        self.labels[node.name], self.range[node.name] = labels, (-math.inf, math.inf)
        self.constants[node.name] = torch.full((layer.shape[0],), float("nan"), dtype=torch.float64)
        if layer.role != "copies" and self.labels[node.inputs[0]] is None:
            yield f"layer {layer.name}: reads the image, of which there are no slots, without copies"
        elif layer.role == "copies":
            yield from self._copy_layer(node, layer, labels, rows, offsets, values)
        else:
            yield from self._sums(node, layer, labels, rows, offsets, values)

    def _copy_layer(self, node, layer, labels, rows, offsets, values) -> Iterator[str]:
        """A layer of copies: a row keeps one entry, that of the channel it is labelled with, or a constant."""
        inside = self.labels[node.inputs[0]]
        count = torch.bincount(rows, minlength=layer.shape[0])
        bias_rows = self.ticket.bias_masks.get(layer.name, torch.empty(0, dtype=torch.int64))
        count[bias_rows] += 1
        wrong = ((labels != DEAD) & (count != 1)).nonzero().flatten()
        if len(wrong):
            yield f"layer {layer.name}: row {int(wrong[0])} keeps {int(count[wrong[0]])} parameters, a copy has one"
        channels = len(self.target.layers[layer.target].weight[0]) if inside is None else max(int(inside.max()) + 1, 0)
        if int(labels.max()) >= channels:
            yield f"{layer.name}.slots: {int(labels.max())} is no channel of what it copies"
        channel, tap = offsets // layer.taps, torch.full((layer.shape[0],), -1, dtype=torch.int64)
        tap[rows] = offsets % layer.taps  # none of a bias
        meaning = channel if inside is None else inside[channel]
        for row in rows[(labels[rows] != meaning) & (labels[rows] != DEAD)][:1].tolist():
            yield f"layer {layer.name}: row {row} is labelled {int(labels[row])} and copies something else"
        for row in bias_rows[labels[bias_rows] != CONSTANT][:1].tolist():
            yield f"layer {layer.name}: row {row} keeps its bias and is no constant"
        value = torch.full((layer.shape[0],), float("nan"), dtype=torch.float64)
        constant = labels[rows] == CONSTANT
        if inside is None:
            for row in rows[constant][:1].tolist():
                yield f"layer {layer.name}: row {row} is labelled constant and reads the image"
        elif constant.any():
            value[rows[constant]] = values[constant].double() * self.constants[node.inputs[0]][channel[constant]]
        for row in rows[constant & ~without_padding(layer)[offsets % layer.taps]][:1].tolist():
            yield f"layer {layer.name}: row {row} reads a constant through a tap that sees the zero padding"
        value[bias_rows] = source.biases(layer, self.ticket.seed, bias_rows).double()
        self.constants[node.name] = value
        self.copies[node.name] = (node, layer)
        self.copied[layer.name] = _Copied(self.range[node.inputs[0]], tap)

    def _sums(self, node, layer, labels, rows, offsets, values) -> Iterator[str]:
        """A layer of sums: in every slot of channel i they are W[i, j, k] and b[i]."""
        target = self.target.layers[layer.target]
        if int(labels.max()) >= len(target.weight):
            yield f"{layer.name}.slots: {int(labels.max())} is no channel of the target"
            return
        yield from self._opposites(node, layer, rows, offsets)
        meaning, worth, sign, sets = self._columns(node)
        channel, tap = offsets // layer.taps, offsets % layer.taps
        constant = meaning[channel] == CONSTANT
        known = self.constants[node.inputs[0]]
        term = values.double() * torch.where(constant, known[channel], worth[channel])
        # a constant channel is one only where no output position reads the zero padding through this tap
        for row in rows[constant & ~without_padding(layer)[tap]][:1].tolist():
            yield f"layer {layer.name}: row {row} reads a constant through a tap that sees the zero padding"
        if constant.any() and not without_padding(target).any():
            yield f"layer {layer.name}: reads a constant, and every tap of the target's layer sees the zero padding"
        taps = math.prod(target.weight.shape[2:]) if layer.kind == "conv" else layer.taps
        read = self._taps(node, layer, target, channel, tap)
        for row in rows[read < 0][:1].tolist():
            yield f"layer {layer.name}: row {row} reads a pixel that the target's layer does not"
            return
        parameter = torch.where(constant, -1, meaning[channel] * taps + read)
        yield from self._linearisation(node, layer, rows, parameter, values)
        weight = target.weight.view(len(target.weight), -1, taps).double()
        ins = weight.shape[1]
        constant_row = labels == CONSTANT

        into = ~constant if bool(constant.any()) else slice(None)  # of what may be many millions no copy is made
        negative, mine = sign[channel] < 0, rows[into]
        entries = Entries(
            mine * len(sets) + torch.where(negative[into], len(sets) - 1, 0), parameter[into], term[into],
            negative[into],
        )  # fmt: skip
        if len(mine) and (int(entries.parameter.min()) < 0 or int(entries.parameter.max()) >= ins * taps):
            yield f"layer {layer.name}: reads a channel that is pruned"
            return
        yield from self._base_sets(node, layer, channel[into], meaning, sign)

        epsilon, within = self.ticket.epsilon, self.ticket.within
        yield from self._compare(layer, entries, weight.flatten(1), labels.repeat_interleave(len(sets)), taps)
        biases = Entries(rows[constant], torch.zeros_like(rows[constant]), term[constant], negative[constant])
        yield from self._compare(layer, biases, target.bias.double()[:, None], labels)
        bias_sum = torch.zeros(layer.shape[0], dtype=torch.float64).index_add_(0, rows[constant], term[constant])
        has = torch.bincount(rows[constant], minlength=layer.shape[0]) > 0
        off = constant_row & has & ~((bias_sum - 1).abs() <= epsilon + ROUNDING)
        for row in off.nonzero().flatten()[:1].tolist():
            yield f"layer {layer.name}, row {row}: a constant sums to {float(bias_sum[row]):.6g}, not to 1"
        for row in mine[constant_row[mine]][:1].tolist():
            yield f"layer {layer.name}: row {row} is labelled constant and reads a channel that is not"
        self.constants[node.name] = torch.where(constant_row, bias_sum, torch.nan)
        if node.inputs[0] in self.copies:
            # one slot a channel: a parameter above epsilon is off by `within`, its linearisation by epsilon
            reach = max(1.0, *map(abs, self._copied(node).range))
            size = target.weight.abs().flatten(1).double()
            size = torch.where(size > epsilon, size + epsilon + within, size).sum(1)
            size = torch.where(size > 0, size * reach, 0.0)
            high = max(float((size + target.bias.abs().double() + within).max()), 1 + within)
            self.range[node.name] = -high, high

    def _largest_subset(self, layer) -> int | None:
        """Terms that a sum has at most; of opposite columns two are one."""
        most = self.ticket.largest_subset
        return None if most is None else most * (2 if layer.opposite == "columns" else 1)

    def _base_sets(self, node, layer, columns, meaning, sign) -> Iterator[str]:
        """Of a channel no more columns are read than a base set has: m, or m opposites.

        With feedback narrow layers have more slots. In a pair base sets are of a channel, a position and a sign. Copies
        of both signs share one where the activation's slopes are odd or its offset cancels; elsewhere an input that is
        not negative needs one sign alone, but the construction need not know that it is not.
        """
        most = self._largest_subset(layer)
        if most is None or self.ticket.feedback:
            return
        position = self._copied(node).tap if node.inputs[0] in self.copies else torch.zeros_like(meaning)
        read = torch.bincount(columns).nonzero().flatten()
        sets, many = torch.stack([meaning[read], sign[read].long(), position[read]]).unique(dim=1, return_counts=True)
        for channel, count in zip(sets[0, many > most][:1].tolist(), many[many > most][:1].tolist(), strict=True):
            yield f"layer {layer.name}: reads {count} slots of input channel {channel}, a base set has {most}"

    def _compare(self, layer, entries, target, labels, taps=0) -> Iterator[str]:
        """Sums are those of the target's parameters above epsilon, of no more terms of either sign than may be.

        labels: of the sums, those of a row one behind the other.
        taps: of a weight; 0 for a bias.
        """
        sets, most = len(labels) // layer.shape[0], self._largest_subset(layer)
        sums = Sums.form(entries, target, labels, self.ticket.epsilon)
        error = (sums.found - sums.wanted).abs()
        self.compared += len(error)
        if len(error):
            self.worst = max(self.worst, float(error.max()))
        for at in (~(error <= self.ticket.within + ROUNDING)).nonzero()[:3, 0].tolist():
            column = int(sums.parameter[at])
            where = f"layer {layer.name}, row {int(sums.of[at]) // sets}, {'weight' if taps else 'bias'}"
            where += f" (input channel {column // taps}, tap {column % taps})" if taps else ""
            yield (
                f"{where}: {float(sums.found[at]):.6g} is {float(error[at]):.3g} from the target's "
                f"{float(sums.wanted[at]):.6g}, more than {self.ticket.within:g}"
            )
        for at in [] if most is None else (sums.terms > most).any(1).nonzero()[:1, 0].tolist():
            row = int(sums.of[at]) // sets
            yield f"layer {layer.name}, row {row}: a sum has more terms than a base set of the ticket"
        for which, column in sums.stray[:3].tolist():
            where = f"input channel {column // taps}, tap {column % taps}" if taps else "bias"
            yield (
                f"layer {layer.name}, row {which // sets}, {where}: keeps parameters where the target has none "
                "above epsilon"
            )

    def _taps(self, node, layer, target, channel, tap) -> Tensor:
        """The taps of the target that entries of a layer of sums read; -1: none."""
        if node.inputs[0] not in self.copies:
            return tap
        found = taps_read(self.copies[node.inputs[0]][1], layer, target)
        assert isinstance(found, Tensor)  # or topology has found what is wrong
        first = self._copied(node).tap[channel]
        return torch.where(first < 0, tap, found[first, tap])

    def _copied(self, node) -> _Copied:
        """What the copies that a layer of sums reads copy."""
        return self.copied[self.copies[node.inputs[0]][1].name]

    def _columns(self, node) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
        """Per input channel of a layer of sums: what it stands for, what an entry is worth, its sign; the sums.

        The sign is 0 where copies of both signs share base sets; sums are one, or one for each sign of the input.
        """
        before = node.inputs[0]
        meaning = self.labels[before]
        assert meaning is not None
        if before not in self.copies:
            return meaning, torch.ones(len(meaning), dtype=torch.float64), torch.zeros(len(meaning)), (0,)
        phi_node, copies = self.copies[before]
        phi = _inside(phi_node)
        rows, _, values = self.ticket.kept(copies.name)
        entry = torch.zeros(len(meaning), dtype=torch.float64)
        entry[rows] = values.double()
        total = phi.slope_pos + phi.slope_neg
        if phi.offset != 0:
            # rows 2n and 2n + 1 are kept together: each is worth half of what the two are
            return meaning, entry * total / 2, torch.zeros(len(meaning)), (0,)
        if phi.odd_slopes or self._copied(node).range[0] >= 0:
            slope = torch.where(entry > 0, phi.slope_pos, phi.slope_neg)
            return meaning, entry * slope, 0 * entry if phi.odd_slopes else entry.sign(), (0,)
        return meaning, entry * total, entry.sign(), (1, -1)

    def _opposites(self, node, layer, rows, offsets) -> Iterator[str]:
        """Behind copies with phi(0) != 0 columns 2n and 2n + 1 are opposites and kept together (Appendix D)."""
        if node.inputs[0] not in self.copies:
            return
        phi_node, copies = self.copies[node.inputs[0]]
        phi = _inside(phi_node)
        if phi.offset == 0:
            return
        if (copies.opposite, layer.opposite) != ("rows", "columns"):
            yield f"layer {layer.name}: behind {phi.name} the pair must be initialised looks_linear"
        flat = rows * layer.row_size + offsets
        partner = flat + layer.taps * (1 - 2 * (offsets // layer.taps & 1))
        for entry in flat[~torch.isin(partner, flat)][:1].tolist():
            yield f"layer {layer.name}: entry {entry} is kept without its opposite"

    def _linearisation(self, node, layer, rows, parameter, values) -> Iterator[str]:
        """Behind copies whose activation is linear near 0 only: how far the pair is from linear (Theorem 3.1).

        The terms v phi(lambda x) of one parameter may be off by epsilon times the largest input, together.
        """
        if node.inputs[0] not in self.copies:
            return
        phi_node, copies = self.copies[node.inputs[0]]
        phi, bound = _inside(phi_node), max(map(abs, self._copied(node).range))
        if phi.exact:
            return
        if not math.isfinite(bound):
            yield f"layer {layer.name}: its inputs have no known bound, which {phi.name} needs to be nearly linear"
            return
        z = torch.linspace(-1, 1, 4001, dtype=torch.float64) * bound * copies.largest
        linear = torch.where(z > 0, phi.slope_pos * z, phi.slope_neg * z) + phi.offset
        off = float((phi.fn(z) - linear).abs().max())
        constant = parameter < 0
        key = rows * (int(parameter.max()) + 1 if len(parameter) else 1) + parameter
        _, which = torch.unique(key[~constant], return_inverse=True)
        total = torch.zeros(int(which.max()) + 1 if len(which) else 0, dtype=torch.float64)
        total.index_add_(0, which, values[~constant].double().abs())
        if len(total) and not float(total.max()) * off <= self.ticket.epsilon * bound * (1 + 1e-6):
            yield (
                f"layer {layer.name}: sigma {copies.sigma:g} leaves {phi.name} {float(total.max()) * off:.3g} from "
                f"linear on inputs of at most {bound:g}, more than epsilon allows"
            )

    def _given(self, node: TicketNode) -> Iterator[str]:
        """A kept head: the target's columns at one slot of each channel, its bias, nothing else."""
        target = self.target.layers[node.attributes["target"]]
        weight, bias = (self.ticket.given[f"{node.name}.{part}"] for part in ("weight", "bias"))
        taps, labels = node.attributes["taps"], self.labels[node.inputs[0]]
        assert labels is not None
        ours = weight.view(len(weight), -1, taps)
        theirs = target.weight.view(len(target.weight), -1, taps)
        expected = torch.zeros_like(ours)
        live = (labels >= 0) & ours.ne(0).any(2).any(0)
        expected[:, live] = theirs[:, labels[live]]
        missing = set(theirs.ne(0).any(2).any(0).nonzero().flatten().tolist()) - set(labels[live].tolist())
        if missing or labels[live].unique().numel() != int(live.sum()):
            yield f"head {node.name}: channel {min(missing, default=-1)} has no slot, or a channel has several"
        if not torch.equal(ours, expected) or not torch.equal(bias, target.bias):
            yield f"head {node.name}: its given parameters are not the target's"
        self.labels[node.name], self.range[node.name] = torch.arange(len(weight)), (-math.inf, math.inf)
        self.constants[node.name] = torch.full((len(weight),), float("nan"), dtype=torch.float64)

    def _output(self, node: TicketNode) -> Iterator[str]:
        labels = self.labels[node.inputs[0]]
        assert labels is not None
        rows = torch.tensor(node.attributes["rows"], dtype=torch.int64)
        if not torch.equal(labels[rows], torch.arange(self.outputs)):
            yield "output: its rows do not stand for the target's outputs in their order"


def _inside(node: TicketNode) -> Activation:
    """The activation inside a pair; none where the pair is linear."""
    return from_attributes(node.attributes) if node.op == "activation" else ACTIVATIONS["identity"]
