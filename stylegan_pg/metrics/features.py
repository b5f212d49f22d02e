"""Feature extractors: Inception, VGG16 and LPIPS with weights from files, coarse pixels, or a user's own function."""

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
from stylegan_pg.metrics.classifiers import VGG16, Inception, in_chunks
from stylegan_pg.metrics.weights import WEIGHTS, find_weights, is_published, verified_checksum, weights_error
from stylegan_pg.ops.recipes import has_bf16_instructions
from stylegan_pg.untrusted import printable

FEATURES = {"pool", "fc2"}  # an extractor returns at least one of these
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def rgb(x: torch.Tensor) -> torch.Tensor:
    """Return images [n, 3, H, W] in [0, 255]. Grey images get three equal channels; RGBA is composited over white."""
    return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else over_white(x)


def pixels(images: torch.Tensor) -> torch.Tensor:
    """Return the mean colours of a 16 x 16 grid of areas, [n, 768] in [0, 1], as features that need no weights."""
    return nn.functional.adaptive_avg_pool2d(images.float() / 255, 16).flatten(1)


class Distance:
    """A function of two batches of images, float32 [n, 3, H, W] in [0, 255], that returns distances [n].

    Attributes:
        name_suffix: As in Extractor.
    """

    def __init__(self, module: nn.Module, name_suffix: str):
        self.module, self.name_suffix = module, name_suffix

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        values = 64 * a.shape[2] * a.shape[3]  # elements per image of the outputs of VGG16's first convolutions
        return in_chunks(lambda a, b: self.module(a, b).flatten(), a, b, values=values, dtype=torch.float32)


def load_distance(files: Sequence[str | Path], device: torch.device) -> Distance:
    """Load the perceptual distance LPIPS. `find_weights` says where weights are searched besides `files`.

    Raises:
        UsageError: if weights are missing or do not fit.
    """
    (path, lin), (vgg_path, vgg) = (find_weights(name, files) for name in ("lpips", "vgg16"))
    from stylegan_pg.metrics.lpips import LPIPS  # imported late, because it imports torch-fidelity and torchvision

    try:
        module = LPIPS(lin, vgg)
    except RuntimeError as error:
        raise weights_error(f"{path} and {vgg_path}", "lpips", error) from None
    hashes = {name: verified_checksum(file, name) for name, file in (("lpips", path), ("vgg16", vgg_path))}
    name_suffix = "".join(f"@{sha[:8]}" for name, sha in hashes.items() if not is_published(sha, name))
    return Distance(module.to(memory_format=torch.channels_last).to(device), name_suffix)


class Extractor:
    """A function of images, uint8 [n, C, H, W], that returns {feature: float32 [n, d] on the CPU}.

    Attributes:
        identity: A text that identifies network, weights and number format in the keys of cached statistics.
        name_suffix: A suffix that is appended to the names of metrics that use this extractor. It is empty for the
            published weights in float32.
        cacheable: Whether the identity determines the features, so that statistics may be cached on disk.
    """

    def __init__(
        self,
        module: Callable[[torch.Tensor], Any],
        identity: str,
        name_suffix: str,
        device: torch.device,
        cacheable: bool = True,
    ):
        self.module, self.identity, self.name_suffix, self.device, self.cacheable = (
            module,
            identity,
            name_suffix,
            device,
            cacheable,
        )
        self.widths: dict[str, int] = {}  # {feature: d} of all earlier calls

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the features of images.

        Raises:
            UsageError: if the features are not finite or have another width than before, or if a user's extractor
                fails.
        """
        given, name = rgb(images.to(self.device)), self.identity.removesuffix("-")
        try:
            found = self.module(given)
        except (MemoryError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:  # a user's code can raise anything
            raise UsageError(f"the extractor {name} failed: {type(error).__name__}: {error}") from None
        found = dict(found) if isinstance(found, Mapping) else {"pool": found}
        what = f"the extractor {name} must return features of shape [{len(images)}, d]"
        _check_shapes(found, len(images), what)
        features = {kind: f.float().cpu() for kind, f in found.items()}
        for kind, f in features.items():
            width = self.widths.setdefault(kind, f.shape[1])
            if f.shape[1] != width:
                raise UsageError(f"{what} of the same width d in every call, not {f.shape[1]} after {width}")
            _check_finite(f, name)
        return features


def _check_shapes(found: dict[str, Any], images: int, what: str) -> None:
    """Check that these are features [n, d] with n = `images`. An error message begins with `what`."""
    if other := [type(f).__name__ for f in found.values() if not isinstance(f, torch.Tensor) or f.is_complex()]:
        raise UsageError(f"{what}, tensors of real numbers, not {', '.join(other)}")
    shapes = {kind: list(f.shape) for kind, f in found.items()}
    if any(f.ndim != 2 or len(f) != images or not f.shape[1] for f in found.values()) or not FEATURES & shapes.keys():
        raise UsageError(f"{what}, not {shapes}")


def _check_finite(features: torch.Tensor, name: str) -> None:
    """Check that an extractor's features are neither NaN nor infinite."""
    if bad := int((~features.isfinite()).any(dim=1).sum()):
        raise UsageError(
            f"the extractor {name} returns features that are not finite (NaN or infinity), for {bad} of "
            f"{len(features)} images: correct it, or choose another extractor"
        )


