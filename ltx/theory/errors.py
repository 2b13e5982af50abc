"""From the outputs' error to that of every parameter, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from ltx.constructions.layout import IMAGE, kept_of, layout
from ltx.defaults import usual_defaults
from ltx.graph import Graph, Node, trace
from ltx.theory.parts import Part, check, parts_of

CONSTANTS_WITHIN = 0.2  # of 1 a row has to be that makes constants, where nothing else asks for less
NOTHING = 1e-300  # in place of 0, the gain of layers and batch norms that are zero


def budgets(
    graph: Graph, parts: Mapping[str, Part], error: float, construction: str, form: str, sizes: Mapping[str, int]
) -> tuple[dict[str, float], dict[str, float]]:
    """Walking back from the output: the largest deviation of every layer's outputs, and epsilon of its parameters.

    An epsilon is at most the largest parameter that its layer may have, also where nothing counts: in front of zeros.
    """
    allowed = dict.fromkeys((node.name for node in graph.nodes), math.inf)
    allowed[graph.nodes[-1].name] = error
    epsilons = {}
    for node in reversed(graph.nodes):
        mine = allowed[node.name]
        if node.name in parts:
            part = parts[node.name]
            shares = 1 + (part.reads != IMAGE) + (not part.linear)
            row = max(1, part.largest_row)
            epsilon = min(mine / (shares * row * max(part.largest_input, 1.0)), part.scale)
            inside = mine / max(shares * part.gain(epsilon, sizes[node.name]), NOTHING)
            if form == "theorem":  # smaller where its assumptions hold; where they do not, it is not enough
                smaller = mine / ((3 if construction == "2L" else 2) * max(1, part.parameters))
                epsilon = min(epsilon, smaller)
                inside = min(inside, smaller / (sizes[node.name] * part.reach if part.several else 1))
            epsilons[node.name] = min(epsilon, part.scale, CONSTANTS_WITHIN if part.makes_constants else math.inf)
        elif node.layer is not None:  # a head that is kept
            inside = mine / max(float(node.layer.weight.double().abs().flatten(1).sum(1).max()), NOTHING)
        else:
            inside = mine / max(_gain(node), NOTHING)
        for name in node.inputs:
            allowed[name] = min(allowed[name], inside * _share(graph, node, name))
    return {name: allowed[name] for name in parts}, epsilons


@usual_defaults()
def ticket_error(
    model: nn.Module | Graph,
    epsilons: Mapping[str, float],
    sizes: Mapping[str, int],
    *,
    construction: str,
    input_range: tuple[float, float] = (-1.0, 1.0),
    head: str = "keep",
    scaling: str = "unit",
    law: str = "uniform",
) -> float:
    """A bound of the outputs' deviation where every parameter of a layer is within its epsilon: `budgets` forwards.

    That there are such subset sums is not asked for, so that parameters may be beyond the scale of their base sets.

    Args:
        epsilons: layer -> error of its parameters.
        sizes: layer -> its m: a parameter is a sum of at most so many entries.
        law: of the source's parameters, which says how large an entry may be.

    Raises:
        LtxError: arguments without meaning, a layer without an epsilon or m.
        ConstructionError: a target that no construction takes.
    """
    graph = trace(model)
    kept = kept_of(graph, head)
    joined = layout(graph, math.inf, kept=kept)  # who reads whom: that constants can be made is the ticket's business
    parts = parts_of(graph, joined, construction, kept, input_range, scaling, law)
    for name in parts:
        check(name in epsilons and name in sizes, f"layer {name}: has no epsilon or no m")
        check(0 <= epsilons[name] < math.inf, f"layer {name}: epsilon {epsilons[name]:g} must be 0 or more, and finite")
        check(sizes[name] >= 1, f"layer {name}: m {sizes[name]} must be at least 1")
    deviation: dict[str, float] = {}
    for node in graph.nodes:
        inside = [deviation[name] for name in node.inputs]
        if node.op == "input":
            deviation[node.name] = 0.0
        elif node.name in parts:
            part, epsilon = parts[node.name], epsilons[node.name]
            off = part.largest_row * epsilon
            reach = off * max(part.largest_input, 1.0) * (1 if part.linear else 2)
            deviation[node.name] = part.gain(epsilon, sizes[node.name]) * inside[0] + reach
        elif node.layer is not None:
            deviation[node.name] = float(node.layer.weight.double().abs().flatten(1).sum(1).max()) * inside[0]
        else:
            deviation[node.name] = sum(inside) * _gain(node)
    return deviation[graph.nodes[-1].name]


def _gain(node: Node) -> float:
    """By how much an elementwise operation may enlarge a deviation."""
    if node.activation is not None:
        return node.activation.lipschitz
    if node.batch_norm is not None:
        return float(node.batch_norm.scale.abs().max())
    return 1.0


def _share(graph: Graph, node: Node, name: str) -> float:
    """Which part of a sum's deviation a summand may have; each layer that reads a concatenation's part the same."""
    if node.op != "add":
        return 1.0
    mine = graph[name].attributes.get("summands", 1) if "summands" in node.attributes else 1
    return mine / node.attributes.get("summands", 2)
