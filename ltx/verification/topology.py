"""Is a ticket's graph the target's, with one or two layers of the source for each of its layers?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from ltx.graph import Graph, Node
from ltx.operations import POOLINGS
from ltx.source import SourceLayer
from ltx.ticket import Ticket, TicketNode
from ltx.verification.pairs import taps_read

Operation = tuple  # what matters of an operation, behind it the positions of those that it reads


def topology(ticket: Ticket, target: Graph) -> Iterator[str]:
    """Violations of: the same operations on the same operations, a pair of layers standing for one."""
    ours, theirs = _ticket_operations(ticket, target), _target_operations(target)
    if isinstance(ours, str):
        yield ours
        return
    for mine, wanted in zip(ours, theirs, strict=False):
        if mine != wanted:
            yield f"graph: has {mine} where the target has {wanted}"
            return
    if len(ours) != len(theirs):
        yield f"graph: has {len(ours)} operations, the target {len(theirs)}"
    given = tuple(node.attributes["target"] for node in ticket.graph if node.op == "given")
    if given and given != target.head:
        yield f"graph: the layers {list(given)} are given, only the head may be"


def _order(nodes: Mapping[str, TicketNode] | Mapping[str, Node], last: str) -> list[str]:
    """Names of the nodes that lead to `last`, those that a node reads before it: the same for equal graphs."""
    order: dict[str, None] = {}
    stack = [(last, False)]
    while stack:
        name, done = stack.pop()
        if done:
            order.setdefault(name)
        elif name not in order:
            stack.append((name, True))
            stack.extend((before, False) for before in reversed(nodes[name].inputs))
    return list(order)


class _Operations:
    """Operations in order; a node that stands for none has the position of the one in front of it."""

    def __init__(self) -> None:
        self.found: list[Operation] = []
        self.position: dict[str, int] = {}
        self.flat: dict[str, bool] = {}  # whether what a node gives is flattened

    def add(self, node: TicketNode | Node, inputs: tuple[str, ...], *operation, flat: bool) -> None:
        before = tuple(self.position[name] for name in inputs)
        self.position[node.name], self.flat[node.name] = len(self.found), flat
        self.found.append((*operation, before))

    def skip(self, node: TicketNode | Node, *, flat: bool) -> None:
        self.position[node.name], self.flat[node.name] = self.position[node.inputs[0]], flat


def _target_operations(target: Graph) -> list[Operation]:
    """The target's operations, each with what matters of it. A flatten shows in the layers behind it."""
    nodes = {node.name: node for node in target.nodes}
    result = _Operations()
    channels: dict[str, int] = {}  # of the nodes behind a layer
    for name in _order(nodes, target.nodes[-1].name):
        node = nodes[name]
        flat = any(result.flat[before] for before in node.inputs)
        if node.inputs and node.inputs[0] in channels:
            channels[name] = channels[node.inputs[0]]
        if node.op == "flatten":
            result.skip(node, flat=True)
            continue
        operation: tuple = (node.op,)
        if node.activation is not None:
            operation = ("activation", *sorted(node.activation.attributes.items()))
        elif node.op in POOLINGS:
            operation = (node.op, *_plain(node.attributes), flat)
        elif node.layer is not None:
            layer = node.layer
            before = (
                layer.weight.shape[1] if layer.kind == "conv" else channels.get(node.inputs[0], layer.weight.shape[1])
            )
            taps = layer.weight[0].numel() // before
            kernel = tuple(layer.weight.shape[2:])
            operation = (name, layer.kind, kernel, layer.stride, layer.padding, layer.dilation, taps, flat)
            channels[name], flat = len(layer.weight), flat or layer.kind == "linear"
        elif node.op == "output":
            operation = ("output", flat)
        elif node.op == "batch_norm":
            operation = ("batch_norm", name, flat)
        result.add(node, node.inputs, *operation, flat=flat)
    return result.found


