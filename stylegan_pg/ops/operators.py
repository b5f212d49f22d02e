"""Registration of operators with PyTorch, and a fast path that bypasses its dispatcher.

Calling a Python function through the dispatcher takes about 0.1 ms, or 0.3 ms with a gradient, which is as much as the
computation on a small image. The dispatcher is needed only if something observes or replaces operators: torch.compile,
export, tracing, FLOP counters and other dispatch modes, fake and other special tensors, torch.func, or the profiler.
Both paths run the same functions and give the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch

# These functions return whether something observes operators. They are not public in PyTorch. If one is missing, all
# calls go through the dispatcher.
_WATCHERS: list[Any] = [
    getattr(torch._C, "_len_torch_dispatch_stack", None),  # FLOP counters, fake tensors, make_fx, export
    getattr(torch._C, "_len_torch_function_stack", None),
    getattr(torch._C, "_are_functorch_transforms_active", None),
    getattr(torch._C, "_is_tracing", None),
    getattr(torch.autograd, "_profiler_enabled", None),  # a profile must show the operators' names
]
_SURE = None not in _WATCHERS and hasattr(torch._C, "_dispatch_keys")
_TYPES = (torch.Tensor, torch.nn.Parameter)


@functools.cache
def _ordinary(cuda: bool) -> frozenset[int]:
    """Return the dispatch keys of ordinary tensors, which are not negated, zero, sparse, wrapped or fake."""
    keys = set()
    for inference in (False, True):
        with torch.inference_mode(inference):
            t = torch.empty(0, device="cuda" if cuda else "cpu")
            keys.add(torch._C._dispatch_keys(t).raw_repr())
    return frozenset(keys)


def watched(tensors: Iterable[torch.Tensor]) -> bool:
    """Return whether something observes operators, so that a call must go through the dispatcher."""
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
    """Register the implementation of an operator, and return a function that calls it.

    Args:
        library: The library in which the operator has been defined.
        name: The operator's name without the namespace stylegan_pg.
        compute: The function that computes the result from the operator's positional arguments. It must not record
            gradients.
        fake: A function with the same arguments that returns a result without data.
        setup, backward: As for torch.library.register_autograd; None for an operator without derivative.
    """
    library.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"stylegan_pg::{name}", fake, lib=library)
    if setup is not None and backward is not None:
        torch.library.register_autograd(f"stylegan_pg::{name}", backward, setup_context=setup, lib=library)
    through = getattr(torch.ops.stylegan_pg, name).default

    def forward(ctx, *args):  # with a separate setup_context, PyTorch would inspect the signature at every call
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
