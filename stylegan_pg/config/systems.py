"""The section `system`: which system of networks and losses is trained, and a class for each system with its keys.

The class is chosen by `system.name`. SYSTEMS is the only list of systems; systems/catalogue.py maps the same names to
what trains them.
"""

from __future__ import annotations

from dataclasses import dataclass

from stylegan_pg.config.fields import at_least_0


@dataclass(frozen=True)
class SystemConfig:
    """One generator against one discriminator, with any objective and terms."""

    name: str = "gan"  # which system is trained; gan: a generator and a discriminator, as `loss` says

    @property
    def images_meet(self) -> bool:
        """Whether images of a group of `model.mbstd_group` meet in what the system adds to the networks."""
        return False


@dataclass(frozen=True)
class AnimeConfig(SystemConfig):
    """A generator that is given attributes against a discriminator that tells them."""

    name: str = "anime"
    attribute_weight: float = at_least_0(1.0)  # factor of the cross entropy of attributes in D's loss
    g_attribute_weight: float = at_least_0(1.0)  # and in G's; 0: images need not have the attributes that G is given
    adversarial_weight: float | None = at_least_0(None)  # factor of the objective; null: the number of attributes


SYSTEMS: dict[str, type[SystemConfig]] = {cls.name: cls for cls in (SystemConfig, AnimeConfig)}
"""{name: class}; a system without keys of its own is a subclass with another name."""
