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
        ConstructionError: a slot has used up MAX_ROWS_PER_SLOT rows, naming layer and row and what failed.
    """
    total = len(slots)
    kind = torch.as_tensor(slots, dtype=torch.int64)
    row = torch.full((total,), -1, dtype=torch.int64)
    sums = torch.zeros(total, dtype=torch.float64)
    masks: list[Tensor] = []
    pending = torch.arange(total)
    begin = solved = failed = 0
    for _ in range(MAX_ROWS_PER_SLOT):
        if len(pending) == 0:
            break
        failing: list[Tensor] = []
        for part in _chunks(pending, [len(problems[int(kind[s])]) for s in pending], bases):
            tried = _try_rows(layer, seed, problems, kind[part], begin, bases, epsilon, selection, device)
            good = tried.good
            row[part[good]] = begin + good.nonzero().flatten()
            sums[part[good]] = tried.sums[good]
            masks.append(tried.mask)
            failing.append(part[~good])
            begin, solved, failed = begin + len(part), solved + tried.problems, failed + tried.failures
            closest = tried.worst
        pending = torch.cat(failing)
    if len(pending):
        which = int(kind[pending[0]])
        raise ConstructionError(
            f"layer {layer.target or layer.name}, {names[which]}: none of {MAX_ROWS_PER_SLOT} source rows solves "
            f"all of its {len(problems[which])} subset-sum problems within {epsilon:g} ({failed / max(solved, 1):.2%} "
            f"of all problems fail, the last row's worst error is {closest:.3g}); raise m or epsilon"
            + ("" if layer.role == "direct" else ", or use construction=L+1")
            + (", or use scaling=layer_max" if _reaches(problems[which], bases, layer) else "")
        )
    return Rows(row, begin, torch.cat(masks).sort().values if masks else torch.empty(0, dtype=torch.int64),
                sums, solved, failed)  # fmt: skip


def _reaches(problems: Problems, bases: BaseSets, layer: SourceLayer) -> bool:
    """Whether some target value is larger than the largest single entry could be."""
    largest = bases.multipliers.abs().amax() * layer.sigma if bases.multipliers.numel() else 0.0
    return bool(len(problems) and problems.theta.abs().max() > largest)


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
    problems: int
    failures: int
    worst: float  # largest error of a problem in the last row


def _try_rows(layer, seed, problems, kinds, begin, bases, epsilon, selection, device) -> _Tried:
    """Solve all problems of rows begin, begin + 1, ... of the given kinds."""
    mine = [problems[int(k)] for k in kinds]
    which = torch.repeat_interleave(torch.arange(len(mine)), torch.tensor([len(p) for p in mine]))
    base, tap, theta = (torch.cat([getattr(p, f) for p in mine]) for f in ("base", "tap", "theta"))
    if len(theta) == 0:
        return _Tried(torch.ones(len(mine), dtype=torch.bool), torch.zeros(len(mine), dtype=torch.float64),
                      torch.empty(0, dtype=torch.int64), 0, 0, 0.0)  # fmt: skip
    rows = (begin + which)[:, None].expand(-1, bases.columns.shape[1])
    offsets = bases.columns[base] * layer.taps + tap[:, None]  # (P, m)
    weight = source.weights(layer, seed, rows.to(device), offsets.to(device))
    values = weight.double() * bases.multipliers[base].to(device)
    found = subset_sum.solve(values, theta.to(device), epsilon, selection=selection)
    error, mask = torch.as_tensor(found.error).cpu(), torch.as_tensor(found.mask).cpu()
    fails = error > epsilon
    good = torch.bincount(which, weights=fails.double(), minlength=len(mine)) == 0
    chosen = (mask[:, None] >> torch.arange(offsets.shape[1])) & 1 == 1  # (P, m)
    sums = torch.zeros(len(mine), dtype=torch.float64)
    sums.index_add_(0, which, torch.where(chosen, values.cpu(), 0.0).sum(1))
    chosen &= good[which][:, None]
    flat = (rows * layer.row_size + offsets)[chosen]
    if bases.paired:
        flat = torch.cat([flat, flat + layer.taps])
    worst = float(error[which == which[-1]].max())
    return _Tried(good, sums, flat, len(theta), int(fails.sum()), worst)
