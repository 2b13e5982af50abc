"""Target files: both encodings hold the same target; anything else is refused with a reason."""

import pytest
import torch

from ltx.activations import ACTIVATIONS
from ltx.errors import CheckpointError, LtxError
from ltx.files import require_writable, tensor_hash
from ltx.graph import trace
from ltx.targets import build, load_into, pack, prunable, read_checkpoint, resnet22, save_target


def fresh(shape=(1, 8, 8)):
    torch.manual_seed(0)
    model = build("mnist_cnn", "relu", shape=shape, classes=10)
    for _, mask in prunable(model).values():
        mask.copy_((torch.rand(mask.shape) < 0.1).float())
    return model


def load(path, shape=(1, 8, 8)):
    return load_into(build("mnist_cnn", "relu", shape=shape, classes=10), read_checkpoint(path), network="mnist_cnn")


def test_dense_packed_and_pt_hold_the_same_target(tmp_path):
    model = fresh()
    save_target(tmp_path / "dense.safetensors", model, {"activation": "relu"})
    pack(tmp_path / "packed.safetensors", read_checkpoint(tmp_path / "dense.safetensors"))
    torch.save(model.state_dict(), tmp_path / "synflow.pt")
    digests = {trace(load(tmp_path / n)).digest() for n in ("dense.safetensors", "packed.safetensors", "synflow.pt")}
    assert digests == {trace(model).digest()}
    assert read_checkpoint(tmp_path / "packed.safetensors").metadata["activation"] == "relu"
    sizes = [(tmp_path / n).stat().st_size for n in ("packed.safetensors", "dense.safetensors")]
    assert sizes[0] < sizes[1] / 5


def test_dense_file_has_synaptic_flows_keys(tmp_path):
    save_target(tmp_path / "a.safetensors", fresh(), {})
    state = read_checkpoint(tmp_path / "a.safetensors").state
    assert set(state) == {f"{n}.{p}{m}" for n in "025" for p in ("weight", "bias") for m in ("", "_mask")}
    assert state["0.weight"].shape == state["0.weight_mask"].shape == (32, 1, 3, 3)


def residual(width=16, blocks=3):
    return resnet22(ACTIVATIONS["sigmoid"], width=width, blocks=blocks)


def synaptic_flow_state(model):
    """The state as Synaptic-Flow writes it: masks of batch norm and weights of identity shortcuts, all ones."""
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            state |= {f"{name}.{p}_mask": torch.ones(module.num_features) for p in ("weight", "bias")}
        if isinstance(module, torch.nn.Identity) and name.endswith("shortcut"):
            channels = model.get_submodule(name.replace("shortcut", "bn2")).num_features
            state |= {f"{name}.weight{m}": torch.ones(channels, 1, 1) for m in ("", "_mask")}
    return state


def test_residual_checkpoints_in_the_authors_layout(tmp_path):
    model = residual()
    state = synaptic_flow_state(model)
    assert {"bn.weight_mask", "blocks.0.shortcut.weight", "blocks.3.shortcut.0.weight_mask"} <= set(state)
    torch.save(state, tmp_path / "a.pt")
    loaded = load_into(residual(), read_checkpoint(tmp_path / "a.pt"), network="resnet22")
    assert trace(loaded).digest() == trace(model.eval()).digest()
    for key in ("bn.weight_mask", "blocks.0.shortcut.weight"):  # pruned batch norm, a scaled shortcut: not this network
        torch.save({**state, key: state[key] * 0}, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match=f"not a resnet22 .unexpected '{key}'"):
            load_into(residual(), read_checkpoint(tmp_path / "a.pt"), network="resnet22")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (dict(width=8), r"'conv.weight' has shape \(8, 3, 3, 3\), resnet22 needs \(16, 3, 3, 3\)"),
        (dict(blocks=2), "keys missing"),
        (dict(blocks=4), "unexpected"),
    ],
)
def test_residual_checkpoints_of_another_depth_or_width(tmp_path, other, message):
    torch.save(residual(**other).state_dict(), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message + r".* choose the target= it was made for"):
        load_into(residual(), read_checkpoint(tmp_path / "a.pt"), network="resnet22")


