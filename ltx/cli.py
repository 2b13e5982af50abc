"""`ltx COMMAND overrides...`: one Hydra application per command.

Every command ends with 0, or with one line on stderr and a non-zero status. stdout carries nothing but what a
command makes: the path of its artefact, alone, as the last line.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import errno
import gc
import importlib
import io
import itertools
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType

from ltx import completion
from ltx.errors import LtxError
from ltx.help import FILE, PLAIN, SEE_HELP, SETTINGS, command_help, override

COMMANDS = {
    "train-target": ("train_target", "train a Synflow-pruned target network"),
    "construct": ("construct", "construct a lottery ticket for a target"),
    "eval": ("evaluate", "evaluate a ticket on test data beside its target"),
    "verify": ("verify", "check that a ticket is a subnetwork of its source and approximates its target"),
    "certify": ("certify", "prove how far a ticket can be from its target, beside how far it was found"),
    "export": ("export", "write a ticket for other tools: dense masks, torch.nn.utils.prune, ONNX"),
    "bounds": ("bounds", "the source that Theorems 3.1 and 3.2 guarantee a ticket in, beside the one that was used"),
    "subset-sum": ("subset_sum", "statistics of random subset-sum problems"),
    "figures": ("figures", "write the paper's Figures 3 and 4, and how failures fall with m"),
    "bench": ("bench", "measure the subset-sum engine beside other solvers"),
    "tables": ("tables", "write the paper's tables from the results that are there"),
    "page": ("page", "write one HTML page of the tables and figures that are there"),
}
_FLAGS = ("--help", "-h", "--hydra-help", "--multirun", "-m", "--run", "-r", "--resolve")
_FLAGS_WITH_VALUE = (
    "--cfg", "-c", "--package", "-p", "--info", "-i", "--config-path", "-cp", "--config-name", "-cn",
    "--config-dir", "-cd", "--experimental-rerun",
)  # fmt: skip
_INFO = ("--info", "-i")  # which may have a value
_OVERRIDE = re.compile(r"^(~[\w@./:]+|[+]*[\w@./:]+=)")
_NAMES = ("output_dir", "data.root", "target.checkpoint", "target.module", "ticket")  # settings that are text
_LIKE_A_NUMBER = re.compile(r"[+-]?(\d[\w.+-]*|\.\d[\w.+-]*|inf|nan)|true|false", re.IGNORECASE)
LOWER = {"train-target": "lower target.batch_size, or use device=cpu"}  # what to do when memory has run out
LOWER_ELSEWHERE = "lower m, give a larger epsilon, or use device=cpu"
INTERRUPTED = 130  # the exit status, as of a shell


def main() -> None:
    """Entry point of the `ltx` command."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        codecs.register_error("ltx", _encoded)
        sys.stdout.reconfigure(errors="ltx")
    gc.disable()  # until all is imported (`_hydra`): none of it is garbage, and to look for some takes a second
    try:
        status = run(sys.argv[1:])
        print(end="", flush=True)
    except OSError as error:  # of --help
        status = _fail(_os_error(error))
    except KeyboardInterrupt:  # before the command has begun
        status = _interrupted()
    finally:
        gc.enable()
    sys.exit(status)


def _encoded(error: UnicodeError) -> tuple[bytes, int]:
    """What stands for signs of a table that an encoding lacks, and the bytes of a path that are no text as they are."""
    assert isinstance(error, UnicodeEncodeError)
    signs = error.object[error.start : error.end]
    return b"".join(os.fsencode(c) if "\udc80" <= c <= "\udcff" else b"?" for c in signs), error.end


