"""Device search: all subsets of one size at a time as batched tensor operations, on any torch device."""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 25  # sums held at a time


@lru_cache(maxsize=64)
def _subsets(m: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    """All subsets of `size` of m indices in lexicographic order, (count, size), and their bit masks (count,)."""
    index = np.array(list(combinations(range(m), size)), dtype=np.int64)
    mask = (1 << index).sum(1)
    return torch.from_numpy(index).to(device), torch.from_numpy(mask).to(device)


def search(values: Tensor, targets: Tensor, stop: float) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors (mask, size, error) of n problems: the subsets that `compiled.search` chooses.

    Args:
        values: (n, m) float64.
        targets: (n,) float64.
        stop: sizes beyond the first one that reaches this error are not looked at.
    """
    n, m = values.shape
    mask = torch.zeros(n, dtype=torch.int64, device=values.device)
    size, error = mask.clone(), targets.abs()
    open_ = (error > stop).nonzero().flatten()
    for k in range(1, m + 1):
        if len(open_) == 0:
            break
        index, masks = _subsets(m, k, str(values.device))
        for part in open_.split(max(1, CHUNK // len(masks))):
            _search_size(values[part], targets[part], index, masks, k, part, mask, size, error)
        open_ = open_[error[open_] > stop]
    return mask, size, error


def _search_size(values, targets, index, masks, k, part, mask, size, error) -> None:
    """Enter the best subset of size k for the problems `part` where it beats what they have."""
    columns = max(1, CHUNK // len(part))
    for begin in range(0, len(masks), columns):
        chosen = index[begin : begin + columns]
        sums = values[:, chosen[:, 0]]
        for d in range(1, k):  # the order of the additions is part of the result
            sums = sums + values[:, chosen[:, d]]
        errors = (sums - targets[:, None]).abs_()
        least, first = errors.min(1).values, errors.argmin(1)  # argmin: the first of several
        better = least < error[part]
        where = part[better]
        mask[where], size[where], error[where] = masks[begin + first[better]], k, least[better]
