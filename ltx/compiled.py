"""numba.njit, whose machine code is kept for the next process where there is a folder for it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import numba

log = logging.getLogger(__name__)


def compiled(**options: Any) -> Callable[[Callable], Any]:
    """A decorator like `numba.njit(**options)`.

    Code is kept beside the module, else in the user's cache, or in the folder that NUMBA_CACHE_DIR names. Where none
    can be written (an installation of root's, run by a user without a home), every process compiles it again.
    """

    def decorate(function: Callable) -> Any:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # numba's, at the decoration
            _say_so()
            return numba.njit(**options)(function)

    return decorate


@cache
def _say_so() -> None:
    log.warning(
        "there is no folder to keep compiled code in, so that every run compiles it again (half a minute): let "
        "NUMBA_CACHE_DIR name one that can be written"
    )
