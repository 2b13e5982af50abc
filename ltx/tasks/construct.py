"""`ltx construct`: a ticket for the target of the settings; does nothing when a valid one is there."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

from tqdm import tqdm

from ltx import paths
from ltx.config import Settings
from ltx.constructions import Statistics, construct
from ltx.constructions.layout import kept_of
from ltx.constructions.sampled import sampled
from ltx.errors import CheckpointError, LtxError, UnsolvedError
from ltx.files import read_result, require_writable, write_json, write_tensors
from ltx.graph import above, fold_batch_norm
from ltx.targets import read_checkpoint
from ltx.tasks import calibration, provenance, targets_at
from ltx.tasks.calibration import feedback_columns
from ltx.ticket import Ticket
from ltx.verification import verify

log = logging.getLogger(__name__)


def run(settings: Settings) -> Path:
    """Construct the ticket that the settings describe; the path of its file."""
    if settings.ticket:
        raise LtxError("construct: ticket names a file that is there; leave it out")
    device = settings.torch_device
    target = targets_at.load(settings)
    path = paths.ticket_file(settings, target.digest)
    if not settings.force and _valid(path, target, settings):
        log.info("%s: there already; force=true constructs again", path)
        return path
    _warn_of_dropped(target, settings)
    if settings.construction.value == "sampled":
        return _sample(settings, target, path)
    statistics: list[Statistics] = []
    feedback = {}
    if settings.selection.value == "feedback":
        targets_at.require_images(target)
        feedback = {
            "feedback": settings.feedback.plain,
            "calibration": calibration.images(
                settings, target.data, many=settings.feedback.images, seed=settings.seed, device=device
            ),
        }
    require_writable(path.parent)
    begin = time.perf_counter()
    failure = path.with_name("failure.json")
    try:
        with tqdm(total=len(target.graph.layers), desc="construct", unit="layer", disable=None, leave=False) as bar:
            ticket = construct(
                target.graph, input_range=target.input_range, device=device, on_statistics=statistics.append,
                on_layer=partial(_advance, bar), **settings.made, **feedback,
            )  # fmt: skip
    except UnsolvedError as error:
        # tables say which tickets there are none of
        how = feedback_columns(asdict(settings.feedback)) if feedback else {}
        about = _about(target, settings) | how
        write_json(failure, {"error": str(error), "kind": "explicit", **about, **provenance.here()})
        raise
    if failure.is_file():
        failure.unlink()  # of an earlier try
    seconds = time.perf_counter() - begin
    made = statistics[0]
    write_json(  # before the ticket, so that it is there where the ticket is
        path.with_name("construction.json"),
        {
            "target": str(target.path), **_about(target, settings),
            "ticket_parameters": ticket.parameters, "source_parameters": ticket.source_parameters,
            **asdict(made), "seconds": seconds, "device": device,
            "settings": settings.plain(), **provenance.here(),
        },
    )  # fmt: skip
    ticket.save(path)
    log.info(
        "%s, %s, seed %d: %d parameters of %d in the source; %d subset-sum problems (%.2f %% without a subset), "
        "%.1f %% of the rows given up; %.2f s%s",
        target.activation, settings.construction.value, settings.seed, ticket.parameters,
        ticket.source_parameters, made.problems, 100 * made.failures / max(made.problems, 1),
        100 * made.given_up / max(made.rows, 1), seconds,
        f", {1e6 * seconds / made.problems:.1f} us a problem" if made.problems else "",
    )  # fmt: skip
    return path


def _about(target: targets_at.Target, settings: Settings) -> dict:
    """What is made of which target, in the words of results."""
    return {
        "target_sha256": target.digest, "data": target.data, "input_range": list(target.input_range),
        "activation": target.activation, **settings.made,
    }  # fmt: skip


def _warn_of_dropped(target: targets_at.Target, settings: Settings) -> None:
    """Name the layers that lose all of their weights because none exceeds epsilon."""
    graph = fold_batch_norm(target.graph) if settings.batch_norm.value == "fold" else target.graph
    kept = kept_of(graph, settings.head.value)
    dropped = [
        name for name, layer in graph.layers.items()
        if name not in kept and layer.weight.any() and not above(layer.weight, settings.epsilon).any()
    ]  # fmt: skip
    if dropped:
        log.warning(
            "no weight of %s exceeds epsilon=%g, up to which parameters are dropped; a smaller epsilon keeps some",
            ", ".join(dropped), settings.epsilon,
        )  # fmt: skip


def _advance(bar: tqdm, layer: str) -> None:
    bar.set_postfix_str(layer)
    bar.update()


def _sample(settings: Settings, target: targets_at.Target, path: Path) -> Path:
    """Write the target with sampled errors: no ticket, but what the paper evaluated for ResNet-22."""
    require_writable(path.parent)
    begin = time.perf_counter()
    found = sampled(
        target.model, base_set_size=settings.m, epsilon=settings.epsilon, seed=settings.seed,
        selection=settings.selection.value, input_range=target.input_range, head=settings.head.value,
        law=settings.law.value,
    )  # fmt: skip
    write_json(
        path.with_name("construction.json"),
        {
            "target": str(target.path), **_about(target, settings), "ticket_parameters": found.parameters,
            "target_parameters": found.target_parameters,
            "seconds": time.perf_counter() - begin, "settings": settings.plain(), **provenance.here(),
        },
    )  # fmt: skip
    write_tensors(
        path,
        found.state,
        {
            **_said_of_sampled(settings, target),
            "parameters": str(found.parameters), "target_parameters": str(found.target_parameters),
        },
    )  # fmt: skip
    log.info(
        "%s, sampled errors, seed %d: an L+1 ticket would have about %d parameters",
        target.activation, settings.seed, found.parameters,
    )  # fmt: skip
    return path


def _said_of_sampled(settings: Settings, target: targets_at.Target) -> dict[str, str]:
    """What a file of sampled errors says of its settings and its target."""
    return {
        "format": "ltx-sampled/1", "network": target.network, "activation": target.activation,
        "data": target.data, "target_sha256": target.digest, "base_set_size": str(settings.m),
        "epsilon": repr(settings.epsilon), "selection": settings.selection.value, "seed": str(settings.seed),
        "head": settings.head.value, "law": settings.law.value,
    }  # fmt: skip


def _valid(path: Path, target: targets_at.Target, settings: Settings) -> bool:
    """Whether a whole ticket of that target and these settings lies there; the file does not say all of them."""
    if not path.is_file():
        return False
    how = {"target_sha256": target.digest, "scaling": settings.scaling.value}
    if read_result(path.with_name("construction.json"), how) is None:
        log.info("%s: no construction.json of it and these settings is beside it; constructing it again", path)
        return False
    try:
        if path.name == "sampled.safetensors":
            return _said_of_sampled(settings, target).items() <= read_checkpoint(path).metadata.items()
        ticket = Ticket.load(path)
        low, high = target.input_range
        wanted = {"target_sha256": target.digest, "input_low": low, "input_high": high, **settings.made}
        said = vars(ticket)
        same = all(said[name] == value for name, value in wanted.items() if name in said)
        if same and ticket.feedback:
            same = asdict(settings.feedback).items() <= json.loads(ticket.feedback).items()
        return same and verify(ticket, target.graph).ok
    except CheckpointError as error:
        log.info("%s; constructing it again", error)
        return False
