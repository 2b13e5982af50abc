"""The paper's protocol for ResNet-22: a target with the errors of random subset-sum problems, and what it counts."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import SMOKE, images, last_line, small_cnn, small_resnet
from test_dags import conv, random_net
from torch import nn
from torch.nn.utils import parametrize, prune

from ltx.constructions.sampled import PROBLEMS, sampled
from ltx.errors import ConstructionError
from ltx.graph import above, trace
from ltx.subset_sum import sample
from ltx.targets import read_checkpoint


@pytest.mark.parametrize("pruned", [False, True])
def test_sampled_errors_of_pruned_parameters(pruned):
    """As torch.nn.utils.prune has them, product of `weight_orig` and `weight_mask`: what is pruned stays so."""
    model, x = small_cnn("relu"), images(4, 6)
    if pruned:
        for module in (model[0], model[2]):
            prune.l1_unstructured(module, "weight", 0.5)
        prune.random_unstructured(model[0], "bias", 1)
    graph, found = trace(model), sampled(model, seed=1, input_range=(0.0, 1.0))
    before = model(x)
    model.load_state_dict(found.state)
    changed = trace(model)
    for name, layer in graph.layers.items():
        other = changed.layers[name].weight
        assert ((other != 0) == above(layer.weight, 0.01)).all()
        assert 0 < (other - layer.weight).abs().max() <= 0.01 + 1e-6
        assert ((changed.layers[name].bias != 0) == above(layer.bias, 0.01)).all()
        assert 0 < (changed.layers[name].bias - layer.bias).abs().max() <= 0.01 + 1e-6
    assert not torch.equal(model(x), before)


def test_parameters_that_have_no_errors_of_their_own():
    model = small_cnn("relu")
    parametrize.register_parametrization(model[2], "weight", nn.Identity())
    with pytest.raises(ConstructionError, match=r"layer 2: its weight is not .* of the model.s state; take"):
        sampled(model)
    joined = random_net(lambda s, x: s.b(torch.cat([x, torch.relu(s.a(x))], 1)), a=conv(1, 2), b=conv(3, 2))
    tied = small_cnn("relu")
    tied[0].bias = tied[2].bias
    with pytest.raises(ConstructionError, match="layer 2: its bias is that of layer 0 too"):
        sampled(tied)
    with pytest.raises(ConstructionError, match=r"layer b\[[01]\]: is part of a layer that reads a concatenation"):
        sampled(joined)


@pytest.mark.parametrize("law", ["uniform", "normal"])
def test_sampled_errors_have_the_moments_of_the_statistics(law):
    model = small_resnet(width=16, density=0.5)
    found = sampled(model, base_set_size=15, epsilon=0.01, seed=3, law=law)
    again, other = (sampled(model, seed=seed, law=law) for seed in (3, 4))
    assert all(torch.equal(found.state[n], again.state[n]) for n in found.state)
    assert not torch.equal(found.state["conv.weight"], other.state["conv.weight"])
    errors = []
    for name, layer in trace(model).layers.items():
        changed = found.state[f"{name}.weight"]
        big = above(layer.weight, 0.01)
        if "shortcut" in name:
            assert torch.equal(changed, model.state_dict()[f"{name}.weight"])
            continue
        assert (changed[~big] == 0).all()  # what is at most epsilon is dropped
        if name != "conv":
            errors.append((changed - layer.weight)[big])
    error = torch.cat(errors).double()
    drawn = sample(law, 15, 0.01, problems=PROBLEMS)
    expected = drawn.error[drawn.solved]
    n = len(error)
    assert error.abs().max() <= 0.01 + 1e-6
    assert abs(float(error.mean())) < 4 * expected.std() / n**0.5 + 4 * expected.mean() / n**0.5
    assert abs(float(error.abs().mean()) - expected.mean()) < 4 * expected.std() / n**0.5
    size = drawn.size[drawn.solved].mean()
    assert found.parameters == pytest.approx(15 * size * found.target_parameters, rel=0.03)
    kept = sampled(model, seed=3, head="keep", law=law)
    (head,) = trace(model).head
    assert torch.equal(kept.state[f"{head}.weight"], model.state_dict()[f"{head}.weight"])
    assert torch.equal(kept.state["conv.weight"], found.state["conv.weight"])
    given = trace(model).layers[head].parameters_above(0.01)
    assert given > 0
    assert kept.target_parameters == found.target_parameters - given
    with pytest.raises(ConstructionError, match="head 'kept' is not known"):
        sampled(model, head="kept")
    with pytest.raises(ConstructionError, match="law 'product' is not known; there are uniform, normal"):
        sampled(model, law="product")
    for seed in (-1, 2**64, 0.5):
        with pytest.raises(ConstructionError, match="seed"):
            sampled(model, seed=seed)


@pytest.mark.parametrize("law", ["uniform", "normal"])
@pytest.mark.parametrize(
    ("activation", "low", "sets"), [("relu", -1.0, 2), ("relu", 0.0, 1), ("tanh", -1.0, 1), ("sigmoid", 0.0, 2)]
)
def test_the_first_layer_gets_errors_of_products(activation, low, sets, law, monkeypatch):
    """A pair in front, with a base set for either sign of a copy; what is behind it counts m slots, the last one."""
    model, m = small_resnet(activation), 7
    product = {"uniform": "product", "normal": "normal_product"}[law]
    of_a_problem = {product: (0.004, 5), law: (0.002, 2)}  # error, size
    monkeypatch.setattr(
        sys.modules["ltx.constructions.sampled"], "_distribution",
        lambda drawn, *_: tuple(np.full(3, number) for number in of_a_problem[drawn]),
    )  # fmt: skip
    found = sampled(model, base_set_size=m, epsilon=0.01, input_range=(low, 1.0), law=law)
    layers = trace(model).layers
    counts = {name: layer.parameters_above(0.01) for name, layer in layers.items() if "shortcut" not in name}
    for name in counts:
        big = above(layers[name].weight, 0.01)
        off = (found.state[f"{name}.weight"] - layers[name].weight)[big].abs()
        assert off == pytest.approx(0.004 if name == "conv" else 0.002, abs=1e-6), name
    between = sum(count for name, count in counts.items() if name not in ("conv", "fc"))
    copies = m * sets * 1  # of the one channel of an image
    assert found.parameters == copies + m * sets * 5 * counts["conv"] + m * 2 * between + 2 * counts["fc"]


@pytest.mark.slow
def test_sampled_errors_and_what_stands_beside_them(outputs, ltx, tmp_path):
    given = (*SMOKE, f"target.checkpoint={outputs / 'targets/digits-relu-smoke-seed0/target.safetensors'}")
    _, out, _ = ltx("construct", *given, "construction=sampled")
    drawn = last_line(out)
    account = drawn.with_name("construction.json")
    assert json.loads(account.read_text())["settings"]["construction"] == "sampled"
    assert "there already" in ltx("construct", *given, "construction=sampled")[2]
    account.unlink()
    assert "there already" not in ltx("construct", *given, "construction=sampled")[2]
    assert account.is_file()
    shutil.copytree(drawn.parent, drawn.parent.with_name(drawn.parent.name.replace("seed0", "seed1")))
    status, out, err = ltx("construct", *given, "construction=sampled", "seed=1")  # of which it is no copy
    assert (status, "there already" in err) == (0, False)
    assert read_checkpoint(last_line(out)).metadata["seed"] == "1"
    assert ltx("eval", *given, "construction=sampled")[0] == 0
    status, out, _ = ltx("tables", *given)
    assert status == 0
    assert "| sampled " in out
    assert "Sampled: no ticket is built" in " ".join(out.split())
    assert ltx("tables", *given, "law=normal")[0] == 1
    for command in ("construct", "eval", "tables"):
        status, normal, err = ltx(command, *given, "law=normal", *["construction=sampled"][: command != "tables"])
        assert status == 0, err
    assert "| sampled " in normal
    assert "random subset-sum problems of a normal source, and" in " ".join(normal.split())
    assert "of a normal source" not in out
    status, found, _ = ltx("construct", *given, "construction=sampled", "law=normal")
    many = [json.loads(path.with_name("construction.json").read_text())["ticket_parameters"]
            for path in (drawn, last_line(found))]  # fmt: skip
    assert 1.05 * many[0] < many[1] < 1.3 * many[0]
    assert ltx("tables", *given)[1] == out


def test_sampled_errors_of_a_head_are_drawn_where_it_is_constructed(outputs, ltx):
    results = {}
    for head in ("keep", "construct"):
        given = [*SMOKE, "construction=sampled", f"head={head}"]
        assert ltx("construct", *given, output_dir=outputs)[0] == 0
        status, out, _ = ltx("eval", *given, output_dir=outputs)
        assert status == 0
        results[head] = json.loads(last_line(out).read_text())
        assert results[head]["head"] == head
    assert results["keep"]["target_parameters"] < results["construct"]["target_parameters"]
    assert results["keep"]["ticket_parameters"] < results["construct"]["ticket_parameters"]
