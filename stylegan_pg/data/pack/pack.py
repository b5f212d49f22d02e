"""Packing of pictures in a folder, zip or tars into shards at every resolution of the pyramid, with an index.

pyramid.py describes what happens to a picture, sources.py what SOURCE may be.

Samples are ordered by their path within SOURCE (by code point, on any file system) and divided into groups; a group is
one shard at every resolution. A group is committed by its manifest in OUT/.pack, and index.json is written last. Every
byte depends on SOURCE and the options only. So an interrupted packing leaves nothing that looks complete, and the same
command continues after the committed groups and writes the same files as an uninterrupted one. Pictures that were
rewritten since are packed again with their groups, also in a complete dataset. If SOURCE cannot be read at the moment,
packing ends and can be continued. Damaged and missing pictures are listed with reasons in OUT/report.json. Members of
archives are never extracted to disk.
"""

import contextlib
import errno
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stylegan_pg.data.datasets.description import check_index
from stylegan_pg.data.datasets.index import FORMAT, identity_of
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.images.decode import MODES, SQUARE, size_at
from stylegan_pg.data.images.headers import MOST_PIXELS
from stylegan_pg.data.pack import ledger
from stylegan_pg.data.pack.encoders import Encoders
from stylegan_pg.data.pack.pyramid import FILTERS, LOSSLESS_UP_TO, Recipe
from stylegan_pg.data.pack.selection import Chosen, choose
from stylegan_pg.data.pack.shard_writer import Group, Manifest, clean, committed_groups, write_whole
from stylegan_pg.data.pack.sources import CONTINUES, few, sources_of, told
from stylegan_pg.data.storage import zips
from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.untrusted import printable, whole_number

LONGEST = 8192  # pixels of a side
LONGEST_LINE = 4000  # characters of a report's lines


