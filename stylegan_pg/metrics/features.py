"""Feature extractors: torch-fidelity's networks with weights that were read from files, or the user's."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stylegan_pg.errors import UsageError
from stylegan_pg.images import over_white
from stylegan_pg.metrics.classifiers import VGG16, Inception, by_pieces
from stylegan_pg.metrics.weights import WEIGHTS, checked, find_weights, is_published, misfit
from stylegan_pg.ops.recipes import multiplies_bf16
from stylegan_pg.untrusted import printable

FEATURES = {"pool", "fc2"}  # of which an extractor gives one at least
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def rgb(x: torch.Tensor) -> torch.Tensor:
    """Return images [n, 3, H, W] in 0 to 255: three equal channels for grey ones, RGBA ones laid over white."""
    return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else over_white(x)


def pixels(images: torch.Tensor) -> torch.Tensor:
    """Return the mean colours of 16 x 16 areas, [n, 768] in 0 to 1, as features that need no weights."""
    return nn.functional.adaptive_avg_pool2d(images.float() / 255, 16).flatten(1)


class Distance:
    """A function of two batches of images, float32 [n, 3, H, W] in 0 to 255, that gives distances [n]. `mark` is what
    an Extractor's is."""

    def __init__(self, module: nn.Module, mark: str):
        self.module, self.mark = module, mark

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        values = 64 * a.shape[2] * a.shape[3]  # of VGG16's first convolutions
        return by_pieces(lambda a, b: self.module(a, b).flatten(), a, b, values=values, dtype=torch.float32)


def load_distance(files: Sequence[str | Path], device: torch.device) -> Distance:
    """Load the perceptual distance LPIPS with weights from these files, or from where `find_weights` looks.

    Raises:
        UsageError: if weights are missing or do not fit.
    """
    (path, lin), (vgg_path, vgg) = (find_weights(name, files) for name in ("lpips", "vgg16"))
    from stylegan_pg.metrics.lpips import LPIPS  # which imports torch-fidelity and torchvision

    try:
        module = LPIPS(lin, vgg)
    except RuntimeError as error:
        raise misfit(f"{path} and {vgg_path}", "lpips", error) from None
    hashes = {name: checked(file, name) for name, file in (("lpips", path), ("vgg16", vgg_path))}
    mark = "".join(f"@{sha[:8]}" for name, sha in hashes.items() if not is_published(sha, name))
    return Distance(module.to(memory_format=torch.channels_last).to(device), mark)


class Extractor:
    """A function of images, uint8 [n, C, H, W], that gives {feature: float32 [n, d] on the CPU}.

    Attributes:
        identity: A text that names network, weights and number format in the keys of cached statistics.
        mark: The end of the names of metrics that use it; empty for the published weights in float32.
        lasting: Whether the identity says all that its features depend on.
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
        """Return the features of images.

        Raises:
            UsageError: if they are not finite or of another shape than before, or if a user's extractor fails.
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
        _check_shapes(found, len(images), what)
        features = {kind: f.float().cpu() for kind, f in found.items()}
        for kind, f in features.items():
            width = self.widths.setdefault(kind, f.shape[1])
            if f.shape[1] != width:
                raise UsageError(f"{what} of one width, not {f.shape[1]} after {width}")
            _check_finite(f, name)
        return features


def _check_shapes(found: dict[str, Any], images: int, what: str) -> None:
    """Check that these are features [n, d] of so many images; a message begins with `what`."""
    if other := [type(f).__name__ for f in found.values() if not isinstance(f, torch.Tensor) or f.is_complex()]:
        raise UsageError(f"{what}, tensors of real numbers, not {', '.join(other)}")
    shapes = {kind: list(f.shape) for kind, f in found.items()}
    if any(f.ndim != 2 or len(f) != images or not f.shape[1] for f in found.values()) or not FEATURES & shapes.keys():
        raise UsageError(f"{what}, not {shapes}")


def _check_finite(features: torch.Tensor, name: str) -> None:
    """Check that an extractor's features are neither NaN nor infinite."""
    if bad := int((~features.isfinite()).any(dim=1).sum()):
        raise UsageError(
            f"the extractor {name} gives features that are not finite (NaN or infinity), of {bad} of "
            f"{len(features)} images: mend it, or take another one"
        )


def check_precision(name: str) -> None:
    """Check a number format of feature networks.

    Raises:
        UsageError: if it is neither fp32 nor bf16.
    """
    if name not in DTYPES:
        raise UsageError(f"metrics precision {printable(repr(name), 60)} is not possible: {' or '.join(DTYPES)}")


def load_extractor(network: str, files: Sequence[str | Path], device: torch.device, precision: str) -> Extractor:
    """Load an extractor of features.

    Args:
        network: "inception", "vgg16", "pixels" (needs no weights), or the importable name of a factory,
            "package.module:function". A factory takes no arguments and returns a function of uint8 RGB images
            [n, 3, H, W] that gives float [n, d]. Statistics of real images are kept on disk only if that function has a
            text `identity`, which must change with its code and weights.
        files: Files with weights; `find_weights` says where else they are looked for.
        precision: "fp32" or "bf16". A CPU without instructions for bfloat16 rounds the weights to it and computes in
            float32.

    Raises:
        UsageError: if weights are missing or do not fit, or a factory cannot be imported.
    """
    check_precision(precision)
    if network == "pixels":
        return Extractor(pixels, "pixels", "@pixels", device)
    if network not in WEIGHTS:
        return _imported(network, device)
    path, state = find_weights(network, files)
    with ThreadPoolExecutor(1) as beside:
        checksum = beside.submit(checked, path, network)
        try:
            module: nn.Module = {"inception": Inception, "vgg16": VGG16}[network](state)
        except RuntimeError as error:
            raise misfit(path, network, error) from None
        module = module.requires_grad_(False).eval().to(device, DTYPES[precision])
        rounded = precision == "bf16" and device.type == "cpu" and not multiplies_bf16()
        if rounded:  # in a quarter of the time that convolutions of bfloat16 take there
            module = module.float()
        module, sha = module.to(memory_format=torch.channels_last), checksum.result()
    mark = ("" if is_published(sha, network) else f"@{sha[:8]}") + ("" if precision == "fp32" else f"@{precision}")
    identity = f"{network}-{sha[:16]}-{precision}" + ("-weights" if rounded else "")
    return Extractor(module, identity, mark, device)


def _imported(name: str, device: torch.device) -> Extractor:
    """Return the extractor that a user's factory makes."""
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
