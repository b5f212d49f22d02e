"""Networks of every kind grow without a jump and use all their parameters."""

import pytest
import torch
from nets import CLASSES, KINDS, close, differ, discriminator, generator, labels, normal

from stylegan_pg.networks import copy_same_names
from stylegan_pg.ops import downsample2d, upsample2d


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("low", [4, 8])
@torch.no_grad()
def test_the_generator_grows_without_a_jump(low, kind):
    old = generator(low, kind=kind)
    fading = generator(2 * low, 1, kind=kind, fade=True)
    fresh = copy_same_names(fading, old)
    assert fresh
    assert all(name.startswith(f"synthesis.b{2 * low}.") for name in fresh)

    z, ws = normal(3, 8), normal(3, fading.num_ws, fading.w_dim, seed=1)
    filter_ = old.synthesis.filter
    at_start = fading.synthesis(ws, alpha=0.0)
    assert torch.equal(at_start, upsample2d(old.synthesis(ws[:, : old.num_ws]), filter_))
    assert torch.equal(fading(z, alpha=0.0), upsample2d(old(z), filter_))

    stable = generator(2 * low, 2, kind=kind)
    assert copy_same_names(stable, fading) == []
    at_end = fading.synthesis(ws, alpha=1.0)
    assert torch.equal(at_end, stable.synthesis(ws))
    close(stable.synthesis(ws, alpha=0.3), at_end)  # alpha has no effect outside a fade
    differ(at_start, at_end)
    close(fading.synthesis(ws, alpha=0.25), 0.75 * at_start + 0.25 * at_end)


@pytest.mark.parametrize("c_dim", [0, CLASSES])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("low", [4, 8])
@torch.no_grad()
def test_the_discriminator_grows_without_a_jump(low, kind, c_dim):
    kwargs = {"kind": kind, "c_dim": c_dim}
    old = discriminator(low, **kwargs)
    fading = discriminator(2 * low, 1, fade=True, **kwargs)
    assert all(name.startswith(f"b{2 * low}.") for name in copy_same_names(fading, old))

    x, c = normal(4, 3, 2 * low, 2 * low), labels(4) if c_dim else None
    at_start = fading(x, c, alpha=0.0)
    assert torch.equal(at_start, old(downsample2d(x, old.filter), c))

    stable = discriminator(2 * low, 2, **kwargs)
    assert copy_same_names(stable, fading) == []
    at_end = fading(x, c, alpha=1.0)
    assert torch.equal(at_end, stable(x, c))
    close(stable(x, c, alpha=0.3), at_end)
    differ(at_start, at_end)
    for alpha in (0.001, 0.999):  # the output is continuous in alpha
        nearest = at_start if alpha < 0.5 else at_end
        assert float((fading(x, c, alpha=alpha) - nearest).abs().max()) < 0.1 * float((at_start - at_end).abs().max())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_growing_a_non_square_grid(kind):
    old, fading = (generator(r, kind=kind, base=(4, 6), fade=r > 4) for r in (4, 8))
    assert all(name.startswith("synthesis.b8.") for name in copy_same_names(fading, old))
    close(fading(z := normal(2, 8), alpha=0.0), upsample2d(old(z), old.synthesis.filter))
    old, fading = (discriminator(r, kind=kind, base=(4, 6), fade=r > 4) for r in (4, 8))
    copy_same_names(fading, old)
    x = normal(2, 3, 8, 12)
    close(fading(x, alpha=0.0), old(downsample2d(x, old.filter)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("fade", "c_dim"), [(False, 0), (True, 0), (True, CLASSES)])
@pytest.mark.parametrize("resolution", [8, 16])
def test_every_parameter_is_used(resolution, kind, fade, c_dim):
    G = generator(resolution, kind=kind, fade=fade, c_dim=c_dim)
    D = discriminator(resolution, kind=kind, fade=fade, c_dim=c_dim)
    c = labels(4) if c_dim else None
    image = G(normal(4, 8), c, alpha=0.4, noise="random", generator=torch.Generator().manual_seed(0))
    D(image, c, alpha=0.4).square().sum().backward()
    for net in (G, D):
        for name, p in net.named_parameters():
            assert p.grad is not None, name
            assert p.grad.abs().max() > 0, name
