"""Perceptual path length."""

import pytest
import torch
from measuring import CPU

from stylegan_pg.checkpoint.snapshot import load_snapshot
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.metrics import features
from stylegan_pg.metrics.base import Settings
from stylegan_pg.metrics.evaluate import Evaluator
from stylegan_pg.metrics.registry import parse


class Squares(torch.nn.Module):
    def forward(self, a, b):
        return (a - b).square().mean(dim=[1, 2, 3])


@pytest.mark.usefixtures("_own_cache")
def test_path_length(tiny_data, snapshot):
    """The values are finite and do not depend on the batch size, up to the rounding of float32."""
    G = load_snapshot(snapshot)
    e = Evaluator(load_index(str(tiny_data)), 16, [parse("ppl2_wend40"), parse("ppl2_zfull40")], Settings(CPU, batch=9))
    e.networks._loaded["lpips"] = features.Distance(Squares(), "")
    first = e(G)
    assert list(first) == ["ppl2_wend40", "ppl2_zfull40"]
    assert all(0 < value < 1e9 for value in first.values())
    e.settings = Settings(CPU, batch=40)
    for name, value in e(G).items():
        assert value == pytest.approx(first[name], rel=0.05)  # differences of images are small numbers in float32


def test_path_length_is_computed_in_float32(tiny_data, snapshot):
    """The rounding of bfloat16 would be hundreds of times as large as a step on the path."""
    index, lengths = load_index(str(tiny_data)), []
    for at in ([], [8, 16]):
        G = load_snapshot(snapshot)
        blocks = {r: getattr(G.synthesis, f"b{r}") for r in G.synthesis.resolutions}
        for r, block in blocks.items():
            block.dtype = torch.bfloat16 if r in at else None
        e = Evaluator(index, 16, [parse("ppl2_wend16")], Settings(CPU))
        e.networks._loaded["lpips"] = features.Distance(Squares(), "")
        lengths.append(e(G)["ppl2_wend16"])
        assert [blocks[r].dtype for r in at] == [torch.bfloat16] * len(at)
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-3)
