"""The command line, in one process, on the embedded digits."""

import errno
import gc
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMOKE, last_line, one_line, small_cnn

from ltx import Ticket, cli, data
from ltx.files import read_tensors
from ltx.help import PLAIN, SETTINGS
from ltx.tasks import construct, subset_sum, tables


def test_help_is_quick_and_lists_the_commands():
    there = "import sys; from ltx import cli; cli.run(['--help']); print({'torch', 'hydra'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", there], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.endswith("set()\n"), "what takes seconds to load"
    assert done.returncode == 0
    assert all(f"  {command} " in done.stdout for command in cli.COMMANDS)


def test_version(ltx):
    assert ltx("--version")[:2] == (0, "ltx 0.1.0\n")
    assert ltx("construct", "m=3", "--version")[:2] == (0, "ltx 0.1.0\n")


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_command_help_lists_the_settings(command, ltx):
    status, out, _ = ltx(command, "--help")
    assert status == 0
    of_targets = command not in PLAIN
    assert ("activation=relu" in out) == of_targets
    assert ("epsilon=0.01" in out) == (command not in ("train-target", "page"))
    assert "output_dir=outputs" in out
    assert ("pair.kernel=1" in out) == ("target.checkpoint=null" in out) == (of_targets and command != "train-target")
    assert ("sampled" in out) == (of_targets and command not in ("train-target", "bounds"))
    assert ("[TICKET ...]" in out) == (command in ("eval", "verify", "certify", "export"))
    assert ("a trained target is found by" in out) == (of_targets and command != "train-target")


def test_help_states_the_settings_as_they_are(ltx):
    import yaml

    _, out, _ = ltx("construct", "target=mnist", "--cfg", "job", "--resolve")
    config = yaml.safe_load(out)
    seen = set()
    for key, default, *_ in SETTINGS:
        if key in ("target", "data", "protocol", "experiment"):
            seen.add(key)
            continue
        value = config
        for part in key.split("."):
            value = value[part]
        assert value == yaml.safe_load(default) or key == "output_dir", key
        seen.add(key.split(".")[0])
    assert set(config) <= seen | {"data"}


@pytest.mark.slow
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
    said = read_tensors(outputs / "targets/digits-relu-smoke-seed0/target.safetensors")[1]
    assert float(said["accuracy"]) == pytest.approx(result["target_accuracy"], abs=1e-3)  # of the same test images

    status, out, err = ltx("tables", *SMOKE, output_dir=outputs)
    assert status == 0
    folder = last_line(out)
    assert {p.name for p in folder.iterdir()} >= {f"table{n}-digits.{e}" for n in (1, 2) for e in ("csv", "md", "tex")}


def test_training_sees_no_test_image(ltx, monkeypatch, tmp_path):
    seen = []

    def train(model, train_split, test_split, *_, **__):
        seen.extend([train_split, test_split])
        raise KeyboardInterrupt

    monkeypatch.setattr("ltx.training.train", train)
    assert ltx("train-target", *SMOKE)[0] == 130
    assert [len(split) for split in seen] == [1437, 360]
    wanted = [data.load("digits", train=train) for train in (True, False)]
    assert all(torch.equal(split.images, want.images) for split, want in zip(seen, wanted, strict=True))
    assert not (seen[0].images.flatten(1)[:, None] == seen[1].images.flatten(1)[:9]).all(2).any()


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
    assert "% of them have no such subset among 2 values" in one_line(
        "\n".join(e for e in err.splitlines() if e.startswith("ltx:"))
    )


@pytest.mark.parametrize(
    ("sweep", "hint"),
    [
        ("seed=range(3,0)", "nothing to do"),
        ("protocol=glob(zz*)", "it has paper, quick, smoke"),
        ("activation=glob(t*)", "list values as A,B"),
    ],
)
def test_a_sweep_without_values_is_not_done(sweep, hint, ltx):
    status, out, err = ltx("construct", "--multirun", *SMOKE, sweep)
    assert (status, out) == (1, "")
    assert f"{sweep}: has no values" in one_line(err)
    assert hint in err


