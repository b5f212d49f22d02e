"""The CUDA kernels on a GPU: `pytest -m gpu`. Values and derivatives against the reference in double precision, what
PyTorch asks of operators, tensors beyond 2^31 elements, a training step, and how fast they are (with -s). Beside them,
how long a GPU waits for others.

The same code runs on the CPU in tests/test_shim.py, and its machine code is looked at in tests/test_machine_code.py."""

import itertools
import time
from typing import Any

import harness
import pytest
import torch
from kernel_cases import FACTORS, FILTERS, KINDS, LAYOUTS, OPS, PADDINGS, Layers, close, numbers, tail

from stylegan_pg.distributed import process_group as dist
from stylegan_pg.networks.stylegan2 import Discriminator, Generator
from stylegan_pg.ops import ACTIVATIONS, bench, bias_act, filtered_lrelu, native, reference, setup_filter, upfirdn2d

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICE = "cuda"
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True, scope="module")
def _kernels_are_used():
    choice = native.choose(DEVICE)
    assert choice.name == DEVICE, f"{choice.reason}: {choice.remedy}"


def on(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.to(DEVICE)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", FILTERS)
def test_upfirdn2d_equals_the_reference(name, dtype):
    """All sizes, factors, paddings, orientations and layouts are tested, with numbers of channels that fill whole packs
    or not."""
    f = FILTERS[name]
    checked = 0
    for size, (up, down), padding, flip, layout, channels in itertools.product(
        [(1, 1), (5, 4), (33, 17), (16, 136)], FACTORS, PADDINGS[::2], (False, True), LAYOUTS, (3, 16)
    ):
        left, right, top, bottom = padding
        if size[0] * up[1] + top + bottom < f.shape[0] or size[1] * up[0] + left + right < f.shape[1]:
            continue
        x = numbers(2, channels, *size, dtype=dtype).contiguous(memory_format=layout)
        y = upfirdn2d(x.to(DEVICE), f.to(DEVICE), up=up, down=down, padding=padding, flip_filter=flip, gain=1.7)
        expected = reference.upfirdn2d(x.double(), f, up, down, padding, flip, 1.7)
        close(y.double().cpu(), expected, TOLERANCES[dtype])
        checked += 1
    assert checked > 100


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_bias_act_and_its_gradients_equal_the_reference(act, dtype, layout):
    for shape, kind in itertools.product(((2, 5, 3, 7), (2, 16, 65, 64), (3, 136, 9, 4), (1, 1, 1, 1)), KINDS):
        how = tail(kind, shape)
        how["x"] = how["x"].contiguous(memory_format=layout)
        # The inputs are rounded first, so that only the kernel's own rounding is measured.
        rounded = {
            k: None if t is None else (t.to(dtype).double() if k == "x" else t.float().double()) for k, t in how.items()
        }
        given = {k: t.clone().requires_grad_(True) for k, t in rounded.items() if t is not None}
        plain = {k: given.get(k) for k in how}
        expected = reference.bias_act(**plain, act=act, gain=1.3, clamp=None, dim=1)  # type: ignore[arg-type]  # x is given
        dy = numbers(*shape, seed=4).to(dtype).double()
        wanted = torch.autograd.grad(expected, list(given.values()), dy)

        acc = torch.float64 if dtype == torch.float64 else torch.float32
        ours = {k: t.detach().to(DEVICE, dtype if k == "x" else acc).requires_grad_(True) for k, t in given.items()}
        y = OPS.bias_act(*(ours.get(k) for k in ("x", "bias", "scale", "noise")), act, 1.3, None, 1)
        got = torch.autograd.grad(y, list(ours.values()), dy.to(DEVICE, dtype))
        close(y.double().cpu(), expected, TOLERANCES[dtype])
        for a, b in zip(got, wanted, strict=True):
            close(a.double().cpu(), b, 30 * TOLERANCES[dtype])


# Rows of one warp and of several, several tiles along rows and columns, and columns that are not whole packs.
BACKWARD_SHAPES = [(2, 16, 4, 6), (16, 512, 4, 4), (3, 7, 33, 65), (4, 40, 128, 128), (2, 3, 260, 255), (2, 1032, 5, 5)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("act", ["linear", "lrelu", "swish"])
def test_backward_pass_of_bias_act(act, dtype, layout):
    """Each combination of gradients, with a clamp, against the reference in double precision; the same bits again."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    every = [[bool(k >> i & 1) for i in range(3)] for k in range(8)]
    for shape, kind in itertools.product(BACKWARD_SHAPES, ("bias scale noise", "bias scale noise shared")):
        x, *given = (t for t in tail(kind, shape).values() if t is not None)
        x, dy = (t.to(dtype).contiguous(memory_format=layout) for t in (x, numbers(*shape, seed=4)))
        exact = [t.to(DEVICE).double().requires_grad_(True) for t in (x, *(t.to(acc) for t in given))]
        y = reference.bias_act(*exact, act, 1.3, 0.9, 1)  # type: ignore[arg-type]  # act follows four tensors
        dy = dy.to(DEVICE).masked_fill((y.detach().abs() - 0.9).abs() < 1e-4, 0)  # rounding may change the derivative
        expected = torch.autograd.grad(y, exact, dy.double())
        ours = [x.to(DEVICE), *(t.to(DEVICE, acc) for t in given)]
        for wanted in every:
            got = OPS.bias_act_backward(dy, *ours, act, 1.3, 0.9, 1, wanted)
            again = OPS.bias_act_backward(dy, *ours, act, 1.3, 0.9, 1, wanted)
            assert got[0].is_contiguous(memory_format=layout)
            close(got[0].double(), expected[0], TOLERANCES[dtype])
            for a, b, repeated, want in zip(got[1:], expected[1:], again[1:], wanted, strict=True):
                assert torch.equal(a, repeated)
                assert a.numel() == (b.numel() if want else 0)
                if want:
                    close(a.double(), b, 1e-11 if acc == torch.float64 else 1e-5)


def test_a_backward_pass_of_bias_act_starts_at_most_two_kernels():
    x, *given = (t.float().to(DEVICE) for t in tail("bias scale noise", (4, 64, 32, 32)).values() if t is not None)
    dense = numbers(8, 64, dtype=torch.float32).to(DEVICE)
    cases: list[tuple[int, Any]] = [
        (
            1,
            lambda: OPS.bias_act_backward(
                dense, dense, given[0], None, None, "lrelu", 1.3, None, 1, [True, False, False]
            ),
        ),
        (2, lambda: OPS.bias_act_backward(x, x, *given, "lrelu", 1.3, 0.9, 1, [True] * 3)),
        (1, lambda: OPS.bias_act_backward(x, x, *given, "lrelu", 1.3, 0.9, 1, [False] * 3)),
    ]
    for most, run in cases:
        run()
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            run()
            torch.cuda.synchronize()
        kernels = [e.name for e in profile.events() or () if e.device_type.name == "CUDA"]
        if not kernels:
            pytest.skip("the profiler sees no kernels here")
        assert len(kernels) == most, kernels
        assert all("bias_act" in name for name in kernels), kernels


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_first_and_second_derivatives(act, layout):
    how = tail("bias scale noise", (2, 3, 2, 3))
    how["x"] = how["x"].contiguous(memory_format=layout)
    inputs = [t.to(DEVICE).requires_grad_(True) for t in how.values() if t is not None]
    for clamp in (None, 1.1):
        assert torch.autograd.gradcheck(lambda *t, clamp=clamp: OPS.bias_act(*t, act, 1.3, clamp, 1), inputs)
        assert torch.autograd.gradgradcheck(lambda *t, clamp=clamp: OPS.bias_act(*t, act, 1.3, clamp, 1), inputs)


def test_first_and_second_derivatives_of_upfirdn2d():
    x, f = numbers(2, 3, 6, 5).to(DEVICE).requires_grad_(True), FILTERS["asymmetric 4x4"].to(DEVICE)
    for up, down in FACTORS:
        assert torch.autograd.gradcheck(lambda x, u=up, d=down: upfirdn2d(x, f, up=u, down=d, padding=3), [x])
        assert torch.autograd.gradgradcheck(lambda x, u=up, d=down: upfirdn2d(x, f, up=u, down=d, padding=3), [x])


@pytest.mark.parametrize("act", ["lrelu", "swish"])
def test_opcheck(act):
    inputs = [t.to(DEVICE).requires_grad_(True) for t in tail("bias scale noise", (2, 3, 4, 5)).values()]
    rest, dy = (act, 1.3, 0.9, 1), numbers(2, 3, 4, 5, seed=4).to(DEVICE)
    plain = [t.detach() for t in inputs]
    torch.library.opcheck(OPS.bias_act, (*inputs, *rest))
    torch.library.opcheck(OPS.bias_act_slope, (dy.clone().requires_grad_(True), *inputs, *rest))
    torch.library.opcheck(OPS.bias_act_curvature, (dy, dy.flip(0), *plain, *rest))
    torch.library.opcheck(OPS.bias_act_backward, (dy, *plain, *rest, [True, True, True]))
    x, f = numbers(2, 3, 6, 5).to(DEVICE).requires_grad_(True), FILTERS["1331"].to(DEVICE)
    torch.library.opcheck(OPS.upfirdn2d, (x, f, [2, 2], [1, 1], [2, 1, 2, 1], False, 4.0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_filtered_lrelu_equals_the_reference(dtype, layout):
    """Values and gradients by the tiled kernel and by the general one. Slopes may differ at values next to zero."""
    smooth, uneven = torch.tensor(bench.SMOOTH), numbers(12, 12, seed=4).float() / 12
    long, checked = smooth.repeat_interleave(2) / 2, 0
    for (up, down), u, d, (c, size), clamp in itertools.product(
        ((2, 2), (4, 2), (2, 4), (1, 2), (4, 4)),
        (smooth, long, None),
        (smooth, uneven),
        ((3, (19, 36)), (16, (35, 40)), (8, (1, 1))),
        (None, 1.1),
    ):
        x = numbers(2, c, *size, dtype=dtype).contiguous(memory_format=layout)
        bias = numbers(c, seed=1, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        exact = [t.double().requires_grad_(True) for t in (x, bias)]
        ours = [t.to(DEVICE).requires_grad_(True) for t in (x, bias)]
        how = {"up": up, "down": down, "padding": (20, 19, 18, 21), "clamp": clamp}
        y = filtered_lrelu(ours[0], on(u), on(d), ours[1], **how)
        expected = reference.filtered_lrelu(exact[0], u, d, exact[1], up, down, (20, 19, 18, 21), 2**0.5, 0.2, clamp)
        close(y.double().cpu(), expected, 4 * TOLERANCES[dtype])
        dy = numbers(*y.shape, seed=4).to(dtype)
        got = torch.autograd.grad(y, ours, dy.to(DEVICE))
        wanted = torch.autograd.grad(expected, exact, dy.double())
        for a, b in zip(got, wanted, strict=True):
            assert float((a.double().cpu() - b).norm() / b.norm()) < 30 * TOLERANCES[dtype]
        checked += 1
    assert checked == 5 * 3 * 2 * 3 * 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_derivatives_of_filtered_lrelu(layout):
    smooth = torch.tensor(bench.SMOOTH, device=DEVICE)
    x = numbers(1, 2, 5, 6).contiguous(memory_format=layout).to(DEVICE).requires_grad_(True)
    bias = numbers(2, seed=1).to(DEVICE).requires_grad_(True)
    for up, down, second in ((2, 2, smooth), (4, 2, torch.outer(smooth, smooth))):

        def run(x, bias, up=up, down=down, second=second):
            return filtered_lrelu(x, smooth, second, bias, up=up, down=down, padding=12, clamp=0.9)

        assert torch.autograd.gradcheck(run, (x, bias))
        assert torch.autograd.gradgradcheck(lambda x, b, run=run: run(x, b).square(), (x, bias), fast_mode=True)
    rest = (2, 2, [9, 10, 11, 9], 1.3, 0.2, 0.9, False)
    torch.library.opcheck(OPS.filtered_lrelu, (x.detach(), smooth, smooth, bias.detach(), *rest))


def test_filtered_lrelu_of_more_than_two_to_the_31_elements():
    free, _ = torch.cuda.mem_get_info()
    if free < 16e9:
        pytest.skip(f"{free / 1e9:.0f} GB of GPU memory are free, 16 are needed")
    smooth = torch.tensor(bench.SMOOTH)
    x = torch.zeros(3, 24, 5488, 5488, dtype=torch.float16, device=DEVICE)  # 2.17e9 elements, 4.3 GB
    x[-1, :, -24:, -24:] = numbers(24, 24, 24, dtype=torch.float16).to(DEVICE)
    corner = x[-1:, :, -24:, -24:].double().cpu()
    y = filtered_lrelu(x.requires_grad_(True), on(smooth), on(smooth), up=2, down=2, padding=(11, 10, 11, 10))
    expected = reference.filtered_lrelu(corner, smooth, smooth, None, 2, 2, (11, 10, 11, 10), 2**0.5, 0.2, None)
    close(y[-1:, :, -8:, -8:].double().cpu(), expected[..., -8:, -8:], 4e-3)


def test_export_and_compile_of_inference():
    net, x = Layers().eval().to(DEVICE), numbers(3, 4, 8, 8, dtype=torch.float32).to(DEVICE)
    with torch.no_grad():
        expected = net(x)
        close(torch.export.export(net, (x,)).module()(x), expected, 1e-6)
        close(torch.compile(net, fullgraph=True)(x), expected, 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_than_two_to_the_31_elements(layout):
    """Only the end of the tensors is compared; a 32-bit index would have overflowed before it."""
    size = (3, 24, 5488, 5488)  # 2.17e9 elements, 4.3 GB
    free, _ = torch.cuda.mem_get_info()
    if free < 14e9:
        pytest.skip(f"{free / 1e9:.0f} GB of GPU memory are free, 14 are needed")
    x = torch.zeros(size, dtype=torch.float16, device=DEVICE).contiguous(memory_format=layout)
    x[-1, :, -16:, -16:] = numbers(24, 16, 16, dtype=torch.float16).to(DEVICE)
    corner = x[-1:, :, -16:, -16:].double().cpu()
    for f in (setup_filter([1, 3, 3, 1]), FILTERS["3x5"]):
        fh, fw = f.shape
        y = upfirdn2d(x, f.to(DEVICE), padding=(fw - 1, 0, fh - 1, 0))
        expected = reference.upfirdn2d(corner, f, (1, 1), (1, 1), (fw - 1, 0, fh - 1, 0), False, 1.0)
        close(y[-1:, :, -16:, -16:].double().cpu(), expected, 2e-3)
        del y
    bias = numbers(24, dtype=torch.float32)
    y = bias_act(x, bias.to(DEVICE), act="lrelu", gain=1.0)
    expected = reference.bias_act(corner, bias.double(), None, None, "lrelu", 1.0, None, 1)
    close(y[-1:, :, -16:, -16:].double().cpu(), expected, 2e-3)
    scale = (numbers(3, 24, seed=2).abs() + 0.5).float()
    tail_ = (x, bias.to(DEVICE), scale.to(DEVICE), None, "lrelu", 1.0, None, 1)
    del y
    dx, dbias, dscale, _ = OPS.bias_act_backward(x, *tail_, [True, True, False])
    given = [corner.requires_grad_(True), *(t.double().requires_grad_(True) for t in (bias, scale[-1:]))]
    expected = reference.bias_act(*given, None, "lrelu", 1.0, None, 1)  # type: ignore[arg-type]
    wanted = torch.autograd.grad(expected, given, corner.detach())
    close(dx[-1:, :, -16:, -16:].double().cpu(), wanted[0], 2e-3)
    close(dbias.double().cpu(), wanted[1], 1e-4)  # only the corner of dy is not zero
    close(dscale[-1:].double().cpu(), wanted[2], 1e-4)
    assert not dscale[:-1].any()


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_training_step_equals_that_of_the_cpu(channels_last):
    """Gradients of G through D, with R1, are compared with the CPU in double precision."""
    torch.manual_seed(0)
    G: Any = Generator(resolution=32, channel_base=512, channel_max=16, z_dim=16, w_dim=16, mapping_layers=2).double()
    D: Any = Discriminator(resolution=32, channel_base=512, channel_max=16, mbstd_group=2).double()
    z, real = numbers(4, 16), numbers(4, 3, 32, 32)
    results = []
    for device in ("cpu", DEVICE):
        G, D = G.to(device), D.to(device)
        if channels_last:
            G, D = (net.to(memory_format=torch.channels_last) for net in (G, D))
        images = real.to(device).requires_grad_(True)
        fake = G.synthesis(G.mapping(z.to(device), None)[:, None].expand(-1, G.num_ws, -1), noise="const")
        penalty = torch.autograd.grad(D(images, None).sum(), images, create_graph=True)[0].square().sum()
        loss = D(fake, None).sum() + penalty
        parameters = [p for net in (G, D) for p in net.parameters()]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        results.append([loss.detach().cpu(), *(g.cpu() for g in gradients if g is not None)])
    assert len(results[0]) == len(results[1]) > 20
    for a, b in zip(*results, strict=True):
        close(a, b, 1e-7)


def test_streams_and_devices_are_respected():
    x, bias = numbers(4, 8, 256, 256, dtype=torch.float32).to(DEVICE), numbers(8, dtype=torch.float32).to(DEVICE)
    expected = bias_act(x, bias, act="lrelu")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        copy = x * 1
        y = bias_act(copy, bias, act="lrelu")
    stream.synchronize()
    assert torch.equal(y, expected)
    graph, out = torch.cuda.CUDAGraph(), None
    f = setup_filter([1, 3, 3, 1]).to(DEVICE)
    plain = upfirdn2d(x, f, padding=2)
    with torch.cuda.graph(graph):  # capturing a graph forbids waiting for the device
        out = upfirdn2d(x, f, padding=2)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, plain)
    if torch.cuda.device_count() > 1:
        other = bias_act(x.to("cuda:1"), bias.to("cuda:1"), act="lrelu")
        assert torch.equal(other.cpu(), expected.cpu())
        assert torch.cuda.current_device() == 0


def test_bandwidth_is_printed():
    """With -s, the achieved bandwidth is printed beside that of a copy."""
    print(f"\n{torch.cuda.get_device_name()}\n{bench.HEAD}")
    rows = list(bench.rows(DEVICE, 0.05))
    for row in rows:
        print(bench.line(row))
    assert len(rows) == 3 * 3 * 2 * 10
    assert all(row["gb_per_sec"] > 0 for row in rows)


def test_waiting_of_the_stream_is_measured():
    """A kernel that sleeps simulates an all-reduce that is not complete: the stream waits while the CPU continues."""
    waiting, other = dist.Waiting(), torch.cuda.Stream()
    waiting.go()
    torch.cuda._sleep(1)  # loads the kernel
    torch.cuda.synchronize()
    began = torch.cuda.Event(enable_timing=True)
    began.record(other)
    with torch.cuda.stream(other):
        torch.cuda._sleep(500_000_000)  # cycles
    done = torch.cuda.Event(enable_timing=True)
    done.record(other)
    started = time.perf_counter()
    with waiting.within(torch.device(DEVICE)):
        torch.cuda.current_stream().wait_event(done)
    launched = time.perf_counter() - started
    waited = waiting.take()
    assert began.elapsed_time(done) / 1000 > 0.1
    assert abs(waited - began.elapsed_time(done) / 1000) < 0.05
    assert launched < waited


@pytest.mark.distributed
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_slow_rank_is_reported_on_gpus(tiny_data, tmp_path):
    """The same as in tests/test_faults.py, on GPUs."""
    assert harness.slowed(tiny_data, tmp_path, train__device="cuda").count([0]) <= 1
