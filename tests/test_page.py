"""`ltx page`: what it shows is what lies there, in one file that needs nothing else."""

import base64
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from conftest import one_line

from ltx.errors import LtxError
from ltx.paths import reference_dir
from ltx.report.page import Entry, Section, Table, from_markdown, page


class _Page(HTMLParser):
    """Headings, tables, pictures and addresses of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.titles: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.notes: list[str] = []
        self.images: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        if tag == "img":
            self.images.append(given["src"])
        elif tag == "a":
            self.links.append(given["href"])
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "h3":
            self.titles.append("")
        elif given.get("class") == "note":
            self.notes.append("")
            tag = "note"
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() not in (tag, "note" if tag == "p" else tag):
            pass

    def handle_data(self, data):
        inside = self._open[-1] if self._open else ""
        if inside in ("td", "th"):
            self.tables[-1][-1][-1] += data
        elif inside == "h3":
            self.titles[-1] += data
        elif inside == "note":
            self.notes[-1] += data


@pytest.fixture
def kept(tmp_path):
    """A copy of the kept results."""
    shutil.copytree(reference_dir(), tmp_path / "kept")
    return tmp_path / "kept"


def _cells(file: Path) -> list[list[str]]:
    rows = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for n, row in enumerate(rows) if n != 1]


def test_the_kept_results(kept, ltx):
    status, out, err = ltx("page", f"output_dir={kept}")
    assert status == 0, err
    assert out == f"{kept / 'index.html'}\n"
    text = (kept / "index.html").read_text(encoding="utf-8")
    found = _Page(text)

    files = [*kept.glob("tables/*.md"), *kept.glob("bench/*/*.md")]
    assert len(files) > 10
    for file in files:
        assert _cells(file) in found.tables, file
        assert found.titles.count(file.read_text(encoding="utf-8").strip("*").splitlines()[0].strip("*").split("; ")[0])
    notes = " ".join(" ".join(found.notes).split())
    for file in kept.glob("tables/*.md"):
        assert " ".join(file.read_text(encoding="utf-8").strip().splitlines()[-1].split()) in notes, file

    pictures = sorted(path.read_bytes() for path in kept.rglob("*.svg"))
    start = "data:image/svg+xml;base64,"
    assert all(address.startswith(start) for address in found.images)
    assert sorted(base64.b64decode(address.removeprefix(start)) for address in found.images) == pictures

    within = {link[1:] for link in found.links if link.startswith("#")}
    assert within == set(found.ids)
    assert len(found.ids) == len(set(found.ids)) == len(found.titles)
    others = [link for link in found.links if not link.startswith("#")]
    assert all((kept / unquote(link)).is_file() for link in others)
    assert {"tables/table1.csv", "tables/table1.tex", "tables/table1.md"} <= set(others)
    assert not {"script", "link", "iframe"} & set(found.tags)
    assert "http" not in re.sub(r'src="data:[^"]*"', "", text)  # nothing is fetched

    assert ltx("page", f"output_dir={kept}")[0] == 0
    assert (kept / "index.html").read_text(encoding="utf-8") == text


def test_numbers_in_names_are_in_their_order(tmp_path, ltx):
    for name in ("table10", "table9", "table2-b #1"):
        (tmp_path / "tables").mkdir(exist_ok=True)
        (tmp_path / "tables" / f"{name}.md").write_text(f"**{name}**\n\n| a |\n|--:|\n| 1 |\n\nnote\n")
    assert ltx("page", output_dir=tmp_path)[0] == 0
    found = _Page((tmp_path / "index.html").read_text())
    assert found.titles == ["table2-b #1", "table9", "table10"]
    assert "tables/table2-b%20%231.md" in found.links


@pytest.mark.slow
def test_statistics_bounds_and_targets(outputs, ltx, tmp_path):
    folder = tmp_path / "all of it"
    shutil.copytree(outputs, folder)
    where = f"output_dir={folder}"
    for theta in ("null", "1"):
        assert ltx("subset-sum", "problems=1000", "m=8", "epsilon=0.05", f"theta={theta}", where)[0] == 0
    assert ltx("subset-sum", "problems=1000", "m=16", "epsilon=0.2", where)[0] == 0
    assert ltx("subset-sum", "problems=1000", "m=6", "epsilon=0.2", where)[0] == 0
    assert ltx("bounds", "target=digits", "protocol=smoke", where)[0] == 0
    status, _, err = ltx("page", where)
    assert status == 0, err
    found = _Page((folder / "index.html").read_text(encoding="utf-8"))
    statistics, bounds, targets = found.tables[-3:]
    runs = {(row[2], row[4]): row for row in statistics[1:]}
    assert [runs["8", theta][:4] + runs["8", theta][5:7] for theta in ("1", "–")] == [
        ["uniform", "smallest", "8", "0.05", "1,000", "0"]
    ] * 2
    # C: bounds where more problems than epsilon have no subset, and where all have one
    assert [bool(re.fullmatch(r"> 2\.67", runs["8", theta][-1])) for theta in ("1", "–")] == [True, True]
    assert re.fullmatch(r"< [\d.]+", runs["16", "–"][-1])
    assert re.fullmatch(r"[\d.]+", runs["6", "–"][-1])
    assert bounds[0][:2] == ["layer", "N"]
    assert len(bounds) > 2
    assert "holds a ticket within 0.1 of the target" in (folder / "index.html").read_text(encoding="utf-8")
    assert targets[1][0].endswith("target.safetensors")
    assert re.search(r"relu, 2 rounds of 1 epochs, [\d.]+ %", targets[1][1])


def test_nothing_there_is_an_error(ltx, tmp_path):
    status, out, err = ltx("page", output_dir=tmp_path / "none")
    assert (status, out) == (1, "")
    assert "there is no table and no figure below" in one_line(err)
    assert not (tmp_path / "none").exists()


def test_damaged_files_are_left_out(ltx, tmp_path):
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "a.md").write_text("**A**\n\n| a | b |\n|:--|--:|\n| x | 1 |\n")
    (tmp_path / "tables" / "b.md").write_text("**B**\n\n| a | b |\n|:--|--:|\n| x |\n")
    (tmp_path / "tables" / "c.md").write_bytes(b"\xff\xfe|")
    (tmp_path / "subset_sum").mkdir()
    (tmp_path / "subset_sum" / "statistics.csv").write_text("")
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets" / "x.safetensors").write_bytes(b"hello")
    status, _, err = ltx("page", output_dir=tmp_path)
    assert status == 0
    assert [err.count(f"{name}: ") for name in ("a.md", "b.md", "c.md", "statistics.csv", "x.safetensors")] == [
        0, 1, 1, 1, 1,
    ]  # fmt: skip
    assert _Page((tmp_path / "index.html").read_text()).titles == ["A"]


def test_what_files_say_is_text():
    entry = Entry("<b>", "a&b", table=Table(["<i>"], [["<script>alert(1)</script>"]], [True]), note="1 < 2", image="")
    text = page("<title>", "&", [Section("<s>", [entry]), Section("empty", [])])
    assert "<script>" not in text
    assert "empty" not in text
    assert text.count("<td class=n>") == text.count("<th class=n>") == 1
    found = _Page(text)
    assert (found.titles, found.tables, found.notes) == (["<b>"], [[["<i>"], ["<script>alert(1)</script>"]]], ["1 < 2"])
    assert found.images == []


def test_markdown_of_pandas_and_pipes_in_cells():
    title, table, note = from_markdown("**T. x**\n\n| a   |   b |\n|:---|---:|\n| x\\|y | 1 |\n| z |  -2 |\n\nsaid\n")
    assert (title, note) == ("T. x", "said")
    assert (table.columns, table.rows, table.numeric) == (["a", "b"], [["x|y", "1"], ["z", "-2"]], [False, True])
    for text in ("no table", "| a |\n", ""):
        with pytest.raises(LtxError, match="holds no Markdown table"):
            from_markdown(text)
