"""The solvers against brute force and against each other."""

import os
import subprocess
import sys
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ltx.errors import LtxError
from ltx.subset_sum import MAX_BASE_SET_SIZE, solve, solver

EPSILON = 0.01
SELECTIONS = ["smallest", "best"]
# `enumerated` stays the same for all examples of a test
examples = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


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


def assert_equals_brute_force(x, theta, epsilon, selection, found):
    for n in range(len(theta)):
        subset, error = brute_force(x[n], theta[n], epsilon, selection)
        assert found.error[n] == error
        assert found.size[n] == len(subset)
        assert found.mask[n] == sum(1 << i for i in subset)


@pytest.fixture(params=["as shipped", "0", "1", "3"])
def enumerated(request, monkeypatch):
    """Up to which size subsets are enumerated before the halves meet: few values would never get there as shipped."""
    if request.param != "as shipped":
        monkeypatch.setattr(solver, "_enumerated_sizes", lambda m, _: m if m == 1 else min(m, int(request.param)))
    return request.param


# duplicates and zeros; sums that are equal but for their rounding; huge and tiny ones together
numbers = st.one_of(
    st.floats(-1, 1), st.sampled_from([0.0, 0.5, -0.5, 0.25, 0.01, 1.0]), st.sampled_from([0.1, 0.2, 0.3, -0.7, 0.0]),
    st.floats(-1e6, 1e6), st.floats(-1e-9, 1e-9), st.sampled_from([1e300, -1e300, 1e20, -1e20, 1e-17, 5e-324, -0.0]),
)  # fmt: skip


def problems(most):
    return st.integers(1, most).flatmap(
        lambda m: st.lists(st.tuples(st.lists(numbers, min_size=m, max_size=m), numbers), min_size=1, max_size=4)
    )


@examples
@given(drawn=problems(10), selection=st.sampled_from(SELECTIONS), epsilon=st.sampled_from([EPSILON, 1e-12, 0.3]))
def test_equals_brute_force(enumerated, drawn, selection, epsilon):
    x, theta = np.array([p[0] for p in drawn]), np.array([p[1] for p in drawn])
    assert_equals_brute_force(x, theta, epsilon, selection, solve(x, theta, epsilon, selection=selection))


@examples
@given(data=st.data(), selection=st.sampled_from(SELECTIONS))
def test_ties_go_to_the_smaller_then_the_lexicographically_first_subset(enumerated, data, selection):
    """Values on a coarse grid: most problems have many subsets of the same error."""
    m = data.draw(st.integers(4, 10))
    step = data.draw(st.sampled_from([0.25, 0.1]))  # sums are exact, or equal up to rounding only
    grid = st.integers(-3, 3).map(lambda v: v * step)
    x = np.array([data.draw(st.lists(grid, min_size=m, max_size=m)) for _ in range(3)])
    theta = np.array(data.draw(st.lists(grid, min_size=3, max_size=3)))
    assert_equals_brute_force(x, theta, EPSILON, selection, solve(x, theta, EPSILON, selection=selection))


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("law", ["uniform", "float32", "grid"])
def test_halves_equal_enumeration(selection, law, monkeypatch):
    """m = 14, too many subsets for brute force in Python; float32 values make equal sums within the halves."""
    rng = np.random.default_rng(0)
    x, theta = rng.uniform(-1, 1, (400, 14)), rng.uniform(-6, 6, 400)
    if law != "uniform":
        x, theta = (
            a.astype(np.float32).astype(float) if law == "float32" else np.round(16 * a) / 16 for a in (x, theta)
        )
    answers = []
    for sizes in (14, 0, 2, 5):
        monkeypatch.setattr(solver, "_enumerated_sizes", lambda m, _, sizes=sizes: sizes)
        answers.append(solve(x, theta, 1e-4, selection=selection))
    for other in answers[1:]:
        np.testing.assert_array_equal(answers[0].mask, other.mask)
        np.testing.assert_array_equal(answers[0].error, other.error)


