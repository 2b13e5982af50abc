"""`ltx tables`: which results are in a table, and what its files are called."""

import hashlib
import json
import math
import os
import shutil
from dataclasses import fields

import pandas as pd
import pytest
from conftest import SMOKE, last_line, settings

from ltx.config import FeedbackSettings
from ltx.tasks import tables as task


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "kind", "sums"),
    [
        ("target=mnist", "", ""),
        ("target=resnet22", "", ""),
        ("target=digits", "-digits", ""),
        ("target=mnist data=digits", "-mnist-digits", ""),
        ("target=resnet22 data=digits", "-resnet22-digits", ""),
        (
            "target=digits target.checkpoint=a/digits-tanh-quick-seed0/target.safetensors",
            "-digits-tanh-quick-seed0",
            "",
        ),
        ("target=mnist target.checkpoint=a/mine.pt", "-mine", ""),
        ("target=resnet22 target.checkpoint=a/mine.pt", "-mine", ""),
        ("target.module=a.b:small", "-small-mnist", ""),
        ("target=mnist head=construct", "-construct", ""),
        ("target=resnet22 head=keep scaling=layer_max batch_norm=fold", "-keep-layer_max-fold", ""),
        ("target=digits pair.kernel=3 pair.stride=first", "-digits-pair3-strided", ""),
        ("target=mnist batch_norm=fold law=normal", "-fold-normal", ""),
        ("target=mnist m=12", "", "-m12-eps0.01"),
        ("target=mnist epsilon=0.001", "", "-m15-eps0.001"),
        ("target=mnist selection=best", "", "-best"),
        ("target=mnist selection=feedback m=12", "", "-m12-eps0.01-feedback"),
    ],
)
def test_tables_of_other_tickets_have_files_of_their_own(given, kind, sums):
    """Those of the paper's targets and tickets have the plain names."""
    found = settings(*given.split())
    assert (task._kind(found), task._sums(found)) == (kind, sums)


ENTRY = {
    "kind": "explicit", "seed": 0, "base_set_size": 15, "epsilon": 0.01, "selection": "smallest", "head": "keep",
    "scaling": "unit", "batch_norm": "keep", "target_sha256": "a", "data": "mnist", "activation": "relu",
    "construction": "L+1",
}  # fmt: skip
CHOSEN = ENTRY | {"selection": "feedback"} | {f"feedback_{f.name}": f.default for f in fields(FeedbackSettings)}
SAMPLED = {key: value for key, value in ENTRY.items() if key not in ("scaling", "batch_norm", "data")} | {
    "kind": "sampled", "construction": "sampled",
}  # fmt: skip


def entries(folders, names, *given, digests, **how):
    """What tables take of the first file of those names in each folder that will do, without what they add."""

    def candidates(folder):
        return [folder / name for name in names if (folder / name).is_file()]

    return task._entries(folders, candidates, settings("target=mnist", *given), digests, **how)


def without(entry, key):
    return {name: value for name, value in entry.items() if name != key}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("entry", "smallest", "best", "any_sums"),  # in the tables of that selection, in the figure of deviations
    [
        (ENTRY, True, False, True),
        (ENTRY | {"selection": "best"}, False, True, True),
        (CHOSEN, True, False, True),
        (CHOSEN | {"scaling": "layer_max", "base_set_size": 9}, True, False, True),
        (CHOSEN | {"head": "construct"}, False, False, False),
        (CHOSEN | {"epsilon": 0.1}, False, False, True),
        (ENTRY | {"base_set_size": 12}, False, False, True),
        (ENTRY | {"epsilon": 0.1}, False, False, True),
        (ENTRY | {"head": "construct"}, False, False, False),
        (ENTRY | {"scaling": "layer_max"}, False, False, False),
        (ENTRY | {"batch_norm": "fold"}, False, False, False),
        (ENTRY | {"pair_kernel": 3}, False, False, False),
        (ENTRY | {"pair_stride": "first"}, False, False, False),
        (ENTRY | {"law": "uniform"}, True, False, True),
        (ENTRY | {"law": "normal"}, False, False, False),
        (ENTRY | {"target_sha256": "b"}, False, False, False),
        (ENTRY | {"data": "digits"}, False, False, False),
        (ENTRY | {"seed": None}, False, False, False),
        (ENTRY | {"seed": True}, False, False, False),
        (ENTRY | {"epsilon": math.nan}, False, False, False),
        (ENTRY | {"law": None}, False, False, False),
        (ENTRY | {"construction": "3L"}, False, False, False),
        (ENTRY | {"kind": "other"}, False, False, False),
        (without(ENTRY, "head"), False, False, False),
        (without(ENTRY, "activation"), False, False, False),
        (without(ENTRY, "data"), True, False, True),
        (without(CHOSEN, "feedback_penalty"), False, False, False),
        (SAMPLED, True, False, True),
        (SAMPLED | {"head": "construct"}, False, False, False),
        (SAMPLED | {"base_set_size": 12}, False, False, True),
        (SAMPLED | {"law": "uniform", "scaling": "unit", "batch_norm": "keep"}, True, False, True),
        ([ENTRY], False, False, False),
    ],
)
def test_which_results_are_in_a_table(entry, smallest, best, any_sums, tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(entry))
    for selection, expected in (("smallest", smallest), ("best", best)):
        for how, many in (({}, expected), ({"any_sums": True}, any_sums)):
            found = entries(
                [tmp_path], ["result.json"], f"selection={selection}", digests={"a": {"data": "mnist"}}, **how
            )
            assert len(found) == many
            assert all(entry.items() <= one.items() for one in found)


