"""Plans: the estimated cost of a run, compared with sums by hand and with torch's counter on real tensors."""

import sys
from typing import Any

import harness
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from stylegan_pg.__main__ import main
from stylegan_pg.config import Config
from stylegan_pg.config.loading import load_config
from stylegan_pg.config.schedule import phases
from stylegan_pg.errors import UsageError
from stylegan_pg.losses.objectives import logistic_d, logistic_g
from stylegan_pg.losses.terms import path_lengths, r1
from stylegan_pg.networks import NETWORKS, NetworkShape
from stylegan_pg.planning import plan
from stylegan_pg.planning.cost import Cost, Meter, cost_of
from stylegan_pg.planning.plan import Machine, draw, make_plan, table

MODEL = {"model.channel_base": 128, "model.channel_max": 16, "model.z_dim": 16, "model.w_dim": 16}
MODEL["model.mapping_layers"] = 2
SMALL = ["run=runs/small", "data.url=none", "resolution=16", "growth.start=8", "train.batch=8"]
SMALL += ["growth.stable_kimg=1", "growth.fade_kimg=0.5"]


def config_of(*overrides: str) -> Config:
    name = next((o.partition("=")[2] for o in overrides if o.startswith("model.name=")), "stylegan2")
    own = harness.own_keys(MODEL, name)
    return load_config(None, [*SMALL, *(f"{key}={value}" for key, value in own.items()), *overrides])


@pytest.fixture
def square(monkeypatch):
    """Pretend that an image costs as many FLOPs as it has pixels, times a thousand, and a MiB, and that the networks
    need a GiB."""

    def cost(config, phase, channels, classes, meter=None):
        return Cost(1000, 2000, 1000.0 * phase.resolution**2, 2**30, 2.0**20)

    monkeypatch.setattr(plan, "cost_of", cost)


# --- what an image costs ----------------------------------------------------------------------------------------------


def flops_on_real_tensors(config: Config, index: int) -> float:
    """Return the FLOPs per image of a step that runs on the CPU, with lazy terms at their share."""
    phase, model = phases(config)[index], config.model
    shape = NetworkShape(phase.resolution, config.resolution, phase.fade, 3, 0, 4)
    pair = NETWORKS[model.name]
    G: Any = pair.G(**pair.g_kwargs(model, shape))
    D: Any = pair.D(**pair.d_kwargs(model, shape))
    z, real = torch.randn(4, model.z_dim), torch.randn(4, 3, *G.img_size)

    def counted(step, *, learns: torch.nn.Module) -> int:
        G.requires_grad_(learns is G)
        D.requires_grad_(learns is D)
        with FlopCounterMode(display=False) as counter:
            step().backward()
        return counter.get_total_flops()

    def d_main():
        with torch.no_grad():
            fake = G(z)
        return logistic_d(D(real), D(fake)).sum()

    def d_r1():
        x = real.clone().requires_grad_(True)
        y = x * 1  # the counter's hooks do not work where a leaf is the input of a module
        return r1(D(y), y).sum()

    def g_path_length():
        ws = G.styles(z)
        return path_lengths(G.synthesis(ws), ws, torch.randn_like(real)).sum()

    flops = counted(lambda: logistic_g(D(G(z))).sum(), learns=G) + counted(d_main, learns=D)
    return (flops + counted(d_r1, learns=D) / 16 + counted(g_path_length, learns=G) / 2 / 4) / 4


@pytest.mark.parametrize("index", [0, 1])
def test_flops_are_those_of_a_real_step(index):
    config = config_of()
    cost = cost_of(config, phases(config)[index], 3, 0)
    # Not exactly: the fused operators of the CPU skip two products whose gradient is known to vanish.
    assert cost.flops_per_image == pytest.approx(flops_on_real_tensors(config, index), rel=1e-3)


def test_a_meter_used_for_other_phases_gives_the_same_results():
    config, meter = config_of("loss.terms=[{name: gradient_penalty, every: 3}]"), Meter()
    for phase in phases(config):
        assert cost_of(config, phase, 3, 2, meter) == cost_of(config, phase, 3, 2)


def test_networks_that_are_updated_less_often_cost_less():
    config = config_of("loss.r1_gamma=0", "loss.pl_weight=0", "resolution=8", "train.total_kimg=1")
    seldom = config_of("loss.r1_gamma=0", "loss.pl_weight=0", "resolution=8", "train.total_kimg=1", "optim.d_steps=5")
    often, rare = (cost_of(c, phases(c)[0], 3, 0).flops_per_image for c in (config, seldom))
    d_alone = (5 * rare - often) / 4  # often = d + g, rare = d + g / 5
    assert 0 < d_alone < rare < often


