"""The figure of section 6: how the deviation of a ticket's slots grows from layer to layer."""

from __future__ import annotations

import itertools
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ltx.report.figures import STYLE, legend_below, panels
from ltx.report.tables import ACTIVATIONS

LINES = {  # construction, selection -> colour and style; those of feedback without a penalty or a bound
    ("sampled", "smallest"): ("#777777", "-"), ("L+1", "smallest"): ("#b2182b", "-"), ("L+1", "best"): ("#b2182b", ":"),
    ("L+1", "feedback"): ("#e08214", "-"), ("2L", "smallest"): ("#2166ac", "-"), ("2L", "best"): ("#2166ac", ":"),
    ("2L", "feedback"): ("#1a9850", "-"),
}  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")  # of m and epsilon, in turns


def figure(table: pd.DataFrame) -> Figure:
    """Root mean square deviation over the target's standard deviation behind every activation, a panel each activation.

    Args:
        table: one row per layer and ticket: `activation`, `construction`, `selection`, `base_set_size`, `epsilon`,
            `seed`, `position`, `deviation`, `target_std`.
    """
    names = [name for name in ACTIVATIONS if (table.activation == name).any()]
    table = table.assign(relative=table.deviation / table.target_std)
    with matplotlib.rc_context(STYLE):
        result, drawn = panels(
            len(names), "activation, from the first to the last", "rms deviation of a slot / std of the target"
        )
        settings = sorted(
            {(m, e) for m, e in zip(table.base_set_size, table.epsilon, strict=True)}, key=lambda s: -s[1]
        )
        for axes, name in zip(drawn, names, strict=True):
            mine = table[table.activation == name]
            for (construction, selection), (colour, style) in LINES.items():
                for (m, epsilon), marker in zip(settings, itertools.cycle(MARKERS), strict=False):
                    line: Any = mine[
                        (mine.construction == construction) & (mine.selection == selection)
                        & (mine.base_set_size == m) & (mine.epsilon == epsilon)
                    ]  # fmt: skip
                    if line.empty:
                        continue
                    mean = np.exp(np.log(line.set_index("position")["relative"]).groupby("position").mean())
                    label = "sampled" if construction == "sampled" else f"explicit {construction}, {selection}"
                    axes.plot(mean.index, mean.to_numpy(), color=colour, ls=style, marker=marker, ms=3, lw=1.1,
                              label=f"{label}, m = {m}, ε = {epsilon:g}")  # fmt: skip
            axes.axhline(1, color="black", lw=0.7, ls=":")
            axes.set_yscale("log")
            axes.set_title(ACTIVATIONS[name], loc="left")
            axes.grid(alpha=0.25, lw=0.5)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend_below(result, drawn)
        result.suptitle(
            "How the deviation of a ticket's slots grows\nthrough ResNet-22 (geometric mean over seeds)", fontsize=9
        )
    return result
