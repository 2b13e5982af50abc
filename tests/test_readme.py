"""The README's Python runs; its commands, and the files that it and `docs` name, exist."""

import re

import pytest
import torch
from conftest import ROOT, small_cnn

from ltx import cli

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda p: p.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"model": small_cnn("relu"), "images": torch.rand(16, 1, 6, 6), "labels": torch.arange(16) % 3}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        exec(compile(block, page.name, "exec"), dict(given))
    assert page.name != "README.md" or (tmp_path / "ticket.safetensors").is_file()


def test_commands_and_make_targets_exist():
    pages = [page.read_text() for page in PAGES]
    blocks = "\n".join(block for page in pages for block in re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL))
    inline = "\n".join(code for page in pages for code in re.findall(r"`([^`\n]+)", page))
    code = f"{blocks}\n{inline}"
    named = set(re.findall(r"^(?:LTX_DATA=\.\.\. )?ltx ([a-z][a-z-]*)", code, flags=re.MULTILINE))
    assert {"train-target", "construct", "eval"} <= named <= {*cli.COMMANDS, "completion"}
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^(?:LTX_DATA=\.\.\. )?make ([a-z-]+)", code, flags=re.MULTILINE))
    assert {"demo", "test", "paper-tables"} <= targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, flags=re.MULTILINE)] == []


def test_links_lead_to_files():
    links = [(page, link) for page in PAGES for link in re.findall(r"\[[^]]*\]\(([^)#]+)[^)]*\)", page.read_text())]
    relative = [page.parent / link for page, link in links if not link.startswith("https:")]
    assert set(PAGES[1:]) <= {page.parent / link for page, link in links if page == PAGES[0]}
    assert [str(path) for path in relative if not path.exists()] == []
    anchors = {page: {_anchor(title) for title in re.findall(r"^#+ (.+)$", page.read_text(), re.M)} for page in PAGES}
    for page in PAGES:
        for file, anchor in re.findall(r"\[[^]]*\]\(([^):#]*)#([^)]+)\)", page.read_text()):
            assert anchor in anchors[(page.parent / file).resolve() if file else page], f"{page}: {file}#{anchor}"


def _anchor(title: str) -> str:
    """As on the usual hosts: lower case, spaces as hyphens, no other punctuation."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
