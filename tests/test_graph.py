"""Tracing: masks in force, the same digest for the same target, refusals that name module and reason."""

import pytest
import torch
from conftest import images, small_cnn
from test_dags import random_net
from torch import nn

from ltx.errors import ConstructionError
from ltx.graph import run, trace


def test_parameters_in_force_are_masked():
    model = small_cnn("relu")
    layer = trace(model).layers["2"]
    assert torch.equal(layer.weight, (model[2].weight * model[2].weight_mask).detach())
    assert [n.op for n in trace(model).nodes] == [
        "input", "layer", "activation", "layer", "activation", "flatten", "layer", "output",
    ]  # fmt: skip


def test_counts_parameters_above_epsilon():
    layer = trace(small_cnn("relu")).layers["0"]
    kept = torch.cat([layer.weight.flatten(), layer.bias]).abs()
    assert layer.parameters_above(0.3) == int((kept > 0.3).sum())


def test_digest_is_of_the_parameters_in_force():
    model = small_cnn("relu")
    before = trace(model).digest()
    with torch.no_grad():
        model[2].weight[model[2].weight_mask == 0] = 5.0  # masked: not in force
    assert trace(model).digest() == before
    with torch.no_grad():
        model[2].weight[model[2].weight_mask == 1] += 1e-6
    assert trace(model).digest() != before


def test_functions_modules_and_dropout_give_one_graph():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 2, 3), nn.Linear(32, 2)

        def forward(self, x):
            x = nn.functional.leaky_relu(self.a(x), 0.2)
            return self.b(x.flatten(1))

    nodes = trace(Functional()).nodes
    assert [n.op for n in nodes] == ["input", "layer", "activation", "flatten", "layer", "output"]
    assert nodes[2].activation.slope_neg == 0.2
    modules = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Dropout(), nn.Identity(), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    assert [n.op for n in trace(modules).nodes] == [n.op for n in nodes]


@pytest.mark.parametrize(
    "pooled",
    [
        lambda x: x.mean((2, 3)),
        lambda x: x.mean([-1, -2]),
        lambda x: torch.mean(x, dim=(2, 3)),
        lambda x: torch.mean(input=x, dim=(2, 3), keepdim=True).flatten(1),
        lambda x: x.mean((2, 3), True).flatten(1),
        lambda x: nn.functional.avg_pool2d(x, 6).view(x.size(0), -1),
        lambda x: nn.functional.avg_pool2d(x, kernel_size=(6, 6), stride=2).flatten(1),
        lambda x: nn.functional.avg_pool2d(x, x.shape[2:]).flatten(1),
        lambda x: nn.functional.avg_pool2d(x, kernel_size=x.size()[-2:], stride=1).flatten(1),
        lambda x: nn.functional.avg_pool2d(x, [x.size(2), x.size(dim=-1)]).view(x.size(0), -1),
        lambda x: nn.functional.adaptive_avg_pool2d(x, 1).flatten(1),
    ],
)
def test_all_spellings_of_an_average_over_the_image(pooled):
    model = random_net(lambda s, x: s.d(pooled(torch.relu(s.a(x)))), a=nn.Conv2d(1, 2, 3), d=nn.Linear(2, 2))
    graph, x = trace(model), images(4, 8)
    *_, (_, value) = run(graph, x)
    with torch.no_grad():
        torch.testing.assert_close(value, model(x))
    assert graph.head == ("d",)


@pytest.mark.parametrize(
    "flat",
    [
        lambda x: x.view(-1, 72),
        lambda x: x.reshape(x.size(0), 72),
        lambda x: torch.relu(x.view(x.shape[0], 72)),
        lambda x: torch.reshape(x, (-1, 72)),
        lambda x: x.reshape(shape=(x.size(0), -1)),
    ],
)
def test_a_view_of_the_width_that_a_linear_layer_reads_flattens(flat):
    model = random_net(lambda s, x: s.d(flat(s.a(x))), a=nn.Conv2d(1, 2, 3), d=nn.Linear(72, 2))
    graph, x = trace(model), images(4, 8)
    assert "flatten" in [node.op for node in graph.nodes]
    *_, (_, value) = run(graph, x)
    with torch.no_grad():
        torch.testing.assert_close(value, model(x))


