"""Statistics of random subset-sum problems; the commands and other solvers around them."""

import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ltx.errors import LtxError
from ltx.subset_sum import baselines, sample, solve, statistics, summarise
from ltx.subset_sum.statistics import LAWS, draw, wilson_interval
from ltx.tasks import bench
from ltx.tasks.subset_sum import constant_of, flat, summary


@pytest.mark.parametrize("law", list(LAWS))
def test_problems_are_a_function_of_seed_and_index(law, monkeypatch):
    values, targets = draw(law, 7, 0, 50, seed=3)
    part, part_targets = draw(law, 7, 20, 10, seed=3)
    assert torch.equal(values[20:30], part)
    assert torch.equal(targets[20:30], part_targets)
    assert not torch.equal(values, draw(law, 7, 0, 50, seed=4)[0])
    assert torch.equal(values[:, :5], draw(law, 5, 0, 50, seed=3)[0])
    assert len(values.unique()) == values.numel()
    whole = sample(law, 7, 0.01, problems=50, seed=3)
    monkeypatch.setattr(statistics, "CHUNK", 8)
    np.testing.assert_array_equal(whole.error, sample(law, 7, 0.01, problems=50, seed=3).error)


@pytest.mark.parametrize(
    ("law", "variance", "fourth"),
    [("uniform", 1 / 3, 1 / 5), ("product", 1 / 9, 1 / 25), ("normal", 1, 3), ("normal_product", 1, 9)],
)
def test_moments_of_the_laws(law, variance, fourth):
    values, targets = draw(law, 10, 0, 40_000, seed=0)
    assert values.mean().abs() < 0.01
    assert math.isclose(float(values.square().mean()), variance, rel_tol=0.02)
    assert math.isclose(float((values**4).mean()), fourth, rel_tol=0.05)
    assert math.isclose(float(targets.square().mean()), 1 / 3, rel_tol=0.02)
    assert abs(np.corrcoef(values[:, 0], targets)[0, 1]) < 0.03


@pytest.mark.gpu
@pytest.mark.parametrize("law", list(LAWS))
def test_problems_are_the_same_on_a_gpu(law):
    for here, there in zip(draw(law, 9, 5, 100, seed=1), draw(law, 9, 5, 100, seed=1, device="cuda"), strict=True):
        assert torch.equal(here, there.cpu())


@pytest.mark.parametrize("selection", ["smallest", "best"])
def test_summary_is_that_of_the_solutions(selection):
    drawn = sample("uniform", 8, 0.02, selection=selection, problems=500, seed=1)
    found = solve(*draw("uniform", 8, 0, 500, seed=1), 0.02, selection=selection)
    s, solved = summarise(drawn), (found.error <= 0.02).numpy()
    assert s.failures == (~solved).sum() == 500 - sum(s.size_counts) == sum(s.failed_size_counts)
    assert math.isclose(s.mean_size_all, found.size.double().mean())
    assert math.isclose(s.mean_error, found.error.mean())
    assert math.isclose(s.mean_size, found.size.numpy()[solved].mean())
    assert s.constant == 8 / -math.log(min(0.02, s.failures / 500))
    low, high = s.mean_error_interval
    assert math.isclose(high - low, 2 * 1.96 * found.error.std() / math.sqrt(500), rel_tol=1e-9)


def test_epsilon_is_a_number_of_any_type():
    for epsilon in ("0.01", np.float32(0.25), torch.tensor(0.5)):
        assert summarise(sample("uniform", 4, epsilon, problems=10)).epsilon == float(epsilon)


def test_summary_without_failures_and_without_solutions():
    certain, hopeless = (summarise(sample("uniform", 6, e, problems=20)) for e in (1.5, 1e-12))
    assert (certain.failures, certain.constant) == (0, None)
    assert (certain.mean_size, certain.mean_size_interval) == (0, (0, 0))
    assert hopeless.failure_share == 1
    assert hopeless.mean_size is hopeless.mean_size_interval is None
    assert hopeless.constant == 6 / -math.log(1e-12)
    beyond = summarise(sample("uniform", 1, 1.0, theta=100.0, problems=20))  # no C, however large, says anything
    assert (beyond.failure_share, beyond.constant, beyond.constant_interval) == (1, None, None)


@pytest.mark.parametrize(
    ("m", "problems", "seed", "known"), [(12, 60, 2, ""), (15, 400, 0, "about"), (15, 4000, 0, "="), (12, 4000, 0, ">")]
)
def test_what_is_known_of_the_constant_of_few_problems(m, problems, seed, known):
    """No upper end, where more than epsilon may fail: the corollary may need a larger one."""
    s = summarise(sample("uniform", m, 0.01, problems=problems, seed=seed))
    assert (s.constant_interval is None) == (s.failure_share_interval[1] > 0.01)
    assert constant_of(flat(asdict(s))).split(" ")[0] == known
    line = {**asdict(s), "seconds": 0.0}
    assert ("C is unknown, of so few problems" in summary(line)) == (known == "")


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_share(hits_and_n):
    hits, n = hits_and_n
    low, high = wilson_interval(hits, n)
    assert 0 <= low <= hits / n <= high <= 1
    if 0 < hits < n:  # its ends are the shares whose normal interval just reaches what was seen
        for end in (low, high):
            assert math.isclose(abs(hits / n - end), 1.96 * math.sqrt(end * (1 - end) / n), rel_tol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 1.5}, "seed 1.5 must be a whole number"),
        ({"seed": "3"}, "seed '3' must be a whole number"),
        ({"seed": -1}, "seed -1 must lie between 0 and"),
        ({"seed": 2**64}, "seed 18446744073709551616 must lie between 0 and"),
        ({"m": -1}, "m=-1: must lie between 1 and 32"),
        ({"m": 5.0}, "m 5.0 must be a whole number"),
        ({"problems": 10.0}, "problems 10.0 must be a whole number"),
        ({"theta": math.nan}, "theta=nan: must be a number"),
        ({"theta": "a"}, "theta 'a' must be a number"),
    ],
)
def test_arguments_without_meaning(arguments, message):
    with pytest.raises(LtxError, match=message):
        sample("uniform", epsilon=0.1, **{"m": 5, "problems": 10, **arguments})


