"""Data sets: splits, normalisation, input ranges, errors."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ltx import data
from ltx.errors import DataError, LtxError


def test_digits_are_whole_disjoint_and_normalised():
    train, test = (data.load("digits", train=t) for t in (True, False))
    assert (len(train), len(test)) == (1437, 360)
    assert train.images.shape == (1437, 1, 8, 8)
    assert abs(float(train.images.mean())) < 0.01
    assert abs(float(train.images.std()) - 1) < 0.01
    seen = {image.numpy().tobytes() for image in train.images}
    assert not any(image.numpy().tobytes() in seen for image in test.images)
    assert torch.bincount(test.labels).min() > 30


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_input_range_is_that_of_any_image(name):
    spec = data.dataset_spec(name)
    mean, std = spec.mean[0], spec.std[0]
    assert spec.input_range == pytest.approx(((0 - mean) / std, (1 - mean) / std))


def test_digits_lie_within_their_range():
    low, high = data.dataset_spec("digits").input_range
    images = data.load("digits", train=True).images
    assert low - 1e-6 <= images.min()
    assert images.max() <= high + 1e-6


def test_root_comes_from_the_variable(monkeypatch):
    monkeypatch.setenv("LTX_DATA", "/some/where")
    assert data.default_root() == Path("/some/where")
    monkeypatch.delenv("LTX_DATA")
    assert data.default_root() == Path.home() / ".cache" / "ltx"


def test_unreachable_mnist_says_what_to_do(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    def offline(self):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(MNIST, "download", offline)
    with pytest.raises(DataError, match=r"could not be downloaded .*data.root=DIR .*; target=digits"):
        data.load("mnist", train=True, root=tmp_path)


def test_cifar10_that_fails_its_checksum(tmp_path, monkeypatch):
    import urllib.error

    from torchvision.datasets import cifar

    def offline(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(cifar, "download_and_extract_archive", offline)
    with pytest.raises(
        DataError, match=r"CIFAR-10: .* does not hold it, and it could not be downloaded .*data.root=DIR"
    ):
        data.load("cifar10", train=True, root=tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        (folder / name).write_bytes(b"not a batch")
    with pytest.raises(
        DataError, match=r"CIFAR-10: .*cifar-10-batches-py holds damaged files, or not all .*data_batch_1 to 5"
    ):
        data.load("cifar10", train=False, root=str(tmp_path))


def test_unknown_data_set():
    with pytest.raises(LtxError, match="'svhn' is not known; there are mnist, cifar10, digits"):
        data.load("svhn", train=True)


def test_labels_of_no_class_are_damage(monkeypatch):
    def read(root, train):
        return torch.zeros(2, 1, 8, 8), torch.tensor([1, 77])

    monkeypatch.setitem(data.DATASETS, "damaged", replace(data.DATASETS["digits"], read=read))
    with pytest.raises(DataError, match="damaged: labels from 1 to 77, there are 10 classes"):
        data.load("damaged", train=True)


def test_digits_where_tensors_are_made_elsewhere_by_default():
    data.load.cache_clear()
    with torch.device("meta"):
        split = data.load("digits", train=False)
    assert split.images.device.type == split.labels.device.type == "cpu"
    data.load.cache_clear()
    assert torch.equal(data.load("digits", train=False).images, split.images)
