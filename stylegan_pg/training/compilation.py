"""torch.compile for the passes of a step that are differentiated once.

What differentiates twice (R1, path length) stays eager, since torch.compile cannot do that; what cannot be compiled
here (no compiler, an operation it does not know) runs eagerly as a whole, on all ranks or on none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from stylegan_pg.distributed import process_group as dist
from stylegan_pg.systems.base import System


def compile_system(system: System, trial: Callable[[], None]) -> str:
    """Compile the modules that a system names, and run `trial`, a forward and backward pass through them; returns why
    that failed, or "".

    A collective call: the slowest rank sets the pace, so one that cannot compile makes all run eagerly.
    """
    if not hasattr(torch.compiler, "set_stance"):
        return "torch 2.6 or newer is needed"
    from torch._dynamo import config as dynamo  # not at the top: it takes a while

    # One frame serves all layers of a kind, each of another size.
    limit = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"
    setattr(dynamo, limit, max(getattr(dynamo, limit), 64))
    for module in system.compiled():
        module.compile(dynamic=False)
    fault = ""
    try:
        trial()
    except Exception as error:  # of many classes, from many layers
        fault = f"rank {dist.rank()}: {(str(error).strip() or type(error).__name__).splitlines()[0][:300]}"
    for net in system.net.values():
        net.zero_grad(set_to_none=True)
    faults = [f for f in dist.gather_objects(fault) if f]
    if faults:
        for module in system.compiled():
            module._compiled_call_impl = None  # type: ignore[assignment]  # as before; torch has no other way back
    return faults[0] if faults else ""


def eager(on: bool) -> contextlib.AbstractContextManager:
    """A stretch where torch.compile is not to be used, if it is used at all (`on`)."""
    return torch.compiler.set_stance("force_eager") if on else contextlib.nullcontext()
