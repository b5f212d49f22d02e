"""Packing: a folder, zip or tars of pictures -> shards at every resolution of the pyramid, with an index.

What happens to a picture is told in `data/picture.py`, what SOURCE may be in `data/sources.py`.

Samples are ordered by their path within SOURCE (by code point, on any file system) and cut into groups: one group is
one shard at every resolution. A group is committed by its manifest in OUT/.pack, index.json comes last, and every byte
follows from SOURCE and the options: an interrupted packing leaves nothing that looks complete, and the same command
continues behind the last committed group to the very files an uninterrupted one writes. Unreadable pictures are listed
with their reasons in OUT/report.json. Nothing of an archive is ever extracted to disk.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stylegan_pg.data.decode import MODES, SQUARE, size_at
from stylegan_pg.data.index import FORMAT, identity_of, load_index
from stylegan_pg.data.labels import classes_of
from stylegan_pg.data.picture import FILTERS, LOSSLESS_UP_TO, Recipe, Result, make
from stylegan_pg.data.shards import Group, clean, committed_groups, write_whole
from stylegan_pg.data.sources import CONTINUES, File, Listing, few, list_source, open_zip, sources_of, told
from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.untrusted import printable

LONGEST = 8192  # pixels of a side
LONGEST_LINE = 4000  # characters of a report's lines


@dataclass(frozen=True)
class PackReport:
    """What a packing did. `unreadable` pairs paths within SOURCE with reasons, `ignored` counts other files, `notes`
    are sentences about how SOURCE was understood."""

    out: str
    count: int
    resolutions: tuple[int, ...]
    base: tuple[int, int]
    label_names: tuple[str, ...]
    identity: str
    unreadable: tuple[tuple[str, str], ...]
    upscaled: int
    ignored: dict[str, int]
    was_complete: bool
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """The report as a few lines of text for people."""
        names = f", {len(self.label_names)} classes" if self.label_names else ", no labels"
        heights_widths = [size_at(r, self.base) for r in self.resolutions]
        sizes = [str(h) if h == w else f"{h}x{w}" for h, w in heights_widths]
        what = "pixels" if self.base[0] == self.base[1] else "rows x columns"
        lines = [f"{self.out}: {self.count} pictures at {', '.join(sizes)} {what}{names}"]
        if self.was_complete:
            lines.insert(0, f"{self.out} is already complete with these options: nothing to do")
        if self.upscaled:
            lines.append(f"warning: {self.upscaled} pictures were smaller than {sizes[-1]} {what} and were enlarged")
        if self.unreadable:
            path, reason = self.unreadable[0]
            lines.append(
                f"warning: {len(self.unreadable)} pictures were left out, the first {path}: {reason}"
                " (all of them in report.json)"
            )
        lines += (f"note: {note}" for note in self.notes)
        if self.ignored:
            lines.append(f"ignored files that are not pictures: {told(self.ignored)}")
        return "\n".join(printable(line, LONGEST_LINE) for line in lines)


def pack(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    resolution: int,
    lowest: int = 4,
    format: str = "jpg",
    quality: int = 95,
    crop: str = "center",
    base: str | Sequence[int] = SQUARE,
    filter: str = "lanczos",
    labels: str | os.PathLike[str] = "auto",
    shard_size: str | int = "256MB",
    workers: int | None = None,
    channels: int = 3,
    progress: bool = True,
) -> PackReport:
    """Pack the pictures of `source` into the dataset folder `out` (see the module's text and `data/index.py`).

    source: a folder (with pictures at any depth, or with tars), a zip, a tar, or several tars as a list, a pattern
        with braces or *, or separated by "::". A path that exists is that, whatever signs are in it.
    resolution, lowest: top and bottom of the pyramid in pixels, powers of two, 4 <= lowest <= resolution <= 4096.
    format: "jpg", "png" or "webp" for levels above 32 pixels; quality 1..100 for jpg and webp.
    crop: "center", "pad" or "none", for pictures of another shape than the dataset's.
    base: (rows, columns) of the pictures at resolution 4, or a text such as "4x6" (1024 rows and 1536 columns at
        resolution 1024).
    labels: "auto" takes dataset.json in SOURCE (as the public StyleGAN tools write it), else the .cls files beside
        the pictures (WebDataset), else the first-level folders if every picture lies in one and there are at least
        two (folders that are all numbers of five digits and more are buckets, not classes); "none" takes none; else
        a file: JSON {path: label} or {"labels": [[path, label], ...]}, or CSV lines `path,label`, with or without a
        header. Integer labels keep their values, names are numbered in sorted order.
    shard_size: bytes of a shard at the top resolution, as a number or with kB, MB, GB, KiB, MiB, GiB.
    workers: processes that encode (None: one per core; 0 or 1: in this process). Does not change a byte. A script
        that calls this with workers needs the usual `if __name__ == "__main__":`.
    progress: show a progress bar on stderr.

    Run again after an interruption, it continues; on a complete `out` it returns at once. Raises UsageError for bad
    options, sources, labels or an `out` that holds something else, RunError for a full disk, a SOURCE that fails while
    being read and worker processes that die.
    """
    recipe = _check_options(resolution, lowest, format, quality, crop, base, filter, channels, shard_size)
    workers = (os.cpu_count() or 1) if workers is None else workers
    if workers < 0:
        raise UsageError(f"workers = {workers}: give 0 or more processes")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: give a new or empty folder to pack into")
    sources = sources_of(source)
    if any(s.is_dir() and out.resolve().is_relative_to(s.resolve()) for s in sources):
        raise UsageError(f"{out} lies within SOURCE, whose files it would join: give a folder outside it")
    open_zip.cache_clear()  # of an earlier call, whose zip may have been replaced since
    listing = list_source(sources)
    classes, names = classes_of(listing, labels)
    plan = {
        **asdict(recipe),
        "base": list(recipe.base),
        "pictures": len(listing.pictures),
        "listing_sha256": _digest((p.path, p.size) for p in listing.pictures),
        "labels_sha256": _digest([*names, *classes]),
    }
    with _disk_faults(out):
        if (out / "index.json").exists():
            load_index(str(out))  # a damaged index is to be named as that
            _compare(out, json.loads((out / "index.json").read_bytes()).get("pack", {}), plan)
            shutil.rmtree(out / ".pack", ignore_errors=True)
            return _report(out, was_complete=True)
        with _bookkeeping(out, plan) as books:
            manifests = _encode_all(listing.pictures, classes, recipe, books, workers, progress)
            _finish(out, sources, listing, classes, names, recipe, plan, manifests)
        shutil.rmtree(out / ".pack")
    return _report(out, was_complete=False)


def _check_options(resolution, lowest, format, quality, crop, base, filter, channels, shard_size) -> Recipe:
    for name, value in {"resolution": resolution, "lowest": lowest}.items():
        if not 4 <= value <= 4096 or value & (value - 1):
            raise UsageError(f"{name} = {value}: give a power of two from 4 to 4096")
    if lowest > resolution:
        raise UsageError(f"lowest = {lowest} is above resolution = {resolution}: lower the one or raise the other")
    choices = {"format": (format, ("jpg", "png", "webp")), "crop": (crop, ("center", "pad", "none"))}
    choices |= {"filter": (filter, tuple(FILTERS)), "channels": (channels, tuple(MODES))}
    for name, (value, known) in choices.items():
        if value not in known:
            raise UsageError(f"{name} = {value}: give one of {', '.join(map(str, known))}")
    if format == "jpg" and channels == 4:
        raise UsageError("format = jpg has no alpha channel: take png or webp for channels = 4")
    if not 1 <= quality <= 100:
        raise UsageError(f"quality = {quality}: give a number from 1 to 100")
    return Recipe(
        resolution, lowest, format, quality, crop, filter, channels, _bytes(shard_size), _base(base, resolution)
    )


def parse_base(text: str) -> tuple[int, int]:
    """ "4x6" -> (4, 6). Raises UsageError for anything else."""
    match = re.fullmatch(r"([1-9]\d{0,2})x([1-9]\d{0,2})", text, re.ASCII)
    if not match:
        raise UsageError(f"base = {text}: give rows and columns at resolution 4, such as 4x6")
    return int(match[1]), int(match[2])


def _base(base: str | Sequence[int], resolution: int) -> tuple[int, int]:
    text = base if isinstance(base, str) else "x".join(map(str, base))
    rows, columns = parse_base(text)
    height, width = size_at(resolution, (rows, columns))
    if max(height, width) > LONGEST:
        raise UsageError(
            f"base = {text} gives {height} rows and {width} columns at resolution {resolution}: with at most {LONGEST} "
            "of each, choose a smaller base or resolution"
        )
    return rows, columns


def _bytes(size: str | int) -> int:
    """ "256MB" -> 256_000_000, "1MiB" -> 1_048_576."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt]?)(i?)b?)?\s*", str(size), re.IGNORECASE)
    number = 0
    if match:
        digits, prefix, binary = match.groups(default="")
        number = int(float(digits) * (1024 if binary else 1000) ** " kmgt".index(prefix.lower() or " "))
    if number <= 0:
        raise UsageError(f"shard_size = {size}: give bytes, such as 256MB, 1GB or 64MiB")
    return number


