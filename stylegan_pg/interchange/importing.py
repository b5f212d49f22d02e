"""Model files of other programs: reading them, and writing snapshots of their generators.

Read are pickles of StyleGAN2-ADA, StyleGAN3 and R3GAN, files of torch.save, and safetensors with public names. Nothing
in a file is run; pickles.py, names.py and torch_files.py say how.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stylegan_pg.checkpoint import tensor_file
from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.interchange import forms, public, torch_files
from stylegan_pg.interchange.pickles import Refused
from stylegan_pg.interchange.public import PARTS, Found
from stylegan_pg.untrusted import open_regular, parse_json, printable

MOST_BYTES = 16 << 30
_PUBLIC = (
    ".const",
    "resample_filter",
    "up_filter",
    "down_filter",
    ".Kernel",
)  # ends of names that only public files have
LICENCE = "the weights keep the licence of their source, which may forbid commercial use or redistribution"
HINT = "docs/import.md says which files are read"


@dataclass
class ModelFile:
    """A model file that was read.

    Attributes:
        path, size, sha256: Of the file.
        kind: What it is, in words.
        found: Its networks.
    """

    path: Path
    size: int
    sha256: str
    kind: str
    found: Found

    @property
    def most_bytes(self) -> int:
        """What its tensors may take together: half precision and shared tensors can double what the file has."""
        return 2 * self.size + (1 << 20)

    def state(self, part: str) -> dict[str, torch.Tensor]:
        """The tensors of a network by their public names, float32.

        Raises:
            UsageError: they are damaged.
        """
        with _told(self.path):
            return self.found.parts[part].state(part, self.most_bytes)

    def generator(self, part: str) -> tuple[Any, dict[str, Any]]:
        """A generator, and the description that its snapshot gets.

        Args:
            part: "G_ema" or "G".

        Raises:
            UsageError: the file does not hold it, or it is none that this package can compute.
        """
        net = self.found.parts.get(part)
        if net is None:
            has = ", ".join(self.found.parts)
            raise UsageError(
                f"{printable(self.path)} holds no {part}, only {has}: give --part another value, or another file"
            )
        state = self.state(part)
        with _told(self.path):
            name, kwargs = forms.generator_form(net, state)
            G = forms.built(name, kwargs, state)
        source = {
            "file": self.path.name,
            "sha256": self.sha256,
            "kind": self.kind,
            "part": part,
            "class": net.shown,
            "kwargs": net.kwargs,
            "training_set_kwargs": self.found.data,
            "augment_p": self.found.augment_p,
            "licence": LICENCE,
        }
        about = {"network": name, "kwargs": kwargs, "alpha": 1.0, "nimg": self.found.nimg}
        about["label_names"] = self.found.label_names if kwargs["c_dim"] else []
        return G, about | {"imported": source}


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """A block in which Refused becomes a UsageError that begins with the file's name."""
    try:
        yield
    except Refused as error:
        raise UsageError(f"{printable(path)} {error} ({HINT})") from None
    except MemoryError:
        raise RunError(f"{printable(path)} needs more memory than there is") from None


def read(path: str | Path) -> ModelFile:
    """Read a model file of another program.

    Returns:
        What it holds; tensors are made when they are asked for.

    Raises:
        UsageError: there is no such file, or it is none that is read, damaged, or refers to anything that model files
            do not need.
        RunError: the file cannot be read at the moment.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "does not exist"
        raise UsageError(f"{printable(path)} {what}: give a model file, such as network-snapshot.pkl ({HINT})")
    with _told(path):
        data = _bytes_of(path)
        kind, found = _content(path, memoryview(data))
    if path.suffix == ".safetensors" and not is_foreign(path):
        raise UsageError(f"{printable(path)} is a checkpoint or snapshot of this package: use it as it is")
    return ModelFile(path, len(data), hashlib.sha256(data).hexdigest(), kind, found)


def is_foreign(path: str | Path) -> bool:
    """Whether a file is to be read by this module: a pickle, a file of torch.save, safetensors with public names, or
    anything that is named like the first two. Checkpoints and snapshots of this package are not.

    Raises:
        OSError: the file cannot be read.
    """
    with open_regular(path) as file:
        start = file.read(4)
        if start == b"PK\x03\x04" or start[:1] == b"\x80" or Path(path).suffix in (".pkl", ".pt", ".pth", ".pickle"):
            return True
        file.seek(0)
        try:
            content = tensor_file.TensorFile(file)
        except tensor_file.BadFileError:
            return Path(path).suffix != ".safetensors"
    own = "stylegan_pg" in content.metadata or "state" in content.metadata
    return not own or any(name.endswith(_PUBLIC) for name in content.entries)


def _bytes_of(path: Path) -> bytearray:
    """The bytes of a file. They are not mapped into memory: a file that shrinks meanwhile would kill the process."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MOST_BYTES:
                raise Refused(f"has {size} bytes, more than {MOST_BYTES}")
            data = bytearray(size)
            if file.readinto(data) != size:
                raise Refused("became shorter while it was read")
            return data
    except OSError as error:
        raise RunError(f"{printable(path)} cannot be read: {printable(error)}") from None


