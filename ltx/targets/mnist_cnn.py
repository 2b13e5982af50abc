"""The paper's small target: two 3x3 convolutions with 32 channels and a linear classifier (section 4)."""

from __future__ import annotations

from torch import nn

from ltx.activations import Activation
from ltx.targets.masked import MaskedConv2d, MaskedLinear


def mnist_cnn(
    activation: Activation,
    *,
    shape: tuple[int, int, int] = (1, 28, 28),
    classes: int = 10,
    channels: int = 32,
) -> nn.Sequential:
    """conv, phi, conv, phi, flatten, linear; keys `0.*`, `2.*`, `5.*` as in the author's MNIST targets.

    Args:
        activation: phi of both hidden layers.
        shape: (C, H, W) of the input images; both convolutions keep H and W.
    """
    c, h, w = shape
    return nn.Sequential(
        MaskedConv2d(c, channels, 3, padding=1),
        activation.module(),
        MaskedConv2d(channels, channels, 3, padding=1),
        activation.module(),
        nn.Flatten(),
        MaskedLinear(channels * h * w, classes),
    )
