"""The command line, in one process, on the embedded digits."""

import errno
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMOKE, last_line, one_line, small_cnn

from ltx import Ticket, cli
from ltx.files import write_tensors
from ltx.help import SETTINGS, SUMS, override


def test_help_is_quick_and_lists_the_commands():
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "ltx.cli", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert time.perf_counter() - begin < 1
    assert done.returncode == 0
    assert all(f"  {command} " in done.stdout for command in cli.COMMANDS)


def test_version(ltx):
    assert ltx("--version")[:2] == (0, "ltx 0.1.0\n")


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_command_help_lists_the_settings(command, ltx):
    status, out, _ = ltx(command, "--help")
    assert status == 0
    of_targets = command not in SUMS
    assert ("activation=relu" in out) == of_targets
    assert ("epsilon=0.01" in out) == (command != "train-target")
    assert "output_dir=outputs" in out
    assert ("pair.kernel=1" in out) == ("target.checkpoint=null" in out) == (of_targets and command != "train-target")
    assert ("sampled" in out) == (of_targets and command not in ("train-target", "bounds"))


def test_help_states_the_settings_as_they_are(ltx):
    import yaml

    _, out, _ = ltx("construct", "target=mnist", "--cfg", "job", "--resolve")
    config = yaml.safe_load(out)
    seen = set()
    for key, default, *_ in SETTINGS:
        if key in ("target", "protocol", "experiment"):
            seen.add(key)
            continue
        value = config
        for part in key.split("."):
            value = value[part]
        assert value == yaml.safe_load(default) or key == "output_dir", key
        seen.add(key.split(".")[0])
    assert set(config) <= seen | {"data"}


def test_several_tickets_are_each_looked_at(outputs, ltx, tmp_path):
    ticket = next((outputs / "tickets").glob("*/*/ticket.safetensors"))
    other = tmp_path / "other" / "ticket.safetensors"
    other.parent.mkdir()
    other.write_bytes(ticket.read_bytes())
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"hello")
    folder = f"output_dir={outputs}"
    status, out, err = ltx("verify", str(ticket), str(other), folder)
    assert (status, out) == (0, "")
    assert all(f"{path}: " in err for path in (ticket, other))
    for files in ([damaged, ticket], [ticket, damaged]):
        status, _, err = ltx("verify", *map(str, files), folder)
        assert status == 1
        assert f"ticket {damaged}: cannot be read" in err
        assert f"{ticket}: " in err
    status, out, err = ltx("eval", str(damaged), str(ticket), str(other), "limit=20", folder)
    assert status == 1
    assert [Path(line) for line in out.splitlines()] == [p.with_name("result-limit20.json") for p in (ticket, other)]
    status, _, err = ltx("verify", str(other), f"ticket={ticket}", folder)
    assert (status, "both name a ticket" in one_line(err)) == (1, True)


def test_interrupted_commands_do_not_go_on_to_the_next_ticket(ltx, monkeypatch):
    from ltx.tasks import verify

    seen = []

    def interrupted(settings):
        seen.append(settings.ticket)
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "run", interrupted)
    status, _, err = ltx("verify", "one", "two")
    assert (status, seen) == (130, ["one"])
    assert one_line(err) == "ltx: interrupted"


@pytest.mark.parametrize("command", SUMS)
@pytest.mark.parametrize(("folder", "message"), [("/dev/null/ltx", "cannot write /dev/null/ltx"), ("", "is empty")])
def test_a_folder_that_cannot_be_written_is_found_out_before_the_work(ltx, command, folder, message):
    begin = time.perf_counter()
    status, out, err = ltx(command, f"output_dir={folder}")
    assert (status, out) == (1, "")
    assert message in one_line(err)
    assert time.perf_counter() - begin < 2