@pytest.mark.parametrize(
    "flat",
    [
        lambda x: x.view(-1, 36),
        lambda x: x.view(-1, 2, 36),
        lambda x: x.view(4, 72),
        lambda x: x.view(x.size(1), -1),
        lambda x: x.view(x.shape[-1], 72),
    ],
)
def test_other_views_are_refused(flat):
    model = random_net(lambda s, x: s.d(flat(s.a(x))), a=nn.Conv2d(1, 2, 3), d=nn.Linear(72, 2))
    with pytest.raises(ConstructionError, match=r"view.*keeps one row per image"):
        trace(model)


@pytest.mark.parametrize(
    "pooled",
    [
        lambda x: nn.functional.avg_pool2d(x, x.size(3)),  # all of the image only where it is square
        lambda x: nn.functional.avg_pool2d(x, (x.size(3), x.size(2))),
        lambda x: nn.functional.avg_pool2d(x, torch.relu(x).shape[2:]),  # of another tensor
        lambda x: nn.functional.avg_pool2d(x, 2, x.size(3)),
        lambda x: nn.functional.max_pool2d(x, x.shape[2:]),
        lambda x: nn.functional.adaptive_avg_pool2d(x, x.shape[2:]),
    ],
)
def test_pools_of_other_sizes_of_tensors_are_refused(pooled):
    model = random_net(lambda s, x: pooled(s.a(x)), a=nn.Conv2d(1, 2, 3))
    with pytest.raises(ConstructionError, match=r"pool2d.*both sides of it: avg_pool2d\(x, x.shape\[2:\]\)"):
        trace(model)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.Softmax(1)),
        nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.LogSoftmax(1)),
        random_net(lambda s, x: nn.functional.log_softmax(s.d(x.flatten(1)), 1), d=nn.Linear(4, 2)),
        random_net(lambda s, x: s.d(x.flatten(1)).softmax(1), d=nn.Linear(4, 2)),
    ],
)
def test_a_softmax_at_the_end_is_refused_with_what_to_do(model):
    with pytest.raises(ConstructionError, match="let the network return what is in front of it"):
        trace(model)


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else x


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x):
        return torch.add(self.conv(x), x, alpha=2)


class Two(nn.Module):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Branch(), "Branch cannot be traced.*control flow"),
        (Scaled(), "module 'add'.*only the sum of two streams"),
        (Two(), "returns several tensors; ltx constructs networks that return one tensor"),
        (nn.Sequential(nn.Conv2d(2, 2, 3, groups=2)), "module '0' .Conv2d.: only convolutions with groups=1"),
        (nn.Sequential(nn.Conv2d(1, 1, 3, padding_mode="reflect")), "padding_mode='zeros'"),
        (nn.Sequential(nn.Conv2d(1, 1, 2, padding="same")), "even kernel"),
        (nn.Sequential(nn.Conv2d(1, 1, 3), nn.Softsign()), "module '1' .Softsign.: not supported; there are Conv2d"),
        (nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False)), "without running statistics"),
        (nn.Sequential(nn.AvgPool2d(2, padding=1)), "module '0' .AvgPool2d.: ceil_mode, padding"),
        (nn.Sequential(nn.Flatten(2)), "start_dim=1"),
        (random_net(lambda s, x: s.a(x).mean(), a=nn.Conv2d(1, 1, 3)), "module 'mean' .mean.: only over height and"),
        (random_net(lambda s, x: s.a(x.mean(1)), a=nn.Conv2d(1, 1, 3)), "only over height and width"),
        (nn.Sequential(nn.LazyConv2d(2, 3)), "module '0' .LazyConv2d.: has no parameters yet; run it"),
        (random_net(lambda s, x: torch.add(s.a(x), x, out=x), a=nn.Conv2d(1, 1, 1)), "'add' .out=.: writes over"),
        (nn.Sequential(nn.MaxPool2d(2, dilation=2)), "return_indices and dilation are not supported"),
    ],
)
def test_refusals_name_module_and_reason(model, message):
    with pytest.raises(ConstructionError, match=message):
        trace(model)


def test_wrappers_are_looked_through():
    model = small_cnn("relu")
    digest = trace(model).digest()
    assert trace(torch.compile(model)).digest() == digest
    assert trace(nn.DataParallel(model)).digest() == digest


@pytest.mark.parametrize("no_network", [{}, nn.ReLU, 3])
def test_what_is_no_network(no_network):
    with pytest.raises(ConstructionError, match=r"is no torch\.nn\.Module; give the network itself"):
        trace(no_network)


def test_head_must_be_linear():
    graph = trace(nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU()))
    with pytest.raises(ConstructionError, match="no head to keep"):
        _ = graph.head


def test_tracing_leaves_the_mode_alone():
    model = small_cnn("relu").train()
    trace(model)
    assert model.training
