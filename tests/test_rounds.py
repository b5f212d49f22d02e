"""Rounds of steps of D: plain ones and WGAN's rounds of warm-up, as a function of the number of a step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from configuring import config_of, refused
from test_engine_steps import entered, sides_of, stepped

from stylegan_pg.config import OptimConfig
from stylegan_pg.config.rounds import Place, g_share, place_of
from stylegan_pg.config.schedule import phases
from stylegan_pg.planning import scaling
from stylegan_pg.planning.cost import cost_of


def places(optim: OptimConfig) -> Iterator[Place]:
    """The places of all steps, counted one by one."""
    for number in itertools.count():
        warm = number < optim.d_warmup_rounds or (optim.d_warmup_every and number % optim.d_warmup_every == 0)
        length = optim.d_warmup_steps if warm else optim.d_steps
        yield from (Place(number, step, length) for step in range(length))


CASES: list[dict[str, Any]] = [
    {},
    {"d_steps": 3},
    {"d_steps": 5, "d_warmup_rounds": 4, "d_warmup_steps": 7},
    {"d_steps": 5, "d_warmup_rounds": 4, "d_warmup_every": 6, "d_warmup_steps": 7},
    {"d_steps": 5, "d_warmup_rounds": 6, "d_warmup_every": 3, "d_warmup_steps": 7},
    {"d_steps": 5, "d_warmup_every": 6, "d_warmup_steps": 7},
    {"d_steps": 2, "d_warmup_every": 1, "d_warmup_steps": 3},
    {"d_steps": 4, "d_warmup_rounds": 1, "d_warmup_every": 2, "d_warmup_steps": 1},  # fewer steps than a plain round
    {"d_steps": 1, "d_warmup_rounds": 25, "d_warmup_every": 500, "d_warmup_steps": 100},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_closed_form(case):
    optim = OptimConfig(**case)
    for number, expected in zip(range(4000), places(optim), strict=False):
        assert place_of(optim, number) == expected


def test_wgan_as_it_was_published():
    """100 steps in each of the first 25 rounds and in each 500th, otherwise 5 (Arjovsky et al. 2017, their program)."""
    optim = OptimConfig(d_steps=5, d_warmup_rounds=25, d_warmup_every=500, d_warmup_steps=100)
    opening = {}
    for number in range(20_000):
        place = place_of(optim, number)
        opening.setdefault(place.round, (number, place.length))
    assert [opening[r] for r in (0, 1, 24, 25, 26)] == [(0, 100), (100, 100), (2400, 100), (2500, 5), (2505, 5)]
    assert opening[500] == (2500 + 475 * 5, 100)
    assert opening[501] == (2500 + 475 * 5 + 100, 5)
    assert [r for r, (_, length) in opening.items() if length == 100] == [
        *range(25),
        *range(500, max(opening) + 1, 500),
    ]


def test_far_steps_take_no_time():
    optim = OptimConfig(d_steps=5, d_warmup_rounds=25, d_warmup_every=500)
    cycle = 100 + 499 * 5
    near, far = place_of(optim, 10_000), place_of(optim, 10_000 + cycle * 10**12)
    assert far == near._replace(round=near.round + 500 * 10**12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_share_of_g(case):
    optim = OptimConfig(**case, g_steps=2)
    for steps in (1, 2, 17, 1000, 3999):
        turns = {place.round for place in itertools.islice(places(optim), steps)}
        assert abs(g_share(optim, steps) * steps - 2 * len(turns)) <= 2  # the last round may not be whole
    if not case.get("d_warmup_rounds") and not case.get("d_warmup_every"):
        assert g_share(optim, 17) == pytest.approx(2 / optim.d_steps, rel=1e-12)


def test_g_trains_when_a_round_begins(tiny_data):
    given = ["optim.d_steps=2", "optim.d_warmup_rounds=1", "optim.d_warmup_every=3", "optim.d_warmup_steps=4"]
    engine = entered(tiny_data, *given, "optim.g_steps=2")
    seen = list(stepped(engine, 14))
    # rounds begin at the steps 0, 4 (of which the first was one of warm-up), 6, 8 (the third, again), 12
    assert "".join("g" if "G" in sides_of(moved) else "." for _, moved in seen) == "g...g.g.g...g."
    assert all("D" in sides_of(moved) for _, moved in seen)
    assert [stats["loss_g"][1] for stats, _ in seen if "loss_g" in stats] == [16] * 5


def test_lazy_terms_of_g_count_its_turns(tiny_data):
    given = ["optim.d_steps=1", "optim.d_warmup_rounds=1", "optim.d_warmup_steps=3", "loss.pl_every=2"]
    engine = entered(tiny_data, *given, "loss.pl_weight=1")
    seen = list(stepped(engine, 7))  # G's turns are at 0, 3, 4, 5, 6
    assert [i for i, (stats, _) in enumerate(seen) if "pl_length" in stats] == [0, 4, 6]


def test_the_plan_knows_how_often_g_trains():
    warm = ["optim.d_warmup_rounds=10", "optim.d_warmup_steps=50"]
    common = ["loss.r1_gamma=0", "loss.pl_weight=0", "resolution=8", "train.batch=10", "train.total_kimg=10"]
    plain, slow = (config_of(*common, *more) for more in ([], warm))
    costs = [cost_of(config, phases(config)[0], 3, 0) for config in (plain, slow)]
    assert costs[1].flops_per_image < costs[0].flops_per_image
    often = [scaling.sums(c, phases(c)[0], cost)[1][0] for c, cost in zip((plain, slow), costs, strict=True)]
    assert often == [1, pytest.approx(510 / 1000)]  # 10 rounds of 50 steps, and 500 of one


def test_values_that_are_not_possible():
    assert refused("optim.d_warmup_steps=0").startswith("optim.d_warmup_steps=0 is not possible")
    assert refused("optim.d_warmup_every=-1").startswith("optim.d_warmup_every=-1 is not possible")
