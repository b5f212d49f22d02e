"""The section `system`: which system of networks and losses is trained, and a class for each system with its keys.

The class is chosen by `system.name`. SYSTEMS is the only list of systems; systems/catalogue.py maps the same names to
what trains them.
"""

from __future__ import annotations

from dataclasses import dataclass

from stylegan_pg.config.fields import at_least_0, choice, positive, share, such_that


@dataclass(frozen=True)
class SystemConfig:
    """One generator against one discriminator, with any objective and terms."""

    name: str = "gan"  # which system is trained; gan: a generator and a discriminator, as `loss` says

    @property
    def images_meet(self) -> bool:
        """Whether images of a group of `model.mbstd_group` meet in what the system adds to the networks."""
        return False


@dataclass(frozen=True)
class LossSensitiveConfig(SystemConfig):
    """Loss-Sensitive GAN, whose margins are the differences of images; it does not read loss.objective."""

    name: str = "loss_sensitive"
    margin: float = at_least_0(1.0)  # margin of D's scores for images whose mean absolute difference is 1
    slope: float = share(0.0)  # share of what lies beyond the margin that counts; 0: LS-GAN, 1: as WGAN


@dataclass(frozen=True)
class ACGANConfig(SystemConfig):
    """A conditional generator against a discriminator that tells classes."""

    name: str = "acgan"
    classifier: str = choice("auxiliary", "joint")  # beside the score; joint: K classes and, as one more, generated
    weight: float = at_least_0(1.0)  # factor of what the heads of D add to both losses


@dataclass(frozen=True)
class InfoGANConfig(SystemConfig):
    """A generator with codes that can be read off its images."""

    name: str = "infogan"
    categories: list[int] = such_that(
        [10], lambda sizes: len(sizes) <= 16 and all(2 <= k <= 4096 for k in sizes), "at most 16 sizes from 2 to 4096"
    )  # sizes of the categorical codes, which are added to model.z_dim; [] for none
    continuous: int = at_least_0(2, most=4096)  # number of continuous codes in (-1, 1), added to model.z_dim
    variance: str = choice("fixed", "learned")  # of the estimated continuous codes: 1, or a further output
    weight: float = at_least_0(1.0)  # factor of what the heads of D add to both losses

    @property
    def images_meet(self) -> bool:
        return True  # in the batch normalisation of Q


@dataclass(frozen=True)
class AnimeConfig(SystemConfig):
    """A generator that is given attributes against a discriminator that tells them."""

    name: str = "anime"
    attribute_weight: float = at_least_0(1.0)  # factor of the cross entropy of attributes in D's loss
    g_attribute_weight: float = at_least_0(1.0)  # and in G's; 0: images need not have the attributes that G is given
    adversarial_weight: float | None = at_least_0(None)  # factor of the objective; null: the number of attributes


@dataclass(frozen=True)
class CANConfig(SystemConfig):
    """A creative adversarial network: D knows styles, and G makes pictures of none of them."""

    name: str = "can"
    style_weight: float = at_least_0(1.0)  # weight of D's loss about the style of real pictures
    ambiguity_weight: float = at_least_0(1.0)  # weight of G's loss about the style that D sees in generated pictures
    ambiguity: str = choice("categorical", "binary")  # that loss: one cross-entropy to 1/K, or one for each style
    head_width: int = positive(128, most=1 << 16)  # hidden units of the head that tells styles


@dataclass(frozen=True)
class ScrubberConfig(SystemConfig):
    """Codes of pictures that do not tell the run's condition."""

    name: str = "scrubber"
    keep: str = ""  # vector field or data.derived entry that stays readable from the code; empty: none
    keep_weight: float = at_least_0(1.0)  # weight of its squared error, relative to its variance
    picture_weight: float = at_least_0(1.0)  # weight of the squared error of the picture that is decoded again
    removal_weight: float = at_least_0(1.0)  # weight of the reversed loss of the inspector; 0: nothing is removed


@dataclass(frozen=True)
class TextConfig(SystemConfig):
    """Texts, character by character, instead of pictures."""

    name: str = "text"
    text: str = "caption"  # text field of the dataset whose first lines are the real texts


@dataclass(frozen=True)
class BEGANSystemConfig(SystemConfig):
    """Boundary equilibrium: D reconstructs real pictures, and generated ones a share k less (model.name=began)."""

    name: str = "began"
    gamma: float = positive(0.5, most=1.0)  # the error of generated pictures, relative to real ones, that k aims at
    k: float = share(0.0)  # weight of generated pictures in D's loss at the start
    k_rate: float = at_least_0(0.001, most=1e6)  # lambda, the speed at which k moves; 0: it stays


@dataclass(frozen=True)
class EBGANSystemConfig(SystemConfig):
    """Energies: D reconstructs real pictures, and generated ones no better than a margin (model.name=began)."""

    name: str = "ebgan"
    margin: float = positive(0.2, most=1e9)  # energy from which on D pushes generated pictures no further up
    pulling: float = at_least_0(0.1, most=1e9)  # weight of the pulling-away term on codes of generated pictures

    @property
    def images_meet(self) -> bool:
        return self.pulling > 0  # in the pulling-away term


@dataclass(frozen=True)
class DDGANSystemConfig(SystemConfig):
    """Denoising diffusion GAN: G takes a few large steps from noise to a picture (model.name=ddgan, ddgan_mlp)."""

    name: str = "ddgan"


_SYSTEMS = (
    SystemConfig,
    LossSensitiveConfig,
    ACGANConfig,
    InfoGANConfig,
    CANConfig,
    ScrubberConfig,
    TextConfig,
    AnimeConfig,
    BEGANSystemConfig,
    EBGANSystemConfig,
    DDGANSystemConfig,
)
SYSTEMS: dict[str, type[SystemConfig]] = {cls.name: cls for cls in _SYSTEMS}
"""{name: class}; a system without keys of its own is a subclass with another name."""

FAMILIES_OF: dict[str, tuple[str, ...]] = {
    CANConfig.name: ("dcgan",),
    ScrubberConfig.name: ("codes",),
    TextConfig.name: ("chars",),
}
"""The families of networks that a system can train, where that is not all those of pictures."""
SPECIAL = ("codes", "chars")  # families that only the systems above can train
