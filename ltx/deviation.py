"""The account of section 6 of the design: how far a ticket's slots are from the target's activations, layer by layer.

In L+1 the slots of a channel deviate independently, and a subset sum amplifies their deviations by its own entries,
not by the parameter that it approximates; in 2L, and with sampled errors, a channel has one slot. Measured behind
every activation, where the next layer reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ltx.graph import Graph, Node
from ltx.ticket import Ticket


@dataclass(frozen=True)
class Deviation:
    """What is known of one activation of the target, over images, pixels and the slots that are read."""

    node: str
    slots: int  # read
    deviation: float  # root of the mean square of slot - target
    deviation_of_means: float  # the same of a channel's mean over its slots
    target_std: float  # of the target's activations, channels weighed like their slots
    gain: float | None  # deviation / that of the activation before; None for the first


def ticket_deviations(ticket: Ticket, target: Graph, images: Tensor) -> list[Deviation]:
    """Deviations of an explicit ticket from its target, in float32 on the images' device.

    Args:
        target: as the ticket was made for, batch norm folded or not.
        images: (N, C, H, W).
    """
    network = ticket.to_module(device=str(images.device))
    names = [n.name for n in target.nodes if n.op == "activation"]
    values = network.run(images, keep=names)
    labels = ticket.node_labels()
    result: list[Deviation] = []
    for node, theirs in run(target, images):
        if node.name not in names or node.name not in values:
            continue
        read = network.channels(node.name)
        slots = labels[node.name]
        meaning = read if slots is None else slots[read]
        live = meaning >= 0
        if not live.any():
            continue
        ours = values[node.name]
        result.append(_deviation(node.name, ours[:, live.to(ours.device)], theirs, meaning[live], result))
    return result


def sampled_deviations(changed: Graph, target: Graph, images: Tensor) -> list[Deviation]:
    """Deviations of a target with sampled errors, whose channels are its slots."""
    result: list[Deviation] = []
    for (node, theirs), (_, ours) in zip(run(target, images), run(changed, images), strict=True):
        if node.op == "activation":
            result.append(_deviation(node.name, ours, theirs, torch.arange(ours.shape[1]), result))
    return result


def _deviation(name: str, ours: Tensor, theirs: Tensor, channels: Tensor, before: list[Deviation]) -> Deviation:
    """ours (N, slots, ...) beside theirs (N, C, ...), perhaps flattened, of which slot s stands for channels[s]."""
    ours = ours.flatten(2) if ours.ndim > 2 else ours[:, :, None]
    theirs = theirs.reshape(len(theirs), -1, ours.shape[2])[:, channels.to(theirs.device)]
    difference = (ours - theirs).double()
    own = torch.zeros(len(channels), int(channels.max()) + 1, dtype=torch.float64, device=ours.device)
    own[torch.arange(len(channels)), channels] = 1
    own = own[:, own.any(0)]
    means = torch.einsum("nsp,sc->ncp", difference, own / own.sum(0))
    rms = float(difference.square().mean().sqrt())
    gain = rms / before[-1].deviation if before and before[-1].deviation > 0 else None
    return Deviation(
        name, len(channels), rms, float(means.square().mean().sqrt()), float(theirs.double().std()), gain
    )  # fmt: skip


@torch.no_grad()
def run(graph: Graph, images: Tensor) -> Iterator[tuple[Node, Tensor]]:
    """Every node of a target with its value, in order; parameters are brought to the images' device and type."""
    values: dict[str, Tensor] = {}
    last = {name: n for n, node in enumerate(graph.nodes) for name in node.inputs}
    for position, node in enumerate(graph.nodes):
        inputs = [values[name] for name in node.inputs]
        values[node.name] = images if node.op == "input" else _value(node, inputs)
        yield node, values[node.name]
        for name in node.inputs:
            if last[name] == position:
                values.pop(name, None)


def _value(node: Node, inputs: list[Tensor]) -> Tensor:
    x = inputs[0]
    if node.layer is not None:
        layer = node.layer
        weight, bias = layer.weight.to(x), layer.bias.to(x)
        if layer.kind == "linear":
            return nn.functional.linear(x, weight, bias)
        return nn.functional.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation)
    if node.batch_norm is not None:
        scale, shift = (t.to(x).view(-1, *[1] * (x.ndim - 2)) for t in (node.batch_norm.scale, node.batch_norm.shift))
        return x * scale + shift
    if node.activation is not None:
        return node.activation.fn(x)
    if node.op == "add":
        return inputs[0] + inputs[1]
    if node.op == "flatten":
        return x.flatten(1)
    if node.op == "max_pool":
        a = node.attributes
        return nn.functional.max_pool2d(x, a["kernel_size"], a["stride"], a["padding"])
    if node.op == "avg_pool":
        size = node.attributes["kernel_size"]
        return (
            x.mean((2, 3), keepdim=True)
            if size is None
            else nn.functional.avg_pool2d(x, size, node.attributes["stride"])
        )
    return x
