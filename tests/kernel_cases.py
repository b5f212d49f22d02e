"""Helpers for the tests of the operators: inputs, filters, and comparisons with a tolerance."""

import torch

from stylegan_pg.ops import bias_act, setup_filter, upfirdn2d

LAYOUTS = [torch.contiguous_format, torch.channels_last]

OPS = torch.ops.stylegan_pg


def numbers(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    scale = max(float(expected.detach().double().abs().max()), 1e-30) if expected.numel() else 1.0
    error = (
        float((actual.detach().double() - expected.detach().double()).abs().max()) / scale if expected.numel() else 0.0
    )
    assert error <= tolerance, f"{error:.2e} of the largest magnitude"


FILTERS = {
    "1331": setup_filter([1, 3, 3, 1]),
    "asymmetric 4x4": torch.outer(torch.tensor([1.0, 2, 3, 5]), torch.tensor([2.0, -1, 4, 3])) / 50,
    "full 4x4": numbers(4, 4, seed=5).float(),
    "3x5": numbers(3, 5, seed=6).float(),
    "1x1": torch.tensor([[0.7]]),
    "12 taps": setup_filter(range(1, 13)),
    "7x1": numbers(7, 1, seed=7).float(),
    "zero": torch.zeros(2, 2),
}

PADDINGS = [(2, 1, 2, 1), (1, 1, 1, 1), (3, 0, 0, 4), (-1, 12, 11, -1), (12, 12, 12, 12)]

FACTORS = [((1, 1), (1, 1)), ((2, 2), (1, 1)), ((1, 1), (2, 2)), ((3, 2), (1, 3)), ((2, 1), (1, 2)), ((2, 2), (2, 2))]


def tail(kind: str, shape, dtype=torch.float64):
    """Arguments of bias_act: x, away from the kinks of the activations, and the arguments that `kind` names."""
    x = numbers(*shape, dtype=torch.float64)
    x = x.sign() * (x.abs() + 0.4)
    n, c = shape[0], shape[1]
    size = [1, 1, *shape[2:]] if "shared" in kind else [n, 1, *shape[2:]]
    return {
        "x": x.to(dtype),
        "bias": (0.1 * numbers(c, seed=1).clamp(-1, 1)).to(dtype) if "bias" in kind else None,
        "scale": (numbers(1 if "shared" in kind else n, c, seed=2).abs() + 0.8).to(dtype) if "scale" in kind else None,
        "noise": (0.1 * numbers(*size, seed=3).clamp(-1, 1)).to(dtype) if "noise" in kind else None,
    }


KINDS = ["", "bias", "scale", "noise", "bias scale noise", "bias scale noise shared"]


class Layers(torch.nn.Module):
    """A network of both operators."""

    f: torch.Tensor

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(numbers(4, dtype=torch.float32))
        self.register_buffer("f", setup_filter([1, 3, 3, 1]))

    def forward(self, x):
        x = bias_act(upfirdn2d(x, self.f, up=2, padding=(2, 1, 2, 1), gain=4.0), self.bias, act="lrelu", clamp=2.0)
        return bias_act(upfirdn2d(x, self.f, down=2, padding=1), scale=x.mean(dim=[2, 3]), act="swish")
