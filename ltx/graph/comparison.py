"""Whether a graph computes what its network does: torch.fx does not see what forward does to real tensors alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from ltx.errors import ConstructionError
from ltx.graph.nodes import BatchNorm, Graph, run
from ltx.precision import exact_convolutions

log = logging.getLogger(__name__)
IMAGES = 8  # are enough: what was not seen changes every one
NOISY = 4  # of noise, where there are no images
SIDES = dict.fromkeys((16, 8, 28, 32, *range(1, 65), 84, 96, 112, 128, 192, 224, 227, 256, 299))  # the usual first
TOLERANCE = 1e-3  # of an output's standard deviation over the images, beside
ROUNDING = 16  # times what float32 leaves of the graph's own outputs, and
UNIT = 2.0**-17  # of the largest output
NORM = 2.0**-22  # how far scale and shift of batch norm may be rounded, relatively


@torch.no_grad()
def require_same_outputs(model: nn.Module, graph: Graph, images: Tensor | None) -> None:
    """Nothing where the two agree on `images` (n, C, H, W), or on noise where the model cannot take these.

    A warning where it does not take noise of any side that was tried either.

    Raises:
        ConstructionError: they do not agree, or the graph alone cannot take the images.
    """
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    for shown in _shown(graph, images):
        try:
            with exact_convolutions:  # of a copy: its first operation may be in place
                theirs = model(shown.to(parameter.device, parameter.dtype, copy=True))
        except Exception:  # of the user's code: of any kind. Whoever needs the model to take them says so
            continue
        theirs = theirs.cpu() if isinstance(theirs, Tensor) else theirs
        _require_same(type(model).__name__, theirs, graph, shown.cpu())  # not every device has float64
        return
    log.warning(
        "the network %s takes none of the images that were tried, so that what torch.fx has traced of it was not "
        "compared with it; give some to ltx.graph.trace(model, images)", type(model).__name__,
    )  # fmt: skip


def _shown(graph: Graph, images: Tensor | None) -> Iterator[Tensor]:
    """The images, then noise of the shapes that the graph takes."""
    if images is not None and images.layout == torch.strided and images.ndim and len(images) and not images.is_meta:
        yield images[:IMAGES].detach()
    for side in SIDES:
        for channels in _channels(graph):
            noise = torch.randn(NOISY, channels, side, side, generator=torch.Generator().manual_seed(side))
            try:
                _output(graph, noise[:1])
            except (RuntimeError, ValueError, IndexError):
                continue
            yield noise


def _channels(graph: Graph) -> tuple[int, ...]:
    """How many an image may have: what its first convolution or batch norm says, where there is one."""
    image = {"input"}
    for node in graph.nodes:
        if not image.isdisjoint(node.inputs):
            if node.layer is not None and node.layer.kind == "conv":
                return (node.layer.weight.shape[1],)
            if node.batch_norm is not None:
                return (len(node.batch_norm.scale),)
            if node.layer is None:
                image.add(node.name)
    return 1, 3


def _require_same(name: str, theirs: object, graph: Graph, images: Tensor) -> None:
    try:
        single, exact = (_output(graph, images.to(dtype)) for dtype in (torch.float32, torch.float64))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConstructionError(
            f"the network {name} takes images {tuple(images.shape[1:])}, but not what torch.fx has traced of it "
            f"({reason}); let nothing in forward depend on the size of the image"
        ) from error
    if not isinstance(theirs, Tensor):
        off = f"a {type(theirs).__name__}, and what torch.fx has traced of it a tensor"
    elif theirs.shape != exact.shape:
        off = f"{tuple(theirs.shape[1:])} for an image, and what torch.fx has traced of it {tuple(exact.shape[1:])}"
    else:
        off = _apart(theirs, exact, (single,))
        if off and graph.normalised:  # what is said of dead channels' batch norm is rounded to float32, and amplified
            off = _apart(theirs, exact, (single, *(_output(other, images.double()) for other in _rounded(graph))))
    if off:
        raise ConstructionError(
            f"the network {name} returns {off}: let forward do the same whatever the type, values and size of its "
            "input, keep nothing from one call to the next, and take hooks on all modules away"
        )


def _apart(theirs: Tensor, exact: Tensor, rounded: tuple[Tensor, ...]) -> str:
    """How the outputs are apart, by more than is made of them by rounding; empty where they are not."""
    single = rounded[0]
    finite = theirs.isfinite() & single.isfinite()
    if bool(single.isfinite().all()) and not bool(finite.all()):
        return "NaN or infinite numbers where what torch.fx has traced of it does not"
    if not bool(finite.any()):  # beyond float32, whichever way it is computed
        return ""
    rounding = max(float((other - exact).where(finite, 0.0).abs().max()) for other in rounded)
    apart, exact = ((theirs.double() - exact).where(finite, 0.0), exact.where(finite, 0.0))
    size, varies = float(exact.abs().max()), exact.std(0, correction=0)
    over = apart.abs() > TOLERANCE * varies + ROUNDING * rounding + UNIT * size
    if not bool(over.any()):
        return ""
    worst = float((apart.abs() * over).max())
    return f"what is up to {worst:.3g} off what torch.fx has traced of it, of {size:.3g}"


def _rounded(graph: Graph) -> Iterator[Graph]:
    """The graph with the scales, or the shifts, of batch norm off by as much as float32 may have rounded them.

    One of the two at a time: a channel that hardly varies has a mean that its shift takes away again.
    """
    generator = torch.Generator().manual_seed(0)

    def off(value: Tensor, by: float) -> Tensor:
        sign = torch.randint(2, value.shape, generator=generator, dtype=torch.float64) * 2 - 1
        return value.double() * (1 + by * sign)

    for scale, shift in ((NORM, 0.0), (0.0, NORM)) * 2:
        yield Graph(
            tuple(
                node if node.batch_norm is None
                else replace(
                    node, batch_norm=BatchNorm(off(node.batch_norm.scale, scale), off(node.batch_norm.shift, shift))
                )
                for node in graph.nodes
            )
        )  # fmt: skip


def _output(graph: Graph, images: Tensor) -> Tensor:
    *_, (_, found) = run(graph, images)
    return found
