"""Whether the values of a configuration are possible: each by itself, as its field demands, and all together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from stylegan_pg.config import (
    FAMILIES_OF,
    MODELS,
    OPERATIONS,
    SPECIAL,
    ADAConfig,
    Config,
    ConvolutionalConfig,
    FixedConfig,
    GrowingConfig,
    MinibatchConfig,
    ObjectiveName,
    PipelineConfig,
    PlainConfig,
    R3GANConfig,
    StyleGAN3Config,
    TermConfig,
    curves,
    r3gan_stages,
)
from stylegan_pg.config.families import FAMILIES, base_of
from stylegan_pg.config.fields import Demand, values_of
from stylegan_pg.config.plain import publishable
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import printable

SMOOTH = tuple(name.value for name in (ObjectiveName.LOGISTIC, ObjectiveName.SATURATING, ObjectiveName.LSGAN))
TWICE = {"r1": " (loss.r1_gamma=0 takes R1 away)", "path_length": " (loss.pl_weight=0 takes it away)"}


def check(config: Config) -> None:
    """Check all ranges, and what contradicts itself.

    Raises:
        UsageError: naming the key, its value and what it may be.
    """
    _check_given(config)
    if config.train.zero_stage == 3:
        raise UsageError(
            "train.zero_stage=3 is not possible: ZeRO-3 takes weights apart as soon as a layer has run, and the terms "
            "that differentiate twice (R1, path length) need them again; take train.zero_stage=2"
        )
    _check_fields(config, config)
    for part in (_check_system, _check_growth, _check_model, _check_augment, _check_train, _check_terms):
        part(config)


def value_of(config: Any, key: str) -> Any:
    """The value of a key such as "optim.g_lr"."""
    for part in key.split("."):
        config = getattr(config, part)
    return config


def _demand(config: Config, condition: object, key: str, wanted: str) -> None:
    if not condition:
        value = printable(value_of(publishable(config), key))
        raise UsageError(f"{key}={value} is not possible: it must be {wanted}")


def _check_given(config: Config) -> None:
    _demand(config, config.run, "run", "the folder of the run")
    if not config.data.url and not config.data.mixture:
        raise UsageError("data.url is not set: give it in the configuration, or as data.url=... on the command line")
    _demand(config, not config.data.url or not config.data.mixture, "data.mixture", "empty if data.url is given")


def _check_fields(config: Config, node: Any, prefix: str = "") -> None:
    """What each field demands of its own value."""
    _check_class(config, node, prefix)
    for field in dataclasses.fields(node):
        value, key = getattr(node, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            _check_fields(config, value, f"{key}.")
        if values_of(field).curve is not None and (curves.is_curve(value) or not isinstance(value, int | float)):
            _check_curves(value, values_of(field).curve or (), key)
            continue
        for demand in values_of(field).demands if value is not None else ():
            _demand(config, demand.fits(value), key, demand.wanted)


def _check_curves(value: Any, demands: Sequence[Demand], key: str) -> None:
    """What a key demands of the ends of its curves."""
    curves.read(value, key)
    for named, number in curves.numbers_in(value, key):
        for demand in demands:
            if not demand.fits(number):
                raise UsageError(f"{named}={number:g} is not possible: it must be {demand.wanted}")


def _check_class(config: Config, node: Any, prefix: str) -> None:
    """A section of several classes must be of the one that it names."""
    base = base_of(type(node))
    if base:
        selector, classes, _ = FAMILIES[base]
        wanted = " or ".join(classes)
        _demand(config, classes.get(getattr(node, selector)) is type(node), prefix + selector, wanted)


def _check_system(config: Config) -> None:
    """Each system trains some families of networks only."""
    name = config.system.name
    possible = FAMILIES_OF.get(name) or tuple(MODELS.keys() - set(SPECIAL))
    if config.model.name not in possible:
        others = [system for system, families in FAMILIES_OF.items() if config.model.name in families]
        remedy = f"take model.name={' or '.join(sorted(possible))}"
        remedy += f", or system.name={' or '.join(others)}" if others else ""
        raise UsageError(f"system.name={name} is not possible with model.name={config.model.name}: {remedy}")


def _check_growth(config: Config) -> None:
    start, total, model = config.growth.start, config.train.total_kimg, config.model
    fits = start is None or start <= config.resolution
    _demand(config, fits, "growth.start", f"a power of two from 4 to {config.resolution}, or null")
    grows = isinstance(model, GrowingConfig)
    _demand(config, grows or start is None, "growth.start", f"null: {model.name} networks do not grow")
    automatic = config.growth.schedule == "auto"
    _demand(config, grows or not automatic, "growth.schedule", f"tables: {model.name} networks do not grow")
    _demand(config, total is not None or not automatic, "train.total_kimg", "given for growth.schedule=auto")
    _demand(config, total is not None or start is not None, "train.total_kimg", "given where nothing grows")


def _check_model(config: Config) -> None:
    model = config.model
    if isinstance(model, MinibatchConfig):
        fits = not model.minibatch_kernels or model.mbstd_group > 1
        _demand(config, fits, "model.mbstd_group", "2 or more with model.minibatch_kernels, which compare images")
    fits = not model.low_precision_at or model.low_precision != "fp32"
    _demand(config, fits, "model.low_precision", "bf16, fp16 or auto if model.low_precision_at is given")
    if isinstance(model, R3GANConfig):
        _check_stages(model, config.resolution)
    elif isinstance(model, ConvolutionalConfig):
        bases, width = ["channel_base"], min(model.channel_base // 4, model.channel_max)
        if isinstance(model, StyleGAN3Config):
            bases += ["d_channel_base"] if model.d_channel_base else []
            width = min((model.d_channel_base or model.channel_base) // 4, model.d_channel_max or model.channel_max)
        for key in bases:
            fits = getattr(model, key) >= config.resolution
            _demand(config, fits, f"model.{key}", f"at least {config.resolution}")
        fits = not model.mbstd_channels or width % model.mbstd_channels == 0
        _demand(config, fits, "model.mbstd_channels", f"a divisor of {width}, the channels at 4x4, or 0")


def _check_stages(model: R3GANConfig, resolution: int) -> None:
    """Channels and groups of each resolution of R3GAN."""
    for r, stage in r3gan_stages(model, resolution).items():
        if stage.channels < 1:
            raise UsageError(
                f"model.channel_base={model.channel_base} leaves no channels at resolution {r}: give "
                f"model.channel_base={r} or more, or model.channels_at={{{r}: CHANNELS}}"
            )
        if stage.channels > 1 << 16:
            raise UsageError(f"model.channels_at={{{r}: {stage.channels}}} is not possible: at most 65536 channels")
        inner = model.expansion * stage.channels
        if inner % stage.groups:
            given = f"model.groups_at={{{r}: {stage.groups}}}"
            how = given if r in model.groups_at else f"groups of model.group_width={model.group_width}"
            raise UsageError(
                f"{how} at resolution {r}: the {inner} channels there ({stage.channels} times model.expansion="
                f"{model.expansion}) do not divide into {stage.groups} groups; give a divisor of {inner} as "
                f"model.groups_at={{{r}: GROUPS}}, or other channels as model.channels_at={{{r}: CHANNELS}}"
            )


def _check_multipliers(augment: PipelineConfig) -> None:
    """Only operations that are in the pipeline have a multiplier."""
    for name, factor in augment.multipliers.items():
        letter = next(letter for letter, names in OPERATIONS.items() if name in names)
        if letter not in augment.pipeline:
            raise UsageError(
                f"augment.multipliers={{{name}: {factor:g}}} has no effect: augment.pipeline={augment.pipeline} lacks "
                f"{letter}, which {name} belongs to; add it, or leave {name} away"
            )


def _check_augment(config: Config) -> None:
    augment = config.augment
    smallest = min(config.model.base) * (config.growth.start or config.resolution) // 4
    if isinstance(augment, ADAConfig) and curves.is_curve(augment.p):
        raise UsageError(
            "augment.p is a curve, but augment.mode=ada chooses the probability itself: give the number that it starts "
            "with, or take augment.mode=fixed"
        )
    if isinstance(augment, PipelineConfig):
        _check_multipliers(augment)
    if isinstance(augment, FixedConfig):
        numbers = [number for _, number in curves.numbers_in(augment.p, "")]
        fits = any([*numbers, *augment.p_at.values(), *augment.p_from.values()])
        _demand(config, fits, "augment.p", "above 0 with augment.mode=fixed")
    blurs = any([*(n for _, n in curves.numbers_in(config.loss.blur_sigma, "")), *config.loss.blur_sigma_at.values()])
    fits = isinstance(config.model, ConvolutionalConfig) or not (blurs or any(config.loss.blur_sigma_from.values()))
    _demand(config, fits, "loss.blur_sigma", f"0 with {config.model.name} networks, whose images are points")
    fits = augment.mode == "none" or (smallest >= 2 and isinstance(config.model, ConvolutionalConfig))
    _demand(config, fits, "augment.mode", "none for pictures with a side of one pixel")


def _check_train(config: Config) -> None:
    train, start = config.train, config.growth.start
    grows = start not in (None, config.resolution)
    has_blocks = isinstance(config.model, ConvolutionalConfig) and not isinstance(config.model, PlainConfig)
    possible = not train.freeze_d or (config.init and not grows and has_blocks)
    wanted = "0, unless the networks do not grow and begin with init=CHECKPOINT"
    _demand(config, possible, "train.freeze_d", wanted)
    if train.zero_offload and not train.zero_stage:
        raise UsageError("train.zero_offload=true needs train.zero_stage=1 or 2: stage 0 has no shards to move")
    optim = config.optim
    if train.engine == "deepspeed" and optim.name != "adam":
        raise UsageError(
            f"optim.name={optim.name} needs train.engine=accelerate: train.engine=deepspeed shards Adam's moments only"
        )
    fits = optim.name != "rmsprop" or optim.beta1 == 0
    _demand(config, fits, "optim.beta1", "0 with optim.name=rmsprop, which keeps no mean of gradients")
    if train.engine == "deepspeed" and train.dtype != "float32":
        raise UsageError(f"train.dtype={train.dtype} needs train.engine=accelerate: DeepSpeed's shards are float32")


def _check_terms(config: Config) -> None:
    for term in config.loss.terms:
        _check_term(term)
    smooth = config.loss.real_target == 1 or config.loss.objective in SMOOTH
    wanted = f"1 with loss.objective={config.loss.objective}, which has no targets: it is for {', '.join(SMOOTH)}"
    _demand(config, smooth, "loss.real_target", wanted)
    names = [term.name for term in config.loss.all_terms()]
    if "path_length" in names and isinstance(config.model, R3GANConfig):
        raise UsageError(
            f"loss.pl_weight={config.loss.pl_weight:g} is not possible with model.name={config.model.name}: its "
            "generator has no ws, whose path lengths could be regularised; take loss.pl_weight=0 (and loss.terms "
            "without path_length)"
        )
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"loss.terms: {name} is there twice: leave one of them away{TWICE.get(name, '')}")


def _check_term(term: TermConfig) -> None:
    if term.name not in FAMILIES[TermConfig].classes:
        raise UsageError(_of_term(term, "name", " or ".join(FAMILIES[TermConfig].classes)))
    for field in dataclasses.fields(term):
        if curves.is_curve(value := getattr(term, field.name)):
            named = f"loss.terms: {printable(term.name, 80)}: {field.name}"
            _check_curves(value, values_of(field).curve or (), named)
            continue
        for demand in values_of(field).demands:
            if not demand.fits(getattr(term, field.name)):
                raise UsageError(_of_term(term, field.name, demand.wanted))


def _of_term(term: TermConfig, key: str, wanted: str) -> str:
    name, value = printable(term.name, 80), printable(getattr(term, key))
    return f"loss.terms: {name}: {key}={value} is not possible: it must be {wanted}"
