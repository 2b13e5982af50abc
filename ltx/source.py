"""The source network f_0 as a function: any parameter from its indices and the seed, nothing stored.

Parameter (layer l, output channel o, input channel i, tap k) of the source is

    block, word = divmod(i * K + k, 4)                     # K taps in the layer's kernel
    r = philox4x32_10(counter=(block, block >> 32, o, l), key=seed)[word]
    u = (r >> 8) * 2**-24
    w = sigma_l * (2 * u - 1)                              # law uniform on [-sigma_l, sigma_l), Assumption 2.1
    w = sigma_l * float32(Phi^-1(u + 2**-25))              # law normal, of standard deviation sigma_l

and the bias of channel o the same with l | 0x80000000 and i = k = 0. The generator is Random123's, Phi the standard
normal distribution; CPU and GPU give the same bits. A value depends on its indices alone: widening a layer changes
nothing that was there before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numba
import numpy as np
import torch
from torch import Tensor

from ltx.checks import one_of
from ltx.compiled import compiled

BIAS_LAYER = 0x80000000
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


@dataclass(frozen=True)
class SourceLayer:
    """One layer of the source network, as wide as the construction used it up."""

    name: str
    index: int  # l: position in the order in which the source applies its layers
    kind: str  # "conv" or "linear"
    shape: tuple[int, ...]  # (C_out, C_in, kernel...)
    taps: int  # K: entries that read one input channel; for a linear layer behind a flatten, its H * W
    sigma: float = 1.0  # parameters lie in [-sigma, sigma), normal ones have it as standard deviation; a float32
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    opposite: str = "none"  # looks_linear: "rows" 2n and 2n + 1 are opposites, or the "columns" that read them
    bias: bool = False  # only the first layer of a source has biases
    role: str = "direct"  # "copies" | "pair": first and second layer of a two-for-one pair; "direct": L+1
    target: str = ""  # the target layer that it approximates
    law: str = "uniform"  # one of LAWS, the same in all layers of a source

    def __post_init__(self):
        one_of(f"layer {self.name}: law", self.law, LAWS)

    @property
    def row_size(self) -> int:
        """Parameters of one output channel, without its bias."""
        size = 1
        for n in self.shape[1:]:
            size *= n
        return size

    @property
    def parameters(self) -> int:
        """All random parameters of the layer."""
        return self.shape[0] * (self.row_size + self.bias)

    @property
    def largest(self) -> float:
        """A magnitude that no parameter exceeds."""
        return LAWS[self.law].largest * self.sigma


def weights(layer: SourceLayer, seed: int, rows: Tensor, offsets: Tensor) -> Tensor:
    """Weights of a source layer at output channels `rows` and positions `offsets` = i * K + k.

    Args:
        rows, offsets: int64, any one shape, on the device where the values are wanted.

    Returns:
        float32 of the same shape; the same bits on every device.
    """
    if layer.opposite == "rows":
        sign, rows = 1 - 2 * (rows & 1), rows & ~1
    elif layer.opposite == "columns":
        channel = offsets.div(layer.taps, rounding_mode="floor")
        sign, offsets = 1 - 2 * (channel & 1), offsets - (channel & 1) * layer.taps
    else:
        sign = None
    values = _drawn(layer, seed, layer.index, rows, offsets)
    return values if sign is None else values * sign.to(values.dtype)


def biases(layer: SourceLayer, seed: int, rows: Tensor) -> Tensor:
    """Biases of a source layer at output channels `rows` (int64); float32 of the same shape."""
    sign = 1
    if layer.opposite == "rows":
        sign, rows = (1 - 2 * (rows & 1)).float(), rows & ~1
    return _drawn(layer, seed, layer.index | BIAS_LAYER, rows, torch.zeros_like(rows)) * sign


def _drawn(layer: SourceLayer, seed: int, index: int, rows: Tensor, offsets: Tensor) -> Tensor:
    return LAWS[layer.law].of_uniform(uniform(seed, index, rows, offsets)) * layer.sigma


def uniform(seed: int, layer: int, rows: Tensor, offsets: Tensor) -> Tensor:
    """Uniform on [-1, 1), float32, of each (layer, row, offset)."""
    if rows.device.type == "cpu":
        where = (t.flatten().contiguous().numpy() for t in (rows, offsets))  # one layout: compiled once
        flat = _uniform_cpu(np.uint64(seed), np.uint64(layer), *where)
        return torch.from_numpy(flat).view(offsets.shape)
    return _uniform_by_tensors(seed, layer, rows, offsets)


def normal(values: Tensor) -> Tensor:
    """Standard normal numbers, float32, of what `uniform` has drawn: quantiles of the middles of its 2^24 steps."""
    return _quantiles(str(values.device))[((values + 1) * 2.0**23).long()]


@cache
def _quantiles(device: str) -> Tensor:
    """Of the standard normal distribution at u + 2^-25 for u = 0, 2^-24, ..., (2^24,) float32, 64 MiB.

    They come from one table, of a CPU's float64, and so are the same everywhere: none of them is within 23 units in the
    last place of float64 of where float32 rounds the other way, and PyTorch's and SciPy's ndtri, off by 3 such units
    where that was looked at, differ by 5 at most.
    """
    if device != "cpu":
        return _quantiles("cpu").to(device)
    low = torch.special.ndtri((torch.arange(2**23, dtype=torch.float64, device=device) + 0.5) * 2.0**-24).float()
    return torch.cat([low, -low.flip(0)])


@dataclass(frozen=True)
class Law:
    """A distribution of parameters with sigma 1."""

    of_uniform: Callable[[Tensor], Tensor]  # numbers of `uniform` -> as many of this law
    largest: float  # no number is larger in magnitude


LAWS = {"uniform": Law(lambda values: values, 1.0), "normal": Law(normal, 5.42)}


def _uniform_by_tensors(seed: int, layer: int, rows: Tensor, offsets: Tensor) -> Tensor:
    block = offsets >> 2
    words = philox4x32_10((block & _LOW, block >> 32, rows, torch.full_like(rows, layer)), _key(seed))
    word = offsets & 3
    bits = torch.where(word < 2, torch.where(word == 0, words[0], words[1]),
                       torch.where(word == 2, words[2], words[3]))  # fmt: skip
    return (bits >> 8).float() * 2.0**-23 - 1.0


def philox4x32_10(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Random123's Philox 4x32 with 10 rounds, on int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1  # wraps modulo 2**64, which leaves all 64 bits of the product right
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW,
        )  # fmt: skip
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


def _key(seed: int) -> tuple[int, int]:
    return seed & _LOW, seed >> 32


@compiled(inline="always")
def _philox_word(c0, c1, c2, c3, k0, k1, word):
    low, shift = np.uint64(_LOW), np.uint64(32)
    for _ in range(10):
        p0, p1 = c0 * np.uint64(_M0), c2 * np.uint64(_M1)
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ k0, p1 & low, (p0 >> shift) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + np.uint64(_W0)) & low, (k1 + np.uint64(_W1)) & low
    if word == 0:
        return c0
    if word == 1:
        return c1
    return c2 if word == 2 else c3


@compiled(parallel=True)
def _uniform_cpu(seed, layer, rows, offsets):
    low, shift = np.uint64(_LOW), np.uint64(32)
    out = np.empty(len(rows), np.float32)
    for n in numba.prange(len(rows)):
        block = np.uint64(offsets[n] >> 2)
        bits = _philox_word(
            block & low, block >> shift, np.uint64(rows[n]), layer, seed & low, seed >> shift, offsets[n] & 3
        )
        out[n] = np.float32(np.float32(bits >> np.uint64(8)) * np.float32(2.0**-23)) - np.float32(1.0)
    return out
