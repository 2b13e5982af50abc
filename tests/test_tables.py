"""Tables 1 and 2: intervals, the paper's values, three formats."""

import io
import math

import pandas as pd
import pytest

from ltx.report import tables


def results(data="mnist", n=10):
    return pd.DataFrame(
        {
            "data": data, "network": "mnist_cnn", "activation": a, "construction": c, "seed": s, "base_set_size": 15,
            "epsilon": 0.01, "selection": "smallest", "head": "keep", "examples": 10_000, "target_accuracy": 98.5,
            "ticket_accuracy": 98.4 + 0.01 * s, "target_parameters": 950, "ticket_parameters": 4000 + 10 * s,
        }
        for a in ("relu", "sigmoid") for c in ("L+1", "2L") for s in range(n)
    )  # fmt: skip


def test_interval():
    mean, half = tables.interval(pd.Series([1.0, 2.0, 3.0, 4.0]))
    assert mean == 2.5
    assert half == pytest.approx(1.96 * 1.2909944487 / 2)
    assert math.isnan(tables.interval(pd.Series([1.0]))[1])


def test_numbers_stand_beside_the_papers():
    table = tables.accuracy_table(results())
    frame = pd.read_csv(io.StringIO(table.csv))
    row = frame[(frame.activation == "ReLU") & (frame.construction == "L+1")].iloc[0]
    assert (row.paper_target, row.paper_ticket, row.paper_ci95) == (98.8, 98.72, 0.04)
    assert row.ticket == pytest.approx(98.445)
    assert row.difference == pytest.approx(-0.055)
    assert row.n == 10
    assert frame[frame.construction == "2L"].paper_ticket.isna().all()  # the paper reports L+1
    row = pd.read_csv(io.StringIO(tables.parameter_table(results()).csv)).iloc[0]
    assert (row.paper_target, row.paper_ticket) == (945, 4386)
    assert row.ratio == pytest.approx(4045 / 950)


def test_markdown_and_latex_hold_the_same_rows():
    table = tables.accuracy_table(results())
    assert "98.44 ± 0.02" in table.markdown or "98.45 ± 0.02" in table.markdown
    assert "98.72 ± 0.04" in table.markdown_page
    assert "10000 test images" in table.markdown_page
    assert r"98.72 $\pm$ 0.04" in table.latex
    assert table.latex.count(r"\\") == 1 + 4
    assert "±" not in table.latex


def test_the_papers_values_stay_with_mnist():
    table = tables.accuracy_table(results(data="digits", n=1))
    assert "paper" not in table.csv
    assert "±" not in table.markdown
