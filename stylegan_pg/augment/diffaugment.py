"""DiffAugment (Zhao et al. 2020, "Differentiable augmentation for data-efficient GAN training", section 4), which is
always applied to every image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from stylegan_pg.augment.colour import colours, cut_out, on_colours

# Section 4 and the authors' settings; lengths are shares of the image's width and height.
BRIGHTNESS = 0.5  # added: uniform in +-
SATURATION = (0.0, 2.0)  # factor of the distance from the pixel's mean over the colours
CONTRAST = (0.5, 1.5)  # factor of the distance from the image's mean
TRANSLATION = 0.125  # uniform in +-, rounded to whole pixels
CUTOUT = 0.5  # side


def draw(policy: str, count: int, generator: torch.Generator, size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Draw the parameters of `count` images of `size` (height, width) for a policy such as "color,translation,cutout".

    Returns CPU tensors (float32) of `count` rows. color: brightness, saturation, contrast; translation: shift [2],
    (x, y) in whole pixels; cutout: cutout [3], (x, y, side), see colour.cut_out.
    """

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand([count, *shape], generator=generator) * (high - low) + low

    params, names = {}, policy.split(",")
    if "color" in names:
        params["brightness"] = uniform(-BRIGHTNESS, BRIGHTNESS)
        params["saturation"] = uniform(*SATURATION)
        params["contrast"] = uniform(*CONTRAST)
    if "translation" in names:
        shifts = [torch.randint(-limit, limit + 1, [count], generator=generator) for limit in limits(size)]
        params["shift"] = torch.stack(shifts, dim=1).float()
    if "cutout" in names:
        params["cutout"] = torch.cat([uniform(0, 1, 2), torch.full([count, 1], CUTOUT)], dim=1)
    return params


def perform(images: torch.Tensor, params: dict[str, torch.Tensor]) -> torch.Tensor:
    """Apply the parameters of `draw` to images [N, C, H, W]; colour does not change an alpha channel."""
    if "brightness" in params:
        values = [params[k].to(images.dtype)[:, None, None, None] for k in _COLOUR]
        images = on_colours(images, lambda x: _recolour(x, *values))
    if "shift" in params:
        images = translate(images, params["shift"], max(limits(images.shape[2:])))
    if "cutout" in params:
        images = cut_out(images, params["cutout"])
    return images


_COLOUR = ("brightness", "saturation", "contrast")


def _recolour(x, brightness, saturation, contrast):
    x = x + brightness
    if colours(x) > 1:
        x = torch.lerp(x.mean(dim=1, keepdim=True), x, saturation)
    return torch.lerp(x.mean(dim=[1, 2, 3], keepdim=True), x, contrast)


def limits(size: Sequence[int]) -> list[int]:
    """The largest translation along x and y of images of `size` (height, width)."""
    return [int(side * TRANSLATION + 0.5) for side in (size[1], size[0])]


def translate(images: torch.Tensor, shift: torch.Tensor, limit: int) -> torch.Tensor:
    """Translate images [N, C, H, W] by shift [N, 2], (x, y) in whole pixels of at most `limit`, and fill up with
    zeros."""
    _, c, h, w = images.shape
    padded = F.pad(images, [limit] * 4)
    shift = shift.long()
    x = torch.arange(w, device=images.device) + limit - shift[:, :1]
    y = torch.arange(h, device=images.device) + limit - shift[:, 1:]
    index = (y[:, :, None] * (w + 2 * limit) + x[:, None, :]).flatten(1)
    return padded.flatten(2).gather(2, index[:, None].expand(-1, c, -1)).unflatten(2, (h, w))
