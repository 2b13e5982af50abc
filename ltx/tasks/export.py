"""`ltx export TICKET format=...`: a ticket for other tools, beside it."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors import SafetensorError

from ltx import __version__, data
from ltx.config import Settings
from ltx.errors import LtxError
from ltx.export import masked_network, onnx, state_dict
from ltx.files import file_hash, read_result, read_tensors, replacing, require_writable, write_json, write_tensors
from ltx.tasks import provenance
from ltx.tasks.evaluate import find_ticket, require_valid
from ltx.ticket import FORMAT, Ticket

log = logging.getLogger(__name__)


def run(settings: Settings) -> Path:
    """Write the ticket in another format, and beside it what it was made from; the path of the file."""
    path, ticket, target = find_ticket(settings)
    kind = settings.format.value
    written = path.with_name(path.stem + {"masks": ".masks.safetensors", "prune": ".prune.pt", "onnx": ".onnx"}[kind])
    beside = path.with_name(f"{path.stem}.{kind}.json")
    about = {
        "ltx": __version__, "format": kind, "ticket_sha256": file_hash(path),
        "target_sha256": ticket.target_sha256, "seed": ticket.seed, "law": ticket.law,
        "data": (settings.data.name if target is None else target.data) if kind == "onnx" else None,
    }  # fmt: skip
    there = None if settings.force else read_result(beside, about)
    if there is not None and written.is_file() and file_hash(written) == there.get("sha256"):
        log.info("%s: there already; force=true writes it again", written)
        return written
    if kind == "masks" and _is_ticket(written):
        raise LtxError(f"{written} is a ticket, not an export: rename it, or {path.name}")
    require_valid(path, ticket, target)
    require_writable(written.parent)
    beside.unlink(missing_ok=True)  # of another file than the one that is written now
    _write(ticket, kind, written, about)
    write_json(beside, {**about, "bytes": written.stat().st_size, "sha256": file_hash(written), **provenance.here()})
    return written


def _is_ticket(path: Path) -> bool:
    try:
        return read_tensors(path)[1].get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


def _write(ticket: Ticket, kind: str, path: Path, about: dict) -> None:
    if kind == "onnx":
        onnx(ticket, path, data.dataset_spec(about["data"]).shape)
        return
    log.info("%d parameters of the source, and as many masks", ticket.source_parameters)
    if kind == "masks":
        said = {key: str(about[key]) for key in ("seed", "law", "ticket_sha256", "target_sha256")}
        write_tensors(path, state_dict(ticket), {"format": "ltx-masks/1", **said})
    else:
        with replacing(path) as part, part.open("wb") as file:
            try:
                torch.save(masked_network(ticket).state_dict(), file)
            except RuntimeError as error:  # PyTorch's of a file that it could not finish
                if not isinstance(error.__context__, OSError):
                    raise
                raise error.__context__ from error
