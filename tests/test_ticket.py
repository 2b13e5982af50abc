"""A ticket is a mask on the source: rebuilt from its file alone, and refused when it is not what it says."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, images, small_cnn
from hypothesis import given, settings
from hypothesis import strategies as st

from ltx import Ticket, construct, source, verify
from ltx.errors import CheckpointError
from ltx.files import read_tensors
from ltx.graph import trace
from ltx.operations import OPERATIONS
from ltx.ticket import DEAD


@pytest.fixture(scope="module")
def model():
    return small_cnn("leaky_relu")


@pytest.fixture(scope="module", params=["2L", "L+1"])
def ticket(request, model):
    return construct(model, construction=request.param, base_set_size=12, epsilon=0.02, seed=5)


def whole_layer(layer, seed):
    """Every parameter of a source layer, as the dense tensor that the ticket masks."""
    rows = torch.arange(layer.shape[0]).repeat_interleave(layer.row_size)
    offsets = torch.arange(layer.row_size).repeat(layer.shape[0])
    return source.weights(layer, seed, rows, offsets).view(layer.shape)


def test_is_exactly_mask_times_source(ticket):
    for layer in ticket.layers:
        mask = torch.zeros(layer.shape).flatten()
        mask[ticket.masks[layer.name]] = 1
        assert torch.equal(ticket.weight(layer.name), whole_layer(layer, ticket.seed) * mask.view(layer.shape))
    first = ticket.layers[0]
    bias_mask = torch.zeros(first.shape[0])
    bias_mask[ticket.bias_masks[first.name]] = 1
    everything = source.biases(first, ticket.seed, torch.arange(first.shape[0]))
    assert torch.equal(ticket.bias(first.name), everything * bias_mask)
    assert list(ticket.bias_masks) == [first.name]  # only the source's first layer has biases


def test_counts(ticket):
    nonzero = sum(int(ticket.weight(n.name).ne(0).sum() + ticket.bias(n.name).ne(0).sum()) for n in ticket.layers)
    assert ticket.parameters == nonzero
    total = sum(whole_layer(n, 0).numel() for n in ticket.layers) + ticket.layers[0].shape[0]
    assert ticket.source_parameters == total


def test_module_equals_a_plain_network_of_its_parameters(ticket):
    """The live channels that TicketNetwork keeps give what the whole source under its mask gives."""
    x = images()
    values = {}
    for node in ticket.graph:
        inner = values[node.inputs[0]] if node.inputs else None
        if node.op == "input":
            values[node.name] = x.double()
        elif node.op == "layer":
            layer = ticket.layer(node.attributes["layer"])
            weight, bias = ticket.weight(layer.name).double(), ticket.bias(layer.name).double()
            values[node.name] = torch.nn.functional.conv2d(inner, weight, bias, layer.stride, layer.padding)
        elif node.op == "activation":
            values[node.name] = torch.nn.functional.leaky_relu(inner, node.attributes["negative_slope"])
        elif node.op == "flatten":
            values[node.name] = inner.flatten(1)
        elif node.op == "given":
            values[node.name] = inner @ ticket.given["5.weight"].double().T + ticket.given["5.bias"].double()
        else:
            values[node.name] = inner[:, node.attributes["rows"]]
    torch.testing.assert_close(ticket.to_module()(x).double(), values["output"], atol=1e-5, rtol=1e-5)


def test_file_holds_the_ticket_and_the_same_ticket_the_same_bytes(ticket, tmp_path, model):
    ticket.save(tmp_path / "a.safetensors")
    again = construct(model, construction=ticket.construction, base_set_size=12, epsilon=0.02, seed=5)
    again.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    loaded = Ticket.load(tmp_path / "a.safetensors")
    assert loaded.layers == ticket.layers
    assert [n.attributes for n in loaded.graph] == [n.attributes for n in ticket.graph]
    assert torch.equal(loaded.to_module()(images()), ticket.to_module()(images()))
    assert verify(loaded, trace(model)).ok
    assert not any("weight" in n for n in loaded.masks)  # no random parameter is in the file


def test_file_has_the_keys_of_the_format(ticket, tmp_path):
    from safetensors import safe_open

    ticket.save(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        metadata, keys = file.metadata(), set(file.keys())
        assert file.get_tensor("0.mask").dtype == torch.int64
    assert metadata["format"] == "ltx-ticket/1"
    assert {"seed", "law", "construction", "base_set_size", "epsilon", "selection", "activation", "target_sha256",
            "layers", "graph"} <= set(metadata)  # fmt: skip
    assert {f"{n.name}.mask" for n in ticket.layers} <= keys
    assert {"0.copies.bias_mask", "given.5.weight", "given.5.bias"} <= keys


def worth(ticket, name):
    """At least what an entry of a layer contributes to its sum, for every position of the layer; 0 for constants."""
    layer = ticket.layer(name)
    if layer.role == "copies":
        return torch.ones(layer.shape[0] * layer.row_size)  # one entry more or less is wrong, whatever it is
    before = f"{name}.copies" if layer.role == "pair" else "0"
    value = torch.ones(layer.shape[1])
    if layer.role == "pair":
        rows, _, lambdas = ticket.kept(before)
        value = torch.zeros(layer.shape[1]).index_put_((rows,), lambdas.abs())
    value = value * (ticket.slots[before] >= 0)
    weight = whole_layer(layer, ticket.seed).flatten(1).abs()
    return (weight * value.repeat_interleave(layer.taps)).flatten()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_change_of_a_mask_that_matters_is_found(data, ticket, model):
    """An entry more or less that moves a sum by more than 2 epsilon takes it out of epsilon: `verify` sees it.

    A smaller one may leave all sums within epsilon, and is then another ticket of the same target.
    """
    name = data.draw(st.sampled_from([n.name for n in ticket.layers]))
    mask = ticket.masks[name]
    matters = (worth(ticket, name) > 2 * ticket.epsilon).nonzero().flatten()
    kept = torch.isin(matters, mask)
    drop = data.draw(st.booleans())
    entry = matters[kept if drop else ~kept]
    entry = entry[data.draw(st.integers(0, len(entry) - 1))]
    changed = mask[mask != entry] if drop else torch.cat([mask, entry[None]]).sort().values
    assert not verify(replace(ticket, masks={**ticket.masks, name: changed}), trace(model)).ok


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.flip(0), "not sorted"),
        (lambda m: torch.cat([m[:1], m]), "not unique"),
        (lambda m: m - 10**6, "outside"),
        (lambda m: m + 10**9, "outside"),
        (lambda m: m.int(), "int64"),
    ],
)
def test_masks_that_are_no_subnetwork(ticket, change, message):
    broken = replace(ticket, masks={**ticket.masks, "2": change(ticket.masks["2"])})
    assert message in verify(broken).violations[0]


def test_claims_that_do_not_hold(ticket, model):
    graph = trace(model)
    assert not verify(replace(ticket, seed=6), graph).ok
    assert not verify(replace(ticket, epsilon=ticket.epsilon / 4), graph).ok
    assert not verify(ticket, trace(small_cnn("leaky_relu", seed=1))).ok
    assert not verify(replace(ticket, given={**ticket.given, "5.bias": ticket.given["5.bias"] + 1}), graph).ok
    slots = ticket.slots["2"].clone()
    slots[slots >= 0] = DEAD
    assert not verify(replace(ticket, slots={**ticket.slots, "2": slots}), graph).ok
    nodes = tuple(n for n in ticket.graph if n.op != "activation")
    assert not verify(replace(ticket, graph=nodes), graph).ok
    wrong = tuple(replace(n, attributes={"function": "relu"}) if n.op == "activation" else n for n in ticket.graph)
    assert not verify(replace(ticket, graph=wrong), graph).ok


def test_biases_are_a_first_layer_matter(ticket):
    extra = {**ticket.bias_masks, "2": torch.tensor([0])}
    assert "2.bias_mask" in verify(replace(ticket, bias_masks=extra)).violations[0]


def test_files_that_are_no_tickets(tmp_path, ticket):
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match="no such file"):
        Ticket.load(path)
    with pytest.raises(CheckpointError, match="is a folder; name the file in it"):
        Ticket.load(tmp_path)
    ticket.save(path)
    whole = path.read_bytes()
    for cut in (0, 5, 100, len(whole) - 7):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match="is it whole"):
            Ticket.load(path)
    from ltx.files import write_tensors

    write_tensors(path, {"x": torch.zeros(2)}, {"format": "ltx-target/1"})
    with pytest.raises(CheckpointError, match="not a target or an export"):
        Ticket.load(path)
    write_tensors(path, {"x": torch.zeros(2)}, {"format": "ltx-ticket/1", "seed": "0"})
    with pytest.raises(CheckpointError, match="damaged metadata"):
        Ticket.load(path)


@pytest.fixture(scope="module")
def described():
    """docs/ticket.md, and what its code defines."""
    page = (ROOT / "docs" / "ticket.md").read_text()
    names: dict = {}
    exec(compile(re.search(r"```python\n(.*?)```", page, flags=re.DOTALL)[1], "ticket.md", "exec"), names)
    return page, names


@pytest.mark.parametrize(
    ("activation", "how"),
    [
        ("leaky_relu", {"construction": "L+1", "head": "construct", "seed": 2**63 + 2**31 + 7}),
        ("tanh", {"construction": "2L", "law": "normal", "seed": 3}),
        ("sigmoid", {"construction": "2L", "head": "construct", "base_set_size": 20}),
        ("sigmoid", {"construction": "L+1", "law": "normal", "scaling": "layer_max"}),
        ("relu", {"construction": "2L", "pair_kernel": 3}),
    ],
)
def test_the_documented_format_is_enough_to_rebuild_a_ticket(activation, how, described, tmp_path):
    """By the page's code, which imports nothing of ltx."""
    _, names = described
    ticket = construct(small_cnn(activation), **{"base_set_size": 15, "epsilon": 0.05, **how})
    ticket.save(tmp_path / "ticket.safetensors")
    found = names["read_ticket"](tmp_path / "ticket.safetensors")
    assert list(found) == [layer.name for layer in ticket.layers]
    for name, (weight, bias) in found.items():
        assert weight.any()
        assert np.array_equal(weight, ticket.weight(name).numpy())
        assert np.array_equal(bias, ticket.bias(name).numpy())


def test_the_documented_format_names_everything(ticket, described, tmp_path):
    page, _ = described
    ticket.save(tmp_path / "ticket.safetensors")
    tensors, metadata = read_tensors(tmp_path / "ticket.safetensors")
    parts = {name.rpartition(".")[2] for name in tensors if not name.startswith("given.")}
    keys = {key for layer in json.loads(metadata["layers"]) for key in layer}
    operations = {"input", "layer", "given", "batch_norm", "activation", "output", *OPERATIONS}
    keys |= {key for node in json.loads(metadata["graph"]) for key in node}
    said = {name.rpartition(".")[2] for name in re.findall(r"`([\w.]+)`", page)}
    assert (parts | set(metadata) | keys | operations) - said == set()
