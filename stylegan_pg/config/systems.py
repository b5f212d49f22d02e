"""The section `system`: which system of networks and losses is trained, and a class for each system with its keys.

The class is chosen by `system.name`. SYSTEMS is the only list of systems; systems/catalogue.py maps the same names to
what trains them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SystemConfig:
    """One generator against one discriminator, with any objective and terms."""

    name: str = "gan"  # which system is trained; gan: a generator and a discriminator, as `loss` says


SYSTEMS: dict[str, type[SystemConfig]] = {cls.name: cls for cls in (SystemConfig,)}
"""{name: class}; a system without keys of its own is a subclass with another name."""
