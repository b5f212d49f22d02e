"""The blur of what D sees, compared with torch's convolution in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import steady
import torch
import torch.nn.functional as F
from test_steady_steps import TINY, steps_of

from stylegan_pg.augment import blur
from stylegan_pg.config.loading import load_config
from stylegan_pg.networks import NetworkShape
from stylegan_pg.systems.gan import GAN


def reference(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """2^-(x/sigma)^2 within floor(3 sigma) along both axes, with zeros around the image."""
    r = math.floor(3 * sigma)
    line = torch.tensor([2.0 ** -((i / sigma) ** 2) for i in range(-r, r + 1)], dtype=torch.float64)
    f = torch.outer(line, line)
    kernel = (f / f.sum())[None, None].repeat(x.shape[1], 1, 1, 1)
    return F.conv2d(x.double(), kernel, padding=r, groups=x.shape[1])


@pytest.mark.parametrize("size", [(16, 16), (7, 13), (1, 5), (2, 1)])
@pytest.mark.parametrize("sigma", [0.34, 1.0, 2.71, 10.0])
def test_the_values(size, sigma):
    for channels, dtype, limit in ((3, torch.float32, 1e-6), (1, torch.float64, 1e-6), (4, torch.bfloat16, 0.02)):
        x = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1)).to(dtype)
        for given in (x, x.to(memory_format=torch.channels_last)):
            y = blur.blur(given, blur.taps(sigma, x.device))
            assert (y.dtype, y.shape) == (x.dtype, x.shape)
            torch.testing.assert_close(y.double(), reference(x, sigma), rtol=limit, atol=limit)


def test_the_filter():
    assert [blur.radius(s) for s in (0, 0.3, 0.34, 1, 10, 170)] == [0, 0, 1, 3, 30, 510]
    for sigma in (0.34, 5.0, 170.0):
        f = blur.taps(sigma, torch.device("cpu"))
        assert f.numel() == 2 * blur.radius(sigma) + 1
        assert float(f.sum()) == pytest.approx(1, abs=1e-6)
        assert torch.equal(f, f.flip(0))
    wide = blur.blur(torch.ones(1, 1, 700, 700), blur.taps(100.0, torch.device("cpu")))
    assert float(wide[0, 0, 350, 350]) == pytest.approx(1, abs=1e-5)  # a constant stays, but for the borders
    assert float(wide[0, 0, 0, 0]) == pytest.approx(0.25, abs=0.01)


def test_derivatives():
    f = blur.taps(0.7, torch.device("cpu"))
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: blur.blur(t, f), x)
    assert torch.autograd.gradgradcheck(lambda t: blur.blur(t, f).square().sum(), x)


def system_of(*overrides: str) -> Any:
    given = [f"{key}={value}" for key, value in TINY.items() if key not in ("growth.start",)]
    config = load_config(None, [*given, "data.url=x", "run=x", "growth.start=16", "model.noise=false", *overrides])
    system = GAN(config)
    system.build(NetworkShape(16, 16, False, 3, 0, 4), None)
    return system


class Fixed:
    """As much of a context as a score needs."""

    def __init__(self, nimg: int):
        self.step: Any = type("Step", (), {"nimg": nimg, "resolution": 16, "alpha": 1.0, "device": torch.device("cpu")})
        self.alpha = 1.0

    def once(self, key: Any, make: Any) -> Any:
        return make()


@pytest.mark.parametrize("nimg", [0, 500, 1000])
def test_what_d_is_shown_and_the_gradient_of_r1(nimg):
    """Sigma fades from 2 to 0 within 1000 images."""
    system = system_of("loss.blur_sigma={from: 2, to: 0, kimg: 1}")
    x = torch.randn(4, 3, 16, 16, requires_grad=True)
    sigma = 2 - nimg / 500
    blurred = reference(x, sigma).float() if sigma else x
    ours = system.score(Fixed(nimg), "any", x)
    torch.testing.assert_close(ours, system.D(blurred), rtol=1e-4, atol=1e-5)
    (grad,) = torch.autograd.grad(ours.sum(), x, create_graph=True)
    (other,) = torch.autograd.grad(system.D(blurred).sum(), x, create_graph=True)
    torch.testing.assert_close(grad, other, rtol=1e-3, atol=1e-5)
    (second,) = torch.autograd.grad(grad.square().sum(), system.D.b16.fromrgb.weight)
    (wanted,) = torch.autograd.grad(other.square().sum(), system.D.b16.fromrgb.weight)
    torch.testing.assert_close(second, wanted, rtol=1e-3, atol=1e-4)


def test_without_blur_nothing_is_done(monkeypatch):
    monkeypatch.setattr(blur, "blur", lambda *_: pytest.fail("it blurs"))
    for override in ("loss.blur_sigma=0", "loss.blur_sigma=0.33", "loss.blur_sigma_at={8: 3}"):
        system = system_of(override)
        x = torch.randn(4, 3, 16, 16)
        assert torch.equal(system.score(Fixed(0), "any", x), system.D(x))


def test_it_comes_before_augmentation():
    """Cut-out leaves sharp edges in what D sees."""
    system = system_of("loss.blur_sigma=3", "augment={mode: fixed, pipeline: o, p: 1}")
    maker, order = system.augment, []

    class Watched:
        def draw(self, *given: Any) -> Any:
            return maker.draw(*given)

        def instructions(self, *given: Any) -> Any:
            return maker.instructions(*given)

        def perform(self, images: torch.Tensor, how: Any) -> torch.Tensor:
            order.append(images)
            return maker.perform(images, how)

    system.augment = Watched()
    x = torch.randn(4, 3, 16, 16)
    context: Any = Fixed(0)
    context.count = 4

    class Streams:
        nimg = 0

        def __call__(self, purpose: str) -> torch.Generator:
            return torch.Generator().manual_seed(0)

    context.draw = lambda key, make: make(Streams())
    shown = system.shown(context, "any", x)
    torch.testing.assert_close(order[0], reference(x, 3).float(), rtol=1e-4, atol=1e-5)
    assert bool((shown == 0).any())


def test_steps_with_a_blur_are_steady(tiny_data, monkeypatch):
    """The filter is made on the device, also while sigma changes (here within a radius)."""

    for sigma in ("1", "{from: 1.3, to: 1.01, kimg: 0.1}"):
        off = ["loss.r1_gamma=0", "loss.pl_weight=0"]
        assert steady.problems(steps_of(tiny_data, monkeypatch, *off, f"loss.blur_sigma={sigma}")) == []
