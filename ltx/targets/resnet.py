"""The paper's deep target: the residual network of CIFAR-10 with 20 layers and two projection shortcuts (section 4).

He et al. 2016, "Deep Residual Learning for Image Recognition", section 4.2, with 1x1 projections where the width
changes; the paper counts them as layers and calls it ResNet-22.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ltx.activations import Activation
from ltx.targets.masked import MaskedConv2d, MaskedLinear


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm beside a skip: the identity, or a 1x1 projection with batch norm."""

    def __init__(self, channels_in: int, channels: int, activation: Activation, *, stride: int):
        super().__init__()
        self.conv1 = MaskedConv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.phi1 = activation.module()
        self.conv2 = MaskedConv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and channels_in == channels
            else nn.Sequential(
                MaskedConv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        )  # fmt: skip
        self.phi2 = activation.module()

    def forward(self, x: Tensor) -> Tensor:
        y = self.phi1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.phi2(y + self.shortcut(x))


class ResNet(nn.Module):
    """conv, bn, phi, three stages of blocks with 1, 2 and 4 times the width, average pool, linear.

    Keys are those of the author's targets: `conv`, `bn`, `blocks.N.conv1`, `.bn1`, `.conv2`, `.bn2`,
    `.shortcut.0`, `.shortcut.1`, `fc`.
    """

    def __init__(
        self, activation: Activation, *, shape: tuple[int, int, int], classes: int, width: int = 16, blocks: int = 3
    ):
        super().__init__()
        self.conv = MaskedConv2d(shape[0], width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.phi = activation.module()
        stages, before = [], width
        for stage, channels in enumerate((width, 2 * width, 4 * width)):
            for block in range(blocks):
                stages.append(Block(before, channels, activation, stride=2 if stage and not block else 1))
                before = channels
        self.blocks = nn.Sequential(*stages)
        self.fc = MaskedLinear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.phi(self.bn(self.conv(x))))
        # not adaptive_avg_pool2d or mean: their gradients are contiguous, which tanh and sigmoid pass on through every
        # skip of the last stage, and batch norm takes ten times as long over gradients that are not channels-last
        x = nn.functional.avg_pool2d(x, x.shape[2:])
        return self.fc(torch.flatten(x, 1))


def resnet22(
    activation: Activation, *, shape: tuple[int, int, int] = (3, 32, 32), classes: int = 10, width: int = 16,
    blocks: int = 3,
) -> ResNet:  # fmt: skip
    """The paper's ResNet-22: 16, 32 and 64 channels, three blocks in each of three stages.

    Args:
        activation: phi everywhere, behind the sums too.
        shape: (C, H, W) of the input images.
        width: channels of the first stage.
        blocks: of every stage.
    """
    return ResNet(activation, shape=shape, classes=classes, width=width, blocks=blocks)
