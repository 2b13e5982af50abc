"""Mistakes on the command line: one line that says what to do, and nothing half-written."""

import importlib
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMOKE, one_line

from ltx.files import write_tensors
from ltx.help import SUMS, override
from ltx.subset_sum import statistics


@pytest.mark.parametrize("command", SUMS)
@pytest.mark.parametrize(("folder", "message"), [("/dev/null/ltx", "cannot write /dev/null/ltx"), ("", "is empty")])
def test_a_folder_that_cannot_be_written_is_found_out_before_the_work(ltx, command, folder, message, monkeypatch):
    monkeypatch.setattr(statistics, "draw", lambda *_, **__: pytest.fail("problems were drawn"))
    status, out, err = ltx(command, f"output_dir={folder}")
    assert (status, out) == (1, "")
    assert message in one_line(err)


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
        (["construct", "law=product"], "law 'product' is not known; there are uniform, normal"),
        (["construct", "construction=sampled", "law=product"], "law 'product' is not known; there are uniform, normal"),
        (["bounds", "law=product"], "law 'product' is not known; there are uniform, normal"),
        (["subset-sum", "law=cauchy"], "expected one of [uniform, product, normal, normal_product]"),
        (["subset-sum", "problems=1"], "between 2 and 100000000"),
        (["subset-sum", "problems=1e9"], "1e9"),
        (["figures", "m=33"], "between 1 and 32"),
        (["bench", "seconds=0"], "seconds=0.0"),
        (["bench", "m=10"], "ltx bench has no setting 'm'"),
        (["figures", "selection=best"], "ltx figures has no setting 'selection'"),
        (["figures", "law=product"], "law 'product' is not known; there are uniform, normal"),
        (["subset-sum", "target=digits"], "ltx subset-sum has no setting 'target'"),
        (["train-target", "seed=3"], "target.seed"),
        (["train-target", "protocol.rounds=0"], "at least 1"),
        (["train-target", "target.density=2"], "(0, 1]"),
        (["train-target", "target.bound=1e300"], "target.bound=1e+300: must be a positive number below 1e38"),
        (["bounds", "bounds.single=1e300"], "bounds.single=1e+300: must be a positive number, at most 10,000"),
        (["subset-sum", "theta=1e300"], "theta=1e+300: must be a number of at most 1e100 in magnitude"),
        (
            ["construct", "--multirun", "hydra/launcher=none"],
            "install its plugin in ltx's clone: pip install -e '.[joblib]'",
        ),
        (["construct", "target=null"], "Got NoneType; ltx COMMAND --help lists the settings"),
        (["construct", "--multirun", "m=3,4", "--cfg", "job"], "Only one of --run, --multirun, --cfg"),
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


@pytest.mark.slow
def test_a_file_and_settings_of_another_ticket(ltx, tmp_path):
    """Which would be taken for a stricter check, or for another ticket, than the one that is looked at."""
    given = ("target=digits", "protocol=smoke")
    for command in ("train-target", "construct"):
        status, out, err = ltx(command, *given, "epsilon=0.02")
        assert status == 0, err
    file = out.splitlines()[-1]
    its = {"epsilon=0.0001": "0.02", "m=7": "15", "seed=3": "0", "activation=tanh": "relu", "construction=2L": "L+1",
           "selection=best": "smallest", "law=normal": "uniform"}  # fmt: skip
    for other in its:
        status, out, err = ltx("verify", file, other)
        assert (status, out) == (1, "")
        assert f"{other} has no meaning for ticket {file}, which has {its[other]}; leave it out" in one_line(err)
    its = {"scaling=layer_max": "unit", "head=construct": "keep", "batch_norm=fold": "keep", "pair.kernel=3": "1",
           "pair.stride=first": "second"}  # fmt: skip
    for other in its:
        assert f"{other} has no meaning for ticket" in one_line(ltx("verify", file, other)[2])
    for same in ("epsilon=0.02", "m=15", "construction=L+1", "limit=5", "pair.kernel=1", "scaling=unit"):
        assert ltx("verify", file, same)[0] == 0
    # also where it is the usual value, of which the ticket has another
    assert "epsilon=0.01 has no meaning for ticket" in one_line(ltx("verify", file, "epsilon=0.01")[2])
    alone = tmp_path / "alone.safetensors"  # does not say all of it
    alone.write_bytes(Path(file).read_bytes())
    assert ltx("verify", str(alone), "head=construct")[0] == 0


@pytest.mark.slow
def test_the_command_that_trains_a_missing_target_is_the_one_that_helps(ltx, tmp_path):
    """Also where it is sought in a folder of its own, of a seed and with settings of training of its own."""
    where = tmp_path / "outputs in ü, b(c), 'd'"
    given = ("construct", "target=digits", "protocol=smoke", "target.seed=3", override("output_dir", where), "m=14",
             "target.density=0.3", "protocol.epochs=2", "target.bound=null", "use_reference=false",
             "force=true")  # fmt: skip
    _, _, err = ltx(*given)
    assert "m=14" not in err
    assert "force" not in err
    assert err.count("target.seed=3") == 1
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


def test_a_target_of_the_wrong_format_is_no_ticket(ltx, tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"0.weight": torch.zeros(1)}, {"format": "ltx-target/1"})
    status, _, err = ltx("verify", str(path))
    assert status == 1
    assert "name the ticket.safetensors that ltx construct has written, not a target" in one_line(err)


@pytest.mark.parametrize(
    ("command", "task", "setting"),
    [("train-target", "train_target", "target.batch_size"), ("construct", "construct", "device=cpu")],
)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MemoryError()])
def test_out_of_memory_names_the_setting_to_lower(ltx, monkeypatch, command, task, setting, error):
    def run(_):
        raise error

    monkeypatch.setattr(importlib.import_module(f"ltx.tasks.{task}"), "run", run)
    status, out, err = ltx(command, *SMOKE)
    assert (status, out) == (1, "")
    assert "out of memory" in one_line(err)
    assert setting in err
