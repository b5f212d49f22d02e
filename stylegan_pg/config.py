"""The configuration: a tree of frozen dataclasses, filled from YAML and `key=value` overrides.

OmegaConf works at this boundary only; everything behind it sees plain immutable objects. Numbers of images are in
kimg (thousands of real images shown to D), as in the papers. Keys that end in `_at` give values by resolution, and
the plain key holds elsewhere: `batch: 32, batch_at: {4: 512, 8: 256}`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, get_type_hints

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stylegan_pg.errors import UsageError

# OmegaConf reads the annotations at run time, hence Optional and plain containers below.


@dataclass(frozen=True)
class DataConfig:
    url: str = MISSING  # the folder that `stylegan-pg pack` wrote
    mirror: bool = False  # flip each image with probability 1/2
    conditional: bool = False  # use the class labels of the dataset
    workers: int = 2  # processes per rank that read and decode; 0 for none


@dataclass(frozen=True)
class ModelConfig:
    name: str = "stylegan2"
    z_dim: int = 512
    w_dim: int = 512
    mapping_layers: int = 8
    channel_base: int = 32768  # channels at resolution r: min(channel_base / r, channel_max)
    channel_max: int = 512
    g_architecture: str = "skip"  # skip, resnet or orig
    d_architecture: str = "resnet"
    noise: bool = True  # per-pixel noise inputs of the generator
    resample_filter: list[float] = field(default_factory=lambda: [1.0, 3.0, 3.0, 1.0])
    conv_clamp: Optional[float] = None  # limit of activations; 256 in the published networks
    mbstd_group: int = 4  # the largest divisor of the batch up to this is taken
    mbstd_channels: int = 1  # 0 for no minibatch stddev
    low_precision: str = "fp32"  # fp32, bf16 or fp16 in the highest resolutions; auto: bf16 where it is faster here
    low_precision_resolutions: int = 0  # how many of them, counted from `resolution` down; for auto 0 stands for all
    low_precision_at: Optional[list[int]] = None  # which exactly; null: see above; auto fills it in at the start
    w_avg_beta: float = 0.998


@dataclass(frozen=True)
class GrowthConfig:
    start: Optional[int] = None  # first resolution; null trains at full resolution all along
    stable_kimg: float = 600.0  # per resolution, after its fade
    fade_kimg: float = 600.0  # per doubling
    stable_kimg_at: dict[int, float] = field(default_factory=dict)
    fade_kimg_at: dict[int, float] = field(default_factory=dict)
    optimizer: str = "reset"  # at the start and the end of each fade: reset, or carry over by name


@dataclass(frozen=True)
class OptimConfig:
    g_lr: float = 0.002
    d_lr: float = 0.002
    lr_at: dict[int, float] = field(default_factory=dict)  # for both players
    beta1: float = 0.0
    beta2: float = 0.99
    eps: float = 1e-8


@dataclass(frozen=True)
class TermConfig:
    """A regularisation term: `weight` times its value, added to its player's loss at every `every`-th step."""

    name: str = MISSING
    weight: float = 1.0
    every: int = 1
    weight_at: dict[int, float] = field(default_factory=dict)  # by resolution
    weight_from: dict[int, float] = field(default_factory=dict)  # from a kimg of the run on; goes before the others


@dataclass(frozen=True)
class LossConfig:
    objective: str = "logistic"
    r1_gamma: float = 10.0  # 0 for no R1
    r1_gamma_at: dict[int, float] = field(default_factory=dict)
    r1_gamma_from: dict[int, float] = field(default_factory=dict)  # {kimg: gamma}: from there on, whatever the size
    r1_every: int = 16
    pl_weight: float = 2.0  # 0 for no path length regularisation
    pl_every: int = 4
    pl_decay: float = 0.01
    pl_batch_shrink: int = 2
    style_mixing: float = 0.9  # probability of two latents per image
    terms: list[TermConfig] = field(default_factory=list)  # further ones, by their names in losses.TERMS

    def all_terms(self) -> list[TermConfig]:
        """R1 and path length, as far as they are switched on, and the further terms."""
        terms = []
        if self.r1_gamma or any(self.r1_gamma_at.values()) or any(self.r1_gamma_from.values()):
            terms.append(TermConfig("r1", self.r1_gamma, self.r1_every, self.r1_gamma_at, self.r1_gamma_from))
        if self.pl_weight:
            terms.append(TermConfig("path_length", self.pl_weight, self.pl_every))
        return terms + list(self.terms)


