"""`stylegan-pg sample --out-shards`: generated datasets, resumed, divided among ranks, and read by other programs."""

import io
import json
import os
import signal
import tarfile
import time
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
import torch
from PIL import Image
from snapshots import NAMES, command, near, saved

from stylegan_pg.checkpoint.snapshot import load_snapshot, save_snapshot
from stylegan_pg.config import StyleGAN2Config
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.inference import shard_request, shards
from stylegan_pg.inference.generate import images_of, latents
from stylegan_pg.inference.look import look_for
from stylegan_pg.networks import NETWORKS, NetworkShape

CPU = torch.device("cpu")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_pictures_labels_and_seeds(conditional, tmp_path):
    G, out = load_snapshot(conditional[1]), tmp_path / "new" / "out"
    line = shards.sample_shards(conditional[1], out, CPU, count=11, seeds="40", labels="owl,cat", per_shard=4, batch=3)
    assert line == f"{out}: 11 images in 3 shards (r0016/*.tar)"
    assert sorted(os.listdir(out)) == ["index.json", "r0016"]
    index = load_index(str(out))
    assert (index.count, index.resolutions, index.label_names) == (11, (16,), tuple(NAMES))
    table = index.table(16)
    labels = [2, 0] * 5 + [2]
    assert table.label.tolist() == labels
    c = torch.eye(3)[labels]
    expected = torch.cat(list(images_of(G, latents(range(40, 51), G.z_dim), c, psi=0.7))).numpy()
    near(np.stack([table.image(i) for i in range(11)]), expected)
    facts = []
    for tar in sorted((out / "r0016").glob("*.tar")):
        with tarfile.open(tar) as file:
            read = {member.name: file.extractfile(member).read() for member in file}  # type: ignore[union-attr]
        facts += [json.loads(data) for name, data in read.items() if name.endswith(".json")]
        assert [data for name, data in read.items() if name.endswith(".cls")] == [
            str(fact["label"]).encode() for fact in facts[-len(read) // 3 :]
        ]
    assert facts == [{"seed": 40 + i, "label": k, "class": NAMES[k]} for i, k in enumerate(labels)]


def test_other_programs_read_the_tars(conditional, tmp_path, capsys, monkeypatch):
    from webdataset.compat import WebDataset

    out = tmp_path / "out"
    code, printed, told = command(
        capsys, monkeypatch, "sample", conditional[1], "--out-shards", out, "--count", 7, "--shard-images", 4
    )
    assert (code, printed) == (0, f"{out}: 7 images in 2 shards (r0016/*.tar)\n")
    assert "7/7" in told  # of the progress bar
    urls = [str(tar) for tar in sorted((out / "r0016").glob("*.tar"))]
    data: Any = WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("png", "cls", "json", "__key__")
    found = list(data)
    assert [(image.size, k, facts["seed"], key) for image, k, facts, key in found] == [
        ((16, 16), i % 3, i, f"{i:08d}") for i in range(7)
    ]
    foreign = load_index(str(out / "r0016" / "{00000..00001}.tar"))  # as tars of another program
    assert foreign.count == 7
    assert foreign.table(16).label.tolist() == [i % 3 for i in range(7)]
    near(foreign.table(16).image(5), load_index(str(out)).table(16).image(5))
    code, printed, _ = command(capsys, monkeypatch, "data", "check", out)
    assert (code, "7 images, all good" in printed) == (0, True)


def test_a_seed_list_and_random_noise(unconditional, tmp_path):
    how: dict[str, Any] = {"seeds": "9,3,3", "noise": "random", "psi": 1.0}
    for batch in (1, 8):
        shards.sample_shards(unconditional[1], tmp_path / str(batch), CPU, batch=batch, **how)
    assert contents(tmp_path / "1") == contents(tmp_path / "8")  # images are made one by one
    index = load_index(str(tmp_path / "1"))
    table = index.table(16)
    assert index.label_names == ()
    assert np.array_equal(table.image(1), table.image(2))
    assert not np.array_equal(table.image(0), table.image(1))
    const = tmp_path / "const"
    shards.sample_shards(unconditional[1], const, CPU, seeds="9,3,3", psi=1.0)
    assert not np.array_equal(load_index(str(const)).table(16).image(1), table.image(1))


def test_grey_pictures_that_are_not_square(tmp_path):
    config = StyleGAN2Config(z_dim=8, w_dim=8, mapping_layers=1, channel_base=64, channel_max=8, base=[3, 5])
    kwargs = NETWORKS["stylegan2"].g_kwargs(config, NetworkShape(16, 16, False, 1, 0, 4))
    G = NETWORKS["stylegan2"].G(**kwargs)
    save_snapshot(tmp_path / "G.safetensors", G, {"network": "stylegan2", "kwargs": kwargs, "alpha": 1.0})
    shards.sample_shards(tmp_path / "G.safetensors", tmp_path / "out", CPU, count=2, psi=1.0)
    index = load_index(str(tmp_path / "out"))
    assert (index.base, index.channels, index.size_at(16)) == ((3, 5), 1, (12, 20))
    near(index.table(16).image(1), next(images_of(G.eval(), latents([1], 8)))[0].numpy())


def test_batches_change_images_by_rounding_only(conditional, tmp_path):
    for batch in (2, 9):
        shards.sample_shards(conditional[1], tmp_path / str(batch), CPU, count=9, batch=batch)
    tables = [load_index(str(tmp_path / str(batch))).table(16) for batch in (2, 9)]
    near(*(np.stack([table.image(i) for i in range(9)]) for table in tables))


class Stop(BaseException):
    pass


def test_an_interrupted_call_continues_and_gives_the_same_bytes(conditional, tmp_path, monkeypatch, caplog):
    request: dict[str, Any] = {"count": 23, "per_shard": 5, "batch": 2}
    shards.sample_shards(conditional[1], tmp_path / "whole", CPU, **request)
    whole, out = contents(tmp_path / "whole"), tmp_path / "out"
    make, made = shards._images, []
    end = 0

    def counted(G, request, samples):
        if len(made) == end:
            raise Stop
        made.append(samples)
        return make(G, request, samples)

    monkeypatch.setattr(shards, "_images", counted)
    for batches in (0, 1, 4, 8):
        end = len(made) + batches
        with pytest.raises(Stop):
            shards.sample_shards(conditional[1], out, CPU, **request)
        assert not (out / "index.json").exists()
        assert not [name for name in contents(out) if name.endswith(".tmp")]
        with pytest.raises(UsageError):
            load_index(str(out))
    end = 1000
    shards.sample_shards(conditional[1], out, CPU, **request)
    assert contents(out) == whole
    assert len(made) == 1 + 4 + 8 + 5  # a shard has 3 batches, the last one 2: the last call made two shards
    shards.sample_shards(conditional[1], out, CPU, **request)  # complete: nothing is made
    assert len(made) == 18
    assert "is complete already" in caplog.text


def test_damage_is_repaired_when_it_continues(conditional, tmp_path, monkeypatch):
    request: dict[str, Any] = {"count": 12, "per_shard": 4}
    shards.sample_shards(conditional[1], tmp_path / "whole", CPU, **request)
    out = tmp_path / "out"
    monkeypatch.setattr(shards, "_finish", lambda *_: (_ for _ in ()).throw(Stop()))
    with pytest.raises(Stop):
        shards.sample_shards(conditional[1], out, CPU, **request)
    monkeypatch.undo()
    assert sorted(os.listdir(out / ".sample")) == ["00000.json", "00001.json", "00002.json", "lock", "plan.json"]
    (out / "r0016" / "00000.tar").unlink()
    with (out / "r0016" / "00001.tar").open("ab") as file:
        file.write(b"x")
    (out / ".sample" / "00002.json").write_text("{")
    (out / "r0016" / "00007.tar.tmp").write_text("of a killed process")
    shards.sample_shards(conditional[1], out, CPU, **request)
    assert contents(out) == contents(tmp_path / "whole")


def test_another_request_is_refused(conditional, unconditional, tmp_path, monkeypatch, caplog):
    out, request = tmp_path / "out", dict[str, Any](count=6, per_shard=4)
    make = shards._images

    def once(G, request, samples):
        monkeypatch.setattr(shards, "_images", lambda *_: (_ for _ in ()).throw(Stop()))
        return make(G, request, samples)

    monkeypatch.setattr(shards, "_images", once)
    with pytest.raises(Stop):
        shards.sample_shards(conditional[1], out, CPU, batch=4, **request)
    monkeypatch.setattr(shards, "_images", make)
    others: list[tuple[dict[str, Any], str]] = [
        ({"psi": 0.5}, "psi was 0.7, is 0.5"),
        ({"count": 7}, "count was 6, is 7"),
        ({"seeds": "3"}, "seeds was 0-5, is 3-8"),
        ({"labels": "owl"}, "classes was 0-2, is 2-2"),
        ({"noise": "none"}, "noise was const, is none"),
        ({"cutoff": 2}, "cutoff was None, is 2"),
        ({"per_shard": 3}, "images per shard was 4, is 3"),
    ]
    before = contents(out)
    for state in ("begun", "complete"):
        for other, message in others:
            with pytest.raises(UsageError, match=f"belongs to another request: .*{message}"):
                shards.sample_shards(conditional[1], out, CPU, **(request | other))
        with pytest.raises(UsageError, match=r"belongs to another request: network was .*; weights was"):
            shards.sample_shards(unconditional[1], out, CPU, **request)
        assert contents(out) == before
        if state == "begun":
            caplog.clear()
            shards.sample_shards(conditional[1], out, CPU, batch=3, **request)
            assert "is continued otherwise (batch was 4, is 3): images may differ by rounding" in caplog.text
            before = contents(out)


def test_folders_that_hold_something_else(conditional, tiny_data, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x.png").write_text("")
    (tmp_path / "file").write_text("")
    for out, message in (
        (tmp_path / "mine", r"holds other files \(x.png, ...\): give a new or empty folder"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "below", "cannot be written"),
        (tiny_data, "holds a dataset that was packed, not generated"),
    ):
        before = contents(out.parent)
        with pytest.raises(UsageError, match=message):
            shards.sample_shards(conditional[1], out, CPU, count=3)
        assert contents(out.parent) == before


def test_two_processes_do_not_write_into_one_folder(conditional, tmp_path, monkeypatch):
    out, make = tmp_path / "out", shards._images

    def second(*args):
        monkeypatch.setattr(shards, "_images", make)
        with pytest.raises(UsageError, match="is being written by another process"):
            shards.sample_shards(conditional[1], out, CPU, count=3)
        return make(*args)

    monkeypatch.setattr(shards, "_images", second)
    shards.sample_shards(conditional[1], out, CPU, count=3)
    assert load_index(str(out)).count == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--out-shards", "out", "--grid"], "--grid: --out-shards writes a dataset, without any of these"),
        (["--out-shards", "out", "--out", "x", "--interpolate", 2], "--out and --interpolate: --out-shards writes"),
        (["--count", 5], "--count: a dataset is written with --out-shards FOLDER"),
        (["--shard-images", 5], "--shard-images: a dataset is written with --out-shards FOLDER"),
        (["--out-shards", "out", "--count", 5, "--seeds", "1,2"], "give one seed, the first, or omit --count"),
        (["--out-shards", "out", "--count", 5, "--seeds", 2**32 - 3], "--count 5: give 1 to 3 images"),
        (["--out-shards", "out", "--seeds", 2**32], "seeds lie between"),
        (["--out-shards", "out", "--psi", "inf"], "psi=inf is not possible"),
        (["--out-shards", "out", "--cutoff", 9], "--cutoff 9 is not one of 0 to 6"),
        (["--out-shards", "out", "--noise", "x"], "noise 'x' is not possible"),
        (["--out-shards", "out", "--labels", "cow"], "'cow' is unknown"),
        (["--out-shards", "out", "--device", "gpu"], "device 'gpu'"),
    ],
)
def test_wrong_options(conditional, capsys, monkeypatch, tmp_path, given, message):
    monkeypatch.chdir(tmp_path)
    code, printed, told = command(capsys, monkeypatch, "sample", conditional[1], *given)
    assert (code, printed, len(told.splitlines())) == (2, "", 1), told
    assert message in told
    assert not list(tmp_path.iterdir())


