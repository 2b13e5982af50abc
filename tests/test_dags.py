"""Graphs that are no chains: skips of many kinds, several readers, odd places of activations and flattening."""

import itertools
from dataclasses import replace

import pytest
import torch
from conftest import deviation, images
from torch import nn

from ltx import LtxError, Ticket, construct, source, verify
from ltx.deviation import ticket_deviations
from ltx.graph import trace
from ltx.source import SourceLayer
from ltx.ticket import CONSTANT, DEAD, TicketNode

both = pytest.mark.parametrize("construction", ["2L", "L+1"])


def test_a_plain_block_with_biases_and_without_batch_norm():
    """An identity skip carries a constant on: only the first row of its stream sums to 1."""

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(i, 3, 3, padding=1) for i in (1, 3, 3))
            self.phi, self.head = nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1)

        def forward(self, x):
            x = self.phi(self.a(x))
            return self.head(self.phi(x + self.c(self.phi(self.b(x)))))

    torch.manual_seed(0)
    model = Plain().eval()
    for construction in ("L+1", "2L"):
        ticket = construct(model, construction=construction, base_set_size=18, epsilon=0.002, head="construct")
        assert verify(ticket, trace(model)).ok
        found = deviation(model, ticket, images(size=8))
        assert found.max() < 0.3
        constant = ticket.slots["c"] == CONSTANT
        assert constant.any()
        assert not torch.isin(ticket.kept("c")[0], constant.nonzero().flatten()).any()


def conv(inside, outside, kernel=3, **arguments):
    return nn.Conv2d(inside, outside, kernel, padding=kernel // 2, **arguments)


class Net(nn.Module):
    """A network whose forward is given."""

    def __init__(self, run, **modules):
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.run(self, x)


def random_net(run, *, seed=0, **modules):
    torch.manual_seed(seed)
    model = Net(run, **modules).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 1.5)
                module.running_mean.uniform_(-0.3, 0.3)
    return model


