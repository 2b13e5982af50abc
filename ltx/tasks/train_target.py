"""`ltx train-target`: rounds of Synflow pruning and training; resumes, and does nothing when it is done."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from tqdm import tqdm

from ltx import data, paths, targets, training
from ltx.config import Settings
from ltx.errors import LtxError
from ltx.files import read_tensors, require_writable
from ltx.tasks import provenance, targets_at

log = logging.getLogger(__name__)
CHECKPOINT = "round.safetensors"


def run(settings: Settings) -> Path:
    """Train the target that the settings describe; the path of its file."""
    if settings.target.checkpoint:
        raise LtxError("train-target: target.checkpoint names a given target; there is nothing to train")
    if settings.target.module:
        raise LtxError(
            "train-target: target.module names a network of your own; train it yourself and give its parameters "
            "with target.checkpoint"
        )
    if settings.seed:
        raise LtxError("train-target: seed is the source network's; the training's is target.seed")
    path = paths.target_file(settings)
    if not settings.force and not _cut_off(settings, path):
        found = targets_at.find(settings)
        if found is not None:
            log.info("%s: there already (%s); force=true trains again", found, targets_at.describe(found))
            return found
    return _train(settings, path)


def _cut_off(settings: Settings, path: Path) -> bool:
    """Whether training with these settings, which was to take the place of another target, was cut off."""
    checkpoint = path.with_name(CHECKPOINT)
    if not (path.is_file() and checkpoint.is_file()):
        return False
    try:
        said = json.loads(read_tensors(checkpoint)[1]["settings"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return False
    now = {"protocol": asdict(targets_at.protocol_of(settings)), "density": settings.density,
           "seed": settings.target.seed, "compiled": settings.compile}  # fmt: skip
    return now.items() <= said.items()


def _train(settings: Settings, path: Path) -> Path:
    device = settings.torch_device
    protocol = targets_at.protocol_of(settings)
    train_split = data.load(settings.data.name, train=True, root=settings.data_root, device=device)
    test_split = data.load(settings.data.name, train=False, root=settings.data_root, device=device)
    spec = data.dataset_spec(settings.data.name)
    model = targets.build(
        settings.target.network, settings.activation.value, shape=spec.shape, classes=spec.classes,
        seed=settings.target.seed,
    )  # fmt: skip
    require_writable(path.parent)
    checkpoint = path.with_name(CHECKPOINT)
    if settings.force:
        checkpoint.unlink(missing_ok=True)
    log.info(
        "%s, %s on %s: %d rounds of %d epochs%s",
        settings.target.network, settings.activation.value, device, protocol.rounds, protocol.epochs,
        f", going on from {checkpoint}" if checkpoint.is_file() else "",
    )  # fmt: skip
    with tqdm(total=protocol.rounds * protocol.epochs, unit="epoch", disable=None) as bar:
        latest = ""

        def show(p: training.Progress) -> None:
            nonlocal latest
            done = (p.round - 1) * protocol.epochs + p.epoch
            if bar.n == 0:
                bar.initial = done - 1  # of a run that goes on: the time left is reckoned from here
            if p.accuracy is not None:
                latest = f" accuracy {p.accuracy:.2f} %"
            bar.n = done
            where = f"round {p.round}/{protocol.rounds} epoch {p.epoch}/{protocol.epochs}"
            bar.set_postfix_str(f"{where} loss {p.loss:.4f}{latest}")
            if p.accuracy is not None:
                log.info(
                    "round %d/%d: loss %.4f, test accuracy %.2f %%",
                    p.round,
                    protocol.rounds,
                    p.loss,
                    p.accuracy,
                )

        accuracy = training.train(
            model, train_split, test_split, protocol, settings.density,
            seed=settings.target.seed, checkpoint=checkpoint, compiled=settings.compile, on_progress=show,
        )  # fmt: skip
    kept_of = {name: int(mask.sum()) for name, (_, mask) in targets.prunable(model).items()}
    kept = sum(kept_of.values())
    if empty := [name for name, many in kept_of.items() if name.endswith("weight") and many == 0]:
        log.warning("no parameter is left of %s; a larger target.density keeps some", ", ".join(empty))
    targets.save_target(
        path,
        model,
        {
            "network": settings.target.network, "activation": settings.activation.value,
            "data": settings.data.name, "accuracy": f"{accuracy:.4f}", "protocol": settings.protocol.name,
            "seed": str(settings.target.seed), "kept_parameters": str(kept),
            "training": json.dumps({**asdict(protocol), "density": settings.density}, sort_keys=True),
            "made_by": json.dumps(provenance.here(), sort_keys=True),
        },
    )  # fmt: skip
    checkpoint.unlink(missing_ok=True)
    log.info("test accuracy %.2f %%, %d parameters kept", accuracy, kept)
    return path
