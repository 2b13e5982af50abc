"""Networks of the user's own: a factory that is imported by name, and a checkpoint of it."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys

from torch import nn

from ltx.defaults import kept_defaults
from ltx.errors import CheckpointError, LtxError
from ltx.targets.checkpoints import Checkpoint, require_layout


def imported(name: str) -> nn.Module:
    """What the factory PACKAGE.MODULE:FACTORY makes without arguments, in eval mode; modules of the folder count.

    Raises:
        LtxError: there is no such module or factory, it fails, or what it makes is no network.
    """
    module, colon, factory = name.partition(":")
    if not (colon and module and factory):
        raise LtxError(f"target.module={name}: must be PACKAGE.MODULE:FACTORY, e.g. torchvision.models:resnet18")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        with kept_defaults(), contextlib.redirect_stdout(sys.stderr):  # stdout belongs to the artefact's path
            make = importlib.import_module(module)
            for part in factory.split("."):
                make = getattr(make, part)
            made = make()  # type: ignore[operator]
            if isinstance(made, nn.Module):
                made.eval()  # which may be the user's own, and return nothing
    except (Exception, SystemExit) as error:  # of the user's code: of any kind
        reason = (str(error).splitlines() or [""])[0]
        raise LtxError(f"target.module={name}: {type(error).__name__}: {reason}") from error
    if not isinstance(made, nn.Module):
        raise LtxError(f"target.module={name}: makes a {type(made).__name__}, not a torch.nn.Module")
    return made


def load_own(model: nn.Module, checkpoint: Checkpoint, *, name: str) -> nn.Module:
    """Load a state dict with the network's keys, masked in any of three ways, into it.

    Masks are buffers of the network that its layers apply, or the file's: `x.weight_mask` beside `x.weight`
    (Synaptic-Flow) or beside `x.weight_orig` (torch.nn.utils.prune); their products are loaded where the network has no
    such buffers. Plain zeros need no mask.

    Raises:
        CheckpointError: keys or shapes are not the network's.
    """
    expected = model.state_dict()
    state = checkpoint.state
    if not any(key.removesuffix("_orig").removesuffix("_mask") in expected for key in state):
        state = {key.removeprefix("module."): tensor for key, tensor in state.items()}  # of DataParallel
    state = dict(state)
    for key in [key for key in state if key.endswith("_mask") and key not in expected]:
        parameter, mask = key.removesuffix("_mask"), state.pop(key)
        dense = state.pop(f"{parameter}_orig", state.get(parameter))
        if dense is None or dense.shape != mask.shape:
            raise CheckpointError(f"checkpoint {checkpoint.path}: mask '{key}' has no parameter of its shape")
        state[parameter] = dense * mask
    instead = "give a state_dict of the network that target.module makes"
    require_layout(checkpoint.path, state, expected, network=name, instead=instead)
    model.load_state_dict(state)
    model.eval()
    return model
