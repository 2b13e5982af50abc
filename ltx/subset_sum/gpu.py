"""Subsets by ascending size on a GPU: one problem per thread, a Triton kernel for the sizes up to 3, which solve most
problems, and one for each size beyond. Before them, one lays the values of neighbouring problems side by side.

The kernels form the same float64 sums in the same order as `by_size`, and visit the subsets of a size in the same
order, so that they choose the same subsets. Problems that are solved leave before the sizes beyond.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import combinations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = 1 << 18  # subsets of one size that are still looked at here: all sizes up to m = 20
THREADS = 128  # problems of one program
LAUNCH = {"enable_fp_fusion": False}  # of every kernel: what it computes is what it says, to the last bit
PROGRAMS = 4096  # at least so many programs are made, by sharing the subsets of a problem out, where it pays


@triton.jit
def _transpose(values, targets, columns, first, n, m, row, column, WIDTH: tl.constexpr, THREADS: tl.constexpr):
    """values (n, m), `row` and `column` numbers apart, to columns (m, n).

    first: one number, lowered to the first problem whose values and target may overflow a sum, or are not finite.
    """
    problem = tl.program_id(0) * THREADS + tl.arange(0, THREADS)
    index = tl.arange(0, WIDTH)
    there = problem < n
    both = there[:, None] & (index < m)[None, :]
    x = tl.load(
        values + problem.to(tl.int64)[:, None] * row + index.to(tl.int64)[None, :] * column, mask=both, other=0.0
    )
    tl.store(columns + index[None, :] * n + problem[:, None], x, mask=both)
    theta = tl.load(targets + problem, mask=there, other=0.0)
    total = tl.abs(theta) + tl.sum(tl.abs(x.to(tl.float64)), 1)
    sound = total + total < float("inf")  # which NaN is not
    bad = tl.min(tl.where(sound, n, problem), 0)
    tl.atomic_min(first, bad, mask=bad < n, sem="relaxed")


@triton.jit
def _add(row, bit, n, total, bits):
    """Sum and bits with one index more, whose values lie at `row`, and where those of the next one lie, and its bit.

    They go along with the index: computing them from it costs twice as many instructions a subset.
    """
    return total + tl.load(row).to(tl.float64), bits | bit, row + n, bit << 1


@triton.jit
def _last_one(row, bit, begin, m, n, total, bits, theta, least, code):
    """Look at the subsets that add one of the indices from `begin` on to those of `bits`, whose sum is `total`.

    least: the difference, signed, of the best subset so far, code: its bits. (Triton 3.2 knows no recursion.)
    """
    for _ in range(begin, m):
        found, chosen, row, bit = _add(row, bit, n, total, bits)
        better = tl.abs(found - theta) < tl.abs(least)
        code = tl.where(better, chosen, code)
        least = tl.where(better, found - theta, least)
    return least, code


@triton.jit
def _last_two(row, bit, begin, m, n, total, bits, theta, least, code):
    """`_last_one` for two of these indices."""
    for i in range(begin, m - 1):
        found, chosen, row, bit = _add(row, bit, n, total, bits)
        least, code = _last_one(row, bit, i + 1, m, n, found, chosen, theta, least, code)
    return least, code


@triton.jit
def _last_three(row, bit, begin, m, n, total, bits, theta, least, code):
    """`_last_one` for three of these indices."""
    for i in range(begin, m - 2):
        found, chosen, row, bit = _add(row, bit, n, total, bits)
        least, code = _last_two(row, bit, i + 1, m, n, found, chosen, theta, least, code)
    return least, code


@triton.jit
def _if_better(error, mask, size, least, code, new_size, epsilon):
    """The best subset so far, or the best one of a larger size where that is better and none is within epsilon."""
    take = (error > epsilon) & (least < error)
    return tl.where(take, least, error), tl.where(take, code, mask), tl.where(take, new_size, size)


@triton.jit
def _up_to_three(values, targets, errors, masks, sizes, allowed, n, m, largest, THREADS: tl.constexpr):
    """The least size up to `largest` (1 to 3) that has a subset within epsilon and its best one, else the best of all.

    values (m, n), float32 or float64; targets, errors, masks and sizes (n,). A sum is a number of float64.
    allowed: one number, epsilon; given as such it would be rounded to float32.
    """
    epsilon = tl.load(allowed)
    problem = tl.program_id(0) * THREADS + tl.arange(0, THREADS)
    there = problem < n
    problem = tl.minimum(problem, n - 1)
    theta = tl.load(targets + problem)
    error = tl.abs(theta)
    mask = tl.zeros((THREADS,), tl.int32)
    size = tl.zeros((THREADS,), tl.int32)
    row = values + problem
    empty = tl.zeros((THREADS,), tl.float64)
    nothing = tl.full((), 0, tl.int32)
    one = tl.full((), 1, tl.int32)
    none = tl.full((THREADS,), float("inf"), tl.float64)
    least, code = _last_one(row, one, 0, m, n, empty, nothing, theta, none, mask)
    error, mask, size = _if_better(error, mask, size, tl.abs(least), code, 1, epsilon)
    if largest > 1:
        least, code = _last_two(row, one, 0, m, n, empty, nothing, theta, none, code)
        error, mask, size = _if_better(error, mask, size, tl.abs(least), code, 2, epsilon)
    if largest > 2:
        least, code = _last_three(row, one, 0, m, n, empty, nothing, theta, none, code)
        error, mask, size = _if_better(error, mask, size, tl.abs(least), code, 3, epsilon)
    tl.store(errors + problem, error, mask=there)
    tl.store(masks + problem, mask.to(tl.int64) & 0xFFFFFFFF, mask=there)
    tl.store(sizes + problem, size.to(tl.int64), mask=there)


@triton.jit
def _one_size(values, targets, least, chosen, prefixes, n, m, size, count, share, THREADS: tl.constexpr):
    """Least error over the subsets of `size` (at least 4) of each problem, and the first of them, for one share of the
    prefixes.

    values (m, n), targets (n,); least and chosen (shares, n); prefixes (count, size - 3): all subsets without their
    last three indices, in lexicographic order.
    """
    problem = tl.program_id(0) * THREADS + tl.arange(0, THREADS)
    there = problem < n
    problem = tl.minimum(problem, n - 1)
    theta = tl.load(targets + problem)
    best = tl.full((THREADS,), float("inf"), tl.float64)
    code = tl.zeros((THREADS,), tl.int32)
    one = tl.full((), 1, tl.int32)
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, count)
    for p in range(begin, end):
        total = tl.zeros((THREADS,), tl.float64)
        bits = tl.full((), 0, tl.int32)
        start = tl.full((), 0, tl.int32)
        for d in range(size - 3):
            index = tl.load(prefixes + p * (size - 3) + d)
            total += tl.load(values + index * n + problem).to(tl.float64)
            bits |= one << index
            start = index + 1
        row = values + start * n + problem
        best, code = _last_three(row, one << start, start, m, n, total, bits, theta, best, code)
    out = tl.program_id(1) * n + problem
    tl.store(least + out, tl.abs(best), mask=there)
    tl.store(chosen + out, code.to(tl.int64) & 0xFFFFFFFF, mask=there)


@lru_cache(maxsize=64)
def _prefixes(m: int, size: int, device: str) -> Tensor:
    """The subsets of `size` of m indices without their last three indices, each once, in lexicographic order."""
    rows = list(combinations(range(m - 3), size - 3))
    return torch.from_numpy(np.array(rows, dtype=np.int32).reshape(len(rows), size - 3)).to(device)


def transposed(values: Tensor, targets: Tensor) -> tuple[Tensor, int | None]:
    """values (n, m) as (m, n), so that neighbouring threads read neighbouring numbers, with a check on the way.

    Returns:
        (m, n), and the first problem with an entry that is not finite or so large that a sum may overflow, or None.
    """
    n, m = values.shape
    columns, first = values.new_empty(m, n), torch.full((1,), n, dtype=torch.int32, device=values.device)
    if n:
        with torch.cuda.device_of(values):
            _transpose[(triton.cdiv(n, THREADS),)](
                values, targets, columns, first, n, m, *values.stride(),
                WIDTH=triton.next_power_of_2(m), THREADS=THREADS,  # pyright: ignore[reportArgumentType] - constants
                **LAUNCH,
            )  # fmt: skip
    bad = int(first)
    return columns, None if bad == n else bad


def search(values: Tensor, targets: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor, int]:
    """The least size that has a subset within epsilon and its best one, else the best of all sizes looked at.

    Args:
        values: (m, n) float32 or float64 on the device.
        targets: (n,) float64 there.
        epsilon: allowed error; negative where all sizes are to be looked at.

    Returns:
        mask, size (n,) int64, error (n,) float64, and the largest size that was looked at.
    """
    m, n = values.shape
    mask = torch.empty(n, dtype=torch.int64, device=values.device)
    size, error = torch.empty_like(mask), torch.empty_like(targets)
    looked = min(m, 3)
    if n:
        with torch.cuda.device_of(values):
            _up_to_three[(triton.cdiv(n, THREADS),)](
                values, targets, error, mask, size, targets.new_full((1,), epsilon), n, m, looked,
                THREADS=THREADS,  # pyright: ignore[reportArgumentType] - a constant
                **LAUNCH,
            )  # fmt: skip
    open_ = (error > epsilon).nonzero().flatten()
    while len(open_) and looked < m and math.comb(m, looked + 1) <= LARGEST:
        looked += 1
        least, chosen = _search_size(values[:, open_], targets[open_], looked)
        before = error[open_]
        better = (least < before).nonzero().flatten()
        where = open_[better]
        mask[where], size[where], error[where] = chosen[better], looked, least[better]
        open_ = open_[torch.minimum(least, before) > epsilon]
    return mask, size, error, looked if len(open_) else m


def _search_size(values: Tensor, targets: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Least error (n,) and the first subset that has it, over the subsets of `size` (at least 4) of values (m, n)."""
    m, n = values.shape
    prefixes = _prefixes(m, size, str(values.device))
    programs = triton.cdiv(n, THREADS)
    shares = max(1, min(PROGRAMS // programs, len(prefixes) // 4))
    share = triton.cdiv(len(prefixes), shares)
    shares = triton.cdiv(len(prefixes), share)
    least = torch.empty(shares, n, dtype=torch.float64, device=values.device)
    chosen = torch.empty(shares, n, dtype=torch.int64, device=values.device)
    with torch.cuda.device_of(values):
        _one_size[(programs, shares)](
            values,
            targets,
            least,
            chosen,
            prefixes,
            n,
            m,
            size,
            len(prefixes),
            share,
            THREADS=THREADS,  # pyright: ignore[reportArgumentType] - a constant
            **LAUNCH,
        )
    first = least.argmin(0, keepdim=True)  # the first of several: the shares are in lexicographic order
    return least.gather(0, first)[0], chosen.gather(0, first)[0]
