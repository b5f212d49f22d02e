"""The section `model`: what all families of networks have, and a class for each family with the keys that it reads.

The class is chosen by `model.name`. MODELS is the only list of families; networks/__init__.py maps the same names to
generators and discriminators.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from omegaconf import MISSING

from stylegan_pg.config.fields import (
    at_least_0,
    by_resolution,
    choice,
    is_power_of_two,
    is_resolution,
    positive,
    share,
    such_that,
)

FEWEST_CHARACTERS, MOST_CHARACTERS = 5, 1024  # of an alphabet; fewer would look like the channels of pictures


@dataclass(frozen=True)
class ModelConfig:
    name: str = MISSING  # family of the networks; mlp is for points
    base: list[int] = such_that(
        [4, 4], lambda base: len(base) == 2 and min(base) > 0, "[rows, columns] at resolution 4, both above 0"
    )  # rows and columns of a picture at resolution 4
    z_dim: int = positive(512, most=1 << 16)  # length of a latent vector
    channel_max: int = positive(512, most=1 << 16)  # most channels of a layer; of mlp, the width of the hidden layers
    mbstd_group: int = positive(4, most=1 << 20)  # images that meet in networks: a divisor of the batch, up to this
    mbstd_channels: int = at_least_0(1, most=1 << 16)  # channels of minibatch stddev; 0: none
    low_precision: str = choice("fp32", "bf16", "fp16", "auto")  # of the highest resolutions; auto: bf16 where faster
    low_precision_resolutions: int = at_least_0(0)  # how many, counted from `resolution` down; for auto 0 means all
    low_precision_at: list[int] | None = such_that(
        None, lambda low: all(is_power_of_two(r) and r >= 8 for r in low), "powers of two from 8 on"
    )  # which resolutions exactly; null: as low_precision_resolutions says; auto fills it in at the start
    w_avg_beta: float = share(0.998)  # decay per step of the running mean of w, which truncation moves towards
    d_spectral_norm: bool = False  # every convolution and dense layer of D has weights of spectral norm 1

    @property
    def images_meet(self) -> bool:
        """Whether the images of a group of `mbstd_group` meet in a network, so that they must be in one pass."""
        return self.mbstd_channels > 0


@dataclass(frozen=True)
class PlainConfig(ModelConfig):
    """What the families read whose generators take latents of another law than N(0, 1)."""

    latent: str = choice("normal", "uniform", "truncated")  # law of latents: N(0, 1), (-1, 1), or N(0, 1) in [-2, 2]


@dataclass(frozen=True)
class MinibatchConfig(PlainConfig):
    """The same, with minibatch discrimination in D (Salimans et al. 2016)."""

    minibatch_kernels: int = at_least_0(0, most=1 << 16)  # kernels of D's minibatch discrimination, 100 as published
    minibatch_dims: int = positive(5, most=1 << 16)  # numbers that each of these kernels compares

    @property
    def images_meet(self) -> bool:
        return self.mbstd_channels > 0 or self.minibatch_kernels > 0


@dataclass(frozen=True)
class ConvolutionalConfig(ModelConfig):
    """What the families read whose networks are made of convolutions."""

    channel_base: int = positive(32768, most=1 << 24)  # channels at resolution r: min(channel_base / r, channel_max)
    conv_clamp: float | None = positive(None)  # limit of activations; 256 in the published networks
    label: str = choice("projection", "concatenation")  # how D takes conditions: multiplied with features, or as planes


@dataclass(frozen=True)
class GrowingConfig(ConvolutionalConfig):
    """The families whose networks grow from resolution to resolution."""


@dataclass(frozen=True)
class StyleConfig(ConvolutionalConfig):
    """What StyleGAN, StyleGAN2 and StyleGAN3 read, whose generators have a mapping network and styles."""

    w_dim: int = positive(512, most=1 << 16)  # length of w, which the mapping network computes from a latent
    mapping_layers: int = positive(8, most=256)  # layers of the mapping network
    resample_filter: list[float] = such_that(
        [1.0, 3.0, 3.0, 1.0],
        lambda taps: len(taps) >= 2 and sum(taps) != 0,
        "at least two taps with a sum other than 0",
    )  # taps of the filter of up- and down-sampling; in stylegan3, of the discriminator


@dataclass(frozen=True)
class NoiseConfig(StyleConfig, GrowingConfig):
    """What StyleGAN and StyleGAN2 read."""

    noise: bool = True  # per-pixel noise inputs of the generator


@dataclass(frozen=True)
class StyleGAN2Config(NoiseConfig):
    name: str = "stylegan2"
    g_architecture: str = choice("skip", "resnet", "orig")  # how the generator's resolutions are connected
    d_architecture: str = choice("resnet", "skip", "orig")  # how the discriminator's resolutions are connected


@dataclass(frozen=True)
class StyleGANConfig(NoiseConfig):
    name: str = "stylegan"


@dataclass(frozen=True)
class StyleGAN3Config(StyleConfig):
    name: str = "stylegan3"
    equivariance: str = choice("translation", "rotation")  # pictures follow it: config T; or rotation, too: config R
    d_architecture: str = choice("resnet", "skip", "orig")  # how the discriminator's resolutions are connected
    d_channel_base: int | None = positive(None, most=1 << 24)  # channel_base of the discriminator; null: that of G
    d_channel_max: int | None = positive(None, most=1 << 16)  # channel_max of the discriminator; null: that of G


@dataclass(frozen=True)
class ProGANConfig(GrowingConfig):
    name: str = "progan"


@dataclass(frozen=True)
class R3GANConfig(GrowingConfig):
    name: str = "r3gan"
    mbstd_channels: int = such_that(0, lambda n: n == 0, "0: R3GAN has no minibatch stddev")
    channels_at: dict[int, int] = by_resolution(
        above_0=True
    )  # channels by resolution, instead of those of channel_base
    expansion: int = positive(2, most=64)  # channels within a residual block: this factor times those between blocks
    group_width: int = positive(16, most=1 << 16)  # channels of each group of the grouped convolutions
    groups_at: dict[int, int] = by_resolution(above_0=True)  # number of groups by resolution, instead of group_width
    blocks: int = positive(2, most=64)  # residual blocks of each resolution, in G and in D
    blocks_at: dict[int, int] = by_resolution(above_0=True)  # blocks by resolution, instead of blocks
    g_embedding: int = positive(64, most=1 << 16)  # numbers that G makes of a condition, beside the latent
    d_embedding: int | None = positive(None, most=1 << 16)  # and numbers that D compares with it; null: its channels


class Stage(NamedTuple):
    """The residual blocks of one resolution of R3GAN."""

    channels: int
    groups: int
    blocks: int


def r3gan_stages(model: R3GANConfig, resolution: int) -> dict[int, Stage]:
    """The stages of R3GAN's networks by resolution, from 4 up to the given one.

    The published networks have groups of 16 channels (32 for ImageNet), which is what `group_width` gives; a resolution
    of fewer channels is one group.
    """
    found = {}
    for r in (2**i for i in range(2, resolution.bit_length())):
        general = min(model.channel_base // r, model.channel_max)
        channels: int = model.channels_at.get(r) or general
        groups: int = model.groups_at.get(r) or max(model.expansion * channels // model.group_width, 1)
        found[r] = Stage(channels, groups, model.blocks_at.get(r) or model.blocks)
    return found


@dataclass(frozen=True)
class DCGANConfig(MinibatchConfig, ConvolutionalConfig):
    name: str = "dcgan"
    channel_base: int = positive(2048, most=1 << 24)  # channels at resolution r: min(channel_base / r, channel_max)
    mbstd_channels: int = such_that(0, lambda n: n == 0, "0: DCGAN has no minibatch stddev")
    normalization: str = choice("batch", "virtual", "none")  # by the group's images, by a fixed reference batch, none
    d_normalization: str = choice("same", "batch", "virtual", "none")  # that of D; none with gradient penalties
    references: int = positive(64, most=1 << 16)  # latents and real pictures of the reference batches of virtual

    @property
    def images_meet(self) -> bool:
        return "batch" in (self.normalization, self.d_normalization) or super().images_meet


@dataclass(frozen=True)
class SRResNetConfig(PlainConfig):
    name: str = "srresnet"
    z_dim: int = positive(128, most=1 << 16)  # length of a latent vector
    channel_base: int = positive(2048, most=1 << 24)  # channels at resolution r: min(channel_base / r, channel_max)
    channel_max: int = positive(1024, most=1 << 16)  # most channels of a layer of the discriminator
    mbstd_channels: int = such_that(0, lambda n: n == 0, "0: SRResNet has no minibatch stddev")
    g_channels: int = positive(64, most=1 << 16)  # channels of all layers of the generator
    start_resolution: int = such_that(
        16, is_resolution, "a power of two of 4 or more"
    )  # resolution of the generator's residual blocks, behind which stages double it
    blocks: int = positive(16, most=64)  # residual blocks of the generator
    d_blocks: int = at_least_0(2, most=64)  # residual blocks of each stage of the discriminator

    @property
    def images_meet(self) -> bool:
        return True  # in G's batch normalisation


@dataclass(frozen=True)
class CodesConfig(ModelConfig):
    """An encoder and a decoder, and an inspector of the codes, whose length is z_dim."""

    name: str = "codes"
    channel_base: int = positive(2048, most=1 << 24)  # channels at resolution r: min(channel_base / r, channel_max)
    mbstd_channels: int = such_that(0, lambda n: n == 0, "0: the inspector has no minibatch stddev")
    d_width: int = positive(256, most=1 << 16)  # width of the inspector's hidden layers
    d_layers: int = positive(2, most=64)  # hidden layers of the inspector

    @property
    def images_meet(self) -> bool:
        return True  # in the normalisation of codes


@dataclass(frozen=True)
class CharsConfig(PlainConfig):
    """Texts as one-hot characters; channel_max is the width of the residual blocks."""

    name: str = "chars"
    mbstd_channels: int = such_that(0, lambda n: n == 0, "0: networks of texts have no minibatch stddev")
    alphabet: str = such_that(
        "abcdefghijklmnopqrstuvwxyz 0123456789.,-",
        lambda a: FEWEST_CHARACTERS <= len(a) == len(set(a)) <= MOST_CHARACTERS and " " in a and a.isprintable(),
        f"{FEWEST_CHARACTERS} to {MOST_CHARACTERS} different printable characters, one of them a space",
    )  # characters of texts; the space stands at the end of short texts, and for characters that are not here
    length: int = positive(64, most=1 << 12)  # characters of a text; longer ones are cut off
    depth: int = positive(5, most=64)  # residual blocks of each network
    output: str = choice("softmax", "gumbel", "straight_through")  # of G: probabilities; samples; one-hot samples
    temperature: float = positive(1.0, most=1e3)  # of the softmax; low ones are nearer to one-hot characters


@dataclass(frozen=True)
class BEGANConfig(PlainConfig):
    """Generators and autoencoders of BEGAN and EBGAN. The discriminator's score is the error of a reconstruction."""

    name: str = "began"
    mbstd_channels: int = such_that(0, lambda n: n == 0, "0: an autoencoder has no minibatch stddev")
    width: int = positive(64, most=1 << 16)  # channels at full resolution; began's encoder: n, 2 n, 3 n, ... downwards
    code_dim: int | None = positive(None, most=1 << 16)  # length of the code of D's autoencoder; null: that of latents
    energy: str = choice("absolute", "squared", "norm")  # of x - D(x): mean |.|, mean square, or Euclidean norm


