"""The figure of `ltx certify`: what is proven, and what was measured, from layer to layer."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ltx.report.figures import BLUE, GREY, RED, STYLE


def figure(nodes: Sequence[dict], about: str) -> Figure:
    """Largest deviation of a slot behind every activation, proven and measured, beside the range of the channel.

    Args:
        nodes: `deviation`, `span` and `measured` (None where it was not) of each activation, in their order.
    """
    with matplotlib.rc_context(STYLE):
        result = Figure(figsize=(5.2, 3.4), layout="constrained")
        axes = result.subplots()
        positions = range(1, len(nodes) + 1)
        axes.plot(positions, [n["deviation"] for n in nodes], color=RED, marker="o", ms=3, label="proven")
        axes.plot(positions, [n["measured"] if n["measured"] else float("nan") for n in nodes], color=BLUE, marker="s",
                  ms=3, label="largest on test images")  # fmt: skip
        alone = len(nodes) == 1  # a point is no line, and has no width
        axes.plot(positions, [n["span"] for n in nodes], color=GREY, ls=":", marker="_" if alone else "",
                  label="range of the channel")  # fmt: skip
        if alone:
            axes.set_xlim(0.5, 1.5)
        if any(max(n["deviation"], n["span"]) > 0 for n in nodes):
            axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("activation, from the first to the last")
        axes.set_ylabel("largest deviation of a slot")
        axes.set_title(about, loc="left")
        axes.grid(alpha=0.25, lw=0.5)
        axes.legend(fontsize=8)
    return result
