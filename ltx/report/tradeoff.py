"""The figure of the trade-off: how much accuracy a ticket of so many parameters keeps."""

from __future__ import annotations

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from ltx.report.figures import STYLE, legend_below, panels
from ltx.report.tables import ACTIVATIONS, interval
from ltx.report.variants import on_same_images, with_variants

WITHIN = 0.5  # points: where tickets count as their target
COLOURS = ("#e08214", "#8073ac", "#1a9850", "#35978f", "#c51b7d", "#8c510a", "#4d4d4d", "#762a83")
PLAIN = {"sampled": ("#777777", "s"), "L+1": ("#b2182b", "D"), "2L": ("#2166ac", "D")}


def figure(results: pd.DataFrame) -> Figure:
    """Ticket minus target in points against parameters kept for each of the target's, a panel each activation.

    A line joins tickets that differ in lambda alone; bars are 95 % intervals over seeds. Of a line those
    tickets are shown that were evaluated on as many images as most of them.

    Args:
        results: one row per ticket, as `result.json` has it.
    """
    named = with_variants(results, everything=True)
    named = named.assign(
        ratio=named.ticket_parameters / named.target_parameters, lost=named.ticket_accuracy - named.target_accuracy
    )
    names = [name for name in ACTIVATIONS if (named.activation == name).any()]
    series = _series(named)
    line = {variant: label for label, (_, _, variants) in series.items() for variant in variants}
    named = on_same_images(named.assign(line=named.variant.map(line)), of="line")
    with matplotlib.rc_context(STYLE):
        result, drawn = panels(len(names), "parameters for each of the target's", "ticket - target, points")
        for axes, name in zip(drawn, names, strict=True):
            axes.axhspan(-WITHIN, WITHIN, color="#f0f0f0", lw=0)
            axes.axhline(0, color="black", lw=0.7, ls=":")
            mine = named.loc[named.activation == name]
            for label, (colour, marker, variants) in series.items():
                points = [mine.loc[mine.variant == variant] for variant in variants]
                points = sorted((p for p in points if len(p)), key=lambda p: p.ratio.mean())
                if points:
                    lost = [interval(p.lost) for p in points]
                    axes.errorbar(
                        [p.ratio.mean() for p in points], [mean for mean, _ in lost], yerr=[half for _, half in lost],
                        color=colour, marker=marker, ms=4, lw=1.1, capsize=2, label=label,
                    )  # fmt: skip
            axes.set_xscale("log")
            axes.set_yscale("symlog", linthresh=5)
            axes.set_ylim(-95, 1.5)
            for which in (axes.xaxis, axes.yaxis):
                which.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                which.set_minor_formatter(NullFormatter())
            axes.set_xticks([2, 5, 10, 20, 50])
            axes.set_yticks([-80, -40, -20, -10, -5, -4, -3, -2, -1, 0, 1])
            axes.grid(alpha=0.25, lw=0.5)
            axes.set_title(ACTIVATIONS[name], loc="left")
        legend_below(result, drawn)
        result.suptitle("Accuracy against size of tickets (ResNet-22); grey: within half a point", fontsize=9)
    return result


def _series(named: pd.DataFrame) -> dict[str, tuple[str, str, list[str]]]:
    """Name of a line -> its colour, marker and variants: those that differ in lambda alone."""
    found: dict[str, tuple[str, str, list[str]]] = {}
    colours = iter(COLOURS * 10)
    for row in named.drop_duplicates("variant").to_dict("records"):
        if row["selection"] != "feedback":
            label = "sampled" if row["construction"] == "sampled" else f"{row['construction']}, {row['selection']}"
            colour, marker = PLAIN[str(row["construction"])]
        else:
            label = ", ".join(part for part in row["variant"].split(", ") if not part.startswith("λ"))
            colour, marker = (found[label][0] if label in found else next(colours)), "o"
        found.setdefault(label, (colour, marker, []))[2].append(row["variant"])
    return found