def _encode_all(pictures, classes, recipe: Recipe, books: Path, workers: int, progress: bool) -> list[dict[str, Any]]:
    """Encode what is not yet committed; the manifests of all groups."""
    out = books.parent
    manifests = committed_groups(out, books)
    clean(out, books, {manifest["name"] for manifest in manifests})
    start = manifests[-1]["following"] if manifests else 0

    def group() -> Group:
        return Group(out, len(manifests), sum(len(m["sources"]) for m in manifests), recipe)

    current = group()
    bar = tqdm(total=len(pictures), initial=start, unit="img", desc="packing", disable=not progress)
    with bar, contextlib.closing(_results(pictures[start:], recipe, workers)) as results:
        try:
            for place, result in enumerate(results, start):
                current.add(pictures[place].path, classes[place] if classes else None, result)
                if current.bytes >= recipe.shard_size:
                    manifests.append(current.commit(books, place + 1))
                    current = group()
                bar.update()
            if current.sources or current.unreadable:
                manifests.append(current.commit(books, len(pictures)))
        except BaseException:  # also Ctrl-C: it is raised again
            current.discard()
            # An interruption may have come between the making of a file and its being known to `current`.
            clean(out, books, {manifest["name"] for manifest in committed_groups(out, books)})
            raise
    return manifests


