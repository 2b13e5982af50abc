"""Synflow pruning (Tanaka et al. 2020, "Pruning neural networks without any data by iteratively conserving
synaptic flow"): scores, the exponential schedule, and masks."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ltx.activations import ACTIVATIONS
from ltx.errors import LtxError
from ltx.targets.masked import prunable


def scores(model: nn.Module, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Synflow's score |theta * dR/dtheta| of every prunable parameter, in float64 on the parameter's device.

    R is the sum of the outputs of the linearised network - absolute parameters, activations replaced by the
    identity, batch norm with its running statistics - on an input of ones. float64, because R grows
    exponentially with depth. Activations have to be modules: a function called in forward stays as it is.

    Args:
        shape: of one input without the batch dimension, e.g. (1, 28, 28).
    """
    linear = copy.deepcopy(model).double().eval()
    activations = tuple(type(a.module()) for a in ACTIVATIONS.values())
    for name, module in list(linear.named_modules(remove_duplicate=False)):
        if isinstance(module, activations):
            linear.set_submodule(name, nn.Identity())
    with torch.no_grad():
        for tensor in linear.state_dict().values():
            if tensor.is_floating_point():
                tensor.abs_()
    parameters = prunable(linear)
    device = next(iter(parameters.values()))[0].device
    flow = linear(torch.ones(1, *shape, dtype=torch.float64, device=device)).sum()
    gradients = torch.autograd.grad(flow, [p for p, _ in parameters.values()])
    result = {
        name: (parameter * gradient).abs().detach()
        for (name, (parameter, _)), gradient in zip(parameters.items(), gradients, strict=True)
    }
    for name, score in result.items():
        if not torch.isfinite(score).all():
            raise LtxError(f"synflow: the score of '{name}' overflows float64; rescale the network's parameters")
    return result


def density_after(step: int, steps: int, density: float) -> float:
    """Density after pruning step `step` (1-based) of `steps` on the exponential schedule: density^(step/steps)."""
    return density ** (step / steps)


def prune(
    model: nn.Module, shape: tuple[int, ...], densities: Mapping[str, float] | float, *, scope: str = "local"
) -> None:
    """Set every mask of `model` to what Synflow keeps at the given density. Masks only ever shrink.

    Args:
        densities: share kept, one number or one per parameter name (`0.weight`).
        scope: `local` prunes every tensor to its density, `global` ranks all parameters together and needs
            one number.

    Raises:
        LtxError: an unknown scope, several densities with the global scope, or not one of every parameter.
    """
    values = scores(model, shape)
    parameters = prunable(model)
    if isinstance(densities, Mapping):
        if scope == "global":
            raise LtxError("synflow: the global scope needs one density for all parameters")
        share = dict(densities)
        if share.keys() != values.keys():
            raise LtxError(f"synflow: densities of {', '.join(share)}; needed are those of {', '.join(values)}")
    else:
        share = dict.fromkeys(values, densities)
    if scope == "local":
        for name, score in values.items():
            _shrink(parameters[name][1], score > _threshold(score.flatten(), share[name]))
    elif scope == "global":
        threshold = _threshold(torch.cat([s.flatten() for s in values.values()]), next(iter(share.values())))
        for name, score in values.items():
            _shrink(parameters[name][1], score > threshold)
    else:
        raise LtxError(f"synflow: scope '{scope}' is not known; there are local, global")


def _threshold(score: Tensor, density: float) -> Tensor:
    """The largest score that is pruned: the k-th smallest with k = int((1 - density) n), as in Synaptic-Flow."""
    k = int((1 - density) * score.numel())
    return score.kthvalue(k).values if k >= 1 else score.new_tensor(-1.0)


def _shrink(mask: Tensor, keep: Tensor) -> None:
    mask.mul_(keep.to(mask.dtype))
