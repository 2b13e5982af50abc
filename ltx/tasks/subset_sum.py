"""`ltx subset-sum`: statistics of random subset-sum problems as JSON and CSV; does nothing when they are there."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

import pandas as pd

from ltx import paths, subset_sum
from ltx.config import Settings
from ltx.files import read_result, require_writable, write_json, write_text
from ltx.tasks import provenance

log = logging.getLogger(__name__)


def run(settings: Settings) -> Path:
    """Measure what the settings describe; the path of the JSON file.

    Beside it stands the same as a CSV file of one line; the CSV file one folder up has a line for every run there.
    """
    path = paths.statistics_file(settings)
    device = settings.torch_device
    there = _read(path) if path.with_suffix(".csv").is_file() else None
    if not settings.force and there is not None and _same(there, settings):
        log.info("%s: there already; force=true measures again", path)
        statistics = there
    else:
        require_writable(path.parent)
        _, statistics = measure(settings, settings.law.value, settings.selection.value, device)
        write_text(path.with_suffix(".csv"), pd.DataFrame([flat(statistics)]).to_csv(index=False))
        write_json(path, statistics)
    log.info("%s", summary(statistics))
    everything = [s for f in sorted(path.parent.parent.glob("*/statistics.json")) if (s := _read(f)) is not None]
    order = ["law", "selection", "epsilon", "base_set_size", "theta", "problems", "seed"]
    table = pd.DataFrame([flat(s) for s in everything]).sort_values(order).convert_dtypes()
    write_text(path.parent.parent / "statistics.csv", table.to_csv(index=False))
    return path


def measure(settings: Settings, law: str, selection: str, device: str) -> tuple[subset_sum.Sample, dict]:
    """A sample with these settings, and its statistics with what made them."""
    begin = time.perf_counter()
    drawn = subset_sum.sample(
        law, settings.m, settings.epsilon, selection=selection, problems=settings.problems, seed=settings.seed,
        theta=settings.theta, device=device,
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    statistics = asdict(subset_sum.summarise(drawn))
    return drawn, {**statistics, "seconds": seconds, "device": device, **provenance.here()}


def flat(statistics: dict) -> dict:
    """One line of a table: intervals as two columns, quantiles and sizes as one each."""
    line = {}
    for key, value in statistics.items():
        if key.endswith("_interval"):
            line[f"{key}_low"], line[f"{key}_high"] = value or (None, None)
        elif key == "error_quantiles":
            line.update({f"error_quantile_{share}": v for share, v in value.items()})
        elif not key.endswith("size_counts"):
            line[key] = value
    for key, name in (("size_counts", "size"), ("failed_size_counts", "failed_size")):
        line.update({f"{name}_{size}": count for size, count in enumerate(statistics[key])})
    return line


def constant_of(line: Mapping) -> str:
    """What is known of C from a line of `flat`; nothing where it has no bound.

    `= 3.3`, or `about 3.3` of so few problems that more than epsilon may have no subset; a bound `> 3.3` where more
    than epsilon have none, or one `< 3.3` where all have one.
    """
    value, most = line["constant"], line["constant_interval_high"]
    if not pd.isna(value):
        sign = ">" if line["failure_share"] > line["epsilon"] else "about" if pd.isna(most) else "="
        return f"{sign} {value:.2f}"
    return "" if pd.isna(most) else f"< {most:.2f}"


def summary(s: dict) -> str:
    """The statistics in one line."""
    low, high = s["failure_share_interval"]
    size = "-" if s["mean_size"] is None else f"{s['mean_size']:.3f}"  # of the solved ones
    found = constant_of(flat(s)) or ("is none, where all fail" if s["failures"] else "is unknown, of so few problems")
    target = "" if s["theta"] is None else f"theta={s['theta']:g}, "
    return (
        f"{s['law']}, {s['selection']}, m={s['base_set_size']}, epsilon={s['epsilon']:g}, {target}"
        f"{s['problems']} problems: "
        f"{100 * s['failure_share']:.3g} % fail ({100 * low:.3g} to {100 * high:.3g}), mean error "
        f"{s['mean_error']:.3g} ({s['mean_error_interval'][0]:.3g} to {s['mean_error_interval'][1]:.3g}), "
        f"mean size {size} ({s['mean_size_all']:.3f} with failures), C {found}; {s['seconds']:.2f} s"
    )


def _same(statistics: dict, s: Settings) -> bool:
    """Whether they are of these settings."""
    wanted = {
        "law": s.law.value, "base_set_size": s.m, "epsilon": s.epsilon, "selection": s.selection.value, "seed": s.seed,
        "theta": s.theta, "problems": s.problems,
    }  # fmt: skip
    return all(statistics[key] == value for key, value in wanted.items())


def _read(path: Path) -> dict | None:
    """The statistics of a file, None where it is not there or not whole."""
    found = read_result(path, {}) or {}
    wanted = {f.name for f in fields(subset_sum.Statistics)} | {"seconds"}
    return found if wanted <= set(found) else None