def run(arguments: list[str]) -> int:
    """Run one command; the exit status."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 2
    if "--version" in arguments:  # of ltx, where Hydra would give its own
        from ltx import __version__

        print(f"ltx {__version__}")
        return 0
    command = arguments[0]
    if command == "completion":
        return _completion(arguments[1:])
    if command not in COMMANDS:
        return _fail(f"unknown command '{command}'; there are {', '.join(COMMANDS)} (ltx --help)")
    overrides: list[str] = []
    flags: list[str] = []
    tickets: list[str] = []
    for before, argument in itertools.pairwise(arguments):
        if before in _FLAGS_WITH_VALUE and not (before in _INFO and _OVERRIDE.match(argument)):
            flags.append(argument)
        elif command in FILE and os.path.isfile(argument) and not _is_setting(argument):
            tickets.append(argument)  # which may have a = in its name
        elif _OVERRIDE.match(argument):
            overrides.append(_as_text(argument))
        elif argument.startswith("-"):
            if argument.split("=")[0] not in _FLAGS + _FLAGS_WITH_VALUE:
                return _fail(f"unknown flag '{argument}'; settings are written KEY=VALUE (ltx {command} --help)")
            flags.append(argument)
        elif command in FILE:  # `ltx verify FILE` is `ltx verify ticket=FILE`
            tickets.append(argument)
        else:
            return _fail(f"'{argument}' is no setting; settings are written KEY=VALUE, e.g. m=15")
    if tickets and any(given.lstrip("+").startswith("ticket=") for given in overrides):
        return _fail(f"'{tickets[0]}' and ticket=... both name a ticket; list the files without ticket=")
    if "--help" in flags or "-h" in flags:
        print(command_help(command, COMMANDS[command][1]))
        return 0
    if command in PLAIN and (unused := _unused(command, overrides)):
        return _fail(f"ltx {command} has no setting '{unused}' (ltx {command} --help lists those that it has)")
    try:
        os.getcwd()
    except FileNotFoundError:
        return _fail("the current folder is not there any more; change to another one")
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        # waiting threads spin briefly, then sleep: by GNU OpenMP's default they spin for milliseconds, and
        # the short loops of the solvers become many times slower wherever another program runs
        os.environ["GOMP_SPINCOUNT"] = "10000"
    os.environ["MPLBACKEND"] = "agg"  # figures are written, not shown: a notebook's own may be none of this environment
    overrides += flags  # Hydra's parser wants them last
    status = 0
    for ticket in tickets:  # one that fails does not keep the others from being looked at
        status = max(status, _hydra(command, [override("ticket", ticket, always=True), *overrides]))
        if status == INTERRUPTED:
            break
    return status if tickets else _hydra(command, overrides)


def _completion(arguments: list[str]) -> int:
    """Print a shell's script, or what the script asks for."""
    if len(arguments) == 2 and arguments[0] == "query":
        names = sorted(file.stem for file in (conf_dir() / "experiment").glob("*.yaml"))
        for found in completion.candidates(arguments[1], COMMANDS, names):
            print(found)
        return 0
    if len(arguments) != 1 or arguments[0] not in completion.SCRIPTS:
        return _fail(f"ltx completion SHELL prints a script for {', '.join(completion.SCRIPTS)} (see ltx --help)")
    print(completion.SCRIPTS[arguments[0]], end="")
    return 0


def _is_setting(argument: str) -> bool:
    """Whether it is KEY=VALUE of a setting, and no path."""
    key, equals, value = argument.partition("=")
    return bool(equals) and "/" not in value and any(key.lstrip("+") == name for name, *_ in SETTINGS)


def _as_text(argument: str) -> str:
    """A setting whose values are names, in quotes where Hydra would read a number: it writes 2026_12_01 as 20261201."""
    key, equals, value = argument.partition("=")
    if key.lstrip("+") not in _NAMES or set(value).intersection("'\"\\([{"):
        return argument
    names = (v.strip() for v in value.split(","))
    return key + equals + ",".join(f"'{v}'" if _LIKE_A_NUMBER.fullmatch(v) else v for v in names)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: ltx COMMAND [KEY=VALUE ...] [--multirun] [--help]",
            "",
            "Strong lottery tickets, constructed by solving a subset-sum problem for every parameter.",
            "",
            "commands:",
            *lines,
            "",
            "ltx COMMAND --help lists the settings, ltx COMMAND --cfg job their values.",
            'eval "$(ltx completion bash)" in ~/.bashrc completes all of them; also for zsh, fish (| source).',
        ]
    )


def _unused(command: str, overrides: list[str]) -> str | None:
    """The first setting given that the command does not look at."""
    for key in (o.lstrip("+~").split("=")[0] for o in overrides if _OVERRIDE.match(o)):
        who = [commands for name, *_, commands in SETTINGS if name == key]
        if who and not any(command in commands for commands in who):
            return key
    return None


def _out_of_memory(error: Exception) -> bool:
    """Whether memory has run out, the processor's or the GPU's."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def conf_dir() -> Path:
    """The configuration folder: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):  # beside a wheel's may lie somebody else's
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no conf/config.yaml beside or inside {package}; install ltx again")


def _hydra(command: str, overrides: list[str]) -> int:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    from ltx import config

    config.register()
    failures: list[str] = []

    def job(cfg: DictConfig) -> None:
        try:
            task = importlib.import_module(f"ltx.tasks.{COMMANDS[command][0]}")
            if not gc.isenabled():
                gc.freeze()
                gc.enable()
            settings = config.settings_from(cfg)
            if command != "tables":  # which are of a whole sweep
                _require_whole_sweep()
            if command != "bounds":
                settings.require_solvable()
            artefact = task.run(settings)
            if artefact is not None:
                print(artefact)
            print(end="", flush=True)
        except (LtxError, OmegaConfBaseException, MemoryError, RuntimeError, OSError) as error:
            if isinstance(error, OSError):
                error = LtxError(_os_error(error))
            elif isinstance(error, MemoryError | RuntimeError):
                if not _out_of_memory(error):
                    raise
                error = LtxError(f"out of memory: {LOWER.get(command, LOWER_ELSEWHERE)}")
            hydra_config = HydraConfig.get()
            if hydra_config.launcher and not hydra_config.launcher._target_.endswith("BasicLauncher"):
                raise error  # the job runs elsewhere: only its exception comes back
            failures.append(_line(error))
            _fail(failures[-1])

    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [f"ltx {command}", *overrides]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through to the one place that reports them
    try:
        with _arguments(), _no_empty_sweeps():
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(job)()
    except (LtxError, HydraException, OmegaConfBaseException) as error:
        return _fail(_line(error))
    except ValueError as error:
        if not _raised_in(hydra, error):
            raise
        return _fail(f"{_line(error)}; {SEE_HELP}")
    except OSError as error:
        return _fail(_os_error(error, "hydra.sweep.dir=DIR for what Hydra notes of a sweep"))
    except SystemExit as done:  # --cfg
        return done.code if isinstance(done.code, int) else 0
    except KeyboardInterrupt:
        return _interrupted()
    finally:
        sys.argv = argv
        if full_error is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
    return 1 if failures else 0


