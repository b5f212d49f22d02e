"""The configuration: a tree of frozen dataclasses, which loading.py fills from files and the command line.

Numbers of images are in kimg (thousands of real images shown to D), as in the papers. Keys that end in `_at` give
values by resolution, and the plain key holds elsewhere: `batch: 32, batch_at: {4: 512, 8: 256}`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

# keys.py and OmegaConf read the annotations at run time, hence Optional and plain containers below.


@dataclass(frozen=True)
class DataConfig:
    url: str = ""  # what `stylegan-pg pack` wrote: folder, http(s)://, s3://; or WebDataset tars: folder, a{00..99}.tar
    mixture: dict[str, float] = field(default_factory=dict)  # instead of url: several, with weights
    window: int = 65536  # samples that are shuffled at least at a time, of as many shards as hold them
    mirror: bool = False  # flip each image with probability 1/2
    conditional: bool = False  # G and D are given each image's class, or a vector field of the dataset
    condition: str = ""  # which: class, or the name of a vector; empty: the class where there is one, else the vector
    unpaired: dict[str, str] = field(default_factory=dict)  # further datasets that are not aligned with the first one
    derived: dict[str, str] = field(default_factory=dict)  # conditions made of the picture, such as {small: low 4}
    workers: int = 2  # processes per rank that read and decode; 0 for none
    cache_dir: str = ""  # for remote shards, on this machine; empty: $STYLEGAN_PG_CACHE/shards or the user's cache
    cache_gib: float = 100.0  # limit of that folder; 0 keeps nothing, and each picture is fetched by itself
    prefetch_shards: int = 8  # remote shards fetched ahead of those in use; 0 for none
    patience_sec: float = 600.0  # a server or disk may be away for so long, before training stops to be continued
    max_bad_share: float = 0.01  # share of the pictures that may be damaged; above it training stops


@dataclass(frozen=True)
class ModelConfig:
    name: str = "stylegan2"  # the generation of the networks; mlp is for points
    base: list[int] = field(default_factory=lambda: [4, 4])  # rows and columns of a picture at resolution 4
    z_dim: int = 512  # length of a latent
    w_dim: int = 512  # length of a style, which the mapping network makes of a latent
    mapping_layers: int = 8  # layers of the mapping network
    channel_base: int = 32768  # channels at resolution r: min(channel_base / r, channel_max)
    channel_max: int = 512  # see channel_base
    g_architecture: str = "skip"  # how the generator's resolutions are connected
    d_architecture: str = "resnet"  # the same of the discriminator
    noise: bool = True  # per-pixel noise inputs of the generator
    resample_filter: list[float] = field(default_factory=lambda: [1.0, 3.0, 3.0, 1.0])  # taps of up- and down-sampling
    conv_clamp: float | None = None  # limit of activations; 256 in the published networks
    mbstd_group: int = 4  # the largest divisor of the batch up to this is taken
    mbstd_channels: int = 1  # 0 for no minibatch stddev
    low_precision: str = "fp32"  # in the highest resolutions; auto: bf16 where it is faster here
    low_precision_resolutions: int = 0  # how many of them, counted from `resolution` down; for auto 0 stands for all
    low_precision_at: list[int] | None = None  # which exactly; null: see above; auto fills it in at the start
    w_avg_beta: float = 0.998  # of the running mean of w, which truncation goes towards


@dataclass(frozen=True)
class GrowthConfig:
    schedule: str = "tables"  # auto: what no table says follows from resolution, total_kimg and devices
    devices: int = 8  # that the automatic schedule is made for; a run may have any number
    start: int | None = None  # first resolution; null trains at full resolution all along (auto: 8, ProGAN: 4)
    stable_kimg: float = 600.0  # per resolution, after its fade
    fade_kimg: float = 600.0  # per doubling
    stable_kimg_at: dict[int, float] = field(default_factory=dict)  # by resolution, before stable_kimg
    fade_kimg_at: dict[int, float] = field(default_factory=dict)  # by the resolution that is faded in
    optimizer: str = "reset"  # at the start and the end of each fade: reset, or carry over by name
    optimizer_at: dict[int, str] = field(default_factory=dict)  # on entering the phases of a resolution


@dataclass(frozen=True)
class OptimConfig:
    g_lr: float = 0.002  # learning rate of the generator, where no table says otherwise
    d_lr: float = 0.002  # learning rate of the discriminator, likewise
    lr_at: dict[int, float] = field(default_factory=dict)  # for both sides
    g_lr_at: dict[int, float] = field(default_factory=dict)  # for one, before lr_at
    d_lr_at: dict[int, float] = field(default_factory=dict)  # for the other, before lr_at
    beta1: float = 0.0  # Adam's
    beta2: float = 0.99  # Adam's
    eps: float = 1e-8  # Adam's
    d_steps: int = 1  # steps of D for each round of G: G moves at every d_steps-th step
    g_steps: int = 1  # steps of G in such a round


@dataclass(frozen=True)
class TermConfig:
    """A regularisation term: `weight` times its value, added to the loss of its side at every `every`-th step."""

    name: str = MISSING  # which one
    weight: float = 1.0  # of its value in the loss
    every: int = 1  # steps from one to the next; what it adds is multiplied by as much
    target: float = 1.0  # of the gradient's norm: gradient_penalty, dragan
    weight_at: dict[int, float] = field(default_factory=dict)  # by resolution
    weight_from: dict[int, float] = field(default_factory=dict)  # from a kimg of the run on; goes before the others


@dataclass(frozen=True)
class LossConfig:
    objective: str = "logistic"  # what G and D minimise
    d_clip: float = 0.0  # limit of every weight of D after its steps (WGAN); 0: none
    r1_gamma: float = 10.0  # weight of R1, the penalty on D's gradients at real images; 0 for no R1
    r1_gamma_at: dict[int, float] = field(default_factory=dict)  # by resolution, before r1_gamma
    r1_gamma_from: dict[int, float] = field(default_factory=dict)  # {kimg: gamma}: from there on, whatever the size
    r1_every: int = 16  # steps from one R1 to the next
    pl_weight: float = 2.0  # 0 for no path length regularisation
    pl_every: int = 4  # steps from one path length to the next
    pl_decay: float = 0.01  # share of a new path length in the running mean
    pl_batch_shrink: int = 2  # path lengths are taken of the batch divided by this
    style_mixing: float = 0.9  # probability of two latents per image
    terms: list[TermConfig] = field(default_factory=list)  # further ones; see `stylegan-pg config loss.terms`

    def all_terms(self) -> list[TermConfig]:
        """R1 and path length, as far as they are switched on, and the further terms."""
        terms = []
        if self.r1_gamma or any(self.r1_gamma_at.values()) or any(self.r1_gamma_from.values()):
            at, since = self.r1_gamma_at, self.r1_gamma_from
            terms.append(TermConfig("r1", self.r1_gamma, self.r1_every, weight_at=at, weight_from=since))
        if self.pl_weight:
            terms.append(TermConfig("path_length", self.pl_weight, self.pl_every))
        return terms + list(self.terms)


@dataclass(frozen=True)
class EmaConfig:
    kimg: float = 10.0  # half-life of the mean of G's weights that snapshots hold
    rampup: float | None = None  # half-life at most this share of the images seen; null: none


@dataclass(frozen=True)
class AugmentConfig:
    """What D sees of both real and generated images is changed at random (Karras et al. 2020, ADA)."""

    mode: str = "none"  # ada: the probability follows from D's signs; fixed: it is p
    p: float = 0.0  # probability of each operation: to start with (ada), or all along (fixed)
    target: float = 0.6  # of the mean sign of D's scores of real images (ada)
    interval: int = 4  # steps between adjustments of p (ada)
    kimg: float = 500.0  # over which p can go from 0 to 1 (ada)
    pipeline: str = "bgc"  # b: blit, g: geometry, c: colour, f: filter, n: noise, o: cutout (ada, fixed)
    policy: str = "color,translation,cutout"  # which changes (diffaugment)


@dataclass(frozen=True)
class TrainConfig:
    total_kimg: float | None = None  # null: as long as the growth phases take
    batch: int = 32  # images per step, over all devices
    batch_at: dict[int, int] = field(default_factory=dict)  # by resolution, before batch
    micro_batch: int = 0  # images per pass of one device, 0: its whole share of the batch
    micro_batch_at: dict[int, int] = field(default_factory=dict)  # by resolution, before micro_batch
    device: str = "auto"  # auto: cuda where there is one
    engine: str = "accelerate"  # what sums gradients over the ranks and keeps Adam's moments
    bucket_mib: float = 16.0  # of gradients that are summed over the ranks at once (accelerate)
    zero_stage: int = 1  # shards of 0: nothing, 1: Adam's moments, 2: gradients too (deepspeed)
    zero_offload: bool = False  # Adam and its moments on the host (deepspeed, stages 1 and 2)
    dtype: str = "float32"  # float64 is for tests
    threads: int = 0  # CPU threads per process, 0: leave to torch
    channels_last: bool | None = True  # null: measure at the start which layout is faster here
    compile: bool = False  # torch.compile the passes of stable phases that are differentiated once
    tf32: bool = False  # let GPUs round fp32 convolutions and products to 10 bits
    deterministic: bool = False  # bit-exact resume on GPUs, at some cost
    join_sec: float = 600.0  # processes wait for each other at the start
    timeout_sec: float = 600.0  # a rank that does not answer for so long is lost, and the others end
    check_ranks_every: int = 500  # steps between comparisons of the ranks' parameters
    freeze_d: int = 0  # resolutions of D, counted from the image down, that stay as `init` has them
    loss_scale: float | None = None  # to start with; halved where gradients overflow; null: 65536 with fp16, else 1
    max_skipped: int = 20  # steps left out as not finite, after which training stops; 100 good ones make up for one


@dataclass(frozen=True)
class OutputConfig:
    tick_kimg: float = 4.0  # from one line in stats.jsonl and TensorBoard to the next
    grid_kimg: float = 100.0  # from one sample grid to the next; 0: none
    grid: list[int] = field(default_factory=lambda: [8, 8])  # columns and rows
    grid_psi: float = 1.0  # their truncation: 1 for none
    snapshot_kimg: float = 500.0  # from one snapshot, the generator for use, to the next; 0: only at the end
    tensorboard: bool = True  # its event files, beside stats.jsonl


@dataclass(frozen=True)
class CheckpointConfig:
    every_kimg: float = 100.0  # from one checkpoint, which a run is continued from, to the next
    keep: int = 2  # how many, the newest of them
    max_failures: int = 5  # failed writes in a row after which the run stops


@dataclass(frozen=True)
class MetricsConfig:
    every_kimg: float = 0.0  # 0: never
    at_snapshots: bool = False  # measure at snapshots too
    names: list[str] = field(default_factory=lambda: ["swd"])  # such as swd, fid50k_full, kid10k (README, Metrics)
    images: int = 4096  # of swd and ms_ssim, where their name does not say
    weights: list[str] = field(default_factory=list)  # files of feature networks, recognised by content
    extractor: str = ""  # instead of Inception and VGG16: pixels, or package.module:function
    precision: str = "fp32"  # of feature networks
    best: str = ""  # the metric that snapshots/best.safetensors goes by; empty: the first one


@dataclass(frozen=True)
class Config:
    run: str = MISSING  # folder of the run
    seed: int = 0  # of everything that is drawn
    resolution: int = 1024  # that training ends at; a picture's sides are model.base times resolution / 4
    init: str = ""  # a snapshot or checkpoint to take weights from, by name, at the start of a new run
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