def _content(path: Path, data: memoryview) -> tuple[str, Found]:
    start = bytes(data[:64])
    if start[8:9] == b"{" and len(data) > 8 and int.from_bytes(start[:8], "little") <= len(data) - 8:
        return "safetensors with public names", _safetensors(path)
    if start[:4] == b"PK\x03\x04":
        kind = "file of torch.save"
    elif start[:1] == b"\x80":
        kind = "file of torch.save" if start[2:].startswith(torch_files.LEGACY_START) else "pickle"
    elif not data:
        raise Refused("is empty")
    elif start.lstrip()[:1] == b"<":
        raise Refused("is a web page, not the model: download the file itself")
    elif start.startswith(b"version https://git-lfs"):
        raise Refused("is a pointer of git-lfs, not the model: fetch the file itself with git lfs pull")
    else:
        raise Refused("is no model file: neither a pickle of protocol 2 to 5, nor one of torch.save, nor safetensors")
    return kind, public.look(torch_files.read(data))


def _safetensors(path: Path) -> Found:
    """Safetensors with public names, of this package's export or of another program."""
    try:
        with tensor_file.opened(path) as file:
            told = _metadata(file.metadata)
            found = Found(public.of_state_dict(file.read(), _settings(told)))
    except tensor_file.BadFileError as error:
        raise Refused(f"cannot be read as safetensors ({error})") from None
    except OSError as error:
        raise RunError(f"{printable(path)} cannot be read: {printable(error)}") from None
    names = told["stylegan_pg"].get("label_names") if isinstance(told.get("stylegan_pg"), dict) else None
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        found.label_names = names
    return found


def _metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The metadata that are JSON values."""
    found: dict[str, Any] = {}
    for name, text in list(metadata.items())[:100]:
        try:
            found[name] = parse_json(text, "", "", max_bytes=100_000, max_depth=8)
        except UsageError:
            continue  # a text
    return found


def _settings(told: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the network in metadata: at the top, in `kwargs`, or as this package exports them, in `init_kwargs`
    and beside the description of the snapshot."""
    description = told.get("stylegan_pg")
    ours = description.get("kwargs") if isinstance(description, dict) else None
    known = {"conv_clamp": "conv_clamp", "critical": "num_critical"}
    found = {public: ours[name] for name, public in known.items() if name in ours} if isinstance(ours, dict) else {}
    for table in (told, told.get("kwargs"), told.get("init_kwargs")):
        found |= table if isinstance(table, dict) else {}
    return {name: value for name, value in found.items() if name not in ("stylegan_pg", "kwargs", "init_kwargs")}


def weights(file: ModelFile) -> tuple[dict[str, dict[str, torch.Tensor]], str, dict[str, Any]]:
    """The networks of a file under this package's names, for a run to start with.

    Returns:
        ({"G", "D", "G_ema": state dict}, the name of their family, the arguments of its generator). If one of the
        generators is missing, the other one stands for it; D may be missing. A file with D alone is refused.

    Raises:
        UsageError: they are damaged, or none that this package knows.
    """
    chosen = next((part for part in PARTS[:2] if part in file.found.parts), None)
    if chosen is None:
        raise UsageError(f"{printable(file.path)} holds no generator, only {', '.join(file.found.parts)}")
    G, about = file.generator(chosen)
    made = {"G_ema": G.state_dict()}
    other = "G" if chosen == "G_ema" else ""
    made["G"] = file.generator(other)[0].state_dict() if other in file.found.parts else made["G_ema"]
    if "D" in file.found.parts:
        state = file.state("D")
        with _told(file.path):
            made["D"] = forms.renamed(state)
    return made, about["network"], about["kwargs"]
