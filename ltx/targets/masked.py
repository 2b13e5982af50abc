"""Convolution and linear layers that carry a 0/1 mask for each parameter, under Synaptic-Flow's buffer names."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Masked(nn.Module):
    """Registers `weight_mask` and `bias_mask`; the parameter in force is parameter * mask."""

    weight: Tensor
    bias: Tensor | None
    weight_mask: Tensor
    bias_mask: Tensor

    def _register_masks(self) -> None:
        self.register_buffer("weight_mask", torch.ones_like(self.weight))
        if self.bias is not None:
            self.register_buffer("bias_mask", torch.ones_like(self.bias))

    def masked(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as the layer applies them."""
        bias = None if self.bias is None else self.bias * self.bias_mask
        return self.weight * self.weight_mask, bias


class MaskedConv2d(Masked, nn.Conv2d):
    """nn.Conv2d with masks."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._register_masks()

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, *self.masked())


class MaskedLinear(Masked, nn.Linear):
    """nn.Linear with masks."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._register_masks()

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, *self.masked())


def prunable(model: nn.Module) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """Name -> (parameter, mask) of every prunable parameter, in the order of the layers.

    A parameter `x.weight` is prunable when its module has a buffer `x.weight_mask`.
    """
    buffers = dict(model.named_buffers())
    return {
        name: (parameter, buffers[f"{name}_mask"])
        for name, parameter in model.named_parameters()
        if f"{name}_mask" in buffers
    }
