"""What Theorems 3.1 and 3.2 guarantee, and whether it holds."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import images, small_cnn, small_resnet, without_parameters
from torch import nn

from ltx import LtxError, construct, theory, verify
from ltx.activations import ACTIVATIONS
from ltx.constructions import Statistics
from ltx.constructions.layout import layout
from ltx.constructions.two_for_one import linear_scale, pair_law
from ltx.errors import ConstructionError
from ltx.graph import run, trace
from ltx.intervals import channel_intervals
from ltx.source import LAWS
from ltx.subset_sum import sample
from ltx.subset_sum.limits import CONSTANTS, GROWTH, NEAR
from ltx.subset_sum.statistics import PRODUCTS, draw
from ltx.theory.parts import Demand, parts_of
from ltx.theory.widths import chance_of_none, enough, rows_of_signs, strides

both = pytest.mark.parametrize("construction", ["2L", "L+1"])
either = pytest.mark.parametrize("law", ["uniform", "normal"])
everywhere = pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "sigmoid", "gelu"])


def tiny(construction):
    """conv, phi, conv with so few parameters that the guaranteed m is within the solver's reach.

    In L+1 the first layer is made m times, so that inputs of both signs, biases and channels make too many problems.
    """
    generator = torch.Generator().manual_seed(0)
    bias, phi = construction == "2L", nn.ReLU() if construction == "2L" else nn.Tanh()
    channels = 2 if construction == "2L" else 1
    model = nn.Sequential(nn.Conv2d(1, channels, 1, bias=bias), phi, nn.Conv2d(channels, 1, 1, bias=bias)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.rand(parameter.shape, generator=generator) * 0.6 + 0.3).mul_(-1))
    return model


@everywhere
@pytest.mark.parametrize("network", [small_cnn, small_resnet])
def test_activations_stay_within_their_ranges(network, activation):
    model = network(activation)
    graph = trace(model)
    shown = images(200, 8 if network is small_resnet else 6)
    bounds = channel_intervals(graph, (-1.0, 1.0))
    for node, value in run(graph, shown.sign()):  # corners of the box
        low, high = bounds[node.name].low, bounds[node.name].high
        values = value.transpose(0, 1).flatten(1) if node.op != "flatten" and value.ndim > 1 else value.flatten()[None]
        if len(low) == len(values):
            assert (values.min(1).values.double() >= low - 1e-5).all()
            assert (values.max(1).values.double() <= high + 1e-5).all()


@both
@everywhere
@either
@pytest.mark.parametrize("form", theory.FORMS)
def test_the_budgets_add_up_to_the_error(construction, activation, form, law):
    graph = trace(small_cnn(activation))
    found = theory.guarantee(graph, 0.5, 0.1, construction=construction, form=form, scaling="layer_max", law=law)
    epsilons = {layer.layer: layer.epsilon for layer in found.layers}
    sizes = {layer.layer: layer.base_set_size for layer in found.layers}
    bound = theory.ticket_error(graph, epsilons, sizes, construction=construction, scaling="layer_max", law=law)
    assert bound == pytest.approx(0.5) if form == "norms" else bound <= 0.5


@both
def test_the_budgets_of_a_residual_network(construction):
    graph = trace(small_resnet("tanh", blocks=1))
    found = theory.guarantee(graph, 0.5, 0.1, construction=construction, scaling="layer_max", head="construct")
    epsilons = {layer.layer: layer.epsilon for layer in found.layers}
    sizes = {layer.layer: layer.base_set_size for layer in found.layers}
    bound = theory.ticket_error(
        graph, epsilons, sizes, construction=construction, head="construct", scaling="layer_max"
    )
    assert bound <= 0.5 * (1 + 1e-9)
    widths = {layer.layer: layer.width for layer in found.layers}
    assert all(width > 0 for width in widths.values())
    assert found.source_parameters > 100 * sum(layer.parameters for layer in found.layers)


@both
@pytest.mark.parametrize("form", theory.FORMS)
@pytest.mark.parametrize("empty", ["0", "2", "5", "02", "025"])
def test_layers_without_parameters(empty, form, construction):
    """A deviation in front of one is lost: any epsilon up to 1 will do there, and the others add up to the error."""
    graph = trace(without_parameters(small_cnn("relu"), *empty))
    found = theory.guarantee(graph, 0.5, 0.1, construction=construction, form=form, head="construct")
    assert all(0 < layer.epsilon <= 1 and layer.base_set_size >= 1 for layer in found.layers)
    epsilons = {layer.layer: layer.epsilon for layer in found.layers}
    sizes = {layer.layer: layer.base_set_size for layer in found.layers}
    assert theory.ticket_error(graph, epsilons, sizes, construction=construction, head="construct") <= 0.5 * (1 + 1e-9)


@either
def test_the_theorem_s_budgets_of_l_plus_one(law):
    """epsilon_l of Theorem 3.2 behind slots that deviate each on its own, with entries as large as the law's."""
    graph = trace(small_cnn("relu"))
    how = {"construction": "L+1", "form": "theorem", "head": "construct", "scaling": "layer_max", "law": law}
    found, allowed = theory.guarantee(graph, 1.0, 0.1, **how), 1.0
    for layer in reversed(found.layers):
        assert layer.epsilon == pytest.approx(allowed / (2 * layer.parameters))
        allowed = layer.epsilon / (layer.base_set_size * LAWS[law].largest)


