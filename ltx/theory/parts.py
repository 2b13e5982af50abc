"""The layers that a construction approximates, as the theorems see them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ltx.activations import ACTIVATIONS
from ltx.checks import interval, one_of
from ltx.constructions import CONSTRUCTIONS, SCALINGS
from ltx.constructions.layout import IMAGE, VECTORS, Layout, constant_value, nonnegative
from ltx.constructions.problems import constant_tap, layer_scale
from ltx.constructions.strides import PairGeometry, pair_geometry, pair_kernel_of
from ltx.constructions.two_for_one import pair_activation, pair_law
from ltx.errors import LtxError
from ltx.graph import Graph, Layer
from ltx.intervals import channel_intervals
from ltx.source import LAWS


@dataclass(frozen=True)
class Demand:
    """Parameters of a layer, and what the entries of their base sets are: numbers of the law, each so many times."""

    largest: float  # magnitude of a parameter
    least: float
    most: float

    @property
    def theta(self) -> float:
        """The largest target, as Corollary 2.2 has it."""
        return self.largest / self.least if self.least else math.inf


@dataclass(frozen=True)
class Part:
    """A layer as a construction sees it."""

    layer: Layer
    weight: Tensor  # (C_out, C_in, K) float64, by the channels that it reads
    reads: str  # stream; IMAGE: the image
    writes: str  # stream
    pair: bool  # whether two source layers stand for it
    signs: int  # base sets of every weight
    signed: bool  # whether the entries of the 1x1 layer must have a sign
    opposite: bool  # rows of the 1x1 layer come in opposite pairs
    exact: bool  # whether the pair is exactly linear on either side of 0
    largest_input: float
    scale: float
    reach: float  # no entry of its base sets is larger in magnitude than so many times the scale
    geometry: PairGeometry | None  # of a pair
    largest_sum: float  # of constants: a bias, or 1 where a row makes new ones; 0: it reads none
    makes_constants: bool  # whether a row does
    maker: str  # the layer whose row makes those that it reads; of the image: none
    constant: Callable[[float], tuple[float, float]]  # deviation of the row that makes them -> what constants count for

    def demands(self, off: float) -> tuple[Demand, ...]:
        """Weights, then what is made of constants, whose base sets are so many times as large as the constants are.

        Args:
            off: by how much the row may be off that makes the constants which the layer reads.
        """
        weights = Demand(float(self.weight.abs().max()), self.scale, self.scale)
        if not self.largest_sum:
            return (weights,)
        least, most = self.constant(off)
        return weights, Demand(self.largest_sum, self.scale * least, self.scale * most)

    @property
    def copied(self) -> int:
        """Input channels of a pair, each as often as there are positions at which a row that copies it is pruned."""
        assert self.geometry is not None
        at = torch.zeros(self.weight.shape[1], int(self.geometry.first.max()) + 1, dtype=torch.bool)
        channel, tap = self.weight.ne(0).any(0).nonzero(as_tuple=True)
        at[channel, self.geometry.first[tap]] = True
        return int(at.sum())

    @property
    def parameters(self) -> int:
        """Nonzero weights and biases."""
        return int(self.layer.weight.count_nonzero() + self.layer.bias.count_nonzero())

    @property
    def problems(self) -> int:
        """Of one row of every channel."""
        return int(self.layer.weight.count_nonzero()) * self.signs + int(self.layer.bias.count_nonzero())

    @property
    def largest_row(self) -> int:
        """Parameters of a row, the most."""
        return int((self.weight.flatten(1).count_nonzero(1) + (self.layer.bias != 0)).max())

    @property
    def several(self) -> bool:
        """Whether it reads several slots of a channel, which deviate each on its own."""
        return not self.pair

    @property
    def linear(self) -> bool:
        """Whether nothing is added by a linearisation."""
        return not self.pair or self.exact

    def gain(self, epsilon: float, m: int) -> float:
        """By how much the sum of a row's entries may enlarge the deviation of what it reads."""
        if self.several:
            return self.largest_row * m * self.reach * self.scale
        off = epsilon if self.linear else 2 * epsilon  # linear near 0 only: off in proportion to what is read
        return float(self.weight.flatten(1).abs().sum(1).max()) + self.largest_row * off


