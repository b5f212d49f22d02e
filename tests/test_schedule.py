"""The schedule as a function of nimg, compared with examples by hand and with brute force."""

import dataclasses
import itertools
import math
import random
from typing import Any

import pytest
import torch
import yaml

from stylegan_pg.config import ADAConfig, Config, DataConfig
from stylegan_pg.config.loading import load_config
from stylegan_pg.config.schedule import (
    Phase,
    at,
    automatic,
    crossed,
    deal,
    ema_beta,
    largest_divisor,
    lazy_ratio,
    phase_at,
    phases,
    size_at,
)
from stylegan_pg.errors import UsageError
from stylegan_pg.networks.layers import minibatch_stddev

GROWTH = [
    "resolution=32",
    "growth.start=8",
    "growth.stable_kimg=1",
    "growth.fade_kimg=0.5",
    "train.batch=48",
    "train.batch_at={8: 64}",
]


def changed(node: Any, key: str, value: Any) -> Any:
    name, _, rest = key.partition(".")
    if isinstance(node, dict):
        return {**node, int(name): value}
    return dataclasses.replace(node, **{name: changed(getattr(node, name), rest, value) if rest else value})


def plan_of(*overrides: str) -> list[Phase]:
    config = Config(run="runs/x", data=DataConfig(url="data/x"))
    for key, _, value in (item.partition("=") for item in overrides):
        config = changed(config, key, yaml.safe_load(value))
    return phases(config)


def summary(plan: list[Phase]) -> list[tuple[str, int, int, int]]:
    return [(str(p), p.start, p.end, p.batch) for p in plan]


def test_phases_are_contiguous_and_rounded_up_to_whole_batches():
    assert summary(plan_of(*GROWTH)) == [
        ("8x8 stable", 0, 1024, 64),
        ("16x16 fade", 1024, 1552, 48),
        ("16x16 stable", 1552, 2560, 48),
        ("32x32 fade", 2560, 3088, 48),
        ("32x32 stable", 3088, 4096, 48),
    ]
    assert [p.index for p in plan_of(*GROWTH)] == [0, 1, 2, 3, 4]


def test_full_resolution_from_the_start():
    plan = plan_of("resolution=64", "train.total_kimg=1", "train.batch=24")
    assert summary(plan) == [("64x64 stable", 0, 1008, 24)]
    assert plan_of("resolution=64", "growth.start=64", "train.total_kimg=1", "train.batch=24") == plan
    assert summary(plan_of("resolution=64", "growth.start=64", "growth.stable_kimg=2", "train.batch=20")) == [
        ("64x64 stable", 0, 2000, 20)
    ]


def test_alpha_rises_from_zero_towards_one():
    plan = plan_of(*GROWTH)
    for phase in plan:
        steps = range(phase.start, phase.end, phase.batch)
        alphas = [phase.alpha(nimg) for nimg in steps]
        if phase.fade:
            assert alphas == pytest.approx([i / len(steps) for i in range(len(steps))])
            assert phase.alpha(phase.end) == 1
        else:
            assert set(alphas) == {1.0}
        assert [phase.step(nimg) for nimg in steps] == list(range(len(steps)))


def test_total_extends_the_last_phase():
    assert summary(plan_of(*GROWTH, "train.total_kimg=10"))[-1] == ("32x32 stable", 3088, 10000, 48)
    assert summary(plan_of(*GROWTH, "train.total_kimg=10.001"))[-1] == ("32x32 stable", 3088, 10048, 48)
    assert summary(plan_of(*GROWTH, "train.total_kimg=10"))[:-1] == summary(plan_of(*GROWTH))[:-1]


def test_total_shortens_a_phase_without_changing_its_alpha():
    whole, cut = plan_of(*GROWTH), plan_of(*GROWTH, "train.total_kimg=1.3")
    assert summary(cut) == [("8x8 stable", 0, 1024, 64), ("16x16 fade", 1024, 1312, 48)]
    for nimg in range(1024, 1312, 48):
        assert cut[1].alpha(nimg) == whole[1].alpha(nimg)
    assert cut[1].alpha(1312) < 0.6
    assert summary(plan_of(*GROWTH, "train.total_kimg=1.024")) == [("8x8 stable", 0, 1024, 64)]
    # Rounding a phase up may use all the remaining images.
    assert summary(plan_of(*GROWTH, "train.total_kimg=1.01")) == [("8x8 stable", 0, 1024, 64)]


