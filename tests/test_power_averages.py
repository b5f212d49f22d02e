"""Power-function averages: profiles and their combinations against independent computations, the update on the device,
and what is made of files."""

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from configuring import config_of, refused
from safetensors.torch import save_file
from snapshots import built, command, saved

from stylegan_pg.checkpoint import averages as files
from stylegan_pg.checkpoint.names import meant_snapshot, of_training
from stylegan_pg.checkpoint.snapshot import load_snapshot, read_snapshot, save_snapshot, write_snapshot
from stylegan_pg.config.schedule import crossed, phases
from stylegan_pg.editing import averages as editing
from stylegan_pg.editing.width_sweep import parse_widths
from stylegan_pg.errors import UsageError
from stylegan_pg.explorer.library import Source
from stylegan_pg.optim.ema import PowerAverage
from stylegan_pg.optim.profiles import Profile, combine, gamma_of, inner, step_inner, step_weight, width_of
from stylegan_pg.planning import averages as planning
from stylegan_pg.planning.advice import without_effect

WIDTHS = [0.001, 0.02, 0.05, 0.1, 0.2, 0.288]


def step_profile(gamma: float, n: int, steps: int) -> np.ndarray:
    """The weight of each of `steps` steps in the average after n of them, by the definition as an integral."""
    k = np.arange(steps + 1)
    return np.diff(np.minimum(k / n, 1.0) ** (gamma + 1))


# --- profiles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
def test_exponents_of_relative_widths(width):
    """The width is the standard deviation of the profile on [0, 1], here by quadrature."""
    gamma = gamma_of(width)
    assert width_of(gamma) == pytest.approx(width, rel=1e-12)
    edges = 1 - np.geomspace(1, 1e-9, 200_001)  # dense near 1, where narrow profiles are
    x, mass = (edges[1:] + edges[:-1]) / 2, np.diff(edges ** (gamma + 1))
    mean = float(mass @ x)
    assert math.sqrt(mass @ (x - mean) ** 2) == pytest.approx(width, rel=1e-5)


def test_published_exponents():
    """Karras et al. 2024, section 3.1: widths of 0.05 and 0.10 are exponents of 16.97 and 6.94."""
    assert [round(gamma_of(width), 2) for width in (0.05, 0.10)] == [16.97, 6.94]


@pytest.mark.parametrize("width", [0, -1, 0.0009, 0.29, 1, math.nan, math.inf])
def test_impossible_widths(width):
    with pytest.raises(UsageError, match=r"give a relative width from 0\.001 to 0\.288"):
        gamma_of(width)


@pytest.mark.parametrize("width", WIDTHS)
def test_updates_give_the_profile(width):
    """The product of all decays is the integral of the profile over each step."""
    gamma, n, batch = gamma_of(width), 40, 8
    weights = np.zeros(n)
    for k in range(n):
        weight = step_weight(gamma, batch, (k + 1) * batch)
        weights *= 1 - weight
        weights[k] = weight
    assert weights == pytest.approx(step_profile(gamma, n, n), abs=1e-12)
    assert step_weight(gamma, 8, 8) == 1


def test_inner_products():
    """Integrals of products, by quadrature on a grid that ends at the earlier moment."""
    profiles = [Profile(gamma_of(width), t) for width in (0.05, 0.1, 0.25) for t in (3.0, 7.0, 20.0)]
    found = inner(profiles, profiles)
    nodes, quadrature = np.polynomial.legendre.leggauss(200)
    for (i, a), (j, b) in itertools.product(enumerate(profiles), repeat=2):
        end = min(a.t, b.t)
        tau = (nodes + 1) * end / 2
        values = [(p.gamma + 1) * tau**p.gamma / p.t ** (p.gamma + 1) for p in (a, b)]
        assert found[i, j] == pytest.approx(float(quadrature @ (values[0] * values[1])) * end / 2, rel=1e-9)


def test_inner_products_of_long_runs_and_narrow_profiles_do_not_overflow():
    assert np.isfinite(inner([Profile(gamma_of(0.001), 4e9)], [Profile(gamma_of(0.001), 1e3)])).all()
    assert inner([Profile(gamma_of(0.001), 4e9)], [Profile(gamma_of(0.001), 4e9)])[0, 0] > 0


