"""What the command line makes of its words before a command begins, and how it says no."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, last_line, one_line
from hydra._internal.hydra import Hydra

from ltx import cli
from ltx.tasks import construct, verify


@pytest.fixture
def built(monkeypatch):
    """The settings that `ltx construct` and `ltx verify` are run with."""
    found = []
    for task in (construct, verify):
        monkeypatch.setattr(task, "run", found.append)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2026_12_01", "1e3", "0x10", "1_0.5", ".5", "-3", "inf", "NaN", "true", "False", "a"])
def test_names_that_look_like_numbers_are_names(name, built, ltx):
    assert ltx("construct", f"output_dir={name}")[0] == 0
    assert ltx("verify", f"+ticket={name}", f"data.root={name}", f"target.checkpoint={name}")[0] == 0
    one, other = built
    assert [one.output_dir, other.ticket, other.data.root, other.target.checkpoint] == [name] * 4


def test_a_sweep_over_names(built, ltx, tmp_path):
    status, _, err = ltx("construct", "--multirun", "output_dir=2026_12_01,b", f"hydra.sweep.dir={tmp_path}")
    assert status == 0, err
    assert [settings.output_dir for settings in built] == ["2026_12_01", "b"]
    assert ltx("construct", "ticket=null", "output_dir=outputs")[0] == 0
    assert built[-1].ticket is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "names"),
    [
        ('"runs,2026,x"', ["runs,2026,x"]),
        ("'a,1,b'", ["a,1,b"]),
        (r"a\,1", ["a,1"]),
        ("1, 2_0 ,c", ["1", "2_0", "c"]),
    ],
)
def test_commas_and_blanks_in_names(given, names, built, ltx, tmp_path):
    status, _, err = ltx("construct", "--multirun", f"output_dir={given}", f"hydra.sweep.dir={tmp_path}")
    assert status == 0, err
    assert [settings.output_dir for settings in built] == names


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ticket", "target.checkpoint", "target.module", "data.root"])
@pytest.mark.parametrize("value", ["", "' '"])
def test_an_empty_name_is_not_one_that_was_not_given(name, value, ltx):
    """Such as that of a variable which the shell does not know."""
    status, out, err = ltx("verify", f"{name}={value}")
    assert (status, out) == (1, "")
    assert f"{name} is empty: say which, or leave it out" in one_line(err)
    assert "ticket is empty" in one_line(ltx("verify", "")[2])


def test_a_ticket_whose_name_looks_like_a_setting(built, ltx, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [Path("m=20/ticket.safetensors"), tmp_path / "x=1" / "y.safetensors"]
    for file in files:
        file.parent.mkdir()
        file.touch()
        status, _, err = ltx("verify", str(file), "m=3", output_dir=tmp_path)
        assert status == 0, err
    assert [(settings.ticket, settings.m) for settings in built] == [(str(file), 3) for file in files]
    for setting in ("limit=5", "++limit=6"):
        (tmp_path / setting).touch()
        assert ltx("verify", str(files[0]), setting, output_dir=tmp_path)[0] == 0
    assert [settings.limit for settings in built[2:]] == [5, 6]
    for given in ("ticket=a", "++ticket=a"):
        assert "both name a ticket" in one_line(ltx("verify", str(files[0]), given)[2])


def test_a_flag_stays_with_its_value(built, ltx, tmp_path):
    folder = tmp_path / "a=b"
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "mine.yaml").write_text("# @package _global_\nm: 7\n")
    status, _, err = ltx("construct", "--config-dir", str(folder), "experiment=mine", "seed=2")
    assert (status, err) == (0, "")
    assert (built[0].m, built[0].seed) == (7, 2)


@pytest.mark.slow
def test_experiments_that_are_swept_themselves(built, ltx, tmp_path):
    """Hydra leaves out their own sweeps then."""
    folder = tmp_path / "conf"
    (folder / "experiment").mkdir(parents=True)
    for name in "ab":
        (folder / "experiment" / f"{name}.yaml").write_text(f"# @package _global_\nm: 1{len(name)}\n")
    given = ("construct", "--multirun", f"hydra.sweep.dir={tmp_path}", "--config-dir", str(folder))
    status, _, err = ltx(*given, "experiment=a,b")
    assert status == 0, err
    assert len(built) == 2
    status, out, err = ltx(*given, "experiment=a,mnist_feedback")
    assert (status, out, len(built)) == (1, "", 3)
    assert "experiment=mnist_feedback has a sweep of its own, over activation, construction, seed; give one" in err
    assert ltx(*given, "experiment=mnist_feedback", "activation=relu", "construction=L+1", "seed=0,1")[0] == 0
    assert len(built) == 5


@pytest.mark.parametrize(
    ("given", "of"), [("--info m=3", "all"), ("m=3 --info", "all"), ("--info config m=3", "config"), ("-i m=3", "all")]
)
def test_info_has_a_value_or_none(given, of, ltx, monkeypatch):
    shown = []
    monkeypatch.setattr(
        Hydra, "show_info", lambda _, info, config_name, overrides, **__: shown.append((info, overrides))
    )
    assert ltx("construct", *given.split(), "output_dir=x") == (0, "", "")
    assert shown == [(of, ["m=3", "output_dir=x"])]


@pytest.mark.slow
def test_an_experiment_that_sweeps_over_what_it_adds(built, ltx, tmp_path):
    experiment = tmp_path / "experiment" / "mine.yaml"
    experiment.parent.mkdir()
    params = '{+target.densities.relu: "0.3,0.5", ++m: "3,4", hydra.job.chdir: false}'
    experiment.write_text(f"# @package _global_\nhydra: {{sweeper: {{params: {params}}}}}\n")
    given = ("construct", "--multirun", f"hydra.sweep.dir={tmp_path}", "--config-dir", str(tmp_path))
    status, _, err = ltx(*given, "experiment=mine")
    assert status == 0, err
    assert [(s.target.densities["relu"], s.m) for s in built] == [(0.3, 3), (0.3, 4), (0.5, 3), (0.5, 4)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cfg", "foo"], "argument --cfg/-c: invalid choice: 'foo'"),
        (["--info", "foo"], "argument --info/-i: invalid choice: 'foo'"),
        (["--multirun=1"], "argument --multirun/-m: ignored explicit argument '1'"),
    ],
)  # fmt: skip
def test_flags_that_are_refused(flags, message, ltx):
    status, out, err = ltx("construct", *flags)
    assert (status, out) == (1, "")
    assert message in one_line(err)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "given", "advised"),
    [
        ({"target/my": "defaults: [digits]\nname: mine\n"}, ["target=my"], ["target=my"]),
        ({"protocol/three": "name: long\nrounds: 2\nepochs: 3\n"}, ["protocol=three"], ["protocol=three"]),
        ({"target/my": "defaults: [digits]\nlearning_rate: ???\n"}, ["target=my", "target.learning_rate=0.02"],
         ["target=my", "target.learning_rate=0.02"]),
        ({}, ["target=digits", "target.name=other"], ["target=digits", "target.name=other"]),
        ({}, ["target=digits", "target.network=resnet22"], ["target=digits", "target.network=resnet22"]),
    ],
)  # fmt: skip
def test_the_missing_target_of_groups_of_ones_own(files, given, advised, ltx, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / f"{name}.yaml").write_text(text)
    folder = ("--config-dir", str(tmp_path)) if files else ()
    status, _, err = ltx("construct", *given, *folder)
    assert status == 1
    assert "no target at" in one_line(err)
    command = one_line(err).split("train it with: ltx ")[1].split()
    assert command[0] == "train-target"
    assert set(advised) <= set(command)
    assert ("--config-dir" in command) == bool(files)


@pytest.mark.slow
def test_the_missing_target_of_an_experiment_of_ones_own(ltx, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment = tmp_path / "c" / "experiment" / "mine.yaml"
    experiment.parent.mkdir(parents=True)
    experiment.write_text("# @package _global_\ntarget:\n  seed: 5\n  flip: true\nprotocol:\n  epochs: 3\n")
    given = ("construct", "target=digits", "experiment=mine", "protocol=smoke", "output_dir=q", "--config-dir", "c")
    advised = one_line(ltx(*given)[2]).split("train it with: ltx ")[1].split()
    assert advised == [
        "train-target", "target=digits", "activation=relu", "protocol=smoke", "protocol.epochs=3", "target.flip=true",
        "target.seed=5", "output_dir=q", "--config-dir", "c",
    ]  # fmt: skip
    assert ltx(*advised)[0] == 0
    assert ltx(*given)[0] == 0


def test_a_misspelt_density(ltx):
    _, _, err = ltx("train-target", "target=digits", "+target.densities.rleu=0.3")
    assert "target.densities: there is no activation rleu; choose relu, " in one_line(err)


@pytest.mark.skipif(not hasattr(os, "umask"), reason="a system without modes")
def test_files_have_the_mode_that_the_user_wants(ltx, tmp_path):
    for mask, mode in ((0o077, 0o600), (0o002, 0o664)):
        before = os.umask(mask)
        try:
            _, out, _ = ltx("subset-sum", "problems=10", "m=3", f"output_dir={tmp_path / str(mask)}")
        finally:
            os.umask(before)
        assert Path(last_line(out)).stat().st_mode & 0o777 == mode


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_interrupted_before_the_command_begins():
    code = (
        "import os, signal, sys, ltx.cli as cli\n"
        "cli.run = lambda _: os.kill(os.getpid(), signal.SIGINT)\n"
        "cli.main()\n"
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (cli.INTERRUPTED, "ltx: interrupted\n")


def test_the_current_folder_is_gone(tmp_path):
    code = (
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); from ltx import cli\n"
        "os.rmdir(os.getcwd()); sys.exit(cli.run(['construct']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "the current folder is not there any more" in one_line(done.stderr)


def test_settings_of_another_package_are_not_ours(tmp_path):
    """As may lie beside `ltx` where it is installed from a wheel."""
    package = tmp_path / "site" / "ltx"
    for folder in (package / "conf", package.parent / "conf"):
        folder.mkdir(parents=True)
        (folder / "config.yaml").touch()
    code = f"import ltx.cli as cli; cli.__file__ = {str(package / 'cli.py')!r}; print(cli.conf_dir())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == str(package / "conf")


def test_what_may_not_be_read(ltx, monkeypatch):
    def run(_):
        raise PermissionError(13, "Permission denied", "/x")

    monkeypatch.setattr(construct, "run", run)
    assert "cannot read or write /x: Permission denied; choose another place" in one_line(ltx("construct")[2])
