"""float32 in full precision, whatever is set for all of PyTorch; on a GPU it rounds convolutions to TensorFloat-32."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.backends import cuda, cudnn, mkldnn

EXACT, TF32 = "ieee", "tf32"


@dataclass(frozen=True)
class _Setting:
    read: Callable[[], str]
    write: Callable[[str], None]


def _of(owner) -> _Setting:
    """PyTorch 2.9's, which must not be read by the older names once somebody has written it."""
    return _Setting(lambda: owner.fp32_precision, lambda value: setattr(owner, "fp32_precision", value))


if hasattr(cudnn, "conv"):
    CONVOLUTIONS = (_of(getattr(cudnn, "conv")),)  # noqa: B009 - which no stub has
    PRODUCTS = (_of(cuda.matmul), *(_of(getattr(mkldnn, name)) for name in ("matmul", "conv")))  # mkldnn: on a CPU
else:
    CONVOLUTIONS = (
        _Setting(
            lambda: TF32 if cudnn.allow_tf32 else EXACT, lambda value: setattr(cudnn, "allow_tf32", value == TF32)
        ),
    )
    PRODUCTS = (
        _Setting(
            torch.get_float32_matmul_precision,
            lambda value: torch.set_float32_matmul_precision("highest" if value == EXACT else value),
        ),
    )

_lock = threading.RLock()  # the settings are those of all threads


@contextlib.contextmanager
def float32(settings: tuple[_Setting, ...], value: str = EXACT) -> Iterator[None]:
    """Within it CONVOLUTIONS on a GPU, or PRODUCTS of matrices, are computed so; other threads wait at its start.

    For single operations: the user's code, which may wait for threads of its own (`nn.DataParallel`), belongs into
    `exact_convolutions` or `exact_products`.
    """
    with _lock, _written(settings, value):
        yield


@contextlib.contextmanager
def _written(settings: tuple[_Setting, ...], value: str) -> Iterator[None]:
    before = [setting.read() for setting in settings]
    try:
        for setting, was in zip(settings, before, strict=True):
            if was != value:  # what was written once is no longer that of the settings above it
                setting.write(value)
        yield
    finally:
        for setting, was in zip(settings, before, strict=True):
            if setting.read() != was:
                setting.write(was)


class OfAllThreads:
    """What is set for all threads: the first that enters sets it, the last that leaves sets it back."""

    def __init__(self, setting: Callable[[], contextlib.AbstractContextManager]) -> None:
        self._setting, self._within, self._stack = setting, 0, contextlib.ExitStack()

    def __enter__(self) -> None:
        with _lock:
            if not self._within:
                self._stack.enter_context(self._setting())
            self._within += 1

    def __exit__(self, *_: object) -> None:
        with _lock:
            self._within -= 1
            if not self._within:
                self._stack.close()


exact_convolutions = OfAllThreads(lambda: _written(CONVOLUTIONS, EXACT))
exact_products = OfAllThreads(lambda: _written(PRODUCTS, EXACT))
