"""Rows of a source layer, tried until every output of a target layer has the slots it needs (Appendix F).

Each slot is a row whose subset-sum problems were all solved. When any problem of a row fails, the whole row is
given up and the slot is tried on the next row of the source that nobody has used: the failed slots of a sweep
go on, in their order, with the rows behind the last one used. No number is looked at twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ltx import source, subset_sum
from ltx.errors import ConstructionError
from ltx.source import SourceLayer

MAX_ROWS_PER_SLOT = 1000
HOPELESS_AFTER = 10  # rows per slot, before the chance of a row is judged
HOPELESS_BELOW = 1e-3  # chance that any of MAX_ROWS_PER_SLOT rows would do
CHUNK = 1 << 22  # base values held at a time


@dataclass(frozen=True)
class BaseSets:
    """What the entries of a row are worth: entry (n, k) contributes w[row, n, k] * multiplier of column n.

    columns: (B, m) int64 source channels; multipliers: (B, m) float64; paired: each column n stands for the
    opposite columns n and n + 1, which are kept together (looks_linear).
    """

    columns: Tensor
    multipliers: Tensor
    paired: bool = False


@dataclass(frozen=True)
class Problems:
    """The subset-sum problems of one output row: base set, tap and target of each."""

    base: Tensor  # (P,) int64, index into BaseSets
    tap: Tensor  # (P,) int64
    theta: Tensor  # (P,) float64

    def __len__(self) -> int:
        return len(self.theta)


@dataclass(frozen=True)
class Rows:
    """The rows that were found and the entries that they keep."""

    row: Tensor  # (slots,) int64: source row of each slot
    width: int  # rows used up
    mask: Tensor  # flat indices row * row_size + offset of the kept entries, sorted
    sums: Tensor  # (slots,) float64: sum over the problems of a row of its subset sums
    problems: int  # how many were solved, failed rows included
    failures: int  # how many of them had no subset within epsilon


def solve_rows(
    layer: SourceLayer,
    seed: int,
    problems: Sequence[Problems],
    slots: Sequence[int],
    bases: BaseSets,
    epsilon: float,
    *,
    selection: str,
    device: str,
    names: Sequence[str],
) -> Rows:
    """Find a row of `layer` for every entry of `slots`.

    Args:
        layer: the source layer; its number of output channels is not used, the rows are what it takes.
        problems: the problems of each kind of row.
        slots: for every slot wanted the index of its kind.
        bases: the base sets that `problems` refer to.
        names: what each kind of row stands for, for messages.

    Raises:
        ConstructionError: a slot has used up MAX_ROWS_PER_SLOT rows, or is next to certain to do so, naming layer
            and row and what failed.
    """
    total = len(slots)
    kind = torch.as_tensor(slots, dtype=torch.int64)
    row = torch.full((total,), -1, dtype=torch.int64)
    sums = torch.zeros(total, dtype=torch.float64)
    masks: list[Tensor] = []
    pending = torch.arange(total)
    begin = attempts = 0
    asked = torch.zeros(len(problems), dtype=torch.float64)  # problems solved for rows of each kind
    missed = asked.clone()  # how many of them had no subset
    while len(pending) and attempts < MAX_ROWS_PER_SLOT:
        if _hopeless(problems, kind[pending], attempts, asked, missed):
            break
        attempts += 1
        failing: list[Tensor] = []
        for part in _chunks(pending, [len(problems[int(kind[s])]) for s in pending], bases):
            tried = _try_rows(layer, seed, problems, kind[part], begin, bases, epsilon, selection, device)
            good = tried.good
            row[part[good]] = begin + good.nonzero().flatten()
            sums[part[good]] = tried.sums[good]
            masks.append(tried.mask)
            failing.append(part[~good])
            counts = torch.tensor([len(problems[int(k)]) for k in kind[part]], dtype=torch.float64)
            asked.index_add_(0, kind[part], counts)
            missed.index_add_(0, kind[part], tried.failures.double())
            begin += len(part)
        pending = torch.cat(failing)
    if len(pending):
        hardest = kind[pending][(missed / asked.clamp_min(1))[kind[pending]].argmax()]
        which, share = int(hardest), float(missed[hardest] / asked[hardest])
        raise ConstructionError(
            f"layer {layer.target or layer.name}, {names[which]}: none of {attempts} source rows solves all of its "
            f"{len(problems[which])} subset-sum problems within {epsilon:g}, because {share:.2g} of them have no such "
            f"subset among {bases.columns.shape[1]} values; raise m or epsilon"
            + (", or use construction=L+1" if layer.role == "pair" and layer.index > 1 else "")
            + (", or use scaling=layer_max" if _beyond(problems[which], bases, layer) else "")
        )
    none = torch.empty(0, dtype=torch.int64)
    mask = torch.cat([none, *masks]).sort().values
    return Rows(row, begin, mask, sums, int(asked.sum()), int(missed.sum()))


def _hopeless(problems, kinds: Tensor, attempts: int, asked: Tensor, missed: Tensor) -> bool:
    """Whether some slot will next to certainly use up all rows that it may try.

    With a share f of its P problems failing, a row succeeds with a chance of at most (1 - f)^P: problems differ,
    and the product of their chances is largest when they do not.
    """
    if attempts < HOPELESS_AFTER:
        return False
    count = torch.tensor([len(p) for p in problems], dtype=torch.float64)[kinds]
    share = (missed / asked.clamp_min(1))[kinds]
    return bool((MAX_ROWS_PER_SLOT * (1 - share) ** count < HOPELESS_BELOW).any())


def _beyond(problems: Problems, bases: BaseSets, layer: SourceLayer) -> bool:
    """Whether some target value is larger than any single entry could be."""
    largest = float(bases.multipliers.abs().max()) * layer.sigma if bases.multipliers.numel() else 0.0
    return float(problems.theta.abs().max()) > min(largest, 1.0)


def _chunks(pending: Tensor, sizes: list[int], bases: BaseSets) -> list[Tensor]:
    """Split the slots so that the base values of one part fit into CHUNK."""
    limit = max(1, CHUNK // max(1, bases.columns.shape[-1]))
    parts, part, held = [], [], 0
    for slot, size in zip(pending.tolist(), sizes, strict=True):
        if part and held + size > limit:
            parts.append(torch.tensor(part))
            part, held = [], 0
        part.append(slot)
        held += size
    return [*parts, torch.tensor(part)]


@dataclass(frozen=True)
class _Tried:
    good: Tensor  # (rows,) bool
    sums: Tensor  # (rows,) float64
    mask: Tensor  # flat indices, of good rows only
    failures: Tensor  # (rows,) int64: problems without a subset within epsilon


def _try_rows(layer, seed, problems, kinds, begin, bases, epsilon, selection, device) -> _Tried:
    """Solve all problems of rows begin, begin + 1, ... of the given kinds."""
    mine = [problems[int(k)] for k in kinds]
    which = torch.repeat_interleave(torch.arange(len(mine)), torch.tensor([len(p) for p in mine]))
    base, tap, theta = (torch.cat([getattr(p, f) for p in mine]) for f in ("base", "tap", "theta"))
    if len(theta) == 0:
        none = torch.zeros(len(mine), dtype=torch.int64)
        return _Tried(none == 0, none.double(), none[:0], none)
    rows = (begin + which)[:, None].expand(-1, bases.columns.shape[1])
    offsets = bases.columns[base] * layer.taps + tap[:, None]  # (P, m)
    weight = source.weights(layer, seed, rows.to(device), offsets.to(device))
    values = weight.double() * bases.multipliers[base].to(device)
    found = subset_sum.solve(values, theta.to(device), epsilon, selection=selection)
    error, chosen = torch.as_tensor(found.error).cpu(), torch.as_tensor(found.members(offsets.shape[1])).cpu()
    failures = torch.bincount(which[error > epsilon], minlength=len(mine))
    good = failures == 0
    sums = torch.zeros(len(mine), dtype=torch.float64)
    sums.index_add_(0, which, torch.where(chosen, values.cpu(), 0.0).sum(1))
    chosen &= good[which][:, None]
    flat = (rows * layer.row_size + offsets)[chosen]
    if bases.paired:
        flat = torch.cat([flat, flat + layer.taps])
    return _Tried(good, sums, flat, failures)