@pytest.mark.parametrize("m", [24, 32])
def test_large_base_sets(m):
    """A subset that is known to be there is found, or a better one; the error is that of the mask."""
    rng = np.random.default_rng(m)
    x = np.round(2**20 * rng.uniform(-1, 1, (6, m))) / 2**20  # sums are exact
    chosen = rng.random((6, m)) < 0.4
    theta = np.where(chosen, x, 0).sum(1)
    for selection, epsilon in (("best", 0.01), ("smallest", 1e-9)):
        found = solve(x, theta, epsilon, selection=selection)
        assert (found.error == 0).all()
        assert (found.size <= chosen.sum(1)).all()
        np.testing.assert_array_equal(found.members(m).sum(1), found.size)
        np.testing.assert_array_equal(np.where(found.members(m), x, 0).sum(1), theta)


def test_pathological_ties_stay_cheap():
    """All values equal: every subset of a size is as good, and the first is wanted."""
    found = solve(np.full((1, 28), 0.5), np.array([3.0]), EPSILON)
    assert found.mask[0] == 0b111111
    assert not solve(np.zeros((1, 32)), np.array([1.0]), EPSILON).mask[0]
    assert not solve(np.full((1, 32), 1e-18), np.array([1.0]), EPSILON).mask[0]


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_value_that_dwarfs_the_rest_is_left_out(selection):
    """Its rounding would otherwise make all sums look alike: 2^30 candidates."""
    rng = np.random.default_rng(5)
    x, theta = rng.uniform(-1, 1, (3, 30)), rng.uniform(-1, 1, 3)
    x[:, [4, 29]] = 1e30, -1e12
    found = solve(x, theta, 1e-6, selection=selection)
    assert (found.error < 1e-6).all()
    assert not found.members(30)[:, [4, 29]].any()


@pytest.mark.parametrize(("x", "theta"), [(0.51, 0.5), (0.3, 0.29), (-0.47, -0.48)])
def test_epsilon_is_compared_in_float64(x, theta):
    """The float64 error decides, on the last bit: where float32 would round it to epsilon, it may be beyond."""
    error = abs(x - theta)
    values, targets = np.full((1, 5), x), np.array([theta])
    assert solve(values, targets, error).size[0] == 1
    below = np.nextafter(error, 0)
    assert solve(values, targets, below).error[0] > below
    assert solve(values, targets, error * (1 - 1e-9)).error[0] > error * (1 - 1e-9)  # equal in float32


@settings(max_examples=100, deadline=None)
@given(drawn=problems(9), selection=st.sampled_from(SELECTIONS))
def test_no_accepted_subset_exceeds_epsilon(drawn, selection):
    x, theta = np.array([p[0] for p in drawn]), np.array([p[1] for p in drawn])
    found = solve(x, theta, EPSILON, selection=selection)
    members = found.members(x.shape[1])
    for n in range(len(theta)):
        total = 0.0
        for value in x[n, members[n]]:
            total += value
        assert abs(total - theta[n]) == found.error[n]


