"""`ltx bounds`: the source that Theorems 3.1 and 3.2 guarantee a ticket in, beside the one a construction uses up."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from ltx import __version__, paths, theory
from ltx.config import Settings
from ltx.constructions import construct
from ltx.errors import ConstructionError, LtxError
from ltx.files import read_result, require_writable, write_json, write_text
from ltx.graph import fold_batch_norm
from ltx.subset_sum.limits import MAX_BASE_SET_SIZE
from ltx.tasks import provenance, targets_at
from ltx.ticket import Ticket

log = logging.getLogger(__name__)


def run(settings: Settings) -> Path:
    """Print and write a table with a line for each layer of the target; the path of the CSV file."""
    construction, m, epsilon, b = settings.construction.value, settings.m, settings.epsilon, settings.bounds
    if construction == "sampled":
        raise LtxError("construction=sampled has no source; use L+1 or 2L")
    target = targets_at.load(settings)
    path = paths.bounds_file(settings, target.digest)
    page, made = path.with_suffix(".md"), path.with_suffix(".json")
    known = asdict(theory.constants(settings.law.value, b.single, b.product))
    about = {"ltx": __version__, "target_sha256": target.digest, **known}  # another ltx may prove something else
    if not settings.force and path.is_file() and page.is_file() and read_result(made, about):
        log.info("%s: there already; force=true computes it again", path)
        print(page.read_text(encoding="utf-8").replace("**", ""))
        return path
    require_writable(path.parent)
    folded = settings.batch_norm.value == "fold"
    graph, box = fold_batch_norm(target.graph) if folded else target.graph, target.input_range
    how = {
        "construction": construction, "input_range": box, "head": settings.head.value,
        "scaling": settings.scaling.value, "law": settings.law.value,
    }  # fmt: skip
    pair = {"pair_kernel": settings.pair.kernel, "pair_stride": settings.pair.stride.value}
    found = theory.guarantee(
        graph, b.error, b.delta, form=b.form.value, single=known["single"], product=known["product"], **how, **pair
    )
    delta = theory.failure_probability(
        graph, m, epsilon, single=known["single"], product=known["product"], **how
    )  # fmt: skip
    epsilons, sizes = dict.fromkeys(graph.layers, epsilon), dict.fromkeys(graph.layers, m)
    reach = theory.ticket_error(graph, epsilons, sizes, **how)
    rows = [asdict(layer) for layer in found.layers]
    used = "no ticket"
    try:
        if m > MAX_BASE_SET_SIZE:
            raise ConstructionError(f"the solver takes an m of up to {MAX_BASE_SET_SIZE}")
        ticket = construct(
            graph, base_set_size=m, epsilon=epsilon, seed=settings.seed, device=settings.torch_device, **how, **pair,
        )  # fmt: skip
        rows = [{**row, **_used(ticket, row["layer"])} for row in rows]
        used = f"{ticket.source_parameters:,} parameters, of which {ticket.parameters:,} are kept"
    except ConstructionError as error:
        log.info("m=%d, epsilon=%g: %s", m, epsilon, error)
    table = pd.DataFrame(rows)
    shown = table.rename(columns=_TITLES).map(lambda v: f"{v:.3g}" if isinstance(v, float) else v)
    name = paths.own_name(settings) or f"{settings.target.name}, {target.activation}"
    of = "" if settings.law.value == "uniform" else f", {settings.law.value} source"
    text = (
        f"**Sources in which the theorems guarantee a ticket of {name} ({construction}{of})**\n\n"
        f"{shown.to_markdown(index=False, disable_numparse=True)}\n\n"
        f"Guaranteed: a source of {float(found.source_parameters):.3g} parameters ({found.problems:,} subset sums, m "
        f"up to {found.base_set_size})\n"
        f"holds a ticket within {b.error:g} of the target with probability {1 - b.delta:g}.\n"
        f"Used: m={m}, epsilon={epsilon:g}, seed {settings.seed}: {used}.\n"
        f"With m={m} and epsilon={epsilon:g} some row fails with a probability of at most {delta:.3g}; where every\n"
        f"parameter is within epsilon, no output is off by more than {reach:.3g}.\n"
        f"C of Corollary 2.2: {known['single']:g}, for products of two {known['product']:g}.\n"
    )
    write_text(path, table.to_csv(index=False))
    write_text(page, text)
    about |= {"target": str(target.path), "source_parameters": found.source_parameters}
    write_json(made, {**about, "settings": settings.plain(), **provenance.here()})  # last: the others are there
    print(text.replace("**", ""))
    return path


_TITLES = {
    "parameters": "N", "largest_input": "largest input", "allowed": "may deviate", "slots": "slots",
    "problems": "subset sums", "base_set_size": "m", "copies": "rows of copies", "width": "rows",
    "source_parameters": "source parameters", "used_copies": "copies used", "used_width": "rows used",
}  # fmt: skip


def _used(ticket: Ticket, name: str) -> dict[str, int]:
    """Rows of the source that the construction used up for a layer of the target."""
    mine = [layer for layer in ticket.layers if layer.target == name]
    return {
        "used_copies": sum(layer.shape[0] for layer in mine if layer.role == "copies"),
        "used_width": sum(layer.shape[0] for layer in mine if layer.role != "copies"),
    }
