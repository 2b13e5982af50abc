"""Assumption 2.3, numerically: every activation is piecewise linear up to eps on [-a(eps), a(eps)]."""

import math

import pytest
import torch

from ltx.activations import ACTIVATIONS, activation, leaky_relu
from ltx.errors import LtxError

ALL = [*ACTIVATIONS.values(), leaky_relu(0.3)]


def deviation(phi, x):
    linear = torch.where(x >= 0, phi.slope_pos * x, phi.slope_neg * x) + phi.offset
    return (phi.fn(x) - linear).abs()


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
    assert deviation(phi, x).max() <= share * radius * (1 + 1e-6)
    assert phi.neighbourhood(share * radius * 1.01) >= radius  # no larger than it may be, nor much smaller
    assert math.isclose(share * radius / phi.neighbourhood(share * radius), share, rel_tol=1e-3)


@pytest.mark.parametrize("phi", ALL, ids=lambda p: p.name)
def test_slopes_offset_and_lipschitz_constant(phi):
    x = torch.linspace(-5, 5, 100_001, dtype=torch.float64)
    assert phi.value(0.0) == phi.offset
    assert ((phi.fn(x)[1:] - phi.fn(x)[:-1]).abs() <= phi.lipschitz * 1e-4 * (1 + 1e-9)).all()
    low, high = phi.bounds(-5.0, 5.0)
    assert low == phi.fn(x).min()
    assert high == phi.fn(x).max()
    assert torch.equal(phi.module()(x), phi.fn(x))


def test_unknown_activation_lists_what_there_is():
    with pytest.raises(LtxError, match="'swish' is not known; there are identity, relu"):
        activation("swish")
