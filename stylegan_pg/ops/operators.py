"""Operators that PyTorch knows of, called past its dispatcher where nobody would notice.

Through the dispatcher a function in Python costs about 0.1 ms a call, with a gradient 0.3: as much as the work on a
small image. It is there for those who look at operators or replace them (torch.compile, export, tracing, FLOP counters,
other dispatch modes, fake and other special tensors, torch.func, the profiler), so only where one of them is at work is
it needed. Both ways run the same functions, and give the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch

# Who may look at operators, told by functions that PyTorch does not call public: without any of them nothing is sure.
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
    """The dispatch keys of tensors that are just memory: not negated, zero, sparse, wrapped or fake."""
    keys = set()
    for inference in (False, True):
        with torch.inference_mode(inference):
            t = torch.empty(0, device="cuda" if cuda else "cpu")
            keys.add(torch._C._dispatch_keys(t).raw_repr())
    return frozenset(keys)


def watched(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether somebody could tell a call past the dispatcher from one through it."""
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
    """Register what an operator that `library` has defined computes, and return the function to call it by.

    Args:
        name: without the namespace stylegan_pg.
        compute: the result from the operator's arguments, all by position; it must record no gradient of its own.
        fake: the same for tensors without data.
        setup, backward: as torch.library.register_autograd has them; None where there is no derivative.
    """
    library.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"stylegan_pg::{name}", fake, lib=library)
    if setup is not None and backward is not None:
        torch.library.register_autograd(f"stylegan_pg::{name}", backward, setup_context=setup, lib=library)
    through = getattr(torch.ops.stylegan_pg, name).default

    def forward(ctx, *args):  # with PyTorch's setup_context it would look at the signature at every call
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
