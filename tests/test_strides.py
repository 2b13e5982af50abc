"""Pairs whose first layer has a larger kernel or the target's stride (Appendix E)."""

from dataclasses import replace

import pytest
import torch
from conftest import deviation, images, one_line, small_cnn, small_resnet
from test_dags import both, random_net
from torch import nn

from ltx import Feedback, Ticket, construct, verify
from ltx.adversary import ascend
from ltx.certificates import certify
from ltx.constructions.strides import pair_geometry
from ltx.errors import ConstructionError
from ltx.export import masked_network
from ltx.graph import Layer, trace
from ltx.source import SourceLayer
from ltx.theory import guarantee
from ltx.verification.pairs import taps_read, without_padding


def layer(kernel, stride, padding, dilation):
    return Layer("conv", torch.randn(2, 3, *kernel), torch.zeros(2), stride, padding, dilation)


@pytest.mark.parametrize(
    ("kernel", "padding", "second"), [(3, 1, (3, 1)), (1, 0, (1, 0)), (5, 2, (5, 2)), (7, 3, (7, 3)), (3, 0, (2, 0))]
)
def test_the_second_layer_is_no_larger_than_it_has_to_be(kernel, padding, second):
    """Behind a first one of 3x3 with the target's stride of 2, which sees a pixel on either side."""
    target = layer((kernel,) * 2, (2, 2), (padding,) * 2, (1, 1))
    geometry = pair_geometry(target, "conv", kernel**2, image=True, kernel=3, stride="first")
    assert [line.second[::2] for line in geometry.lines] == [second] * 2


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "first"),
    [
        ((3, 3), (2, 2), (1, 1), (1, 1), 3), ((3, 3), (2, 2), (1, 1), (1, 1), 7), ((1, 1), (2, 2), (0, 0), (1, 1), 3),
        ((3, 3), (2, 2), (0, 0), (1, 1), 3), ((3, 3), (2, 2), (2, 2), (2, 2), 5), ((7, 7), (2, 2), (3, 3), (1, 1), 3),
        ((11, 11), (4, 4), (2, 2), (1, 1), 7), ((5, 3), (1, 2), (0, 1), (1, 1), 3), ((3, 3), (3, 3), (1, 1), (1, 1), 5),
        ((3, 5), (1, 1), (1, 2), (1, 1), 5), ((4, 4), (2, 2), (1, 1), (1, 1), 1), ((3, 3), (1, 1), (0, 4), (2, 2), 3),
    ],
)  # fmt: skip
def test_a_pair_computes_what_the_layer_does_for_every_size(kernel, stride, padding, dilation, first):
    """With exact copies and weights: shifted, subsampled copies, convolved, are the target's convolution."""
    torch.manual_seed(0)
    target = layer(kernel, stride, padding, dilation)
    where = "first" if first > 1 else "second"
    found = pair_geometry(target, "conv", kernel[0] * kernel[1], image=True, kernel=first, stride=where)
    positions, position = found.first.unique(return_inverse=True)
    assert len(positions) <= stride[0] * stride[1]
    copies = torch.zeros(3, len(positions), 3, found.area)
    for channel in range(3):
        copies[channel, torch.arange(len(positions)), channel, positions] = 1
    rows, columns = found.lines
    second = torch.zeros(2, 3, len(positions), found.taps)
    second[:, :, position, found.second] = target.weight.flatten(2)
    for size in range(max(k * d for k, d in zip(kernel, dilation, strict=True)), 30):
        x = torch.randn(2, 3, size, size + 1)
        inside = nn.functional.conv2d(
            x, copies.view(-1, 3, rows.kernel, columns.kernel), stride=(rows.stride, columns.stride),
            padding=(rows.padding, columns.padding),
        )  # fmt: skip
        (b, s, p, d), (c, t, q, e) = rows.second, columns.second
        weight = second.view(2, -1, b, c)
        outside = nn.functional.conv2d(inside, weight, stride=(s, t), padding=(p, q), dilation=(d, e))
        wanted = nn.functional.conv2d(x, target.weight, None, stride, padding, dilation)
        torch.testing.assert_close(outside, wanted, rtol=1e-4, atol=1e-4)


