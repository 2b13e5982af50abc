"""torch.fx's nodes -> the graph's: each module and function that has a meaning here, the others refused by name."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from ltx.activations import FAMILIES, Activation, Family
from ltx.errors import ConstructionError, LtxError
from ltx.graph.concatenation import CONCATENATION
from ltx.graph.nodes import Node
from ltx.graph.parameters import batch_norm, convolution, linear, pair, refuse, require_its_own_computation


def converted(model: nn.Module, node: fx.Node, inputs: tuple[str, ...]) -> Node | None:
    """A node, of which `inputs` are the graph's names; None where it does nothing in eval mode.

    Raises:
        ConstructionError: it has no meaning here, or arguments that PyTorch may take and nobody here knows.
    """
    try:
        return _convert(model, node, inputs)
    except LtxError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise refuse(*_called(node), f"not understood ({type(error).__name__}: {reason})") from error


def _convert(model: nn.Module, node: fx.Node, inputs: tuple[str, ...]) -> Node | None:
    if node.op == "placeholder":
        return Node("input", "input")
    if node.op == "output":
        if len(inputs) != 1 or not isinstance(node.args[0], fx.Node):
            what = "no tensor" if not inputs else "several tensors" if len(inputs) > 1 else "a collection of tensors"
            raise ConstructionError(f"the network returns {what}; ltx constructs networks that return one tensor")
        return Node("output", "output", inputs)
    if node.op == "call_module":
        name = str(node.target)
        return _convert_module(name, model.get_submodule(name), inputs)
    if node.op in ("call_function", "call_method"):
        return _convert_function(model, node, inputs)
    raise refuse(node.name, str(node.target), "parameters used outside a layer are not supported")


def _convert_module(name: str, module: nn.Module, inputs: tuple[str, ...]) -> Node | None:
    require_its_own_computation(name, module)
    if module.training and isinstance(module, _DIFFERENT_IN_TRAINING):
        raise refuse(name, type(module).__name__, "is in training mode in eval mode too; let eval() reach it")
    if isinstance(module, nn.Conv2d):
        return Node(name, "layer", inputs, layer=convolution(name, module))
    if isinstance(module, nn.Linear):
        return Node(name, "layer", inputs, layer=linear(name, module))
    if isinstance(module, _ABSENT):
        return None
    if isinstance(module, nn.Flatten):
        if (module.start_dim, module.end_dim) != (1, -1):
            raise refuse(name, "Flatten", "only start_dim=1, end_dim=-1 keeps one row per image")
        return Node(name, "flatten", inputs)
    if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
        return Node(name, "batch_norm", inputs, batch_norm=batch_norm(name, module))
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return _average(name, inputs, module.output_size)
    if isinstance(module, nn.AvgPool2d):
        return _avg_pool(name, inputs, vars(module))
    if isinstance(module, nn.MaxPool2d):
        if module.return_indices or pair(module.dilation) != (1, 1):
            raise refuse(name, "MaxPool2d", "return_indices and dilation are not supported")
        return _max_pool(name, inputs, module.kernel_size, module.stride, module.padding, module.ceil_mode)
    for family in FAMILIES.values():
        if type(module) is family.module:
            values = {parameter: getattr(module, parameter) for parameter in family.parameters}
            return Node(name, "activation", inputs, activation=_activation(name, family, values))
    if isinstance(module, nn.Softmax | nn.LogSoftmax):
        raise refuse(name, type(module).__name__, _LEAVE_OUT)
    known = (
        "Conv2d, Linear, BatchNorm1d, BatchNorm2d, Flatten, MaxPool2d, AvgPool2d, AdaptiveAvgPool2d, Dropout, "
        + ", ".join(family.module.__name__ for family in FAMILIES.values())
    )
    raise refuse(name, type(module).__name__, f"not supported; there are {known}")


_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_ABSENT = (*_DROPOUT, nn.Identity)
_DIFFERENT_IN_TRAINING = (*_DROPOUT, nn.BatchNorm1d, nn.BatchNorm2d)
_LEAVE_OUT = "not supported; let the network return what is in front of it, the classes are the same"
_DROPOUTS = (nn.functional.dropout, nn.functional.dropout2d, nn.functional.alpha_dropout)

_FUNCTIONS = {
    function: family
    for family in FAMILIES.values()
    for name in family.names
    for function in (name, getattr(torch, name, name), getattr(nn.functional, name))
}


def _convert_function(model: nn.Module, node: fx.Node, inputs: tuple[str, ...]) -> Node | None:
    if node.target in _DROPOUTS:
        training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
        if training:
            raise refuse(node.name, "dropout", "is at work in eval mode too; pass training=self.training")
        return None
    if node.target in ("view", "reshape", torch.reshape):
        shape = node.args[1:] or (node.kwargs.get("shape", node.kwargs.get("size", ())),)
        shape = shape[0] if isinstance(shape[0], tuple | list) else shape
        if len(shape) == 2 and _is_batch_size(shape[0]) and shape[1] == -1:
            return Node(node.name, "flatten", inputs)
        if len(shape) == 2 and (_is_batch_size(shape[0]) or shape[0] == -1) and _widths_read(model, node) == [shape[1]]:
            return Node(node.name, "flatten", inputs)  # of an image of another size the Linear layer complains
        why = "only view(x.size(0), -1), or view(-1, N) in front of Linear(N, ...), keeps one row per image"
        raise refuse(node.name, "view", why)
    if node.target in (nn.functional.max_pool2d, torch.max_pool2d):
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        given = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
        _require_numbers(node.name, "max_pool2d", given)
        if given.get("return_indices") or pair(given.get("dilation", 1)) != (1, 1):
            raise refuse(node.name, "max_pool2d", "return_indices and dilation are not supported")
        return _max_pool(
            node.name, inputs, given["kernel_size"], given.get("stride"), given.get("padding", 0),
            bool(given.get("ceil_mode", False)),
        )  # fmt: skip
    if node.target is nn.functional.avg_pool2d:
        names = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        image = given.pop("input")
        if sides(given["kernel_size"]) == [(image, 2), (image, 3)]:
            given |= {"kernel_size": None, "stride": None}  # whatever it is, there is one position
        _require_numbers(node.name, "avg_pool2d", given)
        return _avg_pool(node.name, inputs, given)
    if node.target in _FUNCTIONS:
        family = _FUNCTIONS[node.target]  # type: ignore[index]
        values = dict(zip(family.parameters, node.args[1:], strict=False)) | {
            key: value for key, value in node.kwargs.items() if key in family.parameters
        }  # fmt: skip
        return Node(node.name, "activation", inputs, activation=_activation(node.name, family, values))
    if node.target in (torch.flatten, "flatten"):
        start = node.args[1] if len(node.args) > 1 else node.kwargs.get("start_dim", 0)
        end = node.args[2] if len(node.args) > 2 else node.kwargs.get("end_dim", -1)
        if (start, end) == (1, -1):
            return Node(node.name, "flatten", inputs)
    if node.target in ("mean", torch.mean):
        raise refuse(node.name, "mean", "only over height and width, dimensions 2 and 3, of images")
    if node.target in _ADDITIONS:
        others = [a for a in node.args if not isinstance(a, fx.Node)]  # torch.add(x, 2, y) is x + 2 y
        if len(inputs) != 2 or others or node.kwargs.get("alpha", 1) != 1:
            raise refuse(node.name, "add", "only the sum of two streams is supported")
        return Node(node.name, "add", inputs)
    if node.target in (torch.cat, torch.concat, torch.concatenate):
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
        if dim not in (1, -3):
            raise refuse(node.name, "cat", f"along dimension {dim}; only channels, dimension 1, can be concatenated")
        return Node(node.name, CONCATENATION, inputs) if len(inputs) > 1 else None
    if node.target is nn.functional.adaptive_avg_pool2d:
        size = node.args[1] if len(node.args) > 1 else node.kwargs.get("output_size")
        _require_numbers(node.name, "adaptive_avg_pool2d", {"output_size": size})
        return _average(node.name, inputs, size)
    name, what = _called(node)
    raise refuse(name, what, _LEAVE_OUT if what in ("softmax", "log_softmax") else "not supported")


def _called(node: fx.Node) -> tuple[str, str]:
    """The names of a node and of what it calls."""
    if isinstance(node.target, str):
        return (node.target, "module") if node.op == "call_module" else (node.name, node.target)
    return node.name, getattr(node.target, "__name__", str(node.target))


def _is_batch_size(value: object) -> bool:
    """Whether it is x.size(0), x.size()[0] or x.shape[0]."""
    return [dimension for _, dimension in sides(value)] == [0]


def _require_numbers(name: str, what: str, given: Mapping) -> None:
    if sides(list(given.values())):
        why = "sizes of tensors only for an average over all of an image, both sides of it: avg_pool2d(x, x.shape[2:])"
        raise refuse(name, what, why)


def _widths_read(model: nn.Module, node: fx.Node) -> list[int]:
    """The different `in_features` of the Linear layers that read a tensor, directly or behind other operations."""
    found: set[int] = set()
    for user in node.users:
        module = model.get_submodule(str(user.target)) if user.op == "call_module" else None
        found.update([module.in_features] if isinstance(module, nn.Linear) else _widths_read(model, user))
    return sorted(found)


_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")


def _max_pool(name: str, inputs: tuple[str, ...], kernel, stride, padding, ceil_mode: bool) -> Node:
    size = pair(kernel)
    attributes = {"kernel_size": size, "stride": pair(stride or size), "padding": pair(padding)}
    return Node(name, "max_pool", inputs, attributes=attributes | ({"ceil_mode": True} if ceil_mode else {}))


def _avg_pool(name: str, inputs: tuple[str, ...], given: Mapping) -> Node:
    if given.get("ceil_mode") or pair(given.get("padding", 0)) != (0, 0) or given.get("divisor_override"):
        raise refuse(name, "AvgPool2d", "ceil_mode, padding and divisor_override are not supported")
    if given["kernel_size"] is None:
        return _average(name, inputs, 1)
    size = pair(given["kernel_size"])
    attributes = {"kernel_size": size, "stride": pair(given.get("stride") or size)}
    return Node(name, "avg_pool", inputs, attributes=attributes)


def _average(name: str, inputs: tuple[str, ...], size) -> Node:
    """An average over the whole image, or over as many parts of it as `size` says."""
    if size in (1, (1, 1), [1, 1]):
        return Node(name, "avg_pool", inputs, attributes={"kernel_size": None, "stride": None})
    if not isinstance(size, tuple | list) or None not in size:
        size = pair(size)
    return Node(name, "adaptive_avg_pool", inputs, attributes={"output_size": tuple(size)})


def _activation(name: str, family: Family, values: Mapping[str, object]) -> Activation:
    """The activation of that family with these parameters, the others as usual."""
    plain = {
        key: float(value) if isinstance(value, numbers.Real | Tensor) and type(value) not in (int, float) else value
        for key, value in values.items()
    }  # of NumPy, PyTorch or fractions
    try:
        return family.make(**plain)
    except LtxError as error:
        raise refuse(name, family.module.__name__, str(error).partition(": ")[2]) from None


def sides(value: object) -> list[tuple[object, int]]:
    """The tensors, and which of their up to four dimensions, whose sizes a value holds; none where it is no size."""
    if isinstance(value, tuple | list):
        return [side for each in value for side in sides(each)]
    if not isinstance(value, fx.Node) or value.op not in ("call_method", "call_function"):
        return []
    if value.target is operator.getitem:
        return _entries(sides(value.args[0]), value.args[1])
    if value.target == "size" or (value.target is getattr and value.args[1] == "shape"):
        which = (*value.args[1:], *value.kwargs.values()) if value.target == "size" else ()
        return _entries([(value.args[0], dimension) for dimension in range(4)], which[0] if which else slice(None))
    return []


def _entries(of: list, at: object) -> list:
    at = slice(at, at + 1 or None) if isinstance(at, int) else at
    return of[at] if isinstance(at, slice) else []


def in_place(model: nn.Module, node: fx.Node) -> bool:
    """Whether an operation overwrites its first input."""
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        return bool(getattr(module, "inplace", False)) and not isinstance(module, _DROPOUT)
    if node.target in _FUNCTIONS:
        behind = node.args[1 + len(_FUNCTIONS[node.target].parameters) :]  # type: ignore[index]
        return bool(node.kwargs.get("inplace", behind and behind[0]))
    return node.target in (operator.iadd, "add_")
