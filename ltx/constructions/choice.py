"""Choosing subsets with error feedback: which entries of a row lower the error of the function that it computes.

A row's problems are visited one after the other. Its error e (N samples) holds what the entries chosen so far give,
minus what the target's parameters visited so far do. The subset S that a problem takes minimises

    || e + sum_S w_s x_s - theta u ||^2 + penalty |S|        x_s (N,): slots, u (N,): what they stand for

over the subsets of at most `largest` slots, within `bound` of theta where there is one. Only the Gram matrix of the
slots and the products of e with them are needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import torch
from torch import Tensor

from ltx.compiled import compiled

HELD = 1 << 25  # costs of subsets that the batched kernel holds at a time
_STRIP = 512  # samples at a time: what is multiplied stays in the first cache


@dataclass(frozen=True)
class Signals:
    """What entries are worth on the samples, by group g: a base set at a tap. All float32 on one device.

    slots (G, m, N); ideal (G, N); gram (G, m, m) and cross (G, m): products of the slots with one another and with the
    ideal signal.
    """

    slots: Tensor
    ideal: Tensor
    gram: Tensor
    cross: Tensor

    @classmethod
    def of(cls, slots: Tensor, ideal: Tensor) -> Signals:
        cross = torch.bmm(slots, ideal[:, :, None])[:, :, 0]
        return cls(slots, ideal, torch.bmm(slots, slots.mT), cross)


@dataclass(frozen=True)
class Visits:
    """The problems of every kind of row in the order in which they are visited; kind c has begin[c]:begin[c + 1]."""

    begin: Tensor  # (kinds + 1,) int64
    group: Tensor  # (P,) int64
    theta: Tensor  # (P,) float32
    rank: Tensor | None = None  # (G,) int64: where all kinds visit their groups in one order, which one


def choose(
    signals: Signals, visits: Visits, kinds: Tensor, weights: Tensor, worth: Tensor, error: Tensor, penalty: Tensor,
    *, bound: float, largest: int, sweeps: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Choose the subsets of n rows.

    Args:
        kinds: (n,) int64, ascending: what each row computes.
        weights: (V, m) float32: the source's entries for every visit of every row, rows one behind the other.
        worth: (V, m) float32: what these entries count towards theta; looked at where there is a bound.
        error: (n, N) float32, the rows' errors before the first choice; afterwards those that remain.
        penalty: (n,) of an element.
        bound: of |sum - theta|; infinite for none.
        sweeps: later ones take each subset out and choose again.

    Returns:
        members: (V, m) bool: the elements of the subsets.
        missed: (n,) int64: problems without a subset within the bound. Their subset is empty.
    """
    how = (bound, largest, sweeps)
    if error.device.type == "cpu":
        unique, counts = torch.unique_consecutive(kinds, return_counts=True)
        rows = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        sizes = (visits.begin[1:] - visits.begin[:-1])[kinds]
        first = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        chosen = np.full((len(weights), largest), -1, np.int16)
        missed = np.zeros(len(kinds), np.int64)
        arrays = (signals.slots, signals.ideal, signals.gram, signals.cross, visits.begin, visits.group, visits.theta,
                  unique, rows, first, weights, worth, error, penalty)  # fmt: skip
        _choose(*(a.contiguous().numpy() for a in arrays), *how, chosen, missed)  # pyright: ignore[reportCallIssue]
        members = torch.zeros(len(weights), weights.shape[1] + 1, dtype=torch.bool)
        members.scatter_(1, torch.from_numpy(chosen).long() % members.shape[1], True)
        return members[:, :-1].contiguous(), torch.from_numpy(missed)
    return _choose_batched(signals, visits, kinds, weights, worth, error, penalty, *how)


