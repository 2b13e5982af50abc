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
    pages = [page.read_text() for page in PAGES]
    blocks = "\n".join(block for page in pages for block in re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL))
    inline = "\n".join(code for page in pages for code in re.findall(r"`([^`\n]+)", page))
    code = f"{blocks}\n{inline}"
    named = set(re.findall(r"^(?:LTX_DATA=\.\.\. )?ltx ([a-z][a-z-]*)", code, flags=re.MULTILINE))
    assert {"train-target", "construct", "eval"} <= named <= set(cli.COMMANDS)
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^(?:LTX_DATA=\.\.\. )?make ([a-z-]+)", code, flags=re.MULTILINE))
    assert {"demo", "test", "paper-tables"} <= targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, flags=re.MULTILINE)] == []


def test_links_lead_to_files():
    links = [(page, link) for page in PAGES for link in re.findall(r"\[[^]]*\]\(([^)#]+)[^)]*\)", page.read_text())]
    relative = [page.parent / link for page, link in links if not link.startswith("https:")]
    assert set(PAGES[1:]) <= {page.parent / link for page, link in links if page == PAGES[0]}
    assert [str(path) for path in relative if not path.exists()] == []