@pytest.mark.parametrize("width", [0.02, 0.07, 0.2])
def test_combinations_are_the_least_squares_solution(width):
    """Compared with a QR factorisation of the profiles themselves, on a grid of quadrature points, restricted to
    weights whose sum is 1."""
    stored = [Profile(gamma_of(w), t) for w in (0.05, 0.1) for t in np.linspace(10, 100, 10)]
    wanted = Profile(gamma_of(width), 100.0)
    nodes, quadrature = np.polynomial.legendre.leggauss(24)
    starts = np.arange(0, 100, 10.0)
    tau = (starts[:, None] + (nodes + 1) * 5).reshape(-1)
    root = np.sqrt(np.tile(quadrature * 5, len(starts)))
    columns = [np.where(tau < p.t, (p.gamma + 1) * (tau / p.t) ** p.gamma / p.t, 0) * root for p in [*stored, wanted]]
    *given, target = columns
    matrix = np.stack(given, axis=1)
    differences = matrix[:, 1:] - matrix[:, :1]  # x_0 = 1 - the sum of the others
    others = np.linalg.lstsq(differences, target - matrix[:, 0], rcond=None)[0]
    x = np.concatenate([[1 - others.sum()], others])
    found = combine(stored, wanted)
    assert found.weights.sum() == pytest.approx(1, abs=1e-13)
    assert found.weights == pytest.approx(x, rel=1e-6, abs=1e-6)
    residual = np.linalg.norm(matrix @ x - target) / np.linalg.norm(target)
    assert found.residual == pytest.approx(residual, rel=1e-5)


@pytest.mark.parametrize("width", [0.02, 0.08, 0.2])
def test_short_runs_are_combined_by_steps(width):
    """As many files as steps give every width without an error."""
    stored = [Profile(gamma_of(w), t) for w in (0.05, 0.1) for t in range(16, 193, 16)]
    found = combine(stored, Profile(gamma_of(width), 192.0), batch=8)
    profile = sum(x * step_profile(p.gamma, round(p.t / 8), 24) for x, p in zip(found.weights, stored, strict=True))
    assert profile == pytest.approx(step_profile(gamma_of(width), 24, 24), abs=1e-5)
    assert found.residual < 1e-4
    assert combine(stored, Profile(gamma_of(width), 192.0)).residual > found.residual


def test_sums_over_steps_come_near_the_integrals():
    stored = [Profile(gamma_of(w), t) for w in (0.05, 0.1) for t in (8000.0, 16000.0)]
    assert step_inner(stored, stored, 4) == pytest.approx(inner(stored, stored), rel=1e-4)
    wanted = Profile(gamma_of(0.07), 16000.0)
    ours, theirs = combine(stored, wanted, batch=4), combine(stored, wanted)
    assert ours.weights == pytest.approx(theirs.weights, abs=1e-3)
    assert combine(stored, wanted, batch=1).weights.tolist() == theirs.weights.tolist()  # many steps


def test_a_stored_profile_is_taken_as_it_is():
    stored = [Profile(gamma_of(w), t) for w in (0.05, 0.1) for t in (8.0, 16.0, 24.0)]
    for i, profile in enumerate(stored):
        found = combine(stored, profile)
        assert found.weights.tolist() == np.eye(6)[i].tolist()
        assert found.residual == 0


@pytest.mark.parametrize("moments", [[5.0], [5.0, 5.0], [5.0, 5.0 + 1e-7, 7.0], list(np.linspace(1e4, 2.5e7, 300))])
def test_combinations_of_few_many_and_nearly_equal_moments(moments):
    """Weights stay small, so that rounding of the files is not magnified."""
    stored = [Profile(gamma_of(w), t) for w in (0.05, 0.1) for t in moments]
    found = combine(stored, Profile(gamma_of(0.08), moments[-1]))
    assert found.weights.sum() == pytest.approx(1, abs=1e-12)
    assert np.abs(found.weights).max() < 10
    assert found.residual < 0.25


# --- the update -------------------------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    mean: torch.Tensor
    count: torch.Tensor

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones([3, 5], dtype=dtype))
        self.register_buffer("mean", torch.ones([2], dtype=dtype))
        self.register_buffer("count", torch.tensor(0))