@pytest.mark.slow
def test_a_glob_that_finds_files_is_a_sweep(outputs, ltx, tmp_path):
    status, out, _ = ltx("construct", "--multirun", *SMOKE, "protocol=glob(smo*)", output_dir=outputs)
    assert (status, len(out.splitlines())) == (0, 1)
    (tmp_path / "protocol").mkdir()
    shutil.copy(ROOT / "conf" / "protocol" / "smoke.yaml", tmp_path / "protocol" / "mine.yaml")
    for flag in (["--config-dir", str(tmp_path)], [f"--config-dir={tmp_path}"]):
        status, out, _ = ltx("construct", "--multirun", *SMOKE, "protocol=glob(min*)", *flag, output_dir=outputs)
        assert (status, len(out.splitlines())) == (0, 1)
        status, _, err = ltx("construct", "--multirun", *SMOKE, "protocol=glob(zz*)", *flag, output_dir=outputs)
        assert (status, "it has mine, paper, quick, smoke" in err) == (1, True)
    status, _, err = ltx("construct", "--multirun", *SMOKE, "hydra/launcher=glob(*)")
    assert (status, "Sweeping over Hydra's configuration is not supported" in one_line(err)) == (1, True)


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
    for command in ("eval", "export", "certify"):
        status, _, err = ltx(command, str(tmp_path / "tampered.safetensors"), f"output_dir={outputs}")
        assert (status, "is not valid: layer 2, row" in one_line(err)) == (1, True)
        assert [file.name for file in tmp_path.iterdir()] == ["tampered.safetensors"]


def test_tickets_side_by_side_in_a_folder(outputs, ltx, tmp_path):
    """Each has results of its own, which say of its construction what is known of this one."""
    how = {}
    for seed, name in ((0, "a"), (1, "b")):
        made = last_line(ltx("construct", *SMOKE, f"seed={seed}", f"output_dir={outputs}")[1])
        shutil.copy(made, tmp_path / f"{name}.safetensors")
        how[name] = json.loads(made.with_name("construction.json").read_text())
    shutil.copy(made.with_name("construction.json"), tmp_path)  # b's
    assert (
        ltx("eval", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), f"output_dir={outputs}")[0] == 0
    )
    found = {name: json.loads((tmp_path / f"{name}.result.json").read_text()) for name in how}
    assert [found[name]["seed"] for name in how] == [0, 1]
    assert [found[name]["problems"] for name in how] == [None, how["b"]["problems"]]
    assert (tmp_path / "a.deviation.json").is_file()
    assert not (tmp_path / "result.json").exists()


def test_eval_of_a_fixed_random_subset(outputs, ltx):
    status, out, err = ltx("eval", *SMOKE, "limit=100", output_dir=outputs)
    assert status == 0
    assert "fixed random subset of 100" in err
    assert json.loads(last_line(out).read_text())["examples"] == 100


@pytest.mark.slow
@pytest.mark.parametrize("how", ["L+1", "sampled"])
@pytest.mark.parametrize("head", ["keep", "construct"])
def test_layers_without_a_weight_above_epsilon_are_named(how, head, outputs, ltx, tmp_path):
    file = next(outputs.glob("targets/*/target.safetensors"))
    state = read_tensors(file)[0]
    largest = {name: float(state[f"{name}.weight"].abs().max()) for name in ("0", "2", "5")}
    for epsilon in (min(largest.values()) / 2, *largest.values()):
        dropped = [name for name in largest if largest[name] <= epsilon and (name != "5" or head == "construct")]
        settings = (*SMOKE, f"construction={how}", f"head={head}", f"epsilon={epsilon!r}", f"target.checkpoint={file}")
        status, _, err = ltx("construct", *settings, output_dir=tmp_path)
        assert status == 0
        assert ("up to which parameters are dropped" in err) == bool(dropped)
        assert not dropped or f"no weight of {', '.join(dropped)} exceeds epsilon=" in err


# strict, and as Python has it in the C locale
ENCODINGS = [("utf-8", "strict"), ("ascii", "strict"), ("ascii", "surrogateescape")]


