"""Checks of a ticket that use nothing of the code that made it: its file, its source, and the target's parameters.

Without a target: the ticket is a subnetwork of the source that its seed defines. With the target: the source's
parameters, summed over the kept subsets, are within epsilon of every target parameter above epsilon, in every
slot, and no other parameter is there. The labels of the slots are the ticket's claim; a wrong label is a
violation like any other, because the sums do not come out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ltx import source
from ltx.activations import Activation, activation, leaky_relu
from ltx.graph import Graph, Layer
from ltx.source import SourceLayer
from ltx.ticket import CONSTANT, DEAD, Ticket, TicketNode

ROUNDING = 1e-12  # the sums here are formed in another order than the solver's, in float64


@dataclass(frozen=True)
class Verification:
    """What was checked and what is wrong."""

    violations: tuple[str, ...]
    approximated: int  # sums over kept subsets that were compared with a target parameter; 0 without a target
    max_parameter_error: float  # largest |sum - parameter|; NaN without a target

    @property
    def ok(self) -> bool:
        return not self.violations


def verify(ticket: Ticket, target: Graph | None = None) -> Verification:
    """Verify a ticket, against its source alone or with its target's graph too."""
    violations = list(_structure(ticket))
    if violations or target is None:
        return Verification(tuple(violations), 0, float("nan"))
    check = _Approximation(ticket, target)
    violations = list(check.run())
    return Verification(tuple(violations), check.compared, check.worst)


def _structure(ticket: Ticket) -> Iterator[str]:
    """Violations of: indices in range, sorted, unique; widths that fit each other; a source of layers 0, 1, ..."""
    if ticket.law != "uniform":
        yield f"law '{ticket.law}' is not known"
    for position, layer in enumerate(ticket.layers):
        if layer.index != position:
            yield f"layer {layer.name}: index {layer.index}, but it is layer {position} of the source"
        if layer.bias != (position == 0):
            yield f"layer {layer.name}: only the first layer of a source has biases, and it has them"
        size = layer.shape[0] * layer.row_size
        yield from _indices(f"{layer.name}.mask", ticket.masks[layer.name], size)
        if layer.name in ticket.bias_masks:
            size = layer.shape[0] if layer.bias else 0
            yield from _indices(f"{layer.name}.bias_mask", ticket.bias_masks[layer.name], size)
        if ticket.slots[layer.name].shape != (layer.shape[0],):
            yield f"{layer.name}.slots: has shape {tuple(ticket.slots[layer.name].shape)}, not ({layer.shape[0]},)"
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
        if len(node.inputs) != (node.op != "input") or any(name not in widths for name in node.inputs):
            yield f"graph: node '{node.name}' reads {list(node.inputs)}, which are not there before it"
            return
        before = widths[node.inputs[0]] if node.inputs else None
        widths[node.name] = before
        if node.op == "layer":
            used.append(node.attributes["layer"])
            if used[-1] not in names:
                break
            layer = ticket.layer(used[-1])
            if before is not None and layer.row_size != before * layer.taps:
                yield f"layer {layer.name}: reads {layer.row_size // layer.taps} channels, there are {before}"
            widths[node.name] = layer.shape[0]
        elif node.op == "given":
            weight = ticket.given.get(f"{node.name}.weight")
            if weight is None or f"{node.name}.bias" not in ticket.given or before is None:
                yield f"graph: node '{node.name}' has no given parameters"
                return
            if weight.shape[1] != before * node.attributes["taps"]:
                yield f"node {node.name}: its given weight reads {weight.shape[1]} values, there are others"
            widths[node.name] = len(weight)
        elif node.op == "output" and not all(0 <= r < (before or 0) for r in node.attributes["rows"]):
            yield f"output: its rows lie outside the {before} that there are"
    if used != names:
        yield f"graph: applies the layers {used}, the source has {names}"


_ATTRIBUTES = {
    "input": (), "layer": ("layer",), "given": ("target", "taps"), "activation": ("function",), "flatten": (),
    "max_pool": ("kernel_size", "stride", "padding"), "output": ("rows",),
}  # fmt: skip


def _indices(name: str, mask: Tensor, size: int) -> Iterator[str]:
    if mask.dtype != torch.int64 or mask.ndim != 1:
        yield f"{name}: must be int64 and one-dimensional, is {mask.dtype} {tuple(mask.shape)}"
    elif len(mask) and not (int(mask.min()) >= 0 and int(mask.max()) < size):
        yield f"{name}: index {int(mask.min() if mask.min() < 0 else mask.max())} lies outside 0 to {size - 1}"
    elif len(mask) > 1 and not (mask[1:] > mask[:-1]).all():
        at = int((mask[1:] <= mask[:-1]).nonzero()[0])
        yield f"{name}: not sorted or not unique at position {at + 1} ({int(mask[at])}, {int(mask[at + 1])})"


