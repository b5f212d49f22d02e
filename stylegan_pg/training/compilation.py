"""torch.compile for the passes of a step that are differentiated once.

Losses that are differentiated twice (R1, path length) run eagerly, because torch.compile does not support that. If a
system cannot be compiled on this machine (no compiler, an unknown operation), all of it runs eagerly, on all ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from stylegan_pg.distributed import process_group as dist
from stylegan_pg.systems.base import System


def compile_system(system: System, trial: Callable[[], None]) -> str:
    """Compile the modules that a system names, and run `trial`, a forward and backward pass through them. Return the
    reason why that failed, or "".

    A collective call. If one rank cannot compile, all run eagerly, because the others would wait for it anyway.
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
    """A context in which compiled modules run eagerly; it changes nothing unless `on`."""
    return torch.compiler.set_stance("force_eager") if on else contextlib.nullcontext()
