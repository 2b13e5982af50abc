"""What a network does on data: accuracy, agreement with its target, deviation from it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ltx.data import Split
from ltx.defaults import usual_defaults
from ltx.errors import LtxError
from ltx.memory import keep_freed_memory
from ltx.precision import exact_convolutions

NO_CLASS = -1


@dataclass(frozen=True)
class Comparison:
    """A ticket beside its target on the same images; accuracies and agreement in percent."""

    target_accuracy: float
    ticket_accuracy: float
    agreement: float  # share of images that both classify alike
    max_deviation: float  # largest |f_t(x) - f_eps(x)| over images and outputs; infinite or NaN where the ticket's are


@usual_defaults()
def compare(theirs: Tensor, ticket: nn.Module, split: Split) -> Comparison:
    """Run a ticket on all images of a split, on their device, beside the target's `outputs` for them.

    Raises:
        LtxError: the ticket's outputs have another shape than `theirs`, or the labels are not (N,).
    """
    small = 32 if split.images.device.type == "cpu" else 500  # a ticket is wide: keep its tensors in the cache
    ours = outputs(ticket, split.images, batch_size=small)
    if ours.shape != theirs.shape:
        raise LtxError(f"the ticket's outputs are {tuple(ours.shape)}, the target's {tuple(theirs.shape)}")
    classes = theirs.argmax(1).where(~theirs.isnan().any(1), NO_CLASS)
    return Comparison(
        percent_right(theirs, split.labels), percent_right(ours, split.labels),
        percent_right(ours, classes), float((ours - theirs).abs().max()),
    )  # fmt: skip


@usual_defaults()
@torch.no_grad()
def outputs(model: nn.Module, images: Tensor, *, batch_size: int = 500) -> Tensor:
    """The model's outputs in eval mode, (N, classes), on the images' device and of their type.

    The process keeps the memory that it frees from here on (`ltx.memory`).
    """
    keep_freed_memory()
    with eval_mode(model), exact_convolutions:
        try:
            return torch.cat([model(batch.clone()) for batch in images.split(batch_size)])  # it may be in place
        except torch.OutOfMemoryError:  # a ticket may be wider than the GPU's memory allows
            if batch_size == 1:
                raise
    torch.cuda.empty_cache()
    return outputs(model, images, batch_size=batch_size // 2)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode, and back into the mode that each was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def accuracy(model: nn.Module, split: Split) -> float:
    """Share of images classified right, in percent."""
    return percent_right(outputs(model, split.images), split.labels)


def percent_right(logits: Tensor, labels: Tensor) -> float:
    """Share of rows (N, classes) whose largest output is the label's (N,), in percent; a row with NaN is of no class.

    Raises:
        LtxError: other shapes, which PyTorch would compare each with each.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise LtxError(f"labels of shape {tuple(labels.shape)} for outputs of {tuple(logits.shape)}: must be (N,)")
    return 100.0 * float(((logits.argmax(1) == labels) & ~logits.isnan().any(1)).double().mean())
