"""The one entry to the solvers: checks the problems, picks the device's solver, names the results.

Sums are formed in float64 in ascending order of the indices, on every device, so that CPU and GPU choose the
same subsets bit for bit, ties included.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
from dataclasses import dataclass

import numba
import numpy as np
import torch
from torch import Tensor

from ltx.checks import one_of, whole
from ltx.compiled import compiled
from ltx.errors import LtxError
from ltx.subset_sum import by_size, halves
from ltx.subset_sum.limits import MAX_BASE_SET_SIZE

log = logging.getLogger(__name__)
SELECTIONS = ("smallest", "best")
CHUNK = 1 << 14  # problems at a time: what is checked and converted is still in the cache when it is solved
GPU_VALUES = 1 << 27  # the same on a GPU, where a problem has m values
MOST_ENUMERATED = 11  # up to this m, `best` looks at all subsets in vectors; beyond, it meets in the middle


@dataclass(frozen=True)
class SubsetSums:
    """The chosen subsets of n problems; numpy arrays, or torch tensors on the problems' device, as the problems were.

    mask (n,), unsigned: bit s is set where x_s is chosen; uint32, in torch int64 (it cannot shift unsigned ones).
    size (n,) int64: how many are chosen. error (n,) float64: |sum_S x - theta|.

    Where no subset is within epsilon, `error` exceeds epsilon and the subset is the one of least error.
    """

    mask: np.ndarray | Tensor
    size: np.ndarray | Tensor
    error: np.ndarray | Tensor

    def members(self, m: int) -> np.ndarray | Tensor:
        """Which of the m values are in the subsets, (n, m) bool.

        Raises:
            LtxError: subsets have values behind the first m, or m is beyond 32.
        """
        m = whole("m", m)
        if not 0 <= m <= MAX_BASE_SET_SIZE or bool((self.mask >= 1 << m).any()):
            raise LtxError(f"subset sums: m={m} is not that of the values, or there are subsets of more; give that")
        if isinstance(self.mask, Tensor):
            return (self.mask[:, None] >> torch.arange(m, device=self.mask.device)) & 1 == 1
        return (self.mask[:, None] >> np.arange(m, dtype=np.uint32)) & 1 == 1


def solve(
    values: np.ndarray | Tensor,
    targets: np.ndarray | Tensor,
    epsilon: float,
    *,
    selection: str = "smallest",
) -> SubsetSums:
    """Solve n subset-sum problems exactly (Corollary 2.2; the SSAP of Algorithms 1 and 2).

    Args:
        values: base sets x, (n, m), 1 <= m <= 32; numpy or torch, of any real type.
        targets: theta, (n,).
        epsilon: allowed error, positive.
        selection: `smallest` - the least size among the subsets within epsilon, among those the least error,
            among those the lexicographically first; `best` - the least error over all subsets, among those the
            least size, then the lexicographically first. The empty subset serves |theta| <= epsilon in `smallest`
            and competes like any other in `best`.

    Returns:
        The same subsets on every device. An error is that of the float64 sum of the chosen values in ascending
        order of their indices. Beyond results, memory does not grow with n. Time does not depend on the values,
        but where a target, or one value near it, is 10^12 times larger than the others together: rounding alone then
        decides among all of their subsets.

    Raises:
        LtxError: wrong shapes or types, an unknown selection, an epsilon that is not positive, an entry that is NaN or
            infinite, or entries so large that a sum may overflow.
    """
    if isinstance(values, np.ma.MaskedArray) or isinstance(targets, np.ma.MaskedArray):
        raise LtxError("subset sums: masked arrays are not looked at; give the values themselves")
    values, targets = _array(values), _array(targets)
    shape, targets_shape = tuple(values.shape), tuple(targets.shape)
    if len(shape) != 2 or targets_shape != shape[:1]:
        raise LtxError(f"subset sums: values {shape} and targets {targets_shape} must be (n, m) and (n,)")
    m = shape[1]
    if not (_is_dense_and_real(values) and _is_dense_and_real(targets)):
        raise LtxError("subset sums: values and targets must be dense arrays of real numbers")
    if not 1 <= m <= MAX_BASE_SET_SIZE:
        raise LtxError(f"subset sums: a base set has {m} values, 1 to {MAX_BASE_SET_SIZE} are possible")
    one_of("subset sums: selection", selection, SELECTIONS)
    try:
        within = float(epsilon)
    except (TypeError, ValueError, OverflowError):
        within = math.nan
    if not 0 < within < math.inf:
        raise LtxError(f"subset sums: epsilon={epsilon!s:.20} must be a positive number")
    if selection == "best":
        within = -1.0  # an error that no subset reaches
    if isinstance(values, Tensor) and values.device.type == "cuda" and _kernels_run(str(values.device)):
        return _on_gpu(values, targets, within)
    mask, size, error = _on_cpu(values, targets, within)
    if not isinstance(values, Tensor):
        return SubsetSums(mask, size, error)
    return SubsetSums(*(torch.from_numpy(a).to(values.device) for a in (mask.astype(np.int64), size, error)))


@functools.cache
def _kernels_run(device: str) -> bool:
    """Whether Triton is there, and what it needs to compile: a C compiler and Python's headers."""
    if not importlib.util.find_spec("triton"):
        return False
    from ltx.subset_sum import gpu

    try:
        gpu.transposed(torch.zeros(1, 1, device=device), torch.zeros(1, device=device, dtype=torch.float64))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of Triton, of a compiler that is called: of any kind
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        log.warning("subset sums are solved on the CPU, kernels for the GPU do not compile here: %s", reason)
        return False
    return True


