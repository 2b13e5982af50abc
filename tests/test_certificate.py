"""Certificates: nothing that is found exceeds what is proven, and what is proven is as near as it should be."""

import json
import math
import sys

import pytest
import torch
from conftest import images, one_line, randomise, settings, small_cnn, small_resnet
from test_dags import ODD
from torch import nn

from ltx import LtxError, Ticket, construct, theory
from ltx.adversary import ascend
from ltx.certificates import Certificate, certify
from ltx.certificates.forwards import Forwards
from ltx.certificates.tightened import _bounds, _reaches, tightened
from ltx.certificates.together import together
from ltx.graph import run, trace
from ltx.intervals import Interval
from ltx.report import certificate as report
from ltx.targets.masked import MaskedConv2d, MaskedLinear
from ltx.tasks import certify as task
from ltx.tasks import targets_at

both = pytest.mark.parametrize("construction", ["2L", "L+1"])
everywhere = pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "sigmoid", "gelu", "elu", "hardtanh"])
SIZE = 6


def box(size=SIZE, low=-1.0, high=1.0):
    return torch.full((1, size, size), low), torch.full((1, size, size), high)


def apart(ticket, model, x):
    """|f_eps - f_t| in float64, the largest for each output; the model is float32 again."""
    with torch.no_grad():
        found = (ticket.to_module().double()(x.double()) - model.double()(x.double())).abs().amax(0)
    model.float()
    return found


@both
@everywhere
def test_no_input_exceeds_the_certificate(construction, activation):
    model = small_cnn(activation)
    graph = trace(model)
    ticket = construct(graph, construction=construction, base_set_size=18, epsilon=0.02, head="keep")
    proven = certify(ticket, graph, *box())
    for x in (images(200), images(200, seed=1).sign(), torch.zeros(1, 1, SIZE, SIZE)):
        assert (apart(ticket, model, x) <= proven.bound).all()
    found = ascend(ticket.to_module(), model, images(12), *box(), steps=30)
    assert (found.deviations <= proven.bound[found.outputs]).all()
    assert found.largest <= proven.largest <= 60 * found.largest
    plain = certify(ticket, graph, *box(), sharp=False)
    assert (proven.bound <= plain.bound).all()
    assert proven.largest < (0.9 if construction == "2L" else 1.0) * plain.largest


@pytest.mark.slow
@both
@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid"])
@pytest.mark.parametrize("batch_norm", ["keep", "fold"])
def test_residual_networks(construction, activation, batch_norm):
    model = small_resnet(activation, blocks=1)
    graph = trace(model)
    ticket = construct(graph, construction=construction, base_set_size=20, epsilon=0.02, head="construct",
                       batch_norm=batch_norm, scaling="layer_max")  # fmt: skip
    proven = certify(ticket, graph, *box(8))
    x = torch.cat([images(100, 8), images(50, 8, seed=1).sign()])
    assert (apart(ticket, model, x) <= proven.bound).all()
    assert len(proven.nodes) == sum(node.op == "activation" for node in graph.nodes)


NETWORKS = {
    "max pooling": lambda phi: nn.Sequential(
        MaskedConv2d(1, 3, 3, padding=1), phi, nn.MaxPool2d(3, 2, 1, ceil_mode=True), MaskedConv2d(3, 3, 3, stride=2),
        nn.AdaptiveAvgPool2d((2, 1)), nn.Flatten(), MaskedLinear(6, 3)),
    "linear": lambda phi: nn.Sequential(
        nn.Flatten(), MaskedLinear(64, 5), phi, MaskedLinear(5, 4), phi, MaskedLinear(4, 3)),
    "dilated": lambda phi: nn.Sequential(
        MaskedConv2d(1, 3, 3, padding=2, dilation=2), nn.AvgPool2d(2), phi, MaskedConv2d(3, 3, 3, padding=1, stride=2),
        nn.MaxPool2d(2), phi, nn.Flatten(), MaskedLinear(3, 3)),
}  # fmt: skip


