"""Fixtures: small random targets and problems, networks of one's own, the command line in-process, real data."""

from __future__ import annotations

import functools
import gc
import os
import sys
from pathlib import Path

# Side by side, tests have a thread each, and OpenMP's must not spin while they wait: that takes the cores from the
# other processes. PyTorch reads both when it is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ltx import cli, config
from ltx.activations import ACTIVATIONS
from ltx.constructions.choice import Signals, Visits
from ltx.data import Split
from ltx.targets import resnet22
from ltx.targets.masked import MaskedConv2d, MaskedLinear

SMOKE = ("target=digits", "protocol=smoke", "device=cpu")
ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_finish():
    """What is imported by then stays; looking for garbage in it takes a tenth of the time of all tests."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    """Layers that a test makes have the same parameters whichever tests the worker ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _settings_are_composed_once():
    """Hydra composes them twice, first for hydra.mode alone; told that there is none, it looks for --multirun.

    A tenth of the time of all tests.
    """
    get_mode = Hydra.get_mode

    def given(self: Hydra, config_name: str | None, overrides: list[str]) -> RunMode | None:
        return get_mode(self, config_name, overrides) if "hydra.mode" in " ".join(overrides) else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hydra, "get_mode", given)
        yield


def settings(*overrides: str) -> config.Settings:
    """Checked settings, as a command gets them."""
    groups = [given for given in overrides if given.split("=")[0] in ("target", "data", "protocol", "experiment")]
    others = OmegaConf.from_dotlist([given for given in overrides if given not in groups])
    return config.settings_from(OmegaConf.merge(composed(*groups), others))  # which is quicker than to compose them all


@functools.cache
def composed(*overrides: str) -> DictConfig:
    """What Hydra makes of them; the same object each time, to be copied before it is changed."""
    config.register()
    with initialize_config_dir(str(cli.conf_dir()), version_base="1.3"):
        return compose("config", list(overrides))


def small_cnn(activation: str, *, seed: int = 0, density: float = 0.3, channels: int = 4, size: int = 6, bias=True):
    """conv, phi, conv, phi, flatten, linear with random sparse parameters in [-0.9, 0.9]."""
    generator = torch.Generator().manual_seed(seed)
    phi = ACTIVATIONS[activation].module
    model = nn.Sequential(
        MaskedConv2d(1, channels, 3, padding=1), phi(), MaskedConv2d(channels, channels, 3, padding=1), phi(),
        nn.Flatten(), MaskedLinear(channels * size * size, 3),
    )  # fmt: skip
    for module in model:
        if isinstance(module, MaskedConv2d | MaskedLinear):
            randomise(module, generator, density, bias=bias)
    return model.eval()


def randomise(module: nn.Module, generator: torch.Generator, density: float, *, bias: bool = True) -> None:
    """Parameters uniform on [-0.9, 0.9], masks of the given density."""
    with torch.no_grad():
        share = density / 4 if isinstance(module, nn.Linear) else density
        module.weight.copy_(torch.rand(module.weight.shape, generator=generator) * 1.8 - 0.9)
        module.weight_mask.copy_((torch.rand(module.weight.shape, generator=generator) < share).float())
        module.bias.copy_((torch.rand(module.bias.shape, generator=generator) * 1.8 - 0.9) * bias)


def without_parameters(model: nn.Module, *layers: str) -> nn.Module:
    """The same network, in which nothing is left of some layers."""
    with torch.no_grad():
        for name in layers:
            for parameter in model.get_submodule(name).parameters():
                parameter.zero_()
    return model


def small_resnet(activation="relu", *, seed=0, blocks=2, width=2, density=0.25):
    """Random parameters and statistics; 8x8 images with one channel, 3 classes."""
    model = resnet22(ACTIVATIONS[activation], shape=(1, 8, 8), classes=3, width=width, blocks=blocks)
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor, low, high):
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MaskedConv2d):
                module.weight.copy_(torch.rand(module.weight.shape, generator=generator) * 1.8 - 0.9)
                module.weight_mask.copy_((torch.rand(module.weight.shape, generator=generator) < density).float())
            elif isinstance(module, MaskedLinear):
                randomise(module, generator, 4 * 0.5)
            elif isinstance(module, nn.BatchNorm2d):
                uniform(module.weight, 0.5, 0.9)
                uniform(module.bias, -0.4, 0.6)
                uniform(module.running_mean, -0.3, 0.3)
                uniform(module.running_var, 0.5, 1.5)
    return model.eval()


def images(count: int = 16, size: int = 6, *, seed: int = 0, low: float = -1.0) -> torch.Tensor:
    """Uniform images in [low, 1), (count, 1, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, size, size, generator=generator) * (1 - low) + low


def random_rows(*, groups=12, m=7, samples=60, kinds=3, copies=5, seed=0, common=False):
    """Signals, visits, kinds of rows, weights and errors for the kernels of feedback.

    common: all kinds visit their groups in one order, each some of them.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(shape, generator=generator) * 2 - 1

    ideal = uniform(groups, samples)
    signals = Signals.of(ideal[:, None] + 0.2 * uniform(groups, m, samples), ideal)
    visits = Visits(
        torch.arange(kinds + 1) * groups,
        torch.cat([torch.randperm(groups, generator=generator) for _ in range(kinds)]),
        uniform(kinds * groups),
    )
    if common:
        rank = torch.randperm(groups, generator=generator)
        mine = [rank.argsort()[torch.rand(groups, generator=generator) < 0.7] for _ in range(kinds)]
        begin = torch.tensor([0, *map(len, mine)]).cumsum(0)
        visits = Visits(begin, torch.cat(mine), visits.theta[: begin[-1]], rank)
    rows = torch.arange(kinds).repeat_interleave(copies)
    sizes = (visits.begin[1:] - visits.begin[:-1])[rows]
    weights = uniform(int(sizes.sum()), m)
    return signals, visits, rows, weights, uniform(len(rows), samples)


