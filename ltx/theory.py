"""How wide a source has to be, and what a width guarantees (Theorems 3.1 and 3.2, Corollaries 2.2 and C.1).

Three steps lead from an allowed error of the outputs and a failure probability to the widths of a source.

**Error of a parameter.** Walking back from the output, every node of the target is given the largest deviation that it
may have (`allowed`). A layer with n parameters in a row, each within epsilon of the target's, that reads inputs of at
most B in magnitude which deviate by at most D, deviates in any output by at most

    sum_j |w_j + e_j| D + n epsilon max(B, 1) [+ n epsilon max(B, 1)],      |e_j| <= epsilon,

the last part being the linearisation of a pair whose activation is linear near 0 only. In L+1, behind the first layer,
the first part is another one: the slots of a channel deviate each on its own, and a sum of up to m entries of up to 1,
for every parameter, passes on up to m n D. (The proof of Theorem 3.2, equation (13), has N D there, as if all slots of
a channel deviated alike. The theorem can be mended: epsilon_l becomes smaller by a factor of m for each layer behind
l, of which only the logarithm enters the width. What it hides is how tickets of deep networks fail, section 6 of the
design: sum |w_s| and not |W| is what deviations grow with.) Each part gets the same share of what the layer may
deviate. Behind it an activation divides by its Lipschitz constant, batch norm by its largest
scale, and a sum halves. The paper says the same with N, the number of parameters of the whole layer, for n and for
sum |w|, which needs |x| <= 1 and |w| <= 1 (it takes both for granted, and in Theorem 3.2 a first layer that is exactly
linear): form "theorem" gives its epsilon_l, form "norms", the default, what the target's own norms and interval bounds
of its activations give. That one holds for any target, and is larger wherever the paper's assumptions hold.

**Chance of a subset.** Corollary 2.2: of m numbers a subset sum is within epsilon of theta, |theta| <= 1, with
probability at least 1 - delta', if m >= C log(1 / min(epsilon, delta')). A union bound over rho problems needs
delta' = delta / rho. Theorem 3.2 states rho delta / N_l, its proof delta / rho: the proof is right, since rho is at
least the number of problems, and more of them must make each one's chance smaller, not larger. (The statement's would
allow failures that add up to more than delta.) Theorem 3.1 has log(N / min(epsilon_l, delta)): sufficient in epsilon,
where N is counted twice, but not in delta, because inputs of both signs make 2 N problems (Corollary C.1's proof says
so). Here the problems are counted, and m is the least that is enough. In L+1 rho depends on m, because layers are made
m times: the smallest solution is found by iteration, for which the paper bounds rho by C N^(1 + gamma) log(...).

**Width.** In 2L the paper asks for C c log(...) rows of the 1x1 layer; as many are needed of each sign of lambda, whose
signs are random. Here it has so many rows that m of each sign that is needed are among them, again with a union bound,
for which half of delta is set aside. The layers behind have a row for each of their channels, m times as many in L+1.

C is a measurement (`ltx/subset_sum/limits.py`), not a theorem: Lueker's proof gives none. A guarantee is as good as it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ltx.activations import ACTIVATIONS
from ltx.constructions.builder import layer_scale
from ltx.constructions.layout import IMAGE, Layout, layout
from ltx.constructions.strides import PairGeometry, pair_geometry
from ltx.constructions.two_for_one import pair_activation, pair_law
from ltx.errors import LtxError
from ltx.graph import Graph, Layer, Node
from ltx.intervals import channel_intervals
from ltx.subset_sum.limits import PRODUCT, UNIFORM

FORMS = ("norms", "theorem")


@dataclass(frozen=True)
class LayerBound:
    """What a target layer needs of the source."""

    layer: str
    parameters: int  # nonzero, N_l
    largest_input: float  # B: no input of the layer is larger in magnitude
    allowed: float  # largest deviation of its outputs
    epsilon: float  # of a parameter
    slots: int  # rows for each of its channels
    problems: int  # subset sums
    base_set_size: int  # m of these
    copies: int  # rows of the 1x1 layer in front; 0: there is none
    width: int  # rows
    source_parameters: int  # of both layers


@dataclass(frozen=True)
class Guarantee:
    """A source that contains a ticket with an error of at most `error` with probability at least 1 - delta."""

    construction: str
    error: float
    delta: float
    layers: tuple[LayerBound, ...]

    @property
    def problems(self) -> int:
        """rho."""
        return sum(layer.problems for layer in self.layers)

    @property
    def source_parameters(self) -> int:
        return sum(layer.source_parameters for layer in self.layers)

    @property
    def base_set_size(self) -> int:
        """The largest m."""
        return max((layer.base_set_size for layer in self.layers), default=0)

    @property
    def epsilon(self) -> float:
        """The smallest epsilon."""
        return min((layer.epsilon for layer in self.layers), default=math.inf)


@dataclass(frozen=True)
class _Part:
    """A layer as a construction sees it."""

    layer: Layer
    weight: Tensor  # (C_out, C_in, K) float64, by the channels that it reads
    reads: str  # stream; IMAGE: the image
    writes: str  # stream
    pair: bool  # whether two source layers stand for it
    signs: int  # base sets of every weight
    signed: bool  # whether the entries of the 1x1 layer must have a sign
    opposite: bool  # rows of the 1x1 layer come in opposite pairs
    exact: bool  # whether the pair is exactly linear on either side of 0
    largest_input: float
    scale: float
    geometry: PairGeometry | None  # of a pair

    @property
    def copied(self) -> int:
        """Input channels of a pair, each as often as there are positions at which a row that copies it is pruned."""
        assert self.geometry is not None
        at = torch.zeros(self.weight.shape[1], int(self.geometry.first.max()) + 1, dtype=torch.bool)
        channel, tap = self.weight.ne(0).any(0).nonzero(as_tuple=True)
        at[channel, self.geometry.first[tap]] = True
        return int(at.sum())

    @property
    def parameters(self) -> int:
        return int(self.layer.weight.count_nonzero() + self.layer.bias.count_nonzero())

    @property
    def problems(self) -> int:
        """Of one row of every channel."""
        return int(self.layer.weight.count_nonzero()) * self.signs + int(self.layer.bias.count_nonzero())

    @property
    def largest_row(self) -> int:
        """Parameters of a row, the most."""
        return int((self.weight.flatten(1).count_nonzero(1) + (self.layer.bias != 0)).max())

    @property
    def several(self) -> bool:
        """Whether it reads several slots of a channel, which deviate each on its own."""
        return not self.pair

    def gain(self, epsilon: float, m: int) -> float:
        """By how much the sum of a row's entries may enlarge the deviation of what it reads."""
        if self.several:
            return self.largest_row * m * self.scale
        return float(self.weight.flatten(1).abs().sum(1).max()) + self.largest_row * epsilon


