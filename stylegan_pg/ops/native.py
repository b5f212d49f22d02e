"""Which implementation an operation uses here, and the calls into the compiled ones.

STYLEGAN_PG_KERNELS: `auto` (kernels for the tensors' device, the reference where they cannot be built, with one
warning), `cpu` or `cuda` (kernels on that device only), `reference` (none), `strict` (as auto, but a failure is an
error).
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from stylegan_pg import dist
from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.ops import build
from stylegan_pg.ops.reference import ACTIVATIONS, is_channels_last

MODES = ("auto", "cuda", "cpu", "reference", "strict")
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
SUPPORTED = {"cpu": (torch.float32, torch.float64, torch.bfloat16)}
ACTS = {name: i for i, name in enumerate(ACTIVATIONS)}


@dataclass(frozen=True)
class Choice:
    """What the operations on one kind of device use: "cpu", "cuda" or "reference", why, and where it came from."""

    name: str
    why: str
    built: build.Built | None = None
    log: str = ""
    remedy: str = ""


def mode() -> str:
    chosen = os.environ.get("STYLEGAN_PG_KERNELS", "auto").lower() or "auto"
    if chosen not in MODES:
        raise UsageError(f"STYLEGAN_PG_KERNELS={chosen!r} is unknown: choose from {', '.join(MODES)}")
    return chosen


_forced: dict[str, str] = {}  # device -> why the reference was agreed upon


@functools.cache
def _choose(device: str, mode_: str) -> Choice:
    if device not in build.RECIPES:
        return Choice("reference", f"there are no kernels for {device}")
    if mode_ == "reference" or mode_ not in ("auto", "strict", device):
        return Choice("reference", f"STYLEGAN_PG_KERNELS={mode_}")
    try:
        built = build.load(device)
    except build.BuildError as error:
        if mode_ == "strict":
            raise RunError(f"no {device} kernels: {error} (STYLEGAN_PG_KERNELS=strict)") from None
        if dist.is_main():
            print(f"warning: plain PyTorch stands in for the {device} kernels: {error}", file=sys.stderr)
        return Choice("reference", error.cause, log=error.log, remedy=error.remedy)
    _declare(built.library)
    return Choice(device, f"{built.origin}: {built.path}", built, str(built.path.parent / "build.log"))


def choose(device: str) -> Choice:
    """The implementation for tensors on `device` ("cpu", "cuda", ...), built at the first call.

    Raises:
        RunError: in strict mode, where the kernels cannot be built; UsageError: an unknown mode.
    """
    if device in _forced:
        return Choice("reference", _forced[device])
    return _choose(device, mode())


def agree(device: str) -> str:
    """Have all ranks use the same implementation on `device`: the reference, unless all have the same other one.

    Returns its name. A collective call.

    Raises:
        RunError: on all ranks, where one fails in strict mode.
    """
    fault, name = "", ""
    try:
        name = choose(device).name
    except RunError as error:
        fault = str(error)
    told = dist.gather_objects((name, fault))
    faults = [f"rank {i}: {f}" for i, (_, f) in enumerate(told) if f]
    if faults:
        raise RunError("; ".join(faults))
    names = [n for n, _ in told]
    if len(set(names)) > 1:
        missing = [i for i, n in enumerate(names) if n == "reference"]
        _forced[device] = f"ranks {missing} have no kernels"
        if dist.is_main():
            print(f"warning: plain PyTorch stands in for the {device} kernels: {_forced[device]}", file=sys.stderr)
        return "reference"
    return names[0]


def check_device(device: str) -> None:
    """
    Raises:
        UsageError: for a device that is not here.
    """
    if device not in ("cpu", "cuda"):
        raise UsageError(f"--device {device!r} is unknown: choose cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda, but torch finds no CUDA device")


def status() -> str:
    """What `stylegan-pg kernels` prints."""
    lines = [f"STYLEGAN_PG_KERNELS={mode()}, torch {torch.__version__}, cache {build.cache_folder()}"]
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        try:
            choice = choose(device)
        except RunError as error:
            lines.append(f"{device}: none. {error}")
            continue
        formats = ", ".join(str(d).removeprefix("torch.") for d in SUPPORTED.get(device, ()))
        for op in ("upfirdn2d", "bias_act"):
            what = f"{device} kernels for {formats}; plain PyTorch for the rest" if choice.built else "plain PyTorch"
            lines.append(f"{device} {op}: {what}")
        lines.append(f"  why: {choice.why}")
        lines += [f"  log: {choice.log}"] if choice.log else []
        lines += [f"  remedy: {choice.remedy}"] if choice.remedy else []
    return "\n".join(lines)


def build_all(into: Path | None) -> list[str]:
    """Build what this machine can use, and copy it `into` a folder for STYLEGAN_PG_PREBUILT; returns what was done.

    Raises:
        RunError: where something cannot be built or copied.
    """
    done = []
    for kind in ["cpu", *(["cuda"] if torch.cuda.is_available() and "cuda" in build.RECIPES else [])]:
        try:
            built = build.load(kind)
            done.append(f"{kind}: {built.origin}, {built.path}")
            if into:
                target = into / built.path.parent.name
                shutil.copytree(built.path.parent, target, dirs_exist_ok=True)
                done.append(f"{kind}: copied to {target}")
        except build.BuildError as error:
            raise RunError(f"no {kind} kernels: {error}") from None
        except OSError as error:
            raise RunError(f"{into} cannot be written: {error}") from None
    return done


def compiled(x: torch.Tensor) -> ctypes.CDLL | None:
    """The kernels for a tensor, or None where the reference is to be used."""
    device = x.device.type
    if x.dtype not in SUPPORTED.get(device, ()):
        return None
    built = choose(device).built
    return built.library if built else None


# ------------------------------------------------------------------------------------------------------- the calls

_PTR, _I64, _INT, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
_BIAS_ACT = [_I64, _I64, _I64, _INT, _PTR, _PTR, _I64, _PTR, _I64, _DOUBLE, _DOUBLE]


def _declare(lib: ctypes.CDLL) -> None:
    lib.spg_upfirdn2d_cpu.argtypes = [_INT, _PTR, _PTR, _PTR, *[_I64] * 6, *[_INT] * 10, _DOUBLE]
    lib.spg_bias_act_cpu.argtypes = [_INT, _INT, _INT, _PTR, _PTR, _PTR, _PTR, *_BIAS_ACT]
    lib.spg_bias_act_backward_cpu.argtypes = [_INT, _INT, *[_PTR] * 6, *_BIAS_ACT]
    lib.spg_bias_act_chunks_cpu.argtypes = [_I64, _I64, _INT]
    lib.spg_bias_act_chunks_cpu.restype = _I64


def dense(x: torch.Tensor) -> tuple[torch.Tensor, torch.memory_format]:
    """x without gaps in memory, in the layout that it has, and that layout."""
    if is_channels_last(x):
        return x, torch.channels_last
    return x.contiguous(), torch.contiguous_format


def factors(f: torch.Tensor, correlate: bool, gain: float) -> list[float] | None:
    """fx and fy, 4 values each, whose outer product is gain times the filter [4, 4] in the orientation of a
    correlation; None where there are none or the filter has another size."""
    if list(f.shape) != [4, 4]:
        return None
    f = f.double() * gain if correlate else f.double().flip([0, 1]) * gain
    row, column = divmod(int(f.abs().argmax()), 4)
    if not math.isfinite(float(f[row, column])) or not f[row, column]:
        return None
    fx, fy = f[row], f[:, column] / f[row, column]
    if (torch.outer(fy, fx) - f).abs().max() > 1e-7 * f.abs().max():
        return None
    return [*fx.tolist(), *fy.tolist()]


def upfirdn2d(
    lib: ctypes.CDLL,
    x: torch.Tensor,
    f: torch.Tensor,
    up: Sequence[int],
    down: Sequence[int],
    padding: Sequence[int],
    flip_filter: bool,
    gain: float,
    out_size: tuple[int, int],
) -> torch.Tensor:
    """reference.upfirdn2d by a compiled kernel; out_size is (height, width)."""
    x, layout = dense(x)
    n, c, h, w = x.shape
    y = torch.empty([n, c, *out_size], dtype=x.dtype, device=x.device, memory_format=layout)
    f = f.to("cpu", torch.float32).contiguous()
    code = lib.spg_upfirdn2d_cpu(
        DTYPES[x.dtype], x.data_ptr(), y.data_ptr(), f.data_ptr(), n, c, h, w, *out_size, *up, *down,
        padding[0], padding[2], f.shape[0], f.shape[1], layout == torch.channels_last, flip_filter, gain,
    )  # fmt: skip
    assert code == 0
    return y


@functools.lru_cache(maxsize=256)
def _constant(value: float, count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full([count], value, dtype=dtype, device=device)


class Tail:
    """The arguments that bias_act, its derivatives and its backward pass share, as the kernels take them."""

    def __init__(self, x, bias, scale, noise, act: str, gain: float, clamp: float | None, dim: int):
        self.x, self.layout = dense(x)
        self.act = ACTS[act]
        shape = x.shape
        if self.layout == torch.channels_last and dim == 1:
            self.n, self.c, self.inner, self.pixels = shape[0], shape[1], shape[2] * shape[3], True
        else:
            if self.layout == torch.channels_last:
                self.x, self.layout = x.contiguous(), torch.contiguous_format
            self.n, self.c, self.inner, self.pixels = shape[:dim].numel(), shape[dim], shape[dim + 1 :].numel(), False
            if self.inner == 1 and scale is None and noise is None:  # rows of c values
                self.n, self.inner, self.pixels = 1, self.n, True
        acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.acc = acc
        self.bias = _constant(0.0, self.c, acc, x.device) if bias is None else bias.to(acc).contiguous()
        self.scale = _constant(1.0, self.c, acc, x.device) if scale is None else scale.to(acc).contiguous()
        self.noise = None if noise is None else noise.to(acc).contiguous()
        self.args = (
            self.n, self.c, self.inner, self.pixels, self.bias.data_ptr(),
            self.scale.data_ptr(), self.c if scale is not None and len(scale) > 1 else 0,
            None if self.noise is None else self.noise.data_ptr(),
            self.inner if self.noise is not None and len(self.noise) > 1 else 0,
            gain, -1.0 if clamp is None else clamp,
        )  # fmt: skip

    def alike(self, t: torch.Tensor) -> torch.Tensor:
        return t.to(self.x.dtype).contiguous(memory_format=self.layout)

    def elementwise(self, lib: ctypes.CDLL, order: int, *given: torch.Tensor) -> torch.Tensor:
        """f(z), or with g given g f'(z), or with g and h given g h f''(z)."""
        out = torch.empty_like(self.x, memory_format=self.layout)
        tensors = [self.alike(t) for t in given]  # kept alive while their addresses are used
        g, h = ([t.data_ptr() for t in tensors] + [None, None])[:2]
        code = lib.spg_bias_act_cpu(
            DTYPES[out.dtype], self.act, order, self.x.data_ptr(), g, h, out.data_ptr(), *self.args
        )
        assert code == 0
        return out

    def backward(self, lib: ctypes.CDLL, dy: torch.Tensor, with_bias: bool, with_scale: bool, with_noise: bool):
        """dx, and the sums over everything that share a bias [c], a scale [n, c] and a noise value [n, inner]."""
        dy = self.alike(dy)
        dx = torch.empty_like(self.x, memory_format=self.layout)
        rows = [self.n, lib.spg_bias_act_chunks_cpu(self.c, self.inner, self.pixels), self.c]
        empty = functools.partial(torch.empty, dtype=self.acc, device=dy.device)
        sums, products = empty(rows) if with_bias else None, empty(rows) if with_scale else None
        over_channels = empty([self.n, self.inner]) if with_noise else None
        sizes = [None if t is None else t.data_ptr() for t in (sums, products, over_channels)]
        code = lib.spg_bias_act_backward_cpu(
            DTYPES[dx.dtype], self.act, dy.data_ptr(), self.x.data_ptr(), dx.data_ptr(), *sizes, *self.args
        )
        assert code == 0
        return (
            dx,
            None if sums is None else sums.sum(dim=[0, 1]),
            None if products is None else products.sum(dim=1),
            over_channels,
        )