def test_a_copy_of_a_ticket_is_no_other_seed(tmp_path, caplog):
    caplog.set_level("INFO")
    for n, seed in enumerate((0, 1, 1, 2)):
        (tmp_path / str(n)).mkdir()
        (tmp_path / str(n) / "result.json").write_text(json.dumps(ENTRY | {"seed": seed}))
    found = entries(tmp_path.iterdir(), ["result.json"], digests={"a": {}})
    assert [one["seed"] for one in found] == [0, 1, 2]
    assert f"{tmp_path}/2/result.json: left out, it is of the same settings and seed as {tmp_path}/1" in caplog.text


def test_the_next_file_of_a_ticket_counts_where_the_first_is_none(tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "ticket.safetensors").write_bytes(b"ticket")
    digest = hashlib.sha256(b"ticket").hexdigest()
    (tmp_path / "b.json").write_text(json.dumps(ENTRY | {"ticket_sha256": digest}))
    for bad, said in ("{", "cannot be read"), (json.dumps(ENTRY | {"ticket_sha256": "0"}), "is another one"):
        (tmp_path / "a.json").write_text(bad)
        (found,) = entries([tmp_path], ["a.json", "b.json"], digests={"a": {}})
        assert found["ticket_sha256"] == digest
        assert said in caplog.text


def test_a_failure_beside_a_ticket_is_of_an_earlier_try(tmp_path):
    (tmp_path / "failure.json").touch()
    assert list(task._failures(tmp_path)) == [tmp_path / "failure.json"]
    (tmp_path / "ticket.safetensors").touch()
    assert not list(task._failures(tmp_path))


def test_deviations_of_most_images_come_first(tmp_path):
    for name in ("deviation-limit9", "deviation", "deviation-limit20", "deviation-limit100"):
        (tmp_path / f"{name}.json").touch()
    found = [path.stem for path in task._deviations(tmp_path)]
    assert found == ["deviation", "deviation-limit100", "deviation-limit20", "deviation-limit9"]


@pytest.mark.parametrize("other", ["law=normal", "scaling=layer_max", "batch_norm=fold", "pair.kernel=3"])
def test_sampled_errors_are_in_no_table_of_another_source(other, tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(SAMPLED))
    assert len(entries([tmp_path], ["result.json"], digests={"a": {}})) == 1
    assert entries([tmp_path], ["result.json"], other, digests={"a": {}}) == []


@pytest.mark.slow
def test_tables_say_which_target_is_not_the_one_of_the_settings(outputs, ltx):
    status, _, err = ltx("tables", *SMOKE, "target.density=0.5", f"output_dir={outputs}")
    assert status == 1
    assert "was trained with other settings (density 0.1, now 0.5)" in err
    assert "its results are left out" in err


@pytest.mark.slow
def test_tables_leave_out_results_of_another_ticket(outputs, ltx, tmp_path):
    target = outputs / "targets/digits-relu-smoke-seed0/target.safetensors"
    given = [*SMOKE, f"target.checkpoint={target}"]
    tickets = []
    for seed in (0, 1):
        tickets.append(last_line(ltx("construct", *given, f"seed={seed}")[1]))
        assert ltx("eval", *given, f"seed={seed}")[0] == 0
    os.utime(tickets[0])  # as a copy has: the same ticket
    assert ltx("tables", *given)[0] == 0
    table = pd.read_csv(tmp_path / "tables" / "results-digits-relu-smoke-seed0.csv")
    assert sorted(table.seed) == [0, 1]
    tickets[0].write_bytes(tickets[1].read_bytes())
    status, _, err = ltx("tables", *given)
    assert (status, "the ticket beside it is another one; run ltx eval again" in err) == (0, True)
    assert pd.read_csv(tmp_path / "tables" / "results-digits-relu-smoke-seed0.csv").seed.tolist() == [1]
    os.utime(tickets[0], (0, 0))  # as a copy with its times has: another one all the same
    assert "the ticket beside it is another one" in ltx("tables", *given)[2]
    for ticket in tickets:  # results may be kept without them
        ticket.unlink()
    assert ltx("tables", *given)[0] == 0
    assert sorted(pd.read_csv(tmp_path / "tables" / "results-digits-relu-smoke-seed0.csv").seed) == [0, 1]