def test_tables_apply_at_their_resolution_and_the_plain_value_elsewhere():
    plan = plan_of(
        *GROWTH,
        "growth.stable_kimg_at={16: 0.096}",
        "growth.fade_kimg_at={32: 0.48}",
        "optim.g_lr=0.001",
        "optim.d_lr=0.002",
        "optim.lr_at={16: 0.005}",
        "train.micro_batch=8",
        "train.micro_batch_at={32: 16}",
    )
    assert [p.end - p.start for p in plan] == [1024, 528, 96, 480, 1008]
    assert [(p.g_lr, p.d_lr) for p in plan] == [(0.001, 0.002)] + [(0.005, 0.005)] * 2 + [(0.001, 0.002)] * 2
    assert [p.micro_batch for p in plan] == [8, 8, 8, 16, 16]
    assert at(8, {8: 0}, 5) == 0
    assert at(16, {8: 0}, 5) == 5


def test_learning_rates_of_one_network():
    given = ["optim.lr_at={16: 0.005, 32: 0.006}", "optim.d_lr_at={16: 0.001, 8: 0.004}", "optim.g_lr_at={32: 0.007}"]
    plan = plan_of(*GROWTH, "optim.g_lr=0.01", "optim.d_lr=0.02", *given)
    rates = [(0.01, 0.004), (0.005, 0.001), (0.005, 0.001), (0.007, 0.006), (0.007, 0.006)]
    assert [(p.g_lr, p.d_lr) for p in plan] == rates


def test_optimisers_are_chosen_by_the_entered_resolution():
    plan = plan_of(*GROWTH, "growth.optimizer_at={16: carry}")
    assert [p.optimizer for p in plan] == ["reset", "carry", "carry", "reset", "reset"]
    assert {p.optimizer for p in plan_of(*GROWTH, "growth.optimizer=carry")} == {"carry"}


def test_sizes_are_multiples_of_the_base():
    assert size_at(4, [4, 6]) == (4, 6)
    assert size_at(1024, [4, 6]) == (1024, 1536)
    assert size_at(8, (5, 3)) == (10, 6)
    plan = plan_of(*GROWTH, "model.base=[4, 6]")
    assert [p.size for p in plan] == [(8, 12), (16, 24), (16, 24), (32, 48), (32, 48)]
    assert str(plan[1]) == "16x24 fade"


def test_empty_phases_are_omitted():
    names = [str(p) for p in plan_of(*GROWTH, "growth.fade_kimg=0")]
    assert names == ["8x8 stable", "16x16 stable", "32x32 stable"]
    plan = plan_of(*GROWTH, "growth.stable_kimg_at={16: 0, 32: 0}")
    assert summary(plan) == [
        ("8x8 stable", 0, 1024, 64),
        ("16x16 fade", 1024, 1552, 48),
        ("32x32 fade", 1552, 2080, 48),
    ]
    assert [p.index for p in plan] == [0, 1, 2]


def test_a_run_without_images_is_rejected():
    with pytest.raises(UsageError, match="growth"):
        plan_of(*GROWTH, "growth.stable_kimg=0", "growth.fade_kimg=0")


def test_minibatch_stddev_group_divides_the_batch():
    for batch, limit, group in ((48, 4, 4), (6, 4, 3), (14, 16, 14), (7, 4, 1), (3, 16, 3)):
        plan = plan_of(*GROWTH, f"train.batch_at.8={batch}", f"train.batch={batch}", f"model.mbstd_group={limit}")
        assert {p.mbstd_group for p in plan} == {group}
    assert plan_of(*GROWTH, "model.mbstd_channels=0")[0].mbstd_group == 1
    for n, limit in itertools.product(range(1, 40), range(1, 20)):
        best = largest_divisor(n, limit)
        assert n % best == 0
        assert best <= limit
        assert not any(n % d == 0 for d in range(best + 1, limit + 1))


