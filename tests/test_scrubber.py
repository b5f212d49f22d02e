"""The system scrubber: its losses against their formulas, what the networks are, and what codes hold after training."""

import json

import harness
import numpy as np
import pytest
import torch
from configuring import refused
from PIL import Image
from systems import engine_for, gradients, losses_of, same
from test_systems import dataset

from stylegan_pg import codes_of, load_snapshot, pack
from stylegan_pg.errors import UsageError
from stylegan_pg.losses.removal import inspection, relative_error, reversed_loss
from stylegan_pg.systems.base import Context

SMALL = ["train.batch=8", "model.mbstd_group=8", "model.channel_max=8", "model.z_dim=6", "model.d_width=16"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return dataset(tmp_path_factory.mktemp("scrubber"), 32, 1)


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    """16x16 pictures whose brightness is in the first entry of a vector, and whose halves differ by the second one."""
    folder, dice = tmp_path_factory.mktemp("vectors"), np.random.default_rng(0)
    (folder / "pictures").mkdir()
    labels = {}
    for i in range(256):
        light, side = float(dice.uniform(60, 190)), float(dice.integers(2))
        pixels = np.full([16, 16], light) + np.where(np.arange(16) < 8, 1, -1) * (50 * side - 25)
        Image.fromarray((pixels + dice.normal(0, 3, [16, 16])).clip(0, 255).astype(np.uint8)).save(
            folder / "pictures" / f"{i:03d}.png"
        )
        labels[f"{i:03d}.png"] = [light / 50, side]
    (folder / "labels.json").write_text(json.dumps({"labels": labels}))
    pack(folder / "pictures", folder / "packed", resolution=16, channels=1, labels=folder / "labels.json",
         format="png", progress=False)  # fmt: skip
    return folder / "packed"


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# --- formulas ---------------------------------------------------------------------------------------------------------


def test_losses_of_guesses_are_their_formulas():
    guess, classes = normal(5, 3), [0, 2, 1, 1, 0]
    truth = torch.eye(3, dtype=torch.float64)[classes]
    p = guess.exp() / guess.exp().sum(dim=1, keepdim=True)
    expected = torch.stack([-p[i, k].log() for i, k in enumerate(classes)])
    torch.testing.assert_close(inspection(guess, truth), expected, rtol=1e-12, atol=1e-12)
    deviation = torch.tensor([1.0, 2.0, 0.5]).double()
    squares = [[((guess[i, k] - truth[i, k]) / deviation[k]) ** 2 for k in range(3)] for i in range(5)]
    expected = torch.tensor([sum(map(float, row)) / 3 for row in squares], dtype=torch.float64)
    torch.testing.assert_close(inspection(guess, truth, deviation), expected, rtol=1e-12, atol=1e-12)
    targets = normal(4000, 3) * deviation + 7
    known = relative_error(targets.mean(dim=0).expand(4000, -1), targets, targets.std(dim=0, correction=0))
    assert float(known.mean()) == pytest.approx(1)  # of what says the mean, 1 - R^2


def test_a_reversed_loss_has_the_negative_gradient_up_to_its_limit():
    x = torch.tensor([0.3, 0.9, 1.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(reversed_loss(x**2).sum(), x)[0].tolist() == pytest.approx([-0.6, -1.8, -3.0])
    assert torch.autograd.grad(reversed_loss(x**2, 1.0).sum(), x)[0].tolist() == pytest.approx([-0.6, -1.8, 0.0])


def test_losses_of_both_sides_are_their_formulas(data):
    """In an implementation of its own, with batch normalisation written out and gradients reversed in one pass."""
    weights = ["system.keep_weight=0.5", "system.picture_weight=2", "system.removal_weight=0.3"]
    engine = engine_for("systems/scrubber", f"data.url={data}", *SMALL, *weights)
    x, losses = losses_of(engine)
    G, D = x.G, x.D
    ours_g = losses["G encoder's loss"].values(x)["loss"]
    ours_d = losses["D inspector's loss"].values(x)["loss"]
    raw = G.encoder(x.real).flatten(1)
    codes = (raw - raw.mean(dim=0)) / (raw.var(dim=0, correction=0) + 1e-8).sqrt()
    logits = codes
    for layer in D.layers:
        logits = layer(logits)
    assert x.condition is not None
    classes = x.condition.argmax(dim=1)
    told = -torch.log_softmax(logits, dim=1)[torch.arange(8), classes]
    torch.testing.assert_close(ours_d, told, rtol=1e-9, atol=1e-9)
    same(gradients(ours_d, D), gradients(told, D))
    picture = G.decoder.main(torch.cat([codes, x.condition], dim=1)[:, :, None, None])
    ink = (x.field("ink").reshape(8, 1) - G.kept_mean) / G.kept_deviation
    kept = (G.kept(codes) - ink).square().mean(dim=1)
    theirs = 2 * (picture - x.real).square().mean(dim=[1, 2, 3]) + 0.5 * kept - 0.3 * told
    torch.testing.assert_close(ours_g, theirs, rtol=1e-9, atol=1e-9)
    same(gradients(ours_g, G), gradients(theirs, G))


def test_the_inspector_does_not_move_the_encoder(data):
    x, losses = losses_of(engine_for("systems/scrubber", f"data.url={data}", *SMALL))
    loss = losses["D inspector's loss"].values(x)["loss"]
    assert all(float(g.abs().max()) == 0 for g in gradients(loss, x.G))


def test_a_vector_is_removed_by_its_error_relative_to_its_deviation(vectors):
    engine = engine_for("systems/scrubber", f"data.url={vectors}", "resolution=16", "data.condition=labels",
                        "system.keep=", "data.derived={}", *SMALL)  # fmt: skip
    x, losses = losses_of(engine)
    values = engine.state.table.vectors["labels"].astype(np.float64)
    guess = x.D(x.G.encode(x.real))
    told = (((guess - x.condition) / torch.from_numpy(values.std(axis=0))) ** 2).mean(dim=1)
    found = losses["D inspector's loss"].values(x)["loss"]
    torch.testing.assert_close(found, told, rtol=1e-9, atol=1e-9)
    assert "keep_error" not in losses["G encoder's loss"].reports
    assert "keep_error" not in losses["G encoder's loss"].values(x)


# --- networks and data ------------------------------------------------------------------------------------------------


def test_codes_have_mean_0_and_variance_1(data):
    x, _ = losses_of(engine_for("systems/scrubber", f"data.url={data}", *SMALL))
    codes = x.G.encode(x.real)
    assert codes.shape == (8, 6)
    torch.testing.assert_close(codes.mean(dim=0), torch.zeros(6).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(codes.var(dim=0, correction=0), torch.ones(6).double(), rtol=0, atol=1e-2)


def test_the_kept_field_has_its_own_units(vectors):
    """Vectors as they are, pictures in [-1, 1], by the mean and the deviation of the dataset."""
    given = ["resolution=16", "data.condition=labels", "data.derived={ink: low 16}"]
    engine = engine_for("systems/scrubber", f"data.url={vectors}", *given, *SMALL, "system.keep=labels")
    values = engine.state.table.vectors["labels"].astype(np.float64)
    G = engine.state.G
    np.testing.assert_allclose(G.kept_mean.numpy(), values.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(G.kept_deviation.numpy(), values.std(axis=0), rtol=1e-6)
    codes = normal(3, 6)
    expected = (codes @ G.kept.weight.T + G.kept.bias) * G.kept_deviation + G.kept_mean
    torch.testing.assert_close(G.read(codes), expected)
    ink = engine_for("systems/scrubber", f"data.url={vectors}", *given, *SMALL, "system.keep=ink").state.G
    light = values[:, 0].mean() * 50 / 127.5 - 1
    assert float(ink.kept_mean) == pytest.approx(light, abs=0.02)


def test_bad_input_is_refused_in_one_message(data, vectors):
    def message(*overrides: str) -> str:
        with pytest.raises(UsageError) as error:
            engine_for("systems/scrubber", f"data.url={data}", *SMALL, *overrides)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "data.conditional=true" in message("data.conditional=false")
    assert "loss.r1_gamma=0" in message("loss.r1_gamma=1")
    assert "system.keep=thickness" in message("system.keep=thickness")
    assert "data.derived={ink: low 32}" in message("system.keep=caption")
    assert "no such class or vector field" in message("data.condition=labels")
    assert "take model.name=codes" in refused("system.name=scrubber")
    assert "or system.name=scrubber" in refused("model.name=codes")


# --- what users see ---------------------------------------------------------------------------------------------------


def leak(codes: torch.Tensor, classes: torch.Tensor) -> float:
    """R^2 of a linear regression of a number from codes, on the half of them that it has not seen."""
    a = torch.cat([codes.double(), torch.ones(len(codes), 1).double()], dim=1)
    half = len(a) // 2
    w = torch.linalg.lstsq(a[:half], classes[:half].double()).solution
    rest = classes[half:].double()
    return float(1 - (a[half:] @ w - rest).square().mean() / rest.var(correction=0))


@pytest.mark.parametrize("removal", [2, 0])
def test_what_is_removed_cannot_be_read_and_what_is_kept_can(removal, vectors, tmp_path):
    """Which half is lighter is removed, and the brightness is kept; without removal, both are there."""
    labels = np.array([row[1] for row in _rows(vectors)])
    sides = tmp_path / "sides"
    index = _with_classes(vectors, sides)
    given = [f"data.url={index}", "resolution=16", "data.derived={ink: low 16}", f"system.removal_weight={removal}"]
    given += ["model.mbstd_group=32", "model.channel_max=16", "model.z_dim=3", "model.d_width=64", "train.batch=32"]
    given += ["optim.d_steps=3", "optim.g_lr=0.001", "optim.d_lr=0.005", "train.total_kimg=48", "ema.kimg=3"]
    given += ["output.grid_kimg=48", "output.grid=[4,2]", "train.threads=1", "data.workers=0"]
    run = tmp_path / "run"
    harness.command("train", "systems/scrubber", f"run={run}", *given, expected=0)
    (snapshot,) = (run / "snapshots").glob("*.safetensors")
    G = load_snapshot(snapshot)
    codes, classes = codes_of(G, str(index), batch=100)
    assert codes.shape == (len(labels), 3)
    assert sorted(classes.unique().tolist()) == [0, 1]
    table = _table(index)
    images = torch.from_numpy(np.stack([table.image(i) for i in range(len(codes))])).float() / 127.5 - 1
    torch.testing.assert_close(G.encode(images), codes, rtol=1e-4, atol=1e-4)
    dice = torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))
    assert leak(codes[dice], images.mean(dim=[1, 2, 3])[dice]) > 0.9
    told = leak(codes[dice], classes[dice].float())
    assert told < 0.3 if removal else told > 0.7
    assert list((run / "samples").glob("fakes-*.png"))
    if removal:
        done = harness.command("export", snapshot, "--to", "torch", "--out", tmp_path / "G.pt2", expected=0)
        assert "inputs z, c" in done.stdout  # the decoder


def _rows(packed) -> list[list[float]]:
    return _table(packed).vectors["labels"].tolist()


def _table(packed):
    from stylegan_pg.data.datasets.opening import load_index

    index = load_index(str(packed))
    return index.table(max(index.resolutions))


def _with_classes(vectors, out):
    """The same pictures with the second entry of the vector as their class."""
    table, folder = _table(vectors), out / "pictures"
    for i, (_, side) in enumerate(_rows(vectors)):
        (folder / f"side{int(side)}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(table.image(i)[0]).save(folder / f"side{int(side)}" / f"{i:03d}.png")
    pack(folder, out / "packed", resolution=16, channels=1, labels="folders", format="png", progress=False)
    return out / "packed"


def test_codes_of_refuses_what_does_not_fit(data, tmp_path):
    with pytest.raises(UsageError, match="no encoder"):
        codes_of(torch.nn.Linear(1, 1), str(data))
    G = engine_for("systems/scrubber", f"data.url={data}", *SMALL).state.G
    with pytest.raises(UsageError, match="with 1 channels"):
        codes_of(G, str(dataset(tmp_path, 32, 3)))


def test_the_grid_shows_pictures_decoded_from_their_codes(data):
    engine = engine_for("systems/scrubber", f"data.url={data}", *SMALL)
    x, _ = losses_of(engine)
    assert isinstance(x, Context)
    system, G = engine.state.system, engine.state.G_ema
    assert system.inputs() == ["image"]
    shown = system.images(G, torch.zeros(8, 6).double(), x.condition, {"image": x.real})
    torch.testing.assert_close(shown, G.decoder(G.encode(x.real), x.condition))
    assert shown.shape == x.real.shape
