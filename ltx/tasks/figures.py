"""`ltx figures`: Figures 3 and 4, and failures against m, as SVG and PNG, with their statistics as CSV.

With `law=normal` the same of a normal source, which the paper does not have: `figure3-normal.svg`, ...
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from ltx import subset_sum
from ltx.checks import one_of
from ltx.config import Settings
from ltx.files import require_writable, write_text
from ltx.report import figures
from ltx.report.figures import FailureCurve
from ltx.subset_sum.statistics import PRODUCTS, Sample, wilson_interval
from ltx.tasks import provenance
from ltx.tasks.subset_sum import flat, measure, summary

log = logging.getLogger(__name__)

EPSILONS = (0.1, 0.03, 0.01, 0.003, 0.001)
FAILURE_SIZES = range(6, 25)


def run(settings: Settings) -> Path:
    """Draw all figures; the folder that holds them."""
    s = settings
    folder = Path(s.output_dir) / "figures" / f"m{s.m}-eps{s.epsilon!r}-n{s.problems}-seed{s.seed}"
    device = settings.torch_device
    one_of("law", s.law.value, PRODUCTS)
    laws = (s.law.value, PRODUCTS[s.law.value])
    names = [name + ("" if laws[0] == "uniform" else f"-{laws[0]}") for name in ("figure3", "figure4", "failures")]
    written = [folder / f"{name}.{kind}" for name in names for kind in ("svg", "png", "csv")]
    if not s.force and all(_whole(path) for path in written):
        log.info("%s: there already; force=true draws them again", folder)
        return folder
    require_writable(folder)
    for name, law in zip(names, laws, strict=False):
        samples: dict[str, Sample] = {}
        lines = []
        for selection in ("best", "smallest"):
            samples[selection], statistics = measure(settings, law, selection, device)
            lines.append(statistics)
            log.info("%s: %s", name, summary(lines[-1]))
        figures.save(figures.statistics_figure(samples["best"], samples["smallest"]), folder / name)
        table = pd.DataFrame([flat(line) for line in lines])
        write_text(folder / f"{name}.csv", table.to_csv(index=False))
    curves = [curve for law in laws for curve in failure_curves(law, settings, device)]
    figures.save(figures.failure_figure(curves), folder / names[2])
    write_text(folder / f"{names[2]}.csv", failure_table(curves, settings.seed).to_csv(index=False))
    for curve in curves:
        fall = "" if math.isnan(curve.decay) else f", failures fall like exp(-m / {curve.decay:.2f}) in the end"
        sign = ">=" if curve.crossing is None else "="
        fitted = (
            "nothing fails" if math.isnan(curve.fitted_constant) else f"fitted C {sign} {curve.fitted_constant:.2f}"
        )
        log.info("%s, epsilon=%g: %s%s", curve.law, curve.epsilon, fitted, fall)
    return folder


def _whole(path: Path) -> bool:
    """Whether the file is there and ends as one of its kind does."""
    end = {".svg": b"</svg>\n", ".png": b"IEND\xaeB`\x82", ".csv": b"\n"}[path.suffix]
    return path.is_file() and path.read_bytes().endswith(end)


def failure_curves(law: str, settings: Settings, device: str) -> list[FailureCurve]:
    """A curve for each of EPSILONS; the best error of a problem says for all of them whether it fails."""
    failures: dict[float, list[int]] = {epsilon: [] for epsilon in EPSILONS}
    for m in tqdm(FAILURE_SIZES, desc=f"failures, {law}", unit="m", disable=None, leave=False):
        drawn = subset_sum.sample(
            law, m, EPSILONS[0], selection="best", problems=settings.problems, seed=settings.seed, device=device
        )
        for epsilon, counts in failures.items():
            counts.append(int((drawn.error > epsilon).sum()))
    return [
        FailureCurve(law, epsilon, settings.problems, tuple(FAILURE_SIZES), tuple(counts))
        for epsilon, counts in failures.items()
    ]


def failure_table(curves: list[FailureCurve], seed: int) -> pd.DataFrame:
    """One line per point of the curves."""
    lines = []
    for c in curves:
        for m, k in zip(c.base_set_sizes, c.failures, strict=True):
            low, high = wilson_interval(k, c.problems)
            lines.append({
                "law": c.law, "epsilon": c.epsilon, "base_set_size": m, "problems": c.problems, "seed": seed,
                "failures": k, "failure_share": k / c.problems, "failure_share_interval_low": low,
                "failure_share_interval_high": high, "fitted_constant": c.fitted_constant, "crossing": c.crossing,
                "decay": c.decay, **provenance.here(),
            })  # fmt: skip
    return pd.DataFrame(lines)
