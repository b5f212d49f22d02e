"""Rows of digits: DCGAN, spectral norm, conditional GANs and InfoGAN."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rows import digits
from rows.trial import Check, Measured, Row, samples, sheet, trained
from stylegan_pg.config.loading import load_config
from stylegan_pg.inference.traversal import traversal
from stylegan_pg.rng import generator
from stylegan_pg.systems.base import Context
from stylegan_pg.systems.gan import GAN
from stylegan_pg.systems.infogan import InfoGAN, categorical_bound
from stylegan_pg.training.trainer import Trainer

SAMPLES, SIZE = 2000, 16
VARIETY = [Check("classes", 10), Check("least share", 0.04)]
LEAST_SHARE = 0.04  # of the samples that a class must get to count
ASKED = [Check("asked = found", 0.95)]
CODES = [Check("bound", 2.0), Check("purity", 0.7)]


def overrides(seed: int, size: int = SIZE) -> list[str]:
    return [f"data.url={digits.packed(size) / 'train'}", f"seed={seed}"]


def variety(trainer: Trainer, seed: int) -> Measured:
    """How many of the ten digits the classifier finds in samples, and the share of the rarest one."""
    images = samples(trainer, SAMPLES, seed)
    shares = digits.class_shares(images)
    values = {"classes": int((shares >= LEAST_SHARE).sum()), "least share": float(shares.min())}
    return Measured(values, {"shares": [round(float(s), 3) for s in shares]}, sheet(images[:32]))


def dcgan(seed: int, folder: Path, off: bool) -> Measured:
    """DCGAN. Off: neither network has batch normalisation."""
    given = ["model.normalization=none"] if off else []
    return variety(trained("systems/dcgan", [*overrides(seed), *given], folder / "run"), seed)


def sngan(seed: int, folder: Path, off: bool) -> Measured:
    """The hinge loss with spectral norm. Off: without it, and nothing else keeps D's slopes small."""
    given = ["model.d_spectral_norm=false"] if off else []
    return variety(trained("systems/sngan", [*overrides(seed), *given], folder / "run"), seed)


class Blind(GAN):
    """A conditional GAN whose D is not shown the conditions."""

    def score(self, x: Context, purpose: str, images: torch.Tensor, c: torch.Tensor | None = None) -> Any:
        return super().score(x, purpose, images, None if c is None else torch.zeros_like(c))


def obedience(trainer: Trainer, seed: int) -> Measured:
    """The share of samples in which the classifier finds the digit that was asked for, and the same for the next
    digit."""
    names = [int(name) for name in trainer.state.index.label_names]
    asked = torch.arange(SAMPLES) % len(names)
    images = samples(trainer, SAMPLES, seed, torch.eye(len(names))[asked])
    found, wanted = digits.classified(images), torch.tensor(names)[asked]
    shifted = torch.tensor(names).roll(-1)[asked]
    values = {"asked = found": float((found == wanted).float().mean())}
    return Measured(values, {"shifted": float((found == shifted).float().mean())}, sheet(images[:30], columns=10))


def conditional(seed: int, folder: Path, off: bool, config: str = "systems/conditional", *given: str) -> Measured:
    """A conditional DCGAN by projection. Off: D is not shown the classes."""
    given_all = [*overrides(seed), *given]
    blind = Blind(load_config(config, [f"run={folder / 'run'}", *given_all])) if off else None
    return obedience(trained(config, given_all, folder / "run", system=blind), seed)


def concatenated(seed: int, folder: Path, off: bool) -> Measured:
    """The same with the classes as planes beside the picture."""
    return conditional(seed, folder, off, "systems/conditional", "model.label=concatenation")


def acgan(seed: int, folder: Path, off: bool) -> Measured:
    """AC-GAN. Off: the classifier has no weight in the losses."""
    given = ["system.weight=0"] if off else []
    return obedience(trained("systems/acgan", [*overrides(seed), *given], folder / "run"), seed)


def acgan_joint(seed: int, folder: Path, off: bool) -> Measured:
    """The same with K + 1 classes."""
    given = ["system.classifier=joint", *(["system.weight=0"] if off else [])]
    return obedience(trained("systems/acgan", [*overrides(seed), *given], folder / "run"), seed)


def infogan(seed: int, folder: Path, off: bool) -> Measured:
    """InfoGAN. Off: the codes have no weight in the losses."""
    given = ["system.weight=0"] if off else []
    return readability(trained("systems/infogan", [*overrides(seed), *given], folder / "run"), seed)


@torch.no_grad()
def readability(trainer: Trainer, seed: int) -> Measured:
    """The bound of the category's information in nats, and the mean over the categories of the share of the most
    frequent digit. The picture has a row for each category; in it the first continuous code goes from -0.95 to 0.95."""
    system, G = trainer.state.system, trainer.state.G_ema
    assert isinstance(system, InfoGAN)
    (count,) = system.own.categories
    each = SAMPLES // count
    z = torch.randn([each * count, G.z_dim], generator=generator(seed, "latents of a row"))
    z = system.law.with_codes(z, {0: torch.arange(len(z)) % count})
    images = torch.cat([G(part) for part in z.split(250)])
    found = digits.classified(images).reshape(each, count)
    purity = [float(torch.bincount(column, minlength=10).max()) / each for column in found.t()]
    group = system.form.mbstd_group  # which batch normalisation compares
    bounds = [
        categorical_bound(system.judged(system.D(images[i : i + group])).codes, system.law.codes(z[i : i + group]))
        for i in range(0, len(z) // group * group, group)
    ]
    strip = traversal(G, seed=seed, columns=16).z
    assert strip is not None
    values = {"bound": float(torch.cat(bounds).mean()), "purity": float(np.mean(purity))}
    return Measured(values, {"of": round(math.log(count), 3)}, sheet(torch.cat([G(part) for part in strip.split(80)])))


ROWS = [
    Row("dcgan", dcgan, VARIETY, off="no batch normalisation"),
    Row("sngan", sngan, VARIETY, off="no spectral norm"),
    Row("conditional", conditional, ASKED, off="D is not shown the classes"),
    Row("conditional, concatenated", concatenated, ASKED, off="D is not shown the classes"),
    Row("acgan", acgan, ASKED, off="no loss of the classes"),
    Row("acgan, K+1 classes", acgan_joint, ASKED, off="no loss of the classes"),
    Row("infogan", infogan, CODES, off="no loss of the codes"),
]