def guarantee(
    graph: Graph, error: float, delta: float, *, construction: str, input_range: tuple[float, float] = (-1.0, 1.0),
    head: str = "keep", scaling: str = "unit", form: str = "norms", uniform: float = UNIFORM, product: float = PRODUCT,
    same_size: bool = False, pair_kernel: int = 1, pair_stride: str = "second",
) -> Guarantee:  # fmt: skip
    """The widths of a source that contains a ticket with an error of at most `error` with probability 1 - delta.

    Args:
        error: largest deviation of any output over all inputs in `input_range`.
        form: of the error of a parameter, see above.
        uniform, product: C of Corollary 2.2 for base sets of uniform numbers and of products of two.
        same_size: one m for all layers, as `ltx.construct` has it.
        pair_kernel, pair_stride: see `ltx.construct`.

    Raises:
        LtxError: an error, a probability or a constant without meaning, or parameters beyond the reach of base sets.
    """
    _check(error > 0 and math.isfinite(error), f"error {error:g} must be a positive number")
    _check(0 < delta < 1, f"delta {delta:g} must lie between 0 and 1")
    _check(min(uniform, product) > 0, f"the constants C, {uniform:g} and {product:g}, must be positive")
    _check(form in FORMS, f"form '{form}' is not known; there are {', '.join(FORMS)}")
    kept = graph.head if head == "keep" else ()
    joined = layout(graph, 0.0, kept=kept)
    parts = _parts(graph, joined, construction, kept, input_range, scaling, pair_kernel, pair_stride)
    signed = [part for part in parts.values() if part.pair and part.signed]
    delta_sums = delta / 2 if signed else delta
    sizes = dict.fromkeys(parts, 1)
    while True:  # m rises with rho, and in L+1 rho and 1 / epsilon with m, but with their logarithms alone
        allowed, epsilons = _budgets(graph, parts, error, construction, form, sizes)
        problems = _problems(parts, joined, sizes, construction)
        single = delta_sums / max(1, sum(problems.values()))
        needed = {
            name: base_set_size(epsilons[name] / part.scale, single, product if part.pair else uniform)
            for name, part in parts.items()
        }
        if same_size:
            needed = dict.fromkeys(needed, max(needed.values()))
        if needed == sizes:
            break
        sizes = needed
    needs = sum(part.copied + 1 for part in signed)  # channels, and the constant
    slots, layers = _slots(parts, joined, sizes, construction), []
    widths = {
        stream: max(_rows(parts[name], *slots[name]) for name in writers if name in parts)
        for stream, writers in joined.writers.items()
        if any(name in parts for name in writers)
    }
    for name, part in parts.items():
        copies = _copies(part, sizes[name], (delta - delta_sums) / max(1, needs)) if part.pair else 0
        rows, taps = _rows(part, *slots[name]), part.weight.shape[2]
        inside = part.weight.shape[1] if part.reads == IMAGE else widths[part.reads]
        first = 0 if layers else copies  # biases of the source's first layer
        if part.geometry is not None:
            size = copies * inside * part.geometry.area + first + rows * copies * part.geometry.taps
        else:
            size = rows * inside * taps
        bound = LayerBound(
            name, part.parameters, part.largest_input, allowed[name], epsilons[name], slots[name][0], problems[name],
            sizes[name], copies, rows, size,
        )  # fmt: skip
        layers.append(bound)
    return Guarantee(construction, error, delta, tuple(layers))


