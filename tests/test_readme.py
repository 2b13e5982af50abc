"""The README's Python runs, and its commands and settings exist."""

import re

from conftest import ROOT, small_cnn

from ltx import cli

README = (ROOT / "README.md").read_text()


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"model": small_cnn("relu")})
    assert (tmp_path / "ticket.safetensors").is_file()


def test_commands_and_make_targets_exist():
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL))
    assert set(re.findall(r"^ltx ([a-z-]+)", shell, flags=re.MULTILINE)) <= set(cli.COMMANDS)
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z][a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_figures_exist():
    assert all((ROOT / path).is_file() for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README))
