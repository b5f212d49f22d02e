"""The formats of hostile.py: for each, a function that makes what is valid once and returns how a case is read.

A reader gets (dice, folder, marker): it puts a mutated file into the folder, whose text may name programs that would
leave the marker, and reads it as the program does. Those of data are in hostile_data.py, those of model files of
other programs in hostile_models.py.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import random
import socket
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutations
import torch
from hostile_data import DATA, Reader, into, looked_at, packed, picture
from hostile_models import MODELS as MODEL_FILES
from safetensors import safe_open
from safetensors.torch import save_file

from stylegan_pg import urls
from stylegan_pg.checkpoint import checkpoint, tensor_file
from stylegan_pg.checkpoint.checkpoint import BadCheckpointError
from stylegan_pg.checkpoint.snapshot import load_snapshot, save_snapshot
from stylegan_pg.config import MODELS
from stylegan_pg.config.families import fields_of
from stylegan_pg.config.loading import load_config
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.pack.pack import pack
from stylegan_pg.data.storage import remote, retry, shard_cache
from stylegan_pg.data.storage.retry import Fault
from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.files import cache_folder
from stylegan_pg.metrics.weights import read_weights
from stylegan_pg.monitoring import status
from stylegan_pg.networks import NETWORKS, NetworkShape
from stylegan_pg.ops import native
from stylegan_pg.planning.plan import describe
from stylegan_pg.training.devices import Devices
from stylegan_pg.training.trainer import Trainer

ALLOWED = (UsageError, RunError, BadCheckpointError, Fault)


def take_kernels(own: Path) -> None:
    """Use a separate cache with the compiled operators of the user's cache, which are built if they are missing."""
    torch.set_num_threads(1)
    native.choose("cpu")
    own.mkdir()
    for folder in cache_folder().glob("cpu-*"):
        if folder.is_dir():
            (own / folder.name).symlink_to(folder)
    os.environ["STYLEGAN_PG_CACHE"] = str(own)


# ----------------------------------------------------------------------------------------------------- configuration


def configuration(base: Path) -> Reader:
    from stylegan_pg.config.loading import configs_folder

    shipped = [path.read_bytes() for path in sorted(configs_folder().glob("*.yaml"))]
    small = {"run": "r", "resolution": 8, "model": {"channel_max": 8, "z_dim": 8, "w_dim": 8, "mapping_layers": 2}}
    small |= {"train": {"batch": 8, "batch_at": {"4": 16}, "total_kimg": 1}, "data": {"url": "nothing", "mixture": {}}}
    small |= {"loss": {"terms": [{"name": "r2", "weight": 1.0}]}, "growth": {"start": 4, "fade_kimg_at": {"8": 1.0}}}
    texts = ["&a [*a]", "!!python/object/apply:os.system ['touch {marker}']", "? [x]\n: y", "a: 1\na: 2", "\x00", "- a"]
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in itertools.pairwise("abcdefghij")
    )

    def read(dice: random.Random, folder: Path, marker: str) -> None:
        kind, given = dice.random(), []
        if kind < 0.5:
            data = mutations.text(dice, small, marker)
        elif kind < 0.8:
            data = mutations.octets(dice, dice.choice(shipped))
        elif kind < 0.9 and not mutations.OFF:
            data = dice.choice([*texts, bomb]).replace("{marker}", marker).encode()
        else:
            data = json.dumps(small).encode()
            keys = ["run", "train.batch", "train.batch_at", "loss.terms", "data", "data.url", "model.base", "x", "seed"]
            given = [] if mutations.OFF else [f"{dice.choice(keys)}={dice.choice(mutations.values(marker))}"]
        describe(load_config(str(into(folder, "c.yaml", data)), given))

    return read


# ----------------------------------------------------------------------------------------------------- what is trained


TINY = ["resolution=8", "growth.start=4", "growth.stable_kimg=0.016", "growth.fade_kimg=0.016", "train.batch=4"]
TINY += ["train.device=cpu", "model.z_dim=4", "model.w_dim=4", "model.mapping_layers=2", "model.channel_base=32"]
TINY += ["model.channel_max=4", "loss.r1_every=2", "loss.pl_every=2", "data.workers=0", "output.trackers=[]"]
TINY += ["output.grid_kimg=0", "output.tick_kimg=0.004"]


def trained(base: Path) -> tuple[Path, Path]:
    """Create a packed dataset, and the folder of a run on it after its first steps."""
    source, out, run = base / "source", base / "packed", base / "run"
    if not run.exists():
        for i in range(24):
            into(source, f"{i:02d}.png", picture(random.Random(i), "PNG"))
        pack(str(source), out, resolution=8, workers=0, progress=False)
        config = load_config(None, [*TINY, f"data.url={out}", f"run={run}", "train.total_kimg=0.008"])
        with contextlib.closing(Trainer(config, load_index(str(out)), Devices(config))) as trainer:
            trainer.train()
    return out, run


