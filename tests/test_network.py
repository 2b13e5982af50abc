"""The module that a ticket becomes: one set of parameters, whatever is done with it, and none of the ticket's."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

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


def inference_tensors(network):
    with torch.inference_mode():
        network.double().float()
        edit(network)


def another_storage(network):
    for buffer in network.buffers():
        buffer.data = perturbed(buffer)


def replaced(network):
    for name, buffer in list(network.named_buffers()):
        setattr(network, name, perturbed(buffer))


def replaced_by_parameters(network):
    for name, buffer in list(network.named_buffers()):
        if buffer.is_floating_point():
            setattr(network, name, nn.Parameter(perturbed(buffer)))


def swapped(network):
    for buffer in network.buffers():
        torch.utils.swap_tensors(buffer, perturbed(buffer))


def fused_optimiser(network):
    """Which does not count its changes."""
    trained = [buffer.requires_grad_() for buffer in network.buffers() if buffer.is_floating_point()]
    for buffer in trained:
        buffer.grad = torch.ones_like(buffer)
    torch.optim.SGD(trained, lr=0.01, fused=True).step()


def frozen_again(network):
    """A pass before the step, as there always is, sees that the parameters are trained."""
    floats = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
    for buffer in floats:
        buffer.requires_grad_()
    network(torch.rand(1, 3, 8, 8))
    fused_optimiser(network)
    for buffer in floats:
        buffer.requires_grad_(False)


def channels_last(network):
    network.to(memory_format=torch.channels_last)
    edit(network)


@pytest.mark.parametrize(
    "change",
    [
        load, edit, edit_kept_values_past_autograd, edit_in_inference_mode, inference_tensors, there_and_back,
        another_storage, replaced, replaced_by_parameters, swapped, fused_optimiser, frozen_again, channels_last,
    ],
)  # fmt: skip
@torch.no_grad()
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


def test_gradients_of_every_parameter(ticket, images):
    network, dense = ticket.to_module(), ticket.to_module(dense=True)
    network(images)
    names = [name for name, buffer in network.named_buffers() if buffer.is_floating_point()]
    for name in names:
        found, expected = (
            torch.autograd.grad(torch.func.functional_call(n, {name: value}, (images,))[:, 0].sum(), value)[0]
            for n in (network, dense)
            for value in (n.get_buffer(name).clone().requires_grad_(),)
        )
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    zero = {name: torch.zeros_like(network.get_buffer(name)) for name in names}
    assert not torch.func.functional_call(network, zero, (images,)).any()
    torch.testing.assert_close(network(images), dense(images), atol=1e-5, rtol=1e-4)


def test_what_asks_for_no_gradient_is_sparse(ticket, images):
    network = ticket.to_module()
    with torch.no_grad():
        network(images.requires_grad_())
    assert len(network._sparse) == 4  # of the first, which keeps too much for it, too


def test_other_types_are_dense(ticket, images):
    network, dense = ticket.to_module().double(), ticket.to_module(dense=True).double()
    torch.testing.assert_close(network(images.double()), dense(images.double()), atol=1e-12, rtol=1e-12)
    assert not sparse_layers(network)


@pytest.mark.parametrize("shape", [(4, 2, 8, 8), (4, 3, 2, 8), (4, 3, 8), (3, 8)])
def test_images_of_another_shape_are_refused_as_by_pytorch(ticket, shape):
    refused = []
    for dense in (True, False):
        network = ticket.to_module(dense=dense)
        network(torch.zeros(1, 3, 8, 8))
        with pytest.raises((RuntimeError, ValueError, IndexError)) as caught:
            network(torch.zeros(shape))
        refused.append(str(caught.value))
    assert refused[0] == refused[1]


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("bias", lambda bias: torch.cat([bias, torch.ones(5000)])),
        ("bias", lambda bias: bias[:1]),
        ("bias", None),
        ("weight", lambda weight: weight[:, :1]),
        ("weight", lambda weight: weight[:1]),
        ("weight", lambda weight: nn.functional.pad(weight, (1, 1, 1, 1))),
        ("weight", lambda weight: weight[..., :1, :1]),
    ],
)
def test_parameters_of_another_shape_are_used_or_refused_as_by_pytorch(ticket, images, part, change):
    results = []
    for dense in (True, False):
        network = ticket.to_module(dense=dense)
        network(images)
        for name, weight in list(network.named_buffers()):
            if weight.ndim == 4 and weight.shape[2] > 1:  # those that are sparse
                name = name.replace("weight", part)
                setattr(network, name, change and change(network.get_buffer(name)))
        try:
            results.append(network(images))
        except RuntimeError as error:
            results.append(str(error))
    if isinstance(results[0], str):
        assert results[0] == results[1]
    else:
        torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-4)


@JIT_IS_OLD
def test_tracers_and_exporters(ticket, images):
    network, expected = ticket.to_module(), ticket.to_module(dense=True)(images)
    network(images)
    exported = torch.export.export(network, (images,)).module()
    torch.testing.assert_close(exported(images), expected)
    traced = torch.jit.trace(network, images)
    torch.testing.assert_close(traced(images), expected)
    torch.testing.assert_close(torch.func.functionalize(network)(images), expected)
    recorded = make_fx(network)(images)
    torch.testing.assert_close(recorded(images / 2), ticket.to_module(dense=True)(images / 2))
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), expected)
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


@pytest.mark.parametrize("construction", ["2L", "L+1"])
@pytest.mark.parametrize("pair", [{}, {"pair_kernel": 3, "pair_stride": "first"}])
@torch.no_grad()
def test_a_sparse_module_computes_the_same_of_kept_entries_alone(model, images, construction, pair):
    strided = copy.deepcopy(model)
    strided[3].stride = (2, 2)
    ticket = ltx.construct(strided, construction=construction, base_set_size=20, input_range=(0.0, 1.0), **pair)
    usual, sparse = ticket.to_module(), ticket.to_module(outputs_only=True)
    for node in ("3", ticket.graph[-1].name):
        assert torch.equal(usual.run(images, keep=[node])[node], sparse.run(images, keep=[node])[node])
    values = [buffer for name, buffer in sparse.named_buffers() if name.endswith("_values")]
    assert len(values) == sparse_layers(usual) > 1
    assert all(value.ndim == 1 and len(value) <= ticket.parameters for value in values)
    assert max(buffer.numel() for buffer in usual.buffers()) > 4 * sum(buffer.numel() for buffer in sparse.buffers())
    twin = saved(copy.deepcopy(sparse))
    assert torch.equal(twin(images), usual(images))
    with torch.inference_mode():
        assert torch.equal(ticket.to_module(outputs_only=True)(images), usual(images))
    load(twin)
    assert not torch.allclose(twin(images), usual(images), atol=1e-3)


def test_what_a_sparse_module_does_not_give(ticket, images):
    sparse = ticket.to_module(outputs_only=True)
    parameters, values = torch.func.functional_call, {k: v.clone().requires_grad_() for k, v in sparse.named_buffers()}
    for refused in (
        lambda: sparse(images.clone().requires_grad_()),
        lambda: parameters(sparse, values, (images,)),
        lambda: torch.func.jacrev(sparse)(images),
        lambda: copy.deepcopy(sparse).double()(images.double()),
        lambda: make_fx(sparse)(images),
    ):
        with pytest.raises(LtxError, match=r"without gradients .* use ticket.to_module\(\)"):
            refused()
    with pytest.raises(LtxError, match=r"input of shape \(4, .*, 2, 8\): .* and at least 3 x 3 pixels"):
        sparse(images[:, :, :2])
    dense = ticket.to_module(outputs_only=True, dense=True)
    assert dense(images.clone().requires_grad_()).requires_grad
