"""Tickets of a normal source: constructed, verified, written and read like those of a uniform one."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import deviation, images, randomise, small_cnn
from test_constructions import single_layer
from torch import nn

from ltx import Feedback, LtxError, Ticket, construct, verify
from ltx.activations import ACTIVATIONS
from ltx.certificates import certify
from ltx.errors import CheckpointError, ConstructionError
from ltx.export import masked_network
from ltx.files import read_tensors, write_tensors
from ltx.source import LAWS
from ltx.targets.masked import MaskedConv2d

two_for_one = sys.modules["ltx.constructions.two_for_one"]  # the package has a function of that name

both = pytest.mark.parametrize("construction", ["2L", "L+1"])
everywhere = pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "sigmoid"])


@both
@everywhere
@pytest.mark.parametrize("selection", ["smallest", "best"])
def test_every_parameter_is_within_epsilon_and_drawn_from_it(activation, construction, selection):
    model = small_cnn(activation)
    ticket = construct(model, construction=construction, base_set_size=14, epsilon=0.02, head="construct",
                       selection=selection, law="normal")  # fmt: skip
    result = verify(ticket, model)
    assert result.violations == ()
    assert 0 < result.max_parameter_error <= 0.02
    for layer in ticket.layers:
        assert layer.law == "normal"
        values = ticket.kept(layer.name)[2] / layer.sigma
        if layer.role != "copies" and len(values) > 30:
            assert values.abs().max() > 1.1  # beyond what a uniform source has
    uniform = construct(model, construction=construction, base_set_size=14, epsilon=0.02, head="construct",
                        selection=selection)  # fmt: skip
    assert ticket.parameters != uniform.parameters


@both
@everywhere
def test_the_ticket_comes_to_the_target_as_epsilon_goes_to_0(activation, construction):
    model, x = small_cnn(activation), images()
    first, last = (
        deviation(model, construct(model, construction=construction, base_set_size=m, epsilon=epsilon, law="normal",
                                   head="construct"), x).pow(2).mean().sqrt()
        for m, epsilon in ((15, 1e-2), (24, 1e-4))
    )  # fmt: skip
    assert last < first / 20


@both
def test_with_feedback(construction):
    model = small_cnn("relu")
    ticket = construct(model, construction=construction, selection="feedback", calibration=images(),
                       feedback=Feedback(samples=500), law="normal")  # fmt: skip
    assert verify(ticket, model).ok
    plain = construct(model, construction=construction, law="normal")
    error, usual = (deviation(model, each, images()).pow(2).mean() for each in (ticket, plain))
    assert error < usual


def test_the_file_says_it_once_and_is_read_back(tmp_path):
    model, path = small_cnn("tanh"), tmp_path / "a.safetensors"
    ticket = construct(model, law="normal")
    ticket.save(path)
    tensors, metadata = read_tensors(path)
    assert metadata["law"] == "normal"
    assert not any("law" in entry for entry in json.loads(metadata["layers"]))
    loaded = Ticket.load(path)
    assert loaded.layers == ticket.layers
    assert verify(loaded, model).ok
    assert torch.equal(loaded.to_module()(images()), ticket.to_module()(images()))

    write_tensors(path, tensors, metadata | {"law": "uniform"})
    assert not verify(Ticket.load(path), model).ok  # the same masks of another source
    write_tensors(path, tensors, metadata | {"law": "product"})
    with pytest.raises(CheckpointError, match=r"damaged metadata .*law 'product'"):
        Ticket.load(path)
    layers = [entry | {"law": "normal"} for entry in json.loads(metadata["layers"])]
    write_tensors(path, tensors, metadata | {"layers": json.dumps(layers)})
    with pytest.raises(CheckpointError, match="damaged metadata"):
        Ticket.load(path)


def test_a_ticket_has_one_law():
    ticket = construct(small_cnn("relu"), law="normal")
    last = replace(ticket.layers[-1], law="uniform")
    for changes, message in (
        ({"law": "uniform"}, "layer 0.copies: its law is normal, the ticket's uniform"),
        ({"layers": (*ticket.layers[:-1], last)}, f"layer {last.name}: its law is uniform, the ticket's normal"),
        ({"law": "cauchy", "layers": ()}, "law 'cauchy' is not known; there are uniform, normal"),
    ):
        with pytest.raises(LtxError, match=f"^{re.escape(message)}$"):
            replace(ticket, **changes)
    with pytest.raises(LtxError, match="law 'cauchy' is not known; there are uniform, normal"):
        replace(last, law="cauchy")


def test_an_unknown_law_is_refused():
    with pytest.raises(ConstructionError, match="law 'product' is not known; there are uniform, normal"):
        construct(small_cnn("relu"), law="product")


def test_a_sigma_for_uniform_numbers_is_too_large(monkeypatch):
    """Normal numbers reach further: a pair that is linear enough for uniform ones is not for them."""
    model, usual = small_cnn("tanh"), two_for_one.linear_scale
    assert verify(construct(model, law="normal"), model).ok
    monkeypatch.setattr(two_for_one, "linear_scale", lambda *a, largest, **k: usual(*a, **k))
    assert verify(construct(model), model).ok
    assert "from linear on inputs" in verify(construct(model, law="normal"), model).violations[0]


def test_float32_behind_opposite_rows_rounds_what_is_as_large(monkeypatch):
    """The message's number is that of the largest parameter of the second layer, and its remedies are such."""
    model = single_layer("softplus")
    monkeypatch.setattr(two_for_one, "ROUNDING", 0.0)
    said, scales, usual = {}, {}, two_for_one.linear_scale
    for law, of in LAWS.items():
        monkeypatch.setattr(two_for_one, "linear_scale", lambda *a, **k: scales.setdefault(law, usual(*a, **k)))  # noqa: B023
        with pytest.raises(ConstructionError) as refused:
            construct(model, base_set_size=15, epsilon=1e-5, head="construct", law=law)
        said[law] = str(refused.value)
        rounded = float(re.findall(r"by up to ([^;]+);", said[law])[0])
        gain = two_for_one.pair_law(ACTIVATIONS["softplus"], False).gain
        assert rounded == pytest.approx(2.0**-23 * math.log(2) * of.largest / (scales[law] * gain), rel=0.02)
        assert "construction=L+1" not in said[law]  # it is
    assert ["law=uniform" in text for text in said.values()] == [False, True]