def test_terms_without_a_weight_in_a_phase_cost_nothing_there():
    by_size, by_kimg = "loss.r1_gamma_at={16: 1}", "loss.terms=[{name: r2, weight: 0, weight_from: {1: 1}}]"
    configs = [config_of("loss.r1_gamma=0", *more) for more in ([], [by_size], [by_kimg])]
    none, *others = ([cost_of(c, phase, 3, 0).flops_per_image for phase in phases(c)] for c in configs)
    for costs in others:
        assert [a < b for a, b in zip(none, costs, strict=True)] == [False, True, True]


@pytest.mark.parametrize("name", ["progan", "mlp"])
def test_path_length_has_a_cost_without_a_mapping_to_learn(name):
    fixed = ("growth.start=null", "train.total_kimg=1", f"model.name={name}")
    with_it, without = config_of(*fixed), config_of(*fixed, "loss.pl_weight=0")
    more, less = (cost_of(c, phases(c)[0], 3, 0).flops_per_image for c in (with_it, without))
    assert more > less > 0


@pytest.mark.parametrize("objective", ["wgan", "relativistic"])
def test_further_objectives_and_terms_have_a_cost(objective):
    terms = "loss.terms=[{name: r2}, {name: gradient_penalty}, {name: drift}, {name: dragan}]"
    both = [config_of(f"loss.objective={objective}", *more) for more in ([], [terms])]
    plain, more = (cost_of(c, phases(c)[0], 3, 0).flops_per_image for c in both)
    assert more > plain > 0


# --- what it comes to -------------------------------------------------------------------------------------------------


def test_totals_agree_with_sums_by_hand(square):
    made = make_plan(config_of("train.batch=8", "train.micro_batch=4"), Machine(2, 1e9, 0.5))
    # 1 kimg at 8x8; 0.504 and 1 at 16x16 (whole batches).
    flops = [1000 * 1000 * 64, 504 * 1000 * 256, 1000 * 1000 * 256]
    assert [row.flops for row in made.rows] == flops
    assert made.flops == sum(flops)
    assert made.images == 2504
    assert [row.hours for row in made.rows] == pytest.approx([f / (2 * 1e9 * 0.5 * 3600) for f in flops])
    assert made.hours == pytest.approx(sum(flops) / 3.6e12)
    assert made.full_hours == pytest.approx(2504 * 256000 / 3.6e12)
    assert made.saved == pytest.approx(1 - sum(flops) / (2504 * 256000))
    assert made.saved == pytest.approx(0.75 * 1000 / 2504)  # three quarters of the first phase
    assert [row.micro for row in made.rows] == [4, 4, 4]
    assert {row.bytes for row in made.rows} == {2**30 + 4 * 2**20}
    text = table(made)
    assert f"2.504 kimg, {sum(flops):.4g} FLOPs" in text
    assert f"{made.saved:.1%} of the FLOPs are saved" in text
    assert re_table(text)[-1][-1] == f"{made.hours:.4g}"


def re_table(text: str) -> list[list[str]]:
    return [line.split() for line in text.split("\n\n")[0].splitlines()[1:]]


def test_nothing_is_saved_at_full_resolution(square):
    made = make_plan(config_of("growth.start=null", "train.total_kimg=1"), Machine())
    assert made.saved == 0
    assert made.hours == pytest.approx(made.full_hours)


def test_a_run_that_ends_before_full_resolution(square):
    made = make_plan(config_of("train.total_kimg=1"), Machine())
    assert [str(row.phase) for row in made.rows] == ["8x8 stable"]
    assert made.saved == pytest.approx(0.75)


def test_the_busiest_device_determines_the_time(square):
    even = make_plan(config_of("train.batch=24"), Machine(3))
    uneven = make_plan(config_of("train.batch=24"), Machine(4))  # six groups of four: 2, 2, 1, 1
    idle = make_plan(config_of("train.batch=24"), Machine(64))
    assert [p.rows[0].share for p in (even, uneven, idle)] == [8, 8, 4]
    assert uneven.hours == pytest.approx(even.hours)
    assert idle.hours == pytest.approx(even.hours / 2)
    assert "some devices wait" not in table(even)
    assert "in groups of 4 uses 75% of 4 devices" in table(uneven)
    assert "in groups of 4 uses 9% of 64 devices" in table(idle)


def test_micro_batches_of_a_share(square):
    for micro, expected in ((0, 24), (4, 4), (8, 8), (16, 12), (100, 24)):
        made = make_plan(config_of("train.batch=24", f"train.micro_batch={micro}"), Machine())
        assert made.rows[0].micro == expected