def test_what_no_pair_computes_is_refused():
    with pytest.raises(ConstructionError, match="layer conv: a 3x3 layer of stride 2 and one of stride 1 cannot"):
        pair_geometry(layer((2, 2), (2, 2), (0, 0), (1, 1)), "conv", 4, image=True, kernel=3, stride="first")
    with pytest.raises(ConstructionError, match="pair_kernel 2 must be odd"):
        construct(small_cnn("relu"), pair_kernel=2)
    with pytest.raises(ConstructionError, match="needs the copies of every position"):
        construct(small_cnn("relu"), pair_stride="first", selection="feedback", calibration=images(4))


def strided(activation, size=8):
    """A strided convolution of the image, another one with a bias behind it, a linear head."""
    phi = getattr(torch, activation)
    return random_net(
        lambda s, x: s.d(phi(s.c(phi(s.a(x)))).flatten(1)),
        a=nn.Conv2d(1, 2, 3, stride=2, padding=1), c=nn.Conv2d(2, 3, 3, stride=2, padding=1),
        d=nn.Linear(3 * (size // 4) ** 2, 2),
    )  # fmt: skip


@both
@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid"])
@pytest.mark.parametrize(("kernel", "stride"), [(3, "second"), (3, "first"), (5, "first")])
def test_tickets(construction, activation, kernel, stride):
    model, x, found = strided(activation), images(16, 8), []
    graph = trace(model)
    for epsilon, m in ((0.03, 16), (0.001, 24)):
        ticket = construct(graph, construction=construction, base_set_size=m, epsilon=epsilon, head="construct",
                           scaling="layer_max", pair_kernel=kernel, pair_stride=stride)  # fmt: skip
        assert verify(ticket, graph).violations == ()
        copies = ticket.layer("a.copies")
        assert copies.shape[2:] == (kernel, kernel)
        assert copies.stride == ((2, 2) if stride == "first" else (1, 1))
        assert ticket.layer("a").stride == ((1, 1) if stride == "first" else (2, 2))
        taps = (ticket.masks["a.copies"] % copies.row_size % copies.taps).unique()
        assert len(taps) == (4 if stride == "first" else 1)
        found.append(float(deviation(model, ticket, x).square().mean().sqrt()))
    assert found[1] < found[0] / 3
    box = -torch.ones(1, 8, 8), torch.ones(1, 8, 8)
    worst = ascend(ticket.to_module(), model, x, *box, steps=20).largest
    assert 0 < worst <= certify(ticket, graph, *box).largest
    with torch.no_grad():
        x = x.double()  # float32 rounds behind sigmoid's opposite rows
        torch.testing.assert_close(masked_network(ticket).double()(x), ticket.to_module().double()(x))


def test_certificates_do_not_depend_on_how_a_pair_is_written():
    """Of the same function: a ticket whose copies are pruned to other positions has about the same certificate."""
    model = strided("tanh")
    graph, box = trace(model), (-torch.ones(1, 8, 8), torch.ones(1, 8, 8))
    ways = [{}, {"pair_kernel": 3}, {"pair_kernel": 3, "pair_stride": "first"}]
    found = [certify(construct(graph, construction="2L", head="construct", **way), graph, *box).largest for way in ways]
    assert max(found) < 2 * min(found)


def test_residual_networks_with_batch_norm_and_feedback():
    model, x = small_resnet("relu"), images(32, 8)
    graph = trace(model)
    ticket = construct(graph, construction="2L", base_set_size=24, epsilon=0.001, head="construct",
                       scaling="layer_max", pair_kernel=3, pair_stride="first")  # fmt: skip
    assert verify(ticket, graph).violations == ()
    assert float(deviation(model, ticket, x).max()) < 0.02
    taken = construct(graph, construction="2L", base_set_size=15, head="construct", scaling="layer_max", pair_kernel=3,
                      selection="feedback", calibration=x, feedback=Feedback(samples=500))  # fmt: skip
    assert verify(taken, graph, x).violations == ()


@pytest.mark.parametrize("entry", ["another tap", "another stride", "another padding", "other taps", "linear"])
def test_what_reads_other_pixels_is_found(entry):
    graph = trace(strided("relu"))
    ticket = construct(graph, construction="2L", head="construct", scaling="layer_max", pair_kernel=3,
                       pair_stride="first")  # fmt: skip
    copies = ticket.layer("c.copies")
    if entry == "another tap":
        mask = ticket.masks["c.copies"].clone()
        mask[0] += 1 if mask[0] % copies.taps < copies.taps - 1 else -1
        wrong = replace(ticket, masks={**ticket.masks, "c.copies": mask.unique()})
    else:
        size = copies.shape[0], copies.row_size
        changed = {
            "another stride": {"stride": (1, 1)}, "another padding": {"padding": (0, 0)}, "other taps": {"taps": 3},
            "linear": {"kind": "linear", "shape": size, "taps": 1},
        }[entry]  # fmt: skip
        layers = tuple(replace(n, **changed) if n.name == "c.copies" else n for n in ticket.layers)
        wrong = replace(ticket, layers=layers)
    assert not verify(wrong, graph).ok


def test_constants_behind_padding_everywhere_are_found():
    """A certificate gives a constant to a tap of the target that sees no zero padding; there must be one."""

    def padded(by):
        model = random_net(
            lambda s, x: s.d(torch.relu(s.a(x)).flatten(1)), a=nn.Conv2d(1, 2, 1, padding=by), d=nn.Linear(72, 2)
        )
        with torch.no_grad():
            model.a.bias.copy_(torch.tensor([0.8, 0.5]))
        return model

    with pytest.raises(ConstructionError, match="layer a: every tap of its kernel"):
        construct(padded(1), construction="2L")
    graph, ticket = trace(padded(1)), construct(padded(0), construction="2L", base_set_size=20)
    layers = tuple(replace(n, padding=(1, 1)) if n.name == "a.copies" else n for n in ticket.layers)
    wrong = verify(replace(ticket, target_sha256=graph.digest(), layers=layers), graph)
    assert "every tap of the target's layer sees the zero padding" in wrong.violations[0]


def test_the_theorem_counts_positions():
    """Appendix E: s times the width, in either dimension."""
    graph = trace(strided("tanh"))
    plain, partial = (
        guarantee(
            graph, 1.0, 0.1, construction="2L", head="construct", pair_kernel=3, pair_stride=stride, same_size=True
        )
        for stride in ("second", "first")
    )
    one, other = ({n.layer: n.copies for n in found.layers} for found in (plain, partial))
    sizes = [found.layers[0].base_set_size for found in (plain, partial)]
    assert sizes[0] == sizes[1]
    assert (one["a"], other["a"]) == (2 * sizes[0], 5 * sizes[0])  # the image and the constant; four positions of it


@pytest.mark.slow
def test_the_command(ltx, tmp_path):
    given = ("construct", "target=digits", "protocol=smoke", "construction=2L", "pair.kernel=3", "pair.stride=first")
    status, _, err = ltx("train-target", "target=digits", "protocol=smoke")
    assert status == 0, err
    status, out, err = ltx(*given)
    assert status == 0, err
    path = tmp_path / out.splitlines()[-1]
    assert path.parent.name.endswith("-pair3-strided-seed0")
    assert Ticket.load(path).layer("0.copies").shape[2:] == (3, 3)
    for command in ("verify", "eval"):
        status, _, err = ltx(command, *given[1:])
        assert status == 0, err
    assert "must be odd" in one_line(ltx("construct", "target=digits", "pair.kernel=2")[2])
    wrong = ltx("construct", "target=digits", "pair.stride=first", "selection=feedback")
    assert "use pair.stride=second" in one_line(wrong[2])
    assert "no meaning" in one_line(ltx("construct", "target=resnet22", "pair.kernel=3", "construction=sampled")[2])


def test_constructions_and_verification_agree_on_geometry():
    """Each derived for itself which tap of the target is read through which taps of a pair."""
    generator, found = torch.Generator().manual_seed(0), 0

    def some(low, high):
        return tuple(torch.randint(low, high + 1, (2,), generator=generator).tolist())

    for n in range(400):
        target = layer(some(1, 6), some(1, 4), some(0, 3), some(1, 3))
        kernel, taps = 1 + 2 * (n % 5), target.weight[0, 0].numel()
        try:
            mine = pair_geometry(target, "a", taps, image=True, kernel=kernel, stride="first" if n % 3 else "second")
        except ConstructionError:
            continue
        first = mine.first_layer(SourceLayer("a.copies", 0, "conv", (0, 0), 1, role="copies"))
        second = mine.second_layer(
            SourceLayer("a", 1, "conv", (0, 0, *target.weight.shape[2:]), taps, stride=target.stride,
                        padding=target.padding, dilation=target.dilation, role="pair")
        )  # fmt: skip
        table = taps_read(first, second, target)
        assert isinstance(table, torch.Tensor)
        assert table[mine.first, mine.second].tolist() == list(range(taps))
        if mine.constants is not None:
            assert without_padding(first)[mine.constants[0]]
            assert without_padding(second)[mine.constants[1]]
        found += 1
    assert found > 200