def failure_probability(
    graph: Graph, base_set_size: int, epsilon: float, *, construction: str,
    input_range: tuple[float, float] = (-1.0, 1.0), head: str = "keep", scaling: str = "unit",
    uniform: float = UNIFORM, product: float = PRODUCT,
) -> float:  # fmt: skip
    """A delta: with m and epsilon everywhere, no row is given up with probability at least 1 - delta.

    The other way round: rho exp(-m / C), where Corollary 2.2 says anything, i.e. epsilon >= exp(-m / C); 1 elsewhere.
    """
    kept = graph.head if head == "keep" else ()
    joined = layout(graph, epsilon, kept=kept)
    parts = _parts(graph, joined, construction, kept, input_range, scaling)
    problems = _problems(parts, joined, dict.fromkeys(parts, base_set_size), construction)
    total = 0.0
    for name, part in parts.items():
        chance = math.exp(-base_set_size / (product if part.pair else uniform))
        total += problems[name] * (chance if epsilon / part.scale >= chance else 1.0)
    return min(1.0, total)


def base_set_size(epsilon: float, delta: float, constant: float) -> int:
    """m >= C log(1 / min(epsilon, delta)) (Corollary 2.2), and at least 1."""
    least = min(epsilon, delta)
    return max(1, math.ceil(-constant * math.log(least))) if least < 1 else 1


def ticket_error(
    graph: Graph,
    epsilons: Mapping[str, float],
    sizes: Mapping[str, int],
    *,
    construction: str,
    input_range: tuple[float, float] = (-1.0, 1.0),
    head: str = "keep",
    scaling: str = "unit",
) -> float:
    """A bound of the outputs' deviation where every parameter of a layer is within its epsilon: `_budgets` forwards.

    Args:
        epsilons: layer -> error of its parameters.
        sizes: layer -> its m: a parameter is a sum of at most so many entries.
    """
    kept = graph.head if head == "keep" else ()
    parts = _parts(graph, layout(graph, 0.0, kept=kept), construction, kept, input_range, scaling)
    deviation: dict[str, float] = {}
    for node in graph.nodes:
        inside = [deviation[name] for name in node.inputs]
        if node.op == "input":
            deviation[node.name] = 0.0
        elif node.name in parts:
            part, epsilon = parts[node.name], epsilons[node.name]
            off = part.largest_row * epsilon
            reach = off * max(part.largest_input, 1.0) * (1 if _linear(part) else 2)
            deviation[node.name] = part.gain(epsilon, sizes[node.name]) * inside[0] + reach
        elif node.layer is not None:
            deviation[node.name] = float(node.layer.weight.double().abs().flatten(1).sum(1).max()) * inside[0]
        else:
            deviation[node.name] = sum(inside) * _gain(node)
    return deviation[graph.nodes[-1].name]


def _parts(
    graph: Graph, joined: Layout, construction: str, kept: Sequence[str], input_range: tuple[float, float],
    scaling: str, kernel: int = 1, stride: str = "second",
) -> dict[str, _Part]:  # fmt: skip
    """The layers that are approximated, in their order."""
    _check(construction in ("2L", "L+1"), f"construction '{construction}' is not known; there are 2L, L+1")
    bounds, found = channel_intervals(graph, input_range), {}
    for name, layer in graph.layers.items():
        if name in kept:
            continue
        before = graph[name].inputs[0]
        reads, inside = joined.stream[before], bounds[before]
        weight = layer.weight.double()
        if layer.kind == "conv":
            weight = weight.flatten(2)
        elif reads != IMAGE:
            weight = weight.view(len(weight), len(graph.layers[joined.writers[reads][0]].weight), -1)
        else:
            weight = weight[:, :, None]
        scale, pair = layer_scale(layer, scaling), construction == "2L" or reads == IMAGE
        largest = max(float(layer.weight.abs().max()), float(layer.bias.abs().max()))
        _check(largest <= scale, f"layer {name}: a parameter of {largest:g} is beyond {scale:g}; use scaling=layer_max")
        phi = pair_activation(graph, name) if pair else ACTIVATIONS["identity"]
        law = pair_law(phi, bool((inside.low >= 0).all()))
        taps, geometry = weight.shape[2], None
        if pair:
            image = layer.kind == "conv" or taps > 1
            geometry = pair_geometry(layer, name, taps, image=image, kernel=kernel, stride=stride)
        found[name] = _Part(
            layer, weight, reads, joined.stream[name], pair, len(law.signs), law.signs != (0,), law.opposite, phi.exact,
            float(inside.magnitude.max()), scale, geometry,
        )  # fmt: skip
    return found


