"""Perceptual path length: the perceptual change of an image for a small step in latent space (Karras et al. 2019,
section 4.1). The StyleGAN2 paper reports the variant at the ends of paths in w, "ppl2_wend"."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stylegan_pg.errors import UsageError
from stylegan_pg.images import over_white
from stylegan_pg.metrics import base
from stylegan_pg.metrics.base import COUNT, GeneratorMetric, Latents, Settings
from stylegan_pg.rng import generator

EPSILON = 1e-4


@dataclass(frozen=True)
class PathLength(GeneratorMetric):
    """ppl2_wend is the path length at one end of each of 50,000 paths in w. ppl2_zend is the same in z. ppl2_wfull and
    ppl2_zfull take a uniformly random position on each path instead of its end.

    Attributes:
        space: The latent space, "w" or "z".
        where: The position on the path, "end" or "full".
    """

    kind, example = "ppl2", "ppl2_wend"
    pattern = f"ppl2_(?P<space>[wz])(?P<where>end|full)(?P<count>{COUNT})?"
    default_count = 50_000
    network = "lpips"
    min_side = 16

    space: str = "w"
    where: str = "end"

    @classmethod
    def fields_from_name(cls, groups: Mapping[str, str | None]) -> dict[str, Any]:
        return dict(groups)

    def check_generator(self, G: Any) -> None:
        if not hasattr(G, "styles"):
            raise UsageError(f"{self.name} needs a generator with a latent space w")

    def probe(
        self,
        G: Any,
        network: Any,
        draw: Callable[[str], Latents],
        block: int,
        settings: Settings,
        synthesis_args: Mapping[str, Any],
    ) -> Iterator[torch.Tensor]:
        (z, c), (end, _) = draw("metric-path-0"), draw("metric-path-1")
        n, given = len(z), {"alpha": getattr(G, "description", {}).get("alpha", 1.0), **synthesis_args}
        t = torch.zeros(n)
        if self.where == "full":
            t = torch.rand([base.BLOCK], generator=generator(settings.seed, "metric-path-t", block))[:n]
        for i in range(0, n, settings.batch):
            part = slice(i, i + settings.batch)
            ends, labels = torch.stack([z[part], end[part]]), None if c is None else c[part]
            yield path_lengths(G, network, ends, t[part], labels, space=self.space, psi=self.psi, **given)

    def compute(self, real: None, generated: torch.Tensor, settings: Settings) -> dict[str, float]:
        return {"": middle_mean(generated)}


def _slerp(a: torch.Tensor, b: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Interpolate on the great circle between the directions of a and b, [n, d], at t [n, 1] in [0, 1]."""
    a, b = a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)
    d = (a * b).sum(dim=-1, keepdim=True)
    c = b - d * a
    angle = t * d.clamp(-1, 1).acos()
    result = a * angle.cos() + c / c.norm(dim=-1, keepdim=True).clamp(min=1e-12) * angle.sin()
    return result / result.norm(dim=-1, keepdim=True)


@contextlib.contextmanager
def temporarily_set(objects: Sequence[Any], name: str, value: Any) -> Iterator[None]:
    """Set the attribute `name` of all objects to `value` within the block, and restore the old values afterwards."""
    before = [getattr(x, name) for x in objects]
    try:
        for x in objects:
            setattr(x, name, value)
        yield
    finally:
        for x, old in zip(objects, before, strict=True):
            setattr(x, name, old)


@torch.no_grad()
def path_lengths(
    G: Any,
    distance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    z: torch.Tensor,
    t: torch.Tensor,
    c: torch.Tensor | None,
    *,
    space: str,
    psi: float = 1.0,
    alpha: float = 1.0,
) -> torch.Tensor:
    """Return perceptual distances divided by EPSILON^2, float64 [n] on the CPU (Karras et al. 2019, equations 2 and 3).

    Args:
        G: The generator.
        distance: A function of two batches of images [n, 3, H, W] in [0, 255] that returns distances [n].
        z: The two ends of each path, [2, n, z_dim].
        t: The positions on the paths, [n] in [0, 1].
        c: Labels [n, c_dim], or None.
        space: "w" for linear interpolation in w, or "z" for spherical interpolation in z.
        psi: The truncation.
        alpha: The weight of the newest resolution if the generator is fading it in.
    """
    device, dtype = next(G.parameters()).device, next(G.parameters()).dtype
    z, t = z.to(device, dtype), t.to(device, dtype)[:, None]
    c = None if c is None else c.to(device, dtype)
    if space == "z":
        ws = [G.styles(_slerp(z[0], z[1], t + step) * z.shape[-1] ** 0.5, c, psi=psi) for step in (0.0, EPSILON)]
    else:
        ends = [G.styles(end, c, psi=psi) for end in z]
        ws = [torch.lerp(ends[0], ends[1], (t + step)[:, :, None]) for step in (0.0, EPSILON)]
    # All blocks compute in float32, because rounding to 16 bits would be larger than the small steps.
    blocks = [m for m in G.modules() if isinstance(getattr(m, "dtype", None), torch.dtype)]
    with temporarily_set(blocks, "dtype", None):
        images = G.synthesis(torch.cat(ws), alpha=alpha, noise="const").float() * 127.5 + 127.5
    images = over_white(images)
    if (side := min(images.shape[2:])) > 256:
        images = torch.nn.functional.avg_pool2d(images, side // 256)
    a, b = images.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last).chunk(2)
    return distance(a, b).double().cpu() / EPSILON**2


def middle_mean(lengths: torch.Tensor) -> float:
    """Return the mean of the values between the 1st and the 99th percentile."""
    values = lengths.numpy()
    low, high = np.percentile(values, 1, method="lower"), np.percentile(values, 99, method="higher")
    return float(values[(values >= low) & (values <= high)].mean())
