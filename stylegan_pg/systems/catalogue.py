"""The systems of the package by the name that `system.name` gives."""

from __future__ import annotations

from stylegan_pg.config import ACGANConfig, AnimeConfig, Config, InfoGANConfig, SystemConfig
from stylegan_pg.systems.acgan import ACGAN
from stylegan_pg.systems.anime import Anime
from stylegan_pg.systems.base import System
from stylegan_pg.systems.gan import GAN
from stylegan_pg.systems.infogan import InfoGAN

SYSTEMS: dict[str, type[GAN]] = {
    SystemConfig.name: GAN,
    ACGANConfig.name: ACGAN,
    InfoGANConfig.name: InfoGAN,
    AnimeConfig.name: Anime,
}


def system_of(config: Config) -> System:
    """The system that a configuration names, without networks yet."""
    return SYSTEMS[config.system.name](config)
