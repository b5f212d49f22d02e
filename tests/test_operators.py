"""Operators that are called without PyTorch's dispatcher give the same bits as with it, and tools that observe
operators see them."""

import contextlib
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import stylegan_pg.planning.cost  # noqa: F401  # which tells the FLOP counter of upfirdn2d
from stylegan_pg.ops import bias_act, native, operators, setup_filter, upfirdn2d

F = setup_filter([1, 3, 3, 1])


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(x, bias, scale, noise):
    x = upfirdn2d(x, F, up=2, padding=(2, 1, 2, 1), gain=4.0)
    return bias_act(x, bias, scale=scale, noise=noise, act="swish", clamp=0.7)


def inputs() -> list[torch.Tensor]:
    return [numbers(2, 3, 4, 5), numbers(3, seed=1), numbers(2, 3, seed=2), numbers(2, 1, 8, 10, seed=3)]


class Names(TorchDispatchMode):
    """Collects the names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Silent(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Special(torch.Tensor):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_calls_with_and_without_the_dispatcher_are_identical(monkeypatch, dtype, layout):
    def everything():
        given = [t.to(dtype).requires_grad_(True) for t in inputs()]
        y = layer(given[0].contiguous(memory_format=layout), *given[1:])
        plain = torch.autograd.grad(y.square().sum(), given, retain_graph=True)
        first = torch.autograd.grad(y.square().sum(), given, create_graph=True)
        second = torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), given)
        with torch.no_grad():
            alone = layer(given[0].contiguous(memory_format=layout), *given[1:])
        return [y, alone, *plain, *first, *second], type(y.grad_fn).__name__

    past, name = everything()
    monkeypatch.setattr(operators, "_SURE", False)
    through, other_name = everything()
    assert name != other_name, "both went the same way"
    for a, b in zip(past, through, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


def test_ordinary_tensors_bypass_the_dispatcher():
    x = numbers(2, 3, 4, 4)
    with torch.inference_mode():
        inference = numbers(2, 3)
    ordinary = [x, x[:, 1:], x.clone().requires_grad_(True), torch.nn.Parameter(x), x.bfloat16(), inference]
    assert not operators.watched(ordinary)
    with torch.no_grad():
        assert not operators.watched(ordinary)


@pytest.mark.parametrize(
    "watcher",
    [Names, Silent, FakeTensorMode, lambda: FlopCounterMode(display=False), torch.profiler.profile],
    ids=["dispatch mode", "function mode", "fake tensors", "FLOP counter", "profiler"],
)
def test_active_modes_are_detected(watcher):
    x = numbers(2, 3)
    assert not operators.watched([x])
    with watcher():
        assert operators.watched([x])
    assert not operators.watched([x])


@pytest.mark.parametrize(
    "x",
    [
        numbers(2, 3).as_subclass(Special),
        torch.empty(2, 3, device="meta"),
        torch.ops.aten._neg_view(numbers(2, 3)),
        torch.ops.aten._efficientzerotensor([2, 3]),
        numbers(2, 3).to_sparse(),
        FakeTensorMode().from_tensor(numbers(2, 3)),
    ],
    ids=["subclass", "meta", "negated", "zero", "sparse", "fake"],
)
def test_special_tensors_are_detected(x):
    assert operators.watched([numbers(2), x])


@pytest.mark.parametrize("training", [False, True])
def test_dispatch_modes_see_the_operators(training):
    with Names() as names, contextlib.nullcontext() if training else torch.no_grad():
        y = layer(*(t.requires_grad_(training) for t in inputs()))
        if training:
            y.sum().backward()
    expected = ["upfirdn2d", "bias_act"] if native.choose("cpu").built else ["upfirdn2d"]
    expected += ["bias_act_backward"] if training and "bias_act" in expected else []
    for name in expected:
        assert f"stylegan_pg.{name}.default" in names.seen
    if training:
        assert names.seen.count("stylegan_pg.upfirdn2d.default") == 2


def test_flops_are_counted():
    counts = []
    for device in ("cpu", "meta"):
        x = torch.ones(2, 3, 4, 4, device=device, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            upfirdn2d(x, F.to(device), down=2, padding=1).sum().backward()
        counts.append(counter.get_total_flops())
    forward, backward = 2 * (2 * 3 * 2 * 2) * 16, 2 * (2 * 3 * 4 * 4) * 4
    assert counts == [forward + backward] * 2


def test_a_profile_contains_the_operators():
    with torch.profiler.profile() as profile:
        layer(*inputs())
    assert "stylegan_pg::upfirdn2d" in {event.key for event in profile.key_averages()}


def test_graphs_contain_the_operators():
    graphs = []

    def backend(module, example):
        graphs.append(module.code)
        return module

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(*inputs()), layer(*inputs()))
        traced: Any = torch.jit.trace(layer, tuple(inputs()), check_trace=False)
        graphs.append(str(traced.graph).replace("::", "."))
        other = [t + 1 for t in inputs()]
        assert torch.equal(traced(*other), layer(*other))  # a result stored as a constant would differ here
    for graph in graphs:
        assert "stylegan_pg.upfirdn2d" in graph


def test_negated_and_special_tensors_give_the_same_results():
    x, *rest = inputs()
    y = layer(-x, *rest)
    assert torch.equal(layer(torch.ops.aten._neg_view(x), *rest), y)
    special = layer((-x).as_subclass(Special), *rest)
    assert isinstance(special, Special)
    assert torch.equal(special.as_subclass(torch.Tensor), y)


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.vjp], ids=["vmap", "vjp"])
def test_functional_transforms_are_detected(transform):
    """PyTorch makes them reject operators with such a derivative. A result without one would be wrong."""
    noticed = []

    def function(x):
        noticed.append(operators.watched([x]))
        return x

    transform(function, numbers(2, 3)) if transform is torch.func.vjp else transform(function)(numbers(2, 3))
    assert noticed == [True]
