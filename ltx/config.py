"""Every setting, typed and checked. Apart from cli.py and tasks/, the only module that knows omegaconf."""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from ltx.errors import LtxError
from ltx.feedback import IMAGES, Feedback
from ltx.help import ACTIVATION_NAMES, SEE_HELP
from ltx.subset_sum.limits import MAX_BASE_SET_SIZE, MAX_PROBLEMS

# Hydra matches enums by name, and these names are no identifiers
Construction = Enum("Construction", {"2L": "2L", "L+1": "L+1", "sampled": "sampled"})
Selection = Enum("Selection", {"smallest": "smallest", "best": "best", "feedback": "feedback"})
Law = Enum("Law", {name: name for name in ("uniform", "product", "normal", "normal_product")})
Head = Enum("Head", {"keep": "keep", "construct": "construct"})
Scaling = Enum("Scaling", {"unit": "unit", "layer_max": "layer_max"})
BatchNorm = Enum("BatchNorm", {"keep": "keep", "fold": "fold"})
Scope = Enum("Scope", {"local": "local", "global": "global"})
PairStride = Enum("PairStride", {"second": "second", "first": "first"})
BoundsForm = Enum("BoundsForm", {"norms": "norms", "theorem": "theorem"})
Format = Enum("Format", {"masks": "masks", "prune": "prune", "onnx": "onnx"})
Device = Enum("Device", {"auto": "auto", "cpu": "cpu", "cuda": "cuda"})
ActivationName = Enum("ActivationName", {name: name for name in ACTIVATION_NAMES})


@dataclass
class DataSettings:
    name: str = MISSING
    root: str | None = None


@dataclass
class TargetSettings:
    name: str = MISSING
    network: str = MISSING
    density: float | None = MISSING  # share kept of every layer at the end; null: the activation's
    densities: dict[str, float] = field(default_factory=dict)  # per activation
    scope: Scope = Scope.local  # type: ignore[attr-defined]
    head: Head = Head.keep  # type: ignore[attr-defined]  # what the paper does with this network's
    batch_size: int = MISSING
    learning_rate: float = MISSING
    weight_decay: float = 1e-4
    bound: float | None = 0.99  # |theta| <= 1 - eps is an assumption of both theorems
    crop: int = 0  # training images are shifted by up to so many pixels
    flip: bool = False  # and mirrored, every other one
    seed: int = 0  # of initialisation and training
    checkpoint: str | None = None  # a given target instead of a trained one
    module: str | None = None  # PACKAGE.MODULE:FACTORY of a network of one's own
    input_range: list[float] | None = None  # of an input element; null: that of the data

    def check(self) -> None:
        given = self.input_range
        _require(
            given is None or (len(given) == 2 and -math.inf < given[0] < given[1] < math.inf),
            f"target.input_range={given}: must be [LOW, HIGH] with LOW < HIGH, or null",
        )
        unknown = ", ".join(sorted(self.densities.keys() - set(ACTIVATION_NAMES)))
        _require(
            not unknown, f"target.densities: there is no activation {unknown}; choose {', '.join(ACTIVATION_NAMES)}"
        )
        for share in (self.density, *self.densities.values()):
            _require(share is None or 0 < share <= 1, f"target.density={share}: must lie in (0, 1]")
        _require(self.batch_size >= 1, f"target.batch_size={self.batch_size}: must be at least 1")
        _require(
            0 < self.learning_rate < math.inf, f"target.learning_rate={self.learning_rate}: must be a positive number"
        )
        _require(
            0 <= self.weight_decay < math.inf, f"target.weight_decay={self.weight_decay}: must be a number, at least 0"
        )
        _require(
            self.bound is None or 0 < self.bound < 1e38,  # what float32 holds
            f"target.bound={self.bound}: must be a positive number below 1e38, or null for none",
        )
        _require(0 <= self.crop <= 16, f"target.crop={self.crop}: must lie between 0 and 16")
        _require(0 <= self.seed < 2**32, f"target.seed={self.seed}: must lie between 0 and 2**32 - 1")


@dataclass
class ProtocolSettings:
    name: str = MISSING
    rounds: int = MISSING
    epochs: int = MISSING

    def check(self) -> None:
        _require(self.rounds >= 1, f"protocol.rounds={self.rounds}: must be at least 1")
        _require(self.epochs >= 1, f"protocol.epochs={self.epochs}: must be at least 1")


@dataclass
class FeedbackSettings(Feedback):
    images: int = IMAGES  # for calibration, of the training split

    def check(self) -> None:
        super().check()
        _require(self.images >= 1, f"feedback.images={self.images}: must be at least 1")

    @property
    def plain(self) -> Feedback:
        """Without the images, which the library takes as such."""
        return Feedback(**{f.name: getattr(self, f.name) for f in fields(Feedback)})


