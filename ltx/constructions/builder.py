"""A ticket under construction: layers, masks and nodes are added front to back, what nothing reads is pruned."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ltx.activations import Activation
from ltx.constructions.rows import BaseSets, Problems, Rows, solve_rows
from ltx.errors import ConstructionError
from ltx.graph import Layer, above
from ltx.liveness import read_channels
from ltx.source import SourceLayer
from ltx.ticket import CONSTANT, DEAD, Ticket, TicketNode


@dataclass(frozen=True)
class Plan:
    """The settings of a construction."""

    base_set_size: int  # m
    epsilon: float
    seed: int
    selection: str = "smallest"
    scaling: str = "unit"
    device: str = "cpu"


@dataclass(frozen=True)
class Stream:
    """A tensor of the ticket's network and what its channels stand for."""

    node: str
    slots: Tensor | None  # (C, S) int64: source channels that carry target channel c; None: the image itself
    constants: Tensor  # (n,) int64: source channels that are constant
    constant_values: Tensor  # (n,) float64: their values
    bound: float  # no element is larger in magnitude
    nonnegative: bool = False
    vector: bool = False  # one number per channel: the output of a linear layer
    unflattened: str | None = None  # flattened images: the node before the flattening

    def channels(self, layer: Layer) -> tuple[Tensor, int]:
        """Slots (C, S) as `layer` sees them, and how many of its entries read one channel (K)."""
        if layer.kind == "conv":
            slots = torch.arange(layer.weight.shape[1])[:, None] if self.slots is None else self.slots
            return slots, layer.weight.shape[2] * layer.weight.shape[3]
        features = layer.weight.shape[1]
        if self.slots is None:
            return torch.arange(features)[:, None], 1
        if features % len(self.slots):
            raise ConstructionError(
                f"a linear layer with {features} inputs cannot read {len(self.slots)} flattened channels"
            )
        return self.slots, features // len(self.slots)


@dataclass(frozen=True)
class Outputs:
    """What a layer has to provide to those behind it."""

    copies: int  # slots of every channel that is read
    read: Tensor  # (C_out,) bool: channels that anything reads
    constants: int  # constant slots