@dataclass(frozen=True)
class PackReport:
    """The result of a packing.

    `unreadable`: (path within SOURCE, reason). `gone`: files that were listed and then not found. `unlabelled`:
    pictures left out because they have no label. `repacked`: pictures changed since an earlier packing. `decided`:
    (path, a decision that the picture's owner may not expect). `ignored`: counts of other files by kind. `remarks`: how
    labels and options were interpreted. `notes`: how SOURCE was interpreted.
    """

    out: str
    count: int
    resolutions: tuple[int, ...]
    base: tuple[int, int]
    label_names: tuple[str, ...]
    identity: str
    unreadable: tuple[tuple[str, str], ...]
    gone: tuple[str, ...]
    unlabelled: tuple[str, ...]
    repacked: tuple[str, ...]
    upscaled: int
    ignored: dict[str, int]
    empty_classes: tuple[str, ...]
    remarks: tuple[str, ...]
    was_complete: bool
    notes: tuple[str, ...] = ()
    decided: tuple[tuple[str, str], ...] = ()

    def summary(self) -> str:
        """The report as a few lines of text."""
        names = f", {len(self.label_names)} classes" if self.label_names else ", no labels"
        heights_widths = [size_at(r, self.base) for r in self.resolutions]
        sizes = [str(h) if h == w else f"{h}x{w}" for h, w in heights_widths]
        what = "pixels" if self.base[0] == self.base[1] else "rows x columns"
        lines = [f"{self.out}: {self.count} pictures at {', '.join(sizes)} {what}{names}"]
        if self.was_complete:
            lines.insert(0, f"{self.out} is already complete with these options: nothing to do")
        lines += self.remarks
        if self.repacked:
            lines.append(
                f"{len(self.repacked)} pictures had changed since they were packed, and were packed again: "
                f"{printable(few(list(self.repacked)))}"
            )
        if self.upscaled:
            lines.append(f"warning: {self.upscaled} pictures were smaller than {sizes[-1]} {what} and were enlarged")
        if self.unreadable:
            path, reason = self.unreadable[0]
            lines.append(
                f"warning: {len(self.unreadable)} pictures were left out, the first {printable(path)}: "
                f"{printable(reason)} (all of them in report.json)"
            )
        if self.gone:
            lines.append(
                f"warning: {len(self.gone)} pictures were gone from their folders when their turn came: "
                f"{printable(few(list(self.gone)))} (all of them in report.json)"
            )
        if self.empty_classes:
            named = printable(few(list(self.empty_classes)))
            lines.append(f"warning: {len(self.empty_classes)} classes have no picture that could be packed: {named}")
        lines += (f"note: {note}" for note in self.notes)
        for what, count in Counter(what for _, what in self.decided).items():
            path = next(path for path, one in self.decided if one == what)
            lines.append(f"note: {path} {what}" + (f" (and {count - 1} others)" if count > 1 else ""))
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
    unlabelled: str = "refuse",
    max_images: int | None = None,
    shard_size: str | int = "256MB",
    workers: int | None = None,
    channels: int = 3,
    max_pixels: int = MOST_PIXELS,
    progress: bool = True,
) -> PackReport:
    """Pack the pictures of `source` into the dataset folder `out` (see this module's text and datasets/index.py).

    source: a folder (with pictures at any depth, or with tars), a zip, a tar, or several tars as a list, a pattern
        with braces or *, or separated by "::". A path that exists is that, whatever signs are in it.
    resolution, lowest: top and bottom of the pyramid in pixels, powers of two, 4 <= lowest <= resolution <= 4096.
    format: "jpg", "png" or "webp" for levels above 32 pixels; quality 1..100 for jpg and webp.
    crop: "center", "pad" or "none", for pictures of another shape than the dataset's.
    base: (rows, columns) of the pictures at resolution 4, or a text such as "4x6" (1024 rows and 1536 columns at
        resolution 1024).
    labels: "auto" takes the dataset.json in SOURCE (as the public StyleGAN tools write it, or {path: label}), else the
        .cls files beside the pictures (WebDataset) or "label" in .json files there, else the first level of folders at
        which pictures part ways, below train/, val/ and the like (folders that are all numbers of five digits and more
        are buckets, not classes); "folders" takes these whatever they are called; "none" takes none; else a file:
        JSON {path: label} or {"labels": [[path, label], ...]}, or CSV lines `path,label`, with or without a header.
        Classes are what occurs: numbers in their order, names as sorted. Empty labels are none.
    unlabelled: what to do with pictures without a label where others have one: "refuse" raises UsageError, "skip"
        leaves them out, "keep" packs them without a class.
    max_images: pack at most so many, evenly spread over the pictures in their order; None for all.
    shard_size: bytes of a shard at the top resolution, as a number or with kB, MB, GB, KiB, MiB, GiB.
    workers: processes that encode (None: one per core; 0 or 1: in this process). Does not change a byte. A script
        that calls this with workers needs the usual `if __name__ == "__main__":`.
    max_pixels: pictures of more are left out, as they take time and memory (about 16 bytes a pixel). JPEGs may have
        twice as many, as they can be decoded at a fraction of their size, WebP, AVIF and JPEG 2000 pictures half.
    progress: show a progress bar on stderr.

    Run again after an interruption, it continues; on a complete `out` it returns at once, after packing again what has
    changed. Raises UsageError for bad options, sources, labels or an `out` that holds something else, RunError for a
    full disk, a SOURCE that cannot be read just now and worker processes that die.
    """
    recipe = _check_options(resolution, lowest, format, quality, crop, base, filter, channels, shard_size, max_pixels)
    workers = (os.cpu_count() or 1) if workers is None else workers
    if workers < 0:
        raise UsageError(f"workers = {workers}: give 0 or more processes")
    if unlabelled not in ("skip", "keep", "refuse"):
        raise UsageError(f"unlabelled = {unlabelled}: give one of skip, keep, refuse")
    if max_images is not None and max_images < 1:
        raise UsageError(f"max_images = {max_images}: give 1 or more, or leave it away for all")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: give a new or empty folder to pack into")
    sources = sources_of(source)
    if any(s.is_dir() and out.resolve().is_relative_to(s.resolve()) for s in sources):
        raise UsageError(f"{out} lies within SOURCE, whose files it would join: give a folder outside it")
    zips.open_zip.cache_clear()  # of an earlier call, whose zip may have been replaced since
    with _disk_faults(out):
        memory = ledger.remembered(out) if out.exists() else ledger.Memory(False, {}, [], {})
    chosen = choose(sources, labels, unlabelled, max_images, memory.gone)
    classes = {**memory.gone, **dict(zip((p.path for p in chosen.pictures), chosen.classes, strict=True))}
    plan = {
        **asdict(recipe),
        "base": list(recipe.base),
        "max_images": max_images,
        "pictures": len(classes),
        "paths_sha256": ledger.digest(sorted(classes)),
        "labels_sha256": ledger.digest(
            [*chosen.names, *((classes[path] for path in sorted(classes)) if chosen.names else [])]
        ),
    }
    with _disk_faults(out):
        if memory.complete:
            load_index(str(out))  # a damaged index is to be named as that
        if memory.plan:
            ledger.compare(out, memory.plan, plan, chosen.pictures)
        kept, changed = ledger.review(memory.manifests or [], chosen.pictures, progress)
        if memory.complete and not changed:
            if memory.manifests is None:
                chosen.remarks.append(ledger.said_of_older(out, chosen.pictures))
            ledger.discard(out)
            return _report(out, chosen, changed, was_complete=True)
        with ledger.opened(out, plan, memory) as folder:
            manifests = _encode_all(chosen, recipe, folder, kept, workers, progress)
            _finish(out, sources, chosen, recipe, plan, manifests)
        ledger.discard(out)
    return _report(out, chosen, changed, was_complete=False)


