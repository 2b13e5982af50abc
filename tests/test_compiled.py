"""Kernels called from several threads at once, and behind a fork."""

import os
import subprocess
import sys

import pytest

SOLVE = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from ltx import subset_sum

def solve(seed):
    values = np.random.default_rng(seed).uniform(-1, 1, (2_000, 12)).astype("float32")
    return subset_sum.solve(values, values[:, 0] / 2, 0.01).mask.tolist()

before = [solve(seed) for seed in range(8)]
"""


def run(program, **environment):
    return subprocess.run([sys.executable, "-c", SOLVE + program], capture_output=True, text=True, timeout=120,
                          env=os.environ | environment)  # fmt: skip


@pytest.mark.parametrize("layer", ["workqueue", "default"])
def test_threads_at_once_get_the_same_subsets(layer):
    """Numba's workqueue, which a Mac has, ends a process two of whose threads are in it at the same time."""
    program = "with ThreadPoolExecutor(4) as pool:\n    assert list(pool.map(solve, range(8))) == before\n"
    done = run(program, NUMBA_THREADING_LAYER=layer, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_is_told_so_where_it_would_be_ended():
    """A pool of processes that end waits for them for ever."""
    done = run("""
from ltx.compiled import _is_gnu_openmp
if os.fork() == 0:
    try:
        solved = solve(0) == before[0]
    except RuntimeError as error:
        solved = _is_gnu_openmp() and "forked from one that has used ltx" in str(error)
    os._exit(not solved)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
""")
    assert done.returncode == 0, done.stderr