def test_train_construct_eval_verify_tables(outputs, ltx):
    status, out, err = ltx("train-target", *SMOKE, output_dir=outputs)
    assert status == 0
    assert "there already" in err
    assert out == f"{outputs}/targets/digits-relu-smoke-seed0/target.safetensors\n"

    status, out, err = ltx("construct", *SMOKE, output_dir=outputs)
    assert (status, "there already" in err) == (0, True)
    ticket = last_line(out)
    assert Ticket.load(ticket).construction == "L+1"

    status, out, err = ltx("verify", str(ticket), f"output_dir={outputs}")
    assert status == 0
    assert out == ""
    assert "nothing else is kept" in err

    status, out, err = ltx("eval", *SMOKE, output_dir=outputs)
    assert (status, "there already" in err) == (0, True)
    result = json.loads(last_line(out).read_text())
    expected = {
        "kind", "network", "activation", "construction", "base_set_size", "epsilon", "selection", "seed",
        "target_accuracy", "ticket_accuracy", "target_parameters", "ticket_parameters", "source_parameters",
        "agreement", "max_deviation", "max_parameter_error", "examples", "seconds", "ltx", "torch", "commit",
    }  # fmt: skip
    assert expected <= set(result)
    assert result["examples"] == 360
    assert result["max_parameter_error"] <= 0.01
    assert abs(result["ticket_accuracy"] - result["target_accuracy"]) < 2

    status, out, err = ltx("tables", *SMOKE, output_dir=outputs)
    assert status == 0
    folder = last_line(out)
    assert {p.name for p in folder.iterdir()} >= {f"table{n}-digits.{e}" for n in (1, 2) for e in ("csv", "md", "tex")}


def test_the_same_seed_gives_the_same_file(outputs, ltx, tmp_path):
    """Two runs with one seed, forced to do the work, give identical bytes."""
    target = outputs / "targets/digits-relu-smoke-seed0/target.safetensors"
    paths = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        status, out, _ = ltx("construct", *SMOKE, f"target.checkpoint={target}", "seed=11", output_dir=folder)
        assert status == 0
        paths.append(last_line(out))
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].read_bytes() != next((outputs / "tickets").glob("*/*/ticket.safetensors")).read_bytes()


def test_multirun(outputs, ltx):
    status, out, _ = ltx("construct", "--multirun", *SMOKE, "seed=1,2", "construction=2L,L+1", output_dir=outputs)
    assert status == 0
    assert len(set(out.splitlines())) == 4
    assert all(Path(p).is_file() for p in out.splitlines())


def test_multirun_goes_on_after_a_failure_and_says_so(outputs, ltx):
    status, out, err = ltx("construct", "--multirun", *SMOKE, "m=2,15", "epsilon=0.01", "seed=3", output_dir=outputs)
    assert status == 1
    assert len(out.splitlines()) == 1
    assert "no such subset among 2 values" in one_line("\n".join(e for e in err.splitlines() if e.startswith("ltx:")))


def test_a_given_checkpoint(outputs, ltx, tmp_path):
    model_file = tmp_path / "mine.pt"
    torch.save(small_cnn("relu", channels=32, size=8).state_dict(), model_file)
    status, _, err = ltx("construct", *SMOKE, f"target.checkpoint={model_file}", "m=20", output_dir=outputs)
    assert "5.weight' has shape (3, 2048)" in one_line(err)
    assert status == 1


def test_verify_finds_a_tampered_mask(outputs, ltx, tmp_path):
    path = next((outputs / "tickets").glob("*/L+1*seed0/ticket.safetensors"))
    ticket = Ticket.load(path)
    mask = ticket.masks["2"].clone()
    mask[3] += 1 if mask[4] > mask[3] + 1 else -1
    object.__setattr__(ticket, "masks", {**ticket.masks, "2": mask})
    ticket.save(tmp_path / "tampered.safetensors")
    status, out, err = ltx("verify", str(tmp_path / "tampered.safetensors"), f"output_dir={outputs}")
    assert (status, out) == (1, "")
    assert "is not valid: layer 2, row" in one_line(err)
    status, _, err = ltx("eval", str(tmp_path / "tampered.safetensors"), f"output_dir={outputs}")
    assert status == 1
    assert not (tmp_path / "result.json").exists()


