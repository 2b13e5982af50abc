"""Rows of a source layer: the subset-sum problems that a row has to solve, and trying rows (Appendix F).

When any problem of a row fails, the whole row is given up; no number is looked at twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ltx import source, subset_sum
from ltx.source import SourceLayer

CHUNK = 1 << 22  # base values held at a time
FEW = 1 << 14  # problems up to which a GPU is not worth its launches: the CPU solves them, to the same subsets


@dataclass(frozen=True)
class BaseSets:
    """What the entries of a row are worth: entry (n, k) contributes w[row, n, k] * multiplier of column n.

    columns: (B, m) int64 source channels; multipliers: (B, m) float64; paired: each column n stands for the
    opposite columns n and n + 1, which are kept together (looks_linear).

    channels (B,) int64 and slopes (B, 2) float32 say what a base set stands for, the same in all its columns: an input
    x of the target counts slopes[0] x above 0 and slopes[1] x below; a channel of CONSTANT counts 1.
    """

    columns: Tensor
    multipliers: Tensor
    channels: Tensor
    slopes: Tensor
    paired: bool = False


@dataclass(frozen=True)
class Problems:
    """The subset-sum problems of one kind of row: base set, tap and target of each."""

    base: Tensor  # (P,) int64, index into BaseSets
    tap: Tensor  # (P,) int64
    theta: Tensor  # (P,) float64

    def __len__(self) -> int:
        return len(self.theta)


class RowSolver:
    """Tries rows of one source layer.

    errors (0,): what the rows' functions are off, which nobody looks at here.

    Args:
        layer: the source layer; its shape is not used.
        problems: the problems of each kind of row.
        bases: the base sets that they refer to.
    """

    def __init__(
        self, layer: SourceLayer, problems: Sequence[Problems], bases: BaseSets, *, seed: int, epsilon: float,
        selection: str, device: str,
    ):  # fmt: skip
        self.layer, self.bases, self.errors = layer, bases, torch.empty(0)
        self.seed, self.epsilon, self.selection, self.device = seed, epsilon, selection, device
        self.sizes = torch.tensor([len(p) for p in problems], dtype=torch.int64)
        base, tap, theta = (torch.cat([getattr(p, part) for p in problems]) for part in ("base", "tap", "theta"))
        begin = self.sizes.cumsum(0) - self.sizes
        self._tensors: dict[str, tuple[Tensor, ...]] = {
            "cpu": (self.sizes, begin, base, tap, theta, bases.columns * layer.taps, bases.multipliers)
        }

    def attempt(self, rows: Tensor, kinds: Tensor) -> Attempt:
        """Solve all problems of `rows` (n,), each of its kind (n,)."""
        return in_parts(self._attempt, rows, kinds, self.sizes, CHUNK // max(1, self.bases.columns.shape[-1]))

    def _attempt(self, rows: Tensor, kinds: Tensor) -> Attempt:
        many = int(self.sizes[kinds].sum())
        sums = torch.zeros(len(rows), dtype=torch.float64)
        if not many:
            nothing = torch.empty(0, dtype=torch.int64)
            return Attempt(torch.ones(len(rows), dtype=torch.bool), sums, self.sizes[kinds], nothing, nothing)
        device = self.device if many > FEW else "cpu"
        sizes, begin, base, tap, theta, starts, multipliers = self._on(device)
        rows, kinds = rows.to(device), kinds.to(device)
        counts = sizes[kinds]
        which = torch.repeat_interleave(torch.arange(len(rows), device=device), counts, output_size=many)
        index = torch.arange(many, device=device) - (counts.cumsum(0) - counts - begin[kinds])[which]
        base = base[index]
        offsets = starts[base].add_(tap[index][:, None])  # (P, m)
        row = rows[which]
        values = multipliers[base].mul_(source.weights(self.layer, self.seed, row[:, None].expand_as(offsets), offsets))
        found = subset_sum.solve(values, theta[index], self.epsilon, selection=self.selection)
        error, chosen = torch.as_tensor(found.error), torch.as_tensor(found.members(offsets.shape[1]))
        failures = torch.bincount(which[error > self.epsilon], minlength=len(rows))
        good = failures == 0
        constant = (kinds == len(sizes) - 1)[which].nonzero().flatten()
        if len(constant):
            mine = torch.where(chosen[constant], values[constant], 0.0).cpu()  # added up there: the same for any device
            sums.index_add_(0, which[constant].cpu(), mine.sum(1))
        chosen &= good[which][:, None]
        kept = chosen.flatten().nonzero().flatten()
        kept_rows, kept_offsets = row[kept // offsets.shape[1]].cpu(), offsets.flatten()[kept].cpu()
        if self.bases.paired:
            kept_rows, kept_offsets = kept_rows.repeat(2), torch.cat([kept_offsets, kept_offsets + self.layer.taps])
        return Attempt(good.cpu(), sums, failures.cpu(), kept_rows, kept_offsets)

    def _on(self, device: str) -> tuple[Tensor, ...]:
        """The problems and base sets of all kinds on a device."""
        if device not in self._tensors:
            self._tensors[device] = tuple(tensor.to(device) for tensor in self._tensors["cpu"])
        return self._tensors[device]

    def release(self) -> None:
        """No row will be tried any more."""


def in_parts(
    attempt: Callable[[Tensor, Tensor], Attempt], rows: Tensor, kinds: Tensor, sizes: Tensor, limit: int
) -> Attempt:
    """Try rows one part after the other, each of at most `limit` problems, or of one row.

    Args:
        sizes: problems of a row of each kind.
    """
    parts = (sizes[kinds].cumsum(0) - 1).clamp_min(0) // max(1, limit)
    cuts = torch.unique_consecutive(parts, return_counts=True)[1].tolist()
    tried = [attempt(*pair) for pair in zip(rows.split(cuts), kinds.split(cuts), strict=True)]
    return Attempt(*(torch.cat(part) for part in zip(*(t.__dict__.values() for t in tried), strict=True)))


@dataclass(frozen=True)
class Attempt:
    """What trying n rows gave."""

    good: Tensor  # (n,) bool: every problem was solved
    sums: Tensor  # (n,) float64: of a constant row the sum of its subset sums, of others 0
    failures: Tensor  # (n,) int64: problems without a subset within epsilon
    rows: Tensor  # (entries,) int64: the row of each kept entry, of good rows only
    offsets: Tensor  # (entries,) int64: its position i * K + k
