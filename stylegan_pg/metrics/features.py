"""Feature extractors: torch-fidelity's networks, whose weights are read without unpickling anything, or the user's.

No package ships the weights. They are looked for among the files given, in the environment, in this package's cache and
in torch.hub's, and recognised by what is in them. Other weights than the published ones work, but a number made with
them carries their hash in its name: it is comparable with others of the same hash only.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from stylegan_pg.checkpoint import tensor_file
from stylegan_pg.errors import UsageError
from stylegan_pg.files import cache_folder
from stylegan_pg.images import over_white
from stylegan_pg.metrics.classifiers import VGG16, Inception, by_pieces, vgg16
from stylegan_pg.ops.recipes import multiplies_bf16
from stylegan_pg.untrusted import open_regular, printable

FEATURES = {"pool", "fc2"}  # of which an extractor gives one at least
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


RESAVE = "where you trust it, save its state_dict() with torch.save, or as .safetensors"


@dataclass(frozen=True)
class Weights:
    """Where the published weights of a network come from, how they begin to be recognised, and their name."""

    file: str
    url: str
    variable: str
    key: str  # a tensor that only this network has
    sha256: str  # how the published file's hash begins, "" where nobody says


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
    return cache_folder() / "weights"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors or .pth file; nothing in it is run.

    Raises:
        UsageError: for a file that is missing, or holds something else.
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
    """Whether this is a tensor that is just numbers in memory."""
    return isinstance(t, torch.Tensor) and t.layout == torch.strided and t.is_cpu and not t.is_quantized


def _check_pth(path: Path) -> None:
    """Refuse what torch.load does not read as a table of tensors alone, before it gets to see it. A TorchScript archive
    is a program: before 2.6 torch.load gives it to torch.jit.load, which runs parts of it, also with weights_only. The
    names of an archive's members are never compressed, so the one that only such an archive has is found wherever
    readers of zips look for it.

    Raises:
        UsageError: saying what to do; OSError: the file cannot be read.
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
    """The weights of "inception", "vgg16" or "lpips": among `files`, else by environment variable, else in a cache.

    Raises:
        UsageError: naming the file and where to put it; or a file that none of the networks fits.
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
    raise UsageError(
        f"the weights of {network} are missing: fetch {wanted.url}{wanted.file} and put it into {weights_folder()}, or "
        f"name the file by --weights, metrics.weights or {wanted.variable} (metrics that need no network: swd, ms_ssim)"
    )


def rgb(x: torch.Tensor) -> torch.Tensor:
    """Grey [n, 1, H, W] three times, RGBA over white; [n, 3, H, W] of 0 to 255."""
    return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else over_white(x)


def pixels(images: torch.Tensor) -> torch.Tensor:
    """Colours of 16 x 16 areas, [n, 768] in 0 to 1: for what must run without weights."""
    return nn.functional.adaptive_avg_pool2d(images.float() / 255, 16).flatten(1)


def lpips(lin: dict[str, torch.Tensor], vgg: dict[str, torch.Tensor]) -> nn.Module:
    """The perceptual distance [n, 1, 1] of two batches of images in 0 to 255, float32 [n, 3, H, W] (Zhang et al. 2018).

    Raises:
        RuntimeError: for weights that do not fit.
    """
    import torch_fidelity.sample_similarity_lpips as fidelity_lpips

    network = vgg16(vgg)
    with (
        mock.patch.object(fidelity_lpips, "load_state_dict_from_url", return_value=lin),
        mock.patch.object(fidelity_lpips, "torchvision_load_pretrained_vgg16", return_value=network),
    ):
        return fidelity_lpips.SampleSimilarityLPIPS("lpips").to(memory_format=torch.channels_last)


class Distance:
    """float32 [n, 3, H, W] twice, in 0 to 255 -> [n]; `mark` as an Extractor's."""

    def __init__(self, module: nn.Module, mark: str):
        self.module, self.mark = module, mark

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        values = 64 * a.shape[2] * a.shape[3]  # of VGG16's first convolutions
        return by_pieces(lambda a, b: self.module(a, b).flatten(), a, b, values=values, dtype=torch.float32)


def load_distance(files: Sequence[str | Path], device: torch.device) -> Distance:
    """
    Raises:
        UsageError: for weights that are missing or do not fit.
    """
    (path, lin), (vgg_path, vgg) = (find_weights(name, files) for name in ("lpips", "vgg16"))
    try:
        module = lpips(lin, vgg)
    except RuntimeError as error:
        raise _misfit(f"{path} and {vgg_path}", "lpips", error) from None
    hashes = {name: _checked(file, name) for name, file in (("lpips", path), ("vgg16", vgg_path))}
    mark = "".join(f"@{sha[:8]}" for name, sha in hashes.items() if not _is_published(sha, name))
    return Distance(module.to(device), mark)


def _misfit(path: object, network: str, error: Exception) -> UsageError:
    return UsageError(
        f"the weight file {path} does not fit {network}: {printable(str(error).splitlines()[-1].strip()[:200])}"
    )


def _is_published(sha256: str, network: str) -> bool:
    known = WEIGHTS[network].sha256
    return bool(known) and sha256.startswith(known)


