"""Subset-sum problems: choose S from x_1..x_m with |sum_S x - theta| <= epsilon (Corollary 2.2).

from ltx import subset_sum
found = subset_sum.solve(values, targets, 0.01)                 # values (n, m), targets (n,)
found.mask, found.size, found.error, found.members(m)

statistics = subset_sum.summarise(subset_sum.sample("uniform", 15, 0.01, problems=100_000))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ltx.subset_sum.limits import MAX_BASE_SET_SIZE

if TYPE_CHECKING:
    from ltx.subset_sum.solver import SubsetSums, solve
    from ltx.subset_sum.statistics import Sample, Statistics, sample, summarise

__all__ = ["MAX_BASE_SET_SIZE", "Sample", "Statistics", "SubsetSums", "sample", "solve", "summarise"]

_WHERE = {"solve": "solver", "SubsetSums": "solver", "sample": "statistics", "summarise": "statistics",
          "Sample": "statistics", "Statistics": "statistics"}  # fmt: skip


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str):
    """Import the solvers on first use: settings are checked against the limits without them."""
    if name not in _WHERE:
        raise AttributeError(f"module 'ltx.subset_sum' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(f"ltx.subset_sum.{_WHERE[name]}"), name)
