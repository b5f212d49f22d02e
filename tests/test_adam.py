"""Adam with numbers on the device, against PyTorch's own with numbers of the host."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stylegan_pg.optim.adam import DeviceAdam, Rates

SHAPES = ((3, 4), (5,), ())


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=g, dtype=dtype)) for shape in SHAPES]


def gradients(step: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=g, dtype=dtype) * 10 ** (step % 3) for shape in SHAPES]


def rates_at(step: int) -> Rates:
    return Rates(0.001 * (1 + step), 0.5, 0.9 + 0.009 * step)


@pytest.mark.parametrize("beta2_moves", [False, True])
@pytest.mark.parametrize("beta1", [0.0, 0.5])
def test_as_torch_computes_it(beta1, beta2_moves):
    ours, theirs = parameters(), parameters()
    adam = DeviceAdam(ours, rates_at(0), 1e-8, capturable=False, beta2_moves=beta2_moves)
    for step in range(8):
        rates = rates_at(step)._replace(beta1=beta1)
        adam.use(rates)
        if step == 0:
            reference = torch.optim.Adam(theirs, eps=1e-8, foreach=False)
        reference.param_groups[0].update(rates.of_adam())
        for mine, yours, grad in zip(ours, theirs, gradients(step), strict=True):
            mine.grad, yours.grad = grad.clone(), grad.clone()
        if step == 3:  # no gradient: the step leaves this one out
            ours[1].grad = theirs[1].grad = None
        adam.make_step(torch.zeros([]))
        reference.step()
        for mine, yours in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, yours, rtol=1e-12, atol=1e-12)
            for kind in ("exp_avg", "exp_avg_sq", "step"):
                torch.testing.assert_close(
                    adam.state[mine][kind].double(), reference.state[yours][kind].double(), rtol=1e-12, atol=1e-12
                )


@pytest.mark.parametrize("beta2_moves", [False, True])
@pytest.mark.parametrize("first", [0, 2])
def test_a_step_that_is_held_changes_nothing(beta2_moves, first):
    """Also if it is the first one, and if gradients are not finite."""
    ours = parameters(torch.float32)
    adam = DeviceAdam(ours, rates_at(0), 1e-8, capturable=False, beta2_moves=beta2_moves)
    for step in range(first):
        for p, grad in zip(ours, gradients(step, torch.float32), strict=True):
            p.grad = grad
        adam.make_step(torch.zeros([]))
    before = [p.detach().clone() for p in ours]
    moments = [t.clone() for p in ours for t in adam.state[p].values()]
    for p, bad in zip(ours, (float("inf"), float("nan"), 1.0), strict=True):
        p.grad = torch.full_like(p, bad)
    adam.make_step(torch.ones([]))
    assert all(torch.equal(p, old) for p, old in zip(ours, before, strict=True))
    if first:
        now = [t for p in ours for t in adam.state[p].values()]
        assert all(torch.equal(t, old) for t, old in zip(now, moments, strict=True))
    else:
        assert all(not t.any() for p in ours for t in adam.state[p].values())


def test_a_beta2_very_near_1():
    """1 - beta2 is below the rounding of float32."""
    rates, ours, theirs = Rates(0.1, 0.0, 1 - 1e-9), parameters(torch.float32), parameters(torch.float32)
    adams = [DeviceAdam(p, rates, 1e-12, False, beta2_moves=moves) for p, moves in ((ours, True), (theirs, False))]
    for step in range(3):
        for params, adam in zip((ours, theirs), adams, strict=True):
            for p, grad in zip(params, gradients(step, torch.float32), strict=True):
                p.grad = grad
            adam.make_step(torch.full([], float(step == 0)))
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, yours, rtol=1e-3, atol=1e-3)


def test_the_numbers_stay_where_they_are():
    adam = DeviceAdam(parameters(), rates_at(0), 1e-8, capturable=False, beta2_moves=True)
    places = adam.lr.data_ptr(), adam.beta2.data_ptr()
    adam.use(rates_at(5))
    assert (adam.lr.data_ptr(), adam.beta2.data_ptr()) == places
    assert (adam.lr.item(), adam.beta2.item()) == (rates_at(5).lr, rates_at(5).beta2)
