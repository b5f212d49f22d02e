"""Names of metrics, and new metrics that a user adds."""

import os
from pathlib import Path

import pytest
from measuring import Painter, evaluator

from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.loader.reading import read_batch
from stylegan_pg.errors import UsageError
from stylegan_pg.metrics.base import COUNT, FeatureMetric, ImageMetric
from stylegan_pg.metrics.registry import METRICS, parse


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fid50k_full", ("fid", 50_000, True, False, 1)),
        ("fid50k", ("fid", 50_000, False, False, 1)),
        ("kid128_full_mirror_psi0.5", ("kid", 128, True, True, 0.5)),
        ("pr50k3_full", ("pr", 50_000, True, False, 1)),
        ("pr2563", ("pr", 256, False, False, 1)),
        ("is10k", ("is", 10_000, False, False, 1)),
        ("ppl2_wend", ("ppl2", 50_000, False, False, 1)),
        ("swd", ("swd", 8192, False, False, 1)),
        ("ms_ssim500", ("ms_ssim", 500, False, False, 1)),
    ],
)
def test_name_determines_family_count_and_options(name, expected):
    p = parse(name)
    assert (p.kind, p.count, p.full, p.mirror, p.psi) == expected
    assert p.name == name
    if "psi" not in name:
        assert (parse(name, psi=0.7).name, parse(name, psi=0.7).psi) == (f"{name}_psi0.7", 0.7)


@pytest.mark.parametrize(
    "name", ["fid", "fid0", "fid50k_half", "is50k_full", "pr50k_full", "ppl2", "swd_", "", "fid-5"]
)
def test_unknown_names_are_refused(name):
    with pytest.raises(UsageError, match="unknown metric"):
        parse(name)


class ColourDistance(ImageMetric):
    """colour500 is the distance between the mean colours of real images and of 500 generated ones, in grey levels."""

    kind, example = "colour", "colour500"
    pattern = f"colour(?P<count>{COUNT})(?P<full>_full)?"
    uses_real_images = True

    def observe(self, seen):
        return seen.float().mean(dim=[2, 3])

    def compute(self, real, generated, settings):
        return {"": float((real.double().mean(dim=0) - generated.double().mean(dim=0)).norm())}


class ColourVariance(FeatureMetric):
    """variance500 is the mean variance of Inception's features of 500 generated images."""

    kind, example = "variance", "variance500"
    pattern = f"variance(?P<count>{COUNT}){FeatureMetric.REAL_IMAGES}"
    network = "inception"
    lower_is_better = False

    def compute(self, real, generated, settings):
        return {"": float(generated.var(dim=0).mean()), "_real": float(real.var(dim=0).mean())}


@pytest.mark.usefixtures("_own_cache")
def test_a_new_metric_needs_only_one_class(pictures, monkeypatch):
    """A registered class is parsed, measured on all or some real images, truncated and listed like built-in ones."""
    for metric in (ColourDistance, ColourVariance):
        monkeypatch.setitem(METRICS, metric.kind, metric)
    with pytest.raises(UsageError, match=r"swd, ms_ssim, colour500, variance500; other numbers"):
        parse("colour")
    names = "colour30,colour30_full,colour30_psi0.5,variance30_full,kid30_full"
    values = evaluator(pictures[1], names, extractor="pixels", batch=7)(Painter())
    ends = ("", "_full", "_psi0.5")
    assert {f"colour30{end}" for end in ends} | {"variance30_full@pixels", "variance30_full_real@pixels"} <= set(values)
    images = read_batch(load_index(str(pictures[1])).table(64), list(range(64))).double()
    painted = evaluator(pictures[1], "swd30")._latents(Painter(), "metric-z", 0, 30)[0]
    fake = (Painter()(painted) * 127.5 + 127.5).round().clamp(0, 255).double()
    expected = float((images.mean(dim=[0, 2, 3]) - fake.mean(dim=[0, 2, 3])).norm())
    assert values["colour30_full"] == pytest.approx(expected, rel=1e-3)
    assert values["colour30"] != values["colour30_full"]
    cached = list((Path(os.environ["STYLEGAN_PG_CACHE"]) / "metrics").iterdir())
    # kid30_full and variance30_full share the features. A metric with its own `observe` is not cached.
    assert len(cached) == 1