def test_too_many_problems_are_refused():
    with pytest.raises(LtxError, match="between 2 and"):
        sample("uniform", 5, 0.01, problems=10**9)
    with pytest.raises(LtxError, match="uniform, product, normal"):
        sample("cauchy", 5, 0.01)


def test_a_single_target_can_be_harder_than_random_ones():
    """theta = 1 fails more often than targets that are uniform on [-1, 1], theta = 0 never."""
    random, hard, easy = (
        summarise(sample("product", 10, 0.01, problems=4000, theta=t)).failure_share for t in (None, 1.0, 0.0)
    )
    assert 0 == easy < random < hard / 2


def test_subset_sum_command(ltx, tmp_path):
    status, out, err = ltx("subset-sum", "--multirun", "m=4,6", "problems=300", "device=cpu")
    assert status == 0
    files = out.splitlines()
    assert len(files) == 2
    first = json.loads(Path(files[0]).read_text())
    assert (first["base_set_size"], first["problems"], sum(first["size_counts"])) == (4, 300, 300 - first["failures"])
    assert "uniform, smallest, m=6" in err
    line = pd.read_csv(files[0].replace(".json", ".csv"))
    assert line.failure_share[0] == first["failure_share"]
    assert line.size_2[0] == first["size_counts"][2]
    both = pd.read_csv(tmp_path / "subset_sum" / "statistics.csv")
    assert both.base_set_size.tolist() == [4, 6]
    status, out, err = ltx("subset-sum", "m=6", "problems=300", "device=cpu")
    assert (status, out.strip(), "there already" in err) == (0, files[1], True)


def test_subset_sum_command_replaces_a_file_that_is_cut_short(ltx, tmp_path):
    _, out, _ = ltx("subset-sum", "m=4", "problems=50")
    for damaged in ('{"law": ', '{"size_counts": [], "seconds": 1}'):
        Path(out.strip()).write_text(damaged)
        status, _, err = ltx("subset-sum", "m=4", "problems=50")
        assert (status, "there already" in err) == (0, False)
        assert json.loads(Path(out.strip()).read_text())["problems"] == 50


def test_subset_sum_command_where_all_fail(ltx, tmp_path):
    status, out, err = ltx("subset-sum", "theta=100", "epsilon=5", "problems=100")
    assert status == 0, err
    assert json.loads(Path(out.strip()).read_text())["constant_interval"] is None
    assert "C is none, where all fail" in err


def test_subset_sum_command_measures_again_what_is_not_its_own(ltx, tmp_path):
    three, four = (Path(ltx("subset-sum", "m=4", f"problems={n}")[1].strip()) for n in (300, 400))
    four.write_bytes(three.read_bytes())
    status, _, err = ltx("subset-sum", "m=4", "problems=400")
    assert (status, "there already" in err) == (0, False)
    assert json.loads(four.read_text())["problems"] == 400
    four.with_suffix(".csv").unlink()
    assert "there already" not in ltx("subset-sum", "m=4", "problems=400")[2]
    assert four.with_suffix(".csv").is_file()


@pytest.mark.parametrize("selection", ["smallest", "best"])
@pytest.mark.parametrize("rival", ["python_search", "cp_sat"])
def test_baselines_agree_with_the_engine(rival, selection):
    if rival == "cp_sat":
        pytest.importorskip("ortools")
    values, targets = (torch.round(t * baselines.GRID) / baselines.GRID for t in draw("uniform", 7, 0, 25, seed=0))
    targets[:5] *= 4  # out of reach
    found = solve(values, targets, 0.01, selection=selection)
    for n in range(25):
        size, error = getattr(baselines, rival)(values[n].numpy(), float(targets[n]), 0.01, selection)
        assert size == found.size[n]
        assert math.isclose(error, found.error[n], abs_tol=1e-12)


def test_cp_sat_refuses_numbers_off_its_grid():
    pytest.importorskip("ortools")
    with pytest.raises(LtxError, match="multiples of 2"):
        baselines.cp_sat(np.array([0.1]), 0.5, 0.01, "best")


def test_bench_command(ltx, monkeypatch):
    monkeypatch.setattr(bench, "SIZES", (4, 6))
    begin = time.perf_counter()
    status, out, _ = ltx("bench", "seconds=0.01", "device=cpu")
    took = time.perf_counter() - begin
    assert status == 0
    result = json.loads(Path(out.splitlines()[-1]).read_text())
    assert [(row["selection"], row["m"]) for row in result["rows"]] == [
        ("smallest", 4), ("smallest", 6), ("best", 4), ("best", 6),
    ]  # fmt: skip
    for row in result["rows"]:
        assert row["python_same"] == row["python_problems"] > 1
        assert 0 < row["problems"] / row["per_second"] < took
        assert 0 < row["python_problems"] / row["python_per_second"] < took
        assert row["python_ratio"] == row["per_second"] / row["python_per_second"]
    assert "| smallest    | 4" in out
    assert result["processor"]
