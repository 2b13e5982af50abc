"""C of Corollary 2.2, m >= C log(1 / min(epsilon, delta)), for theta = 1, which has the fewest subset sums around it.

    python scripts/constants.py

For each law and epsilon: every m from the first one at which at most a share epsilon of the problems fails, until few
do. The corollary holds for a theta where C is above all of them; random theta have a smaller one (`ltx figures`).
"""

from __future__ import annotations

from ltx import subset_sum

PROBLEMS = 100_000
RARE = 20  # failures: fewer say too little

if __name__ == "__main__":
    for law in ("uniform", "product"):
        for epsilon in (0.1, 0.01, 0.001):
            for m in range(4, subset_sum.MAX_BASE_SET_SIZE + 1):
                drawn = subset_sum.sample(law, m, epsilon, problems=PROBLEMS, seed=0, theta=1.0)
                found = subset_sum.summarise(drawn)
                if found.failures < RARE:
                    break
                if found.failure_share <= epsilon:
                    print(
                        f"{law:8} epsilon {epsilon:<6} m {m:2}  {found.failures:6} fail  C {found.constant:.2f}",
                        flush=True,
                    )