def test_exports_and_certificates_are_of_its_values():
    model, x = small_cnn("relu"), images()
    ticket = construct(model, construction="2L", law="normal")
    torch.testing.assert_close(masked_network(ticket)(x), ticket.to_module(dense=True)(x))
    bound = certify(ticket, model, torch.full(x.shape[1:], -1.0), torch.full(x.shape[1:], 1.0)).bound
    assert 0 < float(deviation(model, ticket, x).max()) <= float(bound.max())


@pytest.mark.gpu
@both
@everywhere
def test_gpu_makes_the_same_ticket(construction, activation):
    model = small_cnn(activation)
    here, there = (construct(model, construction=construction, device=d, law="normal") for d in ("cpu", "cuda"))
    assert all(torch.equal(here.masks[n], there.masks[n]) for n in here.masks)


def test_large_parameters_are_within_reach():
    """A normal source has entries for them; a uniform one gives up, or takes far more of its rows."""
    model = nn.Sequential(MaskedConv2d(2, 6, 3, padding=1), nn.ReLU(), MaskedConv2d(6, 6, 3, padding=1)).eval()
    generator = torch.Generator().manual_seed(0)
    for layer in (model[0], model[2]):
        randomise(layer, generator, 0.5)
        with torch.no_grad():
            layer.weight.mul_(1.6 / layer.weight.abs().max())
    rows = {}
    for law in ("uniform", "normal"):
        counts = []
        construct(model, construction="2L", base_set_size=15, head="construct", law=law, on_statistics=counts.append)
        rows[law] = counts[0].given_up
    assert rows["normal"] < rows["uniform"] / 2


@pytest.mark.slow
def test_the_commands(ltx, tmp_path):
    given = ("target=digits", "protocol=smoke", "law=normal")
    status, _, err = ltx("train-target", *given[:2])
    assert status == 0, err
    for law in ((), ("law=normal",)):
        for command in ("construct", "verify", "eval", "tables"):
            status, out, err = ltx(command, *given[:2], *law)
            assert status == 0, err
            if command == "verify":
                assert ("normal source" in err) == bool(law)
            if command == "eval":
                account = Path(out.splitlines()[-1]).with_name("deviation.json")
                assert json.loads((tmp_path / account).read_text())["law"] == (law[0][4:] if law else "uniform")
            if command == "construct":
                assert ("-normal-seed0" in out) == bool(law)
                assert Ticket.load(tmp_path / out.splitlines()[-1]).law == (law[0][4:] if law else "uniform")
    tables = tmp_path / "tables"
    for name, says in (("table1-digits", False), ("table1-digits-normal", True)):
        assert ("law: normal" in (tables / f"{name}.md").read_text()) == says
    status, out, err = ltx("certify", *given, "certify.starts=0")
    assert status == 0, err
    certificate = json.loads((tmp_path / out.splitlines()[-1]).read_text())
    assert certificate["law"] == "normal"
    assert certificate["theorem"] > certificate["plain"] > certificate["certificate"] > certificate["measured"]
    assert f"by the theorem's argument: {certificate['theorem']:.4g}" in out
    assert "there already" in ltx("construct", *given)[2]
    assert ltx("construct", *given, "m=1")[0] == 1
    (failure,) = (tmp_path / "tickets").glob("*/*/failure.json")
    assert json.loads(failure.read_text())["law"] == "normal"
