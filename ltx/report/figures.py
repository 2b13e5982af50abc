"""The paper's Figures 3 and 4, and a third one: how failures fall with the base set size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ltx.files import replacing
from ltx.subset_sum.statistics import Sample, constant, summarise, wilson_interval

BLUE, GREEN, RED, GREY = "#1b6ca8", "#2e8b57", "#c8384f", "#8a929c"
PAPER_CONSTANT = 3  # "C is about 3", section 2
STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "legend.frameon": False, "svg.hashsalt": "ltx", "savefig.dpi": 200,
}  # fmt: skip
LAW_NAMES = {"uniform": "$X_k \\sim U[-1, 1]$", "product": "$X_k \\sim U[-1, 1]\\,U[-1, 1]$",
             "normal": "$X_k \\sim N(0, 1)$", "normal_product": "$X_k \\sim N(0, 1)\\,N(0, 1)$"}  # fmt: skip
SUFFIXES = (".svg", ".png")


def save(figure: Figure, path: Path) -> list[Path]:
    """Write `path` with each of SUFFIXES behind its name; the same figure gives the same SVG bytes.

    What is drawn is laid out for the first of them and stays where it is: laying out takes as long as drawing.
    """
    written = []
    for suffix, metadata in zip(SUFFIXES, ({"Date": None}, None), strict=True):
        whole = path.with_name(path.name + suffix)
        with matplotlib.rc_context(STYLE), replacing(whole) as part:
            figure.savefig(part, format=suffix[1:], metadata=metadata)
            figure.set_layout_engine(None)
        written.append(whole)
    return written


def panels(count: int, across: str, up: str) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels that share their axes, in one or two columns; room for a legend below them.

    Args:
        across: label of the horizontal axis, below the last panel of a column.
        up: of the vertical one, left of the first panel of a row.
    """
    columns = min(2, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(5.2 * columns, 3.2 * rows + 1.0), layout="constrained")
    drawn = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten().tolist()
    for axes in drawn[count:]:
        axes.remove()
    for axes in drawn[count - columns : count]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel(across)
    for axes in drawn[:count:columns]:
        axes.set_ylabel(up)
    return figure, drawn[:count]


def legend_below(figure: Figure, drawn: Sequence[Axes]) -> None:
    """One legend of all panels, a line each name."""
    named = [axes.get_legend_handles_labels() for axes in drawn]
    lines = {name: line for handles, names in named for line, name in zip(handles, names, strict=True)}
    columns = min(3, len(drawn) + 1)
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=columns, fontsize=7)


