"""Statistics of random subset-sum problems: how often they fail, how large the error and the subset are (Figs. 3, 4).

Problem p of a law is a function of the seed and p alone, drawn like the source network: the same problems on CPU and
GPU, a larger sample begins with the smaller one, and a larger base set with the smaller one. Numbers have 48 bits
(two words of the generator), not the source's 24: with m beyond 20 best errors are smaller than 2^-24. Normal ones
are a function of these that processors may round differently in the last bit of float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ltx import source
from ltx.checks import one_of, real, seed_of, whole
from ltx.errors import LtxError
from ltx.subset_sum.limits import MAX_BASE_SET_SIZE, MAX_PROBLEMS
from ltx.subset_sum.solver import solve

CHUNK = 1 << 16  # problems drawn at a time
_FIRST, _SECOND, _TARGET = (0x40000000 + n for n in range(3))  # layers that no source network has


def _uniform(seed: int, problems: Tensor, m: int, layer: int = _FIRST) -> Tensor:
    rows = problems[:, None].expand(-1, m)
    offsets = 2 * torch.arange(m, device=problems.device).expand(len(problems), -1)
    high, low = (source.uniform(seed, layer, rows, offsets + n).double() for n in (0, 1))
    return high + (low + 1) * 2.0**-24  # on [-1, 1), multiples of 2^-47


def _product(seed: int, problems: Tensor, m: int) -> Tensor:
    return _uniform(seed, problems, m) * _uniform(seed, problems, m, _SECOND)


def _normal(seed: int, problems: Tensor, m: int, layer: int = _FIRST) -> Tensor:
    middle = (_uniform(seed, problems, m, layer) + 1) / 2 + 2.0**-49  # in (0, 1), the middle of its 2^-48
    return torch.special.ndtri(middle.cpu()).to(problems.device)  # last bits are the CPU's, as its functions are


def _normal_product(seed: int, problems: Tensor, m: int) -> Tensor:
    return _normal(seed, problems, m) * _normal(seed, problems, m, _SECOND)


LAWS: dict[str, Callable[[int, Tensor, int], Tensor]] = {
    "uniform": _uniform,  # X ~ U[-1, 1]: one layer of L+1 (Fig. 3)
    "product": _product,  # X ~ U[-1, 1] U[-1, 1]: two layers for one (Fig. 4)
    "normal": _normal,  # X ~ N(0, 1): the same of a normal source
    "normal_product": _normal_product,  # X ~ N(0, 1) N(0, 1)
}
PRODUCTS = {"uniform": "product", "normal": "normal_product"}  # law of a source -> that of products of two parameters


def draw(
    law: str, m: int, first: int, count: int, *, seed: int, theta: float | None = None, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Base sets (count, m) and targets (count,) of the problems first, first + 1, ...; float64.

    Targets are uniform on [-1, 1), or all `theta` where it is given.
    """
    one_of("law", law, LAWS)
    problems = torch.arange(first, first + count, device=device)
    targets = _uniform(seed, problems, 1, _TARGET)[:, 0]
    return LAWS[law](seed, problems, m), targets if theta is None else torch.full_like(targets, theta)


@dataclass(frozen=True)
class Sample:
    """The solutions of the first n random problems of a law and a seed."""

    law: str
    base_set_size: int  # m in the paper
    epsilon: float
    selection: str
    seed: int
    theta: float | None  # the target of all problems; None: uniform on [-1, 1)
    error: np.ndarray  # (n,) float64
    size: np.ndarray  # (n,) uint8

    @property
    def solved(self) -> np.ndarray:
        """(n,) bool: whether a subset is within epsilon."""
        return self.error <= self.epsilon


