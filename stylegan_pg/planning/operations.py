"""The operations that a piece of PyTorch code makes, as its dispatcher sees them.

On a GPU each of them is a launch or more, which takes the host a few microseconds; what only changes a tensor's
description (views) or reserves memory takes none. On a CPU the same operations are made, so that the launches of a
training step can be counted without a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that compute nothing: views, and memory without values.
_NO_LAUNCH = """
view _unsafe_view reshape _reshape_alias expand permute transpose t numpy_T slice select unsqueeze squeeze split
split_with_sizes chunk unbind unfold diagonal as_strided detach alias lift_fresh empty empty_like empty_strided
new_empty new_empty_strided stride size is_same_size _record_function_enter_new _record_function_exit
"""
# Operations whose results the host waits for: their values, or sizes that depend on values.
_HOST_READS = "_local_scalar_dense nonzero equal is_nonzero masked_select unique _unique2 bincount"
NO_LAUNCH, HOST_READS = frozenset(_NO_LAUNCH.split()), frozenset(_HOST_READS.split())
FROM_HOST = frozenset({"lift_fresh", "lift_fresh_copy"})  # tensors made of the host's numbers, which a GPU must be sent
MASKED = frozenset({"index", "index_put", "index_put_"})  # whose result's size depends on a mask
READING_METHODS = frozenset({"tolist", "numpy", "__array__"})  # of tensors, which the dispatcher does not see


class Operations(TorchDispatchMode):
    """Within a `with` block, the operations in order.

    Attributes:
        made: for each operation that is a launch, its name and the shapes of its tensors.
        reads: the names of operations whose results the host waits for.
        transfers: copies between host and device, as (from, to).
        from_host: the names of operations that make tensors of the host's numbers (torch.tensor, indexing by a list).
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple[tuple[int, ...], ...]]] = []
        self.reads: list[str] = []
        self.transfers: list[tuple[str, str]] = []
        self.from_host: list[str] = []
        self._methods = _Methods(self.reads)

    def __enter__(self) -> Operations:
        self._methods.__enter__()
        return super().__enter__()

    def __exit__(self, *fault: Any) -> None:
        super().__exit__(*fault)
        self._methods.__exit__(*fault)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in NO_LAUNCH:
            self.made.append((name, tuple(tuple(t.shape) for t in tensors_in(args))))
        if name in FROM_HOST:
            self.from_host.append(name)
        if name in HOST_READS or (name in MASKED and any(t.dtype == torch.bool for t in tensors_in(args[1]))):
            self.reads.append(name)
        given, found = {t.device.type for t in tensors_in(args)}, {t.device.type for t in tensors_in(result)}
        if name in ("_to_copy", "copy_", "_foreach_copy_") and len(given | found) > 1:
            self.transfers.append((min(given - found or given), min(found)))
        return result

    def counts(self) -> Counter[str]:
        """How often each operation was made."""
        return Counter(name for name, _ in self.made)


class _Methods(TorchFunctionMode):
    """Notes the calls of tensors' methods that hand values to the host."""

    def __init__(self, reads: list[str]):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READING_METHODS:
            self.reads.append(name)
        return func(*args, **(kwargs or {}))


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested lists, tuples and dictionaries."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, dict):
        yield from tensors_in(list(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors_in(value)