def test_the_theorem_s_budgets():
    """epsilon_l = epsilon / prod over s >= l of 3 T N_s in 2L (Theorem 3.1)."""
    graph = trace(small_cnn("sigmoid"))
    found = theory.guarantee(graph, 1.0, 0.1, construction="2L", form="theorem", head="construct", scaling="layer_max")
    product = 1.0
    for layer, lipschitz in zip(reversed(found.layers), (1.0, 0.25, 0.25), strict=True):
        product *= 3 * lipschitz * layer.parameters
        assert layer.epsilon == pytest.approx(1 / product)


@both
@either
@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_the_budgets_of_norms_by_hand(construction, activation, law):
    """From the output back, a share each: for the parameters, what the layer reads, a pair that is not linear."""
    graph = trace(small_cnn(activation))
    how = {"construction": construction, "head": "construct", "scaling": "layer_max", "law": law}
    found = theory.guarantee(graph, 0.5, 0.1, **how)
    lipschitz, allowed = ACTIVATIONS[activation].lipschitz, 0.5
    for bound in reversed(found.layers):
        layer = graph.layers[bound.layer]
        weight, scale = (
            layer.weight.double().flatten(1),
            max(float(layer.weight.abs().max()), float(layer.bias.abs().max())),
        )
        most = int((weight.ne(0).sum(1) + layer.bias.ne(0)).max())
        pair, first = construction == "2L" or bound.layer == "0", bound.layer == "0"
        near = pair and activation == "sigmoid"
        shares = 3 - first - (not near)
        epsilon = allowed / (shares * most * max(bound.largest_input, 1))
        assert (bound.allowed, bound.epsilon) == pytest.approx((allowed, epsilon))
        assert bound.parameters == int(weight.count_nonzero()) + int(layer.bias.count_nonzero())
        row = float(weight.abs().sum(1).max()) + most * epsilon * (1 + near)
        gain = row if pair else most * bound.base_set_size * LAWS[law].largest * max(scale, 1)
        allowed /= shares * gain * lipschitz


