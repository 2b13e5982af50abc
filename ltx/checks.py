"""What several entrances of the library ask of their arguments."""

from __future__ import annotations

import operator

from torch import Tensor

from ltx.errors import LtxError


def whole(name: str, value: object, error: type[LtxError] = LtxError) -> int:
    """A whole number of any type, also numpy's.

    Raises:
        error: it is none.
    """
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise error(f"{name} {value!r} must be a whole number") from None


def real(name: str, value: object, error: type[LtxError] = LtxError) -> float:
    """A number of any type.

    Raises:
        error: it is none.
    """
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise error(f"{name} {value!r} must be a number") from None


def outside(images: Tensor, low: float, high: float) -> str | None:
    """Where elements of images reach beyond [low, high], by more than float32 rounds; None where they do not.

    Images that are none, without elements or of other numbers, are for others to refuse.
    """
    if not (images.numel() and images.is_floating_point()):
        return None
    least, most = (float(end) for end in images.detach().aminmax())
    slack = 1e-6 * max(1.0, abs(low), abs(high))
    return None if low - slack <= least and most <= high + slack else f"[{least:g}, {most:g}]"


def seed_of(value: object, error: type[LtxError] = LtxError) -> int:
    """A seed of the generator, 0 to 2**64 - 1.

    Raises:
        error: it is none.
    """
    seed = whole("seed", value, error)
    if not 0 <= seed < 2**64:
        raise error(f"seed {seed} must lie between 0 and 2**64 - 1")
    return seed
