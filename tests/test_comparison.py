"""A network and what torch.fx has traced of it are compared, since it does not see what forward does to tensors."""

import numpy as np
import pytest
import torch
from conftest import images
from test_dags import random_net
from test_own import Outputs
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune

from ltx import Feedback, construct, evaluation, verify
from ltx.errors import ConstructionError
from ltx.graph import trace
from ltx.graph.comparison import require_same_outputs


class Forgetful(nn.Sequential):
    """What it computes depends on how often it was called."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) if self.calls == 1 else super().forward(x + x)


FX = {  # forward sees no torch.Tensor there
    "what is up to": lambda x: x + x if isinstance(x, torch.Tensor) else x,
    r"returns \(1, 6, 6\) .*, and what .* \(36,\)": lambda x: x if isinstance(x, torch.Tensor) else x.flatten(1),
    "returns a tuple, and what torch.fx has traced": lambda x: (x,) if isinstance(x, torch.Tensor) else x,
    "but not what torch.fx has traced": lambda x: x.flatten(1) if isinstance(x, torch.Tensor) else (
        nn.functional.max_pool2d(x, 9)),
}  # fmt: skip


@pytest.mark.parametrize("message", FX)
def test_what_torch_fx_does_not_see_is_found_on_images(message):
    model = Outputs(FX[message])
    with pytest.raises(ConstructionError, match=f"the network Outputs .*{message}"):
        trace(model, images(2))
    for shown in ((), (torch.zeros(1, 3, 6, 6),)):  # which it does not take
        with pytest.raises(ConstructionError, match="the network Outputs returns"):
            trace(model, *shown)


def test_construct_and_verify_compare_the_network_with_what_was_traced():
    shown, few = images(16), Feedback(samples=100)
    how = {"construction": "2L", "head": "construct", "base_set_size": 10}
    layers = (nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3))
    with pytest.raises(ConstructionError, match=r"the network Forgetful returns what .*from one call to the next"):
        construct(Forgetful(*layers), selection="feedback", calibration=shown, feedback=few, **how)
    with pytest.raises(ConstructionError, match=r"the network Forgetful returns what .*from one call to the next"):
        construct(Forgetful(*layers), **how)
    ticket = construct(nn.Sequential(*layers), **how)
    for given in ((), (shown,)):
        with pytest.raises(ConstructionError, match="keep nothing from one call to the next"):
            verify(ticket, Forgetful(*layers), *given)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e15])
def test_networks_of_any_size_are_what_was_traced(scale):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Sequential(nn.Conv2d(1 if n == 0 else 8, 8, 3, padding=1), nn.Tanh()) for n in range(12)), nn.Flatten()
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    for shown in (images(9), images(9).double()):
        trace(model, shown)
    trace(model.double(), images(9))
    head = nn.Linear(36, 1)
    head.weight, head.bias = nn.Parameter(torch.empty(0, 36)), nn.Parameter(torch.empty(0))
    trace(nn.Sequential(nn.Flatten(), head), images(9))


def test_the_images_are_not_written_to():
    """By a first operation in place, which neither the graph nor the next to read them is to see."""
    model = nn.Sequential(nn.LeakyReLU(0.3, inplace=True), nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3)).eval()
    shown = images(16, low=0.0) - 0.5
    before = shown.clone()
    how = {"construction": "2L", "head": "construct", "base_set_size": 10, "input_range": (-0.5, 0.5)}
    ticket = construct(model, selection="feedback", calibration=shown, feedback=Feedback(samples=100), **how)
    assert verify(ticket, model, shown).ok
    assert torch.equal(evaluation.outputs(model, shown), evaluation.outputs(model, shown))
    assert torch.equal(shown, before)

    def unseen(self, x):
        if torch.is_tensor(x):
            x -= 0.5
        return self.a(x)

    with pytest.raises(ConstructionError, match="what is up to"):
        trace(random_net(unseen, a=nn.Conv2d(1, 2, 3)), shown)


@pytest.mark.parametrize("name", ["changed", "with others", "half", "all modules"])
def test_what_modules_do_not_say(name):
    """Attributes that forward changes for a while, other parameters, float16, hooks on every module."""

    def run(self, x):
        if name == "changed":
            self.b.negative_slope = 0.5
            x = self.b(self.a(x))
            self.b.negative_slope = 0.01
            return x
        if name == "with others":
            return torch.func.functional_call(self.a, {"weight": self.other}, (x,))
        with torch.autocast("cpu", dtype=torch.float16, enabled=name == "half"):
            return self.a(x)

    model = random_net(run, a=nn.Conv2d(1, 2, 3), b=nn.LeakyReLU())
    model.register_buffer("other", torch.zeros(2, 1, 3, 3))
    with torch.no_grad():
        model.a.weight.mul_(1e5)
    hook = register_module_forward_hook(
        lambda module, _, out: out * 2 if name == "all modules" and isinstance(module, nn.Conv2d) else None
    )
    try:
        with pytest.raises(ConstructionError, match=r"returns what is up to|NaN or infinite numbers where"):
            trace(model)
    finally:
        hook.remove()


def test_an_output_that_differs_little_beside_a_large_one():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)
    layers[2].bias.data[0] = 1000.0  # of which 0.2 is less than 1e-3

    def slightly(self, x):
        return self.a(x) if not torch.is_tensor(x) else self.a(x) + torch.tensor([0.0, 0.2]).view(1, 2, 1, 1)

    with pytest.raises(ConstructionError, match=r"what is up to 0\.2 off .* of 1e"):
        trace(random_net(slightly, a=nn.Sequential(*layers)))


def test_a_network_that_takes_no_image_is_said_not_to_be_compared(caplog):
    def fails(self, x):
        if torch.is_tensor(x):
            raise RuntimeError("not now")
        return self.a(x)

    trace(random_net(fails, a=nn.Conv2d(1, 2, 3)))
    assert "the network Net takes none of the images that were tried" in caplog.text
    caplog.clear()
    for channels, layers in ((2, (nn.Conv2d(2, 2, 3),)), (3, (nn.Flatten(), nn.Linear(3 * 37**2, 2))),
                             (5, (nn.ReLU(), nn.BatchNorm2d(5), nn.Conv2d(5, 2, 40)))):  # fmt: skip
        trace(nn.Sequential(*layers))
        with pytest.raises(ConstructionError):
            trace(random_net(lambda s, x: s.a(-x if torch.is_tensor(x) else x), a=nn.Sequential(*layers)))
        assert not caplog.text, channels


@pytest.mark.parametrize("shown", [None, images(1), images(8)])
def test_dead_channels_behind_batch_norm(shown):
    """Without a variance to divide by their means, rounded, are 300 times as large, and once more behind others."""
    torch.manual_seed(14)
    layers, inside = [], 1
    for outside in (8, 8, 16, 16):
        layers += [nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside, momentum=None), nn.ReLU()]
        inside = outside
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 10))
    with torch.no_grad():
        for module in model:
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.mul_(torch.rand_like(module.weight) < 0.05)
        for _ in range(3):
            model(torch.rand(16, 1, 28, 28))
    graph = trace(model, shown)
    model.eval()
    with torch.no_grad():
        model[-1].bias[0] += 0.01  # which what was traced does not know of
    with pytest.raises(ConstructionError, match="what is up to"):
        require_same_outputs(model, graph, shown)


@pytest.mark.parametrize(
    "shown", [torch.tensor(1.0), torch.zeros(0, 1, 6, 6), images(2).to_sparse(), images(2).to("meta"), images(2)[:, 0]]
)
def test_noise_in_the_place_of_what_are_no_images(shown):
    trace(nn.Sequential(nn.Conv2d(1, 2, 3)), shown)
    with pytest.raises(ConstructionError, match="what is up to"):
        trace(random_net(lambda s, x: s.a(x + x if torch.is_tensor(x) else x), a=nn.Conv2d(1, 2, 3)), shown)


@pytest.mark.parametrize("dropout", [nn.AlphaDropout, nn.Dropout1d, nn.Dropout3d, nn.FeatureAlphaDropout])
def test_dropout_in_place_does_nothing(dropout):
    trace(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), dropout(0.5, inplace=True), nn.Conv2d(2, 2, 3)))


class Wrapper(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self._orig_mod = inside

    def forward(self, x):
        return self._orig_mod(-x)


class Cut(nn.DataParallel):
    def forward(self, x):
        return self.module(x)[:, :1]


@pytest.mark.parametrize("wrapper", [Wrapper, Cut])
def test_only_pytorch_s_wrappers_are_looked_into(wrapper):
    with pytest.raises(ConstructionError, match="not supported"):
        trace(wrapper(nn.Conv2d(1, 2, 3)))


class Twice(prune.BasePruningMethod):
    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t, default_mask):
        return default_mask

    def apply_mask(self, module):
        return 2 * super().apply_mask(module)


class Training(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(True)


def without_weight():
    model = nn.Sequential(nn.Conv2d(1, 2, 3))
    model[0].weight = None
    return model


def with_a_sparse_weight():
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 2))
    model[1].weight = nn.Parameter(model[1].weight.detach().to_sparse())
    return model


def with_another_bias(bias):
    model = nn.Sequential(nn.Conv2d(1, 2, 3))
    model[0].bias = nn.Parameter(bias)
    return model


def pruned_in_its_own_way():
    model = nn.Sequential(nn.Conv2d(1, 2, 3))
    Twice.apply(model[0], "weight")
    return model


class Uninitialised(nn.Module):
    def __init__(self):
        pass

    def forward(self, x):
        return x


def function(run):
    return lambda: random_net(lambda s, x: run(s.a(x), x), a=nn.Conv2d(1, 2, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (pruned_in_its_own_way, r"'0' \(Conv2d\): hooks may change what it computes"),
        (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), Training(2)), r"'1' \(Training\): is in training mode in eval mode"),
        (without_weight, r"'0' \(module\): not understood \(AttributeError"),
        (with_a_sparse_weight, r"'1' \(module\): not understood \(RuntimeError"),
        (lambda: with_another_bias(torch.zeros(3)), r"its bias is \(3,\), its weight \(2, 1, 3, 3\)"),
        (lambda: with_another_bias(torch.zeros(2).half()), "has float16 parameters"),
        (lambda: with_another_bias(torch.zeros(2, device="meta")), "has no values, it lies on the device 'meta'"),
        (Uninitialised, r"does not call super\(\).__init__\(\)"),
        (lambda: nn.Sequential(Uninitialised()), r"does not call super\(\).__init__\(\)"),
        (lambda: random_net(lambda s, x: s.input(s.input(x)), input=nn.Conv2d(1, 1, 3)), "'input' .layer.: used twice"),
        (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2.0)), "not understood .TypeError"),
        (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ELU("1")), "'1' .module.: not understood"),
        (function(lambda y, x: nn.functional.max_pool2d(y, None)), "'max_pool2d' .max_pool2d.: not understood"),
        (function(lambda y, x: nn.functional.leaky_relu(y, x.size(1))), "'leaky_relu' .leaky_relu.: not understood"),
        (function(lambda y, x: y.mean((y.ndim - 2, y.ndim - 1))), "only over height and width|not supported"),
        (function(lambda y, x: y.mean((2, None))), "only over height and width"),
    ],
)
def test_oddities_are_refused_in_one_line(make, message):
    with pytest.raises(ConstructionError, match=message) as caught:
        trace(make())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("module", "usual"),
    [
        (nn.MaxPool2d(np.int64(2)), nn.MaxPool2d(2)),
        (nn.LeakyReLU(np.float32(0.25)), nn.LeakyReLU(0.25)),
        (nn.ELU(torch.tensor(0.5)), nn.ELU(0.5)),
        (nn.Conv2d(2, 2, (3, 3), (2,), (1,)), nn.Conv2d(2, 2, 3, 2, 1)),
        (nn.Conv2d(2, 2, 3, np.int64(2)), nn.Conv2d(2, 2, 3, 2)),
        (nn.AdaptiveAvgPool2d((None, 3)), nn.AdaptiveAvgPool2d([None, 3])),
    ],
)
def test_other_kinds_of_numbers(module, usual):
    """What PyTorch takes for a number, or for two."""
    torch.manual_seed(0)
    first, last = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3, padding=1)
    usual.load_state_dict(module.state_dict())
    one, other = (trace(nn.Sequential(first, m, nn.ReLU(), last)) for m in (module, usual))
    assert one.digest() == other.digest()
    ticket = construct(one, construction="2L", head="construct", base_set_size=20)
    assert verify(ticket, other).ok


def test_rewound_weights_are_no_part_of_a_plain_layer():
    model = nn.Sequential(nn.Conv2d(1, 2, 3))
    digest = trace(model).digest()
    model[0].register_buffer("weight_orig", torch.zeros(2, 1, 3, 3))
    model[0].register_buffer("bias_mask", torch.ones(2))
    assert trace(model).digest() == digest
