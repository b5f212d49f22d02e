"""The sliced Wasserstein distance compared with a reference in NumPy and SciPy, and the properties of a distance."""

import itertools

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve

from stylegan_pg.errors import UsageError
from stylegan_pg.metrics.swd import PatchCollector, laplacian_pyramid, sliced_wasserstein


def pictures(n: int, channels: int, resolution: int, seed: int = 0) -> torch.Tensor:
    """Images uint8 [n, channels, resolution, resolution] of coloured blocks with slight noise, so that every level of
    the pyramid has content."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(30, 220, [n, channels, resolution // 4, resolution // 4]).repeat(4, axis=2).repeat(4, axis=3)
    return torch.from_numpy((x + rng.normal(0, 8, x.shape)).clip(0, 255).astype(np.uint8))


def corrupted(images: torch.Tensor, strength: float, seed: int = 5) -> torch.Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + strength * noise).clamp(0, 255).to(torch.uint8)


def collect(images: torch.Tensor, *, split: int | None = None, **kwargs) -> dict[tuple[int, int], torch.Tensor]:
    collector = PatchCollector((images.shape[2], images.shape[3]), images.shape[1], **kwargs)
    for part in images.split(split or len(images)):
        collector.add(part)
    return collector.result()


def reference_pyramid(image: np.ndarray, levels: int) -> list[np.ndarray]:
    """The Laplacian pyramid of float64 [H, W] by its definition: one two-dimensional filter with mirrored borders."""
    taps = np.array([1, 4, 6, 4, 1]) / 16
    kernel = np.outer(taps, taps)
    result = []
    for _ in range(levels - 1):
        low = convolve(image, kernel, mode="mirror")[::2, ::2]
        spread = np.zeros_like(image)
        spread[::2, ::2] = low
        result.append(image - convolve(spread, 4 * kernel, mode="mirror"))
        image = low
    return [*result, image]


def unit(rows: np.ndarray) -> np.ndarray:
    rows = rows - rows.mean(axis=1, keepdims=True)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def reference_distance(a: np.ndarray, b: np.ndarray, directions: int, seed: int) -> float:
    """The 1-D Wasserstein distance of two equally large sets of points, averaged over random directions, times 1000."""
    rng = np.random.default_rng(seed)
    u = rng.normal(size=[a.shape[1], directions])
    u /= np.linalg.norm(u, axis=0)
    return 1000 * np.abs(np.sort(a @ u, axis=0) - np.sort(b @ u, axis=0)).mean()


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("resolution", "levels"), [(8, 1), (16, 1), (64, 3)])
def test_pyramid_agrees_with_scipy(channels, resolution, levels):
    images = pictures(2, channels, resolution)
    ours = laplacian_pyramid(images.float(), levels)
    assert [tuple(x.shape) for x in ours] == [(2, channels, resolution >> i, resolution >> i) for i in range(levels)]
    for n in range(2):
        for c in range(channels):
            for mine, theirs in zip(ours, reference_pyramid(images[n, c].double().numpy(), levels), strict=True):
                np.testing.assert_allclose(mine[n, c].numpy(), theirs, atol=1e-3)  # of 255


@pytest.mark.parametrize("channels", [1, 3])
def test_descriptors_are_normalised_patches_of_the_levels(channels):
    """Each descriptor equals some 7x7 window of the reference's level, up to one shift and scale per channel."""
    images = pictures(3, channels, 32)
    for level, found in enumerate(collect(images, patches_per_image=10).values()):
        assert found.dtype == torch.float32
        assert tuple(found.shape) == (30, 49 * channels)
        found = found.reshape(3, 10, 49, channels).double().numpy()
        assert np.abs(found.mean(axis=(0, 1, 2))).max() < 1e-5
        assert np.abs(found.std(axis=(0, 1, 2)) - 1).max() < 1e-5
        for c in range(channels):
            chosen = []
            for n in range(3):
                plane = reference_pyramid(images[n, c].double().numpy(), 2)[level]
                windows = np.lib.stride_tricks.sliding_window_view(plane, (7, 7)).reshape(-1, 49)
                correlation = unit(found[n, :, :, c]) @ unit(windows).T
                assert correlation.max(axis=1).min() > 1 - 1e-6
                chosen.append(windows[correlation.argmax(axis=1)])
            expected = (np.array(chosen) - np.mean(chosen)) / np.std(chosen)
            np.testing.assert_allclose(found[..., c], expected, atol=1e-3)


def test_distance_agrees_with_the_reference():
    """The random directions differ, so the values are equal within the sampling error of 2000 directions."""
    a, b = (collect(x) for x in (pictures(24, 3, 32), corrupted(pictures(24, 3, 32, seed=1), 40)))
    ours = sliced_wasserstein(a, b, repeats=4, directions=500)
    for r in (32, 16):
        expected = reference_distance(a[r, r].double().numpy(), b[r, r].double().numpy(), 2000, seed=3)
        assert ours[f"swd_{r}"] == pytest.approx(expected, rel=0.03)
    assert ours["swd"] == pytest.approx((ours["swd_32"] + ours["swd_16"]) / 2)


