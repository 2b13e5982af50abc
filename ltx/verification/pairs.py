"""Which tap of the target does a pair of layers read through a tap of each of its own (Appendix E)?

In one dimension, with kernels K0, B and K, strides s0, s1 and s, paddings p0, p1 and p, dilations 1, e and d of the
first layer, the second, and the target's: output o of the pair reads element s0 (s1 o + e b - p1) + a - p0 of the
image, the target's element s o + d k - p. The second layer has zeros in front of its first input and behind its last
one; they stand for zeros of the target where the element that they would read is outside of the image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ltx.graph import Layer
from ltx.source import SourceLayer


def taps_read(first: SourceLayer, second: SourceLayer, target: Layer) -> Tensor | str:
    """The target's tap for each tap of the first and of the second layer, (K0, B) int64, -1 for none; or what is wrong.

    Where the first layer is 1x1 and the second one linear, that is for `topology` to compare.
    """
    if first.kind == "linear":
        return torch.arange(second.taps)[None]
    if first.dilation != (1, 1):
        return "copies need a layer without dilation"
    if second.kind == "linear":
        odd = all(k == 2 * p + 1 for k, p in zip(first.shape[2:], first.padding, strict=True))
        if not odd or first.stride != (1, 1):
            return "copies of what is flattened need all of the image"
        found = torch.full((first.taps, second.taps), -1)
        found[first.taps // 2] = torch.arange(second.taps)  # an odd kernel's centre
        return found
    lines = []
    for n in range(2):
        line = _line(
            (first.shape[2 + n], first.stride[n], first.padding[n]),
            (second.shape[2 + n], second.stride[n], second.padding[n], second.dilation[n]),
            (target.weight.shape[2 + n], target.stride[n], target.padding[n], target.dilation[n]),
        )
        if line is None:
            return "the two layers of a pair do not have the target's stride and size together"
        lines.append(line)
    rows, columns = lines
    found = rows[:, None, :, None] * target.weight.shape[3] + columns[None, :, None, :]
    none = (rows[:, None, :, None] < 0) | (columns[None, :, None, :] < 0)
    return found.masked_fill(none, -1).flatten(2).flatten(0, 1)


def _line(
    first: tuple[int, int, int], second: tuple[int, int, int, int], target: tuple[int, int, int, int]
) -> Tensor | None:
    """The target's tap for each tap of the two in one dimension; None where sizes do not agree for every image."""
    (kernel, stride, padding), (many, step, outer, apart) = first, second
    size, whole, around, dilation = target
    span = 2 * padding - kernel + stride * (2 * outer - apart * (many - 1))
    if stride * step != whole or span != 2 * around - dilation * (size - 1) - 1:
        return None
    a, b = torch.arange(kernel)[:, None], torch.arange(many)
    element = stride * (apart * b - outer) + a - padding + around
    k = element.div(dilation, rounding_mode="floor")
    good = (element >= 0) & (k < size) & (k * dilation == element)
    good &= (apart * b >= outer) | (a < stride + padding)
    good &= (apart * (many - 1 - b) >= outer) | (a >= kernel - 1 - padding)
    return torch.where(good, k, -1)


def without_padding(layer: SourceLayer | Layer) -> Tensor:
    """Which taps of a layer never read its zero padding, (K,) bool; of a target's linear layer one for all."""
    source = isinstance(layer, SourceLayer)
    if layer.kind == "linear":
        return torch.ones(layer.taps if source else 1, dtype=torch.bool)
    kernel = (layer.shape if source else layer.weight.shape)[2:]
    inside = []
    for size, padding, dilation in zip(kernel, layer.padding, layer.dilation, strict=True):
        at = torch.arange(size) * dilation
        inside.append((at >= padding) & (at <= dilation * (size - 1) - padding))
    return (inside[0][:, None] & inside[1]).flatten()
