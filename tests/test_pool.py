"""Memory of large results is reused, and never while something may still read it."""

import gc
import subprocess
import sys
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stylegan_pg.ops import bias_act, filter2d, native, pool, setup_filter
from stylegan_pg.ops.pool import MIN_BYTES, Pool

needs_kernels = pytest.mark.skipif(native.choose("cpu").built is None, reason="no compiled kernels here")
SIZE = 2**20


@pytest.fixture
def small(monkeypatch) -> Pool:
    """Replace the process's pool by one of 8 blocks for results of 1 MiB."""
    fresh = Pool(8 * SIZE)
    monkeypatch.setattr(pool, "_pool", fresh)
    monkeypatch.setattr(pool, "MIN_BYTES", SIZE)
    return fresh


def result(value: float, shape=(1, 16, 128, 128), layout=torch.contiguous_format) -> torch.Tensor:
    return pool.empty(shape, torch.empty(0), layout).fill_(value)


def test_released_memory_is_reused(small):
    for layout in (torch.contiguous_format, torch.channels_last):
        first = result(1.0, layout=layout)
        assert first.is_contiguous(memory_format=layout)
        assert first.shape == (1, 16, 128, 128)
        address = first.data_ptr()
        del first
        assert result(2.0, layout=layout).data_ptr() == address
    assert small.total == SIZE
    assert result(0.0, (512, 512)).stride() == (512, 1)
    assert result(0.0, (2, 3, 5)).data_ptr() not in addresses(small)
    ordinary, ours = torch.empty(4), result(1.0)  # autograd accumulates in place into tensors with their own storage
    uses = [torch._C._storage_Use_Count(t.untyped_storage()._cdata) for t in (ordinary, ours)]
    assert uses[0] == uses[1]
    assert not ours._is_view()


def addresses(of: Pool) -> list[int]:
    return [block.ctypes.data for blocks in of.blocks.values() for block in blocks]


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
def test_memory_in_use_is_not_reused(small, how):
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


def test_moved_and_resized_results(small):
    """A tensor that is moved to shared memory releases its block. One that would grow raises an error."""
    y = result(1.0)
    address = y.data_ptr()
    y.share_memory_()
    assert y.data_ptr() != address
    assert result(2.0).data_ptr() == address
    assert float(y.mean()) == 1.0
    with pytest.raises(RuntimeError, match="resiz"):
        result(3.0).resize_(2, 16, 128, 128)
    assert small.total <= 2 * SIZE


def test_the_limit_is_observed(small):
    kept = [result(float(i)) for i in range(12)]
    assert small.total == 8 * SIZE
    assert [float(k.mean()) for k in kept] == list(range(12))
    del kept
    too_large = result(1.0, (9, 16, 128, 128))  # nothing is freed for this one
    assert small.total == 8 * SIZE
    assert too_large.data_ptr() not in addresses(small)
    large = result(1.0, (6, 16, 128, 128))  # idle blocks are freed for this one
    assert small.total == 8 * SIZE
    assert large.data_ptr() in addresses(small)
    second = result(2.0, (6, 16, 128, 128))  # too large while the first is in use
    assert second.data_ptr() not in addresses(small)
    assert len(addresses(small)) == 3
    del large
    pool.clear()
    assert small.total == 0
    assert not small.blocks


def test_callers_that_cannot_wait_do_not_use_the_pool(small):
    """A finalizer that runs within the pool's lock, another thread, and a process forked within the lock do not
    wait."""
    first = result(1.0)
    with small.lock:
        second = result(2.0)
        pool.clear()
    assert second.data_ptr() not in addresses(small)
    assert first.data_ptr() in addresses(small)


def test_default_dtypes_and_devices_do_not_matter(small):
    with torch.device("meta"):
        assert pool.empty((512, 512), torch.empty(0, device="cpu"), torch.contiguous_format).device.type == "cpu"
        assert Pool(2**24).idle_refcount == small.idle_refcount
    assert result(1.0).is_inference() is False
    with torch.inference_mode():
        assert result(1.0).is_inference()


def test_idle_blocks_are_freed_where_memory_is_short(small, monkeypatch):
    del (first := [result(1.0)])[0]
    assert small.total == SIZE
    asked = []

    def none(nbytes: int):
        asked.append(nbytes)
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(pool, "_new", none)
    assert result(2.0, (2, 16, 128, 128)).shape == (2, 16, 128, 128)
    assert asked == [2 * SIZE]
    assert small.total == 0
    assert not first