@both
@either
def test_the_chances_of_failure_add_up_to_delta(construction, law):
    """Of subset sums (Corollary 2.2), and of first layers of pairs with too few rows of a sign."""
    graph, known = trace(small_cnn("relu")), CONSTANTS[law]
    how = {"construction": construction, "head": "construct", "scaling": "layer_max", "law": law}
    found = theory.guarantee(graph, 0.5, 0.1, **how)
    sums = signs = 0.0
    for bound in found.layers:
        layer, m = graph.layers[bound.layer], bound.base_set_size
        sums += bound.problems * math.exp(-m / (known.product if bound.copies else known.single))
        if bound.copies:
            weight = layer.weight.flatten(2) if layer.weight.ndim == 4 else layer.weight.unflatten(1, (-1, 36))
            channels = int(weight.ne(0).any(2).any(0).sum()) + bool(layer.bias.any())
            rows = bound.copies // channels
            few = sum(math.comb(rows, k) for k in range(m)) / 2**rows
            signs += channels * (2 if bound.layer == "0" else 1) * few  # behind a ReLU one sign is enough
    assert 0.001 < sums <= 0.05
    assert 0.01 < signs <= 0.05


def test_the_source_s_parameters():
    """Of L+1: the copies and their biases, the sums of the pair, then m rows for each channel, and the constants."""
    found = theory.guarantee(trace(small_cnn("relu")), 0.5, 0.1, construction="L+1", head="construct")
    first, second, last = found.layers
    channels = 4
    assert (first.slots, second.slots, last.slots) == (second.base_set_size, last.base_set_size, 1)
    assert [layer.width for layer in found.layers] == [channels * first.slots + first.slots, second.width, 3]
    assert first.source_parameters == 2 * first.copies + 9 * first.copies * first.width
    assert second.source_parameters == 9 * first.width * second.width
    assert last.source_parameters == 36 * second.width * last.width


@both
def test_no_perturbation_within_epsilon_exceeds_the_error(construction):
    model = small_cnn("relu")
    graph = trace(model)
    found = theory.guarantee(graph, 0.5, 0.1, construction=construction)
    layers = {layer.layer: layer.epsilon for layer in found.layers}
    inputs, worst = images(64).sign(), 0.0
    with torch.no_grad():
        before = model(inputs)
        for seed in range(20):
            generator, other = torch.Generator().manual_seed(seed), small_cnn("relu")
            for name, epsilon in layers.items():
                module = other[int(name)]
                for tensor in (module.weight, module.bias):
                    kept = tensor.ne(0) & getattr(
                        module, "weight_mask" if tensor is module.weight else "bias_mask", tensor
                    ).ne(0)
                    sign = torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
                    tensor += epsilon * sign * kept
            worst = max(worst, float((other(inputs) - before).abs().max()))
    assert 0.001 < worst <= 0.5


def guarantee(construction, law="uniform"):
    return theory.guarantee(trace(tiny(construction)), 3.0, 0.5, construction=construction, head="construct", law=law,
                            same_size=True)  # fmt: skip


def failures(construction, law, many):
    """How many of so many sources of the guaranteed width do not hold the ticket."""
    found, graph, failed = guarantee(construction, law), trace(tiny(construction)), 0
    assert found.base_set_size <= 32
    rows = {layer.layer: layer.copies for layer in found.layers}
    for seed in range(many):
        seen: list[Statistics] = []
        ticket = construct(graph, construction=construction, base_set_size=found.base_set_size, head="construct",
                           epsilon=found.epsilon, law=law, seed=seed, on_statistics=seen.append)  # fmt: skip
        wide = any(ticket.layer(f"{name}.copies").shape[0] > most for name, most in rows.items() if most)
        failed += seen[0].given_up > 0 or wide
        assert seen[0].given_up or seen[0].problems == found.problems
    return failed


@both
@either
def test_guaranteed_sources_hold_the_ticket(construction, law):
    assert failures(construction, law, 100) <= 0.5 * 100


@pytest.mark.slow
@both
@either
def test_a_thousand_guaranteed_sources_hold_the_ticket(construction, law):
    assert failures(construction, law, 1000) <= 0.5 * 1000


