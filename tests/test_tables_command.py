"""`ltx tables`: which results are in a table, and what its files are called."""

import json
import os
import shutil

import pandas as pd
import pytest
from conftest import SMOKE, last_line, settings

from ltx.tasks import tables as task


@pytest.mark.parametrize(
    ("given", "kind", "sums"),
    [
        ("target=mnist", "", ""),
        ("target=resnet22", "", ""),
        ("target=digits", "-digits", ""),
        ("target=mnist data=digits", "-mnist", ""),
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
    "scaling": "unit", "batch_norm": "keep", "target_sha256": "a", "data": "mnist",
}  # fmt: skip


SAMPLED = {key: ENTRY[key] for key in ("seed", "base_set_size", "epsilon", "selection", "head", "target_sha256")}


@pytest.mark.parametrize(
    ("entry", "smallest", "best", "any_sums"),  # in the tables of that selection, in the figure of deviations
    [
        (ENTRY, True, False, True),
        (ENTRY | {"selection": "best"}, False, True, True),
        (ENTRY | {"selection": "feedback"}, True, False, True),
        (ENTRY | {"selection": "feedback", "scaling": "layer_max", "base_set_size": 9}, True, False, True),
        (ENTRY | {"selection": "feedback", "head": "construct"}, False, False, False),
        (ENTRY | {"selection": "feedback", "epsilon": 0.1}, False, False, True),
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
        (SAMPLED, True, False, True),
        (SAMPLED | {"head": "construct"}, False, False, False),
        (SAMPLED | {"base_set_size": 12}, False, False, True),
        (SAMPLED | {"law": "uniform", "scaling": "unit", "batch_norm": "keep"}, True, False, True),
        ([ENTRY], False, False, False),
    ],
)
def test_which_results_are_in_a_table(entry, smallest, best, any_sums, tmp_path):
    file = tmp_path / "result.json"
    file.write_text(json.dumps(entry))
    digests = {"a": {"data": "mnist"}}
    for selection, expected in (("smallest", smallest), ("best", best)):
        found = task._entries([file], settings("target=mnist", f"selection={selection}"), digests)
        assert found == [entry] * expected
        found = task._entries([file], settings("target=mnist", f"selection={selection}"), digests, any_sums=True)
        assert found == [entry] * any_sums


@pytest.mark.parametrize("other", ["law=normal", "scaling=layer_max", "batch_norm=fold", "pair.kernel=3"])
def test_sampled_errors_are_in_no_table_of_another_source(other, tmp_path):
    file, digests = tmp_path / "result.json", {"a": {}}
    file.write_text(json.dumps(SAMPLED))
    assert task._entries([file], settings("target=mnist"), digests) == [SAMPLED]
    assert task._entries([file], settings("target=mnist", other), digests) == []


def test_tables_say_which_target_is_not_the_one_of_the_settings(outputs, ltx):
    status, _, err = ltx("tables", *SMOKE, "target.density=0.5", f"output_dir={outputs}")
    assert status == 1
    assert "was trained with other settings (density 0.1, now 0.5)" in err
    assert "its results are left out" in err


def test_tables_leave_out_results_of_another_ticket(outputs, ltx, tmp_path):
    target = outputs / "targets/digits-relu-smoke-seed0/target.safetensors"
    given = [*SMOKE, f"target.checkpoint={target}"]
    tickets = []
    for seed in (0, 1):
        tickets.append(last_line(ltx("construct", *given, f"seed={seed}")[1]))
        assert ltx("eval", *given, f"seed={seed}")[0] == 0
    os.utime(tickets[0])  # as a copy has: the same ticket
    assert ltx("tables", *given)[0] == 0
    table = pd.read_csv(tmp_path / "tables" / "results-target.csv")
    assert sorted(table.seed) == [0, 1]
    tickets[0].write_bytes(tickets[1].read_bytes())
    status, _, err = ltx("tables", *given)
    assert (status, "the ticket beside it is another one; run ltx eval again" in err) == (0, True)
    assert pd.read_csv(tmp_path / "tables" / "results-target.csv").seed.tolist() == [1]
    os.utime(tickets[0], (0, 0))  # as a copy with its times has: another one all the same
    assert "the ticket beside it is another one" in ltx("tables", *given)[2]
    for ticket in tickets:  # results may be kept without them
        ticket.unlink()
    assert ltx("tables", *given)[0] == 0
    assert sorted(pd.read_csv(tmp_path / "tables" / "results-target.csv").seed) == [0, 1]


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
        assert pd.read_csv(tmp_path / "tables" / "results-target.csv").seed.tolist() == [0]


def test_tables_say_that_a_target_is_damaged(outputs, ltx, tmp_path):
    shutil.copytree(outputs, tmp_path, dirs_exist_ok=True)
    assert ltx("tables", *SMOKE)[0] == 0
    damaged = tmp_path / "targets" / "digits-tanh-smoke-seed0" / "target.safetensors"
    damaged.parent.mkdir(exist_ok=True)
    damaged.write_bytes(b"hello")
    status, _, err = ltx("tables", *SMOKE)
    assert (status, f"{damaged}: " in err, "its results are left out" in err) == (0, True, True)
