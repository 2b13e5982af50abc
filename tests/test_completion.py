"""What a shell is offered behind `ltx`."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, one_line, settings

from ltx import cli
from ltx.activations import ACTIVATIONS
from ltx.cli import COMMANDS
from ltx.completion import SCRIPTS


@pytest.fixture
def offered(capsys):
    def found(line: str) -> list[str]:
        assert cli.run(["completion", "query", line]) == 0
        return capsys.readouterr().out.splitlines()

    return found


def test_commands_settings_and_values(offered):
    assert offered("ltx ") == [*COMMANDS, "completion"]
    assert offered("ltx con") == ["construct"]
    assert offered("ltx  construct target=mnist target.c") == ["target.checkpoint="]
    assert offered("ltx construct target")[:2] == ["target=", "target.checkpoint="]
    assert offered("ltx construct target=") == ["target=mnist", "target=resnet22", "target=digits"]
    assert offered("ltx bounds construction=") == ["construction=2L", "construction=L+1"]
    assert offered("ltx eval activation=relu,t") == ["activation=relu,tanh"]
    assert "experiment=mnist_tables" in offered("ltx construct experiment=")
    assert offered("ltx construct --c") == ["--cfg", "--config-dir"]
    assert offered("ltx construct ++activation=relu,gel") == ["++activation=relu,gelu"]
    assert offered("ltx subset-sum selection=") == ["selection=smallest", "selection=best"]
    assert offered("ltx construct --cfg ") == ["job", "hydra", "all"]
    assert offered("ltx completion ") == list(SCRIPTS)
    for line in ("construct m=", "bench experiment=", "page activation=", "no m", "completion zsh "):
        assert offered(f"ltx {line}") == []


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_value_that_is_offered_is_one(command, offered):
    keys = [key for key in offered(f"ltx {command} ") if key.endswith("=")]
    paths = ("output_dir=", "data.root=", "ticket=", "target.checkpoint=")
    found = [value for key in keys if key not in paths for value in offered(f"ltx {command} {key}")]
    assert found or command == "page"
    for value in found:
        settings(*(["selection=feedback"] if value.startswith("feedback.") else []), value)


def test_all_activations_are_offered(offered):
    assert sorted(offered("ltx construct activation=")) == sorted(f"activation={name}" for name in ACTIVATIONS)


def test_files(offered, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my [outputs]").mkdir()
    (tmp_path / "my [outputs]" / "a=1.safetensors").touch()
    for given in ("", "ticket=", "output_dir=", "target.checkpoint="):
        assert offered(f"ltx verify {given}my") == [f"{given}my [outputs]/"]
        assert offered(rf"ltx verify {given}my\ [outputs]/") == [f"{given}my [outputs]/a=1.safetensors"]
    assert offered("ltx construct my") == []
    assert offered("ltx construct --config-dir my") == ["my [outputs]/"]
    assert offered("ltx construct --config-dir=my") == ["--config-dir=my [outputs]/"]


@pytest.mark.parametrize("shell", SCRIPTS)
def test_a_shell(shell, tmp_path):
    if not shutil.which(shell):
        assert shell != "bash"
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "my [outputs]").mkdir()
    lines = ["ltx con", "ltx construct target=mn", "ltx verify ticket=my", "ltx eval activation=relu,ta"]
    tries = {
        "bash": 'eval "$(ltx completion bash)"; for line in "$@"; do COMP_LINE=$line COMP_POINT=${#line}; _ltx; '
                'printf "%s\\n" "${COMPREPLY[@]}"; done',
        "fish": "ltx completion fish | source; for line in $argv; complete -C $line; end",
        "zsh": 'compdef() { }; compadd() { [[ $1 == -S ]] && shift 2; shift; (( $# )) && print -l -- "$@" }; '
               'eval "$(ltx completion zsh)"; for line in "$@"; do words=(${(s: :)line}) CURRENT=$#words '
               "PREFIX=$words[-1]; _ltx; done",
    }[shell]  # fmt: skip
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "ltx").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ltx "$@"\n')
    (bin / "ltx").chmod(0o755)
    paths = {"PATH": f"{bin}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    behind = [] if shell == "fish" else [shell]
    done = subprocess.run(
        [shell, "-c", tries, *behind, *lines], cwd=tmp_path, env={**os.environ, **paths}, capture_output=True, text=True
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == {
        "bash": ["construct", "mnist", r"my\ \[outputs\]/", "relu,tanh"],
    }.get(shell, ["construct", "target=mnist", "ticket=my [outputs]/", "activation=relu,tanh"])


@pytest.mark.parametrize("given", [[], ["tcsh"], ["query"], ["bash", "zsh"]])
def test_completion_for_no_shell(given, capsys):
    assert cli.run(["completion", *given]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert one_line(said.err) == "ltx: ltx completion SHELL prints a script for bash, zsh, fish (see ltx --help)"