@dataclass(frozen=True)
class EmaConfig:
    kimg: float = 10.0  # half-life
    rampup: Optional[float] = None  # half-life at most this share of the images seen; null: none


@dataclass(frozen=True)
class TrainConfig:
    total_kimg: Optional[float] = None  # null: as long as the growth phases take
    batch: int = 32  # images per step, over all devices
    batch_at: dict[int, int] = field(default_factory=dict)
    micro_batch: int = 0  # images per pass of one device, 0: its whole share of the batch
    micro_batch_at: dict[int, int] = field(default_factory=dict)
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "float32"  # float64 is for tests
    threads: int = 0  # CPU threads per process, 0: leave to torch
    channels_last: Optional[bool] = True  # null: measure at the start which layout is faster here
    compile: bool = False  # torch.compile the passes of stable phases that are differentiated once
    tf32: bool = False  # let GPUs round fp32 convolutions and products to 10 bits
    deterministic: bool = False  # bit-exact resume on GPUs, at some cost
    check_ranks_every: int = 500  # steps between comparisons of the ranks' parameters


@dataclass(frozen=True)
class OutputConfig:
    tick_kimg: float = 4.0  # a line in stats.jsonl and TensorBoard
    grid_kimg: float = 100.0  # sample grids
    grid: list[int] = field(default_factory=lambda: [8, 8])  # columns and rows
    grid_psi: float = 1.0
    snapshot_kimg: float = 500.0
    tensorboard: bool = True


@dataclass(frozen=True)
class CheckpointConfig:
    every_kimg: float = 100.0
    keep: int = 2  # how many, the newest of them
    max_failures: int = 5  # failed writes in a row after which the run stops


@dataclass(frozen=True)
class MetricsConfig:
    every_kimg: float = 0.0  # 0: never
    at_snapshots: bool = False  # also then
    names: list[str] = field(default_factory=lambda: ["swd"])  # metrics/protocol.py says what they mean
    images: int = 4096  # of swd and ms_ssim, where their name does not say
    weights: list[str] = field(default_factory=list)  # files of feature networks, recognised by content
    extractor: str = ""  # instead of Inception and VGG16: pixels, or package.module:function
    precision: str = "fp32"  # of feature networks: fp32 or bf16
    best: str = ""  # the metric that snapshots/best.safetensors goes by; empty: the first one


@dataclass(frozen=True)
class Config:
    run: str = MISSING  # folder of the run
    seed: int = 0
    resolution: int = 1024
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)


