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
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stylegan_pg import processors
from stylegan_pg.data.datasets.field_columns import described
from stylegan_pg.data.datasets.index import FORMAT, WITH_FIELDS, identity_of
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.images.decode import SQUARE
from stylegan_pg.data.images.headers import MAX_PIXELS
from stylegan_pg.data.pack import ledger
from stylegan_pg.data.pack.encoders import Encoders
from stylegan_pg.data.pack.options import checked, recipe_of
from stylegan_pg.data.pack.partners import Folders, partner_folders, vector_files
from stylegan_pg.data.pack.pyramid import LOSSLESS_UP_TO, PackOptions
from stylegan_pg.data.pack.report import PackReport, report_of
from stylegan_pg.data.pack.selection import Chosen, Wanted, choose
from stylegan_pg.data.pack.shard_writer import Group, Manifest, clean, committed_groups, write_whole
from stylegan_pg.data.pack.source_files import CONTINUES, few
from stylegan_pg.data.pack.sources import sources_of
from stylegan_pg.data.storage import zips
from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.untrusted import printable


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
    captions: str | os.PathLike[str] = "none",
    pair: Folders = (),
    mask: Folders = (),
    vector: Folders = (),
    unpaired: str = "refuse",
    max_images: int | None = None,
    shard_size: str | int = "256MB",
    workers: int | None = None,
    channels: int = 3,
    max_pixels: int = MAX_PIXELS,
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
        Classes are what occurs: numbers in their order, names as sorted. Empty labels are none. Labels that are lists
        of numbers, all of one length, become the field "labels", a vector, and so do several columns of a CSV, whose
        header names the vector's entries. Lists of names become zeros and ones, one for each name that occurs.
    unlabelled: what to do with pictures without a label where others have one: "refuse" raises UsageError, "skip"
        leaves them out, "keep" packs them without a class, or with a vector of zeros.
    captions: "auto" takes the text of the .txt files beside the pictures, or, without any, the captions in .json
        files; "none" takes none; else a file: JSON {path: text or [texts]}, or CSV lines `path,text`. They become the
        field "caption", in which several texts of a picture are lines.
    pair: NAME=FOLDER, one or more, or {NAME: FOLDER}: a further picture for each, the field NAME. It is the one of the
        same path within FOLDER (a folder, zip or tar) as the picture has within SOURCE, whatever the suffix. It is
        cropped, scaled and encoded like the picture, and has `channels`, or those of NAME:CHANNELS=FOLDER. One that
        has not the picture's size, or at least its shape, makes the sample unreadable.
    mask: the same for masks, whose values (0 to 255; the indices of a palette) are kept: see pyramid.py.
    vector: NAME=FILE, one or more, or {NAME: FILE}: numbers for each picture beside its class, from a CSV or JSON file
        such as `labels` takes for vectors; the header of a CSV names the entries.
    unpaired: what to do with pictures that lack a pair or mask: "refuse" raises UsageError, "skip" leaves them out.
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
    recipe = recipe_of(resolution, lowest, format, quality, crop, base, filter, channels, shard_size, max_pixels)
    folders = partner_folders(pair, mask, channels, format)
    vectors = vector_files(vector, [folder.name for folder in folders])
    wanted = checked(Wanted(labels, unlabelled, captions, folders, vectors, unpaired, max_images))
    workers = processors.count() if workers is None else workers
    if workers < 0:
        raise UsageError(f"workers = {workers}: give 0 or more processes")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: give a new or empty folder to pack into")
    sources = sources_of(source)
    if any(s.is_dir() and out.resolve().is_relative_to(s.resolve()) for s in sources):
        raise UsageError(f"{out} lies within SOURCE, whose files it would join: give a folder outside it")
    zips.open_zip.cache_clear()  # of an earlier call, whose zip may have been replaced since
    with _disk_faults(out):
        memory = ledger.remembered(out) if out.exists() else ledger.Memory(False, {}, [], {})
    chosen = choose(sources, wanted, memory.gone)
    plan = _plan(chosen, recipe, max_images, memory)
    with _disk_faults(out):
        if memory.complete:
            load_index(str(out))  # a damaged index is to be named as that
        if memory.plan:
            ledger.compare(out, memory.plan, plan, chosen.samples)
        kept, changed = ledger.review(memory.manifests or [], chosen.samples, progress)
        if memory.complete and not changed:
            if memory.manifests is None:
                chosen.remarks.append(ledger.said_of_older(out, chosen.samples))
            ledger.discard(out)
            return report_of(out, chosen, changed, was_complete=True)
        with ledger.opened(out, plan, memory) as folder:
            manifests = _encode_all(chosen, recipe, folder, kept, workers, progress)
            _finish(out, sources, chosen, recipe, plan, manifests)
        ledger.discard(out)
    return report_of(out, chosen, changed, was_complete=False)


