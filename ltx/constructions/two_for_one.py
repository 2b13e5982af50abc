"""Two layers for one (section 3.1, Corollary C.1): a 1x1 layer that copies the input, and a layer that sums.

Row n of the 1x1 layer keeps one entry lambda_n, so that its output is phi(lambda_n x_j). Where phi is linear on
either side of 0, the next layer needs

    sum over S of v[i, n, k] * lambda_n * gain  within epsilon of  W[i, j, k],

with a gain that depends on which rows serve: those of either sign as a base set of their own (gain 1 / r = m_+ +
m_-), one set alone where phi is odd or the input nonnegative (m_+), or opposite pairs of rows where phi(0) != 0
(m_+ + m_-, and the offset cancels). The second layer's parameters are scaled by 1 / (sigma * gain), so that every
base set consists of products of two uniform numbers on [-1, 1], as Corollary C.1 assumes (law normal: of products of
two standard normal ones). The first layer may have a larger kernel, of which a row keeps one tap, and the target's
stride (`strides`).
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ltx import source
from ltx.activations import ACTIVATIONS, Activation
from ltx.constructions.builder import Step, TicketBuilder, constant_row, source_layer
from ltx.constructions.problems import layer_scale, target_problems
from ltx.constructions.rows import BaseSets
from ltx.constructions.strides import PairGeometry, pair_geometry
from ltx.errors import ConstructionError
from ltx.graph import Graph, above
from ltx.source import SourceLayer
from ltx.ticket import CONSTANT, DEAD

ROWS, AHEAD = 512, 64  # of the 1x1 layer that are looked at together, at entries for as many rows and some more
SMALLEST_SIGMA = 1e-30  # so that its inverse is a float32 too
log = logging.getLogger(__name__)
ROUNDING = 0.01  # of a parameter by float32, for an input of 1: what is bearable, where epsilon is not larger


@dataclass(frozen=True)
class PairLaw:
    """Which rows of the 1x1 layer serve, and what a row is worth."""

    signs: tuple[int, ...]  # of lambda, one base set each; 0: either sign
    gain: float
    opposite: bool  # rows 2n and 2n + 1 are opposites and are kept together


def pair_law(phi: Activation, nonnegative: bool) -> PairLaw:
    """The base sets that a two-for-one pair needs with activation `phi` (Assumption 2.3, Appendix D)."""
    total = phi.slope_pos + phi.slope_neg
    if phi.offset != 0:
        return PairLaw((0,), total, True)
    if phi.odd_slopes:
        return PairLaw((0,), phi.slope_pos, False)
    if nonnegative:
        return PairLaw((1,), phi.slope_pos, False)
    return PairLaw((1, -1), total, False)


def pair_activation(graph: Graph, name: str) -> Activation:
    """The source's activation inside the pair for layer `name`: that behind the layer, else the last one before it.

    Else, where a branch that has none comes before all others, the network's first. A projection shortcut is linear,
    and so is the pair that stands for it: the identity.
    """
    if graph.is_projection(name):
        return ACTIVATIONS["identity"]
    after = graph.readers(name)
    while after:  # those that read it, those that read these, ...
        for node in after:
            if node.activation is not None:
                return node.activation
        after = list({node.name: node for before in after for node in graph.readers(before.name)}.values())
    position = graph.nodes.index(graph[name])
    before = [n.activation for n in graph.nodes[:position] if n.activation is not None]
    every = [n.activation for n in graph.nodes if n.activation is not None]
    return (before[-1:] or every[:1] or [ACTIVATIONS["identity"]])[0]


def linear_scale(
    phi: Activation, law: PairLaw, bound: float, *, m: int, epsilon: float, scale: float, largest: float = 1.0
) -> float:
    """sigma of the 1x1 layer: with inputs of at most `bound`, phi is linear enough where its inputs can lie.

    A parameter is a sum of at most m (with two base sets or opposite rows, 2 m) terms v phi(lambda x), where |lambda|
    <= largest * sigma and |v| <= largest * scale / (sigma gain). With a = largest * sigma * bound and |phi - phi_hat|
    <= share * a on [-a, a], share = epsilon * gain / (terms * scale * largest^2), the parameter's contribution is off
    by at most epsilon * bound, whatever the subset: linearisation at most doubles the error that epsilon allows. In
    practice it adds far less.

    Args:
        largest: beyond which magnitude no parameter of sigma 1 lies.
    """
    if phi.exact:
        return 1.0
    terms = m * (2 if law.opposite else len(law.signs))
    share = epsilon * law.gain / (terms * scale * largest**2)
    return float(np.float32(phi.linear_radius(share) / (largest * bound)))


def two_for_one(builder: TicketBuilder, step: Step, phi: Activation) -> tuple[str, float]:
    """Approximate a target layer by a pair of source layers with `phi` between them (identity: with nothing).

    Returns:
        the ticket's node, and the largest magnitude of an output.
    """
    plan = builder.plan
    name, target, place = step.name, step.target, step.place
    weight = place.entries(target)
    law = pair_law(phi, place.nonnegative)
    scale = layer_scale(target, plan.scaling)
    if not phi.exact and not np.isfinite(place.bound):
        raise ConstructionError(
            f"layer {name}: its inputs have no known bound, which {phi.name} needs to be nearly linear on them"
            + ("; give every parameter one (feedback.bound)" if math.isinf(plan.within) else "")
        )
    reach = source.LAWS[plan.law].largest
    # the biases of the first layer read constants of 1: phi has to be linear on these, too
    largest = max(place.bound, 1.0) if step.biased and builder.depth == 0 else place.bound
    sigma = linear_scale(phi, law, largest, m=plan.base_set_size, epsilon=plan.epsilon, scale=scale, largest=reach)
    if not sigma >= SMALLEST_SIGMA:
        raise ConstructionError(
            f"layer {name}: its inputs may be as large as {place.bound:.3g}, on which {phi.name} cannot be made linear "
            "in float32"
        )
    # opposite rows leave phi(lambda x) - phi(-lambda x), of two numbers that float32 rounds as phi(0)
    rounding = 2.0**-23 * abs(phi.offset) * reach * scale / (sigma * law.gain)
    if rounding > max(plan.epsilon, ROUNDING):
        remedies = ["a smaller input_range"]
        if plan.law != "uniform":
            remedies.append("law=uniform, whose numbers do not reach as far")
        if place.stream is not None:
            remedies += [
                "batch norm in front of it",
                "construction=L+1, which has such rows in front of the image alone",
            ]
        raise ConstructionError(
            f"layer {name}: its inputs may be as large as {place.bound:.3g}, for which opposite rows of {phi.name} are "
            f"scaled down so far that float32 rounds a parameter by up to {rounding:.2g}; use {' or '.join(remedies)}"
        )
    if rounding > plan.epsilon:
        log.warning(
            "layer %s: float32 rounds a parameter behind opposite rows of %s by up to %.2g, more than epsilon: only in "
            "float64 is the ticket nearer to its target than one of epsilon=%.0e", name, phi.name, rounding, rounding,
        )  # fmt: skip
    image = target.kind == "conv" or (place.stream is not None and not place.vector)
    geometry = pair_geometry(
        target, name, weight.shape[2], image=image, kernel=plan.pair_kernel, stride=plan.pair_stride,
        needed=step.biased,
    )  # fmt: skip
    positions, weight = _by_position(weight, geometry)
    copies = _copy_layer(builder, step, weight, positions, law, phi, sigma, geometry)

    tap = geometry.constants[1] if geometry.constants else 0
    problems = target_problems(weight, target, plan.epsilon, copies.base, copies.constant, tap)
    layer = source_layer(
        builder, name, target, weight.shape[2], sigma=float(np.float32(scale / (sigma * law.gain))), role="pair",
        opposite="columns" if law.opposite else "none",
    )  # fmt: skip
    layer = geometry.second_layer(layer)
    node = builder.add_writer(
        layer, copies.node, copies.width, step, [*problems, constant_row(step, copies.constant, tap)],
        copies.bases,
    )  # fmt: skip
    if math.isinf(plan.within):
        return node, math.inf
    entries = target.weight.abs().flatten(1).double()
    off = plan.within + plan.epsilon  # of a parameter and its linearisation
    reach = (entries + off * above(entries, plan.epsilon)).sum(1) * max(place.bound, 1.0)
    bound = float((reach + target.bias.abs() + plan.within).max())
    return node, max(bound, 1.0 + plan.within)


@dataclass(frozen=True)
class _Copies:
    node: str  # what the second layer reads
    width: int
    bases: BaseSets
    base: Tensor  # (C_in * P, n) base sets of each input channel and position
    constant: int  # base set of the constants


def _by_position(weight: Tensor, geometry: PairGeometry) -> tuple[Tensor, Tensor]:
    """The first layer's taps that are used (P,), and the weight (C_out, C_in * P, K') by them and the second's taps."""
    positions, position = geometry.first.unique(return_inverse=True)
    found = torch.zeros(*weight.shape[:2], len(positions), geometry.taps)
    found[:, :, position, geometry.second] = weight
    return positions, found.flatten(1, 2)


