"""Tables 1 and 2: intervals, the paper's values, three formats."""

import io
import math
import re
from dataclasses import fields, replace

import pandas as pd
import pytest

from ltx.feedback import IMAGES, Feedback
from ltx.paths import reference_dir
from ltx.report import tables, tradeoff


def results(data="mnist", n=10):
    return pd.DataFrame(
        {
            "data": data, "network": "mnist_cnn", "activation": a, "construction": c, "kind": "explicit", "seed": s,
            "base_set_size": 15, "epsilon": 0.01, "selection": "smallest", "head": "keep", "examples": 10_000,
            "target_accuracy": 98.5, "ticket_accuracy": 98.4 + 0.01 * s, "target_parameters": 950,
            "ticket_parameters": 4000 + 10 * s,
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


def test_a_difference_that_rounds_to_zero_has_one_sign():
    alike = results().assign(ticket_accuracy=98.5 - 1e-6)
    assert "+0.00" in tables.accuracy_table(alike).markdown
    assert "-0.00" not in tables.accuracy_table(alike).markdown
    alike = deep_results(n=3).assign(ticket_accuracy=lambda rows: rows.target_accuracy - 1e-6)
    assert "+0.00" in tables.deep_accuracy_table(alike).markdown
    assert "-0.00" not in tables.deep_accuracy_table(alike).markdown


def test_targets_within_epsilon_of_zero_have_no_ratio():
    """All of whose parameters are."""
    shallow = tables.parameter_table(results(n=3).assign(target_parameters=0, ticket_parameters=0))
    deep = tables.deep_parameter_table(deep_results(n=3).assign(target_parameters=0, ticket_parameters=0))
    for table in (shallow, deep):
        assert "nan" not in table.markdown
        assert pd.read_csv(io.StringIO(table.csv)).ratio.isna().all()


def test_markdown_and_latex_hold_the_same_rows():
    table = tables.accuracy_table(results())
    assert "98.44 ± 0.02" in table.markdown or "98.45 ± 0.02" in table.markdown
    assert "98.72 ± 0.04" in table.markdown_page
    assert "10000 test images" in table.markdown_page
    assert r"98.72 $\pm$ 0.04" in table.latex
    assert table.latex.count(r"\\") == 1 + 4
    assert "±" not in table.latex


def test_a_row_is_of_the_same_images():
    """A seed that was evaluated on few images stays out of the mean of the others, and the table says so."""
    mixed = results(n=4)
    few = (mixed.activation == "relu") & (mixed.construction == "L+1") & (mixed.seed == 3)
    mixed.loc[few, ["examples", "ticket_accuracy", "target_accuracy"]] = (10, 50.0, 40.0)
    table = tables.accuracy_table(mixed)
    frame = pd.read_csv(io.StringIO(table.csv))
    row = frame[(frame.activation == "ReLU") & (frame.construction == "L+1")].iloc[0]
    assert (row.n, row.target) == (3, 98.5)
    assert row.ticket == pytest.approx(98.41)
    assert frame.images.tolist() == [10_000] * 4
    assert "images" not in table.shown
    assert "10000 test images" in table.note
    assert tables.left_out(mixed) == " Results on another number of images than most of their row, left out: 1."
    assert tables.left_out(results()) == ""

    of_few = mixed.assign(examples=mixed.examples.where(mixed.activation == "relu", 2000))
    table = tables.accuracy_table(of_few)
    frame = pd.read_csv(io.StringIO(table.csv))
    assert frame.images.tolist() == [10_000, 10_000, 2000, 2000]
    assert "10000 test images" not in table.note
    assert "| 2000 |" in " ".join(table.markdown.split())


def test_the_papers_values_stay_with_mnist():
    table = tables.accuracy_table(results(data="digits", n=1))
    assert "paper" not in table.csv
    assert "±" not in table.markdown


def test_the_papers_values_stay_with_a_kept_head():
    for table in (tables.accuracy_table, tables.parameter_table):
        assert "paper" in table(results()).csv
        assert "paper" not in table(results().assign(head="construct")).csv


@pytest.mark.slow
@pytest.mark.parametrize(
    "other",
    [{"base_set_size": 12}, {"epsilon": 0.05}, {"selection": "best"}, {"law": "normal"}, {"scaling": "layer_max"},
     {"pair_kernel": 3}, {"pair_stride": "first"}],
)  # fmt: skip
def test_the_papers_values_stay_with_its_subset_sums(other):
    """A ticket of other sums has other sizes and errors, with which no table of the paper can be compared."""
    usual = {"law": "uniform", "scaling": "unit", "pair_kernel": 1, "pair_stride": "second"}
    mine = results(n=3).assign(**usual)
    for make in (tables.accuracy_table, tables.parameter_table):
        assert "paper" in make(mine).csv
        assert "paper" not in make(mine.assign(**other)).csv
        partly = mine.assign(law=mine.law.where(mine.seed > 0))  # the first of an ltx that knew no law
        assert "paper" in make(partly).csv
    for make in (tables.deep_accuracy_table, tables.deep_parameter_table):
        assert pd.read_csv(io.StringIO(make(deep_results(n=3)).csv)).paper_target.notna().sum() == 2
        assert pd.read_csv(io.StringIO(make(deep_results(n=3).assign(**usual | other)).csv)).paper_target.isna().all()


def test_the_papers_values_stand_beside_feedback_of_any_m():
    chosen = {f"feedback_{field.name}": field.default for field in fields(Feedback)} | {"feedback_images": IMAGES}
    chosen |= {"selection": "feedback", "base_set_size": 9, "scaling": "layer_max"}
    mine = pd.concat([results(n=3), results(n=3).assign(**chosen)])
    frame = pd.read_csv(io.StringIO(tables.accuracy_table(mine).csv)).set_index(["activation", "construction"])
    assert frame.paper_target.notna().all()
    assert frame.paper_ticket.notna().sum() == 2
    for only in (mine, mine[mine.selection == "feedback"]):
        assert "paper" in tables.accuracy_table(only).csv
        for other in ({"epsilon": 0.1}, {"law": "normal"}):
            assert "paper" not in tables.accuracy_table(only.assign(**other)).csv


def test_a_csv_file_says_what_its_rows_were_made_with():
    mine = results(n=3).assign(target_training="quick, 12 x 3 epochs")
    said = {"images": 10_000, "training": "quick, 12 x 3 epochs", "m": 15, "epsilon": 0.01, "selection": "smallest",
            "head": "keep", "law": "uniform"}  # fmt: skip
    for table in (tables.accuracy_table(mine), tables.parameter_table(mine)):
        frame = pd.read_csv(io.StringIO(table.csv))
        assert frame[list(said)].drop_duplicates().to_dict("records") == [said]
    for table in (tables.deep_accuracy_table(deep_results(n=3)), tables.deep_parameter_table(deep_results(n=3))):
        frame = pd.read_csv(io.StringIO(table.csv)).set_index(["activation", "ticket"])
        assert frame.loc[("ReLU", "sampled"), "images"] == 10_000
        assert frame.loc[("ReLU", "explicit 2L"), ["images", "m", "head"]].tolist() == [2000, 15, "construct"]
    other = pd.read_csv(io.StringIO(tables.accuracy_table(results(n=3).assign(law="normal")).csv))
    assert set(other.law) == {"normal"}


def test_sampled_errors_stand_beside_tickets():
    sampled = results(n=3).query("construction == 'L+1'").assign(construction="sampled", kind="sampled")
    table = tables.accuracy_table(pd.concat([results(n=3), sampled.assign(law="uniform")]))
    frame = pd.read_csv(io.StringIO(table.csv)).set_index(["activation", "construction"])
    assert frame.loc["ReLU"].index.tolist() == ["sampled", "L+1", "2L"]
    assert math.isnan(frame.loc[("ReLU", "sampled"), "paper_ticket"])  # the paper's are of tickets on MNIST
    assert "Sampled: no ticket is built" in table.note
    assert "Sampled" not in tables.accuracy_table(results(n=3)).note
    assert "Explicit" not in tables.accuracy_table(sampled).note


def test_the_note_says_how_targets_were_trained():
    assert "training" not in tables.accuracy_table(results()).note
    trained = results()
    trained["target_training"] = "quick, 12 x 3 epochs"
    assert "test images; training of the targets: quick, 12 x 3 epochs." in tables.accuracy_table(trained).note
    for other, where in (("quick, 12 x 4 epochs", "3 epochs (ReLU); quick, 12 x 4 epochs (sigmoid)."),
                         (None, "3 epochs (ReLU); unknown (sigmoid).")):  # fmt: skip
        trained["target_training"] = trained.activation.map({"relu": "quick, 12 x 3 epochs", "sigmoid": other})
        assert f"training of the targets: quick, 12 x {where}" in tables.accuracy_table(trained).note


def test_activations_that_the_paper_has_not():
    others = results().replace({"activation": {"relu": "elu"}})
    for make in (tables.accuracy_table, tables.parameter_table):
        frame = pd.read_csv(io.StringIO(make(others).csv)).set_index("activation")
        assert frame.loc["ELU", "paper_target"].isna().all()
        assert frame.loc["sigmoid", "paper_target"].notna().all()
        assert frame.loc["ELU", "target"].tolist() == frame.loc["sigmoid", "target"].tolist()
        assert "| ELU | L+1 | – | – |" in " ".join(make(others).markdown.split())
    others = deep_results(n=3).replace({"activation": {"relu": "gelu"}})
    for make in (tables.deep_accuracy_table, tables.deep_parameter_table):
        frame = pd.read_csv(io.StringIO(make(others).csv)).set_index(["activation", "ticket"])
        assert math.isnan(frame.loc[("GELU", "sampled"), "paper_target"])
        assert not math.isnan(frame.loc[("sigmoid", "sampled"), "paper_target"])


def test_tickets_that_there_are_none_of_are_named_as_rows_are():
    plain = {
        "activation": "relu",
        "construction": "2L",
        "seed": 3,
        "base_set_size": 15,
        "scaling": "unit",
        "error": "no",
    }
    feedback = {f"feedback_{field.name}": field.default for field in fields(Feedback)} | {"feedback_images": IMAGES}
    other = {**plain, **feedback, "selection": "feedback", "base_set_size": 10, "feedback_bound": 0.01}
    assert tables.failure_note([{**plain, "selection": "smallest"}, other], 15) == (
        " Not constructed, and not in the means: ReLU, 2L, seed 3 (no)."
        " Not constructed, and not in the means: ReLU, 2L, feedback, m = 10, bound 0.01, seed 3 (no)."
    )


def feedback_results(penalty, seeds, examples=2000, ratio=10.0, lost=0.5, **changes):
    """Of ReLU in L+1: with the seed added to the accuracy."""
    usual = {f"feedback_{field.name}": field.default for field in fields(Feedback)} | {"feedback_images": IMAGES}
    row = deep_results(n=1).query("activation == 'relu' and construction == 'L+1'").iloc[0].to_dict() | usual
    row |= {"selection": "feedback", "feedback_penalty": penalty, "examples": examples, "scaling": "unit"} | changes
    sizes = {"target_accuracy": 80.0, "target_parameters": 100, "ticket_parameters": int(100 * ratio)}
    return pd.DataFrame(row | sizes | {"seed": s, "ticket_accuracy": 80.0 - lost + s} for s in seeds)


def test_variants_of_few_seeds_are_in_the_tables_where_there_are_no_others():
    usual = Feedback().penalty
    table = tables.deep_accuracy_table(feedback_results(1e-6, [0]))
    assert "λ = 1e-06" in table.markdown
    many = pd.concat([feedback_results(usual, range(3)), feedback_results(1e-6, [0, 1])])
    assert "λ" not in tables.deep_accuracy_table(many).markdown
    assert "λ = 1e-06" in tables.deep_accuracy_table(pd.concat([many, feedback_results(1e-6, [2])])).markdown
    other = pd.concat([many, feedback_results(1e-6, [0], activation="tanh")])
    assert [
        ("tanh" in row, "ReLU" in row) for row in tables.deep_accuracy_table(other).markdown.split("\n") if "λ" in row
    ] == [(True, False)]


def test_the_figure_of_the_trade_off_joins_tickets_that_differ_in_lambda_alone():
    shown = pd.concat(
        [
            deep_results(n=4),
            feedback_results(1e-6, range(3), ratio=10, lost=2),
            feedback_results(1e-8, range(3), ratio=20, lost=1),
            feedback_results(1e-8, [7], examples=500, ratio=99, lost=9),  # another seed on fewer images
            feedback_results(1e-6, [0], ratio=30, lost=3, feedback_sweeps=1),
        ]
    )
    figure = tradeoff.figure(shown)
    relu, sigmoid = figure.axes
    assert (relu.get_title("left"), sigmoid.get_title("left")) == ("ReLU", "sigmoid")
    lines = {bars.get_label(): bars.lines[0].get_xydata().tolist() for bars in relu.containers}
    assert set(lines) == {"sampled", "L+1, smallest", "2L, smallest", "L+1, feedback", "L+1, feedback, sweeps = 1"}
    assert lines["L+1, feedback"] == [[10, -1], [20, 0]]  # means over seeds 0 to 2
    assert lines["L+1, feedback, sweeps = 1"] == [[30, -3]]
    ratio, lost = lines["sampled"][0]
    assert (ratio, lost) == pytest.approx((3_900_001.5 / 116_094, 61.5 - 72.64))
    (bars,) = (bars for bars in relu.containers if bars.get_label() == "L+1, feedback")
    for (_, low), (_, high) in bars.lines[2][0].get_segments():
        assert high - low == pytest.approx(2 * 1.96 / 3**0.5)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(lines)
    assert [bars.get_label() for bars in sigmoid.containers] == ["sampled", "L+1, smallest", "2L, smallest"]
    low, high = relu.get_ylim()
    assert low < -90
    assert high > 0


def deep_results(n=50, examples=10_000):
    rows = []
    for activation in ("relu", "sigmoid"):
        for construction, seeds in (("sampled", range(n)), ("L+1", range(3)), ("2L", range(3))):
            for s in seeds:
                explicit = construction != "sampled"
                rows.append(
                    {
                        "data": "cifar10", "network": "resnet22", "activation": activation,
                        "construction": construction, "kind": "explicit" if explicit else "sampled", "seed": s,
                        "base_set_size": 15, "epsilon": 0.01, "selection": "smallest", "head": "construct",
                        "batch_norm": "keep", "examples": 2000 if explicit else examples, "target_accuracy": 72.64,
                        "ticket_accuracy": 60.0 + s, "agreement": 90.0,
                        "target_parameters": 117_226 if explicit else 116_094,
                        "ticket_parameters": 3_900_000 + s, "source_parameters": 141e6 if explicit else None,
                        "target_training": "quick, 12 x 3 epochs",
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)


def test_table_3_tells_sampled_from_explicit_and_takes_the_best_half():
    table = tables.deep_accuracy_table(deep_results())
    frame = pd.read_csv(io.StringIO(table.csv)).set_index(["activation", "ticket"])
    row = frame.loc[("sigmoid", "sampled")]
    assert (row.paper_target, row.paper_ticket, row.paper_ticket_ci95, row.paper_ticket_best_half) == (
        72.66,
        69,
        2,
        73.2,
    )
    assert row["mean"] == pytest.approx(60 + 24.5)
    assert row.target == pytest.approx(72.64)
    assert row.difference == pytest.approx(60 + 24.5 - 72.64)
    assert row.best_half == pytest.approx(60 + 37)  # 25 to 49
    assert row.best_half_ci95 == pytest.approx(1.96 * pd.Series(range(25, 50)).std() / 5)
    assert (row.n, row.images) == (50, 10_000)
    for kind in ("explicit L+1", "explicit 2L"):
        row = frame.loc[("ReLU", kind)]
        assert math.isnan(row.paper_ticket)  # the paper built no ticket
        assert (row.n, row.images, row["mean"]) == (3, 2000, 61.0)
    assert "Sampled: no ticket is built" in table.note
    assert "quick, 12 x 3 epochs" in table.markdown


def test_a_row_of_table_3_is_of_one_set_of_images():
    mixed = pd.concat([deep_results(n=10), deep_results(n=3, examples=500)])
    frame = pd.read_csv(io.StringIO(tables.deep_accuracy_table(mixed).csv)).set_index(["activation", "ticket"])
    assert (frame.loc[("ReLU", "sampled")].n, frame.loc[("ReLU", "sampled")].images) == (10, 10_000)


def test_table_4_has_the_papers_ratio():
    frame = pd.read_csv(io.StringIO(tables.deep_parameter_table(deep_results()).csv)).set_index(
        ["activation", "ticket"]
    )
    row = frame.loc[("sigmoid", "sampled")]
    assert (row.paper_target, row.paper_ticket) == (116_048, 3_934_621)
    assert row.paper_ratio == pytest.approx(33.905, abs=1e-3)
    assert row.ratio == pytest.approx(3_900_024.5 / 116_094)
    assert math.isnan(row.source)
    assert frame.loc[("sigmoid", "explicit 2L")].source == 141e6


def test_signs_of_latex_are_written_out():
    failure = {"activation": "relu", "construction": "2L", "selection": "smallest", "seed": 3, "base_set_size": 15,
               "error": "use scaling=layer_max & m_2 # 1 < 2 {~^\\}"}  # fmt: skip
    table = tables.accuracy_table(results().assign(activation="leaky_relu,tanh"))
    text = replace(table, note=tables.failure_note([failure], 15)).latex
    assert r"leaky\_relu,tanh & 2L & " in text
    assert r"use scaling=layer\_max \& m\_2 \# 1 $<$ 2 \{\textasciitilde{}\textasciicircum{}\textbackslash{}\}" in text
    kept = [*(reference_dir() / "tables").glob("*.tex")]
    assert kept
    for page in [text, *(file.read_text() for file in kept)]:
        assert not re.search(r"(?<!\\)[_#%~^±–λ≤]", page.partition("\\begin{table}")[2])


def test_tables_of_resnet22_on_other_data():
    other = deep_results().assign(data="digits")
    for table in (tables.deep_accuracy_table(other), tables.deep_parameter_table(other)):
        assert table.title.endswith("of ResNet-22 on digits.")
        assert "Fewer than all images are a fixed random subset" in table.note
        assert "| 72.7" not in table.markdown
        assert pd.read_csv(io.StringIO(table.csv)).filter(like="paper_").isna().all(axis=None)


def test_the_papers_values_stay_with_a_constructed_head_of_resnet22():
    kept = deep_results().assign(head="keep")
    for table, column in ((tables.deep_accuracy_table, "paper_target"), (tables.deep_parameter_table, "paper_ticket")):
        assert pd.read_csv(io.StringIO(table(deep_results()).csv))[column].notna().sum() == 2
        assert pd.read_csv(io.StringIO(table(kept).csv))[column].isna().all()


def test_a_note_does_not_say_what_older_results_do_not():
    """Results of an earlier ltx have no law; beside newer ones pandas makes that NaN."""
    mixed = deep_results().assign(law="uniform", kind="explicit")
    mixed.loc[mixed.index[0], "law"] = float("nan")
    assert "law" not in tables.deep_accuracy_table(mixed).note
    assert "law: normal" in tables.deep_accuracy_table(mixed.assign(law="normal")).note
