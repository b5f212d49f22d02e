"""Equivariance: how closely the picture of a moved input is the moved picture (Karras et al. 2021, section 3 and
appendix E).

The generator's input has a `transform`, by which the whole picture is translated or rotated. The result is compared
with the picture of the untransformed input, which is translated or rotated afterwards by high-quality filters. The
value is the peak signal-to-noise ratio in decibels of all valid pixels of all images; 4 is the squared range of images
in [-1, 1]:

    10 log10(4 / mean of squared differences)

Pixels are valid if the filters did not need any pixel from beyond the border.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.metrics import base
from stylegan_pg.metrics.base import COUNT, GeneratorMetric, Latents, Settings
from stylegan_pg.metrics.path_length import temporarily_set
from stylegan_pg.ops import upfirdn2d
from stylegan_pg.rng import generator

LARGEST_SHIFT = 1 / 8  # of the picture's height and width
LOBES = 3  # of the Lanczos filters, on each side
SMALLEST = 1e-15  # mean squared difference that float32 can tell from none; about 156 dB
UP, REACH = 4, 8  # factor of up-sampling before a rotation, and the radius of its filter in pixels
Compared = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # two batches of images, and the weights of their pixels


@dataclass(frozen=True)
class Equivariance(GeneratorMetric):
    """eqt_int50k and eqt_frac50k: equivariance to translation by whole pixels, and by any distance. eqr50k:
    equivariance to rotation by any angle.

    Attributes:
        how: "t_int", "t_frac" or "r".
    """

    kind, example = "eq", "eqt_int50k"
    pattern = f"eq(?P<how>t_int|t_frac|r)(?P<count>{COUNT})?"
    default_count = 50_000
    lower_is_better = False

    how: str = "t_int"

    @classmethod
    def fields_from_name(cls, groups: Mapping[str, str | None]) -> dict[str, Any]:
        return dict(groups)

    def check_size(self, size: tuple[int, int]) -> None:
        least = {"t_int": 8, "t_frac": 16, "r": 32}[self.how]  # so that valid pixels are left
        if min(size) < least:
            raise UsageError(
                f"{self.name} needs images of {least} pixels or more on each side, not {size[0]}x{size[1]}"
            )

    def check_generator(self, G: Any) -> None:
        if not hasattr(getattr(getattr(G, "synthesis", None), "input", None), "transform"):
            raise UsageError(
                f"{self.name} needs a generator whose input can be translated and rotated, as that of "
                "model.name=stylegan3: remove this metric"
            )

    def probe(
        self,
        G: Any,
        network: Any,
        draw: Callable[[str], Latents],
        block: int,
        settings: Settings,
        synthesis_args: Mapping[str, Any],
    ) -> Iterator[torch.Tensor]:
        """Yield for each image the sum of the squared differences of valid pixels, and the number of these: [n, 2]."""
        z, c = draw("metric-equivariance")
        random = torch.rand([base.BLOCK, 2], generator=generator(settings.seed, "metric-move", block))[: len(z)]
        for i in range(0, len(z), settings.batch):
            part = slice(i, i + settings.batch)
            yield differences(G, self.how, z[part], random[part], None if c is None else c[part], psi=self.psi)

    def compute(self, real: None, generated: torch.Tensor, settings: Settings) -> dict[str, float]:
        total, pixels = generated.double().sum(dim=0).tolist()
        if not pixels:
            raise RunError(f"{self.name}: no pixel is valid; choose a larger number of images")
        return {"": 10 * math.log10(4 / max(total / pixels, SMALLEST))}


@torch.no_grad()
def differences(
    G: Any, how: str, z: torch.Tensor, random: torch.Tensor, c: torch.Tensor | None, *, psi: float = 1.0
) -> torch.Tensor:
    """The sums over all channels and valid pixels of squared differences, and their numbers: float64 [n, 2] on the CPU.

    Args:
        how: "t_int", "t_frac" or "r".
        z: Latents [n, z_dim]. random: [n, 2] in [0, 1], from which the transformations follow. c: Labels or None.
    """
    put, (rows, columns) = G.synthesis.input, G.img_size
    device, dtype = put.transform.device, put.transform.dtype
    ws = G.styles(z.to(device, dtype), None if c is None else c.to(device, dtype), psi=psi)
    plain = G.synthesis(ws, noise="const").float()
    transforms = torch.eye(3, device=device, dtype=torch.float64).repeat(len(z), 1, 1)
    random = random.to(device, torch.float64) * 2 - 1
    if how == "r":
        angles = random[:, 0] * math.pi
        transforms[:, :2, :2] = turns(-angles)
    else:
        shifts = random * LARGEST_SHIFT * torch.tensor([columns, rows], device=device)
        shifts = shifts.round() if how == "t_int" else shifts
        transforms[:, :2, 2] = -shifts / G.resolution  # in units of the input, see SynthesisInput
    with temporarily_set([put], "transform", transforms.to(dtype)):
        moved = G.synthesis(ws, noise="const").float()
    if how == "r":
        a, b, weights = compared_rotations(plain, moved, angles)
    else:
        a, weights = translated(plain, shifts, whole=how == "t_int")
        b = moved
    errors = ((a - b).double().square() * weights[:, None]).sum(dim=[1, 2, 3])
    return torch.stack([errors, weights.sum(dim=[1, 2]) * plain.shape[1]], dim=1).cpu()


def turns(angles: torch.Tensor) -> torch.Tensor:
    """Rotation matrices [n, 2, 2] of coordinates (x to the right, y down) by angles [n]."""
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([cos, -sin, sin, cos], dim=1).reshape(-1, 2, 2)


# -------------------------------------------------------------------------------------------------- translation


def lanczos(x: torch.Tensor) -> torch.Tensor:
    """The sinc function, multiplied by its own wide main lobe."""
    return torch.where(x.abs() < LOBES, torch.sinc(x) * torch.sinc(x / LOBES), 0)


def translated(images: torch.Tensor, shifts: torch.Tensor, *, whole: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [n, C, H, W] moved by shifts [n, 2] in pixels (to the right, down), and which pixels are valid, 1 or 0,
    float64 [n, H, W]. `whole`: the shifts are whole numbers, so that no filter is needed."""
    across, x_valid = _shifting(images.shape[3], shifts[:, 0], whole)
    along, y_valid = _shifting(images.shape[2], shifts[:, 1], whole)
    moved = along[:, None].to(images.dtype) @ images @ across[:, None].transpose(2, 3).to(images.dtype)
    return moved, y_valid[:, :, None] * x_valid[:, None, :]


