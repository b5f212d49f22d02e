"""The choice of an implementation of the operators by a process, and the agreement of all ranks on one.

STYLEGAN_PG_KERNELS is `auto` (kernels for the tensors' device, or the reference with one warning if they cannot be
built), `cpu` or `cuda` (kernels on that device only), `reference` (no kernels), or `strict` (as auto, but a failed
build, and dtypes or sizes without a kernel, are errors).
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from stylegan_pg.distributed import process_group as dist
from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.files import cache_folder
from stylegan_pg.ops import build
from stylegan_pg.ops.calls import Kernels, Tail
from stylegan_pg.ops.recipes import RECIPES, BuildError, multiplies_bf16

MODES = ("auto", "cuda", "cpu", "reference", "strict")
SUPPORTED = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16),
    "cuda": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
}


@dataclass(frozen=True)
class Choice:
    """The implementation for one kind of device ("cpu", "cuda" or "reference"), the reason, and its library."""

    name: str
    why: str
    built: build.Built | None = None
    kernels: Kernels | None = None
    log: str = ""
    remedy: str = ""


@functools.cache
def mode() -> str:
    """The value of STYLEGAN_PG_KERNELS at the first call.

    Raises:
        UsageError: the value is unknown.
    """
    chosen = os.environ.get("STYLEGAN_PG_KERNELS", "").lower() or "auto"
    if chosen not in MODES:
        raise UsageError(f"STYLEGAN_PG_KERNELS={chosen!r} is unknown: choose from {', '.join(MODES)}")
    return chosen


_forced: dict[str, str] = {}  # device -> why the reference was agreed upon


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
        if dist.is_main():
            print(f"warning: plain PyTorch stands in for the {device} kernels: {error}", file=sys.stderr)
        return Choice("reference", error.cause, log=error.log, remedy=error.remedy)
    return Choice(device, f"{built.origin}: {built.path}", built, kernels, str(built.path.parent / "build.log"))


def _here(device: str) -> list[torch.Tensor]:
    """A small tensor on each device that needs a trial, as machine code for other GPUs can be loaded but not run."""
    count = torch.cuda.device_count() if device == "cuda" and torch.cuda.is_available() else 0
    return [torch.ones(8, device=f"cuda:{i}") for i in range(count)]


def _load(device: str) -> tuple[build.Built, Kernels]:
    """
    Raises:
        BuildError: there is no library, or it does not run on this machine's devices.
    """
    built = build.load(device)
    kernels = Kernels(device, built.library)
    for x in _here(device):
        try:
            Tail(kernels, x, None, None, None, "linear", 1.0, None, 0).elementwise(0)
        except RuntimeError as error:
            cause, log = f"{built.path} does not run on {x.device}: {error}", str(built.path.parent / "build.log")
            remedy = "unset TORCH_CUDA_ARCH_LIST, or add this GPU's number to it; see that the driver is new enough"
            raise BuildError(cause, log, remedy) from None
    return built, kernels


def choose(device: str) -> Choice:
    """The implementation for tensors on `device` ("cpu", "cuda", ...); the kernels are built at the first call.

    Raises:
        RunError: the kernels cannot be built in strict mode. UsageError: the mode is unknown.
    """
    if device in _forced:
        return Choice("reference", _forced[device])
    return _choose(device, mode())


def agree(device: str) -> str:
    """Agree with all ranks on one implementation for `device`: the reference, unless all have the same kernels.

    A collective call. Returns the implementation's name.

    Raises:
        RunError: on all ranks, if one fails in strict mode.
    """
    fault, name, why = "", "", ""
    try:
        choice = choose(device)
        name, why = choice.name, "; ".join(filter(None, (choice.why, choice.log, choice.remedy)))
    except RunError as error:
        fault = str(error)
    told = dist.gather_objects((name, fault, why))
    faults = [f"rank {i}: {f}" for i, (_, f, _) in enumerate(told) if f]
    if faults:
        raise RunError("; ".join(faults))
    names = [n for n, *_ in told]
    if len(set(names)) > 1:
        missing = [i for i, n in enumerate(names) if n == "reference"]
        _kernels.cache_clear()
        _forced[device] = f"ranks {missing} have no kernels (rank {missing[0]}: {told[missing[0]][2]})"
        if dist.is_main():
            print(f"warning: plain PyTorch stands in for the {device} kernels: {_forced[device]}", file=sys.stderr)
        return "reference"
    return names[0]


def check_device(device: str) -> None:
    """
    Raises:
        UsageError: the device does not exist on this machine.
    """
    if device not in ("cpu", "cuda"):
        raise UsageError(f"--device {device!r} is unknown: choose cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda, but torch finds no CUDA device")


def status() -> str:
    """The text that `stylegan-pg kernels` prints."""
    try:
        cache = str(cache_folder())
    except OSError as error:
        cache = f"none ({error})"
    lines = [f"STYLEGAN_PG_KERNELS={mode()}, torch {torch.__version__}, cache {cache}"]
    for device in RECIPES:
        if device == "cuda" and not torch.cuda.is_available():
            lines.append("cuda: torch finds no CUDA device (kernels build --device cuda compiles for others)")
            continue
        try:
            choice = choose(device)
        except RunError as error:
            lines.append(f"{device}: none. {error}")
            continue
        formats = ", ".join(str(d).removeprefix("torch.") for d in SUPPORTED.get(device, ()))
        for op in ("upfirdn2d", "bias_act"):
            what = f"{device} kernels for {formats}; plain PyTorch for the rest" if choice.built else "plain PyTorch"
            lines.append(f"{device} {op}: {what}")
        if device == "cpu" and choice.built and not multiplies_bf16():
            lines.append("cpu conv3x3: cpu kernels for bfloat16 (as this processor has no instructions for it)")
        lines.append(f"  why: {choice.why}")
        lines += [f"  log: {choice.log}"] if choice.log else []
        lines += [f"  remedy: {choice.remedy}"] if choice.remedy else []
    return "\n".join(lines)


def build_all(kinds: list[str], into: Path | None) -> list[str]:
    """Build kernels (`stylegan-pg kernels build`).

    Args:
        kinds: "cpu", "cuda"; if empty, those that this machine can use.
        into: a folder into which they are copied, for STYLEGAN_PG_PREBUILT.

    Returns:
        Lines that say what was done.

    Raises:
        UsageError: a kind is unknown. RunError: a library cannot be built or copied.
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
    """The kernels for a tensor, or None if the reference has to be used.

    Raises:
        RunError: there are no kernels for such tensors in strict mode.
    """
    return _kernels(x.device.type, x.dtype)


@functools.cache  # this is called at every operation
def _kernels(device: str, dtype: torch.dtype) -> Kernels | None:
    if dtype in SUPPORTED.get(device, ()):
        return choose(device).kernels
    if mode() == "strict" and device != "meta":  # nothing is computed there
        raise RunError(f"there are no kernels for {dtype} on {device} (STYLEGAN_PG_KERNELS=strict)")
    return None


def refused(operation: str, x: torch.Tensor) -> None:
    """Warn once that a kernel does not support x's size and the reference is used instead.

    Raises:
        RunError: in strict mode.
    """
    where = f"{operation} has no kernel for {x.dtype} {list(x.shape)} on {x.device.type}"
    if mode() == "strict":
        raise RunError(f"{where} (STYLEGAN_PG_KERNELS=strict)")
    if operation not in _refused and dist.is_main():
        print(f"warning: plain PyTorch stands in: {where}", file=sys.stderr)
    _refused.add(operation)


_refused: set[str] = set()  # operations for which the warning was given
