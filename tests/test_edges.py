"""Networks at the edges: what a construction, a ticket's module or a verification could get wrong unnoticed."""

import sys

import pytest
import torch
from conftest import images, small_cnn, without_parameters
from torch import nn
from torch.nn.utils import parametrizations, prune

from ltx import LtxError, construct, verify
from ltx.activations import leaky_relu
from ltx.errors import ConstructionError
from ltx.graph import trace

two_for_one = sys.modules["ltx.constructions.two_for_one"]  # the package has a function of that name
both = pytest.mark.parametrize("construction", ["2L", "L+1"])


def close(model, x, *, tolerance=0.1, **arguments):
    """Construct, verify and run a ticket; it must be near its target in shape and value."""
    ticket = construct(model, base_set_size=18, epsilon=0.002, **arguments)
    assert verify(ticket, trace(model)).violations == ()
    with torch.no_grad():
        theirs, ours = model.double()(x.double()), ticket.to_module().double()(x.double())
        single = ticket.to_module()(x.float())
    model.float()
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < tolerance
    torch.testing.assert_close(single.double(), ours, atol=1e-3, rtol=1e-3)
    return ticket


def sequential(*modules):
    return nn.Sequential(*modules).eval()


@both
def test_channels_and_pixels_of_the_image_that_nothing_reads(construction):
    model = sequential(nn.Flatten(), nn.Linear(36, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        model[1].weight[:, 5] = 0
    close(model, images(), construction=construction)
    for first in (nn.Tanh(), nn.MaxPool2d(2)):
        model = sequential(first, nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        with torch.no_grad():
            model[1].weight[:, 0] = 0
        close(model, torch.rand(4, 3, 6, 6), construction=construction, head="construct")
    model = sequential(nn.Tanh(), nn.Conv2d(40, 4, 1), nn.ReLU())
    with torch.no_grad():
        model[1].weight[:, ::2] = 0
    close(model, torch.rand(4, 40, 6, 6), construction=construction, head="construct")


@both
def test_names_that_differ_in_a_dot_only(construction):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(1, 4, 3, padding=1)
            self.l = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1)])
            self.l_0 = nn.Conv2d(4, 4, 3, padding=1)
            self.relu = nn.ReLU()  # one module, used three times
            self.input = nn.Conv2d(4, 2, 1)

        def forward(self, x):
            for layer in (self.first, self.l[0], self.l_0):
                x = self.relu(layer(x))
            return self.input(x)

    torch.manual_seed(0)
    close(Named().eval(), images(), construction=construction, head="construct", tolerance=0.2)


@both
def test_a_network_that_ends_flattened(construction):
    model = sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten())
    close(model, images(), construction=construction, head="construct")


@both
@pytest.mark.parametrize("epsilon", [0.05, 0.1, 0.003])
def test_a_parameter_of_epsilon_itself(construction, epsilon):
    """float32(epsilon) may lie above epsilon: one rule says so everywhere."""
    model = small_cnn("relu", bias=False)
    with torch.no_grad():
        model[2].weight[:, 2] = 0
        model[2].weight[0, 2, 1, 1] = epsilon
        model[2].weight_mask[0, 2, 1, 1] = 1
        model[2].bias[1] = epsilon
    for head in ("keep", "construct"):
        ticket = construct(model, construction=construction, epsilon=epsilon, head=head)
        assert verify(ticket, trace(model)).violations == ()


@both
@pytest.mark.parametrize("empty", ["0", "2", "5", "02", "025"])
def test_layers_without_parameters(construction, empty):
    for activation in ("relu", "sigmoid"):
        model = without_parameters(small_cnn(activation), *empty)
        for head in ("keep", "construct"):
            close(model, images(), construction=construction, head=head)


@both
def test_a_layer_without_bias_needs_no_constant_tap(construction):
    model = sequential(nn.Conv2d(1, 3, 2, padding=1, bias=False), nn.ReLU(), nn.Conv2d(3, 2, 2, padding=1, bias=False))
    close(model, images(), construction=construction, head="construct")


def test_pruned_by_torch():
    model = small_cnn("relu")
    plain = sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))
    prune.random_unstructured(plain[0], "weight", 0.5)
    stale = {k: v.clone() * 0.5 if k.endswith("orig") else v.clone() for k, v in plain.state_dict().items()}
    plain.load_state_dict(stale)  # module.weight is the old one until the next forward
    assert torch.equal(trace(plain).layers["0"].weight, (plain[0].weight_orig * plain[0].weight_mask).detach() + 0.0)
    close(plain, images())
    assert trace(model).layers


class Standardised(nn.Conv2d):
    def forward(self, input):
        return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)


