"""The system text and its networks: characters, Gumbel-softmax, losses, and what users get of a run."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import harness
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from configuring import config_of, refused
from scipy.spatial.distance import jensenshannon
from systems import engine_for, first_batch, gradients, losses_of, same
from test_systems import dataset

from stylegan_pg import load_snapshot, pack
from stylegan_pg.errors import UsageError
from stylegan_pg.metrics.ngrams import distinct_share, ngram_divergence
from stylegan_pg.networks import NETWORKS
from stylegan_pg.networks.chars import to_characters, to_one_hot, to_texts

ALPHABET = " abcdefghijklmnopqrstuvwxyz0123456789"
SMALL = ["train.batch=8", "model.channel_max=8", "model.depth=2", "model.length=12", "model.z_dim=5", "optim.d_steps=1"]
SMALL += [f'model.alphabet="{ALPHABET}"']


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return dataset(tmp_path_factory.mktemp("text"), 32, 3)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- characters -------------------------------------------------------------------------------------------------------


def test_texts_become_one_hot_characters_and_texts_again():
    texts = ["a cat, no!", "Übermut AND", "", "longer than twelve"]
    rows = to_one_hot(texts, ALPHABET, 12)
    assert rows.shape == (4, len(ALPHABET), 1, 12)
    assert (rows.sum(dim=1) == 1).all()
    assert to_texts(rows, ALPHABET) == ["a cat  no", " bermut and", "", "longer than"]
    assert to_texts(to_one_hot(["AND"], "x ANDe", 5), "x ANDe") == ["AND"]  # upper case where the alphabet has it


@pytest.mark.parametrize("output", ["softmax", "gumbel", "straight_through"])
def test_outputs_are_their_formulas(output):
    logits, noise = normal(3, 5, 4).requires_grad_(True), normal(3, 5, 4, seed=1)
    ours = to_characters(logits, output, 0.7, noise)
    uniform = torch.tensor(
        [0.5 * (1 + math.erf(float(n) / math.sqrt(2))) for n in noise.flatten()], dtype=torch.float64
    )
    given = logits if output == "softmax" else logits - (-uniform.reshape(noise.shape).log()).log()
    powers = (given / 0.7).exp()
    soft = powers / powers.sum(dim=1, keepdim=True)
    weights = normal(3, 5, 4, seed=2)
    same(torch.autograd.grad((ours * weights).sum(), logits), torch.autograd.grad((soft * weights).sum(), logits))
    if output == "straight_through":
        assert sorted(ours.detach().unique().round(decimals=9).tolist()) == [0, 1]
        assert (ours.argmax(dim=1) == soft.argmax(dim=1)).all()
    else:
        torch.testing.assert_close(ours, soft, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.sum(dim=1), torch.ones(3, 4).double())


def test_gumbel_samples_follow_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).double()
    drawn = to_characters(logits[None, :, None].expand(1, 4, 20_000), "straight_through", 1.0, normal(1, 4, 20_000))
    shares = drawn.mean(dim=2)[0]
    torch.testing.assert_close(shares, logits.softmax(0), rtol=0, atol=0.015)
    extreme = torch.tensor([-40.0, 40.0]).double()[None, :, None].expand(1, 2, 1).repeat(1, 2, 1)
    assert to_characters(torch.zeros(1, 4, 1).double(), "gumbel", 1.0, extreme).isfinite().all()


# --- networks ---------------------------------------------------------------------------------------------------------


def by_hand(state: Mapping[str, torch.Tensor], x: torch.Tensor, depth: int) -> torch.Tensor:
    """Residual blocks, as sums over the five places that each convolution sees."""

    def conv(x: torch.Tensor, name: str) -> torch.Tensor:
        w, length = state[f"{name}.weight"], x.shape[2]
        padded = F.pad(x, (2, 2))
        return sum(
            torch.einsum("oc,ncl->nol", w[:, :, k], padded[:, :, k : k + length]) for k in range(5)
        ) + state[f"{name}.bias"][:, None]  # fmt: skip

    for i in range(depth):
        inner = conv(x.clamp(min=0), f"blocks.{i}.layers.1")
        x = x + 0.3 * conv(inner.clamp(min=0), f"blocks.{i}.layers.3")
    return x


@pytest.mark.parametrize("c_dim", [0, 3])
def test_networks_are_residual_convolutions(c_dim):
    how = {"alphabet": "abcde ", "length": 7, "c_dim": c_dim, "width": 4, "depth": 2}
    G = NETWORKS["chars"].G(resolution=8, z_dim=5, **how).double()
    D = NETWORKS["chars"].D(**how).double()
    z, c = normal(3, 5), torch.eye(3, dtype=torch.float64) if c_dim else None
    state = dict(G.named_parameters())
    x = z if c is None else torch.cat([z, c], dim=1)
    x = (x @ state["begin.weight"].T + state["begin.bias"]).reshape(3, 4, 7)
    logits = torch.einsum("oc,ncl->nol", state["end.weight"][:, :, 0], by_hand(state, x, 2))
    made = (logits + state["end.bias"][:, None]).softmax(dim=1)
    weights = normal(3, 6, 7, seed=3)
    torch.testing.assert_close(G(z, c)[:, :, 0], made, rtol=1e-9, atol=1e-9)
    same(gradients((G(z, c)[:, :, 0] * weights).flatten(1).sum(1), G), gradients((made * weights).flatten(1).sum(1), G))
    state, images = dict(D.named_parameters()), normal(3, 6, 1, 7, seed=4)
    x = images[:, :, 0]
    x = x if c is None else torch.cat([x, c[:, :, None].expand(-1, -1, 7)], dim=1)
    x = torch.einsum("oc,ncl->nol", state["begin.weight"][:, :, 0], x) + state["begin.bias"][:, None]
    score = by_hand(state, x, 2).flatten(1) @ state["end.weight"].T + state["end.bias"]
    torch.testing.assert_close(D(images, c), score, rtol=1e-9, atol=1e-9)
    same(gradients(D(images, c)[:, 0], D), gradients(score[:, 0], D))


def test_the_latent_holds_the_noise_of_choices():
    how = {"resolution": 8, "alphabet": "abcde ", "length": 7, "width": 4, "depth": 1, "z_dim": 5}
    G: Any = NETWORKS["chars"].G(output="straight_through", **how)
    assert G.z_dim == 5 + 6 * 7
    z = torch.randn(1, G.z_dim).repeat(64, 1)
    assert len(set(G.texts(z))) == 1
    z[:, 5:] = torch.randn(64, 42)
    assert len(set(G.texts(z))) > 1
    assert NETWORKS["chars"].G(output="softmax", **how).z_dim == 5


@pytest.mark.parametrize(
    "wrong", [{"alphabet": "aab cd"}, {"alphabet": "abcdef"}, {"length": 0}, {"output": "hard"}, {"temperature": 0.0}]
)
def test_arguments_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        NETWORKS["chars"].G(**{"resolution": 8, "alphabet": "abcde ", "length": 7, **wrong})


# --- losses -----------------------------------------------------------------------------------------------------------


def test_real_texts_are_the_first_lines_of_captions(data):
    engine = engine_for("systems/text", f"data.url={data}", *SMALL)
    captions = first_batch(engine).fields["caption"]
    assert captions[0].startswith("picture")
    x, _ = losses_of(engine)
    assert to_texts(x.real, ALPHABET) == [text[:12].rstrip() for text in captions]
    several = {"image": torch.zeros(2, 3, 4, 4), "caption": ["\n first line\nsecond", ""]}
    assert to_texts(engine.state.system.real(several), ALPHABET) == ["first line", ""]


def test_losses_are_those_of_wgan_gp(data):
    """Gulrajani et al. 2017, equation 3, of one-hot characters."""
    x, losses = losses_of(engine_for("systems/text", f"data.url={data}", *SMALL))
    D, G, drawn = x.D, x.G, x.step.draws.values
    critic, penalty = losses["D main loss"], losses["D gradient_penalty"]
    ours = critic.values(x)["loss"]
    fake = G(drawn["latents", "d"].z).detach()
    theirs = (D(fake) - D(x.real))[:, 0]
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    found = penalty.values(x)["loss"]
    u = drawn["gradient_penalty-u"].reshape(8, 1, 1, 1)
    between = (u * x.real + (1 - u) * fake).requires_grad_(True)
    (slope,) = torch.autograd.grad(D(between).sum(), between, create_graph=True)
    expected = (slope.square().sum(dim=[1, 2, 3]).sqrt() - 1) ** 2
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert penalty.weight == 10
    same(gradients(ours + 10 * found, D), gradients(theirs + 10 * expected, D))
    ours = losses["G main loss"].values(x)["loss"]
    theirs = -D(G(drawn["latents", "g"].z))[:, 0]
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    same(gradients(ours, G), gradients(theirs, G))


@pytest.mark.parametrize("output", ["gumbel", "straight_through"])
def test_choices_are_trained_through(output, data):
    x, losses = losses_of(engine_for("systems/text", f"data.url={data}", *SMALL, f"model.output={output}"))
    found = gradients(losses["G main loss"].values(x)["loss"], x.G)
    assert all(float(g.abs().max()) > 0 for g in found)


def test_n_grams_against_scipy():
    a, b = ["the cat sat", "the dog sat"], ["the cat ran off", "a dog ran", "x"]
    counts = [Counter(t[i : i + 4] for t in texts for i in range(len(t) - 3)) for texts in (a, b)]
    grams = sorted(counts[0] | counts[1])
    p, q = (np.array([count[g] for g in grams], float) for count in counts)
    assert ngram_divergence(a, b) == pytest.approx(jensenshannon(p, q) ** 2, rel=1e-12)
    assert ngram_divergence(a, a) == 0
    assert ngram_divergence(a, ["zzzzzz"]) == pytest.approx(math.log(2))
    assert ngram_divergence(a, [""]) == pytest.approx(math.log(2))
    assert distinct_share(["a", "b", "a", "a"]) == 0.5


# --- what users see ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("run") / "run"
    given = [f"data.url={data}", *SMALL, "train.total_kimg=0.016", "train.threads=1", "output.grid=[3,2]"]
    harness.command("train", "systems/text", f"run={run}", *given, "data.conditional=true", expected=0)
    return run


def snapshot_of(run):
    (path,) = (run / "snapshots").glob("*.safetensors")
    return path


def test_sample_writes_texts_and_grids_are_texts(run, tmp_path):
    out = tmp_path / "texts"
    printed = harness.command("sample", snapshot_of(run), "--seeds", "3-6", "--labels", "class1", "--out", out,
                              expected=0).stdout  # fmt: skip
    assert printed.strip() == str(out / "samples.txt")
    lines = (out / "samples.txt").read_text().splitlines()
    G = load_snapshot(snapshot_of(run))
    z = torch.from_numpy(np.concatenate([np.random.RandomState(seed).randn(1, G.z_dim) for seed in range(3, 7)]))
    assert lines == G.texts(z.float(), ["class1"] * 4)
    assert all(len(line) <= 12 and set(line) <= set(ALPHABET) for line in lines)
    grids = sorted((run / "samples").glob("fakes-*.txt"))
    assert [len(path.read_text().splitlines()) for path in grids] == [6] * len(grids)
    assert len(grids) == 2  # at the start and at the end


def test_it_is_exported_as_a_program(run, tmp_path):
    done = harness.command("export", snapshot_of(run), "--to", "torch", "--out", tmp_path / "G.pt2", expected=0)
    assert "inputs z, c" in done.stdout
    assert (tmp_path / "G.pt2").stat().st_size > 1000


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["sample", "--grid", "--psi", "0.5"], "--psi and --grid: this generator makes texts"),
        (["metrics", "--metrics", "swd"], "makes texts, not pictures, so there are no metrics of it"),
        (["interpolate", "--seeds", "1,2"], "pictures"),
        (["sample", "--out-shards", "SHARDS", "--count", "4"], "pictures"),
    ],
)
def test_what_needs_pictures_is_refused(command, message, run, tmp_path):
    name, *options = [str(tmp_path / "shards") if part == "SHARDS" else part for part in command]
    done = harness.command(name, snapshot_of(run), *options, expected=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_bad_input_is_refused_in_one_message(data, tmp_path):
    (tmp_path / "bare").mkdir()
    from PIL import Image

    for i in range(4):
        Image.new("L", (32, 32), i).save(tmp_path / "bare" / f"{i}.png")
    pack(tmp_path / "bare", tmp_path / "packed", resolution=32, progress=False)
    for url, key in ((tmp_path / "packed", "caption"), (data, "title")):
        with pytest.raises(UsageError, match=r"no such text field .* pack it with --captions") as error:
            engine_for("systems/text", f"data.url={url}", *SMALL, f"system.text={key}")
        assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match=r"metrics\.every_kimg=0"):
        engine_for("systems/text", f"data.url={data}", *SMALL, "metrics.every_kimg=1")
    assert "take model.name=chars" in refused("system.name=text", "model.name=dcgan")
    assert "or system.name=text" in refused("model.name=chars")
    assert "5 to 1024 different printable" in refused("system.name=text", "model.name=chars", "model.alphabet=aab")


def test_the_alphabet_survives_its_file(run):
    """It begins with a space, which YAML could lose."""
    from stylegan_pg.config.loading import load_config

    model: Any = load_config(run).model
    assert model.alphabet == ALPHABET
    assert load_snapshot(snapshot_of(run)).alphabet == ALPHABET
    model = config_of("system.name=text", "model.name=chars", "loss.pl_weight=0").model
    assert model.alphabet[26] == " "
