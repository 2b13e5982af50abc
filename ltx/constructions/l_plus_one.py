"""One layer for one: behind the first layer, L+1 approximates each target layer by one source layer (Theorem 3.2).

The inputs exist in m slots each, so that W[i, j, k] is a subset sum of w[(i, q), (j, s), k], s = 1..m, for every
copy q of channel i.
"""

from __future__ import annotations

import torch

from ltx.constructions.builder import Step, TicketBuilder, constant_row, source_layer
from ltx.constructions.problems import constant_tap, layer_scale, target_problems
from ltx.constructions.rows import BaseSets
from ltx.graph import above
from ltx.ticket import CONSTANT


def direct(builder: TicketBuilder, step: Step) -> str:
    """Approximate a target layer by one source layer that reads m slots of each channel; the ticket's node."""
    name, target, place = step.name, step.target, step.place
    assert place.stream is not None
    m, epsilon = builder.copies(place.stream), builder.plan.epsilon
    weight = place.entries(target)
    taken = place.take(above(weight, epsilon).any(0), m, m if step.biased else 0)
    columns, multipliers = taken.slots, torch.ones(taken.slots.shape, dtype=torch.float64)
    channels = torch.arange(len(columns))
    constant, tap = len(columns), constant_tap(target, name, weight.shape[2], needed=step.biased)
    if step.biased:
        columns = torch.cat([columns, taken.constants[None]])
        multipliers = torch.cat([multipliers, taken.constant_values[None]])
        channels = torch.cat([channels, torch.tensor([CONSTANT])])
    problems = target_problems(weight, target, epsilon, torch.arange(len(weight[0]))[:, None], constant, tap)
    layer = source_layer(
        builder, name, target, weight.shape[2], sigma=layer_scale(target, builder.plan.scaling), role="direct"
    )
    return builder.add_writer(
        layer, builder.flattened(place), place.stream, step,
        [*problems, constant_row(step, constant, tap)],
        BaseSets(columns, multipliers, channels, torch.ones(len(channels), 2)),
    )  # fmt: skip
