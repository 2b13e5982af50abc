"""Target files: both encodings hold the same target; anything else is refused with a reason."""

import pytest
import torch

from ltx.errors import CheckpointError, LtxError
from ltx.graph import trace
from ltx.targets import build, load_into, pack, prunable, read_checkpoint, save_target


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


def test_unknown_network():
    with pytest.raises(LtxError, match="'resnet9000' is not known; there are mnist_cnn"):
        build("resnet9000", "relu", shape=(1, 8, 8), classes=10)
