"""What is known of a target before any random number is drawn: which nodes share slots, and where constants come from.

Elementwise operations, pooling and sums keep a channel's index, so that the nodes between layers form streams: slot p
of a residual block's output is slot p of its input (section 3.3, skip connections). A stream has one or several
writers, the layers whose rows are its slots.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ltx.checks import one_of
from ltx.errors import ConstructionError
from ltx.graph import Graph, above

IMAGE = "input"  # the stream of the image itself
IMAGES, FLATTENED, VECTORS = "images", "flattened images", "vectors"  # of one number for each channel
HEADS = ("keep", "construct")
PRUNED_ROWS_DO = 0.5  # constants of pruned rows, which cost nothing, are taken where they are as near to 1 as this


@dataclass(frozen=True)
class Constants:
    """How a stream's constant slots come about.

    sums: whether the row of the stream's first writer sums constants to 1; otherwise all rows are pruned, because
    phi(0) or a given shift is constant and not 0. norm: the channel whose batch norm a constant slot has.
    """

    sums: bool
    norm: int


@dataclass(frozen=True)
class Layout:
    """Streams of a target; a stream is named after the first node in it."""

    stream: Mapping[str, str]  # node -> its stream
    kind: Mapping[str, str]  # node -> images, flattened images or vectors
    writers: Mapping[str, tuple[str, ...]]  # stream -> its layers, in order
    constants: Mapping[str, Constants]  # stream -> how its constants are made, where any are needed
    needs: frozenset[str]  # layers that read constants


def layout(graph: Graph, epsilon: float | Mapping[str, float], *, kept: Sequence[str]) -> Layout:
    """Find the streams of a target.

    Args:
        epsilon: biases of at most so much are left out; of all layers, or layer -> its own.
        kept: layers that are taken from the target and read no constants.

    Raises:
        ConstructionError: no layer to approximate, a linear layer on images, a sum with the image, of an image with a
            vector, batch norm of the image or of flattened ones, a head that reads the image, or a bias that no
            constant can make.
    """
    if not graph.layers:
        raise ConstructionError("the network has no Conv2d and no Linear layer: there is nothing to approximate")
    if all(name in kept for name in graph.layers):
        raise ConstructionError("the network has no layer besides its head; use head='construct'")
    least = epsilon if isinstance(epsilon, Mapping) else dict.fromkeys(graph.layers, epsilon)
    stream: dict[str, str] = {}
    for node in graph.nodes:
        joined = {stream[name] for name in node.inputs} if node.op not in ("input", "layer") else set()
        stream[node.name] = min(joined, key=list(stream).index) if joined else node.name
        if len(joined) > 1:
            stream = {name: stream[node.name] if s in joined else s for name, s in stream.items()}
    writers = {
        name: tuple(n.name for n in graph.nodes if n.op == "layer" and stream[n.name] == name)
        for name in dict.fromkeys(stream.values())
    }
    kind = _kinds(graph, stream, writers)
    for name in kept:
        if not writers[stream[graph[name].inputs[0]]]:
            raise ConstructionError(f"the head '{name}' reads the image itself; use head='construct'")
    constants: dict[str, Constants] = {}
    needs: set[str] = set()
    for name in reversed(writers):
        # readers stand behind a stream, so that what they need is known; all but the image can have constants
        readers = [n for n in graph.nodes if n.op == "layer" and stream[n.inputs[0]] == name and n.name not in kept]
        for node in readers:
            assert node.layer is not None
            made = constants.get(stream[node.name])
            first = writers[stream[node.name]][0] == node.name
            biased = bool(above(node.layer.bias, least[node.name]).any())
            if biased or (made is not None and made.sums and first):
                if name == IMAGE and node.name != next(iter(graph.layers)):
                    behind = [
                        n.name for n in graph.nodes if n.name in needs and stream[n.inputs[0]] == stream[node.name]
                    ]
                    what = (
                        "has biases" if biased else f"would make the constants that biases of {', '.join(behind)} need"
                    )
                    raise ConstructionError(
                        f"layer {node.name}: reads the image and {what}, but is not the first layer, which alone can "
                        f"make constants; give {'it' if biased else 'what is behind it'} bias=False"
                    )
                needs.add(node.name)
        places = dict.fromkeys(node.inputs[0] for node in readers if node.name in needs)
        if places and name != IMAGE:
            constants[name] = _constants(graph, writers[name], tuple(places))
    return Layout(stream, kind, writers, constants, frozenset(needs))


def kept_of(graph: Graph, head: str) -> tuple[str, ...]:
    """The layers that are taken from the target; ConstructionError where `head` is none of `HEADS`."""
    one_of("head", head, HEADS, ConstructionError)
    return graph.head if head == "keep" else ()


def _kinds(graph: Graph, stream: Mapping[str, str], writers: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """What every node is: images, flattened ones or vectors; ConstructionError where nodes do not go together."""
    kind: dict[str, str] = {}
    for node in graph.nodes:
        inside = [kind[name] for name in node.inputs] or [IMAGES]
        kind[node.name] = inside[0]
        if node.layer is not None:
            kind[node.name] = IMAGES if node.layer.kind == "conv" else VECTORS
        elif node.op == "flatten" and inside[0] == IMAGES:
            kind[node.name] = FLATTENED
        if node.layer is not None and node.layer.kind == "linear":
            if inside[0] == IMAGES:
                raise ConstructionError(f"layer {node.name}: a linear layer on images; put nn.Flatten() in front of it")
            width, makers = node.layer.weight.shape[1], writers[stream[node.inputs[0]]]
            if makers and width % len(graph.layers[makers[0]].weight):
                raise ConstructionError(
                    f"layer {node.name}: a linear layer with {width} inputs cannot read "
                    f"{len(graph.layers[makers[0]].weight)} flattened channels"
                )
        if node.op == "add" and stream[node.name] == IMAGE:
            raise ConstructionError(
                f"node '{node.name}' adds the image itself, whose channels cannot be widened; put a layer in between"
            )
        if node.op == "batch_norm" and stream[node.name] == IMAGE:
            raise ConstructionError(f"batch norm '{node.name}' normalises the image itself; put a layer before it")
        if node.op == "batch_norm" and inside[0] == FLATTENED:
            raise ConstructionError(f"batch norm '{node.name}' normalises flattened images; flatten behind it")
        if len(set(inside)) > 1:
            raise ConstructionError(
                f"node '{node.name}' adds what a linear layer gives to images, flattened or not, whose channels are no "
                "slots of the same layer"
            )
    for layers in writers.values():
        widths = {layer: len(graph.layers[layer].weight) for layer in layers}
        if len(set(widths.values())) > 1:
            raise ConstructionError(f"the network adds layers of different widths ({widths}), which skips cannot join")
    return kind


def nonnegative(graph: Graph, input_range: tuple[float, float]) -> frozenset[str]:
    """Nodes whose values are never negative, whatever the parameters: what pairs that read them make use of."""
    found: set[str] = set()
    for node in graph.nodes:
        inside = all(name in found for name in node.inputs)
        if node.op == "input":
            inside = input_range[0] >= 0
        elif node.op in ("layer", "batch_norm"):
            inside = False
        elif node.activation is not None:
            inside = node.activation.bounds(0.0 if inside else -math.inf, math.inf)[0] >= 0
        if inside:
            found.add(node.name)
    return frozenset(found)


def _constants(graph: Graph, writers: tuple[str, ...], places: tuple[str, ...]) -> Constants:
    """The way to make constants of a stream that are nearest to 1 at `places`, pruned rows first."""
    layer = graph[writers[0]].layer
    assert layer is not None
    channels = torch.arange(len(layer.weight))
    best: tuple[float, Constants] = (0.0, Constants(True, 0))
    for sums in (False, True):
        start = {writers[0]: torch.full((len(channels),), float(sums), dtype=torch.float64)}
        worth = torch.stack([constant_value(graph, place, start, channels).abs() for place in places])
        worth = torch.minimum(worth, 1 / worth).amin(0)
        if float(worth.max()) > best[0]:
            best = float(worth.max()), Constants(sums, int(worth.argmax()))
        if best[0] >= PRUNED_ROWS_DO:
            break
    if not best[0]:
        raise ConstructionError(
            f"layer {writers[0]}: no slot behind it can be made constant, which the biases behind '{places[0]}' need"
            + ("; use batch_norm='fold'" if graph.normalised else "")
        )
    return best[1]


def constant_value(graph: Graph, place: str, start: Mapping[str, Tensor], channels: Tensor) -> Tensor:
    """The value at `place` of slots whose layers' outputs are constant, (n,) float64.

    Args:
        start: layer -> its outputs (n,); those of other layers are 0, their rows pruned.
        channels: (n,) whose batch norm each slot has.
    """

    behind = {place}
    for node in reversed(graph.nodes):
        if node.name in behind and node.op != "layer":
            behind.update(node.inputs)
    values: dict[str, Tensor] = {}
    for node in (node for node in graph.nodes if node.name in behind):
        inside = [values[name] for name in node.inputs if name in values]
        if node.op == "layer":
            values[node.name] = start.get(node.name, torch.zeros(len(channels), dtype=torch.float64))
        elif node.batch_norm is not None:
            scale, shift = (part.double()[channels] for part in (node.batch_norm.scale, node.batch_norm.shift))
            values[node.name] = inside[0] * scale + shift
        elif node.activation is not None:
            values[node.name] = node.activation.fn(inside[0])
        else:
            values[node.name] = inside[0] + inside[1] if node.op == "add" else inside[0]
    return values[place]
