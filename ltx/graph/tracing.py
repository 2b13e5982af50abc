"""nn.Module -> graph: by torch.fx, in eval mode; what has no meaning here is refused by name."""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from ltx.defaults import usual_defaults
from ltx.errors import ConstructionError
from ltx.evaluation import eval_mode
from ltx.graph.comparison import require_same_outputs
from ltx.graph.concatenation import take_apart
from ltx.graph.conversion import converted, in_place, sides
from ltx.graph.nodes import Graph, Node, leading_to
from ltx.graph.parameters import refuse, require_its_own_computation, require_no_hooks

_LEAVES = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.BatchNorm1d)


class _Proxy(fx.Proxy):
    """A stand-in that tells `x += y` from `x + y`, which torch.fx takes it for."""

    def __iadd__(self, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    """Layers are leaves, whatever module their class was defined in, and so are functions that take sizes of tensors.

    They check their arguments before torch.fx sees them, and PyTorch 2.8 refuses its stand-ins for sizes.
    """

    def __init__(self) -> None:
        super().__init__(autowrap_functions=(torch.reshape, nn.functional.avg_pool2d))
        self._autowrap_search += [torch, nn.functional]  # else only where a function is imported by its own name

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _LEAVES) or super().is_leaf_module(m, module_qualified_name)


@usual_defaults()
def trace(model: nn.Module | Graph, images: Tensor | None = None) -> Graph:
    """The graph of `model` in eval mode; concatenations are taken apart.

    What torch.compile or DataParallel has wrapped is traced without. A graph is what it is.

    Network and graph are compared, since torch.fx does not see what forward does to real tensors alone.

    Args:
        images: (n, C, H, W), on the first of which they are; on noise, of sides that are tried, where it is left out or
            the network cannot take them.

    Raises:
        ConstructionError: what cannot be traced or has no meaning here, naming the module and the reason; or a network
            that computes something else on images.
    """
    if isinstance(model, Graph):
        return model
    if not isinstance(model, nn.Module):
        raise ConstructionError(f"a {type(model).__name__} is no torch.nn.Module; give the network itself")
    try:
        list(model.modules())
    except AttributeError:
        raise refuse("", type(model).__name__, "it or a module in it does not call super().__init__()") from None
    require_no_hooks("", model)
    model = _unwrapped(model)
    require_no_hooks("", model)
    require_its_own_computation("", model)  # torch.fx sees what is on modules within, not on this one nor on leaves
    if type(model).__call__ is not nn.Module.__call__ and not isinstance(model, fx.GraphModule):
        raise refuse("", type(model).__name__, "has a __call__ of its own; say in forward what it computes")
    with eval_mode(model), torch.no_grad():  # parametrizations compute parameters from the mode
        graph = _trace(model)
        require_same_outputs(model, graph, images)
    return graph


def _unwrapped(model: nn.Module) -> nn.Module:
    """What torch.compile's and PyTorch's own parallel modules, and nobody's subclasses of them, pass images on to."""
    if type(model).__name__ == "OptimizedModule" and type(model).__module__.startswith("torch._dynamo"):
        return _unwrapped(model._orig_mod)  # type: ignore[arg-type]
    if type(model) in (nn.DataParallel, nn.parallel.DistributedDataParallel):
        return _unwrapped(model.module)  # type: ignore[arg-type]
    return model


def _trace(model: nn.Module) -> Graph:
    try:
        traced = _Tracer().trace(model)
    except Exception as error:  # fx raises many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConstructionError(
            f"the network {type(model).__name__} cannot be traced by torch.fx ({reason}); "
            "remove control flow that depends on the input"
        ) from error
    many = sum(node.op == "placeholder" for node in traced.nodes)
    if many != 1:
        raise ConstructionError(f"the network takes {many} inputs; ltx constructs networks of one image")
    nodes: list[Node] = []
    alias: dict[str | None, str] = {}  # nodes that do nothing in eval mode -> their input
    memory: dict[str, str] = {}  # node -> the node whose tensor it is a view of
    overwritten: dict[str, str] = {}  # node -> what has changed its tensor in place
    layers: set[str] = set()
    _write_out_means(traced)
    for fx_node in traced.nodes:
        if sides(fx_node):
            continue  # numbers, by which a view tells how it flattens, or a pool that it is of all of an image
        inputs = tuple(alias[a.name] for a in _tensors(fx_node) if not sides(a))
        for name in inputs:
            if memory[name] in overwritten:
                raise refuse(overwritten[memory[name]], "in place", f"changes '{name}', which is read again behind it")
        if fx_node.op != "output" and fx_node.kwargs.get("out") is not None:
            raise refuse(fx_node.name, "out=", "writes over another tensor; let it return its own")
        node = converted(model, fx_node, inputs)
        if in_place(model, fx_node):
            overwritten[memory[inputs[0]]] = fx_node.name
        if node is None:
            alias[fx_node.name] = inputs[0]
            continue
        taken = {"input", "output", *(other.name for other in nodes)}
        if node.layer is not None:
            if node.name in layers:
                raise refuse(node.name, "layer", "used twice; a ticket cannot share the parameters of two places")
            layers.add(node.name)
        name = node.name
        while node.op not in ("input", "output") and name in taken:
            name += "_"  # a module that is used twice, or called like another node
        alias[fx_node.name] = name
        memory[name] = memory[inputs[0]] if node.op == "flatten" else name
        nodes.append(replace(node, name=name))
    # without what forward computes and nothing reads
    return Graph(tuple(take_apart(leading_to(nodes, ("input", "output")))))


_NUMPY = {"axis": "dim", "keepdims": "keepdim", "x": "input", "a": "input"}  # names that PyTorch takes, too


def _write_out_means(traced: fx.Graph) -> None:
    """Write means over height and width as an average pooling, flattened unless they keep the dimensions.

    Others stay, and are refused where it is their turn, behind what is in front of them.
    """
    for node in traced.nodes:
        if node.target not in ("mean", torch.mean):
            continue
        given = dict(zip(("input", "dim", "keepdim"), node.args, strict=False))
        given |= {_NUMPY.get(name, name): value for name, value in node.kwargs.items()}
        dims = given.get("dim")
        if not isinstance(dims, tuple | list) or any(type(d) is not int for d in dims):
            continue
        if sorted(d % 4 for d in dims) != [2, 3]:
            continue
        if not isinstance(given.get("keepdim", False), bool) or given.keys() - {"input", "dim", "keepdim"}:
            continue
        with traced.inserting_before(node):
            mean = traced.call_function(nn.functional.adaptive_avg_pool2d, (given["input"], 1))
            if not given.get("keepdim"):
                mean = traced.call_function(torch.flatten, (mean, 1))
        node.replace_all_uses_with(mean)
        traced.erase_node(node)


def _tensors(node: fx.Node) -> list[fx.Node]:
    """The nodes that an operation reads, one that is read twice (x + x) twice."""
    given = (*node.args, *node.kwargs.values())
    every = [a for arg in given for a in (arg if isinstance(arg, list | tuple) else [arg])]
    direct = [a for a in every if isinstance(a, fx.Node)]
    return direct if len(direct) > len(node.all_input_nodes) else node.all_input_nodes