@dataclass
class PairSettings:
    """The first layer of a pair of source layers (Appendix E)."""

    kernel: int = 1
    stride: PairStride = PairStride.second  # type: ignore[attr-defined]  # the layer that has the target's

    def check(self) -> None:
        _require(self.kernel >= 1 and self.kernel % 2 == 1, f"pair.kernel={self.kernel}: must be odd and positive")


@dataclass
class BoundsSettings:
    """What `ltx bounds` guarantees."""

    error: float = 0.1  # largest deviation of an output
    delta: float = 0.05  # probability that there is no such ticket
    form: BoundsForm = BoundsForm.norms  # type: ignore[attr-defined]
    single: float | None = None  # C of Corollary 2.2, of base sets of parameters; None: measured for the law
    product: float | None = None  # the same of products of two

    def check(self) -> None:
        _require(0 < self.error < math.inf, f"bounds.error={self.error}: must be a positive number")
        for name in ("single", "product"):
            value = getattr(self, name)
            _require(
                value is None or 0 < value <= 1e4,
                f"bounds.{name}={value}: must be a positive number, at most 10,000, or null for the measured one",
            )
        _require(0 < self.delta < 1, f"bounds.delta={self.delta}: must lie between 0 and 1")


@dataclass
class CertifySettings:
    """How `ltx certify` looks for inputs on which a ticket is far from its target."""

    starts: int = 100  # of gradient ascent; 0 for none
    steps: int = 100

    def check(self) -> None:
        _require(0 <= self.starts <= 10**6, f"certify.starts={self.starts}: must lie between 0 and 10**6")
        _require(1 <= self.steps <= 10**5, f"certify.steps={self.steps}: must lie between 1 and 10**5")


