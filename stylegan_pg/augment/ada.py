"""The pipeline of adaptive discriminator augmentation (Karras et al. 2020, "Training generative adversarial networks
with limited data", appendix B): strengths, order and probabilities as published.

Lognormal(0, (s ln 2)^2) is written as 2 to the power of N(0, s^2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from stylegan_pg.augment import colour, geometry

# All from the pseudocode in appendix B; lengths are shares of the image's width and height.
SHIFT = 0.125  # integer translation: uniform in +-
SCALE = 0.2  # isotropic: s of the lognormal
STRETCH = 0.2  # anisotropic: s of the lognormal
MOVE = 0.125  # fractional translation: standard deviation
BRIGHTNESS = 0.2  # standard deviation
CONTRAST = 0.5  # s of the lognormal
SATURATION = 1.0  # s of the lognormal
BAND = 1.0  # amplification of a frequency band: s of the lognormal
POWER = (10 / 13, 1 / 13, 1 / 13, 1 / 13)  # expected in the bands of natural images
NOISE = 0.1  # scale of the half-normal distribution of the noise's standard deviation
CUTOUT = 0.5  # side


def draw(
    pipeline: str,
    count: int,
    p: float,
    generator: torch.Generator,
    size: tuple[int, int],
    multipliers: Mapping[str, float] | None = None,
) -> dict:
    """Draw the parameters of `count` images of `size` (height, width), for the operations in `pipeline`: letters of
    blit, geometry, colour, filter, noise and cutout, which are applied in this order.

    Every operation is enabled independently with probability p, or min(p * factor, 1) if `multipliers` has a factor for
    it (config.OPERATIONS has the names); otherwise its parameter has the neutral value. The same numbers are drawn for
    every p, so with the same generator, an operation that is enabled at one p is enabled with the same parameters at
    every higher p.

    Returns CPU tensors of `count` rows, float32 but for noise_seed (int64):
        b: flip [0 or 1]; turns [0..3], by 90 degrees counter-clockwise; shift [2], (x, y) in whole pixels.
        g: scale, factor; pre_rotation and post_rotation, radians counter-clockwise; stretch, factor of x and 1 / that
            of y, between the two; move [2], (x, y) in pixels.
        c: brightness, added; contrast, factor; luma_flip [0 or 1]; hue, radians; saturation, factor.
        f: bands [4], factors.   n: noise, standard deviation; noise_seed.   o: cutout [3], (x, y, side), see cut_out.
    """

    def some(name: str, value: torch.Tensor, otherwise: float | torch.Tensor) -> torch.Tensor:
        chance = min(p * (multipliers or {}).get(name, 1.0), 1.0)
        if name == "rotation":  # of each of the two, so that `chance` is the probability of at least one
            chance = 1 - math.sqrt(1 - chance)
        on = torch.rand([count], generator=generator) < chance
        return torch.where(on.reshape(-1, *[1] * (value.ndim - 1)), value, otherwise)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand([count, *shape], generator=generator) * (high - low) + low

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn([count, *shape], generator=generator)

    def whole(below: int) -> torch.Tensor:
        return torch.randint(below, [count], generator=generator).float()

    sides = torch.tensor([size[1], size[0]], dtype=torch.float32)
    params = {}
    if "b" in pipeline:
        params["flip"] = some("flip", whole(2), 0)
        params["turns"] = some("turns", whole(4), 0)
        params["shift"] = some("shift", (uniform(-SHIFT, SHIFT, 2) * sides).round(), 0)
    if "g" in pipeline:
        params["scale"] = some("scale", (normal() * SCALE).exp2(), 1)
        params["pre_rotation"] = some("rotation", uniform(-math.pi, math.pi), 0)
        params["stretch"] = some("stretch", (normal() * STRETCH).exp2(), 1)
        params["post_rotation"] = some("rotation", uniform(-math.pi, math.pi), 0)
        params["move"] = some("move", normal(2) * MOVE * sides, 0)
    if "c" in pipeline:
        params["brightness"] = some("brightness", normal() * BRIGHTNESS, 0)
        params["contrast"] = some("contrast", (normal() * CONTRAST).exp2(), 1)
        params["luma_flip"] = some("luma_flip", whole(2), 0)
        params["hue"] = some("hue", uniform(-math.pi, math.pi), 0)
        params["saturation"] = some("saturation", (normal() * SATURATION).exp2(), 1)
    if "f" in pipeline:
        power, bands = torch.tensor(POWER), torch.ones([count, 4])
        for i in range(4):
            gains = torch.ones([count, 4])
            gains[:, i] = (normal() * BAND).exp2()
            gains /= (power * gains.square()).sum(dim=1, keepdim=True).sqrt()  # so that power stays as expected
            bands = bands * some("bands", gains, 1)
        params["bands"] = bands
    if "n" in pipeline:
        params["noise"] = some("noise", normal().abs() * NOISE, 0)
        params["noise_seed"] = torch.randint(2**63 - 1, [count], generator=generator)
    if "o" in pipeline:
        centre = uniform(0, 1, 2)
        params["cutout"] = torch.cat([centre, some("cutout", torch.full([count, 1], CUTOUT), 0)], dim=1)
    return params


def instructions(params: dict[str, torch.Tensor], size: tuple[int, int], channels: int) -> dict[str, torch.Tensor]:
    """What `perform` needs of the parameters of `draw`, for images of this size and number of channels. It is computed
    on the CPU: matrices, filters, and which images each operation changes. All tensors have a row for each image."""
    how: dict[str, torch.Tensor] = {}
    if "flip" in params or "scale" in params:
        how |= geometry.instructions(params, size)
    if "hue" in params:
        how |= colour.instructions(params, 3 if channels >= 3 else 1)
    if "bands" in params:
        how |= colour.filters(params["bands"])
    return how | {name: params[name] for name in ("noise", "noise_seed", "cutout") if name in params}


def perform(images: torch.Tensor, how: dict[str, torch.Tensor]) -> torch.Tensor:
    """Change images [N, C, H, W] (H, W >= 2) as `instructions` says. An image without enabled operations is
    unchanged."""
    if "matrix" in how:
        images = geometry.transform(images, how)
    if "factor" in how:
        images = colour.recolour(images, how)
    if "taps" in how:
        images = colour.equalise(images, how)
    if "noise" in how:
        images = colour.add_noise(images, how["noise"], how["noise_seed"])
    if "cutout" in how:
        images = colour.cut_out(images, how["cutout"])
    return images
