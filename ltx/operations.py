"""What the operations of a graph compute, a target's and a ticket's alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ltx.precision import CONVOLUTIONS, PRODUCTS, TF32, float32

POOLINGS = ("max_pool", "avg_pool", "adaptive_avg_pool")
AVERAGES = POOLINGS[1:]
Sizes = int | tuple[int, ...]
WIDE = 128  # channels in and out from which a convolution on a GPU is worth splitting: its factors are read more often
ALIGNED = 4  # float32 numbers that a GPU reads at once: convolutions of other numbers of channels are slower


def affine(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sizes = 1, padding: Sizes = 0, dilation: Sizes = 1
) -> Tensor:
    """A linear layer (C_out, C_in) on vectors, a convolution (C_out, C_in, kh, kw) on images.

    In full precision on a GPU too, whose convolutions round to TensorFloat-32 by default: what a ticket computes does
    not depend on the device.
    """
    how = (stride, padding, dilation)
    if x.device.type == "cpu":
        vectors = weight.ndim == 2
        return nn.functional.linear(x, weight, bias) if vectors else nn.functional.conv2d(x, weight, bias, *how)
    if weight.ndim == 2:
        with float32(PRODUCTS):
            return nn.functional.linear(x, weight, bias)
    if x.dtype == torch.float32 and x.ndim == 4 and min(weight.shape[:2]) >= WIDE and value_alone(x, weight):
        return _in_two(x, weight, bias, *how)
    with float32(CONVOLUTIONS):
        return nn.functional.conv2d(x, weight, bias, *how)


def value_alone(*tensors: Tensor) -> bool:
    """Whether nothing but numbers is asked of an operation: no derivative, no trace, no batch of `torch.func`."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    return not any(
        (t.requires_grad and torch.is_grad_enabled())
        or torch._C._functorch.is_functorch_wrapped_tensor(t)  # type: ignore[attr-defined]
        or forward_ad.unpack_dual(t).tangent is not None
        for t in tensors
    )  # fmt: skip


def _in_two(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sizes, padding: Sizes, dilation: Sizes
) -> Tensor:  # fmt: skip
    """A convolution of float32 by two of TensorFloat-32, several times faster on a GPU that has it.

    Each factor is the sum of two numbers: x W = (low W + high rest) + high W, where low rest, 2^-20 of the result, is
    left out. The small products are summed by themselves, so that they add no rounding to the sum of the large ones.
    Channels are filled up with zeros to as many as a GPU reads well. What is infinite becomes NaN.
    """
    images, channels, height, width = x.shape
    out, wide = len(weight), channels + -channels % ALIGNED
    whole, rest = _split(nn.functional.pad(weight, (0, 0, 0, 0, 0, wide - channels, 0, -out % ALIGNED)))
    large, small = (
        torch.empty((images, many * wide, height, width), device=x.device, memory_format=torch.channels_last)
        for many in (1, 2)
    )
    low, high = small.chunk(2, 1)
    _split(x, out=(large[:, :channels], low[:, :channels]))
    large[:, channels:] = low[:, channels:] = 0
    high.copy_(large)
    how = (stride, padding, dilation)
    with float32(CONVOLUTIONS, TF32):
        found = nn.functional.conv2d(small, _channels_last(torch.cat([whole, rest], 1)), None, *how)
        found += nn.functional.conv2d(large, _channels_last(whole), None, *how)
    found = found[:, :out]
    return found if bias is None else found.add_(bias.view(-1, 1, 1))


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _split(x: Tensor, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """float32 numbers as the sum of one with the 10 bits of TensorFloat-32 behind the point, and what is left."""
    high, low = out or (torch.empty_like(x), torch.empty_like(x))
    torch.bitwise_and(x.view(torch.int32), -(1 << 13), out=high.view(torch.int32))
    torch.sub(x, high, out=low)
    return high, low


def scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Batch norm in eval mode: x (N, C, ...), scale and shift (C,)."""
    shape = (-1, *[1] * (x.ndim - 2))
    return torch.addcmul(shift.view(shape), x, scale.view(shape))


def _max_pool(inputs: list[Tensor], attributes: dict) -> Tensor:
    return nn.functional.max_pool2d(
        inputs[0], attributes["kernel_size"], attributes["stride"], attributes["padding"],
        ceil_mode=attributes.get("ceil_mode", False),
    )  # fmt: skip


def _avg_pool(inputs: list[Tensor], attributes: dict) -> Tensor:
    if attributes["kernel_size"] is None:
        return inputs[0].mean((2, 3), keepdim=True)
    return nn.functional.avg_pool2d(inputs[0], attributes["kernel_size"], attributes["stride"])


# op -> (inputs, the node's attributes) -> value, of the operations without parameters
OPERATIONS: dict[str, Callable[[list[Tensor], dict], Tensor]] = {
    "add": lambda inputs, _: inputs[0] + inputs[1],
    "flatten": lambda inputs, _: inputs[0].flatten(1),
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "adaptive_avg_pool": lambda inputs, how: nn.functional.adaptive_avg_pool2d(inputs[0], how["output_size"]),
}
