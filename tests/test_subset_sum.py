"""The solvers against brute force, and against each other."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ltx.errors import LtxError
from ltx.subset_sum import MAX_BASE_SET_SIZE, batched, compiled, solve

EPSILON = 0.01


def brute_force(x, theta, epsilon, selection):
    """Subset as a tuple of indices, and its error; the specification, word for word."""
    ranked = []
    for size in range(len(x) + 1):
        for subset in combinations(range(len(x)), size):
            total = 0.0
            for i in subset:
                total += x[i]
            ranked.append((abs(total - theta), size, subset))
    if selection == "smallest" and any(error <= epsilon for error, _, _ in ranked):
        error, _, subset = min((r for r in ranked if r[0] <= epsilon), key=lambda r: (r[1], r[0], r[2]))
    else:
        error, _, subset = min(ranked)
    return subset, error


numbers = st.one_of(
    st.floats(-1, 1), st.sampled_from([0.0, 0.5, -0.5, 0.25, 0.01, 1.0]), st.floats(-1e6, 1e6), st.floats(-1e-9, 1e-9)
)
problems = st.integers(1, 8).flatmap(
    lambda m: st.lists(st.tuples(st.lists(numbers, min_size=m, max_size=m), numbers), min_size=1, max_size=4)
)


@settings(max_examples=150, deadline=None)
@given(problems, st.sampled_from(["smallest", "best"]))
def test_equals_brute_force(drawn, selection):
    x, theta = np.array([p[0] for p in drawn]), np.array([p[1] for p in drawn])
    found = solve(x, theta, EPSILON, selection=selection)
    for n in range(len(theta)):
        subset, error = brute_force(x[n], theta[n], EPSILON, selection)
        assert found.error[n] == error
        assert found.size[n] == len(subset)
        assert found.mask[n] == sum(1 << i for i in subset)


@settings(max_examples=100, deadline=None)
@given(problems, st.sampled_from([EPSILON, -1.0]))
def test_device_path_chooses_the_same_subsets(drawn, stop):
    x, theta = np.array([p[0] for p in drawn]), np.array([p[1] for p in drawn])
    for ours, theirs in zip(
        compiled.search(x, theta, stop), batched.search(torch.from_numpy(x), torch.from_numpy(theta), stop), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs.numpy())


def test_device_path_in_small_chunks(monkeypatch):
    rng = np.random.default_rng(0)
    x, theta = rng.uniform(-1, 1, (40, 10)), rng.uniform(-4, 4, 40)
    whole = batched.search(torch.from_numpy(x), torch.from_numpy(theta), EPSILON)
    monkeypatch.setattr(batched, "CHUNK", 50)
    for a, b in zip(whole, batched.search(torch.from_numpy(x), torch.from_numpy(theta), EPSILON), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_gpu_chooses_the_same_subsets():
    rng = np.random.default_rng(0)
    x, theta = torch.from_numpy(rng.uniform(-1, 1, (2000, 15))), torch.from_numpy(rng.uniform(-1, 1, 2000))
    for selection in ("smallest", "best"):
        here, there = (solve(x.to(d), theta.to(d), EPSILON, selection=selection) for d in ("cpu", "cuda"))
        assert torch.equal(here.mask, there.mask.cpu())
        assert torch.equal(here.error, there.error.cpu())


def test_statistics_of_uniform_base_sets():
    """m = 15, epsilon = 0.01: `smallest` fails on 0.41 % and keeps 2.29 on average (design.md, section 4)."""
    rng = np.random.default_rng(0)
    found = solve(rng.uniform(-1, 1, (100_000, 15)), rng.uniform(-1, 1, 100_000), EPSILON)
    ok = found.error <= EPSILON
    assert abs(100 * (1 - ok.mean()) - 0.41) < 0.1
    assert abs(found.size[ok].mean() - 2.29) < 0.015


def test_failures_fall_with_the_base_set_size():
    """Corollary 2.2: the share of failures falls exponentially in m."""
    rng = np.random.default_rng(1)
    x, theta = rng.uniform(-1, 1, (4000, 14)), rng.uniform(-1, 1, 4000)
    shares = [(solve(x[:, :m], theta, EPSILON).error > EPSILON).mean() for m in (6, 8, 10, 12, 14)]
    assert all(later < 0.8 * earlier for earlier, later in pairwise(shares))


def test_numpy_in_numpy_out_torch_in_torch_out():
    x, theta = np.ones((2, 3)), np.ones(2)
    assert isinstance(solve(x, theta, 0.1).mask, np.ndarray)
    assert isinstance(solve(torch.from_numpy(x), torch.from_numpy(theta), 0.1).mask, torch.Tensor)


def test_no_problems():
    assert solve(np.empty((0, 5)), np.empty(0), 0.1).mask.shape == (0,)


@pytest.mark.parametrize(
    ("x", "theta", "epsilon", "selection", "message"),
    [
        (np.ones((2, 3)), np.ones(3), 0.1, "smallest", r"\(n, m\)"),
        (np.ones((2, MAX_BASE_SET_SIZE + 1)), np.ones(2), 0.1, "smallest", "are possible"),
        (np.ones((2, 0)), np.ones(2), 0.1, "smallest", "are possible"),
        (np.ones((2, 3)), np.ones(2), 0.0, "smallest", "positive"),
        (np.ones((2, 3)), np.ones(2), float("nan"), "smallest", "positive"),
        (np.ones((2, 3)), np.ones(2), 0.1, "largest", "smallest, best"),
        (np.full((2, 3), np.nan), np.ones(2), 0.1, "best", "finite"),
        (np.ones((2, 3)), np.array([1, np.inf]), 0.1, "best", "finite"),
    ],
)
def test_refuses_bad_problems(x, theta, epsilon, selection, message):
    with pytest.raises(LtxError, match=message):
        solve(x, theta, epsilon, selection=selection)
