"""The data loader is deterministic, whatever faults occur during reading."""

import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stylegan_pg.config.loading import load_config
from stylegan_pg.config.schedule import deal
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.datasets.sampler import Order
from stylegan_pg.data.datasets.table import CorruptSample, SampleTable
from stylegan_pg.data.loader import reading
from stylegan_pg.data.loader.loader import Batch, batches
from stylegan_pg.data.loader.reading import Bad, read_batch
from stylegan_pg.data.loader.workers import give_up_waiting
from stylegan_pg.data.pack.pack import pack
from stylegan_pg.data.storage import shard_cache
from stylegan_pg.data.storage.retry import Retries
from stylegan_pg.errors import RunError
from stylegan_pg.training.devices import Devices

COUNT, CLASSES = 13, 3


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        file = folder / "in" / f"class{i % CLASSES}" / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)
    pack(folder / "in", folder / "out", resolution=8, shard_size="1kB", workers=0, progress=False)
    return folder / "out"


@pytest.fixture(scope="module")
def table(original) -> SampleTable:
    table = load_index(str(original)).table(8)
    assert len(table) == COUNT
    assert len(table.paths) > 1
    return table


@pytest.fixture
def damaged(original, tmp_path) -> SampleTable:
    """The table of a copy that a test may damage. Nothing has been read from it yet."""
    return load_index(str(shutil.copytree(original, tmp_path / "data"))).table(8)


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """The durations of all requested pauses, none of which is executed."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


def read(table: SampleTable, **how) -> list[Batch]:
    batch = how.setdefault("batch", 4)
    order = Order(np.bincount(table.shard).tolist(), how.pop("seed", 0))
    return list(batches(table, order, **{"start": 0, "end": 13 * 4, "share": range(batch), "workers": 0, **how}))


def images(shown: list[Batch]) -> torch.Tensor:
    return torch.cat([batch.image for batch in shown])


def ordinals(table: SampleTable, shown: list[Batch]) -> list[int]:
    """Return the ordinals of the samples that the images show."""
    known = {table.image(i).tobytes(): i for i in range(len(table))}
    assert len(known) == len(table)
    return [known[image.numpy().tobytes()] for image in images(shown)]


def flip(table: SampleTable, ordinal: int) -> None:
    """Damage one byte of a sample."""
    with open(table.paths[table.shard[ordinal]], "r+b") as file:
        file.seek(int(table.offset[ordinal] + table.size[ordinal] // 2))
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))


# --- order ------------------------------------------------------------------------------------------------------------


def test_each_epoch_is_a_permutation(table):
    shown = read(table)
    assert [batch.image.shape for batch in shown] == [(4, 3, 8, 8)] * 13
    assert images(shown).dtype == torch.uint8
    order = ordinals(table, shown)
    epochs = [order[i : i + COUNT] for i in range(0, len(order), COUNT)]  # some batches of 4 extend over two epochs
    assert [sorted(epoch) for epoch in epochs] == [list(range(COUNT))] * 4
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_order_depends_on_seed_and_nimg_only(table):
    whole = images(read(table))
    for start in (4, 12, 40):
        assert torch.equal(images(read(table, start=start)), whole[start:])
    assert torch.equal(
        images(read(table, start=6, end=36, batch=6)), whole[6:36]
    )  # the order does not depend on the batch size
    assert torch.equal(images(read(table)), whole)
    assert ordinals(table, read(table, seed=1)) != ordinals(table, read(table))
    far = read(table, start=10**9, end=10**9 + 4)
    assert torch.equal(far[0].image, read(table, start=10**9, end=10**9 + 4)[0].image)
    assert read(table, start=8, end=8) == []


@pytest.mark.parametrize(("batch", "group", "ranks"), [(12, 4, 3), (12, 2, 4), (20, 4, 3), (8, 4, 3)])
def test_shares_of_all_ranks_form_the_batch(table, batch, group, ranks):
    how = {"batch": batch, "end": 3 * batch, "mirror": True, "fields": ["class"]}
    whole = read(table, **how)
    shares = deal(batch, group, ranks)
    parts = [read(table, share=share, **how) for share in shares]
    for step, expected in enumerate(whole):
        together, classes = torch.zeros_like(expected.image), torch.zeros([batch], dtype=torch.int64)
        for share, part in zip(shares, parts, strict=True):
            together[share], classes[share] = part[step].image, part[step].fields["class"]
        assert torch.equal(together, expected.image)
        assert torch.equal(classes, expected.fields["class"])


def test_workers_do_not_change_batches_and_exit(table):
    how = {"mirror": True, "fields": ["class"], "end": 24}
    alone = read(table, **how)
    for workers in (1, 2):
        shown = read(table, workers=workers, **how)
        assert torch.equal(images(shown), images(alone))
        for a, b in zip(shown, alone, strict=True):
            assert torch.equal(a.fields["class"], b.fields["class"])
    assert not multiprocessing.active_children()
    endless = batches(
        table, Order(np.bincount(table.shard).tolist(), 0), start=0, end=10**9, batch=4, share=range(4), workers=2
    )
    next(endless)
    workers_alive = multiprocessing.active_children()
    assert len(workers_alive) == 2
    endless.close()
    assert not any(worker.is_alive() for worker in workers_alive)


def test_mirror_is_drawn_for_each_image_and_epoch(table):
    how = {"batch": 10, "end": 40 * COUNT}
    plain, mirrored = images(read(table, **how)), images(read(table, mirror=True, **how))
    assert torch.equal(images(read(table, mirror=True, **how)), mirrored)
    turned = (mirrored == plain.flip(3)).all(dim=3).all(dim=2).all(dim=1)
    kept = (mirrored == plain).all(dim=3).all(dim=2).all(dim=1)
    assert (turned ^ kept).all()
    assert 0.43 < float(turned.float().mean()) < 0.57  # three standard deviations of 520 draws
    order = torch.tensor(ordinals(table, read(table, **how)))
    assert all(0 < int(turned[order == i].sum()) < 40 for i in range(COUNT))
    other = images(read(table, mirror=True, seed=1, start=0, end=10 * COUNT, batch=10))
    assert len(other) == 10 * COUNT


def test_classes_are_a_field(table):
    shown = read(table, fields=["class"])
    classes = torch.cat([batch.fields["class"] for batch in shown])
    assert classes.dtype == torch.int64
    np.testing.assert_array_equal(classes, table.label[ordinals(table, shown)])
    assert read(table)[0].fields.keys() == {"image"}


def test_read_batch_reads_by_ordinal(table):
    picked = read_batch(table, [5, 0, 5])
    assert picked.dtype == torch.uint8
    np.testing.assert_array_equal(picked, np.stack([table.image(i) for i in (5, 0, 5)]))


# --- faults -----------------------------------------------------------------------------------------------------------


def test_read_batch_reports_replaced_samples(table, damaged):
    flip(damaged, 4)
    bad: list[Bad] = []
    assert torch.equal(read_batch(damaged, [3, 4, 4], bad), read_batch(table, [3, 5, 5]))
    assert [(one.ordinal, one.kind) for one in bad] == [(4, "checksum")] * 2
    assert torch.equal(read_batch(damaged, [4]), read_batch(table, [5]))


@pytest.mark.parametrize("broken", [[4], [4, 5], [COUNT - 1], [0, 1, 2, 7, COUNT - 1]])
def test_corrupt_samples_are_replaced_by_the_next_good_one(table, damaged, broken):
    for ordinal in broken:
        flip(damaged, ordinal)
    order = ordinals(table, read(table))  # the order of the undamaged dataset
    shown = read(damaged, fields=["class"])
    instead = {i: next(j % COUNT for j in range(i, 2 * COUNT) if j % COUNT not in broken) for i in range(COUNT)}
    expected = [instead[i] for i in order]
    assert torch.equal(images(shown), read_batch(table, expected))
    classes = torch.cat([batch.fields["class"] for batch in shown])
    np.testing.assert_array_equal(classes, table.label[expected])
    for batch, wanted in zip(shown, np.reshape(order, (-1, 4)), strict=True):
        assert len(batch.bad) >= sum(i in broken for i in wanted)
        assert bool(batch.bad) == any(i in broken for i in wanted)
    named = {problem for batch in shown for problem in batch.bad}
    shards = {i: f"r0008/{Path(damaged.paths[damaged.shard[i]]).name}" for i in broken}
    assert named == {Bad(8, i, "checksum", shards[i], "checksum mismatch") for i in broken}
    assert {str(problem) for problem in named} == {f"sample {i} in {s}: checksum mismatch" for i, s in shards.items()}
    again = read(damaged, fields=["class"], workers=2)
    assert torch.equal(images(again), images(shown))
    assert [batch.bad for batch in again] == [batch.bad for batch in shown]
    unread = read(table, known=broken)  # after a resume they remain replaced, although they are readable again
    assert torch.equal(images(unread), images(shown))
    assert not any(batch.bad for batch in unread)


def read_slowly(table):
    order = Order(np.bincount(table.shard).tolist(), 0)
    return batches(table, order, start=0, end=4000, batch=4, share=range(4), workers=1)


@pytest.mark.parametrize("workers", [0, 1])
def test_dataset_without_good_samples(damaged, workers):
    for ordinal in range(COUNT):
        flip(damaged, ordinal)
    (only,) = read(damaged, workers=workers)
    assert only.lasting
    assert re.search(r"none of \d+ samples from \d+ on can be decoded \(the last: sample \d+ in r0008/", only.fault)


def test_batches_for_a_gpu_are_pinned(table, monkeypatch):
    """All their tensors are pinned; a batch without images has none."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t.shape) or t)
    order = Order(np.bincount(table.shard).tolist(), 0)
    how = {"start": 0, "end": 8, "batch": 4, "share": range(4), "fields": ["class"], "workers": 0}
    plain, ready = (list(batches(table, order, **how, pin=pin)) for pin in (False, True))
    assert torch.equal(images(plain), images(ready))
    assert pinned == [(4, 3, 8, 8), (4,)] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_reach_the_gpu_unchanged(table):
    """They are copied from pinned memory on a separate stream, while the device is busy."""
    parallel = Devices(load_config("demo", ["train.device=cuda"]))
    order = Order(np.bincount(table.shard).tolist(), 0)
    how = {"start": 0, "end": 40, "batch": 4, "share": range(4), "fields": ["class"], "workers": 1}
    plain = list(batches(table, order, **how))
    busy = torch.randn(4096, 4096, device="cuda")
    for batch, expected in zip(batches(table, order, **how, pin=True), plain, strict=True):
        assert batch.image.is_pinned()
        busy = (busy @ busy).tanh()
        sent = parallel.send(batch)
        torch.cuda.current_stream().wait_event(sent.ready)
        assert torch.equal(sent.image.cpu(), expected.image)
        assert torch.equal(sent.fields["class"].cpu(), expected.fields["class"])