@both
def test_the_other_way_round(construction):
    found, graph = guarantee(construction), trace(tiny(construction))
    delta = theory.failure_probability(graph, found.base_set_size, found.epsilon, construction=construction,
                                       head="construct")  # fmt: skip
    assert 0 < delta <= 0.5
    smaller = [
        theory.failure_probability(graph, m, 0.01, construction=construction, head="construct") for m in (5, 35, 40, 60)
    ]
    assert smaller[0] == 1.0
    assert smaller[1:] == sorted(smaller[1:], reverse=True)
    assert smaller[-1] < 0.05


def test_what_a_pair_reads_may_be_larger_than_what_the_target_reads():
    """The worst there is: parameters that are off by all of epsilon behind SiLU, linear enough and no more."""
    epsilon, many, phi = 0.03, 3, ACTIVATIONS["silu"]
    weight, gain = 1 - epsilon, pair_law(phi, nonnegative=False).gain
    model = nn.Sequential(nn.Flatten(), nn.Linear(many, 1, bias=False), nn.SiLU(), nn.Linear(1, 1, bias=False)).eval()
    with torch.no_grad():
        model[1].weight.fill_(weight)
        model[3].weight.fill_(weight)

    def pair(x, reach, terms):
        sigma = linear_scale(phi, pair_law(phi, nonnegative=False), reach, m=1, epsilon=epsilon, scale=1.0)
        return terms * (weight + epsilon) / (sigma * gain) * phi.value(sigma * x)

    hidden = phi.value(pair(1.0, 1.0, many))
    worst = pair(hidden, phi.value(many * (weight + 2 * epsilon) + epsilon), 1) - weight * phi.value(many * weight)
    layers = dict.fromkeys(trace(model).layers, epsilon)
    bound = theory.ticket_error(trace(model), layers, dict.fromkeys(layers, 1), construction="2L", head="construct")
    assert 0.98 * bound < worst <= bound


@either
@pytest.mark.parametrize("product", [False, True])
def test_the_constants_of_the_corollary_hold_for_every_m(law, product):
    """With m numbers a share of at most epsilon fails, for the least epsilon of which the corollary speaks."""
    constant = CONSTANTS[law].product if product else CONSTANTS[law].single
    of = PRODUCTS[law] if product else law
    shares = {}
    for m in range(1, 15):
        epsilon = math.exp(-m / constant)
        hardest, other = (
            1 - sample(of, m, epsilon, problems=20_000, theta=theta, seed=1).solved.mean() for theta in (1.0, 0.6)
        )
        assert other - 0.01 <= hardest <= epsilon, m
        shares[m] = hardest / epsilon
    assert max(shares.values()) > 0.9  # not larger than it has to be


@pytest.mark.parametrize("theta", [1.05, NEAR])
def test_how_much_larger_the_constants_are_beyond_1(theta):
    most = 0.0
    for law, constants in CONSTANTS.items():
        for of, constant in ((law, constants.single), (PRODUCTS[law], constants.product)):
            for m in range(1, 11):
                epsilon = math.exp(-m / (constant * (1 + GROWTH * (theta - 1))))
                failing = 1 - sample(of, m, epsilon, problems=20_000, theta=theta, seed=1).solved.mean()
                assert failing <= epsilon, (of, m)
                most = max(most, failing / epsilon)
    assert most > 0.9


@both
def test_a_normal_source_need_not_be_as_wide(construction):
    """Its C are smaller, and what its larger entries add to the error counts with its logarithm alone."""
    uniform, normal = (
        theory.guarantee(trace(small_cnn("tanh")), 0.1, 0.05, construction=construction, law=law)
        for law in ("uniform", "normal")
    )
    assert normal.base_set_size < uniform.base_set_size
    assert normal.source_parameters < uniform.source_parameters
    assert normal.epsilon < uniform.epsilon if construction == "L+1" else normal.epsilon == uniform.epsilon


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


