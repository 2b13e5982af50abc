"""From the error and the number of subset sums to rows of the source."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from ltx.constructions.layout import Layout
from ltx.subset_sum.limits import GROWTH, NEAR
from ltx.theory.parts import Demand, Part

ROUNDED = 1e-7  # of a chance: more than its sum may be rounded by
QUANTILES = 1000


def base_set_size(epsilon: float, delta: float, constant: float) -> int:
    """m >= C log(1 / min(epsilon, delta)) (Corollary 2.2), and at least 1."""
    least = min(epsilon, delta)
    return max(1, math.ceil(-constant * math.log(least))) if least < 1 else 1


def enough(demand: Demand, epsilon: float, delta: float, constant: float, law: str) -> int:
    """m with which a subset sum is within epsilon of any of these parameters, but for delta.

    Beyond theta = 1, of which the corollary speaks, C is larger as far as that was measured. Anywhere, `steps`
    numbers bring the rest of a parameter within 1, and it holds for the others, each but for half of delta.

    Args:
        law: of base sets, one of `ltx.subset_sum.statistics.LAWS`.
    """
    epsilon, beyond = epsilon / demand.most, demand.theta - 1
    if beyond <= 0:
        return base_set_size(epsilon, delta, constant)
    longest = 2 * demand.least / demand.most
    parted = base_set_size(epsilon, delta / 2, constant) + steps(beyond, delta / 2, law, longest)
    if demand.theta > NEAR:
        return parted
    return min(parted, base_set_size(epsilon, delta, constant * (1 + GROWTH * beyond)))


def chance_of_none(demand: Demand, epsilon: float, m: int, constant: float, law: str) -> float:
    """A delta for which m are `enough`, however the numbers are shared out; 1 where there is none."""
    if not demand.least:
        return 1.0
    epsilon, beyond = epsilon / demand.most, demand.theta - 1
    if beyond <= 0:
        return _corollary(epsilon, m, constant)
    t, log_mean = _transform(law, _digits(2 * demand.least / demand.most))
    best = _corollary(epsilon, m, constant * (1 + GROWTH * beyond)) if demand.theta <= NEAR else 1.0
    for first in range(0, m, max(1, m // 1000)):  # so many numbers bring it within 1
        short = float((t * beyond + first * log_mean).amin().exp())
        best = min(best, short + _corollary(epsilon, m - first, constant))
    return best


def _corollary(epsilon: float, m: int, constant: float) -> float:
    chance = math.exp(-m / constant)
    return chance if epsilon >= chance else 1.0


def steps(distance: float, delta: float, law: str, longest: float = 2.0) -> int:
    """So many numbers have a subset whose sum is in [distance, distance + 2), but for delta.

    Those in (0, longest] are added as long as the sum falls short of the distance; each may count for up to 2 / longest
    times itself. They add up to less with a probability of at most exp(t distance) E[exp(-t Y)]^n for every t > 0
    (Chernoff), Y being such a number, and 0 for all others.
    """
    t, log_mean = _transform(law, _digits(longest))
    return math.ceil(float(((t * distance - math.log(delta)) / -log_mean).min()))


def _digits(value: float) -> float:
    """Three of them, so that few transforms are computed."""
    return float(f"{value:.3g}")


@lru_cache
def _transform(law: str, longest: float) -> tuple[Tensor, Tensor]:
    """Some t, and log E[exp(-t Y)], with Y = X in (0, longest] and 0 elsewhere: the mean over quantiles of the law."""
    middle = (torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES
    one = torch.special.ndtri(middle) if law.startswith("normal") else 2 * middle - 1
    numbers = (one[:, None] * one).flatten() if law.endswith("product") else one
    numbers = torch.where((numbers > 0) & (numbers <= longest), numbers, 0.0)
    t = torch.logspace(-2, 3, 51, dtype=torch.float64)
    return t, torch.stack([(-each * numbers).exp().mean().log() for each in t])


def slots_of(
    parts: Mapping[str, Part], joined: Layout, sizes: Mapping[str, int], construction: str
) -> dict[str, tuple[int, int]]:
    """For each layer: slots of each of its channels, and constant ones beside them."""
    found = {}
    for name, part in parts.items():
        readers = [other for other, reading in parts.items() if reading.reads == part.writes]
        many = {other: sizes[other] if construction == "L+1" else 1 for other in readers}
        found[name] = (
            max(many.values(), default=1), max((many[other] for other in readers if other in joined.needs), default=0)
        )  # fmt: skip
    return found


def rows_of(part: Part, slots: int, constants: int) -> int:
    """Rows of a layer with so many slots of each of its channels."""
    return len(part.weight) * slots + constants


def problems_of(
    parts: Mapping[str, Part], joined: Layout, sizes: Mapping[str, int], construction: str
) -> dict[str, int]:
    """Subset sums of each layer."""
    slots, found = slots_of(parts, joined, sizes, construction), {}
    for name, part in parts.items():
        how = joined.constants.get(part.writes)
        sums = how is not None and how.sums and joined.writers[part.writes][0] == name
        found[name] = part.problems * slots[name][0] + slots[name][1] * sums
    return found


def copies_of(part: Part, m: int, chance: float) -> int:
    """Rows of the first layer of a pair that serve m base values for every channel, position, sign and the constant.

    Where signs matter so many for each channel that, but for `chance`, m of each that is needed are among them.
    """
    channels, together = part.copied + bool(part.largest_sum), 2 if part.opposite else 1
    rows = channels * (rows_of_signs(m, chance, part.signs) if part.signed else m * together)
    return max(rows, together)  # a layer has rows even where the target reads nothing


def rows_of_signs(m: int, chance: float, signs: int) -> int:
    """The least n so that n random signs hold m of either or one, but for `chance`: signs P(Bin(n, 1/2) < m)."""
    k = torch.arange(m, dtype=torch.float64)
    ways = torch.lgamma(k + 1)

    def enough(n: int) -> bool:
        below = (math.lgamma(n + 1) - ways - torch.lgamma(n - k + 1) - n * math.log(2)).exp().sum()
        return signs * float(below) <= (1 - ROUNDED) * chance

    most = m
    while not enough(most):
        most *= 2
    return m + bisect.bisect_left(range(m, most), True, key=enough)
