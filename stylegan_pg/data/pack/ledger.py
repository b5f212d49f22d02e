"""What a packing remembers in OUT: which pictures were packed, in which versions, and by which options.

While a packing goes on, OUT/.pack holds its plan (the options, and digests of the pictures' paths and labels) and a
manifest of each group of shards that is committed. Of a complete dataset index.json has the plan, and pictures.json the
manifests, one a line. A manifest has a row for every picture: its version (size and times, or what an archive has) and
a digest of its bytes, which decides where the version is another one.
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
from stylegan_pg.data.images.headers import MOST_PIXELS
from stylegan_pg.data.pack.reading import Unreadable, digest_of, read_listed
from stylegan_pg.data.pack.shard_writer import Manifest, committed_groups, version_of, write_whole
from stylegan_pg.data.pack.sources import File, few
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import MOST_JSON_BYTES, open_regular, printable, read_json

PICTURES = "pictures.json"
_ANOTHER = "Repeat the command it was started with, give another OUT, or delete this one"


class Kept(NamedTuple):
    """A committed group that is as it would be made again: of the pictures from `start` to before `end`."""

    start: int
    end: int
    manifest: Manifest


class Memory(NamedTuple):
    """What OUT remembers. `complete`: as a dataset; `manifests` is None where it was packed without keeping them."""

    complete: bool
    plan: dict[str, Any]
    manifests: list[Manifest] | None
    gone: dict[str, int]  # the class (-1: none) of each picture that had been listed and could not be found


def remembered(out: Path) -> Memory:
    """Raises UsageError for damaged files."""
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
    """Raises OSError, and UsageError or ValueError for what holds no table."""
    content = read_json(file, "it is no table", most=MOST_JSON_BYTES)
    if not isinstance(content, dict):
        raise ValueError("it is no table")
    return content


@contextlib.contextmanager
def damage_named(file: Path, what: Path) -> Iterator[None]:
    """Whatever a damaged file leads to, as a UsageError that says `what` to remove."""
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


def compare(out: Path, there: dict[str, Any], now: dict[str, Any], pictures: list[File]) -> None:
    """Raises UsageError, naming every difference, where OUT was packed by another plan."""
    there = {
        "base": list(SQUARE),
        "max_images": None,
        "max_pixels": MOST_PIXELS,
        **there,
    }  # of a version that knew no other
    if "listing_sha256" in there:  # as older versions wrote it
        now = now | {"listing_sha256": digest((picture.path, picture.size) for picture in pictures)}
        del now["paths_sha256"]
    different = [f"{k} was {there.get(k)}, is {now[k]}" for k in now if there.get(k) != now[k] and "sha256" not in k]
    if any(there.get(key) != now[key] for key in ("paths_sha256", "listing_sha256") if key in now):
        different.append("the pictures in SOURCE are others (some are new or no longer there)")
    if there.get("labels_sha256") != now["labels_sha256"]:
        different.append("the labels are others")
    if different:
        raise UsageError(f"{out} was packed otherwise: {'; '.join(different)}. {_ANOTHER}")


def review(manifests: list[Manifest], pictures: list[File], progress: bool) -> tuple[dict[str, Kept], list[str]]:
    """The groups that still are what SOURCE holds, by name, and the paths of the pictures that have changed in others.

    A picture of another version is read: its bytes decide. Raises RunError where SOURCE cannot be read just now.
    """
    places = {picture.path: place for place, picture in enumerate(pictures)}
    rows = [row for manifest in manifests for row in manifest.rows if row.path in places]
    doubtful = {row.path for row in rows if row.version != version_of(pictures[places[row.path]])}
    doubtful |= {row.path for row in rows if row.gone and pictures[places[row.path]].stamp}
    reading = tqdm(sorted(doubtful), unit="img", desc="comparing", disable=not progress or not doubtful)
    now = {path: _digest_now(pictures[places[path]]) for path in reading}
    changed = {row.path for row in rows if row.path in now and now[row.path] != row.digest}
    kept = {}
    for manifest in manifests:
        covered = [places[row.path] for row in manifest.rows if row.path in places]
        missing = any(row.path not in places and not row.gone for row in manifest.rows)
        whole = covered and covered == list(range(covered[0], covered[0] + len(covered)))
        if whole and not missing and changed.isdisjoint(row.path for row in manifest.rows):
            fresh = [
                row._replace(version=version_of(pictures[places[row.path]])) if row.path in places else row
                for row in manifest.rows
            ]
            kept[manifest.name] = Kept(covered[0], covered[-1] + 1, manifest._replace(rows=fresh))
    return kept, sorted(changed)


def said_of_older(out: Path, pictures: list[File]) -> str:
    """What to say of a complete dataset without manifests. Older versions also left out what could not be read for the
    moment: UsageError where that shows."""
    try:
        unreadable = table_in(out / "report.json")["unreadable"]
    except (OSError, UsageError, ValueError, KeyError):
        unreadable = []
    passing = {os.strerror(number) for number in (errno.ENOENT, errno.EACCES)}
    there = {picture.path for picture in pictures if picture.stamp}
    lacking = [path for path, reason in unreadable if reason in passing and path in there]
    if lacking:
        raise UsageError(
            f"{out} lacks {len(lacking)} pictures that are there now ({printable(few(lacking))}), as SOURCE could not "
            "be read when it was packed: delete it, or give another OUT"
        )
    return f"{out} was packed without noting times ({PICTURES}): whether pictures were rewritten since is not known"


def _digest_now(picture: File) -> str | None:
    try:
        return digest_of(read_listed(picture))
    except Unreadable:
        return None


@contextlib.contextmanager
def opened(out: Path, plan: dict[str, Any], memory: Memory) -> Iterator[Path]:
    """OUT/.pack, held by this process alone, with the plan in it; a complete dataset becomes one in the making.

    Raises:
        UsageError: OUT is somebody else's, or another process packs there.
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
    """Keep the manifests of a packing that is about to be complete."""
    write_whole(out / PICTURES, b"\n".join(manifest.written() for manifest in manifests) + b"\n")


def discard(out: Path) -> None:
    shutil.rmtree(out / ".pack", ignore_errors=True)
