"""Projection: latents of which a generator makes given pictures (Karras et al. 2020, appendix D; Abdal et al. 2019).

The latents are found by Adam with the published schedule: the learning rate rises over the first 5% of the steps and
falls along a cosine over the last quarter; noise that shrinks to nothing over the first three quarters is added to
them. If the noise inputs are found as well, a regularisation keeps them free of structure.

Spaces: "w" is one w for all layers (Karras et al. 2020), "w+" one for each (Abdal et al. 2019). Generators without a
mapping network, such as ProGAN's and R3GAN's, are projected into "z".

In "w+" all layers share one w for the first fifth of the steps, which is not published, but finds the w of generated
pictures more reliably (PSNR 38 to 47 dB instead of 32 to 41 within 200 steps, for pictures of a small generator).

Learning rate and noise are relative to the standard deviation of latents, so that they suit any generator. The
published rate of 0.1 is about a quarter of the standard deviation of a component of w in the published networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.func import functional_call

from stylegan_pg.data.classes import class_names, conditions_at
from stylegan_pg.editing.distance import ImageDistance
from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.images import to_uint8
from stylegan_pg.metrics.path_length import temporarily_set
from stylegan_pg.networks import accepted
from stylegan_pg.rng import generator

SPACES = ("w", "w+", "z")
INITS = ("mean", "nearest")
STATISTICS_FROM = 10_000  # samples of w (Karras et al. 2020, appendix D)
SAMPLES = 1_000  # among which the nearest one is searched
RAMP_UP, RAMP_DOWN, NOISE_UNTIL = 0.05, 0.25, 0.75  # shares of the steps
TOGETHER = 0.2  # share of the steps in which all layers have the same w, also in the space "w+"
FIRST_NOISE = 0.05  # of latents, in standard deviations of their distance from the mean
BETAS = (0.9, 0.99)  # the published 0.999 forgets the large gradients of the first steps slowly
SMALLEST_NOISE = 8  # rows or columns of the coarsest level of the regularisation of noise


@dataclass(frozen=True)
class Settings:
    """How pictures are projected.

    Attributes:
        space: one of SPACES.
        steps: of Adam, at least 1.
        init: where the latents begin: "mean" or "nearest", the nearest of SAMPLES samples.
        lr: the largest learning rate, in standard deviations of a component of the latents.
        optimize_noise: whether the noise inputs are found as well.
        noise_weight: of their regularisation. (The published weight, 1e5, would not let the noise follow the distances
            of this package, which are means and not sums.)
        seed: of all random numbers, at least 0. Every picture gets the same ones, so that its result does not depend on
            the others.
    """

    space: str = "w+"
    steps: int = 1000
    init: str = "nearest"
    lr: float = 0.25
    optimize_noise: bool = False
    noise_weight: float = 10.0
    seed: int = 0


@dataclass
class Projection:
    """What was found for n pictures.

    Attributes:
        ws: [n, num_ws, w_dim], or None for a generator without `styles`.
        z: [n, z_dim] in the space "z", else None.
        c: conditions [n, c_dim] of a conditional generator, else None.
        noise: {name of a buffer of G.synthesis: [n, H, W]}, empty unless noise was optimised.
        images: uint8 [n, C, H, W], what the generator makes of them.
        distance, psnr: of the images from the pictures, float [n]; PSNR in dB of 8-bit pixels.
        start: distances [n] at the beginning.
        nearest: distances [n] of the nearest sample, or None if none was searched.
        curves: distances at each step, [steps, n].
        classes: class of each picture, None for an unconditional generator.
    """

    ws: torch.Tensor | None
    z: torch.Tensor | None
    c: torch.Tensor | None
    noise: dict[str, torch.Tensor]
    images: torch.Tensor
    distance: torch.Tensor
    psnr: torch.Tensor
    start: torch.Tensor
    nearest: torch.Tensor | None
    curves: torch.Tensor
    classes: list[int] | None = None


def has_w(G: Any) -> bool:
    """Whether a generator has a mapping network, with parameters, from z to w."""
    return hasattr(G, "styles") and next(iter(G.mapping.parameters()), None) is not None


def chosen_space(G: Any, space: str) -> str:
    """The space for a generator: `space` itself, or "z" if it has no w.

    Raises:
        UsageError: the name is unknown.
    """
    if space not in SPACES:
        raise UsageError(f"space {space!r} is unknown: choose {', '.join(SPACES)}")
    return space if has_w(G) else "z"


def psnr(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB, float64 [n], of uint8 images [n, C, H, W]; equal images have infinity."""
    mse = (images.double() - targets.double()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(255**2 / mse)


def rate(step: int, steps: int) -> float:
    """The learning rate at a step as a share of the largest one (Karras et al. 2020, appendix D)."""
    t = step / steps
    down = min(1.0, (1 - t) / RAMP_DOWN)
    return (0.5 - 0.5 * math.cos(down * math.pi)) * min(1.0, t / RAMP_UP if steps > 1 else 1.0)


def apart_share(step: int, steps: int) -> float:
    """The share of the learning rate with which the layers' w move apart in the space "w+". They start together, as the
    search in w has fewer local minima and stays closer to what the mapping network makes."""
    return min(1.0, max(0.0, step / steps - TOGETHER) / TOGETHER)


def noise_scale(step: int, steps: int) -> float:
    """The standard deviation of the noise added to latents at a step, as a share of the one of latents."""
    return FIRST_NOISE * max(0.0, 1 - step / steps / NOISE_UNTIL) ** 2


def noise_penalty(noise: Sequence[torch.Tensor]) -> torch.Tensor:
    """The regularisation of noise inputs, each [n, 1, H, W] -> [n]: squared correlations of neighbouring pixels, at the
    resolution of an input and at halved ones down to 8x8 (Karras et al. 2020, appendix D, equation 4)."""
    total = noise[0].new_zeros(len(noise[0]))
    for x in noise:
        while True:
            for dim in (2, 3):
                total = total + (x * x.roll(1, dims=dim)).mean(dim=[1, 2, 3]).square()
            if min(x.shape[2:]) <= SMALLEST_NOISE:
                break
            x = torch.nn.functional.avg_pool2d(x, 2) * 2  # the sum of four over their standard deviation
    return total


def project(
    G: Any,
    targets: torch.Tensor,
    distance: ImageDistance,
    settings: Settings,
    *,
    classes: Sequence[int] | None = None,
    batch: int = 32,
    observe: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
    sampled: Callable[[int, int], None] | None = None,
) -> Projection:
    """Find the latents of pictures, all at once; each by itself, so that its result does not depend on the others.

    Args:
        G: the generator, as load_snapshot returns it. Its weights are not changed.
        targets: the pictures, uint8 [n, C, H, W] of G's channels and size.
        distance: what is minimised.
        settings: how.
        classes: class of each picture; None to take that of the nearest sample of a conditional generator.
        batch: samples at a time when the nearest one is searched.
        observe: called at each step with its number, the images [n, C, H, W] in about [-1, 1], and distances [n].
        sampled: called while the nearest sample is searched, with how many have been made, and of how many.

    Raises:
        UsageError: the settings are unknown, or do not fit the generator. RunError: the generator has diverged.
    """
    space, device = chosen_space(G, settings.space), next(G.parameters()).device
    if settings.init not in INITS:
        raise UsageError(f"init {settings.init!r} is unknown: choose {', '.join(INITS)}")
    if settings.optimize_noise and not noise_names(G):
        raise UsageError("this generator has no noise inputs that could be optimised: leave --optimize-noise out")
    pictures = targets.to(device).float() / 127.5 - 1
    with torch.no_grad():
        wanted = distance.embed(pictures)
        near = None
        if settings.init == "nearest" or (G.c_dim and classes is None):
            near = nearest(G, wanted, distance, classes, settings.seed, batch, sampled=sampled)
            classes = near.classes if G.c_dim else None
        c = conditions_at(G, classes).to(device) if G.c_dim and classes is not None else None
        mean, deviation = _statistics(G, space, c, settings.seed)
        latents = mean
        if near is not None and settings.init == "nearest":
            z = near.z.to(device)
            latents = z[:, None] if space == "z" else G.mapping(z, c)[:, None]
        latents = latents.repeat(len(targets) // len(latents), G.num_ws if space == "w+" else 1, 1)
    maker = _Maker(G, space, c)
    found = _Search(maker, latents, deviation, wanted, distance, settings)
    # The blocks compute in float32, because steps become smaller than the rounding of 16 bits.
    with temporarily_set([m for m in G.modules() if isinstance(getattr(m, "dtype", None), torch.dtype)], "dtype", None):
        curves = found.run(observe)
    with torch.no_grad():
        images = to_uint8(maker(found.latents, found.noise))
        again = distance(images.float() / 127.5 - 1, wanted)
        ws = maker.ws(found.latents)
    return Projection(
        ws=None if ws is None else ws.cpu(),
        z=found.latents[:, 0].detach().cpu() if space == "z" else None,
        c=None if c is None else c.cpu(),
        noise={name: x[:, 0].detach().cpu() for name, x in found.noise.items()},
        images=images.cpu(),
        distance=again.cpu(),
        psnr=psnr(images.cpu(), targets.cpu()),
        start=curves[0],
        nearest=None if near is None else near.distance.cpu(),
        curves=curves,
        classes=list(classes) if G.c_dim and classes is not None else None,
    )


def noise_names(G: Any) -> list[str]:
    """The names of the noise inputs among the buffers of a generator's synthesis network."""
    return [name for name, _ in G.synthesis.named_buffers() if name.endswith("noise_const")] if has_w(G) else []


class _Maker:
    """Makes images of latents [n, 1 or num_ws, d] in a space, for conditions c [n, c_dim] or None."""

    def __init__(self, G: Any, space: str, c: torch.Tensor | None):
        self.G, self.space, self.c = G, space, c
        self.alpha = getattr(G, "description", {}).get("alpha", 1.0)

    def ws(self, latents: torch.Tensor) -> torch.Tensor | None:
        """[n, num_ws, w_dim]; None for a generator without `styles`."""
        if self.space == "z":
            return self.G.styles(latents[:, 0], self.c) if hasattr(self.G, "styles") else None
        return latents.expand(-1, self.G.num_ws, -1).contiguous()

    def __call__(self, latents: torch.Tensor, noise: dict[str, torch.Tensor]) -> torch.Tensor:
        ws = self.ws(latents)
        if ws is None:
            given = [latents[:, 0]] if self.c is None else [latents[:, 0], self.c]
            return self.G(*given, **accepted(self.G, alpha=self.alpha))
        if not noise:
            return self.G.synthesis(ws, alpha=self.alpha, noise="const")
        return functional_call(self.G.synthesis, noise, (ws,), {"alpha": self.alpha, "noise": "const"})


class _Search:
    """The optimisation of latents, and of noise."""

    def __init__(
        self,
        maker: _Maker,
        latents: torch.Tensor,
        deviation: torch.Tensor,
        wanted: Sequence[torch.Tensor],
        distance: ImageDistance,
        settings: Settings,
    ):
        self.maker, self.wanted, self.distance, self.settings = maker, wanted, distance, settings
        self.begin, self.deviation = latents.clone(), deviation
        # In standard deviations: what all layers have in common, and what each one has besides.
        self.moved = torch.zeros_like(latents[:, :1]).requires_grad_()
        self.apart = torch.zeros_like(latents).requires_grad_(latents.shape[1] > 1)
        self.noise: dict[str, torch.Tensor] = {}
        if settings.optimize_noise:
            buffers = dict(maker.G.synthesis.named_buffers())
            for name in noise_names(maker.G):
                start = buffers[name][None, None].repeat(len(latents), 1, 1, 1)
                self.noise[name] = start.requires_grad_()

    @property
    def latents(self) -> torch.Tensor:
        return self.begin + (self.moved + self.apart) * self.deviation

    def run(self, observe: Callable[[int, torch.Tensor, torch.Tensor], None] | None) -> torch.Tensor:
        """Make all steps; returns the distances at each, [steps, n].

        Each picture keeps what was nearest to it among the steps without noise in the latents, as Adam may leave a
        minimum again.
        """
        how, curves = self.settings, []
        best = torch.full([len(self.begin)], math.inf, device=self.begin.device)
        everything = [self.moved, self.apart, *self.noise.values()]
        kept = [x.detach().clone() for x in everything]
        draws = generator(how.seed, "projection-noise")
        groups = [{"params": [self.moved, *self.noise.values()]}]
        if self.apart.requires_grad:
            groups.append({"params": [self.apart]})
        adam = torch.optim.Adam(groups, betas=BETAS)
        for step in range(how.steps):
            for group, share in zip(adam.param_groups, (1.0, apart_share(step, how.steps)), strict=False):
                group["lr"] = how.lr * rate(step, how.steps) * share
            shaken = torch.randn([1, *self.begin.shape[1:]], generator=draws).to(self.begin.device)
            latents = self.latents + self.deviation * shaken * noise_scale(step, how.steps)
            images = self.maker(latents, self.noise)
            distances = self.distance(images, self.wanted)
            loss = distances.sum()
            if not bool(loss.isfinite()):
                raise RunError(
                    "the generator makes images that are not finite (NaN or infinity): take another snapshot"
                )
            if self.noise:
                loss = loss + how.noise_weight * noise_penalty(list(self.noise.values())).sum()
            with torch.no_grad():
                if noise_scale(step, how.steps) == 0:
                    better = distances < best
                    best = torch.where(better, distances, best)
                    for old, new in zip(kept, everything, strict=True):
                        old[better] = new[better]
            adam.zero_grad(set_to_none=True)
            loss.backward()
            curves.append(distances.detach().cpu())
            if observe is not None:
                observe(step, images.detach(), curves[-1])
            adam.step()
            with torch.no_grad():
                for x in self.noise.values():
                    x -= x.mean(dim=[1, 2, 3], keepdim=True)
                    x *= (x.square().mean(dim=[1, 2, 3], keepdim=True) + 1e-12).rsqrt()
        with torch.no_grad():
            found = best.isfinite()  # of 3 steps or fewer, none is without noise
            for old, new in zip(kept, everything, strict=True):
                new[found] = old[found]
        return torch.stack(curves)


@dataclass(frozen=True)
class Nearest:
    """The nearest of random samples for each of n pictures: z [n, z_dim], class numbers (0 without classes), distances
    [n]."""

    z: torch.Tensor
    classes: list[int]
    distance: torch.Tensor


@torch.no_grad()
def nearest(
    G: Any,
    wanted: Sequence[torch.Tensor],
    distance: ImageDistance,
    classes: Sequence[int] | None,
    seed: int,
    batch: int,
    count: int = SAMPLES,
    sampled: Callable[[int, int], None] | None = None,
) -> Nearest:
    """Find the nearest of `count` samples for each picture, whose embeddings are `wanted`.

    Args:
        classes: class of each picture; None to take all classes of G in turn, and each at least once.
        seed: of the samples.
        batch: samples at a time.
        sampled: see project.
    """
    device, pictures = next(G.parameters()).device, len(wanted[0])
    known = len(class_names(G)) if G.c_dim else 1
    possible = list(range(known)) if classes is None or not G.c_dim else sorted(set(classes))
    count = max(count, known) if classes is None else count * len(possible)
    z = torch.randn([count, G.z_dim], generator=generator(seed, "projection-samples"))
    if classes is not None and len(possible) > 1:  # every class has the same latents
        z = z[: count // len(possible)].repeat_interleave(len(possible), dim=0)
    labels = [possible[i % len(possible)] for i in range(count)]
    best = torch.full([pictures], math.inf)
    where = torch.zeros([pictures], dtype=torch.long)
    own = None if classes is None or not G.c_dim else torch.tensor(list(classes))
    for i in range(0, count, batch):
        part = z[i : i + batch].to(device)
        given = [part] if not G.c_dim else [part, conditions_at(G, labels[i : i + batch]).to(device)]
        alpha = getattr(G, "description", {}).get("alpha", 1.0)
        pairs = distance.all_pairs(G(*given, **accepted(G, alpha=alpha)), wanted).cpu()
        if own is not None:
            pairs = pairs.masked_fill(torch.tensor(labels[i : i + batch])[:, None] != own[None], math.inf)
        value, place = pairs.min(dim=0)
        better = value < best
        best, where = torch.where(better, value, best), torch.where(better, place + i, where)
        if sampled is not None:
            sampled(min(i + batch, count), count)
    return Nearest(z[where], [labels[i] for i in where.tolist()], best)


@torch.no_grad()
def _statistics(G: Any, space: str, c: torch.Tensor | None, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean [k, 1, d] of latents and the standard deviation [k, 1, 1] of a component, for each row of c; k = 1
    without conditions."""
    if space == "z":
        device = next(G.parameters()).device
        return torch.zeros([1, 1, G.z_dim], device=device), torch.ones([1, 1, 1], device=device)
    device = next(G.parameters()).device
    z = torch.randn([STATISTICS_FROM, G.z_dim], generator=generator(seed, "projection-w")).to(device)
    rows: list[Any] = [None] if c is None else list(c)
    found: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}
    for row in rows:
        key = None if row is None else tuple(row.tolist())
        if key not in found:
            w = G.mapping(z, None if row is None else row.expand(len(z), -1))
            mean = w.mean(dim=0)
            found[key] = mean, (w - mean).square().mean().sqrt()
    each = [found[None if row is None else tuple(row.tolist())] for row in rows]
    return torch.stack([m for m, _ in each])[:, None], torch.stack([s for _, s in each])[:, None, None]
