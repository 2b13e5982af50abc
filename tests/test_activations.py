"""Assumption 2.3, numerically: every activation is piecewise linear up to eps on [-a(eps), a(eps)]."""

import math

import pytest
import torch
from conftest import images, small_cnn
from torch import nn

from ltx import construct, verify
from ltx.activations import (
    ACTIVATIONS,
    FAMILIES,
    activation,
    celu,
    elu,
    from_attributes,
    gelu,
    hardtanh,
    leaky_relu,
    softplus,
)
from ltx.config import ActivationName
from ltx.errors import LtxError
from ltx.graph import trace

OTHERS = [leaky_relu(0.3), elu(0.3), elu(2.0), celu(0.2), gelu("tanh"), softplus(3.0, 30.0), hardtanh(-0.3, 2.0)]
ALL = [*ACTIVATIONS.values(), *OTHERS]


def deviation(phi, x):
    linear = torch.where(x >= 0, phi.slope_pos * x, phi.slope_neg * x) + phi.offset
    return (phi.fn(x) - linear).abs()


@pytest.mark.parametrize("phi", ALL, ids=lambda p: p.name)
def test_float32_keeps_its_digits_near_0(phi):
    """Where the pairs of a source work; PyTorch before 2.8 takes 1 from a rounded exp(x) in ELU, CELU and SELU."""
    x = torch.logspace(-7, 0, 1001)
    x = torch.cat([-x, x])
    torch.testing.assert_close(phi.fn(x).double(), phi.fn(x.double()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("phi", ALL, ids=lambda p: p.name)
@pytest.mark.parametrize("epsilon", [1e-1, 1e-2, 1e-4, 1e-6])
def test_linear_on_its_neighbourhood(phi, epsilon):
    radius = min(phi.neighbourhood(epsilon), 100.0)
    x = torch.linspace(-radius, radius, 20_001, dtype=torch.float64)
    assert deviation(phi, x).max() <= epsilon * (1 + 1e-9)


@pytest.mark.parametrize("phi", [p for p in ALL if not p.exact], ids=lambda p: p.name)
@pytest.mark.parametrize("share", [1e-2, 1e-4, 1e-6])
def test_linear_radius_is_what_theorem_3_1_needs(phi, share):
    radius = phi.linear_radius(share)
    x = torch.linspace(-radius, radius, 20_001, dtype=torch.float64)
    assert deviation(phi, x).max() <= share * radius * (1 + 1e-6) + 2e-16
    assert phi.neighbourhood(share * radius * 1.01) >= radius  # no larger than it may be, nor much smaller
    assert math.isclose(share * radius / phi.neighbourhood(share * radius), share, rel_tol=1e-3)


@pytest.mark.parametrize("phi", ALL, ids=lambda p: p.name)
def test_slopes_offset_and_lipschitz_constant(phi):
    x = torch.linspace(-5, 5, 100_001, dtype=torch.float64)
    assert phi.value(0.0) == phi.offset
    slopes = (phi.fn(x)[1:] - phi.fn(x)[:-1]) / 1e-4
    assert 0.99 * phi.lipschitz <= slopes.abs().max() <= phi.lipschitz * (1 + 1e-9)
    assert phi.least_slope - 1e-9 <= slopes.min() <= phi.least_slope + 0.02  # which some have far out
    bend = (phi.fn(x)[2:] - 2 * phi.fn(x)[1:-1] + phi.fn(x)[:-2]).abs().max()
    assert bend <= phi.curvature * 1e-8 + 1e-14
    assert math.isinf(phi.curvature) or bend >= 0.999 * phi.curvature * 1e-8
    low, high = phi.bounds(-5.0, 5.0)
    assert phi.fn(x).min() - 1e-8 <= low <= phi.fn(x).min()
    assert phi.fn(x).max() <= high <= phi.fn(x).max() + 1e-2
    assert torch.equal(phi.module()(x), phi.fn(x))
    assert low < high
    for lo, hi in ((-5.0, -2.0), (-1.0, -0.9), (-0.9, 0.1), (0.2, 3.0)):
        there = phi.fn(torch.linspace(lo, hi, 10_001, dtype=torch.float64))
        low, high = phi.bounds(lo, hi)
        assert low <= there.min() + 1e-12
        assert high >= there.max() - 1e-12


@pytest.mark.parametrize("phi", ALL, ids=lambda p: p.name)
def test_an_activation_is_what_its_attributes_say(phi):
    again = from_attributes(phi.attributes)
    x = torch.linspace(-5, 5, 1001)
    assert (again.name, again.parameters) == (phi.name, phi.parameters)
    assert torch.equal(again.fn(x), phi.fn(x))
    node = trace(nn.Sequential(nn.Linear(2, 2), phi.module(), nn.Linear(2, 1))).nodes[2]
    if phi.name != "identity":
        assert node.activation.attributes == phi.attributes


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"function": "elu", "alpha": -1.0}, "activation 'elu': alpha -1 must not be negative"),
        ({"function": "celu", "alpha": 0.0}, "activation 'celu': alpha 0 must be positive"),
        ({"function": "softplus", "beta": -1.0}, "activation 'softplus': beta -1 must be positive"),
        ({"function": "softplus", "threshold": 5.0}, "activation 'softplus': with threshold 5 it jumps"),
        ({"function": "gelu", "approximate": "no"}, "activation 'gelu': approximate 'no' must be none or tanh"),
        ({"function": "hardtanh", "min_val": 0.5}, "activation 'hardtanh': its range [0.5, 1] must have 0 inside"),
        ({"function": "relu", "alpha": 1.0}, "activation 'relu': .*unexpected keyword argument 'alpha'"),
    ],
)
def test_parameters_without_meaning(attributes, message):
    with pytest.raises(LtxError, match=message.replace("[", r"\[").replace("]", r"\]")):
        from_attributes(attributes)


