"""Which target the settings, or a ticket, mean: a given checkpoint, a trained one, or one kept with the code."""

from __future__ import annotations

import functools
import json
import logging
import shlex
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

import torch
from torch import nn

from ltx import data, paths, targets, training
from ltx.config import Settings
from ltx.errors import CheckpointError, LtxError
from ltx.evaluation import outputs
from ltx.graph import Graph, trace
from ltx.help import SETTINGS, override
from ltx.tasks import given
from ltx.ticket import Ticket

log = logging.getLogger(__name__)
_KNOWN = {key for key, *_ in SETTINGS}
_TRAINED_WITH = [key for key, *_, commands in SETTINGS if "train-target" in commands and key != "force"]
GIVE_IT = "give it with target.checkpoint=FILE, one of your own with target.module=PACKAGE.MODULE:FACTORY as well"


@dataclass(frozen=True)
class Target:
    """A target that was read from a file."""

    path: Path
    model: nn.Module
    graph: Graph
    digest: str
    network: str
    activation: str
    data: str
    input_range: tuple[float, float]  # of an input element


def protocol_of(settings: Settings) -> training.Protocol:
    """The training protocol that the settings describe."""
    t = settings.target
    return training.Protocol(
        rounds=settings.protocol.rounds, epochs=settings.protocol.epochs, batch_size=t.batch_size,
        learning_rate=t.learning_rate, weight_decay=t.weight_decay, scope=t.scope.value, bound=t.bound,
        crop=t.crop, flip=t.flip,
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
    if settings.use_reference and settings.target.seed == 0 and reference.is_file() and _serves(settings, reference):
        return reference
    return None


def _serves(settings: Settings, reference: Path) -> bool:
    """Whether a kept target was trained by the protocol of the settings, for at least as many epochs."""
    said = _account(reference)
    different = _differences(settings, said)
    longer = said.training.get("epochs", 0) >= settings.protocol.epochs
    return said.metadata.get("protocol") == settings.protocol.name and different.keys() <= {"epochs"} and longer


@dataclass(frozen=True)
class _Account:
    """What a target file says of its training."""

    metadata: dict[str, str]
    training: dict  # its settings
    accuracy: float  # in percent


def _account(path: Path) -> _Account:
    metadata = targets.read_checkpoint(path).metadata
    try:
        found = json.loads(metadata.get("training", "{}"))
        accuracy = float(metadata.get("accuracy", "nan"))
    except ValueError:
        found, accuracy = None, float("nan")
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: what it says of its training is damaged; train again with force=true")
    return _Account(metadata, found, accuracy)


def describe(path: Path) -> str:
    """One phrase on a target file: its protocol and accuracy."""
    said = _account(path)
    return (
        f"{said.metadata.get('network')}, {said.metadata.get('activation')}, {said.training.get('rounds')} rounds of "
        f"{said.training.get('epochs')} epochs, {said.accuracy:.2f} %"
    )


def training_of(path: Path) -> str | None:
    """How a target was trained, in a few words; None where its file does not say."""
    said = _account(path) if path.is_file() else None
    if said is None or not said.training:
        return None
    return f"{said.metadata.get('protocol')}, {said.training['rounds']} x {said.training['epochs']} epochs"


def _require_same(settings: Settings, path: Path) -> None:
    different = _differences(settings, _account(path))
    if different:
        raise CheckpointError(
            f"{path} was trained with other settings ({'; '.join(different.values())}); "
            "choose another output_dir, or train again with force=true"
        )


def _differences(settings: Settings, said: _Account) -> dict[str, str]:
    """Training settings in which a target file differs from the settings, each with a phrase."""
    about = {"network": settings.target.network, "data": settings.data.name, "seed": str(settings.target.seed)}
    now = {**asdict(protocol_of(settings)), "density": settings.density, **about}
    was = asdict(training.Protocol()) | said.training | said.metadata  # a file older than a setting has its default
    return {k: f"{k} {was.get(k)}, now {v}" for k, v in now.items() if was.get(k) != v}


def load(settings: Settings) -> Target:
    """The target of the settings: target.checkpoint, else `find`.

    Raises:
        LtxError: it is not there, which says how to train it, or has no batch norm that could be folded.
    """
    target = _named(settings)
    if settings.batch_norm.value == "fold" and not target.graph.normalised:
        raise LtxError(f"batch_norm=fold has no meaning: {target.network} has no batch norm; leave it out")
    return target


def _named(settings: Settings) -> Target:
    if settings.target.module:
        return _own(settings, settings.target.module)
    if settings.target.checkpoint:
        target = _read(Path(settings.target.checkpoint).expanduser(), settings)
        if target.network != settings.target.network:
            raise CheckpointError(
                f"checkpoint {target.path}: is a {target.network} for {target.data}, "
                f"target={settings.target.name} is a {settings.target.network}; choose the target= it was made for, "
                "or say target.module= for a network of your own"
            )
        if target.data != settings.data.name:
            raise CheckpointError(f"checkpoint {target.path}: is for {target.data}, data={settings.data.name}; say "
                                  f"data={target.data}")  # fmt: skip
        return target
    found = find(settings)
    if found is None:
        raise LtxError(f"no target at {paths.target_file(settings)}; train it with: {_command(settings)}")
    return _read(found, settings)


def _command(settings: Settings) -> str:
    """What trains the target that `paths.target_file` names, where the command looks for it."""
    chosen = {"target": settings.target.name, "protocol": settings.protocol.name} | given.choices()
    said = {"target": chosen["target"], "activation": settings.activation.value, "protocol": chosen["protocol"]}
    words = [override(*pair) for pair in said.items()]
    usual, keys = given.usual(*words), [key for key in _TRAINED_WITH if key not in said]
    if usual is not None:
        words += [override(key, _value(settings, key)) for key in keys if _value(settings, key) != _value(usual, key)]
    words += [
        text for key, text in given.overrides().items()
        if (usual is None and key in keys) or (key.startswith(("target.", "protocol.")) and key not in _KNOWN)
    ]  # fmt: skip
    return " ".join(["ltx train-target", *map(_for_a_shell, [*words, *given.folders()])])


def _value(settings: Settings, key: str) -> str:
    """The value of one of _TRAINED_WITH, as it is written on the command line."""
    value = functools.reduce(getattr, key.split("."), settings)
    value = getattr(value, "value" if isinstance(value, Enum) else "name", value)  # of an enum, of the group data
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _for_a_shell(argument: str) -> str:
    """An argument that may hold single quotes."""
    plain = not set('"$`\\!').intersection(argument)
    return f'"{argument}"' if "'" in argument and plain else shlex.quote(argument)


def load_for(ticket: Ticket, settings: Settings) -> Target | None:
    """The target that a ticket was made for: target.checkpoint, else any known target with its SHA-256.

    Raises:
        LtxError: target.checkpoint is another target than the ticket's.
    """
    if settings.target.module or settings.target.checkpoint:
        target = (
            _own(settings, settings.target.module) if settings.target.module
            else _read(Path(str(settings.target.checkpoint)).expanduser(), settings, ticket.activation)
        )  # fmt: skip
        if target.digest != ticket.target_sha256:
            raise LtxError(
                f"target {target.path}: has SHA-256 {target.digest[:12]}..., the ticket was made for "
                f"{ticket.target_sha256[:12]}...; give the target it was made for"
            )
        return target
    trained = sorted((Path(settings.output_dir) / "targets").glob("*/target.safetensors"))
    kept = sorted((paths.reference_dir() / "targets").glob("*.safetensors"))
    for path in trained + kept:
        try:
            target = _read(path, settings, ticket.activation)
        except LtxError:
            continue  # damaged, or of another activation: not the one
        if target.digest == ticket.target_sha256:
            return target
    return None


def require_images(target: Target) -> None:
    """Try a network of the user's own on an image of its data.

    Raises:
        LtxError: it cannot take them, with its own reason, or its outputs are no vectors of classes.
    """
    shape = data.dataset_spec(target.data).shape
    image = torch.zeros(1, *shape)
    try:
        found = outputs(target.model, image.to(next(target.model.parameters(), image).device))
    except Exception as error:  # of the user's code: of any kind
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise LtxError(
            f"target.module={target.network}: cannot take images of {target.data}, {shape} ({reason}); "
            "target=mnist, digits or resnet22 (CIFAR-10) says which images to use"
        ) from error
    if found.ndim != 2:
        raise LtxError(
            f"target.module={target.network}: its output for an image is {tuple(found.shape[1:])}, not a vector of "
            "classes; construct, verify and export take it, eval and certify need nn.Flatten() behind it"
        )


def unfit_range(ticket: Ticket, target: Target) -> str | None:
    """What is wrong where the target's data has inputs outside the range that the ticket was made for."""
    lo, hi = target.input_range
    if ticket.input_low <= lo and hi <= ticket.input_high:
        return None
    return f"inputs: made for [{ticket.input_low:g}, {ticket.input_high:g}], {target.data} has [{lo:g}, {hi:g}]"


def require_comparable(path: Path, ticket: Ticket, target: Target | None) -> Target:
    """The target, beside which the ticket can run on its data.

    Raises:
        LtxError: it is not known, its network does not take its data, or they have inputs outside the range that the
            ticket was made for.
    """
    if target is None:
        raise LtxError(
            f"ticket {path}: its target (SHA-256 {ticket.target_sha256[:12]}...) is not known here; {GIVE_IT}"
        )
    require_images(target)
    if wrong := unfit_range(ticket, target):
        raise LtxError(
            f"ticket {path} is not valid: {wrong}; construct one for these inputs, or say target.input_range="
            f"[{ticket.input_low!r},{ticket.input_high!r}] where they are those of your data"
        )
    return target


def _own(settings: Settings, name: str) -> Target:
    """The network of target.module, with target.checkpoint's parameters where one is given."""
    model, path = targets.imported(name), Path(name)
    if settings.target.checkpoint:
        path = Path(settings.target.checkpoint).expanduser()
        model = targets.load_own(model, targets.read_checkpoint(path), name=name)
    else:
        log.info("target.module=%s without target.checkpoint: its parameters are what the factory gives", name)
    low, high = _input_range(settings, settings.data.name)
    shape = data.dataset_spec(settings.data.name).shape
    images = low + (high - low) * torch.rand(8, *shape, generator=torch.Generator().manual_seed(0))
    graph = trace(model, images)
    if any(parameter.dtype == torch.float64 for parameter in model.parameters()):
        log.info("target.module=%s: its float64 parameters are rounded to float32", name)
        model = model.float()
    if "activation" in given.overrides() and settings.activation.value != graph.functions:
        raise LtxError(
            f"activation={settings.activation.value} has no meaning for target.module={name}, which has "
            f"{graph.functions or 'none'}; leave it out"
        )
    return Target(
        path, model, graph, graph.digest(), name, graph.functions, settings.data.name, (low, high),
    )  # fmt: skip


def _input_range(settings: Settings, name: str) -> tuple[float, float]:
    """What an input element can be: as the settings say, else that of the data."""
    own = settings.target.input_range
    return data.dataset_spec(name).input_range if own is None else (own[0], own[1])


def _read(path: Path, settings: Settings, activation: str | None = None) -> Target:
    """Read a target file; what it does not say of itself is taken from the settings."""
    checkpoint = targets.read_checkpoint(path)
    said = checkpoint.metadata
    wanted = activation or settings.activation.value
    if said.get("activation", wanted) != wanted:
        raise CheckpointError(
            f"checkpoint {path}: was trained with {said['activation']}, not {wanted}; "
            f"say activation={said['activation']}"
        )
    network, name = said.get("network", settings.target.network), said.get("data", settings.data.name)
    spec = data.dataset_spec(name)
    model = targets.build(network, wanted, shape=spec.shape, classes=spec.classes)
    targets.load_into(model, checkpoint, network=network)
    if "activation" not in said:
        log.info("%s does not say its activation: taken for %s", path, wanted)
    graph = trace(model)
    return Target(path, model, graph, graph.digest(), network, wanted, name, _input_range(settings, name))
