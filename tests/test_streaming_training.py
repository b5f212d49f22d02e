"""Training on data from real servers that disappear, slow down or send wrong answers: no data is lost, the ranks remain
in step, and the result equals that of an undisturbed run."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import clusters
import harness
import pytest
import serving
import torch

from stylegan_pg.checkpoint import checkpoint
from stylegan_pg.checkpoint.names import kimg
from stylegan_pg.data.pack.pack import pack

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Return 96 pictures in shards of four. A run uses each of them once."""
    import numpy as np
    from PIL import Image

    folder, dice = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    (folder / "in").mkdir()
    for i in range(96):
        small = dice.integers(0, 256, [4, 4, 3], dtype=np.uint8)
        Image.fromarray(small).resize((16, 16), Image.Resampling.BICUBIC).save(folder / "in" / f"{i:03d}.png")
    pack(str(folder / "in"), folder / "out", resolution=16, format="png", workers=0, progress=False, shard_size="6kB")
    return folder / "out"


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> dict[int, Path]:
    """The same run on the local folder, with one rank and with two."""
    runs = {}
    for ranks in (0, 2):
        runs[ranks] = tmp_path_factory.mktemp("undisturbed") / f"ranks{ranks}"
        harness.finish(harness.start(harness.arguments(runs[ranks], data), ranks=ranks))
    return runs


@pytest.fixture
def server(data, tmp_path):
    with serving.http(data, tmp_path / "books") as server:
        yield server


def arguments(run: Path, url: str, **changes) -> list[str]:
    own = {"data__cache_dir": run.parent / f"cache-{run.name}", "data__patience_sec": 60, "data__prefetch_shards": 2}
    return harness.arguments(run, Path("x"), **({"data__url": url} | own | changes))


def tars_of(server: serving.Server, resolution: int) -> list[dict]:
    """Return the requests for the pictures of a resolution, without those for its index."""
    return [request for request in server.requests(f"r{resolution:04d}/") if request["path"].endswith(".tar")]


def wait_for(condition, process, seconds: float = 120) -> None:
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None, f"ended early:\n{process.communicate()[0]}"
        assert time.time() < end, "waited too long"
        time.sleep(0.02)


def assert_same_weights(run: Path, other: Path) -> None:
    """Compare bit for bit, including the checkpoint's state."""
    (tensors, state), (expected, wanted) = harness.newest(run), harness.newest(other)
    assert tensors.keys() == expected.keys()
    assert not [name for name, t in tensors.items() if not torch.equal(t, expected[name])]
    for key in ("nimg", "phase", "training", "system", "means", "bad_samples"):
        assert state[key] == wanted[key], key
    assert harness.stats(run) == harness.stats(other)


