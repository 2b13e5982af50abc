"""float32 in full precision: set back as it was, in several threads at once, and around the user's networks."""

import contextlib
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT
from torch import nn

from ltx.adversary import ascend
from ltx.defaults import usual_defaults
from ltx.evaluation import outputs
from ltx.graph import trace
from ltx.precision import CONVOLUTIONS, EXACT, PRODUCTS, TF32, exact_convolutions, float32


def read(settings=CONVOLUTIONS):
    return {EXACT if (value := setting.read()) == "highest" else value for setting in settings}


@contextlib.contextmanager
def tf32():
    """As PyTorch's default on a GPU, and not left behind for other tests."""
    before = [setting.read() for setting in CONVOLUTIONS]
    for setting in CONVOLUTIONS:
        setting.write(TF32)
    try:
        yield
        assert read() == {TF32}
    finally:
        for setting, was in zip(CONVOLUTIONS, before, strict=True):
            setting.write(was)


SET = [
    "pass", "cudnn.allow_tf32 = False", "torch.set_float32_matmul_precision('high')",
    "torch.backends.cuda.matmul.allow_tf32 = True", "cudnn.conv.fp32_precision = 'ieee'",
    "cudnn.conv.fp32_precision = 'tf32'", "cudnn.fp32_precision = 'ieee'", "torch.backends.fp32_precision = 'ieee'",
    "torch.backends.fp32_precision = 'tf32'",
    # what was left alone still follows the setting above it
    "torch.backends.fp32_precision = 'ieee'\nwith exact_convolutions, exact_products: pass\n"
    "torch.backends.fp32_precision = 'tf32'\nassert set(read()) == {TF32}",
]  # fmt: skip
CHECK = """
import os
import sys
import torch
from torch.backends import cudnn
from ltx.precision import CONVOLUTIONS, PRODUCTS, EXACT, TF32, exact_convolutions, exact_products, float32

def read():
    return [setting.read() for setting in (*CONVOLUTIONS, *PRODUCTS)]

for how in sys.argv[1:]:
    child = os.fork()  # what is set is that of the process
    if child:
        assert os.waitpid(child, 0)[1] == 0, how
        continue
    exec(how)
    before = read()
    with float32(CONVOLUTIONS), float32(PRODUCTS):
        assert set(read()) <= {EXACT, "highest"}
        with float32(CONVOLUTIONS, TF32):
            assert read()[0] == TF32
        assert read()[0] == EXACT
    assert read() == before
    os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_precision_is_set_back_however_it_was_set():
    """By the newer names or the older ones, of which PyTorch refuses to read one behind the other."""
    newer = hasattr(torch.backends.cudnn, "conv")  # PyTorch 2.9
    settings = [how for how in SET if newer or "fp32_precision" not in how]
    command = [sys.executable, "-W", "ignore", "-c", CHECK, *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_precision_outlasts_calls_that_overlap_in_threads():
    with tf32(), ThreadPoolExecutor(1) as thread:
        exact_convolutions.__enter__()
        thread.submit(exact_convolutions.__enter__).result()
        exact_convolutions.__exit__()
        assert thread.submit(read).result() == {EXACT}
        thread.submit(exact_convolutions.__exit__).result()


@pytest.mark.parametrize("other", ["operation", "network", "products"])
def test_other_threads_wait_for_an_operation_in_tf32(other):
    """And find, and leave, what was set before it."""
    started = threading.Event()

    def run():
        started.set()
        with {"operation": float32(CONVOLUTIONS), "network": exact_convolutions, "products": usual_defaults()}[other]:
            return read(PRODUCTS if other == "products" else CONVOLUTIONS)

    with tf32(), ThreadPoolExecutor(1) as thread:
        with float32(CONVOLUTIONS, TF32), float32(PRODUCTS):
            running = thread.submit(run)
            started.wait()
            with contextlib.suppress(TimeoutError):
                running.result(timeout=0.05)
            assert not running.done()
            assert read() == {TF32}
        assert running.result(timeout=60) == {EXACT}


def test_many_threads_at_once_leave_what_was_set():
    def work(n):
        for k in range(200):
            value = (EXACT, TF32)[(n + k) % 2]
            with float32(CONVOLUTIONS, value):
                if read() != {value}:
                    return False
            with exact_convolutions:
                pass
        return True

    with tf32(), ThreadPoolExecutor(4) as threads:
        assert list(threads.map(work, range(4))) == [True] * 4


class Seen(nn.Module):
    """A network that looks at what is set while it runs."""

    def __init__(self):
        super().__init__()
        self.layer, self.found = nn.Linear(4, 2), []

    def forward(self, x):
        if not isinstance(x, torch.fx.Proxy):
            self.found.append(read() | read(PRODUCTS))
        return self.layer(x.flatten(1))


def test_the_users_networks_run_in_full_precision():
    images, ticket = torch.rand(2, 1, 2, 2), nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with tf32():
        for run in (
            lambda model: outputs(model, images),
            lambda model: trace(model, images),
            lambda model: ascend(ticket, model, images, images[0] * 0, images[0] * 0 + 1, steps=2),
        ):
            model = Seen()
            run(model)
            assert model.found
            assert set.union(*model.found) == {EXACT}