def test_known_distance_in_one_dimension():
    """If all points are shifted by s, the distance in one dimension is s."""
    a = {(16, 16): torch.linspace(-1, 1, 50)[:, None]}
    assert sliced_wasserstein(a, {(16, 16): a[16, 16] + 0.25})["swd_16"] == pytest.approx(250, rel=1e-5)


def test_identical_sets_have_distance_zero():
    a = collect(pictures(8, 3, 64))
    assert sliced_wasserstein(a, {r: x.flip(0) for r, x in a.items()}) == {
        "swd_64": 0.0,
        "swd_32": 0.0,
        "swd_16": 0.0,
        "swd": 0.0,
    }


def test_the_distance_is_symmetric():
    a, b = collect(pictures(8, 3, 32)), collect(corrupted(pictures(8, 3, 32), 30))
    assert sliced_wasserstein(a, b) == sliced_wasserstein(b, a)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_less_noise_gives_a_smaller_distance(channels):
    images = pictures(16, channels, 32)
    real = collect(images)
    series = [sliced_wasserstein(real, collect(corrupted(images, s)))["swd"] for s in (80, 40, 20, 10, 0)]
    assert all(a > b for a, b in itertools.pairwise(series))
    assert series[-1] == 0


@pytest.mark.parametrize("split", [1, 3, 7])
def test_the_batch_size_does_not_matter(split):
    images = pictures(10, 3, 32)
    whole, parts = collect(images), collect(images, split=split)
    for r in whole:
        torch.testing.assert_close(parts[r], whole[r], atol=1e-5, rtol=0)


def test_deterministic_and_independent_of_the_global_generator():
    images = pictures(6, 3, 32)
    other = corrupted(images, 20)

    def measure(seed=0):
        return sliced_wasserstein(collect(images, seed=seed), collect(other, seed=seed), seed=seed)

    state = torch.get_rng_state()
    first = measure()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(100)
    assert measure() == first
    assert measure(seed=1) != first


def test_patches_cover_the_image_and_differ_between_images():
    """On a ramp, the mean of a patch determines its position."""
    ramp = torch.arange(16, dtype=torch.uint8).expand(2, 1, 16, 16).contiguous()
    x = collect(ramp, patches_per_image=200)[16, 16].reshape(2, 200, 49).mean(dim=2)
    for image in x:
        assert len({round(v, 3) for v in image.tolist()}) == 10  # 16 - 7 + 1 columns
    assert not torch.equal(x[0], x[1])


def test_the_larger_set_is_cut_to_the_size_of_the_smaller():
    a, b = pictures(6, 3, 32), corrupted(pictures(9, 3, 32, seed=1), 20)
    real, fake = collect(a), collect(b)
    cut = {r: x[: 6 * 128] for r, x in fake.items()}
    assert sliced_wasserstein(real, fake) == sliced_wasserstein(real, cut)


def test_constant_images_give_finite_distances():
    a = collect(torch.full([4, 3, 32, 32], 7, dtype=torch.uint8))
    assert all(np.isfinite(v) for v in sliced_wasserstein(a, collect(pictures(4, 3, 32))).values())


@pytest.mark.parametrize("size", [(0, 0), (4, 4), (4, 64), (64, 7)])
def test_images_that_are_too_small(size):
    with pytest.raises(UsageError, match=f"8 pixels or more on each side, not {size[0]}x{size[1]}"):
        PatchCollector(size, 3)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 4, 32, 32, dtype=torch.uint8),  # another number of channels
        torch.zeros(2, 3, 64, 64, dtype=torch.uint8),  # another resolution
        torch.zeros(3, 32, 32, dtype=torch.uint8),  # no batch dimension
        torch.zeros(2, 3, 32, 32),  # floats, whose range ([-1, 1] or [0, 255]) is unknown
    ],
)
def test_images_of_a_wrong_shape_or_dtype(images):
    with pytest.raises(UsageError, match="uint8"):
        PatchCollector((32, 32), 3).add(images)


def test_no_images():
    with pytest.raises(UsageError, match="needs images"):
        PatchCollector((32, 32), 3).result()


def test_sets_of_different_sizes_or_channels():
    with pytest.raises(UsageError, match="sizes or channels"):
        sliced_wasserstein(collect(pictures(2, 3, 32)), collect(pictures(2, 1, 32)))
    with pytest.raises(UsageError, match="sizes or channels"):
        sliced_wasserstein(collect(pictures(2, 3, 32)), collect(pictures(2, 3, 16)))