relu = torch.relu
ODD = {
    "x + x": random_net(lambda s, x: (lambda y: s.c(relu(y + y)))(s.a(x)), a=conv(1, 2), c=conv(2, 2)),
    "two readers and two projections": random_net(
        lambda s, x: (lambda y: s.d(relu(s.c(relu(s.b(y))) + s.p(y)) + s.q(y)))(relu(s.a(x))),
        a=conv(1, 2), b=conv(2, 2), c=conv(2, 3), d=conv(3, 2), p=conv(2, 3, 1), q=conv(2, 3, 1),
    ),
    "a skip over two blocks": random_net(
        lambda s, x: (lambda y: s.d(relu(s.c(relu(relu(s.b(y)) + y)) + y)))(relu(s.a(x))),
        a=conv(1, 2), b=conv(2, 2), c=conv(2, 2), d=conv(2, 2),
    ),
    "a residual block of vectors": random_net(
        lambda s, x: (lambda y: s.d(relu(y + s.c(relu(s.b(y))))))(relu(s.a(x.flatten(1)))),
        a=nn.Linear(64, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4), d=nn.Linear(4, 2),
    ),
    "flattened images added": random_net(
        lambda s, x: s.d(relu(s.a(x)).flatten(1) + relu(s.b(x)).flatten(1)),
        a=conv(1, 2), b=conv(1, 2, bias=False), d=nn.Linear(128, 2),
    ),
    "pre-activation": random_net(
        lambda s, x: (lambda y: s.d(relu(s.c(relu(s.n(y))) + y)))(s.a(x)),
        a=conv(1, 2), n=nn.BatchNorm2d(2), c=conv(2, 2), d=conv(2, 2),
    ),
    "no activation between layers": random_net(
        lambda s, x: s.d(torch.tanh(s.c(s.a(x)))), a=conv(1, 2), c=conv(2, 2), d=conv(2, 2)
    ),
    "the output is a sum": random_net(
        lambda s, x: (lambda y: s.c(relu(s.b(y))) + y)(relu(s.a(x))), a=conv(1, 2), b=conv(2, 2), c=conv(2, 2)
    ),
    "what nothing reads": random_net(
        lambda s, x: (s.b(x), s.d(relu(s.a(x))))[1], a=conv(1, 2), b=conv(1, 2), d=conv(2, 2)
    ),
    "flattened before its activation": random_net(
        lambda s, x: s.d(relu(s.a(x).flatten(1))), a=conv(1, 2), d=nn.Linear(128, 2)
    ),
    "constants below 0": random_net(
        lambda s, x: s.d(relu(s.c(nn.functional.leaky_relu(s.n(s.a(x)), 0.3)))),
        a=conv(1, 2, bias=False), n=nn.BatchNorm2d(2), c=conv(2, 2), d=conv(2, 2, bias=False),
    ),
    "concatenated branches": random_net(
        lambda s, x: (lambda y: s.d(torch.cat([relu(s.b(y)), relu(s.c(y))], 1)))(relu(s.a(x))),
        a=conv(1, 2), b=conv(2, 2, 1), c=conv(2, 3), d=conv(5, 2),
    ),
    "concatenated with the image, again and flattened": random_net(
        lambda s, x: s.d(torch.cat([y := torch.cat([x, relu(s.a(x))], 1), relu(s.b(y))], 1).flatten(1)),
        a=conv(1, 2), b=conv(3, 2), d=nn.Linear(5 * 64, 2),
    ),
    "a sum that broadcasts": random_net(
        lambda s, x: s.d(relu(s.b(y := torch.tanh(s.a(x))) + s.c(y).mean((2, 3), keepdim=True)).flatten(1)),
        a=conv(1, 2), b=conv(2, 2), c=conv(2, 2), d=nn.Linear(128, 2),
    ),
    "operations in front of the first layer": random_net(
        lambda s, x: s.d(relu(s.l(torch.tanh(nn.functional.avg_pool2d(x, 2)).flatten(1)))),
        l=nn.Linear(16, 3), d=nn.Linear(3, 2),
    ),
    "the image, flattened and not": random_net(
        lambda s, x: s.d(torch.cat([relu(s.a(y := relu(x))).mean((2, 3)), relu(s.l(y.flatten(1)))], 1)),
        a=conv(1, 2), l=nn.Linear(64, 3, bias=False), d=nn.Linear(5, 2),
    ),
    "a linear branch before every activation": random_net(
        lambda s, x: s.d(torch.cat([s.b(x), relu(s.a(x))], 1)), a=conv(1, 2, bias=False), b=conv(1, 2), d=conv(4, 2),
    ),
    "wide and deep": random_net(
        lambda s, x: s.w(x.flatten(1)) + s.h(torch.tanh(s.a(x)).flatten(1)),
        w=nn.Linear(64, 2), a=conv(1, 2, bias=False), h=nn.Linear(128, 2, bias=False),
    ),
    "constants near 0": random_net(
        lambda s, x: s.d(relu(s.c(relu(s.n(s.a(x)))))),
        a=conv(1, 2, bias=False), n=nn.BatchNorm2d(2), c=conv(2, 2), d=conv(2, 2),
    ),
}  # fmt: skip
with torch.no_grad():
    ODD["constants below 0"].n.bias.fill_(-3)
    ODD["constants near 0"].n.running_mean.zero_()
    ODD["constants near 0"].n.bias.fill_(0.12)


@pytest.mark.slow
@both
@pytest.mark.parametrize("name", list(ODD))
def test_odd_graphs(construction, name):
    model, x, found = ODD[name], images(8, 8), []
    for epsilon, m in ((0.03, 16), (0.001, 24)):
        ticket = construct(
            model, construction=construction, base_set_size=m, epsilon=epsilon, head="construct", scaling="layer_max"
        )
        assert verify(ticket, trace(model)).violations == ()
        found.append(float(deviation(model, ticket, x).square().mean().sqrt()))
        with torch.no_grad():
            scale = float(model(x).std())
        account = ticket_deviations(ticket, trace(model), x)
        assert all(layer.deviation >= 0 for layer in account)
    assert found[1] < found[0] / 3
    assert found[1] < 0.02 * max(scale, 1)


def test_what_overwrites_its_input_is_refused_where_that_is_read_again():
    def block(s, x):
        y = s.a(x)
        return s.d(y + s.b(s.r(y)))

    wrong = random_net(block, a=conv(1, 2), b=conv(2, 2), d=conv(2, 2), r=nn.ReLU(inplace=True))
    with pytest.raises(LtxError, match=r"module 'r' .in place.: changes 'a', which is read again"):
        trace(wrong)
    trace(random_net(block, a=conv(1, 2), b=conv(2, 2), d=conv(2, 2), r=nn.ReLU()))
    trace(nn.Sequential(conv(1, 2), nn.ReLU(inplace=True), conv(2, 2)).eval())  # nothing reads it again


