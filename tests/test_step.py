"""One training step from inside: what it reads, draws and leaves, and what it needs at full size."""

import subprocess
import sys

import pytest
import torch

from stylegan_pg import ema
from stylegan_pg.data.index import load_index
from stylegan_pg.data.stream import batches
from stylegan_pg.game import Game
from stylegan_pg.parallel import Parallel
from stylegan_pg.schedule import phases
from stylegan_pg.settings import load_config


def players(data, *overrides):
    tiny = "resolution=16 growth.start=8 model.z_dim=8 model.w_dim=8 model.mapping_layers=2 model.channel_base=64"
    given = [f"data.url={data}", "run=unused", "train.batch=8", "growth.stable_kimg=0.016", "growth.fade_kimg=0.016"]
    config = load_config(None, [*tiny.split(), *given, "loss.r1_every=2", *overrides])
    p = Game(config, load_index(str(data)), Parallel(config))
    return p, phases(config)


def take(p, phase, count):
    p.enter(phase)
    p.nimg = phase.start
    data = batches(p.table, seed=0, start=phase.start, end=phase.end, batch=phase.batch, share=p.share, workers=0)
    return [p.step(batch)[0] for _, batch in zip(range(count), data, strict=False)]


def test_a_step_is_a_function_of_seed_and_nimg(tiny_data):
    results = []
    for _ in range(2):
        torch.manual_seed(torch.seed() % 1000)  # whatever the global stream holds
        p, plan = players(tiny_data)
        results.append((take(p, plan[0], 2), p.tensors()))
    (stats_a, a), (stats_b, b) = results
    assert stats_a == stats_b
    assert all(torch.equal(t, b[name]) for name, t in a.items())


def test_training_leaves_the_global_random_stream_alone(tiny_data):
    p, plan = players(tiny_data)
    p.enter(plan[0])
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    take(p, plan[0], 1)
    assert torch.equal(torch.rand(3), expected)


def test_growth_carries_over(tiny_data):
    for carry in ("carry", "reset"):
        p, plan = players(tiny_data, f"growth.optimizer={carry}")
        take(p, plan[0], 2)
        before = {k: t.clone() for k, t in p.tensors().items()}
        p.enter(plan[1])
        after = p.tensors()
        for name, t in after.items():
            part, rest = name.split("/", 1)
            if part in ("G", "D", "G_ema") and name in before:
                assert torch.equal(t, before[name]), name
            elif part == "G_ema":
                assert torch.equal(t, after["G/" + rest])  # new blocks start as G's
        moments = {k for k in after if k.startswith("opt_")}
        assert (moments == {k for k in before if k.startswith("opt_")}) == (carry == "carry")
        assert bool(moments) == (carry == "carry")


def test_stable_phase_after_a_fade_drops_the_old_way_out(tiny_data):
    p, plan = players(tiny_data, "model.g_architecture=orig", "model.d_architecture=orig")
    p.enter(plan[1])
    fading = set(p.tensors())
    p.enter(plan[2])
    assert fading - set(p.tensors()) >= {"G/synthesis.b8.torgb.weight", "D/b8.fromrgb.weight"}


def test_real_images_fade_too(tiny_data):
    p, plan = players(tiny_data)
    fade = plan[1]
    p.enter(fade)
    batch = next(batches(p.table, seed=0, start=16, end=24, batch=8, share=p.share, workers=0))
    p.nimg = fade.start
    soft = p.real_images(batch)[0]
    p.nimg = fade.start + fade.fade_length
    sharp = p.real_images(batch)[0]
    assert torch.equal(sharp, batch.image.float() / 127.5 - 1)
    p.nimg = fade.start + fade.fade_length // 2
    torch.testing.assert_close(p.real_images(batch)[0], (soft + sharp) / 2)
    roughness = [(x[..., 1:] - x[..., :-1]).abs().mean() for x in (soft, sharp)]
    assert roughness[0] < roughness[1]


def test_ema():
    G, G_ema = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    torch.nn.init.constant_(G.weight, 3.0)
    G.get_buffer("running_mean").fill_(5.0)
    ema.update(G_ema, G, 0.75)
    assert torch.allclose(G_ema.weight, torch.full([2], 0.75 * 1 + 0.25 * 3))
    assert torch.equal(G_ema.get_buffer("running_mean"), torch.full([2], 5.0))


@pytest.mark.slow
def test_a_full_size_step_fits_into_16_gib():
    """One step of D, R1, G and path length of stylegan2-ffhq1024.yaml with one image, on the CPU; peak memory of the
    whole process."""
    code = """
import resource
from stylegan_pg.settings import load_config
from stylegan_pg.data.index import DatasetIndex, SampleTable
from stylegan_pg.data.stream import Batch
from stylegan_pg.parallel import Parallel
from stylegan_pg.game import Game
from stylegan_pg.schedule import phases
import torch

config = load_config("stylegan2-ffhq1024", [
    "train.batch=1", "train.micro_batch=1", "train.device=cpu", "model.low_precision=fp32", "data.url=none"])

class Index:
    path, count, channels, label_names, base = "none", 1, 3, (), (4, 4)
    def table(self, resolution):
        return None

p = Game(config, Index(), Parallel(config))
p.enter(phases(config)[0])
stats, _ = p.step(Batch(torch.randint(0, 256, [1, 3, 1024, 1024], dtype=torch.uint8), None, []))
assert {"loss_g", "loss_d", "r1_penalty", "pl_length"} <= stats.keys()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.split()[-1]) < 16, f"{result.stdout} GiB"
