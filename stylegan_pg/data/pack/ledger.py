"""The record of a packing in OUT: which pictures were packed, in which versions, and with which options.

During a packing, OUT/.pack holds its plan (the options, and digests of the pictures' paths and labels) and a manifest
of each committed group of shards. In a complete dataset the plan is in index.json and the manifests are in
pictures.json, one per line. A manifest has a row for each picture, with its version (size and times, or an archive's
checksum) and a digest of its bytes, which is compared if the version differs. Both cover the sample's other files
(captions, pairs, masks) and its vectors.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from stylegan_pg.data.images.decode import SQUARE
from stylegan_pg.data.images.headers import MAX_PIXELS
from stylegan_pg.data.pack.reading import Unreadable
from stylegan_pg.data.pack.samples import SourceSample
from stylegan_pg.data.pack.shard_writer import Manifest, committed_groups, write_whole
from stylegan_pg.data.pack.source_files import few
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import MAX_JSON_BYTES, open_regular, printable, read_json

PICTURES = "pictures.json"
_ANOTHER = "Repeat the command it was started with, give another OUT, or delete this one"


class Kept(NamedTuple):
    """A committed group that is still valid, of the pictures with indices in [start, end)."""

    start: int
    end: int
    manifest: Manifest


class Memory(NamedTuple):
    """The record in OUT. `complete`: OUT is a complete dataset. `manifests` is None if an older version packed it."""

    complete: bool
    plan: dict[str, Any]
    manifests: list[Manifest] | None
    gone: dict[str, int]  # the class (-1: none) of each picture that had been listed and could not be found


def remembered(out: Path) -> Memory:
    """Read the record in OUT. Raises UsageError for damaged files."""
    index, books = out / "index.json", out / ".pack"
    if index.exists():
        with damage_named(index, out):
            plan = dict(table_in(index).get("pack", {}))
        manifests = None
        book = out / PICTURES
        with contextlib.suppress(FileNotFoundError), damage_named(book, out), open_regular(book) as file:
            manifests = [Manifest.read(line) for line in file.read().splitlines()]
        return Memory(True, plan, manifests, _gone(manifests or []))
    plan = {}
    with contextlib.suppress(FileNotFoundError), damage_named(books / "plan.json", out):
        plan = table_in(books / "plan.json")
    with damage_named(books, out):
        manifests = committed_groups(out, books)
    return Memory(False, plan, manifests, plan.get("gone", {}) | _gone(manifests))


def table_in(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises OSError; UsageError or ValueError if it holds none."""
    content = read_json(file, "it is no table", max_bytes=MAX_JSON_BYTES)
    if not isinstance(content, dict):
        raise ValueError("it is no table")
    return content


