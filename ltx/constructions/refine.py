"""Refining the choice of a row's entries: each may give way to any other of the row.

`choice` looks at one problem at a time. Here the whole row is one problem: over the sets A of its entries

    cost(A) = || e + sum_A w_s x_s ||^2 + penalty |A|

falls with every move. A pass takes each entry that is kept out in turn and puts the best of all others in its place,
or none, where that lowers the cost; then it adds entries as long as that does. Only the Gram matrix of the slots and
their products with the error are needed.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from ltx.compiled import compiled
from ltx.constructions.choice import Signals, Visits

LARGEST = 1 << 14  # slots of a layer whose Gram matrix is held as a whole: 1 GiB
HELD = 1 << 27  # elements of a matrix (rows, slots) that the batched kernel holds at a time
TOLERANCE = 1e-6  # share of a row's square error that a move has to gain: below is rounding


class Gram:
    """Products of a layer's slots with one another, (S, S) in all, S = G m; made when they are worth their price."""

    def __init__(self, signals: Signals):
        self._slots = signals.slots.flatten(0, 1)  # (S, N)
        self._m = signals.slots.shape[1]
        self._whole: Tensor | None = None
        self._spent = 0  # elements of parts so far
        self._buffer = np.empty(0, np.float32)  # of parts: fresh memory costs as much as filling it

    @property
    def fits(self) -> bool:
        return len(self._slots) <= LARGEST

    def whole(self) -> Tensor:
        if self._whole is None:
            slots = self._slots
            self._whole = torch.empty(len(slots), len(slots), device=slots.device)
            for begin in range(0, len(slots), 1024):  # it is symmetric
                part = torch.mm(slots[begin : begin + 1024], slots[: begin + 1024].T)
                self._whole[begin : begin + 1024, : part.shape[1]] = part
                self._whole[: part.shape[1], begin : begin + 1024] = part.T
        return self._whole

    def expect(self, elements: int) -> None:
        """So many elements of parts are about to be asked for."""
        self._spent += elements
        if self.fits and self._spent > len(self._slots) ** 2:
            self.whole()

    def part(self, groups: Tensor) -> Tensor:
        """Of the slots of `groups` (P,) alone, (P m, P m); valid until the next is asked for."""
        if self._whole is None:
            mine = self._slots.view(-1, self._m, self._slots.shape[1])[groups].flatten(0, 1)
            return torch.mm(mine, mine.T)
        many = len(groups) * self._m
        if many**2 > len(self._buffer):
            self._buffer = np.empty(many**2, np.float32)
        out = self._buffer[: many**2].reshape(many, many)
        _gather(self._whole.numpy(), groups.numpy(), self._m, out)
        return torch.from_numpy(out)


def refine(
    signals: Signals, gram: Gram, visits: Visits, kinds: Tensor, weights: Tensor, members: Tensor, error: Tensor,
    penalty: Tensor, *, passes: int,
) -> None:  # fmt: skip
    """Lower the costs of n rows, in `passes` passes or until no move does.

    Args:
        kinds: (n,) int64, ascending: what each row computes.
        weights: (V, m) float32: the source's entries for every visit of every row, rows one behind the other.
        members: (V, m) bool: which of them are kept; changed in place.
        error: (n, N) float32, the rows' errors; changed in place.
        penalty: (n,) of an entry.
    """
    if error.device.type != "cpu":
        _refine_batched(signals, gram, visits, kinds, weights, members, error, penalty, passes)
        return
    m = weights.shape[1]
    unique, counts = torch.unique_consecutive(kinds, return_counts=True)
    sizes = visits.begin[1:] - visits.begin[:-1]
    gram.expect(int((sizes[unique] * m).square().sum()))
    products = torch.mm(error, signals.slots.flatten(0, 1).T)  # (n, S)
    tolerance = TOLERANCE * error.square().sum(1)
    row = visit = 0
    for kind, many in zip(unique.tolist(), counts.tolist(), strict=True):
        groups = visits.group[visits.begin[kind] : visits.begin[kind + 1]]
        rows, mine = slice(row, row + many), slice(visit, visit + many * len(groups))
        row, visit = rows.stop, mine.stop
        if len(groups):
            part, chosen = weights[mine].view(many, -1), members[mine].view(many, -1)
            arrays = (signals.slots, gram.part(groups), groups, part, chosen, products[rows], error[rows],
                      penalty[rows], tolerance[rows])  # fmt: skip
            _refine(*(t.contiguous().numpy() for t in arrays), passes)  # pyright: ignore[reportCallIssue]


@compiled(parallel=True)
def _gather(whole, groups, m, out):
    for p in numba.prange(len(groups)):
        for s in range(m):
            row, mine = whole[groups[p] * m + s], out[p * m + s]
            for q in range(len(groups)):
                mine[q * m : (q + 1) * m] = row[groups[q] * m : (groups[q] + 1) * m]


