"""Random numbers that follow from what they are for, never from what was drawn before."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch  # takes its time, which every process that packs would spend


def generator(seed: int, purpose: str, *key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator that is a function of (seed, purpose, key): the same on every rank and after every restart."""
    import torch

    return torch.Generator(device).manual_seed(derive(seed, purpose, *key))


def derive(seed: int, purpose: str, *key: int) -> int:
    """A 63-bit seed, well mixed from (seed, purpose, key); all numbers are 0 or more."""
    entropy = [seed, zlib.crc32(purpose.encode()), *key]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