CHOICES = {
    "model.name": ("stylegan2",),
    "model.g_architecture": ("skip", "resnet", "orig"),
    "model.d_architecture": ("skip", "resnet", "orig"),
    "model.low_precision": ("fp32", "bf16", "fp16", "auto"),
    "growth.optimizer": ("reset", "carry"),
    "loss.objective": ("logistic",),
    "train.device": ("auto", "cpu", "cuda"),
    "train.dtype": ("float32", "float64"),
}
POSITIVE = [
    "model.z_dim",
    "model.w_dim",
    "model.mapping_layers",
    "model.channel_base",
    "model.channel_max",
    "model.mbstd_group",
    "optim.g_lr",
    "optim.d_lr",
    "optim.eps",
    "loss.r1_every",
    "loss.pl_every",
    "loss.pl_batch_shrink",
    "ema.kimg",
    "train.batch",
    "train.check_ranks_every",
    "output.tick_kimg",
    "checkpoint.every_kimg",
    "checkpoint.keep",
    "checkpoint.max_failures",
    "metrics.images",
]
NOT_NEGATIVE = [
    "seed",
    "data.workers",
    "model.mbstd_channels",
    "model.low_precision_resolutions",
    "growth.stable_kimg",
    "growth.fade_kimg",
    "loss.r1_gamma",
    "loss.pl_weight",
    "train.micro_batch",
    "train.threads",
    "output.grid_kimg",
    "output.snapshot_kimg",
    "metrics.every_kimg",
]
UNIT = ["model.w_avg_beta", "optim.beta1", "optim.beta2", "loss.pl_decay", "loss.style_mixing"]


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def configs_folder() -> Path:
    """Where the shipped YAML files are: beside the package in a wheel, one level up in a checkout.

    Raises:
        UsageError: when neither exists (a broken installation).
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return folder
    raise UsageError("the shipped configurations are missing from this installation: install stylegan-pg again")


def find_config(name: str) -> Path:
    """A YAML file by path, or a shipped one by name ('ffhq1024').

    Raises:
        UsageError: naming the shipped ones, when there is no such file.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = configs_folder() / (Path(name).name.removesuffix(".yaml") + ".yaml")
    if shipped.is_file() and Path(name).parent in (Path("."), Path("configs")):
        return shipped
    known = ", ".join(sorted(p.stem for p in configs_folder().glob("*.yaml")))
    raise UsageError(f"no configuration {name!r}: give the path of a YAML file, or one of the shipped ones: {known}")


def _known_keys(cls: type, prefix: str = "") -> list[str]:
    keys = []
    for name, hint in get_type_hints(cls).items():
        keys.append(prefix + name)
        if dataclasses.is_dataclass(hint):
            keys += _known_keys(hint, prefix + name + ".")  # type: ignore[arg-type]  # dataclass types only
    return keys


