"""Residual networks: slots that skips join, dead slots, batch norm kept and folded, projections, sampled errors."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import deviation, images, small_resnet
from torch import nn

from ltx import LtxError, construct, verify
from ltx.activations import ACTIVATIONS
from ltx.constructions import Statistics
from ltx.constructions.sampled import sampled
from ltx.deviation import sampled_deviations, ticket_deviations
from ltx.graph import above, fold_batch_norm, run, trace
from ltx.network import TicketNetwork
from ltx.ticket import CONSTANT, DEAD

everywhere = pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "sigmoid"])
both = pytest.mark.parametrize("construction", ["2L", "L+1"])
kept_or_folded = pytest.mark.parametrize("batch_norm", ["keep", "fold"])


@pytest.mark.slow
@everywhere
@both
@kept_or_folded
@pytest.mark.parametrize("head", ["keep", "construct"])
def test_every_parameter_is_within_epsilon(activation, construction, batch_norm, head):
    model = small_resnet(activation)
    ticket = construct(
        model, construction=construction, base_set_size=14, epsilon=0.02, seed=1, head=head, batch_norm=batch_norm,
        scaling="layer_max",
    )  # fmt: skip
    result = verify(ticket, trace(model))
    assert result.violations == ()
    assert 0 < result.max_parameter_error <= 0.02
    graph = fold_batch_norm(trace(model)) if batch_norm == "fold" else trace(model)
    approximated = [layer for name, layer in graph.layers.items() if head == "construct" or name != "fc"]
    assert result.approximated >= sum(layer.parameters_above(0.02) for layer in approximated)
    assert any(node.op == "batch_norm" for node in ticket.graph) == (batch_norm == "keep")
    with torch.no_grad():  # the narrow module computes what it should in single precision too
        single, double = ticket.to_module()(images(size=8)), ticket.to_module().double()(images(size=8).double())
    torch.testing.assert_close(single.double(), double, atol=2e-3, rtol=2e-3)


@everywhere
@both
@kept_or_folded
def test_agrees_with_the_target_as_epsilon_goes_to_0(activation, construction, batch_norm):
    """The order of the approximation, in float64: 30 times less epsilon, at least 8 times less deviation in 2L.

    In L+1 it is less, because a smaller epsilon takes larger subsets, which amplify the slots' deviations more.
    """
    x, levels = images(8, 8), ((0.03, 14), (0.001, 22))
    found = []
    for epsilon, m in levels:
        deviations = []
        for seed in range(3):
            model = small_resnet(activation, seed=seed, blocks=1, density=0.15)
            ticket = construct(
                model, construction=construction, base_set_size=m, epsilon=epsilon, seed=seed, head="construct",
                batch_norm=batch_norm, scaling="layer_max",
            )  # fmt: skip
            deviations.append(float(deviation(model, ticket, x).square().mean().sqrt()))
        found.append(np.exp(np.mean(np.log(deviations))))
    assert found[1] < found[0] / (8 if construction == "2L" else 3)
    assert found[1] < 0.03


def run_whole(ticket, x, garbage):
    """The whole source under its mask, no channel left out; dead slots' batch norm replaced by garbage."""
    labels, values = ticket.node_labels(), {}
    for node in ticket.graph:
        inner = [values[name] for name in node.inputs]
        if node.op == "input":
            out = x
        elif node.op == "layer":
            layer = ticket.layer(node.attributes["layer"])
            weight, bias = ticket.weight(layer.name).double(), ticket.bias(layer.name).double()
            out = (
                nn.functional.conv2d(inner[0], weight, bias, layer.stride, layer.padding)
                if layer.kind == "conv" else nn.functional.linear(inner[0], weight, bias)
            )  # fmt: skip
        elif node.op == "batch_norm":
            scale, shift = (ticket.given[f"{node.name}.{p}"].double().clone() for p in ("weight", "bias"))
            shift[labels[node.name] == DEAD] = garbage
            out = inner[0] * scale[:, None, None] + shift[:, None, None]
        elif node.op == "activation":
            out = ACTIVATIONS[node.attributes["function"]].fn(inner[0])
        elif node.op == "add":
            out = inner[0] + inner[1]
        elif node.op == "avg_pool":
            out = inner[0].mean((2, 3), keepdim=True)
        elif node.op == "flatten":
            out = inner[0].flatten(1)
        elif node.op == "given":
            out = nn.functional.linear(
                inner[0], *(ticket.given[f"{node.name}.{p}"].double() for p in ("weight", "bias"))
            )
        else:
            out = inner[0][:, node.attributes["rows"]]
        values[node.name] = out
    return values["output"]


