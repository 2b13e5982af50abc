"""What made a result: versions, commit, machine."""

from __future__ import annotations

import platform
import subprocess
from functools import lru_cache
from pathlib import Path


@lru_cache
def here() -> dict[str, str]:
    """Versions of ltx, torch and Python, the commit (+: the tree differs from it), the processor and its vectors."""
    import torch

    from ltx import __version__

    return {
        "ltx": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "processor": f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})",
    }


def _commit() -> str:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown"
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
