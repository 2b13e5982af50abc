"""`ltx page`: one HTML page of the tables and figures below output_dir."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from ltx import __version__
from ltx.config import Settings
from ltx.errors import LtxError
from ltx.files import write_text
from ltx.report.page import Entry, Section, Table, data_uri, from_markdown, page
from ltx.tasks import targets_at

log = logging.getLogger(__name__)
_FIGURES = {  # the name of a file, up to its first hyphen -> what it shows
    "figure3": "Figure 3. Subset sums of uniform numbers",
    "figure4": "Figure 4. Subset sums of products of two uniform numbers",
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
    "mean_size": ("mean size", "{:.3f}"), "constant": ("C", "{:.2f}"),
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
        yield _entry(folder, path, _FIGURES.get(kind, path.stem), image=data_uri(path))


def _statistics(folder: Path) -> Iterator[Entry]:
    path = folder / "subset_sum" / "statistics.csv"
    if not path.is_file():
        return
    try:
        found = pd.read_csv(path)
        if missing := {*_STATISTICS, "constant_interval_high"} - set(found):
            raise ValueError(f"has no column {min(missing)}")
    except (OSError, ValueError) as error:  # pandas' errors of parsing are ValueErrors
        log.warning("%s: left out, %s", path, error)
        return
    named = {name: title for name, (title, _) in _STATISTICS.items()}
    shown = found.filter(list(named)).rename(columns=named)
    table = _table(shown, dict(_STATISTICS.values()))
    at = table.columns.index("C")
    bounded = zip(table.rows, found.to_dict("records"), strict=True)
    table = replace(table, rows=[[*row[:at], _constant(run, row[at]), *row[at + 1 :]] for row, run in bounded])
    note = (
        "C = m / log(1 / min(epsilon, share without a subset)); sizes are those of problems with a subset; where theta "
        "is not said, targets are random."
    )
    yield _entry(folder, path, "Statistics of random subset-sum problems", table=table, note=note)


def _constant(run: Mapping, shown: str) -> str:
    """C as `ltx subset-sum` says it: a bound where more problems than epsilon have no subset, or none is without."""
    most = run["constant_interval_high"]
    if pd.isna(run["constant"]):
        return shown if pd.isna(most) else f"< {most:.2f}"
    return shown if run["failure_share"] <= run["epsilon"] else f"> {shown}"


def _table(found: pd.DataFrame, formats: Mapping[str, str]) -> Table:
    """A data frame as it is shown, columns without a format in four digits."""

    def show(name: str, value: object) -> str:
        usual = "{:.4g}" if isinstance(value, float) else "{}"
        return "–" if pd.isna(value) else formats.get(name, usual).format(value)  # type: ignore[arg-type]

    rows = [[show(*cell) for cell in zip(found.columns, row, strict=True)] for row in found.itertuples(index=False)]
    numeric = [pd.api.types.is_numeric_dtype(kind) for kind in found.dtypes]
    return Table([str(name).replace("_", " ") for name in found.columns], rows, numeric)


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
