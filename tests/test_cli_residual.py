"""The command line on a residual network, with sampled errors and explicit tickets, on the embedded digits."""

import json

import pytest
from conftest import SMOKE, one_line

from ltx import cli


@pytest.fixture(scope="module")
def residual(tmp_path_factory):
    """An output_dir with a ResNet-22 for digits, a target with sampled errors and explicit tickets, all evaluated."""
    folder = tmp_path_factory.mktemp("residual")
    more = ("target.network=resnet22", "target.density=0.1", "target.head=construct", "protocol.rounds=1", "m=12",
            "epsilon=0.03", f"output_dir={folder}")  # fmt: skip
    settings = ("--multirun", *SMOKE, *more)
    assert cli.run(["train-target", *SMOKE, *more]) == 0
    for command in ("construct", "eval"):
        assert cli.run([command, *settings, "construction=sampled,L+1,2L", "seed=0,1"]) == 0
    return folder, (*SMOKE, *more)


def test_residual_network_from_training_to_tables(residual, ltx):
    folder, settings = residual
    results = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("tickets/*/*/result.json")}
    assert sorted(r["kind"] for r in results.values()) == ["explicit"] * 4 + ["sampled"] * 2
    for result in results.values():
        assert result["network"] == "resnet22"
        assert result["ticket_parameters"] > result["target_parameters"]
        assert result["batch_norm"] == "keep"
    accounts = [json.loads(path.read_text()) for path in folder.glob("tickets/*/*/deviation.json")]
    assert len(accounts) == 6
    assert all(len(account["layers"]) == 19 for account in accounts)
    assert ltx("verify", *settings, "construction=2L", "seed=1")[0] == 0
    status, out, err = ltx("construct", *settings, "construction=sampled", "seed=1")
    assert (status, "there already" in err) == (0, True)
    status, out, err = ltx("eval", *settings, "construction=sampled", "seed=1")
    assert (status, "there already" in err) == (0, True)
    status, out, _ = ltx("tables", *settings)
    assert status == 0
    assert "Table 3" in out
    assert "Table 4" in out
    tables = folder / "tables"
    names = {path.name for path in tables.iterdir()}
    assert {
        "table3-digits-m12-eps0.03.md",
        "table4-digits-m12-eps0.03.tex",
        "results-resnet22-digits-m12-eps0.03.csv",
        "deviation-digits.png",
    } <= names
    page = (tables / "table3-digits-m12-eps0.03.md").read_text()
    assert "| sampled " in page
    assert "| explicit L+1 " in page
    assert "| explicit 2L " in page


@pytest.mark.parametrize("command", ["eval", "verify"])
def test_sampled_errors_are_no_ticket(residual, ltx, command):
    folder, settings = residual
    path = next(folder.glob("tickets/*/sampled-*/sampled.safetensors"))
    assert "format 'ltx-sampled/1' is not ltx-ticket/1" in one_line(ltx(command, str(path), *settings)[2])
    if command == "verify":
        assert "no ticket is built" in one_line(ltx(command, *settings, "construction=sampled")[2])
    else:
        assert "draw them with ltx construct" in one_line(ltx(command, *settings, "construction=sampled", "seed=9")[2])
