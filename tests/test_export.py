"""Tickets in other formats compute the same."""

import builtins
import hashlib
import json
import shutil

import pytest
import torch
from conftest import images, one_line, small_cnn, small_resnet
from torch import nn

from ltx import LtxError, construct, data, export
from ltx.activations import from_attributes
from ltx.files import read_tensors
from ltx.tasks import export as task
from ltx.ticket import Ticket

CASES = [
    (lambda: small_cnn("tanh"), 6, {}),
    (lambda: small_cnn("sigmoid"), 6, {"head": "construct", "base_set_size": 22}),
    (lambda: small_resnet("relu", blocks=1), 8, {"head": "construct", "scaling": "layer_max", "base_set_size": 20}),
    (lambda: nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ELU(0.5), nn.MaxPool2d(2, ceil_mode=True), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d((1, 2)),
        nn.Flatten(), nn.Linear(4, 3)).eval(), 11, {}),
    (lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(9, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)).eval(), 3, {}),
]  # fmt: skip
cases = pytest.mark.parametrize(("make", "size", "how"), CASES)
both = pytest.mark.parametrize("construction", ["2L", "L+1"])


def made(make, construction, how):
    torch.manual_seed(0)
    return construct(make(), construction=construction, epsilon=0.02, **how)


@both
@cases
def test_the_masked_network_computes_the_same(make, size, how, construction):
    ticket = made(make, construction, how)
    network, x = export.masked_network(ticket), images(5, size)
    with torch.no_grad():
        assert torch.allclose(network(x), ticket.to_module()(x), atol=1e-4)
    state = network.state_dict()
    masks = [mask for key, mask in state.items() if key.endswith("_mask")]
    assert sum(int(mask.sum()) for mask in masks) == ticket.parameters
    assert sum(mask.numel() for mask in masks) >= ticket.source_parameters - sum(
        layer.shape[0] for layer in ticket.layers
    )
    again = export.masked_network(ticket)
    again.load_state_dict(state)
    assert all(module.weight.eq(module.weight_orig * module.weight_mask).all() for module in again.modules()
               if hasattr(module, "weight_orig"))  # fmt: skip


@both
def test_the_state_dict_holds_the_source_and_the_mask(construction):
    ticket = made(*CASES[0][:1], construction, CASES[0][2])
    state = export.state_dict(ticket)
    for layer in ticket.layers:
        weight, mask = state[f"{layer.name}.weight"], state[f"{layer.name}.weight_mask"]
        assert weight.shape == mask.shape == layer.shape
        assert torch.equal(weight * mask, ticket.weight(layer.name))
        assert torch.equal(mask.flatten().nonzero().flatten(), ticket.masks[layer.name])
        assert (weight != 0).float().mean() > 0.99  # what is pruned is there too
    assert {name for name in state if name.startswith("given.")} == {f"given.{name}" for name in ticket.given}


@pytest.mark.slow
@both
@pytest.mark.parametrize(("make", "size", "how"), CASES[2:])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_onnx_computes_the_same(make, size, how, construction, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    ticket = made(make, construction, how)
    export.onnx(ticket, tmp_path / "ticket.onnx", (1, size, size))
    session = runtime.InferenceSession(str(tmp_path / "ticket.onnx"))
    for many in (1, 7):
        x = images(many, size)
        (found,) = session.run(None, {"images": x.numpy()})
        with torch.no_grad():
            assert torch.allclose(torch.from_numpy(found), ticket.to_module()(x), atol=1e-4)
    assert [file.name for file in tmp_path.iterdir()] == ["ticket.onnx"]
    assert b".py" not in (tmp_path / "ticket.onnx").read_bytes()  # no folders of this machine


@pytest.mark.slow
@pytest.mark.parametrize("phi", [nn.ELU(), nn.ELU(0.5), nn.CELU(2.0), nn.SELU()])
def test_onnx_of_deep_pairs(phi, tmp_path):
    """Their inputs are scaled down, where exp(x) - 1 of a rounded exp(x) has few digits left."""
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    layers = [m for n in range(6) for m in (nn.Conv2d(6 if n else 1, 6, 3, padding=1), phi)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).eval()
    how = {"base_set_size": 20, "scaling": "layer_max", "head": "construct", "input_range": (0, 1)}
    ticket = construct(model, construction="2L", **how)
    export.onnx(ticket, tmp_path / "ticket.onnx", (1, 8, 8))
    x = torch.rand(7, 1, 8, 8)
    (found,) = runtime.InferenceSession(str(tmp_path / "ticket.onnx")).run(None, {"images": x.numpy()})
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(found), ticket.to_module()(x), atol=1e-3)
        x = torch.tensor([-200.0, -3.0, -1e-7, 0.0, 1e-7, 3.0, 200.0])
        attributes = next(n.attributes for n in ticket.graph if n.op == "activation")
        written = export._exponential(from_attributes(attributes), x)
        torch.testing.assert_close(written.double(), phi(x.double()), rtol=1e-6, atol=0)


