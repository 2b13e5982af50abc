"""Slow tests: a training that is killed, a head that is constructed on MNIST."""

import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import some
from safetensors import safe_open

from ltx import construct, data, verify
from ltx.errors import UnsolvedError
from ltx.evaluation import compare, outputs
from ltx.graph import trace
from ltx.paths import reference_dir
from ltx.targets import build, load_into, read_checkpoint

pytestmark = pytest.mark.slow


TRAIN = ("train-target", "target=digits", "protocol=smoke", "device=cpu", "protocol.rounds=4", "protocol.epochs=2")


def rounds_done(path):
    """The round that the checkpoint goes on with; 0 where there is none."""
    if not path.is_file():
        return 0
    with safe_open(path, framework="pt") as file:
        return int(file.metadata()["round"])


def test_a_killed_training_continues_to_the_same_target(ltx, tmp_path):
    status, _, log = ltx(*TRAIN, output_dir=tmp_path / "whole")
    assert (status, "round 1/4" in log) == (0, True)
    command = [sys.executable, "-m", "ltx.cli", *TRAIN, f"output_dir={tmp_path / 'killed'}"]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    round_file = tmp_path / "killed/targets/digits-relu-smoke-seed0/round.safetensors"
    while rounds_done(round_file) < 2:
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert round_file.is_file()
    status, _, log = ltx(*TRAIN, output_dir=tmp_path / "killed")
    assert (status, "round 1/4" in log) == (0, False)
    states = [
        read_checkpoint(tmp_path / n / "targets/digits-relu-smoke-seed0/target.safetensors").state
        for n in ("whole", "killed")
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not round_file.exists()


@pytest.mark.mnist
@pytest.mark.parametrize(
    ("activation", "construction", "m"), [("relu", "L+1", 15), ("sigmoid", "L+1", 20), ("relu", "2L", 20)]
)
def test_constructed_head_on_mnist(mnist_root, activation, construction, m):
    """25,000 parameters in ten rows (README, limits): m = 15 is enough in L+1, and too little in 2L."""
    checkpoint = read_checkpoint(reference_dir() / "targets" / f"mnist-{activation}.safetensors")
    spec = data.dataset_spec("mnist")
    model = load_into(build("mnist_cnn", activation, shape=spec.shape, classes=10), checkpoint, network="mnist_cnn")
    ticket = construct(
        model, construction=construction, base_set_size=m, head="construct", input_range=spec.input_range
    )
    assert verify(ticket, trace(model)).ok
    assert not ticket.given  # nothing but pruned random parameters
    split = some(data.load("mnist", train=False, root=mnist_root), 2000)
    measured = compare(outputs(model, split.images), ticket.to_module(), split)
    assert abs(measured.ticket_accuracy - measured.target_accuracy) < 0.5
    if construction == "2L":
        with pytest.raises(UnsolvedError, match="none of 10 source rows"):
            construct(model, construction="2L", base_set_size=15, head="construct", input_range=spec.input_range)
