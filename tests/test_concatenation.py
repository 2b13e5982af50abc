"""Networks that concatenate channels: taken apart into sums, they are constructed and verified like any other."""

from dataclasses import replace

import pytest
import torch
from conftest import deviation, images
from test_dags import both, conv, random_net, relu
from torch import nn

from ltx import Feedback, construct, verify
from ltx.adversary import ascend
from ltx.certificates import certify
from ltx.errors import ConstructionError
from ltx.export import masked_network
from ltx.graph import fold_batch_norm, run, trace
from ltx.theory import guarantee


def dense():
    """A dense block (Huang et al. 2017): batch norm on what is concatenated, and a classifier on all of it."""

    def forward(s, x):
        x = s.a(x)
        y = s.b(relu(s.m(torch.cat([x], 1))))
        z = s.k(s.c(relu(s.n(torch.cat([x, y], 1)))))
        pooled = nn.functional.adaptive_avg_pool2d(relu(torch.concat((x, y, z), dim=-3)), 1)
        return s.head(torch.flatten(pooled, 1))

    return random_net(
        forward, a=conv(1, 2), m=nn.BatchNorm2d(2), b=conv(2, 3), n=nn.BatchNorm2d(5), c=conv(5, 2),
        k=nn.BatchNorm2d(2), head=nn.Linear(7, 3),
    )  # fmt: skip


def test_the_graph_computes_what_the_network_does():
    model, behind, x = dense(), folding(), images(4, 8)
    graph = trace(model)
    assert [name for name in graph.layers if name.startswith("c")] == ["c[0]", "c[1]"]
    assert graph.head == ("head[0]", "head[1]", "head[2]")
    with torch.no_grad():
        for same, network in ((graph, model), (fold_batch_norm(trace(behind)), behind)):
            *_, (_, value) = run(same, x)
            torch.testing.assert_close(value, network(x), rtol=1e-5, atol=1e-5)
    total = sum(layer.weight.numel() for layer in graph.layers.values())
    assert total == sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))


def folding():
    """Batch norm behind a layer that reads a concatenation."""
    return random_net(
        lambda s, x: s.d(relu(s.n(s.c(torch.cat([relu(s.a(x)), torch.tanh(s.b(x))], 1)))).flatten(1)),
        a=conv(1, 2), b=conv(1, 2, bias=False), c=conv(4, 2), n=nn.BatchNorm2d(2), d=nn.Linear(128, 2),
    )  # fmt: skip


@both
def test_a_kept_head_reads_what_is_concatenated(construction):
    model, x, found = dense(), images(8, 8), []
    graph = trace(model)
    for epsilon, m in ((0.03, 16), (0.001, 24)):
        ticket = construct(graph, construction=construction, base_set_size=m, epsilon=epsilon, scaling="layer_max")
        assert verify(ticket, graph).violations == ()
        assert {node.attributes["target"] for node in ticket.graph if node.op == "given"} == set(graph.head)
        found.append(float(deviation(model, ticket, x).max()))
    assert found[1] < found[0] / 3
    ticket.given["head[1].weight"].neg_()
    assert not verify(ticket, graph).ok


@both
def test_batch_norm_behind_it_is_folded(construction):
    model = folding()
    ticket = construct(model, construction=construction, base_set_size=24, epsilon=0.001, head="construct",
                       batch_norm="fold", scaling="layer_max")  # fmt: skip
    assert not ticket.given
    assert verify(ticket, trace(model)).violations == ()
    assert float(deviation(model, ticket, images(8, 8)).max()) < 0.1


@pytest.mark.slow
def test_feedback_certificates_theorems_and_export():
    model, x = folding(), images(64, 8)
    graph = trace(model)
    ticket = construct(graph, construction="L+1", base_set_size=15, epsilon=0.01, head="construct",
                       selection="feedback", calibration=x, feedback=Feedback(samples=500))  # fmt: skip
    plain = construct(graph, construction="L+1", base_set_size=15, epsilon=0.01, head="construct")
    assert verify(ticket, graph, x).violations == ()
    test = images(64, 8, seed=1)
    assert float(deviation(model, ticket, test).square().mean()) < float(deviation(model, plain, test).square().mean())
    box = -torch.ones(1, 8, 8), torch.ones(1, 8, 8)
    for made in (ticket, plain):
        worst = ascend(made.to_module(), model, test[:16], *box, steps=10).largest
        assert 0 < worst <= certify(made, graph, *box).largest
    pruned = masked_network(plain)
    with torch.no_grad():
        torch.testing.assert_close(pruned(x), plain.to_module()(x), rtol=1e-5, atol=1e-5)
    whole = guarantee(graph, 1.0, 0.1, construction="L+1", head="construct")
    assert {layer.layer for layer in whole.layers} == set(graph.layers)


