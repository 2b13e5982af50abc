"""What `construct` refuses, saying what would help, and that numbers of NumPy's are none of it."""

import math

import pytest
import torch
from conftest import randomise, small_cnn
from torch import nn

import ltx
from ltx import LtxError, construct, verify
from ltx.targets.masked import MaskedConv2d, MaskedLinear


def feedback(**settings):
    return {
        "selection": "feedback", "calibration": torch.rand(2, 1, 6, 6), "feedback": ltx.Feedback(**settings),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"construction": "3L"}, "2L, L\\+1"),
        ({"head": "drop"}, "keep, construct"),
        ({"scaling": "max"}, "unit, layer_max"),
        ({"seed": -1}, "seed -1"),
        ({"input_range": (1.0, 0.0)}, "below the second"),
        ({"input_range": (-math.inf, 1.0)}, "two finite numbers"),
        ({"input_range": (0.0, math.nan)}, "two finite numbers"),
        ({"base_set_size": 0}, "between 1 and 32"),
        ({"epsilon": 0.0}, "positive"),
        ({"epsilon": "small"}, "epsilon 'small' must be a number"),
        ({"seed": 1.5}, "seed 1.5 must be a whole number"),
        ({"base_set_size": None}, "base_set_size None must be a whole number"),
        ({"pair_kernel": 3.0}, "pair_kernel 3.0 must be a whole number"),
        ({"input_range": 5}, "two numbers, \\(LOW, HIGH\\)"),
        ({"input_range": (0, "one")}, "input_range 'one' must be a number"),
        ({"device": "tpu"}, "device 'tpu' is not known; there are cpu and cuda"),
        ({"device": "mps"}, "device 'mps' is not known"),
        ({"calibration": [[1.0]], "selection": "feedback"}, "calibration: must be a tensor of images, is a list"),
        ({"calibration": torch.rand(2, 1, 6, 6), "selection": "feedback", "feedback": {}}, "must be ltx.Feedback"),
        (feedback(samples=1.5), "feedback.samples=1.5: must be a whole number"),
        (feedback(sweeps="a"), "feedback.sweeps='a': must be a whole number"),
        (feedback(refine=1.5), "feedback.refine=1.5: must be a whole number"),
        (feedback(spread=None), "feedback.spread=None: must be a number"),
        ({"device": "cuda:99"}, "device 'cuda:99': there are . CUDA devices"),
    ],
)
def test_refuses_settings_without_meaning(arguments, message):
    with pytest.raises(LtxError, match=message):
        construct(small_cnn("relu"), **arguments)


def test_numbers_of_numpy_are_numbers(tmp_path):
    import numpy as np

    plain = construct(small_cnn("relu"), seed=3, base_set_size=14, input_range=(0.0, 1.0))
    given = construct(
        small_cnn("relu"), seed=np.uint64(3), base_set_size=np.int32(14), epsilon=np.float64(0.01),
        input_range=np.array([0.0, 1.0]), device=torch.device("cpu"),
    )  # fmt: skip
    for name, ticket in (("plain", plain), ("given", given)):
        ticket.save(tmp_path / name)
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "given").read_bytes()


def test_padding_that_every_tap_sees_is_refused():
    model = nn.Sequential(nn.Conv2d(1, 2, 1, padding=1), nn.ReLU())
    with pytest.raises(LtxError, match=r"layer 0: every tap .* zero padding"):
        construct(model, head="construct")
    bias_behind = nn.Sequential(nn.Conv2d(1, 2, 1, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    for construction in ("2L", "L+1"):
        with pytest.raises(LtxError, match="no constant gets through it, which its bias needs, or one behind it"):
            construct(bias_behind, construction=construction, head="construct", base_set_size=20)
        assert verify(construct(bias_behind, construction=construction, base_set_size=20), bias_behind).ok


@pytest.mark.slow
def test_constants_that_are_too_small_are_no_matter_of_scaling():
    """A row that sums -0.09 to 1; what another batch norm would make of it is another matter."""
    model = nn.Sequential(
        MaskedConv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.SiLU(), MaskedConv2d(2, 2, 3, padding=1), nn.Tanh(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), MaskedLinear(2, 2),
    ).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for module in (model[0], model[3], model[7]):
        randomise(module, generator, 1.0)
    nn.init.constant_(model[1].weight, 0.5)
    nn.init.constant_(model[1].bias, -0.2)
    how = {"construction": "2L", "head": "construct", "scaling": "layer_max"}
    with pytest.raises(LtxError, match=r"layer 3, constant channel: .*L\+1, or use batch_norm=fold, which makes other"):
        construct(model, **how)
    assert verify(construct(model, batch_norm="fold", **how), model).ok
    for module in (model[0], model[3], model[7]):
        randomise(module, generator, 0.0)  # of which biases are left
    model[1] = nn.Identity()
    with pytest.raises(LtxError, match=r"layer 3, constant channel: .*L\+1$"):
        construct(model, base_set_size=3, epsilon=0.05, **how)


@pytest.mark.slow
def test_unreachable_parameters_are_an_error_that_helps():
    model = small_cnn("tanh")
    # 2L fails in layer 2, L+1 in the pair in front, which 2L has too
    for construction, hint in (("2L", ", or use construction=L+1"), ("L+1", "")):
        with pytest.raises(LtxError, match=r"none of \d+ source rows .* within 0.0001.* raise m or epsilon") as caught:
            construct(model, construction=construction, base_set_size=13, epsilon=1e-4)
        assert str(caught.value).endswith("raise m or epsilon" + hint)