def _results(pictures: list[File], recipe: Recipe, workers: int) -> Generator[Result, None, None]:
    """The results in the pictures' order; with workers a bounded number of pictures is worked on ahead."""
    chunk = max(1, min(32, (1024 // recipe.resolution) ** 2))  # small pictures: fewer, larger messages
    chunks = [pictures[i : i + chunk] for i in range(0, len(pictures), chunk)]
    workers = min(workers, len(chunks))
    if workers <= 1:
        yield from (make(picture, recipe) for picture in pictures)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    try:
        ahead = deque()
        for pending in chunks:
            ahead.append(pool.submit(_make_chunk, pending, recipe))
            if len(ahead) > 3 * workers:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()
    except (BrokenProcessPool, MemoryError) as error:
        raise RunError(
            f"a worker process died, perhaps for want of memory: with fewer --workers, {CONTINUES}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _make_chunk(pictures: list[File], recipe: Recipe) -> list[Result]:
    return [make(picture, recipe) for picture in pictures]


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    parent = multiprocessing.parent_process()

    def follow():  # a pool's workers hold each other's pipes open, so they would outlive a killed parent
        if parent:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextlib.contextmanager
def _bookkeeping(out: Path, plan: dict[str, Any]) -> Iterator[Path]:
    """OUT/.pack, held by this process alone, with the plan in it; UsageError where OUT is somebody else's."""
    books = out / ".pack"
    if out.exists() and not books.exists() and any(out.iterdir()):
        raise UsageError(f"{out} holds other files ({few(sorted(os.listdir(out)))}): give a new or empty folder")
    books.mkdir(parents=True, exist_ok=True)
    with open(books / "lock", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{out} is being written by another stylegan-pg pack: wait for it, or stop it") from None
        except OSError:
            pass  # a file system without locks
        file = books / "plan.json"
        if file.exists():
            try:
                there = json.loads(file.read_bytes())
            except ValueError:
                raise UsageError(f"{file} is damaged: remove {out} and pack again") from None
            _compare(out, there, plan)
        else:
            write_whole(file, json.dumps(plan).encode())
        yield books


def _compare(out: Path, there: dict[str, Any], now: dict[str, Any]) -> None:
    there = {"base": list(SQUARE), **there}  # of a version that knew no other
    different = [f"{k} was {there.get(k)}, is {now[k]}" for k in now if there.get(k) != now[k] and "sha256" not in k]
    if there.get("listing_sha256") != now["listing_sha256"]:
        different.append("the pictures in SOURCE (their paths or sizes) are others")
    if there.get("labels_sha256") != now["labels_sha256"]:
        different.append("the labels are others")
    if different:
        raise UsageError(
            f"{out} was packed otherwise: {'; '.join(different)}. Repeat the command it was started with, "
            "give another OUT, or delete this one"
        )


def _finish(out, sources, listing: Listing, classes, names, recipe: Recipe, plan, manifests) -> None:
    packed = [path for manifest in manifests for path in manifest["sources"]]
    unreadable = [pair for manifest in manifests for pair in manifest["unreadable"]]
    if not packed:
        shutil.rmtree(out / ".pack")
        reasons = few([f"{path}: {reason}" for path, reason in unreadable])
        raise UsageError(f"{sources[0]} holds no picture that can be read ({reasons}): check SOURCE")
    label_of = dict(zip((picture.path for picture in listing.pictures), classes, strict=False))
    counts = Counter(label_of[path] for path in packed) if classes else {}
    description = {
        "format": FORMAT,
        "count": len(packed),
        "resolutions": recipe.resolutions,
        "base": recipe.base,
        "channels": recipe.channels,
        "labels": {"names": names, "counts": [counts[i] for i in range(len(names))]} if classes else None,
        "source": sources[0].resolve().name + (f" and {len(sources) - 1} more" if len(sources) > 1 else ""),
        "crop": recipe.crop,
        "filter": recipe.filter,
        "quality": recipe.quality,
        "lossless_up_to": recipe.resolution if recipe.format == "png" else LOSSLESS_UP_TO,
        "shards": [
            {"name": m["name"], "count": len(m["sources"]), "index_sha256": m["index_sha256"]}
            for m in manifests
            if m["sources"]
        ],
        "unreadable": len(unreadable),
        "pack": plan,
    }
    report = {
        "packed": len(packed),
        "upscaled": sum(manifest["upscaled"] for manifest in manifests),
        "ignored": listing.ignored,
        "notes": listing.notes,
        "unreadable": unreadable,
    }
    write_whole(out / "sources.json", json.dumps(packed, indent=0).encode())
    write_whole(out / "report.json", json.dumps(report, indent=1).encode())
    description["identity"] = identity_of(description)
    write_whole(out / "index.json", json.dumps(description, indent=1).encode())


def _report(out: Path, was_complete: bool) -> PackReport:
    index = json.loads((out / "index.json").read_bytes())
    try:
        report = json.loads((out / "report.json").read_bytes())
    except FileNotFoundError:  # of use to people only, so they may have removed it
        report = {"unreadable": [], "upscaled": 0, "ignored": {}}
    return PackReport(
        out=str(out),
        count=index["count"],
        resolutions=tuple(index["resolutions"]),
        base=tuple(index.get("base", SQUARE)),
        label_names=tuple(index["labels"]["names"]) if index["labels"] else (),
        identity=index["identity"],
        unreadable=tuple((path, reason) for path, reason in report["unreadable"]),
        upscaled=report["upscaled"],
        ignored=report["ignored"],
        was_complete=was_complete,
        notes=tuple(report.get("notes", ())),
    )


def _digest(rows: Iterable[Any]) -> str:
    return hashlib.sha256("\n".join(json.dumps(row) for row in rows).encode()).hexdigest()


@contextlib.contextmanager
def _disk_faults(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RunError(f"{out}: no room to write ({error.strerror}). Free some space, then {CONTINUES}") from error
        where = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOENT)
        if error.errno in where:
            raise UsageError(f"{out} cannot be written ({error}): mend its permissions or give another OUT") from error
        raise
