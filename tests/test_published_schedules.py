"""The published schedules, and automatic schedules for any number of devices."""

import math
import re

import pytest

from stylegan_pg.config import ADAConfig, Config
from stylegan_pg.config.loading import load_config
from stylegan_pg.config.schedule import (
    Phase,
    automatic,
    deal,
    phase_at,
    phases,
)
from stylegan_pg.errors import UsageError
from stylegan_pg.planning.plan import changes

# Eight devices (Karras et al. 2018 and 2019): the end of each phase in images, batch and learning rate; 4x4 has only a
# stable phase, 600 kimg rounded up to whole batches.
EIGHT = [  # resolution, end of the fade, end of the stable phase, batch, rate
    (4, None, 600_064, 512, 0.001),
    (8, 1_200_128, 1_800_192, 256, 0.001),
    (16, 2_400_256, 3_000_320, 128, 0.001),
    (32, 3_600_320, 4_200_320, 64, 0.001),
    (64, 4_800_320, 5_400_320, 32, 0.001),
    (128, 6_000_320, 6_600_320, 32, 0.0015),
    (256, 7_200_320, 7_800_320, 32, 0.002),
    (512, 8_400_320, 9_000_320, 32, 0.003),
    (1024, 9_600_320, 12_000_000, 32, 0.003),
]

STYLEGAN = [
    (8, None, 600_064, 256, 0.001),
    (16, 1_200_128, 1_800_192, 128, 0.001),
    (32, 2_400_192, 3_000_192, 64, 0.001),
    (64, 3_600_192, 4_200_192, 32, 0.001),
    (128, 4_800_192, 5_400_192, 32, 0.0015),
    (256, 6_000_192, 6_600_192, 32, 0.002),
    (512, 7_200_192, 7_800_192, 32, 0.003),
    (1024, 8_400_192, 25_000_000, 32, 0.003),
]

ONE = [
    (4, None, 800_000, 16, 0.001),
    *((8 << i, (16 + 16 * i) * 100_000, (24 + 16 * i) * 100_000, 16, 0.001) for i in range(5)),
    (256, 9_600_002, 10_400_004, 14, 0.001),
    (512, 11_200_008, 12_000_012, 6, 0.001),
    (1024, 12_800_013, 13_600_014, 3, 0.001),
]

PUBLISHED = {"progan-celebahq1024": EIGHT, "progan-celebahq1024-1gpu": ONE, "stylegan-ffhq1024": STYLEGAN}


