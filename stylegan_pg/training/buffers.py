"""Buffers that a forward pass changes, such as batch normalisation's statistics or spectral norm's vectors.

Their values must not depend on ranks and micro-batches, but be those of one pass over the global batch. Therefore every
micro-batch of an update begins with the same values, and after the update each buffer becomes the mean of its values
after the micro-batches of all ranks, weighted by their numbers of images. For values that move by a momentum towards
the statistics of a batch this is exact. Values that are computed from the weights alone are equal in all micro-batches.
Passes of regularisation terms change no buffers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from stylegan_pg.distributed import process_group as dist


def changing_buffers(nets: Iterable[nn.Module]) -> list[torch.Tensor]:
    """The buffers that forward passes in training mode change: those of modules that normalise with running statistics,
    of spectral norm, and the ones that a module names in an attribute `changing_buffers`. The same on all ranks."""
    return [buffer for net in nets for module in net.modules() for buffer in _of(module)]


def _of(module: nn.Module) -> Iterator[torch.Tensor]:
    named = dict(module.named_buffers(recurse=False))
    if isinstance(module, _NormBase):
        yield from (t for t in named.values() if t is not None)
    elif type(module).__name__ == "_SpectralNorm":  # of torch.nn.utils.parametrizations
        yield from (t for name, t in named.items() if name in ("_u", "_v"))
    elif any(type(hook).__name__ == "SpectralNorm" for hook in module._forward_pre_hooks.values()):
        yield from (t for name, t in named.items() if name.endswith(("_u", "_v")))
    else:
        yield from (named[name] for name in getattr(module, "changing_buffers", ()))


class BufferMeans:
    """The changing buffers of the networks of one phase. Captured steps use its tensors, which stay the same."""

    def __init__(self, nets: Iterable[nn.Module]):
        self.buffers = changing_buffers(nets)
        self.start = [t.detach().clone() for t in self.buffers]
        self.totals = [torch.zeros_like(t, dtype=torch.float64) for t in self.buffers]
        self.totals += [total.new_zeros([1]) for total in self.totals[:1]]  # last, the sum of the weights

    @torch.no_grad()
    def begin(self) -> None:
        """Store the values before the first micro-batch of an update."""
        _copy(self.start, self.buffers)
        for total in self.totals:
            total.zero_()

    @torch.no_grad()
    def restore(self) -> None:
        """Return to the values of `begin`, before each micro-batch."""
        _copy(self.buffers, self.start)

    @torch.no_grad()
    def add(self, images: int, count: int) -> None:
        """After a micro-batch of `images` of the `count` images of the global batch."""
        for total, buffer in zip(self.totals, self.buffers, strict=False):
            total.add_(buffer.double(), alpha=images / count)
        for total in self.totals[-1:]:
            total.add_(images / count)

    def exchange(self, counts: bool) -> list[torch.Tensor]:
        """The sums over the ranks after the last micro-batch of an update; `counts` says whether any of its passes do.
        A collective call, where there are buffers that change."""
        return [dist.all_reduce(torch.cat([t.reshape(-1) for t in self.totals]))] if self.buffers and counts else []

    @torch.no_grad()
    def finish(self, held: torch.Tensor, sums: Sequence[torch.Tensor]) -> None:
        """After an update, which was made if `held`, of shape [], is 0; `sums` are those of `exchange`."""
        self.restore()
        for made in sums:
            means = (made[:-1] / made[-1:]).split([t.numel() for t in self.buffers])
            for buffer, mean, start in zip(self.buffers, means, self.start, strict=True):
                mean = mean if buffer.is_floating_point() else mean.round()
                buffer.copy_(torch.where(held == 0, mean.reshape(buffer.shape).to(buffer.dtype), start))


def _copy(to: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    if to:
        torch._foreach_copy_(to, values)  # type: ignore[attr-defined]  # not in stubs
