"""How much a subset sum amplifies independent deviations of its slots, g = sqrt(E sum w^2 / E W^2), if solved.

python scripts/amplification.py [uniform | product | normal | normal_product]
"""

import sys

import torch

from ltx import subset_sum
from ltx.subset_sum.statistics import draw

PROBLEMS, SEED = 200_000, 0


def main(law: str = "uniform") -> None:
    print("epsilon  m   mean size  g")
    for epsilon, m in ((1e-2, 15), (1e-2, 24), (1e-3, 24), (1e-4, 29), (1e-5, 32)):
        values, theta = draw(law, m, 0, PROBLEMS, seed=SEED, device="cpu")
        found = subset_sum.solve(values, theta, epsilon)
        kept = (torch.as_tensor(found.mask).long()[:, None] >> torch.arange(m)) & 1
        solved = torch.as_tensor(found.error) <= epsilon
        squares = (kept * values.double().square()).sum(1)[solved]
        g = float((squares.mean() / theta.double()[solved].square().mean()).sqrt())
        print(f"{epsilon:<7g}  {m}  {float(torch.as_tensor(found.size)[solved].double().mean()):.2f}       {g:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
