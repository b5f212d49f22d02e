"""Weight files and feature extractors, also those of users."""

import dataclasses
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from measuring import CPU, Painter, evaluator

from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.errors import UsageError
from stylegan_pg.metrics import features
from stylegan_pg.metrics.base import Settings
from stylegan_pg.metrics.neighbours import nearest_real
from stylegan_pg.metrics.weights import WEIGHTS, sha256


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/stylegan_pg_evil",))


@pytest.mark.usefixtures("_own_cache")
def test_messages_about_weights_and_data(pictures, inception, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    evil, junk, other = tmp_path / "evil.pth", tmp_path / "junk.pth", tmp_path / "other.pth"
    torch.save({"Mixed_7c.branch_pool.conv.weight": Evil()}, evil)
    junk.write_bytes(b"not weights at all")
    torch.save({"weight": torch.zeros(3)}, other)
    half = torch.load(inception, weights_only=True)
    half["Mixed_7c.branch_pool.conv.weight"] = torch.zeros(1, 1, 1, 1)
    torch.save(half, tmp_path / "half.pth")
    published = tmp_path / WEIGHTS["inception"].file
    published.write_bytes(inception.read_bytes())
    cases = {
        "but not their checksum": ("fid20_full", {"weights": (str(published),)}),
        "weights of inception are missing: download https://": ("fid20_full", {}),
        "weights of vgg16 are missing": ("pr203_full", {"weights": (str(inception),)}),
        "weights of lpips are missing": ("ppl2_wend20", {}),
        "does not exist": ("fid20_full", {"weights": (str(tmp_path / "nothing.pth"),)}),
        "evil.pth cannot be read": ("fid20_full", {"weights": (str(evil),)}),
        "junk.pth cannot be read": ("fid20_full", {"weights": (str(junk),)}),
        "other.pth belongs to none of inception, vgg16, lpips": ("fid20_full", {"weights": (str(other),)}),
        "half.pth does not fit inception": ("fid20_full", {"weights": (str(tmp_path / "half.pth"),)}),
        "needs 90 real images, the dataset has 64": ("fid90", {"extractor": "pixels"}),
        "cannot be loaded: ModuleNotFoundError": ("fid20_full", {"extractor": "no_such_module:make"}),
        "extractor '../x.py' is unknown": ("fid20_full", {"extractor": "../x.py"}),
        "precision 'fp4'": ("fid20_full", {"precision": "fp4"}),
    }
    for message, (names, settings) in cases.items():
        G = Painter()
        G.styles = None  # type: ignore[assignment]  # the check for a latent space w must pass
        with pytest.raises(UsageError, match="(?s).*" + message.replace("(", r"\(").replace("?", r"\?")) as caught:
            evaluator(pictures[1], names, **settings)(G)
        assert "\n" not in str(caught.value)
    assert not Path("/tmp/stylegan_pg_evil").exists()
    with pytest.raises(UsageError, match="latent space"):
        evaluator(pictures[1], "ppl2_wend20")(Painter())


@pytest.mark.usefixtures("_own_cache")
def test_metrics_without_a_network_are_measured_if_weights_are_missing(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    e = evaluator(pictures[1], "fid60_full,swd16,fid60_full,pr323_full")
    assert set(e(Painter())) == {"swd16_64", "swd16_32", "swd16_16", "swd16"}
    assert set(e.missing) == {"fid60_full", "pr323_full"}
    with pytest.raises(UsageError, match="inception are missing"):
        evaluator(pictures[1], "fid60_full")(Painter())


def factory():
    """Create a user's extractor that returns the mean colour."""
    return lambda images: images.float().mean(dim=[2, 3])


@pytest.mark.usefixtures("_own_cache")
def test_a_users_extractor(pictures):
    values = evaluator(pictures[1], "fid40_full", extractor="test_metrics_extractors:factory")(Painter())
    assert list(values) == ["fid40_full@test_metrics_extractors:factory"]
    assert evaluator(pictures[1], "fid40_full", extractor="test_metrics_extractors:factory")(Painter()) == values


class Colours(torch.nn.Module):
    """The mean colour, weighted."""

    def __init__(self, weight: float = 1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full([3], weight))

    def forward(self, images):
        return images.float().mean(dim=[2, 3]) * self.weight


def module():
    return Colours()


def named():
    """Create an extractor with an identity for the cache."""
    made = Colours()
    made.identity = "colours 1"  # type: ignore[assignment]  # modules have any attributes
    return made


def layered():
    """Create an extractor with a layer that happens to be named identity."""
    made = Colours()
    made.identity = torch.nn.Identity()
    return made


def exported():
    batch = torch.export.Dim("batch", min=2, max=1024)
    example = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    return torch.export.export(Colours(), (example,), dynamic_shapes=({0: batch},)).module()


@pytest.mark.usefixtures("_own_cache")
def test_extractors_may_be_modules(pictures):
    """Exported programs, whose mode cannot be set, work as well. Statistics are cached on disk only if the extractor
    has an identity, because its code could change."""
    folder, values = Path(os.environ["STYLEGAN_PG_CACHE"]) / "metrics", []
    for name, count in (("module", 0), ("exported", 0), ("layered", 0), ("named", 1)):
        values += evaluator(pictures[1], "fid40_full", extractor=f"test_metrics_extractors:{name}")(Painter()).values()
        assert len(list(folder.glob("*"))) == count, name
    assert values == pytest.approx(values[:1] * 4, rel=1e-5)


@pytest.mark.usefixtures("_own_cache")
def test_an_extractor_without_the_needed_output(pictures):
    other = mock.patch.object(features, "pixels", lambda images: {"fc2": torch.zeros(len(images), 4)})
    with other, pytest.raises(UsageError, match="the extractor pixels returns fc2, but not 'pool'"):
        evaluator(pictures[1], "fid40_full", extractor="pixels")(Painter())
    with other, pytest.raises(UsageError, match="the extractor pixels returns fc2, but not 'pool'"):
        nearest_real(Painter(), load_index(str(pictures[1])), Settings(CPU, extractor="pixels"), 3, 1.0)


def test_values_of_unpublished_weights_carry_their_hash(tmp_path, monkeypatch):
    """The suffix contains the hash of each file that is not the published one, whatever the name of the file is."""
    lin, vgg = tmp_path / WEIGHTS["lpips"].file, tmp_path / "vgg.pth"
    torch.save({"lin0.model.1.weight": torch.ones(1)}, lin)
    torch.save({"classifier.3.weight": torch.ones(1)}, vgg)
    monkeypatch.setattr("stylegan_pg.metrics.lpips.LPIPS", lambda lin, vgg: torch.nn.Identity())
    shas = {path: sha256(path)[:8] for path in (lin, vgg)}
    assert features.load_distance([lin, vgg], CPU).name_suffix == f"@{shas[lin]}@{shas[vgg]}"
    monkeypatch.setitem(WEIGHTS, "vgg16", dataclasses.replace(WEIGHTS["vgg16"], sha256=shas[vgg]))
    assert features.load_distance([lin, vgg], CPU).name_suffix == f"@{shas[lin]}"