def test_eval_of_a_fixed_random_subset(outputs, ltx):
    status, out, err = ltx("eval", *SMOKE, "limit=100", output_dir=outputs)
    assert status == 0
    assert "fixed random subset of 100" in err
    assert json.loads(last_line(out).read_text())["examples"] == 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune"], "unknown command 'prune'; there are train-target"),
        (["construct", "colour=red"], "'colour'"),
        (["construct", "activation=swish"], "expected one of [relu, leaky_relu, tanh, sigmoid, identity, elu,"),
        (["construct", "construction=3L"], "expected one of [2L, L+1, sampled]"),
        (["construct", "--fast"], "unknown flag '--fast'"),
        (["construct", "m", "15"], "'m' is no setting; settings are written KEY=VALUE"),
        (["construct", "construction=2L,L+1"], "construction"),
        (["construct", "target=imagenet"], "target/imagenet"),
        (["construct", "m=0"], "m=0: the base set size must be at least 1"),
        (["construct", "constructon=2L"], "ltx COMMAND --help lists the settings"),
        (["construct", "+sed=3"], "there is no setting sed; ltx COMMAND --help lists the settings"),
        (["construct", "+feedback.sample=3"], "there is no setting feedback.sample;"),
        (["construct", "head=keep=1"], "head=keep=1: mismatched input"),
        (["construct", "m=33"], "between 1 and 32"),
        (["construct", "m=many"], "many"),
        (["construct", "epsilon=0"], "positive"),
        (["construct", "epsilon=-0.01"], "positive"),
        (["construct", "epsilon=nan"], "positive"),
        (["construct", "epsilon=inf"], "positive"),
        (["construct", "seed=-1"], "seed=-1"),
        (["construct", "target.checkpoint=/nowhere/x.safetensors"], "no such file"),
        (["construct", "protocol=smoke", "target=digits"], "train it with: ltx train-target target=digits"),
        (["eval", "/nowhere/t.safetensors"], "no such file"),
        (["verify", "/nowhere/t.safetensors"], "no such file"),
        (["tables", "target=digits", "m=3"], "no results below"),
        (["subset-sum", "law=cauchy"], "expected one of [uniform, product, normal]"),
        (["subset-sum", "problems=1"], "between 2 and 100000000"),
        (["subset-sum", "problems=1e9"], "1e9"),
        (["figures", "m=33"], "between 1 and 32"),
        (["bench", "seconds=0"], "seconds=0.0"),
        (["bench", "m=10"], "ltx bench has no setting 'm'"),
        (["figures", "law=normal"], "ltx figures has no setting 'law'"),
        (["subset-sum", "target=digits"], "ltx subset-sum has no setting 'target'"),
        (["train-target", "seed=3"], "target.seed"),
        (["train-target", "protocol.rounds=0"], "at least 1"),
        (["train-target", "target.density=2"], "(0, 1]"),
    ],
    ids=" ".join,
)
def test_bad_input_ends_with_one_clear_line(arguments, message, ltx, tmp_path):
    status, out, err = ltx(*arguments, output_dir=None if len(arguments) < 2 else tmp_path)
    assert status != 0
    assert out == ""
    assert message in one_line(err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_where_there_is_none(ltx, tmp_path):
    status, _, err = ltx("construct", "device=cuda", output_dir=tmp_path)
    assert status == 1
    assert "no CUDA device" in one_line(err)


def test_the_command_that_trains_a_missing_target_is_the_one_that_helps(ltx, tmp_path):
    """Also where it is sought in a folder of its own, of a seed of its own."""
    where = tmp_path / "outputs in ü, b(c), 'd'"
    given = ("construct", "target=digits", "protocol=smoke", "target.seed=3", override("output_dir", where))
    _, _, err = ltx(*given)
    advised = shlex.split(one_line(err).split("train it with: ltx ")[1])
    status, _, _ = ltx(*advised)
    assert status == 0
    assert (where / "targets" / "digits-relu-smoke-seed3").is_dir()
    status, _, err = ltx(*given)
    assert status == 0, err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", [(), ("-u",)])
@pytest.mark.parametrize("arguments", [("--help",), ("construct", "--help"), ("bounds", "--cfg", "job")])
def test_an_output_that_takes_nothing(arguments, unbuffered):
    with open("/dev/full", "w") as full:
        command = [sys.executable, *unbuffered, "-m", "ltx.cli", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert one_line(done.stderr) == "ltx: cannot write to the standard output: No space left on device"


def test_an_output_that_lacks_the_signs_of_a_table(outputs, ltx, tmp_path):
    shutil.copytree(outputs, tmp_path / "again", ignore=shutil.ignore_patterns("tables"))
    settings = (*SMOKE, f"output_dir={tmp_path / 'again'}")
    for command in ("construct", "eval"):
        assert ltx(command, *settings, "seed=1")[0] == 0
    tables = [sys.executable, "-m", "ltx.cli", "tables", *settings]
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(tables, capture_output=True, text=True, cwd=ROOT, env=ascii_only)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "again" / "tables" / "table1-digits.md").read_text(encoding="utf-8").split("\n\n")[1]
    assert "±" in table
    assert table.replace("±", "?") in done.stdout


def test_tables_are_written_although_nobody_reads_the_output(outputs, ltx, monkeypatch, tmp_path):
    shutil.copytree(outputs, tmp_path / "again", ignore=shutil.ignore_patterns("tables"))

    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Closed())
        status = cli.run(["tables", "target=digits", "protocol=smoke", f"output_dir={tmp_path / 'again'}"])
        sys.stdout.close()  # what came in its place
    assert status == 1
    assert (tmp_path / "again" / "tables" / "table1-digits.md").is_file()
    assert (tmp_path / "again" / "tables" / "results-digits.csv").is_file()