def _shifting(size: int, shifts: torch.Tensor, whole: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices [n, size, size] that move a row of pixels by shifts [n], and their valid results, 1 or 0, [n, size]."""
    places = torch.arange(size, device=shifts.device, dtype=torch.float64)
    origins = places - shifts[:, None]  # of each result
    distances = origins[:, :, None] - places
    reach = 0 if whole else LOBES - 1
    valid = (origins.floor() >= reach) & (origins.ceil() <= size - 1 - reach)
    if whole:
        return (distances == 0).double(), valid.double()
    weights = lanczos(distances)
    return weights / weights.sum(dim=2, keepdim=True).clamp(min=0.5), valid.double()


# ----------------------------------------------------------------------------------------------------- rotation


def compared_rotations(plain: torch.Tensor, moved: torch.Tensor, angles: torch.Tensor) -> Compared:
    """The images of plain inputs, turned by angles [n], those of turned inputs, and which pixels are valid.

    The frequencies that a grid of pixels can hold form a square, and a turned grid holds those of a turned square. Both
    images are therefore restricted to the intersection of the two squares.
    """
    rows, columns = plain.shape[2:]
    places = [torch.arange(n, device=plain.device, dtype=torch.float64) - (n - 1) / 2 for n in (rows, columns)]
    y, x = torch.meshgrid(*places, indexing="ij")
    inner = torch.tensor([(columns - 1) / 2 - REACH, (rows - 1) / 2 - REACH], device=plain.device)
    here = torch.stack([x, y], dim=2)  # [H, W, 2]
    turned, filtered, weights = [], [], []
    for image, other, angle, back in zip(plain, moved, angles.tolist(), turns(-angles), strict=True):
        there = here @ back.t()
        f = rotation_filter(angle).to(plain.device)
        padding = UP * REACH
        fine = upfirdn2d(image[None], f.float(), up=UP, padding=padding, gain=UP * UP)
        span = torch.tensor([UP * columns - 1, UP * rows - 1], device=plain.device)
        index = (there + torch.tensor([(columns - 1) / 2, (rows - 1) / 2], device=plain.device)) * UP
        grid = (2 * index / span - 1)[None].to(fine.dtype)
        turned.append(F.grid_sample(fine, grid, mode="bicubic", padding_mode="zeros", align_corners=True))
        coarse = rotation_filter(-angle)[::UP, ::UP].to(plain.device)
        filtered.append(upfirdn2d(other[None], (coarse / coarse.sum()).float(), padding=REACH))
        weights.append((there.abs() <= inner).all(dim=2) & (here.abs() <= inner).all(dim=2))
    return torch.cat(turned), torch.cat(filtered), torch.stack(weights).double()


def rotation_filter(angle: float) -> torch.Tensor:
    """The convolution of two Lanczos filters, one of the pixels' grid and one of a grid that is turned by `angle`, for
    an image that is up-sampled UP times: float64 [2 UP REACH + 1, 2 UP REACH + 1] with the sum 1."""
    x = torch.arange(-UP * REACH, UP * REACH + 1, dtype=torch.float64) / UP
    y, x = torch.meshgrid(x, x, indexing="ij")
    cos, sin = math.cos(angle), math.sin(angle)
    own = lanczos(x) * lanczos(y)
    other = lanczos(cos * x - sin * y) * lanczos(sin * x + cos * y)
    f = F.conv2d(own[None, None], other.flip([0, 1])[None, None], padding=UP * REACH)[0, 0]
    return f / f.sum()
