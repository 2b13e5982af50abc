"""`ltx eval`: accuracy, agreement and deviation of a ticket beside its target, into result.json beside the ticket.

A ticket is explicit, or `construction=sampled`: the target with sampled errors.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ltx import data, paths, targets
from ltx.config import Settings
from ltx.deviation import Deviation, sampled_deviations, ticket_deviations
from ltx.errors import CheckpointError, LtxError
from ltx.evaluation import compare, outputs
from ltx.files import file_hash, read_result, require_writable, with_null, write_json
from ltx.graph import fold_batch_norm
from ltx.tasks import given, provenance, targets_at
from ltx.tasks.calibration import feedback_columns
from ltx.ticket import Ticket
from ltx.verification import Verification, verify

log = logging.getLogger(__name__)
_ABOUT = (
    "kind", "network", "data", "input_range", "activation", "construction", "base_set_size", "epsilon", "selection",
    "seed", "law", "head", "scaling", "batch_norm", "pair_kernel", "pair_stride", "target_sha256", "ticket_sha256",
)  # fmt: skip
_SAID = ("construction", "base_set_size", "epsilon", "selection", "seed", "law", "target_sha256")  # by both
SUBSET_SEED = 0  # of the fixed random subset that limit=N evaluates
DEVIATION_IMAGES = 64  # of the same subset: on which activations are compared


@dataclass(frozen=True)
class _Candidate:
    """What is evaluated."""

    target: targets_at.Target
    about: dict  # entries of the result that describe it
    network: nn.Module
    deviations: Callable[[Tensor], list[Deviation]]


def run(settings: Settings) -> Path:
    """Evaluate a ticket; the path of its result."""
    device = settings.torch_device
    if settings.construction.value == "sampled" and not settings.ticket:
        path, target = _find_sampled(settings)
        candidate, made = partial(_sampled, path, target), {}
    else:
        path, ticket, known = find_ticket(settings)
        target = targets_at.require_comparable(path, ticket, known)
        how = made_with(path, ticket)
        candidate = partial(_explicit, path, ticket, target, how, device)
        made = scaling_of(how)
    result_path = _file(path, "result", settings)
    digest = file_hash(path)
    there = read_result(result_path, {"ticket_sha256": digest, "data": target.data, **made})
    if not settings.force and there and _file(path, "deviation", settings).is_file():
        log.info("%s: there already; force=true evaluates again", result_path)
        return result_path
    require_writable(result_path.parent)
    return _evaluate(candidate(), settings, path, digest, device)


def beside(path: Path, name: str) -> Path:
    """A file of that name beside a ticket; with the ticket's in front where several may lie in one folder."""
    return path.with_name(name if path.stem in ("ticket", "sampled") else f"{path.stem}.{name}")


def _file(path: Path, kind: str, settings: Settings) -> Path:
    """Where the result of a ticket is written, or its deviation."""
    return beside(path, kind + ("" if settings.limit is None else f"-limit{settings.limit}") + ".json")


def _evaluate(candidate: _Candidate, settings: Settings, path: Path, digest: str, device: str) -> Path:
    target = candidate.target
    split, order = _test_split(settings, target.data, device)
    network = candidate.network.to(device)
    theirs = _target_outputs(target, split, settings, device)
    if bad := int((~theirs.isfinite()).any(1).sum()):
        raise LtxError(f"target {target.path}: its outputs for {bad} of {len(split)} test images are not finite")
    begin = time.perf_counter()
    measured = compare(theirs, network, split)
    seconds = time.perf_counter() - begin
    found = candidate.deviations(split.images[order[:DEVIATION_IMAGES]])
    result = {
        **candidate.about, "network": target.network, "data": target.data, "activation": target.activation,
        "target_accuracy": measured.target_accuracy, "ticket_accuracy": measured.ticket_accuracy,
        "agreement": measured.agreement, "max_deviation": measured.max_deviation, "examples": len(split),
        "seconds": seconds, "device": device, "ticket_sha256": digest, "target_sha256": target.digest,
        "target": str(target.path), "target_training": targets_at.training_of(target.path),
        "settings": settings.plain(), **provenance.here(),
    }  # fmt: skip
    images = min(DEVIATION_IMAGES, len(split))
    about = {key: value for key, value in result.items() if key in _ABOUT or key.startswith("feedback_")}
    write_json(
        _file(path, "deviation", settings),
        with_null({**about, "images": images, "layers": [asdict(d) for d in found]}),
    )
    result_path = _file(path, "result", settings)
    write_json(result_path, with_null(result))
    log.info(
        "%s, %s, seed %d: ticket %.2f %%, target %.2f %% of %d test images, agreement %.2f %%; %.1f s",
        target.activation, result["construction"], result["seed"], measured.ticket_accuracy,
        measured.target_accuracy, len(split), measured.agreement, seconds,
    )  # fmt: skip
    return result_path


