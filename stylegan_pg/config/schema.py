"""The configuration: a tree of frozen dataclasses, which loading.py fills from files and the command line.

Numbers of images are in kimg (thousands of real images shown to D), as in the papers. Keys that end in `_at` give
values by resolution, and the plain key holds for all others: `batch: 32, batch_at: {4: 512, 8: 256}`. Keys that end in
`_from` give values by kimg, which hold from there on and go before the others. A key of the type Scheduled holds a
number or curves (curves.py). The sections `system`, `model`, `loss` and `augment` are in
systems.py, models.py, terms.py and augmentations.py.

The comment behind a field is what `stylegan-pg config` prints about it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

from omegaconf import MISSING

from stylegan_pg.config.augmentations import AugmentConfig
from stylegan_pg.config.curves import Scheduled
from stylegan_pg.config.fields import (
    Demand,
    at_least_0,
    by_kimg,
    by_resolution,
    choice,
    decay,
    is_resolution,
    path,
    positive,
    scheduled,
    share,
    such_that,
    table,
)
from stylegan_pg.config.models import ModelConfig, StyleGAN2Config
from stylegan_pg.config.systems import SystemConfig
from stylegan_pg.config.terms import LossConfig

OPTIMIZER = ("reset", "carry")  # what becomes of the optimizers' moments at the start and the end of a fade
NARROWEST, WIDEST = 0.001, 0.288  # relative widths of power-function averages; their limit is 1 / sqrt(12)
WEIGHTS = Demand(
    lambda mixture: all(0 < w < math.inf for w in mixture.values()), "a table from URLs to weights above 0"
)


def are_widths(widths: list[float]) -> bool:
    """Whether a list holds relative widths of averages that differ by 1 % at least. Combinations of closer ones would
    magnify the rounding of what is stored."""
    ordered = sorted(widths)
    apart = all(b >= 1.01 * a for a, b in itertools.pairwise(ordered))
    return apart and len(widths) <= 16 and all(NARROWEST <= width <= WIDEST for width in widths)


@dataclass(frozen=True)
class DataConfig:
    url: str = path()  # what `stylegan-pg pack` wrote: folder, http(s)://, s3://; or WebDataset tars, a{00..99}.tar
    mixture: dict[str, float] = table("URL", WEIGHTS, is_path=True)  # several datasets with weights, instead of url
    window: int = positive(65536)  # least number of samples that are shuffled together, taken from whole shards
    mirror: bool = False  # flip each image with probability 1/2
    conditional: bool = False  # G and D are given each image's class, or a vector field of the dataset
    condition: str = ""  # which: class, or the name of a vector; empty: the class if there is one, else the vector
    unpaired: dict[str, str] = table("name", is_path=True)  # further datasets that are not aligned with the first one
    derived: dict[str, str] = table("name")  # conditions made of the picture, such as {small: low 4}
    workers: int = at_least_0(2, most=1024)  # processes per rank that read and decode; 0: none
    cache_dir: str = path()  # folder for remote shards; empty: $STYLEGAN_PG_CACHE/shards or the user's cache folder
    cache_gib: float = at_least_0(100.0)  # limit of that folder; 0: keep nothing and fetch each picture by itself
    prefetch_shards: int = at_least_0(8, most=1 << 20)  # remote shards fetched ahead of those in use; 0: none
    patience_sec: float = such_that(
        600.0, lambda sec: 0 <= sec <= 3600, "0 to 3600: the other ranks wait for no more than 2 h"
    )  # seconds to retry a failing source before the run stops with exit code 75
    max_bad_share: float = share(0.01)  # share of the pictures that may be damaged before the run stops


@dataclass(frozen=True)
class GrowthConfig:
    schedule: str = choice("tables", "auto")  # auto: what no table says follows from resolution, total_kimg and devices
    devices: int = positive(8, most=1 << 20)  # number that the automatic schedule is made for; a run may have any
    start: int | None = such_that(
        None, is_resolution, "a power of two of 4 or more"
    )  # first resolution; null: train at full resolution from the start (auto: 8, for ProGAN 4)
    stable_kimg: float = at_least_0(600.0)  # length of each stable phase
    fade_kimg: float = at_least_0(600.0)  # length of each fade
    stable_kimg_at: dict[int, float] = by_resolution()  # lengths by resolution, instead of stable_kimg
    fade_kimg_at: dict[int, float] = by_resolution()  # lengths by the resolution that is faded in, instead of fade_kimg
    optimizer: str = choice(*OPTIMIZER)  # the optimizers' moments at both ends of a fade: reset, or carry over by name
    optimizer_at: dict[int, str] = by_resolution(choices=OPTIMIZER)  # the same on entering a resolution's phases


@dataclass(frozen=True)
class OptimConfig:
    name: str = choice("adam", "rmsprop", "sgd")  # what moves the weights of both sides
    g_lr: Scheduled = scheduled(positive(0.002))  # learning rate of the generator, if no table gives another
    d_lr: Scheduled = scheduled(positive(0.002))  # learning rate of the discriminator, if no table gives another
    lr_at: dict[int, float] = by_resolution()  # learning rates of both sides by resolution
    g_lr_at: dict[int, float] = by_resolution()  # learning rates of the generator, instead of lr_at
    d_lr_at: dict[int, float] = by_resolution()  # learning rates of the discriminator, instead of lr_at
    g_lr_from: dict[int, float] = by_kimg()  # {kimg: learning rate of the generator} from there on
    d_lr_from: dict[int, float] = by_kimg()  # {kimg: learning rate of the discriminator} from there on
    lr_scale_at: dict[int, float] = by_resolution(above_0=True)  # factors of g_lr and d_lr themselves by resolution
    beta1: float = decay(0.0)  # decay of the mean of gradients (adam), or momentum (sgd)
    beta2: Scheduled = scheduled(decay(0.99))  # decay of the mean of squared gradients (adam, rmsprop)
    beta2_at: dict[int, float] = by_resolution(of=decay(0.99))  # the same by resolution, instead of beta2
    beta2_from: dict[int, float] = by_kimg(of=decay(0.99))  # {kimg: beta2} from there on
    eps: float = positive(1e-8)  # what is added to the root of that mean, by which gradients are divided
    d_steps: int = positive(1, most=1 << 20)  # steps of D per round: G is trained at every d_steps-th step
    g_steps: int = positive(1, most=1 << 20)  # steps of G per round
    d_warmup_steps: int = positive(100, most=1 << 20)  # steps of D in a round of warm-up (WGAN), instead of d_steps
    d_warmup_rounds: int = at_least_0(0, most=1 << 40)  # the first rounds of a phase that are such; WGAN has 25
    d_warmup_every: int = at_least_0(0, most=1 << 40)  # and rounds whose number this divides; WGAN has 500; 0: none


@dataclass(frozen=True)
class EmaConfig:
    kimg: Scheduled = scheduled(
        positive(10.0), ends=at_least_0(10.0)
    )  # half-life of the mean of G's weights that snapshots hold
    kimg_at: dict[int, float] = by_resolution()  # half-lives by resolution, instead of kimg
    kimg_from: dict[int, float] = by_kimg()  # {kimg: half-life} from there on
    rampup: float | None = positive(None)  # limits the half-life to this share of the images seen; null: no limit
    profiles: list[float] = such_that(
        [],
        are_widths,
        f"a list of relative widths from {NARROWEST} to {WIDEST}, 1 % apart, such as [0.05, 0.1]",
    )  # relative widths of further averages, from which `stylegan-pg ema` makes one of any width; [] for none
    every_kimg: float = at_least_0(500.0)  # interval at which these are stored; 0: only where a phase ends


@dataclass(frozen=True)
class TrainConfig:
    total_kimg: float | None = positive(None, most=1e9)  # length of the run; null: that of the growth phases
    batch: int = positive(32, most=1 << 20)  # images per step, over all devices
    batch_at: dict[int, int] = by_resolution(above_0=True)  # batches by resolution, instead of batch
    micro_batch: int = at_least_0(0, most=1 << 20)  # images per pass of one device; 0: its whole share of the batch
    micro_batch_at: dict[int, int] = by_resolution()  # micro-batches by resolution, instead of micro_batch
    device: str = choice("auto", "cpu", "cuda")  # auto: cuda if there is one
    engine: str = choice("accelerate", "deepspeed")  # what sums gradients over the ranks and holds Adam's moments
    bucket_mib: float = positive(16.0, most=1 << 20)  # MiB of gradients that are summed at once (accelerate)
    zero_stage: int = such_that(
        1, lambda stage: stage in (0, 1, 2), "0, 1 or 2"
    )  # shards of 0: nothing, 1: Adam's moments, 2: also gradients (deepspeed)
    zero_offload: bool = False  # Adam and its moments are on the host (deepspeed, stages 1 and 2)
    dtype: str = choice("float32", "float64")  # float64 is for tests
    threads: int = at_least_0(0, most=1024)  # CPU threads per process; 0: torch decides
    channels_last: bool | None = True  # memory layout; null: measure at the start which one is faster
    compile: bool = False  # torch.compile the passes of stable phases that are differentiated once
    graphs: str = choice("off", "auto", "on")  # replay captured steps (CUDA graphs); auto: where there is a CUDA device
    tf32: bool = False  # let GPUs round fp32 convolutions and products to 10 bits
    deterministic: bool = False  # bit-exact resume on GPUs, which is slower
    join_sec: float = positive(600.0, most=1e8)  # seconds that processes wait for each other at the start
    timeout_sec: float = positive(600.0, most=1e8)  # seconds without an answer after which a rank counts as lost
    check_ranks_every: int = positive(500)  # steps between comparisons of the ranks' parameters
    freeze_d: int = at_least_0(0)  # resolutions of D, from the highest down, that keep the weights of `init`
    loss_scale: float | None = such_that(
        None, lambda scale: scale >= 1 and math.log2(scale).is_integer(), "a power of two of 1 or more", most=2.0**100
    )  # loss scale at the start, halved when gradients overflow; null: 65536 with fp16, otherwise 1
    max_skipped: int = at_least_0(20)  # non-finite steps after which the run stops; 100 good steps offset one


@dataclass(frozen=True)
class OutputConfig:
    tick_kimg: float = positive(4.0)  # interval of the lines in stats.jsonl and in the trackers
    grid_kimg: float = at_least_0(100.0)  # interval of the grids of samples; 0: none
    grid: list[int] = such_that(
        [8, 8], lambda grid: len(grid) == 2 and min(grid) > 0, "[columns, rows]"
    )  # columns and rows of a grid
    grid_psi: float = 1.0  # truncation of the grids; 1: none
    snapshot_kimg: float = at_least_0(500.0)  # interval of snapshots, the generators for use; 0: only at the end
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])  # such as wandb, mlflow; [] for none


@dataclass(frozen=True)
class CheckpointConfig:
    every_kimg: float = positive(100.0)  # interval of checkpoints, from which a run is continued
    keep: int = positive(2)  # number of checkpoints that are kept, the newest ones
    max_failures: int = positive(5)  # failed writes in a row after which the run stops


@dataclass(frozen=True)
class MetricsConfig:
    every_kimg: float = at_least_0(0.0)  # interval of measurements; 0: never
    at_snapshots: bool = False  # measure at snapshots, too
    names: list[str] = field(default_factory=lambda: ["swd"])  # such as swd, fid50k_full, kid10k (docs/metrics.md)
    images: int = positive(4096, most=1 << 30)  # images of swd and ms_ssim, if their name does not say
    weights: list[str] = path([])  # files of feature networks, which are recognised by their content
    extractor: str = ""  # features instead of those of Inception and VGG16: pixels, or package.module:function
    precision: str = choice("fp32", "bf16")  # of feature networks
    watch_kimg: float = at_least_0(100.0)  # interval at which samples are searched for collapse and copies; 0: never
    best: str = ""  # metric that chooses snapshots/best.safetensors; empty: the first one


@dataclass(frozen=True)
class Config:
    run: str = path(MISSING)  # folder of the run
    seed: int = at_least_0(0)  # seed of everything that is drawn at random
    resolution: int = such_that(
        1024, is_resolution, "a power of two, 4 or more", most=1 << 14
    )  # resolution at the end; the sides of a picture are model.base times resolution / 4
    init: str = path()  # snapshot, checkpoint or public .pkl whose weights a new run takes over by name
    data: DataConfig = field(default_factory=DataConfig)
    system: SystemConfig = field(default_factory=SystemConfig)
    model: ModelConfig = field(default_factory=StyleGAN2Config)
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