def _copy_layer(
    builder: TicketBuilder, step: Step, weight: Tensor, positions: Tensor, law: PairLaw, phi: Activation, sigma: float,
    geometry: PairGeometry,
) -> _Copies:  # fmt: skip
    """Add the first layer and its activation: m rows for every (input channel, position, sign) that the target reads.

    Args:
        weight: (C_out, C_in * P, K) of the target layer, by channel, position and tap of the second layer.
        positions: (P,) taps of this layer.
    """
    m, epsilon = builder.plan.base_set_size, builder.plan.epsilon
    name, target, place = step.name, step.target, step.place
    first = builder.depth == 0  # the only layer with biases: its constants need no input
    read = above(weight, epsilon).any(0).any(1)  # (C_in * P,)
    by_channel = read.view(-1, len(positions))
    taken = place.take(by_channel, 1, int(step.biased and not first))
    image = bool(geometry.lines)
    layer = SourceLayer(
        f"{name}.copies", builder.depth, "conv" if image else "linear", (0, 0), 1,
        sigma=sigma, opposite="rows" if law.opposite else "none", bias=first, role="copies", target=name,
        law=builder.plan.law,
    )  # fmt: skip
    layer = geometry.first_layer(layer)

    # what rows are needed for, in order: entry of the row and its sign, m rows each; -1 is the bias of the first layer
    needed = read.nonzero().flatten()
    channels = needed // len(positions)
    entries = taken.slots[channels, 0] * layer.taps + positions[needed % len(positions)]
    needs = [(entry, sign) for entry in entries.tolist() for sign in law.signs]
    if step.biased:
        assert geometry.constants is not None
        positive = first or float(taken.constant_values[0]) > 0  # lambda times the constant must be positive
        sign = 0 if law.signs == (0,) else 1 if positive else -1
        needs.append((-1 if first else int(taken.constants[0]) * layer.taps + geometry.constants[0], sign))
    row, value, used = _match(layer, builder.plan.seed, needs, m, step=2 if law.opposite else 1)

    labels = torch.full((used,), DEAD, dtype=torch.int64)
    rows, offsets, bias_rows = ([torch.empty(0, dtype=torch.int64)] for _ in range(3))
    meaning = [int(j) for j in channels for _ in law.signs] + [CONSTANT] * step.biased
    for need, (entry, _) in enumerate(needs):
        mine = torch.cat([row[need], row[need] + 1]) if law.opposite else row[need]
        labels[mine] = meaning[need]
        if entry < 0:
            bias_rows.append(mine)
        else:
            rows.append(mine)
            offsets.append(torch.full_like(mine, entry))
    if first:
        builder.bias_masks[layer.name] = torch.cat(bias_rows).sort().values

    inside = place.node if image or place.stream is not None else builder.flattened(place)
    width = len(by_channel) if place.stream is None else place.stream
    node = builder.add_copies(layer, inside, width, labels, torch.cat(rows), torch.cat(offsets))
    if phi.name != "identity":
        node = builder.add_activation(f"{layer.name}.phi", node, phi)
    if image and target.kind == "linear":
        node = builder.add_node(f"{layer.name}.flatten", "flatten", (node,))

    multipliers = value * law.gain
    if step.biased:
        before = value[-1] if first else value[-1] * taken.constant_values[0]
        multipliers[-1] = phi.fn(before) - (phi.fn(-before) if law.opposite else 0.0)
    base = torch.zeros(len(read), len(law.signs), dtype=torch.int64)
    base[needed] = torch.arange(len(needed) * len(law.signs)).view(-1, len(law.signs))
    slopes = torch.tensor([_slopes(phi, law, sign) for _, sign in needs]).view(-1, 2)
    bases = BaseSets(row, multipliers, torch.tensor(meaning, dtype=torch.int64), slopes, law.opposite)
    return _Copies(node, used, bases, base, len(needs) - 1)


