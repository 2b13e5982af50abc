"""What a user may have set for all of PyTorch, and the library's results must not depend on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def usual_defaults() -> Iterator[None]:
    """Within it, or in a function that it decorates, tensors are made as in a fresh process.

    In float32 and on the CPU, unless somebody says otherwise; gradients are recorded, and nothing is computed in lower
    precision (`torch.autocast`). At the end everything is as it was before.
    """
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(kept_defaults())
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        if torch.get_default_device().type != "cpu":  # it looks at every call of PyTorch's
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextlib.contextmanager
def kept_defaults() -> Iterator[None]:
    """At its end the defaults for new tensors, and whether gradients are recorded, are as they were before."""
    dtype, device, gradients = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)
