"""What is there already: what serves again, what does not, and what an interrupted or a failed run leaves behind."""

import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT, SMOKE, last_line, one_line, settings

from ltx import Ticket, training
from ltx.files import read_tensors, tensor_hash, write_tensors, write_text
from ltx.tasks import targets_at


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "sigmoid"])
def test_kept_targets_serve_the_default_settings(ltx, tmp_path, activation):
    """A newcomer constructs for MNIST without training anything."""
    status, out, _ = ltx("construct", "target=mnist", f"activation={activation}", output_dir=tmp_path)
    assert status == 0
    assert last_line(out).is_file()
    status, out, err = ltx("train-target", "target=mnist", f"activation={activation}", output_dir=tmp_path)
    assert (status, "there already" in err) == (0, True)


@pytest.mark.slow
def test_training_that_was_interrupted_goes_on_or_with_force_begins_anew(outputs, ltx, monkeypatch, tmp_path):
    plain = training.train

    def interrupted(*args, on_progress, **keywords):
        def show(progress):
            on_progress(progress)
            if progress.round == 2:
                raise KeyboardInterrupt

        return plain(*args, on_progress=show, **keywords)

    begun = tmp_path / "targets" / "digits-relu-smoke-seed0" / "round.safetensors"
    force = ("force=true",)  # the last: what is trained in the place of a target that is there goes on, too
    for first, again, goes_on in (((), (), True), (force, force, False), (force, (), True)):
        monkeypatch.setattr(training, "train", interrupted)
        assert ltx("train-target", *SMOKE, *first)[0] == 130
        assert begun.is_file()
        if first:
            other = ltx("train-target", *SMOKE, "target.density=0.5")
            assert (other[0], "was trained with other settings" in other[2]) == (1, True)
        monkeypatch.setattr(training, "train", plain)
        status, out, err = ltx("train-target", *SMOKE, *again)
        assert (status, f"going on from {begun}" in err) == (0, goes_on)
        assert ("round 1/2" in err, "round 2/2" in err) == (not goes_on, True)
        assert not begun.exists()
        assert tensor_hash(read_tensors(last_line(out))[0]) == tensor_hash(
            read_tensors(outputs / last_line(out).relative_to(tmp_path))[0]
        )


@pytest.mark.parametrize(
    ("key", "value", "serves"),
    [
        ("protocol.epochs", lambda epochs: epochs, True),
        ("protocol.epochs", lambda epochs: epochs - 1, True),  # it was trained for longer
        ("protocol.epochs", lambda epochs: epochs + 1, False),
        ("protocol.rounds", lambda rounds: rounds - 1, False),
        ("protocol.name", lambda name: f"{name}er", False),
        ("target.batch_size", lambda many: many + 1, False),
        ("target.density", lambda share: share / 2, False),
        ("target.seed", lambda seed: seed + 1, False),
        ("use_reference", lambda _: "false", False),
    ],
)
def test_a_kept_target_serves_what_asks_for_no_more(key, value, serves, tmp_path):
    kept = ROOT / "outputs" / "reference" / "targets" / "mnist-relu.safetensors"
    said = read_tensors(kept)[1]
    was = {**json.loads(said["training"]), "name": said["protocol"], "seed": 0}
    given = [f"protocol.{name}={was[name]}" for name in ("name", "rounds", "epochs")]
    given += [f"target.{name}={was[name]}" for name in ("batch_size", "learning_rate", "weight_decay", "density")]
    changed = f"{key}={value(was.get(key.split('.')[-1]))}"
    found = targets_at.find(settings("target=mnist", *given, changed, f"output_dir={tmp_path}"))
    assert found == (kept if serves else None)


@pytest.mark.slow
def test_a_target_depends_on_its_seed_alone(outputs, ltx):
    torch.manual_seed(9)  # whatever the process drew before
    found = []
    for given in ((), ("target.seed=1",)):
        status, out, _ = ltx("train-target", *SMOKE, *given)
        assert status == 0
        found.append(tensor_hash(read_tensors(last_line(out))[0]))
    first = tensor_hash(read_tensors(outputs / "targets/digits-relu-smoke-seed0/target.safetensors")[0])
    assert found[0] == first != found[1]


