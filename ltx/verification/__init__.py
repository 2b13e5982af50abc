"""Checks of a ticket that use nothing of the code that made it: its file, its source, and the target.

Without a target: the ticket is a subnetwork of the source that its seed defines (`structure`). With the target: it
is the target's network with every layer replaced by one or two layers of the source (`topology`), and the source's
parameters, summed over the kept subsets, are within epsilon of every target parameter above epsilon, in every slot,
and nothing else is kept (`approximation`).
"""

from __future__ import annotations

from dataclasses import dataclass

from ltx.errors import ConstructionError
from ltx.graph import Graph, fold_batch_norm
from ltx.ticket import Ticket
from ltx.verification.approximation import Approximation
from ltx.verification.structure import structure
from ltx.verification.topology import topology


@dataclass(frozen=True)
class Verification:
    """What was checked and what is wrong."""

    violations: tuple[str, ...]
    approximated: int  # sums over kept subsets that were compared with a target parameter; 0 without a target
    max_parameter_error: float  # largest |sum - parameter|; NaN without a target

    @property
    def ok(self) -> bool:
        return not self.violations


def verify(ticket: Ticket, target: Graph | None = None) -> Verification:
    """Verify a ticket, against its source alone or with its target's graph too."""
    violations = list(structure(ticket))
    if target is None or violations:
        return Verification(tuple(violations), 0, float("nan"))
    if ticket.target_sha256 != target.digest():
        ours, theirs = ticket.target_sha256[:12], target.digest()[:12]
        violations = [f"target: has SHA-256 {theirs}..., the ticket was made for {ours}..."]
    else:
        try:
            if not any(node.op == "batch_norm" for node in ticket.graph):
                target = fold_batch_norm(target)  # a ticket without batch norm approximates the folded parameters
            violations = list(topology(ticket, target))
        except ConstructionError as error:
            violations = [f"graph: has no batch norm; {error}"]
    if violations:
        return Verification(tuple(violations), 0, float("nan"))
    check = Approximation(ticket, target)
    violations = list(check.run())
    return Verification(tuple(violations), check.compared, check.worst)
