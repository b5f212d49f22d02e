"""SRResNet's generator and discriminator: as the papers have them, for any size, and the published sizes."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stylegan_pg.networks.srresnet import Discriminator, Generator


def shaken(net: nn.Module, seed: int = 0) -> nn.Module:
    """The network in float64 with random weights, also where they begin as zeros and ones."""
    dice = torch.Generator().manual_seed(seed)
    net.double()
    with torch.no_grad():
        for p in net.parameters():
            p += 0.3 * torch.randn(p.shape, generator=dice, dtype=torch.float64) / max(p[0].numel(), 1) ** 0.5
    return net


def normalised(x: torch.Tensor, state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Batch normalisation of training: (x - mean) / sqrt(var + eps) * weight + bias, over batch and pixels."""
    mean = x.mean(dim=(0, 2, 3), keepdim=True)
    deviation = ((x - mean).square().mean(dim=(0, 2, 3), keepdim=True) + 1e-5).sqrt()
    shift = state.get(f"{name}.bias", torch.zeros(x.shape[1], dtype=x.dtype))
    return (x - mean) / deviation * state[f"{name}.weight"][:, None, None] + shift[:, None, None]


def shuffled(x: torch.Tensor) -> torch.Tensor:
    """Sub-pixel convolution's last step: channel 4 k + 2 a + b of pixel (i, j) is pixel (2 i + a, 2 j + b) of k."""
    n, c, h, w = x.shape
    result = x.new_zeros(n, c // 4, 2 * h, 2 * w)
    for a, b in itertools.product(range(2), range(2)):
        result[:, :, a::2, b::2] = x[:, 2 * a + b :: 4]
    return result


def expected_images(s: dict[str, torch.Tensor], z: torch.Tensor, c: torch.Tensor, depth: int, stages: int, size):
    x = (torch.cat([z, c], dim=1) @ s["first.0.weight"].T).reshape(len(z), -1, *size)
    x = first = F.relu(normalised(x, s, "first.2"))
    for i in range(depth):
        name = f"blocks.layers.{i}.layers"
        y = F.relu(normalised(F.conv2d(x, s[f"{name}.0.weight"], padding=1), s, f"{name}.1"))
        x = x + normalised(F.conv2d(y, s[f"{name}.3.weight"], padding=1), s, f"{name}.4")
    x = first + normalised(x, s, f"blocks.layers.{depth}")
    for i in range(stages):
        x = shuffled(F.conv2d(x, s[f"stages.{i}.0.weight"], padding=1))
        x = F.relu(normalised(x, s, f"stages.{i}.2"))
    return torch.tanh(F.conv2d(x, s["to_rgb.0.weight"], s["to_rgb.0.bias"], padding=4))


@pytest.mark.parametrize(
    ("resolution", "start", "base", "size", "stages"),
    [(16, 4, (4, 4), (4, 4), 2), (8, 8, (3, 5), (6, 10), 0), (8, 16, (4, 4), (8, 8), 0), (8, 4, (1, 2), (1, 2), 1)],
)
def test_the_generator_is_the_published_one(resolution, start, base, size, stages):
    how = {"resolution": resolution, "start": start, "base": base, "c_dim": 3, "z_dim": 5, "width": 4, "depth": 2}
    G = shaken(Generator(**how))
    z, c = torch.randn(6, 5, dtype=torch.float64), torch.randint(2, [6, 3]).double()
    expected = expected_images(dict(G.named_parameters()), z, c, 2, stages, size)
    found = G(z, c)
    assert found.shape == (6, 3, base[0] * resolution // 4, base[1] * resolution // 4)
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-11)
    y = torch.randn_like(found)
    names = [name for name, _ in G.named_parameters()]
    gradients = [
        torch.autograd.grad((images * y).sum(), [dict(G.named_parameters())[name] for name in names])
        for images in (found, expected)
    ]
    for name, ours, theirs in zip(names, *gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9, msg=name)
        assert ours.abs().max() > 1e-6, f"{name} is not trained"


def expected_scores(s: dict[str, torch.Tensor], x: torch.Tensor, depth: int, stages: int) -> torch.Tensor:
    place = 0
    for stage in range(stages):
        for _ in range(depth if stage else 0):
            name = f"main.{place}.layers"
            y = F.leaky_relu(F.conv2d(x, s[f"{name}.0.weight"], s[f"{name}.0.bias"], padding=1), 0.2)
            x = F.leaky_relu(x + F.conv2d(y, s[f"{name}.2.weight"], s[f"{name}.2.bias"], padding=1), 0.2)
            place += 1
        x = F.leaky_relu(F.conv2d(x, s[f"main.{place}.weight"], s[f"main.{place}.bias"], stride=2, padding=1), 0.2)
        place += 2
    return x.flatten(1) @ s["last.weight"].T + s["last.bias"]


@pytest.mark.parametrize(("resolution", "base", "stages"), [(16, (4, 4), 3), (8, (3, 5), 2), (16, (1, 4), 2)])
def test_the_discriminator_is_the_published_one(resolution, base, stages):
    how = {"resolution": resolution, "base": base, "channel_base": 32, "channel_max": 8, "outputs": 4}
    D = shaken(Discriminator(**how, depth=2))
    x = torch.randn(3, 3, base[0] * resolution // 4, base[1] * resolution // 4, dtype=torch.float64)
    x.requires_grad_(True)
    found, expected = D(x), expected_scores(D.state_dict(keep_vars=True), x, 2, stages)
    assert found.shape == (3, 4)
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-11)
    y = torch.randn_like(found)
    wanted = [x, *D.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad((o * y).sum(), wanted) for o in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in D.modules())


def test_the_published_sizes():
    """At 128x128 with 34 attributes: G's layers counted by hand, D's channels from 32 to 1024."""
    with torch.device("meta"):
        G = Generator(resolution=128, c_dim=34)
        D = Discriminator(resolution=128, outputs=35)
    first = (128 + 34) * 64 * 16 * 16 + 2 * 64
    blocks = 16 * (2 * 64 * 64 * 9 + 4 * 64) - 64 + 2 * 64  # the last one has no bias, see the module
    stages = 3 * (64 * 256 * 9 + 2 * 64)
    assert sum(p.numel() for p in G.parameters()) == first + blocks + stages + 64 * 3 * 81 + 3
    convolutions = [module for module in D.modules() if isinstance(module, nn.Conv2d) and module.stride == (2, 2)]
    assert [module.out_channels for module in convolutions] == [32, 64, 128, 256, 512, 1024]
    assert len([module for module in D.modules() if isinstance(module, nn.Conv2d)]) == 6 + 5 * 2 * 2
    assert (D.channels, D.feature_size, D.last.out_features) == (1024, (2, 2), 35)


def test_conditions_are_projected_on_the_first_output_only():
    D: Any = shaken(Discriminator(resolution=8, c_dim=3, channel_base=32, channel_max=4, depth=1, outputs=2))
    x, c = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.eye(3, dtype=torch.float64)[[0, 1, 2, 0]]
    plain = D.scores(D.features(x))
    fit = torch.stack([D.embed.weight[:, k] @ D.features(x)[i].sum(dim=(1, 2)) for i, k in enumerate((0, 1, 2, 0))])
    torch.testing.assert_close(D(x, c)[:, 0], plain[:, 0] + fit)
    torch.testing.assert_close(D(x, c)[:, 1], plain[:, 1])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"resolution": 12}, "resolution"),
        ({"resolution": 8, "depth": -1}, "depth"),
        ({"resolution": 8, "start": 5}, "start"),
    ],
)
def test_arguments_out_of_range(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Generator(**kwargs)
