"""`ltx verify TICKET`: is it a subnetwork of its source, and does it approximate its target?"""

from __future__ import annotations

import logging

from ltx.config import Settings
from ltx.errors import LtxError
from ltx.tasks import targets_at
from ltx.tasks.evaluate import find_ticket
from ltx.verification import verify

log = logging.getLogger(__name__)
SHOWN = 5


def run(settings: Settings) -> None:
    """Verify a ticket; LtxError with the first violations when it is not what it claims."""
    path, ticket, target = find_ticket(settings)
    result = verify(ticket, None if target is None else target.graph)
    violations = list(result.violations)
    if target is not None:
        unfit = targets_at.unfit_range(ticket, target)
        violations += [] if unfit is None else [unfit]
    if violations:
        more = f"; and {len(violations) - SHOWN} more" if len(violations) > SHOWN else ""
        raise LtxError(f"ticket {path} is not valid: {'; '.join(violations[:SHOWN])}{more}")
    log.info(
        "%s: %d parameters, a subnetwork of the source with seed %d (%d parameters)",
        path, ticket.parameters, ticket.seed, ticket.source_parameters,
    )  # fmt: skip
    if target is None:
        log.info(
            "its target (SHA-256 %s...) was not found; give it with target.checkpoint=FILE to compare parameters",
            ticket.target_sha256[:12],
        )
    else:
        log.info(
            "%d sums lie within %g of the parameters of %s (largest error %.6f), and nothing else is kept",
            result.approximated, ticket.epsilon, target.path, result.max_parameter_error,
        )  # fmt: skip
