"""Large tensors that are allocated and freed over and over."""

from __future__ import annotations

import ctypes
import sys


def keep_freed_memory(below: int = 1 << 30) -> None:
    """Tell glibc to keep freed blocks instead of returning them to the system, from now on.

    Training and evaluation allocate the same activations at every step; without this, most of the time of an
    evaluation goes into page faults. Other C libraries are left alone.

    Args:
        below: bytes; larger blocks are returned, as is best for those that do not come again: kept ones leave holes
            that nothing fits into.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_mmap_threshold, below)
        mallopt(m_trim_threshold, (1 << 31) - 1)
