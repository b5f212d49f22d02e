"""The section `system`: which system of networks and losses is trained, and a class for each system with its keys.

The class is chosen by `system.name`. SYSTEMS is the only list of systems; systems/catalogue.py maps the same names to
what trains them.
"""

from __future__ import annotations

from dataclasses import dataclass

from stylegan_pg.config.fields import at_least_0, positive, share


@dataclass(frozen=True)
class SystemConfig:
    """One generator against one discriminator, with any objective and terms."""

    name: str = "gan"  # which system is trained; gan: a generator and a discriminator, as `loss` says

    @property
    def images_meet(self) -> bool:
        """Whether images of a group of `model.mbstd_group` meet in what the system adds to the networks."""
        return False


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


SYSTEMS: dict[str, type[SystemConfig]] = {
    cls.name: cls for cls in (SystemConfig, BEGANSystemConfig, EBGANSystemConfig, DDGANSystemConfig)
}
"""{name: class}; a system without keys of its own is a subclass with another name."""
