"""`selection=feedback`: rows whose subsets are chosen by what the row computes on calibration images.

A subset sum that is close to a target's parameter says little where its slots deviate from one another (section 6 of
the design): they enter with the entries of the subset, not with their sum. So the choice among the subsets looks at
what the slots really give, and each makes good what those before it left. The result is a mask like any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ltx import source
from ltx.constructions.calibration import Behind, Calibration, Samples, apply_rows, gather
from ltx.constructions.choice import Signals, Visits, choose
from ltx.constructions.refine import Gram, refine
from ltx.constructions.rows import Attempt, BaseSets, Problems, RowSolver, in_parts
from ltx.errors import ConstructionError
from ltx.source import SourceLayer
from ltx.ticket import CONSTANT

CHUNK = 1 << 23  # entries of the source held at a time
ROUNDING = 1e-6  # of sums in float32, where parameters have a bound
SPARSE = 10.0  # times its penalty: what the sweeps take of a row that is refined afterwards
ENOUGH = 5  # rows of a kind to tell what is usual


@dataclass(frozen=True)
class Read:
    """What a layer reads, on either side, and where its rows' errors are measured."""

    node: str  # the ticket's
    target: str  # the target's node
    behind: Behind
    slots: int  # of each channel that it writes, in the end


class FeedbackSolver:
    """Tries rows of one source layer, as `RowSolver` does; a constant row is the latter's.

    Args:
        plain: the solver of the layer's constant rows, and of what all rows have in common.
        read: where its inputs are, in the ticket and the target, whose layer was just run.
    """

    def __init__(
        self, plain: RowSolver, layer: SourceLayer, problems: Sequence[Problems], bases: BaseSets, read: Read,
        calibration: Calibration,
    ):  # fmt: skip
        self.plain, self.sizes = plain, plain.sizes
        self.layer, self.bases, self.read, self.calibration = layer, bases, read, calibration
        self.errors = torch.empty(0)  # of each slot's row, NaN where there is none
        self._tried = torch.empty(2, 0)  # errors and kinds of all rows so far
        target = calibration.target
        self._wanted = target[layer.target]
        x = target[read.target]
        if layer.kind == "linear":
            x = x.reshape(len(x), -1, layer.taps)
        self._samples = Samples.draw(
            layer, x.shape, self._wanted.shape, calibration.settings.samples, seed=calibration.seed
        )
        self._others = [(ours, target[theirs], by) for ours, theirs, by in read.behind.others]
        self._ideal = torch.stack([gather(x, index) for index in self._samples.inputs], 1)  # (C_in, K, N)
        self._signals: Signals | None = None
        self._gram: Gram | None = None
        self._columns, self._multipliers = (
            bases.columns.to(calibration.device),
            bases.multipliers.to(calibration.device),
        )
        self._visits = self._order(problems[:-1])
        self._start = self._before(problems[:-1])
        self._penalty = self._penalties()

    def _order(self, problems: Sequence[Problems]) -> Visits:
        """The groups, a base set at a tap each, in one random order for all rows, or each row's largest first."""
        taps, settings = self.layer.taps, self.calibration.settings
        groups = len(self.bases.channels) * taps
        rank = torch.from_numpy(np.random.default_rng([self.calibration.seed, 2, self.layer.index]).permutation(groups))
        group, theta = [], []
        for kind in problems:
            index = kind.base * taps + kind.tap
            first = rank[index] if settings.order == "random" else -kind.theta.abs()
            order = first.argsort(stable=True)
            group.append(index[order])
            theta.append(kind.theta[order])
        sizes = torch.tensor([0, *(len(kind) for kind in problems)])
        device = self.calibration.device
        return Visits(
            sizes.cumsum(0).to(device), torch.cat(group).to(device), torch.cat(theta).float().to(device),
            rank.to(device) if settings.order == "random" else None,
        )  # fmt: skip

    def _ideals(self) -> Tensor:
        """What each base set stands for, (B, K, N)."""
        channels, slopes = self.bases.channels, self.bases.slopes.to(self._ideal)
        x = self._ideal[channels.clamp_min(0).to(self._ideal.device)]
        x = slopes[:, :1, None] * x.clamp_min(0) + slopes[:, 1:, None] * x.clamp_max(0)
        return torch.where((channels == CONSTANT).to(x.device)[:, None, None], 1.0, x)

    def _before(self, problems: Sequence[Problems]) -> Tensor:
        """Errors (C_out, N) of rows that keep nothing yet, as if what is to be approximated were there exactly."""
        ideal = self._ideals().flatten(0, 1)
        weight = torch.zeros(len(problems), len(ideal), device=ideal.device)
        for kind, mine in enumerate(problems):
            weight[kind].index_add_(
                0, (mine.base * self.layer.taps + mine.tap).to(ideal.device), mine.theta.to(ideal)
            )  # fmt: skip
        return weight @ ideal - gather(self._wanted, self._samples.output)

    def _penalties(self) -> Tensor:
        """Of an element of a subset, (C_out,): what the sum of squares of a row's error must fall by."""
        scale = self.read.behind.scale.to(self._start)
        if not self.calibration.settings.penalty:
            return torch.zeros_like(scale)
        there = scale[:, None] * gather(self._wanted, self._samples.output)
        for _, theirs, by in self._others:
            there = there + by.to(there)[:, None] * gather(theirs, self._samples.output)
        size = there.var(1, unbiased=False).mean()
        nothing = torch.full_like(scale, 1e30)  # a parameter of a row that batch norm multiplies by 0 is of no use
        slots = len(scale) * self.read.slots
        share = self.calibration.settings.penalty * slots * self._start.shape[1] * size
        return torch.where(scale == 0, nothing, (share / scale.square()).clamp_max(1e30))

    def attempt(self, rows: Tensor, kinds: Tensor) -> Attempt:
        """Choose subsets for `rows` (n,), each of its kind (n,)."""
        constant = kinds == len(self.sizes) - 1
        if not constant.any():
            return self._attempt(rows, kinds)
        plain = self.plain.attempt(rows[constant], kinds[constant])
        self._run(
            rows[constant][plain.good], plain.rows, plain.offsets, *self._inputs(plain.offsets // self.layer.taps)
        )
        if constant.all():
            return plain
        chosen = self._attempt(rows[~constant], kinds[~constant])
        good, sums = torch.ones(len(rows), dtype=torch.bool), torch.zeros(len(rows), dtype=torch.float64)
        failures = torch.zeros(len(rows), dtype=torch.int64)
        for part, index in ((plain, constant), (chosen, ~constant)):
            good[index], sums[index], failures[index] = part.good, part.sums, part.failures
        return Attempt(
            good, sums, failures, torch.cat([plain.rows, chosen.rows]), torch.cat([plain.offsets, chosen.offsets])
        )

    def _attempt(self, rows: Tensor, kinds: Tensor) -> Attempt:
        """The same, of rows that are not constant."""
        order = kinds.argsort(stable=True)
        rows, kinds = rows[order], kinds[order]
        some = bool(self.sizes[kinds].any())  # else they read nothing, and maybe there is nothing to read
        columns = self.bases.columns.flatten() if some else torch.empty(0, dtype=torch.int64)
        x, where = self._inputs(torch.cat([columns, columns + 1]) if self.bases.paired else columns)
        if self._signals is None and some:
            self._signals = self._read(x, where)
        limit = CHUNK // max(1, self.bases.columns.shape[-1])  # visits whose entries are looked at together
        tried = in_parts(lambda part, of: self._solve(part, of, x, where), rows, kinds, self.sizes, limit)
        back = order.argsort()
        return Attempt(tried.good[back], tried.sums[back], tried.failures[back], tried.rows, tried.offsets)

    def _solve(self, rows: Tensor, kinds: Tensor, x: Tensor, where: Tensor) -> Attempt:
        """Choose subsets for rows whose kinds ascend."""
        settings, taps, device = self.calibration.settings, self.layer.taps, self.calibration.device
        slots, kinds_there, begin = rows.to(device), kinds.to(device), self._visits.begin
        sizes = (begin[1:] - begin[:-1])[kinds_there]
        which = torch.repeat_interleave(torch.arange(len(rows), device=device), sizes)
        visit = begin[kinds_there][which] + torch.arange(len(which), device=device) - (sizes.cumsum(0) - sizes)[which]
        group = self._visits.group[visit]
        offsets = self._columns[group // taps] * taps + (group % taps)[:, None]
        weights = source.weights(
            self.layer, self.calibration.seed, slots[which][:, None].expand_as(offsets), offsets
        )  # fmt: skip
        worth = (weights * self._multipliers[group // taps]).float()
        error, beside = self._error(rows, kinds_there)
        self._require_finite(error)
        chosen, missed = torch.zeros_like(weights, dtype=torch.bool), torch.zeros_like(kinds)
        if self._signals is not None and len(which):
            penalty = self._penalty[kinds_there]
            refined = settings.bound is None and settings.refine > 0
            chosen, missed = choose(
                self._signals, self._visits, kinds_there, weights, worth, error, penalty * (SPARSE if refined else 1),
                bound=math.inf if settings.bound is None else settings.bound - ROUNDING, largest=settings.max_subset,
                sweeps=settings.sweeps,
            )  # fmt: skip
            if refined:
                self._gram = self._gram or Gram(self._signals)
                refine(self._signals, self._gram, self._visits, kinds_there, weights, chosen, error, penalty,
                       passes=settings.refine)  # fmt: skip
            self._require_finite(error)
        missed = missed.cpu()
        scale = self.read.behind.scale.to(error)[kinds_there].abs()
        errors = torch.where(scale == 0, beside, scale * error.square().mean(1).sqrt()).cpu()
        good = (missed == 0) & self._usual(errors, kinds)
        entry, place = (chosen & good.to(device)[which][:, None]).nonzero(as_tuple=True)
        kept_rows, kept_offsets = slots[which[entry]].cpu(), offsets[entry, place].cpu()
        if self.bases.paired:
            kept_rows, kept_offsets = kept_rows.repeat(2), torch.cat([kept_offsets, kept_offsets + taps])
        self._run(rows[good], kept_rows, kept_offsets, x, where)
        self._claim(rows[good], errors[good])
        return Attempt(good, torch.zeros(len(rows), dtype=torch.float64), missed, kept_rows, kept_offsets)

    def _require_finite(self, error: Tensor) -> None:
        if not bool(torch.isfinite(error.square().sum(1)).all()):
            raise ConstructionError(
                f"layer {self.layer.target}: activations on the calibration images are not finite, or their squares "
                "are beyond float32"
            )

    def _usual(self, errors: Tensor, kinds: Tensor) -> Tensor:
        """Which rows are not much worse than most, (n,) bool: those of their kind, or of all where there are few."""
        self._tried = torch.cat([self._tried, torch.stack([errors, kinds.to(errors)])], 1)
        limit = self.calibration.settings.reject
        if limit is None:
            return torch.ones(len(kinds), dtype=torch.bool)
        typical = torch.full((len(self.sizes),), float(self._tried[0].median()))
        for kind in kinds.unique().tolist():
            mine = self._tried[0, self._tried[1] == kind]
            if len(mine) >= ENOUGH:
                typical[kind] = mine.median()
        return errors.double() <= limit * typical[kinds].double()  # beyond float32, limit * 0 would be no number

    def _inputs(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Values (n, U, ...) of columns, and where a column is among them."""
        unique = columns.unique()
        if not len(unique):
            return torch.empty(0), unique
        where = torch.full((int(unique[-1]) + 1,), -1)
        where[unique] = torch.arange(len(unique))
        x = self.calibration.at(self.read.node, unique)
        unsolved = x.flatten(2)[0, :, 0].isnan() if x.ndim > 2 else x[0].isnan()  # padding of base sets that none reads
        if bool(unsolved.any()):
            x[:, unsolved] = 0
        return x, where

    def _read(self, x: Tensor, where: Tensor) -> Signals:
        """What the slots that are read give on the samples."""
        sets, m = self.bases.columns.shape
        here = where[self.bases.columns.flatten()].to(x.device)
        beside = where[self.bases.columns.flatten() + 1].to(x.device) if self.bases.paired else None
        slots = torch.empty(sets, self.layer.taps, m, len(self._samples.output), device=x.device)
        for tap, index in enumerate(self._samples.inputs):
            values = gather(x, index)
            mine = values[here] if beside is None else values[here] - values[beside]
            slots[:, tap] = mine.view(sets, m, -1)
        return Signals.of(slots.flatten(0, 1), self._ideals().flatten(0, 1))

    def _error(self, rows: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
        """Errors (len(rows), N) of rows that keep nothing yet: what slots are off beside the layer is theirs too.

        And the root mean square (len(rows),) of what they are off beside, which is left where the layer counts nothing.
        """
        error = self._start[kinds]
        scale = self.read.behind.scale.to(error)
        total = torch.zeros_like(error) if self._others else error[:, :1] * 0
        for ours, theirs, by in self._others:
            there = self.calibration.at(ours, rows, self._samples.output)[0]
            off = (there - gather(theirs, self._samples.output)[kinds]).nan_to_num(0.0)
            total += by.to(scale)[kinds, None] * off
        if self._others:
            error += torch.where(scale == 0, 0.0, 1 / scale)[kinds, None] * total
        return error, total.square().mean(1).sqrt()

    def _run(self, rows: Tensor, kept_rows: Tensor, kept_offsets: Tensor, x: Tensor, where: Tensor) -> None:
        """Outputs of rows that were solved."""
        if not len(kept_rows):
            shape = (len(self._wanted), len(rows), *self._wanted.shape[2:])
            self.calibration.add_rows(
                self.layer.name, rows.sort().values, torch.zeros(shape, device=self._wanted.device)
            )
            return
        ascending = rows.sort().values
        local = torch.searchsorted(ascending, kept_rows)
        values = source.weights(self.layer, self.calibration.seed, kept_rows, kept_offsets)
        offsets = where[kept_offsets // self.layer.taps] * self.layer.taps + kept_offsets % self.layer.taps
        self.calibration.add_rows(
            self.layer.name, ascending, apply_rows(self.layer, local, offsets, values, len(rows), x)
        )  # fmt: skip

    def _claim(self, rows: Tensor, errors: Tensor) -> None:
        """Remember the errors of rows on the samples."""
        if len(rows) and int(rows.max()) >= len(self.errors):
            more = torch.full((int(rows.max()) + 1 - len(self.errors),), math.nan)
            self.errors = torch.cat([self.errors, more])
        self.errors[rows] = errors

    def release(self) -> None:
        """Free what further rows would need: there are none."""
        del self._signals, self._gram, self._others, self._wanted, self._ideal, self._start
