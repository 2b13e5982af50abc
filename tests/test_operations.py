"""What the operations compute does not depend on the device, or on how it is computed there."""

import pytest
import torch
from torch import nn

from ltx import operations


def convolution():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 144, 9, 9, generator=generator)
    weight, bias = torch.randn(130, 144, 3, 3, generator=generator), torch.randn(130, generator=generator)
    return x, weight, bias, 2, 1, 1


def error(found, x, weight, bias, *others):
    exact = torch.conv2d(x.double(), weight.double(), bias.double(), *others)
    return float((found.cpu() - exact).norm() / exact.norm())


def rounded(x):
    """To TensorFloat-32, as a GPU does with the factors of a convolution."""
    return ((x.contiguous().view(torch.int32) + (1 << 12)) & -(1 << 13)).view(torch.float32)


def test_three_convolutions_of_fewer_bits_give_that_of_all(monkeypatch):
    plain = nn.functional.conv2d
    monkeypatch.setattr(nn.functional, "conv2d", lambda x, w, *rest: plain(rounded(x), rounded(w), *rest))
    arguments = convolution()
    assert error(nn.functional.conv2d(*arguments), *arguments) > 1e-4
    assert error(operations._in_three(*arguments), *arguments) < 1e-6


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
