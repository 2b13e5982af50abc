"""The kernels that choose the subsets of selection=feedback."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from conftest import random_rows

from ltx.constructions import choice
from ltx.constructions.choice import choose


@pytest.mark.parametrize(
    ("bound", "largest", "sweeps", "penalty"),
    [
        (np.inf, 3, 1, 0),
        (np.inf, 3, 2, 0.5),
        (0.05, 3, 2, 0),
        (np.inf, 4, 1, 0.1),
        (np.inf, 1, 2, 0),
        (0.01, 2, 1, 0),
        (np.inf, 7, 2, 0),
        (0.02, 6, 1, 0),
    ],
)
@pytest.mark.parametrize("common", [False, True])
def test_both_kernels_choose_alike(common, bound, largest, sweeps, penalty):
    signals, visits, rows, weights, error = random_rows(common=common)
    penalties, other = torch.full((len(rows),), float(penalty)), error.clone()
    how = (bound, largest, sweeps)
    ours = choose(signals, visits, rows, weights, weights, error, penalties, bound=bound, largest=largest,
                  sweeps=sweeps)  # fmt: skip
    theirs = choice._choose_batched(signals, visits, rows, weights, weights, other, penalties, *how)
    assert torch.equal(ours[1], theirs[1])
    assert (bound == np.inf) == (int(ours[1].sum()) == 0)
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(error, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("penalty", [0, 2])
@pytest.mark.parametrize("bound", [np.inf, 0.3])
def test_a_choice_is_the_best_of_all_subsets(penalty, bound):
    signals, visits, rows, weights, error = random_rows(groups=1, kinds=1, copies=9)
    before = error.clone()
    chosen, missed = choose(signals, visits, rows, weights, weights, error, torch.full((9,), float(penalty)),
                            bound=bound, largest=3, sweeps=1)  # fmt: skip
    x, theta = signals.slots[0].double(), float(visits.theta[0])
    for row in range(9):
        w, e = weights[row].double(), before[row].double() - theta * signals.ideal[0].double()
        costs = {
            subset: float((e + w[list(subset)] @ x[list(subset)]).square().sum()) + penalty * len(subset)
            for size in range(4) for subset in combinations(range(7), size)
            if abs(float(w[list(subset)].sum()) - theta) <= bound
        }  # fmt: skip
        mine = tuple(chosen[row].nonzero().flatten().tolist())
        assert (missed[row] > 0) == (not costs)
        if costs:
            assert costs[mine] == pytest.approx(min(costs.values()), rel=1e-4)
            left = float(error[row].double().square().sum()) + penalty * len(mine)
            assert left == pytest.approx(costs[mine], rel=1e-4)


def test_the_error_of_a_row_never_rises_in_a_sweep():
    errors = []
    for sweeps in (1, 2, 3, 6):
        signals, visits, rows, weights, error = random_rows(groups=30, samples=200)
        choose(signals, visits, rows, weights, weights, error, torch.zeros(len(rows)), bound=np.inf, largest=3,
               sweeps=sweeps)  # fmt: skip
        errors.append(error.square().sum(1))
    assert all((after <= before * (1 + 1e-5)).all() for before, after in pairwise(errors))
    assert errors[-1].sum() < 0.95 * errors[0].sum()
