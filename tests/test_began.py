"""BEGAN: its networks and losses against the public implementation, the balance k, and how a run keeps it."""

import json
from typing import cast

import harness
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from stylegan_pg import load_snapshot
from stylegan_pg.config.loading import load_config
from stylegan_pg.errors import UsageError
from stylegan_pg.losses.energies import convergence, moved_balance
from stylegan_pg.networks import began
from stylegan_pg.systems.autoencoders import BEGAN, BEGANState
from stylegan_pg.systems.base import Step
from stylegan_pg.systems.catalogue import system_of
from stylegan_pg.systems.state import read_state

SMALL = ["run=runs/x", "model.width=4", "resolution=16", "train.batch=8"]


@pytest.fixture(scope="module")
def reference(parity_dir):
    path = parity_dir.parent / "parity-systems" / "began_32.safetensors"
    if not path.is_file():
        pytest.skip("no reference numbers: ../shared/parity-systems does not exist beside this checkout")
    with safe_open(path, "pt") as file:
        meta = dict(file.metadata())
        return meta, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


def ours(name: str) -> str:
    """Our name of a parameter of the PyTorch port."""
    for theirs, mine in {
        "G.fc.": "G.decoder.first.", "G.conv.": "G.decoder.layers.", "D.conv1.": "D.encoder.layers.",
        "D.fc1.": "D.encoder.last.", "D.fc2.": "D.decoder.first.", "D.conv2.": "D.decoder.layers.",
    }.items():  # fmt: skip
        name = name.replace(theirs, mine) if name.startswith(theirs) else name
    return name


@pytest.fixture
def nets(reference):
    """Our networks with the file's weights, each with the ELU behind its last layer that the port has and the paper has
    not."""
    _, t = reference
    G = began.Generator(resolution=32, z_dim=8, width=6)
    D = began.Discriminator(resolution=32, code_dim=8, width=6)
    for net, side in ((G, "G."), (D, "D.")):
        state = {ours(name).removeprefix(side): value for name, value in t.items() if name.startswith(side)}
        net.load_state_dict(state)
        net.decoder.layers.append(torch.nn.ELU())
    return G, D


def close(actual, expected, tolerance=5e-5):
    error = float((actual.detach() - expected).abs().max()) / float(expected.abs().max())
    assert error <= tolerance, f"{error:.2e} of the largest magnitude"


def compare_gradients(loss, net, t, prefix, side):
    expected = {ours(side + k.removeprefix(prefix)): v for k, v in t.items() if k.startswith(prefix)}
    found = torch.autograd.grad(loss, list(net.parameters()))
    whole = max(float(v.abs().max()) for v in expected.values())
    assert len(expected) == len(found)
    for (name, _), gradient in zip(net.named_parameters(), found, strict=True):
        wanted = expected[side + name]
        error = float((gradient - wanted).abs().max()) / max(float(wanted.abs().max()), whole / 100)
        assert error <= 5e-5, f"{name}: {error:.2e}"


def test_networks_reproduce_the_port_but_for_its_last_activation(reference, nets):
    _, t = reference
    G, D = nets
    image = G(t["in.z"])
    close(image, t["out.image"])
    code = D.encoder(t["in.real"])
    close(code, t["out.code_real"])
    close(D.decode(code), t["out.autoencoded_real"])
    close(D.decode(D.encoder(image)), t["out.autoencoded_fake"])


