"""Registration of operators with PyTorch, and a fast path that bypasses its dispatcher.

A Python function called through the dispatcher costs about 0.1 ms, and 0.3 ms with a gradient, which is as much as the
work on a small image. The dispatcher is needed only if something observes or replaces operators: torch.compile, export,
tracing, FLOP counters and other dispatch modes, fake and other special tensors, torch.func, the profiler. Both paths
run the same functions and give the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch

# Functions that say whether something observes operators. They are not public in PyTorch; if one is missing, the
# dispatcher is always used.
_WATCHERS: list[Any] = [
    getattr(torch._C, "_len_torch_dispatch_stack", None),  # FLOP counters, fake tensors, make_fx, export
    getattr(torch._C, "_len_torch_function_stack", None),
    getattr(torch._C, "_are_functorch_transforms_active", None),
    getattr(torch._C, "_is_tracing", None),
    getattr(torch.autograd, "_profiler_enabled", None),  # so that operators have their names in a profile
]
_SURE = None not in _WATCHERS and hasattr(torch._C, "_dispatch_keys")
_TYPES = (torch.Tensor, torch.nn.Parameter)


@functools.cache
def _ordinary(cuda: bool) -> frozenset[int]:
    """The dispatch keys of plain tensors: not negated, zero, sparse, wrapped or fake."""
    keys = set()
    for inference in (False, True):
        with torch.inference_mode(inference):
            t = torch.empty(0, device="cuda" if cuda else "cpu")
            keys.add(torch._C._dispatch_keys(t).raw_repr())
    return frozenset(keys)


def watched(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether something observes operators, so that the call must go through the dispatcher."""
    if torch.compiler.is_compiling() or not _SURE:
        return True
    for watcher in _WATCHERS:
        if watcher():
            return True
    for t in tensors:
        if type(t) not in _TYPES or torch._C._dispatch_keys(t).raw_repr() not in _ordinary(t.is_cuda):
            return True
    return False


def operator(
    library: torch.library.Library,
    name: str,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    setup: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register the implementation of an operator that `library` has defined, and return the function that calls it.

    Args:
        name: of the operator, without the namespace stylegan_pg.
        compute: computes the result from the operator's positional arguments; it must not record gradients.
        fake: the same for tensors without data.
        setup, backward: as for torch.library.register_autograd; None for an operator without a derivative.
    """
    library.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"stylegan_pg::{name}", fake, lib=library)
    if setup is not None and backward is not None:
        torch.library.register_autograd(f"stylegan_pg::{name}", backward, setup_context=setup, lib=library)
    through = getattr(torch.ops.stylegan_pg, name).default

    def forward(ctx, *args):  # with a setup_context, PyTorch would inspect the signature at every call
        output = compute(*args)
        if setup is not None:
            setup(ctx, args, output)
        return output

    parts = {"forward": staticmethod(forward)}
    if backward is not None:
        parts["backward"] = staticmethod(backward)
    function: Any = type(name, (torch.autograd.Function,), parts)

    def call(*args: Any) -> Any:
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if watched(tensors):
            return through(*args)
        if backward is not None and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return function.apply(*args)
        return compute(*args)

    return call
