"""Which target the settings mean: a given checkpoint, one trained before, or one that is kept with the code."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from ltx import paths, targets, training
from ltx.config import Settings
from ltx.errors import CheckpointError, LtxError


def protocol_of(settings: Settings) -> training.Protocol:
    """The training protocol that the settings describe."""
    t = settings.target
    return training.Protocol(
        rounds=settings.protocol.rounds, epochs=settings.protocol.epochs, batch_size=t.batch_size,
        learning_rate=t.learning_rate, weight_decay=t.weight_decay, scope=t.scope.value, bound=t.bound,
    )  # fmt: skip


def find(settings: Settings) -> Path | None:
    """A trained target with these settings: one's own, else the reference's; None where there is none.

    Raises:
        LtxError: the folder holds a target that was trained with other settings.
    """
    own = paths.target_file(settings)
    if own.is_file():
        _require_same(settings, own)
        return own
    reference = paths.reference_target(settings)
    if settings.use_reference and settings.target.seed == 0 and reference.is_file():
        if targets.read_checkpoint(reference).metadata.get("protocol") == settings.protocol.name:
            return reference
    return None


def describe(path: Path) -> str:
    """One phrase on a target file: its protocol and accuracy."""
    metadata = targets.read_checkpoint(path).metadata
    rounds = json.loads(metadata.get("training", "{}"))
    return (
        f"{metadata.get('network')}, {metadata.get('activation')}, {rounds.get('rounds')} rounds of "
        f"{rounds.get('epochs')} epochs, {float(metadata.get('accuracy', 'nan')):.2f} %"
    )


def _require_same(settings: Settings, path: Path) -> None:
    was = json.loads(targets.read_checkpoint(path).metadata.get("training", "{}"))
    now = {**asdict(protocol_of(settings)), "density": settings.target.density}
    different = [f"{k} {was.get(k)}, now {v}" for k, v in now.items() if was.get(k) != v]
    if different:
        raise LtxError(
            f"{path} was trained with other settings ({'; '.join(different)}); "
            "choose another output_dir, or train again with force=true"
        )


def require(settings: Settings) -> Path:
    """The checkpoint to use: target.checkpoint, else `find`; LtxError saying how to train it when absent."""
    if settings.target.checkpoint:
        path = Path(settings.target.checkpoint).expanduser()
        activation = targets.read_checkpoint(path).metadata.get("activation", settings.activation.value)
        if activation != settings.activation.value:
            raise CheckpointError(
                f"checkpoint {path}: was trained with {activation}, not {settings.activation.value}; "
                f"say activation={activation}"
            )
        return path
    found = find(settings)
    if found is None:
        raise LtxError(
            f"no target at {paths.target_file(settings)}; train it with: ltx train-target "
            f"target={settings.target.name} activation={settings.activation.value} "
            f"protocol={settings.protocol.name}"
        )
    return found
