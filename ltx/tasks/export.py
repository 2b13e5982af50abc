"""`ltx export TICKET format=...`: a ticket for other tools, beside it."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from ltx import data
from ltx.config import Settings
from ltx.export import masked_network, onnx, state_dict
from ltx.files import replacing, write_tensors
from ltx.tasks.evaluate import find_ticket, require_valid

log = logging.getLogger(__name__)


def run(settings: Settings) -> Path:
    """Write the ticket in another format; the path of the file."""
    path, ticket, target = find_ticket(settings)
    require_valid(path, ticket, target)
    kind = settings.format.value
    written = path.with_name(path.stem + {"masks": ".masks.safetensors", "prune": ".prune.pt", "onnx": ".onnx"}[kind])
    if kind == "onnx":
        onnx(ticket, written, data.dataset_spec(settings.data.name if target is None else target.data).shape)
        return written
    log.info("%d parameters of the source, and as many masks", ticket.source_parameters)
    if kind == "masks":
        write_tensors(
            written, state_dict(ticket), {"format": "ltx-masks/1", "seed": str(ticket.seed), "law": ticket.law}
        )
    else:
        with replacing(written) as part:
            torch.save(masked_network(ticket).state_dict(), part)
    return written
