"""numba.njit, whose machine code is kept for the next process where there is a folder for it."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from collections.abc import Callable
from typing import Any

import numba
import torch
from numba.np.ufunc.parallel import threading_layer

log = logging.getLogger(__name__)
_in_turns = threading.Lock()


def compiled(**options: Any) -> Callable[[Callable], Any]:
    """A decorator like `numba.njit(**options)`.

    Code is kept beside the module, else in the user's cache, or in the folder that NUMBA_CACHE_DIR names. Where none
    can be written (an installation of root's, run by a user without a home), every process compiles it again.

    With `parallel` it runs in as many threads as PyTorch (`torch.set_num_threads`, OMP_NUM_THREADS), at most as many as
    numba may take, and is called from Python alone.
    """

    def decorate(function: Callable) -> Any:
        try:
            made = numba.njit(cache=True, **options)(function)
        except RuntimeError:  # numba's, at the decoration
            _say_so()
            made = numba.njit(**options)(function)
        return in_threads(made) if options.get("parallel") else made

    return decorate


def in_threads(function: Callable) -> Callable:
    """Both share OpenMP's threads, and what one sets holds for the other.

    Where numba has no OpenMP (a Mac), its own threads end the process when two of Python's call for them at the same
    time: these take turns there. GNU's OpenMP ends a forked process, which a pool of them would wait for without end.

    Raises:
        RuntimeError: in a process forked from one in which a kernel has run, with GNU's OpenMP.
    """

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        if _first_process() != os.getpid() and _is_gnu_openmp():
            raise RuntimeError(
                "this process was forked from one that has used ltx, and GNU OpenMP's threads do not outlive a fork: "
                "start processes with multiprocessing.get_context('spawn'), or use threads"
            )
        threads = torch.get_num_threads()  # before numba's own are asked for, which starts them
        most = numba.get_num_threads()
        with _in_turns if threading_layer() == "workqueue" else contextlib.nullcontext():
            numba.set_num_threads(min(threads, most))
            try:
                return function(*arguments)
            finally:
                numba.set_num_threads(most)
                if torch.get_num_threads() != threads:
                    torch.set_num_threads(threads)

    return run


@functools.cache
def _first_process() -> int:
    """The process in which a kernel ran first: this one or, behind a fork, one before it."""
    return os.getpid()


def _is_gnu_openmp() -> bool:
    """Whether the threads are its own, of which a forked process has none; where a kernel has run."""
    if threading_layer() != "omp":
        return False
    # there only where numba has OpenMP
    from numba.np.ufunc import omppool  # pyright: ignore[reportAttributeAccessIssue]

    return omppool.openmp_vendor == "GNU"


@functools.cache
def _say_so() -> None:
    log.warning(
        "there is no folder to keep compiled code in, so that every run compiles it again (half a minute): let "
        "NUMBA_CACHE_DIR name one that can be written"
    )