def _slopes(phi: Activation, law: PairLaw, sign: int) -> tuple[float, float]:
    """What an input x counts for, above and below 0, in a base set whose entries have that sign."""
    if len(law.signs) == 1:
        return 1.0, 1.0
    same, other = phi.slope_pos / law.gain, phi.slope_neg / law.gain
    return (same, other) if sign > 0 else (other, same)


def _entries(layer: SourceLayer, seed: int, rows: Tensor, columns: Tensor) -> Tensor:
    """What each of `rows` (n,) has at each of `columns` (k,), its bias where they are -1: (n, k) float32."""
    found = source.weights(
        layer, seed, rows[:, None].expand(-1, len(columns)), columns.clamp_min(0).expand(len(rows), -1)
    )
    return torch.where(columns < 0, source.biases(layer, seed, rows)[:, None], found) if (columns < 0).any() else found


def _match(
    layer: SourceLayer, seed: int, needs: list[tuple[int, int]], m: int, *, step: int
) -> tuple[Tensor, Tensor, int]:
    """Match rows to needs, in row order: a row serves the first need that lacks rows and whose sign is its own.

    Args:
        needs: (entry i * K + k of the row or -1 for the bias, sign of the entry or 0 for either).
        step: 2 when rows come in opposite pairs, of which the even one is looked at.

    Returns:
        rows (needs, m), the entries they keep (needs, m) float64, and the number of rows used up.
    """
    columns = torch.tensor([entry for entry, _ in needs])
    sign = torch.tensor([s for _, s in needs])
    rows: list[list[int]] = [[] for _ in needs]
    values: list[list[float]] = [[] for _ in needs]
    lacking = list(range(len(needs)))  # lists of Python's: a step of the loop takes a microsecond
    begin = used = 0
    usual = ahead = ROWS // m + AHEAD  # needs whose turn may come within so many rows
    while lacking:
        near = lacking[:ahead]
        block = torch.arange(begin, begin + ROWS * step, step)
        entries = _entries(layer, seed, block, columns[near])
        fits = torch.where(sign[near] == 0, entries != 0, entries.sign() == sign[near])
        matched = []  # (row of the block, position in `near`)
        left, done = list(range(len(near))), ROWS
        for at, fit in enumerate(fits.numpy().tolist()):
            which = next((i for i in left if fit[i]), None)
            if which is None:
                if len(left) < len(lacking):  # it may serve one that is further ahead
                    done = at
                    break
                continue
            matched.append((at, which))
            rows[near[which]].append(begin + at * step)
            used = begin + (at + 1) * step
            if len(rows[near[which]]) == m:
                left.remove(which)
                lacking.remove(near[which])
                if not lacking:
                    break
        if matched:
            for (_, which), value in zip(matched, entries[tuple(torch.tensor(matched).T)].tolist(), strict=True):
                values[near[which]].append(value)
        begin += done * step
        ahead = usual if done else 2 * ahead
    shape = (len(needs), m)
    return (
        torch.tensor(rows, dtype=torch.int64).view(shape), torch.tensor(values, dtype=torch.float64).view(shape),
        max(used, step),  # a layer has rows even where the target reads nothing
    )  # fmt: skip
