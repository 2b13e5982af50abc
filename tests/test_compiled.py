"""Kernels called from several threads at once, and behind a fork."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

SOLVE = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from ltx import subset_sum

def solve(seed):
    values = np.random.default_rng(seed).uniform(-1, 1, (2_000, 12)).astype("float32")
    return subset_sum.solve(values, values[:, 0] / 2, 0.01).mask.tolist()

"""


def run(program, **environment):
    return subprocess.run([sys.executable, "-c", SOLVE + program], capture_output=True, text=True, timeout=120,
                          env=os.environ | environment)  # fmt: skip


def test_threads_at_once_get_the_same_subsets():
    """Numba's workqueue, which a Mac has, ends a process two of whose threads are in it at the same time."""
    program = """
before = [solve(seed) for seed in range(8)]
with ThreadPoolExecutor(4) as pool:
    assert list(pool.map(solve, range(8))) == before
"""
    done = run(program, NUMBA_THREADING_LAYER="workqueue", OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr


FORKS = """
import signal, threading
from ltx import LtxError
from ltx.compiled import _is_gnu_openmp, _process
from ltx.defaults import usual_defaults

def forked(work):
    # The status of a child that does it, forked from whatever this is; a minute at most.
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.alarm(60)
    status = 9
    try:
        status = work()
    finally:
        os._exit(status)

def solves():
    return 0 if len(solve(0)) == 2_000 else 2

def says_so():
    for what in (lambda: solve(0), lambda: usual_defaults().__enter__()):
        try:
            what()
        except LtxError as error:
            assert "forked from one that has used ltx" in str(error)
        else:
            return 3
    return 0

assert forked(solves) == 0  # nothing has run so far
solve(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="another OpenMP, or none")
def test_a_forked_process_is_told_so_where_it_would_be_ended():
    """A pool of processes that end waits for them for ever."""
    program = FORKS + "assert _is_gnu_openmp()\nassert forked(says_so) == forked(lambda: forked(says_so)) == 0\n"
    done = run(program, NUMBA_THREADING_LAYER="omp")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_works_where_it_can():
    """With numba's workqueue, also where another thread was in a kernel at the fork."""
    program = """
assert forked(solves) == 0
held, done = threading.Event(), threading.Event()
def hold():
    with _process.turns:
        held.set()
        done.wait()
threading.Thread(target=hold).start()
held.wait()
status = forked(solves)
done.set()
assert status == 0
"""
    done = run(FORKS + program, NUMBA_THREADING_LAYER="workqueue")
    assert done.returncode == 0, done.stderr
