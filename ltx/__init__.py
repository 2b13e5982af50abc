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
    from ltx import certificates, data, deviation, evaluation, export, graph, subset_sum, targets, theory  # noqa: F401
    from ltx.constructions import construct
    from ltx.errors import LtxError
    from ltx.feedback import Feedback
    from ltx.ticket import Ticket
    from ltx.verification import verify

__all__ = ["Feedback", "LtxError", "Ticket", "construct", "subset_sum", "verify"]

_MODULES = (
    "certificates", "data", "deviation", "evaluation", "export", "graph", "subset_sum", "targets", "theory",
)  # fmt: skip
_WHERE = {
    "construct": "ltx.constructions", "Feedback": "ltx.feedback", "LtxError": "ltx.errors", "Ticket": "ltx.ticket",
    "verify": "ltx.verification",
}  # fmt: skip


def __getattr__(name: str):
    """Import the public names on first use, so that `ltx --help` need not wait for torch."""
    import importlib

    if name in _MODULES:
        return importlib.import_module(f"ltx.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module 'ltx' has no attribute '{name}'")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
