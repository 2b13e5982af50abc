"""The paper's Tables 1 to 4, and which results they may stand beside."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

# section 4 of the paper, as results have it; those that do not say are of an earlier ltx, which had nothing else
_SUBSETS = {"base_set_size": 15, "selection": "smallest", "scaling": "unit"}
_SOURCE = {"epsilon": 0.01, "law": "uniform", "pair_kernel": 1, "pair_stride": "second"}


def values(table: int) -> pd.DataFrame:
    """The paper's table as rows (row, column, mean, ci95)."""
    found = pd.read_csv(Path(__file__).with_name("paper_tables.csv"))
    return found.loc[found.table == table]


def in_its_setting(results: pd.DataFrame) -> bool:
    """Whether these results are of the paper's subset sums: the smallest ones of 15 uniform numbers within 0.01.

    Those with feedback, which the paper has not, may be among them with any m.
    """
    plain = results.loc[results.selection != "feedback"]
    return not any(
        key in rows and (rows[key].dropna() != value).any()
        for rows, setting in ((plain, _SUBSETS), (results, _SOURCE))
        for key, value in setting.items()
    )
