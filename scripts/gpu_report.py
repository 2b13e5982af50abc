"""What a GPU has to show, in one call: agreement with the CPU first, then rates, then times.

    LTX_DATA=... python scripts/gpu_report.py OUTPUT_DIR [SECONDS] [DEVICE] [CHECKPOINT]

Steps run in the order of their worth, each where SECONDS (540) are left, and OUTPUT_DIR/report.json is written behind
every step, so that a call that is cut off keeps what it has; a second call goes on with the steps that are missing or
failed. DEVICE (cuda) may be cpu, to try the script itself. CHECKPOINT is a ResNet-22 with sigmoid, by default the kept
one.

tests      `pytest -m gpu`: the same bits, subsets and tickets as on the CPU
solver     problems a second, m = 15, epsilon = 0.01, uniform; beside two cores; 262,144 answers compared with the CPU's
tickets    explicit ResNet-22 (sigmoid): construction, again, as the first compiles, and evaluation on the test images
profiles   where the time of two of these constructions goes, as Python sees it
epochs     seconds of each epoch of the paper's protocol (ReLU), by batch size, with torch.compile and without
"""

from __future__ import annotations

import cProfile
import io
import json
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import training_speed  # beside this file

from ltx import cli, data, subset_sum
from ltx.files import write_json
from ltx.subset_sum.statistics import draw
from ltx.tasks import provenance

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = sys.argv[4] if len(sys.argv) > 4 else None
TICKETS = {
    "L+1 smallest": ("construction=L+1",),
    "2L smallest": ("construction=2L",),
    "L+1 feedback, one sweep": ("construction=L+1", "selection=feedback", "feedback.sweeps=1", "feedback.refine=0"),
}
VARIANTS = ((128, False), (512, False), (128, True), (512, True))  # batch size, compiled


def tests(_: str) -> dict:
    found = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "gpu",
            "-p",
            "no:cacheprovider",
            "--durations=10",
            "--numprocesses",
            "6",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return {"status": found.returncode, "output": found.stdout[-6000:]}


def solver(device: str) -> dict:
    found = {}
    threads = torch.get_num_threads()
    for selection, many in (("smallest", 1 << 24), ("best", 1 << 20)):
        values, theta = draw("uniform", 15, 0, many if device == "cuda" else 1 << 16, seed=0, device=device)
        seconds, answer = [], None
        for _ in range(6):  # the first compiles
            _synchronise(device)
            begin = time.perf_counter()
            answer = subset_sum.solve(values, theta, 0.01, selection=selection)
            _synchronise(device)
            seconds.append(time.perf_counter() - begin)
        assert answer is not None
        some = slice(0, 1 << 18)
        torch.set_num_threads(2)
        for _ in range(2):  # the first compiles
            begin = time.perf_counter()
            expected = subset_sum.solve(values[some].cpu(), theta[some].cpu(), 0.01, selection=selection)
            cpu = time.perf_counter() - begin
        found[selection] = {
            "problems": len(theta), "seconds": seconds, "per_second": len(theta) / statistics.median(seconds[1:]),
            "same_as_cpu": bool((torch.as_tensor(answer.mask)[some].cpu() == torch.as_tensor(expected.mask)).all()),
            "two_cores_per_second": len(expected.mask) / cpu,
        }  # fmt: skip
        torch.set_num_threads(threads)
    return found


def tickets(device: str) -> dict:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in TICKETS.items():
            given = [*_resnet(device), *settings, f"output_dir={folder}"]
            made = [_result("construct", given, "construction*.json") for _ in range(2)]
            judged = [_result("eval", given, "result*.json") for _ in range(1 if found else 2)]
            found[name] = {
                "construction_seconds": [each["seconds"] for each in made], "problems": made[0]["problems"],
                "evaluation_seconds": [each["seconds"] for each in judged], "result": judged[-1],
            }  # fmt: skip
            print(json.dumps({name: found[name]}, indent=1), file=sys.stderr)
    return found


def profiles(device: str) -> dict:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("L+1 smallest", "L+1 feedback, one sweep"):
            profile, text = cProfile.Profile(), io.StringIO()
            given = [*_resnet(device), *TICKETS[name], f"output_dir={folder}"]
            profile.runcall(_result, "construct", given, "construction*.json")
            pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(40)
            found[name] = text.getvalue().splitlines()
    return found


def _resnet(device: str) -> list[str]:
    given = ["target=resnet22", "activation=sigmoid", f"device={device}", "force=true"]
    if device == "cpu":
        given.append("limit=200")
    return given + ([f"target.checkpoint={CHECKPOINT}"] if CHECKPOINT else [])


def _result(command: str, given: list[str], name: str) -> dict:
    status = cli.run([command, *given])
    if status:
        raise RuntimeError(f"ltx {command} {' '.join(given)} ended with {status}")
    folder = Path(next(each for each in given if each.startswith("output_dir=")).removeprefix("output_dir="))
    return json.loads(max(folder.rglob(name), key=lambda path: path.stat().st_mtime).read_text())


def epochs(device: str) -> dict:
    """Seconds of each epoch; the first with capture and compilation, the last with the evaluation behind it."""
    splits = [
        data.load("cifar10", train=train, root=Path(os.environ["LTX_DATA"]), device=device) for train in (True, False)
    ]
    found = {}
    for batch_size, compiled in VARIANTS:
        count = 4 if device == "cuda" else 1
        seconds = training_speed.epochs("relu", *splits, count=count, batch_size=batch_size, compiled=compiled)
        found[f"batches of {batch_size}{', compiled' if compiled else ''}"] = seconds
    return found


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


STEPS: dict[str, Callable[[str], dict]] = {
    "tests": tests,
    "solver": solver,
    "tickets": tickets,
    "profiles": profiles,
    "epochs": epochs,
}


def main(folder: Path, seconds: float, device: str) -> None:
    begin = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.json"
    report = json.loads(path.read_text()) if path.is_file() else {}
    report |= {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", **provenance.here()}
    for name, step in STEPS.items():
        if "error" not in report.get(name, {"error": "missing"}):
            continue
        if time.monotonic() - begin > seconds:
            print(f"{name}: no time left; call again", file=sys.stderr)
            continue
        started = time.monotonic()
        try:
            report[name] = step(device)
        except Exception:  # the next steps may work
            report[name] = {"error": traceback.format_exc()}
        report[name]["wall_seconds"] = time.monotonic() - started
        write_json(path, report)
        print(json.dumps({name: report[name]}, indent=1, default=str))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3, 4, 5):
        sys.exit(__doc__)
    where, *rest = sys.argv[1:4]
    seconds, device = [*rest, *("540", "cuda")[len(rest) :]]
    main(Path(where), float(seconds), device)