def _no_empty_sweeps() -> AbstractContextManager[object]:
    """Within it a sweep over no values, for which Hydra does nothing and says nothing, is an LtxError."""
    from unittest import mock

    from hydra.core.override_parser.types import Glob, Override
    from hydra.core.plugins import Plugins

    Plugins.instance()  # which loads every plugin's module anew, once
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    split = BasicSweeper.split_arguments

    def checked(overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        for given in overrides:
            if given.is_discrete_sweep() and next(iter(given.sweep_iterator()), None) is None:
                hint = ""
                if isinstance(given.value(), Glob) and given.config_loader is not None:
                    names = ", ".join(given.config_loader.get_group_options(given.key_or_group))
                    hint = f"; it has {names}" if names else "; glob() finds files of conf/; list values as A,B"
                raise LtxError(f"{given.input_line}: has no values, so that there is nothing to do{hint}")
        return split(overrides, max_batch_size)

    return mock.patch.object(BasicSweeper, "split_arguments", staticmethod(checked))


def _raised_in(package: ModuleType, error: BaseException) -> bool:
    """Whether it is code of that package that has raised an exception, not what it calls, nor what a launcher ran."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Path(str(package.__file__)).parent in Path(last.filename).parents and last.name != "return_value"


@contextlib.contextmanager
def _arguments() -> Iterator[None]:
    """Within it, what argparse refuses is an LtxError instead of its usage.

    It takes any help text: since Python 3.14 it refuses Hydra 1.3's, which becomes text late.
    """
    from unittest import mock

    def refuse(_: argparse.ArgumentParser, message: str) -> None:
        raise LtxError(f"{message}; ltx COMMAND --help says what there is")

    parser = argparse.ArgumentParser
    with mock.patch.object(parser, "_check_help", create=True), mock.patch.object(parser, "error", refuse):
        yield


def _require_whole_sweep() -> None:
    """LtxError where a sweep over experiments leaves out their own sweeps; a line where this is one run of one."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from ltx.tasks import given

    hydra_config = HydraConfig.get()
    swept = (key.lstrip("+") for key in hydra_config.sweeper.get("params") or {} if not key.startswith("hydra."))
    left = [key for key in swept if key not in given.overrides()]
    name = f"experiment={hydra_config.runtime.choices.get('experiment')}"
    if left and hydra_config.mode == RunMode.MULTIRUN:
        raise LtxError(f"{name} has a sweep of its own, over {', '.join(left)}; give one experiment at a time")
    if left:
        print(f"ltx: {name} is a sweep, of which this is one run: add --multirun for all", file=sys.stderr, flush=True)


def _line(error: BaseException) -> str:
    """An exception's message in one line, with its cause, a hint, and without Hydra's hints on its own syntax."""
    from hydra.errors import OverrideParseException
    from omegaconf.errors import ConfigAttributeError

    useless = ("To append to your config", "Set the environment variable", "full_key:", "object_type=", "See https:",
               "Config search path:", "provider=", "reference_type=")  # fmt: skip
    cause = None if isinstance(error, LtxError) else error.__cause__  # Hydra's says which values are possible
    lines = [line.strip() for e in (error, cause) if e is not None for line in str(e).splitlines()]
    kept = list(dict.fromkeys(line for line in lines if line and not line.startswith(useless)))
    line = " ".join(kept) or type(error).__name__
    if isinstance(error, OverrideParseException):
        return f"{error.override}: {line}; settings are KEY=VALUE, with quotes around a VALUE of special characters"
    if "Could not find 'hydra/launcher/" in line:
        line += "; install its plugin in ltx's clone: pip install -e '.[joblib]' (or slurm, ray)"
    return line + (f"; {SEE_HELP}" if isinstance(cause, ConfigAttributeError) else "")


def _os_error(error: OSError, other: str = "data.root=DIR for data") -> str:
    """What it says of a file that cannot be read or written, and where to have it instead.

    Or of the standard output, to which no more is written then.
    """
    try:
        print(end="", flush=True)  # fails again, but for what Python 3.14 tried to write without a buffer
        lost = isinstance(error, BrokenPipeError) or (error.errno == errno.ENOSPC and error.filename is None)
    except OSError:
        lost = True
    if lost:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # what it still holds would fail again at the end
        return f"cannot write to the standard output: {error.strerror}"
    where = f"output_dir=DIR, or {other}"
    return f"cannot read or write {error.filename or 'a file'}: {error.strerror}; choose another place with {where}"


def _interrupted() -> int:
    _fail("interrupted")
    return INTERRUPTED


def _fail(message: str) -> int:
    print(f"ltx: {message}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    main()
