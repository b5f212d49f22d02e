"""What CUDA graphs do, on a CPU: operations are recorded with their tensors, and replayed on the same memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stylegan_pg.planning.operations import tensors_in


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.made.append((func, args, kwargs or {}, result))
        return result


def places(values: Any) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors_in(values)}


class EmulatedGraphs:
    """`captures` and `replays` count."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def begin(self) -> None:
        pass

    def capture(
        self, function: Callable[[], Any], streams: Iterable[torch.Generator]
    ) -> tuple[Callable[[], None], Any]:
        self.captures += 1
        with _Tape() as tape:
            result = function()
        tape_ = list(tape.made)

        @torch.no_grad()
        def replay() -> None:
            self.replays += 1
            for func, args, kwargs, before in tape_:
                after = func(*args, **kwargs)
                given = places([args, kwargs])
                for old, new in zip(tensors_in(before), tensors_in(after), strict=True):
                    if old.numel() and old.untyped_storage().data_ptr() not in given:
                        old.copy_(new)

        return replay, result