def test_an_average_equals_the_sum_of_its_definition():
    net, steps, batch, start = Net(torch.float64), 30, 4, 1000
    average = PowerAverage(0.1, net, start)
    seen: list[dict[str, torch.Tensor]] = []
    torch.manual_seed(0)
    for k in range(steps):
        with torch.no_grad():
            net.weight.add_(torch.randn_like(net.weight))
            net.mean += torch.randn_like(net.mean)
            net.count += 2
        seen.append({name: t.clone() for name, t in net.state_dict().items()})
        average.update(net, torch.tensor(average.weight(batch, start + (k + 1) * batch), dtype=torch.float64))
    profile = step_profile(gamma_of(0.1), steps, steps)
    for name in ("weight", "mean"):
        expected = torch.stack([w * state[name] for w, state in zip(profile, seen, strict=True)]).sum(dim=0)
        assert torch.allclose(average.tensors[name], expected, rtol=1e-13, atol=1e-13)
    assert int(average.tensors["count"]) == 2 * steps


def test_small_weights_are_not_rounded_away():
    """Late in a long run a step changes the average by less than half a unit of its last place. Without compensation
    it would not move at all."""
    net, weight = Net(), 2e-5
    average = PowerAverage(0.05, net, 0)
    with torch.no_grad():
        net.weight.fill_(1.001)
    assert float(torch.tensor(1.0) + weight * (net.weight.detach()[0, 0] - 1)) == 1
    for _ in range(20_000):
        average.update(net, torch.tensor(weight))
    expected = 1 + (float(net.weight.detach()[0, 0]) - 1) * (1 - (1 - weight) ** 20_000)
    assert average.tensors["weight"][0, 0].item() == pytest.approx(expected, abs=1e-7)


# --- the configuration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["[0.05,0.5]", "[0]", "[0.05,0.05]", "[0.05,0.0500000001]", "[0.05,0.1,0.0501]", "[-0.1]"]
)
def test_impossible_profiles(text):
    assert "ema.profiles=" in (message := refused(f"ema.profiles={text}"))
    assert "a list of relative widths from 0.001 to 0.288, 1 % apart" in message


def test_profiles_are_given_as_lists():
    assert config_of().ema.profiles == []
    assert config_of("ema.profiles=0.05,0.1").ema.profiles == config_of("ema.profiles=[0.05, 0.1]").ema.profiles
    assert "ema.every_kimg=-1.0 is not possible" in refused("ema.every_kimg=-1")


@pytest.mark.parametrize("every", [0, 0.001, 0.02, 0.05, 0.3, 7])
def test_the_number_of_files_in_plans(every):
    """Counted step by step, as training does."""
    config = config_of(
        *("resolution=16", "growth.start=8", "growth.stable_kimg=0.3", "growth.fade_kimg=0.2", "train.total_kimg=1"),
        *("train.batch=8", "train.batch_at={8: 12}", "ema.profiles=[0.05,0.1]", f"ema.every_kimg={every}"),
    )
    expected = 0
    for phase in phases(config):
        for before in range(phase.start, phase.end, phase.batch):
            expected += crossed(every, before, before + phase.batch) or before + phase.batch == phase.end
    found = planning.cost(config, [(phase, 1000) for phase in phases(config)])
    assert found is not None
    assert (found.files, found.bytes) == (2 * expected, 2 * 2 * 4 * 1000)
    assert found.stored == 2 * expected * 4000
    assert planning.cost(config_of(), [(phase, 1000) for phase in phases(config_of())]) is None


# --- files ------------------------------------------------------------------------------------------------------------


def store(
    folder: Path, width: float, nimg: int, since: int = 0, changes: dict[str, Any] | None = None, **how: Any
) -> tuple[dict[str, torch.Tensor], Path]:
    """Write a stored average with weights of its own."""
    G, description = built(**how)
    torch.manual_seed(nimg + round(1e4 * width))
    tensors = {name: t + 0.1 * torch.randn_like(t) for name, t in G.state_dict().items()}
    buffers = [name for name, _ in G.named_buffers()]
    path = folder / files.file_name(width, f"{nimg:09d}img")
    entry = files.entry(width, since, since, 8, buffers)
    folder.mkdir(parents=True, exist_ok=True)
    write_snapshot(path, tensors, {**description, "nimg": nimg, "ema": entry, **(changes or {})})
    return tensors, path


@pytest.fixture
def run(tmp_path) -> tuple[Path, dict[tuple[float, int], dict[str, torch.Tensor]]]:
    """A run's folder with averages of two widths at four moments of a phase that began at nimg 100, and of one moment
    of the phase before; and their tensors."""
    folder = tmp_path / "run"
    (folder / "snapshots").mkdir(parents=True)
    kept = {(w, n): store(folder / "averages", w, n, 100)[0] for w in (0.05, 0.1) for n in (140, 180, 220, 260)}
    store(folder / "averages", 0.05, 96, 0, resolution=8)
    return folder, kept