def _ticket_operations(ticket: Ticket, target: Graph) -> list[Operation] | str:
    """The ticket's operations in the same form, a pair of layers as one; or what is wrong with a pair."""
    nodes = {node.name: node for node in ticket.graph}
    order = _order(nodes, ticket.graph[-1].name)
    if len(order) != len(ticket.graph):
        return f"graph: {len(ticket.graph) - len(order)} nodes do not lead to the output"
    result = _Operations()
    copies: dict[str, SourceLayer] = {}  # node inside a pair -> the pair's first layer
    active: set[str] = set()  # those of them that are behind the activation inside the pair
    theirs = [node.activation.attributes for node in target.nodes if node.activation is not None]
    for name in order:
        node = nodes[name]
        layer = ticket.layer(node.attributes["layer"]) if node.op == "layer" else None
        flat = any(result.flat[before] for before in node.inputs)
        pair = next((copies[before] for before in node.inputs if before in copies), None)
        if pair is not None and node.op in ("activation", "flatten"):
            if node.op == "activation" and (node.inputs[0] in active or len(_readers(ticket, node.inputs[0])) != 1):
                return f"graph: node '{name}' follows the copies of {pair.target}, the sums must"
            if node.op == "activation" and node.attributes not in theirs:
                return f"graph: node '{name}' is {node.attributes.get('function')}, no activation of the target"
            copies[name] = pair
            if node.op == "activation" or node.inputs[0] in active:
                active.add(name)
            result.skip(node, flat=flat or node.op == "flatten")
        elif pair is not None:
            if layer is None or layer.role != "pair" or layer.target != pair.target:
                return f"graph: node '{name}' follows the copies of {pair.target}, the sums must"
            if node.inputs[0] not in active and not _linear(target, layer.target):
                return f"graph: node '{name}' follows copies, an activation must"
            together = _together(pair, layer, target, flat)
            if isinstance(together, str):
                return f"layer {layer.name}: {together}"
            result.add(node, node.inputs, *together, flat=flat or layer.kind == "linear")
        elif layer is not None and layer.role == "copies":
            if layer.kind == "linear" and (layer.taps != 1 or not flat):
                return f"layer {layer.name}: linear copies read vectors, one number each"
            copies[name] = layer
            result.skip(node, flat=flat)
        elif layer is not None:
            if layer.role == "pair":
                return f"layer {layer.name}: has no copies of its own before it, or has them without being of a pair"
            result.add(node, node.inputs, *_operation(layer, flat), flat=flat or layer.kind == "linear")
        elif node.op == "flatten":
            result.skip(node, flat=True)
        elif node.op == "given":
            operation = (node.attributes["target"], "linear", (), *_PLAIN, node.attributes["taps"], flat)
            result.add(node, node.inputs, *operation, flat=True)
        elif node.op == "activation":
            operation = ("activation", *sorted(node.attributes.items()))
            result.add(node, node.inputs, *operation, flat=flat)
        elif node.op in POOLINGS:
            result.add(node, node.inputs, node.op, *_plain(node.attributes), flat, flat=flat)
        elif node.op == "output":
            result.add(node, node.inputs, "output", flat or bool(node.attributes.get("flatten")), flat=flat)
        elif node.op == "batch_norm":
            result.add(node, node.inputs, "batch_norm", name, flat, flat=flat)
        else:
            result.add(node, node.inputs, node.op, flat=flat)
    return result.found


_PLAIN = ((1, 1), (0, 0), (1, 1))  # stride, padding, dilation


def _operation(layer: SourceLayer, flat: bool) -> tuple:
    return (
        layer.target, layer.kind, layer.shape[2:], layer.stride, layer.padding, layer.dilation, layer.taps, flat
    )  # fmt: skip


def _together(first: SourceLayer, second: SourceLayer, target: Graph, flat: bool) -> tuple | str:
    """What a pair of layers computes, as the operation of the target that it stands for, or what is wrong with it."""
    if first.kind == "linear" and second.kind != "linear":
        return "linear copies stand in front of a convolution"
    theirs = target.layers.get(second.target)
    plain = first.kind == "linear" or (math.prod(first.shape[2:]), first.stride, first.padding) == (1, (1, 1), (0, 0))
    if theirs is None or theirs.kind != second.kind or (plain and first.dilation == (1, 1)):
        return _operation(second, flat)
    read = taps_read(first, second, theirs)
    if isinstance(read, str):
        return read
    if second.kind == "linear":
        return _operation(second, flat)
    kernel = tuple(theirs.weight.shape[2:])
    how = (theirs.stride, theirs.padding, theirs.dilation)
    return (second.target, second.kind, kernel, *how, math.prod(kernel), flat)


def _plain(attributes: dict) -> tuple:
    """A pooling's attributes, which JSON has turned into lists."""
    return tuple(
        tuple(value) if isinstance(value, list | tuple) else value for _, value in sorted(attributes.items())
    )  # fmt: skip


def _linear(target: Graph, name: str) -> bool:
    """Whether the pair for a layer of the target has no activation inside: a projection, or a linear network's."""
    plain = all(node.activation is None or node.activation.name == "identity" for node in target.nodes)
    return plain or (name in target.layers and target.is_projection(name))


def _readers(ticket: Ticket, name: str) -> list[TicketNode]:
    return [node for node in ticket.graph if name in node.inputs]