@pytest.mark.slow
def test_tables_leave_out_files_that_are_no_results(outputs, ltx, tmp_path):
    given = [*SMOKE, f"target.checkpoint={outputs / 'targets/digits-relu-smoke-seed0/target.safetensors'}"]
    for seed in (0, 1):
        result = last_line(ltx("construct", *given, f"seed={seed}")[1]).with_name("result.json")
        assert ltx("eval", *given, f"seed={seed}")[0] == 0
    whole = json.loads(result.read_text())
    failure = tmp_path / "tickets" / "any" / "any" / "failure.json"
    failure.parent.mkdir(parents=True)
    failure.write_text("[1]")
    for other in (3, [whole], {**whole, "ticket_accuracy": "98"}, {n: v for n, v in whole.items() if n != "agreement"}):
        result.write_text(json.dumps(other))
        status, _, err = ltx("tables", *given)
        assert (status, err.count(f"{result}: left out, cannot be read")) == (0, 1)
        assert pd.read_csv(tmp_path / "tables" / "results-digits-relu-smoke-seed0.csv").seed.tolist() == [0]


@pytest.mark.slow
def test_tables_say_that_a_target_is_damaged(outputs, ltx, tmp_path):
    shutil.copytree(outputs, tmp_path, dirs_exist_ok=True)
    assert ltx("tables", *SMOKE)[0] == 0
    damaged = tmp_path / "targets" / "digits-tanh-smoke-seed0" / "target.safetensors"
    damaged.parent.mkdir(exist_ok=True)
    damaged.write_bytes(b"hello")
    status, _, err = ltx("tables", *SMOKE)
    assert (status, f"{damaged}: " in err, "its results are left out" in err) == (0, True, True)


@pytest.mark.slow
def test_tables_say_which_results_they_leave_out(outputs, ltx, tmp_path):
    shutil.copytree(outputs, tmp_path / "again", ignore=shutil.ignore_patterns("tables"))
    again = f"output_dir={tmp_path / 'again'}"
    for seed, limit in ((1, "null"), (2, "50")):
        for command in ("construct", "eval"):
            assert ltx(command, *SMOKE, f"seed={seed}", f"limit={limit}", again)[0] == 0
    left = "Results on another number of images than most of their row, left out: 1."
    for limit, out in (("null", False), ("50", True)):
        status, _, err = ltx("tables", *SMOKE, f"limit={limit}", again)
        assert (status, left in err) == (0, out)
        for number in (1, 2):
            assert (left in (tmp_path / f"again/tables/table{number}-digits.md").read_text()) == out


@pytest.mark.slow
def test_tables_of_another_scaling_have_names_of_their_own(outputs, ltx):
    given = ("target=digits", "protocol=smoke", "construction=L+1", "scaling=layer_max")
    for command in ("construct", "eval", "tables"):
        assert ltx(command, *given, output_dir=outputs)[0] == 0
    page = (outputs / "tables" / "table1-digits-layer_max.md").read_text()
    assert "head: keep, scaling: layer_max;" in page
    assert ltx("tables", *given[:3], output_dir=outputs)[0] == 0
    assert "scaling" not in (outputs / "tables" / "table1-digits.md").read_text()


@pytest.mark.slow
def test_tables_say_what_could_not_be_constructed(outputs, ltx):
    settings = ("target=digits", "protocol=smoke", "epsilon=0.002", "m=9", "construction=2L")
    assert ltx("construct", *settings, "seed=5", output_dir=outputs)[0] == 1
    assert ltx("tables", *settings, output_dir=outputs)[0] == 1  # no result at all
    done = ("target=digits", "protocol=smoke", "epsilon=0.002", "m=14", "construction=L+1")
    for command in ("construct", "eval"):
        assert ltx(command, *done, output_dir=outputs)[0] == 0
    failure = next(outputs.glob("tickets/*/2L-m9*/failure.json"))
    assert "none of" in json.loads(failure.read_text())["error"]
    said = json.loads(failure.read_text()) | {"base_set_size": 14}
    elsewhere = outputs / "tickets" / "digits" / "failed" / "failure.json"
    elsewhere.parent.mkdir(parents=True)
    elsewhere.write_text(json.dumps(said))
    assert ltx("tables", *done, output_dir=outputs)[0] == 0
    assert (
        "Not constructed, and not in the means: ReLU, 2L, seed 5 (layer"
        in (outputs / "tables" / "table1-digits-m14-eps0.002.md").read_text()
    )
