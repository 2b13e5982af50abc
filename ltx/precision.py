"""float32 in full precision, whatever is set for all of PyTorch; on a GPU it rounds convolutions to TensorFloat-32."""

from __future__ import annotations

import contextlib
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


@contextlib.contextmanager
def float32(settings: tuple[_Setting, ...], value: str = EXACT) -> Iterator[None]:
    """Within it CONVOLUTIONS on a GPU, or PRODUCTS of matrices, are computed so."""
    before = [setting.read() for setting in settings]
    try:
        for setting in settings:
            setting.write(value)
        yield
    finally:
        for setting, was in zip(settings, before, strict=True):
            setting.write(was)
