"""The one entry to the solvers: checks the problems, picks the device's solver, names the results.

Sums are formed in float64 in ascending order of the indices, on every device, so that CPU and GPU choose the
same subsets bit for bit, ties included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ltx.errors import LtxError
from ltx.subset_sum import batched, compiled
from ltx.subset_sum.limits import MAX_BASE_SET_SIZE

SELECTIONS = ("smallest", "best")


@dataclass(frozen=True)
class SubsetSums:
    """The chosen subsets of n problems, numpy arrays or torch tensors as the problems were.

    Where no subset is within epsilon, `error` exceeds epsilon and the subset is the one of least error.
    """

    mask: np.ndarray | Tensor  # (n,) int64: bit s is set when x_s is in the subset
    size: np.ndarray | Tensor  # (n,) int64
    error: np.ndarray | Tensor  # (n,) float64: |sum_S x - theta|


def solve(
    values: np.ndarray | Tensor,
    targets: np.ndarray | Tensor,
    epsilon: float,
    *,
    selection: str = "smallest",
) -> SubsetSums:
    """Solve n subset-sum problems exactly.

    Args:
        values: base sets x, (n, m), 1 <= m <= MAX_BASE_SET_SIZE; numpy or torch, on any device.
        targets: theta, (n,).
        epsilon: allowed error, positive.
        selection: `smallest` - the least size among the subsets within epsilon, among those the least error,
            among those the lexicographically first; `best` - the least error over all subsets, among those the
            least size, then the lexicographically first. The empty subset serves |theta| <= epsilon in `smallest`
            and competes like any other in `best`.

    Raises:
        LtxError: wrong shapes, an unknown selection, an epsilon that is not positive, NaN or infinite entries.
    """
    x, theta = torch.as_tensor(values), torch.as_tensor(targets)
    if x.ndim != 2 or theta.ndim != 1 or len(x) != len(theta):
        raise LtxError(f"subset sums: values {tuple(x.shape)} and targets {tuple(theta.shape)} must be (n, m), (n,)")
    if not 1 <= x.shape[1] <= MAX_BASE_SET_SIZE:
        raise LtxError(f"subset sums: a base set has {x.shape[1]} values, 1 to {MAX_BASE_SET_SIZE} are possible")
    if selection not in SELECTIONS:
        raise LtxError(f"subset sums: selection '{selection}' is not known; there are {', '.join(SELECTIONS)}")
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise LtxError(f"subset sums: epsilon={epsilon} must be a positive number")
    if not (torch.isfinite(x).all() and torch.isfinite(theta).all()):
        raise LtxError("subset sums: values and targets must be finite, some are NaN or infinite")
    x, theta = x.double().contiguous(), theta.to(device=x.device, dtype=torch.float64).contiguous()
    stop = epsilon if selection == "smallest" else -1.0  # an error that no subset reaches: look at all of them
    if x.device.type == "cpu":
        found = compiled.search(x.numpy(), theta.numpy(), stop)
        mask, size, error = (torch.from_numpy(a) for a in found)
    else:
        mask, size, error = batched.search(x, theta, stop)
    if isinstance(values, np.ndarray):
        return SubsetSums(mask.numpy(), size.numpy(), error.numpy())
    return SubsetSums(mask, size, error)