def test_a_layer_that_loses_every_parameter_is_named(ltx, tmp_path):
    _, _, err = ltx("train-target", "target=digits", "protocol=smoke", "target.density=1e-6", output_dir=tmp_path)
    assert "no parameter is left of 0.weight, 2.weight, 5.weight; a larger target.density" in err


def test_damaged_mnist(ltx, tmp_path):
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (raw / f"{split}-{kind}-ubyte").write_bytes(b"\x00\x00\x08\x03" + bytes(60))
    status, _, err = ltx(
        "train-target", "target=mnist", "use_reference=false", f"data.root={tmp_path / 'data'}",
        output_dir=tmp_path / "out",
    )  # fmt: skip
    assert status == 1
    line = one_line(err)
    assert "MNIST" in line
    assert "damaged" in line
    assert "target=digits" in line
    assert not (tmp_path / "out").exists()


def test_file_names_with_blanks_and_quotes(outputs, ltx, tmp_path):
    odd = tmp_path / "it's a ticket, really = yes.safetensors"
    odd.write_bytes(next((outputs / "tickets").glob("*/L+1*seed0/ticket.safetensors")).read_bytes())
    assert ltx("verify", str(odd), f"output_dir={outputs}")[0] == 0


def test_every_experiment_composes(ltx):
    for path in sorted((ROOT / "conf" / "experiment").glob("*.yaml")):
        status, out, err = ltx("construct", f"experiment={path.stem}", "--cfg", "job")
        assert status == 0, err
        assert "network:" in out


def test_a_target_of_the_wrong_format_is_no_ticket(ltx, tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"0.weight": torch.zeros(1)}, {"format": "ltx-target/1"})
    status, _, err = ltx("verify", str(path))
    assert status == 1
    assert "a target, not a ticket" in one_line(err)


def test_environment_is_left_as_it_was(ltx):
    before = dict(os.environ)
    ltx("construct", "m=0")
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("command", "task", "setting"),
    [("train-target", "train_target", "target.batch_size"), ("construct", "construct", "device=cpu")],
)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MemoryError()])
def test_out_of_memory_names_the_setting_to_lower(ltx, monkeypatch, command, task, setting, error):
    import importlib

    def run(_):
        raise error

    monkeypatch.setattr(importlib.import_module(f"ltx.tasks.{task}"), "run", run)
    status, out, err = ltx(command, *SMOKE)
    assert (status, out) == (1, "")
    assert "out of memory" in one_line(err)
    assert setting in err


def test_tables_of_another_scaling_have_names_of_their_own(outputs, ltx):
    given = ("target=digits", "protocol=smoke", "construction=L+1", "scaling=layer_max")
    for command in ("construct", "eval", "tables"):
        assert ltx(command, *given, output_dir=outputs)[0] == 0
    page = (outputs / "tables" / "table1-digits-layer_max.md").read_text()
    assert "head: keep, scaling: layer_max;" in page
    assert ltx("tables", *given[:3], output_dir=outputs)[0] == 0
    assert "scaling" not in (outputs / "tables" / "table1-digits.md").read_text()


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
