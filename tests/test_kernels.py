"""Both operators: threads, bad arguments, missing kernels, and PyTorch's requirements (schema, fake tensors, export,
compile)."""

from typing import Any

import pytest
import torch
from kernel_cases import FACTORS, FILTERS, LAYOUTS, OPS, Layers, close, numbers, tail

from stylegan_pg.errors import RunError
from stylegan_pg.ops import ACTIVATIONS, bias_act, calls, native, reference, upfirdn2d


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_have_the_layout_of_x(implementation, layout):
    """The layouts are as the fake implementations state, whatever the layouts of the gradients are."""
    x = numbers(2, 6, 8, 8).contiguous(memory_format=layout)
    other = numbers(2, 6, 8, 8).contiguous(memory_format=next(m for m in LAYOUTS if m != layout))
    tail_ = (x, numbers(6), None, None, "swish", 1.0, None, 1)
    results = [OPS.upfirdn2d(x, FILTERS["1331"], [1, 1], [2, 2], [1, 1, 1, 1], False, 1.0), OPS.bias_act(*tail_)]
    results += [OPS.bias_act_slope(other, *tail_), OPS.bias_act_curvature(other, other, *tail_)]
    results += [OPS.bias_act_backward(other, *tail_, [True, False, False])[0]]
    for y in results:
        assert y.is_contiguous(memory_format=layout)


def test_opcheck_of_channels_last_with_scale_and_noise(implementation):
    how = tail("bias scale noise", (2, 3, 4, 5))
    how["x"] = how["x"].contiguous(memory_format=torch.channels_last)
    inputs = [t.requires_grad_(True) for t in how.values() if t is not None]
    rest, dy = ("swish", 1.3, 0.9, 1), numbers(2, 3, 4, 5, seed=4)
    torch.library.opcheck(OPS.bias_act, (*inputs, *rest))
    torch.library.opcheck(OPS.bias_act_slope, (dy.clone().requires_grad_(True), *inputs, *rest))
    plain = [t.detach() for t in inputs]
    torch.library.opcheck(OPS.bias_act_backward, (dy, *plain, *rest, [True, True, True]))


def test_missing_kernels_are_errors_in_strict_mode(monkeypatch, capsys):
    """In auto mode plain PyTorch is used instead, with one warning for unsupported sizes."""
    half, x = torch.ones(2, 3, dtype=torch.float16), numbers(1, 2, 8, 8)
    monkeypatch.setattr(native, "_warned", set())
    for mode in ("auto", "strict"):
        monkeypatch.setattr(native, "mode", lambda mode=mode: mode)
        find = native._kernels.__wrapped__
        if mode == "auto":
            assert find("cpu", half.dtype) is None
            native.warn_no_kernel("upfirdn2d", x)
            native.warn_no_kernel("upfirdn2d", x)
            warnings = capsys.readouterr().err
            assert warnings.count("warning: plain PyTorch is used instead: upfirdn2d has no kernel for") == 1
            continue
        with pytest.raises(RunError, match=r"no kernels for torch.float16 on cpu \(STYLEGAN_PG_KERNELS=strict\)"):
            find("cpu", half.dtype)
        with pytest.raises(RunError, match=r"no kernels for torch\.float32 on mps"):
            find("mps", torch.float32)
        assert find("meta", torch.float32) is None
        with pytest.raises(RunError, match=r"upfirdn2d has no kernel for torch.float64 \[1, 2, 8, 8\] on cpu"):
            native.warn_no_kernel("upfirdn2d", x)


class LibraryWithoutKernels:
    """A library whose functions support no arguments."""

    def __getattr__(self, name):
        return lambda *args: -1


def test_the_reference_computes_what_a_kernel_does_not_support(monkeypatch, capsys):
    library: Any = LibraryWithoutKernels()
    monkeypatch.setattr(native, "compiled", lambda x: calls.Kernels("cuda", library))
    monkeypatch.setattr(native, "_warned", set())
    x, f = numbers(1, 2, 8, 8), FILTERS["1331"]
    for _ in range(2):
        close(upfirdn2d(x, f, padding=2), reference.upfirdn2d(x, f, (1, 1), (1, 1), (2,) * 4, False, 1.0), 0)
        close(bias_act(x, act="swish"), reference.bias_act(x, None, None, None, "swish", 2**0.5, None, 1), 0)
    assert capsys.readouterr().err.count("warning:") == 2


