"""The section `system`: which system of networks and losses is trained, and a class for each system with its keys.

The class is chosen by `system.name`. SYSTEMS is the only list of systems; systems/catalogue.py maps the same names to
what trains them.
"""

from __future__ import annotations

from dataclasses import dataclass

from stylegan_pg.config.fields import at_least_0, share


@dataclass(frozen=True)
class SystemConfig:
    """One generator against one discriminator, with any objective and terms."""

    name: str = "gan"  # which system is trained; gan: a generator and a discriminator, as `loss` says


@dataclass(frozen=True)
class LossSensitiveConfig(SystemConfig):
    """Loss-Sensitive GAN, whose margins are the differences of images; it does not read loss.objective."""

    name: str = "loss_sensitive"
    margin: float = at_least_0(1.0)  # margin of D's scores for images whose mean absolute difference is 1
    slope: float = share(0.0)  # share of what lies beyond the margin that counts; 0: LS-GAN, 1: as WGAN


SYSTEMS: dict[str, type[SystemConfig]] = {cls.name: cls for cls in (SystemConfig, LossSensitiveConfig)}
"""{name: class}; a system without keys of its own is a subclass with another name."""