GPU_SCRIPT = """
import numpy as np, torch
from ltx.subset_sum import gpu, solve, solver
rng = np.random.default_rng(0)
gpu.PROGRAMS, gpu.THREADS, solver.GPU_VALUES = 64, 32, 300  # several programs for a problem too, and parts
for m in (1, 2, 3, 4, 5, 8):
    x, theta = rng.uniform(-1, 1, (60, m)), rng.uniform(-2, 2, 60)
    x[:40], theta[:40] = np.round(x[:40] * 2) / 2, np.round(theta[:40] * 2) / 2  # many equal errors
    for kind in (np.float64, np.float32):
        values, targets = torch.tensor(x.astype(kind)), torch.tensor(theta)
        columns, bad = gpu.transposed(values, targets)
        assert bad is None and torch.equal(columns, values.T) and columns.is_contiguous()
        wide = torch.zeros(120, 2 * m, dtype=values.dtype)
        wide[::2, ::2] = values
        assert torch.equal(gpu.transposed(wide[::2, ::2], targets)[0], columns)
        for problem, s, what in ((59, m - 1, np.inf), (40, 0, -np.inf), (33, 0, np.nan)):  # the first one counts
            values[problem, s] = what
            assert gpu.transposed(values, targets)[1] == problem
        values[7, 0] = float(np.finfo(kind).max)  # a sum of which overflows in float64 only
        assert gpu.transposed(values, targets)[1] == (7 if kind is np.float64 else 33)
        targets[2] = np.nan
        assert gpu.transposed(values, targets)[1] == 2
        for selection, within in (("smallest", 0.01), ("best", -1.0)):
            expected = solve(x.astype(kind), theta, 0.01, selection=selection)
            found = solver._on_gpu(wide[::2, ::2], torch.tensor(theta).repeat_interleave(2)[::2], within)
            for name in ("mask", "size", "error"):
                assert (getattr(found, name).numpy() == getattr(expected, name)).all(), (m, selection, name)
for x, epsilon in (([[0.6000000005, 0.25, 0.25]], 0.1), ([[0.5099999999, 0.25, 0.25]], 0.01)):  # no float32 numbers
    x, theta = np.array(x), np.array([0.5])
    expected, found = solve(x, theta, epsilon), solver._on_gpu(torch.tensor(x), torch.tensor(theta), epsilon)
    assert found.mask.item() == expected.mask.item(), epsilon
print("same")
"""


@pytest.mark.slow
def test_gpu_kernels_choose_the_same_subsets_when_interpreted():
    """Triton's interpreter runs the kernels without a GPU."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", GPU_SCRIPT], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    if "only 0-dimensional arrays can be converted to Python scalars" in done.stderr:
        pytest.skip("Triton's interpreter is older than NumPy here: it takes arrays of one number for numbers")
    assert done.stdout == "same\n", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("values", ["*fp32", "*fp64"])
@pytest.mark.parametrize("capability", [80, 90])
def test_gpu_kernels_compile_without_a_gpu(values, capability, tmp_path, monkeypatch):
    """Numbers that are 1 are constants to Triton's compiler, which takes other ways with them."""
    pytest.importorskip("triton")
    from triton import compile as compiled
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ltx.subset_sum import gpu

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kinds = {"values": values, "columns": values, "prefixes": "*i32", "allowed": "*fp64", "first": "*i32"}
    kinds |= dict.fromkeys(("n", "m", "row", "column", "largest", "size", "count", "share"), "i32")
    kinds |= dict.fromkeys(("targets", "errors", "least"), "*fp64")
    kinds |= dict.fromkeys(("masks", "sizes", "chosen"), "*i64")
    for kernel, ones in (
        (gpu._up_to_three, ()), (gpu._up_to_three, ("n", "m", "largest")),
        (gpu._one_size, ()), (gpu._one_size, ("n", "count", "share")),
        (gpu._transpose, ()), (gpu._transpose, ("n", "m", "row", "column")),
    ):  # fmt: skip
        known = {"THREADS": gpu.THREADS, "WIDTH": 16, **dict.fromkeys(ones, 1)}
        known = {name: value for name, value in known.items() if name in kernel.arg_names}
        signature = {name: "constexpr" if name in known else kinds[name] for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=known)
        assert "cubin" in compiled(source, target=GPUTarget("cuda", capability, 32), options=gpu.LAUNCH).asm


