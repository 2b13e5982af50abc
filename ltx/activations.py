"""Activation functions as Assumption 2.3 describes them: linear on either side of 0, up to an error.

On a neighbourhood [-a, a] of 0 an activation phi satisfies |phi(x) - phi_hat(x)| <= eps, where phi_hat(x) =
slope_pos * x + offset for x >= 0 and slope_neg * x + offset for x < 0 (m_+, m_- and d in the paper). A
construction needs nothing else of it, so that adding an activation is adding one entry to ACTIVATIONS.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ltx.errors import LtxError


@dataclass(frozen=True)
class Activation:
    """An activation function and its linear neighbourhood of 0 (Assumption 2.3)."""

    name: str
    fn: Callable[[Tensor], Tensor]
    module: Callable[[], nn.Module]
    slope_pos: float  # m_+
    slope_neg: float  # m_-
    offset: float  # d = phi(0)
    lipschitz: float  # T
    neighbourhood: Callable[[float], float]  # eps -> a(eps); infinite where phi is exactly piecewise linear
    bounds: Callable[[float, float], tuple[float, float]]  # range of phi over [lo, hi]

    @property
    def exact(self) -> bool:
        """Whether phi equals its piecewise linear form everywhere (ReLU, leaky ReLU, identity)."""
        return math.isinf(self.neighbourhood(1e-3))

    @property
    def odd_slopes(self) -> bool:
        """Whether m_+ = m_- and d = 0, so that one base set serves inputs of both signs (tanh, identity)."""
        return self.slope_pos == self.slope_neg and self.offset == 0

    @property
    def attributes(self) -> dict:
        """What a ticket's node holds of it; `from_attributes` reads it."""
        return {"function": self.name} | ({"negative_slope": self.slope_neg} if self.name == "leaky_relu" else {})

    def value(self, x: float) -> float:
        """phi(x) of a single number, computed in float64."""
        return float(self.fn(torch.tensor(x, dtype=torch.float64)))

    def linear_radius(self, share: float) -> float:
        """The largest a with eps / a(eps) <= share, i.e. |phi - phi_hat| <= share * a on [-a, a].

        This is a(g^-1(share)) with g(eps) = eps / a(eps), the quantity that sets the scale of the first layer
        of a two-for-one pair (Theorem 3.1). Infinite for an exact activation.
        """
        if self.exact:
            return math.inf
        lo, hi = 1e-30, 1.0  # g rises with eps: bisect on its logarithm
        for _ in range(200):
            mid = math.sqrt(lo * hi)
            lo, hi = (mid, hi) if mid / self.neighbourhood(mid) <= share else (lo, mid)
        return self.neighbourhood(lo)


def _monotone(fn: Callable[[Tensor], Tensor]) -> Callable[[float, float], tuple[float, float]]:
    def bounds(lo: float, hi: float) -> tuple[float, float]:
        out = fn(torch.tensor([lo, hi], dtype=torch.float64))
        return float(out[0]), float(out[1])

    return bounds


def _everywhere(_: float) -> float:
    return math.inf


def leaky_relu(negative_slope: float = 0.01) -> Activation:
    """Leaky ReLU with any slope below 0."""

    def fn(x: Tensor) -> Tensor:
        return nn.functional.leaky_relu(x, negative_slope)

    return Activation(
        "leaky_relu", fn, lambda: nn.LeakyReLU(negative_slope), 1.0, negative_slope, 0.0,
        max(1.0, abs(negative_slope)), _everywhere, _monotone(fn),
    )  # fmt: skip


# a(eps): |tanh x - x| <= |x|^3 / 3 and |sigmoid x - 1/2 - x/4| <= |x|^3 / 48 (section 2 of the paper)
ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(
        "identity", lambda x: x, nn.Identity, 1.0, 1.0, 0.0, 1.0, _everywhere, _monotone(lambda x: x)
    ),
    "relu": Activation("relu", torch.relu, nn.ReLU, 1.0, 0.0, 0.0, 1.0, _everywhere, _monotone(torch.relu)),
    "leaky_relu": leaky_relu(),
    "tanh": Activation(
        "tanh", torch.tanh, nn.Tanh, 1.0, 1.0, 0.0, 1.0,
        lambda eps: min((3 * eps) ** (1 / 3), math.pi / 2), _monotone(torch.tanh),
    ),
    "sigmoid": Activation(
        "sigmoid", torch.sigmoid, nn.Sigmoid, 0.25, 0.25, 0.5, 0.25,
        lambda eps: min((48 * eps) ** (1 / 3), math.pi), _monotone(torch.sigmoid),
    ),
}  # fmt: skip


def activation(name: str) -> Activation:
    """The registered activation of that name; LtxError listing what there is when there is none."""
    if name not in ACTIVATIONS:
        raise LtxError(f"activation '{name}' is not known; there are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def from_attributes(attributes: dict) -> Activation:
    """The activation that a ticket's node names."""
    slope = attributes.get("negative_slope")
    return activation(attributes["function"]) if slope is None else leaky_relu(slope)