@compiled(fastmath=True)
def _products(error, slots, out):
    """out (Q, m) = error (Q, N) @ slots (m, N).T, four by four rows at a time."""
    many, m, samples = len(error), len(slots), error.shape[1]
    for q in range(many):
        for s in range(m):
            out[q, s] = 0
    for begin in range(0, samples, _STRIP):
        end = min(begin + _STRIP, samples)
        for q in range(0, many, 4):
            q1, q2, q3 = min(q + 1, many - 1), min(q + 2, many - 1), min(q + 3, many - 1)
            e0, e1, e2, e3 = error[q, begin:end], error[q1, begin:end], error[q2, begin:end], error[q3, begin:end]
            for s in range(0, m, 4):
                s1, s2, s3 = min(s + 1, m - 1), min(s + 2, m - 1), min(s + 3, m - 1)
                x0, x1, x2, x3 = slots[s, begin:end], slots[s1, begin:end], slots[s2, begin:end], slots[s3, begin:end]
                a00 = a01 = a02 = a03 = a10 = a11 = a12 = a13 = np.float32(0)
                a20 = a21 = a22 = a23 = a30 = a31 = a32 = a33 = np.float32(0)
                for n in range(end - begin):
                    a00 += e0[n] * x0[n]
                    a01 += e0[n] * x1[n]
                    a02 += e0[n] * x2[n]
                    a03 += e0[n] * x3[n]
                    a10 += e1[n] * x0[n]
                    a11 += e1[n] * x1[n]
                    a12 += e1[n] * x2[n]
                    a13 += e1[n] * x3[n]
                    a20 += e2[n] * x0[n]
                    a21 += e2[n] * x1[n]
                    a22 += e2[n] * x2[n]
                    a23 += e2[n] * x3[n]
                    a30 += e3[n] * x0[n]
                    a31 += e3[n] * x1[n]
                    a32 += e3[n] * x2[n]
                    a33 += e3[n] * x3[n]
                for row, sums in ((q, (a00, a01, a02, a03)), (q + 1, (a10, a11, a12, a13)),
                                  (q + 2, (a20, a21, a22, a23)), (q + 3, (a30, a31, a32, a33))):  # fmt: skip
                    if row < many:
                        for d in range(4):
                            if s + d < m:
                                out[row, s + d] += sums[d]


@compiled(fastmath={"contract"})
def _subsets(single, double, value, theta, bound, largest, best, code, cost, worth, beyond, index):
    """The subset of least cost in each lane, over all sizes up to `largest`, in the order of a depth-first search.

    single (m, Q): cost of s alone; double (m, m, Q): what s and t cost together beyond; value (m, Q): towards theta.
    best, code (Q,): cost and elements of the empty subset on entry, of the best one on return: element + 1 in each
    byte of the code, the first in the lowest. cost, worth (largest, Q), beyond (largest, m, Q) and index are scratch.
    """
    m, many = single.shape
    free = bound == np.inf
    depth = 0  # of the path index[:depth], whose cost and worth are those of depth - 1
    start = 0
    label = 0
    for t in range(m):  # numba takes 5 s to compile an assignment of whole arrays
        for q in range(many):
            beyond[0, t, q] = single[t, q]
    while True:
        for s in range(start, m):  # every subset that has one element more than the path
            mine = label | (s + 1) << 8 * depth
            for q in range(many):
                before = cost[depth - 1, q] if depth else np.float32(0)
                reached = (worth[depth - 1, q] if depth else np.float32(0)) + value[s, q]
                total = before + beyond[depth, s, q]
                take = (total < best[q]) & (free | (abs(reached - theta) <= bound))
                best[q] = total if take else best[q]
                code[q] = mine if take else code[q]
        if depth + 1 < largest and start < m - 1:
            s = start  # one deeper
        else:
            while depth > 0 and index[depth - 1] >= m - 2:
                depth -= 1
                label &= (1 << 8 * depth) - 1
            if depth == 0:
                return
            depth -= 1
            label &= (1 << 8 * depth) - 1
            s = index[depth] + 1
        index[depth] = s
        label |= (s + 1) << 8 * depth
        for q in range(many):
            cost[depth, q] = (cost[depth - 1, q] if depth else np.float32(0)) + beyond[depth, s, q]
            worth[depth, q] = (worth[depth - 1, q] if depth else np.float32(0)) + value[s, q]
        depth += 1
        for t in range(s + 1, m):
            for q in range(many):
                beyond[depth, t, q] = beyond[depth - 1, t, q] + double[s, t, q]
        start = s + 1


