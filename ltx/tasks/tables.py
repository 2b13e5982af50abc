"""`ltx tables`: Tables 1 and 2 from the results below output_dir, the paper's values beside the measured ones."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pandas as pd

from ltx.activations import ACTIVATIONS
from ltx.config import ActivationName, Settings
from ltx.errors import LtxError
from ltx.files import write_text
from ltx.report import tables
from ltx.tasks import targets_at

log = logging.getLogger(__name__)


def run(settings: Settings) -> Path:
    """Write the tables and print them; the folder that holds them."""
    results = collect(settings)
    if results.empty:
        raise LtxError(
            f"no results below {Path(settings.output_dir) / 'tickets'} for target={settings.target.name} "
            f"m={settings.m} epsilon={settings.epsilon:g} selection={settings.selection.value} "
            f"head={settings.head.value} scaling={settings.scaling.value} protocol={settings.protocol.name}; "
            "make them with ltx construct and ltx eval, or all of them with make paper-tables"
        )
    folder = Path(settings.output_dir) / "tables"
    suffix = "" if settings.data.name == "mnist" else f"-{settings.target.name}"
    for number, table in ((1, tables.accuracy_table(results)), (2, tables.parameter_table(results))):
        print(f"\n{table.title}\n\n{table.markdown}\n")
        for extension, text in (("csv", table.csv), ("md", table.markdown_page), ("tex", table.latex)):
            write_text(folder / f"table{number}{suffix}.{extension}", text)
    write_text(folder / f"results{suffix}.csv", results.drop(columns=["settings", "target"]).to_csv(index=False))
    return folder


def collect(settings: Settings) -> pd.DataFrame:
    """One row per result of an explicit ticket with these settings, of any activation, construction and seed.

    Only the tickets of the targets that the settings mean are taken: those of another training protocol, say,
    stay out.
    """
    wanted = {
        "kind": "explicit", "base_set_size": settings.m, "epsilon": settings.epsilon,
        "selection": settings.selection.value, "head": settings.head.value, "scaling": settings.scaling.value,
    }  # fmt: skip
    digests = set()
    names = [settings.activation.value] if settings.target.checkpoint else list(ACTIVATIONS)
    for name in names:
        try:
            digests.add(targets_at.load(replace(settings, activation=ActivationName(name))).digest)  # type: ignore[operator]
        except LtxError as error:
            log.debug("%s", error)  # no target of that activation
    rows = []
    for path in sorted((Path(settings.output_dir) / "tickets").glob("*/*/result.json")):
        try:
            result = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            log.info("%s: left out, cannot be read (%s)", path, error)
            continue
        if all(result.get(key) == value for key, value in wanted.items()) and result["target_sha256"] in digests:
            rows.append(result)
    return pd.DataFrame(rows)