@pytest.mark.slow
def test_what_lies_in_the_place_of_a_ticket_has_to_be_that_ticket(outputs, ltx, tmp_path):
    shutil.copytree(outputs, tmp_path, dirs_exist_ok=True)
    ticket = last_line(ltx("construct", *SMOKE)[1])
    folder = ticket.parent
    whole = ticket.read_bytes()
    shutil.copytree(folder, folder.with_name(folder.name.replace("seed0", "seed3")))  # of another seed
    status, out, err = ltx("construct", *SMOKE, "seed=3")
    assert (status, "there already" in err, Ticket.load(last_line(out)).seed) == (0, False, 3)
    tensors, said = read_tensors(ticket)
    tensors["2.slots"] = tensors["2.slots"] + 1  # no subnetwork that approximates anything
    write_tensors(ticket, tensors, said)
    status, out, err = ltx("construct", *SMOKE)
    assert (status, "there already" in err) == (0, False)
    assert ticket.read_bytes() == whole


@pytest.mark.slow
def test_a_ticket_without_its_account_is_constructed_again(outputs, ltx, tmp_path):
    """As after a copy of the ticket alone: tables need to know how it was made."""
    target = outputs / "targets/digits-relu-smoke-seed0/target.safetensors"
    given = (*SMOKE, f"target.checkpoint={target}", "seed=5")
    _, out, _ = ltx("construct", *given)
    ticket = last_line(out)
    before, account = ticket.read_bytes(), ticket.with_name("construction.json")
    account.unlink()
    status, out, err = ltx("eval", *given, "limit=20")
    assert status == 0
    result = last_line(out)
    assert "construction.json is not beside it; the result says less" in err
    said = json.loads(result.read_text())
    assert (said["scaling"], said["construction_seconds"]) == (None, None)
    how: dict = {}
    for text in (None, "{}", "{", "[1]", "scaling", "target_sha256"):
        if text in how:  # what another ticket would say
            account.write_text(json.dumps(how | {text: "another"}))
        elif text is not None:
            account.write_text(text)
        status, _, err = ltx("construct", *given)
        how = json.loads(account.read_text())
        assert status == 0
        assert "no construction.json of it and these settings is beside it; constructing it again" in err
        assert ticket.read_bytes() == before
    assert "there already" in ltx("construct", *given)[2]
    status, out, err = ltx("eval", *given, "limit=20")  # of a result that did not say how the ticket was made
    assert (status, "there already" in err) == (0, False)
    assert json.loads(last_line(out).read_text())["scaling"] == "unit"
    account.unlink()  # which does not make the result worse
    assert "there already" in ltx("eval", *given, "limit=20")[2]
    status, out, _ = ltx("tables", *given, "limit=20")
    assert status == 0
    assert "20 test images" in " ".join(out.split())  # in the note


