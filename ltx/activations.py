"""Activation functions as Assumption 2.3 describes them: linear on either side of 0, up to an error.

On a neighbourhood [-a, a] of 0 an activation phi satisfies |phi(x) - phi_hat(x)| <= eps, where phi_hat(x) =
slope_pos * x + offset for x >= 0 and slope_neg * x + offset for x < 0 (m_+, m_- and d in the paper). A
construction needs nothing else of it, so that adding an activation is adding one entry to FAMILIES.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn

from ltx.checks import one_of
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
    least_slope: float = 0.0  # phi(y) - phi(x) >= least_slope (y - x) where y >= x; T is the largest
    turns: tuple[float, ...] = ()  # where it changes from falling to rising or back
    steepest: float | None = None  # the slope rises up to here and falls from here on; None: it does neither
    curvature: float = math.inf  # the slope of phi changes by at most so much times the distance
    limits: tuple[float, float] = (-math.inf, math.inf)  # phi is nowhere outside
    jump: tuple[float, float] | None = None  # where phi falls at once, which no slope tells, and by how much at most
    parameters: tuple[tuple[str, float | str], ...] = ()  # of its family, by the names that PyTorch has for them

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
        return {"function": self.name, **dict(self.parameters)}

    def value(self, x: float) -> float:
        """phi(x) of a single number, computed in float64."""
        return float(self.fn(torch.tensor(x, dtype=torch.float64)))

    def bounds(self, lo: float, hi: float) -> tuple[float, float]:
        """The least and the largest value of phi over [lo, hi]."""
        low, high = self.range(torch.tensor(lo, dtype=torch.float64), torch.tensor(hi, dtype=torch.float64))
        return float(low), float(high)

    def range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The same of each [low, high], tensors of one shape."""
        ends = self.fn(low), self.fn(high)
        least, largest = torch.minimum(*ends), torch.maximum(*ends)
        for turn in self.turns:
            inside, value = (low < turn) & (turn < high), self.value(turn)
            least = torch.where(inside, least.clamp_max(value), least)
            largest = torch.where(inside, largest.clamp_min(value), largest)
        fall = self.fall(low, high)
        return least - fall, largest + fall

    def fall(self, low: Tensor, high: Tensor) -> Tensor:
        """By how much phi(y) - phi(x) may be off what `slopes` says of x and y in each [low, high]: where phi jumps."""
        at, by = self.jump or (math.inf, 0.0)
        return ((low <= at * (1 + 1e-12)) & (at * (1 - 1e-12) <= high)).to(low) * by

    def slopes(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of the slope over each [low, high]: of (phi(y) - phi(x)) / (y - x) for x, y in it, but for jumps."""
        least, largest = torch.full_like(low, self.least_slope), torch.full_like(low, self.lipschitz)
        if self.steepest is not None:
            with torch.enable_grad():
                ends = [end.detach().clone().requires_grad_() for end in (low, high)]
                slopes = [torch.autograd.grad(self.fn(end).sum(), end)[0] for end in ends]
            at = [slope + slack for slope in slopes for slack in (-1e-12, 1e-12)]  # few digits where phi is flat
            inside = (low <= self.steepest) & (self.steepest <= high)
            least = torch.maximum(least, torch.minimum(at[0], at[2]))
            largest = torch.where(inside, largest, torch.minimum(largest, torch.maximum(at[1], at[3])))
        return least, largest

    def linear_error(self, reach: Tensor) -> Tensor:
        """An upper bound of |phi - phi_hat| on [-reach, reach]: the least eps with a(eps) >= reach, up to a factor.

        Where there is none, what the steepest slopes of both leave: they are equal at 0.
        """
        if self.exact:
            return torch.zeros_like(reach)
        radii, errors = self._neighbourhoods
        found = torch.searchsorted(radii, reach.double().contiguous() * (1 + 1e-12))
        apart = (self.lipschitz + max(abs(self.slope_pos), abs(self.slope_neg))) * (1 + 1e-12) * reach.double()
        return torch.where(reach > 0, torch.where(errors[found].isinf(), apart, errors[found]), 0.0)

    @cached_property
    def _neighbourhoods(self) -> tuple[Tensor, Tensor]:
        """a(eps), rising, and eps from 3e-64 to 2e4, with one more that is infinite."""
        errors = 1.05 ** torch.arange(-3000, 200, dtype=torch.float64)
        radii = torch.tensor([self.neighbourhood(eps) for eps in errors.tolist()], dtype=torch.float64)
        return torch.cummax(radii, 0).values, torch.cat([errors, torch.tensor([math.inf], dtype=torch.float64)])

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


@dataclass(frozen=True)
class Family:
    """Activations that differ in parameters, and how PyTorch writes them.

    make: parameters, by name -> activation. module: PyTorch's class. names: of the function in torch,
    torch.nn.functional and of tensors, whose arguments behind x are the parameters in their order.
    """

    make: Callable[..., Activation]
    module: type[nn.Module]
    names: tuple[str, ...]
    parameters: tuple[str, ...] = ()


def _everywhere(_: float) -> float:
    return math.inf


def _check(name: str, holds: bool, why: str) -> None:
    if not holds:
        raise LtxError(f"activation '{name}': {why}")


def identity() -> Activation:
    return Activation(
        "identity", lambda x: x, nn.Identity, 1.0, 1.0, 0.0, 1.0, _everywhere, least_slope=1.0, steepest=0.0
    )


def relu() -> Activation:
    return Activation("relu", torch.relu, nn.ReLU, 1.0, 0.0, 0.0, 1.0, _everywhere, steepest=math.inf)


def leaky_relu(negative_slope: float = 0.01) -> Activation:
    """Leaky ReLU. With a slope below 0 errors of the two base sets amplify one another, or m_+ + m_- = 0."""
    _check("leaky_relu", 0 <= negative_slope < math.inf, f"negative_slope {negative_slope:g} must not be negative")

    def fn(x: Tensor) -> Tensor:  # 0 times infinity is NaN
        return nn.functional.leaky_relu(x, negative_slope) if negative_slope else torch.relu(x)

    return Activation(
        "leaky_relu", fn, lambda: nn.LeakyReLU(negative_slope), 1.0, negative_slope, 0.0, max(1.0, negative_slope),
        _everywhere, min(1.0, negative_slope), steepest=math.inf if negative_slope <= 1 else -math.inf,
        parameters=(("negative_slope", negative_slope),),
    )  # fmt: skip


def elu(alpha: float = 1.0) -> Activation:
    """x, and alpha (e^x - 1) below 0, which alpha x exceeds by at most alpha x^2 / 2."""
    _check("elu", 0 <= alpha < math.inf, f"alpha {alpha:g} must not be negative")

    def fn(x: Tensor) -> Tensor:
        return nn.functional.elu(x, alpha)

    return Activation(
        "elu", fn, lambda: nn.ELU(alpha), 1.0, alpha, 0.0, max(1.0, alpha),
        lambda eps: math.sqrt(2 * eps / alpha) if alpha else math.inf, steepest=math.inf if alpha <= 1 else 0.0,
        parameters=(("alpha", alpha),),
    )  # fmt: skip


def celu(alpha: float = 1.0) -> Activation:
    """x, and alpha (e^(x / alpha) - 1) below 0, which x exceeds by at most x^2 / (2 alpha)."""
    _check("celu", 0 < alpha < math.inf, f"alpha {alpha:g} must be positive")

    def fn(x: Tensor) -> Tensor:
        return nn.functional.celu(x, alpha)

    return Activation(
        "celu", fn, lambda: nn.CELU(alpha), 1.0, 1.0, 0.0, 1.0, lambda eps: math.sqrt(2 * alpha * eps),
        steepest=math.inf, parameters=(("alpha", alpha),),
    )  # fmt: skip


SELU_SCALE, SELU_ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717


def selu() -> Activation:
    """ELU times a constant."""
    steep = SELU_SCALE * SELU_ALPHA
    return Activation(
        "selu", nn.functional.selu, nn.SELU, SELU_SCALE, steep, 0.0, steep, lambda eps: math.sqrt(2 * eps / steep),
        steepest=0.0,
    )  # fmt: skip


def gelu(approximate: str = "none") -> Activation:
    """x Phi(x): |x (Phi(x) - 1/2)| <= x^2 / sqrt(2 pi). With approximate="tanh", x/2 (1 + tanh(u)), u the cubic.

    There |x tanh(u) / 2| <= x^2 sqrt(2 / pi) (1 + 0.044715 x^2) / 2, for |x| <= 1.
    """
    _check("gelu", approximate in ("none", "tanh"), f"approximate '{approximate}' must be none or tanh")
    exact = approximate == "none"
    # slopes of 1/2 at 0; steepest where x^2 = 2: Phi(sqrt 2) + sqrt 2 Phi'(sqrt 2); the tanh form was maximised
    steepest = (1 + math.erf(1)) / 2 + math.exp(-1) / math.sqrt(math.pi) if exact else 1.12899307
    turn = -0.7517915246935645 if exact else -0.7524614220710162
    curve = 1 / math.sqrt(2 * math.pi) * (1.0 if exact else 1.044715)

    def fn(x: Tensor) -> Tensor:
        return nn.functional.gelu(x, approximate=approximate)

    return Activation(
        "gelu", fn, lambda: nn.GELU(approximate), 0.5, 0.5, 0.0, steepest,
        lambda eps: min(math.sqrt(eps / curve), math.inf if exact else 1.0), 1 - steepest, (turn,),
        curvature=2 * curve * (1 + 1e-12) if exact else math.inf,
        parameters=() if exact else (("approximate", approximate),),
    )  # fmt: skip


def silu() -> Activation:
    """x sigmoid(x): |x (sigmoid(x) - 1/2)| <= x^2 / 4. Steepest, 1.09984, at 2.39936; least at -1.27846."""
    return Activation(
        "silu", nn.functional.silu, nn.SiLU, 0.5, 0.5, 0.0, 1.0998393202, lambda eps: 2 * math.sqrt(eps),
        1 - 1.0998393202, (-1.278464542761074,), curvature=0.5,
    )  # fmt: skip


def softplus(beta: float = 1.0, threshold: float = 20.0) -> Activation:
    """log(1 + e^(beta x)) / beta, whose curvature is at most beta / 4.

    PyTorch takes x itself where beta x is beyond the threshold, and so falls there by log(1 + e^-threshold) / beta:
    from 20 on by less than float32 rounds.
    """
    _check("softplus", 0 < beta < math.inf, f"beta {beta:g} must be positive")
    _check("softplus", threshold >= 20, f"with threshold {threshold:g} it jumps; it must be at least 20")

    def fn(x: Tensor) -> Tensor:
        return nn.functional.softplus(x, beta, threshold)

    return Activation(
        "softplus", fn, lambda: nn.Softplus(beta, threshold), 0.5, 0.5, math.log(2) / beta, 1.0,
        lambda eps: min(math.sqrt(8 * eps / beta), 20 / beta), steepest=math.inf, curvature=beta / 4,
        jump=(threshold / beta, (1 + 1e-6) * math.log1p(math.exp(-threshold)) / beta),
        parameters=(("beta", beta), ("threshold", threshold)) if (beta, threshold) != (1, 20) else (),
    )  # fmt: skip


def tanh() -> Activation:
    """|tanh x - x| <= |x|^3 / 3 (section 2 of the paper)."""
    return Activation(
        "tanh", torch.tanh, nn.Tanh, 1.0, 1.0, 0.0, 1.0, lambda eps: min((3 * eps) ** (1 / 3), math.pi / 2),
        steepest=0.0, curvature=(1 + 1e-12) * 4 / (3 * math.sqrt(3)), limits=(-1.0, 1.0),
    )  # fmt: skip


def hardtanh(min_val: float = -1.0, max_val: float = 1.0) -> Activation:
    """x clipped to [min_val, max_val]: exact within."""
    _check("hardtanh", min_val < 0 < max_val, f"its range [{min_val:g}, {max_val:g}] must have 0 inside")

    def fn(x: Tensor) -> Tensor:
        return nn.functional.hardtanh(x, min_val, max_val)

    return Activation(
        "hardtanh", fn, lambda: nn.Hardtanh(min_val, max_val), 1.0, 1.0, 0.0, 1.0,
        lambda eps: min(-min_val, max_val) + eps, steepest=0.0, limits=(min_val, max_val),
        parameters=(("min_val", min_val), ("max_val", max_val)) if (min_val, max_val) != (-1, 1) else (),
    )  # fmt: skip


def sigmoid() -> Activation:
    """|sigmoid x - 1/2 - x/4| <= |x|^3 / 48 (section 2 of the paper)."""
    return Activation(
        "sigmoid", torch.sigmoid, nn.Sigmoid, 0.25, 0.25, 0.5, 0.25,
        lambda eps: min((48 * eps) ** (1 / 3), math.pi),
        steepest=0.0, curvature=(1 + 1e-12) / (6 * math.sqrt(3)), limits=(0.0, 1.0),
    )  # fmt: skip


FAMILIES: dict[str, Family] = {
    "identity": Family(identity, nn.Identity, ()),
    "relu": Family(relu, nn.ReLU, ("relu",)),
    "leaky_relu": Family(leaky_relu, nn.LeakyReLU, ("leaky_relu",), ("negative_slope",)),
    "tanh": Family(tanh, nn.Tanh, ("tanh",)),
    "sigmoid": Family(sigmoid, nn.Sigmoid, ("sigmoid",)),
    "elu": Family(elu, nn.ELU, ("elu",), ("alpha",)),
    "celu": Family(celu, nn.CELU, ("celu",), ("alpha",)),
    "selu": Family(selu, nn.SELU, ("selu",)),
    "gelu": Family(gelu, nn.GELU, ("gelu",), ("approximate",)),
    "silu": Family(silu, nn.SiLU, ("silu",)),
    "softplus": Family(softplus, nn.Softplus, ("softplus",), ("beta", "threshold")),
    "hardtanh": Family(hardtanh, nn.Hardtanh, ("hardtanh",), ("min_val", "max_val")),
}
ACTIVATIONS: dict[str, Activation] = {name: family.make() for name, family in FAMILIES.items()}


def activation(name: str) -> Activation:
    """The registered activation of that name; LtxError listing what there is when there is none."""
    one_of("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]


@lru_cache(typed=True)  # one object for all nodes, which tables its neighbourhoods once; 1 and 1.0 are written apart
def _made(name: str, /, **parameters: float | str) -> Activation:
    return FAMILIES[name].make(**parameters)


def from_attributes(attributes: dict) -> Activation:
    """The activation that a ticket's node names.

    Raises:
        LtxError: an activation or a parameter of it that is not known, or has no meaning.
    """
    name = attributes["function"]
    activation(name)
    try:
        return _made(name, **{key: value for key, value in attributes.items() if key != "function"})
    except TypeError as error:
        raise LtxError(f"activation '{name}': {error}") from None