def _on_cpu(values, targets, within: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks, sizes and errors of the problems; within < 0 asks for the best of all subsets."""
    n, m = values.shape
    mask, size, error = np.empty(n, np.uint32), np.empty(n, np.int64), np.empty(n)
    sizes = _enumerated_sizes(m, within)
    for begin in range(0, n, CHUNK):
        part = slice(begin, begin + CHUNK)
        x, theta = _float64(values[part]), _float64(targets[part])
        if (bad := _first_not_finite(x, theta)) < len(theta):
            raise LtxError(f"subset sums: {_what_is_not_finite(x[bad], float(theta[bad]), begin + bad)}")
        by_size.search(x, theta, within, sizes, mask[part], size[part], error[part])
        if sizes < m:
            hard = np.flatnonzero(error[part] > within)
            halves.improve(x, theta, hard, sizes, within, mask[part], size[part], error[part])
    return mask, size, error


def _on_gpu(values: Tensor, targets: np.ndarray | Tensor, within: float) -> SubsetSums:
    """The same on a GPU; what is too large for it (some problems with m > 20) meets in the middle on the CPU."""
    from ltx.subset_sum import gpu

    m = values.shape[1]
    parts = []
    for begin in range(0, max(1, len(values)), GPU_VALUES // m):
        part = slice(begin, begin + GPU_VALUES // m)
        x, theta = values[part], _to(values.device, targets[part])
        columns, bad = gpu.transposed(x if x.dtype == torch.float32 else x.double(), theta)
        if bad is not None:
            raise LtxError(f"subset sums: {_what_is_not_finite(_float64(x[bad]), float(theta[bad]), begin + bad)}")
        mask, size, error, looked = gpu.search(columns, theta, within)
        if looked < m:
            hard = (error > within).nonzero().flatten()
            masks, sizes, errors = (t[hard].cpu().numpy() for t in (mask, size, error))
            masks = masks.astype(np.uint32)
            halves.improve(
                _float64(x[hard]), _float64(theta[hard]), np.arange(len(hard)), looked, within, masks, sizes, errors
            )
            solved = (masks.astype(np.int64), sizes, errors)
            mask[hard], size[hard], error[hard] = (torch.from_numpy(a).to(mask.device) for a in solved)
        parts.append((mask, size, error))
    return SubsetSums(*(torch.cat(p) if len(parts) > 1 else p[0] for p in zip(*parts, strict=True)))


def _enumerated_sizes(m: int, within: float) -> int:
    """Up to which size enumeration is quicker than meeting in the middle (measured, for values of about 1).

    It is worth more as long as few subsets were looked at for this epsilon: the next size solves most problems then,
    while those that are left of many subsets are hard in every size.
    """
    if within < 0:
        return m if m <= MOST_ENUMERATED else 0
    size, looked = 0, 0
    while size < m and math.comb(m, size + 1) <= (32 if looked * within < 10 else 8) * 2 ** (m / 2):
        size += 1
        looked += math.comb(m, size)
    return size


def _array(given: object) -> np.ndarray | Tensor:
    if isinstance(given, Tensor):
        return given.detach().resolve_neg()
    try:
        return np.asarray(given)
    except ValueError as error:  # lists of different lengths
        raise LtxError(f"subset sums: values and targets must be arrays, (n, m) and (n,) ({error})") from error


def _is_dense_and_real(array: np.ndarray | Tensor) -> bool:
    if isinstance(array, Tensor):
        return not (array.is_complex() or array.is_meta) and array.layout == torch.strided
    return array.dtype.kind in "fiub"


def _float64(array: np.ndarray | Tensor) -> np.ndarray:
    if isinstance(array, Tensor):
        array = array.cpu().double().numpy()
    return np.ascontiguousarray(array, np.float64)


def _to(device: torch.device, array: np.ndarray | Tensor) -> Tensor:
    array = array if isinstance(array, Tensor) else torch.from_numpy(_float64(array))
    return array.to(device, torch.float64).contiguous()


@compiled(parallel=True)
def _first_not_finite(x, theta):
    """The first problem with an entry that is not finite or so large that a sum may overflow; n for none."""
    first = len(theta)
    for p in numba.prange(len(theta)):
        total = abs(theta[p])
        for s in range(x.shape[1]):
            total += abs(x[p, s])
        if not np.isfinite(2 * total):
            first = min(first, p)
    return first


def _what_is_not_finite(x: np.ndarray, theta: float, problem: int) -> str:
    if not math.isfinite(theta):
        return f"targets[{problem}] is {theta}, it must be finite"
    for s in np.flatnonzero(~np.isfinite(x)):
        return f"values[{problem}, {s}] is {x[s]}, it must be finite"
    return f"the values of problem {problem} are so large that their sum may overflow float64; scale them down"
