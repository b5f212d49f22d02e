"""Grouped convolutions and their derivatives, compared with PyTorch's."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import LAYOUTS, close, numbers
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

import stylegan_pg.planning.cost  # noqa: F401  # which tells the FLOP counter of the operators
from stylegan_pg.ops import grouped_conv
from stylegan_pg.planning.cost import Meter

# images, input and output channels, groups, rows, columns, rows and columns of the kernel, padding
SHAPES = [
    (2, 6, 9, 3, 5, 7, 3, 3, 1),
    (3, 8, 8, 8, 4, 6, 4, 6, 0),
    (1, 4, 2, 1, 3, 3, 3, 3, 1),
    (2, 4, 4, 2, 1, 1, 3, 3, 1),
    (2, 10, 20, 5, 8, 3, 1, 3, 2),
]


def operands(shape: Any, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, dict[str, int]]:
    n, ins, outs, groups, rows, columns, kh, kw, padding = shape
    x = numbers(n, ins, rows, columns, dtype=dtype).requires_grad_(True)
    weight = numbers(outs, ins // groups, kh, kw, seed=1, dtype=dtype).requires_grad_(True)
    return x, weight, {"groups": groups, "padding": padding}


def derivatives(function: Any, x: torch.Tensor, weight: torch.Tensor, how: dict[str, int]) -> list[torch.Tensor]:
    """The value, both gradients, and the gradients of the sum of their squares."""
    y = function(x, weight, **how)
    first = torch.autograd.grad(y.square().sum(), [x, weight], create_graph=True)
    second = torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), [x, weight])
    return [y, *first, *second]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_derivatives_are_those_of_torch(shape, layout):
    x, weight, how = operands(shape)
    expected = derivatives(F.conv2d, x, weight, how)
    given = [t.detach().contiguous(memory_format=layout).requires_grad_(True) for t in (x, weight)]
    found = derivatives(grouped_conv, given[0], given[1], how)
    for got, want in zip(found, expected, strict=True):
        close(got, want, 1e-12)
    assert found[0].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_derivatives_are_those_of_differences(shape):
    x, weight, how = operands(shape)
    assert gradcheck(lambda a, b: grouped_conv(a, b, **how), [x, weight])
    assert gradgradcheck(lambda a, b: grouped_conv(a, b, **how), [x, weight])


def test_one_gradient_without_the_other():
    x, weight, how = operands(SHAPES[0])
    dx, dw = torch.autograd.grad(grouped_conv(x, weight, **how).sum(), [x, weight])
    assert torch.equal(torch.autograd.grad(grouped_conv(x, weight.detach(), **how).sum(), x)[0], dx)
    assert torch.equal(torch.autograd.grad(grouped_conv(x.detach(), weight, **how).sum(), weight)[0], dw)


def test_half_precision():
    x, weight, how = operands(SHAPES[0], torch.bfloat16)
    exact = [t.detach().double().requires_grad_(True) for t in (x, weight)]
    found, expected = derivatives(grouped_conv, x, weight, how), derivatives(F.conv2d, exact[0], exact[1], how)
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == torch.bfloat16
        close(got.double(), want, 0.05)


def test_a_second_derivative_takes_as_many_operations_for_any_number_of_groups():
    """PyTorch's takes some for each group."""

    def operations(function: Any, groups: int) -> int:
        x, weight, how = operands((2, 32, 32, groups, 4, 4, 3, 3, 1))
        with Meter() as meter, torch.device("meta"):
            derivatives(function, x.to("meta"), weight.to("meta"), how)
        return meter.launches

    assert operations(grouped_conv, 2) == operations(grouped_conv, 32)
    assert operations(F.conv2d, 2) < operations(F.conv2d, 32)


@pytest.mark.parametrize("shape", SHAPES)
def test_flops_are_those_of_the_definition(shape):
    x, weight, how = operands(shape)
    n, ins, outs, groups, rows, columns, kh, kw, padding = shape
    one = 2 * n * outs * (rows + 2 * padding - kh + 1) * (columns + 2 * padding - kw + 1) * kh * kw * ins // groups
    with FlopCounterMode(display=False) as counter:
        y = grouped_conv(x, weight, **how)
        assert counter.get_total_flops() == one
        first = torch.autograd.grad(y.sum(), [x, weight], create_graph=True)
        assert counter.get_total_flops() == 3 * one
        torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), [x, weight])
    assert counter.get_total_flops() >= 5 * one


@pytest.mark.parametrize(
    ("x", "weight", "how"),
    [
        (torch.zeros(1, 4, 3, 3), torch.zeros(4, 4, 3, 3), {"groups": 2}),
        (torch.zeros(1, 4, 3, 3), torch.zeros(3, 2, 3, 3), {"groups": 2}),
        (torch.zeros(1, 4, 3, 3), torch.zeros(4, 2, 3, 3).double(), {"groups": 2}),
        (torch.zeros(4, 3, 3), torch.zeros(4, 2, 3, 3), {"groups": 2}),
        (torch.zeros(1, 4, 3, 3), torch.zeros(4, 2, 3, 3), {"groups": 0}),
        (torch.zeros(1, 4, 2, 3), torch.zeros(4, 2, 3, 3), {"groups": 2}),
        (torch.zeros(1, 4, 3, 3), torch.zeros(4, 2, 3, 3), {"groups": 2, "padding": -1}),
    ],
)
def test_wrong_shapes_are_refused(x, weight, how):
    with pytest.raises(ValueError, match=r"^grouped_conv: "):
        grouped_conv(x, weight, **how)
