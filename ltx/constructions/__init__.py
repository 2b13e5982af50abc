"""The two constructions: from a target network and a seed to a ticket."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ltx.checks import interval, one_of, outside, real, seed_of, whole
from ltx.constructions.builder import Place, Plan, Step, TicketBuilder
from ltx.constructions.calibration import Calibration
from ltx.constructions.l_plus_one import direct
from ltx.constructions.layout import HEADS, constant_value, kept_of, layout, nonnegative
from ltx.constructions.streams import Stream
from ltx.constructions.strides import pair_kernel_of
from ltx.constructions.two_for_one import pair_activation, two_for_one
from ltx.defaults import usual_defaults
from ltx.errors import ConstructionError
from ltx.feedback import Feedback
from ltx.graph import Graph, Node, fold_batch_norm, trace
from ltx.operations import POOLINGS
from ltx.source import LAWS
from ltx.subset_sum import MAX_BASE_SET_SIZE
from ltx.ticket import Ticket

CONSTRUCTIONS = ("2L", "L+1")
SCALINGS = ("unit", "layer_max")
_READERS = ("layer", "output")  # operations that ask for slots
SELECTIONS = ("smallest", "best", "feedback")


@dataclass(frozen=True)
class Statistics:
    """What a construction cost."""

    problems: int  # subset-sum problems solved, those of failed rows included
    failures: int  # problems without a subset within epsilon
    rows: int  # of the source that were tried, copies of inputs left out
    given_up: int  # how many of them, for a failure or, with feedback, for an error that is not usual


@usual_defaults()
def construct(
    model: nn.Module | Graph,
    *,
    construction: str = "L+1",
    base_set_size: int = 15,
    epsilon: float = 0.01,
    seed: int = 0,
    law: str = "uniform",
    selection: str = "smallest",
    head: str = "keep",
    scaling: str = "unit",
    batch_norm: str = "keep",
    pair_kernel: int = 1,
    pair_stride: str = "second",
    input_range: tuple[float, float] = (-1.0, 1.0),
    calibration: Tensor | None = None,
    feedback: Feedback | None = None,
    device: str = "cpu",
    on_statistics: Callable[[Statistics], None] = lambda _: None,
    on_layer: Callable[[str], None] = lambda _: None,
) -> Ticket:
    """Construct a lottery ticket for a target network.

    Args:
        model: the target, or its graph from `ltx.graph.trace`.
        construction: `2L` (Theorem 3.1, two source layers for every target layer) or `L+1` (Theorem 3.2, two for
            the first, one for each other).
        base_set_size: m, the number of random parameters to choose from for each target parameter.
        epsilon: allowed error of one parameter; parameters of at most epsilon in magnitude are dropped.
        seed: of the source network, 0 <= seed < 2**64.
        law: of its parameters: `uniform` (the paper's), or `normal`, of standard deviation 1 where `uniform` reaches
            from -1 to 1 (or from -s to s).
        selection: `smallest` or `best`, see `ltx.subset_sum.solve`, or `feedback`: what a row computes on the
            calibration images decides. Its parameters need not be within epsilon of the target's.
        head: `keep` takes the classifier from the target, uncounted (the paper's, for MNIST); `construct`
            approximates it like any other layer.
        scaling: `unit` draws from [-1, 1] (the paper's); `layer_max` from [-s, s] where a target layer has
            entries of magnitude s beyond 1.
        batch_norm: `keep` takes it from the target, uncounted, each slot that of its channel (the paper's); `fold`
            folds it into weights and biases first.
        pair_kernel: size of the kernel of the first layer of a pair, odd; a row keeps one of its entries (Appendix E).
        pair_stride: which layer of a pair has the target's stride, `second` or `first`. With `first`, rows pruned at
            several positions make one copy of an input; the kernel must be at least 2 stride - 1 for most layers.
        input_range: the least and largest value of an input element; decides whether negative inputs need base
            sets of their own, and how far tanh or sigmoid have to be scaled down to be linear on the inputs.
        calibration: images (n, C, H, W) of the kind that the target was trained on, without labels, for `feedback`.
        feedback: its settings.
        device: where the source is computed and the problems are solved, `cpu`, `cuda` or `cuda:1`. The ticket is the
            same on either; with `feedback` another one as good, because rounding decides some ties.
        on_statistics, on_layer: called at the end, and with the name of every target layer that was gone through.

    Raises:
        ConstructionError: an unsupported module, a parameter out of reach, or settings that have no meaning.
    """
    for name, value, known in (
        ("construction", construction, CONSTRUCTIONS),
        ("law", law, LAWS),
        ("head", head, HEADS),
        ("scaling", scaling, SCALINGS),
        ("batch_norm", batch_norm, ("keep", "fold")),
        ("selection", selection, SELECTIONS),
    ):
        one_of(name, value, known, ConstructionError)
    base_set_size, seed = whole("base_set_size", base_set_size, ConstructionError), seed_of(seed, ConstructionError)
    pair_kernel = pair_kernel_of(pair_kernel, pair_stride)
    epsilon = real("epsilon", epsilon, ConstructionError)
    input_range, device = interval("input_range", input_range, ConstructionError), _device(device)
    if not 1 <= base_set_size <= MAX_BASE_SET_SIZE:
        raise ConstructionError(f"base_set_size {base_set_size} must lie between 1 and {MAX_BASE_SET_SIZE}")
    if pair_stride == "first" and selection == "feedback":
        raise ConstructionError("selection 'feedback' needs the copies of every position; use pair_stride='second'")
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ConstructionError(f"epsilon {epsilon} must be a positive number")
    if (selection == "feedback") != (calibration is not None) or (feedback is not None and selection != "feedback"):
        raise ConstructionError(f"selection '{selection}': feedback, and it alone, needs calibration images")
    if calibration is not None and not isinstance(calibration, Tensor):
        raise ConstructionError(f"calibration: must be a tensor of images, is a {type(calibration).__name__}")
    if feedback is not None and not isinstance(feedback, Feedback):
        raise ConstructionError(f"feedback: must be ltx.Feedback(...), is a {type(feedback).__name__}")
    graph = trace(model, calibration)
    walked = fold_batch_norm(graph) if batch_norm == "fold" else graph
    compared, within = None, epsilon
    if calibration is not None:
        compared = Calibration(walked, calibration, feedback or Feedback(), seed=seed, device=device)
        if (reach := outside(calibration, *input_range)) is not None:
            raise ConstructionError(
                f"input_range {input_range}: the calibration images lie in {reach}; give the range of all inputs"
            )
        within = math.inf if compared.settings.bound is None else compared.settings.bound
        if within < epsilon:
            raise ConstructionError(
                f"feedback.bound {within:g} is below epsilon {epsilon:g}, up to which parameters are left out: lower "
                "epsilon, too, or raise the bound"
            )
    plan = Plan(base_set_size, epsilon, seed, law, selection, scaling, device, pair_kernel, pair_stride, within)
    builder = TicketBuilder(plan, compared)
    _Walk(walked, builder, construction, head).run(input_range, on_layer)
    on_statistics(Statistics(builder.problems, builder.failures, builder.rows, builder.given_up))
    return builder.finish(
        construction=construction,
        activation=graph.functions,
        target_sha256=graph.digest(),
        input_low=input_range[0],
        input_high=input_range[1],
    )


def _device(name: str) -> str:
    """The device's name; ConstructionError where there is none such."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConstructionError(f"device {name!r} is not known; there are cpu and cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConstructionError(f"device {name!r}: there are {torch.cuda.device_count()} CUDA devices; use 'cpu'")
    return str(device)


class _Walk:
    """Walks a target's graph front to back and lets the construction approximate its layers."""

    def __init__(self, graph: Graph, builder: TicketBuilder, construction: str, head: str):
        self.graph, self.builder, self.construction = graph, builder, construction
        self.kept = kept_of(graph, head)
        self.layout = layout(graph, builder.plan.epsilon, kept=self.kept)
        self.streams = {
            name: Stream(len(graph.layers[layers[0]].weight), graph.normalised)
            for name, layers in self.layout.writers.items() if layers
        }  # fmt: skip
        self._open = list(self.streams)  # of which rows may be asked for yet

    def run(self, input_range: tuple[float, float], on_layer: Callable[[str], None]) -> None:
        lo, hi = input_range
        places: dict[str, Place] = {}
        never_negative = nonnegative(self.graph, input_range)
        for position, node in enumerate(self.graph.nodes):
            inputs = [places[name] for name in node.inputs]
            if self.builder.calibration:
                self.builder.calibration.advance(node)
            if node.op == "input":
                name = self.builder.add_node("input", "input", ())
                places[node.name] = Place(name, node.name, None, (), max(abs(lo), abs(hi)))
            elif node.op == "layer":
                beside = {target: place.node for target, place in places.items()}
                places[node.name] = self._layer(node, inputs[0], beside)
                on_layer(node.name)
            elif node.op == "output":
                self._output(inputs[0])
            else:
                place = self._elementwise(node, inputs)
                places[node.name] = replace(place, target=node.name, **self._constant(node))
            if node.op != "output":
                places[node.name] = replace(places[node.name], nonnegative=node.name in never_negative)
            if self.builder.calibration:
                self._release(self.graph.nodes[position + 1 :])

    def _release(self, rest: Sequence[Node]) -> None:
        """Free what only rows of streams need that nobody behind, in the `rest` of the network, asks for."""
        calibration, stream = self.builder.calibration, self.layout.stream
        assert calibration is not None
        later = {stream[name] for n in rest for name in ([n.name] if n.op not in _READERS else n.inputs)}
        for name in [name for name in self._open if name not in later and self.streams[name].writers]:
            self._open.remove(name)
            for writer in self.streams[name].writers.values():
                writer.release()
        # rows of an open stream that are still to come read those of others
        read = {stream[self.graph[layer].inputs[0]] for name in self._open for layer in self.streams[name].writers}
        for name, layers in self.layout.writers.items():
            if name not in self._open and name not in read:
                calibration.release(layers)

    def _slots(self, name: str) -> int:
        """How many slots of each channel that a layer writes are read: many where L+1 approximates what reads them."""
        stream = self.layout.stream
        readers = [n for n in self.graph.nodes if n.op == "layer" and n.name not in self.kept]
        several = self.construction == "L+1" and any(stream[n.inputs[0]] == stream[name] for n in readers)
        return self.builder.copies(self.streams[stream[name]]) if several else 1

    def _output(self, place: Place) -> None:
        rows: list[int] = []
        if place.stream is not None:
            channels = torch.arange(place.stream.width)
            kept = any(name in self.kept for name in place.behind)  # its rows are the outputs
            rows = (channels if kept else place.stream.take(place.behind, channels, 1, 0)[0][:, 0]).tolist()
        flatten = {"flatten": True} if place.flattened else {}
        self.builder.add_node("output", "output", (place.node,), rows=rows, **flatten)

    def _constant(self, node: Node) -> dict:
        """How a place tells the values of constant slots."""
        stream = self.layout.stream[node.name]
        how = self.layout.constants.get(stream)
        if how is None:
            return {}

        def value(slots: Tensor) -> Tensor:
            first = self.layout.writers[stream][0]
            start = {first: self.streams[stream].writers[first].sums[slots]}
            return constant_value(self.graph, node.name, start, torch.full_like(slots, how.norm))

        return {"constant": value}

    def _elementwise(self, node: Node, inputs: list[Place]) -> Place:
        """An operation that treats every channel alike, so that slots stay where they are."""
        builder, place = self.builder, inputs[0]
        if node.op == "flatten":
            return place if place.vector or place.flat else replace(place, flat=node.name)
        if node.op == "activation":
            phi = node.activation
            assert phi is not None
            low, high = phi.bounds(0.0 if place.nonnegative else -place.bound, place.bound)
            return replace(
                place, node=builder.add_activation(node.name, place.node, phi),
                bound=max(abs(low), abs(high)),
            )  # fmt: skip
        if node.op == "batch_norm":
            norm = node.batch_norm
            assert norm is not None
            how = self.layout.constants.get(self.layout.stream[node.name])
            name = builder.add_batch_norm(node.name, place, norm, constant=how.norm if how else 0)
            bound = norm.scale.abs() * place.bound + norm.shift.abs()
            bound = float(bound.nan_to_num(nan=math.inf, posinf=math.inf).max())
            return replace(place, node=name, bound=bound)
        if node.op == "add":
            one, other = inputs
            return replace(
                place, node=builder.add_node(node.name, "add", (one.node, other.node)),
                behind=tuple(dict.fromkeys(one.behind + other.behind)), bound=one.bound + other.bound,
            )  # fmt: skip
        if node.op in POOLINGS:
            attributes = {k: list(v) if isinstance(v, tuple) else v for k, v in node.attributes.items()}
            name = builder.add_node(node.name, node.op, (place.node,), **attributes)
            return replace(place, node=name)
        raise ConstructionError(f"node '{node.name}': operation '{node.op}' is not supported")

    def _layer(self, node: Node, place: Place, beside: Mapping[str, str]) -> Place:
        target = node.layer
        assert target is not None
        name, bound = node.name, math.inf
        stream = self.streams[self.layout.stream[name]]
        if name in self.kept:
            weight = place.entries(target)
            taken = place.take(weight.ne(0).any(0), 1, 0)
            written = self.builder.add_head(name, place, target, weight, taken.slots[:, 0])
        else:
            step = Step(
                name, target, place, stream, self._slots(name), first=not stream.writers,
                biased=name in self.layout.needs, constants=self.layout.constants.get(self.layout.stream[name]),
                beside=beside,
            )  # fmt: skip
            if self.construction == "2L" or place.stream is None:
                written, bound = two_for_one(self.builder, step, pair_activation(self.graph, name))
            else:
                written = direct(self.builder, step)
        return Place(written, name, stream, (name,), bound, vector=target.kind == "linear", **self._constant(node))