@dataclass
class Settings:
    """All settings of a command, after its overrides."""

    data: DataSettings = field(default_factory=DataSettings)
    target: TargetSettings = field(default_factory=TargetSettings)
    protocol: ProtocolSettings = field(default_factory=ProtocolSettings)
    activation: ActivationName = ActivationName.relu  # type: ignore[attr-defined]
    construction: Construction = Construction["L+1"]
    m: int = 15
    epsilon: float = 0.01
    selection: Selection = Selection.smallest  # type: ignore[attr-defined]
    feedback: FeedbackSettings = field(default_factory=FeedbackSettings)
    head: Head = Head.keep  # type: ignore[attr-defined]
    scaling: Scaling = Scaling.unit  # type: ignore[attr-defined]
    batch_norm: BatchNorm = BatchNorm.keep  # type: ignore[attr-defined]
    pair: PairSettings = field(default_factory=PairSettings)
    bounds: BoundsSettings = field(default_factory=BoundsSettings)
    certify: CertifySettings = field(default_factory=CertifySettings)
    law: Law = Law.uniform  # type: ignore[attr-defined]
    theta: float | None = None
    problems: int = 100_000
    seconds: float = 2.0
    seed: int = 0
    device: Device = Device.auto  # type: ignore[attr-defined]
    compile: bool = False
    output_dir: str = "outputs"
    ticket: str | None = None
    limit: int | None = None
    format: Format = Format.masks  # type: ignore[attr-defined]
    use_reference: bool = True
    force: bool = False

    def check(self) -> None:
        _require(self.m >= 1, f"m={self.m}: the base set size must be at least 1")
        _require(
            math.isfinite(self.epsilon) and self.epsilon > 0,
            f"epsilon={self.epsilon}: the allowed error must be a positive number, e.g. epsilon=0.01",
        )
        _require(
            2 <= self.problems <= MAX_PROBLEMS,
            f"problems={self.problems}: must lie between 2 and {MAX_PROBLEMS}; several seeds give more",
        )
        _require(self.output_dir.strip() != "", "output_dir is empty: it must name a folder")
        for name, value in (
            ("data.root", self.data.root), ("target.checkpoint", self.target.checkpoint),
            ("target.module", self.target.module), ("ticket", self.ticket),
        ):  # fmt: skip
            _require(value is None or value.strip() != "", f"{name} is empty: say which, or leave it out")
        _require(
            self.theta is None or abs(self.theta) <= 1e100,  # its square is looked at, too
            f"theta={self.theta}: must be a number of at most 1e100 in magnitude, or null for random",
        )
        _require(0 < self.seconds < math.inf, f"seconds={self.seconds}: must be a positive number")
        _require(0 <= self.seed < 2**64, f"seed={self.seed}: must lie between 0 and 2**64 - 1")
        for name, kind in (("batch_norm", "keep"), ("scaling", "unit")):
            given = getattr(self, name).value
            _require(
                self.construction.value != "sampled" or given == kind,
                f"{name}={given} has no meaning with construction=sampled: no ticket is built; leave it out",
            )
        _require(
            self.selection.value == "feedback" or self.feedback == FeedbackSettings(),
            f"feedback.* has no meaning with selection={self.selection.value}; say selection=feedback",
        )
        _require(
            self.selection.value != "feedback" or self.construction.value != "sampled",
            "selection=feedback has no meaning with construction=sampled: no ticket is built; use L+1 or 2L",
        )
        _require(
            self.construction.value != "sampled" or self.pair == PairSettings(),
            "pair.* has no meaning with construction=sampled: no ticket is built; leave it out",
        )
        _require(
            self.selection.value != "feedback" or self.pair.stride.value == "second",
            "selection=feedback needs copies of every position: use pair.stride=second",
        )
        _require(
            self.target.module is None or self.construction.value != "sampled",
            "construction=sampled perturbs the paper's targets alone; leave target.module out, or use L+1 or 2L",
        )
        _require(self.limit is None or self.limit >= 1, f"limit={self.limit}: must be at least 1")

    @property
    def density(self) -> float:
        """The share that pruning keeps of every layer; LtxError where the target says none for the activation."""
        t = self.target
        share = t.densities.get(self.activation.value) if t.density is None else t.density
        if share is None:
            raise LtxError(f"target={t.name} has no density for {self.activation.value}; give one with target.density=")
        return share

    @property
    def torch_device(self) -> str:
        """`cpu` or `cuda`; LtxError when a GPU is asked for where there is none."""
        import torch

        there = torch.cuda.is_available()
        if self.device is Device.cuda and not there:  # type: ignore[attr-defined]
            raise LtxError("device=cuda: no CUDA device is available; use device=cpu or device=auto")
        return "cuda" if there and self.device is not Device.cpu else "cpu"  # type: ignore[attr-defined]

    @property
    def data_root(self) -> Path | None:
        return Path(self.data.root).expanduser() if self.data.root else None

    @property
    def built(self) -> dict[str, str | int]:
        """Which source is drawn, and what of the target it approximates, as `ltx.construct` and results have it."""
        return {
            "law": self.law.value, "head": self.head.value, "scaling": self.scaling.value,
            "batch_norm": self.batch_norm.value, "pair_kernel": self.pair.kernel, "pair_stride": self.pair.stride.value,
        }  # fmt: skip

    @property
    def made(self) -> dict[str, str | int | float]:
        """How a ticket is made, as `ltx.construct` takes it and results have it; tickets say the most of it."""
        return {
            "construction": self.construction.value, "base_set_size": self.m, "epsilon": self.epsilon,
            "selection": self.selection.value, "seed": self.seed, **self.built,
        }  # fmt: skip

    def require_solvable(self) -> None:
        """LtxError where m is beyond what the solver takes; the theorems' formulas (`ltx bounds`) take any."""
        _require(
            self.m <= MAX_BASE_SET_SIZE,
            f"m={self.m}: the base set size must lie between 1 and {MAX_BASE_SET_SIZE}, the solver's limit",
        )

    def plain(self) -> dict:
        """The settings as plain values, for result files; a network of one's own has activations of its own."""
        found = _plain(asdict(self))
        if self.target.module:
            del found["activation"]
        return found


def settings_from(config: DictConfig) -> Settings:
    """Checked settings from Hydra's config; LtxError for a value that has no meaning."""
    missing = OmegaConf.missing_keys(config)
    if missing:
        raise LtxError(f"settings without a value: {', '.join(sorted(missing))}; give them as KEY=VALUE")
    unknown = _unknown(config)
    if unknown:
        raise LtxError(f"there is no setting {', '.join(unknown)}; {SEE_HELP}")
    settings = OmegaConf.to_object(config)
    assert isinstance(settings, Settings)
    s = settings
    for part in (s, s.target, s.protocol, s.feedback, s.pair, s.bounds, s.certify):
        part.check()
    return settings


def _unknown(config: DictConfig, prefix: str = "") -> list[str]:
    """Keys that Hydra's +KEY=VALUE added; no setting has a place for them."""
    schema = OmegaConf.get_type(config)
    if not is_dataclass(schema):
        return []
    names = {f.name for f in fields(schema)}
    inner = (_unknown(config[k], f"{prefix}{k}.") for k in names if OmegaConf.is_dict(config[k]))
    return sorted(f"{prefix}{key}" for key in config if key not in names) + [k for found in inner for k in found]


@functools.cache
def register() -> None:
    """Make the schema known to Hydra, once in a process."""
    ConfigStore.instance().store(name="settings_schema", node=Settings)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise LtxError(message)


def _plain(value):
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value.value if isinstance(value, Enum) else value
