"""What `stylegan-pg sample --out-shards` does: generated images as a packed dataset, whose tars are WebDataset shards.

The dataset has the form that `pack` writes (data/datasets/index.py), at the generator's resolution. A sample has the
members KEY.png, KEY.cls (the class's number, of a conditional generator) and KEY.json:

    {"seed": 5, "label": 2, "class": "owl"}          label and class: of a conditional generator

Sample number i is made from seed number i and class number i, both lists being repeated. Shard number k holds the
samples from k S to (k + 1) S - 1 for S images per shard. So what is in a shard does not depend on the other shards, on
the number of ranks or on interruptions. Of W ranks, rank r makes every W-th of the shards that are missing.

OUT/.sample holds the request and a manifest of each complete shard until all shards are complete. Then index.json is
written, which contains the request under "pack".
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from stylegan_pg import processors
from stylegan_pg.checkpoint.snapshot import load_snapshot
from stylegan_pg.data.classes import class_names, conditions_at
from stylegan_pg.data.datasets.index import FORMAT, identity_of, resolution_folder
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.pack.shard_writer import ShardFile, clean, is_whole, write_whole
from stylegan_pg.distributed import launcher
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.errors import UsageError
from stylegan_pg.images import to_pil
from stylegan_pg.inference.generate import images_of, latents, writing
from stylegan_pg.inference.look import look_for
from stylegan_pg.inference.sampling import enough_memory
from stylegan_pg.inference.shard_request import Request, checked_seeds, plan_of, request_for
from stylegan_pg.rng import generator
from stylegan_pg.untrusted import MAX_JSON_BYTES, printable, read_json

log = logging.getLogger(__name__)

BOOKS = ".sample"
WAIT_SEC = 7 * 86400.0  # for which a rank that has finished waits for the others
MADE_WITH = ("batch", "device", "threads", "torch")  # what changes images by rounding only


def sample_shards(
    snapshot: Path,
    out: Path,
    device: torch.device,
    *,
    count: int | None = None,
    seeds: str | None = None,
    labels: str | None = None,
    psi: float | None = None,
    cutoff: int | None = None,
    noise: str = "const",
    batch: int = 16,
    per_shard: int | None = None,
    progress: bool = False,
) -> str:
    """Write images of a snapshot into the folder `out`. All ranks must call this; it is a collective call.

    Called again after an interruption, it continues: complete shards are kept, the others are made again. A complete
    dataset is left as it is. The bytes are those of an undisturbed call (with the same batch size, device, number of
    threads and version of torch; otherwise images may differ by rounding, which is logged).

    Args:
        device: This rank's.
        count: The number of images, whose seeds follow that in `seeds` (0 by default). None: one for each of `seeds`
            or, if that is longer, of `labels`.
        labels: Classes, see classes.parse_classes; all by default.
        per_shard: Images per shard; None for 1000, or fewer large ones.

    Returns:
        A line that says what `out` holds.

    Raises:
        UsageError: An option is not possible, or `out` holds something else or the result of another request.
        RunError: The disk is full, memory is short, or the generator has diverged.
    """
    numbers = checked_seeds(seeds, count)
    G = load_snapshot(snapshot, device)
    dist.check_same(G.state_dict().values(), "the snapshots")
    look = look_for(G, psi=psi, cutoff=cutoff, noise=noise, batch=batch)
    request = request_for(G, snapshot, numbers, count, labels, look, per_shard)
    plan = plan_of(G, request)
    made_with: dict[str, Any] = dict(
        zip(MADE_WITH, (batch, device.type, torch.get_num_threads(), torch.__version__), strict=True)
    )
    books, folder = out / BOOKS, out / resolution_folder(G.resolution)
    with contextlib.ExitStack() as stack:
        with dist.main_decides() as box, writing(out):
            if dist.is_main():
                box.append(_begin(out, request, plan, made_with, stack))
        (missing,) = box
        if missing is not None:
            mine = missing[dist.rank() :: dist.world()]
            with enough_memory(batch), writing(out):
                _make(G, request, mine, folder, books, batch, progress)
            dist.barrier()
            with dist.main_decides(), writing(out):
                if dist.is_main():
                    _finish(out, G, request, plan)
    return f"{out}: {request.count} images in {request.shards} shards ({folder.name}/*.tar)"


def _begin(
    out: Path, request: Request, plan: dict[str, Any], made_with: dict[str, Any], stack: contextlib.ExitStack
) -> list[int] | None:
    """Prepare the folder, and lock it until `stack` is closed; returns the numbers of the shards that are missing, or
    None if the dataset is complete.

    Raises:
        UsageError: The folder holds something else, or another process writes into it.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{printable(out)} is a file: give a new or empty folder")
    books, index = out / BOOKS, out / "index.json"
    if index.exists():
        load_index(str(out))  # names damage
        _compare(out, _table(index).get("pack", {}), plan)
        log.info(f"{out} is complete already")
        shutil.rmtree(books, ignore_errors=True)
        return None
    if out.is_dir() and not books.is_dir() and (others := sorted(os.listdir(out))):
        raise UsageError(
            f"{printable(out)} holds other files ({printable(others[0])}, ...): give a new or empty folder"
        )
    books.mkdir(parents=True, exist_ok=True)
    lock = stack.enter_context((books / "lock").open("wb"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"{printable(out)} is being written by another process: wait for it, or stop it") from None
    except OSError:
        pass  # a file system without locks
    if (books / "plan.json").exists():
        before = _table(books / "plan.json")
        _compare(out, before.get("plan", {}), plan)
        earlier = before.get("made_with", {})
        changed = [f"{k} was {printable(earlier.get(k))}, is {v}" for k, v in made_with.items() if earlier.get(k) != v]
        if changed:
            log.warning(f"{out} is continued otherwise ({'; '.join(changed)}): images may differ by rounding")
    else:
        write_whole(books / "plan.json", json.dumps({"plan": plan, "made_with": made_with}).encode())
    done = {name for name in map(_name, range(request.shards)) if _committed(out, books, name)}
    clean(out, books, done)
    if done:
        log.info(f"{out}: {len(done)} of {request.shards} shards are complete")
    return [k for k in range(request.shards) if _name(k) not in done]


def _name(shard: int) -> str:
    return f"{shard:05d}"


def _table(file: Path) -> dict[str, Any]:
    content = read_json(file, "it is no table", max_bytes=MAX_JSON_BYTES)
    if not isinstance(content, dict):
        raise UsageError(f"{printable(file)} is damaged: remove the folder, or give another one")
    return content


def _compare(out: Path, there: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UsageError, naming every difference, if the folder belongs to another request."""
    if not isinstance(there, dict) or not there.get("generated"):
        raise UsageError(f"{printable(out)} holds a dataset that was packed, not generated: give a new or empty folder")
    different = [f"{k} was {printable(there.get(k))}, is {now[k]}" for k in now if there.get(k) != now[k]]
    if different:
        raise UsageError(
            f"{printable(out)} belongs to another request: {'; '.join(different)}. Repeat the command it was started "
            "with, or give a new or empty folder"
        )


def _committed(out: Path, books: Path, name: str) -> dict[str, Any] | None:
    """The manifest of a shard: its resolution, count, SHA-256 of its index, and images per class; None if the shard is
    not complete."""
    try:
        manifest = json.loads((books / f"{name}.json").read_bytes())
        (place,) = manifest["index_sha256"].items()
        return manifest if is_whole(out, name, *place) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _make(
    G: Any, request: Request, shards: Sequence[int], folder: Path, books: Path, batch: int, progress: bool
) -> None:
    """Make this rank's shards one after another. Pixels are encoded by threads, which do not change a byte."""
    names, ranks = class_names(G), dist.world()
    total = sum(len(request.samples(k)) for k in shards)
    what = "sampling" if ranks == 1 else f"sampling (rank 0 of {ranks})"
    workers = max(1, min(8, processors.count() // launcher.place().local_world))
    bar = tqdm(total=total, unit="img", desc=what, disable=not progress or not dist.is_main())
    with bar, ThreadPoolExecutor(workers) as pool:
        for shard in shards:
            name, samples = _name(shard), request.samples(shard)
            tar = ShardFile(folder / f"{name}.tar", {})
            counts: Counter[int] = Counter()
            try:
                for first in range(samples.start, samples.stop, batch):
                    some = range(first, min(first + batch, samples.stop))
                    for i, png in zip(some, pool.map(_png, _images(G, request, some)), strict=True):
                        label, key = request.label(i), f"{i:08d}"
                        tar.add(key, "png", png, label, {}, {})
                        tar.member(key, "json", json.dumps(_facts(request, i, names)).encode())
                        counts.update([] if label is None else [label])
                    bar.update(len(some))
                sha256 = tar.commit()
            except BaseException:  # KeyboardInterrupt is included; it is raised again
                tar.discard()
                raise
            manifest = {"count": len(samples), "index_sha256": {str(G.resolution): sha256}, "labels": counts}
            write_whole(books / f"{name}.json", json.dumps(manifest).encode())


def _facts(request: Request, i: int, names: Sequence[str]) -> dict[str, Any]:
    label = request.label(i)
    return {"seed": request.seed(i)} | ({} if label is None else {"label": label, "class": names[label]})


def _images(G: Any, request: Request, samples: range) -> torch.Tensor:
    """uint8 [n, C, H, W]. With random noise, images are made one by one, from noise that follows from their seeds;
    within a batch, an image's noise would depend on its place."""
    seeds = [request.seed(i) for i in samples]
    z = latents(seeds, G.z_dim)
    classes = [label for i in samples if (label := request.label(i)) is not None]
    c = conditions_at(G, classes) if classes else None
    if request.how["noise"] != "random":
        return torch.cat(list(images_of(G, z, c, batch=len(z), **request.how)))
    device, made = next(G.parameters()).device, []
    for i, seed in enumerate(seeds):
        noise = generator(seed, "picture-noise", device=device)
        some = None if c is None else c[i : i + 1]
        made += images_of(G, z[i : i + 1], some, generator=noise, **request.how)
    return torch.cat(made)


def _png(image: torch.Tensor) -> bytes:
    file = io.BytesIO()
    to_pil(image).save(file, format="PNG")
    return file.getvalue()


def _finish(out: Path, G: Any, request: Request, plan: dict[str, Any]) -> None:
    """Write index.json, which makes the dataset complete."""
    counts: Counter[int] = Counter()
    shards = []
    for name in map(_name, range(request.shards)):
        manifest = _committed(out, out / BOOKS, name)
        if manifest is None:
            raise UsageError(
                f"{printable(out)} lacks the shard {name}, which was removed meanwhile: repeat the command"
            )
        counts.update({int(k): n for k, n in manifest["labels"].items()})
        shards.append({"name": name, "count": manifest["count"], "index_sha256": manifest["index_sha256"]})
    names = class_names(G)
    description = {
        "format": FORMAT,
        "count": request.count,
        "resolutions": [G.resolution],
        "base": [side * 4 // G.resolution for side in G.img_size],
        "channels": G.img_channels,
        "labels": {"names": names, "counts": [counts[i] for i in range(len(names))]} if names else None,
        "source": f"images of a generator ({G.description['network']}, {G.description.get('nimg', 0)} images)",
        "shards": shards,
        "pack": plan,
    }
    description["identity"] = identity_of(description)
    write_whole(out / "index.json", json.dumps(description, indent=1).encode())
    shutil.rmtree(out / BOOKS, ignore_errors=True)
