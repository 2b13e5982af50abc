"""The sums of what rows keep, one for each parameter of the target above epsilon that a row stands for.

In proportion to what is kept and wanted: in a wide ticket a matrix of all rows and parameters is nearly empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Entries:
    """What the rows of a layer keep, (n,) each."""

    sum: Tensor  # int64, to which of the S sums over all of a row's parameters it belongs
    parameter: Tensor  # int64, of the target's row
    term: Tensor  # float64, what it adds
    negative: Tensor  # bool, whether it is of the base set of negative copies


@dataclass(frozen=True)
class Sums:
    """Subset sums beside the parameters that they approximate, (P,) each, those of a row one behind the other."""

    of: Tensor  # int64, the row's sum
    parameter: Tensor  # int64
    found: Tensor  # float64
    wanted: Tensor  # float64
    terms: Tensor  # (P, 2) int64: how many, of the base sets of positive and of negative copies
    stray: Tensor  # (n, 2) int64, ascending: sums and parameters in which something is kept and nothing is wanted

    @classmethod
    def form(cls, entries: Entries, target: Tensor, labels: Tensor, epsilon: float) -> Sums:
        """Add up entries.

        Args:
            target: (C, K) float64, the parameters of the target's rows.
            labels: (S,) the target's row that each sum stands for; negative: none, and what it keeps is not looked at.
        """
        big = target.abs() > epsilon
        many = big.sum(1)
        count = torch.where(labels >= 0, many[labels.clamp_min(0)], 0)
        begin = count.cumsum(0) - count
        of = torch.repeat_interleave(count)
        index = (many.cumsum(0) - many)[labels[of]] + torch.arange(len(of)) - begin[of]  # among all that are big

        label = labels[entries.sum]
        place = torch.where(big, big.cumsum(1) - 1, -1)[label.clamp_min(0), entries.parameter]
        there = (label >= 0) & (place >= 0)
        stray = torch.stack([entries.sum, entries.parameter], 1)[(label >= 0) & (place < 0)].unique(dim=0)
        place = (begin[entries.sum] + place)[there]
        found = torch.zeros(len(of), dtype=torch.float64).index_add_(0, place, entries.term[there])
        terms = torch.bincount(2 * place + entries.negative[there], minlength=2 * len(of)).view(-1, 2)
        return cls(of, big.nonzero()[:, 1][index], found, target[big][index], terms, stray)