def test_stored_averages_are_found_in_order(run):
    folder, kept = run
    (folder / "averages" / "notes.safetensors").write_bytes(b"of another program")
    found = files.found(folder / "averages")
    assert [(one.width, one.nimg, one.since) for one in found][:3] == [(0.05, 96, 0), (0.05, 140, 100), (0.1, 140, 100)]
    assert len(found) == len(kept) + 1


@pytest.mark.parametrize("width", [0.05, 0.1])
@pytest.mark.parametrize("nimg", [140, 220, 260])
def test_a_stored_width_after_the_fact_equals_the_stored_one(run, width, nimg):
    folder, kept = run
    made, fit = editing.post_hoc(folder, width, nimg / 1000)
    assert fit.residual == 0
    assert made.tensors.keys() == kept[width, nimg].keys()
    for name, t in made.tensors.items():
        assert torch.equal(t, kept[width, nimg][name]), name
    assert made.description["nimg"] == nimg
    assert [part["weight"] for part in made.description["ema"]["made_of"]] == [1.0]


def test_another_width_is_the_weighted_sum(run):
    folder, kept = run
    made, fit = editing.post_hoc(folder, 0.07)
    order = sorted(kept, key=lambda key: (key[1], key[0]))
    wanted = combine([Profile(gamma_of(w), n - 100) for w, n in order], Profile(gamma_of(0.07), 160.0), batch=8)
    assert fit.weights == pytest.approx(wanted.weights)
    for name, t in made.tensors.items():
        parts = [x * kept[key][name].double() for x, key in zip(wanted.weights, order, strict=True)]
        expected = torch.stack(parts).sum(dim=0)
        positive = torch.stack([kept[key][name] for key in order]).min(dim=0).values > 0
        same = torch.isclose(t.double(), expected, rtol=1e-6, atol=1e-6)
        assert bool((same | (positive & (expected <= 0))).all()), name
        assert t.dtype == torch.float32
    ema = made.description["ema"]
    assert (ema["width"], ema["since"], len(ema["made_of"])) == (0.07, 100, 8)


def test_checkpoints_are_not_replaced(run, tmp_path):
    folder, _ = run
    other, snapshot = tmp_path / "000000100.safetensors", saved(tmp_path / "G.safetensors", {"nimg": 220})[1]
    save_file({"G/x": torch.ones(3)}, other)
    before = other.read_bytes()
    for out, reason in (
        (other, "is there, and is no snapshot"),
        (snapshot, "would replace what the average is made of"),
    ):
        with pytest.raises(UsageError, match=reason):
            editing.check_out(out, [snapshot])
    editing.check_out(snapshot)
    made, _ = editing.post_hoc(folder, 0.07)
    with pytest.raises(UsageError, match="is no snapshot"):
        made.save(other)
    assert other.read_bytes() == before


def test_averages_do_not_count_as_snapshots_of_training(run):
    """Neither for `sample RUN` nor for the explorer's slider."""
    folder, _ = run
    for name in ("000000100img", "best-000000180img", "ema-0.07-000000180img", "ema-0.07-000000260img"):
        saved(folder / "snapshots" / f"{name}.safetensors", {"nimg": 180})
    found = [path.name[:-12] for path in of_training(folder / "snapshots")]
    assert found == ["000000100img", "best-000000180img"]
    assert [one.name[:-12] for one in Source("run", folder).snapshots()] == found


def test_the_moment_that_is_meant(run):
    """That of a file within the batch behind it, of a snapshot that is given, or the newest."""
    folder, _ = run
    assert editing.moment_of(folder).nimg == 260
    assert editing.moment_of(folder, 0.175).nimg == 180  # within a batch of 8
    assert editing.moment_of(folder / "averages", 0.18).nimg == 180
    between = editing.moment_of(folder, 0.150)
    assert (between.nimg, len(between.used)) == (150, 4)  # and what was stored next, at 180
    _, snapshot = saved(folder / "snapshots" / "000000220img.safetensors", {"nimg": 220})
    assert editing.moment_of(snapshot).nimg == 220
    assert editing.moment_of(folder / "averages" / "width0.05-000000180img.safetensors").nimg == 180
    assert editing.moment_of(folder, 0.09).newest.since == 0  # of the phase before, by itself