def sample(
    law: str, m: int, epsilon: float, *, selection: str = "smallest", problems: int = 100_000, seed: int = 0,
    theta: float | None = None, device: str = "cpu",
) -> Sample:  # fmt: skip
    """Draw and solve random problems.

    Args:
        law: of the base sets, `uniform`, `normal` or products of two, `product` and `normal_product`.
        theta: the target of all problems; by default each has its own, uniform on [-1, 1), as in section 4. The
            corollary holds for any single one: theta = 1 is the hardest.
        m, epsilon, selection: as in `solve`.
        problems: how many, 2 to MAX_PROBLEMS.

    Raises:
        LtxError: as `solve`; an unknown law; a seed or number of problems that is none.
    """
    m, problems, seed = whole("m", m), whole("problems", problems), seed_of(seed)
    if not 1 <= m <= MAX_BASE_SET_SIZE:
        raise LtxError(f"m={m}: must lie between 1 and {MAX_BASE_SET_SIZE}")
    epsilon = real("epsilon", epsilon)
    if theta is not None:
        theta = real("theta", theta)
        if not math.isfinite(theta):
            raise LtxError(f"theta={theta}: must be a number, or None for random targets")
    if not 2 <= problems <= MAX_PROBLEMS:
        raise LtxError(f"problems={problems}: must lie between 2 and {MAX_PROBLEMS}; several seeds give more")
    error, size = np.empty(problems), np.empty(problems, np.uint8)
    for begin in range(0, problems, CHUNK):
        end = min(problems, begin + CHUNK)
        found = solve(
            *draw(law, m, begin, end - begin, seed=seed, theta=theta, device=device), epsilon, selection=selection
        )
        error[begin:end], size[begin:end] = (torch.as_tensor(a, device="cpu") for a in (found.error, found.size))
    return Sample(law, m, epsilon, selection, seed, theta, error, size)


@dataclass(frozen=True)
class Statistics:
    """What section 4 of the paper reports of a sample. An interval is a 95 % confidence interval (low, high)."""

    law: str
    base_set_size: int
    epsilon: float
    selection: str
    seed: int
    theta: float | None
    problems: int
    failures: int  # problems without a subset within epsilon
    failure_share: float  # delta
    failure_share_interval: tuple[float, float]  # Wilson's
    mean_error: float  # over all problems, the failures with their closest subset
    mean_error_interval: tuple[float, float]
    error_quantiles: dict[str, float]  # of all problems, by share
    mean_size_all: float  # over all problems, the failures with their closest subset
    mean_size: float | None  # over the solved problems; None where there is none
    mean_size_interval: tuple[float, float] | None  # None where fewer than two are solved
    size_counts: list[int]  # solved problems by the size of their subset, 0..m
    failed_size_counts: list[int]  # the failures by the size of their closest subset, 0..m
    # C = m / log(1 / min(epsilon, delta)) of Corollary 2.2, here of one m; None where nothing failed, or
    # everything with epsilon >= 1. Where delta > epsilon, it only says that the corollary needs a larger one
    constant: float | None
    constant_interval: tuple[float, float] | None  # None where it has no upper end: delta may be beyond epsilon


def summarise(drawn: Sample) -> Statistics:
    """The statistics of a sample."""
    n, m, solved = len(drawn.error), drawn.base_set_size, drawn.solved
    failures = int(n - solved.sum())
    low, high = wilson_interval(failures, n)
    sizes = drawn.size[solved]
    found, least, most = (constant(m, drawn.epsilon, share) for share in (failures / n, low, high))
    return Statistics(
        law=drawn.law, base_set_size=m, epsilon=drawn.epsilon, selection=drawn.selection, seed=drawn.seed,
        theta=drawn.theta, problems=n, failures=failures, failure_share=failures / n,
        failure_share_interval=(low, high),
        mean_error=float(drawn.error.mean()), mean_error_interval=_mean_interval(drawn.error),
        error_quantiles={f"{q:g}": float(np.quantile(drawn.error, q)) for q in (0.025, 0.5, 0.975)},
        mean_size_all=float(drawn.size.mean()),
        mean_size=float(sizes.mean()) if len(sizes) else None,
        mean_size_interval=_mean_interval(sizes) if len(sizes) > 1 else None,
        size_counts=np.bincount(sizes, minlength=m + 1).tolist(),
        failed_size_counts=np.bincount(drawn.size[~solved], minlength=m + 1).tolist(),
        constant=found if failures and math.isfinite(found) else None,
        constant_interval=(least, most) if high <= drawn.epsilon and math.isfinite(most) else None,
    )  # fmt: skip


def constant(m: float, epsilon: float, delta: float) -> float:
    """C = m / log(1 / min(epsilon, delta)) (Corollary 2.2); infinite where everything fails, whatever epsilon >= 1."""
    least = min(epsilon, delta)
    if least <= 0:
        return 0.0
    return m / -math.log(least) if least < 1 else math.inf


def wilson_interval(hits: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of which `hits` of n were seen (Wilson's score interval)."""
    z, share = 1.96, hits / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (max(0.0, centre - half) if hits else 0.0), (min(1.0, centre + half) if hits < n else 1.0)


def _mean_interval(values: np.ndarray) -> tuple[float, float]:
    half = 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values))
    return float(values.mean()) - half, float(values.mean()) + half