@pytest.mark.slow
@both
@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
@pytest.mark.parametrize("head", ["keep", "construct"])
def test_dead_slots_are_never_read(activation, construction, head):
    """With a small m rows fail in the middle of a stream: their slots may hold anything from there on."""
    model = small_resnet(activation, density=0.5)
    seen: list[Statistics] = []
    ticket = construct(
        model, construction=construction, base_set_size=10 if construction == "L+1" else 13, epsilon=0.02, head=head,
        on_statistics=seen.append,
    )  # fmt: skip
    assert verify(ticket, trace(model)).ok
    assert seen[0].failures > 0
    stream = {f"blocks.{b}.conv2": ticket.slots[f"blocks.{b}.conv2"] for b in (4, 5)}
    assert all(len(slots) == len(ticket.slots["blocks.4.shortcut.0"]) for slots in stream.values())
    died = (stream["blocks.4.conv2"] >= 0) & (stream["blocks.5.conv2"] == DEAD)
    assert died.any()  # else this test would not test anything
    x = images(size=8).double()
    with torch.no_grad():
        narrow = ticket.to_module().double()(x)
    for garbage in (0.0, 1e3):
        torch.testing.assert_close(run_whole(ticket, x, garbage), narrow, atol=1e-9, rtol=1e-9)


@both
def test_skips_join_equal_indices(construction):
    """Slot p of a block's output is slot p of its input: the same channel, and the same width."""
    ticket = construct(small_resnet(blocks=3), construction=construction, base_set_size=12, epsilon=0.02)
    for first, block in (("conv", 0), ("blocks.0.conv2", 1), ("blocks.3.conv2", 4), ("blocks.3.shortcut.0", 5)):
        before, after = ticket.slots[first], ticket.slots[f"blocks.{block}.conv2"]
        alive = after >= 0
        assert alive.any()
        assert torch.equal(after[alive], before[alive])


def test_a_projection_is_a_linear_pair():
    ticket = construct(small_resnet("sigmoid"), construction="2L", base_set_size=14, epsilon=0.02)
    nodes = {node.name: node for node in ticket.graph}
    for layer in ticket.layers:
        if layer.role == "pair":
            linear = nodes[nodes[layer.name].inputs[0]].op == "layer"
            assert linear == ("shortcut" in layer.name), layer.name
    order = [layer.target for layer in ticket.layers]
    assert order.index("blocks.2.conv2") < order.index("blocks.2.shortcut.0")


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_constants_come_from_given_shifts(activation):
    """Batch norm kept, a constructed head with biases: its constants are fully pruned rows, no sums to 1."""
    model = small_resnet(activation)
    assert bool(above(model.fc.bias, 0.02).any())
    ticket = construct(model, base_set_size=14, epsilon=0.02, head="construct")
    rows, _, _ = ticket.kept("blocks.5.conv2")
    constant = (ticket.slots["blocks.5.conv2"] == CONSTANT).nonzero().flatten()
    assert len(constant) > 0
    assert not torch.isin(constant, rows).any()
    assert verify(ticket, trace(model)).ok
    for part in ("weight", "bias"):
        changed = ticket.given[f"blocks.5.bn2.{part}"].clone()
        changed[constant] += 0.01
        other = replace(ticket, given={**ticket.given, f"blocks.5.bn2.{part}": changed})
        found = verify(other, trace(model)).violations
        assert any(f"slot {int(constant[0])} has that of no channel" in violation for violation in found), found


def test_what_is_wrong_with_a_residual_ticket_is_found():
    model = small_resnet()
    graph = trace(model)
    honest = construct(model, base_set_size=14, epsilon=0.02)
    assert verify(honest, graph).ok

    def node(name, **changes):
        return replace(honest, graph=tuple(replace(n, **changes) if n.name == name else n for n in honest.graph))

    def given(name, change):
        return replace(honest, given={**honest.given, name: change(honest.given[name])})

    sums = next(n for n in honest.graph if n.op == "add")
    others = [n.name for n in honest.graph if n.op == "batch_norm" and n.name not in sums.inputs]
    pool = next(n.name for n in honest.graph if n.op == "avg_pool")
    slots = honest.slots["blocks.0.conv2"]
    dead = torch.where(slots == slots.max(), DEAD, slots)
    wrong = {
        "a skip from elsewhere": node(sums.name, inputs=(sums.inputs[0], others[0])),
        "no skip": node(sums.name, op="activation", inputs=sums.inputs[:1], attributes={"function": "relu"}),
        "another scale": given("bn.weight", lambda t: t * 1.01),
        "another shift": given("blocks.0.bn1.bias", lambda t: t + 0.01),
        "batch norm of too few slots": given("bn.weight", lambda t: t[:-1]),
        "a dead slot that is read": replace(honest, slots={**honest.slots, "blocks.0.conv2": dead}),
        "another pooling": node(pool, op="max_pool", attributes={"kernel_size": 2, "stride": 2, "padding": 0}),
        "no batch norm": replace(honest, graph=tuple(
            replace(n, inputs=tuple(i if i != "bn" else "conv" for i in n.inputs))
            for n in honest.graph if n.name != "bn"
        )),
    }  # fmt: skip
    for what, ticket in wrong.items():
        assert not verify(ticket, graph).ok, what


