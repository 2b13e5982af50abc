"""The paper's protocol for ResNet-22: no ticket is built, the target's parameters get the errors that one would have.

Each parameter above epsilon gets the error, with a random sign, of a random subset-sum problem, and that problem's
subset size counts for the ticket's parameters (section 4, Tables 3 and 4). Problems without a subset within epsilon
are left out, as the rows they belong to are given up (Appendix F). Projection shortcuts stay as they are and are not
counted: Table 4's counts are without them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from ltx.checks import one_of, seed_of
from ltx.constructions.layout import kept_of
from ltx.constructions.two_for_one import pair_activation, pair_law
from ltx.defaults import usual_defaults
from ltx.errors import ConstructionError
from ltx.graph import Graph, above, trace
from ltx.source import LAWS
from ltx.subset_sum import sample
from ltx.subset_sum.statistics import PRODUCTS

PROBLEMS = 100_000  # the paper's


@dataclass(frozen=True)
class Sampled:
    """A target with sampled errors, and what it counts for."""

    state: dict[str, Tensor]  # the target's state with changed parameters, masks applied
    parameters: int  # estimate: of an L+1 ticket
    target_parameters: int  # above epsilon, of the layers that were changed


@usual_defaults()
def sampled(
    model: nn.Module, *, base_set_size: int = 15, epsilon: float = 0.01, seed: int = 0, selection: str = "smallest",
    input_range: tuple[float, float] = (-1.0, 1.0), head: str = "construct", law: str = "uniform",
) -> Sampled:  # fmt: skip
    """Draw the errors and the size of an L+1 ticket for `model` (its state is left alone).

    A layer behind the first counts m slots of each output, the last one. The first layer is a two-for-one pair: its
    errors are those of products of two of the source's numbers, and it counts once for each base set.

    Args:
        base_set_size, epsilon, selection, input_range: as in `ltx.construct`.
        law: of the source's parameters, as in `ltx.construct`; the paper's is uniform.
        head: `construct` treats the classifier like any layer, as the paper does; `keep` leaves it as it is, uncounted.
        seed: of the errors. The problems that they are drawn from are the same for all seeds.

    Raises:
        ConstructionError: the model's layers cannot be traced, or its parameters are not in its state; an unknown
            head or law, or nothing else; a seed that is none.
        LtxError: as `ltx.subset_sum.solve`.
    """
    if isinstance(model, Graph):
        raise ConstructionError("a graph has no state whose parameters could get errors; give the network itself")
    graph = trace(model)
    generator = torch.Generator().manual_seed(seed_of(seed, ConstructionError))
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    one_of("law", law, LAWS, ConstructionError)
    kept = kept_of(graph, head)
    layers = {n: layer for n, layer in graph.layers.items() if n not in kept and not graph.is_projection(n)}
    if not layers:
        raise ConstructionError("the network has no layer whose parameters could get errors")
    first, last = next(iter(layers)), list(layers)[-1]
    named, shared = dict(model.named_parameters(remove_duplicate=False)), {}  # which a layer of that name has already
    parameters = copies = 0
    for name, layer in layers.items():
        sets = constants = 1  # base sets of a weight, of a bias
        if name == first:
            rows = pair_law(pair_activation(graph, name), nonnegative=input_range[0] >= 0)
            sets, constants = (2, 2) if rows.opposite else (len(rows.signs), 1)
            read = above(layer.weight, epsilon).any(0)  # (C_in, ...)
            channels = int(read.view(len(read), -1).any(1).sum())
            biased = bool(above(layer.bias, epsilon).any())
            copies = base_set_size * (sets * channels + constants * biased)
        error, size = _distribution(PRODUCTS[law] if name == first else law, base_set_size, epsilon, selection)
        slots = 1 if name == last else base_set_size
        for part, tensor in (("weight", layer.weight), ("bias", layer.bias)):
            if part == "bias" and not bool(tensor.any()):
                continue
            key = f"{name}.{part}"
            key = f"{key}_orig" if f"{key}_orig" in state else key  # of torch.nn.utils.prune, beside KEY_mask
            if key not in state and "[" in name:
                raise ConstructionError(
                    f"layer {name}: is part of a layer that reads a concatenation, which has no sampled errors; use "
                    "construction L+1 or 2L"
                )
            if key not in state or state[key].shape != tensor.shape:
                raise ConstructionError(
                    f"layer {name}: its {part} is not '{key}' of the model's state; take its parametrization away, "
                    "e.g. with torch.nn.utils.parametrize.remove_parametrizations"
                )
            if key in named and (other := shared.setdefault(named[key], name)) != name:
                raise ConstructionError(
                    f"layer {name}: its {part} is that of layer {other} too, which has errors; give it its own"
                )
            changed, sizes = _perturbed(tensor, epsilon, error, size, generator)
            state[key] = changed.to(state[key].device)
            parameters += slots * (sets if part == "weight" else constants) * sizes
    counted = sum(layer.parameters_above(epsilon) for layer in layers.values())
    return Sampled(state, parameters + copies, counted)


@lru_cache
def _distribution(law: str, m: int, epsilon: float, selection: str) -> tuple[np.ndarray, np.ndarray]:
    """Errors and sizes of the solved ones of PROBLEMS random problems."""
    drawn = sample(law, m, epsilon, selection=selection, problems=PROBLEMS)
    solved = drawn.solved
    if not solved.any():
        raise ConstructionError(
            f"none of {PROBLEMS} random problems has a subset within {epsilon:g}; raise m or epsilon"
        )
    return drawn.error[solved], drawn.size[solved]


def _perturbed(
    tensor: Tensor, epsilon: float, error: np.ndarray, size: np.ndarray, generator: torch.Generator
) -> tuple[Tensor, int]:
    """The parameters with sampled errors, those of at most epsilon dropped, and the sum of the sampled sizes."""
    big = above(tensor, epsilon)
    count = int(big.sum())
    which = torch.randint(len(error), (count,), generator=generator)
    sign = torch.randint(2, (count,), generator=generator).double() * 2 - 1
    changed = torch.zeros_like(tensor)
    changed[big] = (tensor[big].double() + sign * torch.from_numpy(error)[which]).to(tensor.dtype)
    return changed, int(torch.from_numpy(size).long()[which].sum())
