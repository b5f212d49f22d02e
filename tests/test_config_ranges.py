"""Ranges and choices of the configuration's keys."""

import dataclasses
import math
import re
from typing import Any

import pytest
from configuring import config_of, refused

from stylegan_pg.config import Config
from stylegan_pg.config.checks import check
from stylegan_pg.errors import UsageError

# Keys whose values start above 0, at 0, lie between 0 and 1, are one of a few words, and go by resolution.
ONE_UP = """model.z_dim model.w_dim model.mapping_layers model.channel_base model.channel_max model.mbstd_group
    growth.devices optim.g_lr optim.d_lr optim.eps loss.r1_every loss.pl_every loss.pl_batch_shrink ema.kimg train.batch
    train.check_ranks_every output.tick_kimg checkpoint.every_kimg checkpoint.keep checkpoint.max_failures
    metrics.images train.total_kimg optim.d_steps optim.g_steps
    optim.d_warmup_steps"""
ZERO_UP = """seed data.workers model.mbstd_channels model.low_precision_resolutions growth.stable_kimg
    growth.fade_kimg loss.r1_gamma loss.pl_weight train.micro_batch train.threads output.grid_kimg
    output.snapshot_kimg metrics.every_kimg loss.d_clip optim.d_warmup_rounds optim.d_warmup_every"""
UNIT = "model.w_avg_beta optim.beta1 optim.beta2 loss.pl_decay loss.style_mixing"
CHOICES = """model.name model.g_architecture model.d_architecture model.low_precision growth.schedule growth.optimizer
    loss.objective train.device train.dtype optim.name"""
TABLES = """growth.stable_kimg_at growth.fade_kimg_at optim.lr_at optim.g_lr_at optim.d_lr_at loss.r1_gamma_at
    train.batch_at train.micro_batch_at"""


@pytest.fixture(scope="module")
def possible() -> Config:
    return config_of()


def changed(node: Any, key: str, value: Any) -> Any:
    """A copy of a configuration with one value changed: a tenth of the time of loading it again."""
    name, _, rest = key.partition(".")
    return dataclasses.replace(node, **{name: changed(getattr(node, name), rest, value) if rest else value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in ONE_UP.split() for value in (0, -1, math.inf)),
        *((key, value) for key in ZERO_UP.split() for value in (-1, math.nan)),
        *((key, value) for key in UNIT.split() for value in (-0.1, 1.1)),
        *((key, "nonsense") for key in CHOICES.split()),
        *((key, table) for key in TABLES.split() for table in ({12: 1}, {2: 1}, {8: -1}, {8: math.inf})),
        *(("resolution", value) for value in (0, 2, 48, -64)),
        *(("growth.start", value) for value in (0, 2, 12, 2048)),
        *(("growth.optimizer_at", table) for table in ({12: "carry"}, {8: "keep"})),
        ("model.channel_base", 512),
        ("model.resample_filter", [1]),
        ("model.resample_filter", [1, -1]),
        ("output.grid", [1]),
        ("output.grid", [0, 4]),
        ("output.grid", [1, 2, 3]),
        ("train.batch_at", {8: 0}),
        ("optim.beta1", 1),
        ("optim.beta2", 1),
        ("model.conv_clamp", 0),
        ("ema.rampup", 0),
        ("train.threads", 1025),
        ("model.mbstd_channels", 3),
    ],
)
def test_values_out_of_range_are_refused_by_key(possible, key, value):
    with pytest.raises(UsageError, match=rf"^{re.escape(key)}=.* is not possible: it must be "):
        check(changed(possible, key, value))


def test_values_out_of_range_are_refused_when_loading():
    for override in ("train.batch=0", "train.total_kimg=.inf", "growth.stable_kimg_at={8: .inf}", "optim.beta1=1"):
        assert refused(override).startswith(override.split("=")[0])
        assert "it must be" in refused(override)


def test_limits_that_are_possible():
    config_of(*(f"{key}=0" for key in ZERO_UP.split()), *(f"{key}=0" for key in UNIT.split()))
    config_of("model.w_avg_beta=1", "loss.style_mixing=1", "resolution=4", "growth.start=4", "ema.rampup=0.05")
    # Tables may go on above the resolution: half the resolution is one override.
    assert config_of("resolution=8", "train.batch_at={16: 4}").train.batch_at == {16: 4}
