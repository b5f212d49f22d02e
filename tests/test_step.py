"""A single training step: its inputs, its random numbers, its results, and its memory at full size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stylegan_pg.config.loading import load_config
from stylegan_pg.config.schedule import phases
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.loader.loader import batches
from stylegan_pg.optim import ema
from stylegan_pg.training.devices import Devices
from stylegan_pg.training.engine import Engine
from stylegan_pg.training.inputs import on_device
from stylegan_pg.training.train_state import TrainState


def engine_of(data, *overrides):
    tiny = "resolution=16 growth.start=8 model.z_dim=8 model.w_dim=8 model.mapping_layers=2 model.channel_base=64"
    given = [f"data.url={data}", "run=unused", "train.batch=8", "growth.stable_kimg=0.016", "growth.fade_kimg=0.016"]
    config = load_config(None, [*tiny.split(), *given, "loss.r1_every=2", *overrides])
    return Engine(TrainState(config, load_index(str(data)), Devices(config))), phases(config)


def read(state, start, end, batch):
    share = state.micro_batches.share
    return batches(state.table, state.index.order(seed=0), start=start, end=end, batch=batch, share=share, workers=0)


def take(engine, phase, count):
    engine.state.enter(phase)
    engine.state.nimg = phase.start
    data = read(engine.state, phase.start, phase.end, phase.batch)
    return [engine.step(batch).stats for _, batch in zip(range(count), data, strict=False)]


def test_a_step_is_a_function_of_seed_and_nimg(tiny_data):
    results = []
    for _ in range(2):
        torch.manual_seed(torch.seed() % 1000)  # any state of the global stream
        engine, plan = engine_of(tiny_data)
        results.append((take(engine, plan[0], 2), engine.state.tensors()))
    (stats_a, a), (stats_b, b) = results
    assert stats_a == stats_b
    assert all(torch.equal(t, b[name]) for name, t in a.items())


def test_training_does_not_use_the_global_random_stream(tiny_data):
    engine, plan = engine_of(tiny_data)
    engine.state.enter(plan[0])
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    take(engine, plan[0], 1)
    assert torch.equal(torch.rand(3), expected)


def test_growth_keeps_the_state(tiny_data):
    for carry in ("carry", "reset"):
        engine, plan = engine_of(tiny_data, f"growth.optimizer={carry}")
        take(engine, plan[0], 2)
        before = {k: t.clone() for k, t in engine.state.tensors().items()}
        engine.state.enter(plan[1])
        after = engine.state.tensors()
        for name, t in after.items():
            part, rest = name.split("/", 1)
            if part in ("G", "D", "G_ema") and name in before:
                assert torch.equal(t, before[name]), name
            elif part == "G_ema":
                assert torch.equal(t, after["G/" + rest])  # new blocks start as copies of G's
        moments = {k for k in after if k.startswith("opt_")}
        assert (moments == {k for k in before if k.startswith("opt_")}) == (carry == "carry")
        assert bool(moments) == (carry == "carry")


def test_the_stable_phase_after_a_fade_removes_the_old_output_layer(tiny_data):
    engine, plan = engine_of(tiny_data, "model.g_architecture=orig", "model.d_architecture=orig")
    engine.state.enter(plan[1])
    fading = set(engine.state.tensors())
    engine.state.enter(plan[2])
    assert fading - set(engine.state.tensors()) >= {"G/synthesis.b8.torgb.weight", "D/b8.fromrgb.weight"}


def test_real_images_fade_too(tiny_data):
    engine, plan = engine_of(tiny_data)
    fade = plan[1]
    engine.state.enter(fade)
    batch = next(read(engine.state, 16, 24, 8))
    engine.state.nimg = fade.start
    soft = on_device(batch, engine.state)["image"]
    engine.state.nimg = fade.start + fade.fade_length
    sharp = on_device(batch, engine.state)["image"]
    assert torch.equal(sharp, batch.image.float() / 127.5 - 1)
    engine.state.nimg = fade.start + fade.fade_length // 2
    torch.testing.assert_close(on_device(batch, engine.state)["image"], (soft + sharp) / 2)
    roughness = [(x[..., 1:] - x[..., :-1]).abs().mean() for x in (soft, sharp)]
    assert roughness[0] < roughness[1]


def test_ema():
    G, G_ema = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    torch.nn.init.constant_(G.weight, 3.0)
    G.get_buffer("running_mean").fill_(5.0)
    ema.update(G_ema, G, torch.tensor(0.25))
    assert torch.allclose(G_ema.weight, torch.full([2], 0.75 * 1 + 0.25 * 3))
    assert torch.equal(G_ema.get_buffer("running_mean"), torch.full([2], 5.0))


@pytest.mark.slow
def test_memory_of_a_full_size_step():
    """One step of G and D with all terms at 1024x1024 with one image on the CPU. The peak memory (GiB) is that of the
    whole process. The other architectures and phases are in tests/campaigns."""
    script = Path(__file__).parent / "campaigns" / "full_size_steps.py"
    command = [sys.executable, str(script), "stylegan2-ffhq1024", "stable"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["gib"] < 16