def _explicit(path: Path, ticket: Ticket, target: targets_at.Target, how: dict, device: str) -> _Candidate:
    verification = require_valid(path, ticket, target)
    if not how:
        log.info("%s: its construction.json is not beside it; the result says less, and tables leave it out", path)
    constructed = {layer.target for layer in ticket.layers}
    operations = {node.op for node in ticket.graph}
    folded = target.graph.normalised and "batch_norm" not in operations
    graph = fold_batch_norm(target.graph) if folded else target.graph
    about = {
        "kind": "explicit", "input_range": [ticket.input_low, ticket.input_high], "construction": ticket.construction,
        "base_set_size": ticket.base_set_size,
        "epsilon": ticket.epsilon, "selection": ticket.selection, "seed": ticket.seed, "law": ticket.law,
        "head": "keep" if "given" in operations else "construct", "scaling": how.get("scaling"),
        "batch_norm": "fold" if folded else "keep",
        "pair_kernel": how.get("pair_kernel", 1), "pair_stride": how.get("pair_stride", "second"),
        "target_parameters": sum(
            layer.parameters_above(ticket.epsilon) for name, layer in graph.layers.items() if name in constructed
        ),
        "ticket_parameters": ticket.parameters, "source_parameters": ticket.source_parameters,
        "max_parameter_error": verification.max_parameter_error,
        "construction_seconds": how.get("seconds"), "problems": how.get("problems"),
        **(feedback_columns(json.loads(ticket.feedback)) if ticket.feedback else {}),
    }  # fmt: skip
    network = ticket.to_module(device=device, outputs_only=True)
    return _Candidate(
        target, about, network, lambda images: ticket_deviations(ticket, graph, images, network=network)
    )  # fmt: skip


def made_with(path: Path, ticket: Ticket) -> dict:
    """What stands beside a ticket of how it was made; nothing where it is not there, or is of another ticket."""
    found = read_result(path.with_name("construction.json"), {}) or {}
    return {} if any(found.get(key, value) != value for key, value in vars(ticket).items() if key in _SAID) else found


def scaling_of(how: Mapping) -> dict:
    """What a ticket does not say of itself and its results do, where `made_with` knows it."""
    return {"scaling": how["scaling"]} if "scaling" in how else {}


def _find_sampled(settings: Settings) -> tuple[Path, targets_at.Target]:
    """The sampled errors that the settings name, and their target."""
    target = targets_at.load(settings)
    path = paths.ticket_file(settings, target.digest)
    if not path.is_file():
        raise LtxError(f"no sampled errors at {path}; draw them with ltx construct and the same settings")
    return path, target


