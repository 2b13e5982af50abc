"""Interval arithmetic, rounded outwards: what a network's nodes can be over all inputs in a box.

Sums are formed in float64 in whatever order the library likes, so that a sum of n terms is off by at most
(n + 1) 2^-53 times the sum of their magnitudes; every bound is widened by more than that. What overflows or is not
known is infinite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ltx import operations
from ltx.activations import Activation
from ltx.errors import LtxError
from ltx.graph import Graph, Layer, Node

UNIT = 2.0**-52  # twice the relative error of one operation
TINY = 1e-300  # beyond what underflow may lose


@dataclass(frozen=True)
class Interval:
    """Numbers between `low` and `high`, tensors of one shape, float64."""

    low: Tensor
    high: Tensor

    @classmethod
    def exactly(cls, value: Tensor) -> Interval:
        return cls(value.double(), value.double())

    @classmethod
    def around(cls, value: Tensor, radius: Tensor) -> Interval:
        return cls(value - radius, value + radius).widened(TINY)

    @property
    def magnitude(self) -> Tensor:
        """No number in it is larger in magnitude."""
        return torch.maximum(self.low.abs(), self.high.abs())

    @property
    def width(self) -> Tensor:
        return (self.high - self.low) * (1 + 2 * UNIT)

    @property
    def positive(self) -> Interval:
        """max(x, 0) of its numbers."""
        return Interval(self.low.clamp_min(0), self.high.clamp_min(0))

    @property
    def negative(self) -> Interval:
        """min(x, 0) of its numbers."""
        return Interval(self.low.clamp_max(0), self.high.clamp_max(0))

    def widened(self, by: Tensor | float = 0.0) -> Interval:
        """By what some operations round off their results, which leaves their signs, and `by`; no end is NaN."""
        low, high = self.low - (4 * UNIT * self.low.abs() + by), self.high + (4 * UNIT * self.high.abs() + by)
        return Interval(torch.where(low.isnan(), -torch.inf, low), torch.where(high.isnan(), torch.inf, high))

    def __add__(self, other: Interval) -> Interval:
        return Interval(self.low + other.low, self.high + other.high).widened()

    def __sub__(self, other: Interval) -> Interval:
        return Interval(self.low - other.high, self.high - other.low).widened()

    def __neg__(self) -> Interval:
        return Interval(-self.high, -self.low)

    def __getitem__(self, index) -> Interval:
        return Interval(self.low[index], self.high[index])

    def map(self, function: Callable[[Tensor], Tensor]) -> Interval:
        """A monotone function that does not round, of each end: a view, a maximum over a window."""
        return Interval(function(self.low), function(self.high))

    def within(self, other: Interval) -> Interval:
        """The numbers that are in both."""
        return Interval(torch.maximum(self.low, other.low), torch.minimum(self.high, other.high))

    def where(self, choose: Tensor, other: Interval) -> Interval:
        """Its own numbers where `choose` (C,) says so, the other's elsewhere; channels come first."""
        choose = choose.view(-1, *[1] * (self.low.ndim - 1))
        return Interval(torch.where(choose, self.low, other.low), torch.where(choose, self.high, other.high))

    def scaled(self, scale: Tensor, shift: Tensor) -> Interval:
        """scale x + shift, (C,) each, float64."""
        scale, shift = (part.double().view(-1, *[1] * (self.low.ndim - 1)) for part in (scale, shift))
        ends = scale * self.low, scale * self.high
        margin = 4 * UNIT * (scale.abs() * self.magnitude + shift.abs()) + TINY
        return Interval(torch.minimum(*ends) + shift, torch.maximum(*ends) + shift).widened(margin)

    def __mul__(self, other: Interval) -> Interval:
        """Products of any two of their numbers."""
        ends = torch.stack([one * another for one in (self.low, self.high) for another in (other.low, other.high)])
        return Interval(ends.amin(0), ends.amax(0)).widened(TINY)

    def joined(self, other: Interval) -> Interval:
        """The numbers from the least to the largest of both."""
        return Interval(torch.minimum(self.low, other.low), torch.maximum(self.high, other.high))

    def through(self, phi: Activation) -> Interval:
        """phi of its numbers; functions of float64 are right to a few units in the last place."""
        slack = 0.0 if phi.exact else 4 * UNIT * self.magnitude + TINY
        found = Interval(*phi.range(self.low, self.high)).widened(slack)
        return Interval(*(end.clamp(*phi.limits) for end in (found.low, found.high)))

    def affine(self, weight: Tensor, how: tuple = (), *, terms: Tensor | None = None) -> Interval:
        """A convolution or linear layer without bias.

        Args:
            weight: (C_out, C_in, kh, kw) on (C, H, W), or (C_out, n) on (n,), float64.
            how: stride, padding, dilation.
            terms: where an entry is itself a sum, the sum of the magnitudes, for its rounding; of weight's shape. An
                entry is a sum of at most as many as weight has entries in a row, else this is larger.
        """
        centre, radius = (self.low + self.high) / 2, (self.high - self.low) / 2
        size = weight.abs()
        terms = size if terms is None else terms
        gamma = (2 * weight[0].numel() + 16) * UNIT
        slack = 2 * gamma * (terms.flatten(1).sum(1) * self.magnitude.max()) + TINY
        middle = operations.affine(centre[None], weight, None, *how)[0]
        spread = operations.affine(radius[None], size, None, *how)[0]
        return Interval.around(middle, spread + slack.view(-1, *[1] * (middle.ndim - 1)))

    def average(self, op: str, attributes: dict) -> Interval:
        """An average pooling of images (C, H, W)."""
        pooled = self.map(lambda end: operations.OPERATIONS[op]([end[None]], attributes)[0])
        return pooled.widened((self.low[0].numel() + 4) * UNIT * self.magnitude.max())

    def maximum(self, attributes: dict) -> Interval:
        """The largest of each window."""
        return self.map(lambda end: operations.OPERATIONS["max_pool"]([end[None]], attributes)[0])


