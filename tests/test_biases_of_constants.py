"""Guarantees of biases, which are subset sums of constants: of what these are, and of how far they may be off."""

import math

import pytest
import torch
from torch import nn

from ltx import LtxError, construct, theory
from ltx.activations import ACTIVATIONS
from ltx.constructions import Statistics
from ltx.constructions.layout import layout
from ltx.errors import ConstructionError
from ltx.graph import trace
from ltx.subset_sum.limits import CONSTANTS
from ltx.theory.parts import Demand, parts_of

both = pytest.mark.parametrize("construction", ["2L", "L+1"])
either = pytest.mark.parametrize("law", ["uniform", "normal"])


def biased(phi, bias, outputs=1):
    """conv, batch norm where asked for, phi, conv with a bias that is made of constants other than 1."""
    generator = torch.Generator().manual_seed(0)
    first, last = nn.Conv2d(1, 1, 1), nn.Conv2d(1, outputs, 1)
    with torch.no_grad():
        for layer, value in ((first, 0.0), (last, bias)):
            layer.weight.copy_(-0.3 - 0.6 * torch.rand(layer.weight.shape, generator=generator))
            layer.bias.fill_(value)
    return nn.Sequential(first, *phi, last).eval()


def scaled(scale, shift=0.0):
    norm = nn.BatchNorm2d(1, eps=0.0)
    with torch.no_grad():
        norm.weight.fill_(scale)
        norm.bias.fill_(shift)
    return norm


def given_up(graph, m, epsilon, **how):
    """The share of 40 sources in which some row is given up."""
    failed = 0
    for seed in range(40):
        seen: list[Statistics] = []
        try:
            construct(graph, base_set_size=m, epsilon=epsilon, seed=seed, on_statistics=seen.append, **how)
            failed += seen[0].given_up > 0
        except ConstructionError:
            failed += 1
    return failed / 40


@both
@pytest.mark.parametrize(
    ("phi", "sums", "made", "least"),
    [
        ((nn.Sigmoid(),), False, 0.5, 0.5),
        ((scaled(0.3), nn.ReLU()), True, 0.3, 0.27),
        ((scaled(0.3, 2.0), nn.Hardtanh()), False, 1.0, 1.0),
        ((scaled(0.3, 1.6), nn.ReLU()), False, 1.6, 1.6),
        ((scaled(-0.8, 0.1), nn.Tanh()), True, math.tanh(0.7), math.tanh(0.62)),
    ],
    ids=["phi(0)", "scale", "saturated", "shift", "negative"],
)
def test_biases_that_are_made_of_constants(phi, sums, made, least, construction):
    """Their base sets are so many times as large as what a pruned row, or one that sums to 1, becomes."""
    graph = trace(biased(phi, 0.9))
    first, last = parts_of(graph, layout(graph, 0.0, kept=()), construction, (), (-1.0, 1.0), "unit", "normal").values()
    weights, biases = last.demands(0.0)
    assert weights == Demand(float(last.layer.weight.abs().max()), 1.0, 1.0)
    assert (biases.largest, biases.least, biases.most) == pytest.approx((0.9, made, made))
    assert last.demands(0.1)[1].least == pytest.approx(least)
    assert (first.makes_constants, last.makes_constants) == (sums, False)
    assert [demand.largest for demand in first.demands(0.0)[1:]] == [1.0] * sums


@either
def test_a_share_of_a_pair_s_constants(law):
    """Two base sets, for inputs of either sign, make a bias of that with its slope alone."""
    how, phi = {"construction": "2L", "head": "construct", "law": law}, ACTIVATIONS["selu"]
    share = phi.slope_pos / (phi.slope_pos + phi.slope_neg)
    assert 0.3 < share < 0.4

    def size(bias):
        model = biased((nn.SELU(),), 0.0)
        with torch.no_grad():
            model[0].bias.fill_(bias)
        return theory.guarantee(trace(model), 0.2, 0.1, **how).layers[0].base_set_size

    assert size(0.99 * share) == size(0.5 * share)
    assert size(1.2 * share) > size(0.99 * share) + 3