def test_too_many_consecutive_bad_samples(damaged, monkeypatch):
    """The loader does not read through a million pictures of a format that it cannot decode."""
    for ordinal in range(COUNT):
        flip(damaged, ordinal)
    monkeypatch.setattr(reading, "IN_A_ROW", 3)
    with pytest.raises(RunError, match="none of 3 samples from 5 on can be decoded"):
        reading.read_image(damaged, 5)


def test_a_killed_worker_ends_the_batches(table):
    """The operating system may kill it if memory runs out. Earlier batches are good, and the next one states the
    reason."""
    data = read_slowly(table)
    assert not next(data).fault
    for process in multiprocessing.active_children():
        os.kill(process.pid or 0, signal.SIGKILL)
    last = next(batch for batch in data if batch.fault)
    assert "was killed, perhaps because memory ran out" in last.fault
    assert not last.lasting
    assert not list(data)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_file_ends_the_batches(table, damaged, workers):
    """The batches before the first one that needs the file are good, and the next one states the reason, after the time
    for retries."""
    order = ordinals(table, read(table))
    gone = int(damaged.shard[order[9]])  # a shard that the first batches do not need
    first = next(i for i, ordinal in enumerate(order) if damaged.shard[ordinal] == gone) // 4
    os.unlink(damaged.paths[gone])
    with shard_cache.patience(1.0):
        started = time.monotonic()
        *good, last = read(damaged, workers=workers)
    assert 1.0 <= time.monotonic() - started < 20
    assert len(good) == first
    if first:
        assert torch.equal(images(good), images(read(table))[: 4 * first])
    assert not last.lasting
    assert re.search(r"r0008/\d+\.tar cannot be read: .*No such file", last.fault)
    assert not multiprocessing.active_children()
    with shard_cache.patience(60.0):
        started = time.monotonic()
        *_, last = read(damaged, workers=workers, start=4 * first, first_patience=0.3)
    assert last.fault
    assert time.monotonic() - started < 20


