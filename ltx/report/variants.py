"""What a result is called in tables and figures: its construction, and of feedback how subsets were chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast

import pandas as pd

from ltx.feedback import IMAGES, Feedback

LEAST_SEEDS = 3  # variants of feedback that fewer seeds were made of are in the CSV and the figure, not in the tables
_NAMES = {
    "reject": "reject =",
    "spread": "spread =",
    "samples": "N =",
    "images": "images =",
    "max_subset": "subsets ≤",
    "sweeps": "sweeps =",
    "refine": "passes =",
    "order": "order",
}
_USUAL = {f.name: f.default for f in fields(Feedback)} | {"images": IMAGES}


def variant(result: Mapping[Any, Any], base_set_size: int) -> str:
    """How a ticket was made, e.g. `L+1, feedback, λ = 0.001`; with its base set size where that is not the usual."""
    name = str(result["construction"])
    if result["selection"] != "feedback":
        return name
    parts = [name, "feedback"]
    if result["base_set_size"] != base_set_size:
        parts.append(f"m = {result['base_set_size']}")
    if result["feedback_penalty"] != _USUAL["penalty"]:
        parts.append(f"λ = {result['feedback_penalty']:g}")
    bound = result["feedback_bound"]
    if bound is not None and not math.isnan(bound):
        parts.append(f"bound {bound:g}")
    if result["scaling"] != "unit":
        parts.append(str(result["scaling"]))
    for key, text in _NAMES.items():
        if (value := result[f"feedback_{key}"]) != _USUAL[key]:
            parts.append(f"{text} {value:g}" if isinstance(value, int | float) else f"{text} {value}")
    return ", ".join(parts)


def usual_size(results: pd.DataFrame) -> int:
    """The base set size that goes without saying: that of most results, feedback left out where there are others."""
    rest = results[results.selection != "feedback"]
    return int((rest if len(rest) else results).base_set_size.mode()[0])


def with_variants(results: pd.DataFrame, *, everything: bool = False) -> pd.DataFrame:
    """Results with a column `variant`, in the order in which tables show them.

    Args:
        everything: also variants of feedback with fewer than LEAST_SEEDS seeds, where others have as many.
    """
    usual = usual_size(results)
    names = [variant(row, usual) for row in results.to_dict("records")]
    found = results.assign(variant=names)
    order = ["sampled", "L+1", "2L"]
    found = found.assign(_place=[order.index(c) for c in found.construction])
    keys = [k for k in ("feedback_bound", "base_set_size", "feedback_penalty", "seed") if k in found]
    found = found.sort_values(["_place", "selection", *keys], ascending=[True, False, *[True] * len(keys)],
                              kind="stable", na_position="first")  # fmt: skip
    if not everything:
        seeds = found.groupby(["activation", "variant"]).seed.transform("nunique")
        few = (found.selection == "feedback") & (seeds < LEAST_SEEDS)
        found = found[~few | few.groupby(found.activation).transform("all")]
    return cast(pd.DataFrame, found.drop(columns="_place"))


def on_same_images(named: pd.DataFrame, of: str = "variant") -> pd.DataFrame:
    """Results on as many images as most of those of their activation and their `of`; of equals the larger number."""
    usual = named.groupby(["activation", of]).examples.transform(lambda many: many.mode().max())
    return cast(pd.DataFrame, named[named.examples == usual])
