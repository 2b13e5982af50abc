"""`ltx tables`: the paper's tables from the results below output_dir, its values beside the measured ones.

Tables 1 and 2 for the 3-layer network; for ResNet-22 Tables 3 and 4, and the figure of how deviation grows.
"""

from __future__ import annotations

import json
import logging
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path

import pandas as pd

from ltx import paths
from ltx.config import ActivationName, FeedbackSettings, Settings
from ltx.errors import CheckpointError, LtxError
from ltx.files import file_hash, write_text
from ltx.help import ACTIVATION_NAMES
from ltx.report import deviation, figures, tables, tradeoff
from ltx.report.variants import usual_size
from ltx.tasks import targets_at

log = logging.getLogger(__name__)
_MEASURED = (  # the numbers of a result
    "examples", "target_accuracy", "ticket_accuracy", "agreement", "target_parameters", "ticket_parameters",
)  # fmt: skip

_WHICH = (  # what tells a ticket from others, besides the settings of feedback
    "kind", "activation", "construction", "base_set_size", "epsilon", "selection", "seed", "law", "head", "scaling",
    "batch_norm", "pair_kernel", "pair_stride", "target_sha256",
)  # fmt: skip
_EARLIER = {"pair_kernel": 1, "pair_stride": "second", "law": "uniform", "scaling": "unit", "batch_norm": "keep"}
_KNOWN = {"kind": ("explicit", "sampled"), "construction": ("sampled", "L+1", "2L")}
_TICKETS = ("ticket", "sampled")


def run(settings: Settings) -> Path:
    """Write the tables and print them; the folder that holds them."""
    deep = settings.target.network == "resnet22" and not settings.target.module
    digests = _targets(settings)
    results = pd.DataFrame(_entries(_folders(settings), _results(settings), settings, digests, _MEASURED))
    failed = _entries(_folders(settings), _failures, settings, digests)
    if results.empty:
        own = settings.target.module
        of = f"target.module={own}" if own else f"target={settings.target.name}"
        raise LtxError(
            f"no results below {_tickets(settings)} for {of} m={settings.m} epsilon={settings.epsilon:g} "
            f"selection={settings.selection.value} head={settings.head.value} scaling={settings.scaling.value} "
            f"batch_norm={settings.batch_norm.value} law={settings.law.value} protocol={settings.protocol.name} "
            f"limit={settings.limit or 'null'}; make them "
            "with ltx construct and ltx eval (with a limit, say the same one here)"
            f"{'' if own else ', or all with make paper-tables'}"
        )
    folder = Path(settings.output_dir) / "tables"
    kind = _kind(settings)
    suffix = kind + _sums(settings)
    made = (
        {3: tables.deep_accuracy_table(results), 4: tables.deep_parameter_table(results)} if deep
        else {1: tables.accuracy_table(results), 2: tables.parameter_table(results)}
    )  # fmt: skip
    left = tables.left_out(results)
    if left:
        log.info("%s", left.strip())
    note = left + tables.failure_note(failed, usual_size(results))
    if settings.target.input_range:
        note += " Elements of inputs between {:g} and {:g}.".format(*settings.target.input_range)
    for number, table in made.items():
        table = made[number] = replace(table, note=table.note + note)
        for extension, text in (("csv", table.csv), ("md", table.markdown_page), ("tex", table.latex)):
            write_text(folder / f"table{number}{suffix}.{extension}", text)
    network = "-resnet22" if deep else ""
    plain = results.drop(columns=["settings", "target", "input_range"], errors="ignore").dropna(axis=1, how="all")
    write_text(folder / f"results{network}{suffix}.csv", plain.to_csv(index=False))
    if deep:
        _deviation_figure(settings, digests, folder / f"deviation{kind}")
        if (results.selection == "feedback").any():
            figures.save(tradeoff.figure(results), folder / f"tradeoff{suffix}")
    for table in made.values():
        print(f"\n{table.title}\n\n{table.markdown}\n\n{textwrap.fill(table.note, 100)}\n")
    return folder


