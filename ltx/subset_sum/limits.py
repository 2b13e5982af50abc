"""What is known of subset sums in numbers; apart, so that the command line need not load the solvers for it."""

from __future__ import annotations

from dataclasses import dataclass

MAX_BASE_SET_SIZE = 32  # a subset is a mask of 32 bits; a half has at most 2^15 sums
MAX_PROBLEMS = 10**8  # of a sample: 9 bytes of each are kept


@dataclass(frozen=True)
class Constants:
    """C of Corollary 2.2, for base sets of a source's parameters and of products of two."""

    single: float
    product: float


# by law, for theta = 1, the hardest: above the largest values in `python scripts/constants.py` (seed 0, a million
# problems for each m up to 20), 3.73 at m = 6 and 7.00 at m = 8 for uniform numbers, 3.35 and 4.80 at m = 5 for normal
CONSTANTS = {"uniform": Constants(3.8, 7.1), "normal": Constants(3.4, 4.9)}
# of theta in (1, NEAR] it is larger, by at most (theta - 1) GROWTH of itself: by 26, 34, 13 and 18 % at 1.25 there
NEAR, GROWTH = 1.25, 1.4
