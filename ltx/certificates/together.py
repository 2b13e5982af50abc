"""Slots of one channel share what they stand for, and so their activation's slope.

Behind the first layer the deviations d_s of the slots of a channel with value z are nearly convolutions of the image,
each another one. With a slope between s - r and s + r, phi(z + d_s) - phi(z) - s d_s is at most r |d_s| for each slot
by itself. But phi(z + d_s) - phi(z) = phi'(z) d_s up to d_s^2 / 2 times the largest |phi''|, with the same phi'(z) for
all, so that a form f of them is off from s sum f_s d_s by at most

    r |sum over s of f_s d_s|  +  sum over s of |f_s| max |phi''| d_s^2 / 2,

where the convolutions of the slots add up before magnitudes are taken, and cancel as far as they do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ltx.activations import from_attributes
from ltx.certificates.forwards import Forwards, Slots
from ltx.intervals import TINY, UNIT, Interval
from ltx.ticket import TicketNode


def together(walk: Forwards, node: TicketNode, form: Tensor) -> tuple[Tensor, Interval]:
    """A slope for every slot (C, H, W), and bounds (O,) of what the form (O, C, H, W) is off with these slopes."""
    before, phi = walk.slots[node.inputs[0]], from_attributes(node.attributes)
    assert before.linear is not None
    theirs = walk.theirs(before)
    least, largest = phi.slopes(theirs.low, theirs.high)
    slope = (least + largest) / 2
    reach = (largest - least) * (0.5 + 4 * UNIT)
    alone = walk.beside(node, slope)
    curved = (before.off.magnitude.square() * (phi.curvature / 2) + walk.fall(node)) * (1 + 8 * UNIT) + TINY
    low, high, sizes = (torch.zeros(len(form), dtype=torch.float64) for _ in range(3))
    patches = _patches(walk, before)
    for channel in before.labels[before.labels >= 0].unique().tolist():
        slots = (before.labels == channel).nonzero().flatten()
        part = form[:, slots]
        size = part.abs()
        off = reach[slots[0]] * _sum(before, slots, part, *patches) + (size * curved[slots]).sum(1)
        ends = part * alone.low[slots], part * alone.high[slots]
        one, other = torch.minimum(*ends).sum(1), torch.maximum(*ends).sum(1)
        slack = (len(slots) + 16) * UNIT * (size * alone.magnitude[slots]).sum(1)
        least, most = torch.maximum(-off, one - slack), torch.minimum(off, other + slack)
        low += least.flatten(1).sum(1)
        high += most.flatten(1).sum(1)
        sizes += torch.maximum(least.abs(), most.abs()).flatten(1).sum(1)
    return slope, Interval(low, high).widened((form[0].numel() + 16) * UNIT * sizes + TINY)


def _patches(walk: Forwards, before: Slots) -> tuple[Tensor, Tensor]:
    """The middle and half the range of what each tap of the first layer reads, (C * K, pixels)."""
    assert before.linear is not None
    box, (stride, padding, dilation) = walk.channels["input"], before.linear.how
    kernel = before.linear.weight.shape[2:]

    def unfold(x: Tensor) -> Tensor:
        return nn.functional.unfold(x[None], kernel, dilation, padding, stride)[0]  # type: ignore[arg-type]

    return unfold((box.low + box.high) / 2), unfold((box.high - box.low) * (0.5 + 4 * UNIT))


def _sum(before: Slots, slots: Tensor, form: Tensor, middle: Tensor, spread: Tensor) -> Tensor:
    """The largest magnitude of sum over s of f_s d_s at each pixel, (O, H, W)."""
    assert before.linear is not None
    weight, rest = before.linear.weight[slots].flatten(1), before.linear.rest[slots]
    size = form.abs()
    summed = torch.einsum("osp,st->otp", form.flatten(2), weight)
    centre = (summed * middle).sum(1).view(len(form), *form.shape[2:]) + (form * (rest.low + rest.high) / 2).sum(1)
    radius = (summed.abs() * spread).sum(1).view_as(centre) + (size * (rest.width / 2)).sum(1)
    largest = weight.abs().sum(1) * (middle.abs() + spread).max()
    slack = 4 * (weight.numel() + 16) * UNIT * (size * (largest.view(-1, 1, 1) + rest.magnitude)).sum(1)
    return centre.abs() + radius + slack
