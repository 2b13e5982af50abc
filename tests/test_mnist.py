"""Real MNIST: the kept targets and their tickets. Needs LTX_DATA; see CONTRIBUTING.md."""

import shutil

import pytest
import torch

from ltx import construct, data, verify
from ltx.errors import DataError
from ltx.evaluation import accuracy, compare, outputs
from ltx.graph import trace
from ltx.paths import reference_dir
from ltx.targets import build, load_into, read_checkpoint

pytestmark = pytest.mark.mnist
ACTIVATIONS = ["relu", "leaky_relu", "tanh", "sigmoid"]


def kept_target(activation):
    checkpoint = read_checkpoint(reference_dir() / "targets" / f"mnist-{activation}.safetensors")
    model = build("mnist_cnn", activation, shape=(1, 28, 28), classes=10)
    return load_into(model, checkpoint, network="mnist_cnn"), checkpoint


def test_is_mnist(mnist_root):
    train, test = (data.load("mnist", train=t, root=mnist_root) for t in (True, False))
    assert (train.images.shape, test.images.shape) == ((60_000, 1, 28, 28), (10_000, 1, 28, 28))
    assert abs(float(train.images.mean())) < 1e-3
    low, high = data.dataset_spec("mnist").input_range
    assert low == pytest.approx(float(train.images.min()))
    assert high == pytest.approx(float(train.images.max()))


@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kept_targets_have_the_accuracy_they_state(mnist_root, activation):
    model, checkpoint = kept_target(activation)
    measured = accuracy(model, data.load("mnist", train=False, root=mnist_root))
    assert measured == pytest.approx(float(checkpoint.metadata["accuracy"]), abs=0.02)
    assert measured >= 98.0
    assert checkpoint.path.stat().st_size < 500_000


@pytest.mark.slow
@pytest.mark.parametrize("construction", ["2L", "L+1"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_tickets_of_kept_targets(mnist_root, activation, construction):
    model, _ = kept_target(activation)
    spec = data.dataset_spec("mnist")
    ticket = construct(model, construction=construction, seed=123, input_range=spec.input_range)
    assert verify(ticket, trace(model)).ok
    split = data.load("mnist", train=False, root=mnist_root)
    some = data.Split(split.images[:2000], split.labels[:2000])
    measured = compare(outputs(model, some.images), ticket.to_module(), some)
    assert measured.agreement > 99
    assert abs(measured.ticket_accuracy - measured.target_accuracy) < 0.6


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])
def test_files_that_are_cut_short(mnist_root, tmp_path, name):
    raw = tmp_path / "MNIST" / "raw"
    shutil.copytree(mnist_root / "MNIST" / "raw", raw)
    (raw / name).write_bytes((raw / name).read_bytes()[:-1000])
    with pytest.raises(DataError, match="damaged files"):
        data.load("mnist", train=True, root=tmp_path)


def test_a_label_file_of_another_split(mnist_root, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    shutil.copytree(mnist_root / "MNIST" / "raw", raw)
    shutil.copy(raw / "t10k-labels-idx1-ubyte", raw / "train-labels-idx1-ubyte")
    with pytest.raises(DataError, match="10000 labels instead of 60000"):
        data.load("mnist", train=True, root=tmp_path)
    assert torch.is_tensor(data.load("mnist", train=False, root=tmp_path).labels)