class StandardisedInside(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean(), bias)


class Halved(nn.BatchNorm2d):
    def forward(self, input):
        return 0.5 * super().forward(input)


def replaced(model, name, function, method="forward"):
    """The model with another function in place of a module's own."""
    setattr(model.get_submodule(name), method, function)
    return model


def doubled(model, name):
    """The model with a hook that doubles what a module gives."""
    model.get_submodule(name).register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


def test_batch_norm_that_torch_pruned_counts_with_its_mask():
    model = sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3))
    prune.random_unstructured(model[1], "weight", 1)
    model.load_state_dict({k: v * 0.5 if k == "1.weight_orig" else v for k, v in model.state_dict().items()})
    norm = trace(model)["1"].batch_norm
    assert norm is not None
    assert int((norm.scale == 0).sum()) == 1
    assert float(norm.scale.max()) == pytest.approx(0.5, abs=1e-4)
    close(model, images(), head="construct", scaling="layer_max")


def test_what_float32_cannot_tell_from_the_offset_is_refused():
    """Softplus has no bound: behind some layers its pairs are scaled down until phi(0) swallows what they copy."""

    def deep(depth, phi):
        layers = [m for n in range(depth) for m in (nn.Conv2d(6 if n else 1, 6, 3, padding=1), phi())]
        return sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))

    how = {"construction": "2L", "base_set_size": 20, "scaling": "layer_max", "head": "construct"}
    x = torch.rand(16, 1, 8, 8)
    for model in (deep(3, nn.Softplus), deep(7, nn.SiLU), deep(7, nn.Sigmoid)):
        ticket = construct(model, input_range=(0, 1), **how)
        with torch.no_grad():
            single, double = ticket.to_module()(x), ticket.to_module().double()(x.double())
        assert (single - double).abs().max() < 0.01
    with pytest.raises(
        ConstructionError, match=r"opposite rows of softplus .* float32 rounds a parameter by up to 0.\d"
    ):
        construct(deep(7, nn.Softplus), input_range=(0, 1), **how)
    assert verify(construct(deep(7, nn.Softplus), input_range=(0, 1), **{**how, "construction": "L+1"})).ok


def test_a_smaller_epsilon_that_float32_cannot_keep_is_said(caplog):
    model = sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Softplus(), nn.Conv2d(2, 2, 3, padding=1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(0))
    how = {"base_set_size": 24, "head": "construct", "scaling": "layer_max"}
    construct(model, epsilon=1e-2, **how)
    assert not caplog.records
    ticket = construct(model, epsilon=1e-4, **how)
    (record,) = caplog.records
    assert "layer 0: float32 rounds a parameter behind opposite rows of softplus" in record.getMessage()
    x = images()
    with torch.no_grad():
        single, double = ticket.to_module()(x), ticket.to_module().double()(x.double())
        theirs = model.double()(x.double())
    assert (double - theirs).abs().max() < 1e-2 < 10 * (single - theirs).abs().max()


def test_a_network_in_training_is_traced_as_in_eval_mode_and_left_alone():
    model = sequential(parametrizations.spectral_norm(nn.Conv2d(1, 4, 3)), nn.ReLU(), nn.Conv2d(4, 2, 1))
    evaluated = trace(model).digest()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    assert trace(model).digest() == evaluated
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class AddsTwice(nn.Module):
    def __init__(self, add):
        super().__init__()
        self.first, self.second, self.add = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1), add

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.add(x, self.second(x))


def test_biases_behind_a_second_layer_that_reads_the_image():
    class Wide(nn.Module):
        def __init__(self, bias):
            super().__init__()
            self.wide, self.conv = nn.Linear(36, 2), nn.Conv2d(1, 2, 3, bias=False)
            self.head = nn.Linear(32, 2, bias=bias)

        def forward(self, x):
            return self.wide(x.flatten(1)) + self.head(torch.relu(self.conv(x)).flatten(1))

    construct(Wide(False), head="construct")
    with pytest.raises(
        ConstructionError, match=r"layer conv: .*constants that biases of head need.*what is behind it b"
    ):
        construct(Wide(True), head="construct")


