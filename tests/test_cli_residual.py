"""The command line on a residual network, with sampled errors and explicit tickets, on the embedded digits."""

import json
import shutil

import pandas as pd
import pytest
from conftest import SMOKE, last_line, one_line

from ltx import cli

pytestmark = pytest.mark.slow


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
    last_line(out).with_name("deviation.json").unlink()
    status, out, err = ltx("eval", *settings, "construction=sampled", "seed=1")
    assert (status, "there already" in err) == (0, False)
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


def test_deviations_of_a_ticket_that_was_replaced_are_left_out(residual, ltx, tmp_path):
    folder, settings = residual
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    settings = [*(s for s in settings if not s.startswith("output_dir=")), f"output_dir={tmp_path}"]
    one, other = sorted(tmp_path.glob("tickets/*/2L-*/ticket.safetensors"))
    one.write_bytes(other.read_bytes())
    assert ltx("tables", *settings)[0] == 0
    table = pd.read_csv(tmp_path / "tables" / "deviation-digits.csv")
    assert set(table[table.construction == "2L"].seed) == {1}
    assert set(table[table.construction == "L+1"].seed) == {0, 1}


def test_deviations_of_targets_whose_names_have_a_dot(residual, ltx, tmp_path):
    folder, settings = residual
    names = {f"net-v1.{n}.safetensors" for n in (2, 3)}
    for name in names:
        shutil.copy(next(folder.glob("targets/*/target.safetensors")), tmp_path / name)
        assert ltx("tables", *settings, f"target.checkpoint={tmp_path / name}")[0] == 0
    found = {path.name for path in (folder / "tables").glob("deviation-net*")}
    assert found == {f"deviation-net-v1.{n}.{suffix}" for n in (2, 3) for suffix in ("csv", "svg", "png")}


@pytest.mark.parametrize("command", ["eval", "verify"])
def test_sampled_errors_are_no_ticket(residual, ltx, command):
    folder, settings = residual
    path = next(folder.glob("tickets/*/sampled-*/sampled.safetensors"))
    assert "format 'ltx-sampled/1' is not ltx-ticket/1" in one_line(ltx(command, str(path), *settings)[2])
    if command == "verify":
        assert "no ticket is built" in one_line(ltx(command, *settings, "construction=sampled")[2])
    else:
        assert "draw them with ltx construct" in one_line(ltx(command, *settings, "construction=sampled", "seed=9")[2])


def test_feedback_from_construction_to_tables(residual, ltx):
    folder, settings = residual
    quick = (
        "construction=2L",
        "selection=feedback",
        "feedback.images=32",
        "feedback.samples=200",
        "feedback.max_subset=2",
    )
    made = ("--multirun", *settings, *quick, "seed=0,1,2")
    assert ltx("construct", *made)[0] == 0
    assert ltx("eval", *made)[0] == 0
    status, _, err = ltx("verify", *settings, *quick, "seed=1")
    assert status == 0
    assert "with no bound on their errors" in err
    assert "rows on the calibration images are as claimed" in err
    path = next(folder.glob("tickets/*/2L-*feedback-n200-i32-k2-s4-f3-p5e-08-r1.5-w0.5-*seed1/result.json"))
    result = json.loads(path.read_text())
    assert (result["selection"], result["feedback_images"], result["feedback_bound"]) == ("feedback", 32, None)
    assert result["max_parameter_error"] > 0.03
    deviation = json.loads(path.with_name("deviation.json").read_text())
    assert deviation["feedback_samples"] == 200
    assert "there already" in ltx("construct", *settings, *quick, "seed=1")[2]
    assert ltx("tables", *settings)[0] == 0
    for number in (3, 4):
        page = (folder / "tables" / f"table{number}-digits-m12-eps0.03.md").read_text()
        assert "explicit 2L, feedback, N = 200, images = 32, subsets ≤ 2 " in page
        assert "explicit L+1 " in page
        assert r"subsets $\leq$ 2" in (folder / "tables" / f"table{number}-digits-m12-eps0.03.tex").read_text()
    assert (folder / "tables" / "tradeoff-digits-m12-eps0.03.svg").is_file()


def test_feedback_needs_images_and_a_ticket(residual, ltx):
    _, settings = residual
    asked = "feedback.images=1438: digits has 1437 training images"
    assert asked in one_line(ltx("construct", *settings, "selection=feedback", "feedback.images=1438")[2])
    sampled = ltx("construct", *settings, "selection=feedback", "construction=sampled")[2]
    assert "selection=feedback has no meaning with construction=sampled" in one_line(sampled)
    assert "feedback.reject=0.5: must be a number of at least 1" in one_line(
        ltx("construct", *settings, "selection=feedback", "feedback.reject=0.5")[2]
    )
    assert "say selection=feedback" in one_line(ltx("construct", *settings, "feedback.bound=0.01")[2])
    assert "there are smallest, best" in one_line(ltx("subset-sum", "selection=feedback", "problems=10")[2])
