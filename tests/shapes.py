"""Pictures and generators that are not square or not RGB, for the tests of their use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from packing import packed
from PIL import Image

from stylegan_pg.checkpoint.snapshot import save_snapshot
from stylegan_pg.config import StyleGAN2Config
from stylegan_pg.data.datasets.index import DatasetIndex
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.images import save_image
from stylegan_pg.networks import NETWORKS, NetworkShape

MODES = {1: "L", 3: "RGB", 4: "RGBA"}

COUNT = 12


def random_images(count: int, channels: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """uint8 [count, channels, height, width]: smooth, of every opacity."""
    g = torch.Generator().manual_seed(seed)
    small = torch.rand([count, channels, height // 4, width // 4], generator=g) * 255
    return torch.nn.functional.interpolate(small, (height, width), mode="bilinear").to(torch.uint8)


def save_small_snapshot(path: Path, resolution: int, channels: int, c_dim: int = 0, base=(4, 4), names=()) -> Path:
    """Save a snapshot of a small generator whose weights all differ from their initial values."""
    model = StyleGAN2Config(z_dim=8, w_dim=8, mapping_layers=2, channel_base=64, channel_max=8, base=list(base))
    kwargs = NETWORKS["stylegan2"].g_kwargs(model, NetworkShape(resolution, 16, False, channels, c_dim, 4))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        G = NETWORKS["stylegan2"].G(**kwargs)
        for tensor in G.state_dict().values():
            tensor += 0.3 * torch.randn(tensor.shape)
    save_snapshot(path, G, {"network": "stylegan2", "kwargs": kwargs, "alpha": 1.0, "label_names": list(names)})
    return path


def by_hand(images: torch.Tensor) -> torch.Tensor:
    """Return uint8 [n, 3, H, W], the visible colours computed with Pillow."""
    seen = []
    for image in images.permute(0, 2, 3, 1).numpy():
        picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
        if picture.mode == "RGBA":
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        seen.append(np.asarray(picture.convert("RGB")).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(seen))


class Painter(torch.nn.Module):
    """A substitute for a generator of any shape: smooth images that depend only on z."""

    z_dim, w_dim, c_dim, num_ws = 16, 16, 0, 2

    def __init__(self, channels: int, size: tuple[int, int], resolution: int):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.img_channels, self.img_size, self.resolution = channels, size, resolution

    def styles(self, z, c=None, *, psi=1.0, cutoff=None):
        return (psi * z)[:, None].repeat(1, self.num_ws, 1)

    def synthesis(self, ws, *, alpha=1.0, noise="const"):
        small = ws[:, 0].reshape(-1, 4, 2, 2)[:, : self.img_channels]
        return torch.nn.functional.interpolate(small, self.img_size, mode="bilinear")

    def forward(self, z, c=None, *, psi=1.0, alpha=1.0, noise="const"):
        return self.synthesis(self.styles(z, c, psi=psi), alpha=alpha, noise=noise)


def pack_shapes(folder: Path, channels: int) -> tuple[DatasetIndex, torch.Tensor]:
    """Return a dataset of 4 rows by 6 columns up to 64x96 with two classes, and its pictures at 64x96."""
    images = random_images(COUNT, channels, 64, 96)
    for i, image in enumerate(images):
        save_image(image, folder / "in" / "ab"[i % 2] / f"{i:02d}.png")
    packed(folder / "in", folder / "out", 64, base="4x6", channels=channels, format="png")
    return load_index(str(folder / "out")), images[[*range(0, COUNT, 2), *range(1, COUNT, 2)]]
