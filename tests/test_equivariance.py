"""The equivariance metrics: of ideal pictures, of known errors, of StyleGAN3, and of generators that cannot move."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from measuring import CPU

from stylegan_pg.checkpoint.snapshot import load_snapshot
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.errors import UsageError
from stylegan_pg.metrics.base import Settings
from stylegan_pg.metrics.equivariance import differences, rotation_filter, translated
from stylegan_pg.metrics.evaluate import Evaluator
from stylegan_pg.metrics.registry import parse
from stylegan_pg.networks.stylegan3 import Generator


class Waves:
    """A generator of pictures that are sums of waves of the coordinates, and so follow every transformation exactly.

    `fastest` is the highest frequency in cycles per pixel; `wrong` moves transformed pictures by that share of the
    transformation too little, and `noise` is a standard deviation.
    """

    z_dim, c_dim, img_channels = 8, 0, 3

    def __init__(self, size: tuple[int, int], fastest: float = 0.3, wrong: float = 0.0, noise: float = 0.0):
        self.img_size, self.resolution, self.wrong, self.noise = size, 4 * size[0] // 4, wrong, noise
        self.synthesis: Any = self._images
        g = torch.Generator().manual_seed(0)
        angles, radii = torch.rand(8, generator=g) * 2 * math.pi, torch.rand(8, generator=g) * fastest * size[0]
        self.waves = torch.stack([angles.cos(), angles.sin()], dim=1) * radii[:, None]
        put = SimpleNamespace(transform=torch.eye(3))
        self.synthesis = type("S", (), {"input": put, "__call__": staticmethod(self._images)})()

    def styles(self, z, c=None, *, psi=1.0):
        return z[:, None]

    def _images(self, ws, noise="const"):
        transform = self.synthesis.input.transform.double()
        transform = torch.lerp(transform, torch.eye(3, dtype=torch.float64), self.wrong)
        rows, columns = self.img_size
        y = (torch.arange(rows, dtype=torch.float64) - (rows - 1) / 2) / self.resolution
        x = (torch.arange(columns, dtype=torch.float64) - (columns - 1) / 2) / self.resolution
        places = torch.stack([*torch.meshgrid(x, y, indexing="xy"), torch.ones(rows, columns)], dim=2).double()
        places = places @ transform[..., :2, :].expand(len(ws), 2, 3).transpose(1, 2)[:, None]
        phases = places @ self.waves.t().double() + ws[:, :, None]
        image = (2 * math.pi * phases).sin().mean(dim=3, keepdim=True).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
        return (image + self.noise * torch.randn(image.shape)).float()


def measured(G: Any, how: str, count: int = 6) -> float:
    """Decibels."""
    z = torch.randn(count, G.z_dim, generator=torch.Generator().manual_seed(1))
    found = differences(G, how, z, torch.rand(count, 2, generator=torch.Generator().manual_seed(2)), None)
    assert (found[:, 1] > 0).all()
    total, pixels = found.sum(dim=0).tolist()
    return 10 * math.log10(4 / max(total / pixels, 1e-15))


@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
@pytest.mark.parametrize(("how", "least"), [("t_int", 110), ("t_frac", 50), ("r", 50)])
def test_a_picture_that_follows_exactly(size, how, least):
    """Only filters and float32 limit the ratio."""
    assert measured(Waves(size), how) > least


@pytest.mark.parametrize("how", ["t_int", "t_frac", "r"])
def test_a_picture_that_does_not_follow(how):
    values = [measured(Waves((64, 64), fastest=0.1, wrong=wrong), how) for wrong in (0.0, 0.01, 1.0)]
    assert values[0] > values[1] + 5 > values[2] + 10
    assert values[2] < 25


def test_noise_has_the_ratio_that_its_variance_says():
    """Differences of two images with noise of standard deviation s have the variance 2 s^2."""
    assert measured(Waves((64, 64), noise=0.05), "t_int") == pytest.approx(10 * math.log10(4 / (2 * 0.05**2)), abs=0.1)


def test_whole_translations_are_exact_and_their_borders_invalid():
    images = torch.rand(2, 3, 5, 7)
    moved, valid = translated(images, torch.tensor([[2.0, -1.0], [0.0, 0.0]], dtype=torch.float64), whole=True)
    assert torch.equal(moved[0, :, :4, 2:], images[0, :, 1:, :5])
    assert torch.equal(moved[1], images[1])
    assert valid[0].nonzero().tolist() == [[y, x] for y in range(4) for x in range(2, 7)]
    assert valid[1].all()


def test_a_rotation_filter_restricts_to_both_squares():
    """Its frequency response is 1 in the intersection of the squares, and 0 outside of either."""
    f = rotation_filter(math.pi / 4)
    assert f.sum() == pytest.approx(1)
    x = torch.arange(-32, 33, dtype=torch.float64) / 4
    for (u, v), expected in {(0.2, 0.2): 1, (0.3, 0.0): 1, (0.45, 0.45): 0, (0.75, 0.0): 0}.items():
        wave = (2 * math.pi * (u * x[None] + v * x[:, None])).cos()
        assert float((f * wave).sum()) == pytest.approx(expected, abs=0.05)


def small(resolution: int, seed: int = 0, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    how = {"z_dim": 16, "w_dim": 16, "channel_base": 32 * resolution, "channel_max": 24, "conv_clamp": 256.0}
    G = Generator(**{"resolution": resolution, **how, **kwargs}).eval()
    with torch.no_grad():  # pictures of about the range [-1, 1], so that the ratio is not that of grey pictures
        image = G(torch.randn(8, 16))
        getattr(G.synthesis, G.synthesis.names[-1]).weight.mul_(0.5 / image.std())
    return G


def test_config_t_follows_translation():
    G = small(64)
    assert measured(G, "t_int", 3) > 50
    assert measured(G, "t_frac", 3) > 35


def test_config_r_follows_rotation():
    turning = {"kernel": 1, "radial": True}
    values = {kind: measured(small(64, **how), "r", 3) for kind, how in (("T", {}), ("R", turning))}
    assert values["R"] > 30
    assert values["R"] > values["T"] + 10


def test_by_name_for_any_batch(tiny_data, snapshot):
    index = load_index(str(tiny_data))
    names = ["eqt_int9", "eqt_frac9", "eqt_int9_psi0.5"]
    G = small(16, base=[4, 4])
    G.description = {}
    values = []
    for batch in (4, 9):
        evaluator = Evaluator(index, 16, [parse(name) for name in names], Settings(CPU, batch=batch))
        values.append(evaluator(G))
    assert list(values[0]) == names
    assert list(values[0].values()) == pytest.approx(list(values[1].values()), abs=0.05)
    assert torch.equal(G.synthesis.input.transform, torch.eye(3))
    assert not parse("eqr50k").lower_is_better
    assert parse("eqr").count == parse("eqr50k").count == 50_000
    other = load_snapshot(snapshot)
    for name in ("eqt_int16", "eqt_frac16", "eqr16"):
        with pytest.raises(UsageError, match=f"{name} needs a generator whose input can be translated and rotated"):
            Evaluator(index, 16, [parse(name)], Settings(CPU))(other)
    with pytest.raises(UsageError, match="eqr16 needs images of 32 pixels or more on each side, not 16x16"):
        Evaluator(index, 16, [parse("eqr16")], Settings(CPU))(G)