@compiled(parallel=True, fastmath={"contract"})
def _choose(
    slots, ideal, gram, cross, begin, group, theta, kinds, rows, first, weights, worth, error, penalty, bound, largest,
    sweeps, chosen, missed,
):  # fmt: skip
    """All rows of a kind visit the same problems together: their work is one (Q, N) times (N, m) product a visit."""
    m = slots.shape[1]
    for c in numba.prange(len(kinds)):
        r0, r1 = rows[c], rows[c + 1]
        many, mine = r1 - r0, error[r0:r1]
        products = np.empty((many, m), np.float32)
        single, value = np.empty((m, many), np.float32), np.empty((m, many), np.float32)
        double = np.empty((m, m, many), np.float32)
        best, code = np.empty(many, np.float32), np.empty(many, np.int64)
        cost, reached = np.empty((largest + 1, many), np.float32), np.empty((largest + 1, many), np.float32)
        beyond, index = np.empty((largest + 1, m, many), np.float32), np.empty(largest + 1, np.int64)
        for sweep in range(sweeps):
            for p in range(begin[kinds[c]], begin[kinds[c] + 1]):
                g, wanted = group[p], theta[p]
                step = p - begin[kinds[c]]
                _products(mine, slots[g], products)
                for q in range(many):
                    visit = first[r0 + q] + step
                    w = weights[visit]
                    if sweep == 0:
                        for s in range(m):
                            products[q, s] -= wanted * cross[g, s]
                    else:
                        for d in range(largest):
                            old = chosen[visit, d]
                            if old >= 0:
                                for s in range(m):
                                    products[q, s] -= w[old] * gram[g, old, s]
                    for s in range(m):
                        value[s, q] = worth[visit, s]
                        single[s, q] = w[s] * (w[s] * gram[g, s, s] + 2 * products[q, s]) + penalty[r0 + q]
                        for t in range(s + 1, m):
                            double[s, t, q] = 2 * w[s] * w[t] * gram[g, s, t]
                    best[q] = 0 if abs(wanted) <= bound else np.inf
                    code[q] = 0
                _subsets(
                    single, double, value, wanted, np.float32(bound), largest, best, code, cost, reached, beyond, index
                )
                for q in range(many):
                    visit = first[r0 + q] + step
                    w, e = weights[visit], mine[q]
                    if best[q] == np.inf and sweep == 0:
                        missed[r0 + q] += 1
                    if sweep == 0:
                        e -= wanted * ideal[g]
                    for d in range(largest):
                        old = chosen[visit, d]
                        new = (code[q] >> 8 * d & 255) - 1
                        if old != new:
                            if old >= 0:
                                e -= w[old] * slots[g, old]
                            if new >= 0:
                                e += w[new] * slots[g, new]
                            chosen[visit, d] = new