def statistics_figure(best: Sample, smallest: Sample) -> Figure:
    """Errors and sizes of the best and of the smallest subsets: Figure 3 (uniform) or Figure 4 (product)."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 5.6), layout="constrained")
        axes = figure.subplots(2, 2, width_ratios=[1.25, 1])
        for row, (drawn, name) in enumerate(((best, "best subset"), (smallest, "smallest subset"))):
            _error_panel(axes[row, 0], drawn, f"({'ac'[row]}) {name}: error")
            _size_panel(axes[row, 1], drawn, f"({'bd'[row]}) {name}: size")
        axes[1, 0].set_xlabel("error  $|\\theta - \\sum_{k \\in S} X_k|$")
        axes[1, 1].set_xlabel("subset size  $|S|$")
        figure.suptitle(
            f"{len(best.error):,} subset-sum problems, {LAW_NAMES[best.law]}, m = {best.base_set_size}, "
            f"target $\\theta \\sim U[-1, 1]$, ε = {best.epsilon:g}, seed {best.seed}",
            fontsize=10,
        )
    return figure


def _error_panel(axes: Axes, drawn: Sample, title: str) -> None:
    statistics = summarise(drawn)
    errors, epsilon = drawn.error, drawn.epsilon
    end = float(errors.max()) or epsilon
    width = end / 60
    if width / 3 < epsilon <= end:
        width = epsilon / max(1, round(epsilon / width))  # epsilon is the edge of a bin
    bins = [k * width for k in range(math.ceil(end / width) + 1)]
    bins[-1] = max(bins[-1], end)  # which rounding can leave out
    axes.hist(errors, bins, weights=np.full(len(errors), 1 / len(errors)), color=BLUE)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    axes.yaxis.set_major_locator(LogLocator(numticks=8))
    axes.set_ylim(0.7 / len(errors), 1)
    axes.set_xlim(0, bins[-1])
    if epsilon < end:
        axes.axvline(epsilon, color=RED, lw=0.8)
    axes.set_ylabel("share of the problems")
    axes.set_title(title, loc="left")
    half = (statistics.mean_error_interval[1] - statistics.mean_error_interval[0]) / 2
    axes.set_title(
        f"mean {_scientific(statistics.mean_error, half)};  {_percent(statistics.failure_share)} beyond ε",
        loc="right", fontsize=8,
    )  # fmt: skip
    close = min(epsilon, float(np.quantile(errors, 0.9))) or epsilon
    if close > 0.15 * end or np.mean(errors <= close) < 0.5:
        return  # nothing that the panel itself does not show
    inset = axes.inset_axes((0.45, 0.53, 0.54, 0.36))
    inset.hist(errors, np.linspace(0, close, 31).tolist(), weights=np.full(len(errors), 1 / len(errors)), color=GREEN)
    inset.set_title(f"the smallest {100 * (errors <= close).mean():.3g} % of the errors", fontsize=8, color=GREEN)
    inset.set_xlim(0, close)
    inset.ticklabel_format(axis="x", style="sci", scilimits=(-2, 2))
    inset.xaxis.set_major_locator(MaxNLocator(4))
    inset.xaxis.get_offset_text().set_fontsize(7)
    inset.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    inset.yaxis.set_major_locator(MaxNLocator(3))
    inset.tick_params(labelsize=7)


def _size_panel(axes: Axes, drawn: Sample, title: str) -> None:
    statistics, n = summarise(drawn), len(drawn.error)
    solved = np.array(statistics.size_counts) / n
    failed = np.array(statistics.failed_size_counts) / n
    sizes = np.arange(drawn.base_set_size + 1)
    axes.bar(sizes, solved, color=BLUE, width=0.8, label="within ε")
    axes.bar(sizes, failed, bottom=solved, color=GREY, width=0.8, label="none within ε: closest")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_xlim(-0.7, drawn.base_set_size + 0.7)
    axes.set_ylim(0, 1.18 * float((solved + failed).max()))
    axes.set_title(title, loc="left")
    if statistics.mean_size is not None:
        axes.set_title(f"mean {statistics.mean_size:.2f} within ε", loc="right", fontsize=8)
    axes.legend(loc="upper right", fontsize=7.5)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.4g} %"


def _scientific(value: float, half: float) -> str:
    """`(5.96 ± 0.24)·10^-4`"""
    exponent = int(np.floor(np.log10(value))) if value > 0 else 0
    scale = 10.0**exponent
    return f"$({value / scale:.2f} \\pm {half / scale:.2f})\\cdot 10^{{{exponent}}}$"


@dataclass(frozen=True)
class FailureCurve:
    """Shares of random problems of one law without a subset within epsilon, by base set size."""

    law: str
    epsilon: float
    problems: int
    base_set_sizes: tuple[int, ...]
    failures: tuple[int, ...]

    @property
    def shares(self) -> np.ndarray:
        return np.array(self.failures) / self.problems

    @property
    def crossing(self) -> float | None:
        """The m, taken as a real number, at which a share epsilon fails; None where the curve does not show it."""
        points = list(zip(self.base_set_sizes, self.shares, strict=True))
        for (m0, f0), (m1, f1) in pairwise(points):
            if f0 > self.epsilon >= f1 > 0:  # a line between the logarithms
                return m0 + (m1 - m0) * math.log(f0 / self.epsilon) / math.log(f0 / f1)
        return None

    @property
    def fitted_constant(self) -> float:
        """The least C with which Corollary 2.2 holds on this curve, m taken as a real number; nan where nothing fails.

        The corollary says that m >= C log(1 / min(delta, epsilon)) makes at most a share delta fail. An m at which
        a share f fails contradicts every C below m / log(1 / min(f, epsilon)), and the largest of these lies where
        the curve crosses epsilon. Without a crossing in sight it is a lower bound. Targets are random here, as in
        the paper's experiments; the corollary itself is about any single one.
        """
        at = [constant(m, self.epsilon, f) for m, f in zip(self.base_set_sizes, self.shares, strict=True) if f > 0]
        if self.crossing is not None:
            at.append(constant(self.crossing, self.epsilon, self.epsilon))
        return max(at, default=math.nan)

    @property
    def decay(self) -> float:
        """How fast failures fall in the end: the C of exp(-m / C), fitted to the shares below 1 % with 10 failures.

        nan where they do not fall, or fewer than two m have such shares.
        """
        use = [n for n, k in enumerate(self.failures) if k >= 10 and self.shares[n] < 0.01]
        if len(use) < 2 or self.failures[use[0]] <= self.failures[use[-1]]:
            return float("nan")
        m, weight = np.array(self.base_set_sizes)[use], np.sqrt(np.array(self.failures)[use])
        slope = float(np.polyfit(m, np.log(self.shares[use]), 1, w=weight)[0])
        return -1 / slope if slope < 0 else float("nan")


def failure_figure(curves: Sequence[FailureCurve]) -> Figure:
    """Failure share against m, a panel for each law, beside exp(-m / C) for the paper's C and the fitted one."""
    laws = list(dict.fromkeys(c.law for c in curves))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.9 * len(laws), 4.6), layout="constrained")
        panels = figure.subplots(1, len(laws), sharey=True, squeeze=False)[0]
        shades = matplotlib.colormaps["viridis"](np.linspace(0.85, 0.1, len({c.epsilon for c in curves})))
        for axes, law in zip(panels, laws, strict=True):
            mine = [c for c in curves if c.law == law]
            for curve, shade in zip(mine, shades, strict=True):
                _failure_curve(axes, curve, shade)
            sizes = np.array(mine[0].base_set_sizes, float)
            axes.plot(sizes, np.exp(-sizes / PAPER_CONSTANT), color=RED, lw=1.2, ls="--",
                      label=f"$e^{{-m/C}}$, the paper's C ≈ {PAPER_CONSTANT}")  # fmt: skip
            fitted = max((c.fitted_constant for c in mine if c.crossing is not None), default=None)
            if fitted is not None:
                axes.plot(sizes, np.exp(-sizes / fitted), color="black", lw=1.2, ls=":",
                          label=f"$e^{{-m/C}}$, fitted C = {fitted:.2f}")  # fmt: skip
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(numticks=12))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_ylim(top=1.5)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlabel("base set size m")
            axes.set_title(LAW_NAMES[law], loc="left")
            axes.grid(alpha=0.25, lw=0.5)
            axes.legend(loc="lower left", fontsize=7.5)
        panels[0].set_ylabel("share of the problems without a subset within ε")
        figure.suptitle(
            f"Failures fall exponentially with m ({curves[0].problems:,} problems at each m; bars: 95 % intervals; "
            "circles: where a curve crosses its ε)",
            fontsize=9,
        )
    return figure


def _failure_curve(axes: Axes, curve: FailureCurve, shade) -> None:
    m, shares = np.array(curve.base_set_sizes), curve.shares
    seen = shares > 0
    intervals = np.array([wilson_interval(k, curve.problems) for k in curve.failures])
    bars = np.abs(intervals[seen].T - shares[seen])
    label = f"ε = {curve.epsilon:g}: C {'≥' if curve.crossing is None else '='} {curve.fitted_constant:.2f}"
    if not seen.any():
        label = f"ε = {curve.epsilon:g}: nothing fails"
    axes.errorbar(m[seen], shares[seen], bars, color=shade, lw=1.3, marker="o", ms=2.5, elinewidth=0.8, label=label)
    if curve.crossing is not None:
        axes.plot(curve.crossing, curve.epsilon, "o", ms=7, mfc="none", mec=shade, mew=1.2)
