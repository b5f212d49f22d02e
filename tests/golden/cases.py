"""The training runs that `record.py` makes: what each of them overrides, and which dataset it is given.

Every case is one tiny run on the CPU. Each of them differs from the others in one thing, so that a difference between
two recordings says where to look.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Grows from 8x8 over a fade to 16x16, in four steps of eight images each; every kind of step happens in each phase.
TINY = {
    "resolution": 16,
    "seed": 3,
    "data.url": "data/rgb",
    "model.z_dim": 16,
    "model.w_dim": 16,
    "model.mapping_layers": 2,
    "model.channel_base": 128,
    "model.channel_max": 8,
    "growth.start": 8,
    "growth.stable_kimg": 0.032,
    "growth.fade_kimg": 0.032,
    "train.batch": 8,
    "loss.r1_every": 2,
    "loss.r1_gamma": 1,
    "loss.pl_every": 2,
}
# Settings that no case varies: one thread, little output, and only the newest checkpoint.
COMMON = {
    "data.workers": 0,
    "train.threads": 1,
    "train.device": "cpu",
    "output.tick_kimg": 0.008,
    "output.grid_kimg": 0.032,
    "output.grid": "[2,2]",
    "output.snapshot_kimg": 0,
    "output.trackers": "[]",
    "checkpoint.every_kimg": 0.032,
    "checkpoint.keep": 1,
}
# Small versions of the shipped configurations. Objective, terms, architectures, augmentation, optimiser and mapping
# depth are as shipped.
SHIPPED = {
    "data.url": "data/rgb",
    "model.z_dim": 16,
    "model.w_dim": 16,
    "model.channel_base": 256,
    "model.channel_max": 16,
    "checkpoint.every_kimg": 0.016,
    "output.grid_kimg": 0.016,
}
FULL_SIZE = {"resolution": 16, "train.total_kimg": 0.064, "train.batch": 8}
GROWS_TO_16 = {
    "resolution": 16,
    "growth.stable_kimg": 0.024,
    "growth.fade_kimg": 0.024,
    "growth.stable_kimg_at": "{}",
    "growth.fade_kimg_at": "{}",
    "train.total_kimg": "null",
    "train.batch": 8,
}
MEASURES = {"metrics.every_kimg": 0.032, "metrics.images": 32}
STEEP_ADA = {"augment.kimg": 0.1, "augment.p": 0.3}
NO_TERMS = {"loss.r1_gamma": 0, "loss.pl_weight": 0}
NOT_GROWING = {"growth.start": "null", "train.total_kimg": 0.064}
POINTS = {
    "resolution": 4,
    "data.url": "points:ring",
    "model.name": "mlp",
    "model.base": "[1,1]",
    "model.mbstd_channels": 0,
    "growth.start": "null",
    "train.total_kimg": 0.064,
    "loss.pl_weight": 0,
}
POSITIVE_ADA = {"augment.mode": "ada", "augment.interval": 2, "augment.kimg": 0.1, "augment.p": 0.3}
CONDITIONAL = {"data.conditional": "true"}
LARGE_BATCHES = {"train.batch": 64, "growth.stable_kimg": 0.512, "growth.fade_kimg": 0.512}  # past 1 kimg
# Keys of TINY and SHIPPED that families of networks do not have.
NOT_READ = {"progan": ("model.w_dim", "model.mapping_layers"), "mlp": ("model.w_dim", "model.channel_base")}


def own_keys(values: dict[str, Any], model: str) -> dict[str, Any]:
    """`values` without what the networks of that name do not read."""
    return {key: value for key, value in values.items() if key not in NOT_READ.get(model, ())}


FLOAT64 = {"train.dtype": "float64"}


@dataclass(frozen=True)
class Case:
    """One run. `legs` are overrides of further calls of `train` that resume it. `commands` are run on its last
    snapshot, whose path replaces "SNAPSHOT". `init` is the name of the case whose last checkpoint this run starts
    from."""

    name: str
    overrides: dict[str, Any]
    config: str = ""  # the name of a shipped configuration, or ""
    ranks: int = 0  # processes under torchrun; 0: a single process without it
    legs: list[dict[str, Any]] = field(default_factory=list)
    commands: list[list[str]] = field(default_factory=list)
    init: str = ""
    needs: str = ""  # a package that the case requires

    def arguments(self, leg: dict[str, Any], init_path: str = "") -> list[str]:
        """Return the arguments after `python -m stylegan_pg train CONFIG` for the first call, or for a leg."""
        values = COMMON | self.overrides | leg | {"run": f"runs/{self.name}"}
        if init_path:
            values["init"] = init_path
        name = values.get("model.name") or ("progan" if "progan" in self.config else "")
        return [f"{key}={value}" for key, value in own_keys(values, name).items()]


SAMPLE = ["sample", "SNAPSHOT", "--seeds", "0-3", "--psi", "0.7"]
METRICS = "metrics SNAPSHOT --extractor pixels --metrics fid32_full,kid32_full,pr323_full,swd16,ms_ssim --batch 16"


def tiny(name: str, overrides: dict[str, Any] | None = None, **how: Any) -> Case:
    return Case(name, TINY | (overrides or {}), **how)


def term(name: str, every: int, weight: float = 1.0, more: str = "") -> dict[str, Any]:
    """Replace R1 and path length by one term."""
    return NO_TERMS | {"loss.terms": f"[{{name: {name}, weight: {weight}, every: {every}{more}}}]"}


def shipped(config: str, *overrides: dict[str, Any], **how: Any) -> Case:
    values = dict(SHIPPED)
    for some in overrides:
        values |= some
    return Case(f"shipped-{config}", values, config, **how)


def _shipped() -> list[Case]:
    """All files in configs/ with smaller sizes. Those that grow cross every kind of boundary."""
    tables = {"train.batch_at": "{8: 16}", "train.micro_batch_at": "{16: 4}"}
    gammas = {"loss.r1_gamma_at": "{8: 0.05, 16: 1}"}
    rates = {"optim.lr_at": "{8: 0.0015, 16: 0.003}"}
    demo = {"train.batch_at": "{8: 16}"}
    # `auto` would measure on each machine which precision is faster.
    fixed = {"model.low_precision": "fp32"}
    progan = {"growth.stable_kimg": 0.016, "growth.fade_kimg": 0.016} | rates
    late = {"loss.r1_gamma_from": "{0: 3, 1: 2}"}
    auto = {"growth.devices": 1, "train.batch_at": "{8: 8, 16: 8}", "train.total_kimg": 0.384}
    auto |= {"resolution": 16, "loss.r1_gamma_at": "{8: 0.02}"}
    return [
        *(shipped(f"ada-small-data{r}", FULL_SIZE, STEEP_ADA, MEASURES, fixed) for r in (64, 128)),
        shipped("ada-small-data256", FULL_SIZE, STEEP_ADA, MEASURES, {"train.micro_batch": 8, "train.batch": 16}),
        shipped("demo", GROWS_TO_16, demo),
        shipped("demo-long", GROWS_TO_16, demo, late, MEASURES),
        shipped("ffhq1024", GROWS_TO_16, MEASURES, tables, gammas),
        shipped("progan-celebahq1024", GROWS_TO_16, MEASURES, progan, tables),
        shipped("progan-celebahq1024-1gpu", GROWS_TO_16, MEASURES, progan, {"train.batch_at": "{16: 6}"}),
        shipped("stylegan-ffhq1024", GROWS_TO_16, MEASURES, tables, rates),
        shipped("stylegan2-ffhq1024", FULL_SIZE, MEASURES, {"train.micro_batch": 4}),
        shipped("stylegan2-ffhq256", FULL_SIZE, MEASURES, {"train.micro_batch": 8, "train.batch": 16}),
        shipped("stylegan2-growing256", MEASURES, auto),
    ]


def _losses() -> list[Case]:
    """Objectives and regularisation terms, at every step and at every second one."""
    objectives = ("logistic", "saturating", "wgan", "lsgan", "hinge", "relativistic")
    cases = [tiny(f"objective-{name}", {"loss.objective": name}) for name in objectives]
    for every in (1, 2):
        cases += [
            tiny(f"term-r1-{every}", {"loss.r1_every": every, "loss.pl_weight": 0}),
            tiny(f"term-path_length-{every}", {"loss.r1_gamma": 0, "loss.pl_every": every}),
            tiny(f"term-drift-{every}", term("drift", every, 0.001)),
            tiny(f"term-r2-{every}", term("r2", every)),
            tiny(f"term-gradient_penalty-{every}", term("gradient_penalty", every, 10, ", target: 0.5")),
            tiny(f"term-dragan-{every}", term("dragan", every)),
        ]
    tables = ", weight_at: {8: 2, 16: 3}, weight_from: {1: 0.5}"
    every_term = "[{name: r2, every: 3}, {name: gradient_penalty}, {name: drift, every: 2}, {name: dragan, every: 4}]"
    return [
        *cases,
        tiny("term-tables", term("r2", 2, 1, tables) | LARGE_BATCHES),
        tiny("term-all", {"loss.terms": every_term}),
        tiny("r1-gamma-at", {"loss.r1_gamma_at": "{8: 2, 16: 5}"}),
        tiny("r1-gamma-from", {"loss.r1_gamma_from": "{0: 3, 1: 2}"} | LARGE_BATCHES),
        tiny("d-clip", {"loss.objective": "wgan", "loss.d_clip": 0.1}),
        tiny("path-length-decay", {"loss.pl_decay": 0.1, "loss.pl_batch_shrink": 4, "loss.pl_weight": 1}),
        tiny("style-mixing-0", {"loss.style_mixing": 0}),
        tiny("style-mixing-0.9", {"loss.style_mixing": 0.9}),
    ]


def _data() -> list[Case]:
    """The input of D: augmentation, labels, kinds of images, several datasets."""
    foreign = "data/tars/a-{000..001}.tar"
    mixed = {"data.url": "''", "data.mixture": "{data/rgb: 1, data/other: 2.5}"}
    with_tars = {"data.url": "''", "data.mixture": f'{{"{foreign}": 1, data/rgb: 2}}'} | CONDITIONAL
    return [
        tiny("ada", POSITIVE_ADA, commands=[SAMPLE]),
        tiny("ada-all", POSITIVE_ADA | {"augment.pipeline": "bgcfno", "augment.target": -1}),
        tiny("augment-fixed", {"augment.mode": "fixed", "augment.p": 0.7, "augment.pipeline": "bgcfno"}),
        tiny("diffaugment", {"augment.mode": "diffaugment"}),
        tiny("diffaugment-color", {"augment.mode": "diffaugment", "augment.policy": "color"}),
        tiny(
            "conditional", CONDITIONAL, commands=[[*SAMPLE, "--labels", "a,#2"], ["sample", "SNAPSHOT", "--class-grid"]]
        ),
        tiny("conditional-ada", CONDITIONAL | POSITIVE_ADA),
        tiny("mirror", {"data.mirror": "true"}),
        tiny("base-4x6", {"data.url": "data/wide", "model.base": "[4,6]"}, commands=[SAMPLE]),
        tiny("grey", {"data.url": "data/grey"}),
        tiny("grey-ada", {"data.url": "data/grey"} | POSITIVE_ADA),
        tiny("rgba", {"data.url": "data/rgba"}),
        tiny("jpg", {"data.url": "data/jpg"}),
        tiny("window", {"data.window": 16}),
        tiny("mixture", mixed),
        tiny("foreign-tars", {"data.url": foreign}),
        tiny("foreign-tars-mixture", with_tars),
    ]


def _networks() -> list[Case]:
    """Network families and architectures."""
    progan = {"model.name": "progan", "growth.start": 4} | NO_TERMS
    stylegan = {"model.name": "stylegan", "loss.pl_weight": 0}
    pictures = NOT_GROWING | {"model.name": "mlp", "resolution": 4, "loss.pl_weight": 0}
    cases = [
        tiny("mlp-points", POINTS),
        tiny("mlp-points-conditional", POINTS | CONDITIONAL | {"data.url": "points:grid25", "loss.objective": "wgan"}),
        tiny("mlp-pictures", pictures, commands=[SAMPLE]),
        tiny("progan", progan, commands=[SAMPLE]),
        tiny("progan-wgan", progan | {"loss.objective": "wgan"} | term("gradient_penalty", 1, 10)),
        tiny("progan-conditional", progan | CONDITIONAL),
        tiny("stylegan", stylegan, commands=[SAMPLE]),
        tiny("stylegan-conditional", stylegan | CONDITIONAL),
        tiny("stylegan-path-length", {"model.name": "stylegan"}),
        tiny("noise-off", {"model.noise": "false"}),
        tiny("conv-clamp", {"model.conv_clamp": 0.5}),
        tiny("resample-box", {"model.resample_filter": "[1,1]"}),
        tiny("mbstd-off", {"model.mbstd_channels": 0}),
        tiny("mbstd-2-channels", {"model.mbstd_channels": 2, "model.mbstd_group": 8}),
        tiny("w-avg-beta", {"model.w_avg_beta": 0.5, "output.grid_psi": 0.5}),
    ]
    for name in ("skip", "resnet", "orig"):
        both = {"model.g_architecture": name, "model.d_architecture": name}
        cases += [tiny(f"stylegan2-{name}", both), tiny(f"stylegan2-{name}-full-size", both | NOT_GROWING)]
    return cases


def _training() -> list[Case]:
    """Steps, optimizers, growth, precision, and resumed or initialised runs."""
    carry, reset = ({"growth.optimizer": how} for how in ("carry", "reset"))
    auto = {"growth.start": "null", "growth.schedule": "auto", "growth.devices": 1, "train.batch_at": "{8: 8, 16: 8}"}
    auto |= {"growth.stable_kimg": 0.08, "growth.fade_kimg": 0.064}
    frozen = NOT_GROWING | {"train.freeze_d": 1}
    everything = ["fid32_full", "kid32_full", "pr323_full", "swd", "ms_ssim"]
    measured = {"metrics.every_kimg": 0.032, "metrics.images": 32, "metrics.extractor": "pixels"}
    return [
        tiny("plain", commands=[SAMPLE, [*METRICS.split(), "--data", "data/rgb"]]),
        tiny("micro-batch", {"train.micro_batch": 4}),
        tiny("micro-batch-uneven", {"train.micro_batch": 8, "train.batch": 12}),
        tiny("batch-tables", {"train.batch_at": "{8: 16}", "train.micro_batch_at": "{8: 8, 16: 4}"}),
        tiny(
            "rate-tables", {"optim.lr_at": "{8: 0.001}", "optim.g_lr_at": "{16: 0.004}", "optim.d_lr_at": "{8: 0.003}"}
        ),
        tiny("adam", {"optim.beta1": 0.5, "optim.beta2": 0.9, "optim.eps": 1e-6, "optim.g_lr": 0.001}),
        tiny("d-steps-2", {"optim.d_steps": 2}),
        tiny("g-steps-2", {"optim.g_steps": 2}),
        tiny("d-and-g-steps", {"optim.d_steps": 3, "optim.g_steps": 2}),
        tiny("ema", {"ema.kimg": 0.02, "ema.rampup": 0.1}),
        tiny("growth-carry", carry),
        tiny("growth-reset", reset),
        tiny("growth-optimizer-at", carry | {"growth.start": 4, "growth.optimizer_at": "{8: reset}"}),
        tiny("growth-auto", auto | {"train.total_kimg": 0.384}),
        tiny("growth-cut", {"train.total_kimg": 0.056}),
        tiny("not-growing", NOT_GROWING),
        tiny("resolution-32", {"resolution": 32, "growth.stable_kimg": 0.016, "growth.fade_kimg": 0.016}),
        tiny("continued", {"train.total_kimg": 0.048}, legs=[{"train.total_kimg": "null"}]),
        tiny(
            "continued-otherwise", {"train.total_kimg": 0.048}, legs=[{"train.total_kimg": "null", "loss.r1_gamma": 3}]
        ),
        tiny("init", NOT_GROWING, init="plain"),
        tiny("init-growing", {}, init="plain"),
        tiny("init-conditional", NOT_GROWING | CONDITIONAL, init="plain"),
        tiny("freeze-d", frozen, init="plain"),
        tiny("low-precision-bf16", {"model.low_precision": "bf16", "model.low_precision_resolutions": 1}),
        tiny("low-precision-bf16-all", {"model.low_precision": "bf16"}),
        tiny("low-precision-bf16-at", {"model.low_precision": "bf16", "model.low_precision_at": "[8]"}),
        tiny("channels-last", {"train.channels_last": "true"}),
        tiny("channels-first", {"train.channels_last": "false"}),
        tiny("loss-scale", {"train.loss_scale": 4096}),
        tiny("metrics", MEASURES),
        tiny("metrics-more", measured | {"metrics.names": f"[{','.join(everything)}]"}),
        tiny("snapshots", {"output.snapshot_kimg": 0.016, "metrics.at_snapshots": "true", "metrics.images": 32}),
    ]


def _processes() -> list[Case]:
    """Both engines, on one process and on two, with noise inputs."""
    cases = [
        tiny("ranks-2", ranks=2),
        tiny("ranks-2-ada", POSITIVE_ADA | CONDITIONAL, ranks=2),
        tiny("ranks-2-micro-batch", {"train.micro_batch": 4, "train.batch": 16}, ranks=2),
        tiny("ranks-2-metrics", MEASURES, ranks=2),
        tiny("ranks-2-progan", {"model.name": "progan", "growth.optimizer": "carry"} | NO_TERMS, ranks=2),
        tiny("ranks-2-f64", FLOAT64, ranks=2),
    ]
    for stage in (0, 1, 2):
        engine = {"train.engine": "deepspeed", "train.zero_stage": stage}
        cases += [
            tiny(f"deepspeed-{stage}", engine, needs="deepspeed"),
            tiny(f"deepspeed-{stage}-ranks-2", engine, ranks=2, needs="deepspeed"),
        ]
    carry = {"train.engine": "deepspeed", "growth.optimizer": "carry"}
    return [*cases, tiny("deepspeed-carry-ranks-2", carry, ranks=2, needs="deepspeed")]


# The cases that are also recorded in float64.
IN_FLOAT64 = [
    "plain",
    "objective-relativistic",
    "term-all",
    "ada-all",
    "diffaugment",
    "conditional",
    "base-4x6",
    "progan-wgan",
    "stylegan",
    "stylegan2-orig-full-size",
    "mlp-pictures",
    "growth-carry",
    "d-and-g-steps",
    "micro-batch",
    "mixture",
    "continued",
    "shipped-ffhq1024",
    "shipped-progan-celebahq1024",
    "shipped-stylegan-ffhq1024",
]


def _all() -> dict[str, Case]:
    cases = [*_shipped(), *_losses(), *_data(), *_networks(), *_training(), *_processes()]
    by_name = {case.name: case for case in cases}
    assert len(by_name) == len(cases), "two cases have one name"
    for name in IN_FLOAT64:
        case = by_name[name]
        double = Case(f"{name}-f64", case.overrides | FLOAT64, case.config, case.ranks, case.legs, case.commands)
        by_name[double.name] = double
    return by_name


CASES = _all()
