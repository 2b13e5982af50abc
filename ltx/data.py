"""Image classification data sets as tensors: the whole set in memory, on the device, normalised once."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltx.checks import one_of
from ltx.errors import DataError


@dataclass(frozen=True)
class Split:
    """One split of a data set: normalised images and their labels, on one device."""

    images: Tensor  # (N, C, H, W) float32
    labels: Tensor  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class DatasetSpec:
    """What is known of a data set before it is read. Pixels lie in [0, 1] before normalisation."""

    name: str
    shape: tuple[int, int, int]  # (C, H, W)
    classes: int
    mean: tuple[float, ...]  # per channel
    std: tuple[float, ...]
    read: Callable[[Path, bool], tuple[Tensor, Tensor]]  # (root, train) -> uint8 or [0, 1] images, labels

    @property
    def input_range(self) -> tuple[float, float]:
        """The least and the largest value that a normalised pixel can take."""
        return (
            min(-m / s for m, s in zip(self.mean, self.std, strict=True)),
            max((1 - m) / s for m, s in zip(self.mean, self.std, strict=True)),
        )


def default_root() -> Path:
    """Where data sets lie when no root is given: $LTX_DATA, else ~/.cache/ltx."""
    return Path(os.environ.get("LTX_DATA") or Path.home() / ".cache" / "ltx")


def _read_digits(_: Path, train: bool) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch: Any = load_digits()
    images = torch.from_numpy(bunch.images).float().div_(16)[:, None]  # (1797, 1, 8, 8)
    labels = torch.from_numpy(bunch.target).long()
    train_index, test_index = train_test_split(
        np.arange(len(labels)), test_size=360, random_state=0, stratify=bunch.target
    )
    index = torch.from_numpy(train_index if train else test_index)
    return images[index], labels[index]


def _read_mnist(root: Path, train: bool) -> tuple[Tensor, Tensor]:
    from torchvision.datasets import MNIST

    folder = root / "MNIST" / "raw"
    data = _torchvision("MNIST", MNIST, root, train, folder, "the four idx files")
    _require_shape("MNIST", folder, data, (60_000 if train else 10_000, 28, 28))
    return data.data[:, None], data.targets


def _read_cifar10(root: Path, train: bool) -> tuple[Tensor, Tensor]:
    from torchvision.datasets import CIFAR10

    folder = root / "cifar-10-batches-py"
    data = _torchvision("CIFAR-10", CIFAR10, root, train, folder, "data_batch_1 to 5, test_batch and batches.meta")
    _require_shape("CIFAR-10", folder, data, (50_000 if train else 10_000, 32, 32, 3))
    return torch.from_numpy(data.data).permute(0, 3, 1, 2), torch.tensor(data.targets)


def _torchvision(name: str, dataset: Callable[..., Any], root: Path, train: bool, folder: Path, files: str) -> Any:
    """A data set of torchvision's, downloaded when its files are missing or damaged."""
    instead = "another folder with data.root=DIR or the variable LTX_DATA; target=digits needs no files"
    try:
        there = any(folder.glob("*"))
    except OSError as error:
        raise DataError(f"{name}: {folder} cannot be read ({error.strerror}); name {instead}") from error
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout belongs to the artefact's path
            return dataset(str(root), train=train, download=True)
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError, pickle.UnpicklingError) as error:
        what = (
            "holds damaged files, or not all of them," if there else "does not hold it, and it could not be downloaded"
        )
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{name}: {folder if there else root} {what} ({reason}); put {files} into {folder}, or name {instead}"
        ) from error


def _require_shape(name: str, folder: Path, data: Any, shape: tuple[int, ...]) -> None:
    if tuple(data.data.shape) != shape or len(data.targets) != shape[0]:
        raise DataError(
            f"{name}: {folder} holds {len(data.data)} images and {len(data.targets)} labels "
            f"instead of {shape[0]}; remove the folder to download it again, or put the original files there"
        )


DATASETS: dict[str, DatasetSpec] = {
    "mnist": DatasetSpec("mnist", (1, 28, 28), 10, (0.1307,), (0.3081,), _read_mnist),
    "cifar10": DatasetSpec(
        "cifar10", (3, 32, 32), 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), _read_cifar10
    ),
    "digits": DatasetSpec("digits", (1, 8, 8), 10, (0.3053,), (0.3761,), _read_digits),
}


def dataset_spec(name: str) -> DatasetSpec:
    """The registered data set of that name; LtxError listing what there is when there is none."""
    one_of("data set", name, DATASETS)
    return DATASETS[name]


@lru_cache(maxsize=4)
def load(name: str, *, train: bool, root: str | Path | None = None, device: str = "cpu") -> Split:
    """Read one split, normalised, onto the device; kept in memory for the next call.

    Raises:
        DataError: the files are neither there nor reachable, or damaged.
    """
    spec = dataset_spec(name)
    root = Path(root or default_root())
    pixels, labels = spec.read(root, train)
    low, high = int(labels.min()), int(labels.max())
    if not 0 <= low <= high < spec.classes:
        raise DataError(
            f"{name}: labels from {low} to {high}, there are {spec.classes} classes; remove its folder in "
            f"{root} to download it again, or put the original files there"
        )
    return Split(_normalised(spec, pixels.to(device)), labels.to(device))


def load_images(
    name: str, choose: Callable[[int], Tensor], *, root: str | Path | None = None, device: str = "cpu"
) -> Tensor:
    """Some training images, normalised, in the memory of these alone.

    Args:
        choose: how many there are -> which.

    Raises:
        DataError: the files are neither there nor reachable, or damaged.
    """
    spec = dataset_spec(name)
    pixels, _ = spec.read(Path(root or default_root()), True)
    return _normalised(spec, pixels[choose(len(pixels))]).to(device)  # on the CPU: the same bits for every device


def _normalised(spec: DatasetSpec, images: Tensor) -> Tensor:
    images = images.float().div_(255) if images.dtype == torch.uint8 else images.float()
    mean, std = (torch.tensor(part, device=images.device)[:, None, None] for part in (spec.mean, spec.std))
    return images.sub_(mean).div_(std)
