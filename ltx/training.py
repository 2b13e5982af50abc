"""Training a Synflow-pruned target: rounds of one pruning step and some epochs, resumable after every epoch."""

from __future__ import annotations

import contextlib
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.backends import cudnn

from ltx import synflow
from ltx.data import Split
from ltx.defaults import usual_defaults
from ltx.errors import CheckpointError, LtxError
from ltx.evaluation import accuracy
from ltx.files import read_tensors, write_tensors
from ltx.memory import keep_freed_memory
from ltx.onednn import TanhByOneDnn
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
    crop: int = 0  # images are shifted by up to so many pixels in either direction, at random
    flip: bool = False  # and mirrored, every other one


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


SAVE_EVERY = 20.0  # seconds; a checkpoint is written at the end of the first epoch behind them


@usual_defaults()
def train(
    model: nn.Module,
    data: Split,
    test: Split,
    protocol: Protocol,
    density: Mapping[str, float] | float,
    *,
    seed: int,
    checkpoint: Path | None = None,
    compiled: bool = False,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> float:
    """Train `model` in place and return its test accuracy in percent.

    What happens in an epoch depends on (seed, round, epoch) alone, in a model without dropout, and every round starts
    a fresh optimizer, so a run that resumes from `checkpoint` (written after every round, and after an epoch where the
    last one is older than SAVE_EVERY) ends where an unbroken one ends.

    Args:
        density: final share kept of every prunable parameter (one number), or one per parameter name.
        checkpoint: safetensors file to resume from and to write; None keeps nothing.
        compiled: train through torch.compile: faster steps after a minute of compilation, other roundings.

    On a GPU a step (one batch: its images, forwards, backwards) is captured once and replayed as a CUDA graph.

    Raises:
        CheckpointError: `checkpoint` belongs to other settings, or is damaged.
        LtxError: torch.compile does not work here, the loss is no number, or `checkpoint` cannot be written.
    """
    device = str(data.images.device)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    settings = json.dumps(
        {
            "protocol": asdict(protocol), "density": density, "seed": seed, "shapes": shapes, "images": len(data),
            "modules": [type(module).__name__ for module in model.modules()], "compiled": compiled,
        },
        sort_keys=True,
    )  # fmt: skip
    start = _resume(model, checkpoint, settings, protocol) if checkpoint else _Start()

    def keep(round_: int, epoch: int, optimizer: Mapping[str, Tensor]) -> None:
        if checkpoint:
            state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
            metadata = {"round": str(round_), "epoch": str(epoch), "settings": settings}
            write_tensors(checkpoint, state | dict(optimizer), metadata)

    shape = tuple(data.images.shape[1:])
    model.to(device)
    call = _compiled(model) if compiled else model
    keep_freed_memory()
    step = _step(model, call, data, protocol)
    for round_ in range(start.round, protocol.rounds + 1):
        if start.epoch == 1:
            share = (
                {k: synflow.density_after(round_, protocol.rounds, d) for k, d in density.items()}
                if isinstance(density, Mapping)
                else synflow.density_after(round_, protocol.rounds, density)
            )
            synflow.prune(model, shape, share, scope=protocol.scope)
        _train_round(model, step, data, test, protocol, round_, start, seed, keep, on_progress)
        keep(round_ + 1, 1, {})
        start = _Start()
    return accuracy(model, test)


def _compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The model through torch.compile; LtxError where that fails, which shows at the first call."""
    call = torch.compile(model)

    def checked(images: Tensor) -> Tensor:
        try:
            return call(images)
        except Exception as error:  # of many kinds: no compiler, an old one, a device that it does not know
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise LtxError(f"compile=true: torch.compile does not work here ({reason}); use compile=false") from error

    return checked


def _step(model: nn.Module, call: Callable[[Tensor], Tensor], data: Split, protocol: Protocol) -> Callable[..., Tensor]:
    """What gives every parameter its gradient on one batch, from `_draws`, and returns the mean loss."""
    device = data.images.device
    # without its cache, which within another autocast is never emptied: weights would stay those of the first step
    amp = torch.autocast(device.type, dtype=torch.bfloat16, enabled=fast_bf16(str(device)), cache_enabled=False)

    by_onednn = contextlib.nullcontext() if call is not model or device.type != "cpu" else TanhByOneDnn()

    def step(index: Tensor, shifts: Tensor, mirrored: Tensor) -> Tensor:
        images, labels = _batch(data, protocol, index, shifts, mirrored)
        model.zero_grad(set_to_none=True)
        with amp, by_onednn:
            logits = call(images.contiguous(memory_format=torch.channels_last))
        loss = nn.functional.cross_entropy(logits.float(), labels)
        loss.backward()
        return loss.detach()

    if device.type != "cuda":
        return step
    model.train()
    return _Captured(step, next(_draws(data, protocol, seed=(0, 0, 0))), model)


@contextlib.contextmanager
def _fastest_kernels() -> Iterator[None]:
    """cuDNN tries several and takes the fastest."""
    before, cudnn.benchmark = cudnn.benchmark, True
    try:
        yield
    finally:
        cudnn.benchmark = before


class _Captured:
    """A step as a CUDA graph: one launch instead of hundreds. Gradients stay where they were when it was captured."""

    WARM_UP = 3  # steps before it; libraries choose their kernels, torch.compile compiles

    def __init__(self, step: Callable[..., Tensor], example: tuple[Tensor, ...], model: nn.Module):
        self._inputs = [each.clone() for each in example]
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self._device = example[0].device
        with torch.cuda.device(self._device), _fastest_kernels():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(self.WARM_UP):
                    step(*self._inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=stream):
                self._loss = step(*self._inputs)
        model.load_state_dict(state)  # the warm-up moved batch norm's statistics

    def __call__(self, *draw: Tensor) -> Tensor:
        for mine, given in zip(self._inputs, draw, strict=True):
            mine.copy_(given)
        with torch.cuda.device(self._device):
            self._graph.replay()
        return self._loss


@dataclass(frozen=True)
class _Start:
    """Where a run goes on: at the begin of an epoch, with the optimizer as it was then."""

    round: int = 1
    epoch: int = 1
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)


def _train_round(
    model: nn.Module, step: Callable[..., Tensor], data: Split, test: Split, protocol: Protocol, round_: int,
    start: _Start, seed: int, keep: Callable[[int, int, Mapping[str, Tensor]], None],
    on_progress: Callable[[Progress], None],
) -> None:  # fmt: skip
    device = str(data.images.device)
    steps = len(data) // min(protocol.batch_size, len(data))
    warm_up = 0.2 if protocol.epochs * steps != 5 else 0.3  # OneCycleLR divides by pct_start * total_steps - 1
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=protocol.learning_rate, weight_decay=protocol.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=protocol.learning_rate,
        total_steps=protocol.epochs * steps,
        pct_start=warm_up,
        anneal_strategy="linear",
    )
    if start.epoch > 1:
        done = (start.epoch - 1) * steps
        _restore(optimizer, schedule, model, start.optimizer, done)
    bounded = [parameter.data for parameter, _ in prunable(model).values()]
    saved = time.monotonic()
    for epoch in range(start.epoch, protocol.epochs + 1):
        model.train()
        total, count = torch.zeros((), device=device), 0
        for draw in _draws(data, protocol, seed=(seed, round_, epoch)):
            loss = step(*draw)
            optimizer.step()
            schedule.step()
            if protocol.bound is not None:
                torch._foreach_clamp_min_(bounded, -protocol.bound)  # pyright: ignore[reportPrivateImportUsage]
                torch._foreach_clamp_max_(bounded, protocol.bound)  # pyright: ignore[reportPrivateImportUsage]
            total, count = total + loss, count + 1
        mean = float(total) / count
        if not math.isfinite(mean):
            raise LtxError(
                f"training: the loss is {mean} in round {round_}, epoch {epoch}; lower target.learning_rate, or bound "
                "the parameters with target.bound"
            )
        last = epoch == protocol.epochs
        if not last and time.monotonic() - saved > SAVE_EVERY:
            keep(round_, epoch + 1, _optimizer_state(optimizer, model))
            saved = time.monotonic()
        on_progress(Progress(round_, epoch, mean, accuracy(model, test) if last else None))


def _optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """AdamW's moments and step counts under the parameters' names."""
    return {
        f"optimizer.{key}.{name}": torch.as_tensor(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def _restore(optimizer, schedule, model: nn.Module, state: Mapping[str, Tensor], steps: int) -> None:
    """Bring a fresh optimizer and its schedule to where they were after `steps` steps."""
    for name, tensor in state.items():
        _, key, parameter = name.split(".", 2)
        like = model.get_parameter(parameter)
        optimizer.state[like][key] = tensor.to(like.device)
    schedule.load_state_dict(schedule.state_dict() | {"last_epoch": steps, "_step_count": steps + 1})
    with warnings.catch_warnings(action="ignore"):  # it wants to be called by step() alone
        rates = schedule.get_lr()  # sets the momenta too
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _draws(data: Split, protocol: Protocol, *, seed: tuple[int, int, int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Which images make the whole batches of an epoch (B,), how each is shifted (B, 2), and whether mirrored (B,).

    Drawn on the CPU, so the same for any device.
    """
    base, round_, epoch = seed
    generator = torch.Generator().manual_seed(((base << 12) + round_ << 16) + epoch)
    device, n = data.labels.device, len(data)
    order = torch.randperm(n, generator=generator)
    shifts = torch.randint(0, 2 * protocol.crop + 1, (n, 2), generator=generator)
    mirrored = torch.rand(n, generator=generator) < 0.5
    size = min(protocol.batch_size, n)
    parts = [each.to(device).split(size) for each in (order, shifts, mirrored)]
    yield from list(zip(*parts, strict=True))[: n // size]


def _batch(data: Split, protocol: Protocol, index: Tensor, shifts: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor]:
    """Images and labels of a batch, shifted and mirrored as the protocol says."""
    crop, (height, width) = protocol.crop, data.images.shape[2:]
    images = data.images[index]
    if protocol.flip:
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    if crop:
        images = _shifted(nn.functional.pad(images, (crop,) * 4), shifts, height, width)
    return images, data.labels[index]


def _shifted(padded: Tensor, shifts: Tensor, height: int, width: int) -> Tensor:
    """Of every padded image the window of height x width whose upper left corner is at its shift (B, 2)."""
    rows = shifts[:, 0, None] + torch.arange(height, device=shifts.device)  # (B, H)
    columns = shifts[:, 1, None] + torch.arange(width, device=shifts.device)  # (B, W)
    images = torch.arange(len(padded), device=shifts.device)[:, None, None]
    # (B, H, W, C) comes out, which is the layout that convolutions want
    return padded.permute(0, 2, 3, 1)[images, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _resume(model: nn.Module, checkpoint: Path, settings: str, protocol: Protocol) -> _Start:
    """Load the checkpoint if there is one; where to go on."""
    if not checkpoint.is_file():
        return _Start()
    from safetensors import SafetensorError

    try:
        state, metadata = read_tensors(checkpoint)
    except SafetensorError as error:
        raise _damaged(checkpoint, str(error)) from error
    if metadata.get("settings") != settings:
        raise CheckpointError(
            f"{checkpoint}: was written by a run with other settings; start again with force=true (or remove it), "
            "or choose another output_dir"
        )
    moments = {name: tensor for name, tensor in state.items() if name.startswith("optimizer.")}
    try:
        round_, epoch = int(metadata["round"]), int(metadata["epoch"])
        if not (1 <= round_ <= protocol.rounds + 1 and 1 <= epoch <= protocol.epochs):
            raise ValueError(f"round {round_}, epoch {epoch}")
        shapes = {
            f"optimizer.{key}.{name}": () if key == "step" else model.get_parameter(name).shape
            for name in {n.split(".", 2)[-1] for n in moments}
            for key in ("step", "exp_avg", "exp_avg_sq")  # AdamW's
        }
        if (epoch > 1) != bool(moments) or {name: tensor.shape for name, tensor in moments.items()} != shapes:
            raise ValueError("the optimizer's state is not whole")
        model.load_state_dict({n.removeprefix("model."): t for n, t in state.items() if n.startswith("model.")})
    except (KeyError, ValueError, AttributeError, RuntimeError) as error:
        raise _damaged(checkpoint, str(error)) from error
    return _Start(round_, epoch, moments)


def _damaged(checkpoint: Path, why: str) -> CheckpointError:
    first = (why.splitlines() or ["empty"])[0]
    return CheckpointError(f"{checkpoint}: damaged ({first}); remove it to start again")
