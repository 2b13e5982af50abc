"""Figures 3 and 4, failures against m, deviations: what is drawn is what was measured."""

import math
import re
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ltx.config import Settings
from ltx.report import deviation
from ltx.report import figures as drawing
from ltx.report.figures import FailureCurve, failure_figure, panels, statistics_figure
from ltx.subset_sum import sample, summarise
from ltx.subset_sum.statistics import Sample, constant, wilson_interval
from ltx.tasks import figures


def test_fitted_constant_is_the_least_that_the_corollary_allows():
    """Shares exp(-(m - 3) / 1.5) reach epsilon at m = 3 + 1.5 log(1 / epsilon)."""
    sizes, n = tuple(range(4, 21)), 10**9
    curve = FailureCurve("uniform", 0.01, n, sizes, tuple(int(n * math.exp(-(m - 3) / 1.5)) for m in sizes))
    assert math.isclose(curve.crossing, 3 + 1.5 * math.log(100), rel_tol=1e-3)
    assert math.isclose(curve.fitted_constant, (3 + 1.5 * math.log(100)) / math.log(100), rel_tol=1e-3)
    assert math.isclose(curve.decay, 1.5, rel_tol=1e-3)
    for m, share in zip(sizes, curve.shares, strict=True):  # no point contradicts it
        assert constant(m, 0.01, share) <= curve.fitted_constant + 1e-9
    early = FailureCurve("uniform", 0.01, n, sizes[:4], curve.failures[:4])
    assert early.crossing is None
    assert early.fitted_constant < curve.fitted_constant


@pytest.mark.parametrize("failures", [(11, 11), (11, 12), (20, 5), (13, 10, 11)])
def test_a_curve_that_does_not_fall_has_no_decay(failures):
    sizes = tuple(range(11, 11 + len(failures)))
    curve = FailureCurve("uniform", 0.1, 1500, sizes, failures)
    assert math.isnan(curve.decay) == (failures != (13, 10, 11))


def test_a_curve_that_falls_to_no_failure_at_all_shows_no_crossing():
    curve = FailureCurve("uniform", 0.001, 400, (10, 11, 12), (3, 1, 0))
    assert curve.crossing is None
    assert curve.fitted_constant == constant(11, 0.001, 0.0025)
    assert math.isnan(FailureCurve("uniform", 0.1, 10, (6, 7), (0, 0)).fitted_constant)


@pytest.mark.slow
def test_figures_command(ltx, monkeypatch):
    monkeypatch.setattr(figures, "FAILURE_SIZES", range(4, 8))
    status, out, err = ltx("figures", "m=6", "problems=400", "device=cpu")
    assert status == 0
    folder = Path(out.splitlines()[-1])
    for name in ("figure3", "figure4", "failures"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        xml.etree.ElementTree.parse(folder / f"{name}.svg")
    table = pd.read_csv(folder / "failures.csv")
    point = table[(table.law == "uniform") & (table.epsilon == 0.01) & (table.base_set_size == 6)]
    assert point.failures.item() == summarise(sample("uniform", 6, 0.01, problems=400)).failures
    for line in table.drop_duplicates(["law", "epsilon"]).itertuples():
        sign, fall = (">=" if math.isnan(line.crossing) else "="), f"exp(-m / {line.decay:.2f})"
        assert f"{line.law}, epsilon={line.epsilon:g}: fitted C {sign} {line.fitted_constant:.2f}" in err
        assert math.isnan(line.decay) or fall in err
    assert err.count("fall like exp") == table.drop_duplicates(["law", "epsilon"]).decay.count()
    before = {path: path.read_bytes() for path in folder.glob("*.svg")}
    assert "there already" in ltx("figures", "m=6", "problems=400", "device=cpu")[2]
    (folder / "figure3.svg").unlink()
    assert ltx("figures", "m=6", "problems=400", "device=cpu")[0] == 0
    assert {path: path.read_bytes() for path in folder.glob("*.svg")} == before
    drawn = []
    monkeypatch.setattr(drawing, "save", lambda figure, path: drawn.append(path.name))
    for name, share in (("figure3.csv", 0), ("figure3.csv", 0.5), ("figure4.png", 0.5), ("failures.svg", 0.5)):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: int(share * len(whole))])
        assert "there already" not in ltx("figures", "m=6", "problems=400", "device=cpu")[2], name
        assert drawn == ["figure3", "figure4", "failures"], name
        drawn.clear()
        (folder / name).write_bytes(whole)


def test_figures_of_a_normal_source(ltx, monkeypatch):
    monkeypatch.setattr(figures, "FAILURE_SIZES", range(4, 6))
    drawn = {}
    monkeypatch.setattr(drawing, "save", lambda figure, path: drawn.update({path.name: figure}))
    for law, product, end in (("uniform", "product", ""), ("normal", "normal_product", "-normal")):
        status, out, _ = ltx("figures", f"law={law}", "m=5", "problems=200", "device=cpu")
        assert status == 0
        for name, its in ((f"figure3{end}", law), (f"figure4{end}", product)):
            table = pd.read_csv(Path(out.splitlines()[-1]) / f"{name}.csv")
            assert table.law.tolist() == [its, its]
            for line in table.itertuples():
                own = summarise(sample(its, 5, 0.01, selection=line.selection, problems=200))
                assert math.isclose(line.mean_error, own.mean_error, rel_tol=1e-12)  # as older pandas reads it
            assert drawing.LAW_NAMES[its] in drawn[name].get_suptitle()
        panels = drawn[f"failures{end}"].axes
        assert [axes.get_title("left") for axes in panels] == [drawing.LAW_NAMES[law], drawing.LAW_NAMES[product]]
    assert len(drawn) == 6


