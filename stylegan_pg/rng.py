"""Stateless random streams, seeded by (seed, purpose, key).

A stream does not depend on earlier draws, so every rank and every resumed run draws the same numbers.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch  # imported late, because it is slow to import and packing processes do not need it


def generator(seed: int, purpose: str, *key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a new torch generator that is a function of (seed, purpose, key)."""
    import torch

    return torch.Generator(device).manual_seed(derive(seed, purpose, *key))


def derive(seed: int, purpose: str, *key: int) -> int:
    """Return a 63-bit seed that is a hash of (seed, purpose, key).

    Args:
        seed: The run's seed, at least 0.
        purpose: The name of the use. Streams for different purposes are independent.
        key: Further numbers, such as nimg or an epoch; each is at least 0.
    """
    entropy = [seed, zlib.crc32(purpose.encode()), *key]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