class Written(nn.Module):
    """A network whose activation is a function, a tensor's method or one of torch, with parameters behind x."""

    def __init__(self, function):
        super().__init__()
        self.one, self.two, self.function = nn.Linear(4, 3), nn.Linear(3, 2), function

    def forward(self, x):
        return self.two(self.function(self.one(torch.flatten(x, 1))))


@pytest.mark.parametrize(
    ("function", "attributes"),
    [
        (lambda x: nn.functional.elu(x, 0.5), {"function": "elu", "alpha": 0.5}),
        (lambda x: nn.functional.elu(x, alpha=0.5), {"function": "elu", "alpha": 0.5}),
        (lambda x: torch.celu(x, 0.5), {"function": "celu", "alpha": 0.5}),
        (torch.selu, {"function": "selu"}),
        (lambda x: nn.functional.gelu(x, approximate="tanh"), {"function": "gelu", "approximate": "tanh"}),
        (nn.functional.silu, {"function": "silu"}),
        (lambda x: nn.functional.softplus(x, 2), {"function": "softplus", "beta": 2, "threshold": 20.0}),
        (lambda x: nn.functional.hardtanh(x, -2, 2), {"function": "hardtanh", "min_val": -2, "max_val": 2}),
        (lambda x: nn.functional.leaky_relu(x, 0.1), {"function": "leaky_relu", "negative_slope": 0.1}),
        (lambda x: x.tanh(), {"function": "tanh"}),
    ],
)
def test_activations_that_are_written_as_functions(function, attributes):
    nodes = trace(Written(function)).nodes
    assert [n.activation.attributes for n in nodes if n.activation is not None] == [attributes]


@pytest.mark.parametrize("construction", ["2L", "L+1"])
@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "identity"])
def test_every_activation_goes_through_both_constructions(name, construction):
    """With the true activation in the ticket: the deviation falls with epsilon, and verify has nothing to say."""
    model, shown, off = small_cnn(name), images(64), []
    for epsilon, m in ((0.03, 12), (0.003, 18)):
        ticket = construct(model, construction=construction, base_set_size=m, epsilon=epsilon, head="construct",
                           scaling="layer_max")  # fmt: skip
        assert verify(ticket, trace(model)).violations == ()
        with torch.no_grad():
            off.append(float((ticket.to_module()(shown) - model(shown)).abs().max()))
    assert off[1] < 0.5 * off[0]
    assert off[1] < 0.15


def test_the_commands_know_every_activation():
    assert {name.value for name in ActivationName} == set(ACTIVATIONS) == set(FAMILIES)


def test_unknown_activation_lists_what_there_is():
    with pytest.raises(LtxError, match="'swish' is not known; there are identity, relu"):
        activation("swish")
