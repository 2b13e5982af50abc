"""What certificates rest on: intervals rounded outwards, bounds of activations, what overflows or underflows."""

import math
from fractions import Fraction

import pytest
import torch
from conftest import images
from test_certificate import apart, both, box
from torch import nn

from ltx import construct
from ltx.activations import ACTIVATIONS
from ltx.certificates import certify
from ltx.certificates.forwards import Rows
from ltx.intervals import Interval


@pytest.mark.parametrize("phi", ACTIVATIONS.values(), ids=lambda p: p.name)
def test_slopes_hold_on_every_interval(phi):
    generator = torch.Generator().manual_seed(0)
    ends = torch.rand(2, 500, generator=generator, dtype=torch.float64) * 10 - 5
    low, high = ends.amin(0), ends.amax(0)
    least, largest = phi.slopes(low, high)
    x, y = (low + (high - low) * torch.rand(400, 500, generator=generator, dtype=torch.float64) for _ in range(2))
    slope = (phi.fn(y) - phi.fn(x)) / (y - x)
    slack = 1e-12 / (y - x).abs() + 1e-9
    assert (slope <= largest + slack).all()
    assert (slope >= least - slack).all()
    assert (largest <= phi.lipschitz).all()


@pytest.mark.parametrize("phi", ACTIVATIONS.values(), ids=lambda p: p.name)
def test_linear_errors(phi):
    reach = torch.tensor([0.0, 1e-6, 1e-3, 0.1, 0.5], dtype=torch.float64)
    for radius, error in zip(reach.tolist(), phi.linear_error(reach).tolist(), strict=True):
        x = torch.linspace(-radius, radius, 1001, dtype=torch.float64)
        straight = torch.where(x >= 0, phi.slope_pos * x, phi.slope_neg * x) + phi.offset
        assert (phi.fn(x) - straight).abs().max() <= error + 1e-15


def test_intervals_are_rounded_outwards():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 300, generator=generator, dtype=torch.float64)
    x = torch.randn(300, generator=generator, dtype=torch.float64)
    found = Interval.exactly(x).affine(weight)
    exact = [
        sum((Fraction(w) * Fraction(v) for w, v in zip(row.tolist(), x.tolist(), strict=True)), Fraction(0))
        for row in weight
    ]
    for value, low, high in zip(exact, found.low.tolist(), found.high.tolist(), strict=True):
        assert low <= value <= high
    assert (found.width < 1e-9).all()
    weight, low, high = 5.5456e-311, -2.5448e15, 1.2256e149  # a part of the weight alone is no number of float64
    wide = Interval(*torch.tensor([[low], [high]], dtype=torch.float64))
    found = wide.affine(torch.tensor([[weight]], dtype=torch.float64))
    assert Fraction(found.low.item()) <= Fraction(weight) * Fraction(low)


@pytest.mark.slow
@both
@pytest.mark.parametrize("phi", [nn.Hardtanh, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.Softplus, nn.ELU])
def test_boxes_far_beyond_the_input_range(phi, construction):
    """Where Assumption 2.3 knows no error of a linear activation, and where numbers overflow."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), phi(), nn.Conv2d(2, 1, 3, padding=1)).eval()
    ticket = construct(model, construction=construction, head="construct", scaling="layer_max", base_set_size=20)
    x = images(50, 4)
    bounded = phi in (nn.Hardtanh, nn.Tanh, nn.Sigmoid)
    for size in (1, 1e3, 1e6, 1e30):
        least, most = (end.double() * size for end in box(4))
        proven, plain = certify(ticket, model, least, most), certify(ticket, model, least, most, sharp=False)
        assert (apart(ticket, model, torch.cat([x, x.sign()]) * size).view(-1) <= proven.bound).all()
        assert (proven.bound <= plain.bound).all()
        assert plain.bound.isfinite().all()
        assert proven.largest < 40 or not bounded
    least, most = (end.double() * 1.7e308 for end in box(4))
    for sharp in (True, False):
        largest = certify(ticket, model, least, most, sharp=sharp).largest
        assert largest < 80 if bounded else largest == math.inf


def scalar(*weights, phi=nn.Identity):
    """A chain of numbers; phi behind the last but one."""
    layers = [nn.Linear(1, 1, bias=False) for _ in weights]
    with torch.no_grad():
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.fill_(weight)
    return nn.Sequential(nn.Flatten(), *layers[:-1], phi(), layers[-1]).eval()


@pytest.mark.parametrize("seed", [0, 4])
@pytest.mark.parametrize("sharp", [True, False])
def test_softplus_falls_where_it_becomes_the_identity(sharp, seed):
    """By 2e-9 at 20, between a slot and its channel."""
    model = scalar(0.9, 0.9, 0.8, phi=nn.Softplus)
    model.insert(2, nn.ReLU())
    ticket = construct(model, construction="L+1", base_set_size=12, epsilon=0.001, seed=seed, head="construct",
                       input_range=(0, 40))  # fmt: skip
    x = torch.full((1, 1, 1), 19.99 / 0.81, dtype=torch.float64)
    for radius in (1e-8, 1e-3, 1):
        at = x + torch.linspace(-radius, radius, 201, dtype=torch.float64).view(-1, 1, 1, 1)
        found = apart(ticket, model, at)
        assert found <= certify(ticket, model, x - radius, x + radius, sharp=sharp).bound
        assert found > 0.01


@both
@pytest.mark.parametrize("sharp", [True, False])
def test_what_underflows_on_the_way_back_is_not_lost(sharp, construction):
    model = scalar(*[1e-38] * 10)
    ticket = construct(model, construction=construction, base_set_size=12, head="construct")
    x = torch.full((1, 1, 1), 1e300, dtype=torch.float64)
    assert apart(ticket, model, x[None]) <= certify(ticket, model, -x, x, sharp=sharp).bound


def test_entries_that_are_sums_themselves():
    """An interval around what float64 makes of 200,000 times 0.1 in one entry."""
    value, there = torch.full((200_000,), 0.1, dtype=torch.float64), torch.zeros(200_000, dtype=torch.int64)
    none = torch.zeros(1)
    rows = Rows("", there[:1], torch.zeros(1, 1, 1), none, (), (), there, there, there, value)
    part = rows.part("", rows.dense(value, there, 1), Interval.exactly(torch.ones(1)), rows.dense(value, there, 1))
    found = part.x.affine(part.weight, terms=part.terms)
    assert found.low.item() <= Fraction(0.1) * len(value) <= found.high.item()