@pytest.mark.parametrize(("construction", "most"), [("2L", 31), ("L+1", 31)])
@either
def test_guaranteed_sources_hold_biases_beyond_their_constants(construction, most, law):
    graph = trace(biased((nn.Sigmoid(),), 0.6))
    how = {"construction": construction, "head": "construct", "law": law}
    found = theory.guarantee(graph, 1.0, 0.5, same_size=True, **how)
    given = {"base_set_size": found.base_set_size, "epsilon": found.epsilon}
    assert found.base_set_size <= most
    assert theory.failure_probability(graph, *given.values(), **how) <= 0.5
    failed = 0
    for seed in range(60):
        seen: list[Statistics] = []
        construct(graph, seed=seed, on_statistics=seen.append, **given, **how)
        failed += seen[0].given_up > 0
    assert failed <= 30


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


@either
@pytest.mark.parametrize("product", [False, True])
@pytest.mark.parametrize(("distance", "delta"), [(0.1, 0.2), (1.0, 0.05), (4.0, 0.01)])
def test_strides(distance, delta, law, product):
    """So many numbers have a subset that goes so far and no farther than 2 beyond; some fewer have none too often."""
    of = PRODUCTS[law] if product else law
    many = strides(distance, delta, of)

    def short(many):
        values, _ = draw(of, many, 0, 20_000, seed=2)
        step = torch.where((values > 0) & (values <= 2), values, 0.0)
        total = torch.zeros(len(values), dtype=torch.float64)
        for n in range(many):
            total = torch.where(total < distance, total + step[:, n], total)
        return float((total < distance).double().mean())

    assert short(many) <= delta
    assert short(many // 3) > delta


@either
@pytest.mark.parametrize("theta", [0.5, 1.0, 1.01, 2.0, 7.0])
@pytest.mark.parametrize("unit", [0.4, 1.0, 2.5])
def test_the_chance_of_none_is_what_is_enough_the_other_way_round(unit, theta, law):
    demand, constant = Demand(theta * unit, unit, unit), CONSTANTS[law].single
    sizes = []
    for delta in (0.3, 0.01, 1e-6):
        m = enough(demand, 0.05, delta, constant, law)
        assert chance_of_none(demand, 0.05, m, constant, law) <= delta * (1 + 1e-9)
        assert chance_of_none(demand, 0.05, max(1, m - 8), constant, law) > delta
        sizes.append(m)
    assert sizes == sorted(set(sizes))
    assert chance_of_none(demand, 0.05, 1, constant, law) == 1.0


def test_a_network_too_deep_for_float64():
    many = [m for _ in range(300) for m in (nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.ReLU())]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.ReLU(), *many).eval()
    with pytest.raises(LtxError, match="layer 0: so many layers are behind it that its epsilon is 0 in float64"):
        theory.guarantee(trace(model), 0.1, 0.1, construction="L+1", head="construct", law="normal")


def test_constants_that_may_be_0():
    graph, how = trace(biased((scaled(0.3, -0.25), nn.ReLU()), 0.9)), {"construction": "2L", "head": "construct"}
    with pytest.raises(LtxError, match="layer 3: the constants that its biases are made of may be 0; give a smaller"):
        theory.guarantee(graph, 9.0, 0.1, **how)
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


@both
def test_constants_of_your_own(construction):
    def guaranteed(**given):
        found = theory.guarantee(
            trace(small_cnn("relu")), 0.5, 0.1, construction=construction, head="construct", **given
        )
        return [layer.base_set_size for layer in found.layers]

    measured = CONSTANTS["uniform"]
    assert guaranteed() == guaranteed(single=measured.single, product=measured.product)
    pairs = 3 if construction == "2L" else 1
    usual, changed = guaranteed(), guaranteed(product=2 * measured.product)
    assert [a < b for a, b in zip(usual, changed, strict=True)][:pairs] == [True] * pairs
    changed = guaranteed(single=2 * measured.single)
    assert (changed == usual) if construction == "2L" else changed[1] > 1.9 * usual[1]


