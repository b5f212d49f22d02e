"""The kernels of upfirdn2d compared with the reference: values, layouts and number formats."""

import itertools

import pytest
import torch
from kernel_cases import FACTORS, FILTERS, LAYOUTS, PADDINGS, close, numbers

from stylegan_pg.ops import bias_act, calls, native, reference, setup_filter, upfirdn2d

SIZES = [(1, 1), (1, 9), (2, 3), (5, 4), (8, 8), (33, 17), (16, 130)]


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("size", SIZES)
def test_upfirdn2d_equals_the_reference(size, name):
    """All combinations of factors, paddings, orientations, layouts and dtypes agree, for channel counts below and above
    the vector width."""
    f = FILTERS[name]
    checked = 0
    for (up, down), padding, flip, layout in itertools.product(FACTORS, PADDINGS, (False, True), LAYOUTS):
        for channels, dtype, tolerance in ((3, torch.float64, 1e-13), (17, torch.float32, 1e-6)):
            x = numbers(2, channels, *size, dtype=dtype).contiguous(memory_format=layout)
            left, right, top, bottom = padding
            if size[0] * up[1] + top + bottom < f.shape[0] or size[1] * up[0] + left + right < f.shape[1]:
                with pytest.raises(ValueError, match="smaller than the filter"):
                    upfirdn2d(x, f, up=up, down=down, padding=padding, flip_filter=flip)
                continue
            expected = reference.upfirdn2d(x, f, up, down, padding, flip, 1.7)
            y = upfirdn2d(x, f, up=up, down=down, padding=padding, flip_filter=flip, gain=1.7)
            assert y.is_contiguous(memory_format=reference.layout_of(x))
            # Kernels sum separable filters in another order; other filters may differ in the last bit only.
            close(y, expected, tolerance)
            checked += 1
    assert checked > 20


@pytest.mark.parametrize("shape", [(1, 1, 3, 9001), (1, 300, 3, 61), (2, 1, 1, 9)])
@pytest.mark.parametrize("padding", [(2, 3), (9000, 2), (3, 9001)])
def test_upfirdn2d_of_long_rows(shape, padding):
    """Rows are longer than the section that a kernel processes at once, and some sections consist of padding only."""
    x = numbers(*shape, dtype=torch.float32)
    if shape[1] > 1:
        x, padding = x.contiguous(memory_format=torch.channels_last), tuple(min(p, 90) for p in padding)
    padding = (*padding, 11, 11)
    for name, (up, down) in itertools.product(("1331", "full 4x4", "12 taps"), FACTORS):
        y = upfirdn2d(x, FILTERS[name], up=up, down=down, padding=padding)
        close(y, reference.upfirdn2d(x, FILTERS[name], up, down, padding, False, 1.0), 1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", [{"up": 2, "padding": (2, 1, 2, 1)}, {"down": 2, "padding": 1}, {"padding": 2}])
def test_upfirdn2d_in_bfloat16_rounds_once(how, layout):
    """The result equals the float32 result rounded to bfloat16; intermediate values are not rounded."""
    for name, width in itertools.product(("1331", "full 4x4", "12 taps"), (71, 21, 5)):
        x = numbers(2, 24, 19, width, dtype=torch.bfloat16).contiguous(memory_format=layout)
        padding = 12 if name == "12 taps" else how["padding"]
        y = upfirdn2d(x, FILTERS[name], **(how | {"padding": padding}))
        expected = upfirdn2d(x.float(), FILTERS[name], **(how | {"padding": padding}))
        assert y.dtype == torch.bfloat16
        if native.compiled(x) is not None:
            torch.testing.assert_close(y, expected.bfloat16(), rtol=1 / 128, atol=1e-6)
        close(y.float(), expected, 2e-2)


@pytest.mark.skipif(native.choose("cpu").built is None, reason="no compiled kernels here")
@pytest.mark.parametrize("channels", [31, 32, 33, 48, 64, 100, 1040])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 3), (16, 34), (37, 70)])
def test_downsampling_in_channels_last(size, channels):
    """Down-sampling in channels_last, which processes two rows at a time, gives the same bits as in the contiguous
    layout. The cases have odd numbers of rows, channels that are no multiple of the vector width, long rows, and
    padding and cropping on each side."""
    checked = 0
    for padding, name in itertools.product(
        [(1, 1, 1, 1), (3, 0, 0, 4), (-1, 9, 8, -1), (6, 5, 7, 6)], ("1331", "asymmetric 4x4")
    ):
        f, (left, right, top, bottom) = FILTERS[name], padding
        if size[0] + top + bottom < 4 or size[1] + left + right < 4:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            x = numbers(2, channels, *size, seed=channels, dtype=dtype)
            y = upfirdn2d(x.contiguous(memory_format=torch.channels_last), f, down=2, padding=padding, gain=1.3)
            if channels > 1 and size != (1, 1):
                assert y.shape[2] * y.shape[3] == 1 or not y.is_contiguous()
            expected = upfirdn2d(x, f, down=2, padding=padding, gain=1.3)
            torch.testing.assert_close(y, expected, rtol=0, atol=0)
            if dtype == torch.float32:
                close(y, reference.upfirdn2d(x, f, (1, 1), (2, 2), padding, False, 1.3), 1e-6)
            checked += 1
    assert checked >= 4


