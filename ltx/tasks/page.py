"""`ltx page`: one HTML page of the tables and figures below output_dir."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from ltx import __version__
from ltx.config import Settings
from ltx.errors import LtxError
from ltx.files import write_text
from ltx.report.page import Entry, Section, Table, data_uri, from_markdown, page
from ltx.tasks import targets_at
from ltx.tasks.subset_sum import constant_of

log = logging.getLogger(__name__)
_FIGURES = {  # the name of a file, whole or up to its first hyphen -> what it shows
    "figure3": "Figure 3. Subset sums of uniform numbers",
    "figure4": "Figure 4. Subset sums of products of two uniform numbers",
    "figure3-normal": "The same as Figure 3 of normal numbers",
    "figure4-normal": "The same as Figure 4 of products of two normal numbers",
    "failures": "Random problems without a subset within epsilon, against m",
    "deviation": "How deviation grows through the network",
    "tradeoff": "Accuracy against the parameters kept",
    "scaling": "Time and memory against the target's parameters",
    "calibration": "What a ticket with feedback depends on",
    "certificate": "How far slots can be from the target's activations",
}
_STATISTICS = {  # column of statistics.csv -> what it is called, how it is written
    "law": ("law", "{}"), "selection": ("selection", "{}"), "base_set_size": ("m", "{}"),
    "epsilon": ("epsilon", "{:g}"), "theta": ("theta", "{:g}"), "problems": ("problems", "{:,}"),
    "seed": ("seed", "{}"), "failure_share": ("without a subset", "{:.3%}"), "mean_error": ("mean error", "{:.3g}"),
    "mean_size": ("mean size", "{:.3f}"),
}  # fmt: skip


def run(settings: Settings) -> Path:
    """Write the page; its path. Every call makes it anew."""
    folder = Path(settings.output_dir)
    sections = [
        Section("Tables", [*_markdown(folder, "tables/*.md")]),
        Section("Tables of a GPU", [*_markdown(folder, "gpu/*.md")]),
        Section("Figures", [*_figures(folder, ("tables/*.svg", "figures/*/*.svg", "scaling/*.svg", "feedback/*.svg"))]),
        Section("Random problems", [*_statistics(folder)]),
        Section("Speed", [*_markdown(folder, "bench/*/bench.md")]),
        Section("Certificates", [*_figures(folder, ("certificates/*.svg", "tickets/*/*/certificate.svg"))]),
        Section("Guarantees", [*_markdown(folder, "bounds/*.md")]),
        Section("Targets", [*_targets(folder)]),
    ]
    many = sum(len(section.entries) for section in sections)
    if not many:
        raise LtxError(
            f"there is no table and no figure below {folder}; make some with ltx tables or ltx figures, or name their "
            "folder with output_dir=DIR"
        )
    about = f"What ltx {__version__} found below {folder}: {many} tables and figures. ltx page makes this page anew."
    path = folder / "index.html"
    write_text(path, page("Strong lottery tickets, constructed", about, sections))
    return path


def _entry(folder: Path, path: Path, title: str, **parts) -> Entry:
    """An entry of a file, with links to it and to the same in other forms beside it."""
    beside = (path.with_suffix(end) for end in (".md", ".csv", ".tex", ".svg", ".png", ".json"))
    files = [(file.suffix[1:], quote(str(file.relative_to(folder)))) for file in beside if file.is_file()]
    return Entry(title, _name(folder, path), files=files, **parts)


def _found(folder: Path, patterns: Iterable[str]) -> Iterator[Path]:
    """Files in the order of their names, numbers as such: table10 behind table9."""
    for pattern in patterns:
        yield from sorted(folder.glob(pattern), key=lambda path: _natural(_name(folder, path)))


def _name(folder: Path, path: Path) -> str:
    return str(path.relative_to(folder).with_suffix(""))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _markdown(folder: Path, pattern: str) -> Iterator[Entry]:
    for path in _found(folder, (pattern,)):
        try:
            before, table, note = from_markdown(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, LtxError) as error:
            log.warning("%s: left out, %s", path, error)
            continue
        title, _, rest = before.partition("; ")
        yield _entry(folder, path, title, table=table, note=note or rest)


def _figures(folder: Path, patterns: Iterable[str]) -> Iterator[Entry]:
    for path in _found(folder, patterns):
        kind = "certificate" if path.parent.name == "certificates" else path.stem.partition("-")[0]
        yield _entry(folder, path, _FIGURES.get(path.stem, _FIGURES.get(kind, path.stem)), image=data_uri(path))


def _statistics(folder: Path) -> Iterator[Entry]:
    path = folder / "subset_sum" / "statistics.csv"
    if not path.is_file():
        return
    try:
        runs = pd.read_csv(path).to_dict("records")
        rows = [[*_numbers(run), constant_of(run).removeprefix("= ") or "–"] for run in runs]
    except (OSError, ValueError, KeyError) as error:  # pandas' errors of parsing are ValueErrors
        log.warning("%s: left out, %s", path, error)
        return
    columns = [*(title for title, _ in _STATISTICS.values()), "C"]
    table = Table(columns, rows, [name not in ("law", "selection") for name in columns])
    note = (
        "C = m / log(1 / min(epsilon, share without a subset)); sizes are those of problems with a subset; where theta "
        "is not said, targets are random."
    )
    yield _entry(folder, path, "Statistics of random subset-sum problems", table=table, note=note)


def _numbers(run: Mapping) -> list[str]:
    return ["–" if pd.isna(run[key]) else form.format(run[key]) for key, (_, form) in _STATISTICS.items()]


def _targets(folder: Path) -> Iterator[Entry]:
    rows = []
    for path in _found(folder, ("targets/*.safetensors", "targets/*/target.safetensors")):
        try:
            rows.append([str(path.relative_to(folder)), targets_at.describe(path)])
        except LtxError as error:
            log.warning("%s: left out", error)
    if rows:
        table = Table(["file", "network, activation, training, accuracy on the test images"], rows, [False, False])
        yield Entry("Trained and pruned targets", "targets", table=table)
