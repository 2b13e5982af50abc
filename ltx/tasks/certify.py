"""`ltx certify TICKET`: a proven bound on how far a ticket is from its target, beside how far it was found to be."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from ltx import __version__, theory
from ltx.adversary import ascend
from ltx.certificates import Certificate, certify
from ltx.checks import outside
from ltx.config import Settings
from ltx.deviation import ticket_deviations
from ltx.errors import LtxError
from ltx.evaluation import outputs
from ltx.files import file_hash, read_result, require_writable, with_null, write_json
from ltx.graph import Graph, fold_batch_norm
from ltx.graph import run as run_graph
from ltx.report import certificate as report
from ltx.report.figures import SUFFIXES, save
from ltx.tasks import provenance, targets_at
from ltx.tasks.evaluate import DEVIATION_IMAGES, beside, find_ticket, made_with, require_valid, scaling_of, some_images
from ltx.ticket import Ticket

log = logging.getLogger(__name__)
START_SEED = 0  # of the images that the ascent starts from
IN_FLOAT64 = 32  # images at a time
FLOAT64 = 2.0**-40  # of an output: by how much its rounding may be beyond a bound


def run(settings: Settings) -> Path:
    """Print the bounds, write them beside the ticket; the path of the JSON file.

    Raises:
        LtxError: the ticket is not valid, was made for other inputs than the test images, or, which would be an error
            of `ltx`, is farther from its target somewhere than was proven.
    """
    path, ticket, known = find_ticket(settings)
    target = targets_at.require_comparable(path, ticket, known)
    written, how = beside(path, "certificate.json"), scaling_of(made_with(path, ticket))
    about = {
        "ltx": __version__,  # another one may prove something else
        "ticket_sha256": file_hash(path), "target_sha256": target.digest,
        "data": target.data, "limit": settings.limit,
        "starts": settings.certify.starts, "steps": settings.certify.steps, **how,
    }  # fmt: skip
    there = None if settings.force else read_result(written, about)
    figures = (written.with_suffix(suffix) for suffix in SUFFIXES)
    if there is not None and all(figure.is_file() for figure in figures):
        log.info("%s: there already; force=true certifies again", written)
        _print(there, ticket)
        return written
    require_valid(path, ticket, target)
    require_writable(written.parent)
    device = settings.torch_device
    images = some_images(settings, target.data, device)
    folded = not any(node.op == "batch_norm" for node in ticket.graph)
    graph = fold_batch_norm(target.graph) if folded else target.graph
    low, high = (torch.full_like(images[0], value, device="cpu") for value in (ticket.input_low, ticket.input_high))
    if (reach := outside(images, ticket.input_low, ticket.input_high)) is not None:
        made = f"[{ticket.input_low:g}, {ticket.input_high:g}]"
        raise LtxError(
            f"inputs: made for {made}, beyond which nothing is proven; images of {target.data} lie in {reach}: make a "
            "ticket for these"
        )
    proven = certify(ticket, graph, low, high)
    seen = certify(ticket, graph, images.amin(0), images.amax(0))
    plain = certify(ticket, graph, low, high, sharp=False)
    network, model = ticket.to_module(device=device), target.model.to(device)
    apart = (outputs(network, images, batch_size=32) - outputs(model, images)).abs()
    where = {"measured": (apart, images)}
    if settings.certify.starts:
        where["ascent"] = _ascent(settings, network, model, low.to(device), high.to(device))
    found: dict[str, Tensor] = {}
    for name, (values, at) in where.items():
        found[name] = _largest(values.double().cpu(), at, proven.bound, ticket, graph)
        over = (~(found[name] <= proven.bound)).nonzero().flatten().tolist()
        if over:
            raise LtxError(
                f"ticket {path}: output {over[0]} is off by {float(found[name][over[0]]):.6g} ({name}), beyond the "
                f"proven {float(proven.bound[over[0]]):.6g}; please report this as an error of ltx"
            )
    layers = {d.node: d.largest for d in ticket_deviations(ticket, graph, images[:DEVIATION_IMAGES], network=network)}
    nodes = [{**asdict(node), "measured": layers.get(node.node)} for node in proven.nodes]
    theorem = _theorem(ticket, graph, scaling=how.get("scaling", "layer_max"))
    result = {
        "ticket": str(path), "construction": ticket.construction, "selection": ticket.selection, "seed": ticket.seed,
        "law": ticket.law, "activation": ticket.activation, "input_range": [ticket.input_low, ticket.input_high],
        "certificate": proven.largest, "over_the_data": seen.largest, "plain": plain.largest,
        "theorem": theorem, **{name: float(values.max()) for name, values in found.items()},
        "examples": len(images), "outputs": _rows(proven, seen, found), "layers": nodes, **about, **provenance.here(),
    }  # fmt: skip
    of = "" if ticket.law == "uniform" else f" {ticket.law} source,"
    title = f"{ticket.construction}, {ticket.activation},{of} seed {ticket.seed}"
    save(report.figure(nodes, title), written.with_suffix(""))
    result = with_null(result)
    write_json(written, result)  # behind the figures, so that they are there where it is
    _print(result, ticket)
    return written


def _ascent(
    settings: Settings, network: torch.nn.Module, model: torch.nn.Module, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """How far the output that a start was after went, (starts, O), -inf for the others; and where it went to."""
    generator = torch.Generator().manual_seed(START_SEED)
    starts = torch.rand(settings.certify.starts, *low.shape, generator=generator).to(low) * (high - low) + low
    with tqdm(total=len(starts), desc="gradient ascent", disable=None) as bar:
        found = ascend(network, model, starts, low, high, steps=settings.certify.steps, on_batch=bar.update)
    apart = torch.full((len(starts), outputs(model, starts[:1]).shape[1]), -torch.inf, device=low.device)
    return apart.scatter_(1, found.outputs[:, None], found.deviations[:, None].float().clamp_min(0)), found.images


def _largest(apart: Tensor, images: Tensor, bound: Tensor, ticket: Ticket, graph: Graph) -> Tensor:
    """The largest deviation of each output, (O,), -inf for none; in float64 where float32's is beyond what is proven.

    Args:
        apart: of every image, (N, O). images: (N, ...).
        bound: of the networks in exact arithmetic, (O,): float32 adds its own rounding, and float64 a little.
        graph: the target that it is proven for, whose batch norm or folded layers are rounded to float32.
    """
    values, which = apart.max(0)
    over = (values > bound).nonzero().flatten()
    if len(over):
        network, parts = ticket.to_module(device="cpu").double(), []
        for output in over.split(IN_FLOAT64):
            x = images[which[output].to(images.device)].double().cpu()
            *_, (_, theirs) = run_graph(graph, x)
            ours, theirs = (found.gather(1, output[:, None])[:, 0] for found in (network(x), theirs))
            off, rounding = (ours - theirs).abs(), FLOAT64 * torch.maximum(ours.abs(), theirs.abs())
            parts.append(torch.where(off <= bound[output] + rounding, off.minimum(bound[output]), off))
        exact = torch.cat(parts)
        log.info(
            "in float32, which rounds, %d outputs are off by more than is proven (output %d by %.3g): measured in "
            "float64 instead, at most %.3g", len(over), over[0], values[over[0]], exact.max(),
        )  # fmt: skip
        values[over] = exact
    return values


def _theorem(ticket: Ticket, graph: Graph, *, scaling: str) -> float | None:
    """What the theorem's argument gives for parameters within epsilon, or a bound; None for other tickets."""
    if ticket.largest_subset is None:
        return None
    epsilons, sizes = dict.fromkeys(graph.layers, ticket.within), dict.fromkeys(graph.layers, ticket.largest_subset)
    head = "keep" if any(node.op == "given" for node in ticket.graph) else "construct"
    return theory.ticket_error(
        graph, epsilons, sizes, construction=ticket.construction, head=head, scaling=scaling, law=ticket.law,
        input_range=(ticket.input_low, ticket.input_high),
    )  # fmt: skip