def some(split: Split, count: int) -> Split:
    """A fixed random subset of a split's images, (count, C, H, W)."""
    index = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:count]
    return Split(split.images[index], split.labels[index])


def deviation(model: nn.Module, ticket, x: torch.Tensor) -> torch.Tensor:
    """|f_t - f_eps| over images and outputs, in float64, so that rounding plays no part; the model is float32 again."""
    with torch.no_grad():
        found = (model.double()(x.double()) - ticket.to_module().double()(x.double())).abs()
    model.float()
    return found


NETWORKS = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.Dropout(), nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d((2, 1)), nn.Flatten(),
        nn.Linear(8, 10),
    )

class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = make()

    def forward(self, x):
        return self.module(x)

def normalised():
    net = make()
    with torch.no_grad():
        for tensor in (net[1].running_var, net[1].weight):
            tensor.uniform_(0.3, 0.9)
    return net

def two_functions():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 10))

def large():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 10, 8), nn.ReLU(), nn.Flatten(), nn.Linear(10, 10))
    with torch.no_grad():
        net[0].weight.uniform_(.1, .9)
        net[3].weight.uniform_(.1, .9)
    return net

def constant():
    torch.manual_seed(4)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 10))
    with torch.no_grad():
        net[0].weight.mul_(1e-20)
        for tensor in (net[1].running_var, net[1].running_mean, net[1].bias):
            tensor.uniform_(0.1, 0.9)
    return net

def attention():
    return nn.Sequential(nn.Flatten(), nn.TransformerEncoderLayer(64, 2))

def unseeded():
    torch.seed()
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def number():
    return 3

def leaves():
    raise SystemExit(0)

def attention_behind_a_mean():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.attention, self.out = nn.Linear(8, 4), nn.MultiheadAttention(4, 1), nn.Linear(4, 10)

        def forward(self, x):
            y = self.inside(x)
            return self.out(self.attention(y, y, y)[0].mean(1))

    return Net()

def empty():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).to("meta")

def spatial():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3))

def double():
    return make().double()
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module `nets_NAME` in the working folder; its name."""
    name = f"nets_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield name
    sys.modules.pop(name, None)


@pytest.fixture
def ltx(capsys, tmp_path):
    """Run `ltx ARGUMENTS output_dir=tmp_path`; the exit status, stdout and stderr."""

    def run(*arguments: str, output_dir: Path | None = None) -> tuple[int, str, str]:
        capsys.readouterr()
        given = len(arguments) < 2 or any(a.startswith("output_dir=") for a in arguments)
        extra = [] if given and output_dir is None else [f"output_dir={output_dir or tmp_path}"]
        status = cli.run([*arguments, *extra])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """An output_dir with a trained target, a ticket and its result."""
    folder = tmp_path_factory.mktemp("outputs")
    for command in ("train-target", "construct", "eval"):
        assert cli.run([command, *SMOKE, f"output_dir={folder}"]) == 0
    return folder


def _required(path: Path, what: str) -> None:
    """Skip a test without its data; fail it where LTX_REQUIRE_DATA says that they must be there."""
    if not path.is_file():
        message = f"{what} is not there: {path}"
        if os.environ.get("LTX_REQUIRE_DATA"):
            pytest.fail(message)
        pytest.skip(message)


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    """Where real MNIST lies (LTX_DATA)."""
    root = Path(os.environ.get("LTX_DATA", "/nowhere"))
    _required(root / "MNIST" / "raw" / "t10k-images-idx3-ubyte", "real MNIST")
    return root


@pytest.fixture(scope="session")
def cifar_root() -> Path:
    """Where real CIFAR-10 lies (LTX_DATA)."""
    root = Path(os.environ.get("LTX_DATA", "/nowhere"))
    _required(root / "cifar-10-batches-py" / "test_batch", "real CIFAR-10")
    return root


@pytest.fixture(scope="session")
def author_target() -> Path:
    """The residual target that the paper's author released: LTX_AUTHOR_TARGET, else where CI has it."""
    beside = ROOT.parent / "shared" / "reference" / "resnet-sigmoid.pt"
    path = Path(os.environ.get("LTX_AUTHOR_TARGET", beside))
    _required(path, "the author's ResNet-22 (RelationalML/LT-existence)")
    return path


def last_line(out):
    return Path(out.splitlines()[-1])


def one_line(err):
    """The one line of an error; everything else on stderr would be noise to a user."""
    assert "Traceback" not in err
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("ltx: ")
    return lines[0]
