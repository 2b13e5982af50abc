"""Convolution with a masked kernel on the CPU: work in proportion to the kept parameters, not to the width.

A ticket keeps 1 to 2 % of a wide source. Each kept entry adds one shifted channel to one output channel; on
zero-padded rows laid end to end, small images one behind the other, that is a single contiguous multiply-add. With a
stride s, every s-th pixel goes into a channel of its own, so that what a tap reads is contiguous again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ltx.compiled import compiled
from ltx.errors import LtxError
from ltx.operations import value_alone
from ltx.source import SourceLayer

SPARSE_BELOW = 0.25  # density under which it beats the dense convolution on a CPU


class SparseConvolution:
    """A 2d convolution that does nothing for entries that are not kept."""

    def __init__(
        self, rows: Tensor, offsets: Tensor, *, shape: tuple[int, int], kernel: tuple[int, int],
        stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int],
    ):  # fmt: skip
        """Places of the kept entries as `Ticket.kept` returns them, rows ascending, offsets i * K + k.

        Args:
            shape: (C_out, C_in).
        """
        many, self.channels = shape
        taps = kernel[0] * kernel[1]
        tap = (offsets % taps).numpy()
        self.begin = np.searchsorted(rows.numpy(), np.arange(many + 1))
        self.channel = (offsets // taps).numpy()
        self.dy, self.dx = tap // kernel[1] * dilation[0], tap % kernel[1] * dilation[1]
        self.used = np.flatnonzero(np.bincount(self.channel))
        self.stride, self.padding = stride, padding
        self.reach = (dilation[0] * (kernel[0] - 1), dilation[1] * (kernel[1] - 1))

    @classmethod
    def of(cls, layer: SourceLayer, shape: torch.Size, rows: Tensor, offsets: Tensor) -> SparseConvolution:
        """That of a source layer with a weight (C_out, C_in, kernel...) of this shape."""
        return cls(
            rows, offsets, shape=shape[:2], kernel=shape[2:],  # type: ignore[arg-type]
            stride=layer.stride, padding=layer.padding, dilation=layer.dilation,  # type: ignore[arg-type]
        )  # fmt: skip

    def takes(self, x: Tensor) -> bool:
        """Whether an input has its channels and is at least as large as its kernel."""
        return x.ndim == 4 and x.shape[1] == self.channels and all(
            x.shape[2 + d] + 2 * self.padding[d] > self.reach[d] for d in (0, 1)
        )  # fmt: skip

    def __call__(self, x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """(N, C_in, H, W), the entries' values and biases (C_out,), float32 on the CPU -> (N, C_out, H', W').

        Raises:
            LtxError: an input that it does not take.
        """
        if not self.takes(x):
            least = " x ".join(str(max(1, self.reach[d] + 1 - 2 * self.padding[d])) for d in (0, 1))
            raise LtxError(
                f"input of shape {tuple(x.shape)}: the convolution takes images of {self.channels} channels and at "
                f"least {least} pixels"
            )
        h, w = ((x.shape[2 + d] + 2 * self.padding[d] - self.reach[d] - 1) // self.stride[d] + 1 for d in (0, 1))
        # a zero-padded image of every sy-th row and sx-th column; with stride 1 the zeros behind a row or an image
        # are those before the next one
        tall, wide = (
            x.shape[2 + d] + self.padding[d] if self.stride[d] == 1
            else -(-(x.shape[2 + d] + 2 * self.padding[d]) // self.stride[d])
            for d in (0, 1)
        )  # fmt: skip
        (sy, sx), phases = self.stride, self.stride[0] * self.stride[1]
        row = self.channel * phases + self.dy % sy * sx + self.dx % sx
        shift = self.dy // sy * wide + self.dx // sx
        behind = (self.padding[0] * (sy == 1) + 1) * wide
        group = max(1, CACHE // max(1, 4 * self.channels * phases * tall * wide))
        out = np.empty((len(x), len(bias), h, w), np.float32)
        _convolve(
            *(t.detach().contiguous().numpy() for t in (x, values, bias)), self.begin, row, shift, self.used, sy, sx,
            self.padding[0], self.padding[1], tall, wide, behind, group, out,
        )  # fmt: skip
        return torch.from_numpy(out)


@dataclass(frozen=True)
class KeptPlaces:
    """Where the weight of a convolution is not zero, as long as it is not changed."""

    state: tuple
    storage: torch.UntypedStorage  # held, so that no other one comes to lie in its place
    places: Tensor  # flat
    convolution: SparseConvolution | None  # None where too much is kept

    @classmethod
    def of(cls, weight: Tensor, layer: SourceLayer) -> KeptPlaces:
        places = weight.reshape(-1).nonzero()[:, 0]
        convolution, row_size = None, weight[0].numel()
        if len(places) < SPARSE_BELOW * weight.numel():
            convolution = SparseConvolution.of(layer, weight.shape, places // row_size, places % row_size)
        return cls(cls._state(weight), weight.untyped_storage(), places, convolution)

    def are_of(self, weight: Tensor) -> bool:
        return self.state == self._state(weight)

    @staticmethod
    def _state(weight: Tensor) -> tuple:
        """What changes with the weight."""
        return weight.data_ptr(), weight.shape, weight.stride(), weight._version


def serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a sparse convolution, if it takes x, may stand in for PyTorch's, which says what is wrong with others."""
    if bias is None or not numbers_alone(x, weight, bias):
        return False
    if weight.requires_grad or bias.requires_grad or weight.is_inference():
        return False  # changes of inference tensors are not counted, nor those by fused optimisers
    return weight.ndim == 4 and weight.numel() > 0 and bias.shape == weight.shape[:1]


