"""Inputs on which a ticket is far from its target, found by gradient ascent on the deviation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Adversary:
    """The largest deviation that was found from each start, and where."""

    deviations: Tensor  # (starts,) |f_eps - f_t| of the output that the start was after
    outputs: Tensor  # (starts,) which one
    images: Tensor  # (starts, C, H, W)


def ascend(
    ticket: nn.Module, target: nn.Module, starts: Tensor, low: Tensor, high: Tensor, *, steps: int = 20,
    batch_size: int = 50, on_step: Callable[[], None] = lambda: None,
) -> Adversary:  # fmt: skip
    """Maximise the deviation of one output over the images between `low` and `high` (C, H, W).

    Start n is after output n // 2 (modulo the outputs) with the sign of n's parity. A step goes to the corner of the box
    that the gradient points at, or, where that is no better, a shorter way to it: each is half as long as the last that
    failed. Networks of piecewise linear activations are at their largest in corners, as far as they are convex.

    Args:
        starts: (starts, C, H, W), clipped to the box.
    """
    ticket, target = (network.eval().requires_grad_(False) for network in (ticket, target))

    def apart(x: Tensor) -> Tensor:
        return ticket(x) - target(x)

    with torch.no_grad():
        many = apart(starts[:1]).shape[1]
    order = torch.arange(len(starts), device=starts.device)
    output, sign = order // 2 % many, 1 - 2 * (order % 2)
    found = [
        _climb(apart, x, output[n], sign[n], low, high, steps, on_step)
        for x, n in zip(starts.split(batch_size), order.split(batch_size), strict=True)
    ]
    values, images = (torch.cat(part) for part in zip(*found, strict=True))
    return Adversary(values, output, images)


def _climb(
    apart: Callable[[Tensor], Tensor], x: Tensor, output: Tensor, sign: Tensor, low: Tensor, high: Tensor, steps: int,
    on_step: Callable[[], None],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    best, value = torch.minimum(torch.maximum(x, low), high), torch.full((len(x),), -torch.inf, device=x.device)
    gradient, length = torch.zeros_like(best), torch.ones(len(x), 1, 1, 1, device=x.device)
    trial = best
    for _ in range(steps + 1):
        trial = trial.detach().requires_grad_()
        reached = apart(trial).gather(1, output[:, None])[:, 0] * sign
        (slope,) = torch.autograd.grad(reached.sum(), trial)
        better = (reached.detach() > value).view(-1, 1, 1, 1)
        best, gradient = torch.where(better, trial.detach(), best), torch.where(better, slope, gradient)
        length = torch.where(better, 1.0, length / 2)
        value = torch.maximum(value, reached.detach())
        corner = torch.where(gradient > 0, high, torch.where(gradient < 0, low, best))
        trial = best + length * (corner - best)
        on_step()
    return value, best