@pytest.mark.slow
@both
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("phi", [nn.ReLU(), nn.LeakyReLU(0.2), nn.Sigmoid(), nn.GELU()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("head", ["keep", "construct"])
def test_other_networks_in_boxes_and_points(name, phi, construction, head):
    model = NETWORKS[name](phi).eval()
    generator = torch.Generator().manual_seed(0)
    for module in model:
        if isinstance(module, MaskedConv2d | MaskedLinear):
            randomise(module, generator, 0.9)
    graph = trace(model)
    ticket = construct(graph, construction=construction, base_set_size=20, epsilon=0.02, head=head)
    proven = certify(ticket, graph, *box(8))
    x = torch.cat([images(100, 8), images(100, 8, seed=1).sign()])
    assert (apart(ticket, model, x) <= proven.bound).all()
    for point in images(5, 8, seed=2):
        with torch.no_grad():
            found = (ticket.to_module().double()(point[None].double()) - model.double()(point[None].double()))[0]
        model.float()
        alone = certify(ticket, graph, point, point).outputs
        assert (alone.low - 1e-12 <= found).all()
        assert (found <= alone.high + 1e-12).all()


@pytest.mark.slow
@both
@pytest.mark.parametrize("name", ODD)
def test_graphs_that_are_no_chains(name, construction):
    graph = trace(ODD[name])
    ticket = construct(graph, construction=construction, base_set_size=20, head="construct", scaling="layer_max")
    x, point = torch.cat([images(60, 8), images(60, 8, seed=1).sign()]), images(1, 8, seed=2)

    def off(x):  # from the graph, in which batch norm's scale and shift are float32
        *_, (_, theirs) = run(graph, x.double())
        with torch.no_grad():
            return (ticket.to_module().double()(x.double()) - theirs).abs().amax(0).flatten()

    for sharp in (True, False):
        proven = certify(ticket, graph, *box(8), sharp=sharp)
        assert (off(x) <= proven.bound).all()
        alone = certify(ticket, graph, point[0], point[0], sharp=sharp)
        assert (off(point) <= alone.bound + 1e-12).all()
        assert alone.largest <= proven.largest


@both
def test_a_smaller_box_and_a_smaller_epsilon_prove_more(construction):
    graph = trace(small_cnn("relu"))
    tickets = [construct(graph, construction=construction, base_set_size=24, epsilon=e) for e in (0.02, 0.002)]
    bounds = [certify(ticket, graph, *box()).largest for ticket in tickets]
    assert bounds[1] < 0.3 * bounds[0]
    assert certify(tickets[0], graph, *box(low=-0.1, high=0.1)).largest < bounds[0]
    point = images(1)[0]
    alone = certify(tickets[0], graph, point, point)
    found = apart(tickets[0], small_cnn("relu"), point[None])
    assert (alone.outputs.width < 1e-9).all()  # one image: no interval but rounding's
    assert torch.allclose(alone.bound, found, atol=1e-9)


@both
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh"])
def test_measured_certificate_theorem(construction, activation):
    """Each is at most the next: of an input, of the parameters that are kept, of any within epsilon."""
    model = small_cnn(activation)
    graph = trace(model)
    ticket = construct(graph, construction=construction, base_set_size=18, epsilon=0.02)
    proven = certify(ticket, graph, *box())
    every = [{name: value for name in graph.layers} for value in (0.02, 18)]
    assert float(apart(ticket, model, images(200)).max()) <= proven.largest
    assert proven.largest <= theory.ticket_error(graph, *every, construction=construction)


def test_rows_pass_on_more_than_the_proof_of_theorem_3_2_allows():
    """Equation (13) lets a row of N parameters pass on N D; slots that deviate by D each on their own make more."""
    graph = trace(small_cnn("relu", density=0.8))
    ticket = construct(graph, construction="L+1")
    rows, _, values = ticket.kept("2")
    labels = ticket.slots["2"]
    passed = torch.zeros(len(labels)).index_add_(0, rows, values.abs())
    parameters = (graph.layers["2"].weight.flatten(1).abs() > 0.01).sum(1)
    live = labels >= 0
    assert (passed[live] > parameters[labels[live]]).any()


def test_boxes_without_images():
    graph = trace(small_cnn("relu"))
    ticket = construct(graph)
    least, most = box()
    for low, high in (
        (most, least), (torch.zeros(6, 6), torch.ones(6, 6)), (least, torch.ones(1, 5, 5)), (least, most * torch.inf)
    ):  # fmt: skip
        with pytest.raises(LtxError, match=r"low and high must be finite images \(C, H, W\) with low <= high"):
            certify(ticket, graph, low, high)
    with pytest.raises(LtxError, match=r"images \(3, 6, 6\) do not fit the network: "):
        certify(ticket, graph, *(end.expand(3, 6, 6) for end in box()))


def test_ascent_on_outputs_that_are_images():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1)).eval()
    ticket = construct(model, head="construct", base_set_size=18)
    low, high = box(4)
    found = ascend(ticket.to_module(), model, images(64, 4), low, high, steps=20)
    assert found.outputs.unique().tolist() == list(range(32))
    assert 0 < found.largest <= certify(ticket, model, low, high).largest