def test_packed_residual_targets_keep_batch_norm(tmp_path):
    model = residual()
    with torch.no_grad():
        model.bn.running_var += 1
    save_target(tmp_path / "dense.safetensors", model, {})
    pack(tmp_path / "packed.safetensors", read_checkpoint(tmp_path / "dense.safetensors"))
    loaded = load_into(residual(), read_checkpoint(tmp_path / "packed.safetensors"), network="resnet22")
    assert trace(loaded).digest() == trace(model.eval()).digest()


def test_missing_truncated_and_foreign_files(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        read_checkpoint(tmp_path / "none.pt")
    for name in ("a.safetensors", "a.pt"):
        path = tmp_path / name
        save_target(path, fresh(), {}) if name.endswith("s") else torch.save(fresh().state_dict(), path)
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(CheckpointError, match="is it whole"):
            read_checkpoint(path)
        path.write_bytes(b"not a checkpoint")
        with pytest.raises(CheckpointError, match="is it whole"):
            read_checkpoint(path)
    torch.save({"model": 3}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="not a state dict"):
        read_checkpoint(tmp_path / "b.pt")


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_state_dicts_beside_what_a_training_loop_saves(key, tmp_path):
    state = fresh().state_dict()
    more = {"epoch": 3, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}
    torch.save({key: state, **more}, tmp_path / "a.pt")
    assert tensor_hash(read_checkpoint(tmp_path / "a.pt").state) == tensor_hash(state)
    for other, message in (
        (
            {"state_dict": state, "model": state, **more},
            "holds several state dicts, state_dict and model; save the one",
        ),
        ({"ema": state, **more}, "not a state dict of tensors"),
        ({key: {}, **more}, "not a state dict of tensors"),
    ):
        torch.save(other, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(tmp_path / "a.pt")


def test_other_networks_shapes_nan_and_masks(tmp_path):
    path = tmp_path / "a.pt"
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(CheckpointError, match=r"not a mnist_cnn .*no '0.weight'.*unexpected 'weight'"):
        load(path)
    torch.save(fresh().state_dict(), path)
    with pytest.raises(CheckpointError, match=r"'5.weight' has shape .*choose the target="):
        load(path, shape=(1, 28, 28))
    state = fresh().state_dict()
    state["2.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"'2.weight' has NaN"):
        load(path)
    state = fresh().state_dict()
    state["2.weight_mask"][0, 0, 0, 0] = 0.5
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="other than 0 and 1"):
        load(path)


def test_nothing_is_left_behind_when_writing_fails(tmp_path, monkeypatch):
    import os

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(LtxError, match=r"cannot write .*No space left.*output_dir"):
        save_target(tmp_path / "a.safetensors", fresh(), {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["a/b", "c" * 300 + "/b", "a/" + "c" * 300, "file/b"])
def test_asking_whether_a_folder_can_be_written_makes_none(tmp_path, folder):
    (tmp_path / "file").touch()
    if folder == "a/b":
        require_writable(tmp_path / folder)
    else:
        with pytest.raises(LtxError, match=r"cannot write .*: (File name too long|Not a directory); choose another"):
            require_writable(tmp_path / folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder; name the file in it"):
        read_checkpoint(tmp_path)


def test_unknown_network():
    with pytest.raises(LtxError, match="'resnet9000' is not known; there are mnist_cnn"):
        build("resnet9000", "relu", shape=(1, 8, 8), classes=10)


def test_names_shapes_types_and_values_count_for_a_hash():
    plain = {"a": torch.arange(4.0), "b": torch.zeros(2)}
    others = [
        {"c": plain["a"], "b": plain["b"]},
        {**plain, "a": plain["a"].view(2, 2)},
        {**plain, "a": plain["a"].view(torch.int32)},
        {**plain, "a": plain["a"].flip(0)},
        {"a": plain["a"]},
    ]
    assert len({tensor_hash(tensors) for tensors in (plain, *others)}) == 6
    assert tensor_hash(dict(reversed(plain.items()))) == tensor_hash(plain)
    assert tensor_hash({**plain, "a": torch.arange(8.0)[:4]}) == tensor_hash(plain)