def rows(plan: list[Phase]) -> list[tuple]:
    ends = {(p.resolution, p.fade): p.end for p in plan}
    stable = [p for p in plan if not p.fade]
    assert all(p.g_lr == p.d_lr for p in plan)
    return [(p.resolution, ends.get((p.resolution, True)), p.end, p.batch, p.g_lr) for p in stable]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_schedules(name):
    plan = phases(load_config(name))
    assert rows(plan) == PUBLISHED[name]
    assert {p.optimizer for p in plan} == {"reset"}
    for phase in plan:
        assert phase_at(plan, phase.start) is phase
        assert phase_at(plan, phase.end - 1) is phase
        assert phase.alpha(phase.start) == (0 if phase.fade else 1)
        if phase.fade:
            assert phase.alpha(phase.start + (phase.end - phase.start) // 2) == pytest.approx(0.5, abs=0.001)
            assert 1 - phase.batch / 600_000 <= phase.alpha(phase.end - phase.batch) < 1
    groups = [p.mbstd_group for p in plan if not p.fade]
    assert groups == ([16] * 6 + [14, 6, 3] if "1gpu" in name else [4] * len(groups))


def test_other_published_settings():
    for name in PUBLISHED:
        config = load_config(name)
        assert (config.optim.beta1, config.optim.beta2, config.optim.eps) == (0, 0.99, 1e-8)
        assert (config.optim.d_steps, config.optim.g_steps) == (1, 1)
        terms = {t.name: (t.weight, t.every, *t.options().values()) for t in config.loss.all_terms()}
        if name.startswith("progan"):
            assert (config.model.name, config.loss.objective, config.loss.style_mixing) == ("progan", "wgan", 0)
            assert terms == {"gradient_penalty": (10, 1, 1), "drift": (0.001, 1)}
        else:
            assert (config.model.name, config.loss.objective, config.loss.style_mixing) == ("stylegan", "logistic", 0.9)
            assert terms == {"r1": (10, 1)}
            assert config.model.w_avg_beta == 0.995
    ada = load_config("ada-small-data256").augment
    assert ada == ADAConfig(target=0.6, interval=4, kimg=500, pipeline="bgc")


R3GAN = {  # gamma, p of augmentation, half-life and length of the schedules in kimg, batch
    "r3gan-cifar10": ((0.05, 0.005), 0.55, 5_000, 20_000, 512),
    "r3gan-ffhq64": ((2, 0.2), 0.3, 500, 20_000, 256),
    "r3gan-ffhq256": ((150, 15), 0.3, 500, 20_000, 256),
    "r3gan-imagenet32": ((0.5, 0.05), 0.5, 50_000, 200_000, 4096),
    "r3gan-imagenet64": ((1, 0.1), 0.4, 50_000, 200_000, 4096),
}


def table_of_plan(name: str) -> dict[str, list[float]]:
    """Every number at 0, 25, 50, 75 and 100 % of the run."""
    found, same = {}, "numbers that do not change: "
    for line in changes(load_config(name))[2:]:
        if line.startswith(same):
            parts = (part.rsplit(" ", 1) for part in line.removeprefix(same).split(", "))
            found |= {key: [float(value)] * 5 for key, value in parts}
        else:
            key, *values = re.split(r"\s{2,}", line)
            found[key] = list(map(float, values))
    return found


@pytest.mark.parametrize("name", R3GAN)
def test_the_plan_of_r3gan(name):
    """Cosines from one number to another (Huang et al. 2024), at 0, 25, 50, 75 and 100 % of the run."""
    gamma, p, half_life, kimg, batch = R3GAN[name]
    shares = [0, (1 - math.sqrt(0.5)) / 2, 0.5, (1 + math.sqrt(0.5)) / 2, 1]
    ours = table_of_plan(name)
    for key, (a, b) in {
        "optim.g_lr": (2e-4, 5e-5),
        "optim.d_lr": (2e-4, 5e-5),
        "optim.beta2": (0.9, 0.99),
        "loss.r1_gamma": gamma,
        "weight of r2": gamma,
        "ema.kimg": (0, half_life),
        "augment.p": (0, p),
    }.items():
        assert ours[key] == pytest.approx([a + share * (b - a) for share in shares], rel=1e-4, abs=1e-9), key
    halves = ours["ema.kimg"][1:]
    assert ours["EMA's beta"] == pytest.approx([0, *(0.5 ** (batch / 1000 / half) for half in halves)], abs=1e-5)
    config = load_config(name)
    assert config.train.total_kimg == kimg
    assert (config.optim.beta1, config.optim.eps, config.ema.rampup) == (0, 1e-8, None)
    assert {(t.name, t.every) for t in config.loss.all_terms()} == {("r1", 1), ("r2", 1)}


@pytest.mark.parametrize(
    ("name", "gamma", "sigma"),
    [("stylegan3-t-ffhq1024", 32, 0), ("stylegan3-r-ffhq1024", 32, 10), ("stylegan3-t-256", 2, 0)],
)
def test_the_plan_of_stylegan3(name, gamma, sigma):
    ours, config = table_of_plan(name), load_config(name)
    for key, value in {"optim.g_lr": 0.0025, "optim.d_lr": 0.002, "optim.beta2": 0.99, "loss.r1_gamma": gamma}.items():
        assert ours[key] == [value] * 5
    assert ours["ema.kimg"] == [0, 10, 10, 10, 10]
    assert ours["EMA's beta"][1:] == pytest.approx([0.5 ** (32 / 10_000)] * 4, abs=1e-6)
    assert ours.get("loss.blur_sigma", [0] * 5) == [sigma, 0, 0, 0, 0]
    assert (config.loss.r1_every, config.loss.pl_weight, config.loss.style_mixing) == (16, 0, 0)
    assert (config.train.batch, config.model.mbstd_group, config.train.total_kimg) == (32, 4, 25_000)
    assert config.augment == ADAConfig(target=0.6, interval=4, kimg=500, pipeline="bgc")


def auto_of(*overrides: str) -> Config:
    return load_config(None, ["run=x", "data.url=x", "growth.schedule=auto", *overrides])


RATES = ["optim.g_lr=0.001", "optim.d_lr=0.001"]


def test_the_automatic_schedule_of_eight_devices_is_the_published_one():
    progan = auto_of("model.name=progan", "train.total_kimg=12000", *RATES)
    assert rows(phases(progan)) == EIGHT
    stylegan = auto_of("model.name=stylegan", "train.total_kimg=25000", *RATES)
    assert rows(phases(stylegan)) == STYLEGAN
    assert [p.micro_batch for p in phases(stylegan) if p.fade] == [16, 8, 4, 4, 4, 4, 4]


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 8, 64, 100])
@pytest.mark.parametrize(
    ("resolution", "total", "group"), [(1024, 25000, 4), (256, 3000.5, 8), (64, 800, 1), (8, 500, 4)]
)
def test_properties_of_automatic_schedules(devices, resolution, total, group):
    given = [f"resolution={resolution}", f"train.total_kimg={total}", f"model.mbstd_group={group}"]
    config = auto_of(*given, f"growth.devices={devices}", "optim.d_lr=0.001")
    plan = phases(config)
    assert config.growth.schedule == "tables"
    assert automatic(config) == config
    assert 0 <= plan[-1].end - total * 1000 < plan[-1].batch
    assert [p.start for p in plan] == [0, *(p.end for p in plan[:-1])]
    assert [(p.resolution, p.fade) for p in plan] == [
        (8, False),
        *((r, fade) for r in (16 << i for i in range(resolution.bit_length() - 4)) for fade in (True, False)),
    ]
    lengths = [p.end - p.start for p in plan[:-1]]
    assert all(p.start % 1 == 0 and (p.end - p.start) % p.batch == 0 for p in plan)
    assert all(abs(length - lengths[0]) < plan[0].batch for length in lengths)
    assert (
        not lengths or plan[-1].end - plan[-1].start >= 3.5 * lengths[0]
    )  # most images are used at the full resolution
    batches, rates = [p.batch for p in plan], [p.g_lr for p in plan]
    assert batches == sorted(batches, reverse=True)
    assert rates == sorted(rates)
    assert all(0.002 <= p.g_lr <= 0.003 and p.g_lr == pytest.approx(2 * p.d_lr) for p in plan)
    for p in plan:
        assert p.batch % devices == 0
        shares = {len(part) for part in deal(p.batch, p.mbstd_group, devices)}
        assert shares == {p.batch // devices}  # all devices get the same number of images
        assert p.mbstd_group == group
        assert group <= p.micro_batch <= p.batch // devices


def test_tables_take_precedence_over_the_automatic_schedule():
    given = ["growth.start=16", "growth.stable_kimg_at={32: 50}", "growth.fade_kimg=25", "train.batch_at={32: 12}"]
    given += ["optim.lr_at={64: 0.01}", "optim.d_lr_at={32: 0.02}", "train.micro_batch_at={64: 8}"]
    plan = phases(auto_of("resolution=64", "train.total_kimg=800", "growth.devices=1", *given, *RATES))
    lengths = [(p.resolution, p.fade, p.end - p.start) for p in plan[:-1]]
    assert lengths == [(16, False, 100_096), (32, True, 25_008), (32, False, 50_004), (64, True, 25_024)]
    assert [p.batch for p in plan] == [128, 12, 12, 32, 32]
    assert [(p.g_lr, p.d_lr) for p in plan] == [(0.001, 0.001), *[(0.001, 0.02)] * 2, *[(0.01, 0.01)] * 2]
    assert [p.micro_batch for p in plan] == [128, 12, 12, 8, 8]


def test_automatic_schedules_that_are_too_short():
    with pytest.raises(UsageError, match=r"total_kimg=20 leaves 1\.\d+ kimg .* resolution 8, .* batches of 256"):
        auto_of("train.total_kimg=20")
    with pytest.raises(UsageError, match=r"train\.total_kimg=None"):
        auto_of("growth.start=8")