@dataclass(frozen=True)
class DenoisingConfig(ModelConfig):
    """What the families read whose generators remove noise in a few steps (denoising diffusion GAN)."""

    z_dim: int = positive(100, most=1 << 16)  # length of the latent of each step
    steps: int = positive(4, most=64)  # T, from noise to a picture
    beta_min: float = positive(0.1, most=1e3)  # rate of the noise's growth at the picture
    beta_max: float = positive(20.0, most=1e3)  # and at the end, where next to nothing of the picture is left
    mapping_layers: int = positive(4, most=256)  # dense layers of z behind the first one; ddgan_mlp: hidden layers


@dataclass(frozen=True)
class DDGANConfig(DenoisingConfig):
    name: str = "ddgan"
    width: int = positive(128, most=1 << 16)  # channels of G, to be multiplied by `multipliers`
    multipliers: list[int] = such_that(
        [1, 2, 2, 2], lambda ms: 1 <= len(ms) <= 10 and all(0 < m <= 64 for m in ms), "1 to 10 numbers from 1 to 64"
    )  # of the channels, from the highest resolution down
    blocks: int = positive(2, most=64)  # residual blocks of each resolution
    attention_at: list[int] = such_that(
        [16], lambda rs: len(rs) <= 16 and all(is_power_of_two(r) and r >= 4 for r in rs), "powers of two from 4 on"
    )  # resolutions whose blocks are followed by self-attention
    w_dim: int = positive(256, most=1 << 16)  # length of what the mapping makes of z
    d_width: int = positive(64, most=1 << 16)  # the discriminator's channels are 2, 4 and 8 times as many
    d_time_dim: int = positive(128, most=1 << 16)  # length of D's embedding of the step
    d_stages: str = choice("small", "large")  # halvings in D: 3, for 32x32; or 6, for 256x256


@dataclass(frozen=True)
class DDGANPointsConfig(DenoisingConfig):
    """The same for points, with multi-layer perceptrons."""

    name: str = "ddgan_mlp"
    mbstd_channels: int = such_that(0, lambda n: n == 0, "0: there is no minibatch stddev for points")


@dataclass(frozen=True)
class MLPConfig(MinibatchConfig):
    name: str = "mlp"
    mapping_layers: int = positive(8, most=256)  # hidden layers of each network


_FAMILIES = (
    StyleGAN2Config,
    StyleGANConfig,
    ProGANConfig,
    StyleGAN3Config,
    R3GANConfig,
    DCGANConfig,
    SRResNetConfig,
    BEGANConfig,
    DDGANConfig,
    DDGANPointsConfig,
    MLPConfig,
    CodesConfig,
    CharsConfig,
)
MODELS: dict[str, type[ModelConfig]] = {cls.name: cls for cls in _FAMILIES}