# --- the picture ------------------------------------------------------------------------------------------------------


def test_the_picture_is_not_blank(square, tmp_path):
    out = tmp_path / "plan.png"
    draw(make_plan(config_of(), Machine()), out, "small")
    picture = Image.open(out).convert("RGB")
    assert min(picture.size) > 500
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(-1, 3)
    assert 0.002 < (pixels < 250).any(dim=1).float().mean() < 0.5
    wide, high = picture.size
    for third in range(3):  # each part contains some of the blue line
        part = picture.crop((0, third * high // 3, wide, (third + 1) * high // 3))
        part = torch.frombuffer(bytearray(part.tobytes()), dtype=torch.uint8).reshape(-1, 3).int()
        assert ((part - torch.tensor([31, 119, 180])).abs().amax(dim=1) < 40).sum() > 50
    assert [p.name for p in tmp_path.iterdir()] == ["plan.png"]


def test_a_plan_from_the_command_line(square, tmp_path, monkeypatch, capsys):
    out = tmp_path / "plan.png"
    arguments = ["plan", "demo", "--devices", "2", "--device-flops", "1e12", "--out", str(out), "train.batch=64"]
    monkeypatch.setattr(sys, "argv", ["stylegan-pg", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "64x64 stable" in text
    assert "on 2 devices of 1e+12 FLOPs per second, if 30% of that is used" in text
    assert out.stat().st_size > 10_000


def test_an_automatic_schedule_uses_the_given_number_of_devices(square, monkeypatch, capsys):
    def printed(*more: str) -> str:
        auto = ["growth.schedule=auto", "train.total_kimg=1000", "growth.start=8"]
        monkeypatch.setattr(sys, "argv", ["stylegan-pg", "plan", "demo", *auto, *more])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
        return capsys.readouterr().out

    def batches(text: str) -> list[str]:
        return [line.split()[3] for line in text.splitlines() if " stable " in line or " fade " in line]

    told = "growth.schedule=auto for 64 devices: train with growth.devices=64 instead of 8"
    plain, given, said = printed(), printed("--devices", "64"), printed("growth.devices=64")
    assert told in given
    assert told not in plain + said
    assert batches(given) == batches(said) != batches(plain)
    both = printed("--devices", "64", "growth.devices=8")
    assert batches(both) == batches(plain)
    assert told not in both


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "0"], "--devices 0 is not possible"),
        (["--devices", "-3"], "--devices -3 is not possible"),
        (["--device-flops=-4e14"], "--device-flops -4e+14 is not possible"),
        (["--device-flops=nan"], "--device-flops nan is not possible"),
        (["--device-flops=inf"], "--device-flops inf is not possible"),
        (["--utilisation", "0"], "--utilisation 0 is not possible"),
        (["--utilisation", "1.5"], "--utilisation 1.5 is not possible"),
        (["--out", "plan.jpg"], "ends in .png"),
        (["--out", "nowhere/plan.png"], "there is no folder nowhere"),
        (["--out", "folder.png"], "cannot be written"),
        (["--out", "x" * 300 + ".png"], "cannot be written"),
        (["train.bacth=8"], "did you mean 'train.batch'"),
        (["growth.schedule=auto", "train.total_kimg=0.1"], "raise train.total_kimg"),
        (["growth.schedule=auto"], "train.total_kimg=None"),
    ],
)
def test_bad_input_is_reported_in_one_line(square, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(sys, "argv", ["stylegan-pg", "plan", "demo", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert [p.name for p in tmp_path.iterdir()] == ["folder.png"]


def test_the_dry_run_of_training_is_the_same_table(square):
    config = config_of()
    assert table(make_plan(config, Machine())) in plan.describe(config)
    with pytest.raises(UsageError):
        make_plan(config_of("growth.stable_kimg=0", "growth.fade_kimg=0"), Machine())


def test_notes_at_the_start_of_training_are_part_of_the_description(tiny_data, tmp_path, capsys, monkeypatch):
    (tmp_path / "c.yaml").write_text(f"run: {tmp_path / 'run'}\nresolution: 16\ndata: {{url: {tiny_data}}}\n")
    for arguments in (["train", "--dry-run"], ["plan"]):
        given = [arguments[0], str(tmp_path / "c.yaml"), "growth.start=8", "train.batch=7", *arguments[1:]]
        monkeypatch.setattr(sys, "argv", ["stylegan-pg", *given])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
        notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
        assert len(notes) == 2
        assert "minibatch stddev does nothing" in notes[0]
        assert "give data.conditional=true" in notes[1]