def test_waiting_workers_exit_at_once(damaged):
    """They exit even during long retries, if the trainer is requested to stop or the stream is closed."""
    for path in damaged.paths:
        os.unlink(path)
    order = Order(np.bincount(damaged.shard).tolist(), 0)
    data = batches(damaged, order, start=0, end=40, batch=4, share=range(4), workers=2)
    started = time.monotonic()
    threading.Timer(1.0, give_up_waiting).start()
    try:
        assert next(data).fault
        assert 1.0 <= time.monotonic() - started < 10
    finally:
        Retries.giving_up = False
        data.close()
    assert time.monotonic() - started < 10
    assert not multiprocessing.active_children()
    data = batches(damaged, order, start=0, end=40, batch=4, share=range(4), workers=2, first_patience=0.1)
    assert next(data).fault  # the other worker keeps waiting
    data.close()
    assert not multiprocessing.active_children()
    assert time.monotonic() - started < 20


def test_transient_faults_are_retried(table, damaged, monkeypatch):
    hidden = [shutil.move(path, f"{path}.away") for path in damaged.paths]
    waits = []

    def back(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            for path in hidden:
                shutil.move(path, path.removesuffix(".away"))

    monkeypatch.setattr(time, "sleep", back)
    shown = read(damaged)
    assert len(waits) >= 2
    assert torch.equal(images(shown), images(read(table)))
    assert not any(batch.bad for batch in shown)


@pytest.mark.parametrize("faults", ["c", "o", "oc", "co", "ooc", "oco"])
def test_only_permanently_damaged_samples_are_replaced(table, monkeypatch, pauses, faults):
    """In `faults`, `o` means that the file cannot be read, and `c` that the bytes are damaged once."""
    whole, real = images(read(table)), SampleTable.image
    script = list(faults)

    def image(self: SampleTable, i: int, out: np.ndarray | None = None) -> np.ndarray:
        kind = script.pop(0) if script else ""
        if kind == "o":
            raise OSError("the network is away")
        if kind == "c":
            raise CorruptSample("r0008/00000.tar", i, "checksum mismatch")
        return real(self, i, out)

    monkeypatch.setattr(SampleTable, "image", image)
    shown = read(table)
    assert not script
    assert not any(batch.bad for batch in shown)
    assert torch.equal(images(shown), whole)
    assert bool(pauses) == ("o" in faults)


def test_a_sample_is_damaged_only_after_two_reads(table, monkeypatch):
    """The first read returns damaged bytes, and the second one fails."""
    script = iter("c")

    def image(self: SampleTable, i: int, out: np.ndarray | None = None) -> np.ndarray:
        if next(script, "o") == "o":
            raise OSError("the network is away")
        raise CorruptSample("r0008/00000.tar", i, "checksum mismatch")

    monkeypatch.setattr(SampleTable, "image", image)
    with shard_cache.patience(0.5):
        (only,) = read(table)
    assert "cannot be read: the network is away" in only.fault
    assert not only.bad