def test_images_of_which_nothing_is_proven(ltx, tmp_path):
    given = ["target=digits", "protocol=smoke", "construction=2L", "target.input_range=[0,0.05]"]
    for command in ("train-target", "construct"):
        assert ltx(command, *given, output_dir=tmp_path)[0] == 0
    status, _, err = ltx("certify", *given, "certify.starts=0", output_dir=tmp_path)
    assert status == 1
    assert "made for [0, 0.05], beyond which nothing is proven; images of digits lie in [-0.8" in err.splitlines()[-1]
    assert not list(tmp_path.glob("tickets/*/*/certificate.json"))


@pytest.mark.slow
@both
def test_the_command(construction, ltx, tmp_path, monkeypatch):
    given = ["target=digits", "protocol=smoke", f"construction={construction}"]
    for command in ("train-target", "construct"):
        assert ltx(command, *given, output_dir=tmp_path)[0] == 0
    path = next(tmp_path.glob("tickets/*/*/ticket.safetensors"))
    status, out, _ = ltx("certify", str(path), "certify.starts=20", "certify.steps=20", output_dir=tmp_path)
    assert status == 0
    written = path.with_name("certificate.json")
    assert out.splitlines()[-1] == str(written)
    assert "No output is off by more than" in out
    found = json.loads(written.read_text())
    assert found["measured"] < found["certificate"]
    assert found["ascent"] < found["certificate"] <= found["plain"] <= found["theorem"]
    assert found["over_the_data"] <= found["certificate"]
    ticket, model = Ticket.load(path), targets_at.load(settings(*given, f"output_dir={tmp_path}")).model
    assert found["theorem"] == theory.ticket_error(  # the head is kept, its errors are none
        trace(model), dict.fromkeys(trace(model).layers, 0.01), dict.fromkeys(trace(model).layers, 15),
        construction=construction, head="keep", scaling="unit", input_range=(ticket.input_low, ticket.input_high),
    )  # fmt: skip
    assert written.with_suffix(".png").is_file()
    table = out
    given = ("certify", str(path), "certify.starts=20", "certify.steps=20")
    status, out, err = ltx(*given, output_dir=tmp_path)
    assert (status, out) == (0, table)
    assert "there already" in err
    written.write_text(json.dumps(found | {"ltx": "0.0.9"}))
    with monkeypatch.context() as patch:
        patch.setattr(theory, "ticket_error", lambda *_, **__: math.inf)
        patch.setattr(
            task, "certify", lambda *args, sharp=True: certify(*args) if sharp else Certificate(everything, ())
        )
        everything = Interval(torch.full((10,), -torch.inf), torch.full((10,), torch.inf))
        status, out, err = ltx(*given, output_dir=tmp_path)
    there = json.loads(written.read_text())
    assert (status, "there already" in err, there["theorem"], there["plain"]) == (0, False, None, None)
    assert (
        "copies apart: nothing, it is too large for float64; by the theorem's argument: nothing, it is too large for "
        "float64)" in out
    )
    assert "there already" in ltx(*given, output_dir=tmp_path)[2]
    written.write_text("{}")
    status, out, err = ltx("certify", str(path), "certify.starts=2", "certify.steps=2", output_dir=tmp_path)
    assert status == 0
    assert "damaged" in err
    assert json.loads(written.read_text())["certificate"] == found["certificate"]
    shown = [row["ascent"] for row in json.loads(written.read_text())["outputs"]]
    assert shown[0] > 0
    assert shown[1:] == [None] * 9  # no start was after these
    assert out.count("| – ") == 9
    before = written.read_bytes()
    written.with_suffix(".svg").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(task, "require_writable", lambda _: pytest.fail("done again"))
        with pytest.raises(pytest.fail.Exception, match="done again"):
            ltx("certify", str(path), "certify.starts=2", "certify.steps=2", output_dir=tmp_path)
    status, out, err = ltx("certify", str(path), "certify.starts=-1", output_dir=tmp_path)
    assert (status, out) == (1, "")
    assert "certify.starts=-1: must lie between" in one_line(err)
    status, out, err = ltx("certify", str(tmp_path / "none.safetensors"), output_dir=tmp_path)
    assert (status, out) == (1, "")
    assert "no such file" in one_line(err)
    assert written.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid", "softplus"])