@pytest.mark.slow
def test_figures_of_problems_that_all_fail_or_none(ltx, monkeypatch):
    monkeypatch.setattr(drawing, "save", lambda figure, path: figure.draw_without_rendering())
    for epsilon, sizes in (("1e-9", range(1, 3)), ("3", range(12, 14))):
        monkeypatch.setattr(figures, "FAILURE_SIZES", sizes)
        status, _, err = ltx("figures", "m=2", "problems=2", f"epsilon={epsilon}", "device=cpu")
        assert (status, "nan" in err) == (0, False)
    assert "nothing fails" in err


def _heights(axes):
    return np.array([bar.get_height() for bar in axes.patches])


@pytest.mark.parametrize("epsilon", [0.01, 0.05])
def test_panels_show_every_problem(epsilon):
    best, smallest = (sample("uniform", 8, epsilon, selection=s, problems=3000, seed=2) for s in ("best", "smallest"))
    figure = statistics_figure(best, smallest)
    assert "3,000 subset-sum problems" in figure.get_suptitle()
    assert f"m = 8, target $\\theta \\sim U[-1, 1]$, ε = {epsilon:g}, seed 2" in figure.get_suptitle()
    for row, drawn in enumerate((best, smallest)):
        errors, sizes = figure.axes[2 * row : 2 * row + 2]
        assert math.isclose(_heights(errors).sum(), 1)
        edges = np.array([bar.get_x() for bar in errors.patches])
        assert np.abs(edges - epsilon).min() < 1e-9  # no bar is of both sides of epsilon
        assert math.isclose(_heights(errors)[edges < epsilon - 1e-9].sum(), drawn.solved.mean())
        assert errors.get_yscale() == "log"
        assert [line.get_xdata()[0] for line in errors.lines] == [epsilon]
        assert errors.get_ylim()[0] < 1 / 3000 < errors.get_ylim()[1]  # one problem can be seen
        statistics = summarise(drawn)
        assert f"{100 * statistics.failure_share:.2g} % beyond" in errors.get_title("right")
        solved, failed = _heights(sizes).reshape(2, 9)
        np.testing.assert_allclose(solved, np.array(statistics.size_counts) / 3000)
        np.testing.assert_allclose(failed, np.array(statistics.failed_size_counts) / 3000)
        assert f"mean {statistics.mean_size:.2f} within" in sizes.get_title("right")


def test_the_mean_error_of_a_panel_is_the_mean():
    statistics = summarise(drawn := sample("product", 8, 0.05, selection="best", problems=3000))
    title = statistics_figure(drawn, drawn).axes[0].get_title("right")
    shown = re.search(r"\((\S+) \\pm (\S+)\)\\cdot 10\^\{(-?\d+)\}", title)
    mean, half, exponent = map(float, shown.groups())
    assert 1 <= mean < 10
    low, high = statistics.mean_error_interval
    assert math.isclose(mean * 10**exponent, statistics.mean_error, abs_tol=0.005 * 10**exponent)
    assert math.isclose(half * 10**exponent, (high - low) / 2, abs_tol=0.005 * 10**exponent)


@pytest.mark.parametrize("end", [0.1186, 1.5, 1.99])
def test_the_largest_error_is_shown_too(end):
    """Sixty bars of end / 60 can end below end, in floating point."""
    drawn = Sample("uniform", 3, 5.0, "best", 0, None, np.array([0, 0.01, end]), np.ones(3, np.uint8))
    assert math.isclose(_heights(statistics_figure(drawn, drawn).axes[0]).sum(), 1)


def test_the_inset_shows_the_smallest_errors():
    drawn = sample("product", 15, 0.01, selection="best", problems=4000)
    (inset,) = statistics_figure(drawn, drawn).axes[0].child_axes
    close = inset.get_xlim()[1]
    assert close <= 0.01
    assert math.isclose(_heights(inset).sum(), share := np.mean(drawn.error <= close))
    assert f"{100 * share:.3g} %" in inset.get_title()
    even = Sample("uniform", 3, 0.2, "best", 0, None, np.linspace(0, 1, 99), np.ones(99, np.uint8))
    assert not statistics_figure(even, even).axes[0].child_axes  # it would show what the panel shows


