"""Artefacts of other settings have other paths; those of the same settings have the same, on any machine."""

import pytest
from conftest import settings

from ltx import paths

EITHER = ["m=12", "epsilon=0.02", "seed=1", "head=construct", "target.input_range=[0,1]", "target.input_range=[0,2]"]
BUILT = [
    *EITHER, "construction=2L", "scaling=layer_max", "batch_norm=fold", "pair.kernel=3", "pair.stride=first",
    "law=normal", "activation=tanh", "target=digits", "target.module=a.b:small", "target.module=a.b:small data=digits",
]  # fmt: skip
SAMPLED = [
    "construction=sampled",
    *(f"construction=sampled {given}" for given in (*EITHER, "selection=best", "law=normal")),
]
FEEDBACK = [
    "samples=5", "images=5", "sweeps=5", "refine=5", "max_subset=5", "penalty=1e-7", "bound=0.1", "bound=0.2",
    "reject=null", "reject=3", "spread=0", "spread=0.2", "order=largest",
]  # fmt: skip
CHOSEN = ["selection=best", "selection=feedback", *(f"selection=feedback feedback.{given}" for given in FEEDBACK)]
BOUNDS = ["bounds.error=1", "bounds.delta=0.1", "bounds.form=theorem", "bounds.single=4", "bounds.product=8",
          "bounds.product=4"]  # fmt: skip
SUMS = ["law=product", "selection=best", "m=12", "epsilon=0.02", "problems=50", "seed=1", "theta=0", "theta=0.5"]
WITHOUT = ["device=cpu", "force=true", "use_reference=false", "limit=5", "compile=true", "data.root=x", "seconds=1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "different"),
    [
        (lambda s: paths.ticket_file(s, "0123456789"), [*BUILT, *SAMPLED, *CHOSEN]),
        (lambda s: paths.bounds_file(s, "0123456789"), [*BUILT, *BOUNDS]),
        (paths.statistics_file, SUMS),
        (paths.target_file, ["target=digits", "activation=tanh", "protocol=smoke", "target.seed=1"]),
    ],
    ids=["ticket", "bounds", "statistics", "target"],
)
def test_other_settings_other_paths(path, different):
    plain = path(settings())
    found = [plain, *(path(settings(*given.split())) for given in different)]
    assert len(set(found)) == len(found), found
    assert {path(settings(given)) for given in WITHOUT} == {plain}
    assert path(settings("output_dir=else/where")).parts[:2] == ("else", "where")


def test_another_target_another_ticket():
    assert paths.ticket_file(settings(), "0123456789") != paths.ticket_file(settings(), "1123456789")
