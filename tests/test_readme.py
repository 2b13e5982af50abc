"""The README's Python runs; its commands, and the files that it and `docs` name, exist."""

import re

from conftest import ROOT, small_cnn

from ltx import cli

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"model": small_cnn("relu")})
    assert (tmp_path / "ticket.safetensors").is_file()


def test_commands_and_make_targets_exist():
    text = "\n".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"(?:^|`)ltx ([a-z][a-z-]*)", text, flags=re.MULTILINE))
    assert {"train-target", "construct", "eval"} <= named <= set(cli.COMMANDS)
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`|\.\.\. )make ([a-z-]+)", text, flags=re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_links_lead_to_files():
    links = [(page, link) for page in PAGES for link in re.findall(r"\[[^]]*\]\(([^)#]+)[^)]*\)", page.read_text())]
    relative = [page.parent / link for page, link in links if not link.startswith("https:")]
    assert set(PAGES[1:]) <= set(relative)  # the README names each
    assert [str(path) for path in relative if not path.exists()] == []
