"""The two constructions: from a target network and a seed to a ticket."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from ltx.activations import ACTIVATIONS, Activation
from ltx.constructions.builder import Outputs, Plan, Stream, TicketBuilder
from ltx.constructions.l_plus_one import direct
from ltx.constructions.two_for_one import two_for_one
from ltx.errors import ConstructionError
from ltx.graph import Graph, Node, above, trace
from ltx.subset_sum import MAX_BASE_SET_SIZE
from ltx.ticket import Ticket

CONSTRUCTIONS = ("2L", "L+1")


@dataclass(frozen=True)
class Statistics:
    """What a construction cost."""

    problems: int  # subset-sum problems solved, those of failed rows included
    failures: int  # problems without a subset within epsilon


def construct(
    model: nn.Module | Graph,
    *,
    construction: str = "L+1",
    base_set_size: int = 15,
    epsilon: float = 0.01,
    seed: int = 0,
    selection: str = "smallest",
    head: str = "keep",
    scaling: str = "unit",
    input_range: tuple[float, float] = (-1.0, 1.0),
    device: str = "cpu",
    on_statistics: Callable[[Statistics], None] = lambda _: None,
) -> Ticket:
    """Construct a lottery ticket for a target network.

    Args:
        model: the target, or its graph from `ltx.graph.trace`.
        construction: `2L` (Theorem 3.1, two source layers for every target layer) or `L+1` (Theorem 3.2, two for
            the first, one for each other).
        base_set_size: m, the number of random parameters to choose from for each target parameter.
        epsilon: allowed error of one parameter; parameters of at most epsilon in magnitude are dropped.
        seed: of the source network, 0 <= seed < 2**64.
        selection: `smallest` or `best`, see `ltx.subset_sum.solve`.
        head: `keep` takes the classifier from the target, uncounted (the paper's, for MNIST); `construct`
            approximates it like any other layer.
        scaling: `unit` draws from [-1, 1] (the paper's); `layer_max` from [-s, s] where a target layer has
            entries of magnitude s beyond 1.
        input_range: the least and largest value of an input element; decides whether negative inputs need base
            sets of their own, and how far tanh or sigmoid have to be scaled down to be linear on the inputs.
        device: where the source is computed and the problems are solved, `cpu` or `cuda`. The ticket is the
            same on either.

    Raises:
        ConstructionError: an unsupported module, a parameter out of reach, or settings that have no meaning.
    """
    if construction not in CONSTRUCTIONS:
        raise ConstructionError(f"construction '{construction}' is not known; there are {', '.join(CONSTRUCTIONS)}")
    for name, value, known in (
        ("head", head, ("keep", "construct")),
        ("scaling", scaling, ("unit", "layer_max")),
    ):
        if value not in known:
            raise ConstructionError(f"{name} '{value}' is not known; there are {', '.join(known)}")
    if not 1 <= base_set_size <= MAX_BASE_SET_SIZE:
        raise ConstructionError(f"base_set_size {base_set_size} must lie between 1 and {MAX_BASE_SET_SIZE}")
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ConstructionError(f"epsilon {epsilon} must be a positive number")
    if not (0 <= seed < 2**64):
        raise ConstructionError(f"seed {seed} must lie between 0 and 2**64 - 1")
    graph = model if isinstance(model, Graph) else trace(model)
    builder = TicketBuilder(Plan(base_set_size, epsilon, seed, selection, scaling, device))
    _Walk(graph, builder, construction, head).run(input_range)
    on_statistics(Statistics(builder.problems, builder.failures))
    names = dict.fromkeys(n.activation.name for n in graph.nodes if n.activation is not None)
    return builder.finish(
        construction=construction,
        activation=",".join(names) or "identity",
        target_sha256=graph.digest(),
        input_low=float(input_range[0]),
        input_high=float(input_range[1]),
    )


class _Walk:
    """Walks a target's graph front to back and lets the construction approximate its layers."""

    def __init__(self, graph: Graph, builder: TicketBuilder, construction: str, head: str):
        self.graph, self.builder, self.construction = graph, builder, construction
        self.nodes = {node.name: node for node in graph.nodes}
        self.kept = graph.head if head == "keep" else None
        self.order = [name for name in graph.layers if name != self.kept]
        if not self.order:
            raise ConstructionError("the network has no layer besides its head; use head='construct'")

    def run(self, input_range: tuple[float, float]) -> None:
        lo, hi = input_range
        if not lo < hi:
            raise ConstructionError(f"input_range {input_range}: the first value must be below the second")
        none, empty = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
        streams: dict[str, Stream] = {}
        for node in self.graph.nodes:
            if node.op == "input":
                name = self.builder.add_node("input", "input", ())
                streams[node.name] = Stream(name, None, none, empty, max(abs(lo), abs(hi)), lo >= 0)
            elif node.op == "layer":
                streams[node.name] = self._layer(node, streams[node.inputs[0]])
            elif node.op == "output":
                stream = streams[node.inputs[0]]
                rows = [] if stream.slots is None else stream.slots[:, 0].tolist()
                flatten = {"flatten": True} if stream.unflattened else {}
                self.builder.add_node("output", "output", (stream.unflattened or stream.node,), rows=rows, **flatten)
            else:
                streams[node.name] = self._elementwise(node, streams[node.inputs[0]])

    def _elementwise(self, node: Node, stream: Stream) -> Stream:
        """An operation that treats every channel alike, so that slots stay where they are."""
        builder = self.builder
        if node.op == "flatten":
            if stream.vector or stream.unflattened:
                return stream  # one number per channel already
            name = builder.add_node(node.name, "flatten", (stream.node,))
            return replace(stream, node=name, unflattened=stream.node)
        if node.op == "activation":
            phi = node.activation
            assert phi is not None
            low, high = phi.bounds(0.0 if stream.nonnegative else -stream.bound, stream.bound)
            changed = replace(
                stream, constant_values=phi.fn(stream.constant_values), bound=max(abs(low), abs(high)),
                nonnegative=low >= 0,
            )  # fmt: skip
            if stream.unflattened:  # the same before the flattening, which 2L needs
                before = builder.add_activation(f"{node.name}.image", stream.unflattened, phi)
                name = builder.add_node(node.name, "flatten", (before,))
                return replace(changed, node=name, unflattened=before)
            return replace(changed, node=builder.add_activation(node.name, stream.node, phi))
        if node.op == "max_pool":
            attributes = {k: list(v) for k, v in node.attributes.items()}
            return replace(stream, node=builder.add_node(node.name, "max_pool", (stream.node,), **attributes))
        raise ConstructionError(f"node '{node.name}': operation '{node.op}' is not supported")

    def _layer(self, node: Node, stream: Stream) -> Stream:
        target = node.layer
        assert target is not None
        if target.kind == "linear" and stream.slots is not None and not (stream.vector or stream.unflattened):
            raise ConstructionError(f"layer {node.name}: a linear layer on images; flatten them first")
        if node.name == self.kept:
            return self._keep(node, stream)
        outputs = self._outputs(node)
        after = self._activation_behind(node)
        free = after is not None and after.offset != 0
        if self.construction == "2L" or node.name == self.order[0]:
            return two_for_one(
                self.builder,
                node.name,
                target,
                stream,
                outputs,
                self._pair_activation(node),
                free_constants=free,
            )
        return direct(self.builder, node.name, target, stream, outputs, free_constants=free)

    def _keep(self, node: Node, stream: Stream) -> Stream:
        """Take a linear layer from the target, each column moved to its channel's slot."""
        target = node.layer
        assert target is not None
        slots, taps = stream.channels(target)
        weight = torch.zeros(len(target.weight), self.builder.width, taps)
        there = slots[:, 0] >= 0
        weight[:, slots[there, 0]] = target.weight.view(len(target.weight), -1, taps)[:, there]
        self.builder.given[f"{node.name}.weight"] = weight.flatten(1)
        self.builder.given[f"{node.name}.bias"] = target.bias
        name = self.builder.add_node(node.name, "given", (stream.node,), target=node.name, taps=taps)
        rows = torch.arange(len(target.weight))[:, None]
        return Stream(name, rows, torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64),
                      float("inf"), vector=True)  # fmt: skip

    def _outputs(self, node: Node) -> Outputs:
        """What the layers behind `node` need of it: slots per channel, which channels, constant slots."""
        m, epsilon = self.builder.plan.base_set_size, self.builder.plan.epsilon
        layer = node.layer
        assert layer is not None
        reader = self._reader(node)
        if reader.op == "output" or reader.layer is None:
            return Outputs(1, torch.ones(len(layer.weight), dtype=torch.bool), 0)
        least = 0.0 if reader.name == self.kept else epsilon
        read = above(reader.layer.weight.view(len(reader.layer.weight), len(layer.weight), -1), least).any(2).any(0)
        behind = self.order[self.order.index(node.name) + 1 :]
        biases = any(bool(above(self.graph.layers[n].bias, epsilon).any()) for n in behind)
        single = self.construction == "2L" or reader.name == self.kept
        return Outputs(1 if single else m, read, (1 if single else m) if biases else 0)

    def _reader(self, node: Node) -> Node:
        """The layer (or the output) that reads `node`, through operations that keep the channels."""
        readers = [n for n in self.graph.nodes if node.name in n.inputs]
        if len(readers) != 1:
            raise ConstructionError(f"'{node.name}' is read by {len(readers)} nodes; only chains are supported")
        return readers[0] if readers[0].op in ("layer", "output") else self._reader(readers[0])

    def _activation_behind(self, node: Node) -> Activation | None:
        """The first activation between `node` and the next layer; None where there is none."""
        readers = [n for n in self.graph.nodes if node.name in n.inputs]
        if not readers or readers[0].op in ("layer", "output"):
            return None
        return readers[0].activation or self._activation_behind(readers[0])

    def _pair_activation(self, node: Node) -> Activation:
        """The source's activation inside a pair: that behind the layer, else the last one before it."""
        behind = self._activation_behind(node)
        if behind is not None:
            return behind
        position = self.graph.nodes.index(node)
        before = [n.activation for n in self.graph.nodes[:position] if n.activation is not None]
        return before[-1] if before else ACTIVATIONS["identity"]