def _check_options(resolution, lowest, format, quality, crop, base, filter, channels, shard_size, max_pixels) -> Recipe:
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
    if max_pixels < 1:
        raise UsageError(f"max_pixels = {max_pixels}: give the most pixels of a picture, such as {MOST_PIXELS}")
    size, shape = _bytes(shard_size), _base(base, resolution)
    return Recipe(resolution, lowest, format, quality, crop, filter, channels, size, shape, max_pixels)


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


def _encode_all(
    chosen: Chosen, recipe: Recipe, folder: Path, kept: dict[str, ledger.Kept], workers: int, progress: bool
) -> list[Manifest]:
    """Encode the groups that are not in `kept`; returns the manifests of all groups. `folder` is OUT/.pack."""
    out, pictures = folder.parent, chosen.pictures
    clean(out, folder, set(kept))
    manifests: list[Manifest] = []
    place = first = 0
    current = results = None
    bar = tqdm(total=len(pictures), unit="img", desc="packing", disable=not progress)
    with bar, contextlib.closing(Encoders(recipe, workers)) as encoders:
        try:
            while place < len(pictures):
                name = f"{len(manifests):05d}"
                known = kept.get(name)
                if known and (known.start, known.manifest.first) == (place, first):
                    manifests.append(known.manifest)
                    bar.update(known.end - place)
                    place, results = known.end, None  # what was encoded ahead is of the kept group
                else:
                    current = Group(out, name, first, recipe)
                    results = results or encoders.results(pictures[place:])
                    for result in results:
                        current.add(pictures[place], chosen.classes[place], result)
                        place += 1
                        bar.update()
                        if current.bytes >= recipe.shard_size:
                            break
                    manifests.append(current.commit(folder))
                first += len(manifests[-1].packed)
            clean(out, folder, {manifest.name for manifest in manifests})
        except BaseException:  # also Ctrl-C: it is raised again
            if current:
                current.discard()
            # An interruption may have come between the making of a file and its being known to `current`.
            clean(out, folder, {manifest.name for manifest in committed_groups(out, folder)})
            raise
    return manifests