def test_rows_of_signs():
    for m, chance, signs in ((1, 0.5, 2), (5, 0.1, 2), (15, 1e-6, 2), (5, 0.1, 1), (1, 0.9, 1)):
        n = rows_of_signs(m, chance, signs)
        enough, fewer = (signs * sum(math.comb(many, k) for k in range(m)) / 2**many for many in (n, n - 1))
        assert enough <= chance * (1 + 1e-9)
        assert fewer > chance * (1 - 1e-9) or n == m


def test_base_set_sizes():
    assert theory.base_set_size(0.01, 0.1, 3.0) == math.ceil(3 * math.log(100))
    assert theory.base_set_size(0.1, 0.01, 3.0) == math.ceil(3 * math.log(100))
    assert theory.base_set_size(2.0, 1.5, 3.0) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"error": 0.0}, "error 0 must be a positive number"),
        ({"delta": 0.0}, "delta 0 must lie between 0 and 1"),
        ({"delta": 1.0}, "delta 1 must lie between 0 and 1"),
        ({"single": 0.0}, "the constants C, 0 and 7.1, must be positive"),
        ({"product": -1.0, "law": "normal"}, "the constants C, 3.4 and -1, must be positive"),
        ({"law": "cauchy"}, "law 'cauchy' is not known; there are uniform, normal"),
        ({"input_range": (0.0, math.inf)}, "input_range .* must be finite"),
        ({"form": "exact"}, "form 'exact' is not known; there are norms, theorem"),
        ({"construction": "3L"}, "construction '3L' is not known; there are 2L, L\\+1"),
    ],
)
def test_arguments_without_meaning(arguments, message):
    how = {"error": 1.0, "delta": 0.1, "construction": "2L", **arguments}
    with pytest.raises(LtxError, match=message):
        theory.guarantee(trace(small_cnn("relu")), how.pop("error"), how.pop("delta"), **how)


@both
def test_the_command_shows_what_is_guaranteed_beside_what_was_used(construction, ltx, tmp_path):
    given = ["target=digits", "protocol=smoke"]
    assert ltx("train-target", *given, output_dir=tmp_path)[0] == 0
    status, out, _ = ltx("bounds", *given, f"construction={construction}", "bounds.error=1", output_dir=tmp_path)
    assert status == 0
    table = pd.read_csv(out.splitlines()[-1])
    assert list(table.layer) == [0, 2]
    assert (table.base_set_size > 15).all()
    assert (table.width * table.copies.clip(lower=1) > table.used_width * table.used_copies).all()
    assert "holds a ticket within 1 of the target with probability 0.95" in out
    assert "of which" in out
    file = Path(out.splitlines()[-1])
    made = json.loads(file.with_suffix(".json").read_text())
    assert made["settings"]["bounds"]["error"] == 1
    assert {"commit", "torch", "target_sha256"} <= set(made)
    before, again = file.stat().st_mtime_ns, ltx("bounds", *given, f"construction={construction}", "bounds.error=1",
                                                 output_dir=tmp_path)  # fmt: skip
    assert (again[0], again[1], file.stat().st_mtime_ns) == (0, out, before)
    assert "there already" in again[2]
    same = ("bounds", *given, f"construction={construction}", "bounds.error=1")
    other = file.with_suffix(".json")
    for damage in (file.with_suffix(".md").unlink, file.unlink, lambda: other.write_text('{"target_sha256": "a"}')):
        damage()
        again = ltx(*same, output_dir=tmp_path)
        assert again[:2] == (0, out)
        assert "there already" not in again[2]
    assert "there already" not in ltx(*same, "force=true", output_dir=tmp_path)[2]


