"""What the operations compute does not depend on the device, or on how it is computed there."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from ltx import operations


def convolution(channels=145, out=130):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, channels, 9, 9, generator=generator)
    weight, bias = torch.randn(out, channels, 3, 3, generator=generator), torch.randn(out, generator=generator)
    return x, weight, bias, 2, 1, 1


def error(found, x, weight, bias, *others):
    exact = torch.conv2d(x.double(), weight.double(), bias.double(), *others)
    return float((found.cpu() - exact).norm() / exact.norm())


def rounded(x):
    """To TensorFloat-32, as a GPU does with the factors of a convolution."""
    return ((x.view(torch.int32) + (1 << 12)) & -(1 << 13)).view(torch.float32)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("channels", "out"), [(145, 130), (144, 132), (7, 5)])
def test_two_convolutions_of_fewer_bits_give_that_of_all(monkeypatch, channels, out, layout):
    plain = nn.functional.conv2d
    monkeypatch.setattr(nn.functional, "conv2d", lambda x, w, *rest: plain(rounded(x), rounded(w), *rest))
    x, *others = convolution(channels, out)
    assert error(nn.functional.conv2d(x, *others), x, *others) > 1e-4
    found = operations._in_two(x.to(memory_format=layout), *others)
    assert error(found, x, *others) < 1e-6
    assert torch.relu(found).is_contiguous(memory_format=torch.channels_last)
    without_bias = operations._in_two(x, others[0], None, *others[2:])
    torch.testing.assert_close(without_bias + others[1].view(-1, 1, 1), found)


def test_a_split_number_is_the_sum_of_its_parts():
    x = torch.cat([torch.randn(1000) * 10.0**k for k in range(-30, 30, 6)] + [torch.tensor([0.0, -0.0, 1.0])])
    high, low = operations._split(x)
    assert torch.equal(high + low, x)
    assert torch.equal(rounded(high), high)
    assert (low.abs() <= x.abs() * 2**-10).all()


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_what_is_more_than_numbers_is_one_convolution():
    """Derivatives, batches of torch.func and traces, of which what writes into given tensors knows nothing."""
    seen = []

    def look(x):
        seen.append(operations.value_alone(x))
        return x * 2

    x = torch.ones(3)
    look(x)
    with torch.no_grad():
        look(torch.ones(3, requires_grad=True))
    assert seen == [True, True]
    look(torch.ones(3, requires_grad=True))
    torch.func.jvp(look, (x,), (x,))
    torch.func.jacrev(look)(x)
    torch.func.vmap(look)(x[None])
    torch.jit.trace(look, x, check_trace=False)
    with forward_ad.dual_level():
        look(forward_ad.make_dual(x, x))
    assert seen[2:] == [False] * 6


@pytest.mark.gpu
def test_derivatives_and_batches_on_a_gpu():
    x, weight, bias, *how = (a.cuda() if isinstance(a, torch.Tensor) else a for a in convolution())
    plain = operations.affine(x, weight, bias, *how)
    value, tangent = torch.func.jvp(lambda x: operations.affine(x, weight, bias, *how), (x,), (x,))
    torch.testing.assert_close(value, plain, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(tangent, plain - bias.view(-1, 1, 1), rtol=1e-4, atol=1e-3)
    many = torch.vmap(lambda x: operations.affine(x, weight, bias, *how))(x[:, None])
    torch.testing.assert_close(many[:, 0], plain, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(operations.affine(x[0], weight, bias, *how), plain[0], rtol=1e-4, atol=1e-3)
    torch.set_float32_matmul_precision("high")
    try:
        exact = nn.functional.linear(x[:, :, 0, 0].double(), weight[:, :, 0, 0].double())
        found = operations.affine(x[:, :, 0, 0], weight[:, :, 0, 0], None)
        assert float((found - exact).norm() / exact.norm()) < 1e-6
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.gpu
def test_a_convolution_on_a_gpu_is_that_of_float32():
    arguments = convolution()
    on_gpu = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
    assert error(operations.affine(*on_gpu), *arguments) < 3e-6
    with torch.enable_grad():
        on_gpu[1].requires_grad_()
        operations.affine(*on_gpu).sum().backward()
    assert on_gpu[1].grad is not None
