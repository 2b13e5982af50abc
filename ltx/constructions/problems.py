"""What a target layer asks of the source: its subset-sum problems, their scale, and where constants get through."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ltx.constructions.rows import Problems
from ltx.errors import ConstructionError
from ltx.graph import Layer, above


def layer_scale(target: Layer, scaling: str) -> float:
    """Factor on a layer's parameters: 1, or with `layer_max` the target's largest magnitude where beyond 1."""
    if scaling == "unit":
        return 1.0
    largest = max(float(target.weight.abs().max()), float(target.bias.abs().max()))
    return float(np.nextafter(np.float32(largest), np.float32(np.inf))) if largest > 1 else 1.0


def constant_tap(target: Layer, name: str, taps: int, *, needed: bool) -> int:
    """The tap in which a constant channel is constant at every output position, borders included.

    A tap at offset a * dilation - padding never reads the zero padding when padding <= a * dilation <=
    dilation * (kernel - 1) - padding: the centre tap of a "same" convolution, any tap without padding.

    Args:
        needed: whether anything reads a constant; 0 where nothing does.
    """
    if target.kind == "linear" or not needed:
        return 0
    tap = []
    for size, padding, dilation in zip(target.weight.shape[2:], target.padding, target.dilation, strict=True):
        inside = [a for a in range(size) if padding <= a * dilation <= dilation * (size - 1) - padding]
        if not inside:
            raise no_constant_tap(target, name)
        tap.append(inside[len(inside) // 2])
    return tap[0] * target.weight.shape[3] + tap[1] if taps > 1 else 0


def no_constant_tap(target: Layer, name: str) -> ConstructionError:
    return ConstructionError(
        f"layer {name}: every tap of its kernel {tuple(target.weight.shape[2:])} reads the zero padding "
        f"{target.padding} somewhere, so that no constant gets through it, which its bias needs, or one behind it; pad "
        "by at most half the kernel, or keep the head, where no other bias needs one"
    )


def target_problems(
    weight: Tensor, target: Layer, epsilon: float, base: Tensor, constant: int, tap: int
) -> list[Problems]:
    """The subset-sum problems of every output channel: one per base set and parameter above epsilon.

    Args:
        weight: (C_out, C_in, K) that of `target`, by the channels that it reads.
        base: (C_in, n) int64, the n base sets of each input channel.
        constant: the base set of constants, for the bias.
        tap: the tap that reads a constant.
    """
    result = []
    for row, bias in zip(weight.double(), target.bias.double(), strict=True):
        channel, k = above(row, epsilon).nonzero(as_tuple=True)
        sets = base[channel]  # (P, n)
        theta = row[channel, k][:, None].expand_as(sets)
        parts = (sets.flatten(), k[:, None].expand_as(sets).flatten(), theta.flatten())
        if above(bias, epsilon):
            extra = (torch.tensor([constant]), torch.tensor([tap]), bias[None])
            parts = tuple(torch.cat(pair) for pair in zip(parts, extra, strict=True))
        result.append(Problems(*parts))
    return result
