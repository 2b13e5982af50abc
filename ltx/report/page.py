"""One HTML page of tables and figures, in one file that needs nothing else and can be sent to somebody."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment

from ltx.errors import LtxError


@dataclass(frozen=True)
class Table:
    """Cells as they are shown."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[bool]  # which columns are set flush right


@dataclass(frozen=True)
class Entry:
    """A table or a figure, with what is said of it."""

    title: str
    source: str  # the file that it is from, as it is shown
    table: Table | None = None
    image: str = ""  # an address, `data_uri` of a file
    note: str = ""
    files: Sequence[tuple[str, str]] = ()  # the same in other forms: what it is called, address relative to the page


@dataclass(frozen=True)
class Section:
    title: str
    entries: Sequence[Entry]


def page(title: str, about: str, sections: Sequence[Section]) -> str:
    """The page; the same arguments give the same text."""
    template = Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8")
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template).render(
        title=title, about=about, sections=[section for section in sections if section.entries]
    )  # fmt: skip


def from_markdown(text: str) -> tuple[str, Table, str]:
    """What stands in front of a Markdown page's table, the table, and what stands behind it.

    Raises:
        LtxError: there is no table, or one whose rows are not all as wide.
    """
    lines = text.splitlines()
    inside = [n for n, line in enumerate(lines) if line.startswith("|")]
    rows = [[cell.strip().replace("\\|", "|") for cell in _CELLS.split(lines[n].strip()[1:-1])] for n in inside]
    if len(rows) < 2 or len({len(row) for row in rows}) > 1:
        raise LtxError("holds no Markdown table whose rows are all as wide")
    numeric = [rule.endswith(":") and not rule.startswith(":") for rule in rows[1]]
    before, behind = ("\n".join(part).strip() for part in (lines[: inside[0]], lines[inside[-1] + 1 :]))
    return before.strip("*"), Table(rows[0], rows[2:], numeric), behind


def data_uri(path: Path) -> str:
    """An SVG file as an address that holds it: names within one figure do not meet those of another."""
    return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


_CELLS = re.compile(r"(?<!\\)\|")