def _finish(out: Path, sources, chosen: Chosen, recipe: Recipe, plan, manifests: list[Manifest]) -> None:
    rows = [row for manifest in manifests for row in manifest.rows]
    packed = [row for row in rows if not row.reason]
    unreadable = [(row.path, row.reason) for row in rows if row.reason and not row.gone]
    if not packed:
        ledger.discard(out)
        reasons = printable(few([f"{row.path}: {row.reason}" for row in rows]))
        raise UsageError(f"{sources[0]} holds no picture that can be read ({reasons}): check SOURCE")
    counts = Counter(row.label for row in packed)
    names = chosen.names
    description = {
        "format": FORMAT,
        "count": len(packed),
        "resolutions": recipe.resolutions,
        "base": recipe.base,
        "channels": recipe.channels,
        "labels": {"names": names, "counts": [counts[i] for i in range(len(names))]} if names else None,
        "source": sources[0].resolve().name + (f" and {len(sources) - 1} more" if len(sources) > 1 else ""),
        "crop": recipe.crop,
        "filter": recipe.filter,
        "quality": recipe.quality,
        "lossless_up_to": recipe.resolution if recipe.format == "png" else LOSSLESS_UP_TO,
        "shards": [
            {"name": manifest.name, "count": len(manifest.packed), "index_sha256": manifest.index_sha256}
            for manifest in manifests
            if manifest.packed
        ],
        "unreadable": len(unreadable),
        "pack": plan,
    }
    report = {
        "packed": len(packed),
        "upscaled": sum(manifest.upscaled for manifest in manifests),
        "ignored": chosen.ignored,
        "notes": chosen.notes,
        "unreadable": unreadable,
        "gone": [row.path for row in rows if row.gone],
        "unlabelled": chosen.unlabelled,
        "decided": [(row.path, row.decided) for row in rows if row.decided],
    }
    write_whole(out / "sources.json", json.dumps([row.path for row in packed], indent=0).encode())
    write_whole(out / "report.json", json.dumps(report, indent=1).encode())
    ledger.close(out, manifests)
    description["identity"] = identity_of(description)
    write_whole(out / "index.json", json.dumps(description, indent=1).encode())


def _report(out: Path, chosen: Chosen, changed: list[str], was_complete: bool) -> PackReport:
    with ledger.damage_named(out / "index.json", out):
        index = ledger.table_in(out / "index.json")
        check_index(index)
    report: dict[str, Any] = {}
    file = out / "report.json"  # this file is for information only and may have been removed
    with contextlib.suppress(FileNotFoundError), ledger.damage_named(file, file):
        report = ledger.table_in(file)
    labels = index.get("labels") or {"names": [], "counts": []}
    with ledger.damage_named(file, file):
        return PackReport(
            out=str(out),
            count=index["count"],
            resolutions=tuple(index["resolutions"]),
            base=tuple(index.get("base", SQUARE)),
            label_names=tuple(labels["names"]),
            identity=str(index.get("identity")),
            unreadable=tuple((path, reason) for path, reason in report.get("unreadable", [])),
            gone=tuple(report.get("gone", [])),
            unlabelled=tuple(report.get("unlabelled", [])),
            repacked=tuple(changed),
            upscaled=whole_number(report.get("upscaled", 0), 0, 1 << 53, "upscaled", "it counts pictures"),
            ignored={str(kind): int(count) for kind, count in report.get("ignored", {}).items()},
            empty_classes=tuple(n for n, count in zip(labels["names"], labels["counts"], strict=True) if not count),
            remarks=tuple(chosen.remarks),
            was_complete=was_complete,
            notes=tuple(map(str, report.get("notes", ()))),
            decided=tuple((path, what) for path, what in report.get("decided", [])),
        )


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
        raise RunError(f"{out} cannot be written just now ({error}). When it can, {CONTINUES}") from error