@pytest.mark.gpu
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize(("m", "n"), [(3, 5000), (10, 5000), (15, 20000), (22, 200)])
def test_gpu_chooses_the_same_subsets(selection, m, n):
    rng = np.random.default_rng(0)
    x, theta = torch.from_numpy(rng.uniform(-1, 1, (n, m))), torch.from_numpy(rng.uniform(-1, 1, n))
    x[: n // 4] = (4 * x[: n // 4]).round() / 4  # many equal errors
    here, there = (solve(x.to(d), theta.to(d), EPSILON, selection=selection) for d in ("cpu", "cuda"))
    assert torch.equal(here.mask, there.mask.cpu())
    assert torch.equal(here.size, there.size.cpu())
    assert torch.equal(here.error, there.error.cpu())


@pytest.mark.parametrize(("law", "failures", "size"), [("uniform", 0.41, 2.291), ("product", 3.5, 2.375)])
def test_statistics(law, failures, size):
    """m = 15, epsilon = 0.01, 100,000 problems (design.md, section 4); within four standard errors."""
    rng = np.random.default_rng(0)
    x, theta = rng.uniform(-1, 1, (100_000, 15)), rng.uniform(-1, 1, 100_000)
    if law == "product":
        x = x * rng.uniform(-1, 1, x.shape)
    found = solve(x, theta, EPSILON)
    ok = found.error <= EPSILON
    assert abs(100 * (1 - ok.mean()) - failures) < 400 * np.sqrt(failures / 100 / 1e5)
    assert abs(found.size[ok].mean() - size) < 0.005 + 4 * found.size[ok].std() / np.sqrt(1e5)


def test_failures_fall_with_the_base_set_size():
    """Corollary 2.2: the share of failures falls exponentially in m."""
    rng = np.random.default_rng(1)
    x, theta = rng.uniform(-1, 1, (4000, 14)), rng.uniform(-1, 1, 4000)
    shares = [(solve(x[:, :m], theta, EPSILON).error > EPSILON).mean() for m in (6, 8, 10, 12, 14)]
    assert all(later < 0.8 * earlier for earlier, later in pairwise(shares))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_chunks_do_not_change_the_answers(selection, monkeypatch):
    rng = np.random.default_rng(2)
    x, theta = rng.uniform(-1, 1, (300, 12)), rng.uniform(-3, 3, 300)
    whole = solve(x, theta, EPSILON, selection=selection)
    monkeypatch.setattr(solver, "CHUNK", 7)
    parts = solve(x, theta, EPSILON, selection=selection)
    np.testing.assert_array_equal(whole.mask, parts.mask)
    np.testing.assert_array_equal(whole.error, parts.error)


def test_numpy_in_numpy_out_torch_in_torch_out():
    x, theta = np.ones((2, 3)), np.ones(2)
    here, there = solve(x, theta, 0.1), solve(torch.from_numpy(x), torch.from_numpy(theta), 0.1)
    assert isinstance(here.mask, np.ndarray)
    assert here.mask.dtype == np.uint32
    assert isinstance(there.mask, torch.Tensor)
    assert there.members(3).tolist() == here.members(3).tolist() == [[True, False, False]] * 2


@pytest.mark.parametrize(
    "convert",
    [lambda a: a.astype(np.float32), lambda a: a.astype(">f8"), np.asfortranarray, lambda a: np.repeat(a, 2, 0)[::2],
     lambda a: a.tolist(), lambda a: a[::-1].copy()[::-1], lambda a: torch.from_numpy(a).float().requires_grad_(),
     lambda a: torch.from_numpy(a).to(torch.float16)],
)  # fmt: skip
def test_any_real_type_and_layout(convert):
    rng = np.random.default_rng(3)
    x, theta = np.round(64 * rng.uniform(-1, 1, (20, 6))) / 64, np.round(64 * rng.uniform(-1, 1, 20)) / 64
    expected, found = solve(x, theta, EPSILON), solve(convert(x), convert(theta), EPSILON)
    np.testing.assert_array_equal(np.asarray(found.mask), expected.mask)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("m", [5, 20])
def test_no_problems(selection, m):
    assert solve(np.empty((0, m)), np.empty(0), 0.1, selection=selection).mask.shape == (0,)
    assert solve(torch.empty(0, m), torch.empty(0), 0.1, selection=selection).error.shape == (0,)


@pytest.mark.parametrize(
    ("x", "theta", "epsilon", "selection", "message"),
    [
        (np.ones((2, 3)), np.ones(3), 0.1, "smallest", r"\(n, m\)"),
        (np.ones(3), np.ones(3), 0.1, "smallest", r"\(n, m\)"),
        (np.ones((2, MAX_BASE_SET_SIZE + 1)), np.ones(2), 0.1, "smallest", "1 to 32 are possible"),
        (np.ones((2, 0)), np.ones(2), 0.1, "smallest", "are possible"),
        (np.ones((2, 3)), np.ones(2), 0.0, "smallest", "positive"),
        (np.ones((2, 3)), np.ones(2), float("nan"), "smallest", "positive"),
        (np.ones((2, 3)), np.ones(2), 0.1, "largest", "smallest, best"),
        (np.array([[1, 2, 3], [1, np.nan, 3]]), np.ones(2), 0.1, "best", r"values\[1, 1\] is nan"),
        (np.ones((2, 20)), np.array([1, np.inf]), 0.1, "smallest", r"targets\[1\] is inf"),
        (np.full((2, 3), 1e308), np.ones(2), 0.1, "best", "may overflow"),
        (np.full((2, 12), 0.0), np.full(2, 1.7e308), 0.1, "best", "may overflow"),
        (np.ones((2, 3)), np.ones(2), 10**400, "smallest", "positive"),
        (np.ones((2, 3)), np.ones(2), "small", "smallest", "positive"),
        (np.ones((2, 3), complex), np.ones(2), 0.1, "best", "real numbers"),
        (np.array([["a", "b"]]), np.ones(1), 0.1, "best", "real numbers"),
        (torch.ones(2, 3, dtype=torch.complex64), np.ones(2), 0.1, "best", "real numbers"),
        (torch.ones(2, 3).to_sparse(), torch.ones(2), 0.1, "best", "dense arrays of real numbers"),
        (torch.ones(2, 3, device="meta"), torch.ones(2), 0.1, "best", "dense arrays of real numbers"),
        (np.ma.masked_less(np.ones((2, 3)), 0), np.ones(2), 0.1, "best", "masked arrays"),
        (np.ones((2, 3)), np.ma.masked_less(np.ones(2), 2), 0.1, "best", "masked arrays"),
        ([[1, 2], [3]], np.ones(2), 0.1, "best", r"must be arrays, \(n, m\) and \(n,\)"),
        (np.ones((2, 3)), np.ones(2), 0.1, np.array(SELECTIONS), "is not known"),
    ],
)
def test_refuses_bad_problems(x, theta, epsilon, selection, message):
    with pytest.raises(LtxError, match=message):
        solve(x, theta, epsilon, selection=selection)


@pytest.mark.parametrize("made", [np.asarray, torch.as_tensor])
def test_members_are_those_of_all_values(made):
    found = solve(made(np.eye(32)), made(np.ones(32)), 0.1)
    assert (np.asarray(found.members(32)) == np.eye(32, dtype=bool)).all()
    for m in (31, 3, 0, -1, 33, 64):
        with pytest.raises(LtxError, match=f"m={m} is not that of the values"):
            found.members(m)
    with pytest.raises(LtxError, match="m 'a' must be a whole number"):
        found.members("a")


def test_tensors_that_are_negated_late():
    """PyTorch notes the sign of the imaginary part of a conjugate, and leaves the numbers as they are."""
    x = torch.tensor([[0.5, 0.25, -0.3]])
    for kind in (torch.float32, torch.float64):
        plain, given = x.to(kind), torch.complex(x.to(kind), -x.to(kind)).conj().imag
        assert given.is_neg()
        assert solve(given, given[:, 2], 1e-6).mask == solve(plain, plain[:, 2], 1e-6).mask == 4


@pytest.mark.parametrize("error", [None, RuntimeError("Failed to find C compiler.\nSet CC"), FileNotFoundError()])
def test_a_gpu_without_a_compiler(error, monkeypatch, caplog):
    gpu = pytest.importorskip("ltx.subset_sum.gpu")

    def launch(*_):
        if error:
            raise error

    monkeypatch.setattr(gpu, "transposed", launch)
    assert solver._kernels_run.__wrapped__("cpu") == (error is None)
    assert ("solved on the CPU" in caplog.text) == (error is not None)
