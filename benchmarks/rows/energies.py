"""Rows of systems whose discriminator is an autoencoder, on the digits: BEGAN and EBGAN."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from rows import digits
from rows.trial import Check, Measured, Row, samples, sheet, trained
from stylegan_pg.config.loading import load_config
from stylegan_pg.errors import RunError
from stylegan_pg.systems.autoencoders import EBGAN
from stylegan_pg.training.trainer import Trainer

SIZE = 16
GAMMAS, MARGINS = (0.5, 0.75), (0.2, 0.5)
TOLERANCE = 0.08  # of the ratio of errors
COUNTED = 0.25  # of a run's length, at its end


class NoHinge(EBGAN):
    """EBGAN without the margin: D pushes the energies of generated pictures up without an end."""

    def __init__(self, *given):
        super().__init__(*given)
        margin = self.settings.margin
        self.objective = self.objective._replace(d=lambda real, fake: real + margin - fake)


def late_means(run: Path, names: Sequence[str]) -> list[float]:
    """Means of logged values over the end of a run; of one that diverged, over the end of what was finite."""
    lines = [json.loads(line) for line in (run / "stats.jsonl").read_text("utf-8").splitlines()]
    lines = [line for line in lines if all(name in line for name in names)]
    late = lines[-max(int(len(lines) * COUNTED), 1) :]
    return [sum(line[name] for line in late) / len(late) for name in names]


def data(kimg: float) -> list[str]:
    return [
        f"resolution={SIZE}",
        f"data.url={digits.packed(SIZE) / 'train'}",
        "output.tick_kimg=0.5",
        f"train.total_kimg={kimg}",
    ]


def picture(trainers: Sequence[Trainer], seed: int):
    return sheet(torch.cat([samples(trainer, 32, seed) for trainer in trainers]), columns=32)


def began(seed: int, folder: Path, off: bool) -> Measured:
    """L(G(z)) / L(x) must be gamma, for two of them. Off: k is held at 0, and at 1."""
    values, further, trainers = {}, {}, []
    for gamma, held in zip(GAMMAS, (0, 1), strict=True):
        run = folder / f"gamma{gamma}"
        given = [f"seed={seed}", f"system.gamma={gamma}", *data(16)]
        given += [f"system.k={held}", "system.k_rate=0"] if off else []
        trainers.append(trained("systems/began", given, run))
        fake, real, k = late_means(run, ("loss_g", "score_real", "k"))
        values[f"off {gamma}"] = abs(fake / real - gamma)
        further |= {f"ratio at {gamma}": round(fake / real, 3), f"k at {gamma}": round(k, 3)}
    return Measured(values, further, picture(trainers, seed))


def ebgan(seed: int, folder: Path, off: bool) -> Measured:
    """The mean energy of generated pictures before D's step must be from m to 1.5 m. Off: no hinge, which diverges."""
    values, further, trainers = {}, {}, []
    for margin in MARGINS:
        run = folder / f"margin{margin}"
        given = [f"seed={seed}", f"system.margin={margin}", *data(16)]
        given += ["output.tick_kimg=0.1"] if off else []
        system = NoHinge(load_config("systems/ebgan", [f"run={run}", *given])) if off else None
        try:
            trainers.append(trained("systems/ebgan", given, run, system=system))
        except RunError:  # without the hinge, energies grow until they are not finite
            if not off:
                raise
        fake, real, pulling = late_means(run, ("score_fake", "score_real", "pulling_away"))
        values[f"off 1.25 m, m = {margin}"] = abs(fake / margin - 1.25)
        further |= {f"energies at {margin}": [round(fake, 3), round(real, 4)], f"cosine at {margin}": round(pulling, 3)}
    return Measured(values, further, picture(trainers, seed) if trainers else None)


ROWS = [
    Row("began", began, [Check(f"off {g}", TOLERANCE, at_most=True) for g in GAMMAS], off="k is held at 0 and at 1"),
    Row(
        "ebgan",
        ebgan,
        [Check(f"off 1.25 m, m = {m}", 0.25, at_most=True) for m in MARGINS],
        off="D's loss has no hinge",
    ),
]