def test_each_thread_gets_different_memory(small):
    faults, interval = [], sys.getswitchinterval()

    def work(number: float) -> None:
        held: list[torch.Tensor] = []
        for i in range(200):
            held.append(result(number + i))
            if len(held) == 2:
                first = held.pop(0)
                if (first != number + i - 1).any():
                    faults.append(number)

    threads = [threading.Thread(target=work, args=(1000.0 * i,)) for i in range(4)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not faults
    assert small.total <= 8 * SIZE


@needs_kernels
def test_operations_and_their_gradients_use_the_pool(monkeypatch):
    """Every call gives the same bits as with memory from malloc."""
    x = torch.randn(1, 8, 64, 96, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    bias, f = torch.ones(8, requires_grad=True), setup_filter([1, 3, 3, 1])

    def both() -> list[torch.Tensor]:
        y = filter2d(bias_act(filter2d(x, f), bias, act="swish"), f)
        first = torch.autograd.grad(y.square().sum(), [x, bias], create_graph=True)
        return [y, *first, *torch.autograd.grad(first[0].square().sum(), [x, bias])]

    expected = [t.detach().clone() for t in both()]
    own = Pool(2**24)
    monkeypatch.setattr(pool, "_pool", own)
    monkeypatch.setattr(pool, "MIN_BYTES", 2**10)
    for _ in range(4):
        for actual, wanted in zip(both(), expected, strict=True):
            assert torch.equal(actual, wanted)
        gc.collect()
    assert own.total > 0


@pytest.mark.parametrize(("value", "limit"), [("0", 0), ("64", 2**26), ("many", None)])
def test_the_environment_variable(monkeypatch, capsys, value, limit):
    monkeypatch.setenv("STYLEGAN_PG_POOL_MIB", value)
    found = pool.default_limit()
    assert limit is None or found == limit
    assert found <= 2**31


def test_the_limit_is_shared_by_ranks_and_is_below_the_memory_of_a_job(monkeypatch, tmp_path):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    whole = pool.default_limit()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert pool.default_limit() <= whole
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "limit").write_text(f"{2**30}\n")
    monkeypatch.setattr(pool, "MEMORY_LIMITS", [tmp_path / "memory.max", tmp_path / "limit", tmp_path / "none"])
    assert pool.default_limit() == 2**30 // 64


def test_wrong_values_of_the_environment_variable(monkeypatch, capsys):
    monkeypatch.setenv("STYLEGAN_PG_POOL_MIB", "-1")
    assert pool.default_limit() > 0
    assert "not a number of MiB" in capsys.readouterr().err


@needs_kernels
def test_reused_memory_causes_no_page_faults():
    """From the second call on, no memory is requested from the system."""
    program = f"""if True:
        import resource, torch
        from stylegan_pg.ops import bias_act
        x = torch.zeros({2 * MIN_BYTES // 4})
        for _ in range(3):
            bias_act(x, act="lrelu")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            bias_act(x, act="lrelu")
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    out = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert int(out.stdout) < 100


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_conversions_agree_with_torch(layout):
    """Values, layout and derivatives of both orders agree. Tools that observe operators see one."""
    x = torch.randn(2, 16, 200, 200).bfloat16().contiguous(memory_format=layout).requires_grad_(True)
    y = pool.converted(x, torch.float32)
    assert torch.equal(y, x.float())
    assert y.is_contiguous(memory_format=layout)
    results = []
    for function in (pool.converted, torch.Tensor.to):
        (first,) = torch.autograd.grad(function(x, torch.float32).square().sum(), [x], create_graph=True)
        (second,) = torch.autograd.grad(first.float().square().sum(), [x])
        results.append((first, second))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, theirs)
    small = x.detach()[0, :2, :2, :2].clone().requires_grad_(True)
    rows = torch.autograd.functional.jacobian(lambda t: pool.converted(t, torch.float32), small, vectorize=True)
    assert torch.equal(rows.reshape(8, 8), torch.eye(8))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert pool.converted(torch.empty(4, 4, dtype=torch.bfloat16), torch.float32).dtype == torch.float32