def _rows(proven: Certificate, seen: Certificate, found: dict[str, Tensor]) -> list[dict]:
    return [
        {
            "output": n, "certificate": float(proven.bound[n]), "over_the_data": float(seen.bound[n]),
            **{name: float(values[n]) for name, values in found.items()},
        }
        for n in range(len(proven.bound))
    ]  # fmt: skip


_TITLES = {
    "output": "output", "certificate": "proven, all inputs", "over_the_data": "proven, test images' box",
    "ascent": "found by ascent", "measured": "on test images",
}  # fmt: skip


def _print(result: dict, ticket: Ticket) -> None:
    columns = [name for name in _TITLES if name in result["outputs"][0]]
    table = pd.DataFrame(result["outputs"]).loc[:, columns].rename(columns=_TITLES)
    shown = table.astype(object).map(lambda v: "–" if pd.isna(v) else f"{v:.4g}" if isinstance(v, float) else v)
    print(f"\n{shown.to_markdown(index=False, disable_numparse=True)}\n")
    said = {name: "nothing, it is too large for float64" if result[name] is None else f"{result[name]:.4g}"
            for name in ("certificate", "plain", "theorem")}  # fmt: skip
    if math.isinf(ticket.within):
        said["theorem"] = "nothing, its parameters have no bound"
    print(
        f"No output is off by more than {said['certificate']} for any input with elements in "
        f"[{result['input_range'][0]:.4g}, {result['input_range'][1]:.4g}]\n"
        f"(layer by layer, copies apart: {said['plain']}; by the theorem's argument: {said['theorem']})."
    )
    empty = [n["node"] for n in result["layers"] if None in (n["deviation"], n["span"]) or n["deviation"] >= n["span"]]
    if empty:
        print(f"From activation {empty[0]} on a slot may be anywhere in its channel's range: nothing is proven of it.")
    print()
