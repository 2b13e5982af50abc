"""Kernels and strides of the two layers of a pair (Appendix E).

The first layer of a pair makes copies of its input. Its kernel may be larger than 1x1: a row keeps the entry of one
tap. Where it has the target's stride s, a row sees every s-th element only, from the position of its tap on; rows that
are pruned at s positions (s^2 in two dimensions) make one complete copy together. The second layer then has stride 1,
and reads tap k of the target as its own tap b of the rows pruned at tap a, where s b + a = k + a constant.

In one dimension with H elements, let the target have K taps, dilation d and padding P, the first layer kernel K0,
stride s and padding p, the second layer kernel B and padding q. The pair has as many outputs as the target for every H
where

    2 p - K0 + s (2 q - B + 1) = 2 P - d (K - 1) - 1,

and element s (o + b - q) + a - p of the input is s o + k d - P where s b + a = k d + p + s q - P. Elements that the
second layer replaces by zero padding, in front of its first and behind its last input, must be beyond the image:
a < s + p where b < q, and a >= K0 - 1 - p where b > B - 1 - q.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ltx.checks import one_of, whole
from ltx.constructions.problems import no_constant_tap
from ltx.errors import ConstructionError
from ltx.graph import Layer
from ltx.source import SourceLayer

STRIDES = ("second", "first")  # which layer of a pair has the target's


@dataclass(frozen=True)
class _Line:
    """A pair in one dimension."""

    kernel: int
    stride: int
    padding: int
    second: tuple[int, int, int, int]  # kernel, stride, padding, dilation
    taps: tuple[tuple[int, int], ...]  # first and second layer's, of each of the target's taps
    constants: tuple[tuple[int, int], ...]  # those that never read zero padding


@dataclass(frozen=True)
class PairGeometry:
    """How a pair reads what a target layer with K taps does.

    first (K,), second (K,): the taps of the first and of the second layer that together read each tap of the target.
    taps: how many the second layer has.
    constants: the taps through which both layers read a constant as such, borders included; None: there are none.
    """

    lines: tuple[_Line, ...]
    first: Tensor
    second: Tensor
    taps: int
    constants: tuple[int, int] | None

    @property
    def area(self) -> int:
        """Taps of the first layer."""
        return math.prod(line.kernel for line in self.lines)

    def first_layer(self, layer: SourceLayer) -> SourceLayer:
        kernel = tuple(line.kernel for line in self.lines)
        if not kernel:
            return layer
        stride, padding = (tuple(getattr(line, part) for line in self.lines) for part in ("stride", "padding"))
        return replace(
            layer, shape=(0, 0, *kernel), taps=kernel[0] * kernel[1], stride=stride, padding=padding,
        )  # fmt: skip

    def second_layer(self, layer: SourceLayer) -> SourceLayer:
        if not self.lines or layer.kind == "linear":
            return layer
        kernel, stride, padding, dilation = zip(*(line.second for line in self.lines), strict=True)
        return replace(
            layer, shape=(0, 0, *kernel), taps=kernel[0] * kernel[1], stride=stride, padding=padding, dilation=dilation
        )


def pair_kernel_of(kernel: object, stride: object) -> int:
    """The size of the first layer's kernel.

    Raises:
        ConstructionError: it is not odd and positive, or the stride is none of `STRIDES`.
    """
    one_of("pair_stride", stride, STRIDES, ConstructionError)
    size = whole("pair_kernel", kernel, ConstructionError)
    if not (size >= 1 and size % 2):
        raise ConstructionError(f"pair_kernel {size} must be odd and positive")
    return size


def pair_geometry(
    target: Layer, name: str, taps: int, *, image: bool, kernel: int, stride: str, needed: bool = False
) -> PairGeometry:  # fmt: skip
    """The geometry of the pair for a target layer.

    Args:
        taps: those with which the target reads an input channel.
        image: whether it reads images, not vectors.
        kernel: the first layer's, in both dimensions; odd.
        stride: `first` or `second`, the layer that has the target's stride.
        needed: whether anything reads a constant through the pair.

    Raises:
        ConstructionError: no two layers with such a kernel compute what the target's layer does, or no constant gets
            through them that is needed.
    """
    every = torch.arange(taps)
    if not image:
        return PairGeometry((), torch.zeros_like(every), every, taps, (0, 0))
    if target.kind == "linear":  # of flattened images: all of its taps see the whole image, and every one a constant
        line, centre = _unstrided(1, 1, 0, 1, kernel), (kernel // 2) * kernel + kernel // 2
        return PairGeometry((line, line), torch.full_like(every, centre), every, taps, (centre, 0))
    lines = []
    shapes = zip(target.weight.shape[2:], target.stride, target.padding, target.dilation, strict=True)
    for size, step, padding, dilation in shapes:
        if stride == "second" or step == 1:
            line = _unstrided(size, step, padding, dilation, kernel)
        else:
            line = _strided(size, step, padding, dilation, kernel)
        if line is None:
            raise ConstructionError(
                f"layer {name}: a {kernel}x{kernel} layer of stride {step} and one of stride 1 cannot compute what its "
                f"kernel of {size} with padding {padding} does; raise pair.kernel, {2 * step - 1} is often enough, or "
                "use pair.stride=second"
            )
        lines.append(line)
    rows, columns = lines

    def joined(part: int) -> Tensor:
        wide = columns.kernel if part == 0 else columns.second[0]
        return torch.tensor([y[part] * wide + x[part] for y in rows.taps for x in columns.taps])

    constants = None
    if rows.constants and columns.constants:
        y, x = (line.constants[len(line.constants) // 2] for line in lines)
        constants = y[0] * columns.kernel + x[0], y[1] * columns.second[0] + x[1]
    elif needed:
        raise no_constant_tap(target, name)
    return PairGeometry((rows, columns), joined(0), joined(1), rows.second[0] * columns.second[0], constants)


def _unstrided(size: int, step: int, padding: int, dilation: int, kernel: int) -> _Line:
    """The first layer keeps its centre tap, the second has the target's geometry."""
    centre = kernel // 2
    taps = tuple((centre, k) for k in range(size))
    return _Line(
        kernel, 1, centre, (size, step, padding, dilation), taps, _constants(taps, size, padding, dilation)
    )  # fmt: skip


