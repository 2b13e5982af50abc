"""numba.njit, whose machine code is kept for the next process where there is a folder for it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import numba
import torch

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
    """Both share OpenMP's threads, and what one sets holds for the other."""

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        threads = torch.get_num_threads()  # before numba's own are asked for, which starts them
        most = numba.get_num_threads()
        numba.set_num_threads(min(threads, most))
        try:
            return function(*arguments)
        finally:
            numba.set_num_threads(most)
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)

    return run


@functools.cache
def _say_so() -> None:
    log.warning(
        "there is no folder to keep compiled code in, so that every run compiles it again (half a minute): let "
        "NUMBA_CACHE_DIR name one that can be written"
    )
