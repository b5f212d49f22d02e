"""The systems of the package by the name that `system.name` gives."""

from __future__ import annotations

from stylegan_pg.config import (
    ACGANConfig,
    AnimeConfig,
    BEGANSystemConfig,
    CANConfig,
    Config,
    DDGANSystemConfig,
    EBGANSystemConfig,
    InfoGANConfig,
    LossSensitiveConfig,
    ScrubberConfig,
    SystemConfig,
    TextConfig,
)
from stylegan_pg.systems.acgan import ACGAN
from stylegan_pg.systems.anime import Anime
from stylegan_pg.systems.autoencoders import BEGAN, EBGAN
from stylegan_pg.systems.base import System
from stylegan_pg.systems.can import CAN
from stylegan_pg.systems.ddgan import DDGAN
from stylegan_pg.systems.gan import GAN
from stylegan_pg.systems.infogan import InfoGAN
from stylegan_pg.systems.loss_sensitive import LossSensitiveGAN
from stylegan_pg.systems.one_pair import OnePair
from stylegan_pg.systems.scrubber import Scrubber
from stylegan_pg.systems.text import TextGAN

SYSTEMS: dict[str, type[OnePair]] = {
    SystemConfig.name: GAN,
    LossSensitiveConfig.name: LossSensitiveGAN,
    ACGANConfig.name: ACGAN,
    InfoGANConfig.name: InfoGAN,
    CANConfig.name: CAN,
    ScrubberConfig.name: Scrubber,
    TextConfig.name: TextGAN,
    AnimeConfig.name: Anime,
    BEGANSystemConfig.name: BEGAN,
    EBGANSystemConfig.name: EBGAN,
    DDGANSystemConfig.name: DDGAN,
}


def system_of(config: Config) -> System:
    """The system that a configuration names, without networks yet."""
    return SYSTEMS[config.system.name](config)