def _strided(size: int, step: int, padding: int, dilation: int, kernel: int) -> _Line | None:
    """The first layer has the target's stride. The second's kernel is as near to the target's as it can be."""
    found = []
    for many in range(1, 2 * size + 2):
        for first in range(kernel):
            second, odd = divmod(
                2 * padding - dilation * (size - 1) - 1 - 2 * first + kernel - step + step * many, 2 * step
            )
            if odd or second < 0:
                continue
            for begin in range(max(1, kernel - step + 1)):  # which of the taps that see the same elements is used
                line = _with(size, step, padding, dilation, kernel, many, first, second, begin)
                if line is not None:
                    found.append((not line.constants, abs(many - size), abs(2 * first - kernel + 1), begin, line))
    return min(found, key=lambda entry: entry[:-1])[-1] if found else None


def _with(
    size: int, step: int, padding: int, dilation: int, kernel: int, many: int, first: int, second: int, begin: int
) -> _Line | None:
    shift = first + step * second - padding
    taps = []
    for k in range(size):
        a = begin + (k * dilation + shift - begin) % step
        b = (k * dilation + shift - a) // step
        lost = (b < second and a >= step + first) or (b > many - 1 - second and a < kernel - 1 - first)
        if not (a < kernel and 0 <= b < many) or lost:
            return None
        taps.append((a, b))
    inner = [
        (a, b) for a, b in _constants(tuple(taps), size, padding, dilation)
        if first <= a <= kernel - 1 - first and second <= b <= many - 1 - second
    ]  # fmt: skip
    return _Line(kernel, step, first, (many, 1, second, 1), tuple(taps), tuple(inner))


def _constants(taps: tuple, size: int, padding: int, dilation: int) -> tuple[tuple[int, int], ...]:
    """The taps of the target that read no zero padding: padding <= k * dilation <= dilation * (size - 1) - padding."""
    last = dilation * (size - 1) - padding
    return tuple(taps[k] for k in range(size) if padding <= k * dilation <= last)