def _choose_batched(
    signals: Signals, visits: Visits, kinds: Tensor, weights: Tensor, worth: Tensor, error: Tensor, penalty: Tensor,
    bound: float, largest: int, sweeps: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same with torch, on any device: a group at a time where all rows have one order, else a visit of every row.

    What is looked at together has to be few launches on a GPU: its rows are next to each other, and x, the slots, are
    (m, N) where they are one group's, (n, m, N) where each row has its own.
    """
    device, m = error.device, weights.shape[1]
    kinds, begin, group, theta = (t.to(device) for t in (kinds, visits.begin, visits.group, visits.theta))
    sizes = (begin[1:] - begin[:-1])[kinds]
    row = torch.repeat_interleave(torch.arange(len(kinds), device=device), sizes)  # of every visit
    step = torch.arange(len(row), device=device) - (sizes.cumsum(0) - sizes)[row]
    problem = begin[kinds][row] + step
    turn = step if visits.rank is None else visits.rank.to(device)[group[problem]]
    turn, order = turn.sort(stable=True)
    counts = torch.unique_consecutive(turn, return_counts=True)[1].tolist()
    row, problem, w, worth = row[order], problem[order], weights[order], worth[order]
    chosen = torch.zeros_like(w)
    groups = group[problem].split(counts)
    if visits.rank is not None:
        groups = torch.stack([mine[0] for mine in groups]).tolist() if groups else []
    parts = [t.split(counts) for t in (row, theta[problem], w, worth, penalty[row, None].expand(-1, m), chosen)]
    subsets = torch.cat([_combinations(m, size, device) for size in range(largest + 1)])  # (subsets, m) float32
    subsets = [(some, (some[:, :, None] * some[:, None]).flatten(1)) if len(subsets) * m * m <= HELD else (some, None)
               for some in subsets.split(max(1, HELD // max(*counts, m * m, 1)))]  # fmt: skip
    missed = torch.zeros(len(kinds), dtype=torch.int64, device=device)
    for sweep in range(sweeps):
        for g, mine, wanted, w, worth, price, kept in zip(groups, *parts, strict=True):
            x, e = signals.slots[g], error[mine]
            products = _times(e, x.mT)
            if sweep == 0:
                products -= wanted[:, None] * signals.cross[g]
            else:
                old = w * kept
                products -= _times(old, signals.gram[g])
            pairs = (w[:, :, None] * w[:, None]).mul_(signals.gram[g]).flatten(1)  # (n, m m)
            linear = torch.addcmul(price, w, products, value=2)
            least, best = _cheapest(subsets, linear, pairs, worth, wanted, bound)
            if bound < float("inf"):
                failed = (least == torch.inf)[:, None]
                best = torch.where(failed, 0.0, best)
                if sweep == 0:
                    missed[mine] += failed[:, 0]
            if sweep == 0:
                e -= wanted[:, None] * signals.ideal[g]
                e += _times(w * best, x)
            else:
                e += _times(w * best - old, x)
            error[mine] = e
            kept.copy_(best)
    return torch.empty_like(chosen).index_copy_(0, order, chosen) > 0, missed


def _cheapest(
    subsets: list[tuple[Tensor, Tensor | None]], linear: Tensor, pairs: Tensor, worth: Tensor, wanted: Tensor,
    bound: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Least cost (n,) and the first subset that has it (n, m); infinite where none is within the bound.

    subsets: in parts (some, m), each with the products of its members (some, m m), or None to form them here.
    """
    tried = []
    for some, both in subsets:
        both = (some[:, :, None] * some[:, None]).flatten(1) if both is None else both
        cost = torch.addmm(linear @ some.T, pairs, both.T)
        if bound < float("inf"):
            off = (worth @ some.T - wanted[:, None]).abs()
            cost = torch.where(off <= bound, cost, torch.inf)
        found, index = cost.min(1)
        tried.append((found, some[index]))
    least, best = tried[0]
    for found, subset in tried[1:]:
        best = torch.where((found < least)[:, None], subset, best)
        least = torch.minimum(least, found)
    return least, best


def _times(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows (n, p) times one matrix (p, q) for all, or (n, p, q) one for each."""
    return rows @ matrix if matrix.ndim == 2 else (rows[:, None] @ matrix)[:, 0]


def _combinations(m: int, size: int, device: torch.device) -> Tensor:
    """The subsets of `size` of m elements, as rows of 0 and 1 (subsets, m)."""
    if size > m:
        return torch.zeros(0, m, device=device)
    index = torch.combinations(torch.arange(m), size) if size else torch.zeros(1, 0, dtype=torch.int64)
    return torch.zeros(len(index), m).scatter_(1, index, 1.0).to(device)
