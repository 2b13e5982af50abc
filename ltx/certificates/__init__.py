"""A proven bound on how far a ticket is from its target, from the parameters that it keeps.

One pass through the ticket's network, with intervals that are rounded outwards. For every slot, at every pixel, two
intervals are carried: what its channel of the target can be, X, and how far the slot can be off, d. A row that keeps
w_s of the slots s of channel j at a tap where the target has W is off by

    sum over s of w_s d_s  +  (sum over s of w_s - W) X,

and both sums are known. So an error of the parameters counts for itself, and a deviation counts with the entries that
are really kept: |w_1| + |w_2|, and not |w_1 + w_2|. Behind an activation a deviation is multiplied by at most its
Lipschitz constant, or, where that is less, is what the ranges of slot and channel leave.

In a two-for-one pair the copies phi(lambda_n Y) of a channel are functions of the one slot Y = X + d that they read.
With phi linear on either side of 0 their sum is A_+ Y for Y > 0 and A_- Y below, exactly, which is off by

    W d  +  (A_+- - W) Y  [+ the error of the linearisation, by Assumption 2.3]:

the deviation counts as in the target, however large the entries are. That is why 2L tickets of deep networks work and
L+1 tickets of smallest subsets do not (`ltx.theory` says what the proof of Theorem 3.2 takes for granted there).

A second pass goes from the outputs back to the image (`ltx.certificates.backwards`), and where that is worth it one
from every slot in front of a later activation (`ltx.certificates.tightened`). The better bound counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ltx.certificates.backwards import Backwards
from ltx.certificates.forwards import Forwards, NodeBound
from ltx.certificates.tightened import tightened
from ltx.defaults import usual_defaults
from ltx.errors import LtxError
from ltx.graph import Graph, fold_batch_norm, trace
from ltx.intervals import Interval
from ltx.ticket import Ticket


@dataclass(frozen=True)
class Certificate:
    """Bounds over all inputs in a box."""

    outputs: Interval  # f_eps - f_t, (O,)
    nodes: tuple[NodeBound, ...]

    @property
    def bound(self) -> Tensor:
        """Of |f_eps - f_t|, (O,) float64."""
        return self.outputs.magnitude

    @property
    def largest(self) -> float:
        return float(self.bound.max())


@usual_defaults()
@torch.no_grad()
def certify(ticket: Ticket, target: nn.Module | Graph, low: Tensor, high: Tensor, *, sharp: bool = True) -> Certificate:
    """Bound the deviation of a ticket's outputs over all images between `low` and `high`.

    Args:
        ticket: one that `ltx.verification.verify` finds in order.
        target: the network that it was made for, or its graph, whose parameters are float32: of batch norm scale and
            shift (`ltx.graph.trace` rounds them), of batch norm that the ticket folds the folded layers.
        low, high: (C, H, W), the least and largest value of each element; any float type, exactly taken.
        sharp: whether the copies in a pair are treated as functions of the slot that they read, and not as slots with
            deviations of their own; and whether passes go back from the outputs, and from later activations.

    Returns:
        a bound for the networks in exact arithmetic; float32 adds its own rounding when they are run. It is infinite
        where float64 does not hold what there is to bound.

    Raises:
        LtxError: a box without images, without bounds, or of images that the target does not take.
        ConstructionError: a target that cannot be traced.
    """
    target = trace(target)
    if low.shape != high.shape or low.ndim != 3 or not bool(((low <= high) & low.isfinite() & high.isfinite()).all()):
        raise LtxError(f"low and high must be finite images (C, H, W) with low <= high, not {tuple(low.shape)}")
    if not any(node.op == "batch_norm" for node in ticket.graph):
        target = fold_batch_norm(target)
    low, high = low.double().cpu(), high.double().cpu()
    known = tightened(ticket, target, low, high) if sharp else {}
    forwards = Forwards(ticket, target, Interval(low, high), sharp, known)
    nodes = tuple(forwards.run())
    outputs = forwards.outputs.within(Backwards(forwards).run()) if sharp else forwards.outputs
    return Certificate(outputs, nodes)
