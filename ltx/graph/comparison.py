"""Whether a graph computes what its network does: torch.fx does not see what forward does to real tensors alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ltx.errors import ConstructionError
from ltx.graph.nodes import Graph, run
from ltx.precision import CONVOLUTIONS, float32

log = logging.getLogger(__name__)
IMAGES = 8  # are enough: what was not seen changes every one
NOISY = 4  # of noise, where there are no images
SIDES = dict.fromkeys((16, 8, 28, 32, *range(1, 65), 96, 112, 128, 192, 224, 227, 256, 299))  # the usual first
TOLERANCE = 1e-3  # of an output's standard deviation over the images, beside
ROUNDING = 16  # times what float32 leaves of the graph's own outputs, and
UNIT = 2.0**-17  # of the largest output


@torch.no_grad()
def require_same_outputs(model: nn.Module, graph: Graph, images: Tensor | None) -> None:
    """Nothing where the two agree on `images` (n, C, H, W), or on noise where the model cannot take these.

    A warning where it does not take noise of any side that was tried either.

    Raises:
        ConstructionError: they do not agree, or the graph alone cannot take the images.
    """
    parameter = next(model.parameters(), torch.zeros(()))
    for shown in _shown(graph, images):
        try:
            with float32(CONVOLUTIONS):  # of a copy: its first operation may be in place
                theirs = model(shown.to(parameter.device, parameter.dtype, copy=True))
        except Exception:  # of the user's code: of any kind. Whoever needs the model to take them says so
            continue
        _require_same(type(model).__name__, theirs, graph, shown.to(parameter.device))
        return
    log.warning(
        "the network %s takes none of the images that were tried, so that what torch.fx has traced of it was not "
        "compared with it; give some to ltx.graph.trace(model, images)", type(model).__name__,
    )  # fmt: skip


def _shown(graph: Graph, images: Tensor | None) -> Iterator[Tensor]:
    """The images, then noise of the shapes that the graph takes."""
    if images is not None:
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
        off = _apart(theirs, single, exact)
    if off:
        raise ConstructionError(
            f"the network {name} returns {off}: let forward do the same whatever the type, values and size of its "
            "input, keep nothing from one call to the next, and take hooks on all modules away"
        )


def _apart(theirs: Tensor, single: Tensor, exact: Tensor) -> str:
    """How the outputs are apart, by more than float32 makes of them; empty where they are not."""
    finite = theirs.isfinite() & single.isfinite()
    if bool(single.isfinite().all()) and not bool(finite.all()):
        return "NaN or infinite numbers where what torch.fx has traced of it does not"
    if not bool(finite.any()):  # beyond float32, whichever way it is computed
        return ""
    apart, rounding, exact = (value.where(finite, 0.0) for value in (theirs.double() - exact, single - exact, exact))
    size, varies = float(exact.abs().max()), exact.std(0, correction=0)
    over = apart.abs() > TOLERANCE * varies + ROUNDING * float(rounding.abs().max()) + UNIT * size
    if not bool(over.any()):
        return ""
    worst = float((apart.abs() * over).max())
    return f"what is up to {worst:.3g} off what torch.fx has traced of it, of {size:.3g}"


def _output(graph: Graph, images: Tensor) -> Tensor:
    *_, (_, found) = run(graph, images)
    return found