def test_a_tensor_twice_and_by_name():
    model = random_net(
        lambda s, x: s.d(torch.cat(tensors=[(y := relu(s.a(x))), y, s.b(x)], dim=1).flatten(1)),
        a=conv(1, 2), b=conv(1, 1, bias=False), d=nn.Linear(5 * 64, 2),
    )  # fmt: skip
    graph, x = trace(model), images(4, 8)
    *_, (_, value) = run(graph, x)
    with torch.no_grad():
        torch.testing.assert_close(value, model(x), rtol=1e-5, atol=1e-5)
    assert verify(construct(graph, head="construct", base_set_size=20), graph).ok


def test_layers_of_a_concatenation_are_no_projections():
    """A dense block is no residual block, though one summand reads what the other one does, without activation."""
    graph = trace(dense())
    assert not any(graph.is_projection(name) for name in graph.layers)


@pytest.mark.parametrize(
    ("run_it", "message"),
    [
        (lambda s, x: s.c(torch.cat([s.a(x), s.b(x)], 2)), r"module 'cat' \(cat\): along dimension 2; only channels"),
        (lambda s, x: torch.cat([s.a(x), s.b(x)], 1), "the network returns a concatenation; put a layer behind it"),
        (lambda s, x: s.c(torch.cat([s.a(x), s.b(x)], 1) + s.d(x)), "node 'add' adds a concatenation to what is not"),
        (
            lambda s, x: s.e(torch.cat([s.a(x).flatten(1), s.b(x).flatten(1)], 1)),
            "node 'cat' concatenates flattened images; flatten behind the concatenation",
        ),
        (
            lambda s, x: s.e(s.n(torch.cat([s.a(x), s.b(x)], 1).flatten(1))),
            "batch norm 'n' has 256 channels, the concatenation in front of it 4; flatten behind it",
        ),
        (lambda s, x: s.d(torch.cat([s.a(x), s.b(x)], 1)), r"layer 'd' reads 1 channels, the concatenation has 2 \+ 2"),
        (lambda s, x: s.c(torch.cat([x + s.a(x), s.b(x)], 1)), "node 'add' adds the image itself; put a layer"),
        (
            lambda s, x: s.e(torch.cat([x, s.a(torch.cat([x, x], 1))], 1).flatten(1)),
            "node 'cat' concatenates the image, whose channels no convolution of it tells",
        ),
    ],
)
def test_what_is_refused(run_it, message):
    model = random_net(run_it, a=conv(1, 2), b=conv(1, 2), c=conv(4, 2), d=conv(1, 4), e=nn.Linear(256, 2),
                       n=nn.BatchNorm1d(256))  # fmt: skip
    with pytest.raises(ConstructionError, match=message):
        trace(model)


def test_a_channel_with_several_columns_in_a_kept_head_is_found():
    """Each of the two is the target's column, so that nothing else is wrong with the parameters."""

    def forward(s, x):
        x = torch.relu(s.a(x))
        return s.head(torch.cat([x, s.b(x)], 1).flatten(1))

    model = random_net(forward, a=nn.Conv2d(1, 2, 3), b=nn.Conv2d(2, 2, 3, padding=1), head=nn.Linear(64, 3))
    ticket = construct(model, base_set_size=14, epsilon=0.02)
    assert verify(ticket, trace(model)).ok
    weight = ticket.given["head[0].weight"].view(3, -1, 16).clone()  # of 4 x 4 pixels
    labels, read = ticket.slots["a"], weight.ne(0).any(2).any(0)
    slot = int(read.nonzero()[0])
    twin = int(((labels == labels[slot]) & ~read).nonzero()[0])
    weight[:, twin] = weight[:, slot]
    other = replace(ticket, given={**ticket.given, "head[0].weight": weight.view(3, -1)})
    assert verify(other, trace(model)).violations == ("head head[0]: channel -1 has no slot, or a channel has several",)