def test_poor_fits_are_told(run, capsys, monkeypatch):
    folder, _ = run
    for arguments, advice in (
        (["--width", 0.07, "--at", 0.150], "nothing was stored at 0.15 kimg, take --at 0.14 or --at 0.18"),
        (["--width", 0.002], "take a width nearer to theirs, or a later moment"),
        (["--width", 0.07], ""),
    ):
        code, printed, told = command(capsys, monkeypatch, "ema", folder, *arguments)
        assert code == 0
        assert Path(printed.strip()).is_file()
        assert ("fit the profile of width" in told) == bool(advice)
        assert advice in told


@pytest.mark.parametrize("at", [0.098, 0.3, 1e6, 0, -1, math.nan])
def test_moments_without_averages(run, at):
    folder, _ = run
    with pytest.raises(UsageError) as error:
        editing.moment_of(folder, at)
    if at in (0.3, 1e6):
        assert "stored reaches from 0 to 0.096 kimg, and from 0.1 to 0.26 kimg" in str(error.value)


def test_averages_that_began_later_are_not_mixed_with_others(run):
    folder, _ = run
    for nimg in (220, 260):
        store(folder / "averages", 0.02, nimg, 180)
    moment = editing.moment_of(folder, 0.26)
    assert {one.since for one in moment.used} == {100}
    assert 0.02 not in {one.width for one in moment.used}


def test_alpha_follows_the_fade(tmp_path):
    """It rises from 0 at the start of the phase, also where an average began later."""
    for since in (100, 180):
        folder = tmp_path / str(since) / "averages"
        for nimg, alpha in ((220, 0.3), (300, 0.5)):
            entry = {"width": 0.05, "phase": 100, "since": since, "batch": 8, "buffers": []}
            store(folder, 0.05, nimg, since, {"alpha": alpha, "ema": entry}, fade=True)
        assert editing.moment_of(tmp_path / str(since), 0.3).alpha == 0.5
        assert editing.moment_of(tmp_path / str(since), 0.22).alpha == pytest.approx(0.3)
        assert editing.moment_of(tmp_path / str(since), 0.26).alpha == pytest.approx(0.4)


def test_buffers_above_zero_stay_so(tmp_path):
    """Weights may be below 0. A mean square that would become negative is that of the heaviest average."""
    total = editing._Sum(["square"])
    for weight, value in ((1.5, 1.0), (-0.5, 4.0)):
        total.add(
            {"square": torch.tensor([value, 1.0]), "w": torch.tensor([value]), "n": torch.tensor(value).int()}, weight
        )
    found = total.result()
    assert found["square"].tolist() == [1.0, 1.0]
    assert found["w"].tolist() == [-0.5]
    assert found["n"].item() == 1


def test_constant_buffers_and_weights_stay_bit_for_bit(tmp_path):
    G, description = built()
    state = G.state_dict()
    for width, nimg in itertools.product((0.05, 0.1), range(8, 200, 8)):
        entry = files.entry(width, 0, 0, 8, [name for name, _ in G.named_buffers()])
        (tmp_path / "averages").mkdir(exist_ok=True)
        path = tmp_path / "averages" / files.file_name(width, f"{nimg:09d}img")
        write_snapshot(path, state, {**description, "nimg": nimg, "ema": entry})
    made, _ = editing.post_hoc(tmp_path, 0.02)
    assert {name for name, t in made.tensors.items() if not torch.equal(t, state[name])} == set()


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "bytes":
        data[-5] ^= 1
    elif how == "cut":
        data = data[: len(data) // 2]
    elif how == "empty":
        data = bytearray()
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["bytes", "cut", "empty"])
def test_damaged_files_are_named(run, how):
    folder, _ = run
    damage(folder / "averages" / "width0.1-000000180img.safetensors", how)
    with pytest.raises(UsageError) as error:
        editing.post_hoc(folder, 0.07)
    assert "width0.1-000000180img.safetensors" in str(error.value)
    assert "move the file out of" in str(error.value)
    (folder / "averages" / "width0.1-000000180img.safetensors").unlink()
    assert editing.post_hoc(folder, 0.07)[1].residual < 0.2


