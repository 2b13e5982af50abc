"""`ltx verify TICKET`: is it a subnetwork of its source, and does it approximate its target?"""

from __future__ import annotations

import json
import logging
import math

from torch import Tensor

from ltx.config import Settings
from ltx.constructions.calibration import images_sha256
from ltx.errors import LtxError
from ltx.tasks import calibration, targets_at
from ltx.tasks.evaluate import find_ticket
from ltx.ticket import Ticket
from ltx.verification import verify

log = logging.getLogger(__name__)
SHOWN = 5


def run(settings: Settings) -> None:
    """Verify a ticket; LtxError with the first violations when it is not what it claims."""
    path, ticket, target = find_ticket(settings)
    result = verify(ticket, None if target is None else target.graph, _calibration(settings, ticket, target))
    violations = list(result.violations)
    if target is not None:
        unfit = targets_at.unfit_range(ticket, target)
        violations += [] if unfit is None else [unfit]
    if violations:
        more = f"; and {len(violations) - SHOWN} more" if len(violations) > SHOWN else ""
        raise LtxError(f"ticket {path} is not valid: {'; '.join(violations[:SHOWN])}{more}")
    log.info(
        "%s: %d parameters, a subnetwork of the %ssource with seed %d (%d parameters)",
        path, ticket.parameters, "" if ticket.law == "uniform" else f"{ticket.law} ", ticket.seed,
        ticket.source_parameters,
    )  # fmt: skip
    if target is None:
        log.info(
            "its target (SHA-256 %s...) is not known here, so that parameters were not compared; %s",
            ticket.target_sha256[:12],
            targets_at.GIVE_IT,
        )
    elif ticket.feedback:
        log.info(
            "%d sums stand for parameters of %s, with %s (largest error %.6g), and nothing else is kept",
            result.approximated, target.path,
            "no bound on their errors" if math.isinf(ticket.within) else f"errors within {ticket.within:g}",
            result.max_parameter_error,
        )  # fmt: skip
        if result.rows:
            log.info(
                "the errors of %d rows on the calibration images are as claimed, at most %.3f of the target's standard "
                "deviation", result.rows, result.max_row_error,
            )  # fmt: skip
    else:
        log.info(
            "%d sums lie within %g of the parameters of %s (largest error %.6g), and nothing else is kept",
            result.approximated, ticket.epsilon, target.path, result.max_parameter_error,
        )  # fmt: skip


def _calibration(settings: Settings, ticket: Ticket, target: targets_at.Target | None) -> Tensor | None:
    """The images that a ticket with feedback was made with; None where it needs none or they are not there."""
    if not ticket.feedback or target is None:
        return None
    many = json.loads(ticket.feedback)["images"]
    try:
        found = calibration.images(settings, target.data, many=many, seed=ticket.seed, device=settings.torch_device)
    except LtxError as error:
        log.info("errors of rows were not measured: %s", error)
        return None
    if images_sha256(found) != json.loads(ticket.feedback)["images_sha256"]:
        log.info("errors of rows were not measured: the ticket was made with other images than those of ltx construct")
        return None
    return found
