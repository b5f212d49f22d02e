"""Stateless random streams, seeded by (seed, purpose, key).

A stream never depends on what was drawn before, so every rank and every continued run draws the same numbers.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch  # imported late: it is slow, and packing processes do not need it


def generator(seed: int, purpose: str, *key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh torch generator that depends on (seed, purpose, key) alone."""
    import torch

    return torch.Generator(device).manual_seed(derive(seed, purpose, *key))


def derive(seed: int, purpose: str, *key: int) -> int:
    """A 63-bit seed hashed from (seed, purpose, key).

    Args:
        seed: the run's seed, 0 or more.
        purpose: names the use, so that streams for different uses are independent.
        key: further numbers, each 0 or more, such as nimg or an epoch.
    """
    entropy = [seed, zlib.crc32(purpose.encode()), *key]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
