"""Inputs on which a ticket is far from its target, found by gradient ascent on the deviation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ltx.defaults import usual_defaults
from ltx.evaluation import eval_mode
from ltx.precision import exact_convolutions

RATE = 0.2  # step of an element whose gradient stays the same, as a share of its range; it falls to 0
FIRST, SECOND = 0.9, 0.99  # Adam's averages


@dataclass(frozen=True)
class Adversary:
    """The largest deviation that was found from each start, and where."""

    deviations: Tensor  # (starts,) |f_eps - f_t| of the output that the start was after
    outputs: Tensor  # (starts,) which one
    images: Tensor  # (starts, C, H, W)

    @property
    def largest(self) -> float:
        return float(self.deviations.max())


@usual_defaults()
def ascend(
    ticket: nn.Module, target: nn.Module, starts: Tensor, low: Tensor, high: Tensor, *, steps: int = 300,
    batch_size: int = 50, on_batch: Callable[[int], object] = lambda _: None,
) -> Adversary:  # fmt: skip
    """Maximise the deviation of one output over the images between `low` and `high`, by Adam, clipped to the box.

    An output that is no vector, such as an image, is flattened.

    Start n is after output n // 2 (modulo the outputs), above the target where n is even, below it where n is odd. Both
    networks are run in eval mode, and left as they are.

    Args:
        starts: (starts, C, H, W), clipped to the box.
        low, high: (C, H, W).
        on_batch: called with the number of starts that were gone through.
    """

    def apart(x: Tensor) -> Tensor:
        return (ticket(x) - target(x.clone())).flatten(1)  # whose first operation may be in place

    with exact_convolutions, eval_mode(ticket), eval_mode(target), _constant(ticket), _constant(target):
        with torch.no_grad():
            many = apart(starts[:1]).shape[1]
        order = torch.arange(len(starts), device=starts.device)
        output, sign = order // 2 % many, 1 - 2 * (order % 2)
        values, images = torch.zeros(len(starts), device=starts.device), torch.empty_like(starts)
        for n in order.split(batch_size):
            values[n], images[n] = _climb(
                lambda x, n=n: apart(x).gather(1, output[n, None])[:, 0] * sign[n], starts[n], low, high, steps
            )
            on_batch(len(n))
    return Adversary(values, output, images)


@contextlib.contextmanager
def _constant(network: nn.Module) -> Iterator[None]:
    """Within it no gradients are computed of a network's parameters."""
    learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


def _climb(
    function: Callable[[Tensor], Tensor], x: Tensor, low: Tensor, high: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """The largest value of each element's function, (n,), and where, (n, C, H, W)."""
    x = torch.minimum(torch.maximum(x, low), high)
    best, where = torch.full((len(x),), -torch.inf, device=x.device), x
    mean, square = torch.zeros_like(x), torch.zeros_like(x)
    for step in range(steps + 1):
        x = x.detach().requires_grad_()
        value = function(x)
        (gradient,) = torch.autograd.grad(value.sum(), x)
        value, x = value.detach(), x.detach()
        better = value > best
        best = torch.where(better, value, best)
        where = torch.where(better.view(-1, *[1] * (x.ndim - 1)), x, where)
        mean, square = FIRST * mean + (1 - FIRST) * gradient, SECOND * square + (1 - SECOND) * gradient**2
        along = mean / (1 - FIRST ** (step + 1)) / ((square / (1 - SECOND ** (step + 1))).sqrt() + 1e-12)
        x = x + RATE * (1 - step / (steps + 1)) * (high - low) * along
        x = torch.minimum(torch.maximum(x, low), high)
    return best, where
