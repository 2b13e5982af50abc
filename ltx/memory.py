"""Large tensors that are allocated and freed over and over."""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache

KEPT = 1 << 27  # bytes; larger blocks, such as outputs of whole layers, would leave holes that nothing fits into


@lru_cache(maxsize=1)
def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks up to KEPT instead of returning them to the system, for the rest of the process.

    Training and evaluation allocate the same activations at every step; without this, most of the time of an
    evaluation goes into page faults. Other C libraries are left alone.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_mmap_threshold, KEPT)
        mallopt(m_trim_threshold, (1 << 31) - 1)