@contextlib.contextmanager
def damage_named(file: Path, what: Path) -> Iterator[None]:
    """Turn errors caused by a damaged file into a UsageError that says `what` to remove."""
    try:
        yield
    except (UsageError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UsageError(f"{file} is damaged: remove {what} and pack again") from None
    except OSError as error:
        if error.errno != errno.EINVAL:  # of open_regular
            raise
        raise UsageError(f"{file} is no regular file: remove {what} and pack again") from None


def _gone(manifests: Iterable[Manifest]) -> dict[str, int]:
    return {row.path: row.label for manifest in manifests for row in manifest.rows if row.gone}


def digest(rows: Iterable[Any]) -> str:
    return hashlib.sha256("\n".join(json.dumps(row) for row in rows).encode()).hexdigest()


def compare(out: Path, there: dict[str, Any], now: dict[str, Any], samples: list[SourceSample]) -> None:
    """Raise UsageError, naming every difference, if OUT was packed with another plan."""
    there = {
        "base": list(SQUARE),
        "max_images": None,
        "max_pixels": MAX_PIXELS,
        **there,
    }  # of a version that knew no other
    if "listing_sha256" in there:  # as older versions wrote it
        now = now | {"listing_sha256": digest((sample.path, sample.picture.size) for sample in samples)}
        del now["paths_sha256"]
    there, now = ({**plan, "fields": _told(plan.get("fields", {}))} for plan in (there, now))
    different = [f"{k} was {there.get(k)}, is {now[k]}" for k in now if there.get(k) != now[k] and "sha256" not in k]
    if any(there.get(key) != now[key] for key in ("paths_sha256", "listing_sha256") if key in now):
        different.append("the pictures in SOURCE are others (some are new or no longer there)")
    if there.get("labels_sha256") != now["labels_sha256"]:
        different.append("the labels are others")
    if different:
        raise UsageError(f"{out} was packed otherwise: {'; '.join(different)}. {_ANOTHER}")


def _told(fields: dict[str, Any]) -> str:
    """Described fields as a few words."""
    return ", ".join(f"{name} {json.dumps(facts)}" for name, facts in sorted(fields.items())) or "none"


def review(manifests: list[Manifest], samples: list[SourceSample], progress: bool) -> tuple[dict[str, Kept], list[str]]:
    """The groups that still agree with SOURCE, by name, and the paths of the changed pictures in the others.

    A sample with another version is read and its digest compared. Raises RunError if SOURCE cannot be read at the
    moment.
    """
    places = {sample.path: place for place, sample in enumerate(samples)}
    rows = [row for manifest in manifests for row in manifest.rows if row.path in places]
    doubtful = {row.path for row in rows if row.version != samples[places[row.path]].version}
    doubtful |= {row.path for row in rows if row.gone and samples[places[row.path]].picture.stamp}
    reading = tqdm(sorted(doubtful), unit="img", desc="comparing", disable=not progress or not doubtful)
    now = {path: _digest_now(samples[places[path]]) for path in reading}
    changed = {row.path for row in rows if row.path in now and now[row.path] != row.digest}
    kept = {}
    for manifest in manifests:
        covered = [places[row.path] for row in manifest.rows if row.path in places]
        missing = any(row.path not in places and not row.gone for row in manifest.rows)
        whole = covered and covered == list(range(covered[0], covered[0] + len(covered)))
        if whole and not missing and changed.isdisjoint(row.path for row in manifest.rows):
            fresh = [
                row._replace(version=samples[places[row.path]].version) if row.path in places else row
                for row in manifest.rows
            ]
            kept[manifest.name] = Kept(covered[0], covered[-1] + 1, manifest._replace(rows=fresh))
    return kept, sorted(changed)


def said_of_older(out: Path, samples: list[SourceSample]) -> str:
    """A note about a complete dataset without manifests. Raises UsageError if pictures are missing in it because they
    could not be read at the time, which older versions left out."""
    try:
        unreadable = table_in(out / "report.json")["unreadable"]
    except (OSError, UsageError, ValueError, KeyError):
        unreadable = []
    passing = {os.strerror(number) for number in (errno.ENOENT, errno.EACCES)}
    there = {sample.path for sample in samples if sample.picture.stamp}
    lacking = [path for path, reason in unreadable if reason in passing and path in there]
    if lacking:
        raise UsageError(
            f"{out} lacks {len(lacking)} pictures that are there now ({printable(few(lacking))}), as SOURCE could not "
            "be read when it was packed: delete it, or give another OUT"
        )
    return f"{out} was packed without noting times ({PICTURES}): whether pictures were rewritten since is not known"


def _digest_now(sample: SourceSample) -> str | None:
    try:
        return sample.read()[1]
    except Unreadable:
        return None


@contextlib.contextmanager
def opened(out: Path, plan: dict[str, Any], memory: Memory) -> Iterator[Path]:
    """Create and lock OUT/.pack and write the plan into it; a complete dataset becomes an incomplete one.

    Raises:
        UsageError: OUT holds something else, or another process packs there.
    """
    books = out / ".pack"
    if not memory.complete and out.exists() and not books.exists() and any(out.iterdir()):
        raise UsageError(
            f"{out} holds other files ({printable(few(sorted(os.listdir(out))))}): give a new or empty folder"
        )
    books.mkdir(parents=True, exist_ok=True)
    with open(books / "lock", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{out} is being written by another stylegan-pg pack: wait for it, or stop it") from None
        except OSError:
            pass  # a file system without locks
        write_whole(books / "plan.json", json.dumps(plan | {"gone": memory.gone}).encode())
        if memory.complete:
            for manifest in memory.manifests or []:
                write_whole(books / f"{manifest.name}.json", manifest.written())
            (out / "index.json").unlink(missing_ok=True)
        yield books


def close(out: Path, manifests: list[Manifest]) -> None:
    """Write pictures.json with the manifests of a packing that is about to be complete."""
    write_whole(out / PICTURES, b"\n".join(manifest.written() for manifest in manifests) + b"\n")


def discard(out: Path) -> None:
    shutil.rmtree(out / ".pack", ignore_errors=True)