def test_networks_that_a_construction_cannot_serve():
    class FromImage(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x):
            return torch.relu(x + self.conv(x))

    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.last = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1)

        def forward(self, x):
            return self.last(self.bn(torch.relu(self.conv(x))))

    with pytest.raises(LtxError, match="adds the image itself"):
        construct(FromImage().eval(), head="construct")
    with pytest.raises(LtxError, match=r"batch norm 'bn' does not stand directly behind .* batch_norm='keep'"):
        construct(PreActivation().eval(), head="construct", batch_norm="fold")
    with pytest.raises(LtxError, match="batch_norm 'drop' is not known; there are keep, fold"):
        construct(small_resnet(), batch_norm="drop")
    with pytest.raises(LtxError, match=r"layer \S+, channel \d+: none of .* raise m or epsilon"):
        construct(small_resnet(density=0.9), base_set_size=6, epsilon=0.002)
    ticket = construct(PreActivation().eval(), head="construct", base_set_size=16)
    assert verify(ticket, trace(PreActivation().eval())).ok is False  # other parameters: another target


def test_folding_changes_nothing_but_rounding():
    model = small_resnet("tanh")
    folded = fold_batch_norm(trace(model))
    assert not any(node.op == "batch_norm" for node in folded.nodes)
    *_, (_, ours) = run(folded, images(size=8))
    *_, (_, plain) = run(trace(model), images(size=8))
    with torch.no_grad():
        theirs = model(images(size=8))
    torch.testing.assert_close(plain, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_batch_norm_is_part_of_the_digest():
    model = small_resnet()
    before = trace(model).digest()
    with torch.no_grad():
        model.bn.running_mean += 0.1
    assert trace(model).digest() != before


def test_projections_are_told_from_other_layers():
    graph = trace(small_resnet())
    assert [name for name in graph.layers if graph.is_projection(name)] == [
        "blocks.2.shortcut.0",
        "blocks.4.shortcut.0",
    ]


@pytest.mark.slow
def test_the_account_of_deviations():
    model = small_resnet("tanh", blocks=3, width=3)
    graph = trace(model)
    names = [node.name for node in graph.nodes if node.op == "activation"]
    explicit = {
        c: ticket_deviations(construct(model, construction=c, base_set_size=14, epsilon=0.01), graph, images(size=8))
        for c in ("2L", "L+1")
    }
    assert all([d.node for d in found] == names for found in explicit.values())
    for found in explicit.values():
        assert found[0].gain is None
        for before, after in pairwise(found):
            assert after.gain == pytest.approx(after.deviation / before.deviation)
    assert all(d.deviation_of_means <= d.deviation for d in explicit["L+1"])
    # section 6: the slots of L+1 amplify one another's deviations, those of 2L do not
    assert explicit["L+1"][-1].deviation > 2 * explicit["2L"][-1].deviation
    exact = construct(model, construction="2L", base_set_size=26, epsilon=1e-4)
    assert ticket_deviations(exact, graph, images(size=8))[-1].deviation < 0.1 * explicit["2L"][-1].deviation
    changed = small_resnet("tanh", blocks=3, width=3)
    changed.load_state_dict(sampled(model, seed=0).state)
    found = sampled_deviations(trace(changed), graph, images(size=8))
    assert [d.node for d in found] == names
    assert 0 < found[0].deviation < 0.1


@both
def test_a_ticket_runs_the_same_on_images_of_either_layout(construction):
    """On a GPU the channels of a position lie side by side, and stay so where a node takes some of them only."""
    ticket = construct(small_resnet("tanh", blocks=3), construction=construction, base_set_size=14, epsilon=0.02)
    network, x = TicketNetwork(ticket, dense=True), images(size=8)
    narrowed = [name for name, _ in network.named_buffers() if "_take" in name]
    assert narrowed or construction == "2L"
    adds = [node.name for node in ticket.graph if node.op == "add"]
    with torch.no_grad():
        expected, found = (network.run(each, keep=adds) for each in (x, x.to(memory_format=torch.channels_last)))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    assert all(found[name].is_contiguous(memory_format=torch.channels_last) for name in adds)


@pytest.mark.gpu
@both
@kept_or_folded
@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_gpu_makes_and_runs_the_same_ticket(construction, batch_norm, activation):
    model = small_resnet(activation)
    here, there = (
        construct(
            model, construction=construction, base_set_size=14, epsilon=0.02, batch_norm=batch_norm,
            scaling="layer_max", device=device,
        )
        for device in ("cpu", "cuda")
    )  # fmt: skip
    assert all(torch.equal(here.masks[n], there.masks[n]) for n in here.masks)
    x = images(size=8)
    with torch.no_grad():
        ours, theirs = here.to_module()(x), there.to_module(device="cuda")(x.cuda()).cpu()
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)
    graph = fold_batch_norm(trace(model)) if batch_norm == "fold" else trace(model)
    pairs = zip(ticket_deviations(here, graph, x), ticket_deviations(there, graph, x.cuda()), strict=True)
    assert all(a.deviation == pytest.approx(b.deviation, rel=0.05, abs=1e-4) for a, b in pairs)