def parts_of(
    graph: Graph, joined: Layout, construction: str, kept: Sequence[str], input_range: tuple[float, float],
    scaling: str, law: str, kernel: int = 1, stride: str = "second",
) -> dict[str, Part]:  # fmt: skip
    """The layers that are approximated, in their order.

    Raises:
        LtxError: a law, construction, scaling or pair that is not known, no range.
        ConstructionError: a bias whose constants read the zero padding wherever the kernel looks.
    """
    one_of("law", law, LAWS)
    one_of("construction", construction, CONSTRUCTIONS)
    one_of("scaling", scaling, SCALINGS)
    input_range, kernel = interval("input_range", input_range), pair_kernel_of(kernel, stride)
    bounds, never_negative, found = channel_intervals(graph, input_range), nonnegative(graph, input_range), {}
    for name, layer in graph.layers.items():
        if name in kept:
            continue
        before = graph[name].inputs[0]
        reads, inside = joined.stream[before], bounds[before]
        weight = layer.weight.double()
        if layer.kind == "conv":
            weight = weight.flatten(2)
        elif reads != IMAGE:
            weight = weight.view(len(weight), len(graph.layers[joined.writers[reads][0]].weight), -1)
        else:
            weight = weight[:, :, None]
        scale, pair = layer_scale(layer, scaling), construction == "2L" or reads == IMAGE
        phi = pair_activation(graph, name) if pair else ACTIVATIONS["identity"]
        rows = pair_law(phi, before in never_negative)
        taps, geometry, needed = weight.shape[2], None, name in joined.needs
        if pair:
            # also flattened images of 1x1, which are no vectors
            image = layer.kind == "conv" or (reads != IMAGE and joined.kind[before] != VECTORS)
            geometry = pair_geometry(layer, name, taps, image=image, kernel=kernel, stride=stride, needed=needed)
        else:
            constant_tap(layer, name, taps, needed=needed)
        how = joined.constants.get(joined.stream[name])
        makes = how is not None and how.sums and joined.writers[joined.stream[name]][0] == name
        largest_sum = max(float(layer.bias.abs().max()), float(makes)) if needed else 0.0
        share = phi.slope_pos / rows.gain if len(rows.signs) == 2 else 1.0  # theirs is one of two base sets
        found[name] = Part(
            layer, weight, reads, joined.stream[name], pair, len(rows.signs), rows.signs != (0,), rows.opposite,
            phi.exact, float(inside.magnitude.max()), scale, LAWS[law].largest, geometry, largest_sum, makes,
            "" if reads == IMAGE else joined.writers[reads][0], partial(_constant, graph, joined, before, share),
        )  # fmt: skip
    return found


def _constant(graph: Graph, joined: Layout, place: str, share: float, off: float) -> tuple[float, float]:
    """The least and the largest magnitude of constants at a node of the target, times `share`; 1 beside the image.

    Args:
        off: by how much the row may be off that sums them to 1.
    """
    how = joined.constants.get(joined.stream[place])
    if how is None:
        return share, share
    first = joined.writers[joined.stream[place]][0]
    rows = torch.linspace(1 - off, 1 + off, 33, dtype=torch.float64) * float(how.sums)
    values = constant_value(graph, place, {first: rows}, torch.full((33,), how.norm))
    least = float(values.abs().min()) if values.min() > 0 or values.max() < 0 else 0.0
    return share * least, share * float(values.abs().max())


def check(holds: bool, why: str) -> None:
    """LtxError where it does not hold."""
    if not holds:
        raise LtxError(why)
