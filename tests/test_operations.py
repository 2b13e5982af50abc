"""What the operations compute does not depend on the device, or on how it is computed there."""

import pytest
import torch
from torch import nn

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


@pytest.mark.gpu
def test_a_convolution_on_a_gpu_is_that_of_float32():
    arguments = convolution()
    on_gpu = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
    assert error(operations.affine(*on_gpu), *arguments) < 3e-6
    with torch.enable_grad():
        on_gpu[1].requires_grad_()
        operations.affine(*on_gpu).sum().backward()
    assert on_gpu[1].grad is not None
