"""Conversion of tensors to image files: 8-bit conversion, grids, PNG, and class names beside the rows of a grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from stylegan_pg import files

MIN_ROW_HEIGHT = 16  # pixels; rows of a grid with class names are enlarged to this height


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Convert images [N, C, H, W] from floats in [-1, 1] to uint8, rounded and clipped."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def over_white(images: torch.Tensor) -> torch.Tensor:
    """Composite RGBA images [N, 4, H, W] in [0, 255] over white -> [N, 3, H, W] (uint8 is rounded).

    Images with another number of channels are returned unchanged.
    """
    if images.shape[1] != 4:
        return images
    wide = images.int() if images.dtype == torch.uint8 else images
    colour, alpha = wide[:, :3], wide[:, 3:].clamp(0, 255)
    if images.dtype == torch.uint8:
        return torch.div(colour * alpha + 255 * (255 - alpha) + 127, 255, rounding_mode="floor").to(torch.uint8)
    return 255 + (colour - 255) * (alpha / 255)


def to_pil(image: torch.Tensor | np.ndarray) -> Image.Image:
    """Convert uint8 [C, H, W] with C = 1, 3 or 4 to a Pillow image of mode L, RGB or RGBA."""
    array = np.asarray(image).transpose(1, 2, 0)
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else np.ascontiguousarray(array))


def tile(images: torch.Tensor, columns: int) -> torch.Tensor:
    """Arrange uint8 images [N, C, H, W] row by row in one image [C, rows H, columns W], padded with black."""
    n, c, h, w = images.shape
    rows = -(-n // columns)
    full = torch.cat([images, images.new_zeros([rows * columns - n, c, h, w])])
    return full.reshape(rows, columns, c, h, w).permute(2, 0, 3, 1, 4).reshape(c, rows * h, columns * w)


def save_image(image: torch.Tensor, path: Path) -> None:
    """Write uint8 [C, H, W] as a PNG file (grey, RGB or RGBA for C = 1, 3 or 4), atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_write(path) as file:
        to_pil(image).save(file, format="PNG")


def name_rows(picture: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    """Add a margin at the left of a grid, with a name in black on white beside each row.

    Args:
        picture: uint8 [C, H, W], a grid of len(names) rows of equal height.
        names: The name of each row.

    Returns:
        uint8 [C, k H, margin + k W]. The picture is enlarged by the integer factor k, so that each row is high enough
        for a line of text.
    """
    channels, height, _ = picture.shape
    k = -(-MIN_ROW_HEIGHT * len(names) // height)
    picture = picture.repeat_interleave(k, dim=1).repeat_interleave(k, dim=2)
    row = k * height // len(names)
    size = min(max(row // 8, 12), 40)
    names = [name if len(name) <= 32 else f"{name[:31]}\u2026" for name in names]
    font = _font(size)
    margin = math.ceil(max(font.getlength(name) for name in names)) + size
    strip = Image.new("L", (margin, picture.shape[1]), "white")
    draw = ImageDraw.Draw(strip)
    for i, name in enumerate(names):
        draw.text((margin - size // 2, i * row + row // 2), name, fill="black", font=font, anchor="rm")
    text = torch.from_numpy(np.array(strip)).expand(channels, -1, -1).clone()
    text[3:] = 255  # opaque
    return torch.cat([text, picture], dim=2)


def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib  # its font supports more scripts than Pillow's

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)
