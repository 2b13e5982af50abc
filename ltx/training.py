"""Training a Synflow-pruned target: rounds of one pruning step and some epochs, resumable after every round."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ltx import synflow
from ltx.data import Split
from ltx.errors import CheckpointError
from ltx.evaluation import accuracy
from ltx.files import read_tensors, write_tensors
from ltx.memory import keep_freed_memory
from ltx.targets.masked import prunable


@dataclass(frozen=True)
class Protocol:
    """How a target is trained. Each round prunes one step of the schedule, then trains `epochs` epochs."""

    rounds: int = 12
    epochs: int = 50
    batch_size: int = 256
    learning_rate: float = 4e-3
    weight_decay: float = 1e-4
    scope: str = "local"
    bound: float | None = 0.99  # parameters are kept in [-bound, bound]: both theorems assume |theta| <= 1 - eps


@dataclass(frozen=True)
class Progress:
    """Where training stands; `accuracy` (%) on the test split, at the end of a round only."""

    round: int  # 1-based
    epoch: int  # 1-based, within the round
    loss: float  # mean training loss of the epoch
    accuracy: float | None


def fast_bf16(device: str) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def train(
    model: nn.Module,
    data: Split,
    test: Split,
    protocol: Protocol,
    density: Mapping[str, float] | float,
    *,
    seed: int,
    checkpoint: Path | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> float:
    """Train `model` in place and return its test accuracy in percent.

    The order of the images depends on (seed, round, epoch) alone and every round starts a fresh optimizer, so
    a run that resumes from `checkpoint` (written after every round) ends where an unbroken one ends.

    Args:
        density: final share kept of every prunable parameter (one number), or one per parameter name.
        checkpoint: safetensors file to resume from and to write; None keeps nothing.

    Raises:
        CheckpointError: `checkpoint` belongs to other settings.
    """
    device = str(data.images.device)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    settings = json.dumps(
        {"protocol": asdict(protocol), "density": density, "seed": seed, "shapes": shapes, "images": len(data)},
        sort_keys=True,
    )

    def keep(done: int) -> None:
        if checkpoint:
            write_tensors(checkpoint, model.state_dict(), {"round": str(done), "settings": settings})

    done = _resume(model, checkpoint, settings) if checkpoint else 0
    if not done:
        keep(0)  # a folder that cannot be written to shows before the first round, not after it
    shape = tuple(data.images.shape[1:])
    model.to(device)
    keep_freed_memory()
    for round_ in range(done + 1, protocol.rounds + 1):
        step = (
            {k: synflow.density_after(round_, protocol.rounds, d) for k, d in density.items()}
            if isinstance(density, Mapping)
            else synflow.density_after(round_, protocol.rounds, density)
        )
        synflow.prune(model, shape, step, scope=protocol.scope)
        _train_round(model, data, test, protocol, round_, seed, on_progress)
        keep(round_)
    return accuracy(model, test)


def _train_round(
    model: nn.Module, data: Split, test: Split, protocol: Protocol, round_: int, seed: int,
    on_progress: Callable[[Progress], None],
) -> None:  # fmt: skip
    device = str(data.images.device)
    steps = protocol.epochs * (len(data) // min(protocol.batch_size, len(data)))
    warm_up = 0.2 if steps != 5 else 0.3  # OneCycleLR divides by pct_start * total_steps - 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=protocol.learning_rate, weight_decay=protocol.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=protocol.learning_rate,
        total_steps=steps,
        pct_start=warm_up,
        anneal_strategy="linear",
    )
    bounded = [parameter.data for parameter, _ in prunable(model).values()]
    amp = torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=fast_bf16(device))
    for epoch in range(1, protocol.epochs + 1):
        model.train()
        total, count = torch.zeros((), device=device), 0
        for images, labels in _batches(data, protocol.batch_size, seed=(seed, round_, epoch)):
            with amp:
                logits = model(images.contiguous(memory_format=torch.channels_last))
            loss = nn.functional.cross_entropy(logits.float(), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            if protocol.bound is not None:
                for parameter in bounded:
                    parameter.clamp_(-protocol.bound, protocol.bound)
            total, count = total + loss.detach(), count + 1
        last = epoch == protocol.epochs
        on_progress(Progress(round_, epoch, float(total) / count, accuracy(model, test) if last else None))


def _batches(data: Split, size: int, *, seed: tuple[int, int, int]):
    """Whole batches of a shuffled split; the order is drawn on the CPU, so that it is the same on any device."""
    base, round_, epoch = seed
    generator = torch.Generator().manual_seed(((base << 12) + round_ << 16) + epoch)
    order: Tensor = torch.randperm(len(data), generator=generator).to(data.labels.device)
    size = min(size, len(data))
    for start in range(0, len(data) - size + 1, size):
        index = order[start : start + size]
        yield data.images[index], data.labels[index]


def _resume(model: nn.Module, checkpoint: Path, settings: str) -> int:
    """Load the checkpoint if there is one; the number of rounds that are done."""
    if not checkpoint.is_file():
        return 0
    from safetensors import SafetensorError

    try:
        state, metadata = read_tensors(checkpoint)
    except SafetensorError as error:
        raise CheckpointError(f"{checkpoint}: damaged ({error}); remove it to start again") from error
    if metadata.get("settings") != settings:
        raise CheckpointError(
            f"{checkpoint}: was written by a run with other settings; remove it to start again, "
            "or choose another output_dir"
        )
    model.load_state_dict(state)
    return int(metadata["round"])
