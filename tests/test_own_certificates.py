"""`ltx certify` on networks of the user's own: the bound of feedback, and what float32 rounds."""

import json

import pytest

from ltx import data, theory
from ltx.graph import trace
from ltx.targets import imported


@pytest.mark.slow
@pytest.mark.parametrize("bound", [None, 0.05])
def test_a_certificate_with_feedback(own, ltx, tmp_path, bound):
    given = ["target=digits", f"target.module={own}:make", "head=construct", "m=20", "scaling=layer_max",
             "construction=2L", "selection=feedback", "feedback.images=16", "feedback.samples=100", "feedback.sweeps=1",
             *([] if bound is None else [f"feedback.bound={bound}", "feedback.max_subset=4"])]  # fmt: skip
    status, out, err = ltx("construct", *given)
    assert status == 0, err
    path = tmp_path / out.splitlines()[-1]
    for _ in range(2):  # certified, and there already
        status, out, err = ltx("certify", str(path), *given[:2], "certify.starts=0", "limit=16")
        assert status == 0, err
        assert ("its parameters have no bound" in out) == (bound is None)
    theorem = json.loads(path.with_name("certificate.json").read_text())["theorem"]
    if bound is None:
        assert theorem is None
        return
    graph = trace(imported(f"{own}:make"))
    assert theorem == theory.ticket_error(
        graph, dict.fromkeys(graph.layers, bound), dict.fromkeys(graph.layers, 4), construction="2L", head="construct",
        scaling="layer_max", input_range=data.dataset_spec("digits").input_range,
    )  # fmt: skip


@pytest.mark.slow
def test_what_float32_rounds_is_no_error_of_the_certificate(own, ltx, tmp_path):
    """Sums of some 20 differ by 3e-5 in float32; in float64 they lie within the bound, which is of exact arithmetic."""
    given = ["target=digits", f"target.module={own}:large", "construction=2L", "m=30", "epsilon=1e-7"]
    assert ltx("construct", *given)[0] == 0
    status, _, err = ltx("certify", *given, "certify.starts=40", "certify.steps=30")
    assert status == 0, err
    assert "in float32, which rounds," in err
    result = json.loads(next(tmp_path.glob("tickets/*/*/certificate.json")).read_text())
    assert all(max(row["measured"], row["ascent"]) <= row["certificate"] for row in result["outputs"])
    assert 0 < result["ascent"] < result["certificate"] < 1e-4
    assert "(largest error 0.000000)" not in ltx("verify", *given)[2]


@pytest.mark.slow
@pytest.mark.parametrize("batch_norm", ["keep", "fold"])
def test_a_tight_bound_is_of_the_rounded_target(own, batch_norm, ltx, tmp_path):
    """Outputs that hardly change have bounds without room for what float32 rounds of batch norm's parameters."""
    given = ["target=digits", f"target.module={own}:constant", "head=construct", "m=20", f"batch_norm={batch_norm}"]
    assert ltx("construct", *given)[0] == 0
    status, _, err = ltx("certify", *given, "certify.starts=2", "certify.steps=2")
    assert status == 0, err
    result = json.loads(next(tmp_path.glob("tickets/*/*/certificate.json")).read_text())
    for row in result["outputs"]:
        assert row["measured"] <= row["certificate"] < row["measured"] + 1e-6