@compiled(parallel=True, fastmath={"contract", "reassoc", "nsz"})
def _refine(slots, gram, groups, weights, members, products, error, penalty, tolerance, passes):
    """Rows of one kind, whose entries are those of `groups` (P,): n = P m.

    slots (G, m, N); gram (n, n); weights, members (Q, n); products (Q, G m): of all slots with the error (Q, N).
    """
    n, m = len(gram), slots.shape[1]
    for q in numba.prange(len(weights)):
        w, kept = weights[q], members[q]
        before, c = kept.copy(), np.empty(n, np.float32)
        for j in range(n):
            c[j] = products[q, groups[j // m] * m + j % m]
        alone = np.empty(n, np.float32)  # what an entry costs beside its product with the error; infinite when kept
        for j in range(n):
            alone[j] = np.inf if kept[j] else w[j] * w[j] * gram[j, j] + penalty[q]
        for _ in range(passes):
            changed = False
            for i in np.nonzero(kept)[0]:
                mine, others = w[i], gram[i]
                without = mine * (mine * others[i] - 2 * c[i]) - penalty[q]  # what leaving it out costs
                least = np.float32(np.inf)
                for j in range(n):
                    least = min(least, alone[j] + 2 * w[j] * (c[j] - mine * others[j]))
                if without + min(least, np.float32(0)) < -tolerance[q]:
                    changed = True
                    _add(c, others, -mine)
                    if least < 0:
                        _put(gram, w, kept, c, alone)
                    kept[i] = False
                    alone[i] = mine * mine * others[i] + penalty[q]
            while True:
                least = np.float32(np.inf)
                for j in range(n):
                    least = min(least, alone[j] + 2 * w[j] * c[j])
                if least >= -tolerance[q]:
                    break
                changed = True
                _put(gram, w, kept, c, alone)
            if not changed:
                break
        for j in range(n):
            if kept[j] != before[j]:
                _add(error[q], slots[groups[j // m], j % m], w[j] if kept[j] else -w[j])


@compiled(fastmath={"contract"})
def _add(c, row, factor):
    for j in range(len(c)):
        c[j] += factor * row[j]


@compiled(fastmath={"contract"})
def _put(gram, w, kept, c, alone):
    """Keep the entry that costs least."""
    best, least = 0, np.float32(np.inf)
    for j in range(len(c)):
        value = alone[j] + 2 * w[j] * c[j]
        if value < least:
            best, least = j, value
    kept[best] = True
    alone[best] = np.inf
    _add(c, gram[best], w[best])


def _refine_batched(
    signals: Signals, gram: Gram, visits: Visits, kinds: Tensor, weights: Tensor, members: Tensor, error: Tensor,
    penalty: Tensor, passes: int,
) -> None:  # fmt: skip
    """The same with torch, an entry of every row at a time, on any device."""
    device, m = error.device, weights.shape[1]
    begin, group, kinds = visits.begin.to(device), visits.group.to(device), kinds.to(device)
    sizes = (begin[1:] - begin[:-1])[kinds]
    slots = signals.slots.flatten(0, 1)
    row = torch.repeat_interleave(torch.arange(len(kinds), device=device), sizes)
    visit = begin[kinds][row] + torch.arange(len(row), device=device) - (sizes.cumsum(0) - sizes)[row]
    column = group[visit][:, None] * m + torch.arange(m, device=device)  # (V, m)
    for rows in torch.arange(len(kinds), device=device).split(max(1, HELD // len(slots))):
        here = (row >= rows[0]) & (row <= rows[-1])
        at = (row[here][:, None] - rows[0], column[here])
        w = torch.zeros(len(rows), len(slots), device=device)  # 0: of a slot that the row does not read
        kept, turn = torch.zeros_like(w, dtype=torch.bool), torch.zeros_like(w, dtype=torch.int64)
        w[at], kept[at] = weights[here], members[here]
        turn[at] = torch.arange(at[1].numel(), device=device).view_as(at[1])  # as the visits are
        before = kept.clone()
        tolerance = TOLERANCE * error[rows].square().sum(1)
        _refine_rows(slots, gram, w, kept, turn, error[rows] @ slots.T, penalty[rows], tolerance, passes)
        error[rows] += (w * (kept.float() - before.float())) @ slots
        members[here] = kept[at]


def _refine_rows(
    slots: Tensor, gram: Gram, w: Tensor, kept: Tensor, turn: Tensor, c: Tensor, penalty: Tensor, tolerance: Tensor,
    passes: int,
) -> None:  # fmt: skip
    """Passes over n rows with all S slots: w, kept, c (n, S), of which `kept` is changed; turn (n, S) orders them."""
    every = torch.arange(len(w), device=w.device)
    norms = slots.square().sum(1)
    alone = w.square() * norms + penalty[:, None]

    def products(index: Tensor) -> Tensor:
        """Of a slot for each row with all, (n, S)."""
        return gram.whole()[index] if gram.fits else slots[index] @ slots.T

    def best(c: Tensor) -> tuple[Tensor, Tensor]:
        """What the entry that costs least costs, and which it is, (n,) each."""
        return torch.where(kept, torch.inf, alone + 2 * w * c).min(1)

    def put(c: Tensor, who: Tensor, which: Tensor) -> Tensor:
        """Keep `which` (n,) in the rows `who` (n,) bool."""
        kept[every, which] |= who
        return c + torch.where(who, w[every, which], 0.0)[:, None] * products(which)

    for _ in range(passes):
        counts = kept.sum(1)
        order = torch.where(kept, turn, kept.numel()).argsort(1)  # what is kept comes first
        changed = torch.zeros((), dtype=torch.bool, device=w.device)
        for step in range(int(counts.max())):
            i, there = order[:, step], step < counts
            mine = torch.where(there, w[every, i], 0.0)
            reduced = c - mine[:, None] * products(i)
            least, j = best(reduced)
            without = mine * (mine * norms[i] - 2 * c[every, i]) - penalty
            move = there & (without + least.clamp_max(0) < -tolerance)
            c = put(torch.where(move[:, None], reduced, c), move & (least < 0), j)
            kept[every, i] &= ~move
            changed |= move.any()
        while True:
            least, j = best(c)
            more = least < -tolerance
            if not bool(more.any()):
                break
            c = put(c, more, j)
            changed |= True
        if not bool(changed):
            break
