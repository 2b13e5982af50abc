"""Subsets by ascending size on a GPU: one problem per thread, a Triton kernel for the sizes up to 3, which solve most
problems, and one for each size beyond.

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
PROGRAMS = 4096  # at least so many programs are made, by sharing the subsets of a problem out, where it pays


@triton.jit
def _up_to_three(values, targets, errors, masks, sizes, n, m, largest, epsilon, THREADS: tl.constexpr):
    """The least size up to `largest` (1 to 3) that has a subset within epsilon and its best one, else the best of all.

    values (m, n), float32 or float64; targets, errors, masks and sizes (n,). A sum is a number of float64.
    """
    problem = tl.program_id(0) * THREADS + tl.arange(0, THREADS)
    there = problem < n
    theta = tl.load(targets + problem, mask=there, other=0.0)
    error = tl.abs(theta)
    mask = tl.zeros((THREADS,), tl.int32)
    size = tl.zeros((THREADS,), tl.int32)
    one = tl.full((), 1, tl.int32)
    least = tl.full((THREADS,), float("inf"), tl.float64)
    code = tl.zeros((THREADS,), tl.int32)
    for i in range(m):
        first = tl.load(values + i * n + problem, mask=there, other=0.0).to(tl.float64)
        off = tl.abs(first - theta)
        better = off < least
        code = tl.where(better, one << i, code)
        least = tl.where(better, off, least)
    take = (error > epsilon) & (least < error)
    error, mask, size = tl.where(take, least, error), tl.where(take, code, mask), tl.where(take, 1, size)
    if largest > 1:
        least = tl.full((THREADS,), float("inf"), tl.float64)
        for i in range(m - 1):
            first = tl.load(values + i * n + problem, mask=there, other=0.0).to(tl.float64)
            for j in range(i + 1, m):
                second = tl.load(values + j * n + problem, mask=there, other=0.0).to(tl.float64)
                off = tl.abs(first + second - theta)
                better = off < least
                code = tl.where(better, (one << i) | (one << j), code)
                least = tl.where(better, off, least)
        take = (error > epsilon) & (least < error)
        error, mask, size = tl.where(take, least, error), tl.where(take, code, mask), tl.where(take, 2, size)
    if largest > 2:
        least = tl.full((THREADS,), float("inf"), tl.float64)
        for i in range(m - 2):
            first = tl.load(values + i * n + problem, mask=there, other=0.0).to(tl.float64)
            for j in range(i + 1, m - 1):
                pair = first + tl.load(values + j * n + problem, mask=there, other=0.0).to(tl.float64)
                bits = (one << i) | (one << j)
                for k in range(j + 1, m):
                    third = tl.load(values + k * n + problem, mask=there, other=0.0).to(tl.float64)
                    off = tl.abs(pair + third - theta)
                    better = off < least
                    code = tl.where(better, bits | (one << k), code)
                    least = tl.where(better, off, least)
        take = (error > epsilon) & (least < error)
        error, mask, size = tl.where(take, least, error), tl.where(take, code, mask), tl.where(take, 3, size)
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
    theta = tl.load(targets + problem, mask=there, other=0.0)
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
            total += tl.load(values + index * n + problem, mask=there, other=0.0).to(tl.float64)
            bits |= one << index
            start = index + 1
        for i in range(start, m - 2):
            first = total + tl.load(values + i * n + problem, mask=there, other=0.0).to(tl.float64)
            for j in range(i + 1, m - 1):
                second = first + tl.load(values + j * n + problem, mask=there, other=0.0).to(tl.float64)
                most = bits | (one << i) | (one << j)
                for k in range(j + 1, m):
                    third = tl.load(values + k * n + problem, mask=there, other=0.0).to(tl.float64)
                    error = tl.abs(second + third - theta)
                    better = error < best
                    code = tl.where(better, most | (one << k), code)
                    best = tl.where(better, error, best)
    out = tl.program_id(1) * n + problem
    tl.store(least + out, best, mask=there)
    tl.store(chosen + out, code.to(tl.int64) & 0xFFFFFFFF, mask=there)


@lru_cache(maxsize=64)
def _prefixes(m: int, size: int, device: str) -> Tensor:
    """The subsets of `size` of m indices without their last three indices, each once, in lexicographic order."""
    rows = list(combinations(range(m - 3), size - 3))
    return torch.from_numpy(np.array(rows, dtype=np.int32).reshape(len(rows), size - 3)).to(device)


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
                values, targets, error, mask, size, n, m, looked, epsilon, THREADS=THREADS,
                enable_fp_fusion=False,  # pyright: ignore[reportCallIssue] - an option of the launch
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
            THREADS=THREADS,
            enable_fp_fusion=False,  # pyright: ignore[reportCallIssue] - an option of the launch
        )
    first = least.argmin(0, keepdim=True)  # the first of several: the shares are in lexicographic order
    return least.gather(0, first)[0], chosen.gather(0, first)[0]