def _linear(part: _Part) -> bool:
    """Whether nothing is added by a linearisation."""
    return not part.pair or part.exact


def _gain(node: Node) -> float:
    """By how much an elementwise operation may enlarge a deviation."""
    if node.activation is not None:
        return node.activation.lipschitz
    if node.batch_norm is not None:
        return float(node.batch_norm.scale.abs().max())
    return 1.0


def _budgets(
    graph: Graph, parts: Mapping[str, _Part], error: float, construction: str, form: str, sizes: Mapping[str, int]
) -> tuple[dict[str, float], dict[str, float]]:
    """Walking back from the output: the largest deviation of every layer's outputs, and epsilon of its parameters."""
    allowed = dict.fromkeys((node.name for node in graph.nodes), math.inf)
    allowed[graph.nodes[-1].name] = error
    epsilons = {}
    for node in reversed(graph.nodes):
        mine = allowed[node.name]
        if node.name in parts:
            part = parts[node.name]
            if form == "theorem":
                shares, count = 3 if construction == "2L" else 2, max(1, part.parameters)
                epsilons[node.name] = mine / (shares * count)
                inside = epsilons[node.name] / (sizes[node.name] if part.several else 1)
            else:
                shares = 1 + (part.reads != IMAGE) + (not _linear(part))
                row = max(1, part.largest_row)
                epsilons[node.name] = epsilon = mine / (shares * row * max(part.largest_input, 1.0))
                inside = mine / (shares * part.gain(epsilon, sizes[node.name]))
        elif node.layer is not None:  # a head that is kept
            inside = mine / max(float(node.layer.weight.double().abs().flatten(1).sum(1).max()), 1e-300)
        else:
            inside = mine / max(_gain(node), 1e-300)
        for name in node.inputs:
            allowed[name] = min(allowed[name], inside * _share(graph, node, name))
    return {name: allowed[name] for name in parts}, epsilons


def _share(graph: Graph, node: Node, name: str) -> float:
    """Which part of a sum's deviation a summand may have; each layer that reads a concatenation's part the same."""
    if node.op != "add":
        return 1.0
    mine = graph[name].attributes.get("summands", 1) if "summands" in node.attributes else 1
    return mine / node.attributes.get("summands", 2)


def _slots(
    parts: Mapping[str, _Part], joined: Layout, sizes: Mapping[str, int], construction: str
) -> dict[str, tuple[int, int]]:
    """For each layer: slots of each of its channels, and constant ones beside them."""
    found = {}
    for name, part in parts.items():
        readers = [other for other, reading in parts.items() if reading.reads == part.writes]
        many = {other: sizes[other] if construction == "L+1" else 1 for other in readers}
        found[name] = (
            max(many.values(), default=1), max((many[other] for other in readers if other in joined.needs), default=0)
        )  # fmt: skip
    return found


def _rows(part: _Part, slots: int, constants: int) -> int:
    return len(part.weight) * slots + constants


def _problems(
    parts: Mapping[str, _Part], joined: Layout, sizes: Mapping[str, int], construction: str
) -> dict[str, int]:
    """Subset sums of each layer."""
    slots, found = _slots(parts, joined, sizes, construction), {}
    for name, part in parts.items():
        how = joined.constants.get(part.writes)
        sums = how is not None and how.sums and joined.writers[part.writes][0] == name
        found[name] = part.problems * slots[name][0] + slots[name][1] * sums
    return found


def _copies(part: _Part, m: int, chance: float) -> int:
    """Rows of the first layer of a pair that serve m base values for every channel, position, sign and the constant.

    Where signs matter so many for each channel that, but for `chance`, m of each that is needed are among them.
    """
    channels = part.copied + bool(part.layer.bias.any())
    return channels * (_rows_of_signs(m, chance, part.signs) if part.signed else m * (2 if part.opposite else 1))


def _rows_of_signs(m: int, chance: float, signs: int) -> int:
    """The least n so that n random signs hold m of either or one, but for `chance`: signs P(Bin(n, 1/2) < m)."""
    n = m
    while True:
        below = sum(
            math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))
            for k in range(m)
        )
        if signs * below <= chance:
            return n
        n += 1


def _check(holds: bool, why: str) -> None:
    if not holds:
        raise LtxError(why)
