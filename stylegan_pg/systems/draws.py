"""The random inputs of a step's losses: drawn on the host beforehand, and copied to the device together.

What a loss draws follows from (seed, nimg) alone. The first step of a kind draws its inputs when its losses ask for
them, and remembers what they asked for. `Draws.prepare` then draws everything for a later step of that kind at once,
which a trainer does while the device still computes the step before. Tensors of one dtype travel as one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from stylegan_pg.rng import generator

ALIGNED = 64  # numbers


class Streams:
    """The random streams of a step: streams(purpose, *key) is one of them."""

    def __init__(self, seed: int, nimg: int):
        self.seed, self.nimg = seed, nimg

    def __call__(self, purpose: str, *key: int) -> torch.Generator:
        return generator(self.seed, purpose, self.nimg, *key)


Kind = Hashable  # of steps whose losses draw the same


class Request(NamedTuple):
    """What a loss asks for.

    make: draws for a global batch, as nested tuples (also named ones), lists and dictionaries of tensors and None, each
        tensor with a row for each image. It is called again at later steps, so it must not hold on to a step.
    share: the places of this rank's images in that batch.
    """

    make: Callable[[Streams], Any]
    share: Sequence[int]


class Draws:
    """The inputs of the steps of one phase.

    device, dtype: where the losses compute, and the dtype that floating-point numbers get.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.requests: dict[Kind, dict[Any, Request]] = {}
        self.step: tuple[Kind, int, int] | None = None  # kind, seed, nimg
        self.values: dict[Any, Any] = {}  # of the present step
        self.prepared: tuple[tuple[Kind, int, int], dict[Any, Any]] | None = None  # of a later step

    def begin(self, kind: Kind, seed: int, nimg: int) -> None:
        """Start a step with what was prepared for it; without that, everything is drawn now, as far as its kind is
        known."""
        self.step = (kind, seed, nimg)
        if self.prepared is None or self.prepared[0] != self.step:
            self.prepare(kind, seed, nimg)
        self.values = self.prepared[1] if self.prepared and self.prepared[0] == self.step else {}
        self.prepared = None

    def prepare(self, kind: Kind, seed: int, nimg: int) -> None:
        """Draw what a later step will ask for, as far as its kind is known."""
        if known := self.requests.get(kind):
            self.prepared = (kind, seed, nimg), self._drawn(known, seed, nimg)

    def discard(self) -> None:
        """Forget what was prepared, because something else that it depended on has changed."""
        self.prepared = None

    def get(self, key: Any, request: Request) -> Any:
        """The rows of this rank's images, on the device. `key` names them within the step."""
        assert self.step is not None, "begin a step first"
        if key not in self.values:
            kind, seed, nimg = self.step
            self.values |= self._drawn({key: request}, seed, nimg)
            self.requests.setdefault(kind, {})[key] = request
        return self.values[key]

    def _drawn(self, requests: Mapping[Any, Request], seed: int, nimg: int) -> dict[Any, Any]:
        streams = Streams(seed, nimg)
        drawn = {
            key: mapped(request.make(streams), partial(rows_of, rows=request.share))
            for key, request in requests.items()
        }
        return moved(drawn, self.device, self.dtype)


def slices(rows: Sequence[int]) -> list[slice]:
    """Rows as slices, one if they are evenly spaced, as those of a micro-batch mostly are. Indexing by slices needs no
    copy of the numbers on the device."""
    found: list[slice] = []
    start = 0
    while start < len(rows):
        end = start + 1
        step = rows[end] - rows[start] if end < len(rows) and rows[end] > rows[start] else 1
        while end < len(rows) and rows[end] - rows[end - 1] == step:
            end += 1
        found.append(slice(rows[start], rows[end - 1] + 1, step))
        start = end
    return found


def rows_of(t: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Rows of a tensor, a view if they are evenly spaced."""
    parts = [t[one] for one in slices(rows)] or [t[:0]]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def put_rows(t: torch.Tensor, rows: Sequence[int], values: torch.Tensor) -> None:
    """Write values into rows of a tensor."""
    done = 0
    for one in slices(rows):
        part = t[one]
        part.copy_(values[done : done + len(part)])
        done += len(part)


def mapped(tree: Any, f: Callable[[torch.Tensor], Any]) -> Any:
    """Nested tuples, lists and dictionaries with f applied to each tensor."""
    if isinstance(tree, torch.Tensor):
        return f(tree)
    if isinstance(tree, dict):
        return {key: mapped(value, f) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(mapped(value, f) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(mapped(value, f) for value in tree)
    return tree


def moved(tree: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The tensors of nested tuples, lists and dictionaries on a device, floating-point numbers in `dtype`: copied there
    from pinned memory, those of one dtype as one."""
    given: list[torch.Tensor] = []
    mapped(tree, given.append)
    kinds = [dtype if t.is_floating_point() else t.dtype for t in given]
    arrived: dict[torch.dtype, list[torch.Tensor]] = {}
    for kind in dict.fromkeys(kinds):
        mine = [t for t, one in zip(given, kinds, strict=True) if one == kind]
        # All begin at places where kernels can read them as fast as tensors of their own, so that they choose the same.
        ends = list(itertools.accumulate(-(-t.numel() // ALIGNED) * ALIGNED for t in mine))
        begins = [0, *ends[:-1]]
        flat = torch.zeros([ends[-1]], dtype=kind, pin_memory=device.type == "cuda")
        for begin, t in zip(begins, mine, strict=True):
            flat[begin : begin + t.numel()] = t.reshape(-1)
        there = flat.to(device, non_blocking=True)
        arrived[kind] = [there[b : b + t.numel()].view(t.shape) for b, t in zip(begins, mine, strict=True)]
    turn = {kind: iter(tensors) for kind, tensors in arrived.items()}
    order = iter(kinds)
    return mapped(tree, lambda _: next(turn[next(order)]))
