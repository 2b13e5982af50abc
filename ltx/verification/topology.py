"""Is a ticket's graph the target's, with one or two layers of the source for each of its layers?"""

from __future__ import annotations

from collections.abc import Iterator

from ltx.graph import Graph, Node
from ltx.source import SourceLayer
from ltx.ticket import Ticket, TicketNode


def topology(ticket: Ticket, target: Graph) -> Iterator[str]:
    """Violations of: the same target; the same operations in the same order, a pair of layers standing for one."""
    if ticket.target_sha256 != target.digest():
        yield (f"target: has SHA-256 {target.digest()[:12]}..., the ticket was made for {ticket.target_sha256[:12]}...")
        return
    ours, theirs = _ticket_chain(ticket), _target_chain(target)
    if isinstance(ours, str):
        yield ours
        return
    for mine, wanted in zip(ours, theirs, strict=False):
        if mine != wanted:
            yield f"graph: has {mine} where the target has {wanted}"
            return
    if len(ours) != len(theirs):
        yield f"graph: has {len(ours)} operations, the target {len(theirs)}"
    given = [node.attributes["target"] for node in ticket.graph if node.op == "given"]
    if given and given != [target.head]:
        yield f"graph: the layers {given} are given, only the head may be"


def _target_chain(target: Graph) -> list[tuple]:
    """The target's operations, each with what matters of it. A flatten shows in the layers behind it."""
    chain, flat, channels = [], False, None
    nodes = {node.name: node for node in target.nodes}
    path = [next(node for node in target.nodes if node.op == "output")]
    while path[-1].inputs:
        path.append(nodes[path[-1].inputs[0]])
    for node in reversed(path):
        if node.op == "flatten":
            flat = True
        elif node.op == "activation":
            chain.append(_activation(node))
        elif node.op == "max_pool":
            chain.append(("max_pool", *(tuple(node.attributes[k]) for k in ("kernel_size", "stride", "padding")), flat))
        elif node.layer is not None:
            layer = node.layer
            reads = layer.weight[0].numel()
            kernel = tuple(layer.weight.shape[2:])
            before = layer.weight.shape[1] if layer.kind == "conv" or channels is None else channels
            taps = reads // before
            chain.append((node.name, layer.kind, kernel, layer.stride, layer.padding, layer.dilation, taps, flat))
            channels = len(layer.weight)
            flat = flat or layer.kind == "linear"
        elif node.op == "output":
            chain.append(("output", flat))
    return chain


def _activation(node: Node) -> tuple:
    phi = node.activation
    assert phi is not None
    return ("activation", phi.name, phi.slope_neg if phi.name == "leaky_relu" else None)


def _ticket_chain(ticket: Ticket) -> list[tuple] | str:
    """The ticket's operations in the same form, a pair of layers as one; or what is wrong with a pair."""
    chain, flat = [], False
    nodes = {node.name: node for node in ticket.graph}
    path = [ticket.graph[-1]]
    while path[-1].inputs:
        path.append(nodes[path[-1].inputs[0]])
    if len(path) != len(ticket.graph):
        return f"graph: {len(ticket.graph) - len(path)} nodes do not lead to the output"
    copies: SourceLayer | None = None
    inner = False  # behind copies, in front of the activation inside their pair
    for node in reversed(path):
        layer = ticket.layer(node.attributes["layer"]) if node.op == "layer" else None
        if inner and node.op != "activation":
            return f"graph: node '{node.name}' follows copies, an activation must"
        if copies is not None and not inner and node.op != "flatten" and (layer is None or layer.role != "pair"):
            return f"graph: node '{node.name}' follows the copies of {copies.target}, the sums must"
        if inner:
            inner = False
        elif node.op == "flatten":
            flat = True
        elif node.op == "activation":
            chain.append(("activation", node.attributes["function"], node.attributes.get("negative_slope")))
        elif node.op == "max_pool":
            chain.append(("max_pool", *(tuple(node.attributes[k]) for k in ("kernel_size", "stride", "padding")), flat))
        elif node.op == "given":
            chain.append((node.attributes["target"], "linear", (), *_PLAIN, node.attributes["taps"], flat))
            flat = True
        elif layer is not None and layer.role == "copies":
            if _not_univariate(layer):
                return f"layer {layer.name}: copies need a 1x1 layer with stride 1 and without padding"
            copies, inner = layer, True
        elif layer is not None:
            if (layer.role == "pair") != (copies is not None) or (copies and copies.target != layer.target):
                return f"layer {layer.name}: has no copies of its own before it, or has them without being of a pair"
            chain.append(
                (
                    layer.target,
                    layer.kind,
                    layer.shape[2:],
                    layer.stride,
                    layer.padding,
                    layer.dilation,
                    layer.taps,
                    flat,
                )
            )
            copies = None
            flat = flat or layer.kind == "linear"
        elif node.op == "output":
            chain.append(("output", flat or _flattens(node)))
    return chain


_PLAIN = ((1, 1), (0, 0), (1, 1))  # stride, padding, dilation


def _not_univariate(layer: SourceLayer) -> bool:
    kernel = all(n == 1 for n in layer.shape[2:])
    return not kernel or layer.taps != 1 or (layer.stride, layer.padding, layer.dilation) != _PLAIN


def _flattens(node: TicketNode) -> bool:
    return bool(node.attributes.get("flatten"))
