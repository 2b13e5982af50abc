"""CPU search: subsets by ascending size in lexicographic order, compiled, parallel over problems."""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(cache=True)
def _search_one(x, theta, stop):
    """(mask, size, error) of the first size that has a subset with error <= stop, else of the least error."""
    m = len(x)
    best_mask, best_size, best_error = 0, 0, abs(theta)
    if best_error <= stop:
        return best_mask, best_size, best_error
    index = np.empty(m, np.int64)
    partial = np.empty(m + 1)  # partial[d]: sum of the first d chosen values
    partial[0] = 0.0
    # the values from j on can add at most above[j] and at least below[j]; the slack is far more than rounding
    above, below = np.zeros(m + 1), np.zeros(m + 1)
    for j in range(m - 1, -1, -1):
        above[j] = above[j + 1] + max(x[j], 0.0)
        below[j] = below[j + 1] + min(x[j], 0.0)
    slack = 1e-12 * (above[0] - below[0] + abs(theta))
    for size in range(1, m + 1):
        depth = 0  # indices index[0..depth-1] are fixed; the last one runs in the inner loop
        index[0] = -1
        while depth >= 0:
            if depth == size - 1:
                first = index[depth - 1] + 1 if depth > 0 else 0
                base = partial[depth]
                for j in range(first, m):
                    error = abs(base + x[j] - theta)
                    if error < best_error:
                        best_error, best_size = error, size
                        best_mask = 1 << j
                        for d in range(depth):
                            best_mask |= 1 << index[d]
                depth -= 1
                continue
            # advance the index at this depth, leaving room for those behind it
            index[depth] += 1
            if index[depth] > m - size + depth:
                depth -= 1
                continue
            partial[depth + 1] = partial[depth] + x[index[depth]]
            rest, missing = index[depth] + 1, theta - partial[depth + 1]
            if missing - above[rest] > best_error + slack or below[rest] - missing > best_error + slack:
                continue  # no subset that begins like this comes closer than the best one
            depth += 1
            index[depth] = index[depth - 1]
        if best_error <= stop:
            break
    return best_mask, best_size, best_error


@numba.njit(cache=True, parallel=True)
def search(values, targets, stop):
    """Arrays (mask, size, error) of n problems; see `_search_one`.

    Args:
        values: (n, m) float64.
        targets: (n,) float64.
        stop: sizes beyond the first one that reaches this error are not looked at.
    """
    n = len(targets)
    mask, size, error = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n)
    for p in numba.prange(n):
        mask[p], size[p], error[p] = _search_one(values[p], targets[p], stop)
    return mask, size, error