class _Approximation:
    """Walks the ticket's graph beside the target's parameters."""

    def __init__(self, ticket: Ticket, target: Graph):
        self.ticket, self.target = ticket, target
        self.compared = 0
        self.worst = 0.0
        # per node: labels of its channels, and the value of each that is constant (NaN elsewhere)
        self.labels: dict[str, Tensor | None] = {}
        self.constants: dict[str, Tensor] = {}
        self.copies: dict[str, tuple[TicketNode, SourceLayer]] = {}  # node behind a 1x1 layer -> that layer
        self.nonnegative: dict[str, bool] = {}  # node -> whether none of its elements can be negative

    def run(self) -> Iterator[str]:
        ticket = self.ticket
        if ticket.target_sha256 != self.target.digest():
            yield (
                f"target: its parameters have SHA-256 {self.target.digest()[:12]}..., "
                f"the ticket was made for {ticket.target_sha256[:12]}..."
            )
            return
        constructed = {layer.target for layer in ticket.layers}
        kept = {node.attributes["target"] for node in ticket.graph if node.op == "given"}
        if (constructed | kept) != set(self.target.layers) or constructed & kept:
            yield (
                f"target: has the layers {sorted(self.target.layers)}, the ticket {sorted(constructed)} and, "
                f"given, {sorted(kept)}"
            )
            return
        if len(kept) > 1 or (kept and kept != {self.target.head}):
            yield f"graph: the layers {sorted(kept)} are given, only the head may be"
        yield from self._operations()
        for node in ticket.graph:
            if node.op == "input":
                self.labels[node.name], self.constants[node.name] = None, torch.empty(0, dtype=torch.float64)
                self.nonnegative[node.name] = ticket.input_low >= 0
            elif node.op == "layer":
                yield from self._layer(node)
            elif node.op == "given":
                yield from self._given(node)
            elif node.op == "output":
                yield from self._output(node)
            else:
                self._pass(node)

    def _operations(self) -> Iterator[str]:
        """The ticket applies the target's activations and poolings, in the target's order."""
        inner = {n.name for n in self.ticket.graph if n.inputs and n.inputs[0] in self._copy_nodes()}
        ours = [
            (n.op, n.attributes.get("function", n.attributes.get("target", n.attributes.get("kernel_size"))))
            for n in self.ticket.graph
            if n.op in ("activation", "max_pool") and n.name not in inner
        ]
        theirs = [
            (n.op, n.activation.name if n.activation else list(n.attributes["kernel_size"]))
            for n in self.target.nodes
            if n.op in ("activation", "max_pool")
        ]
        if ours != theirs:
            yield f"graph: applies {ours}, the target {theirs}"

    def _copy_nodes(self) -> set[str]:
        return {
            n.name for n in self.ticket.graph
            if n.op == "layer" and self.ticket.layer(n.attributes["layer"]).role == "copies"
        }  # fmt: skip

    def _pass(self, node: TicketNode) -> None:
        """Operations that keep the channels."""
        before = node.inputs[0]
        self.labels[node.name] = self.labels[before]
        self.constants[node.name] = self.constants[before]
        self.nonnegative[node.name] = self.nonnegative[before]
        if node.op == "activation":
            phi = _phi(node)
            self.constants[node.name] = phi.fn(self.constants[before])
            low = 0.0 if self.nonnegative[before] else -1e9
            self.nonnegative[node.name] = phi.bounds(low, 1e9)[0] >= 0
        if before in self.copies:
            self.copies[node.name] = (
                node if node.op == "activation" else self.copies[before][0],
                self.copies[before][1],
            )

    def _layer(self, node: TicketNode) -> Iterator[str]:
        layer = self.ticket.layer(node.attributes["layer"])
        labels = self.ticket.slots[layer.name]
        rows, offsets, values = self.ticket.kept(layer.name)
        dead = rows[labels[rows] == DEAD]
        if len(dead):
            yield f"layer {layer.name}: row {int(dead[0])} is labelled as pruned and keeps parameters"
        self.labels[node.name], self.nonnegative[node.name] = labels, False
        self.constants[node.name] = torch.full((layer.shape[0],), float("nan"), dtype=torch.float64)
        if layer.role == "copies":
            yield from self._copy_layer(node, layer, labels, rows, offsets, values)
        else:
            yield from self._sums(node, layer, labels, rows, offsets, values)

    def _copy_layer(self, node, layer, labels, rows, offsets, values) -> Iterator[str]:
        """A 1x1 layer: a row keeps one entry, that of the channel it is labelled with, or a constant."""
        inside = self.labels[node.inputs[0]]
        count = torch.bincount(rows, minlength=layer.shape[0])
        bias_rows = self.ticket.bias_masks.get(layer.name, torch.empty(0, dtype=torch.int64))
        count[bias_rows] += 1
        wrong = ((labels != DEAD) & (count != 1)).nonzero().flatten()
        if len(wrong):
            yield f"layer {layer.name}: row {int(wrong[0])} keeps {int(count[wrong[0]])} parameters, a copy has one"
        meaning = offsets if inside is None else inside[offsets]
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
            value[rows[constant]] = values[constant].double() * self.constants[node.inputs[0]][offsets[constant]]
        value[bias_rows] = source.biases(layer, self.ticket.seed, bias_rows).double()
        self.constants[node.name] = value
        self.copies[node.name] = (node, layer)
        self.negative_inputs = not self.nonnegative[node.inputs[0]]

    def _sums(self, node, layer, labels, rows, offsets, values) -> Iterator[str]:
        """A layer of sums: in every slot of channel i they are W[i, j, k] and b[i]."""
        target = self.target.layers[layer.target]
        if (layer.stride, layer.padding, layer.dilation) != (target.stride, target.padding, target.dilation):
            yield f"layer {layer.name}: stride, padding or dilation are not the target's"
        yield from self._opposites(node, layer, rows, offsets)
        meaning, worth, sign, sets = self._columns(node)
        channel, tap = offsets // layer.taps, offsets % layer.taps
        constant = meaning[channel] == CONSTANT
        known = self.constants[node.inputs[0]]
        term = values.double() * torch.where(constant, known[channel], worth[channel])
        # a constant channel is one only where no output position reads the zero padding through this tap
        inner = torch.tensor([_inner(target, layer, k) for k in range(layer.taps)])
        for row in rows[constant & ~inner[tap]][:1].tolist():
            yield f"layer {layer.name}: row {row} reads a constant through a tap that sees the zero padding"
        weight = target.weight.view(len(target.weight), -1, layer.taps).double()
        ins = weight.shape[1]
        live = labels != DEAD
        constant_row = labels == CONSTANT

        sums = torch.zeros(layer.shape[0] * len(sets), ins * layer.taps, dtype=torch.float64)
        kept = torch.zeros_like(sums, dtype=torch.bool)
        into = ~constant
        set_of = torch.where(sign[channel] < 0, len(sets) - 1, 0)
        index = (rows * len(sets) + set_of)[into], (meaning[channel] * layer.taps + tap)[into]
        if len(index[1]) and (int(index[1].min()) < 0 or int(index[1].max()) >= ins * layer.taps):
            yield f"layer {layer.name}: reads a channel that is pruned"
            return
        sums.index_put_(index, term[into], accumulate=True)
        kept[index] = True
        bias_sum = torch.zeros(layer.shape[0], dtype=torch.float64).index_add_(0, rows[constant], term[constant])

        wanted = torch.zeros(layer.shape[0], ins * layer.taps, dtype=torch.float64)
        channels = live & ~constant_row
        wanted[channels] = weight.flatten(1)[labels[channels]]
        wanted = wanted.repeat_interleave(len(sets), 0)
        epsilon = self.ticket.epsilon
        yield from self._compare(layer, sums, kept, wanted, channels.repeat_interleave(len(sets)), len(sets), epsilon)

        bias = torch.zeros(layer.shape[0], dtype=torch.float64)
        bias[channels] = target.bias.double()[labels[channels]]
        has = torch.bincount(rows[constant], minlength=layer.shape[0]) > 0
        yield from self._compare(layer, bias_sum[:, None], has[:, None], bias[:, None], channels, 1, epsilon, "bias")
        stray = kept.view(layer.shape[0], -1).any(1) & constant_row
        for row in stray.nonzero().flatten()[:1].tolist():
            yield f"layer {layer.name}: row {row} is labelled constant and reads a channel that is not"
        self.constants[node.name] = torch.where(constant_row, bias_sum, torch.nan)

    def _compare(self, layer, sums, kept, wanted, rows, sets, epsilon, what="weight") -> Iterator[str]:
        big = (wanted.abs() > epsilon) & rows[:, None]
        error = (sums - wanted).abs()
        self.compared += int(big.sum())
        if big.any():
            self.worst = max(self.worst, float(error[big].max()))
        for row, column in (big & (error > epsilon + ROUNDING)).nonzero()[:3].tolist():
            where = f"layer {layer.name}, row {row // sets}, {what}"
            where += f" (input channel {column // layer.taps}, tap {column % layer.taps})" if what == "weight" else ""
            yield (
                f"{where}: {float(sums[row, column]):.6g} is {float(error[row, column]):.3g} from the target's "
                f"{float(wanted[row, column]):.6g}, epsilon is {epsilon:g}"
            )
        for row, column in (kept & ~big & rows[:, None]).nonzero()[:3].tolist():
            where = f"input channel {column // layer.taps}, tap {column % layer.taps}" if what == "weight" else what
            yield (
                f"layer {layer.name}, row {row // sets}, {where}: keeps parameters where the target has none "
                "above epsilon"
            )

    def _columns(self, node) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
        """Per input channel of a layer of sums: what it stands for, what an entry is worth, its sign; the base sets."""
        before = node.inputs[0]
        meaning = self.labels[before]
        assert meaning is not None
        if before not in self.copies:
            return meaning, torch.ones(len(meaning), dtype=torch.float64), torch.zeros(len(meaning)), (0,)
        phi_node, copies = self.copies[before]
        phi = _phi(phi_node)
        rows, _, values = self.ticket.kept(copies.name)
        entry = torch.zeros(len(meaning), dtype=torch.float64)
        entry[rows] = values.double()
        total = phi.slope_pos + phi.slope_neg
        if phi.offset != 0:
            # rows 2n and 2n + 1 are kept together: each is worth half of what the two are
            return meaning, entry * total / 2, torch.zeros(len(meaning)), (0,)
        if phi.odd_slopes or not self.negative_inputs:
            return meaning, entry * phi.slope_pos, torch.zeros(len(meaning)), (0,)
        return meaning, entry * total, entry.sign(), (1, -1)

    def _opposites(self, node, layer, rows, offsets) -> Iterator[str]:
        """Behind copies with phi(0) != 0 columns 2n and 2n + 1 are opposites and kept together (Appendix D)."""
        if node.inputs[0] not in self.copies:
            return
        phi_node, copies = self.copies[node.inputs[0]]
        if _phi(phi_node).offset == 0:
            return
        if (copies.opposite, layer.opposite) != ("rows", "columns"):
            yield f"layer {layer.name}: behind {_phi(phi_node).name} the pair must be initialised looks_linear"
        flat = rows * layer.row_size + offsets
        partner = flat + layer.taps * (1 - 2 * (offsets // layer.taps & 1))
        for entry in flat[~torch.isin(partner, flat)][:1].tolist():
            yield f"layer {layer.name}: entry {entry} is kept without its opposite"

    def _given(self, node: TicketNode) -> Iterator[str]:
        """A kept head: the target's columns at the slots that read them, its bias, nothing else."""
        target = self.target.layers[node.attributes["target"]]
        weight, bias = (self.ticket.given[f"{node.name}.{part}"] for part in ("weight", "bias"))
        taps, labels = node.attributes["taps"], self.labels[node.inputs[0]]
        assert labels is not None
        ours = weight.view(len(weight), -1, taps)
        theirs = target.weight.view(len(target.weight), -1, taps)
        expected = torch.zeros_like(ours)
        live = labels >= 0
        expected[:, live] = theirs[:, labels[live]]
        missing = set(theirs.ne(0).any(2).any(0).nonzero().flatten().tolist()) - set(labels[live].tolist())
        if missing or labels[live].unique().numel() != int(live.sum()):
            yield f"head {node.name}: channel {min(missing, default=-1)} has no slot, or a channel has several"
        if not torch.equal(ours, expected) or not torch.equal(bias, target.bias):
            yield f"head {node.name}: its given parameters are not the target's"
        self.labels[node.name] = torch.arange(len(weight))
        self.constants[node.name] = torch.full((len(weight),), float("nan"), dtype=torch.float64)

    def _output(self, node: TicketNode) -> Iterator[str]:
        labels = self.labels[node.inputs[0]]
        assert labels is not None
        rows = torch.tensor(node.attributes["rows"])
        last = [n for n in self.target.nodes if n.op == "layer"][-1].layer
        assert last is not None
        if not torch.equal(labels[rows], torch.arange(len(last.weight))):
            yield "output: its rows do not stand for the target's outputs in their order"


def _phi(node: TicketNode) -> Activation:
    slope = node.attributes.get("negative_slope")
    return activation(node.attributes["function"]) if slope is None else leaky_relu(slope)


def _inner(target: Layer, layer: SourceLayer, tap: int) -> bool:
    """Whether no output position reads the zero padding through this tap."""
    if target.kind == "linear":
        return True
    height, width = target.weight.shape[2:]
    inside = True
    for a, size, padding, dilation in zip(
        divmod(tap, width), (height, width), target.padding, target.dilation, strict=True
    ):
        inside &= padding <= a * dilation <= dilation * (size - 1) - padding
    return inside
