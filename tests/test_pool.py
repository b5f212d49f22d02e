"""Memory of large results is used again, and never while anything could still look at it."""

import gc
import subprocess
import sys
import threading

import pytest
import torch

from stylegan_pg.ops import bias_act, filter2d, native, pool, setup_filter
from stylegan_pg.ops.pool import LEAST, Pool

needs_kernels = pytest.mark.skipif(native.choose("cpu").built is None, reason="no compiled kernels here")
SIZE = 2**20


@pytest.fixture
def small(monkeypatch) -> Pool:
    """A pool of 8 blocks for results of 1 MiB, instead of the process's own."""
    fresh = Pool(8 * SIZE)
    assert fresh.limit, "this PyTorch does not say who holds a storage"
    monkeypatch.setattr(pool, "_pool", fresh)
    monkeypatch.setattr(pool, "LEAST", SIZE)
    return fresh


def result(value: float, shape=(1, 16, 128, 128), layout=torch.contiguous_format) -> torch.Tensor:
    return pool.empty(shape, torch.empty(0), layout).fill_(value)


def test_what_nobody_holds_is_used_again(small):
    for layout in (torch.contiguous_format, torch.channels_last):
        first = result(1.0, layout=layout)
        assert first.is_contiguous(memory_format=layout)
        assert first.shape == (1, 16, 128, 128)
        address = first.data_ptr()
        del first
        assert result(2.0, layout=layout).data_ptr() == address
    assert small.total == SIZE
    assert result(0.0, (512, 512)).stride() == (512, 1)
    assert result(0.0, (2, 3, 5)).data_ptr() not in [b[1] for blocks in small.blocks.values() for b in blocks]


HOLDERS = {
    "itself": lambda y: y,
    "a view": lambda y: y[:, 3:5],
    "detached": lambda y: y.detach(),
    "its storage": lambda y: y.untyped_storage(),
    "numpy": lambda y: y.numpy(),
    "a view of numpy": lambda y: y.numpy()[0, 0],
    "dlpack": lambda y: torch.from_dlpack(y),
    "saved for a gradient": lambda y: (torch.ones_like(y, requires_grad=True) * y).sum(),
    "inference": lambda y: torch.inference_mode()(lambda: y[0])(),
    "in a cycle": lambda y: (box := [y], box.append(box))[0],
}


@pytest.mark.parametrize("how", HOLDERS)
def test_what_is_held_stays(small, how):
    y = result(1.0)
    address = y.data_ptr()
    held = HOLDERS[how](y)
    del y
    others = [result(2.0) for _ in range(5)]
    assert address not in [o.data_ptr() for o in others]
    if how == "saved for a gradient":
        assert float(held.detach()) == 16 * 128 * 128
    elif how == "its storage":
        assert set(held[:4]) <= {0x00, 0x80, 0x3F}
    del held, others
    gc.collect()
    assert address in [o.data_ptr() for o in [result(3.0) for _ in range(6)]]


def test_moved_or_resized_memory_is_not_used_again(small):
    y = result(1.0)
    y.share_memory_()
    address = y.data_ptr()
    del y
    assert result(2.0).data_ptr() != address
    y = result(1.0)
    y.resize_(2, 16, 128, 128)
    del y
    z = result(5.0)
    assert float(z.sum()) == 5.0 * z.numel()


def test_the_limit_holds(small):
    kept = [result(float(i)) for i in range(12)]
    assert small.total == 8 * SIZE
    assert [float(k.mean()) for k in kept] == list(range(12))
    del kept
    large = result(1.0, (6, 16, 128, 128))  # for which idle blocks go
    assert small.total <= 8 * SIZE
    assert large.data_ptr() in [b[1] for b in small.blocks[6 * SIZE]]
    del large
    pool.clear()
    assert small.total == 0
    assert small.blocks == {}


def test_threads_get_memory_of_their_own(small):
    faults = []

    def work(number: float) -> None:
        for _ in range(300):
            a = result(number)
            if float(a[0, 0, 0, 0]) != number or float(a.view(-1)[-1]) != number:
                faults.append(number)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def test_a_pytorch_that_does_not_tell(monkeypatch):
    monkeypatch.delattr(torch._C, "_storage_Use_Count")
    assert Pool(2**30).limit == 0


@needs_kernels
def test_operations_and_their_gradients_use_it(monkeypatch):
    """The same bits, call after call, as with memory from malloc."""
    x = torch.randn(1, 8, 64, 96, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    bias, f = torch.ones(8, requires_grad=True), setup_filter([1, 3, 3, 1])

    def both() -> list[torch.Tensor]:
        y = filter2d(bias_act(filter2d(x, f), bias, act="swish"), f)
        first = torch.autograd.grad(y.square().sum(), [x, bias], create_graph=True)
        return [y, *first, *torch.autograd.grad(first[0].square().sum(), [x, bias])]

    expected = [t.detach().clone() for t in both()]
    own = Pool(2**24)
    monkeypatch.setattr(pool, "_pool", own)
    monkeypatch.setattr(pool, "LEAST", 2**10)
    for _ in range(4):
        for actual, wanted in zip(both(), expected, strict=True):
            assert torch.equal(actual, wanted)
        gc.collect()
    assert own.total > 0


@pytest.mark.parametrize(("value", "limit"), [("0", 0), ("64", 2**26), ("many", None)])
def test_the_variable(monkeypatch, capsys, value, limit):
    monkeypatch.setenv("STYLEGAN_PG_POOL_MIB", value)
    found = pool.default_limit()
    assert limit is None or found == limit
    assert found <= 2**31
    assert ("no number of MiB" in capsys.readouterr().err) == (limit is None)


@needs_kernels
def test_large_results_cost_no_page_faults_twice():
    """What it is for: from the second call on the system hands nothing out."""
    program = f"""if True:
        import resource, torch
        from stylegan_pg.ops import bias_act
        x = torch.zeros({2 * LEAST // 4})
        for _ in range(3):
            bias_act(x, act="lrelu")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            bias_act(x, act="lrelu")
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    out = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert int(out.stdout) < 100
