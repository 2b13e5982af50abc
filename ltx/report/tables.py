"""Tables 1 and 2: the paper's values beside measured ones, as CSV, Markdown and LaTeX."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

ACTIVATIONS = {"relu": "ReLU", "leaky_relu": "Leaky ReLU", "tanh": "tanh", "sigmoid": "sigmoid"}
CONSTRUCTIONS = ("L+1", "2L")
PM = "±"


@dataclass(frozen=True)
class Table:
    """A table in the forms in which it is written."""

    title: str
    note: str
    numbers: pd.DataFrame  # one row per activation and construction, plain numbers
    shown: pd.DataFrame  # the same as text

    @property
    def csv(self) -> str:
        return self.numbers.to_csv(index=False)

    @property
    def markdown(self) -> str:
        return self.shown.to_markdown(index=False, disable_numparse=True, colalign=self._align)

    @property
    def markdown_page(self) -> str:
        return f"**{self.title}**\n\n{self.markdown}\n\n{self.note}\n"

    @property
    def latex(self) -> str:
        shown = self.shown.map(_tex).rename(columns=_tex)
        body = shown.to_latex(index=False, column_format="ll" + "r" * (len(shown.columns) - 2), escape=False)
        caption = _tex(f"{self.title} {self.note}")
        return f"% needs \\usepackage{{booktabs}}\n\\begin{{table}}\n\\caption{{{caption}}}\n{body}\\end{{table}}\n"

    @property
    def _align(self) -> tuple[str, ...]:
        return ("left", "left") + ("right",) * (len(self.shown.columns) - 2)


def _tex(text: str) -> str:
    return text.replace("%", r"\%").replace(PM, r"$\pm$").replace("–", "--")


def interval(values: pd.Series) -> tuple[float, float]:
    """Mean and half width 1.96 s / sqrt(n) of the 95 % interval; NaN for a single value."""
    n = len(values)
    numbers = values.to_numpy(dtype=float)
    return numbers.mean(), 1.96 * numbers.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan


def paper_values(table: int) -> pd.DataFrame:
    """The paper's table as rows (row, column, mean, ci95)."""
    values = pd.read_csv(Path(__file__).with_name("paper_tables.csv"))
    return values.loc[values.table == table]


def accuracy_table(results: pd.DataFrame) -> Table:
    """Table 1: test accuracy of targets and tickets. The paper's column is its L+1 construction."""
    return _table(
        results, paper_values(1), "target_accuracy", "ticket_accuracy", "difference",
        lambda ticket, target: ticket - target, digits=2, sign="+",
        title="Table 1. Test accuracy in % of tickets and their targets.",
    )  # fmt: skip


def parameter_table(results: pd.DataFrame) -> Table:
    """Table 2: prunable parameters of targets (above epsilon) and tickets."""
    return _table(
        results, paper_values(2), "target_parameters", "ticket_parameters", "ratio",
        lambda ticket, target: ticket / target, digits=0, sign="",
        title="Table 2. Number of prunable parameters of tickets and their targets.",
    )  # fmt: skip


def _table(results, paper, target_column, ticket_column, relation, relate, *, digits, sign, title) -> Table:
    numbers, shown = [], []
    first = results.iloc[0]
    on_paper = first.data == "mnist"
    places = f".{digits}f"
    for (activation, label), construction in itertools.product(ACTIVATIONS.items(), CONSTRUCTIONS):
        mine = results[(results.activation == activation) & (results.construction == construction)]
        if mine.empty:
            continue
        theirs = paper[paper.row == activation].set_index("column")
        target, (mean, half) = float(mine[target_column].iloc[0]), interval(mine[ticket_column])
        row = {"activation": label, "construction": construction}
        number: dict[str, str | float] = dict(row)
        text = dict(row)
        if on_paper:
            paper_target = float(theirs.loc["target", "mean"])
            number["paper_target"], text["paper: target"] = paper_target, f"{paper_target:g}"
            number["paper_ticket"] = number["paper_ci95"] = number[f"paper_{relation}"] = math.nan
            text["paper: ticket"] = "–"
            if construction == "L+1":  # the paper reports this one only
                paper_mean, paper_half = (float(theirs.loc["ticket", c]) for c in ("mean", "ci95"))
                number["paper_ticket"], number["paper_ci95"] = paper_mean, paper_half
                number[f"paper_{relation}"] = relate(paper_mean, paper_target)
                text["paper: ticket"] = f"{paper_mean:g} {PM} {paper_half:g}"
        number |= {"target": target, "ticket": mean, "ci95": half, relation: relate(mean, target), "n": len(mine)}
        text["target"] = f"{target:{places}}"
        text["ticket"] = f"{mean:{places}} {PM} {half:{places}}" if len(mine) > 1 else f"{mean:{places}}"
        text[relation] = f"{relate(mean, target):{sign}.2f}"
        text["n"] = str(len(mine))
        numbers.append(number)
        shown.append(text)
    note = (
        f"Mean {PM} 1.96 s / sqrt(n) over n seeds of the source; m = {first.base_set_size}, epsilon = "
        f"{first.epsilon:g}, {first.selection} subsets, head: {first['head']}; {first.data}, {first.examples} test "
        "images. Explicit tickets, each verified against its source and its target."
    )
    return Table(title, note, pd.DataFrame(numbers), pd.DataFrame(shown))