def test_tensors_on_different_devices_are_an_error():
    """The kernels would use addresses that are invalid on x's device."""
    kernels = native.compiled(torch.ones(1))
    if kernels is None:
        pytest.skip("no compiled kernels here")
    with pytest.raises(ValueError, match="x is on cpu, bias on meta"):
        calls.BiasAct(kernels, torch.ones(2, 3), torch.ones(3, device="meta"), None, None, "relu", 1.0, None, 1)


def test_bad_arguments_are_errors():
    x, f = numbers(1, 2, 4, 4), FILTERS["1331"]
    with pytest.raises(ValueError, match="at least 1"):
        upfirdn2d(x, f, up=0)
    with pytest.raises(ValueError, match=r"must be \[N, C, H, W\]"):
        upfirdn2d(x[0], f)
    for match, how in {
        "unknown activation 'gelu'": {"act": "gelu"},
        r"the bias \[3\]": {"bias": torch.ones(3)},
        r"scale must be \[N, C\]": {"scale": torch.ones(2, 3)},
        "noise must be": {"noise": torch.ones(1, 2, 4, 4)},
        "need dim=1": {"scale": torch.ones(1, 2), "dim": 2},
        "no dimension 4": {"bias": torch.ones(1), "dim": 4},
        "no dimension -5": {"bias": torch.ones(4), "dim": -5},
        "clamp must be at least 0, not -1": {"clamp": -1},
        "not nan": {"clamp": float("nan")},
    }.items():
        with pytest.raises(ValueError, match=match):
            bias_act(x, **how)


def test_results_do_not_depend_on_the_number_of_threads():
    x, dy = numbers(3, 40, 70, 50, dtype=torch.float32), numbers(3, 40, 70, 50, seed=1, dtype=torch.float32)
    inputs = [x, numbers(40, dtype=torch.float32), numbers(3, 40, dtype=torch.float32)]
    inputs = [t.requires_grad_(True) for t in [*inputs, numbers(3, 1, 70, 50, dtype=torch.float32)]]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = bias_act(inputs[0], inputs[1], scale=inputs[2], noise=inputs[3], act="lrelu")
            results.append([y, upfirdn2d(x, FILTERS["1331"], up=2, padding=2), *torch.autograd.grad(y, inputs, dy)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_opcheck_upfirdn2d(implementation):
    x, f = numbers(2, 3, 6, 5).requires_grad_(True), FILTERS["asymmetric 4x4"]
    for up, down in FACTORS:
        torch.library.opcheck(OPS.upfirdn2d, (x, f, list(up), list(down), [2, 3, 4, 3], False, 1.5))
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_(True)
    torch.library.opcheck(OPS.upfirdn2d, (last, f, [2, 2], [1, 1], [2, 1, 2, 1], True, 4.0))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_opcheck_bias_act(implementation, act):
    how = tail("bias scale noise", (2, 3, 4, 5))
    inputs = [t.requires_grad_(True) for t in how.values()]
    rest = (act, 1.3, 0.9, 1)
    torch.library.opcheck(OPS.bias_act, (*inputs, *rest))
    torch.library.opcheck(OPS.bias_act, (inputs[0], None, None, None, *rest))
    dy = numbers(2, 3, 4, 5, seed=4)
    torch.library.opcheck(OPS.bias_act_slope, (dy.clone().requires_grad_(True), *inputs, *rest))
    plain = [t.detach() for t in inputs]
    torch.library.opcheck(OPS.bias_act_curvature, (dy, dy.flip(0), *plain, *rest))
    for wanted in ([True, True, True], [False, True, False]):
        torch.library.opcheck(OPS.bias_act_backward, (dy, *plain, *rest, wanted))


def test_export_and_compile_of_inference(implementation):
    net, x = Layers().eval(), numbers(3, 4, 8, 8, dtype=torch.float32)
    with torch.no_grad():
        expected = net(x)
        exported = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
        close(exported.module()(x), expected, 1e-6)
        close(exported.module()(x[:2]), net(x[:2]), 1e-6)
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        close(compiled(x), expected, 1e-6)
    if implementation == "kernels":
        assert "stylegan_pg.upfirdn2d" in exported.graph_module.code


def test_compiled_training_step():
    """torch.compile also supports the first derivative."""
    net, x = Layers(), numbers(3, 4, 8, 8, dtype=torch.float32)
    net(x).square().sum().backward()
    assert net.bias.grad is not None
    expected, net.bias.grad = net.bias.grad.clone(), None
    torch.compile(net, backend="aot_eager")(x).square().sum().backward()
    close(net.bias.grad, expected, 1e-5)
