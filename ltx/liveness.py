"""Which channels of which node anything reads, found back to front through a ticket's graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ltx.ticket import TicketNode


def read_channels(
    nodes: Sequence[TicketNode], given: Mapping[str, Tensor], columns: Callable[[str, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Node name -> sorted channels that are read, in the order from the output to the input.

    Behind a flatten the channels are those of the image before it.

    Args:
        columns: (source layer, its read rows) -> the input channels that these rows read.
    """
    read: dict[str, Tensor] = {}
    nothing = torch.empty(0, dtype=torch.int64)
    for node in reversed(nodes):
        mine = read.setdefault(node.name, nothing)
        if node.op == "output":
            wanted = torch.tensor(node.attributes["rows"], dtype=torch.int64)
        elif node.op == "given":
            entries = given[f"{node.name}.weight"].ne(0).any(0).nonzero().flatten()
            wanted = entries // node.attributes["taps"]
        elif node.op == "layer":
            wanted = torch.bincount(columns(node.attributes["layer"], mine)).nonzero().flatten()
        else:
            wanted = mine
        for name in node.inputs:
            read[name] = torch.cat([read.get(name, nothing), wanted]).unique()
    return read