def _plan(chosen: Chosen, recipe: PackOptions, max_images: int | None, memory: ledger.Memory) -> dict[str, Any]:
    """The options and digests with which a repeated packing is compared."""
    classes = {**memory.gone, **{sample.path: sample.label for sample in chosen.samples}}
    labels = [classes[path] for path in sorted(classes)] if chosen.names else []
    plan = {
        **asdict(recipe),
        "base": list(recipe.base),
        "max_images": max_images,
        "pictures": len(classes),
        "paths_sha256": ledger.digest(sorted(classes)),
        "labels_sha256": ledger.digest([*chosen.names, *labels]),
    }
    return plan | ({"fields": described(chosen.fields)} if chosen.fields else {})


def _encode_all(
    chosen: Chosen, recipe: PackOptions, folder: Path, kept: dict[str, ledger.Kept], workers: int, progress: bool
) -> list[Manifest]:
    """Encode the groups that are not in `kept`; returns the manifests of all groups. `folder` is OUT/.pack."""
    out, samples = folder.parent, chosen.samples
    clean(out, folder, set(kept))
    manifests: list[Manifest] = []
    place = first = 0
    current = results = None
    bar = tqdm(total=len(samples), unit="img", desc="packing", disable=not progress)
    with bar, contextlib.closing(Encoders(recipe, workers)) as encoders:
        try:
            while place < len(samples):
                name = f"{len(manifests):05d}"
                known = kept.get(name)
                if known and (known.start, known.manifest.first) == (place, first):
                    manifests.append(known.manifest)
                    bar.update(known.end - place)
                    place, results = known.end, None  # what was encoded ahead is of the kept group
                else:
                    current = Group(out, name, first, recipe, chosen.fields)
                    results = results or encoders.results(samples[place:])
                    for result in results:
                        current.add(samples[place], result)
                        place += 1
                        bar.update()
                        if current.is_full:
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


def _finish(out: Path, sources, chosen: Chosen, recipe: PackOptions, plan, manifests: list[Manifest]) -> None:
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
        "format": WITH_FIELDS if chosen.fields else FORMAT,
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
    } | ({"fields": described(chosen.fields)} if chosen.fields else {})
    report = {
        "packed": len(packed),
        "upscaled": sum(manifest.upscaled for manifest in manifests),
        "ignored": chosen.ignored,
        "notes": chosen.notes,
        "unreadable": unreadable,
        "gone": [row.path for row in rows if row.gone],
        "unlabelled": chosen.unlabelled,
        **({"unpaired": chosen.unpaired} if chosen.unpaired else {}),
        "decided": [(row.path, row.decided) for row in rows if row.decided],
    }
    write_whole(out / "sources.json", json.dumps([row.path for row in packed], indent=0).encode())
    write_whole(out / "report.json", json.dumps(report, indent=1).encode())
    ledger.close(out, manifests)
    description["identity"] = identity_of(description)
    write_whole(out / "index.json", json.dumps(description, indent=1).encode())


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
