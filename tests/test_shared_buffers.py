"""Shared memory of batches is reused, but never while a batch still refers to it."""

import gc
import itertools

import numpy as np
import pytest
import torch

from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.loader import loader
from stylegan_pg.data.loader.loader import batches
from stylegan_pg.data.loader.reading import read_batch
from stylegan_pg.data.loader.shared_buffers import SharedBuffers


def test_buffers_without_references_are_free():
    slots = SharedBuffers(2, [3, 4], np.uint8)
    first, second = slots.acquire(), slots.acquire()
    assert slots.acquire() is None
    assert first is not None
    assert second is not None
    whole = slots.as_tensor(first)
    whole.fill_(7)
    view, array = whole[1:].t(), whole.permute(1, 0).numpy()
    del whole
    gc.collect()
    assert slots.acquire() is None
    del view
    assert slots.acquire() is None
    assert (array == 7).all()
    del array
    assert slots.acquire() == first  # these pages are already allocated
    assert (slots.as_tensor(first) == 7).all()
    other = slots.as_tensor(second)
    del slots
    gc.collect()
    other.fill_(9)  # its memory remains valid after the pool
    assert other.sum() == 9 * 12


@pytest.mark.parametrize("shape", [[0, 8, 8, 3], [4, 0]])
def test_empty_buffers(shape):
    assert SharedBuffers(3, shape, np.uint8).acquire() is None


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mirror", [False, True])
def test_batches_in_use_are_not_overwritten(tiny_data, workers, mirror):
    """A long stream of which all batches, every third, or none are kept gives the same images."""
    index = load_index(str(tiny_data))
    table, order = index.table(16), index.order(3)
    how = {"start": 0, "end": 8 * 40, "batch": 8, "share": [1, 5, 6], "workers": workers, "mirror": mirror}
    kept = list(batches(table, order, **how))
    copies = [b.image.clone() for b in batches(table, order, **how)]
    assert len(kept) == len(copies) == 40 > loader.AHEAD[-1] * 2 + loader.IN_USE
    assert all(torch.equal(b.image, c) for b, c in zip(kept, copies, strict=True))
    some = [b for k, b in enumerate(batches(table, order, **how)) if k % 3 == 0]
    assert all(torch.equal(b.image, c) for b, c in zip(some, copies[::3], strict=True))
    for k in range(0, 40, 13):
        plain = read_batch(table, [order.at(8 * k + i)[1] for i in (1, 5, 6)])
        unlike = [not torch.equal(a, b) for a, b in zip(copies[k], plain, strict=True)]
        flipped = [torch.equal(a, b.flip(-1)) for a, b in zip(copies[k], plain, strict=True)]
        assert all(f for u, f in zip(unlike, flipped, strict=True) if u)
        assert mirror or not any(unlike)
    assert kept[0].image.is_contiguous(memory_format=torch.channels_last)


def test_memory_is_reused(tiny_data):
    """A consumer that holds two batches at a time, like training, sees only a few memory addresses."""
    index = load_index(str(tiny_data))
    how = {"start": 0, "end": 8 * 60, "batch": 8, "share": range(8), "workers": 2}
    data = batches(index.table(16), index.order(0), **how)
    places = {now.image.data_ptr() for now, _next in itertools.pairwise(data)}
    assert len(places) <= loader.AHEAD[-1] * 2 + loader.IN_USE
