"""Mixtures of Gaussians as a dataset, and the pair of MLPs that is trained on them."""

from typing import Any

import numpy as np
import pytest
import torch

from stylegan_pg.checkpoint.snapshot import load_snapshot, save_snapshot
from stylegan_pg.config import MLPConfig
from stylegan_pg.config.loading import load_config
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.datasets.points import MIXTURES, PointIndex
from stylegan_pg.data.loader.loader import batches
from stylegan_pg.data.loader.reading import read_batch
from stylegan_pg.errors import UsageError
from stylegan_pg.metrics.coverage import mode_coverage
from stylegan_pg.networks import NETWORKS, NetworkShape

NAMES = {"points:ring": 8, "points:grid25": 25}


def points(url: str) -> PointIndex:
    index = load_index(url)
    assert isinstance(index, PointIndex)
    return index


@pytest.mark.parametrize("url", NAMES)
def test_points_are_the_same_every_time(url):
    a, b = points(url), points(url)
    assert a.identity == b.identity
    assert np.array_equal(a.table(4).points, b.table(4).points)
    assert (a.path, a.count, a.channels, a.resolutions) == (url, len(a.table(4)), 2, (4,))
    image = a.table(4).image(5)
    assert (image.shape, image.dtype) == ((2, 1, 1), np.float32)
    assert a.source_of(5) != a.source_of(6)


def test_each_name_has_a_different_identity():
    assert len({points(url).identity for url in NAMES}) == len(NAMES)


@pytest.mark.parametrize(("url", "modes"), NAMES.items())
def test_points_cover_every_mode_equally(url, modes):
    index = points(url)
    table, (centres, deviation) = index.table(4), index.mixture
    samples = torch.from_numpy(table.points)
    found = mode_coverage(samples, torch.from_numpy(centres), deviation)
    assert found["modes"] == modes == len(index.label_names)
    assert found["high_quality"] == pytest.approx(
        1 - np.exp(-4.5), abs=0.003
    )  # the value for a two-dimensional Gaussian
    assert np.ptp(np.bincount(table.label)) == 0
    assert abs(table.points).max() < 1.1
    for k in range(modes):
        mine = table.points[table.label == k].astype(np.float64)
        np.testing.assert_allclose(mine.mean(axis=0), centres[k], atol=5 * deviation / len(mine) ** 0.5)
        np.testing.assert_allclose(mine.std(axis=0), deviation, rtol=0.15)


def test_modes_are_far_apart():
    for centres, deviation in MIXTURES.values():
        distances = np.linalg.norm(centres[:, None] - centres, axis=-1)
        assert distances[distances > 0].min() > 20 * deviation


@pytest.mark.parametrize("workers", [0, 2])
def test_the_order_of_the_stream_depends_on_seed_and_nimg(workers):
    index = points("points:ring")
    table, order = index.table(4), index.order(seed=5)
    start, size = 7990, 10  # across the end of an epoch
    data = list(
        batches(
            table,
            order,
            start=start,
            end=start + 2 * size,
            batch=size,
            share=[0, 3, 4],
            workers=workers,
            fields=["class"],
        )
    )
    assert len(data) == 2
    for k, batch in enumerate(data):
        ordinals = [order.at(start + k * size + i)[1] for i in (0, 3, 4)]
        assert batch.image.dtype == torch.float32
        assert torch.equal(batch.image, torch.from_numpy(table.points[ordinals])[:, :, None, None])
        assert torch.equal(batch.image, read_batch(table, ordinals))
        assert batch.fields["class"].tolist() == table.label[ordinals].tolist()


def test_unknown_points_and_resolutions_are_rejected():
    with pytest.raises(UsageError, match="points:spiral: no such points; choose points:ring or points:grid25"):
        load_index("points:spiral")
    with pytest.raises(UsageError, match="resolution=4"):
        points("points:ring").table(8)
    with pytest.raises(UsageError, match=r"growth\.start=4 .* null"):
        load_config(None, ["run=r", "data.url=points:ring", "model.name=mlp", "growth.start=4"])


# --------------------------------------------------------------------------------------------------------- networks


def pair(base: list[int], channels: int, c_dim: int) -> tuple[Any, Any, dict[str, Any]]:
    config = MLPConfig(base=base, channel_max=16, mapping_layers=2, z_dim=5)
    shape = NetworkShape(8, 8, False, channels, c_dim, 1)
    mlp = NETWORKS["mlp"]
    kwargs = mlp.g_kwargs(config, shape)
    return mlp.G(**kwargs), mlp.D(**mlp.d_kwargs(config, shape)), kwargs


@pytest.mark.parametrize(("base", "channels", "c_dim"), [([1, 1], 2, 0), ([4, 6], 3, 4), ([2, 1], 1, 2)])
def test_mlp_shapes_and_interface(base, channels, c_dim):
    G, D, _ = pair(base, channels, c_dim)
    z, c = torch.randn(3, G.z_dim), torch.eye(c_dim)[torch.arange(3) % c_dim] if c_dim else None
    assert (G.num_ws, G.c_dim, G.w_dim, G.resolution, G.img_channels) == (1, c_dim, 5 + c_dim, 8, channels)
    assert tuple(G.img_size) == (2 * base[0], 2 * base[1])
    assert G.mapping(z, c).shape == (3, G.w_dim) == (3, *G.mapping.w_avg.shape)
    ws = G.styles(z, c)
    images = G.synthesis(ws, alpha=0.5, noise="random", generator=torch.Generator())
    assert images.shape == (3, channels, *G.img_size)
    assert torch.equal(images, G(z, c))
    scores = D(images, c, alpha=0.5)
    assert scores.shape == (3, 1)
    scores.sum().backward()
    for net in (G, D):
        assert all(p.grad is not None and p.grad.any() for p in net.parameters())
    assert D.filter.sum() == 1
    if c is not None:
        other = c.roll(1, dims=1)
        assert not torch.equal(G(z, other), images)
        assert not torch.equal(D(images, other), scores)


def test_mlp_truncation_moves_towards_the_mean():
    G, _, _ = pair([1, 1], 2, 0)
    G.mapping.w_avg.fill_(3.0)
    z = torch.randn(4, 5)
    torch.testing.assert_close(G.styles(z, psi=0.25)[:, 0], 3 + 0.25 * (z - 3))
    assert torch.equal(G.styles(z, psi=0.25, cutoff=0)[:, 0], z)


def test_mlp_has_the_configured_width_and_depth():
    G, D, _ = pair([1, 1], 2, 0)
    assert [tuple(p.shape) for p in G.parameters() if p.ndim == 2] == [(16, 5), (16, 16), (8, 16)]
    assert [tuple(p.shape) for p in D.parameters() if p.ndim == 2] == [(16, 8), (16, 16), (1, 16)]


def test_mlp_snapshots_load(tmp_path):
    G, _, kwargs = pair([1, 1], 2, 3)
    path = tmp_path / "g.safetensors"
    save_snapshot(path, G, {"network": "mlp", "kwargs": kwargs, "alpha": 1.0})
    z, c = torch.randn(4, 5), torch.eye(3)[[0, 1, 2, 0]]
    assert torch.equal(load_snapshot(path)(z, c), G(z, c))