def test_a_full_disk_and_a_diverged_generator(conditional, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    monkeypatch.setattr(shards.ShardFile, "commit", full)
    with pytest.raises(RunError, match=r"out cannot be written: .*No space left"):
        shards.sample_shards(conditional[1], out, CPU, count=3)
    assert sorted(contents(out)) == [".sample/lock", ".sample/plan.json"]
    monkeypatch.undo()
    saved(tmp_path / "huge.safetensors", c_dim=3)
    G = load_snapshot(tmp_path / "huge.safetensors")
    monkeypatch.setattr(shards, "load_snapshot", lambda *_: G)
    for parameter in G.synthesis.parameters():
        parameter.fill_(1e30)
    with pytest.raises(RunError, match="not finite"):
        shards.sample_shards(conditional[1], tmp_path / "huge", CPU, count=3)


def test_a_request_takes_the_same_memory_for_any_count(conditional):
    G = load_snapshot(conditional[1])
    seeds = shard_request.checked_seeds("5", 2**32 - 5)
    assert isinstance(seeds, range)
    request = shard_request.request_for(G, conditional[1], seeds, len(seeds), None, look_for(G), None)
    assert request.shards == -(-(2**32 - 5) // 1000)
    assert request.samples(request.shards - 1).stop == 2**32 - 5
    assert (request.seed(10**9), request.label(10**9)) == (10**9 + 5, 1)
    assert shard_request.plan_of(G, request)["seeds"] == f"5-{2**32 - 1}"


@pytest.mark.distributed
@pytest.mark.slow
def test_kills_and_ranks_do_not_change_a_byte(conditional, tmp_path):
    def args(out: Path) -> list[str]:
        words = ["sample", str(conditional[1]), "--out-shards", str(out), "--count", "4000", "--shard-images", "150"]
        return [*words, "--batch", "8"]

    harness.command(*args(tmp_path / "whole"), expected=0)
    whole, out = contents(tmp_path / "whole"), tmp_path / "out"
    assert len(load_index(str(tmp_path / "whole")).shards) == 27
    for ranks in (0, 2, 0):
        done = len(list(out.glob("r0016/*.tar")))
        process = harness.start(args(out), ranks=ranks, start_new_session=True)
        until = time.time() + 120
        while len(list(out.glob("r0016/*.tar"))) < done + 3:
            assert process.poll() is None, process.communicate()[0]
            assert time.time() < until
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (out / "index.json").exists()
    done = harness.command(*args(out), ranks=2, expected=0)
    assert "27 shards are complete" in done.stderr
    assert contents(out) == whole
    run = tmp_path / "run"  # a conditional generator is trained on it
    short: dict[str, object] = {"growth__start": 16, "train__total_kimg": 0.016, "data__conditional": "true"}
    harness.command(*harness.arguments(run, out, **short), expected=0)
    assert harness.newest(run)[1]["nimg"] == 16
    with tarfile.open(out / "r0016" / "00026.tar") as file:
        names = file.getnames()
        assert names[:3] == ["00003900.png", "00003900.cls", "00003900.json"]
        member = file.extractfile(names[0])
        assert member is not None
        assert Image.open(io.BytesIO(member.read())).size == (16, 16)
