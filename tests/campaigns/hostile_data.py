"""The formats of hostile.py that are data: archives, packed datasets, tars with further fields, labels and captions.

See hostile_formats.py, which has the others.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutations
import numpy as np
from PIL import Image

from stylegan_pg.data.datasets.index import DatasetIndex, identity_of
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.datasets.table import CorruptSample
from stylegan_pg.data.pack.pack import pack
from stylegan_pg.data.verify import info

Reader = Callable[[random.Random, Path, str], None]


def picture(dice: random.Random, format: str, mode: str = "RGB", **options: Any) -> bytes:
    pixels = np.random.default_rng(dice.randrange(1 << 30)).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


def members() -> dict[str, bytes]:
    dice, files = random.Random(0), {}
    for i in range(3):
        files[f"cat/{i:03d}.png"] = picture(dice, "PNG")
        files[f"cat/{i:03d}.cls"] = b"%d" % (i % 2)
        files[f"dog/{i:03d}.jpg"] = picture(dice, "JPEG")
        files[f"dog/{i:03d}.cls"] = b"1"
    return files


def into(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def packed(source: Path, out: Path, **options: Any) -> None:
    pack(str(source), out, resolution=4, workers=0, progress=False, **options).summary()


def looked_at(index: DatasetIndex) -> None:
    """Do with a dataset what `data info`, `data check` and the first batches of training do."""
    list(info(index))
    table = index.table(max(index.resolutions))
    for i in range(min(len(table), 4)):
        try:
            table.image(i)
        except CorruptSample:
            index.source_of(i)
        for name in table.fields:
            with contextlib.suppress(CorruptSample):
                table.value(name, i)


# --------------------------------------------------------------------------------------------------------- archives


def tar(base: Path) -> Reader:
    made = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
            for i, (name, data) in enumerate(members().items()):
                member = tarfile.TarInfo(f"{'long/' * 30}{name}" if name.startswith("cat/000") else name)
                member.size, member.pax_headers = len(data), {"comment": "x"} if i == 2 else {}
                archive.addfile(member, io.BytesIO(data))
            for suffix in ("png", "cls"):
                link = tarfile.TarInfo(f"cat/link.{suffix}")
                link.type, link.linkname = tarfile.LNKTYPE, f"cat/001.{suffix}"
                archive.addfile(link)
        made.append(buffer.getvalue())

    def read(dice: random.Random, folder: Path, _: str) -> None:
        data = dice.choice(made)
        data = mutations.tar_header(dice, data) if dice.random() < 0.6 else mutations.octets(dice, data)
        path = into(folder, "x.tar", data)
        if dice.random() < 0.5:
            packed(path, folder / "out")
        else:
            looked_at(load_index(str(path)))

    return read


def zip(base: Path) -> Reader:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members().items():
            archive.writestr(name, data)
        archive.writestr("dataset.json", json.dumps({"labels": None}))
    whole = buffer.getvalue()

    def read(dice: random.Random, folder: Path, _: str) -> None:
        packed(into(folder, "x.zip", mutations.octets(dice, whole)), folder / "out")

    return read


# --------------------------------------------------------------------------------------------------------- datasets


def index(base: Path) -> Reader:
    source, out = base / "index-source", base / "index-packed"
    for name, data in members().items():
        if not name.endswith(".cls"):
            into(source, name, data)
    packed(source, out, labels="none")
    return _index_of(out)


def _index_of(out: Path) -> Reader:
    """Reads a packed dataset of which a file is mutated."""
    packed_files = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    description = json.loads(packed_files["index.json"])
    shards = [name for name in packed_files if name.endswith(".index.json")]

    def read(dice: random.Random, folder: Path, marker: str) -> None:
        files, told = dict(packed_files), json.loads(packed_files["index.json"])
        kind = dice.random()
        if kind < 0.4:  # consistent, but wrong: every checksum is right
            shard = dice.choice(shards)
            content = json.loads(files[shard])
            files[shard] = mutations.text(dice, content, marker)
            digest = hashlib.sha256(files[shard]).hexdigest()
            told["shards"][int(Path(shard).name[:5])]["index_sha256"][str(int(shard[1:5]))] = digest
        elif kind < 0.8:
            told = mutations.tree(dice, description, marker)
        else:
            name = dice.choice(sorted(files))
            files[name] = mutations.octets(dice, files[name])
        if kind < 0.8:
            with contextlib.suppress(Exception):  # what has no identity any more keeps the old one
                told["identity"] = identity_of(told)
            files["index.json"] = json.dumps(told).encode()
        if dice.random() < 0.2:
            files["sources.json"] = mutations.text(dice, json.loads(packed_files["sources.json"]), marker)
        for name, data in files.items():
            into(folder / "data", name, data)
        looked_at(load_index(str(folder / "data")))

    return read


def again(base: Path) -> Reader:
    """Mutate the files of a complete packing, and pack again."""
    source, out = base / "again-source", base / "again-packed"
    for name, data in members().items():
        if not name.endswith(".cls"):
            into(source, name, data)
    packed(source, out)
    files = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    books = [name for name in files if "/" not in name]

    def read(dice: random.Random, folder: Path, marker: str) -> None:
        changed = dice.choice(books)
        first, *rest = files[changed].splitlines(keepends=True) if changed == "pictures.json" else [files[changed]]
        told = mutations.text(dice, json.loads(first), marker) if dice.random() < 0.7 else mutations.octets(dice, first)
        for name, data in files.items():
            into(folder / "out", name, b"".join([told, b"\n", *rest]) if name == changed else data)
        packed(source, folder / "out")

    return read


def labels(base: Path) -> Reader:
    source = base / "labels-source"
    names = [f"{i:02d}.png" for i in range(6)]
    for i, name in enumerate(names):
        into(source, name, picture(random.Random(i), "PNG"))
    rows = [[name, i % 3] for i, name in enumerate(names)]
    forms: list[Any] = [{"labels": rows}, dict(map(tuple, rows)), {"labels": [[n, "ab"[i % 2]] for n, i in rows]}]
    forms += [{"labels": [[n, [i, 0.5]] for n, i in rows]}, {n: ["x", "y"][: i + 1] for n, i in rows}]

    def read(dice: random.Random, folder: Path, marker: str) -> None:
        if dice.random() < 0.6:
            path = into(folder, "labels.json", mutations.text(dice, dice.choice(forms), marker))
        else:
            buffer = io.StringIO()
            table = mutations.tree(dice, rows, marker) if dice.random() < 0.5 else rows
            csv.writer(buffer).writerows(r for r in table if isinstance(r, list)) if isinstance(table, list) else None
            data = buffer.getvalue().encode("utf-8", "surrogatepass")
            path = into(folder, "labels.csv", mutations.octets(dice, data) if dice.random() < 0.5 else data)
        packed(source, folder / "out", labels=str(path))

    return read


def with_fields(base: Path) -> Path:
    """A packed dataset with every kind of field that packing makes."""
    source, out, dice = base / "fields", base / "fields-packed", random.Random(1)
    if out.exists():
        return out
    for i in range(4):
        into(source, f"in/{i}.png", picture(dice, "PNG"))
        into(source, f"in/{i}.txt", b"a text")
        into(source, f"B/{i}.png", picture(dice, "PNG"))
        into(source, f"m/{i}.png", picture(dice, "PNG", "L"))
    labels = into(source, "labels.json", json.dumps({f"{i}.png": [i, 0.5] for i in range(4)}).encode())
    pairs, masks = [f"B={source / 'B'}"], [f"m={source / 'm'}"]
    packed(source / "in", out, labels=labels, captions="auto", pair=pairs, mask=masks)
    return out


def fields(base: Path) -> Reader:
    return _index_of(with_fields(base))


def parts(base: Path) -> Reader:
    """Tars of other programs with further fields."""
    dice, files = random.Random(2), {}
    for i in range(3):
        files |= {f"{i}.png": picture(dice, "PNG"), f"{i}.B.jpg": picture(dice, "JPEG"), f"{i}.txt": b"a text"}
        files[f"{i}.mask.png"] = picture(dice, "PNG", "P")
        for name, array in {"x": np.arange(4), "v": np.ones(3, np.float32)}.items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            files[f"{i}.{name}.npy"] = buffer.getvalue()
    program = b"\x80\x04\x95cposix\nsystem\nX\x0c\0\0\0touch MARKER\x85R."

    def read(dice: random.Random, folder: Path, marker: str) -> None:
        changed = dict(files)
        for name in dice.sample(sorted(files), dice.choice([0, 1, 1, 2])):
            octets = program.replace(b"MARKER", marker.encode()) if dice.random() < 0.05 else files[name]
            changed[name] = mutations.octets(dice, octets)
        for name in dice.sample(sorted(files), dice.choice([0, 0, 1])):
            changed.pop(name)
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name, data in changed.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        whole = buffer.getvalue()
        data = mutations.octets(dice, whole) if dice.random() < 0.3 else whole
        looked_at(load_index(str(into(folder, "x.tar", data))))

    return read


def captions(base: Path) -> Reader:
    source = base / "captions-source"
    for i in range(4):
        into(source, f"{i}.png", picture(random.Random(i), "PNG"))
    table: dict[str, Any] = {"0.png": "one", "1.png": ["two", "three"], "2": "four", "3.png": ""}

    def read(dice: random.Random, folder: Path, marker: str) -> None:
        if dice.random() < 0.6:
            path = into(folder, "c.json", mutations.text(dice, table, marker))
        else:
            path = into(folder, "c.csv", mutations.octets(dice, b'path,text\n0.png,"one, two"\n1.png,three\n'))
        packed(source, folder / "out", captions=str(path))

    return read


DATA: dict[str, Callable[[Path], Reader]] = {
    "tar": tar,
    "zip": zip,
    "index": index,
    "fields": fields,
    "parts": parts,
    "again": again,
    "labels": labels,
    "captions": captions,
}
