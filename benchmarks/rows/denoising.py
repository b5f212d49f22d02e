"""Row of the denoising diffusion GAN: its posterior, and the ring."""

from __future__ import annotations

from pathlib import Path

import torch

from rows.points import coverage
from rows.trial import Check, Measured, Row, trained
from stylegan_pg.config.loading import load_config
from stylegan_pg.networks.diffusion import Diffusion
from stylegan_pg.systems.base import Context, Values
from stylegan_pg.systems.ddgan import DDGAN


class SquaredError(DDGAN):
    """A denoising diffusion of as few steps without the adversary: G's guess of x_0 minimises the squared error, so it
    is the mean of all pictures that x_{t+1} may stem from."""

    def generator_loss(self, x: Context, turn: str) -> Values:
        loss = (self.denoising(x, "g" + turn).guess - x.real).square().flatten(1).mean(dim=1)
        return {"loss_g": loss, "loss": loss}


def posterior_error(steps: int = 4) -> float:
    """The largest deviation of the posterior's mean and standard deviation from those of the joint distribution of x_t
    and x_{t+1} given x_0, by the formulas for conditional Gaussians."""
    diffusion, worst = Diffusion(steps), 0.0
    kept = (1 - diffusion.betas[1:]).cumprod(0)
    for t in range(1, steps):
        mean, variance = kept[t - 1].sqrt(), 1 - kept[t - 1]  # of x_t given x_0 = 1
        slope, added = (1 - diffusion.betas[t + 1]).sqrt(), diffusion.betas[t + 1]
        gain = slope * variance / (slope.square() * variance + added)
        exact = torch.stack([mean - gain * slope * mean, gain, (variance - gain * slope * variance).sqrt()])
        worst = max(worst, float((diffusion.posterior[t] - exact).abs().max()))
    return worst


def ring(seed: int, folder: Path, off: bool) -> Measured:
    """Four steps from noise to the ring. Off: G's guess minimises the squared error."""
    run = folder / "run"
    system = SquaredError(load_config("systems/ddgan", [f"run={run}", f"seed={seed}"])) if off else None
    found = coverage(trained("systems/ddgan", [f"seed={seed}"], run, system=system), "ring", seed)
    return Measured({**found.values, "posterior": posterior_error()}, found.further, found.picture)


ROWS = [
    Row(
        "ddgan",
        ring,
        [Check("modes", 8), Check("near", 0.6), Check("posterior", 1e-9, at_most=True)],
        off="G minimises the squared error of its guess",
    ),
]
