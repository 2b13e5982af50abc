"""C of Corollary 2.2, m >= C log(1 / min(epsilon, delta)), for theta = 1, which has the fewest subset sums around it.

    python scripts/constants.py [theta]

The corollary says most where epsilon = delta: with m numbers at most a share epsilon of the problems fails for every
epsilon >= exp(-m / C). So for each law and m, the least C is m / log(1 / epsilon) at the epsilon at which a share
epsilon fails. The corollary holds for all m where C is above all of these; they fall beyond m = 8. Random theta have
a smaller one (`ltx figures`), theta beyond 1 a larger one.
"""

from __future__ import annotations

import sys

import numpy as np

from ltx import subset_sum
from ltx.subset_sum.statistics import constant

PROBLEMS = 1_000_000
LARGEST = 20  # m

if __name__ == "__main__":
    theta = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    for law in ("uniform", "product", "normal", "normal_product"):
        for m in range(1, LARGEST + 1):
            drawn = subset_sum.sample(law, m, 1.0, selection="best", problems=PROBLEMS, seed=0, theta=theta)
            errors = np.sort(drawn.error)
            failing = 1 - np.arange(1, PROBLEMS + 1) / PROBLEMS  # share of the problems, where epsilon is that error
            epsilon = errors[np.argmax(failing <= errors)]
            print(f"{law:14} m {m:2}  a share {epsilon:.5f} fails  C {constant(m, epsilon, epsilon):.3f}", flush=True)