def test_what_may_help_is_what_is_not_there_already():
    model = sequential(nn.Conv2d(1, 2, 3, bias=False), nn.ReLU(), nn.Conv2d(2, 2, 3, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(20)
    for scaling, advised in (("unit", True), ("layer_max", False)):
        with pytest.raises(LtxError, match="raise m or epsilon") as caught:
            construct(model, head="construct", scaling=scaling, base_set_size=5, epsilon=1e-4)
        assert ("scaling=layer_max" in str(caught.value)) == advised


def test_batch_norm_beyond_float32():
    model = sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2, eps=0.0), nn.ReLU(), nn.Conv2d(2, 2, 3))
    with torch.no_grad():
        model[0].weight.mul_(1e30)
        model[1].running_var.fill_(1e-30)
    with pytest.raises(ConstructionError, match="batch norm '1' makes parameters of layer '0' that are beyond float32"):
        construct(model, head="construct", batch_norm="fold")
    with torch.no_grad():
        model[1].weight.fill_(1e30)
    with pytest.raises(ConstructionError, match=r"module '1' \(BatchNorm2d\): its scale has NaN or infinite entries"):
        trace(model)


def test_leaky_relu_without_a_slope_is_never_negative():
    """So that a pair behind it needs base sets of one sign alone, as behind ReLU."""
    sizes = []
    for phi in (nn.ReLU(), nn.LeakyReLU(0.0)):
        torch.manual_seed(0)
        model = sequential(nn.Conv2d(1, 3, 3), phi, nn.Conv2d(3, 2, 3))
        sizes.append(construct(model, construction="2L", base_set_size=18, head="construct").source_parameters)
    assert sizes[0] == sizes[1]


@pytest.mark.filterwarnings("ignore:This overload of add is deprecated")
def test_refusals():
    hooked = nn.Linear(4, 2)
    hooked.register_forward_pre_hook(lambda module, args: None)
    broken = nn.Linear(4, 2)
    with torch.no_grad():
        broken.weight[0, 0] = float("nan")

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x):
            return self.conv(self.conv(x))

    for model, message in (
        (sequential(Standardised(1, 2, 3)), "forward of its own"),
        (sequential(StandardisedInside(1, 2, 3)), r"module '0' \(StandardisedInside\): .*_conv_forward of its own"),
        (sequential(nn.Conv2d(1, 2, 3), Halved(2)), r"module '1' \(Halved\): .*forward of its own"),
        (replaced(sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), "1", torch.tanh), r"\(ReLU\): its forward was replaced"),
        (replaced(sequential(nn.Conv2d(1, 2, 3)), "", torch.tanh), r"\(Sequential\): its forward was replaced"),
        (
            replaced(sequential(nn.Conv2d(1, 2, 3)), "0", nn.functional.conv2d, "_conv_forward"),
            r"module '0' \(Conv2d\): its _conv_forward was replaced",
        ),
        (AddsTwice(lambda x, y: torch.add(x, 2, y)), "only the sum of two streams"),
        (AddsTwice(lambda x, y: x.add(2, y)), "only the sum of two streams"),
        (AddsTwice(lambda x, y: torch.add(x, y, alpha=2)), "only the sum of two streams"),
        (sequential(nn.Flatten(), hooked), "hooks"),
        (doubled(sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), "1"), r"module '1' \(ReLU\): hooks"),
        (doubled(sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), "1"), r"module '1' \(BatchNorm2d\): hooks"),
        (doubled(sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), ""), r"\(Sequential\): hooks"),
        (sequential(nn.Flatten(), broken), "weight has NaN"),
        (Twice(), "used twice"),
        (sequential(nn.Conv2d(1, 2, 3), nn.LeakyReLU(-0.5)), "must not be negative"),
        (sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Linear(4, 2)), "nn.Flatten.. in front"),
        (sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), "layer 0: .*nn.Flatten.. in front"),
    ):
        with pytest.raises(ConstructionError, match=message):
            construct(model, head="construct")


def test_modes_of_the_modules_stay():
    model = small_cnn("relu")
    model.train()
    model[2].eval()
    trace(model)
    assert model.training
    assert not model[2].training


def test_targets_that_differ_in_structure_only_have_other_digests():
    conv, relu = nn.Conv2d(1, 1, 3, padding=1), nn.ReLU()
    variants = [
        nn.Sequential(conv, relu), nn.Sequential(relu, conv), nn.Sequential(conv, nn.LeakyReLU(0.1)),
        nn.Sequential(conv, nn.LeakyReLU(0.2)), nn.Sequential(conv, relu, nn.MaxPool2d(2)),
        nn.Sequential(conv, relu, nn.MaxPool2d(2, 1)),
    ]  # fmt: skip
    assert len({trace(v).digest() for v in variants}) == len(variants)


def test_leaky_slopes_above_one():
    model = sequential(nn.Conv2d(1, 3, 3, padding=1), leaky_relu(1.5).module())
    close(model, images(), head="construct")
    with pytest.raises(LtxError, match="negative"):
        trace(sequential(nn.Conv2d(1, 3, 3), nn.LeakyReLU(-1.0)))
