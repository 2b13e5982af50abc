"""numba.njit: machine code that is kept for the next process, in PyTorch's number of threads, in threads and forks."""

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

from ltx.errors import LtxError

log = logging.getLogger(__name__)


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
    """PyTorch and numba share OpenMP's threads, and what one sets holds for the other.

    Where numba has no OpenMP (on many a Mac), its own threads end the process when two of Python's call for them at the
    same time: these take turns there.

    Raises:
        LtxError: see `require_unforked`.
    """

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        threads = torch.get_num_threads()  # before numba's own are asked for, which starts them
        most = numba.get_num_threads()
        require_unforked()
        _process.started = True
        with _process.turns if _layer() == "workqueue" else contextlib.nullcontext():
            numba.set_num_threads(min(threads, most))
            try:
                return function(*arguments)
            finally:
                numba.set_num_threads(most)
                if torch.get_num_threads() != threads:
                    torch.set_num_threads(threads)

    return run


class _Process:
    """What a fork changes."""

    def __init__(self) -> None:
        self.started = False  # whether a kernel has run, here or before a fork
        self.forked = False  # whether one had run when this process was forked
        self.turns = threading.RLock()

    def fork(self) -> None:
        self.forked, self.turns = self.started, threading.RLock()


_process = _Process()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_process.fork)


def require_unforked() -> None:
    """Refuse to go on in a process forked from one in which a kernel has run, where numba's threads are GNU OpenMP's.

    Numba would end it, which a pool of processes waits for without end, and PyTorch would wait for threads that a fork
    does not copy, as it does behind a fork of any process that has used them.

    Raises:
        LtxError: it is such a process.
    """
    if _process.forked and _is_gnu_openmp():
        raise LtxError(
            "this process was forked from one that has used ltx, whose threads do not outlive a fork: start processes "
            "with multiprocessing.get_context('spawn') (a DataLoader's multiprocessing_context='spawn'), or use threads"
        )


def _layer() -> str:
    """Numba's threads, once they have started: omp, tbb or workqueue."""
    return numba.threading_layer()  # pyright: ignore[reportPrivateImportUsage]


def _is_gnu_openmp() -> bool:
    if _layer() != "omp":
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