def _checked(path: Path, network: str) -> str:
    """A weight file's checksum.

    Raises:
        UsageError: for a file that bears the published one's name without being it.
    """
    sha, known = _sha256(path), WEIGHTS[network]
    if path.name == known.file and known.sha256 and not _is_published(sha, network):
        raise UsageError(f"{path} has the published weights' name, but not their checksum: fetch or rename it")
    return sha


class Extractor:
    """uint8 [n, C, H, W] -> {feature: float32 [n, d] on the CPU}.

    Attributes:
        identity: what a cache may know it by: network, weights, number format.
        mark: what a metric's name ends with, empty for the published weights in float32.
        lasting: whether the identity says all that its features depend on.
    """

    def __init__(
        self,
        module: Callable[[torch.Tensor], Any],
        identity: str,
        mark: str,
        device: torch.device,
        lasting: bool = True,
    ):
        self.module, self.identity, self.mark, self.device, self.lasting = module, identity, mark, device, lasting
        self.widths: dict[str, int] = {}  # of the features that it has given so far

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Raises:
            UsageError: for what is no finite number, or has another shape from image to image; and for what a user's
                extractor raises.
        """
        given, name = rgb(images.to(self.device)), self.identity.removesuffix("-")
        try:
            found = self.module(given)
        except (MemoryError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:  # it may be the user's, and anything can happen
            raise UsageError(f"the extractor {name} fails: {type(error).__name__}: {error}") from None
        found = dict(found) if isinstance(found, Mapping) else {"pool": found}
        what = f"the extractor {name} must give [{len(images)}, d] features"
        if other := [type(f).__name__ for f in found.values() if not isinstance(f, torch.Tensor) or f.is_complex()]:
            raise UsageError(f"{what}, tensors of real numbers, not {', '.join(other)}")
        shapes = {kind: list(f.shape) for kind, f in found.items()}
        if (
            any(f.ndim != 2 or len(f) != len(images) or not f.shape[1] for f in found.values())
            or not FEATURES & shapes.keys()
        ):
            raise UsageError(f"{what}, not {shapes}")
        features = {kind: f.float().cpu() for kind, f in found.items()}
        for kind, f in features.items():
            width = self.widths.setdefault(kind, f.shape[1])
            if f.shape[1] != width:
                raise UsageError(f"{what} of one width, not {f.shape[1]} after {width}")
            if bad := int((~f.isfinite()).any(dim=1).sum()):
                raise UsageError(
                    f"the extractor {name} gives features that are not finite (NaN or infinity), of {bad} of "
                    f"{len(f)} images: mend it, or take another one"
                )
        return features


def check_precision(name: str) -> None:
    """
    Raises:
        UsageError: for what is no precision of feature networks.
    """
    if name not in DTYPES:
        raise UsageError(f"metrics precision {printable(repr(name), 60)} is not possible: {' or '.join(DTYPES)}")


def load_extractor(network: str, files: Sequence[str | Path], device: torch.device, precision: str) -> Extractor:
    """inception, vgg16, pixels (needs no weights), or the importable name of a factory, "package.module:function".

    precision: fp32, or bf16; a CPU without instructions for bfloat16 rounds the weights to it, and computes in float32.

    A factory takes no arguments and returns a callable: uint8 RGB [n, 3, H, W] -> float [n, d]. Statistics of real
    images are kept on disk if it has a text `identity`, which is to change with its code and weights.

    Raises:
        UsageError: for weights that are missing or do not fit, and factories that cannot be imported.
    """
    check_precision(precision)
    if network == "pixels":
        return Extractor(pixels, "pixels", "@pixels", device)
    if network not in WEIGHTS:
        return _imported(network, device)
    path, state = find_weights(network, files)
    with ThreadPoolExecutor(1) as beside:
        checksum = beside.submit(_checked, path, network)
        try:
            module: nn.Module = {"inception": Inception, "vgg16": VGG16}[network](state)
        except RuntimeError as error:
            raise _misfit(path, network, error) from None
        module = module.requires_grad_(False).eval().to(device, DTYPES[precision])
        rounded = precision == "bf16" and device.type == "cpu" and not multiplies_bf16()
        if rounded:  # in a quarter of the time that convolutions of bfloat16 take there
            module = module.float()
        module, sha = module.to(memory_format=torch.channels_last), checksum.result()
    mark = ("" if _is_published(sha, network) else f"@{sha[:8]}") + ("" if precision == "fp32" else f"@{precision}")
    identity = f"{network}-{sha[:16]}-{precision}" + ("-weights" if rounded else "")
    return Extractor(module, identity, mark, device)


def _imported(name: str, device: torch.device) -> Extractor:
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        raise UsageError(f"extractor {name!r} is not possible: pixels, or an importable name, package.module:function")
    where, function = name.split(":")
    try:
        module = getattr(importlib.import_module(where), function)()
        if isinstance(module, nn.Module):
            with contextlib.suppress(NotImplementedError):  # an exported program is in the mode that it was exported in
                module.eval()
            module = module.requires_grad_(False).to(device)
    except Exception as error:  # it is the user's, and anything can happen
        raise UsageError(f"the extractor {name} cannot be had: {type(error).__name__}: {error}") from None
    given = getattr(module, "identity", "")
    identity = given if isinstance(given, str) else ""  # a network may have a layer of that name
    return Extractor(module, f"{name}-{identity}", f"@{name}", device, lasting=bool(identity))