@pytest.mark.slow
@both
@either
def test_guaranteed_sources_hold_biases_beyond_their_constants(construction, law):
    graph = trace(biased((nn.Sigmoid(),), 0.6))
    how = {"construction": construction, "head": "construct", "law": law}
    found = theory.guarantee(graph, 1.0, 0.5, same_size=True, **how)
    assert found.base_set_size <= 31
    claimed = theory.failure_probability(graph, found.base_set_size, found.epsilon, **how)
    assert given_up(graph, found.base_set_size, found.epsilon, **how) <= claimed <= 0.5


def test_what_the_corollary_alone_would_promise_of_a_bias_beyond_its_constants():
    """With the m of theta = 1 more sources fail than it says: the bias is three times what constants of 1/2 reach."""
    graph, how = trace(biased((nn.Sigmoid(),), 1.5)), {"construction": "2L", "head": "construct"}
    m, epsilon = 26, 0.1
    assert 3 * math.exp(-m / CONSTANTS["uniform"].product) < 0.1
    assert 0.2 < given_up(graph, m, epsilon, **how) <= theory.failure_probability(graph, m, epsilon, **how)
    within = trace(biased((nn.Sigmoid(),), 0.4))
    assert theory.failure_probability(within, 40, epsilon, **how) < 0.1


@pytest.mark.parametrize(
    ("phi", "first", "second", "low", "high", "m"),
    [(nn.SELU(), 0.2, 0.9, 0.0, 1.0, 24), (nn.Tanh(), 0.9, 0.3, -0.01, 0.01, 26)],
    ids=["positive where nobody knows", "inputs near 0"],
)
def test_constants_are_what_the_construction_makes_of_them(phi, first, second, low, high, m):
    """A pair behind a layer has two base sets although that has weights above 0 alone; constants of 1 beside the image
    are read as such also where its inputs are smaller.
    """
    model = biased((phi,), second)
    with torch.no_grad():
        model[0].weight.fill_(0.5)
        model[0].bias.fill_(first)
        model[2].weight.fill_(0.5)
    graph, how = trace(model), {"construction": "2L", "head": "construct", "input_range": (low, high)}
    claimed = theory.failure_probability(graph, m, 0.1, **how)
    assert given_up(graph, m, 0.1, **how) <= claimed
    assert claimed > 0.25 if low == 0 else claimed < 0.2


def test_constants_that_may_be_0():
    graph, how = trace(biased((scaled(0.3, -0.25), nn.ReLU()), 0.9)), {"construction": "2L", "head": "construct"}
    with pytest.raises(LtxError, match="layer 3: the constants that its biases are made of may be 0; give a smaller"):
        theory.guarantee(graph, 3.0, 0.1, **how)
    assert theory.guarantee(graph, 0.01, 0.1, **how).base_set_size > 1
    assert theory.failure_probability(graph, 10_000, 0.5, **how) == 1.0
    assert theory.failure_probability(graph, 10_000, 0.1, **how) < 1e-9
    near = trace(biased((scaled(0.3, -0.2), nn.ReLU()), 0.9))  # with sizes of 1 they might be
    assert 20 < theory.guarantee(near, 5.0, 0.1, construction="L+1", head="construct").base_set_size < 200


@pytest.mark.parametrize(
    ("scale", "bias", "error", "same_size"),
    [(1.0, 1.3480517184699365, 63.111456237467934, False), (0.05, 2.0110553690345965, 38.59998469031553, True)],
)
def test_sizes_that_make_each_other_larger_and_smaller(scale, bias, error, same_size):
    """A larger m makes epsilon smaller, and so the constants less far from 1, which need a smaller m."""
    model = biased((scaled(scale), nn.ReLU()), bias)
    with torch.no_grad():
        model[0].weight.fill_(0.5)
        model[3].weight.fill_(-0.5)
    how = {"construction": "L+1", "head": "construct"}
    found = theory.guarantee(trace(model), error, 0.5, same_size=same_size, **how)
    sizes = [layer.base_set_size for layer in found.layers]
    epsilons = {layer.layer: layer.epsilon for layer in found.layers}
    largest = dict(zip(epsilons, sizes, strict=True))
    assert theory.ticket_error(trace(model), epsilons, largest, **how) <= error
    assert 20 < max(sizes) < 1000


