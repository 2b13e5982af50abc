"""Streams of slots: which slot stands for which channel, and where it is still alive.

The layers of a stream (its writers) share slots: row p of each is slot p. A slot belongs to one channel; it is alive
at a node when the rows of all writers behind it were solved. Slots are made on demand: whoever reads a node asks for
so many live slots of each channel, and rows of the source are used up, in their order, until they are there. A row
that fails is given up whole (Appendix F); its slot is dead from that layer on, and nothing reads it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ltx.constructions.feedback import FeedbackSolver
from ltx.constructions.rows import BaseSets, Problems, RowSolver
from ltx.errors import UnsolvedError
from ltx.source import SourceLayer
from ltx.ticket import CONSTANT, DEAD

MAX_ROWS_PER_SLOT = 1000
HOPELESS_AFTER = 10  # rows per slot, before the chance of a row is judged
HOPELESS_BELOW = 1e-3  # chance that any of MAX_ROWS_PER_SLOT rows would do
_UNTRIED, _SOLVED, _FAILED = 0, 1, 2


class Writer:
    """A source layer that writes to a stream.

    problems: of a row of each target channel, then those of a constant row.
    """

    def __init__(
        self, layer: SourceLayer, problems: Sequence[Problems], bases: BaseSets, solver: RowSolver | FeedbackSolver,
        within: float, scaling: str,
    ):  # fmt: skip
        self.layer, self.problems, self.bases = layer, problems, bases
        self.within = within  # of its target value a subset has to be
        self.scaling = scaling
        self._solver = solver
        self.state = torch.empty(0, dtype=torch.int8)  # of every slot
        self.sums = torch.empty(0, dtype=torch.float64)
        self._rows: list[Tensor] = []
        self._offsets: list[Tensor] = []
        self.asked = torch.zeros(len(problems), dtype=torch.float64)  # problems solved for rows of each kind
        self.missed = self.asked.clone()  # how many of them had no subset

    def grow(self, slots: int) -> None:
        more = slots - len(self.state)
        self.state = torch.cat([self.state, torch.full((more,), _UNTRIED, dtype=torch.int8)])
        self.sums = torch.cat([self.sums, torch.zeros(more, dtype=torch.float64)])

    def attempt(self, slots: Tensor, channels: Tensor) -> None:
        """Try the rows of `slots`, whose channels are given; remember which were solved and what they keep."""
        if not len(slots):
            return
        kinds = self.kinds(channels)
        tried = self._solver.attempt(slots, kinds)
        self.state[slots] = torch.where(tried.good, _SOLVED, _FAILED).to(torch.int8)
        self.sums[slots] = tried.sums
        self._rows.append(tried.rows)
        self._offsets.append(tried.offsets)
        self.asked.index_add_(0, kinds, self._solver.sizes[kinds].double())
        self.missed.index_add_(0, kinds, tried.failures.double())

    @property
    def tried(self) -> int:
        return int((self.state != _UNTRIED).sum())

    @property
    def given_up(self) -> int:
        return int((self.state == _FAILED).sum())

    def kinds(self, channels: Tensor) -> Tensor:
        """Which of the problems are those of a row of these channels."""
        return torch.where(channels == CONSTANT, len(self.problems) - 1, channels)

    def log_chance(self, channels: Tensor) -> Tensor:
        """An upper bound of the log of the chance that a row of these channels is solved.

        With a share f of its P problems failing, a row succeeds with a chance of at most (1 - f)^P: problems differ,
        and the product of their chances is largest when they do not. One more problem is counted as solved, so that a
        few failures of a single problem do not mean that it always fails.
        """
        share = self.missed / (self.asked + 1)
        return torch.special.xlogy(self._solver.sizes.double(), 1 - share)[self.kinds(channels)]

    def release(self) -> None:
        """No row will be tried any more."""
        self._solver.release()

    def errors(self, slots: int) -> Tensor:
        """Of the rows of so many slots, on calibration images, (slots,) float32; NaN where there is none."""
        found = torch.full((slots,), math.nan)
        found[: len(self._solver.errors)] = self._solver.errors
        return found

    def entries(self) -> tuple[Tensor, Tensor]:
        """Rows and offsets i * K + k of what is kept."""
        nothing = torch.empty(0, dtype=torch.int64)
        return torch.cat([nothing, *self._rows]), torch.cat([nothing, *self._offsets])


@dataclass
class Stream:
    """The slots that several nodes share."""

    width: int  # channels of the target here
    normalised: bool = False  # whether the target has batch norm that is kept
    channels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # of each slot; or CONSTANT
    writers: dict[str, Writer] = field(default_factory=dict)  # layer -> writer, in order

    def add(self, name: str, writer: Writer) -> None:
        self.writers[name] = writer
        writer.grow(len(self.channels))

    def live(self, behind: Sequence[str]) -> Tensor:
        """Which slots are alive where the rows of the writers `behind` add up, (slots,) bool."""
        alive = torch.ones(len(self.channels), dtype=torch.bool)
        for name in behind:
            alive &= self.writers[name].state == _SOLVED
        return alive

    def take(self, behind: Sequence[str], channels: Tensor, copies: int, constants: int) -> tuple[Tensor, Tensor]:
        """Live slots of each of `channels`, (len(channels), copies), and so many constant ones, (constants,).

        Raises:
            UnsolvedError: a channel has used up MAX_ROWS_PER_SLOT rows for each slot, or is next to certain to do
                so, naming layer and channel and what failed.
        """
        kinds = torch.cat([channels, torch.full((int(constants > 0),), CONSTANT)])
        wanted = torch.tensor([copies] * len(channels) + [constants] * (constants > 0), dtype=torch.int64)
        for attempts in range(MAX_ROWS_PER_SLOT + 1):
            self._attempt(behind, kinds)
            found = torch.bincount(self.channels[self.live(behind)] - CONSTANT, minlength=self.width - CONSTANT)
            short = (wanted - found[kinds - CONSTANT]).clamp_min(0)
            if not short.any():
                break
            if attempts == MAX_ROWS_PER_SLOT or (
                attempts >= HOPELESS_AFTER and self._hopeless(behind, kinds[short > 0])
            ):
                raise self._error(behind, kinds[short > 0], attempts)
            self.channels = torch.cat([self.channels, kinds.repeat_interleave(short)])
            for writer in self.writers.values():
                writer.grow(len(self.channels))
        slots = (self.live(behind) & torch.isin(self.channels, kinds)).nonzero().flatten()
        slots = slots[self.channels[slots].sort(stable=True).indices]  # by channel, constants first
        counts = torch.unique_consecutive(self.channels[slots], return_counts=True)[1].tolist() if len(slots) else []
        parts = [part[: constants if self.channels[part[0]] == CONSTANT else copies] for part in slots.split(counts)]
        fixed = parts.pop(0) if constants else slots[:0]
        return (torch.stack(parts) if parts else slots.new_empty(0, copies)), fixed

    def _attempt(self, behind: Sequence[str], kinds: Tensor) -> None:
        """Try every slot of these kinds, in the writers in turn, as long as it is alive."""
        alive = torch.isin(self.channels, kinds)
        for name in (name for name in self.writers if name in behind):
            writer = self.writers[name]
            slots = (alive & (writer.state == _UNTRIED)).nonzero().flatten()
            writer.attempt(slots, self.channels[slots])
            alive &= writer.state == _SOLVED

    def _log_chance(self, behind: Sequence[str], kinds: Tensor) -> Tensor:
        """Of the writers `behind`, (W, len(kinds))."""
        return torch.stack([self.writers[name].log_chance(kinds) for name in behind])

    def _hopeless(self, behind: Sequence[str], kinds: Tensor) -> bool:
        """Whether some slot will next to certainly use up all rows that it may try."""
        return bool((MAX_ROWS_PER_SLOT * self._log_chance(behind, kinds).sum(0).exp() < HOPELESS_BELOW).any())

    def _error(self, behind: Sequence[str], kinds: Tensor, attempts: int) -> UnsolvedError:
        chance = self._log_chance(behind, kinds)
        hardest = int(chance.sum(0).argmin())
        kind = int(kinds[hardest])
        writer = self.writers[behind[int(chance[:, hardest].argmin())]]
        index = int(writer.kinds(kinds[hardest]))
        share = float(writer.missed[index] / writer.asked[index].clamp_min(1))
        problems, layer = writer.problems[index], writer.layer
        what = "constant channel" if kind == CONSTANT else f"channel {kind}"
        free = math.isinf(writer.within)  # feedback without a bound
        within = "" if free else f" within {writer.within:g}"
        return UnsolvedError(
            f"layer {layer.target or layer.name}, {what}: none of {attempts} source rows solves all of its "
            f"{len(problems)} subset-sum problems{within}, because {100 * share:.3g} % of them have no such subset "
            f"among {writer.bases.columns.shape[1]} values; raise m"
            + ("" if free else " or epsilon")
            + (", or use construction=L+1" if layer.role == "pair" and layer.index > 1 else "")
            + self._remedy(kind, problems, writer)
        )

    def _remedy(self, kind: int, problems: Problems, writer: Writer) -> str:
        """What else may help where subsets are too small for what they should sum to."""
        if not _beyond(problems, writer.bases, writer.layer):
            return ""
        if kind != CONSTANT:
            return ", or use scaling=layer_max" if writer.scaling == "unit" else ""
        return ", or use batch_norm=fold, which makes other constants" if self.normalised else ""

    def labels(self, name: str) -> Tensor:
        """What the rows of a writer stand for, (slots,): a channel, CONSTANT, or DEAD where the row was not solved."""
        return torch.where(self.writers[name].state == _SOLVED, self.channels, DEAD)


def _beyond(problems: Problems, bases: BaseSets, layer: SourceLayer) -> bool:
    """Whether some target value is larger than any single entry could be."""
    largest = float(bases.multipliers.abs().max()) * layer.sigma if bases.multipliers.numel() else 0.0
    return bool(len(problems)) and float(problems.theta.abs().max()) > min(largest, 1.0)
