"""`ltx bounds`."""

import json
from pathlib import Path

import pandas as pd
import pytest

from ltx import __version__

both = pytest.mark.parametrize("construction", ["2L", "L+1"])


@pytest.mark.slow
@both
def test_the_command_shows_what_is_guaranteed_beside_what_was_used(construction, ltx, tmp_path):
    given = ["target=digits", "protocol=smoke"]
    assert ltx("train-target", *given, output_dir=tmp_path)[0] == 0
    status, out, _ = ltx("bounds", *given, f"construction={construction}", "bounds.error=1", output_dir=tmp_path)
    assert status == 0
    table = pd.read_csv(out.splitlines()[-1])
    assert list(table.layer) == [0, 2]
    assert (table.base_set_size > 15).all()
    assert (table.width * table.copies.clip(lower=1) > table.used_width * table.used_copies).all()
    assert "holds a ticket within 1 of the target with probability 0.95" in out
    assert "of which" in out
    file = Path(out.splitlines()[-1])
    made = json.loads(file.with_suffix(".json").read_text())
    assert made["settings"]["bounds"]["error"] == 1
    assert {"commit", "torch", "target_sha256"} <= set(made)
    before, again = file.stat().st_mtime_ns, ltx("bounds", *given, f"construction={construction}", "bounds.error=1",
                                                 output_dir=tmp_path)  # fmt: skip
    assert (again[0], again[1], file.stat().st_mtime_ns) == (0, out, before)
    assert "there already" in again[2]
    same = ("bounds", *given, f"construction={construction}", "bounds.error=1")
    other = file.with_suffix(".json")
    earlier = other.read_text().replace(f'"ltx": "{__version__}"', '"ltx": "0.0.9"')
    for damage in (
        file.with_suffix(".md").unlink, file.unlink, lambda: other.write_text('{"target_sha256": "a"}'),
        lambda: other.write_text(earlier),
    ):  # fmt: skip
        damage()
        again = ltx(*same, output_dir=tmp_path)
        assert again[:2] == (0, out)
        assert "there already" not in again[2]
    assert "there already" not in ltx(*same, "force=true", output_dir=tmp_path)[2]


@pytest.mark.slow
def test_the_command_gives_back_what_it_guarantees(ltx, tmp_path):
    """m and epsilon of the guarantee, put in the other way round, fail with a probability of delta at most."""
    given = ["target=digits", "protocol=smoke", "construction=L+1", "bounds.delta=0.05"]
    assert ltx("train-target", *given, output_dir=tmp_path)[0] == 0
    status, out, _ = ltx("bounds", *given, output_dir=tmp_path)
    assert status == 0
    table = pd.read_csv(out.splitlines()[-1])
    again = [f"m={table.base_set_size.max()}", f"epsilon={table.epsilon.min()}"]
    status, other, err = ltx("bounds", *given, *again, output_dir=tmp_path)
    assert status == 0
    assert "the solver takes an m of up to 32" in err
    assert 0 < float(other.partition("with a probability of at most ")[2].partition(";")[0]) <= 0.05
    ltx("bounds", *given, "head=construct", output_dir=tmp_path)
    ltx("bounds", *given, "scaling=layer_max", output_dir=tmp_path)
    status, normal, _ = ltx("bounds", *given, "law=normal", output_dir=tmp_path)
    assert status == 0
    assert "of digits, relu (L+1, normal source)" in normal
    assert "normal source" not in out
    other, off, used = pd.read_csv(normal.splitlines()[-1]), "no output is off by more than ", "Used: m=15"
    assert other.base_set_size.max() < table.base_set_size.max()
    assert (other.used_width != table.used_width).any()
    assert normal.partition(used)[2].splitlines()[0] != out.partition(used)[2].splitlines()[0]
    beyond = [float(page.partition(off)[2].splitlines()[0].rstrip(".")) for page in (out, normal)]
    assert beyond[1] > 4 * beyond[0]
    assert "C of Corollary 2.2: 3.8, for products of two 7.1." in out
    assert "C of Corollary 2.2: 3.4, for products of two 4.9." in normal
    assert len(list(tmp_path.glob("bounds/*.csv"))) == 5  # none in the place of another


def test_the_command_refuses_what_has_no_meaning(ltx, tmp_path):
    for given, message in (
        ("construction=sampled", "construction=sampled has no source; use L+1 or 2L"),
        ("bounds.delta=1", "bounds.delta=1.0: must lie between 0 and 1"),
        ("bounds.error=0", "bounds.error=0.0: must be a positive number"),
    ):
        status, out, err = ltx("bounds", given, output_dir=tmp_path)
        assert (status, out) == (1, "")
        assert message in err
    assert list(tmp_path.iterdir()) == []
