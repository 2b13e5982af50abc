"""The account of section 6 of the design: how far a ticket's slots are from the target's activations, layer by layer.

In L+1 the slots of a channel deviate independently, and a subset sum amplifies their deviations by its own entries,
not by the parameter that it approximates; in 2L, and with sampled errors, a channel has one slot. Measured behind
every activation, where the next layer reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ltx.defaults import usual_defaults
from ltx.graph import Graph, run, trace
from ltx.network import TicketNetwork
from ltx.ticket import Ticket


@dataclass(frozen=True)
class Deviation:
    """What is known of one activation of the target, over images, pixels and the slots that are read."""

    node: str
    slots: int  # read
    deviation: float  # root of the mean square of slot - target
    deviation_of_means: float  # the same of a channel's mean over its slots
    largest: float  # of |slot - target|
    target_std: float  # of the target's activations, channels weighed like their slots
    gain: float | None  # deviation / that of the activation before; None for the first


@usual_defaults()
def ticket_deviations(
    ticket: Ticket, target: nn.Module | Graph, images: Tensor, *, network: TicketNetwork | None = None
) -> list[Deviation]:
    """Deviations of an explicit ticket from its target, in float32 on the images' device.

    Args:
        target: the network that the ticket was made for, or its graph, batch norm folded or not.
        images: (N, C, H, W).
        network: the ticket as a module, where there is one already.
    """
    target = trace(target)
    network = network or ticket.to_module(device=str(images.device), outputs_only=True)
    names = [n.name for n in target.nodes if n.op == "activation"]
    with torch.no_grad():
        values = network.run(images, keep=names)
    labels = ticket.node_labels()
    result: list[Deviation] = []
    for node, theirs in run(target, images):
        if node.name not in names or node.name not in values:
            continue
        read = network.channels(node.name)
        slots = labels[node.name]
        if slots is None:  # of the image, which is not off
            continue
        meaning = slots[read]
        live = meaning >= 0
        if not live.any():
            continue
        ours = values[node.name]
        result.append(_deviation(node.name, ours[:, live.to(ours.device)], theirs, meaning[live], result))
    return result


@usual_defaults()
def sampled_deviations(changed: nn.Module | Graph, target: nn.Module | Graph, images: Tensor) -> list[Deviation]:
    """Deviations of a target with sampled errors, whose channels are its slots."""
    result: list[Deviation] = []
    for (node, theirs), (_, ours) in zip(run(trace(target), images), run(trace(changed), images), strict=True):
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
        name, len(channels), rms, float(means.square().mean().sqrt()), float(difference.abs().max()),
        float(theirs.double().std()), gain,
    )  # fmt: skip
