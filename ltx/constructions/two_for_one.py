"""Two layers for one (section 3.1, Corollary C.1): a 1x1 layer that copies the input, and a layer that sums.

Row n of the 1x1 layer keeps one entry lambda_n, so that its output is phi(lambda_n x_j). Where phi is linear on
either side of 0, the next layer needs

    sum over S of v[i, n, k] * lambda_n * gain  within epsilon of  W[i, j, k],

with a gain that depends on which rows serve: those of either sign as a base set of their own (gain 1 / r = m_+ +
m_-), one set alone where phi is odd or the input nonnegative (m_+), or opposite pairs of rows where phi(0) != 0
(m_+ + m_-, and the offset cancels). The second layer's parameters are scaled by 1 / (sigma * gain), so that every
base set consists of products of two uniform numbers on [-1, 1], as Corollary C.1 assumes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ltx import source
from ltx.activations import Activation
from ltx.constructions.builder import (
    Outputs,
    Stream,
    TicketBuilder,
    constant_row,
    constant_tap,
    layer_scale,
    target_problems,
)
from ltx.constructions.rows import BaseSets
from ltx.errors import ConstructionError
from ltx.graph import Layer, above
from ltx.source import SourceLayer
from ltx.ticket import CONSTANT, DEAD


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


def linear_scale(phi: Activation, law: PairLaw, bound: float, *, m: int, epsilon: float, scale: float) -> float:
    """sigma of the 1x1 layer: with inputs of at most `bound`, phi is linear enough on [-sigma bound, sigma bound].

    A parameter is a sum of at most m (with two base sets or opposite rows, 2 m) terms v phi(lambda x), |v| <=
    scale / (sigma gain). With a = sigma * bound and |phi - phi_hat| <= share * a on [-a, a], share = epsilon *
    gain / (terms * scale), the parameter's contribution is off by at most epsilon * bound, whatever the subset:
    linearisation at most doubles the error that epsilon allows. In practice it adds far less.
    """
    if phi.exact:
        return 1.0
    terms = m * (2 if law.opposite else len(law.signs))
    return float(np.float32(phi.linear_radius(epsilon * law.gain / (terms * scale)) / bound))


def two_for_one(
    builder: TicketBuilder, name: str, target: Layer, stream: Stream, outputs: Outputs, phi: Activation,
    *, free_constants: bool,
) -> Stream:  # fmt: skip
    """Approximate `target` by a pair of source layers with `phi` between them.

    Args:
        phi: the source's activation behind the 1x1 layer.
        free_constants: whether a fully pruned row of the second layer is constant and not 0 behind the
            activation that follows it.
    """
    plan = builder.plan
    slots, taps = stream.channels(target)
    law = pair_law(phi, stream.nonnegative)
    scale = layer_scale(target, plan.scaling)
    if not phi.exact and not np.isfinite(stream.bound):
        raise ConstructionError(
            f"layer {name}: its inputs have no known bound, which {phi.name} needs to be nearly linear on them"
        )
    sigma = linear_scale(phi, law, stream.bound, m=plan.base_set_size, epsilon=plan.epsilon, scale=scale)
    copies = _copy_layer(builder, name, target, stream, law, phi, sigma, slots, taps, outputs)

    tap = constant_tap(target, name, taps, needed=copies.biased)
    problems = target_problems(target, taps, plan.epsilon, copies.base, copies.constant, tap)
    row, constants, values = builder.approximate(
        name, target, copies.node, problems, copies.bases, outputs,
        constant_row(outputs, copies.constant, tap, free=free_constants),
        taps=taps, sigma=float(np.float32(scale / (sigma * law.gain))), role="pair",
    )  # fmt: skip
    weight = target.weight.abs().flatten(1).double()
    reach = (weight + 2 * plan.epsilon * above(weight, plan.epsilon)).sum(1) * max(stream.bound, 1.0)
    bound = float((reach + target.bias.abs() + plan.epsilon).max())
    return Stream(name, row, constants, values, max(bound, 1.0 + plan.epsilon), vector=target.kind == "linear")


@dataclass(frozen=True)
class _Copies:
    node: str  # what the second layer reads
    bases: BaseSets
    base: Tensor  # (C_in, n) base sets of each input channel
    constant: int  # base set of the constants
    biased: bool  # whether there are any


def _copy_layer(
    builder: TicketBuilder, name: str, target: Layer, stream: Stream, law: PairLaw, phi: Activation,
    sigma: float, slots: Tensor, taps: int, outputs: Outputs,
) -> _Copies:  # fmt: skip
    """Add the 1x1 layer and its activation: m rows for every (input channel, sign) that the target reads."""
    m, epsilon = builder.plan.base_set_size, builder.plan.epsilon
    first = not builder.layers
    weight = target.weight.view(len(target.weight), -1, taps)
    read = above(weight, epsilon).any(2).any(0).nonzero().flatten()
    biased = bool(above(target.bias, epsilon).any()) or (outputs.constants > 0)
    image = target.kind == "conv" or (stream.slots is not None and not stream.vector)
    width = len(slots) if first else builder.width
    layer = SourceLayer(
        f"{name}.copies", len(builder.layers), "conv" if image else "linear",
        (0, width, 1, 1) if image else (0, width), 1, sigma=sigma,
        opposite="rows" if law.opposite else "none", bias=first, role="copies", target=name,
    )  # fmt: skip

    # what rows are needed for, in order: (source channel, sign), m rows each; -1 is the bias of the first layer
    needs = [(int(slots[j, 0]), sign) for j in read for sign in law.signs]
    if biased:
        needs.append((-1 if first else int(stream.constants[0]), 0 if law.signs == (0,) else 1))
    row, value, used = _match(layer, builder.plan.seed, needs, m, step=2 if law.opposite else 1)

    labels = torch.full((used,), DEAD, dtype=torch.int64)
    keep, bias_keep = [], []
    meaning = [int(j) for j in read for _ in law.signs] + [CONSTANT] * biased
    for need, (channel, _) in enumerate(needs):
        mine = torch.cat([row[need], row[need] + 1]) if law.opposite else row[need]
        labels[mine] = meaning[need]
        (bias_keep if channel < 0 else keep).append(mine if channel < 0 else mine * layer.row_size + channel)
    if first:
        empty = torch.empty(0, dtype=torch.int64)
        builder.bias_masks[layer.name] = torch.cat([empty, *bias_keep]).sort().values
    layer = replace(layer, shape=(used, *layer.shape[1:]))
    mask = torch.cat([torch.empty(0, dtype=torch.int64), *keep]).sort().values

    inside = stream.unflattened if image and target.kind == "linear" else stream.node
    assert inside is not None
    node = builder.add_layer(layer, inside, mask, labels)
    node = builder.add_activation(f"{layer.name}.phi", node, phi)
    if image and target.kind == "linear":
        node = builder.add_node(f"{layer.name}.flatten", "flatten", (node,))

    multipliers = value * law.gain
    if biased:
        before = value[-1] if first else value[-1] * stream.constant_values[0]
        multipliers[-1] = phi.fn(before) - (phi.fn(-before) if law.opposite else 0.0)
    base = torch.zeros(len(slots), len(law.signs), dtype=torch.int64)
    base[read] = torch.arange(len(read) * len(law.signs)).view(-1, len(law.signs))
    return _Copies(node, BaseSets(row, multipliers, law.opposite), base, len(needs) - 1, biased)


def _match(
    layer: SourceLayer, seed: int, needs: list[tuple[int, int]], m: int, *, step: int
) -> tuple[Tensor, Tensor, int]:
    """Match rows to needs, in row order: a row serves the first need that lacks rows and whose sign is its own.

    Args:
        needs: (source channel or -1 for the bias, sign of the entry or 0 for either).
        step: 2 when rows come in opposite pairs, of which the even one is looked at.

    Returns:
        rows (needs, m), the entries they keep (needs, m) float64, and the number of rows used up.
    """
    columns = torch.tensor([channel for channel, _ in needs])
    sign = torch.tensor([s for _, s in needs])
    rows = torch.empty(len(needs), m, dtype=torch.int64)
    values = torch.empty(len(needs), m, dtype=torch.float64)
    have = torch.zeros(len(needs), dtype=torch.int64)
    begin = used = 0
    while bool((have < m).any()):
        block = torch.arange(begin, begin + 512 * step, step)
        entries = source.weights(
            layer, seed, block[:, None].expand(-1, len(needs)), columns.clamp_min(0).expand(len(block), -1)
        )
        if (columns < 0).any():
            entries = torch.where(columns < 0, source.biases(layer, seed, block)[:, None], entries)
        fits = torch.where(sign == 0, entries != 0, entries.sign() == sign)
        for n, fit in zip(block.tolist(), fits, strict=True):
            free = (fit & (have < m)).nonzero()
            if len(free):
                need = int(free[0])
                rows[need, have[need]], values[need, have[need]] = (
                    n,
                    entries[(n - begin) // step, need].double(),
                )
                have[need] += 1
                used = n + step
            elif not bool((have < m).any()):
                break
        begin = int(block[-1]) + step
    return rows, values, max(used, step)  # a layer has rows even where the target reads nothing
