"""Parameters of several layers scaled, stacked and normed in one operation; passes of two batches at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from nets import CLASSES, KINDS, close, discriminator, labels, normal
from torch.autograd import gradcheck, gradgradcheck

from stylegan_pg.networks import equalized, modulation
from stylegan_pg.networks.layers import FullyConnected, affine_outputs
from stylegan_pg.networks.modulation import ModulatedConv2d, styles_of
from stylegan_pg.planning.operations import Operations

EQUAL, SMALLER = [(2, 3), (2, 3)], [(4, 1), (2, 3), (1, 2)]


def tensors(shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    return [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


def scale(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(equalized.scaled(given, [0.5, 1, 3][: len(given)]))


def stack(*given: torch.Tensor) -> torch.Tensor:
    return equalized.stacked(given, [2.0] * len(given))


def there_and_back(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(equalized.unstacked(stack(*given), [t.shape for t in given]))


def norms(*given: torch.Tensor) -> torch.Tensor:
    return modulation.squared_norms([t[:, :, None, None] * torch.ones(3, 3) for t in given])


@pytest.mark.parametrize("shapes", [EQUAL, SMALLER])
@pytest.mark.parametrize("function", [scale, stack, there_and_back, norms])
def test_derivatives(function: Callable[..., torch.Tensor], shapes):
    given = tensors(shapes)
    assert gradcheck(function, given)
    assert gradgradcheck(function, given)


@pytest.mark.parametrize("shapes", [EQUAL, SMALLER])
@pytest.mark.parametrize("function", [scale, stack, there_and_back, norms])
def test_the_same_where_a_compiler_sees_plain_operations(function: Callable[..., torch.Tensor], shapes, monkeypatch):
    ours = function(*tensors(shapes))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    plain = function(*tensors(shapes))
    for one, other in zip(ours, plain, strict=True):
        assert torch.equal(one, other)


def test_values_and_padding():
    a, b = tensors([(1, 2), (2, 1)])
    assert torch.equal(stack(a, b), 2 * torch.stack([F.pad(a, (0, 0, 0, 1)), F.pad(b, (0, 1))]))
    assert all(map(torch.equal, there_and_back(a, b), [2 * a, 2 * b]))
    weight = normal(3, 2, 5, 5)
    close(modulation.squared_norms([weight, weight[:1, :1]])[0], weight.square().sum([2, 3]))
    assert modulation.squared_norms([weight, weight[:1, :1]])[1, 1:].abs().sum() == 0


def test_gradients_of_some_tensors_only():
    a, b = tensors(EQUAL)
    b.requires_grad_(False)
    (first, second), both = equalized.scaled([a, b], [2.0, 3.0]), stack(a, b)
    (first.sum() + second.sum() + both[0].sum()).backward()
    assert (a.grad == 4).all()
    assert b.grad is None


def test_many_layers_are_scaled_by_one_operation_in_each_direction():
    layers = [FullyConnected(3, 3, lr_multiplier=0.1) for _ in range(5)]
    with Operations() as operations:
        ready = equalized.scaled_parameters(*layers)
        torch.stack([t.sum() for each in ready for t in each]).sum().backward()
    assert operations.counts()["_foreach_mul"] == 2
    assert operations.counts()["mul"] == 0
    for layer, (weight, bias) in zip(layers, ready, strict=True):
        assert torch.equal(weight, layer.weight * layer.weight_gain)
        assert torch.equal(bias, layer.bias * 0.1)


def test_layers_of_several_sizes_together_equal_each_alone():
    kinds = [(4, 3, True), (4, 3, False), (2, 5, True), (6, 1, True)]
    layers = [ModulatedConv2d(i, o, 7, 3, demodulate=d).double() for i, o, d in kinds]
    ws, places = normal(2, 3, 7), [0, 2, 1, 2]
    every = styles_of(layers, ws, places)
    for layer, place, (s, d) in zip(layers, places, every, strict=True):
        wanted = layer.affine(ws[:, place]) * layer.style_gain
        close(s, wanted, 1e-12)
        assert s.is_contiguous()
        if layer.demodulate:
            assert d is not None
            close(
                d, ((layer.weight[None] * wanted[:, None, :, None, None]).square().sum([2, 3, 4]) + 1e-8).rsqrt(), 1e-12
            )
        else:
            assert d is None
    outputs = affine_outputs([layer.affine for layer in layers], ws, places)
    assert outputs.shape == (4, 2, 6)
    assert outputs[2, :, 2:].abs().sum() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [{}, {"c_dim": CLASSES}, {"fade": True}, {"mbstd_group": 2}, {"mbstd_channels": 0}])
def test_two_batches_in_one_pass_are_scored_as_each_alone(kind, how):
    D = discriminator(16, kind=kind, **how)
    images, c = normal(8, 3, 16, 16), labels(8) if "c_dim" in how else None
    blend = {"alpha": 0.3} if "fade" in how else {}
    with torch.no_grad():
        together = D(images, c, batches=2, **blend)
        alone = [D(images[i : i + 4], None if c is None else c[i : i + 4], **blend) for i in (0, 4)]
    close(together, torch.cat(alone), 1e-12)
    if how.get("mbstd_channels") != 0:
        with torch.no_grad():
            assert not torch.allclose(D(images, c, **blend), together)
