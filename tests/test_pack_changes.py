"""Packing while SOURCE changes: it becomes unavailable, loses pictures, or pictures are rewritten. Parts that changed
are packed again."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import harness
import pytest
from packing import encoded, files_of, folder_of, labels_of, noise, packed, tar_of, zip_of

from stylegan_pg.data.pack import encoders, shard_writer, sources
from stylegan_pg.data.pack.ledger import digest
from stylegan_pg.data.pack.sample_encoder import make
from stylegan_pg.data.storage import zips
from stylegan_pg.errors import RunError, UsageError

SMALL: dict[str, Any] = {"shard_size": "2kB"}  # two or three pictures of 16x16 a shard


@pytest.fixture
def source(tmp_path) -> Path:
    return folder_of(tmp_path / "in", [f"{'cat' if i % 2 else 'dog'}/{i:02d}.png" for i in range(12)])


def before_picture(monkeypatch, number: int, act) -> None:
    """Call `act` just before the picture of this number is read."""
    seen = []

    def acting(picture, recipe):
        seen.append(picture)
        if len(seen) == number:
            act()
        return make(picture, recipe)

    monkeypatch.setattr(encoders, "make", acting)


def rewrite(path: Path, seed: int) -> None:
    """Replace a picture by another one of the same number of bytes, with the old times."""
    there, size = path.stat(), path.stat().st_size
    data = encoded(noise(seed))
    assert len(data) <= size + 200
    path.write_bytes(data[:size].ljust(size, b"\0"))
    os.utime(path, ns=(there.st_atime_ns, there.st_mtime_ns))
    assert path.stat().st_size == size


def same_size(source: Path) -> dict[Path, int]:
    """Pad all pictures to the same number of bytes, so that they can be rewritten."""
    for path in source.rglob("*.png"):
        path.write_bytes(path.read_bytes().ljust(1200, b"\0"))
    return {path: path.stat().st_size for path in source.rglob("*.png")}


# --- what goes away ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", ["nothing", "an empty folder"])
def test_packing_stops_when_its_source_disappears_and_continues_later(tmp_path, source, monkeypatch, left):
    whole = packed(source, tmp_path / "whole", **SMALL)

    def unmount():
        source.rename(tmp_path / "away")
        if left != "nothing":  # like the mount point of a disk
            (source / "cat").mkdir(parents=True)
            (source / "dog").mkdir()

    before_picture(monkeypatch, 8, unmount)
    with pytest.raises(RunError, match=r"cannot be read: No such file or directory.* run the same command again"):
        packed(source, tmp_path / "out", **SMALL)
    assert not (tmp_path / "out" / "index.json").exists()
    monkeypatch.undo()
    with pytest.raises(UsageError, match="no such folder" if left == "nothing" else "holds no pictures"):
        packed(source, tmp_path / "out", **SMALL)
    shutil.rmtree(source, ignore_errors=True)
    (tmp_path / "away").rename(source)
    report = packed(source, tmp_path / "out", **SMALL)
    assert (report.count, report.identity, report.was_complete) == (12, whole.identity, False)
    assert (report.unreadable, report.gone, report.repacked) == ((), (), ())


@pytest.mark.parametrize(
    "number", [errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN]
)
def test_transient_faults_stop_packing(tmp_path, source, monkeypatch, number):
    def fail(self):
        raise OSError(number, os.strerror(number), self.container)

    before_picture(monkeypatch, 5, lambda: monkeypatch.setattr(sources.File, "read", fail))
    with pytest.raises(RunError, match=rf"{os.strerror(number)}.* run the same command again"):
        packed(source, tmp_path / "out", **SMALL)
    monkeypatch.undo()
    assert packed(source, tmp_path / "out", **SMALL).count == 12


def test_a_folder_that_temporarily_cannot_be_listed(tmp_path, source, monkeypatch):
    real = os.scandir

    def fail(path):
        if str(path).endswith("dog"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
        return real(path)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(RunError, match=r"dog cannot be listed \(Stale file handle\)"):
        packed(source, tmp_path / "out")


def test_an_archive_that_disappears(tmp_path, monkeypatch):
    members = {f"{i:02d}.png": encoded(noise(i)) for i in range(12)}
    for archive in (tar_of(tmp_path / "a.tar", members), zip_of(tmp_path / "a.zip", members)):
        out, content = tmp_path / f"out{archive.suffix}", archive.read_bytes()

        def vanish(archive=archive):
            archive.write_bytes(b"")
            archive.unlink()
            zips.open_zip.cache_clear()

        before_picture(monkeypatch, 5, vanish)
        with pytest.raises(RunError, match=rf"a\{archive.suffix} cannot be read: No such file"):
            packed(archive, out, **SMALL)
        monkeypatch.undo()
        archive.write_bytes(content)
        assert packed(archive, out, **SMALL).count == 12


def test_missing_and_damaged_pictures_are_distinguished(tmp_path, source, monkeypatch):
    (source / "dog" / "00.png").write_bytes(b"?")
    before_picture(monkeypatch, 4, (source / "dog" / "06.png").unlink)
    report = packed(source, tmp_path / "out", **SMALL)
    assert (report.count, report.gone) == (10, ("dog/06.png",))
    assert [path for path, _ in report.unreadable] == ["dog/00.png"]
    assert "1 pictures were gone from their folders when their turn came: dog/06.png" in report.summary()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["gone"] == ["dog/06.png"]
    monkeypatch.undo()
    again = packed(source, tmp_path / "out", **SMALL)  # although the source has one picture less
    assert (again.was_complete, again.gone) == (True, ("dog/06.png",))
    noise(6).save(source / "dog" / "06.png")
    back = packed(source, tmp_path / "out", **SMALL)
    assert (back.was_complete, back.count, back.gone, back.repacked) == (False, 11, (), ("dog/06.png",))
    assert back.identity == packed(source, tmp_path / "whole", **SMALL).identity


def test_links_to_an_unmounted_disk_on_the_command_line(tmp_path, source):
    folder_of(tmp_path / "disk", ["x.png"])
    (source / "dog" / "link.png").symlink_to(tmp_path / "disk" / "x.png")
    (tmp_path / "disk").rename(tmp_path / "away")
    command = ["pack", source, tmp_path / "out", "--resolution", "8", "--shard-size", "2kB", "--workers", "2"]
    result = harness.command(*command, expected=1)
    (message,) = [line for line in result.stderr.splitlines() if "error" in line]
    assert "link.png cannot be read: No such file or directory" in message
    assert "run the same command again" in message
    assert "Traceback" not in result.stderr
    (tmp_path / "away").rename(tmp_path / "disk")
    report = packed(source, tmp_path / "out", **SMALL)
    assert (report.count, report.was_complete) == (13, False)


def test_a_picture_that_is_written_during_packing(tmp_path, source, monkeypatch):
    """The content at the time of reading is packed, and is not considered changed afterwards."""
    path = source / "dog" / "06.png"
    before_picture(monkeypatch, 4, lambda: path.write_bytes(encoded(noise(77, 40))))
    report = packed(source, tmp_path / "out", **SMALL)
    assert (report.count, report.unreadable) == (12, ())
    monkeypatch.undo()
    assert packed(source, tmp_path / "out", **SMALL).was_complete
    assert packed(source, tmp_path / "whole", **SMALL).identity == report.identity


# --- what is rewritten ------------------------------------------------------------------------------------------------


def test_pictures_rewritten_with_the_same_size_are_packed_again(tmp_path, source):
    same_size(source)
    out = tmp_path / "out"
    first = packed(source, out, **SMALL)
    shards_before = {path: path.stat().st_mtime_ns for path in (out / "r0008").glob("*.tar")}
    assert len(shards_before) > 3
    rewrite(source / "dog" / "04.png", 99)
    again = packed(source, out, **SMALL)
    assert (again.was_complete, again.repacked, again.count) == (False, ("dog/04.png",), 12)
    assert "1 pictures had changed since they were packed, and were packed again: dog/04.png" in again.summary()
    assert again.identity != first.identity
    untouched = [path for path, time in shards_before.items() if path.stat().st_mtime_ns == time]
    assert len(untouched) >= 2, "groups before it are kept"
    packed(source, tmp_path / "whole", **SMALL)
    assert files_of(out) == files_of(tmp_path / "whole")
    assert not (out / ".pack").exists()
    assert packed(source, out, **SMALL).was_complete


def test_pictures_rewritten_before_a_packing_continues(tmp_path, source, monkeypatch):
    same_size(source)
    out = tmp_path / "out"

    def interrupt():
        raise KeyboardInterrupt

    before_picture(monkeypatch, 10, interrupt)
    with pytest.raises(KeyboardInterrupt):
        packed(source, out, **SMALL)
    monkeypatch.undo()
    rewrite(source / "cat" / "01.png", 98)  # already packed
    rewrite(source / "dog" / "10.png", 99)  # not packed yet
    report = packed(source, out, **SMALL)
    assert report.repacked == ("cat/01.png",)
    packed(source, tmp_path / "whole", **SMALL)
    assert files_of(out) == files_of(tmp_path / "whole")


def test_repacking_that_is_interrupted_continues(tmp_path, source, monkeypatch):
    same_size(source)
    out = tmp_path / "out"
    packed(source, out, **SMALL)
    for i in (1, 9):
        rewrite(source / "cat" / f"{i:02d}.png", 90 + i)
    made = shard_writer.Group.commit

    def commit(self, folder):
        if self.name != "00000":
            raise KeyboardInterrupt
        return made(self, folder)

    monkeypatch.setattr(shard_writer.Group, "commit", commit)
    with pytest.raises(KeyboardInterrupt):
        packed(source, out, **SMALL)
    monkeypatch.undo()
    assert not (out / "index.json").exists(), "what is half stale does not look complete"
    packed(source, out, **SMALL)
    packed(source, tmp_path / "whole", **SMALL)
    assert files_of(out) == files_of(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["tar", "zip", "damaged"])
def test_rewritten_members_of_archives_and_repaired_pictures(tmp_path, kind):
    members = {f"{i:02d}.png": encoded(noise(i)).ljust(1200, b"\0") for i in range(8)}
    if kind == "damaged":
        members["03.png"] = bytes(1200)
    pack_up = zip_of if kind == "zip" else tar_of
    archive = pack_up(tmp_path / f"a.{kind}", members)
    packed(archive, tmp_path / "out", **SMALL)
    members["03.png"] = encoded(noise(77)).ljust(1200, b"\0")
    pack_up(archive, members)
    report = packed(archive, tmp_path / "out", **SMALL)
    assert (report.count, report.repacked, report.unreadable) == (8, ("03.png",), ())
    assert report.identity == packed(archive, tmp_path / "whole", **SMALL).identity


def test_changed_times_of_the_same_content_change_nothing(tmp_path, source):
    out = tmp_path / "out"
    packed(source, out, **SMALL)
    shutil.copytree(source, tmp_path / "copy")
    before = files_of(out)
    assert packed(tmp_path / "copy", out, **SMALL).was_complete
    assert files_of(out) == before


def test_datasets_of_older_versions_are_recognised(tmp_path, source):
    """They have no pictures.json, and a digest of paths and sizes in index.json."""
    out = tmp_path / "out"
    packed(source, out, **SMALL)
    index = json.loads((out / "index.json").read_text())
    files = sorted(path for path in source.rglob("*.png"))
    del index["pack"]["paths_sha256"], index["pack"]["max_images"]
    index["pack"]["listing_sha256"] = digest((str(p.relative_to(source)), p.stat().st_size) for p in files)
    (out / "index.json").write_text(json.dumps(index))
    (out / "pictures.json").unlink()
    report = packed(source, out, **SMALL)
    assert report.was_complete
    assert "was packed without noting times" in report.summary()
    left_out = {"packed": 11, "unreadable": [["cat/01.png", "No such file or directory"]], "upscaled": 0, "ignored": {}}
    (out / "report.json").write_text(json.dumps(left_out))
    with pytest.raises(UsageError, match=r"1 pictures that are there now \(cat/01\.png\)"):
        packed(source, out, **SMALL)
    files[0].write_bytes(files[0].read_bytes() + b"\0")
    with pytest.raises(UsageError, match="the pictures in SOURCE are others"):
        packed(source, out, **SMALL)


def test_an_interrupted_packing_of_an_older_version_starts_again(tmp_path, source):
    books = tmp_path / "out" / ".pack"
    books.mkdir(parents=True)
    packed(source, tmp_path / "whole", **SMALL)
    plan = json.loads((tmp_path / "whole" / "index.json").read_text())["pack"]
    del plan["paths_sha256"], plan["max_images"]
    files = sorted(source.rglob("*.png"))
    plan["listing_sha256"] = digest((str(p.relative_to(source)), p.stat().st_size) for p in files)
    (books / "plan.json").write_text(json.dumps(plan))
    old = {"name": "00000", "following": 3, "index_sha256": {}, "sources": [], "unreadable": [], "upscaled": 0}
    (books / "00000.json").write_text(json.dumps(old))
    packed(source, tmp_path / "out", **SMALL)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


# --- a part -----------------------------------------------------------------------------------------------------------


def test_max_images_takes_pictures_from_the_whole_source(tmp_path, source):
    command = ["pack", source, tmp_path / "out", "--resolution", "8", "--max-images", "4", "--workers", "0"]
    result = harness.command(*command, expected=0)
    assert "4 of 12 pictures were taken" in result.stdout
    assert labels_of(tmp_path / "out") == (("cat", "dog"), [0, 0, 1, 1])
    with pytest.raises(UsageError, match="max_images was 4, is None"):
        packed(source, tmp_path / "out")
    assert packed(source, tmp_path / "all", max_images=100).count == 12
    with pytest.raises(UsageError, match="max_images = 0: give 1 or more"):
        packed(source, tmp_path / "none", max_images=0)
