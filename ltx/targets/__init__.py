"""Target networks and their checkpoints."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ltx.activations import activation as activation_named
from ltx.checks import one_of, seed_of
from ltx.defaults import usual_defaults
from ltx.targets.checkpoints import Checkpoint, load_into, pack, read_checkpoint, save_target
from ltx.targets.masked import MaskedConv2d, MaskedLinear, prunable
from ltx.targets.mnist_cnn import mnist_cnn
from ltx.targets.own import imported, load_own
from ltx.targets.resnet import resnet22

NETWORKS: dict[str, Callable[..., nn.Module]] = {"mnist_cnn": mnist_cnn, "resnet22": resnet22}


@usual_defaults()
def build(
    network: str, activation: str, *, shape: tuple[int, int, int], classes: int, seed: int | None = None
) -> nn.Module:  # fmt: skip
    """A fresh target network, initialised as PyTorch does.

    Args:
        seed: of the initialisation, which leaves PyTorch's generator as it is; None: that generator goes on.

    Raises:
        LtxError: `network` or `activation` is not registered; a seed that is none.
    """
    one_of("network", network, NETWORKS)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed_of(seed))
        return NETWORKS[network](activation_named(activation), shape=shape, classes=classes)


__all__ = [
    "NETWORKS", "Checkpoint", "MaskedConv2d", "MaskedLinear", "build", "imported", "load_into", "load_own", "mnist_cnn",
    "pack", "prunable", "read_checkpoint", "resnet22", "save_target",
]  # fmt: skip
