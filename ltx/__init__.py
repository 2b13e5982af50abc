"""ltx: strong lottery tickets, constructed by solving a subset-sum problem for every parameter of a target.

import ltx
ticket = ltx.construct(model, construction="L+1", base_set_size=15, epsilon=0.01, seed=0)
ticket.save("ticket.safetensors")
network = ticket.to_module()

found = ltx.subset_sum.solve(values, targets, 0.01)  # the engine on its own
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ltx import subset_sum
    from ltx.constructions import construct
    from ltx.errors import LtxError
    from ltx.feedback import Feedback
    from ltx.ticket import Ticket
    from ltx.verification import verify

__all__ = ["Feedback", "LtxError", "Ticket", "construct", "subset_sum", "verify"]

_WHERE = {
    "construct": "ltx.constructions", "Feedback": "ltx.feedback", "LtxError": "ltx.errors", "Ticket": "ltx.ticket",
    "verify": "ltx.verification",
}  # fmt: skip


def __getattr__(name: str):
    """Import the public names on first use, so that `ltx --help` need not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'ltx' has no attribute '{name}'")
    import importlib

    if name == "subset_sum":
        return importlib.import_module("ltx.subset_sum")
    return getattr(importlib.import_module(_WHERE[name]), name)