def adds(s, x):
    x += s.b(x)
    return x


@pytest.mark.parametrize(
    "change", [adds, lambda s, x: x.add_(s.b(x)), lambda s, x: nn.functional.relu(x, True),
               lambda s, x: nn.functional.leaky_relu(x, 0.1, True), lambda s, x: nn.functional.elu(x, inplace=True)],
)  # fmt: skip
def test_functions_that_overwrite_their_input(change):
    """Also those that torch.fx takes for others (+=), or that say so by position."""
    layers = {"a": conv(1, 2), "b": conv(2, 2), "d": conv(2, 2)}
    with pytest.raises(LtxError, match=r".in place.: changes 'a', which is read again"):
        trace(random_net(lambda s, x: (lambda y: s.d(change(s, y)) + y)(s.a(x)), **layers))
    model = random_net(lambda s, x: s.d(change(s, s.a(x))), **layers)
    trace(model, images(size=8))  # nothing reads it again


def test_graphs_whose_channels_do_not_fit_are_refused():
    wide = random_net(lambda s, x: relu(s.a(x) + s.b(x)), a=conv(1, 1), b=conv(1, 2))
    with pytest.raises(LtxError, match="different widths"):
        construct(wide, head="construct")
    flat = nn.Sequential(conv(1, 2), nn.Flatten(), nn.BatchNorm1d(128), nn.Linear(128, 2)).eval()
    with pytest.raises(LtxError, match=r"batch norm '2' normalises flattened images"):
        construct(flat, head="construct")


def test_swapped_batch_norms_and_skips_from_copies_are_found():
    def two(first, second):
        return random_net(
            lambda s, x: s.d(relu(getattr(s, second)(s.b(relu(getattr(s, first)(s.a(x))))))),
            a=conv(1, 2), m=nn.BatchNorm2d(2), b=conv(2, 2), n=nn.BatchNorm2d(2), d=conv(2, 2),
        )  # fmt: skip

    ours, theirs = trace(two("m", "n")), trace(two("n", "m"))
    ticket = construct(ours, base_set_size=18, epsilon=0.01, head="construct")
    assert verify(ticket, ours).ok
    assert not verify(replace(ticket, target_sha256=theirs.digest()), theirs).ok

    model = ODD["the output is a sum"]
    honest = construct(model, construction="2L", base_set_size=18, epsilon=0.01, head="construct")
    width = honest.layer("b.copies").shape[0]
    layers, _masks, slots = [], dict(honest.masks), dict(honest.slots)
    for layer in honest.layers:
        if layer.name in ("a", "c"):  # dead rows, until the widths fit
            more = torch.full((width - layer.shape[0],), DEAD)
            slots[layer.name] = torch.cat([slots[layer.name], more])
            layer = replace(layer, shape=(width, *layer.shape[1:]))
        layers.append(layer)
    graph = tuple(
        replace(n, inputs=(n.inputs[0], "b.copies.phi")) if n.op == "add" else n for n in honest.graph
    )  # fmt: skip
    assert not verify(replace(honest, layers=tuple(layers), slots=slots, graph=graph), trace(model)).ok


