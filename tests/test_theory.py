"""The errors that Theorems 3.1 and 3.2 allow a parameter, and what they add up to."""

import math

import pytest
import torch
from conftest import images, small_cnn, small_resnet, without_parameters
from torch import nn

from ltx import LtxError, construct, theory, verify
from ltx.activations import ACTIVATIONS
from ltx.constructions.two_for_one import linear_scale, pair_law
from ltx.errors import ConstructionError
from ltx.graph import run, trace
from ltx.intervals import channel_intervals
from ltx.source import LAWS

both = pytest.mark.parametrize("construction", ["2L", "L+1"])
either = pytest.mark.parametrize("law", ["uniform", "normal"])
everywhere = pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "sigmoid", "gelu"])


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
    model = small_cnn("relu")
    with torch.no_grad():
        for parameter in model.parameters():  # |x| <= 1, as the theorem has it
            parameter.mul_(0.05)
    graph = trace(model)
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
@pytest.mark.parametrize(
    ("weight", "depth", "phi", "error"), [(10.0, 2, nn.ReLU, 0.1), (1.0, 4, nn.Tanh, 3.0), (1.0, 4, nn.Sigmoid, 1.0)]
)
def test_the_theorem_s_budgets_are_enough_where_it_takes_more_for_granted(weight, depth, phi, error, construction):
    """|w| + epsilon <= 1 and |x| <= 1; in 2L three epsilons of a layer, of which a pair near 0 adds one more."""
    layers = [module for _ in range(depth) for module in (nn.Conv2d(1, 1, 1, bias=False), phi())][:-1]
    for layer in layers[::2]:
        layer.weight.data.fill_(weight)
    graph = trace(nn.Sequential(*layers).eval())
    how = {"construction": construction, "head": "construct", "scaling": "layer_max"}
    found = theory.guarantee(graph, error, 0.5, form="theorem", **how)
    epsilons = {layer.layer: layer.epsilon for layer in found.layers}
    sizes = {layer.layer: layer.base_set_size for layer in found.layers}
    assert theory.ticket_error(graph, epsilons, sizes, **how) <= error * (1 + 1e-9)


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


def test_a_network_too_deep_for_float64():
    many = [m for _ in range(300) for m in (nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.ReLU())]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.ReLU(), *many).eval()
    with pytest.raises(LtxError, match=r"layer 0: so many layers are behind it, .* its epsilon is 0 in float64"):
        theory.guarantee(trace(model), 0.1, 0.1, construction="L+1", head="construct", law="normal")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"error": 0.0}, "error 0 must be a positive number"),
        ({"delta": 0.0}, "delta 0 must lie between 0 and 1"),
        ({"delta": 1.0}, "delta 1 must lie between 0 and 1"),
        ({"single": 0.0}, "the constants C, 0 and 7.1, must be positive"),
        ({"product": -1.0, "law": "normal"}, "the constants C, 3.4 and -1, must be positive"),
        ({"law": "cauchy"}, "law 'cauchy' is not known; there are uniform, normal"),
        ({"input_range": (0.0, math.inf)}, "input_range .* must be two finite numbers"),
        ({"input_range": (1.0, -1.0)}, "input_range .* the first below the second"),
        ({"product": math.inf}, "the constants C, 3.8 and inf, must be positive numbers"),
        ({"head": "none"}, "head 'none' is not known; there are keep, construct"),
        ({"scaling": "none"}, "scaling 'none' is not known; there are unit, layer_max"),
        ({"pair_kernel": 2}, "pair_kernel 2 must be odd and positive"),
        ({"pair_stride": "third"}, "pair_stride 'third' is not known; there are second, first"),
        ({"error": 5e-324}, "or the error is so small, that its epsilon is 0 in float64"),
        ({"delta": 5e-324}, "delta .* a problem's share of it is 0 in float64"),
        ({"form": "exact"}, "form 'exact' is not known; there are norms, theorem"),
        ({"construction": "3L"}, "construction '3L' is not known; there are 2L, L\\+1"),
    ],
)
def test_arguments_without_meaning(arguments, message):
    how = {"error": 1.0, "delta": 0.1, "construction": "2L", **arguments}
    with pytest.raises(LtxError, match=message):
        theory.guarantee(trace(small_cnn("relu")), how.pop("error"), how.pop("delta"), **how)


