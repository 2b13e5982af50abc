"""Where artefacts lie: deterministic folders, so that a second run finds what the first one made."""

from __future__ import annotations

from pathlib import Path

from ltx.config import Settings


def reference_dir() -> Path:
    """Measured results that are kept with the code; absent from an installed wheel."""
    return Path(__file__).resolve().parent.parent / "outputs" / "reference"


def target_file(settings: Settings) -> Path:
    """The target that `ltx train-target` writes with these settings."""
    t = settings.target
    name = f"{t.name}-{settings.activation.value}-{settings.protocol.name}-seed{t.seed}"
    return Path(settings.output_dir) / "targets" / name / "target.safetensors"


def reference_target(settings: Settings) -> Path:
    """The kept target of this network and activation, whether it is there or not."""
    return reference_dir() / "targets" / f"{settings.target.name}-{settings.activation.value}.safetensors"


def own_name(settings: Settings) -> str | None:
    """What a network of one's own is called, with its data, of which no file says anything; None of the paper's."""
    own = settings.target.module
    return f"{own.split(':')[-1]}-{settings.data.name}" if own else None


def _target(settings: Settings, digest: str) -> str:
    return f"{own_name(settings) or f'{settings.target.name}-{settings.activation.value}'}-{digest[:8]}"


def ticket_file(settings: Settings, target_digest: str) -> Path:
    """The ticket that `ltx construct` writes with these settings for the target of that SHA-256."""
    s = settings
    target = _target(s, target_digest)
    if s.construction.value == "sampled":
        kept = "-keep" if s.head.value == "keep" else ""
        law = "" if s.law.value == "uniform" else f"-{s.law.value}"
        name = f"sampled-m{s.m}-eps{s.epsilon!r}-{s.selection.value}{kept}{law}{_inputs(s)}-seed{s.seed}"
        return Path(s.output_dir) / "tickets" / target / name / "sampled.safetensors"
    selection = s.selection.value
    if selection == "feedback":
        f = s.feedback
        selection += f"-n{f.samples}-i{f.images}-k{f.max_subset}-s{f.sweeps}-f{f.refine}-p{f.penalty!r}"
        selection += "" if f.bound is None else f"-b{f.bound!r}"
        selection += ("" if f.reject is None else f"-r{f.reject!r}") + (f"-w{f.spread!r}" if f.spread else "")
        selection += "" if f.order == "random" else f"-{f.order}"
    name = f"{s.construction.value}-m{s.m}-eps{s.epsilon!r}-{selection}-{_kind(s)}-seed{s.seed}"
    return Path(s.output_dir) / "tickets" / target / name / "ticket.safetensors"


def bounds_file(settings: Settings, target_digest: str) -> Path:
    """The table that `ltx bounds` writes with these settings for the target of that SHA-256."""
    s, b = settings, settings.bounds
    constants = "".join(f"-{name}{c!r}" for name, c in (("C", b.single), ("Cproduct", b.product)) if c is not None)
    name = (
        f"{_target(s, target_digest)}-{s.construction.value}-m{s.m}-eps{s.epsilon!r}-error{b.error!r}-delta{b.delta!r}"
        f"-{b.form.value}{constants}-{_kind(s)}-seed{s.seed}"
    )
    return Path(s.output_dir) / "bounds" / f"{name}.csv"


def _kind(s: Settings) -> str:
    """What of the target is approximated, and by what source."""
    return f"{s.head.value}-{s.scaling.value}{kind_of(s)}{_inputs(s)}"


def kind_of(settings: Settings) -> str:
    """What of the target is approximated, and by what source, besides head and scaling: what is not as usual."""
    s = settings
    kind = "-fold" if s.batch_norm.value == "fold" else ""
    kind += "" if s.law.value == "uniform" else f"-{s.law.value}"
    kind += f"-pair{s.pair.kernel}" if s.pair.kernel > 1 else ""
    return kind + ("-strided" if s.pair.stride.value == "first" else "")


def _inputs(s: Settings) -> str:
    """The range of input elements, where it is not that of the data."""
    given = s.target.input_range
    return "" if given is None else f"-inputs{given[0]!r}..{given[1]!r}"


def statistics_file(settings: Settings) -> Path:
    """The statistics of random subset-sum problems that `ltx subset-sum` writes with these settings."""
    s = settings
    name = f"{s.law.value}-{s.selection.value}-m{s.m}-eps{s.epsilon!r}-n{s.problems}-seed{s.seed}"
    name += "" if s.theta is None else f"-theta{s.theta!r}"
    return Path(s.output_dir) / "subset_sum" / name / "statistics.json"
