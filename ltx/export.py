"""A ticket for other tools: as a plain PyTorch network with masks, as a dense state dict, as ONNX."""

from __future__ import annotations

import operator
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import prune

from ltx import operations, source
from ltx.activations import FAMILIES, Activation, from_attributes
from ltx.defaults import usual_defaults
from ltx.errors import LtxError
from ltx.files import replacing
from ltx.source import SourceLayer
from ltx.ticket import Ticket, TicketNode

HELD = 1 << 22  # parameters that are drawn at a time


@usual_defaults()
def masked_network(ticket: Ticket) -> fx.GraphModule:
    """The source network of standard modules, pruned by `torch.nn.utils.prune`: `weight_orig` and `weight_mask`.

    It is as wide as the source, `ticket.source_parameters` numbers and as many masks, whatever the ticket keeps;
    `ticket.to_module()` runs it much faster. Given parameters have no mask.
    """
    modules, graph, values = nn.ModuleDict(), fx.Graph(), {}
    for node in ticket.graph:
        inputs = tuple(values[name] for name in node.inputs)
        if node.op == "input":
            values[node.name] = graph.placeholder("images")
        elif node.op == "output":
            rows = torch.tensor(node.attributes["rows"], dtype=torch.int64)
            taken = graph.call_module(_hold(modules, node.name, _Rows(rows)), inputs)
            graph.output(graph.call_function(torch.flatten, (taken, 1)) if node.attributes.get("flatten") else taken)
        elif node.op == "add":
            values[node.name] = graph.call_function(operator.add, inputs)
        elif node.op == "flatten":
            values[node.name] = graph.call_function(torch.flatten, (*inputs, 1))
        else:
            values[node.name] = graph.call_module(_hold(modules, node.name, _module(ticket, node)), inputs)
    network = fx.GraphModule(modules, graph, "Ticket")
    return network.eval()


@usual_defaults()
def state_dict(ticket: Ticket) -> dict[str, Tensor]:
    """The source's parameters, dense, and their masks of 0 and 1 under Synaptic-Flow's names.

    `LAYER.weight` (C_out, C_in, kernel...) and `LAYER.weight_mask`, the same of biases where the source has them, and
    what is given, not random, as `given.NODE.weight` and `.bias`. float32.
    """
    found = {}
    for layer in ticket.layers:
        for part, (values, mask) in _parameters(ticket, layer).items():
            found[f"{layer.name}.{part}"], found[f"{layer.name}.{part}_mask"] = values, mask
    return found | {f"given.{name}": tensor.clone() for name, tensor in ticket.given.items()}


@usual_defaults()
def onnx(ticket: Ticket, path: Path, shape: tuple[int, int, int]) -> None:
    """Write the ticket as ONNX, for images (N, C, H, W) of that shape, any N; only the channels that are read.

    The same versions of PyTorch and onnxscript make the same bytes of the same ticket, wherever they are installed.

    Raises:
        LtxError: the packages that PyTorch's exporter needs are missing, or the ticket cannot take such images.
    """
    try:
        import onnxscript  # noqa: F401 - what torch.onnx.export needs, said before its own long message
    except ImportError:
        raise LtxError("ONNX needs two packages more: pip install 'onnx>=1.17' 'onnxscript>=0.6.2'") from None
    from ltx.network import TicketNetwork

    class Exported(TicketNetwork):
        def _activation(self, node: TicketNode, x: Tensor) -> Tensor:
            phi = from_attributes(node.attributes)
            return _exponential(phi, x) if phi.name in ("elu", "celu", "selu") else super()._activation(node, x)

    network = Exported(ticket, dense=True).eval()
    try:
        network(torch.zeros(1, *shape))
    except RuntimeError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise LtxError(
            f"the ticket cannot take images {shape} ({reason}); give the shape of the images it is for"
        ) from error
    program = torch.onnx.export(
        network, (torch.zeros(2, *shape),), input_names=["images"], output_names=["outputs"],
        dynamic_shapes=({0: torch.export.Dim("images")},), dynamo=True, external_data=False, verbose=False,
    )  # fmt: skip
    assert program is not None  # it is where nothing is written
    for node in program.model.graph.all_nodes():
        for about in (node, *node.outputs):
            about.metadata_props.clear()  # where on this machine the exporter's caller lies
    with replacing(path) as part:
        program.save(str(part), external_data=False)


