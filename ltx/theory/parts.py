"""The layers that a construction approximates, as the theorems see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ltx.activations import ACTIVATIONS
from ltx.constructions.builder import layer_scale
from ltx.constructions.layout import IMAGE, Layout
from ltx.constructions.strides import PairGeometry, pair_geometry
from ltx.constructions.two_for_one import pair_activation, pair_law
from ltx.errors import LtxError
from ltx.graph import Graph, Layer
from ltx.intervals import channel_intervals
from ltx.source import LAWS


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
    """The layers that are approximated, in their order."""
    check(construction in ("2L", "L+1"), f"construction '{construction}' is not known; there are 2L, L+1")
    check(law in LAWS, f"law '{law}' is not known; there are {', '.join(LAWS)}")
    bounds, found = channel_intervals(graph, input_range), {}
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
        rows = pair_law(phi, bool((inside.low >= 0).all()))
        taps, geometry = weight.shape[2], None
        if pair:
            image = layer.kind == "conv" or taps > 1
            geometry = pair_geometry(layer, name, taps, image=image, kernel=kernel, stride=stride)
        found[name] = Part(
            layer, weight, reads, joined.stream[name], pair, len(rows.signs), rows.signs != (0,), rows.opposite,
            phi.exact, float(inside.magnitude.max()), scale, LAWS[law].largest, geometry,
        )  # fmt: skip
    return found


def require_within_reach(parts: Mapping[str, Part]) -> None:
    """LtxError where a parameter is beyond the scale of its layer's base sets: Corollary 2.2 says nothing of it."""
    for name, part in parts.items():
        largest = max(float(part.layer.weight.abs().max()), float(part.layer.bias.abs().max()))
        why = f"layer {name}: a parameter of {largest:g} is beyond {part.scale:g}; use scaling=layer_max"
        check(largest <= part.scale, why)


def check(holds: bool, why: str) -> None:
    """LtxError where it does not hold."""
    if not holds:
        raise LtxError(why)
