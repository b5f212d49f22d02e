"""Perceptual path length: how much an image changes perceptually for a small step in latent space (Karras et al. 2019,
section 4.1). The figures of StyleGAN2 are those at the ends of paths in w, "ppl2_wend"."""

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
from stylegan_pg.metrics.base import COUNT, GeneratorMetric, Latents, Tools
from stylegan_pg.rng import generator

EPSILON = 1e-4


@dataclass(frozen=True)
class PathLength(GeneratorMetric):
    """ppl2_wend: the path length at one end of each of 50,000 paths in w; ppl2_zend: in z; ppl2_wfull: anywhere along
    the paths.

    Attributes:
        space: "w" or "z".
        where: "end" or "full".
    """

    kind, example = "ppl2", "ppl2_wend"
    pattern = f"ppl2_(?P<space>[wz])(?P<where>end|full)(?P<count>{COUNT})?"
    default_count = 50_000
    network = "lpips"
    least_side = 16

    space: str = "w"
    where: str = "end"

    @classmethod
    def parts(cls, groups: Mapping[str, str | None]) -> dict[str, Any]:
        return dict(groups)

    def check_generator(self, G: Any) -> None:
        if not hasattr(G, "styles"):
            raise UsageError(f"{self.name} needs a generator with a latent space w")

    def probe(
        self, G: Any, network: Any, draw: Callable[[str], Latents], block: int, tools: Tools, how: Mapping[str, Any]
    ) -> Iterator[torch.Tensor]:
        (z, c), (end, _) = draw("metric-path-0"), draw("metric-path-1")
        n, given = len(z), {"alpha": getattr(G, "description", {}).get("alpha", 1.0), **how}
        t = torch.zeros(n)
        if self.where == "full":
            t = torch.rand([base.BLOCK], generator=generator(tools.seed, "metric-path-t", block))[:n]
        for i in range(0, n, tools.batch):
            part = slice(i, i + tools.batch)
            ends, labels = torch.stack([z[part], end[part]]), None if c is None else c[part]
            yield path_lengths(G, network, ends, t[part], labels, space=self.space, psi=self.psi, **given)

    def compute(self, real: None, generated: torch.Tensor, tools: Tools) -> dict[str, float]:
        return {"": middle_mean(generated)}


def _slerp(a: torch.Tensor, b: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Interpolate along the great circle between the directions of a and b, [n, d], at t [n, 1] in 0 to 1."""
    a, b = a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)
    d = (a * b).sum(dim=-1, keepdim=True)
    c = b - d * a
    angle = t * d.clamp(-1, 1).acos()
    result = a * angle.cos() + c / c.norm(dim=-1, keepdim=True).clamp(min=1e-12) * angle.sin()
    return result / result.norm(dim=-1, keepdim=True)


@contextlib.contextmanager
def held(objects: Sequence[Any], name: str, value: Any) -> Iterator[None]:
    """Set an attribute of some objects to this value within the block, and restore it afterwards."""
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
    """Return perceptual distances over EPSILON^2, float64 [n] on the CPU (Karras et al. 2019, equations 2 and 3).

    Args:
        distance: A function of two batches of images [n, 3, H, W] in 0 to 255 that gives distances [n].
        z: The two ends of each path, [2, n, z_dim].
        t: The places on the paths, [n] in 0 to 1.
        c: Labels [n, c_dim], or None.
        space: "w", where paths are straight lines, or "z", where they are arcs of circles.
        psi: The truncation.
        alpha: The weight of the newest resolution in a generator that fades it in.
    """
    device, dtype = next(G.parameters()).device, next(G.parameters()).dtype
    z, t = z.to(device, dtype), t.to(device, dtype)[:, None]
    c = None if c is None else c.to(device, dtype)
    if space == "z":
        ws = [G.styles(_slerp(z[0], z[1], t + step) * z.shape[-1] ** 0.5, c, psi=psi) for step in (0.0, EPSILON)]
    else:
        ends = [G.styles(end, c, psi=psi) for end in z]
        ws = [torch.lerp(ends[0], ends[1], (t + step)[:, :, None]) for step in (0.0, EPSILON)]
    # Blocks that work in 16 bits would round the small steps away.
    blocks = [m for m in G.modules() if isinstance(getattr(m, "dtype", None), torch.dtype)]
    with held(blocks, "dtype", None):
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
