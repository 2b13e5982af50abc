"""The module that a ticket becomes: one set of parameters, whatever is done with it, and none of the ticket's."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import ltx
from ltx import export
from ltx.errors import LtxError

JIT_IS_OLD = pytest.mark.filterwarnings(  # and PyTorch uses it for tangents itself
    "ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning"
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 2),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def ticket(model):
    return ltx.construct(model, construction="2L", base_set_size=20, input_range=(0.0, 1.0))


@pytest.fixture
def images():
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def sparse_layers(network):
    return sum(layer.convolution is not None for layer in network._sparse.values())


def perturbed(value):
    """Every entry, those that were zero too."""
    return value + 0.01 if value.is_floating_point() else value


def load(network):
    network.load_state_dict({name: perturbed(value) for name, value in network.state_dict().items()})


def edit(network):
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer += 0.01


def edit_kept_values_past_autograd(network):
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.data.mul_(1.5)


def edit_in_inference_mode(network):
    with torch.inference_mode():
        edit(network)


def there_and_back(network):
    network.double().float().requires_grad_(False)
    edit(network)


def channels_last(network):
    network.to(memory_format=torch.channels_last)
    edit(network)


@pytest.mark.parametrize(
    "change", [load, edit, edit_kept_values_past_autograd, edit_in_inference_mode, there_and_back, channels_last]
)
def test_changed_parameters_are_those_that_run(ticket, images, change):
    network, dense = ticket.to_module(), ticket.to_module(dense=True)
    before = network(images)
    torch.testing.assert_close(before, dense(images), atol=1e-5, rtol=1e-4)
    assert sparse_layers(network) == 3
    change(network)
    change(dense)
    after = network(images)
    assert not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(after, dense(images), atol=1e-4, rtol=1e-4)


def saved(network):
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network)), saved])
def test_a_copy_has_parameters_of_its_own(ticket, images, copied):
    network = ticket.to_module()
    before = network(images)
    edit(network)  # behind the use, ahead of the copy
    twin = copied(network)
    edited = network(images)
    assert torch.equal(twin(images), edited)
    assert sparse_layers(twin) == sparse_layers(network)
    edit(network)
    assert torch.equal(twin(images), edited)
    assert not torch.allclose(before, edited)


def test_nothing_that_is_made_of_a_ticket_shares_its_memory(ticket, model, images):
    first, second = ticket.to_module(), ticket.to_module()
    expected = second(images)
    edit(first)
    for value in export.state_dict(ticket).values():
        value += 1
    masked = export.masked_network(ticket)
    with torch.no_grad():
        for value in (*masked.parameters(), *masked.buffers()):
            if value.is_floating_point():
                value += 1
    assert torch.equal(second(images), expected)
    assert ltx.verify(ticket, model).ok


@JIT_IS_OLD
def test_derivatives_of_every_kind(ticket, images):
    network, dense = ticket.to_module(), ticket.to_module(dense=True)
    along = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    network(images)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(images, along)
        found, expected = (forward_ad.unpack_dual(n(dual)).tangent for n in (network, dense))
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.func.jvp(network, (images,), (along,))[1], expected)
    torch.testing.assert_close(torch.vmap(lambda x: network(x[None])[0])(images), dense(images), atol=1e-5, rtol=1e-4)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(
            torch.einsum("noabcd,abcd->no", jacobian(network)(images), along), expected, atol=1e-5, rtol=1e-4
        )
    assert sparse_layers(network) == 3
    named = {name: buffer.clone() for name, buffer in network.named_buffers()}
    weight = named[next(name for name in named if name.endswith("_weight"))].requires_grad_()
    output = torch.func.functional_call(network, named, (images,))
    assert torch.autograd.grad(output.sum(), weight)[0].abs().sum() > 0
    with torch.no_grad():  # nothing is asked for
        weight.zero_()
        other = torch.func.functional_call(network, named, (images,))
        assert not torch.allclose(other, network(images))


@JIT_IS_OLD
def test_tracers_and_exporters(ticket, images):
    network, expected = ticket.to_module(), ticket.to_module(dense=True)(images)
    network(images)
    exported = torch.export.export(network, (images,)).module()
    torch.testing.assert_close(exported(images), expected)
    traced = torch.jit.trace(network, images)
    torch.testing.assert_close(traced(images), expected)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert network(mode.from_tensor(images)).shape == expected.shape


def test_dense_is_never_sparse(ticket, images):
    network = ticket.to_module(dense=True)
    network(images)
    assert not sparse_layers(network)


def test_a_layer_that_is_not_there(ticket):
    names = ", ".join(layer.name for layer in ticket.layers)
    for asked in (ticket.layer, ticket.kept, ticket.weight, ticket.bias):
        with pytest.raises(LtxError, match=f"the ticket has no layer 'nope'; there are {names}"):
            asked("nope")