def _exponential(phi: Activation, x: Tensor) -> Tensor:
    """An activation with exp(x) - 1 in it, exact near 0 as PyTorch's is: ONNX's Elu takes 1 from a rounded exp(x).

    The inputs of a pair of layers are scaled down to where little else is left of it.
    """
    width = float(dict(phi.parameters)["alpha"]) if phi.name == "celu" else 1.0  # alpha (exp(x / alpha) - 1)
    half = torch.tanh(x.clamp_max(0.0) / (2 * width))
    return phi.slope_pos * x.clamp_min(0.0) + phi.slope_neg * width * (2 * half / (1 - half))


class _Rows(nn.Module):
    """The channels that are the network's outputs."""

    rows: Tensor

    def __init__(self, rows: Tensor):
        super().__init__()
        self.register_buffer("rows", rows)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.rows]


class _Pool(nn.Module):
    def __init__(self, op: str, attributes: dict):
        super().__init__()
        self.op, self.attributes = op, attributes

    def forward(self, x: Tensor) -> Tensor:
        return operations.OPERATIONS[self.op]([x], self.attributes)


def _hold(modules: nn.ModuleDict, name: str, module: nn.Module) -> str:
    key = name.replace(".", "_")
    while key in modules:
        key += "_"
    modules[key] = module
    return key


def _module(ticket: Ticket, node: TicketNode) -> nn.Module:
    """The standard module of a node."""
    if node.op == "layer":
        return _pruned(ticket, ticket.layer(node.attributes["layer"]))
    if node.op == "activation":
        phi = from_attributes(node.attributes)
        return FAMILIES[phi.name].module(**dict(phi.parameters)) if phi.parameters else phi.module()
    if node.op in operations.POOLINGS:
        return _Pool(node.op, node.attributes)
    weight, bias = (ticket.given[f"{node.name}.{part}"] for part in ("weight", "bias"))
    if node.op == "given":
        module: nn.Module = nn.Linear(weight.shape[1], len(weight), device="meta")
        module.weight, module.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
        return module
    kind = nn.BatchNorm1d if _flat(ticket, node) else nn.BatchNorm2d
    module = kind(len(weight), eps=0.0)  # statistics of 0 and 1: what is left is scale and shift
    module.load_state_dict({"weight": weight, "bias": bias}, strict=False)
    return module


def _flat(ticket: Ticket, node: TicketNode) -> bool:
    """Whether a node's outputs are vectors, not images."""
    nodes = {other.name: other for other in ticket.graph}
    while node.op not in ("layer", "flatten", "given", "input"):
        node = nodes[node.inputs[0]]
    linear = node.op == "layer" and ticket.layer(node.attributes["layer"]).kind == "linear"
    return linear or node.op in ("flatten", "given")


def _pruned(ticket: Ticket, layer: SourceLayer) -> nn.Module:
    rows, inside = layer.shape[:2]
    bias = layer.name in ticket.bias_masks
    if layer.kind == "linear":
        module: nn.Module = nn.Linear(inside, rows, bias=bias, device="meta")  # initialisation would draw numbers
    else:
        how = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "bias": bias}
        module = nn.Conv2d(inside, rows, layer.shape[2:], **how, device="meta")  # type: ignore[arg-type]
    for part, (values, mask) in _parameters(ticket, layer).items():
        setattr(module, part, nn.Parameter(values, requires_grad=False))
        prune.custom_from_mask(module, part, mask)
    return module


def _parameters(ticket: Ticket, layer: SourceLayer) -> dict[str, tuple[Tensor, Tensor]]:
    """A layer's random parameters, kept or not, and their masks."""
    rows, size = layer.shape[0], layer.row_size
    some = torch.arange(rows).split(max(1, HELD // size))  # indices take more than values
    weight = torch.cat(
        [
            source.weights(layer, ticket.seed, part.repeat_interleave(size), torch.arange(size).repeat(len(part)))
            for part in some
        ]
    )
    mask = torch.zeros(rows * size)
    mask[ticket.masks[layer.name]] = 1.0
    found = {"weight": (weight.view(layer.shape), mask.view(layer.shape))}
    if layer.name in ticket.bias_masks:
        kept = torch.zeros(rows)
        kept[ticket.bias_masks[layer.name]] = 1.0
        found["bias"] = source.biases(layer, ticket.seed, torch.arange(rows)), kept
    return found