def test_constants_that_are_too_small():
    for scale in (1e-7, 1e-30):
        with pytest.raises(LtxError, match="layer 3: the constants that its biases are made of are too small for an m"):
            theory.guarantee(trace(biased((scaled(scale), nn.ReLU()), 0.9)), 0.2, 0.1, construction="2L",
                             head="construct")  # fmt: skip
        assert theory.failure_probability(trace(biased((scaled(scale), nn.ReLU()), 0.9)), 30, 1e-4, construction="2L",
                                          head="construct") == 1.0  # fmt: skip


class TwoReadersOfTheImage(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(1, 1, 1) for _ in range(3))

    def forward(self, x):
        return self.c(torch.relu(self.a(x))) + self.b(x)


@both
def test_biases_that_are_left_out_need_no_constants(construction):
    """`construct` leaves out those within epsilon of 0, which no constant has to make."""
    model = TwoReadersOfTheImage().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
        model.b.bias.fill_(0.001)
    how = {"construction": construction, "head": "construct"}
    found = theory.guarantee(model, 1.0, 0.5, same_size=True, **how)
    assert found.epsilon > 0.001
    assert construct(model, base_set_size=20, epsilon=found.epsilon, **how).parameters
    with pytest.raises(ConstructionError, match="is not the first layer"):
        theory.guarantee(model, 0.001, 0.5, same_size=True, **how)


class TwoPlaces(nn.Module):
    """Constants of one stream that are read in front of and behind a second batch norm."""

    def __init__(self, bias):
        super().__init__()
        self.a, self.one, self.two = nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)
        self.b, self.c = scaled(1.5, 0.5), scaled(1.0, -0.5)
        with torch.no_grad():
            for parameter, value in zip(
                (self.a.weight, self.one.weight, self.one.bias, self.two.weight, self.two.bias),
                (0.5, 0.3, bias, 0.3, 1.8), strict=True,
            ):  # fmt: skip
                parameter.fill_(value)

    def forward(self, x):
        x = self.b(self.a(x))
        return self.two(x) + self.one(self.c(x))


def test_a_bias_that_is_left_out_has_no_say_in_how_constants_are_made():
    """A row that sums to 1 makes larger ones than pruned rows do, but for the place of the small bias these are 0."""
    how, ways = {"construction": "2L", "head": "construct", "input_range": (0.0, 1.0)}, []
    for bias in (0.05, 0.3):
        model = TwoPlaces(bias).eval()
        found = theory.guarantee(model, 1.2, 0.5, same_size=True, **how)
        assert theory.failure_probability(model, found.base_set_size, found.epsilon, **how) <= 0.5
        (made,) = layout(trace(model), found.epsilon, kept=()).constants.values()
        ways.append((bias > found.epsilon, made.sums, found.base_set_size > 32))
    assert ways == [(False, False, True), (True, True, False)]


class Doubled(nn.Module):
    """A sum of a node and of what is made of it, many times over."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 1)

    def forward(self, x):
        x = self.a(x)
        for _ in range(60):
            x = x + torch.tanh(x)
        return self.b(x)


def test_constants_behind_many_sums_take_no_longer_than_there_are_nodes():
    """Each sum reads its own past twice: to follow both each time would take 2^60 steps."""
    (made,) = layout(trace(Doubled().eval()), 1e-6, kept=()).constants.values()
    assert made.sums


@both
@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.Tanh(), nn.Conv2d(1, 1, 1, padding=1)), "padding"),
        (lambda: nn.Sequential(nn.Conv2d(1, 1, 1, padding=1), nn.ReLU(), nn.Conv2d(1, 1, 1)), "zero padding"),
        (lambda: nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Conv2d(1, 1, 2, padding=1)), "zero padding"),
        (TwoReadersOfTheImage, "is not the first layer"),
        (lambda: nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 1, 1)), "normalises the image"),
    ],
)  # fmt: skip
def test_biases_that_no_source_can_make_have_no_guarantee(model, why, construction):
    network = model().eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            module.bias.data.fill_(0.5)
    how, graph = {"construction": construction, "head": "construct"}, trace(network)
    for refused in (
        lambda: theory.guarantee(graph, 1.0, 0.5, **how),
        lambda: theory.failure_probability(graph, 100, 0.1, **how),
        lambda: construct(graph, base_set_size=20, epsilon=0.1, **how),
    ):
        with pytest.raises(ConstructionError, match=why):
            refused()