def test_a_pair_is_judged_by_what_its_own_copies_read():
    """Copies of an image of both signs need subsets of either sign, whatever is copied in between."""
    model = random_net(
        lambda s, x: s.d(relu(s.a(x) + s.b(relu(s.c(x)))).flatten(1)),
        **{name: conv(1, 1, 1, bias=False) for name in "cab"}, d=nn.Linear(16, 2),
    )  # fmt: skip
    wanted, m, epsilon = {"c": 0.7, "a": -0.8, "b": 0.1}, 28, 0.01
    with torch.no_grad():
        for name, weight in wanted.items():
            getattr(model, name).weight.fill_(weight)
    graph = trace(model)
    shapes = {"c.copies": (m, 1), "c": (1, m), "a.copies": (m, 1), "b.copies": (m, 1), "a": (1, m), "b": (1, m)}
    layers = {
        name: SourceLayer(name, n, "conv", (*shape, 1, 1), 1, bias=n == 0, target=name[0],
                          role="copies" if "." in name else "pair")
        for n, (name, shape) in enumerate(shapes.items())
    }  # fmt: skip

    def forged(both_signs):
        masks, slots = {}, {}
        for name, weight in wanted.items():
            zeros, every = torch.zeros(m, dtype=torch.int64), torch.arange(m)
            entries = source.weights(layers[f"{name}.copies"], 0, every, zeros).double()
            products = entries * source.weights(layers[name], 0, zeros, every).double()
            kept = []
            for sign in (1, -1) if name in both_signs else (1,):
                some = (entries * sign > 0).nonzero().flatten().tolist()
                sets = (s for size in range(1, 6) for s in itertools.combinations(some, size))
                kept += next(s for s in sets if abs(float(products[list(s)].sum()) - weight) < epsilon / 2)
            masks[name] = masks[f"{name}.copies"] = torch.tensor(sorted(kept))
            slots[name] = torch.zeros(1, dtype=torch.int64)
            slots[f"{name}.copies"] = torch.full((m,), DEAD).index_fill_(0, masks[name], 0)

        def node(name, op, *inputs, **attributes):
            return TicketNode(name, op, inputs, attributes)

        def phi(name, before):
            return node(name, "activation", before, function="relu")

        first, second = (n.name for n in graph.nodes if n.activation is not None)
        nodes = (
            node("input", "input"),
            node("c.copies", "layer", "input", layer="c.copies"), phi("c.phi", "c.copies"),
            node("c", "layer", "c.phi", layer="c"), phi(first, "c"),
            node("a.copies", "layer", "input", layer="a.copies"),
            node("b.copies", "layer", first, layer="b.copies"),
            phi("a.phi", "a.copies"), node("a", "layer", "a.phi", layer="a"),
            phi("b.phi", "b.copies"), node("b", "layer", "b.phi", layer="b"),
            node("add", "add", "a", "b"), phi(second, "add"), node("flatten", "flatten", second),
            node("d", "given", "flatten", target="d", taps=16), node("output", "output", "d", rows=[0, 1]),
        )  # fmt: skip
        return Ticket(
            seed=0, law="uniform", construction="2L", base_set_size=15, epsilon=epsilon, selection="smallest",
            activation="relu", target_sha256=graph.digest(), input_low=-1.0, input_high=1.0,
            layers=tuple(layers.values()), graph=nodes, masks=masks, bias_masks={}, slots=slots,
            given={"d.weight": model.d.weight.detach(), "d.bias": model.d.bias.detach()},
        )  # fmt: skip

    x = images(8, 4)
    honest = forged(both_signs="ca")
    assert verify(honest, graph).violations == ()
    assert float(deviation(model, honest, x).abs().max()) < 0.1
    wrong = forged(both_signs="c")
    assert not verify(wrong, graph).ok
    assert float(deviation(model, wrong, x).abs().max()) > 0.1


def test_a_head_that_reads_the_image_is_not_kept():
    model = random_net(
        lambda s, x: s.d(torch.cat([relu(s.a(x)).mean((2, 3)), x.mean((2, 3))], 1)), a=conv(1, 2), d=nn.Linear(3, 2)
    )
    with pytest.raises(LtxError, match=r"the head 'd\[1\]' reads the image itself; use head='construct'"):
        construct(model)
    assert verify(construct(model, head="construct"), model).ok


def test_a_sigma_that_is_too_large_is_found_behind_layers_without_activation():
    model = ODD["no activation between layers"]
    honest = construct(model, construction="2L", base_set_size=18, epsilon=0.01, head="construct")
    assert verify(honest, trace(model)).ok
    factor = {"c.copies": 4096.0, "c": 1 / 4096}
    layers = tuple(replace(n, sigma=n.sigma * factor.get(n.name, 1.0)) for n in honest.layers)
    assert not verify(replace(honest, layers=layers), trace(model)).ok


def test_only_paths_with_an_activation_make_a_projection():
    linear = trace(random_net(lambda s, x: (lambda y: relu(s.b(y) + s.c(y)))(relu(s.a(x))),
                              a=conv(1, 2), b=conv(2, 2), c=conv(2, 2)))  # fmt: skip
    assert not any(linear.is_projection(name) for name in linear.layers)
    short = trace(random_net(lambda s, x: (lambda y: relu(y + s.c(y)))(relu(s.a(x))), a=conv(1, 2), c=conv(2, 2)))
    assert not any(short.is_projection(name) for name in short.layers)