@pytest.mark.slow
def test_a_ticket_is_written_last(outputs, ltx, tmp_path, monkeypatch):
    """Whatever cuts a construction off, where the ticket is the rest is too."""
    target = outputs / "targets/digits-relu-smoke-seed0/target.safetensors"
    given = (*SMOKE, f"target.checkpoint={target}", "seed=6")

    def cut_off(self, path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Ticket, "save", cut_off)
        assert ltx("construct", *given)[0] == 130
    assert [p.name for p in tmp_path.glob("tickets/*/*/*")] == ["construction.json"]
    assert ltx("construct", *given)[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("construction", ["L+1", "sampled"])
def test_other_inputs_are_another_ticket(outputs, ltx, construction):
    """target.input_range decides how a ticket is made, so that one made for another range does not serve."""
    given = ("construct", *SMOKE, "seed=8", f"construction={construction}", "target.input_range=")
    made = {}
    for reach in ("null", "[0,0.5]", "[-5,5]"):
        status, out, err = ltx(*given[:-1], given[-1] + reach, output_dir=outputs)
        assert (status, "there already" in err) == (0, False)
        made[reach] = last_line(out)
        assert "there already" in ltx(*given[:-1], given[-1] + reach, output_dir=outputs)[2]
    assert len(set(made.values())) == 3
    if construction == "L+1":
        assert (Ticket.load(made["[-5,5]"]).input_low, Ticket.load(made["[-5,5]"]).input_high) == (-5, 5)
        usual, narrow = made["null"], made["[0,0.5]"]
        usual.write_bytes(narrow.read_bytes())  # of a version that put both into one folder
        assert "there already" not in ltx(*given[:-1], given[-1] + "null", output_dir=outputs)[2]
        assert Ticket.load(usual).input_low != 0
        for reach in made:
            assert ltx("eval", *given[1:-1], given[-1] + reach, "limit=20", output_dir=outputs)[0] == 0
        status, _, err = ltx("tables", *given[1:-3], given[-1] + "[-5,5]", "limit=20", output_dir=outputs)
        assert status == 0, err
        assert pd.read_csv(outputs / "tables" / "results-digits.csv").seed.tolist() == [8]
        page = (outputs / "tables" / "table1-digits.md").read_text()
        assert page.endswith(" Elements of inputs between -5 and 5.\n")


def test_a_ticket_in_a_folder_that_cannot_be_written_is_not_begun(outputs, ltx, monkeypatch):
    from ltx.tasks import construct

    target = outputs / "targets/digits-relu-smoke-seed0/target.safetensors"
    monkeypatch.setattr(construct, "construct", lambda *_, **__: pytest.fail("was begun"))
    monkeypatch.setattr(construct, "sampled", lambda *_, **__: pytest.fail("was begun"))
    for more in ("construction=L+1", "construction=sampled"):
        status, out, err = ltx("construct", *SMOKE, f"target.checkpoint={target}", more, "output_dir=/dev/null/ltx")
        assert (status, out) == (1, "")
        assert "cannot write /dev/null/ltx" in one_line(err)


def test_training_that_cannot_be_written_is_not_begun(ltx, monkeypatch):
    from ltx import training

    monkeypatch.setattr(training, "train", lambda *_, **__: pytest.fail("was begun"))
    status, out, err = ltx("train-target", *SMOKE, "output_dir=/dev/null/ltx")
    assert (status, out) == (1, "")
    assert "cannot write /dev/null/ltx" in one_line(err)


def test_output_folder_that_cannot_be_written(outputs, ltx):
    target = outputs / "targets/digits-relu-smoke-seed0/target.safetensors"
    status, out, err = ltx("construct", *SMOKE, f"target.checkpoint={target}", output_dir=Path("/dev/null/x"))
    assert (status, out) == (1, "")
    assert "cannot write /dev/null/x" in one_line(err)
    status, _, err = ltx("construct", "--multirun", *SMOKE, "seed=0,1", output_dir=Path("/dev/null/x"))
    assert status == 1
    assert "cannot read or write /dev/null/x" in one_line(err)


def test_a_damaged_ticket_is_constructed_again(outputs, ltx):
    status, out, _ = ltx("construct", *SMOKE, "seed=21", output_dir=outputs)
    path = last_line(out)
    whole = path.read_bytes()
    path.write_bytes(whole[:300])
    status, _, err = ltx("construct", *SMOKE, "seed=21", output_dir=outputs)
    assert status == 0
    assert "constructing it again" in err
    assert path.read_bytes() == whole


def test_a_checkpoint_of_another_network_is_refused(ltx):
    kept = ROOT / "outputs" / "reference" / "targets" / "mnist-relu.safetensors"
    status, _, err = ltx("construct", "target=resnet22", f"target.checkpoint={kept}")
    assert status == 1
    assert "is a mnist_cnn for mnist, target=resnet22 is a resnet22" in one_line(err)


@pytest.mark.slow
def test_a_target_of_other_data_or_another_network_does_not_serve(outputs, ltx):
    for given, difference in (
        ("target.network=resnet22", "network mnist_cnn, now resnet22"),
        ("data.name=mnist", "data digits, now mnist"),
    ):
        for command in ("train-target", "construct"):
            status, _, err = ltx(command, *SMOKE, given, output_dir=outputs)
            assert (status, difference in err) == (1, True), err
    status, _, err = ltx("construct", "target=mnist", "data=digits", "activation=tanh")
    assert (status, "no target at" in err) == (1, True)
    status, _, err = ltx("train-target", "target=mnist", "data=digits", "protocol=smoke", "use_reference=true")
    assert (status, "there already" in err) == (0, False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("target.weight_decay=-1", "target.weight_decay=-1.0: must be a number, at least 0"),
        ("target.weight_decay=nan", "target.weight_decay=nan"),
        ("target.learning_rate=inf", "target.learning_rate=inf: must be a positive number"),
    ],
)
def test_training_settings_without_meaning(ltx, tmp_path, given, message):
    status, _, err = ltx("train-target", *SMOKE, given)
    assert (status, message in one_line(err)) == (1, True)
    assert not list(tmp_path.iterdir())


