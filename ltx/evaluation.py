"""What a network does on data: accuracy, agreement with its target, deviation from it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ltx.data import Split


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor, *, batch_size: int = 500) -> Tensor:
    """The model's outputs in eval mode and float32, (N, classes), on the images' device."""
    training = model.training
    model.eval()
    result = torch.cat([model(batch) for batch in images.split(batch_size)])
    model.train(training)
    return result


def accuracy(model: nn.Module, split: Split) -> float:
    """Share of images classified right, in percent."""
    return percent_right(outputs(model, split.images), split.labels)


def percent_right(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest output is the label's, in percent."""
    return 100.0 * float((logits.argmax(1) == labels).double().mean())
