"""The choice between the compiled kernels and the reference implementation, which is the same on all ranks.

The environment variable STYLEGAN_PG_KERNELS has one of these values:

- auto: kernels for the tensors' device; if they cannot be built, the reference, with one warning
- cpu, cuda: kernels on this device only
- reference: no kernels
- strict: as auto, but a failed build, or a dtype or size without a kernel, is an error
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from stylegan_pg.distributed import process_group as dist
from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.files import cache_folder
from stylegan_pg.ops import build
from stylegan_pg.ops.calls import BiasAct, Kernels
from stylegan_pg.ops.recipes import RECIPES, BuildError, has_bf16_instructions

log = logging.getLogger(__name__)

MODES = ("auto", "cuda", "cpu", "reference", "strict")
SUPPORTED = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16),
    "cuda": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
}


@dataclass(frozen=True)
class Choice:
    """The implementation for one kind of device.

    Attributes:
        name: "cpu", "cuda" or "reference".
        reason: Why it was chosen.
        built, kernels: The library and its functions; None for the reference.
        log: The path of the compiler's output, or "".
        remedy: How to get kernels if they cannot be built, or "".
    """

    name: str
    reason: str
    built: build.Built | None = None
    kernels: Kernels | None = None
    log: str = ""
    remedy: str = ""


@functools.cache
def mode() -> str:
    """Return the value of STYLEGAN_PG_KERNELS at the first call.

    Raises:
        UsageError: if the value is unknown.
    """
    chosen = os.environ.get("STYLEGAN_PG_KERNELS", "").lower() or "auto"
    if chosen not in MODES:
        raise UsageError(f"STYLEGAN_PG_KERNELS={chosen!r} is unknown: choose from {', '.join(MODES)}")
    return chosen


_reference_reasons: dict[str, str] = {}  # {device: why all ranks use the reference}


@functools.cache
def _choose(device: str, mode_: str) -> Choice:
    if device not in RECIPES:
        return Choice("reference", f"there are no kernels for {device}")
    if mode_ == "reference" or mode_ not in ("auto", "strict", device):
        return Choice("reference", f"STYLEGAN_PG_KERNELS={mode_}")
    try:
        built, kernels = _load(device)
    except BuildError as error:
        if mode_ == "strict":
            raise RunError(f"no {device} kernels: {error} (STYLEGAN_PG_KERNELS=strict)") from None
        log.warning(f"plain PyTorch replaces the {device} kernels: {error}")
        return Choice("reference", error.cause, log=error.log, remedy=error.remedy)
    return Choice(device, f"{built.origin}: {built.path}", built, kernels, str(built.path.parent / "build.log"))


def _trial_tensors(device: str) -> list[torch.Tensor]:
    """Return a small tensor on each GPU. Kernels are tried on all of them, because machine code for another GPU can be
    loaded but not run."""
    count = torch.cuda.device_count() if device == "cuda" and torch.cuda.is_available() else 0
    return [torch.ones(8, device=f"cuda:{i}") for i in range(count)]


def _load(device: str) -> tuple[build.Built, Kernels]:
    """Load the kernels for a device and try them.

    Raises:
        BuildError: if there is no library, or it does not run on this machine's devices.
    """
    built = build.load(device)
    kernels = Kernels(device, built.library)
    for x in _trial_tensors(device):
        try:
            BiasAct(kernels, x, None, None, None, "linear", 1.0, None, 0).elementwise(0)
        except RuntimeError as error:
            cause, log = f"{built.path} does not run on {x.device}: {error}", str(built.path.parent / "build.log")
            remedy = "unset TORCH_CUDA_ARCH_LIST, or add this GPU's number to it; see that the driver is new enough"
            raise BuildError(cause, log, remedy) from None
    return built, kernels


def choose(device: str) -> Choice:
    """Return the implementation for tensors on `device` ("cpu", "cuda", ...). The kernels are built at the first call.

    Raises:
        RunError: if the kernels cannot be built in strict mode.
        UsageError: if STYLEGAN_PG_KERNELS has an unknown value.
    """
    if device in _reference_reasons:
        return Choice("reference", _reference_reasons[device])
    return _choose(device, mode())


def agree(device: str) -> str:
    """Make all ranks use the same implementation for `device`, and return its name. It is the reference unless all
    ranks have kernels. All ranks must call this.

    Raises:
        RunError: on all ranks, if a rank fails in strict mode.
    """
    fault, name, why = "", "", ""
    try:
        choice = choose(device)
        name, why = choice.name, "; ".join(filter(None, (choice.reason, choice.log, choice.remedy)))
    except RunError as error:
        fault = str(error)
    results = dist.gather_objects((name, fault, why))
    faults = [f"rank {i}: {f}" for i, (_, f, _) in enumerate(results) if f]
    if faults:
        raise RunError("; ".join(faults))
    names = [n for n, *_ in results]
    if len(set(names)) > 1:
        missing = [i for i, n in enumerate(names) if n == "reference"]
        _kernels.cache_clear()
        _reference_reasons[device] = f"ranks {missing} have no kernels (rank {missing[0]}: {results[missing[0]][2]})"
        log.warning(f"plain PyTorch replaces the {device} kernels: {_reference_reasons[device]}")
        return "reference"
    return names[0]


def check_device(device: str) -> None:
    """Check that `device` is "cpu" or "cuda" and available.

    Raises:
        UsageError: if it is unknown or does not exist on this machine.
    """
    if device not in ("cpu", "cuda"):
        raise UsageError(f"--device {device!r} is unknown: choose cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch finds no CUDA device; check the driver, or choose cpu")


def status() -> str:
    """Return the text that `stylegan-pg kernels` prints."""
    try:
        cache = str(cache_folder())
    except OSError as error:
        cache = f"none ({error})"
    lines = [f"STYLEGAN_PG_KERNELS={mode()}, torch {torch.__version__}, cache {cache}"]
    for device in RECIPES:
        if device == "cuda" and not torch.cuda.is_available():
            lines.append(
                "cuda: PyTorch finds no CUDA device (`kernels build --device cuda` compiles for other machines)"
            )
            continue
        try:
            choice = choose(device)
        except RunError as error:
            lines.append(f"{device}: none. {error}")
            continue
        formats = ", ".join(str(d).removeprefix("torch.") for d in SUPPORTED.get(device, ()))
        for op in ("upfirdn2d", "bias_act", "filtered_lrelu"):
            what = f"{device} kernels for {formats}; plain PyTorch for the rest" if choice.built else "plain PyTorch"
            lines.append(f"{device} {op}: {what}")
        if device == "cpu" and choice.built and not has_bf16_instructions():
            lines.append("cpu conv3x3: cpu kernels for bfloat16 (this processor has no bfloat16 instructions)")
        lines.append(f"  why: {choice.reason}")
        lines += [f"  log: {choice.log}"] if choice.log else []
        lines += [f"  remedy: {choice.remedy}"] if choice.remedy else []
    return "\n".join(lines)


def build_all(kinds: list[str], into: Path | None) -> list[str]:
    """Build kernels (`stylegan-pg kernels build`).

    Args:
        kinds: "cpu" and "cuda". If the list is empty, those that this machine can use are built.
        into: A folder to which the libraries are copied, for STYLEGAN_PG_PREBUILT; None for no copy.

    Returns:
        One line of text for each action.

    Raises:
        UsageError: if a kind is unknown.
        RunError: if a library cannot be built or copied.
    """
    if unknown := [kind for kind in kinds if kind not in RECIPES]:
        raise UsageError(f"--device {unknown[0]!r} is unknown: choose from {', '.join(RECIPES)}")
    done = []
    for kind in kinds or ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        try:
            built = build.load(kind)
            done.append(f"{kind}: {built.origin}, {built.path}")
            if into:
                target = into / built.path.parent.name
                shutil.copytree(built.path.parent, target, dirs_exist_ok=True)
                done.append(f"{kind}: copied to {target}")
        except BuildError as error:
            raise RunError(f"no {kind} kernels: {error}") from None
        except OSError as error:
            raise RunError(f"{into} cannot be written: {error}") from None
    return done


def compiled(x: torch.Tensor) -> Kernels | None:
    """Return the kernels for a tensor, or None if the reference must be used.

    Raises:
        RunError: if there are no kernels for this dtype and device in strict mode.
    """
    return _kernels(x.device.type, x.dtype)


@functools.cache  # it is called at every operation
def _kernels(device: str, dtype: torch.dtype) -> Kernels | None:
    if dtype in SUPPORTED.get(device, ()):
        return choose(device).kernels
    if mode() == "strict" and device != "meta":  # tensors on "meta" have no data
        raise RunError(f"there are no kernels for {dtype} on {device} (STYLEGAN_PG_KERNELS=strict)")
    return None


def warn_no_kernel(operation: str, x: torch.Tensor) -> None:
    """Warn once for each operation that its kernel does not support x's size, so that the reference is used.

    Raises:
        RunError: in strict mode.
    """
    where = f"{operation} has no kernel for {x.dtype} {list(x.shape)} on {x.device.type}"
    if mode() == "strict":
        raise RunError(f"{where} (STYLEGAN_PG_KERNELS=strict)")
    if operation not in _warned:
        log.warning(f"plain PyTorch is used instead: {where}")
    _warned.add(operation)


_warned: set[str] = set()  # operations for which a warning was printed