def checkpoints(base: Path) -> Reader:
    out, run = trained(base)
    data = load_index(str(out))
    path = checkpoint.found(run / "checkpoints")[0]
    whole, (tensors, state) = path.read_bytes(), checkpoint.read(path)

    def read(dice: random.Random, folder: Path, marker: str) -> None:
        there = load_config(None, [*TINY, f"data.url={out}", f"run={folder / 'run'}", "train.total_kimg=0.016"])
        where = folder / "run" / "checkpoints" / path.name
        where.parent.mkdir(parents=True)
        kind = dice.random()
        if kind < 0.3:
            into(folder, f"run/checkpoints/{path.name}", mutations.octets(dice, whole))
        elif kind < 0.65:
            checkpoint.write(where, mutations.tensors(dice, tensors), state)
        else:
            checkpoint.write(where, tensors, mutations.tree(dice, state, marker))
        with contextlib.closing(Trainer(there, data, Devices(there))) as trainer:
            trainer.train(must_resume=True)

    return read


def snapshot(base: Path) -> Reader:
    how: dict[str, Any] = {"z_dim": 4, "w_dim": 4, "mapping_layers": 2, "channel_base": 32, "channel_max": 4}
    made = []
    for name in ("stylegan2", "stylegan", "progan", "stylegan3"):
        pair = NETWORKS[name]
        model = MODELS[name](**{key: value for key, value in how.items() if key in fields_of(MODELS[name])})
        kwargs = pair.g_kwargs(model, NetworkShape(8, 8, name == "progan", 3, 2, 4))
        path = base / f"snapshot-{name}.safetensors"
        description = {"network": name, "kwargs": kwargs, "alpha": 0.5, "nimg": 1, "label_names": ["a", "b"]}
        save_snapshot(path, pair.G(**kwargs).eval(), {**description, "config": {"data": {"url": "x"}}})
        with safe_open(path, "pt") as file:
            meta = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        made.append((path.read_bytes(), tensors, meta))

    def read(dice: random.Random, folder: Path, marker: str) -> None:
        whole, tensors, meta = dice.choice(made)
        path, kind = folder / "s.safetensors", dice.random()
        if kind < 0.3:
            path.write_bytes(mutations.octets(dice, whole))
        else:
            description = json.loads(meta["stylegan_pg"])
            if kind < 0.6:
                tensors = mutations.tensors(dice, tensors)
            else:
                description = mutations.tree(dice, description, marker)
            told = {"stylegan_pg": json.dumps(description)}
            if dice.random() < 0.5 and isinstance(description, dict):  # as of an older version, without a checksum
                description.pop("checksum", None)
                told = {"stylegan_pg": json.dumps(description)}
            else:  # with one that is right
                told["blake2b"] = tensor_file.digest(tensors, told["stylegan_pg"])
            save_file(tensors, path, told)
        G = load_snapshot(path)
        c = torch.eye(G.c_dim)[:1] if G.c_dim else None
        G(torch.zeros(1, G.z_dim), c, psi=0.7)

    return read


def weights(base: Path) -> Reader:
    path = base / "weights.pth"
    torch.save({f"layer{i}.weight": torch.randn(3, 4) for i in range(4)}, path)
    scripted = base / "script.pth"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), scripted)
    wholes = [path.read_bytes(), path.read_bytes(), scripted.read_bytes()]

    def read(dice: random.Random, folder: Path, marker: str) -> None:
        kind, whole = dice.random(), dice.choice(wholes)
        if kind < 0.4:
            made = folder / "w.pth"
            with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(made, "w") as new:
                for member in old.infolist():
                    data = old.read(member)
                    if member.filename.endswith("data.pkl"):
                        attack = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()
                        data = attack if dice.random() < 0.3 and not mutations.OFF else mutations.octets(dice, data)
                    new.writestr(member.filename, data)
        elif kind < 0.5 and not mutations.OFF:
            made = into(folder, "w.pth", f"cos\nsystem\n(S'touch {marker}'\ntR.".encode())
        else:
            made = into(folder, dice.choice(["w.pth", "w.safetensors"]), mutations.octets(dice, whole))
        read_weights(made)

    return read


# ---------------------------------------------------------------------------------------------------- everything else