def test_onnx_without_its_packages(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *rest):
        if name == "onnxscript":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    ticket = made(*CASES[0][:1], "2L", CASES[0][2])
    with pytest.raises(LtxError, match=r"pip install 'onnx>=1\.17' 'onnxscript>=0\.6\.2'"):
        export.onnx(ticket, tmp_path / "ticket.onnx", (1, 6, 6))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command(ltx, tmp_path):
    given = ["target=digits", "protocol=smoke", "construction=2L"]
    for command in ("train-target", "construct"):
        assert ltx(command, *given)[0] == 0
    path = next(tmp_path.glob("tickets/*/*/ticket.safetensors"))
    ticket = Ticket.load(path)
    status, out, _ = ltx("export", str(path))
    assert (status, out.splitlines()[-1]) == (0, str(path.with_name("ticket.masks.safetensors")))
    state, metadata = read_tensors(path.with_name("ticket.masks.safetensors"))
    assert sum(int(mask.sum()) for name, mask in state.items() if name.endswith("_mask")) == ticket.parameters
    of = {"ticket_sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "target_sha256": ticket.target_sha256}
    assert metadata == {"format": "ltx-masks/1", "seed": "0", "law": "uniform", **of}
    assert of.items() <= json.loads(path.with_name("ticket.masks.json").read_text()).items()
    assert ltx("export", str(path), "format=prune")[0] == 0
    state = torch.load(path.with_name("ticket.prune.pt"), weights_only=True)
    export.masked_network(ticket).load_state_dict(state)
    written = path.with_name("ticket.prune.pt")
    assert "there already" in ltx("export", str(path), "format=prune")[2]
    whole = written.read_bytes()
    for damage in (
        lambda: written.write_bytes(b"half"),
        lambda: written.write_bytes(bytes(8) + whole[8:]),
        lambda: path.with_name("ticket.prune.json").write_text("{}"),
    ):
        damage()
        assert "there already" not in ltx("export", str(path), "format=prune")[2]
        assert torch.load(written, weights_only=True).keys() == state.keys()
    assert "there already" not in ltx("export", str(path), "format=prune", "force=true")[2]
    shutil.copy(path, path.with_name("ticket.masks.safetensors"))  # of a ticket called ticket.masks
    status, _, err = ltx("export", str(path))
    assert status == 1
    assert "ticket.masks.safetensors is a ticket" in one_line(err)
    assert ltx("construct", *given, "epsilon=0.02")[0] == 0  # another ticket in the place of this one
    shutil.copy(next(tmp_path.glob("tickets/*/*eps0.02*/ticket.safetensors")), path)
    assert "there already" not in ltx("export", str(path), "format=prune")[2]
    other = torch.load(written, weights_only=True)
    assert any(other[name].shape != state[name].shape or (other[name] != state[name]).any() for name in state)
    status, out, err = ltx("export", str(path), "format=jpeg")
    assert (status, out) == (1, "")
    assert "format" in err
    status, out, err = ltx("export", str(tmp_path / "no"))
    assert (status, out) == (1, "")
    assert "no such file" in one_line(err)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["masks", "prune"])
def test_a_full_disk(ltx, tmp_path, kind):
    resource = pytest.importorskip("resource")
    given = ["target=digits", "protocol=smoke", "construction=2L"]
    for command in ("train-target", "construct"):
        assert ltx(command, *given)[0] == 0
    path = next(tmp_path.glob("tickets/*/*/ticket.safetensors"))
    before, limits = set(path.parent.iterdir()), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        status, out, err = ltx("export", str(path), f"format={kind}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (status, out) == (1, "")
    assert "cannot write" in one_line(err.splitlines()[-1])
    assert "File too large" in err
    assert set(path.parent.iterdir()) == before


@pytest.mark.slow
def test_onnx_is_of_the_images_of_the_target(ltx, tmp_path, monkeypatch):
    given = ["target=digits", "protocol=smoke"]
    for command in ("train-target", "construct"):
        assert ltx(command, *given)[0] == 0
    path = next(tmp_path.glob("tickets/*/*/ticket.safetensors"))
    shapes = []

    def recorded(_, path, shape):
        shapes.append(shape)
        path.write_bytes(b"onnx")

    monkeypatch.setattr(task, "onnx", recorded)
    assert ltx("export", str(path), "format=onnx")[0] == 0
    alone = shutil.copy(path, tmp_path / "alone.safetensors")
    for target in ("mnist", "resnet22"):
        assert ltx("export", str(alone), "format=onnx", f"target={target}", output_dir=tmp_path / "other")[0] == 0
    assert shapes == [data.dataset_spec(name).shape for name in ("digits", "mnist", "cifar10")]
    beside = path.with_name("ticket.onnx.json")
    monkeypatch.setattr(task, "onnx", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ltx("export", str(path), "format=onnx", "force=true")
    assert not beside.exists()  # what it says is not of a file that may be half of another
