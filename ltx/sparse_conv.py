"""Convolution with a masked kernel on the CPU: work in proportion to the kept parameters, not to the width.

A ticket keeps 1 to 2 % of a wide source. Each kept entry adds one shifted channel to one output channel; on
zero-padded rows laid end to end that is a single contiguous multiply-add.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor


class SparseConvolution:
    """A 2d convolution that holds nothing but its kept entries."""

    def __init__(
        self, rows: Tensor, offsets: Tensor, values: Tensor, bias: Tensor, *, channels: int, kernel: tuple[int, int],
        stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int],
    ):  # fmt: skip
        """Kept entries as `Ticket.kept` returns them: rows ascending, offsets i * K + k."""
        taps = kernel[0] * kernel[1]
        tap = (offsets % taps).numpy()
        self.begin = np.searchsorted(rows.numpy(), np.arange(len(bias) + 1))
        self.channel = (offsets // taps).numpy()
        self.dy, self.dx = tap // kernel[1] * dilation[0], tap % kernel[1] * dilation[1]
        self.value, self.bias = values.numpy().astype(np.float32), bias.numpy().astype(np.float32)
        self.used = np.unique(self.channel)
        self.stride, self.padding = stride, padding
        self.channels = channels
        self.reach = (dilation[0] * (kernel[0] - 1), dilation[1] * (kernel[1] - 1))

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) float32 on the CPU -> (N, C_out, H', W')."""
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"input of shape {tuple(x.shape)}: the convolution takes {self.channels} channels")
        h, w = ((x.shape[2 + d] + 2 * self.padding[d] - self.reach[d] - 1) // self.stride[d] + 1 for d in (0, 1))
        out = np.empty((len(x), len(self.bias), h, w), np.float32)
        _convolve(
            x.detach().contiguous().numpy(), self.begin, self.channel, self.dy, self.dx, self.value, self.bias,
            self.used, self.stride[0], self.stride[1], self.padding[0], self.padding[1], self.reach[1], out,
        )  # fmt: skip
        return torch.from_numpy(out)


@numba.njit(cache=True, parallel=True, fastmath={"contract"})
def _convolve(x, begin, channel, dy, dx, value, bias, used, sy, sx, py, px, reach, out):
    _, channels, height, width = x.shape
    wide = width + 2 * px
    rows_out, cols_out = out.shape[2], out.shape[3]
    length = (rows_out - 1) * sy * wide + (cols_out - 1) * sx + 1  # last position that is read, plus 1
    for n in numba.prange(len(x)):
        # zero-padded rows end to end; the slack keeps the last shifts inside
        padded = np.zeros((channels, (height + 2 * py) * wide + reach), np.float32)
        for c in used:
            for y in range(height):
                start = (y + py) * wide + px
                padded[c, start : start + width] = x[n, c, y]
        total = np.empty(length, np.float32)
        for o in range(len(bias)):
            total[:] = bias[o]
            for e in range(begin[o], begin[o + 1]):
                shift = dy[e] * wide + dx[e]
                shifted = padded[channel[e], shift : shift + length]
                weight = value[e]
                for p in range(length):
                    total[p] += weight * shifted[p]
            for y in range(rows_out):
                for z in range(cols_out):
                    out[n, o, y, z] = total[y * sy * wide + z * sx]
