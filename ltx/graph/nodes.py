"""A target as a graph: its layers with their parameters in force, and the operations that join them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ltx import operations
from ltx.activations import Activation
from ltx.errors import ConstructionError
from ltx.files import tensor_hash


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer of the target with its parameters in force (masks applied)."""

    kind: str  # "conv" | "linear"
    weight: Tensor  # (C_out, C_in, kh, kw) or (C_out, C_in), float32 on the CPU
    bias: Tensor  # (C_out,); zeros where the layer has none
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def parameters_above(self, epsilon: float) -> int:
        """Weights and biases of more than epsilon in magnitude: those that a ticket has to approximate."""
        return int(above(self.weight, epsilon).sum() + above(self.bias, epsilon).sum())


def above(parameters: Tensor, epsilon: float) -> Tensor:
    """Which parameters exceed epsilon in magnitude, compared in float64: the one place that decides it."""
    return parameters.double().abs() > epsilon


@dataclass(frozen=True)
class BatchNorm:
    """Batch norm in eval mode: channel c is multiplied by scale[c], then shift[c] is added."""

    scale: Tensor  # (C,) float32 on the CPU: gamma / sqrt(var + eps)
    shift: Tensor  # (C,): beta - mean * scale


@dataclass(frozen=True)
class Node:
    """One operation of the target."""

    name: str
    op: str  # input | layer | batch_norm | activation | add | flatten | output, or one of operations.POOLINGS
    inputs: tuple[str, ...] = ()
    layer: Layer | None = None
    activation: Activation | None = None
    batch_norm: BatchNorm | None = None
    # of a pooling: kernel_size (None: global), stride, padding; of what reads part of a concatenation: part_of; of a
    # sum of such layers: summands
    attributes: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """A target network, its nodes in the order in which they run."""

    nodes: tuple[Node, ...]

    @property
    def layers(self) -> dict[str, Layer]:
        """Name -> layer, in the order in which they run."""
        return {node.name: node.layer for node in self.nodes if node.layer is not None}

    @property
    def normalised(self) -> bool:
        """Whether there is batch norm that is not folded."""
        return any(node.op == "batch_norm" for node in self.nodes)

    @property
    def functions(self) -> str:
        """Names of its activations, each once, with commas between; `identity` where there are none."""
        names = dict.fromkeys(node.activation.name for node in self.nodes if node.activation is not None)
        return ",".join(names) or "identity"

    def __getitem__(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)

    def readers(self, name: str) -> list[Node]:
        """The nodes that read `name`, in their order."""
        return [node for node in self.nodes if name in node.inputs]

    def is_projection(self, name: str) -> bool:
        """Whether layer `name` is a projection shortcut: linear, and added to a path from the same input that is not.

        Behind the layer there is nothing but batch norm in front of the sum; the sum's other side reads the layer's
        input through at least one activation, as that of a residual block does. A layer that reads a part of a
        concatenation is none, whatever its sum's other parts read.
        """
        if "part_of" in self[name].attributes:
            return False
        last, after = name, self.readers(name)
        while len(after) == 1 and after[0].op == "batch_norm":
            last, after = after[0].name, self.readers(after[0].name)
        if [node.op for node in after] != ["add"]:
            return False
        nodes, start = {node.name: node for node in self.nodes}, self[name].inputs[0]
        reached: set[tuple[str, bool]] = set()  # backwards from the sum: a node, and whether through an activation
        stack = [(other, False) for other in after[0].inputs if other != last]
        while stack:
            other, passed = stack.pop()
            if (other, passed) not in reached:
                reached.add((other, passed))
                passed = passed or nodes[other].op == "activation"
                stack += [(before, passed) for before in nodes[other].inputs if other != start]
        return (start, True) in reached

    def parts(self, name: str) -> tuple[str, ...]:
        """The layer of this name; where it reads a concatenation the layers whose sum it is; none of any other node."""
        if self[name].layer is not None:
            return (name,)
        return tuple(node.name for node in self.nodes if node.attributes.get("part_of") == name)

    @property
    def head(self) -> tuple[str, ...]:
        """Name of the classifier, the last linear layer; of its parts, where it reads a concatenation.

        Raises:
            ConstructionError: the output is that of no linear layer.
        """
        last = next(node for node in self.nodes if node.op == "output").inputs[0]
        found = self.parts(last)
        if not found or self.layers[found[0]].kind != "linear":
            raise ConstructionError(
                f"the network ends with '{last}', which is no linear layer, so that there is no head to keep; "
                "use head='construct'"
            )
        return found

    def digest(self) -> str:
        """SHA-256 over operations and parameters in force; the same for every file format of the same target."""
        position = {node.name: n for n, node in enumerate(self.nodes)}
        tensors, operations = {}, []
        for node in self.nodes:
            entry: list = [node.op, [position[name] for name in node.inputs], sorted(node.attributes.items())]
            if node.activation is not None:
                entry += [node.activation.name, node.activation.slope_neg]
                entry += [list(pair) for pair in node.activation.parameters if pair[0] != "negative_slope"]
            if node.batch_norm is not None:
                tensors[f"{node.name}.scale"], tensors[f"{node.name}.shift"] = (
                    node.batch_norm.scale, node.batch_norm.shift,
                )  # fmt: skip
            if node.layer is not None:
                entry += [node.name, node.layer.kind, node.layer.stride, node.layer.padding, node.layer.dilation]
                tensors[f"{node.name}.weight"], tensors[f"{node.name}.bias"] = node.layer.weight, node.layer.bias
            operations.append(entry)
        return hashlib.sha256((json.dumps(operations) + tensor_hash(tensors)).encode()).hexdigest()


