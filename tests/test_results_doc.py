"""docs/results.md says what every key and column of a result file means, and of no other."""

import json
import re
from fnmatch import fnmatch

import pandas as pd
import pytest
from conftest import ROOT, SMOKE

from ltx import cli
from ltx.paths import reference_dir

pytestmark = pytest.mark.slow
COMMANDS = (
    ["construct", "construction=sampled"], ["eval", "construction=sampled"], ["eval", "limit=20"],
    ["tables"], ["bounds"],
    ["certify", "certify.starts=2", "certify.steps=1", "limit=20"],
)  # fmt: skip
OF_A_GPU = {"gpu_*"}


def _documented() -> dict[str, list[str]]:
    """Section -> patterns of the keys in its tables."""
    found, text = {}, (ROOT / "docs" / "results.md").read_text()
    for section in text.split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        cells = re.findall(r"^\| (`.*?) \|", body, re.MULTILINE)
        found[title] = [key for cell in cells for key in re.findall(r"`([^`]+)`", cell)]
    return found


DOCUMENTED = _documented()
EVERYWHERE = DOCUMENTED["In many of them"]


def _keys(path) -> set[str]:
    """Columns of a CSV file; of a JSON file the keys of its object, and of objects in its lists."""
    if path.suffix == ".csv":
        return set(pd.read_csv(path, nrows=1).columns)
    found = json.loads(path.read_text())
    inside = [entry for value in found.values() if isinstance(value, list) for entry in value]
    return set(found).union(*(entry for entry in inside if isinstance(entry, dict)))


def _as_documented(key: str) -> str:
    """In CSV, intervals, quantiles and counts have a column for each number."""
    key = re.sub(r"^(failed_)?size_\d+$", r"\1size_counts", key)
    key = re.sub(r"^error_quantile_0.*", "error_quantiles", key)
    return re.sub(r"_interval_(low|high)$", "_interval", key)


@pytest.fixture(scope="module")
def files(outputs):
    """Section -> what commands wrote of its kind, and what is kept."""
    for command, *settings in COMMANDS:
        assert cli.run([command, *SMOKE, *settings, f"output_dir={outputs}"]) == 0
    assert cli.run(["subset-sum", "problems=200", "device=cpu", f"output_dir={outputs}"]) == 0
    kept = reference_dir()
    globs = {
        "`construction.json`": ["tickets/*/*/construction.json"],
        "`result.json`, `results.csv`": ["tickets/*/*/result*.json", "tables/results*.csv"],
        "`deviation.json`, `deviation.csv`": ["tickets/*/*/deviation*.json"],
        "`certificate.json`": ["tickets/*/*/certificate.json"],
        "`table1.csv` to `table4.csv`": ["tables/table*.csv"],
        "`bounds/*.csv`, `.json`": ["bounds/*.csv", "bounds/*.json"],
        "`statistics.json`, `.csv`, `figure3.csv`, `figure4.csv`": [
            "subset_sum/*/statistics.*", "subset_sum/statistics.csv",
        ],
    }  # fmt: skip
    found = {title: [path for glob in globs[title] for path in outputs.glob(glob)] for title in globs}
    found["`deviation.json`, `deviation.csv`"].append(kept / "tables" / "deviation.csv")
    found["`table1.csv` to `table4.csv`"] += kept.glob("tables/table?.csv")
    found["`result.json`, `results.csv`"].append(kept / "tables" / "results-resnet22.csv")
    found["`statistics.json`, `.csv`, `figure3.csv`, `figure4.csv`"] += kept.glob("figures/*/figure?.csv")
    found["`failures.csv`"] = list(kept.glob("figures/*/failures.csv"))
    found["`bench.csv`, `.json`"] = list(kept.glob("bench/*/bench.*[nv]"))
    return found


def test_every_kind_of_file_has_a_section(files):
    assert {"In many of them", *files} == set(DOCUMENTED)
    assert all(files.values())


def test_every_key_is_documented(files):
    for title, paths in files.items():
        for path in paths:
            for key in map(_as_documented, _keys(path)):
                assert any(fnmatch(key, pattern) for pattern in DOCUMENTED[title] + EVERYWHERE), f"{path}: {key}"


def test_nothing_else_is(files):
    found = {title: {_as_documented(key) for path in paths for key in _keys(path)} for title, paths in files.items()}
    found["In many of them"] = set().union(*found.values())
    for title, patterns in DOCUMENTED.items():
        for pattern in set(patterns) - OF_A_GPU:
            pattern = _as_documented(pattern)
            assert any(fnmatch(key, pattern) for key in found[title]), f"{title}: {pattern}"