def _kind(settings: Settings) -> str:
    """What of which target is approximated and by what source, where that is not as in the paper's tables."""
    t = settings.target
    usual = (t.network, settings.data.name) in (("mnist_cnn", "mnist"), ("resnet22", "cifar10"))
    usual = usual and not (t.module or t.checkpoint)
    name = t.name if t.name == settings.data.name else f"{t.name}-{settings.data.name}"
    if t.checkpoint:
        file = Path(t.checkpoint)
        name = file.absolute().parent.name if file.name == "target.safetensors" else file.stem  # as train-target has it
    kind = "" if usual else f"-{paths.own_name(settings) or name}"
    kind += "" if settings.head.value == t.head.value else f"-{settings.head.value}"
    kind += "" if settings.scaling.value == "unit" else f"-{settings.scaling.value}"
    return kind + paths.kind_of(settings)


def _sums(settings: Settings) -> str:
    """How subsets are chosen, where that is not as in the paper's tables."""
    usual = (settings.m, settings.epsilon) == (15, 0.01)
    sums = "" if usual else f"-m{settings.m}-eps{settings.epsilon!r}"
    return sums + ("" if settings.selection.value == "smallest" else f"-{settings.selection.value}")


def _deviation_figure(settings: Settings, digests: Mapping[str, dict], path: Path) -> None:
    """How deviation grows through the network, for every m and epsilon that there is; figure and CSV."""
    rows = []
    for account in _entries(_folders(settings), _deviations, settings, digests, any_sums=True):
        layers = account.pop("layers", [])
        rows += [{**account, "position": n, **layer} for n, layer in enumerate(layers, start=1)]
    if rows:
        table = _plain(pd.DataFrame(rows), settings)
        short = table.drop(columns=["target_sha256", "ticket_sha256", "kind", "data", "input_range"], errors="ignore")
        write_text(path.with_name(f"{path.name}.csv"), short.to_csv(index=False, float_format="%.5g"))
        figures.save(deviation.figure(table), path)


def _entries(
    folders: Iterable[Path], candidates: Callable[[Path], Iterable[Path]], settings: Settings,
    digests: Mapping[str, dict], numbers: Iterable[str] = (), *, any_sums: bool = False,
) -> list[dict]:  # fmt: skip
    """What is known of the tickets in the folders, explicit and sampled, with these settings and of these targets.

    One entry of each ticket: a copy of its folder is no other seed.

    Args:
        candidates: folder -> the files that may say it, of which the first counts that is whole and of that ticket.
        digests: SHA-256 of the targets that the settings mean -> their data and range of inputs, so that those of
            another training protocol, of a network of one's own on other data, and for other inputs stay out.
        numbers: what each must have.
        any_sums: whatever m, epsilon and selection. Those of feedback stand beside `smallest` ones, whatever their m.
    """
    epsilon = {} if any_sums else {"epsilon": settings.epsilon}
    sums = {} if any_sums else {"base_set_size": settings.m, "selection": settings.selection.value}

    def wanted(entry: dict) -> bool:
        meant = digests.get(entry["target_sha256"])
        if meant is None or any(entry.setdefault(key, value) != value for key, value in meant.items()):
            return False  # of an earlier ltx not all say it
        needs = epsilon | settings.built
        if entry["selection"] != "feedback":
            needs |= sums
        elif settings.selection.value == "best" and not any_sums:
            return False
        else:
            needs.pop("scaling")  # rows name it
        return all(entry[key] == value for key, value in needs.items())

    found: dict[tuple, tuple[Path, dict]] = {}
    for folder in sorted(folders):
        for path in candidates(folder):
            entry = _read(path, ("seed", "base_set_size", "epsilon", *numbers))
            if entry is None or not wanted(entry):
                continue
            if _stale(path, entry):
                log.info("%s: left out, the ticket beside it is another one; run ltx eval again", path)
                continue
            which = tuple(str(entry[key]) for key in sorted(entry) if key in _WHICH or key.startswith("feedback_"))
            other, _ = found.setdefault(which, (path, entry))
            if other != path:
                log.info("%s: left out, it is of the same settings and seed as %s", path, other)
            break
    return [entry for _, entry in found.values()]