def _sampled(path: Path, target: targets_at.Target) -> _Candidate:
    checkpoint = targets.read_checkpoint(path)
    spec, said = data.dataset_spec(target.data), checkpoint.metadata
    if said.get("target_sha256") != target.digest:
        raise CheckpointError(f"{path}: belongs to another target; draw it again with force=true")
    model = targets.build(target.network, target.activation, shape=spec.shape, classes=spec.classes)
    targets.load_into(model, checkpoint, network=target.network)
    about = {
        "kind": "sampled", "input_range": list(target.input_range), "construction": "sampled",
        "base_set_size": int(said["base_set_size"]),
        "epsilon": float(said["epsilon"]), "selection": said["selection"], "seed": int(said["seed"]),
        "head": said.get("head", "construct"), "law": said.get("law", "uniform"),
        "scaling": "unit", "batch_norm": "keep", "pair_kernel": 1, "pair_stride": "second",
        "target_parameters": int(said["target_parameters"]), "ticket_parameters": int(said["parameters"]),
        "source_parameters": None, "max_parameter_error": None, "construction_seconds": None, "problems": None,
    }  # fmt: skip
    return _Candidate(
        target, about, model, lambda images: sampled_deviations(model, target.graph, images)
    )  # fmt: skip


def _test_split(settings: Settings, name: str, device: str) -> tuple[data.Split, Tensor]:
    """The test images that are evaluated, and an order of them that begins with those of a smaller limit."""
    split = data.load(name, train=False, root=settings.data_root, device=device)
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(SUBSET_SEED)).to(device)
    if settings.limit is None or settings.limit >= len(split):
        return split, order
    index = order[: settings.limit]
    log.info("evaluating a fixed random subset of %d test images", len(index))
    return data.Split(split.images[index], split.labels[index]), torch.arange(len(index), device=device)


def some_images(settings: Settings, name: str, device: str) -> Tensor:
    """The test images that `limit` leaves, (N, C, H, W)."""
    return _test_split(settings, name, device)[0].images


_OUTPUTS: dict[tuple, Tensor] = {}


def _target_outputs(target: targets_at.Target, split: data.Split, settings: Settings, device: str) -> Tensor:
    """The target's outputs, kept for the next ticket of a sweep."""
    key = (target.digest, target.data, settings.data.root, len(split), device)
    if key not in _OUTPUTS:
        _OUTPUTS.clear()
        _OUTPUTS[key] = outputs(target.model.to(device), split.images)
    return _OUTPUTS[key]


def find_ticket(settings: Settings) -> tuple[Path, Ticket, targets_at.Target | None]:
    """The ticket that the settings name, read, and its target where that is known."""
    if settings.ticket:
        path = Path(settings.ticket).expanduser()
        ticket = Ticket.load(path)
        _require_its_own(path, ticket, settings)
        return path, ticket, targets_at.load_for(ticket, settings)
    if settings.construction.value == "sampled":
        raise LtxError("construction=sampled: no ticket is built, which this command is about; use L+1 or 2L")
    target = targets_at.load(settings)
    path = paths.ticket_file(settings, target.digest)
    if not path.is_file():
        drawn = settings.target.module and not settings.target.checkpoint
        why = " (where the factory of target.module draws at random, its parameters are other ones each time: give "
        why = why + "target.checkpoint, or seed it)" if drawn else ""
        raise LtxError(f"no ticket at {path}; make it with ltx construct and the same settings{why}")
    return path, Ticket.load(path), target


def _require_its_own(path: Path, ticket: Ticket, settings: Settings) -> None:
    """Refuse settings that say of a named file's ticket what it is not."""
    now = {**settings.made, "activation": settings.activation.value}
    its = made_with(path, ticket) | vars(ticket)
    for key in given.overrides():
        name = "base_set_size" if key == "m" else key.replace(".", "_")
        if name in now and its.get(name, now[name]) != now[name]:
            raise LtxError(f"{key}={now[name]} has no meaning for ticket {path}, which has {its[name]}; leave it out")


def require_valid(path: Path, ticket: Ticket, target: targets_at.Target | None) -> Verification:
    """What verification measured; LtxError with the first violation where the ticket is not what it claims.

    Args:
        target: with which its parameters are compared; None where it is not known.
    """
    found = verify(ticket, None if target is None else target.graph)
    if found.violations:
        raise LtxError(f"ticket {path} is not valid: {found.violations[0]}; construct it again with force=true")
    return found
