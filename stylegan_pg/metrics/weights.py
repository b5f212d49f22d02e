"""Weights of the feature networks: found, recognised by what is in them, and read without unpickling anything.

No package ships the weights. They are looked for among the files given, in the environment, in this package's cache and
in torch.hub's. Other weights than the published ones work, but a number made with them carries their hash in its name:
it is comparable with others of the same hash only.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stylegan_pg.checkpoint import tensor_file
from stylegan_pg.errors import UsageError
from stylegan_pg.files import cache_folder
from stylegan_pg.metrics.registry import METRICS
from stylegan_pg.untrusted import open_regular, printable

RESAVE = "where you trust it, save its state_dict() with torch.save, or as .safetensors"


@dataclass(frozen=True)
class Weights:
    """The published weights of a network.

    Attributes:
        file: The name of the published file.
        url: The folder that it can be fetched from.
        variable: The environment variable that can name another file.
        key: The name of a tensor that only this network has, by which files are recognised.
        sha256: The beginning of the published file's checksum; "" if none is published.
    """

    file: str
    url: str
    variable: str
    key: str
    sha256: str


WEIGHTS = {
    "inception": Weights(
        "weights-inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/",
        "STYLEGAN_PG_INCEPTION",
        "Mixed_7c.branch_pool.conv.weight",
        "6726825d",
    ),
    "vgg16": Weights(
        "vgg16-397923af.pth",
        "https://download.pytorch.org/models/",
        "STYLEGAN_PG_VGG16",
        "classifier.3.weight",
        "397923af",
    ),
    "lpips": Weights(
        "weights-vgg16-lpips.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/",
        "STYLEGAN_PG_LPIPS",
        "lin0.model.1.weight",
        "",
    ),
}


def weights_folder() -> Path:
    """Return the folder in which weights are looked for that no option names."""
    return cache_folder() / "weights"


def sha256(path: Path) -> str:
    """Return the checksum of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a .safetensors or .pth file without running anything in it.

    Raises:
        UsageError: if the file is missing, or holds other things than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            with tensor_file.opened(path) as file:
                state = file.read()
        else:
            _check_pth(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"the weight file {path} does not exist") from None
    except pickle.UnpicklingError:  # whose message tells how to run what is in the file
        raise UsageError(
            f"the weight file {path} cannot be read: it holds other things than tensors; {RESAVE}"
        ) from None
    except UsageError:
        raise
    except Exception as error:  # a file of another kind can fail in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UsageError(f"the weight file {path} cannot be read: {printable(reason)}") from None
    if not isinstance(state, Mapping) or not all(isinstance(k, str) and _plain(v) for k, v in state.items()):
        raise UsageError(f"the weight file {path} holds no table of tensors")
    return dict(state)


def _plain(t: Any) -> bool:
    """Return whether this is a dense tensor on the CPU that is not quantised."""
    return isinstance(t, torch.Tensor) and t.layout == torch.strided and t.is_cpu and not t.is_quantized


def _check_pth(path: Path) -> None:
    """Refuse files that torch.load would not read as a mere table of tensors, before it is called.

    A TorchScript archive is a program: before version 2.6 torch.load gives it to torch.jit.load, which runs parts of it
    even with weights_only. The names of an archive's members are never compressed, so the member that only TorchScript
    writes is found by its name, wherever in the file readers of zips look for it.

    Raises:
        UsageError: if the file is such a one; the message says what to do.
        OSError: if the file cannot be read.
    """
    named = f"the weight file {path} cannot be read: it"
    with open_regular(path) as file:
        kind, size = file.read(4), os.fstat(file.fileno()).st_size
        if kind != b"PK\x03\x04" and kind[:1] != b"\x80":
            raise UsageError(f"{named} is none that torch.save writes; {RESAVE}")
        before = b""
        file.seek(0)
        while chunk := file.read(1 << 22):
            if b"constants.pkl" in before + chunk:
                raise UsageError(f"{named} is TorchScript, a program and not weights; {RESAVE}")
            if b"bytearray" in before + chunk:  # which asks for any amount of memory, and which no tensor needs
                raise UsageError(f"{named} holds other things than tensors; {RESAVE}")
            before = chunk[-16:]
        if kind[:1] == b"P":
            file.seek(0)
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
                if packed or sum(member.file_size for member in members) > size:  # torch.save compresses nothing
                    raise UsageError(f"{named} is compressed, or unpacks to more than its size; {RESAVE}")


def find_weights(network: str, files: Sequence[str | Path] = ()) -> tuple[Path, dict[str, torch.Tensor]]:
    """Find the weights of "inception", "vgg16" or "lpips": among `files`, then by the environment variable, then in
    this package's cache and in torch.hub's. Returns the file and its tensors.

    Raises:
        UsageError: if there are none, with their URL and where to put them; or if a file fits no network.
    """
    wanted = WEIGHTS[network]
    for path in map(Path, files):
        state = read_weights(path)
        if wanted.key in state:
            return path, state
        if not any(w.key in state for w in WEIGHTS.values()):
            raise UsageError(f"the weight file {path} fits none of {', '.join(WEIGHTS)}: the README names theirs")
    if given := os.environ.get(wanted.variable):
        return Path(given), read_weights(Path(given))
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    for folder in (weights_folder(), hub):
        if (folder / wanted.file).is_file():
            return folder / wanted.file, read_weights(folder / wanted.file)
    without = ", ".join(kind for kind, metric in METRICS.items() if not metric.network)
    raise UsageError(
        f"the weights of {network} are missing: fetch {wanted.url}{wanted.file} and put it into {weights_folder()}, or "
        f"name the file by --weights, metrics.weights or {wanted.variable} (metrics that need no network: {without})"
    )


def misfit(path: object, network: str, error: Exception) -> UsageError:
    """Return the error to raise if a network refuses the weights of a file with this error."""
    return UsageError(
        f"the weight file {path} does not fit {network}: {printable(str(error).splitlines()[-1].strip()[:200])}"
    )


def is_published(digest: str, network: str) -> bool:
    """Return whether a checksum is that of the published weights of a network."""
    known = WEIGHTS[network].sha256
    return bool(known) and digest.startswith(known)


def checked(path: Path, network: str) -> str:
    """Return the checksum of a weight file.

    Raises:
        UsageError: if it has the name of the published file, but not its checksum.
    """
    digest, known = sha256(path), WEIGHTS[network]
    if path.name == known.file and known.sha256 and not is_published(digest, network):
        raise UsageError(f"{path} has the published weights' name, but not their checksum: fetch or rename it")
    return digest
