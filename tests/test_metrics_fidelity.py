"""Metrics and networks compared with torch-fidelity, on the same files and weights."""

import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from measuring import Painter, evaluator, fidelity, packed, paint, random_vgg16

from stylegan_pg.metrics import classifiers
from stylegan_pg.metrics.lpips import LPIPS
from stylegan_pg.metrics.real import RealSide
from stylegan_pg.metrics.weights import sha256


@pytest.fixture(scope="module")
def few_pictures(tmp_path_factory) -> tuple[Path, Path]:
    """A folder of 24 pictures and the dataset packed from it; few, because the networks are slow."""
    return packed(tmp_path_factory.mktemp("few"), 24)


@pytest.mark.slow
@pytest.mark.usefixtures("_own_cache")
def test_fid_kid_and_is_equal_torch_fidelity(few_pictures, inception, tmp_path):
    """The files and weights are the same; there are fewer images than features."""
    folder, data = few_pictures
    e = evaluator(data, "fid16_full,kid16_full,is16", weights=(str(inception),), batch=10)
    G = Painter()
    ours = e(G)
    paint(e, G, 16, tmp_path / "fake")
    theirs = fidelity(folder, tmp_path / "fake", inception, "--fid", "--kid", "--isc", "--kid-subset-size", "16")
    mark = f"@{sha256(inception)[:8]}"
    assert set(ours) == {f"{n}{mark}" for n in ("fid16_full", "kid16_full", "kid16_full_std", "is16", "is16_std")}
    assert ours[f"fid16_full{mark}"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    assert ours[f"kid16_full{mark}"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert ours[f"is16{mark}"] == pytest.approx(theirs["inception_score_mean"], rel=1e-3)
    # The value is the same with cached statistics of real images and with another batch size.
    again = evaluator(data, "fid16_full", weights=(str(inception),), batch=7)
    with mock.patch.object(RealSide, "_read", side_effect=AssertionError("the cache was not used")):
        assert again(G)[f"fid16_full{mark}"] == pytest.approx(ours[f"fid16_full{mark}"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("_own_cache")
def test_bf16_changes_the_value_slightly(few_pictures, inception):
    """The metric's name contains the precision, and each precision has its own cached statistics."""
    values = {}
    for precision in ("fp32", "bf16"):
        values |= evaluator(few_pictures[1], "fid6", weights=(str(inception),), precision=precision)(Painter())
    mark = f"fid6@{sha256(inception)[:8]}"
    assert list(values) == [mark, f"{mark}@bf16"]
    change = values[f"{mark}@bf16"] / values[mark] - 1
    assert 1e-7 < abs(change) < 0.05
    assert len(list((Path(os.environ["STYLEGAN_PG_CACHE"]) / "metrics").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("_own_cache")
def test_precision_and_recall_equal_torch_fidelity(few_pictures, tmp_path):
    weights = tmp_path / "vgg.pth"
    torch.save(random_vgg16(), weights)
    folder, data = few_pictures
    e = evaluator(data, "pr163_full", weights=(str(weights),), batch=10)
    ours = e(Painter())
    paint(e, Painter(), 16, tmp_path / "fake")
    theirs = fidelity(folder, tmp_path / "fake", weights, "--prc", "--feature-extractor", "vgg16")
    mark = f"@{sha256(weights)[:8]}"
    assert ours[f"pr163_full_precision{mark}"] == pytest.approx(theirs["precision"], abs=1e-3)
    assert ours[f"pr163_full_recall{mark}"] == pytest.approx(theirs["recall"], abs=1e-3)
    assert 0 < theirs["precision"] < 1


@pytest.mark.slow
def test_lpips_uses_the_given_weights():
    """LPIPS downloads nothing. Equal images have distance zero, and the distance grows with the noise."""
    torch.manual_seed(0)
    channels = [64, 128, 256, 512, 512]
    lin = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(channels)}
    distance = LPIPS(lin, random_vgg16())
    a = torch.rand(2, 3, 32, 32) * 255
    assert distance(a, a).flatten().tolist() == [0, 0]
    near, far = (distance(a, (a + s * torch.randn_like(a)).clamp(0, 255)) for s in (5, 60))
    assert (near < far).all()
    assert near.shape[0] == 2


def test_resizing_equals_torch_fidelity():
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as resize

    for h, w in ((64, 64), (33, 70), (299, 299), (512, 512)):
        x = torch.rand(2, 3, h, w) * 255
        ours = classifiers.resize_matrix(h, 299) @ x @ classifiers.resize_matrix(w, 299).t()
        torch.testing.assert_close(ours, resize(x, size=(299, 299), align_corners=False), rtol=0, atol=1e-3)
