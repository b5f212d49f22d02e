"""The check of an exported program: it is run, and its images are compared with those of the generator itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from stylegan_pg.errors import RunError
from stylegan_pg.export.program import Program, conditions, default_cutoff
from stylegan_pg.inference.generate import between, finite, latents
from stylegan_pg.networks import accepted

# Largest difference, as a share of the range of the images. In fp16, rounding alone gives some 1e-3 in small networks,
# and more in deep ones.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}
Run = Callable[[dict[str, torch.Tensor]], torch.Tensor]  # an exported program: inputs by name -> images on the CPU


class Case(NamedTuple):
    """Inputs of a program, and the images [N, C, H, W] that the generator makes of them."""

    inputs: dict[str, torch.Tensor]
    expected: torch.Tensor


class Trial(NamedTuple):
    """seed: of the first image. psi, cutoff: as of Generator.styles. t: place on a walk."""

    batch: int
    seed: int
    psi: float = 1.0
    cutoff: int | None = None
    t: float = 0.0


def trials(G: Any) -> list[Trial]:
    """Batches of 1 and 5 with several seeds and psi, the default cutoff and another one."""
    if not hasattr(G, "styles"):
        return [Trial(1, 0), Trial(5, 100, t=0.4), Trial(1, 7, t=1.0)]
    other = G.num_ws // 2 if default_cutoff(G) == G.num_ws else G.num_ws
    return [Trial(1, 0), Trial(5, 100, 0.7, None, 0.4), Trial(1, 7, 0.5, other, 1.0), Trial(2, 50, -0.3, other, 0.75)]


@torch.no_grad()
def case(G: Any, program: Program, trial: Trial) -> Case:
    """The inputs of a trial, and its images in single precision.

    They are made by the generator's own methods, with psi and cutoff as numbers, and not by the program's function.

    Args:
        G: the network in single precision, see program.rebuilt.
        program: the function that was exported.

    Raises:
        RunError: the images are not finite.
    """
    z, to = (latents(range(first, first + trial.batch), G.z_dim) for first in (trial.seed, trial.seed + 1000))
    both = conditions(G, 2 * trial.batch)
    c, c_to = (None, None) if both is None else both.split(trial.batch)
    t = trial.t if program.wanted.walk else 0.0
    given = {"z": z, "c": c, "to": to, "c_to": c_to, "t": torch.tensor(t)}
    if program.styled:
        n = default_cutoff(G) if trial.cutoff is None else trial.cutoff
        given |= {"psi": torch.tensor(trial.psi), "mask": (torch.arange(G.num_ws) < n).float(), "ws": G.styles(z, c)}
        ends = [G.styles(*end, psi=trial.psi, cutoff=trial.cutoff) for end in ((z, c), (to, c_to))]
        how = accepted(G.synthesis, noise=program.wanted.noise)
        images = G.synthesis(torch.lerp(ends[0], ends[1], t), **how, **program.how)
    else:
        if t:
            z = torch.cat([between(a, b, torch.full([1, 1], t)) for a, b in zip(z, to, strict=True)])
            c = None if c is None or c_to is None else torch.lerp(c, c_to, t)
        images = G(z, c, **program.how)
    inputs = {name: tensor for name in program.names if (tensor := given[name]) is not None}
    return Case(inputs, finite(images.float()))


@torch.no_grad()
def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of images as a share of the expected ones' range (but at least 1e-3 of 1).

    Raises:
        RunError: the shapes differ. NaN in the images is a difference of infinity.
    """
    if actual.shape != expected.shape:
        raise RunError(f"it gives images {list(actual.shape)} instead of {list(expected.shape)}")
    largest = float((actual.double() - expected.double()).abs().max())
    extent = max(float(expected.max() - expected.min()), 1e-3)
    return float("inf") if math.isnan(largest) else largest / extent


def check(run: Run, G: Any, program: Program, what: str) -> tuple[float, int]:
    """Run an exported program on all trials and compare its images.

    Returns:
        The largest difference, and the number of trials.

    Raises:
        RunError: the difference is beyond the tolerance.
    """
    worst, count = 0.0, 0
    for trial in trials(G):
        inputs, expected = case(G, program, trial)
        worst, count = max(worst, difference(run(inputs), expected)), count + 1
    tolerance = TOLERANCE[program.wanted.precision]
    if worst > tolerance:
        remedy = "take --precision fp32" if program.wanted.precision != "fp32" else "update PyTorch and the runtime"
        raise RunError(
            f"{what} differs from PyTorch by {worst:.1e} of the range of the images, more than {tolerance:g}, and was "
            f"removed: {remedy}"
        )
    return worst, count