def numbers_alone(*tensors: Tensor) -> bool:
    """Whether these are numbers in memory, and nothing but an output in float32 is asked of them."""
    if not value_alone(*tensors) or _get_current_dispatch_mode():
        return False
    return all(t.device.type == "cpu" and t.dtype == torch.float32 and _in_memory(t) for t in tensors)


def _in_memory(tensor: Tensor) -> bool:
    """Not so within `torch.func` or among fake tensors."""
    if torch._is_functional_tensor(tensor):  # type: ignore[attr-defined]
        return False
    try:
        tensor.detach().numpy()
    except (RuntimeError, TypeError):  # TypeError: of another layout
        return False
    return True


CACHE = 1_300_000  # bytes of padded images that stay in a core's cache; several of them where they are small


@compiled(parallel=True, fastmath={"contract"})
def _convolve(x, value, bias, begin, row, shift, used, sy, sx, py, px, tall, wide, behind, group, out):
    """Images in groups; tall and wide are an image's in the group, behind the zeros after the last one."""
    images, channels, height, width = x.shape
    rows_out, cols_out = out.shape[2], out.shape[3]
    size, phases = tall * wide, sy * sx
    for g in numba.prange((images + group - 1) // group):
        first = g * group
        many = min(group, images - first)
        padded = np.zeros((channels * phases, many * size + behind), np.float32)
        for c in used:
            for n in range(many):
                for y in range(height):
                    to = n * size + (y + py) // sy * wide
                    phase = c * phases + (y + py) % sy * sx
                    if sx == 1:
                        padded[phase, to + px : to + px + width] = x[first + n, c, y]
                    else:
                        for z in range(width):
                            padded[phase + (z + px) % sx, to + (z + px) // sx] = x[first + n, c, y, z]
        length = (many - 1) * size + (rows_out - 1) * wide + cols_out  # up to the last position that is written
        total = np.empty(length, np.float32)
        for o in range(len(bias)):
            total[:] = bias[o]
            e, end = begin[o], begin[o + 1]
            while e + 8 <= end:  # eight at a time: the sums are loaded and stored less often
                x0, x1 = padded[row[e], shift[e] :], padded[row[e + 1], shift[e + 1] :]
                x2, x3 = padded[row[e + 2], shift[e + 2] :], padded[row[e + 3], shift[e + 3] :]
                x4, x5 = padded[row[e + 4], shift[e + 4] :], padded[row[e + 5], shift[e + 5] :]
                x6, x7 = padded[row[e + 6], shift[e + 6] :], padded[row[e + 7], shift[e + 7] :]
                w0, w1, w2, w3 = value[e], value[e + 1], value[e + 2], value[e + 3]
                w4, w5, w6, w7 = value[e + 4], value[e + 5], value[e + 6], value[e + 7]
                for p in range(length):
                    total[p] += (
                        w0 * x0[p] + w1 * x1[p] + w2 * x2[p] + w3 * x3[p]
                        + w4 * x4[p] + w5 * x5[p] + w6 * x6[p] + w7 * x7[p]
                    )  # fmt: skip
                e += 8
            while e < end:
                x0, w0 = padded[row[e], shift[e] :], value[e]
                for p in range(length):
                    total[p] += w0 * x0[p]
                e += 1
            for n in range(many):
                for y in range(rows_out):
                    for z in range(cols_out):
                        out[first + n, o, y, z] = total[n * size + y * wide + z]
