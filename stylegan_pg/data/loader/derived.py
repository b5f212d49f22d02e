"""Conditions that are computed from the picture itself, in the loader's processes.

A recipe is a word, followed by a number if it takes one: `grey`, `edges`, `low 4`, `noise 25`, `hole 0.5`. Random
recipes use a random stream that belongs to the sample, so that a picture gets the same condition on any number of ranks
and workers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import printable

LUMA = np.array([299, 587, 114])  # thousandths of R, G and B in the luma of ITU-R BT.601
FILL = 127  # the value of pixels within a hole


def grey(image: np.ndarray) -> np.ndarray:
    """Return the luma of a picture [H, W, C] as uint8 [H, W, 1]. The alpha channel is ignored if C = 4."""
    if image.shape[2] == 1:
        return image.copy()
    return ((image[:, :, :3].astype(np.int32) @ LUMA + 500) // 1000).astype(np.uint8)[:, :, None]


def edges(image: np.ndarray) -> np.ndarray:
    """Return the magnitude of the Sobel gradient of the luma, divided by 4 and limited to 255, as uint8 [H, W, 1]."""
    p = np.pad(grey(image)[:, :, 0].astype(np.int32), 1, mode="edge")
    across = p[:, 2:] - p[:, :-2]
    down = p[2:] - p[:-2]
    gx = across[:-2] + 2 * across[1:-1] + across[2:]
    gy = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
    return np.minimum(np.sqrt(gx * gx + gy * gy) / 4, 255).astype(np.uint8)[:, :, None]


def low(image: np.ndarray, factor: int) -> np.ndarray:
    """Return the rounded means of blocks of factor x factor pixels as uint8 [H / factor, W / factor, C]."""
    h, w, c = image.shape
    blocks = image.reshape(h // factor, factor, w // factor, factor, c).astype(np.int64)
    return ((blocks.sum(axis=(1, 3)) + factor * factor // 2) // (factor * factor)).astype(np.uint8)


def noise(image: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    """Add Gaussian noise to a picture. The standard deviation is in units of 0 to 255; the result is rounded and
    limited to this range."""
    noisy = image + deviation * rng.standard_normal(image.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def hole(image: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Fill a rectangle at a random position with FILL. Its sides are `share` of the picture's sides. The result, uint8
    [H, W, C + 1], has a further channel that is 255 within the rectangle and 0 elsewhere."""
    h, w, c = image.shape
    rows, columns = max(round(h * share), 1), max(round(w * share), 1)
    top, left = int(rng.integers(h - rows + 1)), int(rng.integers(w - columns + 1))
    out = np.concatenate([image, np.zeros([h, w, 1], np.uint8)], axis=2)
    out[top : top + rows, left : left + columns] = [FILL] * c + [255]
    return out


@dataclass(frozen=True)
class Derivation:
    """A parsed recipe: its word, and its number (0 if the word takes none)."""

    word: str
    number: float = 0.0

    def shape(self, height: int, width: int, channels: int) -> tuple[int, int, int]:
        """Return (rows, columns, channels) of the result for a picture of this shape.

        Raises:
            UsageError: The picture cannot be divided into blocks of this size.
        """
        if self.word in ("grey", "edges"):
            return height, width, 1
        if self.word == "hole":
            return height, width, channels + 1
        if self.word == "low":
            factor = int(self.number)
            if height % factor or width % factor:
                raise UsageError(
                    f"data.derived: low {factor} does not divide pictures of {height}x{width} (rows x columns) into "
                    "whole blocks: choose a smaller power of two"
                )
            return height // factor, width // factor, channels
        return height, width, channels

    def apply(self, image: np.ndarray, rng: Callable[[], np.random.Generator]) -> np.ndarray:
        """Return the condition of a picture, uint8 [H, W, C]. `rng` returns the sample's random stream."""
        if self.word == "low":
            return low(image, int(self.number))
        if self.word in ("noise", "hole"):
            return {"noise": noise, "hole": hole}[self.word](image, self.number, rng())
        return {"grey": grey, "edges": edges}[self.word](image)


# For each word: a description of the numbers that it takes and a check of a number, or None if it takes no number.
_NUMBERS: dict[str, tuple[str, Callable[[float], bool]] | None] = {
    "grey": None,
    "edges": None,
    "low": ("a power of two from 2 on", lambda n: 2 <= n <= 1024 and math.log2(n).is_integer()),
    "noise": ("a standard deviation above 0, in units of 0 to 255", lambda n: 0 < n <= 255),
    "hole": ("a share of the sides between 0 and 1", lambda n: 0 < n < 1),
}


def parse(text: str) -> Derivation:
    """Parse a recipe: "low 4" -> Derivation("low", 4.0).

    Raises:
        UsageError: The text is not a recipe. The message lists the recipes.
    """
    word, *rest = text.split() or [""]
    forms = "grey, edges, low 4, noise 25, hole 0.5"
    if word not in _NUMBERS:
        raise UsageError(f"data.derived: {printable(repr(text))} is not a recipe: give one such as {forms}")
    wanted = _NUMBERS[word]
    if wanted is None:
        if rest:
            raise UsageError(f"data.derived: {word} takes no number, but {printable(repr(text))} has one")
        return Derivation(word)
    try:
        (number,) = map(float, rest)
        fits = wanted[1](number)
    except ValueError:
        fits, number = False, 0.0
    if not fits:
        raise UsageError(f"data.derived: {printable(repr(text))} is not possible: {word} takes {wanted[0]}")
    return Derivation(word, number)
