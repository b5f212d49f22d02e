"""The systems of the package by the name that `system.name` gives."""

from __future__ import annotations

from stylegan_pg.config import Config, LossSensitiveConfig, SystemConfig
from stylegan_pg.systems.base import System
from stylegan_pg.systems.gan import GAN
from stylegan_pg.systems.loss_sensitive import LossSensitiveGAN

SYSTEMS: dict[str, type[GAN]] = {SystemConfig.name: GAN, LossSensitiveConfig.name: LossSensitiveGAN}


def system_of(config: Config) -> System:
    """The system that a configuration names, without networks yet."""
    return SYSTEMS[config.system.name](config)
