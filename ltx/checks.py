"""What several entrances of the library ask of their arguments."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection

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


def one_of(name: str, value: object, known: Collection[str], error: type[LtxError] = LtxError) -> None:
    """Nothing, where the value is known.

    Raises:
        error: it is not.
    """
    if not isinstance(value, str) or value not in known:
        raise error(f"{name} '{value}' is not known; there are {', '.join(known)}")


def interval(name: str, value: object, error: type[LtxError] = LtxError) -> tuple[float, float]:
    """Two finite numbers, the first below the second.

    Raises:
        error: they are none.
    """
    try:
        low, high = value  # type: ignore[misc]
    except (TypeError, ValueError):
        raise error(f"{name} {value!r} must be two numbers, (LOW, HIGH)") from None
    low, high = real(name, low, error), real(name, high, error)
    if not -math.inf < low < high < math.inf:
        raise error(f"{name} {(low, high)}: must be two finite numbers, the first below the second")
    return low, high


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