def check_precision(name: str) -> None:
    """Check the name of a number format of feature networks.

    Raises:
        UsageError: if it is neither fp32 nor bf16.
    """
    if name not in DTYPES:
        raise UsageError(f"metrics precision {printable(repr(name), 60)} is unknown: choose {' or '.join(DTYPES)}")


def load_extractor(network: str, files: Sequence[str | Path], device: torch.device, precision: str) -> Extractor:
    """Load a feature extractor.

    Args:
        network: "inception", "vgg16", "pixels" (needs no weights), or the importable name of a factory,
            "package.module:function". A factory takes no arguments and returns a function that maps uint8 RGB images
            [n, 3, H, W] to float [n, d]. Statistics of real images are cached on disk only if that function has a
            text attribute `identity`, which must change with its code and weights.
        files: Files with weights. `find_weights` says where else weights are searched.
        device: The device of the network.
        precision: "fp32" or "bf16". On a CPU without bfloat16 instructions, the weights are rounded to bfloat16 and
            the computation uses float32.

    Raises:
        UsageError: if weights are missing or do not fit, or a factory cannot be imported.
    """
    check_precision(precision)
    if network == "pixels":
        return Extractor(pixels, "pixels", "@pixels", device)
    if network not in WEIGHTS:
        return _load_user_extractor(network, device)
    path, state = find_weights(network, files)
    with ThreadPoolExecutor(1) as background:
        checksum = background.submit(verified_checksum, path, network)
        try:
            module: nn.Module = {"inception": Inception, "vgg16": VGG16}[network](state)
        except RuntimeError as error:
            raise weights_error(path, network, error) from None
        module = module.requires_grad_(False).eval().to(device, DTYPES[precision])
        rounded = precision == "bf16" and device.type == "cpu" and not has_bf16_instructions()
        if rounded:  # without these instructions, float32 convolutions are four times as fast as those in bfloat16
            module = module.float()
        module, sha = module.to(memory_format=torch.channels_last), checksum.result()
    name_suffix = ("" if is_published(sha, network) else f"@{sha[:8]}") + (
        "" if precision == "fp32" else f"@{precision}"
    )
    identity = f"{network}-{sha[:16]}-{precision}" + ("-weights" if rounded else "")
    return Extractor(module, identity, name_suffix, device)


def _load_user_extractor(name: str, device: torch.device) -> Extractor:
    """Return the extractor that a user's factory creates."""
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        raise UsageError(
            f"the extractor {name!r} is unknown: give pixels, or an importable name such as package.module:function"
        )
    where, function = name.split(":")
    try:
        module = getattr(importlib.import_module(where), function)()
        if isinstance(module, nn.Module):
            with contextlib.suppress(NotImplementedError):  # an exported program cannot change its mode
                module.eval()
            module = module.requires_grad_(False).to(device)
    except Exception as error:  # a user's code can raise anything
        raise UsageError(f"the extractor {name} cannot be loaded: {type(error).__name__}: {error}") from None
    given = getattr(module, "identity", "")
    identity = given if isinstance(given, str) else ""  # it may be a layer that happens to have this name
    return Extractor(module, f"{name}-{identity}", f"@{name}", device, cacheable=bool(identity))
