"""Ranges of settings: what lies at their ends serves, what lies just beyond does not."""

import pytest
import yaml
from conftest import composed, settings
from omegaconf import OmegaConf

from ltx import config
from ltx.errors import LtxError


@pytest.mark.parametrize(
    ("name", "served", "refused"),
    [
        ("m", ["1", "32"], ["0", "33"]),
        ("epsilon", ["1e-300", "5"], ["0", "-1", "nan", "inf", "-inf"]),
        ("problems", ["2", "100000000"], ["1", "100000001"]),
        ("theta", ["null", "1e100", "-1e100", "0"], ["1.1e100", "-1.1e100", "nan"]),
        ("seconds", ["1e-9", "1e9"], ["0", "-1", "nan", "inf"]),
        ("seed", ["0", f"{2**64 - 1}"], ["-1", f"{2**64}"]),
        ("limit", ["null", "1"], ["0", "-1"]),
        ("output_dir", ["x"], ["''", "' '"]),
        ("target.input_range", ["null", "[0,1e-9]", "[-5,3]"], ["[0,0]", "[1,0]", "[0]", "[0,1,2]", "[0,inf]",
                                                              "[-inf,0]", "[nan,1]"]),
        ("target.density", ["1e-9", "1"], ["0", "1.001", "-1", "nan"]),
        ("target.densities.relu", ["1"], ["0", "1.001"]),
        ("target.batch_size", ["1"], ["0"]),
        ("target.learning_rate", ["1e-9", "10"], ["0", "-1", "nan", "inf"]),
        ("target.weight_decay", ["0", "1"], ["-1e-9", "nan", "inf"]),
        ("target.bound", ["null", "1e-9", "9e37"], ["0", "-1", "1.1e38", "nan"]),
        ("target.crop", ["0", "16"], ["-1", "17"]),
        ("target.seed", ["0", f"{2**32 - 1}"], ["-1", f"{2**32}"]),
        ("protocol.rounds", ["1"], ["0"]),
        ("protocol.epochs", ["1"], ["0"]),
        ("pair.kernel", ["1", "3"], ["-1", "0", "2"]),
        ("bounds.error", ["1e-9", "1e9"], ["0", "nan", "inf"]),
        ("bounds.single", ["null", "1e-9", "10000"], ["0", "10001", "nan"]),
        ("bounds.product", ["null", "1e-9", "10000"], ["0", "10001", "nan"]),
        ("bounds.delta", ["1e-9", "0.999"], ["0", "1", "nan"]),
        ("certify.starts", ["0", "1000000"], ["-1", "1000001"]),
        ("certify.steps", ["1", "100000"], ["0", "100001"]),
        ("feedback.samples", ["1", "1000000"], ["0"]),
        ("feedback.images", ["1"], ["0"]),
        ("feedback.sweeps", ["1", "100"], ["0", "101"]),
        ("feedback.refine", ["0", "100"], ["-1", "101"]),
        ("feedback.max_subset", ["1", "7"], ["0", "8"]),
        ("feedback.penalty", ["0", "1"], ["-1e-9", "nan", "inf"]),
        ("feedback.bound", ["null", "1e-9"], ["0", "nan", "inf"]),
        ("feedback.reject", ["null", "1"], ["0.999", "nan", "inf"]),
        ("feedback.spread", ["0", "1"], ["-1e-9", "1.001", "nan"]),
        ("feedback.order", ["random", "largest"], ["smallest"]),
    ],
)  # fmt: skip
def test_the_ends_of_a_range(name, served, refused):
    given = composed(*(["selection=feedback"] if name.startswith("feedback") else []))
    named = "target.density" if "densities" in name else name

    def check(value):
        changed = given.copy()
        OmegaConf.update(changed, name, yaml.safe_load(value), force_add=True)
        config.settings_from(changed).require_solvable()

    for value in served:
        check(value)
    for value in refused:
        with pytest.raises(LtxError, match=f"^{named}(=| is empty)"):
            check(value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["construction=sampled", "batch_norm=fold"], "batch_norm=fold has no meaning with construction=sampled"),
        (["construction=sampled", "scaling=layer_max"], "scaling=layer_max has no meaning with construction=sampled"),
        (["construction=sampled", "selection=feedback"], "selection=feedback has no meaning with construction=sampled"),
        (["construction=sampled", "pair.kernel=3"], r"pair\.\* has no meaning with construction=sampled"),
        (["construction=sampled", "pair.stride=first"], r"pair\.\* has no meaning with construction=sampled"),
        (["construction=sampled", "target.module=a:b"], "construction=sampled perturbs the paper's targets alone"),
        (["feedback.sweeps=5"], r"feedback\.\* has no meaning with selection=smallest"),
        (["selection=best", "feedback.images=5"], r"feedback\.\* has no meaning with selection=best"),
        (["selection=feedback", "pair.stride=first"], "use pair.stride=second"),
    ],
    ids=str,
)
def test_settings_without_a_meaning_together(overrides, message):
    with pytest.raises(LtxError, match=message):
        settings(*overrides)
    for alone in overrides:
        if not alone.startswith("feedback."):
            settings(alone)