def test_micro_batches_are_whole_groups():
    for micro, expected in ((0, 0), (4, 4), (7, 4), (8, 8), (100, 100)):
        assert {p.micro_batch for p in plan_of(*GROWTH, f"train.micro_batch={micro}")} == {expected}
    with pytest.raises(UsageError, match=r"train\.micro_batch=3 at 16x16 .* group of 4"):
        plan_of(*GROWTH, "train.micro_batch_at={16: 3}")
    plan_of(*GROWTH, "train.micro_batch=3", "model.mbstd_group=3")
    plan_of(*GROWTH, "train.micro_batch=1", "model.mbstd_channels=0")


def test_phase_at_every_nimg():
    plan = plan_of(*GROWTH)
    for nimg in [*range(0, plan[-1].end, 37), *(p.start for p in plan), *(p.end - 1 for p in plan)]:
        (expected,) = [p for p in plan if p.start <= nimg < p.end]
        assert phase_at(plan, nimg) is expected
    assert phase_at(plan, plan[-1].end) is plan[-1]
    assert phase_at(plan, plan[-1].end + 12345) is plan[-1]


def test_ema_halves_in_its_half_life():
    assert ema_beta(32, 0, 10, None) ** (10_000 / 32) == pytest.approx(0.5)
    assert ema_beta(32, 10**9, 10, 0.05) == ema_beta(32, 0, 10, None)
    assert ema_beta(64, 100_000, 10, 0.05) ** (5_000 / 64) == pytest.approx(0.5)
    assert ema_beta(32, 0, 10, 0.05) == 0  # at the start, take the new weights
    rising = [ema_beta(32, nimg, 10, 0.05) for nimg in range(32, 300_000, 3200)]
    assert rising == sorted(rising)


def test_crossed_is_true_once_for_every_boundary():
    rng = random.Random(0)
    for _ in range(200):
        every = rng.choice([1, 7, 64, 250, 1000, 4000])
        nimg, met = 0, 0
        while nimg < 20_000:
            after = nimg + rng.choice([1, 4, 32, 100, 512])
            inside = any(m % every == 0 for m in range(nimg + 1, after + 1))
            assert crossed(every / 1000, nimg, after) == inside
            met += inside
            nimg = after
        if every >= 512:  # with steps shorter than the interval, each boundary is met exactly once
            assert met == nimg // every
    assert not crossed(0, 0, 10**9)
    assert crossed(0.0001, 4, 5)  # an interval of less than an image: true at every step


def test_lazy_ratio():
    assert lazy_ratio([]) == 1
    for k in (2, 4, 16):
        assert lazy_ratio([k]) == pytest.approx(k / (k + 1))
    # 12 training steps with terms every 3 and every 4 steps are 12 + 4 + 3 optimiser steps.
    assert lazy_ratio([3, 4]) == pytest.approx(12 / 19)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 8])
def test_deal_partitions_a_batch_into_whole_groups(group):
    for groups, parts in itertools.product(range(1, 13), range(1, 9)):
        batch = groups * group
        dealt = deal(batch, group, parts)
        assert len(dealt) == parts
        assert sorted(itertools.chain(*dealt)) == list(range(batch))
        if groups % parts == 0:
            assert dealt == [list(range(batch))[k::parts] for k in range(parts)]
        assert [len(part) for part in dealt] == [group * len(range(k, groups, parts)) for k in range(parts)]
        whole = {frozenset(range(m, batch, groups)) for m in range(groups)}
        own = set()
        for part in dealt:
            n = len(part) // group
            own |= {frozenset(part[m::n]) for m in range(n)}
        assert own == whole


def test_surplus_parts_are_empty():
    assert deal(8, 4, 4) == [[0, 2, 4, 6], [1, 3, 5, 7], [], []]


@pytest.mark.parametrize(("batch", "group", "parts"), [(12, 4, 3), (12, 2, 4), (24, 4, 4), (6, 3, 5)])
def test_divided_batches_have_the_statistics_of_the_whole_batch(batch, group, parts):
    x = torch.randn([batch, 3, 2, 2], generator=torch.Generator().manual_seed(0))
    together = torch.empty_like(whole := minibatch_stddev(x, group))
    for part in deal(batch, group, parts):
        if part:
            together[part] = minibatch_stddev(x[part], group)
    torch.testing.assert_close(together, whole)
    assert math.isfinite(float(whole.sum()))


# --- the published schedules ------------------------------------------------------------------------------------------

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


# --- the automatic schedule -------------------------------------------------------------------------------------------


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
