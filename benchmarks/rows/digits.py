"""The digits of scikit-learn as data for rows, and a classifier that judges generated ones."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from rows.trial import DATA, ROOT
from stylegan_pg.data.datasets.opening import load_index

sys.path.insert(0, str(ROOT / "demo"))
from digits import pack_digits  # of demo/

SIZE = 32


def packed(size: int = SIZE) -> Path:
    """The folder with the datasets `train` and `held-out`."""
    folder = DATA / f"digits{size}"
    pack_digits(folder, size)
    return folder


@functools.cache
def real(part: str, size: int = SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """Real digits of the part "train" or "held-out": images [n, 1, size, size] in [-1, 1], and their digits int64."""
    index = load_index(str(packed(size) / part))
    table = index.table(size)
    images = np.stack([table.image(i) for i in range(index.count)])
    names = torch.tensor([int(name) for name in index.label_names])
    return torch.from_numpy(images).float() / 127.5 - 1, names[torch.from_numpy(table.label.astype(np.int64))]


class Classifier(nn.Sequential):
    """Images [N, 1, H, W] in [-1, 1] -> logits of the ten digits."""

    def __init__(self):
        super().__init__()
        for a, b in ((1, 32), (32, 64), (64, 64)):
            self.extend([nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)])
        self.extend([nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 16, 10)])


@functools.cache
@torch.enable_grad()  # it may be asked for where nothing else is trained
def classifier(size: int = SIZE, seed: int = 0) -> Classifier:
    """A classifier trained on the part "train", which must know 97 % of the part "held-out".

    Raises:
        RuntimeError: it does not, so nothing may be judged by it.
    """
    images, digits = real("train", size)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Classifier()
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        for _ in range(25):
            for part in torch.randperm(len(images)).split(64):
                shift = torch.randint(-1, 2, [2]).tolist()
                loss = F.cross_entropy(net(images[part].roll(shift, dims=(2, 3))), digits[part])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    net.eval().requires_grad_(False)
    held_out, theirs = real("held-out", size)
    if (known := float((net(held_out).argmax(dim=1) == theirs).float().mean())) < 0.97:
        raise RuntimeError(f"the classifier knows {known:.3f} of the held-out digits, less than 0.97")
    return net


def classified(images: torch.Tensor) -> torch.Tensor:
    """The digits int64 [n] that the classifier sees in images [n, 1, H, W]."""
    return classifier(images.shape[-1])(images.float().clamp(-1, 1)).argmax(dim=1)


def class_shares(images: torch.Tensor) -> torch.Tensor:
    """The share of each of the ten digits among images [n, 1, H, W]."""
    return torch.bincount(classified(images), minlength=10) / len(images)