def _explain(error: OmegaConfBaseException, source: str) -> UsageError:
    key = str(getattr(error, "full_key", "") or "")
    known = _known_keys(Config)
    if "missing mandatory value" in str(error):
        return UsageError(f"{source}: {key} is not set: give it there, or as {key}=... on the command line")
    reason = str(error).splitlines()[0]
    if key and "not in" in reason and key not in known:
        by_leaf = {k.rsplit(".", 1)[-1]: k for k in known}
        near = difflib.get_close_matches(key, known, 1, 0.6)
        near = near or [by_leaf[m] for m in difflib.get_close_matches(key.rsplit(".", 1)[-1], by_leaf, 1, 0.6)]
        return UsageError(f"{source}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return UsageError(f"{source}: {key + ': ' if key else ''}{reason}")


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration from a YAML file and `key=value` overrides, checked.

    Raises:
        UsageError: no such file, no YAML, an unknown key (naming the nearest known one), a value of a wrong type or
            out of range, or values that contradict each other.
    """
    source = "configuration" if path is None else str(path)
    try:
        merged = OmegaConf.structured(Config)
        if path is not None:
            file = OmegaConf.load(find_config(str(path)))
            if not OmegaConf.is_dict(file):
                raise UsageError(f"{source}: not a mapping of keys to values")
            for key in (item.split("=", 1)[0] for item in overrides):
                if key.endswith(("_at", "_from")) and OmegaConf.is_dict(OmegaConf.select(file, key)):
                    OmegaConf.update(file, key, {}, merge=False)  # a table given as a whole replaces the file's
            merged = OmegaConf.merge(merged, file)
        for item in overrides:
            source = item
            if "=" not in item:
                raise UsageError(f"{item!r} is not of the form key=value")
            merged = OmegaConf.merge(merged, _override(item))
        source = "configuration" if path is None else str(path)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise _explain(error, source) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{source}: {error}") from None
    except Exception as error:  # PyYAML has no common base here that OmegaConf exposes
        if type(error).__module__.startswith("yaml"):
            raise UsageError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
        raise
    assert isinstance(config, Config)
    check(config)
    return config


def _override(item: str) -> Any:
    """One `a.b=c`; the last part of the key may be a resolution."""
    key, value = item.split("=", 1)
    parsed = OmegaConf.from_dotlist([f"v={value}"])
    parsed = OmegaConf.to_container(parsed)["v"]  # type: ignore[index, call-overload]  # a mapping, as just made
    for part in reversed(key.split(".")):
        parsed = {int(part) if part.isdigit() else part: parsed}
    return OmegaConf.create(parsed)


def check(config: Config) -> None:
    """Ranges and contradictions.

    Raises:
        UsageError: naming the key, its value and what it may be.
    """

    def value(key: str) -> Any:
        node: Any = config
        for part in key.split("."):
            node = getattr(node, part)
        return node

    def demand(condition: bool, key: str, wanted: str) -> None:
        if not condition:
            raise UsageError(f"{key}={value(key)} is not possible: it must be {wanted}")

    demand(is_power_of_two(config.resolution) and config.resolution >= 4, "resolution", "a power of two, 4 or more")
    for key, choices in CHOICES.items():
        demand(value(key) in choices, key, " or ".join(choices))
    for key in POSITIVE:
        demand(0 < value(key) < math.inf, key, "above 0 and finite")
    for key in NOT_NEGATIVE:
        demand(0 <= value(key) < math.inf, key, "0 or more and finite")
    for key in UNIT:
        demand(0 <= value(key) <= 1, key, "between 0 and 1")
    for key in ("optim.beta1", "optim.beta2"):
        demand(value(key) < 1, key, "below 1")
    demand(config.model.channel_base >= config.resolution, "model.channel_base", f"at least {config.resolution}")
    start = config.growth.start
    if start is not None:
        possible = is_power_of_two(start) and 4 <= start <= config.resolution
        demand(possible, "growth.start", f"a power of two from 4 to {config.resolution}, or null")
    else:
        demand(config.train.total_kimg is not None, "train.total_kimg", "given where nothing grows")
    if config.train.total_kimg is not None:
        demand(0 < config.train.total_kimg < math.inf, "train.total_kimg", "above 0 and finite")
    for key in ("model.conv_clamp", "ema.rampup"):
        demand(value(key) is None or 0 < value(key) < math.inf, key, "above 0 and finite, or null")
    demand(config.train.threads <= 1024, "train.threads", "at most 1024")
    width = min(config.model.channel_base // 4, config.model.channel_max)
    low = config.model.low_precision_at or []
    demand(
        all(is_power_of_two(r) and r >= 8 for r in low), "model.low_precision_at", "powers of two from 8 on, or null"
    )
    demand(
        not low or config.model.low_precision != "fp32", "model.low_precision", "bf16, fp16 or auto where _at is given"
    )
    mbstd = config.model.mbstd_channels
    demand(not mbstd or width % mbstd == 0, "model.mbstd_channels", f"a divisor of {width}, the channels at 4x4, or 0")
    taps = config.model.resample_filter
    demand(len(taps) >= 2 and sum(taps) != 0, "model.resample_filter", "at least two taps with a sum other than 0")
    demand(len(config.output.grid) == 2 and min(config.output.grid) > 0, "output.grid", "[columns, rows]")
    tables = "growth.stable_kimg_at growth.fade_kimg_at optim.lr_at loss.r1_gamma_at train.batch_at"
    for key in [*tables.split(), "train.micro_batch_at"]:
        fits = all(is_power_of_two(r) and r >= 4 and 0 <= v < math.inf for r, v in value(key).items())
        demand(fits, key, "a table from resolutions (powers of two, 4 or more) to numbers of 0 or more")
    demand(all(v > 0 for v in config.train.batch_at.values()), "train.batch_at", "above 0")
    fits = all(k >= 0 and 0 <= v < math.inf for k, v in config.loss.r1_gamma_from.items())
    demand(fits, "loss.r1_gamma_from", "a table from kimg (0 or more) to numbers of 0 or more")
    for term in config.loss.terms:
        if term.every < 1:
            raise UsageError(f"loss.terms: {term.name}: every={term.every} is not possible: it must be 1 or more")


def to_yaml(config: Config) -> str:
    """The whole resolved configuration as YAML, which load_config reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
