"""`ltx bench`: the subset-sum engine on this machine, beside a Python search and CP-SAT on the same problems."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from ltx import subset_sum
from ltx.config import Settings
from ltx.files import require_writable, write_json, write_text
from ltx.subset_sum import baselines, statistics
from ltx.tasks import provenance

log = logging.getLogger(__name__)

SIZES = (8, 10, 12, 14, 15, 16, 18, 20, 22, 24)
REPEATS = 5
MOST = 1 << 20  # problems of one run
MOST_ON_GPU = 1 << 24


def run(settings: Settings) -> Path:
    """Measure, print a table and write it; the JSON file."""
    on_gpu = settings.torch_device == "cuda"
    rivals: dict[str, Callable] = {"python": baselines.python_search}
    if importlib.util.find_spec("ortools"):
        rivals["cp_sat"] = baselines.cp_sat
    else:
        log.info("CP-SAT is left out: it needs OR-tools (pip install ortools)")
    rows = []
    folder = Path(settings.output_dir) / "bench" / f"{settings.law.value}-eps{settings.epsilon!r}"
    require_writable(folder)
    cells = [(selection, m) for selection in ("smallest", "best") for m in SIZES]
    rates: dict[tuple[str, int], float] = {}
    last: dict[tuple[str, str], tuple[int, float]] = {}
    bar = tqdm(cells, desc="bench", unit="cell", disable=None, leave=False)
    for selection, m in bar:
        if bar.disable:
            log.info("%s, m=%d (%d cells)", selection, m, len(cells))
        row = {"selection": selection, "m": m, **_engine(settings, selection, m, "cpu", MOST)}
        rates[selection, m] = row["per_second"]
        smaller = rates.get((selection, m - 2))
        row["cost_against_m_minus_2"] = smaller and smaller / row["per_second"]
        if on_gpu:
            row |= {f"gpu_{key}": value for key, value in _engine(settings, selection, m, "cuda", MOST_ON_GPU).items()}
            row["gpu_ratio"] = row["gpu_per_second"] / row["per_second"]
        for name, rival in rivals.items():
            before = last.get((name, selection))
            if before and before[1] * 2.0 ** (m - before[0]) > 10 * settings.seconds and before[1] > settings.seconds:
                continue  # no problem would be done in time
            rate = _rival(settings, selection, m, rival)
            last[name, selection] = m, 1 / rate["per_second"]
            row |= {f"{name}_{key}": value for key, value in rate.items()}
            row[f"{name}_ratio"] = row["per_second"] / rate["per_second"]
        rows.append(row)
    table = pd.DataFrame(rows)
    about = {**_machine(on_gpu), "law": settings.law.value, "epsilon": settings.epsilon, "seed": settings.seed,
             "seconds": settings.seconds, "repeats": REPEATS}  # fmt: skip
    page = f"{_title(about)}\n\n{_markdown(table)}\n"
    print(f"\n{page}")
    write_text(folder / "bench.csv", table.to_csv(index=False))
    write_text(folder / "bench.md", page)
    write_json(folder / "bench.json", {**about, **provenance.here(), "rows": rows})
    return folder / "bench.json"


def _problems(settings: Settings, m: int, n: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The first n random problems, rounded to the source network's 24 bits, which CP-SAT takes as integers."""
    drawn = statistics.draw(settings.law.value, m, 0, n, seed=settings.seed, device=device)
    values, targets = ((t * baselines.GRID).round() / baselines.GRID for t in drawn)
    return values, targets


def _engine(settings: Settings, selection: str, m: int, device: str, most: int) -> dict:
    """Median rate of REPEATS runs, each of about a fifth of `seconds`, after one that compiles."""

    def timed(n: int) -> float:
        values, targets = _problems(settings, m, n, device)
        _synchronise(device)
        begin = time.perf_counter()
        subset_sum.solve(values, targets, settings.epsilon, selection=selection)
        _synchronise(device)
        return time.perf_counter() - begin

    n = 256
    timed(n)
    while n < most and min(timed(n), timed(n)) < 0.05 * settings.seconds:
        n *= 2
    n = min(most, 4 * n)
    rates = sorted(n / timed(n) for _ in range(REPEATS))
    return {"per_second": median(rates), "per_second_least": rates[0], "per_second_most": rates[-1], "problems": n}


def _rival(settings: Settings, selection: str, m: int, solver: Callable) -> dict:
    """Rate of a solver that takes one problem at a time, for `seconds`; its answers must be the engine's."""
    values, targets = _problems(settings, m, 4096, "cpu")
    found = subset_sum.solve(values, targets, settings.epsilon, selection=selection)
    x, theta, n = values.numpy(), targets.numpy(), 0
    solver(x[0, :1], float(theta[0]), settings.epsilon, selection)  # imports are not part of its time
    begin, answers = time.perf_counter(), []
    while n < len(theta) and (n == 0 or time.perf_counter() - begin < settings.seconds):
        answers.append(solver(x[n], float(theta[n]), settings.epsilon, selection))
        n += 1
    rate = n / (time.perf_counter() - begin)
    same = sum(
        size == int(found.size[p]) and abs(error - float(found.error[p])) < 1e-12
        for p, (size, error) in enumerate(answers)
    )
    return {"per_second": rate, "problems": n, "same": same}


def _machine(on_gpu: bool) -> dict:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return {
        "processor": provenance.here()["processor"], "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "memory_gib": round(memory / 2**30), "system": platform.platform(),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        **{name: _version(name) for name in ("numba", "numpy", "ortools", "triton")},
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _title(about: dict) -> str:
    gpu = f", {about['gpu']}" if about["gpu"] else ""
    return (
        f"Problems a second: {about['law']}, epsilon = {about['epsilon']:g}, {about['threads']} threads of "
        f"{about['processor']}{gpu}; median of {about['repeats']} runs. The others solve the first of the same "
        f"problems, one at a time, for {about['seconds']:g} s: a few slow ones decide their rates."
    )


def _markdown(table: pd.DataFrame) -> str:
    shown = pd.DataFrame({"selection": table.selection, "m": table.m, "engine": table.per_second.map(_rate)})
    shown["least to most"] = [
        f"{_rate(low)} to {_rate(high)}"
        for low, high in zip(table.per_second_least, table.per_second_most, strict=True)
    ]
    shown["cost of m / m - 2"] = table.cost_against_m_minus_2.map(lambda v: "" if pd.isna(v) else f"{v:.2f}")
    for name, title in (("gpu", "GPU"), ("python", "Python search"), ("cp_sat", "CP-SAT")):
        if f"{name}_per_second" in table:
            shown[title] = table[f"{name}_per_second"].map(_rate)
            what = "GPU / engine" if name == "gpu" else f"engine / {title}"
            shown[what] = table[f"{name}_ratio"].map(lambda v: "–" if pd.isna(v) else f"{_rate(v)}×")
        if f"{name}_same" in table:
            answered, same = table[f"{name}_problems"], table[f"{name}_same"]
            shown[f"same answers as {title}"] = [
                "–" if pd.isna(n) else f"{int(k)} of {int(n)}" for k, n in zip(same, answered, strict=True)
            ]
    return shown.to_markdown(index=False, disable_numparse=True)


def _rate(value: float) -> str:
    """Three digits, thousands apart."""
    if pd.isna(value):
        return "–"
    digits = max(0, 2 - int(np.floor(np.log10(value)))) if value > 0 else 0
    return f"{round(value, 2 - int(np.floor(np.log10(value)))):,.{digits}f}"


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
