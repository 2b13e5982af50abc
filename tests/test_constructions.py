"""The theorems, asserted on small networks: every parameter within epsilon, deviation bounded and proportional."""

import importlib
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import deviation, images, randomise, small_cnn
from torch import nn

import ltx
from ltx import LtxError, construct, source, verify
from ltx.activations import ACTIVATIONS
from ltx.constructions import Statistics
from ltx.constructions.two_for_one import linear_scale, pair_law
from ltx.graph import trace
from ltx.targets.masked import MaskedConv2d, MaskedLinear

ACTIVATION_NAMES = ["relu", "leaky_relu", "tanh", "sigmoid"]
everywhere = pytest.mark.parametrize("activation", ACTIVATION_NAMES)
both = pytest.mark.parametrize("construction", ["2L", "L+1"])
heads = pytest.mark.parametrize("head", ["keep", "construct"])


def single_layer(activation, *, seed=0, padding=1, stride=1, dilation=1, kernel=3, channels=2, density=0.3):
    model = nn.Sequential(
        MaskedConv2d(channels, 3, kernel, padding=padding, stride=stride, dilation=dilation),
        ACTIVATIONS[activation].module(),
    )
    randomise(model[0], torch.Generator().manual_seed(seed), density)
    return model.eval()


@pytest.mark.parametrize(("activation", "signs"), [("relu", (1, -1)), ("tanh", (0,)), ("sigmoid", (0,))])
@pytest.mark.parametrize("together", [(512, 64), (40, 1)])
def test_rows_serve_the_first_input_that_lacks_them(activation, signs, together, monkeypatch):
    """Row by row, for more inputs than the construction looks at together, which is to make no difference."""
    m, module = 20, importlib.import_module("ltx.constructions.two_for_one")
    for name, value in zip(("ROWS", "AHEAD"), together, strict=True):
        monkeypatch.setattr(module, name, value)
    model = nn.Sequential(nn.Flatten(), nn.Linear(200, 2), ACTIVATIONS[activation].module(), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.1 + 0.3 * torch.rand(p.shape, generator=torch.Generator().manual_seed(0)))
    ticket = construct(model, construction="2L", base_set_size=m, epsilon=0.09)
    copies = ticket.layers[0]
    lacking = dict.fromkeys([*((j, sign) for j in range(200) for sign in signs), (-1, signs[0])], m)
    kept = []
    step = 2 if activation == "sigmoid" else 1
    for row in range(0, copies.shape[0], step):
        weights = source.weights(copies, 0, torch.full((200,), row), torch.arange(200)).tolist()
        there = [*weights, *source.biases(copies, 0, torch.tensor([row])).tolist()]
        who = next((n for n in lacking if n[1] in (0, math.copysign(1, there[n[0]]))), None)
        if who is not None:
            kept += [(row + r, who[0]) for r in range(step)]
            lacking[who] -= 1
            if not lacking[who]:
                del lacking[who]
    assert not lacking
    assert copies.shape[0] == kept[-1][0] + 1
    mask = ticket.masks[copies.name]  # without the rows that no subset has
    read = {*zip((mask // 200).tolist(), (mask % 200).tolist(), strict=True)}
    assert read <= {*kept}
    assert {(row, -1) for row in ticket.bias_masks[copies.name].tolist()} <= {*kept}
    assert len({column for _, column in read}) == 200


@everywhere
@both
@heads
@pytest.mark.parametrize("selection", ["smallest", "best"])
def test_every_parameter_is_within_epsilon_and_nothing_else_is_kept(activation, construction, head, selection):
    model = small_cnn(activation)
    ticket = construct(model, construction=construction, base_set_size=12, epsilon=0.02, seed=1, head=head,
                       selection=selection)  # fmt: skip
    result = verify(ticket, trace(model))
    assert result.violations == ()
    assert 0 < result.max_parameter_error <= 0.02
    slots = sum(layer.parameters_above(0.02) for layer in trace(model).layers.values())
    assert result.approximated >= slots - (trace(model).layers["5"].parameters_above(0.02) if head == "keep" else 0)


@everywhere
@both
@heads
@pytest.mark.parametrize("bias", [True, False])
def test_deviation_shrinks_in_proportion_to_epsilon(activation, construction, head, bias):
    """The order of the approximation: log deviation against log epsilon has slope 1 in 2L.

    In L+1 it is a little less (0.7 to 1 here), which is no error: a smaller epsilon takes larger subsets, and
    the slots of a channel deviate independently, so that a larger subset amplifies their deviations more.
    """
    x, epsilons, logs = images(), [3e-2, 1e-3], []
    for epsilon in epsilons:
        found = []
        for seed in range(6):
            model = small_cnn(activation, seed=seed, density=0.15, bias=bias)
            ticket = construct(
                model, construction=construction, base_set_size=18, epsilon=epsilon, seed=seed, head=head
            )
            found.append(math.log(deviation(model, ticket, x).square().mean().sqrt()))
        logs.append(sum(found) / len(found))
    slope = (logs[1] - logs[0]) / (math.log(epsilons[1]) - math.log(epsilons[0]))
    assert (0.8 if construction == "2L" else 0.6) < slope < 1.2
    assert logs[1] < math.log(0.005)


@everywhere
@pytest.mark.parametrize("low", [-1.0, 0.0])
@pytest.mark.parametrize(
    "shape",
    [
        {}, {"padding": 0}, {"stride": 2}, {"padding": 2, "kernel": 5}, {"padding": 2, "dilation": 2},
        {"kernel": 1, "padding": 0},
    ],
    ids=str,
)  # fmt: skip
def test_one_layer_stays_within_its_bound_at_every_pixel(activation, low, shape):
    """Corollary C.1: T (N X + 1) epsilon for exact activations, twice that with linearisation; borders included."""
    epsilon = 0.01
    model = single_layer(activation, **shape)
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(64, 2, 7, 7, generator=generator) * (1 - low) + low
    ticket = construct(model, epsilon=epsilon, base_set_size=16, seed=3, head="construct", input_range=(low, 1.0))
    phi = ACTIVATIONS[activation]
    layer = trace(model).layers["0"]
    active = max(int((row.abs() > 0).sum()) for row in layer.weight.flatten(1))
    bound = phi.lipschitz * (active + 1) * epsilon * (1 if phi.exact else 2)
    assert deviation(model, ticket, x).max() <= bound
    border = deviation(model, ticket, x)
    interior = border[:, :, 1:-1, 1:-1] if border.shape[-1] > 2 else border
    assert border.max() <= 4 * interior.max() + 1e-6  # the border is no worse than the rest


@everywhere
@both
def test_biases_alone_are_right_at_the_border(activation, construction):
    """No weights: what is left is biases, carried by constants that must not see the zero padding."""
    model = small_cnn(activation, seed=3)
    for module in model:
        if isinstance(module, MaskedConv2d):
            module.weight_mask.zero_()
    ticket = construct(model, construction=construction, epsilon=0.001, base_set_size=20, seed=0)
    out = deviation(model[:4], replace_head(ticket), images())
    assert out.max() < 0.01
    assert out.flatten(2).std(2).max() < 1e-9  # the same deviation at every pixel


def replace_head(ticket):
    """The ticket without its head: its output is the last activation."""
    from ltx.ticket import TicketNode

    graph = [n for n in ticket.graph if n.op not in ("given", "flatten", "output")]
    slots = ticket.slots["2"]
    rows = [int((slots == c).nonzero()[0]) for c in range(4)]
    return replace(ticket, graph=(*graph, TicketNode("output", "output", (graph[-1].name,), {"rows": rows})))


@everywhere
@pytest.mark.parametrize("largest", [law.largest for law in source.LAWS.values()], ids=source.LAWS)
def test_linear_scale_keeps_its_promise(activation, largest):
    """m terms v phi(lambda x) of largest magnitude deviate from linear by at most epsilon * bound."""
    phi = ACTIVATIONS[activation]
    m, epsilon, bound = 15, 0.01, 2.8
    law = pair_law(phi, nonnegative=False)
    sigma = linear_scale(phi, law, bound, m=m, epsilon=epsilon, scale=1.0, largest=largest)
    if phi.exact:
        assert sigma == 1.0
        return
    z = largest * sigma * torch.linspace(-bound, bound, 10_001, dtype=torch.float64)
    linear = torch.where(z > 0, phi.slope_pos * z, phi.slope_neg * z) + phi.offset
    terms = m * (2 if law.opposite else len(law.signs))
    assert terms * largest / (sigma * law.gain) * (phi.fn(z) - linear).abs().max() <= epsilon * bound * (1 + 1e-3)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_nonnegative_inputs_need_one_base_set(activation):
    model = single_layer(activation)
    one, two = (construct(model, base_set_size=16, head="construct", input_range=r) for r in ((0.0, 1.0), (-1.0, 1.0)))
    assert one.parameters < 0.7 * two.parameters
    assert verify(one, trace(model)).ok
    claimed = replace(one, input_low=-1.0)
    assert not verify(claimed, trace(model)).ok  # for negative inputs the second base set is missing


@both
def test_a_seed_is_a_ticket(construction):
    model = small_cnn("relu")
    a, b, other = (construct(model, construction=construction, seed=s) for s in (7, 7, 8))
    assert all(torch.equal(a.masks[n], b.masks[n]) for n in a.masks)
    assert not all(torch.equal(a.masks[n], other.masks[n]) for n in a.masks)
    assert a.source_parameters > a.parameters > 0


@pytest.mark.gpu
@both
@everywhere
def test_gpu_makes_the_same_ticket(construction, activation):
    model = small_cnn(activation)
    here, there = (construct(model, construction=construction, device=d) for d in ("cpu", "cuda"))
    assert all(torch.equal(here.masks[n], there.masks[n]) for n in here.masks)
    x = images()
    torch.testing.assert_close(
        here.to_module()(x), there.to_module(device="cuda")(x.cuda()).cpu(), atol=1e-4, rtol=1e-4
    )


def test_failed_rows_are_given_up_whole():
    """With small m rows fail: the source is wider than what is kept, and the failed rows are empty."""
    model = small_cnn("relu", density=0.6)
    seen: list[Statistics] = []
    ticket = construct(model, base_set_size=9, epsilon=0.02, seed=1, on_statistics=seen.append)
    assert seen[0].failures > 0
    assert verify(ticket, trace(model)).ok
    slots = ticket.slots["2"]
    assert len(slots) > 4
    assert sorted(slots[slots >= 0].tolist()) == [0, 1, 2, 3]


def test_l_plus_one_makes_m_slots_of_what_it_reads_and_one_of_the_outputs():
    seen: list[Statistics] = []
    ticket = construct(small_cnn("relu"), construction="L+1", base_set_size=24, epsilon=0.05, head="construct",
                       on_statistics=seen.append)  # fmt: skip
    slots = [ticket.slots[name] for name in ("0", "2", "5")]
    many = [torch.bincount(labels[labels >= 0]).tolist() for labels in slots]
    assert all(20 <= n <= 24 for n in many[0])  # of the others nothing is read
    assert all(1 < n <= 24 for n in many[1])
    assert many[2] == [1, 1, 1]
    assert sum(len(labels) for labels in slots) == seen[0].rows
    assert len(slots[2]) <= 3 + seen[0].given_up


def test_layer_max_reaches_parameters_beyond_one():
    model = small_cnn("relu")
    with torch.no_grad():
        model[2].weight.mul_(8)
    with pytest.raises(LtxError, match=r"layer 2, channel .*scaling=layer_max"):
        construct(model, base_set_size=14, seed=0)
    ticket = construct(model, base_set_size=18, scaling="layer_max")
    assert verify(ticket, trace(model)).ok
    assert ticket.layer("2").sigma >= float(model[2].masked()[0].detach().abs().max())


@both
def test_what_nothing_reads_is_pruned(construction):
    """A channel of the first layer that the second does not read costs nothing."""
    model = small_cnn("relu")
    model[2].weight_mask[:, 1] = 0
    ticket = construct(model, construction=construction)
    assert 1 not in ticket.slots["0"].tolist()
    read = ticket.read_channels()
    for node in ticket.graph:
        if node.op == "layer":
            name = node.attributes["layer"]
            assert set(ticket.kept(name)[0].tolist()) <= set(read[node.name].tolist())


@both
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_pooling_functions_and_multilayer_perceptrons(construction, activation):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(1, 3, 3, padding="same"), nn.MaxPool2d(2), nn.Dropout())
            self.hidden = nn.Linear(27, 5)
            self.head = nn.Linear(5, 2, bias=False)

        def forward(self, x):
            fn = {"relu": torch.relu, "tanh": torch.tanh}[activation]
            x = fn(torch.flatten(self.features(x), 1))
            return self.head(fn(self.hidden(x)))

    torch.manual_seed(0)
    model = Pooled().eval()
    for head in ("keep", "construct"):
        ticket = construct(model, construction=construction, base_set_size=18, epsilon=0.002, head=head)
        assert verify(ticket, trace(model)).ok
        assert deviation(model.float(), ticket, images()).max() < 0.1
        model.float()


@both
def test_a_network_without_convolutions(construction):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    ticket = construct(model, construction=construction, base_set_size=18, epsilon=0.005, head="construct")
    assert verify(ticket, trace(model)).ok
    assert deviation(model, ticket, images()).max() < 0.5


@both
def test_deviation_falls_with_every_epsilon_of_a_deep_chain(construction):
    model = nn.Sequential(*[m for _ in range(4) for m in (MaskedConv2d(2, 2, 3, padding=1), nn.Tanh())]).eval()
    generator = torch.Generator().manual_seed(0)
    for module in model[::2]:
        randomise(module, generator, 0.3)
    x = torch.rand(8, 2, 6, 6) * 2 - 1
    found = [
        float(deviation(model.float(), construct(model.float(), construction=construction, base_set_size=18,
                                                 epsilon=e, head="construct"), x).max())
        for e in (0.03, 0.003, 0.0005)
    ]  # fmt: skip
    assert all(later < earlier for earlier, later in pairwise(found))


@pytest.mark.slow
@pytest.mark.parametrize("construction", ["2L", "L+1"])
def test_a_network_serves_wherever_its_graph_does(construction):
    model, x = small_cnn("tanh"), images()
    ticket, graph = construct(model, construction=construction), trace(model)
    assert trace(graph) is graph
    low, high = x.amin(0), x.amax(0)
    sizes, epsilons = dict.fromkeys(graph.layers, 15), dict.fromkeys(graph.layers, 0.01)

    def measured(target):
        return (
            verify(ticket, target).max_parameter_error,
            ltx.deviation.ticket_deviations(ticket, target, x),
            ltx.certificates.certify(ticket, target, low, high).largest,
            ltx.theory.guarantee(target, 0.1, 0.1, construction=construction),
            ltx.theory.failure_probability(target, 15, 0.01, construction=construction),
            ltx.theory.ticket_error(target, epsilons, sizes, construction=construction),
        )

    assert measured(model) == measured(graph)


def test_public_names():
    assert ltx.__all__ == ["Feedback", "LtxError", "Ticket", "construct", "subset_sum", "verify"]
    assert all(hasattr(ltx, name) for name in ltx.__all__)
    assert {*ltx.__all__, "certificates", "deviation", "export", "graph", "theory"} <= set(dir(ltx))
    assert all(hasattr(ltx, name) for name in dir(ltx))
    assert not hasattr(ltx, "constructed")
    assert isinstance(small_cnn("relu")[5], MaskedLinear)
