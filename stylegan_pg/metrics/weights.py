"""Weights of the feature networks: where they are searched, how files are recognised, and safe reading of them.

No package contains the weights. They are searched among the given files, in environment variables, in this package's
cache and in torch.hub's cache. Weights other than the published ones are accepted, but the names of metrics computed
with them contain their hash: such a number may be compared only with numbers that have the same hash.
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

RESAVE = "if you trust the file, load it and save its state_dict() with torch.save, or as .safetensors"


@dataclass(frozen=True)
class Weights:
    """The published weights of a network.

    Attributes:
        file: The name of the published file.
        url: The URL of the folder with the published file.
        variable: The environment variable that can name another file.
        key: The name of a tensor that only this network has. Files are recognised by it.
        sha256: The first digits of the published file's SHA-256 checksum; "" if none is published.
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
    """Return the folder in which weights are searched if no option names a file."""
    return cache_folder() / "weights"


def sha256(path: Path) -> str:
    """Return the SHA-256 checksum of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a .safetensors or .pth file without running any code in it.

    Raises:
        UsageError: if the file is missing or contains anything but tensors.
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
    except pickle.UnpicklingError:  # torch's own message would explain how to run the code in the file
        raise UsageError(
            f"the weight file {path} cannot be read: it contains objects other than tensors; {RESAVE}"
        ) from None
    except UsageError:
        raise
    except Exception as error:  # an arbitrary file can cause any error
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UsageError(f"the weight file {path} cannot be read: {printable(reason)}") from None
    if not isinstance(state, Mapping) or not all(isinstance(k, str) and _plain(v) for k, v in state.items()):
        raise UsageError(f"the weight file {path} contains no dictionary of tensors: {RESAVE}")
    return dict(state)


def _plain(t: Any) -> bool:
    """Return whether `t` is a dense tensor on the CPU that is not quantised."""
    return isinstance(t, torch.Tensor) and t.layout == torch.strided and t.is_cpu and not t.is_quantized


def _check_pth(path: Path) -> None:
    """Refuse files that torch.load would not read as a plain dictionary of tensors. This is called before torch.load.

    A TorchScript archive is a program. Before version 2.6, torch.load passes it to torch.jit.load, which runs parts of
    it even with weights_only=True. Only TorchScript writes a member named constants.pkl. The names of a zip's members
    are never compressed, so the name is found by searching the bytes of the whole file.

    Raises:
        UsageError: if the file is refused; the message says what to do.
        OSError: if the file cannot be read.
    """
    named = f"the weight file {path} cannot be read: it"
    with open_regular(path) as file:
        kind, size = file.read(4), os.fstat(file.fileno()).st_size
        if kind != b"PK\x03\x04" and kind[:1] != b"\x80":
            raise UsageError(f"{named} was not written by torch.save; {RESAVE}")
        before = b""
        file.seek(0)
        while chunk := file.read(1 << 22):
            if b"constants.pkl" in before + chunk:
                raise UsageError(f"{named} is TorchScript, a program and not weights; {RESAVE}")
            if b"bytearray" in before + chunk:  # it could allocate any amount of memory, and no tensor needs it
                raise UsageError(f"{named} contains objects other than tensors; {RESAVE}")
            before = chunk[-16:]
        if kind[:1] == b"P":
            file.seek(0)
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
                if packed or sum(member.file_size for member in members) > size:  # torch.save compresses nothing
                    raise UsageError(f"{named} is compressed, or larger when unpacked; {RESAVE}")


def find_weights(network: str, files: Sequence[str | Path] = ()) -> tuple[Path, dict[str, torch.Tensor]]:
    """Find the weights of "inception", "vgg16" or "lpips". They are searched among `files`, then in the file that the
    environment variable names, then in this package's cache, then in torch.hub's cache.

    Returns:
        The path of the file, and its tensors by name.

    Raises:
        UsageError: if no weights are found (the message gives their URL and destination), or if one of `files` belongs
            to none of the networks.
    """
    wanted = WEIGHTS[network]
    for path in map(Path, files):
        state = read_weights(path)
        if wanted.key in state:
            return path, state
        if not any(w.key in state for w in WEIGHTS.values()):
            raise UsageError(
                f"the weight file {path} belongs to none of {', '.join(WEIGHTS)}: docs/metrics.md links to their files"
            )
    if given := os.environ.get(wanted.variable):
        return Path(given), read_weights(Path(given))
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    for folder in (weights_folder(), hub):
        if (folder / wanted.file).is_file():
            return folder / wanted.file, read_weights(folder / wanted.file)
    without = ", ".join(kind for kind, metric in METRICS.items() if not metric.network)
    raise UsageError(
        f"the weights of {network} are missing: download {wanted.url}{wanted.file} into {weights_folder()}, or "
        f"name the file by --weights, metrics.weights or {wanted.variable} (metrics without a network: {without})"
    )


def weights_error(path: object, network: str, error: Exception) -> UsageError:
    """Return a UsageError for a weight file that a network refused with the given error."""
    return UsageError(
        f"the weight file {path} does not fit {network}: {printable(str(error).splitlines()[-1].strip()[:200])}"
    )


def is_published(digest: str, network: str) -> bool:
    """Return whether a SHA-256 checksum is that of the network's published weights."""
    known = WEIGHTS[network].sha256
    return bool(known) and digest.startswith(known)


def verified_checksum(path: Path, network: str) -> str:
    """Return the SHA-256 checksum of a weight file.

    Raises:
        UsageError: if the file has the published file's name but another checksum.
    """
    digest, known = sha256(path), WEIGHTS[network]
    if path.name == known.file and known.sha256 and not is_published(digest, network):
        raise UsageError(
            f"{path} has the name of the published weights, but not their checksum: download it again, or rename it"
        )
    return digest
