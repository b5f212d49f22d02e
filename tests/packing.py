"""Helpers for the tests of packing: sources of generated pictures, and the contents of packed datasets."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.pack.pack import pack


def packed(source, out, resolution=8, workers=0, **options):
    return pack(source, out, resolution=resolution, workers=workers, progress=False, **options)


def encoded(picture: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def noise(seed: int, size: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def folder_of(folder: Path, names: list[str], size: int = 16) -> Path:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise(seed, size).save(folder / name)
    return folder


def zip_of(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def only_image(source: Path, out: Path, resolution: int = 8, **options) -> np.ndarray:
    """Pack a source with a single picture without loss, and return it: [C, H, W]."""
    report = packed(source, out, resolution, **options)
    assert (report.count, report.unreadable) == (1, ())
    return load_index(str(out)).table(resolution).image(0)


def labels_of(out: Path) -> tuple[tuple[str, ...], list[int]]:
    index = load_index(str(out))
    return index.label_names, index.table(index.resolutions[0]).label.tolist()


def files_of(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
