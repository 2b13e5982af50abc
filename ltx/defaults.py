"""What a user may have set for all of PyTorch, and the library's results must not depend on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ltx.compiled import require_unforked
from ltx.precision import OfAllThreads, exact_products


@contextlib.contextmanager
def usual_defaults() -> Iterator[None]:
    """Within it, or in a function that it decorates, tensors are made as in a fresh process.

    In float32 and on the CPU, unless somebody says otherwise; gradients are recorded, and nothing is computed in lower
    precision (`torch.autocast`, `torch.set_float32_matmul_precision`). At the end everything is as it was before.

    Raises:
        LtxError: in a forked process (`ltx.compiled.require_unforked`).
    """
    require_unforked()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_float32)
        stack.enter_context(exact_products)
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if default_device().type != "cpu":  # it looks at every call of PyTorch's
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextlib.contextmanager
def _default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


_float32 = OfAllThreads(_default_dtype)


@contextlib.contextmanager
def kept_defaults() -> Iterator[None]:
    """At its end the defaults for new tensors, and whether gradients are recorded, are as they were before."""
    dtype, device, gradients = torch.get_default_dtype(), default_device(), torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)
        if default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)


def default_device() -> torch.device:
    """Where a new tensor is made; PyTorch 2.8's `get_default_device` fails behind `set_default_device(None)`."""
    return torch.empty(0).device
