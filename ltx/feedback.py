"""Settings of `selection=feedback`, which need nothing of torch."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

from ltx.errors import LtxError

MAX_SUBSET = 7  # elements of a subset
IMAGES = 128  # of a training split, where nobody says how many
ORDERS = ("random", "largest")


@dataclass
class Feedback:
    """How subsets are chosen by what the rows compute on calibration images.

    samples: positions (image, y, x) at which a row's error is looked at; a vector has one for each image.
    sweeps: how often every subset is chosen; after the first time it is taken out before.
    refine: passes over the row as a whole after the sweeps, in which each entry may give way to any other of the row,
        of whatever parameter; then the sweeps begin sparse, with ten times the penalty. 0 for none; there are none
        with a bound.
    max_subset: elements of a subset, as the sweeps choose it.
    penalty: lambda. A parameter has to lower the mean square error of the layer, averaged over its slots, by this share
        of the variance of the target's activations, both measured behind batch norm and behind the sum of a residual
        block. So a parameter of a layer of few slots, which few others share an error with, may cost more.
    bound: on the error of every single parameter, at least the construction's epsilon; None for none.
    reject: a row is given up, as one with a failing problem is, where its error is so many times the median of the rows
        that were tried for its channel; None for never. It costs rows of the source, and no parameters.
    spread: in L+1 a channel of a stream of c channels has m (C / c)^spread slots, at most 32, where C are those of the
        widest convolution (layer, where there is none). Narrow layers have few parameters, and all behind them reads
        their deviations.
    order: of a row's parameters, `random` or `largest` first.
    """

    samples: int = 4000
    sweeps: int = 4
    refine: int = 3
    max_subset: int = 3
    penalty: float = 5e-8
    bound: float | None = None
    reject: float | None = 1.5
    spread: float = 0.5
    order: str = "random"

    def check(self) -> None:
        """LtxError for a value that has no meaning."""
        for name in ("samples", "sweeps", "refine", "max_subset"):
            if not isinstance(getattr(self, name), numbers.Integral):
                raise LtxError(f"feedback.{name}={getattr(self, name)!r}: must be a whole number")
        for name in ("penalty", "bound", "reject", "spread"):
            value = getattr(self, name)
            if not (isinstance(value, numbers.Real) or (value is None and name in ("bound", "reject"))):
                raise LtxError(f"feedback.{name}={value!r}: must be a number")
        for name, high in (("samples", math.inf), ("sweeps", 100), ("max_subset", MAX_SUBSET)):
            value = getattr(self, name)
            if not 1 <= value <= high:
                limit = f"lie between 1 and {high}" if high < math.inf else "be at least 1"
                raise LtxError(f"feedback.{name}={value}: must {limit}")
        if not 0 <= self.refine <= 100:
            raise LtxError(f"feedback.refine={self.refine}: must lie between 0 and 100")
        if not 0 <= self.penalty < math.inf:
            raise LtxError(f"feedback.penalty={self.penalty}: must be a number of at least 0")
        if self.bound is not None and not 0 < self.bound < math.inf:
            raise LtxError(f"feedback.bound={self.bound}: must be a positive number, or null for none")
        if self.reject is not None and not 1 <= self.reject < math.inf:
            raise LtxError(f"feedback.reject={self.reject}: must be a number of at least 1, or null for never")
        if not 0 <= self.spread <= 1:
            raise LtxError(f"feedback.spread={self.spread}: must lie between 0 and 1")
        if self.order not in ORDERS:
            raise LtxError(f"feedback.order={self.order}: is not known; there are {', '.join(ORDERS)}")
