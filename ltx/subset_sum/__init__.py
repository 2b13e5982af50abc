"""Subset-sum problems: choose S from x_1..x_m with |sum_S x - theta| <= epsilon (Corollary 2.2)."""

from __future__ import annotations

from ltx.subset_sum.limits import MAX_BASE_SET_SIZE
from ltx.subset_sum.solver import SubsetSums, solve

__all__ = ["MAX_BASE_SET_SIZE", "SubsetSums", "solve"]