def test_training_that_diverges_is_no_target(ltx, tmp_path):
    status, out, err = ltx(
        "train-target", *SMOKE, "target.learning_rate=1e30", "target.bound=null", "protocol.rounds=1"
    )
    assert (status, out) == (1, "")
    assert "the loss is nan in round 1, epoch 1; lower target.learning_rate" in err.strip().splitlines()[-1]
    assert not list(tmp_path.rglob("target.safetensors"))
    assert ltx("train-target", *SMOKE, "protocol.rounds=1")[0] == 0  # what it advises works where it was given


def test_damaged_accounts_of_training(outputs, ltx, tmp_path):
    target = outputs / "targets/digits-relu-smoke-seed0/target.safetensors"
    tensors, metadata = read_tensors(target)
    mine = tmp_path / target.relative_to(outputs)
    for change in ({"training": "{"}, {"training": "[1]"}, {"accuracy": "x"}):
        write_tensors(mine, tensors, metadata | change)
        status, _, err = ltx("train-target", *SMOKE)
        assert status == 1
        assert "train again with force=true" in one_line(err)


@pytest.mark.slow
def test_a_ticket_of_other_settings_in_the_folder_does_not_serve(outputs, ltx, tmp_path):
    target = outputs / "targets/digits-relu-smoke-seed0/target.safetensors"
    given = ["construct", *SMOKE, f"target.checkpoint={target}", "selection=feedback", "feedback.samples=50"]
    given += ["feedback.images=8", "m=8"]
    one, two = (last_line(ltx(*given, f"feedback.penalty={penalty}")[1]) for penalty in ("5e-8", "1e-3"))
    whole = one.read_bytes()
    one.write_bytes(two.read_bytes())
    status, _, err = ltx(*given, "feedback.penalty=5e-8")
    assert (status, "there already" in err) == (0, False)
    assert one.read_bytes() == whole
    tensors, metadata = read_tensors(one)
    for change in ({"penalty": -1}, {"sweeps": "4"}, {"images": "8"}, {"images_sha256": 3}):
        feedback = json.loads(metadata["feedback"]) | change
        write_tensors(tmp_path / "other.safetensors", tensors, metadata | {"feedback": json.dumps(feedback)})
        status, _, err = ltx("verify", str(tmp_path / "other.safetensors"))
        assert (status, "damaged metadata" in one_line(err)) == (1, True)
    less = {k: v for k, v in json.loads(metadata["feedback"]).items() if k != "penalty"}
    write_tensors(tmp_path / "other.safetensors", tensors, metadata | {"feedback": json.dumps(less)})
    assert "damaged metadata" in one_line(ltx("verify", str(tmp_path / "other.safetensors"))[2])
    name = next(name for name in tensors if name.endswith(".error"))
    boundless = {**tensors, name: torch.full_like(tensors[name], float("inf"))}
    write_tensors(tmp_path / "other.safetensors", boundless, metadata)
    status, _, err = ltx("verify", str(tmp_path / "other.safetensors"), f"target.checkpoint={target}")
    assert (status, f"{name}: claims an infinite error" in err) == (1, True)


def test_what_a_killed_process_left_is_removed(tmp_path):
    path = tmp_path / "a[1].json"
    old, new, other = (tmp_path / f".{name}.part" for name in ("a[1].json.x1", "a[1].json.x2", "a1.json.x3"))
    for left in (old, new, other):
        left.touch()
    for left in (old, other):
        os.utime(left, (0, 0))
    write_text(path, "{}")
    assert sorted(tmp_path.iterdir()) == sorted([new, other, path])
