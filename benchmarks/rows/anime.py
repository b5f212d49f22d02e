"""The row of system `anime`: avatars have the attributes that were asked for."""

from __future__ import annotations

from pathlib import Path

import torch

from rows import avatars
from rows.trial import Check, Measured, Row, samples, sheet, trained
from stylegan_pg.rng import generator

SAMPLES = 1000
ASKED = {"hair": 0.9, "skin": 0.9, "glasses": 0.9, "mouth_open": 0.9}


def anime(seed: int, folder: Path, off: bool) -> Measured:
    """Attributes of real avatars are asked for, and looked for in the pictures. Off: G has no loss of attributes."""
    given = [f"data.url={avatars.packed() / 'train'}", f"seed={seed}"]
    trainer = trained("systems/anime", [*given, *(["system.g_attribute_weight=0"] if off else [])], folder / "run")
    _, attributes = avatars.real("train")
    chosen = torch.randint(len(attributes), [SAMPLES], generator=generator(seed, "asked attributes"))
    images = samples(trainer, SAMPLES, seed, attributes[chosen])
    shares = avatars.shares_right(images, attributes[chosen])
    further = {question: round(share, 3) for question, share in shares.items() if question not in ASKED}
    return Measured({name: shares[name] for name in ASKED}, further, sheet(images[:64]))


ROWS = [Row("anime", anime, [Check(*asked) for asked in ASKED.items()], off="G has no loss of attributes")]
