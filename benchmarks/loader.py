"""The speed of the data loader compared with alternatives: `python benchmarks/loader.py` (about four minutes).

All have two worker processes and are measured in turns on the same generated pictures. `ratio` is this loader's images
per second divided by those of the alternative. `decode`: two processes that only decode the JPEGs from memory with
simplejpeg. `webloader`: webdataset's WebLoader on the same tars with the same decoder, which shuffles 1000 samples.
`zip`: PNGs in a zip, the format of StyleGAN's tools. `start 1000 shards`: one second divided by the time from the
configuration to the first batch, in a new process, without imports, if the index is cached. `memory`: the memory of all
processes after 2 epochs divided by that after 20.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import simplejpeg
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.images.decode import decode
from stylegan_pg.data.loader.loader import batches
from stylegan_pg.data.pack.pack import pack

WORKERS, BATCH = 2, 32
START = """
import sys, time, contextlib
from stylegan_pg.config.loading import load_config
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.loader.loader import batches
begin = time.perf_counter()
config = load_config(None, ["run=none", "train.total_kimg=1", "resolution=8", f"data.url={sys.argv[1]}"])
index = load_index(config.data.url)
table, order = index.table(8), index.order(config.seed, config.data.window)
with contextlib.closing(batches(table, order, start=0, end=1000, batch=32, share=range(32), workers=2)) as data:
    next(data)
    print(time.perf_counter() - begin)
"""


def pictures(folder: Path, count: int, resolution: int) -> Path:
    """Write PNGs with structure at all scales, so that decoding them takes as long as decoding photographs."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(resolution)
    for i in range(count):
        total = np.zeros([resolution, resolution, 3])
        for octave in range(2, resolution.bit_length() - 1):
            small = Image.fromarray(rng.integers(0, 256, [2**octave, 2**octave, 3], dtype=np.uint8))
            total += np.asarray(small.resize((resolution, resolution), Image.Resampling.BICUBIC)) / 2.0 ** (octave - 2)
        total = (total - total.min()) / (total.max() - total.min()) * 255
        Image.fromarray(total.astype(np.uint8)).save(folder / f"{i:05d}.png", compress_level=1)
    return folder


def ours(url: Path, resolution: int) -> Iterator[int]:
    index = load_index(str(url))
    table, order = index.table(resolution), index.order(0)
    how: dict[str, Any] = {"start": 0, "end": 1 << 40, "batch": BATCH, "share": range(BATCH), "workers": WORKERS}
    with contextlib.closing(batches(table, order, **how)) as data:
        for batch in data:
            yield len(batch.image)


def webloader(url: Path, resolution: int) -> Iterator[int]:
    import webdataset as wds

    def to_image(data: bytes) -> torch.Tensor:
        return torch.from_numpy(decode(data, (resolution, resolution), 3))

    tars = sorted(str(path) for path in (url / f"r{resolution:04d}").glob("*.tar"))
    dataset = wds.WebDataset(tars, shardshuffle=len(tars), resampled=False, nodesplitter=None, empty_check=False)  # type: ignore[attr-defined]  # exported without a stub
    dataset = dataset.repeat().shuffle(1000).to_tuple("jpg").map_tuple(to_image)
    dataset = dataset.batched(BATCH)
    for (images,) in wds.WebLoader(dataset, batch_size=None, num_workers=WORKERS):  # type: ignore[attr-defined]  # likewise
        yield len(images)


class Zip(Dataset):
    """A dataset of PNGs in an uncompressed zip, which are read and decoded one by one."""

    def __init__(self, path: Path):
        self.path, self.file = path, None
        with zipfile.ZipFile(path) as file:
            self.names = sorted(file.namelist())

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, i: int) -> torch.Tensor:
        self.file = self.file or zipfile.ZipFile(self.path)  # each worker opens the file itself
        data = self.file.read(self.names[i % len(self.names)])
        return torch.from_numpy(
            np.asarray(Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))).transpose(2, 0, 1).copy()
        )


def zipped(path: Path) -> Iterator[int]:
    for images in DataLoader(Zip(path), batch_size=BATCH, num_workers=WORKERS, prefetch_factor=4):
        yield len(images)


def speed(stream: Iterator[int], seconds: float) -> float:
    """Return images per second, measured after the workers have filled their buffers."""
    with contextlib.closing(stream) as data:  # type: ignore[type-var]  # generators all
        for _ in range(2 * WORKERS + 1):
            next(data)
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            count += next(data)
        return count / (time.perf_counter() - begin)


def _decode_for(pictures: list[bytes], seconds: float, ready: Any, counts: Any) -> None:
    ready.wait()
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        simplejpeg.decode_jpeg(pictures[count % len(pictures)])
        count += 1
    counts.put(count / (time.perf_counter() - begin))


