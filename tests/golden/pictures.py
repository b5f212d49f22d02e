"""The datasets of the recorded runs: pictures that are functions of numbers, packed by the command line."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

# {dataset: (seed, number of pictures, (rows, columns), channels, options of `pack`)}
PACKED = {
    "rgb": (0, 48, (32, 32), 3, "--resolution 32 --format png"),
    "other": (1, 30, (16, 16), 3, "--resolution 16 --format png"),
    "grey": (2, 48, (16, 16), 1, "--resolution 16 --format png --channels 1"),
    "rgba": (3, 48, (16, 16), 4, "--resolution 16 --format png --channels 4"),
    "wide": (4, 48, (16, 24), 3, "--resolution 16 --format png --base 4x6"),
    "jpg": (5, 48, (70, 64), 3, "--resolution 16 --format jpg --filter box --quality 90"),
}
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def picture(seed: int, size: tuple[int, int], channels: int) -> Image.Image:
    """Return a smooth picture of `size` (rows, columns) with slight noise, the same on every machine."""
    random = np.random.default_rng(seed)
    rows, columns = size
    coarse = random.integers(0, 256, [4, 4, channels])
    pixels = np.kron(coarse, np.ones([-(-rows // 4), -(-columns // 4), 1], dtype=np.int64))[:rows, :columns]
    pixels = np.clip(pixels + random.integers(-20, 21, pixels.shape), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels, MODES[channels])


def make(folder: Path, texts: list[str], command: Callable[[list[str]], None]) -> None:
    """Create those datasets in `folder` whose paths, data/NAME, occur in the texts. `command` runs the arguments of
    `python -m stylegan_pg` in the folder."""
    everything = " ".join(texts)
    for name, (seed, count, size, channels, options) in PACKED.items():
        if f"data/{name}" not in everything:
            continue
        for i in range(count):
            path = folder / "pictures" / name / "abc"[i % 3] / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(1000 * seed + i, size, channels).save(path)
        command(["pack", f"pictures/{name}", f"data/{name}", *options.split(), "--workers", "0"])
    if "data/tars" in everything:
        _tars(folder / "data" / "tars")


def _tars(folder: Path) -> None:
    """Create a WebDataset of two shards: PNGs of several sizes with class numbers."""
    folder.mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(folder / f"a-{shard:03d}.tar", "w") as tar:
            for i in range(20 * shard, 20 * shard + 20):
                buffer = io.BytesIO()
                picture(9000 + i, (16 + 4 * (i % 3), 20), 3).save(buffer, "PNG")
                _add(tar, f"{i:04d}.png", buffer.getvalue())
                _add(tar, f"{i:04d}.cls", str(i % 3).encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
