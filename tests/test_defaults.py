"""What is set for all of PyTorch, or of the processor's threads, changes no result and is left as it was."""

import contextlib
import copy
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest
import torch
from conftest import small_cnn
from torch import nn

import ltx
from ltx import adversary, certificates, data, export, targets, theory, training
from ltx.compiled import in_threads
from ltx.defaults import usual_defaults
from ltx.graph import trace
from ltx.network import TicketNetwork


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def matmul_precision(name):
    torch.set_float32_matmul_precision(name)
    try:
        yield
        assert torch.get_float32_matmul_precision() == name
    finally:
        torch.set_float32_matmul_precision("highest")


@contextlib.contextmanager
def taken_back(device):
    with default_device(device):
        pass
    yield


SETTINGS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "device": lambda: default_device("meta"),  # on which nothing has a value
    "device, taken back": lambda: taken_back("meta"),
    "with device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "matmul precision": lambda: matmul_precision("medium"),  # bfloat16, where a CPU has it
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


def made(model, images, path):
    """Tickets, and what is measured of them."""
    found = {}
    by_feedback = {"selection": "feedback", "calibration": images}
    for construction, more in (("2L", {}), ("L+1", {}), ("L+1", by_feedback)):
        ticket = ltx.construct(
            model, construction=construction, base_set_size=12, epsilon=0.02, seed=1, head="construct",
            input_range=(0.0, 1.0), **more,
        )  # fmt: skip
        assert ltx.verify(ticket, model, more.get("calibration")).ok
        ticket.save(path)
        found[construction, bool(more)] = path.read_bytes()
        ticket = ltx.Ticket.load(path)
        assert {tensor.dtype for tensor in export.state_dict(ticket).values()} == {torch.float32}
        assert {p.dtype for p in export.masked_network(ticket).parameters()} == {torch.float32}
        network = TicketNetwork(ticket)
        assert all(labels.device.type == "cpu" for labels in ticket.node_labels().values() if labels is not None)
        assert all(read.device.type == "cpu" for read in ticket.read_channels().values())
    graph = trace(model)
    epsilons, sizes = dict.fromkeys(graph.layers, ticket.epsilon), dict.fromkeys(graph.layers, ticket.base_set_size)
    found["theorem"] = theory.ticket_error(graph, epsilons, sizes, construction="L+1", input_range=(0.0, 1.0))
    low, high = torch.zeros_like(images[0]), torch.ones_like(images[0])
    found["certificate"] = certificates.certify(ticket, trace(model), low, high).largest
    found["ascent"] = adversary.ascend(network, model, images[:2], low, high, steps=2).largest
    network = targets.build("mnist_cnn", "relu", shape=(1, 6, 6), classes=3)
    labels = torch.arange(len(images), device="cpu") % 3
    split, protocol = data.Split(images, labels), training.Protocol(rounds=1, epochs=1, batch_size=8)
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    training.train(network, split, split, protocol, 0.5, seed=0)
    return found


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    torch.manual_seed(0)
    model, images = small_cnn("tanh"), torch.rand(16, 1, 6, 6)
    return model, images, made(model, images, tmp_path_factory.mktemp("usual") / "ticket.safetensors")


def settings():
    gradients = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return torch.get_default_dtype(), torch.empty(0).device, *gradients, torch.is_autocast_enabled("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_results_do_not_depend_on_what_is_set_for_all_of_pytorch(setting, usual, tmp_path):
    model, images, expected = usual
    with SETTINGS[setting]():
        before = settings()
        found = made(model, images, tmp_path / "ticket.safetensors")
        after = settings()
    assert found == expected
    assert after == before


def test_networks_and_random_numbers_of_the_user_are_left_as_they_are(usual, tmp_path):
    images = usual[1]
    model = small_cnn("tanh").train()
    model[0].bias.requires_grad_(False)
    ticket = ltx.construct(model, base_set_size=12, epsilon=0.02, head="construct", input_range=(0.0, 1.0))
    network = ticket.to_module().train()
    kept = ltx.construct(model, base_set_size=12, epsilon=0.02, input_range=(0.0, 1.0))  # the classifier is given
    before = torch.get_rng_state()
    with torch.no_grad():
        for of in (ticket, kept):
            copy.deepcopy(export.masked_network(of))
            export.state_dict(of)
    adversary.ascend(network, model, images[:2], torch.zeros_like(images[0]), torch.ones_like(images[0]), steps=2)
    ltx.verify(ticket, model)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for net in (model, network) for module in net.modules())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["0.bias"]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_parameters_are_held_in_one_layout():
    """Convolutions round differently in another one, which decides ties of feedback."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).to(memory_format=torch.channels_last)
    assert model[0].weight.stride() == (9, 1, 3, 1)
    assert [layer.weight.stride() for layer in trace(model).layers.values()] == [(9, 9, 3, 1), (36, 9, 3, 1)]


def test_what_a_network_of_ones_own_sets_is_taken_back(tmp_path, monkeypatch):
    (tmp_path / "setting_defaults.py").write_text(
        "import torch\n"
        "network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
        "torch.set_default_dtype(torch.float64), torch.set_default_device('meta'), torch.set_grad_enabled(False)\n"
        "def make(): return network\n"
    )
    monkeypatch.chdir(tmp_path)
    targets.imported("setting_defaults:make")
    assert settings() == (torch.float32, torch.device("cpu"), True, False, False)


@in_threads
@numba.njit(parallel=True)
def _threads_of_a_kernel(out):
    for i in numba.prange(len(out)):
        out[i] = numba.get_num_threads()


@pytest.mark.parametrize(("threads", "most"), [(1, None), (2, None), (7, None), (2, 1)])
def test_kernels_run_in_as_many_threads_as_pytorch_and_leave_it_its_own(threads, most):
    before, usual = torch.get_num_threads(), numba.get_num_threads()
    most, out = most or usual, np.zeros(3)
    torch.set_num_threads(threads)
    numba.set_num_threads(most)
    try:
        torch.set_num_threads(threads)
        _threads_of_a_kernel(out)
        assert (torch.get_num_threads(), numba.get_num_threads()) == (threads, most)
        assert out.tolist() == [min(threads, most)] * 3
    finally:
        torch.set_num_threads(before)
        numba.set_num_threads(usual)


def test_the_default_dtype_outlasts_calls_that_overlap_in_threads():
    with default_dtype(torch.float64):
        one, other = usual_defaults(), usual_defaults()
        with ThreadPoolExecutor(1) as thread:
            one.__enter__()
            thread.submit(other.__enter__).result()
            one.__exit__(None, None, None)
            assert thread.submit(torch.get_default_dtype).result() == torch.float32
            thread.submit(other.__exit__, None, None, None).result()
        assert torch.get_default_dtype() == torch.float64