class TicketBuilder:
    """Collects source layers with their masks, and the nodes of the ticket's network."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.layers: list[SourceLayer] = []
        self.nodes: list[TicketNode] = []
        self.masks: dict[str, Tensor] = {}
        self.bias_masks: dict[str, Tensor] = {}
        self.slots: dict[str, Tensor] = {}
        self.given: dict[str, Tensor] = {}
        self.problems = 0
        self.failures = 0

    def add_node(self, name: str, op: str, inputs: tuple[str, ...], **attributes) -> str:
        if any(node.name == name for node in self.nodes):
            raise ConstructionError(f"two nodes are called '{name}'; rename a module of the network")
        self.nodes.append(TicketNode(name, op, inputs, attributes))
        return name

    def add_activation(self, name: str, node: str, phi: Activation) -> str:
        return self.add_node(name, "activation", (node,), **phi.attributes)

    @property
    def width(self) -> int:
        """Output channels of the last source layer."""
        return self.layers[-1].shape[0]

    def add_layer(self, layer: SourceLayer, node: str, mask: Tensor, labels: Tensor) -> str:
        """Add a source layer that reads `node` and keeps `mask`; `labels` say what its rows stand for."""
        self.layers.append(layer)
        self.masks[layer.name], self.slots[layer.name] = mask, labels
        return self.add_node(layer.name, "layer", (node,), layer=layer.name)

    def approximate(
        self, name: str, target: Layer, node: str, problems: list[Problems], bases: BaseSets,
        outputs: Outputs, constant: Problems | None, *, taps: int, sigma: float, role: str,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Solve the rows of a source layer that approximates `target` behind the last layer, and add it.

        Args:
            taps: entries of a row that read one of its input channels.
            sigma, role: of the source layer.
            constant: problems of a row that is constant before the activation; no problems where a fully
                pruned row serves; None where no constant slots are wanted.

        Returns:
            slots (C_out, copies), constant slots (n,), and the constants' values before the activation (n,).
        """
        linear = target.kind == "linear"
        layer = SourceLayer(
            name, len(self.layers), target.kind,
            (0, self.width * taps) if linear else (0, self.width, *target.weight.shape[2:]), taps, sigma=sigma,
            stride=target.stride, padding=target.padding, dilation=target.dilation,
            opposite="columns" if bases.paired else "none", role=role, target=name,
        )  # fmt: skip
        channel = outputs.read.nonzero().flatten()
        kinds = [*problems, *([] if constant is None else [constant])]
        count = 0 if constant is None else outputs.constants
        wanted = channel.repeat_interleave(outputs.copies).tolist() + [len(problems)] * count
        names = [f"channel {c}" for c in range(len(problems))] + ["constant channel"]
        plan = self.plan
        found: Rows = solve_rows(
            layer, plan.seed, kinds, wanted, bases, plan.epsilon, selection=plan.selection,
            device=plan.device, names=names,
        )  # fmt: skip
        self.problems, self.failures = self.problems + found.problems, self.failures + found.failures
        copies = len(channel) * outputs.copies
        slots = torch.full((len(problems), outputs.copies), -1, dtype=torch.int64)
        slots[channel] = found.row[:copies].view(-1, outputs.copies)
        width = max(found.width, 1)  # a layer has rows even where nothing reads it
        labels = torch.full((width,), DEAD, dtype=torch.int64)
        labels[found.row[:copies]] = channel.repeat_interleave(outputs.copies)
        labels[found.row[copies:]] = CONSTANT
        layer = replace(layer, shape=(width, *layer.shape[1:]))
        self.add_layer(layer, node, found.mask, labels)
        return slots, found.row[copies:], found.sums[copies:]

    def finish(self, **metadata) -> Ticket:
        """Prune what nothing reads, back to front, and name the result."""
        self._drop_unread_nodes()
        self._prune_unread_rows()
        return Ticket(
            seed=self.plan.seed, law="uniform", base_set_size=self.plan.base_set_size,
            epsilon=self.plan.epsilon, selection=self.plan.selection, layers=tuple(self.layers),
            graph=tuple(self.nodes), masks=self.masks, bias_masks=self.bias_masks, slots=self.slots,
            given=self.given, **metadata,
        )  # fmt: skip

    def _drop_unread_nodes(self) -> None:
        read, kept = {self.nodes[-1].name}, []
        for node in reversed(self.nodes):
            if node.name in read:
                read.update(node.inputs)
                kept.append(node)
        self.nodes = kept[::-1]

    def _prune_unread_rows(self) -> None:
        layers = {layer.name: layer for layer in self.layers}
        read_channels(self.nodes, self.given, lambda name, read: self._prune_rows(layers[name], read))

    def _prune_rows(self, layer: SourceLayer, read: Tensor) -> Tensor:
        """Empty the rows that are not read; the input channels that the others read."""
        keep = torch.zeros(layer.shape[0], dtype=torch.bool)
        keep[read] = True
        mask = self.masks[layer.name]
        mask = mask[keep[mask // layer.row_size]]
        self.masks[layer.name] = mask
        if layer.name in self.bias_masks:
            bias = self.bias_masks[layer.name]
            self.bias_masks[layer.name] = bias[keep[bias]]
        self.slots[layer.name] = torch.where(keep, self.slots[layer.name], DEAD)
        return mask % layer.row_size // layer.taps


def constant_row(outputs: Outputs, base: int, tap: int, *, free: bool) -> Problems | None:
    """The problems of a row that is constant: to sum the constants of base set `base` to 1 before its activation.

    None where no such row is wanted; no problems where `free`: with phi(0) != 0 a fully pruned row will do.
    """
    if not outputs.constants:
        return None
    one = Problems(torch.tensor([base]), torch.tensor([tap]), torch.ones(1, dtype=torch.float64))
    return Problems(one.base[:0], one.tap[:0], one.theta[:0]) if free else one


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
            raise ConstructionError(
                f"layer {name}: every tap of its kernel {tuple(target.weight.shape[2:])} reads the zero padding "
                f"{target.padding} somewhere, so that its bias cannot be represented; pad by at most half the kernel"
            )
        tap.append(inside[len(inside) // 2])
    return tap[0] * target.weight.shape[3] + tap[1] if taps > 1 else 0


def target_problems(target: Layer, taps: int, epsilon: float, base: Tensor, constant: int, tap: int) -> list[Problems]:
    """The subset-sum problems of every output channel: one per base set and parameter above epsilon.

    Args:
        base: (C_in, n) int64, the n base sets of each input channel.
        constant: the base set of constants, for the bias.
        tap: the tap that reads a constant.
    """
    weight = target.weight.view(len(target.weight), -1, taps).double()
    result = []
    for row, bias in zip(weight, target.bias.double(), strict=True):
        channel, k = above(row, epsilon).nonzero(as_tuple=True)
        sets = base[channel]  # (P, n)
        theta = row[channel, k][:, None].expand_as(sets)
        parts = (sets.flatten(), k[:, None].expand_as(sets).flatten(), theta.flatten())
        if above(bias, epsilon):
            extra = (torch.tensor([constant]), torch.tensor([tap]), bias[None])
            parts = tuple(torch.cat(pair) for pair in zip(parts, extra, strict=True))
        result.append(Problems(*parts))
    return result