def test_the_failure_figure_shows_shares_intervals_and_constants():
    curves = [
        FailureCurve("uniform", 0.1, 400, (4, 5, 6, 7), (200, 60, 10, 0)),
        FailureCurve("uniform", 0.01, 400, (4, 5, 6, 7), (390, 350, 300, 200)),
        FailureCurve("product", 0.1, 400, (4, 5, 6, 7), (0, 0, 0, 0)),
        FailureCurve("product", 0.01, 400, (4, 5, 6, 7), (399, 390, 380, 370)),
    ]
    uniform, product = failure_figure(curves).axes
    first, second = uniform.containers
    np.testing.assert_array_equal(first[0].get_xydata(), [[4, 0.5], [5, 0.15], [6, 0.025]])  # no zero on a log axis
    np.testing.assert_array_equal(second[0].get_ydata(), np.array([390, 350, 300, 200]) / 400)
    for (x, share), bar in zip(first[0].get_xydata(), first[2][0].get_segments(), strict=True):
        np.testing.assert_allclose(bar, [(x, low) for low in wilson_interval(round(400 * share), 400)])
    labels = [text.get_text() for text in uniform.get_legend().get_texts()]
    constants = [label for label in labels if label.startswith("ε")]
    assert constants == [
        f"ε = 0.1: C = {curves[0].fitted_constant:.2f}",
        f"ε = 0.01: C ≥ {curves[1].fitted_constant:.2f}",
    ]
    assert f"$e^{{-m/C}}$, fitted C = {curves[0].fitted_constant:.2f}" in labels
    assert [curves[0].crossing, 0.1] in [line.get_xydata()[0].tolist() for line in uniform.lines]
    (paper,) = (line for line in uniform.lines if "paper" in line.get_label())
    np.testing.assert_allclose(paper.get_ydata(), np.exp(-np.arange(4, 8) / 3))
    labels = [text.get_text() for text in product.get_legend().get_texts()]
    assert "ε = 0.1: nothing fails" in labels
    assert not any("fitted" in label for label in labels)  # no curve there crosses its epsilon
    assert product.get_yscale() == "log"


def test_the_table_of_failures_is_that_of_the_curves(monkeypatch):
    monkeypatch.setattr(figures, "FAILURE_SIZES", range(4, 7))
    curves = figures.failure_curves("product", Settings(problems=300, seed=3), "cpu")
    assert [c.epsilon for c in curves] == [0.1, 0.03, 0.01, 0.003, 0.001]  # "several epsilon"
    table = figures.failure_table(curves, 3)
    assert len(table) == 5 * 3
    for row in table.itertuples():
        own = summarise(sample(row.law, row.base_set_size, row.epsilon, problems=300, seed=3))
        assert row.failures == own.failures
        assert row.failure_share == own.failure_share
        assert (row.failure_share_interval_low, row.failure_share_interval_high) == own.failure_share_interval
        assert (row.problems, row.seed) == (300, 3)
    for _, rows in table.groupby("epsilon"):
        assert rows.fitted_constant.nunique() == 1


def test_the_figure_of_deviations_has_a_line_for_every_epsilon():
    table = pd.DataFrame(
        {"activation": "relu", "construction": "2L", "selection": "smallest", "base_set_size": 15, "epsilon": epsilon,
         "seed": 0, "position": position, "deviation": epsilon * position, "target_std": 1.0}
        for epsilon in (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003) for position in (1, 2)
    )  # fmt: skip
    (axes,) = deviation.figure(table).axes
    named = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    assert len(named) == 6
    assert len({line.get_marker() for line in named}) == 6


def test_the_figure_of_deviations_shows_geometric_means_over_seeds():
    row = {"activation": "tanh", "construction": "L+1", "base_set_size": 15, "epsilon": 0.01}
    table = pd.DataFrame(
        {**row, "selection": selection, "seed": seed, "position": position,
         "deviation": (seed + 1) * position * (10 if selection == "best" else 1), "target_std": 2.0 * position}
        for selection in ("best", "smallest") for seed in (0, 3) for position in (2, 1)
    )  # fmt: skip
    (axes,) = deviation.figure(table).axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    mean = (1 * 4) ** 0.5 / 2
    for selection, times in (("smallest", 1), ("best", 10)):
        line = lines[f"explicit L+1, {selection}, m = 15, ε = 0.01"]
        np.testing.assert_allclose(line.get_xydata(), [[1, times * mean], [2, times * mean]])
    assert lines["explicit L+1, smallest, m = 15, ε = 0.01"].get_linestyle() != line.get_linestyle()
    assert (axes.get_title("left"), axes.get_yscale()) == ("tanh", "log")
    assert axes.get_xlabel() == "activation, from the first to the last"
    assert axes.get_ylabel() == "rms deviation of a slot / std of the target"
    (legend,) = axes.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [name for name in lines if name.startswith("explicit")]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_every_column_of_panels_ends_with_its_axis(count):
    figure, drawn = panels(count, "across", "up")
    assert len(drawn) == count == len(figure.axes)
    figure.draw_without_rendering()
    labelled = [axes.get_xlabel() == "across" for axes in drawn]
    assert labelled == [n + 2 >= count for n in range(count)]
    numbered = [any(t.label1.get_visible() for t in axes.xaxis.get_major_ticks()) for axes in drawn]
    assert numbered == labelled
    assert [axes.get_ylabel() == "up" for axes in drawn] == [n % 2 == 0 for n in range(count)]
