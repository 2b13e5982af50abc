"""Networks of the user's own: traced, constructed, verified; what does not work is refused in one line."""

import pytest
import torch
from conftest import deviation, images
from torch import nn

from ltx import construct, verify
from ltx.errors import ConstructionError
from ltx.graph import trace


def narrow(name, width):
    """A network of torchvision with layers that are narrower by `width`, a tenth of its weights, for 32x32 images."""
    import torchvision

    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=3, weights=None)
    generator = torch.Generator().manual_seed(0)

    def thinner(channels):
        return max(2, channels // width)

    for parent in [*model.modules()]:
        for key, child in [*parent.named_children()]:
            if isinstance(child, nn.Conv2d):
                inside = 3 if child.in_channels == 3 else thinner(child.in_channels)
                new = nn.Conv2d(inside, thinner(child.out_channels), child.kernel_size, child.stride, child.padding,
                                bias=child.bias is not None)  # fmt: skip
            elif isinstance(child, nn.BatchNorm2d):
                new = nn.BatchNorm2d(thinner(child.num_features))
                new.running_mean.normal_(0, 0.1, generator=generator)
                new.running_var.uniform_(0.5, 1.5, generator=generator)
            elif isinstance(child, nn.Linear):
                inside = (
                    thinner(child.in_features // 49) * 49 if child.in_features % 49 == 0 else thinner(child.in_features)
                )
                new = nn.Linear(inside, 3 if child.out_features == 3 else thinner(child.out_features))
            elif isinstance(child, nn.AdaptiveAvgPool2d) and child.output_size == (7, 7):
                new = nn.AdaptiveAvgPool2d(7)
            else:
                continue
            setattr(parent, key, new)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                kept = torch.rand(module.weight.shape, generator=generator) < 0.1
                module.weight.copy_((torch.rand(module.weight.shape, generator=generator) * 1.6 - 0.8) * kept)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("construction", ["2L", "L+1"])
@pytest.mark.parametrize(
    ("name", "width"), [("resnet18", 16), ("resnet34", 32), ("vgg11_bn", 32), ("squeezenet1_1", 16)]
)
def test_networks_of_torchvision(name, width, construction):
    model = narrow(name, width)
    graph = trace(model)
    ticket = construct(graph, construction=construction, base_set_size=20, epsilon=0.01, head="construct",
                       scaling="layer_max")  # fmt: skip
    assert verify(ticket, graph).ok
    assert {layer.target for layer in ticket.layers} == set(graph.layers)
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    if construction == "2L":
        assert 0 < float(deviation(model, ticket, x).max()) < 0.5


def test_ways_to_write_the_same_network():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 2, 3), nn.Linear(8, 2)

        def forward(self, x):
            x = nn.functional.max_pool2d(torch.relu(self.conv(x)), 2)
            x = nn.functional.dropout(x, training=self.training, inplace=True)
            return self.head(x.view(x.size(0), -1))

    class Reshaped(Written):
        def forward(self, x):
            x = nn.functional.max_pool2d(nn.functional.relu(self.conv(x), inplace=True), kernel_size=2, stride=2)
            return self.head(torch.reshape(x, (x.shape[0], -1)))

    torch.manual_seed(0)
    one, other = Written(), Reshaped()
    other.load_state_dict(one.state_dict())
    layers = nn.Sequential(one.conv, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), one.head)
    kinds = [[node.op for node in trace(model).nodes] for model in (one, other, layers)]
    assert kinds[0] == kinds[1] == kinds[2]
    assert trace(one).digest() == trace(other).digest()


@pytest.mark.parametrize(
    "mean", [lambda x: x.mean((2, 3), keepdims=True), lambda x: torch.mean(a=x, dim=(-1, -2), keepdim=True),
             lambda x: x.mean(axis=(2, 3), keepdim=True), lambda x: torch.mean(input=x, axis=(2, 3), keepdims=True)],
)  # fmt: skip
def test_means_by_the_names_of_numpy(mean):
    model = Outputs(lambda x: mean(torch.relu(x)))
    digest = trace(model, images(2)).digest()
    for keepdim in (True, False):
        model.how = lambda x, keepdim=keepdim: torch.relu(x).mean((2, 3), keepdim=keepdim)
        assert (trace(model).digest() == digest) == keepdim


class Outputs(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.conv, self.how = nn.Conv2d(1, 1, 1), how

    def forward(self, x):
        return self.how(self.conv(x))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Called(nn.Sequential):
    def __call__(self, x):
        return super().__call__(x / 2)


def complex_layer():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten())
    model[0].weight = nn.Parameter(torch.zeros(1, 1, 1, 1, dtype=torch.complex64))
    return model


def with_nan():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten())
    with torch.no_grad():
        model[0].weight.fill_(torch.nan)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.Conv2d(2, 2, 1, groups=2)), r"module '0' \(Conv2d\): only convolutions with groups"),
        (lambda: nn.Sequential(nn.ConvTranspose2d(1, 1, 2)), r"module '0' \(ConvTranspose2d\): not supported; there"),
        (Attention, r"module 'attention' \(MultiheadAttention\): not supported; there are"),
        (lambda: nn.Sequential(nn.Conv2d(1, 1, 1), nn.Mish()), r"module '1' \(Mish\): not supported; there are"),
        (lambda: nn.Sequential(nn.Conv2d(1, 1, 1)).half(), r"module '0' \(Conv2d\): has float16 parameters, ltx takes"),
        (complex_layer, r"module '0' \(Conv2d\): has complex64 parameters, ltx takes float32; call model.float\(\)"),
        (with_nan, r"module '0' \(Conv2d\): its weight has NaN or infinite entries"),
        (lambda: Outputs(lambda x: (x, x)), "the network returns several tensors; ltx"),
        (lambda: Outputs(lambda x: {"out": x}), "the network returns a collection of tensors"),
        (lambda: Outputs(lambda x: 3), "the network returns no tensor; ltx constructs networks that return one tensor"),
        (lambda: Outputs(lambda x: x if x.sum() > 0 else -x), "cannot be traced by torch.fx"),
        (lambda: Outputs(lambda x: nn.functional.dropout(x)), r"\(dropout\): is at work in eval mode too"),
        (lambda: Called(nn.Conv2d(1, 1, 1)), r"\(Called\): has a __call__ of its own; say in forward"),
        (lambda: Outputs(lambda x: x.mean((2, 3), dtype=torch.float64)), r"\(mean\): only over height and width"),
        (lambda: Outputs(lambda x: x.view(4, -1)), r"\(view\): only view\(x.size\(0\), -1\), or view\(-1, N\)"),
    ],
)  # fmt: skip
def test_what_is_refused(make, message):
    with pytest.raises(ConstructionError, match=message) as caught:
        trace(make())
    assert "\n" not in str(caught.value)


def test_what_torch_fx_has_traced_is_traced_again():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 1, 1))
    assert trace(torch.fx.symbolic_trace(model)).digest() == trace(model).digest()


def test_images_of_many_sizes():
    """Adaptive pooling is the same function of slots as of channels, whatever the image."""
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d((2, 3)), nn.Flatten(), nn.Linear(12, 3)
    ).eval()
    ticket = construct(model, construction="2L", base_set_size=20)
    for size in (5, 6, 9):
        assert float(deviation(model, ticket, images(4, size)).max()) < 0.2
