"""Checks of a ticket that use nothing of the code that made it: its file, its source, and the target.

Without a target: the ticket is a subnetwork of the source that its seed defines (`structure`). With the target: it
is the target's network with every layer replaced by one or two layers of the source (`topology`), and the source's
parameters, summed over the kept subsets, are within epsilon of every target parameter above epsilon, in every slot,
and nothing else is kept (`approximation`). With feedback the bound is another one, or none, and a row's error on the
calibration images is what the ticket says (`rows`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ltx.checks import outside
from ltx.defaults import usual_defaults
from ltx.errors import ConstructionError, LtxError
from ltx.graph import Graph, fold_batch_norm, trace
from ltx.ticket import Ticket
from ltx.verification.approximation import Approximation
from ltx.verification.rows import Rows
from ltx.verification.structure import structure
from ltx.verification.topology import topology


@dataclass(frozen=True)
class Verification:
    """What was checked and what is wrong."""

    violations: tuple[str, ...]
    approximated: int  # sums over kept subsets that were compared with a target parameter; 0 without a target
    max_parameter_error: float  # largest |sum - parameter|; NaN without a target
    rows: int = 0  # whose errors were measured on calibration images
    max_row_error: float = float("nan")  # the largest, over the standard deviation of the target's values there

    @property
    def ok(self) -> bool:
        return not self.violations


@usual_defaults()
def verify(ticket: Ticket, target: Graph | nn.Module | None = None, calibration: Tensor | None = None) -> Verification:
    """Verify a ticket, against its source alone or with its target too.

    Args:
        target: the network that the ticket was made for, or its graph.
        calibration: the images (n, C, H, W) that a ticket with `selection=feedback` was made with. Without a bound its
            parameters are not within epsilon of the target's: what it claims is the error of its rows on these images.

    Raises:
        ConstructionError: a target that cannot be traced, or computes something else on the images.
        LtxError: a ticket that is none, or calibration images that are no tensor.
    """
    if not isinstance(ticket, Ticket):
        raise LtxError(f"a {type(ticket).__name__} is no ticket; read one with ltx.Ticket.load(PATH)")
    if calibration is not None and not isinstance(calibration, Tensor):
        raise LtxError(f"calibration: must be a tensor of images (n, C, H, W), is a {type(calibration).__name__}")
    target = None if target is None else trace(target, calibration)
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
    if ticket.activation != target.functions:
        violations.append(f"activation '{ticket.activation}': the target has {target.functions}")
    if violations:
        return Verification(tuple(violations), 0, float("nan"))
    check = Approximation(ticket, target)
    violations = list(check.run())
    if calibration is None or not ticket.feedback or violations:
        return Verification(tuple(violations), check.compared, check.worst)
    if (reach := outside(calibration, ticket.input_low, ticket.input_high)) is not None:
        made = f"[{ticket.input_low:g}, {ticket.input_high:g}]"
        violations = [f"inputs: made for {made}, the calibration images lie in {reach}"]
        return Verification(tuple(violations), check.compared, check.worst)
    rows = Rows(ticket, target, calibration)
    violations = tuple(rows.run())
    return Verification(violations, check.compared, check.worst, rows.measured, rows.largest)
