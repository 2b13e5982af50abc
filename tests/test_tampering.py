"""What `verify` and `Ticket.load` have to see in a ticket that is not what it claims."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from conftest import images, randomise, small_cnn
from torch import nn

from ltx import LtxError, Ticket, construct, verify
from ltx.activations import ACTIVATIONS
from ltx.errors import CheckpointError
from ltx.files import read_tensors, write_tensors
from ltx.graph import trace
from ltx.targets.masked import MaskedConv2d, MaskedLinear
from ltx.ticket import CONSTANT, TicketNode

two_for_one = sys.modules["ltx.constructions.two_for_one"]  # the package has a function of that name


@pytest.fixture(scope="module")
def relu():
    return small_cnn("relu")


@pytest.fixture(scope="module", params=["2L", "L+1"])
def honest(request, relu):
    return construct(relu, construction=request.param, base_set_size=14, epsilon=0.02)


def node(ticket, name, **changes):
    """The ticket with one node of its graph changed."""
    return replace(ticket, graph=tuple(replace(n, **changes) if n.name == name else n for n in ticket.graph))


def layer(ticket, name, **changes):
    return replace(ticket, layers=tuple(replace(n, **changes) if n.name == name else n for n in ticket.layers))


def test_tampered_structures_are_found(honest, relu):
    graph = trace(relu)
    assert verify(honest, graph).ok
    first = honest.layers[0]
    behind = "2" if honest.construction == "L+1" else "2.copies"
    wrong = {
        "a layer that skips its activation": node(honest, behind, inputs=("0",)),
        "an operation behind the output": replace(
            honest, graph=(*honest.graph, TicketNode("more", "activation", ("output",), {"function": "relu"}))
        ),
        "no output": replace(honest, graph=honest.graph[:-1]),
        "another activation": node(honest, "1", attributes={"function": "identity"}),
        "an unknown activation": node(honest, "1", attributes={"function": "swish"}),
        "an activation without a name": node(honest, "1", attributes={}),
        "a kernel turned": layer(honest, "2", shape=(*honest.layer("2").shape[:2], 1, 9)),
        "other padding": layer(honest, "2", padding=(0, 0)),
        "a stride in the copies": layer(honest, first.name, stride=(2, 2)),
        "padded copies": layer(honest, first.name, padding=(1, 1)),
        "no number as sigma": layer(honest, "2", sigma=float("nan")),
        "a sigma between two numbers of float32": layer(honest, "2", sigma=honest.layer("2").sigma * (1 + 1e-9)),
        "a sigma beyond float32": layer(honest, "2", sigma=2.0**200),
        "an unknown role": layer(honest, "2", role="magic"),
        "a label beyond the target": replace(
            honest, slots={**honest.slots, "2": torch.where(honest.slots["2"] == 0, 99, honest.slots["2"])}
        ),
        "a label of the copies beyond the image": replace(
            honest, slots={**honest.slots, first.name: torch.where(honest.slots[first.name] == 0, 9, 0)}
        ),
        "any epsilon": replace(honest, epsilon=float("inf")),
    }
    for what, ticket in wrong.items():
        assert not verify(ticket, graph).ok, what


def test_verify_says_which_rule_is_broken(honest, relu):
    graph = trace(relu)
    first, last = honest.layers[0], honest.layers[-1]
    head = next(n.name for n in honest.graph if n.op == "given")
    output = honest.graph[-1]
    twice = TicketNode("1", "flatten", ("1",), {})
    slots = honest.slots["2"]
    live = int((slots >= 0).nonzero()[0])
    constant = slots.clone()
    constant[live] = CONSTANT

    def given(part, change):
        name = f"{head}.{part}"
        return replace(honest, given={**honest.given, name: change(honest.given[name])})

    other = "2L" if honest.construction == "L+1" else "L+1"
    wrong = {
        "several nodes or layers have one name: ['1']": replace(
            honest, graph=(*honest.graph[:3], twice, *honest.graph[3:])
        ),
        f"given.{head}.weight: must be float32": given("weight", torch.Tensor.double),
        f"given.{head}.bias: has NaN": given("bias", lambda t: t / 0),
        "a sum has more terms than a base set": replace(honest, base_set_size=1),
        "its given parameters have shapes": given("bias", lambda t: t[:-1]),
        "2.slots: has shape": replace(honest, slots={**honest.slots, "2": slots.double()}),
        "seed -1 is not": replace(honest, seed=-1),
        f"seed {2**64} is not": replace(honest, seed=2**64),
        "base_set_size 0 not from 1 to 32": replace(honest, base_set_size=0),
        "construction '3L' or selection 'smallest' is not known": replace(honest, construction="3L"),
        "construction '" + honest.construction + "' or selection 'any' is not known": replace(honest, selection="any"),
        "in 2L there are pairs" if other == "2L" else "in front of the image alone": replace(
            honest, construction=other
        ),
        "activation 'tanh': the target has relu": replace(honest, activation="tanh"),
        f"layer {last.name}: only the first layer of a source has biases": layer(honest, last.name, bias=True),
        "stride (1,), padding": layer(honest, first.name, stride=(1,)),
        "dilation (0, 1) is none": layer(honest, first.name, dilation=(0, 1)),
        "row " + str(live) + " is labelled constant and reads a channel that is not": replace(
            honest, slots={**honest.slots, "2": constant}
        ),
        "node '0' follows the copies of 0": layer(honest, "0", target="2"),
        "node '0' follows the copies of 0, the sums must": layer(
            honest, "0", role="copies" if other == "L+1" else "direct"
        ),
        "output: its rows do not stand for": node(
            honest, output.name, attributes={**output.attributes, "rows": output.attributes["rows"][::-1]}
        ),
    }
    for reason, ticket in wrong.items():
        found = verify(ticket, graph).violations
        assert any(reason in violation for violation in found), (reason, found)


@pytest.mark.parametrize("other", ["identity", "leaky_relu"])
def test_another_activation_inside_a_pair_is_found(honest, relu, other):
    inside = next(n.name for n in honest.graph if n.op == "activation")
    ticket = node(honest, inside, attributes=ACTIVATIONS[other].attributes)
    assert any(
        f"node '{inside}' is {other}, no activation of the target" in violation
        for violation in verify(ticket, trace(relu)).violations
    )


def test_an_entry_without_its_opposite_is_found():
    model = small_cnn("sigmoid")
    ticket = construct(model, construction="2L", base_set_size=14, epsilon=0.02, head="construct")
    mask = ticket.masks["2"]
    for entry in (0, len(mask) // 2, len(mask) - 1):
        alone = torch.cat([mask[:entry], mask[entry + 1 :]])
        found = verify(replace(ticket, masks={**ticket.masks, "2": alone}), trace(model)).violations
        assert any("is kept without its opposite" in violation for violation in found), found


def test_a_constant_that_is_not_1_is_found():
    model = small_cnn("relu")
    ticket = construct(model, base_set_size=16, epsilon=0.02, head="construct")
    name, rows = next(
        (name, rows)
        for name in (n.name for n in ticket.layers if n.role != "copies")
        if len(rows := (ticket.slots[name] == CONSTANT).nonzero().flatten())
    )
    mask, size = ticket.masks[name], ticket.layer(name).row_size
    mine = mask[mask // size == rows[0]]
    assert len(mine) > 0
    less = mask[mask != mine[0]]
    found = verify(replace(ticket, masks={**ticket.masks, name: less}), trace(model)).violations
    assert any(f"row {int(rows[0])}: a constant sums to" in violation for violation in found) or len(mine) == 1, found


def test_a_bias_is_the_sum_of_what_reads_constants(relu):
    """An entry that is missing leaves it off; one at another tap reads the padding, which is 0 and no constant."""
    ticket, graph = construct(relu, construction="2L", base_set_size=14, epsilon=0.02), trace(relu)
    mask, taps = ticket.masks["2"], ticket.layer("2").taps
    rows, offsets, _ = ticket.kept("2")
    constant = ticket.slots["2.copies"][offsets // taps] == CONSTANT
    row, entry = int(rows[constant][0]), int(mask[constant][0])
    assert entry % taps == taps // 2

    def violations(changed):
        return verify(replace(ticket, masks={**ticket.masks, "2": changed}), graph).violations

    (found,) = violations(mask[mask != entry])
    bias = float(graph.layers["2"].bias[ticket.slots["2"][row]])
    assert found.startswith(f"layer 2, row {row}, bias: ")
    assert found.endswith(f" from the target's {bias:.6g}, more than 0.02")
    for off in (*range(-(taps // 2), 0), *range(1, taps // 2 + 1)):
        moved = torch.where(mask == entry, entry + off, mask).sort().values
        assert f"layer 2: row {row} reads a constant through a tap that sees the zero padding" in violations(moved)


@pytest.mark.parametrize(
    "change",
    [
        ("layers", lambda n: n[0].update(shape=3)), ("layers", lambda n: n[0].update(shape=[3, "a"])),
        ("layers", lambda n: n[0].update(taps=None)), ("layers", lambda n: n[0].update(stride=1)),
        ("layers", lambda n: n[0].update(sigma="x")), ("layers", lambda n: n[0].update(sigma=10**400)),
        ("layers", lambda n: n[0].update(bias=1)),
        ("layers", lambda n: n[0].update(role=["copies"])), ("layers", lambda n: n.append(3)),
        ("graph", lambda n: n[1].update(op=["layer"])), ("graph", lambda n: n[1].update(name=["1"])),
        ("graph", lambda n: n[1].update(inputs="input")), ("graph", lambda n: n[1].update(layer=0)),
        ("graph", lambda n: n[-1].update(rows=1)), ("graph", lambda n: n[-1].update(rows=["0"])),
        ("graph", lambda n: n.append("output")),
    ],
)  # fmt: skip
def test_a_file_with_values_of_other_types_is_damaged(honest, change, tmp_path):
    path = tmp_path / "ticket.safetensors"
    honest.save(path)
    tensors, metadata = read_tensors(path)
    key, edit = change
    entries = json.loads(metadata[key])
    edit(entries)
    write_tensors(path, tensors, metadata | {key: json.dumps(entries)})
    with pytest.raises(CheckpointError, match="damaged metadata"):
        Ticket.load(path)


def test_verify_takes_tickets_networks_and_tensors(honest, relu):
    for arguments, message in (
        (("ticket.safetensors", relu), "a str is no ticket"),
        ((honest, relu.state_dict()), "a OrderedDict is no torch.nn.Module"),
        ((honest, "mnist"), "a str is no torch.nn.Module"),
        ((honest, relu, images().numpy()), "calibration: must be a tensor of images"),
    ):
        with pytest.raises(LtxError, match=message):
            verify(*arguments)


def test_copies_of_the_wrong_sign_are_found(monkeypatch):
    """With nonnegative inputs a row with lambda < 0 computes nothing behind a ReLU, whatever the sums say."""
    model = nn.Sequential(MaskedConv2d(2, 3, 3, padding=1), nn.ReLU()).eval()
    randomise(model[0], torch.Generator().manual_seed(0), 0.3)
    either = two_for_one.PairLaw((0,), 1.0, False)
    monkeypatch.setattr(two_for_one, "pair_law", lambda phi, nonnegative: either)
    ticket = construct(model, base_set_size=16, head="construct", input_range=(0.0, 1.0))
    assert not verify(ticket, trace(model)).ok


def test_a_sigma_beyond_the_linear_neighbourhood_is_found(monkeypatch):
    model = small_cnn("tanh")
    monkeypatch.setattr(two_for_one, "linear_scale", lambda *a, **k: 1.0)
    ticket = construct(model, base_set_size=16)
    result = verify(ticket, trace(model))
    assert "from linear on inputs of at most 1" in result.violations[0]


@pytest.mark.parametrize("pair", [{}, {"pair_kernel": 3}, {"pair_kernel": 3, "pair_stride": "first"}])
@pytest.mark.parametrize("construction", ["2L", "L+1"])
@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_a_smaller_m_than_that_of_the_base_sets_is_found(activation, construction, pair):
    """Sums have so few terms that they say nothing; the slots that they are taken from do."""
    model = small_cnn(activation, density=0.9)
    model[0].stride = model[0].stride[0] + ("pair_stride" in pair), model[0].stride[1]
    model[5] = MaskedLinear(4 * (3 if "pair_stride" in pair else 6) * 6, 3)
    ticket = construct(model, construction=construction, base_set_size=18, epsilon=0.05, **pair)
    assert verify(ticket, model).ok
    (found,) = verify(replace(ticket, base_set_size=9), model).violations
    most = 18 if activation == "sigmoid" else 9
    many = int(found.removeprefix("layer 0: reads ").removesuffix(f" slots of input channel 0, a base set has {most}"))
    assert most < many <= 2 * most


class _Sum(nn.Module):
    """Two activations, of which the sum is positive, as bounds say and a construction does not know."""

    def __init__(self, other: nn.Module):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(1, 1, 1) for _ in range(3))
        self.d, self.other = nn.Conv2d(1, 8, 3, padding=1), other
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for layer in (self.a, self.b, self.c):
                layer.weight.fill_(0.5)
                layer.bias.zero_()
            self.d.weight.copy_(torch.rand(self.d.weight.shape, generator=generator) * 1.8 - 0.9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x).relu()
        return self.d(self.b(h).sigmoid() + self.other(self.c(h))).relu()


@pytest.mark.parametrize("other", [nn.LeakyReLU(0.01), nn.Hardtanh(-0.1, 1.0)])
def test_base_sets_of_both_signs_where_one_would_do_are_honest(other):
    model = _Sum(other).eval()
    for m, selection in ((15, "smallest"), (20, "smallest"), (15, "best")):
        ticket = construct(
            model, construction="2L", base_set_size=m, selection=selection, input_range=(0.0, 1.0), head="construct"
        )
        assert verify(ticket, model).violations == ()
        assert not verify(replace(ticket, base_set_size=m // 2), model).ok


def test_base_sets_behind_a_batch_norm_that_is_zero_are_honest():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(72, 2, bias=False),
    ).eval()  # fmt: skip
    nn.init.zeros_(model[1].weight)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in (model[0], model[2], model[5]):
            layer.weight.copy_(torch.rand(layer.weight.shape, generator=generator) * 1.8 - 0.9)
    ticket = construct(model, construction="2L", base_set_size=20, head="construct")
    assert verify(ticket, model).violations == ()
