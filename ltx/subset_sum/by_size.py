"""Subsets by ascending size, many problems side by side: CPU, compiled, parallel.

All problems of a group look at the same subset at the same time, each in a lane of its own, so that the inner
loop is vector code without a branch. Problems that are solved leave; the others of a block close ranks before the
next size. The subsets of one size are visited in lexicographic order and a sum is formed in ascending order of its
indices, so the first of several equal errors is the one that the specification asks for. The inner loop keeps the
least error only; which last index it was is found again at the end.

What an inner loop keeps it reads from one row and writes to another. Written back to where it was read, LLVM 20 turns
"keep the smaller one" into masked stores, which cost four times as much on processors without AVX-512.
"""

from __future__ import annotations

import numba
import numpy as np

from ltx.compiled import compiled

LANES = 64  # problems side by side
BLOCK = 1024  # problems whose solved ones leave together


@compiled()
def _one_size(x, theta, m, size, sums, index, least, error, prefix, row):
    """Enter the least error over all subsets of `size` where it beats `error`, and that subset without its last index.

    x (m, LANES), theta (LANES,); error and prefix (2, LANES) hold in `row` what is known, afterwards in the row that is
    returned; sums (m + 1, LANES), index (m,) and least (2, LANES) are scratch.
    """
    last = size - 1  # the last index runs in the inner loop, those before it are index[:last]
    for d in range(last):
        index[d] = d
    valid = 0  # sums[:valid + 1] belong to index[:valid]
    while True:
        for d in range(valid, last):
            i = index[d]
            for lane in range(LANES):
                sums[d + 1, lane] = sums[d, lane] + x[i, lane]
        j = index[last - 1] + 1 if last > 0 else 0
        new = 0  # row of least
        for lane in range(LANES):
            least[new, lane] = abs(sums[last, lane] + x[j, lane] - theta[lane])
        j += 1
        while j + 3 < m:
            for lane in range(LANES):
                s, t = sums[last, lane], theta[lane]
                e0, e1 = abs(s + x[j, lane] - t), abs(s + x[j + 1, lane] - t)
                e2, e3 = abs(s + x[j + 2, lane] - t), abs(s + x[j + 3, lane] - t)
                least[1 - new, lane] = min(least[new, lane], min(min(e0, e1), min(e2, e3)))
            new = 1 - new
            j += 4
        while j < m:
            for lane in range(LANES):
                e = abs(sums[last, lane] + x[j, lane] - theta[lane])
                least[1 - new, lane] = min(least[new, lane], e)
            new = 1 - new
            j += 1
        code = 0
        for d in range(last):
            code |= 1 << index[d]
        for lane in range(LANES):
            e, best, before = least[new, lane], error[row, lane], prefix[row, lane]
            error[1 - row, lane] = min(e, best)
            prefix[1 - row, lane] = code if e < best else before
        row = 1 - row
        d = last - 1
        while d >= 0 and index[d] == m - size + d:
            d -= 1
        if d < 0:
            return row
        index[d] += 1
        for later in range(d + 1, last):
            index[later] = index[later - 1] + 1
        valid = d


@compiled()
def _last_index(x, theta, prefix, error):
    """The first index behind those of `prefix` whose sum has exactly this error."""
    total, s = 0.0, 0
    while prefix >> s:
        if prefix >> s & 1:
            total += x[s]
        s += 1
    while s < len(x) - 1 and abs(total + x[s] - theta) != error:  # the same additions: one of them is equal
        s += 1
    return s


@compiled(parallel=True)
def search(values, targets, epsilon, sizes, mask, size, error):
    """The least size that has a subset within epsilon and its best one, else the best of all sizes looked at.

    Args:
        values, targets: (n, m) and (n,) float64.
        epsilon: allowed error; negative where all sizes are to be looked at.
        sizes: the largest size to look at.
        mask, size, error: (n,) uint32, int64 and float64, filled in.
    """
    n, m = values.shape
    for block in numba.prange((n + BLOCK - 1) // BLOCK):
        begin, end = block * BLOCK, min(n, (block + 1) * BLOCK)
        open_, count = np.empty(end - begin, np.int64), 0
        for p in range(begin, end):
            mask[p], size[p], error[p] = 0, 0, abs(targets[p])
            if error[p] > epsilon:
                open_[count] = p
                count += 1
        x, theta = np.zeros((m, LANES)), np.zeros(LANES)
        sums, least = np.zeros((m + 1, LANES)), np.empty((2, LANES))
        err, prefix, index = np.zeros((2, LANES)), np.empty((2, LANES), np.int64), np.empty(m, np.int64)
        row = np.int64(0)  # a literal 0 has _one_size compiled a second time
        k = 1
        while k <= sizes and count > 0:
            together = 2 if k == 1 and sizes > 1 else 1  # few are solved by one value: two sizes before closing ranks
            still = 0
            for group in range(0, count, LANES):
                lanes = min(LANES, count - group)
                for lane in range(lanes):
                    p = open_[group + lane]
                    theta[lane] = targets[p]
                    err[row, lane] = error[p]
                    for s in range(m):
                        x[s, lane] = values[p, s]
                for now in range(k, k + together):
                    prefix[row] = -1
                    row = _one_size(x, theta, m, now, sums, index, least, err, prefix, row)
                    for lane in range(lanes):
                        if prefix[row, lane] >= 0:
                            p = open_[group + lane]
                            mask[p], size[p], error[p] = prefix[row, lane], now, err[row, lane]
                            if err[row, lane] <= epsilon:
                                err[row, lane] = -1.0  # solved: no error is less
                for lane in range(lanes):
                    p = open_[group + lane]
                    if error[p] > epsilon:
                        open_[still] = p
                        still += 1
            count = still
            k += together
        for p in range(begin, end):
            if size[p] > 0:
                mask[p] |= np.uint32(1 << _last_index(values[p], targets[p], mask[p], error[p]))