@pytest.mark.parametrize(
    "changes",
    [
        {"ema": None},
        {"ema": []},
        {"ema": {"width": 0.05}},
        {"ema": {"width": "x", "phase": 0, "since": 0, "batch": 8, "buffers": []}},
        {"ema": {"width": 0.9, "phase": 0, "since": 0, "batch": 8, "buffers": []}},
        {"ema": {"width": 0.05, "phase": 0, "since": 10**9, "batch": 8, "buffers": []}},
        {"ema": {"width": 0.05, "phase": 50, "since": 0, "batch": 8, "buffers": []}},
        {"ema": {"width": 0.05, "phase": 0, "since": 0, "batch": 0, "buffers": []}},
        {"ema": {"width": 0.05, "phase": 0, "since": 0, "batch": 8, "buffers": [1]}},
        {"nimg": 0},
        {"nimg": None},
        {"alpha": "1"},
        {"kwargs": 3},
    ],
)
def test_hostile_descriptions(tmp_path, changes):
    store(tmp_path / "averages", 0.05, 160, 0, changes)
    with pytest.raises(UsageError, match=r"width0\.05-000000160img"):
        editing.post_hoc(tmp_path, 0.05)


def test_files_of_another_network_are_refused(run):
    folder, _ = run
    store(folder / "averages", 0.08, 220, 100, channel_max=4)
    with pytest.raises(UsageError, match="has another network than") as error:
        editing.post_hoc(folder, 0.07)
    assert "channel_max is 4, not 8" in str(error.value)


@pytest.mark.parametrize("change", ["shape", "missing", "more"])
def test_tensors_that_do_not_fit_are_refused(run, change):
    folder, _ = run
    path = folder / "averages" / "width0.1-000000180img.safetensors"
    description, tensors = read_snapshot(path)
    name = min(tensors)
    changed = {"shape": {name: tensors[name][:0]}, "missing": {}, "more": {"a": torch.zeros(1), name: tensors[name]}}
    write_snapshot(path, {n: t for n, t in tensors.items() if n != name} | changed[change], description)
    with pytest.raises(UsageError, match=r"width0\.1-000000180img.* is of another network"):
        editing.post_hoc(folder, 0.07)


def test_the_interval_has_no_effect_without_profiles():
    given = ["run=x", "data.url=y", "train.total_kimg=1", "ema.every_kimg=5"]
    (line,) = without_effect(None, given)
    assert "ema.every_kimg" in line
    assert "no averages are kept" in line
    assert without_effect(None, [*given, "ema.profiles=[0.05]"]) == []


def test_numbers_that_are_not_finite_are_refused(run):
    folder, _ = run
    path = folder / "averages" / "width0.1-000000180img.safetensors"
    description, tensors = read_snapshot(path)
    next(iter(tensors.values())).reshape(-1)[0] = math.nan
    write_snapshot(path, tensors, description)
    with pytest.raises(UsageError, match="not finite"):
        editing.post_hoc(folder, 0.07)


def test_a_post_hoc_snapshot_is_not_taken_for_the_newest(run):
    folder, _ = run
    _, plain = saved(folder / "snapshots" / "000000180img.safetensors", {"nimg": 180})
    made, _ = editing.post_hoc(folder, 0.07)
    path = editing.path_of(editing.moment_of(folder), 0.07)
    assert path == folder / "snapshots" / "ema-0.07-000000260img.safetensors"
    made.save(path)
    assert meant_snapshot(folder)[0] == plain
    plain.unlink()
    assert meant_snapshot(folder)[0] == path
    assert load_snapshot(path)(torch.zeros([1, 8])).shape == (1, 3, 16, 16)


def test_later_files_are_cut_back(run):
    folder, kept = run
    (folder / "averages" / "width0.2-000000999img.safetensors").write_bytes(b"no snapshot")
    files.cut_back(folder / "averages", 200)
    names = {path.name for path in (folder / "averages").iterdir()}
    assert names == {
        *(files.file_name(w, f"{n:09d}img") for w, n in kept if n <= 200),
        "width0.05-000000096img.safetensors",
        "width0.2-000000999img.safetensors",
    }
    files.cut_back(folder / "nowhere", 0)


