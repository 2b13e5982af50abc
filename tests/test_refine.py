"""Refining rows: any entry may give way to any other."""

from itertools import combinations, pairwise

import pytest
import torch
from conftest import random_rows

from ltx.constructions import refine as module
from ltx.constructions.refine import Gram, refine


def refined(passes, *, penalty=0.5, kernel=refine, density=0.3, **shape):
    """Random rows, members and errors after so many passes, and the rows' costs computed anew from the members."""
    signals, visits, kinds, weights, start = random_rows(**shape)
    generator = torch.Generator().manual_seed(1)
    members = torch.rand(weights.shape, generator=generator) < density
    groups = visits.begin[1]
    parts = weights.view(len(kinds), -1), torch.stack([visits.group.view(-1, groups)[k] for k in kinds])
    entries = signals.slots[parts[1]].flatten(1, 2)  # (n, P m, N)
    error = start + ((parts[0] * members.view(len(kinds), -1))[:, None] @ entries)[:, 0]
    kernel(signals, Gram(signals), visits, kinds, weights, members, error, torch.full((len(kinds),), float(penalty)),
           passes=passes)  # fmt: skip
    kept = members.view(len(kinds), -1)
    anew = start + ((parts[0] * kept)[:, None] @ entries)[:, 0]
    torch.testing.assert_close(error, anew, atol=1e-4, rtol=1e-4)
    return kept, anew, (anew.double().square().sum(1) + penalty * kept.sum(1)), parts[0], entries


def batched(*tensors, passes):
    module._refine_batched(*tensors, passes)


def test_costs_never_rise_and_fall():
    costs = [refined(passes)[2] for passes in (0, 1, 2, 20)]
    assert all((after <= before * (1 + 1e-6)).all() for before, after in pairwise(costs))
    assert (costs[1] < 0.9 * costs[0]).all()


@pytest.mark.parametrize("penalty", [0.0, 0.5, 5.0])
def test_no_single_move_is_left(penalty):
    kept, error, costs, weights, entries = refined(100, penalty=penalty, groups=4, m=5)
    for row in range(len(kept)):
        x = weights[row, :, None].double() * entries[row].double()  # what each entry gives
        for out in (*kept[row].nonzero().flatten().tolist(), None):
            for into in (*(~kept[row]).nonzero().flatten().tolist(), None):
                after = error[row].double() - (0 if out is None else x[out]) + (0 if into is None else x[into])
                count = int(kept[row].sum()) - (out is not None) + (into is not None)
                assert after.square().sum() + penalty * count >= costs[row] * (1 - 1e-5)


def test_small_rows_come_near_the_best_of_all_subsets():
    _, _, costs, weights, entries = refined(20, groups=3, m=3, copies=20, samples=40)
    _, _, kinds, _, start = random_rows(groups=3, m=3, copies=20, samples=40)
    reached = []
    for row in range(len(kinds)):
        x = weights[row, :, None].double() * entries[row].double()
        best = min(
            float((start[row].double() + x[list(some)].sum(0)).square().sum()) + 0.5 * size
            for size in range(10)
            for some in combinations(range(9), size)
        )
        assert costs[row] >= best - 1e-4
        reached.append(float(costs[row]) <= best + 1e-4)
    assert sum(reached) > 0.5 * len(reached)


@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_both_kernels_refine_alike(penalty):
    ours, theirs = (refined(3, penalty=penalty, kernel=kernel) for kernel in (refine, batched))
    assert torch.equal(ours[0], theirs[0])


def test_parts_of_the_gram_matrix(monkeypatch):
    signals = random_rows(groups=5, m=4)[0]
    gram, groups = Gram(signals), torch.tensor([4, 0, 2])
    apart = gram.part(groups).clone()
    gram.expect(401)  # more than the 20^2 of all slots
    assert gram._whole is not None
    torch.testing.assert_close(gram.part(groups), apart)
    torch.testing.assert_close(gram.whole(), signals.slots.flatten(0, 1) @ signals.slots.flatten(0, 1).T)
    ours = [refined(3, kernel=kernel)[0] for kernel in (refine, batched)]
    monkeypatch.setattr(module, "LARGEST", 1)  # as if there were too many slots for the whole
    theirs = [refined(3, kernel=kernel)[0] for kernel in (refine, batched)]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
