"""The schedule as a function of nimg, compared with examples by hand and with brute force."""

import dataclasses
import itertools
import math
import random
from typing import Any

import pytest
import torch
import yaml

from stylegan_pg.config import Config, DataConfig
from stylegan_pg.config.schedule import (
    Phase,
    at,
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