@pytest.mark.skipif(native.choose("cpu").built is None, reason="no compiled kernels here")
def test_bfloat16_is_rounded_as_pytorch_does():
    """All bfloat16 values are tested, also near rounding ties, in vectorised and in scalar code."""
    f = torch.zeros(4, 4)
    f[1, 1] = 1.0
    values = torch.arange(2**16).to(torch.int16).view(torch.bfloat16).reshape(1, 64, 32, 32)
    for layout in LAYOUTS:
        x = values.contiguous(memory_format=layout)
        y = bias_act(x, gain=1.0 + 2.0**-9, clamp=None)  # products near rounding ties
        expected = (x.float() * (1.0 + 2.0**-9)).to(torch.bfloat16)
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    finite = torch.where(values.float().abs() < 1e30, values, 0.0).repeat(1, 1, 2, 2)
    for gain in (1.0 + 2.0**-9, 1.0 + 2.0**-8, 1 / 3):
        x = finite.contiguous(memory_format=torch.channels_last)
        y = upfirdn2d(x, f, down=2, padding=(1, 2, 1, 2), flip_filter=True, gain=gain)
        expected = (finite[:, :, ::2, ::2].float() * torch.tensor(gain)).to(torch.bfloat16)
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
    spoilt = torch.ones(1, 40, 8, 8, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    spoilt[0, 3, 0, 0], spoilt[0, 39, 4, 5] = float("nan"), float("inf")
    y = upfirdn2d(spoilt, FILTERS["1331"], down=2, padding=1)
    expected = reference.upfirdn2d(spoilt, FILTERS["1331"], (1, 1), (2, 2), (1, 1, 1, 1), False, 1.0)
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02, equal_nan=True)
    assert y.isnan().sum() == 1
    assert y.isinf().sum() == 4


def test_upfirdn2d_of_non_contiguous_tensors():
    """Slices, expanded and transposed tensors give the same as their copies. An empty batch stays empty."""
    f, base = FILTERS["asymmetric 4x4"], numbers(3, 8, 20, 22, dtype=torch.float32)
    for x in (base[:, ::2], base[1:2, :, 3:, 1:-2], base.transpose(2, 3), base[:, :1].expand(-1, 5, -1, -1)):
        close(upfirdn2d(x, f, padding=2), upfirdn2d(x.clone().contiguous(), f, padding=2), 0)
    assert upfirdn2d(base[:0], f, up=2, padding=2).shape == (0, 8, 41, 45)
    assert bias_act(base[:0], torch.ones(8), act="lrelu").shape == (0, 8, 20, 22)
    one_dimensional = torch.tensor([1.0, 3, 3, 1]) / 8
    close(upfirdn2d(base, one_dimensional, padding=2), upfirdn2d(base, FILTERS["1331"], padding=2), 1e-6)


@pytest.mark.parametrize("size", [(4, 0), (0, 4), (0, 0)])
def test_images_of_padding_only_are_zero(size):
    for layout, (up, down) in itertools.product(LAYOUTS, ((1, 1), (2, 1), (1, 2))):
        x = torch.zeros(2, 3, *size).contiguous(memory_format=layout)
        y = upfirdn2d(x, FILTERS["1331"], up=up, down=down, padding=4)
        assert y.numel()
        assert not y.any()


def test_filters_are_used_as_float32(implementation):
    f = torch.tensor([[0.1, 0.3], [0.4, 0.7]], dtype=torch.float64)
    x = numbers(1, 2, 5, 6)
    assert torch.equal(upfirdn2d(x, f, padding=1), upfirdn2d(x, f.float(), padding=1))
    assert not torch.equal(
        upfirdn2d(x, f.float(), padding=1), reference.upfirdn2d(x, f, (1, 1), (1, 1), (1,) * 4, False, 1.0)
    )


@pytest.mark.parametrize("taps", [[1, 3, 3, 1], [0.1, 0.3, 0.4, 0.2], [0.1, 0.6, 0.4, 0.7], [0.8, 0.2, 0.4, 0.9]])
def test_rounded_filters_count_as_separable(taps):
    """Filters that were normalised in float32 are outer products up to rounding. For float64 images the taps are used
    directly."""
    f = setup_filter(taps)
    assert calls.separable_factors(f, False, 1.0) is not None
    assert calls.separable_factors(FILTERS["full 4x4"], False, 1.0) is None
    x = torch.zeros(1, 1, 9, 9)
    x[0, 0, 4, 4] = 1
    if native.compiled(x) is None:
        pytest.skip("no compiled kernels here")
    response = upfirdn2d(x, f, padding=2)[0, 0, 3:7, 3:7]
    close(response, f, 4e-7)
    row, column = divmod(int(f.argmax()), 4)
    fx, fy = f[row], f[:, column] / f[row, column]
    assert torch.equal(response, torch.outer(fy, fx)), (
        "the filter was applied as one 2-D filter, not as two 1-D factors"
    )
    assert torch.equal(upfirdn2d(x.double(), f, padding=2)[0, 0, 3:7, 3:7], f.double())