def printed(monkeypatch, encoding, errors, *arguments):
    """What `ltx ARGUMENTS` writes, in bytes, where stdout has such an encoding; the status has to be 0."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors))
        patch.setattr(sys, "argv", ["ltx", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 0
        return sys.stdout.buffer.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(("encoding", "errors"), ENCODINGS)
def test_an_output_that_lacks_the_signs_of_a_table(outputs, ltx, tmp_path, monkeypatch, encoding, errors):
    shutil.copytree(outputs, tmp_path / "again", ignore=shutil.ignore_patterns("tables"))
    settings = (*SMOKE, f"output_dir={tmp_path / 'again'}")
    for command in ("construct", "eval"):
        assert ltx(command, *settings, "seed=1")[0] == 0
    done = printed(monkeypatch, encoding, errors, "tables", *settings).decode(encoding)
    table = (tmp_path / "again" / "tables" / "table1-digits.md").read_text(encoding="utf-8").split("\n\n")[1]
    assert "±" in table
    assert (table if encoding == "utf-8" else table.replace("±", "?")) in done


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text elsewhere")
@pytest.mark.parametrize(("encoding", "errors"), ENCODINGS)
def test_a_path_that_is_no_text_is_printed_as_it_is(tmp_path, monkeypatch, encoding, errors):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    done = printed(monkeypatch, encoding, errors, "subset-sum", "problems=100", f"output_dir='{folder}'")
    assert os.path.isfile(done.splitlines()[-1])


def test_garbage_is_collected_while_a_command_works(monkeypatch):
    """Not while it imports; and whatever becomes of it."""
    seen = []
    monkeypatch.setattr(subset_sum, "run", lambda _: seen.append(gc.isenabled()))
    printed(monkeypatch, "utf-8", "strict", "subset-sum", "problems=100")
    assert (seen, gc.isenabled()) == ([True], True)
    monkeypatch.setattr(sys, "argv", ["ltx", "subset-sum", "problems=-1"])
    with pytest.raises(SystemExit):
        cli.main()
    assert gc.isenabled()


@pytest.mark.slow
def test_the_output_of_a_process_of_its_own(tmp_path):
    """Whose stdout Python has opened."""
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    command = [sys.executable, "-m", "ltx.cli", "subset-sum", "problems=100", b"output_dir='" + folder + b"'"]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert os.path.isfile(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_from_a_notebook_whose_backend_is_not_here(outputs):
    tables = [sys.executable, "-m", "ltx.cli", "tables", *SMOKE, f"output_dir={outputs}"]
    there = os.environ | {"MPLBACKEND": "module://of_a_notebook.backend_inline"}
    done = subprocess.run(tables, capture_output=True, text=True, cwd=ROOT, env=there)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
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


def test_file_names_with_blanks_and_quotes(outputs, ltx, tmp_path):
    odd = tmp_path / "it's a ticket, really = yes.safetensors"
    odd.write_bytes(next((outputs / "tickets").glob("*/L+1*seed0/ticket.safetensors")).read_bytes())
    assert ltx("verify", str(odd), f"output_dir={outputs}")[0] == 0


@pytest.mark.slow
def test_every_experiment_composes(ltx, monkeypatch):
    monkeypatch.setattr(construct, "run", lambda settings: settings.target.network)
    monkeypatch.setattr(tables, "run", lambda settings: settings.target.network)
    for path in sorted((ROOT / "conf" / "experiment").glob("*.yaml")):
        status, out, err = ltx("construct", f"experiment={path.stem}")
        assert status == 0, err
        assert out in ("mnist_cnn\n", "resnet22\n")
        assert f"experiment={path.stem} is a sweep, of which this is one run: add --multirun for all" in one_line(err)
        assert ltx("tables", f"experiment={path.stem}") == (0, out, "")


@pytest.mark.slow
def test_a_whole_experiment_is_not_one_run_of_it(ltx, monkeypatch, tmp_path):
    monkeypatch.setattr(construct, "run", lambda settings: settings.selection.value)
    given = ("construct", "--multirun", "experiment=mnist_tables", "seed=0", f"hydra.sweep.dir={tmp_path}")
    status, out, err = ltx(*given)
    assert (status, out.splitlines(), "ltx:" in err) == (0, ["smallest"] * 8, False), err


def test_environment_is_left_as_it_was(ltx, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")  # what the command itself sets, for the whole process
    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")
    before = dict(os.environ)
    ltx("construct", "m=0")
    assert dict(os.environ) == before
