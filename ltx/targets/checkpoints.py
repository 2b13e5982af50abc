"""Target checkpoints in and out, with Synaptic-Flow's keys: `x.weight` and its buffer `x.weight_mask`.

A target file is safetensors with dense tensors; `pack` writes the same target sparsely (`x.weight.values`,
`x.weight.indices`), which is what is kept in the repository. Synaptic-Flow's own `.pt` files are read as data
(`weights_only=True`).
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor, nn

from ltx.errors import CheckpointError
from ltx.files import read_tensors, write_tensors

FORMAT = "ltx-target/1"


@dataclass(frozen=True)
class Checkpoint:
    """A target as it was read: the dense state and what the file says of itself."""

    path: Path
    state: dict[str, Tensor]
    metadata: dict[str, str]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a `.safetensors` target (dense or packed) or a Synaptic-Flow `.pt`, also where a `.pt` holds more than it.

    Raises:
        CheckpointError: missing, unreadable, truncated, not a state dict, or with NaN or infinite entries.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"checkpoint {path}: is a folder; name the file in it, target.safetensors")
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            state, metadata = _read_safetensors(path)
        else:
            state, metadata = torch.load(path, map_location="cpu", weights_only=True), {}
    except CheckpointError:
        raise
    except (
        OSError,
        ValueError,
        RuntimeError,
        EOFError,
        KeyError,
        IndexError,
        pickle.UnpicklingError,
    ) as error:
        reason = (str(error).splitlines() or [""])[0]
        reason = reason if " " in reason else f"{type(error).__name__} {reason}".strip()
        if isinstance(error, pickle.UnpicklingError):  # PyTorch's advice is to give up weights_only
            reason = "no file of tensors alone, as model.state_dict() is saved"
        raise CheckpointError(f"checkpoint {path}: cannot be read ({reason}); is it whole?") from error
    except Exception as error:  # safetensors raises a bare class of its own
        raise CheckpointError(f"checkpoint {path}: cannot be read ({error}); is it whole?") from error
    state = _unwrapped(path, state)
    if not _is_state(state):
        raise CheckpointError(
            f"checkpoint {path}: not a state dict of tensors; save model.state_dict(), or use ltx train-target"
        )
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"checkpoint {path}: '{name}' has NaN or infinite entries")
    return Checkpoint(path, dict(state), metadata)


def _is_state(found: object) -> TypeGuard[Mapping[str, Tensor]]:
    return isinstance(found, Mapping) and all(isinstance(value, Tensor) for value in found.values())


def _unwrapped(path: Path, found: object) -> object:
    """The one state dict in what training loops save beside epoch and optimizer; else what there is."""
    if not isinstance(found, Mapping) or _is_state(found):
        return found
    inner = {key: found.get(key) for key in ("state_dict", "model_state_dict", "model")}
    named = [key for key, value in inner.items() if value and _is_state(value)]
    if len(named) > 1:
        raise CheckpointError(
            f"checkpoint {path}: holds several state dicts, {' and '.join(named)}; save the one alone"
        )
    return inner[named[0]] if named else found


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors, metadata = read_tensors(path)
    if "shapes" not in metadata:
        return tensors, metadata
    state = {}
    for name, shape in json.loads(metadata["shapes"]).items():
        values, indices = tensors.pop(f"{name}.values"), tensors.pop(f"{name}.indices").long()
        flat = torch.zeros(shape).flatten()
        if len(values) != len(indices) or (len(indices) and not 0 <= indices.min() <= indices.max() < len(flat)):
            raise CheckpointError(f"checkpoint {path}: '{name}' has indices that do not fit its shape {shape}")
        mask = torch.zeros_like(flat)
        flat[indices], mask[indices] = values, 1.0
        state[name], state[f"{name}_mask"] = flat.view(*shape), mask.view(*shape)
    return {**state, **tensors}, metadata


def load_into(model: nn.Module, checkpoint: Checkpoint, *, network: str) -> nn.Module:
    """Load a checkpoint into a freshly built network of the same layout; returns the network in eval mode.

    Raises:
        CheckpointError: keys or shapes are not the network's, or a mask has entries other than 0 and 1.
    """
    expected = model.state_dict()
    state = _without_ones(checkpoint.state, expected)
    require_layout(
        checkpoint.path,
        state,
        expected,
        network=network,
        instead="choose the target= it was made for, or say target.module= for a network of your own",
    )
    for name in expected:
        if name.endswith("_mask") and not ((state[name] == 0) | (state[name] == 1)).all():
            raise CheckpointError(f"checkpoint {checkpoint.path}: mask '{name}' has entries other than 0 and 1")
    model.load_state_dict(state)
    return model.eval()


def require_layout(
    path: Path, state: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, network: str, instead: str
) -> None:
    """CheckpointError where keys or shapes of a checkpoint are not a network's; `instead`: what to do about it."""
    missing = [name for name in expected if name not in state]
    extra = [name for name in state if name not in expected]
    if missing or extra:
        sample = ", ".join([f"no '{n}'" for n in missing[:2]] + [f"unexpected '{n}'" for n in extra[:2]])
        raise CheckpointError(
            f"checkpoint {path}: not a {network} ({sample}; {len(missing)} keys missing, {len(extra)} unexpected); "
            f"{instead}"
        )
    for name, tensor in expected.items():
        if tensor.shape != state[name].shape:
            raise CheckpointError(
                f"checkpoint {path}: '{name}' has shape {tuple(state[name].shape)}, {network} needs "
                f"{tuple(tensor.shape)}; {instead}"
            )


def _without_ones(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what Synaptic-Flow writes and what does nothing: masks of batch norm and identity shortcuts, all ones."""

    def idle(name: str, tensor: Tensor) -> bool:
        parameter = name.removesuffix("_mask")
        mask = name != parameter and parameter in expected
        identity = parameter.endswith("shortcut.weight") and tensor.shape[1:] == (1, 1)
        return name not in expected and (mask or identity) and bool((tensor == 1).all())

    return {name: tensor for name, tensor in state.items() if not idle(name, tensor)}


def save_target(path: Path, model: nn.Module, metadata: Mapping[str, str]) -> None:
    """Write a target densely, masked parameters as 0, so that any reader of Synaptic-Flow's keys can use it."""
    write_tensors(path, _masked_state(model.state_dict()), {"format": FORMAT, **metadata})


def pack(path: Path, checkpoint: Checkpoint) -> None:
    """Write a target sparsely: of every masked parameter only the kept values and their flat indices."""
    tensors, shapes = {}, {}
    for name, tensor in _masked_state(checkpoint.state).items():
        mask = checkpoint.state.get(f"{name}_mask")
        if mask is not None:
            indices = mask.flatten().nonzero().flatten()
            tensors[f"{name}.indices"], tensors[f"{name}.values"] = indices.int(), tensor.flatten()[indices]
            shapes[name] = list(tensor.shape)
        elif not name.endswith("_mask"):
            tensors[name] = tensor
    write_tensors(path, tensors, {**checkpoint.metadata, "format": FORMAT, "shapes": json.dumps(shapes)})


def _masked_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t * state[f"{n}_mask"] if f"{n}_mask" in state else t for n, t in state.items()}
