"""From the error and the number of subset sums to rows of the source."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping

import torch

from ltx.constructions.layout import Layout
from ltx.theory.parts import Part

ROUNDED = 1e-7  # of a chance: more than its sum may be rounded by


def base_set_size(epsilon: float, delta: float, constant: float) -> int:
    """m >= C log(1 / min(epsilon, delta)) (Corollary 2.2), and at least 1."""
    least = min(epsilon, delta)
    return max(1, math.ceil(-constant * math.log(least))) if least < 1 else 1


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
    channels = part.copied + bool(part.layer.bias.any())
    return channels * (rows_of_signs(m, chance, part.signs) if part.signed else m * (2 if part.opposite else 1))


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