def _folders(settings: Settings) -> Iterable[Path]:
    """Of all tickets."""
    return _tickets(settings).glob("*/*")


def _results(settings: Settings) -> Callable[[Path], Iterable[Path]]:
    """The result of a ticket on all images, else that on `limit` of them."""
    names = dict.fromkeys(("result.json", f"result-limit{settings.limit}.json"))
    return lambda folder: (folder / name for name in names if (folder / name).is_file())


def _deviations(folder: Path) -> Iterable[Path]:
    """Of a ticket that was evaluated with several limits, on most images first."""

    def images(path: Path) -> float:
        many = path.stem.removeprefix("deviation-limit")
        return int(many) if many.isdecimal() else math.inf

    return sorted(folder.glob("deviation*.json"), key=images, reverse=True)


def _failures(folder: Path) -> Iterable[Path]:
    """What is said of a ticket that there is none of."""
    made = any((folder / f"{kind}.safetensors").is_file() for kind in _TICKETS)
    return [] if made else folder.glob("failure.json")


def _plain(table: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """Of feedback the accounts without a bound and with the usual m, and among these those of the least lambda."""
    chosen = table.selection == "feedback"
    if not chosen.any():
        return table
    usual = chosen & (table.base_set_size == settings.m) & table.feedback_bound.isna()
    for field in fields(FeedbackSettings):
        if field.name not in ("penalty", "bound", "max_subset"):
            usual &= table[f"feedback_{field.name}"] == field.default
    least = table[usual].groupby(["activation", "construction"]).feedback_penalty.min()
    pairs = pd.MultiIndex.from_arrays([table.activation, table.construction])
    return table.loc[~chosen | (usual & (table.feedback_penalty == least.reindex(pairs).to_numpy()))]


def _tickets(settings: Settings) -> Path:
    return Path(settings.output_dir) / "tickets"


def _targets(settings: Settings) -> dict[str, dict]:
    """SHA-256 of the targets that the settings mean, of every activation -> their data and range of inputs."""
    digests = {}
    one = settings.target.checkpoint or settings.target.module
    names = [settings.activation.value] if one else ACTIVATION_NAMES
    for name in names:
        try:
            target = targets_at.load(replace(settings, activation=ActivationName(name)))  # type: ignore[operator]
            digests[target.digest] = {"data": target.data, "input_range": list(target.input_range)}
        except LtxError as error:
            if one:
                raise
            if isinstance(error, CheckpointError):
                log.warning("%s; its results are left out", error)
            else:
                log.debug("%s", error)  # no target of that activation
    return digests


def _stale(path: Path, result: Mapping) -> bool:
    """Whether the ticket beside a result is not the one that it is of."""
    tickets = (path.with_name(f"{kind}.safetensors") for kind in _TICKETS)
    ticket = next((file for file in tickets if file.is_file()), None)
    if ticket is None or "ticket_sha256" not in result:
        return False  # results may be kept without their tickets, which are large
    return result["ticket_sha256"] != file_hash(ticket)


def _read(path: Path, numbers: Iterable[str] = ()) -> dict | None:
    """What a file says of a ticket, where that is all there and these numbers are; else None, and it is said."""
    try:
        entry = json.loads(path.read_text())
        if not isinstance(entry, dict):
            raise ValueError(f"a {type(entry).__name__}, no object")
        entry = _EARLIER | entry
        of_feedback = [f"feedback_{field.name}" for field in fields(FeedbackSettings)]
        for key in (*_WHICH, *(of_feedback if entry.get("selection") == "feedback" else [])):
            if key not in entry:
                raise ValueError(f"it does not say its {key}")
        for key, known in _KNOWN.items():
            if entry[key] not in known:
                raise ValueError(f"{key} is {entry[key]!r}")
        for key in numbers:
            value = entry.get(key)
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"{key} is {value!r}")
    except (OSError, ValueError) as error:
        log.info("%s: left out, cannot be read (%s)", path, error)
        return None
    return entry
