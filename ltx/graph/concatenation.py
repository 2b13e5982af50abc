"""Concatenation along channels, taken apart: a layer that reads one is the sum of layers that read its parts.

With W = [W_a, W_b] by input channels, W * cat(a, b) = W_a * a + W_b * b, in the target and in the source alike: the
layers of the source that stand for W_a and W_b together are one layer that reads a concatenation, with independent
parameters throughout, and a row of it is one row of each. The bias goes with one part. So graphs hold no
concatenations, and constructions, theorems and certificates need to know nothing of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ltx.errors import ConstructionError
from ltx.graph.nodes import BatchNorm, Layer, Node

CONCATENATION = "cat"


@dataclass(frozen=True)
class _Part:
    """What one of the concatenated tensors is."""

    name: str  # of the node that gives it
    channels: int
    image: bool  # whether there is no layer in front of it


def take_apart(nodes: Sequence[Node]) -> list[Node]:
    """The same network without concatenations.

    Part p of what NAME computes on a concatenation is called NAME[p], the sum of the first p parts NAME[:p].

    Raises:
        ConstructionError: a concatenation that is added to something else, is the output, or whose parts' channels
            cannot be told, naming it.
    """
    by_name = {node.name: node for node in nodes}
    result: list[Node] = []
    parts: dict[str, tuple[_Part, ...]] = {}  # of the nodes that give a concatenation
    for node in nodes:
        if node.op == CONCATENATION:
            found = [parts[n] if n in parts else (_part(by_name, n, node.name),) for n in node.inputs]
            parts[node.name] = tuple(part for several in found for part in several)
        elif not any(name in parts for name in node.inputs):
            result.append(node)
        elif node.layer is not None:
            result += _layer(node, node.layer, parts[node.inputs[0]])
        else:
            mine = [parts.get(name, ()) for name in node.inputs]
            split = _elementwise(node, mine)
            result += split
            parts[node.name] = tuple(replace(p, name=n.name) for p, n in zip(mine[0], split, strict=True))
    return result


def _layer(node: Node, layer: Layer, parts: Sequence[_Part]) -> list[Node]:
    """Layers that read the parts, and their sum, which has the layer's name."""
    inputs, channels = layer.weight.shape[1], sum(part.channels for part in parts)
    if inputs % channels:
        there = " + ".join(str(part.channels) for part in parts)
        raise ConstructionError(f"layer '{node.name}' reads {inputs} channels, the concatenation has {there}")
    weights = layer.weight.split([part.channels * inputs // channels for part in parts], dim=1)
    result: list[Node] = []
    # the bias goes with the first: last are parts of the image, of which no constant can be made
    for many, p in enumerate(sorted(range(len(parts)), key=lambda p: parts[p].image), start=1):
        bias = layer.bias if many == 1 else torch.zeros_like(layer.bias)
        one = replace(layer, weight=weights[p].contiguous(), bias=bias)
        name = f"{node.name}[{p}]"
        before = result[-1].name if result else ""
        result.append(Node(name, "layer", (parts[p].name,), layer=one, attributes={"part_of": node.name}))
        if before:
            total = node.name if many == len(parts) else f"{node.name}[:{many}]"
            result.append(Node(total, "add", (before, name), attributes={"summands": many}))
    return result


def _elementwise(node: Node, parts: Sequence[Sequence[_Part]]) -> list[Node]:
    """An operation that treats every channel alike, part by part."""
    if node.op == "output":
        raise ConstructionError("the network returns a concatenation; put a layer behind it")
    sizes = [[part.channels for part in several] for several in parts]
    if any(size != sizes[0] for size in sizes):
        raise ConstructionError(
            f"node '{node.name}' adds a concatenation to what is not concatenated of as many channels; put a layer "
            "in between"
        )
    norms: Sequence[BatchNorm | None] = [None] * len(parts[0])
    if node.batch_norm is not None:
        if len(node.batch_norm.scale) != sum(sizes[0]):
            raise ConstructionError(
                f"batch norm '{node.name}' has {len(node.batch_norm.scale)} channels, the concatenation in front of it "
                f"{sum(sizes[0])}; flatten behind it"
            )
        scale, shift = node.batch_norm.scale.split(sizes[0]), node.batch_norm.shift.split(sizes[0])
        norms = [BatchNorm(*pair) for pair in zip(scale, shift, strict=True)]
    return [
        replace(node, name=f"{node.name}[{p}]", inputs=tuple(several[p].name for several in parts), batch_norm=norm)
        for p, norm in enumerate(norms)
    ]


def _part(nodes: Mapping[str, Node], name: str, cat: str) -> _Part:
    """What is concatenated by `cat`.

    Raises:
        ConstructionError: its channels cannot be told without running the network.
    """
    flat, averaged, node = False, False, nodes[name]
    while node.layer is None and node.inputs:
        flat = flat or node.op == "flatten"
        averaged = averaged or (node.op == "avg_pool" and node.attributes["kernel_size"] is None)
        before = [_origin(nodes, other) for other in node.inputs]
        if len({origin.layer is None for origin in before}) > 1:
            raise ConstructionError(f"node '{node.name}' adds the image itself; put a layer in between")
        node = nodes[node.inputs[0]]
    vector = averaged or (node.layer is not None and node.layer.kind == "linear")
    if flat and not vector:
        raise ConstructionError(f"node '{cat}' concatenates flattened images; flatten behind the concatenation")
    if node.layer is not None:
        return _Part(name, len(node.layer.weight), False)
    for other in nodes.values():  # a convolution of the image tells how many channels it has
        if other.layer is not None and other.layer.kind == "conv" and _of_the_image(nodes, other.inputs[0]):
            return _Part(name, other.layer.weight.shape[1], True)
    raise ConstructionError(f"node '{cat}' concatenates the image, whose channels no convolution of it tells")


def _of_the_image(nodes: Mapping[str, Node], name: str) -> bool:
    return _origin(nodes, name).op == "input"


def _origin(nodes: Mapping[str, Node], name: str) -> Node:
    """The layer, concatenation or input whose channels a node has."""
    node = nodes[name]
    while node.layer is None and node.op not in ("input", CONCATENATION):
        node = nodes[node.inputs[0]]
    return node
