"""The numbers of a configuration that change during a run, as a table and as a figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from stylegan_pg.config import Config, FixedConfig, curves
from stylegan_pg.config.schedule import (
    Phase,
    augment_p,
    blur_sigma,
    ema_beta,
    ema_half_life,
    instance_noise,
    learning_rate,
    number,
    phase_at,
    phases,
    term_weight,
)
from stylegan_pg.monitoring import figures

SHARES = (0, 0.25, 0.5, 0.75, 1)  # of the run, in the table
POINTS = 400  # of a line in the figure, besides the places where something begins or ends
Numbers = dict[str, Callable[[Phase, float], float]]


def numbers(config: Config) -> Numbers:
    """Every number that a schedule can change, as a function of the phase and nimg."""
    loss, ema = config.loss, config.ema

    def half_life(p: Phase, nimg: float) -> float:
        kimg = ema_half_life(config, p.resolution, nimg)
        return kimg if ema.rampup is None else min(kimg, nimg * ema.rampup / 1000)

    def beta(p: Phase, nimg: float) -> float:
        return ema_beta(p.batch, round(nimg), ema_half_life(config, p.resolution, nimg), ema.rampup)

    own = {"r1": "loss.r1_gamma", "path_length": "loss.pl_weight"}
    built_in = {t.name for t in loss.all_terms()} - {t.name for t in loss.terms}
    found: Numbers = {
        "resolution": lambda p, nimg: p.resolution,
        "batch": lambda p, nimg: p.batch,
        "optim.g_lr": lambda p, nimg: learning_rate(config, "G", p.resolution, nimg),
        "optim.d_lr": lambda p, nimg: learning_rate(config, "D", p.resolution, nimg),
        "optim.beta2": lambda p, nimg: number(config.optim, "beta2", p.resolution, nimg),
    }
    for term in loss.all_terms():
        label = own[term.name] if term.name in built_in else f"weight of {term.name}"
        found[label] = partial(lambda p, nimg, t: term_weight(t, p.resolution, nimg), t=term)
    found |= {"ema.kimg": half_life, "EMA's beta": beta}
    if isinstance(config.augment, FixedConfig):
        found["augment.p"] = lambda p, nimg: augment_p(config, p.resolution, nimg) or 0.0
    found["loss.instance_noise"] = lambda p, nimg: instance_noise(config, p.resolution, nimg)
    return found | {"loss.blur_sigma": lambda p, nimg: blur_sigma(config, p.resolution, nimg)}


def _corners(config: Config, plan: Sequence[Phase]) -> list[float]:
    """Numbers of images, within a run, at which a phase, a curve or an entry of a table begins or ends; and those one
    image before."""
    end, found = plan[-1].end, {0.0, float(plan[-1].end), *(float(p.start) for p in plan)}
    sections = (config.optim, config.ema, config.augment, config.loss, *config.loss.all_terms())
    for section in sections:
        for name, value in vars(section).items():
            if name.endswith("_from"):
                found |= {kimg * 1000.0 for kimg in value}
            elif name != "terms":
                found |= {n for curve in _curves(value) for n in (curve.begin, curve.end)}
    return sorted(n for corner in found for n in (corner - 1, corner) if 0 <= n <= end)


def _curves(value: Any) -> Sequence[curves.Curve]:
    """The curves that a key holds, none if it holds anything else."""
    is_curve = isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)
    return curves.curves_of(value) if is_curve else ()


def _values(get: Callable[[Phase, float], float], plan: list[Phase], places: Sequence[float]) -> list[float]:
    return [get(phase_at(plan, round(n)), n) for n in places]


def varying(config: Config, plan: list[Phase]) -> Numbers:
    """Those of `numbers` that are not the same all along."""
    corners = _corners(config, plan)
    return {name: get for name, get in numbers(config).items() if len(set(_values(get, plan, corners))) > 1}


def rows(config: Config) -> list[list[str]]:
    """A table of the numbers that change, at 0, 25, 50, 75 and 100 % of the run, with a head; empty if none does."""
    plan = phases(config)
    places = [share * plan[-1].end for share in SHARES]
    table = [[name, *(f"{v:.6g}" for v in _values(get, plan, places))] for name, get in varying(config, plan).items()]
    head = ["numbers that change", *(f"{share:.0%}" for share in SHARES)]
    return [head, ["kimg", *(f"{n / 1000:.9g}" for n in places)], *table] if table else []


def constant(config: Config) -> str:
    """The numbers that do not change, as one line; without those that are 0 and those of the table of phases."""
    plan = phases(config)
    kept = numbers(config).keys() - varying(config, plan).keys() - {"resolution", "batch"}
    found = {name: get(plan[0], 0.0) for name, get in numbers(config).items() if name in kept}
    return ", ".join(f"{name} {value:.6g}" for name, value in found.items() if value)


def draw(config: Config, out: Path) -> None:
    """Draw every number that changes over the images shown, in axes of its own, as a PNG; all, if none does.

    Raises:
        OSError: if the file cannot be written.
    """
    plan = phases(config)
    end = plan[-1].end
    places = sorted({*_corners(config, plan), *(end * i / POINTS for i in range(POINTS + 1))})
    shown = varying(config, plan) or numbers(config)
    points = [{"kimg": n / 1000} for n in places]
    for name, get in shown.items():
        for point, value in zip(points, _values(get, plan, places), strict=True):
            point[name] = value
    figures.draw_lines(points, list(shown), out)
