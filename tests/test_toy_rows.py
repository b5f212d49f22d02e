"""What benchmarks/ measures on the line and in the plane, with cases whose numbers are known."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from stylegan_pg.data.datasets.points import MIXTURES

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import modes
from rows import line, wasserstein


class Line(nn.Module):
    """D(x) = slope x + shift."""

    def __init__(self, slope: float, shift: float):
        super().__init__()
        self.slope, self.shift = slope, shift

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.slope * images.flatten(1) + self.shift


def test_exact_distances():
    found = [line.wasserstein(*pair) for pair in wasserstein.PAIRS]
    assert found == pytest.approx([0.25, 0.5, 1, 1.5, 2], abs=0.005)
    wide, narrow = line.normal(0, 1.0), line.normal(0, 0.5)  # W1 = |difference of deviations| E|N(0, 1)|
    assert line.wasserstein(wide, narrow) == pytest.approx(0.5 * math.sqrt(2 / math.pi), abs=0.01)


def test_pulls_and_slopes_of_a_line():
    """|d/dx softplus(-D)| = |D'| / (1 + exp(D)), and of the minimax game |D'| / (1 + exp(-D))."""
    D, at = Line(-4.0, 3.0), torch.tensor([2.0, 1.0])
    scores = [-5.0, -1.0]
    assert line.slopes(D, at).tolist() == pytest.approx([4, 4])
    assert line.pull(D, at, "logistic") == pytest.approx(sum(4 / (1 + math.exp(s)) for s in scores) / 2, rel=1e-5)
    assert line.pull(D, at, "saturating") == pytest.approx(sum(4 / (1 + math.exp(-s)) for s in scores) / 2, rel=1e-5)
    assert line.pull(D, at, "wgan") == pytest.approx(4)


def test_values_of_a_line():
    real, fake = line.normal(1.0, 0.0), line.normal(-1.0, 0.0)
    how = line.Training("wgan", lr=0, steps=0)
    assert line.value(Line(0.5, 7.0), real, fake, how, seed=0) == pytest.approx(1)
    how = line.Training("logistic", lr=0, steps=0)
    assert line.value(Line(0.0, 0.0), real, fake, how, seed=0) == pytest.approx(0, abs=1e-6)
    assert line.value(Line(100.0, 0.0), real, fake, how, seed=0) == pytest.approx(2 * math.log(2))


@pytest.mark.parametrize("rmsprop", [True, False])
def test_clipped_critics(rmsprop):
    how = line.Training("wgan", lr=0.01, steps=30, rmsprop=rmsprop, clip=0.05)
    D = line.critic(line.normal(-1, 0.1), line.normal(1, 0.1), how, seed=1)
    assert max(float(p.detach().abs().max()) for p in D.parameters()) == pytest.approx(0.05)
    assert line.value(D, line.normal(-1, 0.1), line.normal(1, 0.1), how, seed=1) > 0


@pytest.mark.parametrize("name", MIXTURES)
def test_the_rule_of_modes(name):
    """Uniform noise must fail, although one sample of it lies near every mode; the mixture itself passes; a collapse
    onto all modes but one does not."""
    centres, deviation = (torch.as_tensor(x) for x in MIXTURES[name])
    g, count = torch.Generator().manual_seed(0), modes.SAMPLES
    noise = modes.samples_of(modes.Case(f"{name} noise", 0), seed=0, scale=1.0)
    assert noise.shape == (count, 2)
    assert noise.abs().max() <= 1.4
    of_noise = modes.measured(modes.Case(f"{name} noise", 0), noise)
    assert of_noise["ratio"] < 0.2

    def of(modes_used: int) -> dict:
        at = centres[torch.arange(count) % modes_used]
        points = at + deviation * torch.randn(count, 2, generator=g, dtype=torch.float64)
        return modes.measured(modes.Case(f"{name} logistic", 1), points)

    assert of(len(centres))["ratio"] == 1
    assert of(len(centres) - 1)["modes"] == len(centres) - 1
    assert of(len(centres) - 1)["ratio"] < 1
    assert {f"{points} noise" for points in MIXTURES} <= {case.name for case in modes.CASES}


def test_many_samples_near_few_modes_and_few_near_all():
    """One sample near each mode is not enough."""
    centres, _ = MIXTURES["ring"]
    points = torch.cat([torch.zeros(modes.SAMPLES - 8, 2), torch.from_numpy(centres).float()])
    found = modes.measured(modes.Case("ring logistic", 1), points)
    assert (found["modes"], found["near"]) == (0, pytest.approx(8 / modes.SAMPLES, abs=1e-3))