class _Reads(Protocol):
    """A node of a target or of a ticket."""

    @property
    def name(self) -> str: ...

    @property
    def inputs(self) -> tuple[str, ...]: ...


_Reading = TypeVar("_Reading", bound=_Reads)


def leading_to(nodes: Sequence[_Reading], names: Iterable[str]) -> tuple[_Reading, ...]:
    """Of nodes in the order in which they run those of these names, and all whose values they read, directly or not."""
    read = set(names)
    for node in reversed(nodes):
        if node.name in read:
            read.update(node.inputs)
    return tuple(node for node in nodes if node.name in read)


def fold_batch_norm(graph: Graph) -> Graph:
    """The same network with every batch norm folded into the weights and biases of the layer in front of it.

    Raises:
        ConstructionError: a batch norm is not directly behind a layer that nothing else reads.
    """
    nodes, alias = {node.name: node for node in graph.nodes}, {}
    for node in graph.nodes:
        norm = node.batch_norm
        if norm is None:
            continue
        parts = graph.parts(node.inputs[0])
        if not parts or len(graph.readers(node.inputs[0])) != 1:
            raise ConstructionError(
                f"batch norm '{node.name}' does not stand directly behind a layer of its own, so that it cannot be "
                "folded; use batch_norm='keep'"
            )
        scale = norm.scale.double()
        for position, name in enumerate(parts):
            layer = nodes[name].layer
            assert layer is not None
            weight = layer.weight.double() * scale.view(-1, *[1] * (layer.weight.ndim - 1))
            bias = layer.bias.double() * scale + (norm.shift.double() if position == 0 else 0.0)
            folded = replace(layer, weight=weight.float() + 0.0, bias=bias.float() + 0.0)
            if not bool(folded.weight.isfinite().all() and folded.bias.isfinite().all()):
                raise ConstructionError(
                    f"batch norm '{node.name}' makes parameters of layer '{name}' that are beyond float32; use "
                    "batch_norm='keep'"
                )
            nodes[name] = replace(nodes[name], layer=folded)
        alias[node.name] = node.inputs[0]
    return Graph(
        tuple(
            replace(node, inputs=tuple(alias.get(name, name) for name in node.inputs))
            for node in nodes.values() if node.name not in alias
        )
    )  # fmt: skip


@torch.no_grad()
def run(graph: Graph, images: Tensor) -> Iterator[tuple[Node, Tensor]]:
    """Every node of a target with its value, in order; parameters are brought to the images' device and type."""
    values: dict[str, Tensor] = {}
    last = {name: n for n, node in enumerate(graph.nodes) for name in node.inputs}
    for position, node in enumerate(graph.nodes):
        inputs = [values[name] for name in node.inputs]
        values[node.name] = images if node.op == "input" else evaluate(node, inputs)
        yield node, values[node.name]
        for name in node.inputs:
            if last[name] == position:
                values.pop(name, None)


def evaluate(node: Node, inputs: list[Tensor]) -> Tensor:
    x = inputs[0]
    if node.layer is not None:
        layer = node.layer
        how = (layer.stride, layer.padding, layer.dilation)
        return operations.affine(x, layer.weight.to(x), layer.bias.to(x), *how)
    if node.batch_norm is not None:
        return operations.scale_and_shift(x, node.batch_norm.scale.to(x), node.batch_norm.shift.to(x))
    if node.activation is not None:
        return node.activation.fn(x)
    return x if node.op == "output" else operations.OPERATIONS[node.op](inputs, node.attributes)