def test_the_command_gives_back_what_it_guarantees(ltx, tmp_path):
    """m and epsilon of the guarantee, put in the other way round, fail with a probability of delta at most."""
    given = ["target=digits", "protocol=smoke", "construction=L+1", "bounds.delta=0.05"]
    assert ltx("train-target", *given, output_dir=tmp_path)[0] == 0
    status, out, _ = ltx("bounds", *given, output_dir=tmp_path)
    assert status == 0
    table = pd.read_csv(out.splitlines()[-1])
    again = [f"m={table.base_set_size.max()}", f"epsilon={table.epsilon.min()}"]
    status, other, err = ltx("bounds", *given, *again, output_dir=tmp_path)
    assert status == 0
    assert "the solver takes an m of up to 32" in err
    assert 0 < float(other.partition("with a probability of at most ")[2].partition(";")[0]) <= 0.05
    ltx("bounds", *given, "head=construct", output_dir=tmp_path)
    ltx("bounds", *given, "scaling=layer_max", output_dir=tmp_path)
    status, normal, _ = ltx("bounds", *given, "law=normal", output_dir=tmp_path)
    assert status == 0
    assert "of digits, relu (L+1, normal source)" in normal
    assert "normal source" not in out
    other, off, used = pd.read_csv(normal.splitlines()[-1]), "no output is off by more than ", "Used: m=15"
    assert other.base_set_size.max() < table.base_set_size.max()
    assert (other.used_width != table.used_width).any()
    assert normal.partition(used)[2].splitlines()[0] != out.partition(used)[2].splitlines()[0]
    beyond = [float(page.partition(off)[2].splitlines()[0].rstrip(".")) for page in (out, normal)]
    assert beyond[1] > 4 * beyond[0]
    assert "C of Corollary 2.2: 3.8, for products of two 7.1." in out
    assert "C of Corollary 2.2: 3.4, for products of two 4.9." in normal
    assert len(list(tmp_path.glob("bounds/*.csv"))) == 5  # none in the place of another


def test_the_command_refuses_what_has_no_meaning(ltx, tmp_path):
    for given, message in (
        ("construction=sampled", "construction=sampled has no source; use L+1 or 2L"),
        ("bounds.delta=1", "bounds.delta=1.0: must lie between 0 and 1"),
        ("bounds.error=0", "bounds.error=0.0: must be a positive number"),
    ):
        status, out, err = ltx("bounds", given, output_dir=tmp_path)
        assert (status, out) == (1, "")
        assert message in err
    assert list(tmp_path.iterdir()) == []


def test_parameters_beyond_the_scale():
    model, sizes = small_cnn("relu"), {}
    for factor in (1, 5):
        with torch.no_grad():
            model[0].weight.mul_(factor)
        sizes[factor] = [
            theory.guarantee(trace(model), 1.0, 0.1, construction="2L", scaling=s).layers[0].base_set_size
            for s in ("unit", "layer_max")
        ]
    assert sizes[1][0] == sizes[1][1]
    assert sizes[5][0] > sizes[5][1] + 10
    assert theory.failure_probability(trace(model), 15, 0.01, construction="2L") == 1.0
    graph = trace(model)
    every = dict.fromkeys(graph.layers, 0.01), dict.fromkeys(graph.layers, 15)  # where there are subsets
    unit, scaled = (theory.ticket_error(graph, *every, construction="2L", scaling=s) for s in ("unit", "layer_max"))
    assert 0 < unit == scaled


def test_the_error_of_a_ticket_that_needs_no_constants():
    """A channel behind a dead layer cannot be constant, and biases within epsilon of 0 do not ask for one."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)
    ).eval()
    with torch.no_grad():
        model[1].bias.fill_(-9.0)
        model[3].bias.fill_(0.005)
        model[6].bias.zero_()
    graph = trace(model)
    ticket = construct(graph, construction="2L", base_set_size=20, epsilon=0.01, head="construct")
    assert verify(ticket, graph).ok
    every = dict.fromkeys(graph.layers, 0.01), dict.fromkeys(graph.layers, 20)
    assert 0 < theory.ticket_error(graph, *every, construction="2L", head="construct") < math.inf
    with pytest.raises(LtxError, match=r"can be made constant, .*; use batch_norm='fold'"):
        construct(graph, construction="2L", base_set_size=20, epsilon=0.001, head="construct")