def elementwise(node: Node, inside: list[Interval]) -> Interval:
    """A node of the target without weights."""
    x = inside[0]
    if node.batch_norm is not None:
        return x.scaled(node.batch_norm.scale, node.batch_norm.shift)
    if node.activation is not None:
        return x.through(node.activation)
    return x + inside[1] if node.op == "add" else x


def node_intervals(graph: Graph, box: Interval) -> dict[str, Interval]:
    """What every node of the target can be, (C, H, W) or (n,), over all images in a box (C, H, W)."""
    found: dict[str, Interval] = {}
    for node in graph.nodes:
        inside = [found[name] for name in node.inputs]
        if node.op == "input":
            found[node.name] = box
        elif node.layer is not None:
            layer = node.layer
            how = (layer.stride, layer.padding, layer.dilation)
            bias = torch.ones(len(layer.bias)), layer.bias
            found[node.name] = inside[0].affine(layer.weight.double(), how).scaled(*bias)
        elif node.op == "flatten":
            found[node.name] = inside[0].map(torch.flatten)
        elif node.op == "max_pool":
            found[node.name] = inside[0].maximum(node.attributes)
        elif node.op in operations.AVERAGES:
            found[node.name] = inside[0].average(node.op, node.attributes)
        else:
            found[node.name] = elementwise(node, inside)
    return found


def channel_intervals(graph: Graph, input_range: tuple[float, float]) -> Mapping[str, Interval]:
    """What every channel can be, (C,), wherever and however large the image is, its elements in `input_range`."""
    found: dict[str, Interval] = {}
    for node in graph.nodes:
        inside = [found[name] for name in node.inputs]
        if node.op == "input":
            low, high = (torch.tensor([float(value)], dtype=torch.float64) for value in input_range)
            found[node.name] = Interval(low, high)
        elif node.layer is not None:
            found[node.name] = _anywhere(node.layer, inside[0])
        else:  # pooling and flattening: no value outside those that there are
            found[node.name] = elementwise(node, inside)
    return found


def _anywhere(layer: Layer, x: Interval) -> Interval:
    """Behind a layer; the zero padding is one of its inputs."""
    if layer.kind == "conv" and any(layer.padding):
        x = Interval(x.low.clamp_max(0), x.high.clamp_min(0))
    weight = layer.weight.double().flatten(1)
    if weight.shape[1] % len(x.low):
        raise LtxError(f"a row with {weight.shape[1]} entries cannot read {len(x.low)} channels")
    each = x.map(lambda end: end.repeat_interleave(weight.shape[1] // len(end)))
    return each.affine(weight).scaled(torch.ones(len(weight)), layer.bias)