@pytest.mark.parametrize(
    ("m", "epsilon", "more", "message"),
    [
        (0, 0.1, {}, "base_set_size 0 must be at least 1"),
        (60.5, 0.1, {}, "base_set_size 60.5 must be a whole number"),
        (60, math.nan, {}, "epsilon nan must be a positive number"),
        (60, math.inf, {}, "epsilon inf must be a positive number"),
        (60, 0.1, {"head": "none"}, "head 'none' is not known"),
    ],
)
def test_failures_of_arguments_without_meaning(m, epsilon, more, message):
    with pytest.raises(LtxError, match=message):
        theory.failure_probability(small_cnn("relu"), m, epsilon, construction="2L", **more)


@pytest.mark.parametrize(
    ("epsilons", "sizes", "message"),
    [
        ({"0": 0.1, "2": -0.1}, {"0": 9, "2": 9}, "layer 2: epsilon -0.1 must be 0 or more, and finite"),
        ({"0": math.nan, "2": 0.1}, {"0": 9, "2": 9}, "layer 0: epsilon nan must be 0 or more, and finite"),
        ({"0": math.inf, "2": 0.1}, {"0": 9, "2": 9}, "layer 0: epsilon inf must be 0 or more, and finite"),
        ({"0": 0.1, "2": 0.1}, {"0": 9, "2": 0}, "layer 2: m 0 must be at least 1"),
        ({"0": 0.1}, {"0": 9, "2": 9}, "layer 2: has no epsilon or no m"),
    ],
)
def test_errors_of_arguments_without_meaning(epsilons, sizes, message):
    with pytest.raises(LtxError, match=message):
        theory.ticket_error(small_cnn("relu"), epsilons, sizes, construction="L+1")


def test_parameters_too_large_for_any_m():
    model = small_cnn("relu", bias=False)
    with torch.no_grad():
        model[0].weight.mul_(1e7)
    with pytest.raises(LtxError, match=r"layer 0: parameters of up to .* are too large for an m .*layer_max"):
        theory.guarantee(model, 0.1, 0.1, construction="2L")
    assert theory.guarantee(model, 0.1, 0.1, construction="2L", scaling="layer_max").base_set_size < 1000


class VectorsAndImages(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 2, 1), nn.Linear(2, 2), nn.Linear(2, 1)
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()

    def forward(self, x):
        x = self.flatten(self.pool(self.a(x)))
        return self.c(self.b(x) + x)


@both
@pytest.mark.parametrize(
    ("model", "head", "why"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), "keep", "no layer besides its head"),
        (nn.Sequential(nn.ReLU(), nn.Flatten()), "construct", "there is nothing to approximate"),
        (nn.Sequential(nn.Conv2d(1, 2, 1), nn.Linear(4, 2)), "construct", "layer 1: a linear layer on images"),
        (nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 1)), "construct",
         "batch norm '2' normalises flattened images"),
        (nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(5, 1)), "construct",
         "layer 2: a linear layer with 5 inputs cannot read 2 flattened channels"),
        (VectorsAndImages(), "construct", "adds what a linear layer gives to images"),
    ],
    ids=["head alone", "no layer", "images", "batch norm", "channels", "vectors and images"],
)  # fmt: skip
def test_what_no_construction_takes_has_no_guarantee(model, head, why, construction):
    how, model = {"construction": construction, "head": head}, model.eval()
    every = dict.fromkeys(dict(model.named_modules()), 0.1), dict.fromkeys(dict(model.named_modules()), 20)
    for refused in (
        lambda: construct(model, base_set_size=20, **how),
        lambda: theory.guarantee(model, 1.0, 0.5, **how),
        lambda: theory.failure_probability(model, 60, 0.1, **how),
        lambda: theory.ticket_error(model, *every, **how),
    ):
        with pytest.raises(ConstructionError, match=why):
            refused()


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
