"""Whether a graph computes what its network does: torch.fx does not see what forward does to real tensors alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ltx.errors import ConstructionError
from ltx.graph.nodes import Graph, run
from ltx.precision import CONVOLUTIONS, float32

IMAGES = 8  # are enough: what was not seen changes every one
TOLERANCE = 1e-3  # of the largest output, beside
ROUNDING = 16  # times what float32 leaves of the graph's own outputs


@torch.no_grad()
def require_same_outputs(model: nn.Module, graph: Graph, images: Tensor) -> None:
    """Nothing where the two agree on `images` (n, C, H, W), or the model cannot take these.

    Raises:
        ConstructionError: they do not, or the graph alone cannot take the images.
    """
    name = type(model).__name__
    parameter = next(model.parameters(), images)
    images = images[:IMAGES].detach().to(parameter.device)
    try:
        with float32(CONVOLUTIONS):
            theirs = model(images.to(parameter.dtype))
    except Exception:  # of the user's code: of any kind. Whoever needs the model to take them says so
        return
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
    elif exact.numel() and bool(theirs.isfinite().all() and exact.isfinite().all() and single.isfinite().all()):
        apart, rounding = (float((other.double() - exact).abs().max()) for other in (theirs, single))
        size = float(exact.abs().max())
        if apart <= TOLERANCE * size + ROUNDING * rounding:
            return
        off = f"what is up to {apart:.3g} off what torch.fx has traced of it, of {size:.3g}"
    else:
        return
    raise ConstructionError(
        f"the network {name} returns {off}: let forward do the same whatever the type, values and size of its input, "
        "and keep nothing from one call to the next"
    )


def _output(graph: Graph, images: Tensor) -> Tensor:
    *_, (_, found) = run(graph, images)
    return found
