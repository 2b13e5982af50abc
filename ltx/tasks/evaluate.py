"""`ltx eval`: a ticket's accuracy, agreement and deviation beside its target, into result.json beside the ticket."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from pathlib import Path

import torch

from ltx import data, paths
from ltx.config import Settings
from ltx.errors import LtxError
from ltx.evaluation import compare
from ltx.files import write_json
from ltx.tasks import provenance, targets_at
from ltx.ticket import Ticket
from ltx.verification import verify

log = logging.getLogger(__name__)
SUBSET_SEED = 0  # of the fixed random subset that limit=N evaluates


def run(settings: Settings) -> Path:
    """Evaluate a ticket; the path of its result."""
    device = settings.torch_device
    path, ticket, target = find_ticket(settings)
    if target is None:
        raise LtxError(
            f"ticket {path}: its target (SHA-256 {ticket.target_sha256[:12]}...) is neither below "
            f"{settings.output_dir} nor kept with the code; give it with target.checkpoint=FILE"
        )
    result_path = path.with_name("result.json" if settings.limit is None else f"result-limit{settings.limit}.json")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not settings.force and _valid(result_path, digest):
        log.info("%s: there already; force=true evaluates again", result_path)
        return result_path

    verification = verify(ticket, target.graph)
    wrong = (*verification.violations, targets_at.unfit_range(ticket, target))[0]
    if wrong is not None:
        raise LtxError(f"ticket {path} is not valid: {wrong}; construct it again with force=true")
    split = data.load(target.data, train=False, root=settings.data_root, device=device)
    if settings.limit is not None and settings.limit < len(split):
        index = torch.randperm(len(split), generator=torch.Generator().manual_seed(SUBSET_SEED))
        index = index[: settings.limit].to(split.labels.device)
        split = data.Split(split.images[index], split.labels[index])
        log.info("evaluating a fixed random subset of %d test images", len(split))
    network = ticket.to_module(device=device)
    begin = time.perf_counter()
    measured = compare(target.model.to(device), network, split)
    seconds = time.perf_counter() - begin
    built = path.with_name("construction.json")
    how = json.loads(built.read_text()) if built.is_file() else {}
    constructed = [layer.target for layer in ticket.layers]
    result = {
        "kind": "explicit", "network": target.network, "data": target.data, "activation": target.activation,
        "construction": ticket.construction, "base_set_size": ticket.base_set_size, "epsilon": ticket.epsilon,
        "selection": ticket.selection, "seed": ticket.seed,
        "head": "keep" if any(n.op == "given" for n in ticket.graph) else "construct",
        "scaling": how.get("scaling"),
        "target_accuracy": measured.target_accuracy, "ticket_accuracy": measured.ticket_accuracy,
        "target_parameters": sum(
            layer.parameters_above(ticket.epsilon)
            for name, layer in target.graph.layers.items() if name in constructed
        ),
        "ticket_parameters": ticket.parameters, "source_parameters": ticket.source_parameters,
        "agreement": measured.agreement, "max_deviation": measured.max_deviation,
        "max_parameter_error": verification.max_parameter_error, "examples": len(split), "seconds": seconds,
        "construction_seconds": how.get("seconds"), "problems": how.get("problems"), "device": device,
        "ticket_sha256": digest, "target_sha256": target.digest, "target": str(target.path),
        "settings": settings.plain(), **provenance.here(),
    }  # fmt: skip
    write_json(result_path, result)
    log.info(
        "%s, %s, seed %d: ticket %.2f %%, target %.2f %% of %d test images, agreement %.2f %%",
        target.activation, ticket.construction, ticket.seed, measured.ticket_accuracy,
        measured.target_accuracy, len(split), measured.agreement,
    )  # fmt: skip
    return result_path


def find_ticket(settings: Settings) -> tuple[Path, Ticket, targets_at.Target | None]:
    """The ticket that the settings name, read, and its target where that is known."""
    if settings.ticket:
        path = Path(settings.ticket).expanduser()
        ticket = Ticket.load(path)
        return path, ticket, targets_at.load_for(ticket, settings)
    target = targets_at.load(settings)
    path = paths.ticket_file(settings, target.digest)
    if not path.is_file():
        raise LtxError(f"no ticket at {path}; make it with ltx construct and the same settings")
    return path, Ticket.load(path), target


def _valid(path: Path, digest: str) -> bool:
    """Whether a whole result of that very ticket lies there."""
    try:
        return json.loads(path.read_text()).get("ticket_sha256") == digest
    except (OSError, ValueError, AttributeError):
        return False