def test_losses_and_their_gradients(reference, nets):
    """Of D's loss the paper's gradient, with the generated pictures fixed; not what the port applies to D."""
    meta, t = reference
    G, D = nets
    k = float(meta["k_in_the_losses"])
    image = G(t["in.z"])
    real, fake = D(t["in.real"]).scores, D(image.detach()).scores
    close(real.mean(), t["out.loss_real"])
    close(fake.mean(), t["out.loss_fake"])
    config = load_config("systems/began", [*SMALL, f"system.k={k}"])
    system = BEGAN(config)
    loss_d = system.objective.d(real, fake).mean()
    close(loss_d, t["out.loss_d"])
    compare_gradients(loss_d, D, t, "grad_loss_d.", "D.")
    loss_g = system.objective.g(D(image).scores).mean()
    close(loss_g, t["out.loss_g"])
    compare_gradients(loss_g, G, t, "grad_loss_g.", "G.")
    mixed = [v for name, v in t.items() if name.startswith("grad_d_of_d_loss_plus_g_loss.")]
    wanted = [v for name, v in t.items() if name.startswith("grad_loss_d.")]
    assert max(float((a - b).abs().max()) for a, b in zip(mixed, wanted, strict=True)) > 1e-3  # they do differ


@pytest.mark.parametrize(("rate", "name"), [(0.001, "published_lambda"), (5.0, "lambda_5")])
def test_the_sequence_of_k_and_the_measure(reference, rate, name):
    _, t = reference
    k, ks, measures = 0.0, [], []
    for real, fake in zip(t["in.sequence_loss_real"].tolist(), t["in.sequence_loss_fake"].tolist(), strict=True):
        k = moved_balance(k, real, fake, 0.5, rate)
        ks.append(k)
        measures.append(convergence(real, fake, 0.5))
    torch.testing.assert_close(torch.tensor(ks), t[f"out.sequence_k_{name}"], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(torch.tensor(measures), t[f"out.sequence_measure_{name}"], rtol=1e-5, atol=0)
    if rate == 5:
        assert {0.0, 1.0} <= set(ks)  # clipped at both ends


@pytest.mark.parametrize("energy", ["absolute", "squared", "norm"])
def test_energies_and_their_gradients_in_float64(energy):
    torch.manual_seed(0)
    D = began.Discriminator(resolution=16, img_channels=2, code_dim=5, width=3, energy=energy).double()
    images = torch.randn(4, 2, 16, 16, dtype=torch.float64, requires_grad=True)
    found = D(images)
    assert found.scores.shape == (4, 1)
    assert found.code.shape == (4, 5)
    decoded = D.decode(D.encoder(images))
    numbers = images[0].numel()
    expected = torch.stack(
        [
            {"absolute": sum(e.abs()) / numbers, "squared": sum(e**2) / numbers, "norm": sum(e**2) ** 0.5}[energy]
            for e in (images - decoded).reshape(4, -1)
        ]
    )
    torch.testing.assert_close(found.scores[:, 0], expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(v.sum(), images, retain_graph=True)[0] for v in (found.scores, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_the_norm_has_a_derivative_at_0():
    images = torch.zeros(2, 1, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(began.energy_of(images, torch.zeros_like(images), "norm").sum(), images)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize(("resolution", "base", "channels"), [(4, (4, 4), 1), (8, (4, 4), 3), (64, (3, 5), 2)])
def test_any_resolution_base_and_channels(resolution, base, channels):
    form = {"resolution": resolution, "base": base, "img_channels": channels, "width": 4, "channel_max": 6}
    G, D = began.Generator(z_dim=3, **form), began.Discriminator(code_dim=3, **form)
    images = G(torch.randn(2, 3))
    assert images.shape == (2, channels, base[0] * resolution // 4, base[1] * resolution // 4)
    assert D(images).scores.shape == (2, 1)
    smallest = D.encoder.layers(images).shape
    assert smallest[2:] == (base[0] * 2, base[1] * 2) if resolution >= 8 else smallest[2:] == base
    assert max(p.shape[0] for p in D.encoder.layers.parameters()) <= 6


def test_conditions_reach_both_networks():
    G = began.Generator(resolution=8, c_dim=3, z_dim=4, width=4)
    D = began.Discriminator(resolution=8, c_dim=3, code_dim=4, width=4)
    z, (a, b) = torch.randn(1, 4), torch.eye(3)[:2, None]
    image = G(z, a)
    assert not torch.allclose(image, G(z, b))
    assert not torch.allclose(D(image, a).scores, D(image, b).scores)


def test_k_follows_the_errors_of_a_step():
    system = BEGAN(load_config("systems/began", [*SMALL, "system.gamma=0.7", "system.k_rate=0.1"]))
    assert system.running.k == 0
    sums = {"score_real": (8.0, 8), "loss_g": (2.0, 8), "score_fake": (100.0, 8)}
    system.terms = []
    step = cast(Step, None)  # nothing of k follows from the step
    system.after_step(step, sums, {})
    assert system.running.k == pytest.approx(0.1 * (0.7 * 1.0 - 0.25))
    assert system.statistics()["convergence"] == pytest.approx(1.0 + 0.45)
    system.after_step(step, {"score_real": (8.0, 8)}, {})  # a step of D alone
    assert system.running.k == pytest.approx(0.045)
    real, fake = torch.tensor([[2.0]]), torch.tensor([[3.0]])
    assert float(system.objective.d(real, fake)) == pytest.approx(2.0 - 3.0 * 0.045)
    assert float(system.objective.g(fake)) == 3


def test_a_state_out_of_range_is_refused():
    state = BEGANState(k=0.4, convergence=1.5)
    assert read_state(BEGANState, state.plain(), "it") == state
    for name, value in {"k": 1.5, "convergence": -1.0}.items():
        with pytest.raises(UsageError, match=f"it: {name}"):
            read_state(BEGANState, {**state.plain(), name: value}, "it")


def test_another_discriminator_is_refused(tmp_path):
    config = load_config("systems/began", ["run=runs/x", "resolution=16", "model=dcgan"])
    from stylegan_pg.config.schedule import phases
    from stylegan_pg.networks import NetworkShape

    phase = phases(config)[0]
    with pytest.raises(UsageError, match="take model") as error:
        system_of(config).build(NetworkShape(phase.resolution, 16, False, 1, 0, phase.mbstd_group), None)
    assert "system.name=began needs a discriminator that is an autoencoder" in str(error.value)


def test_a_run_logs_the_balance_and_exports(tmp_path):
    """The k of the log is the paper's sequence of the errors in the log, with a line for each step."""
    from PIL import Image

    from stylegan_pg import pack

    dice = torch.Generator().manual_seed(0)
    (tmp_path / "pictures").mkdir()
    for i in range(16):
        pixels = torch.randint(256, [16, 16], generator=dice).byte().numpy()
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.png")
    pack(tmp_path / "pictures", tmp_path / "packed", resolution=16, channels=1, format="png", progress=False)
    run = tmp_path / "run"
    given = [*SMALL, f"run={run}", f"data.url={tmp_path / 'packed'}", "train.total_kimg=0.064", "system.k_rate=0.5"]
    given += ["system.k=0.3", "output.tick_kimg=0.008", "output.grid_kimg=0"]
    harness.command("train", "systems/began", *given, expected=0)
    lines = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    k, seen = 0.3, 0
    for line in lines:
        if "loss_g" not in line:
            continue
        k = min(max(k + 0.5 * (0.5 * line["score_real"] - line["loss_g"]), 0), 1)
        assert line["k"] == pytest.approx(k, abs=1e-5)
        seen += 1
    assert seen >= 6
    (snapshot,) = (run / "snapshots").glob("*.safetensors")
    G = load_snapshot(snapshot)
    z = torch.randn(3, G.z_dim)
    harness.command("export", snapshot, "--to", "torch", "--out", tmp_path / "g.pt2", expected=0)
    exported = torch.export.load(tmp_path / "g.pt2").module()
    torch.testing.assert_close(exported(z=z), G(z), rtol=1e-4, atol=1e-5)
    uniform = torch.erf(z / 2**0.5)
    first = G.decoder.first
    expected = F.linear(uniform, first.weight, first.bias)
    torch.testing.assert_close(first(G.law(z)), expected)
