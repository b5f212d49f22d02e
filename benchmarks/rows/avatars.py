"""Avatars with known attributes as data for rows, and a classifier that judges generated ones."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from rows.trial import DATA, ROOT
from stylegan_pg.data.datasets.opening import load_index

sys.path.insert(0, str(ROOT / "demo"))
from avatar_styles import ATTRIBUTES, COLOURS, FLAGS  # of demo/
from avatars import pack_avatars

SIZE, COUNT, STYLES = 32, 2000, ("micah",)
# The places in the vector of attributes of each question that the classifier answers: one of several, or yes or no.
QUESTIONS = {
    **{what: [ATTRIBUTES.index(f"{what}_{name}") for name in names] for what, names in COLOURS.items()},
    **{flag: [ATTRIBUTES.index(flag)] for flag in FLAGS},
}


def packed(styles: Sequence[str] = STYLES, size: int = SIZE, count: int = COUNT) -> Path:
    """The folder with the datasets `train` and `held-out`."""
    folder = DATA / f"avatars{size}-{'-'.join(styles)}"
    pack_avatars(folder, size, count, styles)
    return folder


@functools.cache
def real(part: str, styles: Sequence[str] = STYLES, size: int = SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """Real avatars of the part "train" or "held-out": images [n, 3, size, size] in [-1, 1], and their attributes,
    zeros and ones [n, attributes]."""
    index = load_index(str(packed(styles, size) / part))
    table = index.table(size)
    images = np.stack([table.image(i) for i in range(index.count)])
    return torch.from_numpy(images).float() / 127.5 - 1, torch.from_numpy(table.vectors["attributes"].copy())


def told(logits: torch.Tensor, a: torch.Tensor) -> dict[str, torch.Tensor]:
    """For each question, whether logits [n, attributes] answer it as the attributes [n, attributes] do: bool [n]."""
    found = {}
    for question, places in QUESTIONS.items():
        mine, theirs = logits[:, places], a[:, places]
        one = len(places) == 1
        found[question] = (mine[:, 0] > 0) == (theirs[:, 0] > 0.5) if one else mine.argmax(1) == theirs.argmax(1)
    return found


class Classifier(nn.Sequential):
    """Images [N, 3, H, W] in [-1, 1] -> logits of the attributes [N, attributes]."""

    def __init__(self):
        super().__init__()
        for a, b in ((3, 24), (24, 48), (48, 64)):
            self.extend([nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)])
        self.extend([nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.2), nn.Linear(64 * 16, len(ATTRIBUTES))])


@functools.cache
def classifier(styles: Sequence[str] = STYLES, size: int = SIZE, seed: int = 0, least: float = 0.98) -> Classifier:
    """A classifier trained on the part "train", which must answer each question for the share `least` of "held-out".

    Raises:
        RuntimeError: it does not, so nothing may be judged by it.
    """
    images, a = real("train", styles, size)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Classifier()
        optimizer = torch.optim.Adam(net.parameters(), 2e-3)
        for epoch in range(8):
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 if epoch < 5 else 3e-4
            for part in torch.randperm(len(images)).split(64):
                shift = torch.randint(-1, 2, [2]).tolist()
                shown = images[part].roll(shift, dims=(2, 3)) + 0.15 * torch.randn_like(images[part])
                loss = F.binary_cross_entropy_with_logits(net(shown), a[part])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    net.eval().requires_grad_(False)
    shares = {
        question: float(right.float().mean())
        for question, right in told(net(real("held-out", styles, size)[0]), real("held-out", styles, size)[1]).items()
    }
    if (known := min(shares.values())) < least:
        raise RuntimeError(f"the classifier answers {known:.3f} of the held-out avatars, less than {least}: {shares}")
    return net


def shares_right(images: torch.Tensor, a: torch.Tensor, styles: Sequence[str] = STYLES) -> dict[str, float]:
    """For each question, the share of images [n, 3, H, W] in which the classifier sees what was asked for, attributes
    [n, attributes]."""
    logits = classifier(styles, images.shape[-1])(images.float().clamp(-1, 1))
    return {question: float(right.float().mean()) for question, right in told(logits, a).items()}