def bare(url: Path, resolution: int, seconds: float) -> float:
    """Return images per second of WORKERS processes that only decode."""
    table = load_index(str(url)).table(resolution)
    held = [table.read(i) for i in range(min(len(table), 128))]
    context = multiprocessing.get_context("fork")
    ready, counts = context.Barrier(WORKERS), context.Queue()
    processes = [context.Process(target=_decode_for, args=(held, seconds, ready, counts)) for _ in range(WORKERS)]
    for process in processes:
        process.start()
    found = [counts.get() for _ in processes]
    for process in processes:
        process.join()
    return sum(found)


def against(name: str, functions: dict[str, Callable[[], float]], rounds: int) -> dict[str, Any]:
    """Return a row with the medians of both, which are measured in turns."""
    found: dict[str, list[float]] = {who: [] for who in functions}
    for _ in range(rounds):
        for who, function in functions.items():
            found[who].append(function())
    medians = {who: statistics.median(values) for who, values in found.items()}
    ratio = statistics.median(a / b for a, b in zip(found["ours"], found["peer"], strict=True))
    return {
        "case": name,
        "ratio": round(ratio, 3),
        "ours_img_per_sec": round(medians["ours"], 1),
        "peer_img_per_sec": round(medians["peer"], 1),
    }


def starting(folder: Path) -> dict[str, Any]:
    tiny = pictures(folder / "tiny", 1, 8)
    with open(tiny / "00000.png", "rb") as file:
        one = file.read()
    for i in range(1, 4000):
        (tiny / f"{i:05d}.png").write_bytes(one)
    url = folder / "shards1000"
    pack(str(tiny), url, resolution=8, lowest=8, format="png", shard_size=4096, progress=False)
    shards = len(load_index(str(url)).shards)
    environment = os.environ | {"STYLEGAN_PG_CACHE": str(folder / "cache")}
    seconds = []
    for _ in range(4):  # the first start fills the cache
        command = [sys.executable, "-c", START, str(url)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        seconds.append(float(result.stdout))
    warm = statistics.median(seconds[1:])
    return {
        "case": f"start {shards} shards",
        "ratio": round(1 / warm, 3),
        "seconds": round(warm, 3),
        "cold": round(seconds[0], 3),
    }


def memory(url: Path, resolution: int) -> dict[str, Any]:
    """Return the private memory of this process and its workers."""
    index = load_index(str(url))
    table, order = index.table(resolution), index.order(0, 64)
    found: dict[int, float] = {}
    how: dict[str, Any] = {"start": 0, "end": 22 * index.count, "batch": BATCH, "share": range(BATCH)}
    with contextlib.closing(batches(table, order, **how, workers=WORKERS)) as data:
        for k, _ in enumerate(data):
            epoch = k * BATCH // index.count
            if epoch in (2, 20) and epoch not in found:
                me = psutil.Process()
                found[epoch] = sum(p.memory_full_info().uss for p in [me, *me.children(recursive=True)]) / 2**20
    row = {"case": f"memory {resolution} 20 epochs", "ratio": round(found[2] / found[20], 3)}
    return row | {"mib_after_2": round(found[2], 1), "mib_after_20": round(found[20], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []

    def report(row: dict[str, Any]) -> None:
        rows.append(row)
        print(f"{row['case']:24} " + "  ".join(f"{k} {v}" for k, v in row.items() if k != "case"), flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for resolution, count in ((256, 512), (1024, 64)):
            source = pictures(folder / f"pictures{resolution}", count, resolution)
            url = folder / f"packed{resolution}"
            size = "4MB" if resolution == 256 else "8MB"
            pack(str(source), url, resolution=resolution, lowest=resolution, shard_size=size, progress=False)
            archive = folder / f"{resolution}.zip"
            with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
                for path in sorted(source.glob("*.png")):
                    file.write(path, path.name)
            mine = lambda url=url, r=resolution: speed(ours(url, r), args.seconds)  # noqa: E731 - one of a row of such
            peers: dict[str, Callable[[], float]] = {
                "decode": lambda url=url, r=resolution: bare(url, r, args.seconds),
                "webloader": lambda url=url, r=resolution: speed(webloader(url, r), args.seconds),
                "zip": lambda archive=archive: speed(zipped(archive), args.seconds),
            }
            for peer, function in peers.items():
                if args.only in f"{peer} {resolution}":
                    report(against(f"{peer} {resolution}", {"ours": mine, "peer": function}, args.rounds))
            if resolution == 256 and args.only in "memory 256 20 epochs":
                report(memory(url, resolution))
        if args.only in "start 1000 shards":
            report(starting(folder))
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
