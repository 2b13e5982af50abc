"""One layer for one: behind the first layer, L+1 approximates each target layer by one source layer (Theorem 3.2).

The inputs exist in m slots each, so that W[i, j, k] is a subset sum of w[(i, q), (j, s), k], s = 1..m, for every
copy q of channel i.
"""

from __future__ import annotations

import torch

from ltx.constructions.builder import (
    Outputs,
    Stream,
    TicketBuilder,
    constant_row,
    constant_tap,
    layer_scale,
    target_problems,
)
from ltx.constructions.rows import BaseSets
from ltx.graph import Layer


def direct(
    builder: TicketBuilder,
    name: str,
    target: Layer,
    stream: Stream,
    outputs: Outputs,
    *,
    free_constants: bool,
) -> Stream:
    """Approximate `target` by one source layer that reads the slots of `stream`.

    Args:
        free_constants: whether a fully pruned row is constant and not 0 behind the activation (phi(0) != 0).
    """
    m, epsilon = builder.plan.base_set_size, builder.plan.epsilon
    slots, taps = stream.channels(target)  # (C_in, m)
    columns, multipliers = slots.clamp_min(0), torch.ones(slots.shape, dtype=torch.float64)
    constant, tap = len(columns), constant_tap(target, name, taps, needed=len(stream.constants) > 0)
    if len(stream.constants):
        columns = torch.cat([columns, stream.constants[None, :m]])
        multipliers = torch.cat([multipliers, stream.constant_values[None, :m]])
    problems = target_problems(target, taps, epsilon, torch.arange(len(slots))[:, None], constant, tap)
    row, constants, values = builder.approximate(
        name, target, stream.node, problems, BaseSets(columns, multipliers), outputs,
        constant_row(outputs, constant, tap, free=free_constants),
        taps=taps, sigma=layer_scale(target, builder.plan.scaling), role="direct",
    )  # fmt: skip
    return Stream(name, row, constants, values, float("inf"), vector=target.kind == "linear")
