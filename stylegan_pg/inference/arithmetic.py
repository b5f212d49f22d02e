"""Arithmetic with latents: means of the latents of several seeds, added and subtracted (Radford et al. 2016, section
6.3.2). Where the generator has a w, the latents are its styles, otherwise z."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from stylegan_pg.data.classes import conditions_at, parse_classes, parse_numbers
from stylegan_pg.errors import UsageError
from stylegan_pg.images import to_uint8
from stylegan_pg.inference.generate import finite, latents
from stylegan_pg.networks import accepted
from stylegan_pg.untrusted import printable

EXAMPLE = "'1,2,3 - 4,5,6 + 7,8,9'"
MOST_SEEDS, MOST_GROUPS = 64, 32  # of a group; groups


class Group(NamedTuple):
    """The seeds whose mean is added (sign 1) or subtracted (-1)."""

    sign: int
    seeds: list[int]

    @property
    def name(self) -> str:
        return f"{'+' if self.sign > 0 else '-'} {','.join(map(str, self.seeds))}"


class Result(NamedTuple):
    """Images uint8 [n, C, H, W]: the result [1, ...]; and for each group those of its seeds, and of their mean."""

    groups: list[Group]
    operands: list[torch.Tensor]
    means: torch.Tensor
    image: torch.Tensor


def parse(text: str) -> list[Group]:
    """'1,2,3 - 4-6 + 7' -> groups of seeds with signs. A sign has a space on both sides; 4-6 are the seeds 4, 5, 6.

    Raises:
        UsageError: it is no such expression, or has too many groups or seeds.
    """
    given = f"--arithmetic {printable(repr(text), 80)}"
    how = f"give groups of seeds with + or - between them, a space on both sides, such as {EXAMPLE}"
    parts = re.split(r"\s+([+-])\s+", text.strip())
    signs = [1, *(1 if sign == "+" else -1 for sign in parts[1::2])]
    groups = []
    for sign, part in zip(signs, parts[::2], strict=True):
        try:
            seeds = parse_numbers(re.sub(r"\s*,\s*", ",", part))
        except UsageError:
            raise UsageError(f"{given}: {printable(repr(part), 40)} is no list of seeds; {how}") from None
        if len(seeds) > MOST_SEEDS:
            raise UsageError(f"{given}: a group has {len(seeds)} seeds; give at most {MOST_SEEDS}")
        latents([max(seeds)], 1)  # refuses those that are too large
        groups.append(Group(sign, seeds))
    if len(groups) < 2:
        raise UsageError(f"{given} has one group only: {how}")
    if len(groups) > MOST_GROUPS:
        raise UsageError(f"{given} has {len(groups)} groups; give at most {MOST_GROUPS}")
    return groups


def condition_of(G: Any, labels: str | None) -> torch.Tensor | None:
    """The one condition [1, c_dim] that all images share: that of `labels`, or the first one; None for an
    unconditional generator.

    Raises:
        UsageError: the labels stand for several classes.
    """
    classes = parse_classes(G, labels)
    if not classes:
        return None
    if labels is not None and len(classes) > 1:
        raise UsageError(f"--arithmetic is of one class, and --labels {printable(labels, 60)} stands for several")
    return conditions_at(G, classes[:1])


@torch.no_grad()
def latent_arithmetic(
    G: Any,
    groups: Sequence[Group],
    c: torch.Tensor | None = None,
    *,
    psi: float = 1.0,
    cutoff: int | None = None,
    noise: str = "const",
    batch: int = 16,
) -> Result:
    """Images of the sum of the groups' signed means, and of what it is made of.

    Args:
        c: one condition [1, c_dim] for all images. psi, cutoff: truncation of the styles, of a generator that has some.

    Raises:
        UsageError: psi is not 1, and the generator has no ws. RunError: the images are not finite.
    """
    like = next(G.parameters())
    has_ws = hasattr(G, "styles")
    if psi != 1 and not has_ws:
        raise UsageError(f"psi={psi}: this generator has no ws, so there is nothing to truncate; take psi=1")
    alpha = getattr(G, "description", {}).get("alpha", 1.0)

    def codes(seeds: Sequence[int]) -> torch.Tensor:
        z = latents(seeds, G.z_dim).to(like)
        if not has_ws:
            return z
        return G.styles(z, None if c is None else c.to(like).expand(len(z), -1), psi=psi, cutoff=cutoff)

    def images(some: torch.Tensor) -> torch.Tensor:
        made = []
        for part in some.split(batch):
            if has_ws:
                image = G.synthesis(part, **accepted(G.synthesis, alpha=alpha, noise=noise))
            else:
                image = G(part, *([] if c is None else [c.to(like).expand(len(part), -1)]))
            made.append(to_uint8(finite(image)).cpu())
        return torch.cat(made)

    found = [codes(group.seeds) for group in groups]
    means = torch.stack([some.mean(dim=0) for some in found])
    signs = torch.tensor([float(group.sign) for group in groups], dtype=means.dtype, device=means.device)
    total = torch.tensordot(signs, means, dims=1)[None]
    return Result(list(groups), [images(some) for some in found], images(means), images(total))


def picture_of(result: Result) -> tuple[torch.Tensor, list[str]]:
    """One picture of the operands, uint8 [C, rows H, columns W], and the names of its rows: a row for each group with
    the images of its seeds and, last, that of their mean; and a row with the result."""
    columns = max(map(len, result.operands)) + 1
    blank = torch.full_like(result.image, 255)
    rows = []
    for operands, mean in zip(result.operands, result.means, strict=True):
        rows += [operands, blank.expand(columns - 1 - len(operands), -1, -1, -1), mean[None]]
    rows += [blank.expand(columns - 1, -1, -1, -1), result.image]
    images = torch.cat(rows)
    count, channels, height, width = images.shape
    tiled = images.reshape(count // columns, columns, channels, height, width).permute(2, 0, 3, 1, 4)
    return tiled.reshape(channels, count // columns * height, columns * width), [
        *(group.name for group in result.groups),
        "=",
    ]
