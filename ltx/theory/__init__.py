"""How wide a source has to be, and what a width guarantees (Theorems 3.1 and 3.2, Corollaries 2.2 and C.1).

Three steps lead from an allowed error of the outputs and a failure probability to the widths of a source.

**Error of a parameter.** Walking back from the output, every node of the target is given the largest deviation that it
may have (`errors.budgets`). A layer with n parameters in a row, each within epsilon of the target's, that reads inputs
of at most B in magnitude which deviate by at most D, deviates in any output by at most

    sum_j |w_j + e_j| D + n epsilon max(B, 1) [+ n epsilon (max(B, 1) + D)],      |e_j| <= epsilon,

the last part being the linearisation of a pair whose activation is linear near 0 only. In L+1, behind the first layer,
the first part is another one: the slots of a channel deviate each on its own, and a sum of up to m entries of up to 1,
for every parameter, passes on up to m n D (5.42 times as much of a normal source, `ltx.source.LAWS`). (The proof of
Theorem 3.2, equation (13), has N D there, as if all slots of a channel deviated alike. The theorem can be mended:
epsilon_l becomes smaller by a factor of m for each layer behind l, of which only the logarithm enters the width. What
it hides is how tickets of deep networks fail, as the README says under "Deep tickets that work": sum |w_s| and not |W|
is what deviations grow with.) Each part gets the same share of what the layer may deviate. Behind it an activation
divides by its Lipschitz constant, batch norm by its largest scale, and a sum halves. The paper says the same with N,
the number of parameters of the whole layer, for n and for sum |w|, which needs |x| <= 1 and |w| <= 1 (it takes both for
granted, and in Theorem 3.2 a first layer that is exactly linear): form "theorem" gives its epsilon_l, but less where a
target does not keep to that, as much as form "norms", the default, gives: what follows from the target's own norms and
interval bounds of its activations. That one holds for any target, and is larger wherever the paper's assumptions hold.
With skips epsilon_l of form "theorem" is another one than the paper's: it counts the skips' parameters beside the
layer's, (T N_w + N_m) in equation (14), where here a sum halves what its summands may deviate, which then go on each by
itself. Both are sound.

**Chance of a subset.** Corollary 2.2: of m numbers a subset sum is within epsilon of theta, |theta| <= 1, with
probability at least 1 - delta', if m >= C log(1 / min(epsilon, delta')). A union bound over rho problems needs delta' =
delta / rho. Theorem 3.2 states rho delta / N_l, its proof delta / rho: the proof is right, since rho is at least the
number of problems, and more of them must make each one's chance smaller, not larger. (The statement's would allow
failures that add up to more than delta.) Theorem 3.1 has log(N / min(epsilon_l, delta)): sufficient in epsilon, where N
is counted twice, but not in delta, because inputs of both signs make 2 N problems (Corollary C.1's proof says so). Here
the problems are counted, and m is no larger than they ask for. theta is a parameter in units of its base set: of the
scale, and for a bias of the constants, too, that it is a sum of, which are phi(0), a batch norm's shift, or what a row
that sums to 1 becomes behind these (the paper takes them for 1; those of such rows are within their epsilon, so that
theta is that of the least and epsilon that of the largest). Beyond theta = 1, of which the corollary does not speak,
some numbers are set aside, so many that a subset of them brings the rest within 1 but for half of delta' (Chernoff's
bound, `widths.steps`), and the corollary holds for the others; up to 1.25 a larger C was measured, too. In L+1 rho
depends on m, because layers are made m times: the smallest solution is found by iteration, for which the paper bounds
rho by C N^(1 + gamma) log(...).

**Width.** In 2L the paper asks for C c log(...) rows of the 1x1 layer; as many are needed of each sign of lambda, whose
signs are random. Here it has so many rows that m of each sign that is needed are among them, again with a union bound,
for which half of delta is set aside. The layers behind have a row for each of their channels, m times as many in L+1.

C is a measurement (`ltx/subset_sum/limits.py`), not a theorem: Lueker's proof gives none. A guarantee is as good as it.
Of a normal source it is smaller, so that fewer rows are enough, although theta = 1 is one standard deviation and
entries may be larger than a uniform source's, which deviations of slots grow with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ltx.checks import one_of, real, whole
from ltx.constructions.layout import IMAGE, Layout, kept_of, layout
from ltx.defaults import usual_defaults
from ltx.graph import Graph, trace
from ltx.subset_sum.limits import CONSTANTS, Constants
from ltx.subset_sum.statistics import PRODUCTS
from ltx.theory.errors import budgets, ticket_error
from ltx.theory.parts import Demand, Part, check, parts_of
from ltx.theory.widths import base_set_size, chance_of_none, copies_of, enough, problems_of, rows_of, slots_of

__all__ = [
    "FORMS", "Guarantee", "LayerBound", "base_set_size", "constants", "failure_probability", "guarantee",
    "ticket_error",
]  # fmt: skip

FORMS = ("norms", "theorem")
MOST = 1_000_000  # m


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


@usual_defaults()
def guarantee(
    model: nn.Module | Graph, error: float, delta: float, *, construction: str,
    input_range: tuple[float, float] = (-1.0, 1.0), head: str = "keep", scaling: str = "unit", form: str = "norms",
    law: str = "uniform", single: float | None = None, product: float | None = None,
    same_size: bool = False, pair_kernel: int = 1, pair_stride: str = "second",
) -> Guarantee:  # fmt: skip
    """The widths of a source that contains a ticket with an error of at most `error` with probability 1 - delta.

    Args:
        error: largest deviation of any output over all inputs in `input_range`.
        form: of the error of a parameter, see above.
        law: of the source's parameters, as `ltx.construct` has it.
        single, product: C of Corollary 2.2 for base sets of parameters and of products of two; by default those that
            were measured for the law (`ltx.subset_sum.limits.CONSTANTS`).
        same_size: one m and one epsilon for all layers, as `ltx.construct` has them; otherwise each its own, those of
            the result being the largest m and the smallest epsilon of any.
        pair_kernel, pair_stride: see `ltx.construct`.

    Raises:
        LtxError: an error, a probability, a constant or a setting without meaning; constants that may be 0, or so small
            that m is beyond a million, as it is for parameters far beyond the scale; a network so deep, or an error so
            small, that an epsilon is 0 in float64.
        ConstructionError: no source contains a ticket: of a bias that cannot be made, or of a normalised image, or no
            construction takes the target.

    Arithmetic is exact here. Float32 may round opposite rows, of sigmoid and softplus, so far that `ltx.construct`
    refuses what a guarantee is given for.
    """
    graph = trace(model)
    check(error > 0 and math.isfinite(error), f"error {error:g} must be a positive number")
    check(0 < delta < 1, f"delta {delta:g} must lie between 0 and 1")
    one_of("form", form, FORMS)
    kept = kept_of(graph, head)
    known = _bases(law, single, product)

    def seen(joined: Layout) -> dict[str, Part]:
        return parts_of(graph, joined, construction, kept, input_range, scaling, law, pair_kernel, pair_stride)

    epsilons, sizes = dict.fromkeys(graph.layers, math.inf), dict.fromkeys(graph.layers, 1)
    joined = layout(graph, epsilons, kept=kept)
    parts, rows_vary = seen(joined), False
    while True:  # m rises with rho, and in L+1 rho and 1 / epsilon with m, but with their logarithms alone
        signed = [part for part in parts.values() if part.pair and part.signed]
        delta_sums = delta / 2 if signed else delta
        allowed, within = budgets(graph, parts, error, construction, form, sizes)
        if same_size:
            within = dict.fromkeys(within, min(within.values()))
        larger, epsilons = epsilons, epsilons | {name: min(within[name], epsilons[name]) for name in parts}
        problems = problems_of(parts, joined, sizes, construction)
        chance = delta_sums / max(1, sum(problems.values()))
        check(chance > 0, f"delta {delta:g} is so small that a problem's share of it is 0 in float64")
        needed = {}
        for name, part in parts.items():
            demands = part.demands(epsilons.get(part.maker, 0.0) if rows_vary else 0.0)
            _require_reachable(name, epsilons[name], demands)
            needed[name] = max(enough(d, epsilons[name], chance, *known[part.pair]) for d in demands)
            check(needed[name] <= MOST, f"layer {name}: needs an m of {needed[name]:,}, beyond {MOST:,}")
        if same_size:
            needed = dict.fromkeys(needed, max(needed.values()))
        before, sizes = sizes, sizes | {name: max(m, sizes[name]) for name, m in needed.items()}
        if (sizes, epsilons) == (before, larger):
            if rows_vary:
                break
            # rows of constants vary by epsilon: that is looked at when it is nearly what it will be, with sizes of 1 it
            # is much larger. With a larger m it becomes smaller, so that m may be more than is needed; it is enough
            rows_vary = True
        # biases of at most epsilon are left out, which says what constants are for, and with that how they are made:
        # more of them are read as epsilon falls, which it alone does
        elif (now := layout(graph, epsilons, kept=kept)) != joined:
            joined, parts = now, seen(now)
    needs = sum(part.copied + 1 for part in signed)  # channels, and the constant
    slots, layers = slots_of(parts, joined, sizes, construction), []
    widths = {
        stream: max(rows_of(parts[name], *slots[name]) for name in writers if name in parts)
        for stream, writers in joined.writers.items()
        if any(name in parts for name in writers)
    }
    for name, part in parts.items():
        copies = copies_of(part, sizes[name], (delta - delta_sums) / max(1, needs)) if part.pair else 0
        rows, taps = rows_of(part, *slots[name]), part.weight.shape[2]
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


@usual_defaults()
def failure_probability(
    model: nn.Module | Graph, base_set_size: int, epsilon: float, *, construction: str,
    input_range: tuple[float, float] = (-1.0, 1.0), head: str = "keep", scaling: str = "unit", law: str = "uniform",
    single: float | None = None, product: float | None = None,
) -> float:  # fmt: skip
    """A delta: with m and epsilon everywhere, no row is given up with probability at least 1 - delta.

    The other way round: rho exp(-m / C), where Corollary 2.2 says anything, i.e. epsilon >= exp(-m / C) and theta <= 1;
    beyond theta = 1 what remains of m (`widths.chance_of_none`); 1 elsewhere.

    Raises:
        LtxError: arguments without meaning.
        ConstructionError: as `guarantee` does.
    """
    graph = trace(model)
    base_set_size, epsilon = whole("base_set_size", base_set_size), real("epsilon", epsilon)
    check(base_set_size >= 1, f"base_set_size {base_set_size} must be at least 1")
    check(0 < epsilon < math.inf, f"epsilon {epsilon:g} must be a positive number")
    kept = kept_of(graph, head)
    joined = layout(graph, epsilon, kept=kept)
    parts = parts_of(graph, joined, construction, kept, input_range, scaling, law)
    known = _bases(law, single, product)
    problems = problems_of(parts, joined, dict.fromkeys(parts, base_set_size), construction)
    total = 0.0
    for name, part in parts.items():
        if problems[name]:
            demands = part.demands(epsilon if part.maker in parts else 0.0)
            chance = max(chance_of_none(d, epsilon, base_set_size, *known[part.pair]) for d in demands)
            total += problems[name] * chance
    return min(1.0, total)


def constants(law: str, single: float | None = None, product: float | None = None) -> Constants:
    """C of Corollary 2.2: what is given, else what was measured for a source of that law.

    Raises:
        LtxError: a law that is not known, a constant that is not positive.
    """
    one_of("law", law, CONSTANTS)
    measured = CONSTANTS[law]
    found = Constants(measured.single if single is None else single, measured.product if product is None else product)
    check(
        all(0 < constant < math.inf for constant in (found.single, found.product)),
        f"the constants C, {found.single:g} and {found.product:g}, must be positive numbers",
    )
    return found


def _require_reachable(name: str, epsilon: float, demands: Sequence[Demand]) -> None:
    """LtxError where no m of at most `MOST` is enough for a layer, or that cannot be told in float64."""
    check(
        all(epsilon / demand.most > 0 for demand in demands if demand.most),
        f"layer {name}: so many layers are behind it, or the error is so small, that its epsilon is 0 in float64",
    )
    weights, *biases = demands
    check(
        weights.theta < MOST,
        f"layer {name}: parameters of up to {weights.largest:g} are too large for an m of at most {MOST:,}; use "
        "scaling='layer_max'",
    )
    for demand in biases:
        why = "may be 0; give a smaller error" if not demand.least else f"are too small for an m of at most {MOST:,}"
        check(demand.theta < MOST, f"layer {name}: the constants that its biases are made of {why}")


def _bases(law: str, single: float | None, product: float | None) -> tuple[tuple[float, str], tuple[float, str]]:
    """C and law of the base sets of a layer on its own, and of a pair."""
    found = constants(law, single, product)
    return (found.single, law), (found.product, PRODUCTS[law])
