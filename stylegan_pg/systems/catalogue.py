"""The systems of the package by the name that `system.name` gives."""

from __future__ import annotations

from stylegan_pg.config import BEGANSystemConfig, Config, DDGANSystemConfig, EBGANSystemConfig, SystemConfig
from stylegan_pg.systems.autoencoders import BEGAN, EBGAN
from stylegan_pg.systems.base import System
from stylegan_pg.systems.ddgan import DDGAN
from stylegan_pg.systems.gan import GAN

SYSTEMS: dict[str, type[GAN]] = {
    SystemConfig.name: GAN,
    BEGANSystemConfig.name: BEGAN,
    EBGANSystemConfig.name: EBGAN,
    DDGANSystemConfig.name: DDGAN,
}


def system_of(config: Config) -> System:
    """The system that a configuration names, without networks yet."""
    return SYSTEMS[config.system.name](config)