# --- averages of snapshots --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stylegan2", "stylegan3", "r3gan", "progan", "stylegan"])
@pytest.mark.parametrize("weights", [[1 / 3] * 3, [0.5, 0.25, 0.25], [0, 0, 1]])
def test_an_average_of_snapshots(tmp_path, name, weights):
    states, paths = [], []
    for i in range(3):
        G, description = built(name=name)
        torch.manual_seed(i)
        with torch.no_grad():
            for t in G.state_dict().values():
                t += torch.rand_like(t)
        states.append(G.state_dict())
        paths.append(tmp_path / f"{i}.safetensors")
        save_snapshot(paths[-1], G, {**description, "nimg": i})
    made = editing.average(paths, weights)
    for key, t in made.tensors.items():
        expected = torch.stack([w * state[key].double() for w, state in zip(weights, states, strict=True)]).sum(dim=0)
        assert torch.allclose(t.double(), expected, rtol=1e-6, atol=1e-7), key
    assert made.description["nimg"] == (2 if weights[2] == 1 else 0)
    made.save(tmp_path / "out.safetensors")
    assert load_snapshot(tmp_path / "out.safetensors").description["averaged"][1]["weight"] == weights[1]


def test_the_alpha_of_an_average_is_the_mean(tmp_path):
    paths = [saved(tmp_path / f"{a}.safetensors", {"alpha": a}, fade=True)[1] for a in (0.2, 0.6)]
    assert editing.average(paths, [0.25, 0.75]).description["alpha"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("how", "word"),
    [
        ({"resolution": 8}, "resolution is 8, not 16"),
        ({"c_dim": 2}, "c_dim is 2, not 0"),
        ({"name": "stylegan"}, "another network"),
        ({"fade": True}, "fade is True, not False"),
    ],
)
def test_snapshots_of_different_networks(tmp_path, how, word):
    _, a = saved(tmp_path / "a.safetensors")
    _, b = saved(tmp_path / "b.safetensors", **how)
    with pytest.raises(UsageError, match=word):
        editing.average([a, b], [0.5, 0.5])


def test_classes_in_another_order_are_refused(tmp_path):
    _, a = saved(tmp_path / "a.safetensors", c_dim=2)
    _, b = saved(tmp_path / "b.safetensors", {"label_names": ["dog", "cat"]}, c_dim=2)
    with pytest.raises(UsageError, match="classes is"):
        editing.average([a, b], [0.5, 0.5])


def test_precision_is_no_other_network(tmp_path):
    _, a = saved(tmp_path / "a.safetensors")
    G, description = built()
    other = tmp_path / "b.safetensors"
    save_snapshot(other, G, {**description, "kwargs": {**description["kwargs"], "low_precision": "bf16"}})
    assert editing.average([a, other], [0.5, 0.5]).tensors


@pytest.mark.parametrize("text", ["1", "1,2,3", "1,x", "-1,2", "0,0", "nan,1", "inf,1", ""])
def test_impossible_weights(text):
    with pytest.raises(UsageError, match="give 2 numbers with commas between them"):
        editing.parse_weights(text, 2)


def test_weights_are_divided_by_their_sum():
    assert editing.parse_weights("1,3", 2) == [0.25, 0.75]


@pytest.mark.parametrize(
    "text", ["0.1", "0.1:0.2", "0.2:0.1:0.01", "0.02:0.5:0.1", "0.1:0.2:0", "0.1:0.2:-1", "0.1:0.2:1e-9", "a:b:c", "::"]
)
def test_impossible_sweeps(text):
    with pytest.raises(UsageError, match="give FROM:TO:STEP, such as"):
        parse_widths(text)


def test_widths_of_a_sweep():
    assert parse_widths("0.02:0.20:0.02") == [round(0.02 * i, 9) for i in range(1, 11)]
    assert parse_widths("0.05:0.05:1") == [0.05]


def test_a_file_keeps_its_state_where_writing_fails(run, monkeypatch):
    """Also where the disk is full in the middle."""
    folder, _ = run
    made, _ = editing.post_hoc(folder, 0.07)
    out = folder / "snapshots" / "x.safetensors"
    made.save(out)
    before = out.read_bytes()

    def full(file, tensors, metadata):
        file.write(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stylegan_pg.checkpoint.tensor_file.write", full)
    with pytest.raises(Exception, match="No space left on device"):
        made.save(out)
    assert out.read_bytes() == before
    assert [path.name for path in out.parent.iterdir()] == ["x.safetensors"]


def test_the_free_name(tmp_path):
    assert editing.free_path(tmp_path).name == "average.safetensors"
    shutil.copy(__file__, tmp_path / "average.safetensors")
    assert editing.free_path(tmp_path).name == "average-2.safetensors"


def test_descriptions_are_json(run):
    folder, _ = run
    json.dumps(editing.post_hoc(folder, 0.2)[0].description)
