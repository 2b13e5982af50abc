"""The sparse convolution equals the dense one."""

import pytest
import torch
from torch import nn

from ltx.sparse_conv import SparseConvolution


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 3)])
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (2, 0)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 1)])
def test_equals_dense(kernel, stride, padding, dilation):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 4, *kernel, generator=generator)
    weight *= torch.rand(weight.shape, generator=generator) < 0.3
    weight[2] = 0
    bias = torch.randn(5, generator=generator)
    x = torch.randn(3, 4, 9, 11, generator=generator)
    flat = weight.flatten(1)
    rows, offsets = flat.nonzero(as_tuple=True)
    convolution = SparseConvolution(
        rows, offsets, shape=(5, 4), kernel=kernel, stride=stride, padding=padding, dilation=dilation,
    )  # fmt: skip
    dense = nn.functional.conv2d(x, weight, bias, stride, padding, dilation)
    torch.testing.assert_close(convolution(x, flat[rows, offsets], bias), dense, atol=1e-5, rtol=1e-5)
