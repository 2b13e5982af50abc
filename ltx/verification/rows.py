"""Do the rows of a ticket with `selection=feedback` compute what they claim on the calibration images?

The claim is the root mean square of what a slot is off at the samples: behind the batch norm of its layer and, where
the other side of a residual block's sum is there before the layer, behind that sum.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ltx.graph import Graph, run
from ltx.ticket import Ticket

ROUNDING = 1e-2  # of a claim, beside that of sums in float32:
NOISE = 2e-3  # of the standard deviation of the target's values,
FLOAT32 = 16 * 2.0**-23  # and of their root mean square, where they hardly vary;
OWN = 4.0  # times what float32 really leaves of the layer's values, where that is more: behind opposite rows, say
UNDERFLOW = 2.0**-63  # the smallest error whose square is a normal float32
PART = 32  # images at a time
EXACT = 8  # images by which that is measured, or as many shades of fewer, since each rounds anew
SHADE = 2.0**-10  # by which one is darker than the one before


@dataclass(frozen=True)
class _Claim:
    layer: str  # of the ticket
    node: str  # where it is measured, in ticket and target
    positions: Tensor  # (N,) ascending flat (image, y, x)


class Rows:
    """Runs a ticket and its target on calibration images and compares the errors of the rows with the claims."""

    def __init__(self, ticket: Ticket, target: Graph, images: Tensor):
        self.ticket, self.target, self.images = ticket, target, images.detach().float()
        self.measured = 0
        self.largest = 0.0  # error / standard deviation of the target's values, or their size where they are constant

    def run(self) -> Iterator[str]:
        said = json.loads(self.ticket.feedback)
        digest = hashlib.sha256(self.images.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()
        if said["images_sha256"] != digest:
            yield f"calibration images: have SHA-256 {digest[:12]}..., the ticket names {said['images_sha256'][:12]}..."
            return
        if said["images"] != len(self.images):
            yield f"calibration images: there are {len(self.images)}, the ticket names {said['images']}"
            return
        shapes = {node.name: value.shape for node, value in run(self.target, self.images[:1])}
        claims = []
        for layer in self.ticket.layers:
            if layer.name in self.ticket.errors:
                pixels = shapes[layer.target][2:].numel()
                total = pixels * len(self.images)
                order = np.random.default_rng([self.ticket.seed, 1, layer.index]).permutation(total)
                many = total if layer.kind == "linear" else said["samples"]
                chosen = torch.from_numpy(np.sort(order[:many]))
                claims.append(_Claim(layer.name, _measured_at(self.target, layer.target, shapes), chosen))
        squares, sums, spread = {}, {}, {}
        network = self.ticket.to_module(device=str(self.images.device), outputs_only=True)
        nodes, noise = {claim.node for claim in claims}, None
        for begin in range(0, len(self.images), PART):
            part = self.images[begin : begin + PART]
            with torch.no_grad():
                ours = network.run(part, keep=nodes)
            theirs = {node.name: value for node, value in run(self.target, part) if node.name in nodes}
            for claim in claims:
                labels = self.ticket.slots[claim.layer][network.channels(claim.node)]
                mine, wanted = (_pixels(values[claim.node]) for values in (ours, theirs))
                here = claim.positions - begin * mine.shape[2]
                here = here[(here >= 0) & (here < len(part) * mine.shape[2])].to(part.device)
                image, pixel = here // mine.shape[2], here % mine.shape[2]
                mine, wanted = mine[image, :, pixel].double(), wanted[image, :, pixel].double()
                off = (mine - wanted[:, labels.clamp_min(0).to(part.device)]).square().sum(0).cpu()
                key = claim.layer
                squares[key] = squares.get(key, 0) + off
                sums[key] = sums.get(key, 0) + wanted.sum(0).cpu()
                spread[key] = spread.get(key, 0) + wanted.square().sum(0).cpu()
        for claim in claims:
            read = network.channels(claim.node)
            labels = self.ticket.slots[claim.layer][read]
            many = len(claim.positions)
            std = (spread[claim.layer] / many - (sums[claim.layer] / many).square()).clamp_min(0).mean().sqrt()
            error = (squares[claim.layer] / many).sqrt()[labels >= 0]
            said_error = self.ticket.errors[claim.layer][read][labels >= 0].double()
            self.measured += len(error)
            rms = (spread[claim.layer] / many).mean().sqrt()
            if len(error) and bool(error.max() > 0):
                self.largest = max(self.largest, float(error.max() / (std if std > FLOAT32 * rms else rms)))
            bearable = ROUNDING * said_error + NOISE * std + FLOAT32 * rms + UNDERFLOW
            wrong = ~((error - said_error).abs() <= bearable)
            if bool(wrong.any()):
                noise = noise or self._noise(nodes)
                wrong = ~((error - said_error).abs() <= bearable + OWN * noise[claim.node])
            for at in wrong.nonzero().flatten()[:1].tolist():
                yield (
                    f"layer {claim.layer}, row {int(read[labels >= 0][at])}: its error on the calibration images is "
                    f"{float(error[at]):.4g}, the ticket claims {float(said_error[at]):.4g}"
                )

    def _noise(self, nodes: Collection[str]) -> dict[str, float]:
        """What float32 changes of the ticket's values: the largest root mean square of a channel at each node.

        Or at a node before it, in proportion to the size of the values: what a pair leaves may happen to cancel behind
        it, and need not where the construction added it up.
        """
        images, device = self.images[:EXACT], str(self.images.device)
        single, double = self.ticket.to_module(device=device), self.ticket.to_module(device=device).double()
        order = [node.name for node in self.ticket.graph if node.name in nodes]
        squares: dict[str, list[tuple[Tensor, Tensor]]] = {node: [] for node in order}  # of what is off, of values
        for shade in range(math.ceil(EXACT / len(images))):  # apart: matrix products of one row round otherwise
            darker = images * (1 - SHADE * shade)
            with torch.no_grad():
                ours, exact = single.run(darker, keep=nodes), double.run(darker.double(), keep=nodes)
            for node in order:
                off = _pixels(ours[node].double() - exact[node]).square().mean((0, 2))
                squares[node].append((off, exact[node].square().mean()))
        found, share = {}, 0.0
        for node in order:
            off, size = (float(torch.stack(part).mean(0).max().sqrt()) for part in zip(*squares[node], strict=True))
            share = max(share, off / size if size else 0.0)
            found[node] = max(off, share * size)
        return found


def _pixels(values: Tensor) -> Tensor:
    return values.flatten(2) if values.ndim > 2 else values[:, :, None]


def _measured_at(target: Graph, layer: str, shapes: Mapping[str, torch.Size]) -> str:
    """Behind a layer its batch norm, and a sum with what is computed before it and has as many pixels."""
    order = [node.name for node in target.nodes]
    name = layer
    while True:
        after = [node for node in target.nodes if name in node.inputs]
        if len(after) != 1 or after[0].op not in ("batch_norm", "add"):
            return name
        beside = [other for other in after[0].inputs if other != name]
        if after[0].op == "add" and (
            not beside or order.index(beside[0]) > order.index(layer) or shapes[beside[0]] != shapes[layer]
        ):
            return name
        name = after[0].name