def pictures(base: Path) -> Reader:
    dice = random.Random(0)
    kinds = [("PNG", mode) for mode in ("RGB", "P", "LA", "1")] + [("JPEG", "RGB"), ("JPEG", "CMYK"), ("TIFF", "RGB")]
    kinds += [("WEBP", "RGBA"), ("GIF", "P"), ("BMP", "RGB"), ("PPM", "RGB"), ("TGA", "RGB"), ("JPEG2000", "RGB")]
    made = [(format, picture(dice, format, mode)) for format, mode in kinds]
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch MARKER) (w) file\nshowpage\n%%EOF\n"
    made.append(("EPS", program))

    def read(dice: random.Random, folder: Path, marker: str) -> None:
        suffixes = ["png", "jpg", "tif", "webp", "gif", "bmp"]
        for i in range(4):
            _, data = dice.choice(made)
            data = mutations.octets(dice, data.replace(b"MARKER", marker.encode()))
            into(folder, f"in/{i}.{dice.choice(suffixes)}", data)
        packed(folder / "in", folder / "out", crop=dice.choice(["center", "pad"]), channels=dice.choice([1, 3, 4]))

    return read


def run_folder(base: Path) -> Reader:
    _, run = trained(base)
    files = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}

    def read(dice: random.Random, folder: Path, marker: str) -> None:
        for name, data in files.items():
            if dice.random() < 0.3:
                data = mutations.octets(dice, data)
            elif name.endswith((".json", ".jsonl")) and dice.random() < 0.6:
                first, *rest = data.splitlines(keepends=True) if name.endswith("l") else [data]
                changed = mutations.text(dice, json.loads(first), marker) + b"\n"
                data = dice.choice([changed + data, b"".join([changed, *rest]), data + changed])
            into(folder, name, data)
        name = dice.choice(["000000000008", "8" * 30, "\u0663", "x", "-1"])
        into(folder, f"checkpoints/{name}.safetensors", b"x")
        status.render(status.collect(folder))

    return read


def server(base: Path) -> Reader:
    """Serve a packed dataset and a tar with mutated responses."""
    source, out = base / "server-source", base / "server-packed"
    for i in range(4):
        into(source, f"{i}.png", picture(random.Random(i), "PNG"))
    packed(source, out)
    current: dict[str, Any] = {}

    def answer(connection: socket.socket) -> None:
        with connection:
            try:
                connection.settimeout(10)
                request = connection.recv(1 << 16).decode("latin-1")
                dice: random.Random = current["dice"]
                path = out / request.split(" ")[1].lstrip("/").split("?")[0]
                body = path.read_bytes() if path.is_file() else b""
                head = f"HTTP/1.1 {200 if body else 404} OK\r\nContent-Length: {len(body)}\r\nETag: x\r\n\r\n".encode()
                if dice.random() < 0.5:
                    head = mutations.octets(dice, head)
                elif dice.random() < 0.5 and not mutations.OFF:
                    head = dice.choice(STRANGE).replace(b"MARKER", current["marker"].encode())
                if dice.random() < 0.3:
                    body = mutations.octets(dice, body)
                connection.sendall(head + (b"" if request.startswith("HEAD") else body))
            except OSError:
                pass

    def serve(listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def read(dice: random.Random, folder: Path, marker: str) -> None:
        if "listener" not in current:  # in the process that reads
            current["listener"] = socket.create_server(("127.0.0.1", 0))
            threading.Thread(target=serve, args=(current["listener"],), daemon=True).start()
            remote.TIMEOUT = retry.GRACE = remote.GRACE = 0.5
        current.update(dice=dice, marker=marker)
        shard_cache.configure(shard_cache.CacheSettings(str(folder / f"cache{dice.random()}"), 1 << 30, 0.3))
        url = f"http://127.0.0.1:{current['listener'].getsockname()[1]}"
        looked_at(load_index(url if dice.random() < 0.5 else f"{url}/r0004/00000.tar"))

    return read


def netrc(base: Path) -> Reader:
    """Mutate the file with passwords. No message may contain them."""
    whole = b'machine h login u password geheim\nmachine g login "u u" password "geheim"\nmacdef m\nls\n\n'

    def read(dice: random.Random, folder: Path, marker: str) -> None:
        os.environ["NETRC"] = str(into(folder, "netrc", mutations.octets(dice, whole)))
        try:
            urls.authorization(dice.choice(["http://h/x", "https://g:81/x"]))
        except UsageError as error:
            if "geheim" in str(error):
                raise RuntimeError("the password is told") from None
            raise

    return read


STRANGE = (
    b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 5-9/10\r\nContent-Length: 5\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: pipe:touch MARKER\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: /index.json\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 1152921504606846975\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n",
    b"HTTP/1.1 200 \x1b[2J\r\nETag: \x1b]0;x\x07\r\n\r\n",
    b"HTTP/1.1 401 \x1b[31mno\r\nWWW-Authenticate: Basic realm=\x1b[2J\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n" * 50,
    b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n",
    b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
    b"HTTP/9.9 abc\r\n\r\n",
    b"",
)

FORMATS: dict[str, Callable[[Path], Reader]] = {
    **DATA,
    **MODEL_FILES,
    "configuration": configuration,
    "checkpoint": checkpoints,
    "snapshot": snapshot,
    "weights": weights,
    "pictures": pictures,
    "run": run_folder,
    "server": server,
    "netrc": netrc,
}