@pytest.mark.parametrize("construction", ["2L", "L+1"])
def test_passes_back_from_later_activations_hold_at_every_pixel(construction, activation):
    """One for each distance from the border bounds all pixels, as well as one for each pixel would."""
    model = small_cnn(activation, channels=3, size=9)
    graph = trace(model)
    ticket = construct(graph, construction=construction, base_set_size=18, epsilon=0.02)
    low, high = -torch.ones(1, 9, 9, dtype=torch.float64), torch.ones(1, 9, 9, dtype=torch.float64)
    known = tightened(ticket, graph, low, high)
    assert list(known) == ["2"]
    walk = Forwards(ticket, graph, Interval(low, high), True)
    walk.run()
    live = ticket.read_channels()["2"]
    live = live[walk.slots["2"].labels[live] >= 0]
    before, bound = walk.slots["2"].off[live], known["2"][live]
    assert float(before.within(bound).width.mean()) < float(before.width.mean())
    every = _bounds(walk, "2", live)[live]
    torch.testing.assert_close(every.low, bound.low, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(every.high, bound.high, rtol=1e-9, atol=1e-10)
    network = ticket.to_module().double()
    x = torch.cat([images(300, 9), images(300, 9).sign()]).double()
    values = network.run(x, keep=["2"])["2"]
    (theirs,) = (value for node, value in run(graph, x) if node.name == "2")
    read = network.channels("2")
    mine = torch.isin(read, live)
    off = values[:, mine] - theirs[:, ticket.slots["2"][read[mine]]]
    assert bool((off >= bound.low - 1e-9).all())
    assert bool((off <= bound.high + 1e-9).all())
    model.float()


def test_passes_over_small_images_are_those_over_the_whole():
    """Of several nodes behind each other, in images that are not square."""
    graph = trace(ODD["a skip over two blocks"])
    ticket = construct(graph, construction="2L", base_set_size=20, head="construct", scaling="layer_max")
    box = Interval(-torch.ones(1, 8, 9, dtype=torch.float64), torch.ones(1, 8, 9, dtype=torch.float64))
    known = tightened(ticket, graph, box.low, box.high)
    assert list(known) == ["b", "add", "add_1"]  # which see 2, 2 and 3 pixels far
    for n, (name, bound) in enumerate(known.items()):
        walk = Forwards(ticket, graph, box, True, dict(list(known.items())[:n]))
        walk.run()
        live = ticket.read_channels()[name]
        live = live[walk.slots[name].labels[live] >= 0]
        every = _bounds(walk, name, live)
        better = bool(bound[live].width.mean() < walk.slots[name].off[live].width.mean())
        assert better == (name != "add")
        torch.testing.assert_close(every.low, bound.low, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(every.high, bound.high, rtol=1e-9, atol=1e-10)


# products of passes back from 2 slots at all pixels of 5x5 or 7x7, through 3x3 rows: 3 of one channel, then 3 of 3
NEAR, FAR = 2 * 25 * 25 * (3 * 1 * 9 + 3 * 3 * 9), 2 * 49 * 49 * (3 * 1 * 9 + 2 * 3 * 3 * 9)


@pytest.mark.parametrize(
    ("most", "names"),
    [(NEAR - 1, []), (NEAR, ["b", "add"]), (FAR - 1, ["b", "add"]), (FAR, ["b", "add", "add_1"])],
)
def test_passes_that_take_too_much_are_left_out(most, names, monkeypatch):
    graph = trace(ODD["a skip over two blocks"])
    ticket = construct(graph, construction="2L", base_set_size=20, head="construct", scaling="layer_max")
    monkeypatch.setattr(sys.modules[tightened.__module__], "MOST", most)
    box = torch.ones(1, 8, 8, dtype=torch.float64)
    assert list(tightened(ticket, graph, -box, box)) == names


def test_how_far_nodes_see_in_a_deep_network():
    """It has 2^40 paths, which are not gone through one by one."""
    found = _reaches(trace(small_resnet("relu", blocks=40)))
    assert (found["input"], found["conv"], found["blocks.0.conv1"], found["add"], found["add_39"]) == (0, 1, 2, 3, 81)
    assert math.isinf(found["blocks.40.shortcut.0"])  # of stride 2


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "softplus", "silu", "gelu"])
def test_slots_of_a_channel_together(activation):
    """Forms of the slots behind the first activation: within their bounds, which are better than those of each slot."""
    model = small_cnn(activation, channels=3, size=6)
    graph = trace(model)
    ticket = construct(graph, construction="L+1", base_set_size=18, epsilon=0.02)
    box = Interval(-torch.ones(1, 6, 6, dtype=torch.float64), torch.ones(1, 6, 6, dtype=torch.float64))
    walk = Forwards(ticket, graph, box, True)
    walk.run()
    node = next(n for n in ticket.graph if n.name == "1")
    labels = walk.slots["0"].labels
    generator = torch.Generator().manual_seed(0)
    form = torch.rand(8, *walk.slots["1"].off.low.shape, generator=generator, dtype=torch.float64) - 0.5
    form[:, labels < 0] = 0
    x = torch.cat([images(500, 6), images(500, 6).sign()]).double()
    network = ticket.to_module().double()
    values = network.run(x, keep=["0", "1"])
    theirs = {n.name: value for n, value in run(graph, x) if n.name in ("0", "1")}
    read = network.channels("1")
    off = {}
    for name in ("0", "1"):
        off[name] = torch.zeros(len(x), *form.shape[1:], dtype=torch.float64)
        off[name][:, read] = values[name] - theirs[name][:, labels[read].clamp_min(0)]
    form[:, ~torch.isin(torch.arange(len(labels)), read)] = 0
    alone = (form.abs() * walk.slots["1"].off.magnitude).flatten(1).sum(1)
    slope, rest = together(walk, node, form)
    found = torch.einsum("nchw,ochw->no", off["1"] - slope * off["0"], form)
    assert bool((found >= rest.low - 1e-9).all())
    assert bool((found <= rest.high + 1e-9).all())
    assert bool((rest.magnitude < alone).all())


def test_a_layer_that_nothing_reads():
    model = small_cnn("tanh", channels=3, size=6)
    with torch.no_grad():
        model[5].weight_mask.zero_()
    ticket = construct(model, construction="L+1", base_set_size=20, head="construct")
    box = -torch.ones(1, 6, 6), torch.ones(1, 6, 6)
    assert certify(ticket, trace(model), *box).largest < 0.1


def test_the_figure_without_anything_above_zero():
    figure = report.figure([{"deviation": 0.0, "span": 0.0, "measured": None}], "a layer that is zero")
    assert figure.axes[0].get_yscale() == "linear"


def test_the_figure_of_one_activation_counts_it():
    figure = report.figure([{"deviation": 0.1, "span": 1.0, "measured": 0.01}], "one hidden layer")
    figure.canvas.draw()
    low, high = figure.axes[0].get_xlim()
    assert [tick for tick in figure.axes[0].get_xticks() if low <= tick <= high] == [1]