@pytest.mark.parametrize(("ranks", "workers"), [(0, 0), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_a_server_in_trouble(ranks, workers, data, server, undisturbed, tmp_path):
    """The server is killed and restarted, is slow, and sends 404, 500 and truncated bodies, all within one run, which
    ends like an undisturbed one."""
    run = tmp_path / "run"
    args = arguments(run, server.url, data__workers=workers, data__prefetch_shards=1, data__window=1)
    server.misbehave(match=".tar", rate=20_000)
    process = harness.start(args, ranks=ranks)
    troubles = [{"status": 500}, {"status": 404}, {"truncate": 2000}, {"truncate": 2000, "no_ranges": True}, None]
    for k, trouble in enumerate(troubles):
        wait_for(lambda k=k: harness.lines_of(run) >= k + (k > 2), process)  # the last ones are in the second phase
        if trouble is None:
            server.kill()
            time.sleep(1.0)
            server.start()
            continue
        before = len(server.requests())
        server.misbehave(match=".tar", **trouble)
        wait_for(lambda before=before: len(server.requests()) > before + 2, process)
        server.misbehave(match=".tar", rate=20_000)
    server.misbehave()
    output = harness.finish(process)
    assert "corrupt" not in output
    reference = tmp_path / "reference"
    harness.finish(
        harness.start(harness.arguments(reference, data, data__window=1, data__workers=workers), ranks=ranks)
    )
    assert_same_weights(run, reference)
    assert not (run / "data-faults.jsonl").exists()


@pytest.mark.parametrize(("ranks", "workers"), [(0, 1), (2, 0), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_a_server_that_remains_unavailable(ranks, workers, server, undisturbed, tmp_path):
    """For longer than the retry time: exit code 75 with a checkpoint during the run, and exit code 1 at the start. When
    the server is back, the same command reaches the same end."""
    run = tmp_path / "run"
    args = arguments(run, server.url, data__workers=workers, data__patience_sec=2, data__prefetch_shards=0)
    server.misbehave(match="r0016", rate=1000)  # the second resolution is sent slowly
    process = harness.start(args, ranks=ranks, fresh=bool(ranks))
    wait_for(lambda: tars_of(server, 16), process)
    server.kill()
    output = harness.finish(process, 1 if ranks else 75)  # torchrun has its own exit code
    assert "stopped, as there is no more data (data.patience_sec=2): http://127.0.0.1" in output
    assert "to continue, run the same command again" in output
    assert output.count("Traceback (most") == (ranks > 0)  # only torchrun's
    stopped = harness.newest(run)[1]["nimg"]
    assert 0 < stopped < 96
    if ranks:
        assert "exitcode  : 75" in output
    output = harness.finish(harness.start(args, ranks=ranks), 1)
    assert f"error: {server.url}/index.json" in output
    assert "refused" in output
    server.misbehave()
    server.start()
    output = harness.finish(harness.start(args, ranks=ranks))
    assert f"at {kimg(stopped)} kimg" in output
    assert_same_weights(run, undisturbed[ranks])


@pytest.mark.slow
def test_a_launch_script_passes_on_that_data_is_unavailable(server, undisturbed, tmp_path):
    """It exits with 75, after which Slurm's script and the supervisor continue, instead of starting ranks that find no
    data either."""
    run = tmp_path / "run"
    args = arguments(run, server.url, data__workers=1, data__patience_sec=2, data__prefetch_shards=0)[1:]
    server.misbehave(match="r0016", rate=1000)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [str(clusters.LAUNCH / "single.sh"), *args]
    process = subprocess.Popen(command, env=clusters.environment(NPROC="2"), **pipes)
    wait_for(lambda: tars_of(server, 16), process)
    server.kill()
    output = harness.finish(process, 75)
    assert "stopped, as there is no more data" in output
    assert "Traceback" not in output
    server.misbehave()
    server.start()
    harness.finish(subprocess.Popen(command, env=clusters.environment(NPROC="2"), **pipes))
    assert_same_weights(run, undisturbed[2])


def test_a_stop_before_the_first_batch(server, tmp_path):
    """A stop while the run waits for a server means that it can be continued, and is not an error."""
    run = tmp_path / "run"
    server.misbehave(match=".tar", rate=200)
    process = harness.start(arguments(run, server.url, data__workers=1))
    wait_for(lambda: server.requests(".tar"), process)
    process.send_signal(signal.SIGTERM)
    output = harness.finish(process, 75)
    assert "to continue, run the same command again" in output
    assert "error" not in output


def test_only_one_rank_loses_its_connection(server, undisturbed, tmp_path):
    """Each rank has its own store, as on two nodes. With shards in its store, a rank can continue."""
    run = tmp_path / "run"
    wrapper = tmp_path / "node.py"
    wrapper.write_text(
        "import os, sys\n"
        "sys.argv = [a.replace('CACHE', 'cache' + os.environ['RANK']) for a in sys.argv]\n"
        "from stylegan_pg.__main__ import run\nrun()\n"
    )
    args = arguments(run, server.url, data__cache_dir=f"{tmp_path}/CACHE", data__patience_sec=2)
    first = arguments(tmp_path / "first", server.url, data__cache_dir=f"{tmp_path}/CACHE")
    harness.finish(harness.start(first, ranks=2, script=wrapper))
    for path in (tmp_path / "cache1").iterdir():
        if "r0016" in json.dumps(path.name) or path.suffix in (".json", ".lock"):
            continue
        path.unlink()
    server.misbehave(match=".tar", rate=3000)
    process = harness.start(args, ranks=2, script=wrapper, fresh=True)  # because of torchrun's report
    wait_for(lambda: harness.lines_of(run) >= 1, process)
    server.kill()
    output = harness.finish(process, 1)
    assert "exitcode  : 75" in output
    assert "stopped, as there is no more data" in output
    server.misbehave()
    server.start()
    harness.finish(harness.start(args, ranks=2, script=wrapper))
    assert_same_weights(run, undisturbed[2])


def test_down_at_the_start(server, tmp_path):
    server.kill()
    started = time.monotonic()
    output = harness.finish(harness.start(arguments(tmp_path / "run", server.url)), 1)
    assert time.monotonic() - started < 60
    assert output.count("error:") == 1
    assert "Traceback" not in output
    server.start()
    server.misbehave(match=".tar", status=503)  # the index is available, but the pictures are not
    output = harness.finish(harness.start(arguments(tmp_path / "run", server.url)), 1)
    assert "error: there is no data to start with: http://127.0.0.1" in output
    assert "the server answered 503" in output
    server.misbehave(match=".tar", status=404)
    output = harness.finish(harness.start(arguments(tmp_path / "run", server.url)), 1)
    assert "the server answered 404" in output
    assert not checkpoint.found(tmp_path / "run" / "checkpoints")


def test_a_request_to_stop_ends_the_wait(server, undisturbed, tmp_path):
    """SIGTERM while the server is unavailable and the retry time is long: the run soon exits with code 75 and can be
    continued to the same end."""
    run = tmp_path / "run"
    args = arguments(run, server.url, data__patience_sec=600, data__workers=1, data__prefetch_shards=0)
    server.misbehave(match="r0016", rate=1000)
    process = harness.start(args)
    wait_for(lambda: tars_of(server, 16), process)
    server.kill()
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    output = harness.finish(process, 75)
    assert time.monotonic() - started < 40
    assert "no more data" not in output
    server.misbehave()
    server.start()
    harness.finish(harness.start(args))
    assert_same_weights(run, undisturbed[0])


def test_the_second_epoch_comes_from_the_cache(server, tmp_path):
    """Each shard is requested once for any number of processes and epochs, and not at all by a second run."""
    cache = tmp_path / "cache"
    long = {"growth__start": "null", "train__total_kimg": 0.24, "data__cache_dir": cache, "data__workers": 2}
    harness.finish(harness.start(arguments(tmp_path / "run", server.url, **long)))
    paths = [request["path"] for request in server.requests()]
    assert len(paths) == len(set(paths)) > 3
    harness.finish(harness.start(arguments(tmp_path / "again", server.url, **long)))
    assert len(server.requests()) == len(paths)
    assert_same_weights(tmp_path / "run", tmp_path / "again")


def test_a_shard_that_vanishes_between_epochs(data, tmp_path):
    """Without a cache, training stops so that it can be continued, and names the shard. After the shard is restored, it
    continues to the same end. A local shard is already open, so that only the next process notices, at its start."""
    copy = shutil.copytree(data, tmp_path / "data")
    (shard,) = [p for p in (copy / "r0016").iterdir() if p.name == "00003.tar"]
    how = {"growth__start": "null", "train__total_kimg": 0.16, "data__patience_sec": 2, "data__cache_gib": 0}
    local = arguments(tmp_path / "local", str(copy), **how)
    hidden = shard.rename(tmp_path / "hidden")
    assert "r0016/00003.tar" in harness.finish(harness.start(local), 2)
    hidden.rename(shard)
    harness.finish(harness.start(local))
    with serving.http(copy, tmp_path / "books") as server:
        args = arguments(tmp_path / "remote", server.url, **how)
        process = harness.start(args)
        wait_for(lambda: harness.lines_of(tmp_path / "remote") >= 12, process)  # all 96 images have been used
        hidden = shard.rename(tmp_path / "hidden")
        output = harness.finish(process, 75)
        assert "r0016/00003.tar" in output
        assert "stopped, as there is no more data" in output
        hidden.rename(shard)
        harness.finish(harness.start(args))
    assert_same_weights(tmp_path / "local", tmp_path / "remote")


def test_damaged_pictures(data, server, tmp_path):
    """They are counted, named once, agreed on by the ranks and recorded. They are replaced in the same way on one rank
    and on two. Too many stop the run with a message."""
    copy = shutil.copytree(data, tmp_path / "data")
    index = json.loads((copy / "r0008" / "00002.index.json").read_text())
    with open(copy / "r0008" / "00002.tar", "r+b") as file:
        for _key, offset, size, *_ in index["samples"][:3]:
            file.seek(offset + size // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
    how = {"data__max_bad_share": 0.05, "growth__stable_kimg": 0.096}
    ends = []
    with serving.http(copy, tmp_path / "books") as own:
        for name, ranks, url in (("one", 0, str(copy)), ("two", 2, str(copy)), ("served", 2, own.url)):
            run = tmp_path / name
            output = harness.finish(harness.start(arguments(run, url, **how), ranks=ranks))
            assert output.count("replaced a corrupt picture") == 3
            lines = [json.loads(line) for line in (run / "data-faults.jsonl").read_text().splitlines()]
            assert {line["kind"] for line in lines} == {"checksum"}
            assert {line["shard"] for line in lines} == {"r0008/00002.tar"}
            assert len({line["ordinal"] for line in lines}) == len(lines) == 3
            assert all(0 < line["nimg"] <= 96 and line["source"].endswith(".png") for line in lines)
            assert harness.stats(run)[-1]["bad_checksum"] == harness.stats(run)[-1]["bad_samples"] == 3
            state = harness.newest(run)[1]["bad_samples"]
            ends.append(sorted(state))
    assert ends[0] == ends[1] == ends[2]
    assert_same_weights(tmp_path / "two", tmp_path / "served")
    output = harness.finish(
        harness.start(arguments(tmp_path / "many", str(copy), data__max_bad_share=0.01), ranks=2), 1
    )
    assert "pictures" in output
    assert "more than data.max_bad_share=0.01 allows" in output
    assert "data-faults.jsonl names them" in output


def test_a_cache_that_is_full_or_gets_damaged(server, undisturbed, tmp_path):
    """A store with room for two shards, whose files are damaged while they are in use."""
    run = tmp_path / "run"
    folder = tmp_path / "cache-run"
    args = arguments(run, server.url, data__cache_gib=30_000 / 2**30, data__workers=1)
    process = harness.start(args)
    done = threading.Event()

    def damage() -> None:
        while not done.wait(0.05):
            for path in list(folder.glob("*.tar")) if folder.exists() else []:
                try:
                    with open(path, "r+b") as file:
                        file.seek(1000)
                        file.write(b"damaged")
                except FileNotFoundError:
                    pass
                break

    vandal = threading.Thread(target=damage)
    vandal.start()
    try:
        output = harness.finish(process)
    finally:
        done.set()
        vandal.join()
    assert "corrupt" not in output
    assert_same_weights(run, undisturbed[0])


def test_s3(data, undisturbed, tmp_path, monkeypatch):
    """Uses moto's server with credentials from the environment. It forgets everything when it is killed and restarted,
    so that the shard is missing until it is uploaded again."""
    boto3 = pytest.importorskip("boto3", reason="boto3 is not installed")
    for name, value in {"ACCESS_KEY_ID": "us", "SECRET_ACCESS_KEY": "secret", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with serving.s3() as (endpoint, _):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        client = boto3.client("s3")
        client.create_bucket(Bucket="faces")
        for path in sorted(data.rglob("*.*")):
            client.upload_file(str(path), "faces", f"set/{path.relative_to(data)}")
        run = tmp_path / "run"
        args = arguments(run, "s3://faces/set", data__workers=1, data__patience_sec=3)
        client.delete_object(Bucket="faces", Key="set/r0016/00001.tar")
        output = harness.finish(harness.start(args, ranks=2, fresh=True), 1)
        assert "exitcode  : 75" in output
        assert "s3://faces/set/r0016/00001.tar" in output
        client.upload_file(str(data / "r0016" / "00001.tar"), "faces", "set/r0016/00001.tar")
        harness.finish(harness.start(args, ranks=2))
    assert_same_weights(run, undisturbed[2])


def test_pipes(data, tmp_path):
    """Tars from the output of commands. They have no index, so they count as tars of other programs."""
    tars = sorted((data / "r0016").glob("*.tar"))
    urls = "::".join(f"pipe:cat {tar}" for tar in tars[:8])
    how = {"growth__start": "null", "train__total_kimg": 0.032, "data__cache_dir": tmp_path / "cache"}
    harness.finish(harness.start(arguments(tmp_path / "run", urls, **how)))
    for tar in tars[:8]:
        shutil.copy(tar, tmp_path)
    harness.finish(harness.start(arguments(tmp_path / "local", f"{tmp_path}/{{00000..00007}}.tar", **how)))
    assert_same_weights(tmp_path / "run", tmp_path / "local")
