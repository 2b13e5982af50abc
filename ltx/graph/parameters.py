"""The parameters of single modules as they are in force: masks applied, statistics folded in, oddities refused."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune

from ltx.errors import ConstructionError
from ltx.graph.nodes import BatchNorm, Layer
from ltx.targets.masked import MaskedConv2d, MaskedLinear


def batch_norm(name: str, module: nn.BatchNorm2d | nn.BatchNorm1d) -> BatchNorm:
    """Scale and shift with the running statistics, computed in float64."""
    if module.running_mean is None or module.running_var is None:
        raise refuse(name, type(module).__name__, "without running statistics it is no fixed function")
    _require_real(name, module, module.running_var)
    with torch.no_grad():
        variance = module.running_var.double().cpu() + module.eps
        gamma, beta = (
            torch.full_like(variance, value) if getattr(module, part) is None
            else _masked(name, module, part).detach().double().cpu()
            for part, value in (("weight", 1.0), ("bias", 0.0))
        )  # fmt: skip
        scale = gamma / variance.sqrt()
        shift = beta - module.running_mean.double().cpu() * scale
    scale, shift = scale.float() + 0.0, shift.float() + 0.0
    for part, tensor in (("scale", scale), ("shift", shift)):
        if not torch.isfinite(tensor).all():
            raise refuse(name, type(module).__name__, f"its {part} has NaN or infinite entries")
    return BatchNorm(scale, shift)


def convolution(name: str, module: nn.Conv2d) -> Layer:
    if isinstance(module, nn.ConvTranspose2d) or module.groups != 1 or module.padding_mode != "zeros":
        raise refuse(name, type(module).__name__, "only convolutions with groups=1 and padding_mode='zeros'")
    kernel, dilation = pair(module.kernel_size), pair(module.dilation)
    if isinstance(module.padding, str):
        full = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        if module.padding == "same" and any(f % 2 for f in full):
            raise refuse(name, "Conv2d", "padding='same' with an even kernel pads one side more than the other")
        padding = (full[0] // 2, full[1] // 2) if module.padding == "same" else (0, 0)
    else:
        padding = pair(module.padding)
    return Layer("conv", *_parameters(name, module), pair(module.stride), padding, dilation)


def linear(name: str, module: nn.Linear) -> Layer:
    return Layer("linear", *_parameters(name, module))


def _parameters(name: str, module: nn.Conv2d | nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias in force: of a plain layer, one with `weight_mask` buffers, or torch.nn.utils.prune's."""
    for tensor in (module.weight, module.bias):
        if tensor is not None:
            _require_real(name, module, tensor)
    with torch.no_grad():
        weight = _in_force(name, module, "weight")
        bias = torch.zeros(len(weight)) if module.bias is None else _in_force(name, module, "bias")
    for part, tensor in (("weight", weight), ("bias", bias)):
        if not torch.isfinite(tensor).all():
            raise refuse(name, type(module).__name__, f"its {part} has NaN or infinite entries")
    if bias.shape != weight.shape[:1]:
        raise refuse(name, type(module).__name__, f"its bias is {tuple(bias.shape)}, its weight {tuple(weight.shape)}")
    return weight, bias


_KNOWN = {
    nn.Conv2d: (nn.Conv2d.forward, MaskedConv2d.forward),
    nn.Linear: (nn.Linear.forward, MaskedLinear.forward),
    (nn.BatchNorm2d, nn.BatchNorm1d): (nn.BatchNorm2d.forward,),
}


def require_its_own_computation(name: str, module: nn.Module) -> None:
    """Refuse what may compute something else than its class: hooks, an override in a subclass or in an instance."""
    if any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
        raise refuse(name, type(module).__name__, "has no parameters yet; run it on some images first")
    require_no_hooks(name, module)
    known = next((forwards for base, forwards in _KNOWN.items() if isinstance(module, base)), None)
    if known is not None and type(module).forward not in known:
        raise refuse(name, type(module).__name__, "a subclass with a forward of its own may compute anything")
    if isinstance(module, nn.Conv2d) and type(module)._conv_forward is not nn.Conv2d._conv_forward:
        raise refuse(name, type(module).__name__, "a subclass with a _conv_forward of its own may compute anything")
    if replaced := {"forward", "_conv_forward"} & vars(module).keys():
        raise refuse(name, type(module).__name__, f"its {min(replaced)} was replaced; take that back")


def require_no_hooks(name: str, module: nn.Module) -> None:
    """Refuse hooks besides those of torch.nn.utils.prune, whose masks are looked at."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    if any(not _is_usual_pruning(hook) for hook in hooks):
        raise refuse(name, type(module).__name__, "hooks may change what it computes; remove them")


def _is_usual_pruning(hook: object) -> bool:
    """Whether it is one of torch.nn.utils.prune's and multiplies by its mask."""
    usual = prune.BasePruningMethod
    if not isinstance(hook, usual):
        return False
    return type(hook).apply_mask is usual.apply_mask and type(hook).__call__ is usual.__call__


def _require_real(name: str, module: nn.Module, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise refuse(name, type(module).__name__, "has no values, it lies on the device 'meta'; load its parameters")
    if tensor.dtype not in (torch.float32, torch.float64):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise refuse(name, type(module).__name__, f"has {kind} parameters, ltx takes float32; call model.float()")


def _masked(name: str, module: nn.Module, part: str) -> Tensor:
    """The parameter in force: times the mask of a masked layer, or of the pruning that a hook applies."""
    parameter, mask = getattr(module, part), getattr(module, f"{part}_mask", None)
    if any(getattr(hook, "_tensor_name", None) == part for hook in module._forward_pre_hooks.values()):
        return getattr(module, f"{part}_orig") * mask
    if mask is None or isinstance(module, MaskedConv2d | MaskedLinear):
        return parameter if mask is None else parameter * mask
    if not torch.equal(parameter * mask, parameter):
        why = f"its buffer {part}_mask is not applied by its forward; multiply it into the {part}"
        raise refuse(name, type(module).__name__, why)
    return parameter


def _in_force(name: str, module: nn.Module, part: str) -> Tensor:
    tensor = _masked(name, module, part)
    # + 0.0 turns the -0.0 of a masked parameter into 0.0, so that the digest depends on values alone
    return tensor.detach().float().cpu().clone(memory_format=torch.contiguous_format) + 0.0


def pair(value) -> tuple[int, int]:
    """Of one number, or one or two of them."""
    numbers = [operator.index(each) for each in (value if isinstance(value, tuple | list) else [value])]
    return numbers[0], numbers[-1]


def refuse(name: str, what: str, why: str) -> ConstructionError:
    return ConstructionError(f"module '{name}' ({what}): {why}")
