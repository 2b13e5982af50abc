"""Calibration images of `selection=feedback`: random ones of the training split, without their labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from ltx import data
from ltx.config import Settings
from ltx.errors import LtxError
from ltx.feedback import Feedback


def images(settings: Settings, name: str, *, many: int, seed: int, device: str) -> Tensor:
    """`many` images (many, C, H, W) of data set `name`, a function of the seed.

    Raises:
        DataError: the data are not there.
        LtxError: the training split has not so many.
    """

    def choose(available: int) -> Tensor:
        if many > available:
            raise LtxError(f"feedback.images={many}: {name} has {available} training images")
        return torch.from_numpy(np.random.default_rng([seed, 0]).permutation(available)[:many])

    return data.load_images(name, choose, root=settings.data_root, device=device)


def feedback_columns(settings: Mapping) -> dict:
    """The settings of feedback as entries of a result."""
    return {f"feedback_{name}": settings[name] for name in (*(f.name for f in fields(Feedback)), "images")}
