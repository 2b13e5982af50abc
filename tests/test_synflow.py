"""Synflow as Tanaka et al. describe it: conservation of the scores, the schedule, the masks."""

import itertools

import pytest
import torch
from conftest import small_cnn
from torch import nn

from ltx import synflow
from ltx.errors import LtxError
from ltx.targets import build, prunable
from ltx.targets.masked import MaskedLinear


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build("mnist_cnn", "tanh", shape=(1, 8, 8), classes=10)


def test_scores_are_conserved(model):
    """Without biases the scores of every layer sum to R (Tanaka et al., Theorem 2: network-wise conservation)."""
    with torch.no_grad():
        for name, (parameter, _) in prunable(model).items():
            if name.endswith("bias"):
                parameter.zero_()
    totals = [score.sum() for name, score in synflow.scores(model, (1, 8, 8)).items() if name.endswith("weight")]
    assert len(totals) == 3
    torch.testing.assert_close(torch.stack(totals), totals[0].expand(3))


def test_scores_ignore_signs_and_activation(model):
    before = synflow.scores(model, (1, 8, 8))
    relu = build("mnist_cnn", "relu", shape=(1, 8, 8), classes=10)
    relu.load_state_dict({k: v if k.endswith("mask") else -v for k, v in model.state_dict().items()})
    for name, score in synflow.scores(relu, (1, 8, 8)).items():
        torch.testing.assert_close(score, before[name])


def test_scores_leave_the_model_alone(model):
    state = {k: v.clone() for k, v in model.state_dict().items()}
    synflow.scores(model, (1, 8, 8))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_schedule_is_exponential():
    steps = [synflow.density_after(s, 12, 0.1) for s in range(1, 13)]
    ratios = [b / a for a, b in itertools.pairwise(steps)]
    assert steps[-1] == pytest.approx(0.1)
    assert all(r == pytest.approx(0.1 ** (1 / 12)) for r in ratios)


def test_local_scope_keeps_the_share_of_every_tensor(model):
    synflow.prune(model, (1, 8, 8), 0.1)
    for name, (parameter, mask) in prunable(model).items():
        assert int(mask.sum()) == parameter.numel() - int(0.9 * parameter.numel()), name


def test_keeps_the_largest_scores(model):
    before = synflow.scores(model, (1, 8, 8))
    synflow.prune(model, (1, 8, 8), 0.2)
    for name, (_, mask) in prunable(model).items():
        assert before[name][mask == 1].min() > before[name][mask == 0].max()


@pytest.mark.parametrize(("density", "pruned"), [(1.0, 0), (0.8, 0), (0.75, 1), (0.5, 2), (0.0, 4)])
def test_a_share_of_few_is_rounded_down(density, pruned):
    model = nn.Sequential(MaskedLinear(1, 4, bias=False))
    synflow.prune(model, (1,), density)
    assert int((prunable(model)["0.weight"][1] == 0).sum()) == pruned


def test_global_scope_ranks_all_together(model):
    synflow.prune(model, (1, 8, 8), 0.1, scope="global")
    masks = [mask for _, mask in prunable(model).values()]
    total = sum(m.numel() for m in masks)
    assert sum(int(m.sum()) for m in masks) == total - int(0.9 * total)
    assert len({round(float(m.mean()), 3) for m in masks}) > 2


def test_masks_only_shrink(model):
    synflow.prune(model, (1, 8, 8), 0.3)
    before = {n: m.clone() for n, (_, m) in prunable(model).items()}
    synflow.prune(model, (1, 8, 8), 0.1)
    assert all((m <= before[n]).all() for n, (_, m) in prunable(model).items())


def test_densities_by_name(model):
    share = {name: 0.5 if name.endswith("bias") else 0.1 for name in prunable(model)}
    synflow.prune(model, (1, 8, 8), share)
    assert float(prunable(model)["2.bias"][1].mean()) == 0.5


def test_refusals(model):
    with pytest.raises(LtxError, match="local, global"):
        synflow.prune(model, (1, 8, 8), 0.1, scope="layer")
    with pytest.raises(LtxError, match="one density"):
        synflow.prune(model, (1, 8, 8), {"0.weight": 0.1}, scope="global")
    with pytest.raises(LtxError, match=r"densities of 0.weight; needed are those of 0.weight, 0.bias, "):
        synflow.prune(model, (1, 8, 8), {"0.weight": 0.1})
    with torch.no_grad():
        model[5].weight.fill_(1e30)
        model[2].weight.fill_(1e38)
    model.double()
    with torch.no_grad():
        model[0].weight.fill_(1e300)
    with pytest.raises(LtxError, match="overflows"):
        synflow.scores(model, (1, 8, 8))


def test_small_network_of_the_tests_is_prunable():
    assert list(prunable(small_cnn("relu"))) == ["0.weight", "0.bias", "2.weight", "2.bias", "5.weight", "5.bias"]
