"""AC-GAN: its losses against formulas written here, both kinds of classifiers, all pairs, and what it asks of data."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from configuring import config_of
from first_step import FirstStep, agree, batches_of, engine_of
from PIL import Image
from plain_pairs import PlainDiscriminator, PlainGenerator

from stylegan_pg import Pair, pack
from stylegan_pg.config.loading import load_config
from stylegan_pg.errors import UsageError
from stylegan_pg.systems.acgan import ACGAN, class_loss, joint_judgement, share_right

CLASSES = 3


def acgan(data, *overrides):
    return engine_of("systems/acgan", data, *overrides)


def cross_entropy(logits, c):
    """-log softmax at the class, in plain operations."""
    e = (logits - logits.amax(dim=1, keepdim=True)).exp()
    return -((e / e.sum(dim=1, keepdim=True)) * c).sum(dim=1).log()


def softplus(x):
    return (1 + x.exp()).log()


def test_class_loss():
    torch.manual_seed(0)
    logits, c = torch.randn(6, 4).double().requires_grad_(True), torch.eye(4).double()[[0, 1, 2, 3, 3, 1]]
    ours, expected = class_loss(logits, c), cross_entropy(logits, c)
    torch.testing.assert_close(ours, expected)
    weights = torch.rand(6).double()
    (a,), (b,) = (torch.autograd.grad((weights * loss).sum(), logits) for loss in (ours, expected))
    torch.testing.assert_close(a, b)
    assert share_right(torch.tensor([[1.0, 2], [3.0, 1]]), torch.tensor([[0.0, 1], [0.0, 1]])).tolist() == [1, 0]


def test_joint_classes_are_k_plus_1_classes():
    """Salimans et al. 2016, section 5: cross entropy over K + 1 classes, the last one having the logit 0."""
    torch.manual_seed(1)
    real, fake = (torch.randn(5, CLASSES).double().requires_grad_(True) for _ in range(2))
    target = torch.tensor([0, 2, 1, 1, 0])
    c = F.one_hot(target, CLASSES).double()
    seen_real, seen_fake = joint_judgement(real), joint_judgement(fake)
    ours = F.softplus(-seen_real.scores[:, 0]) + F.softplus(seen_fake.scores[:, 0]) + class_loss(seen_real.classes, c)
    everything = [F.pad(logits, (0, 1)) for logits in (real, fake)]
    expected = F.cross_entropy(everything[0], target, reduction="none")
    expected = expected + F.cross_entropy(everything[1], torch.full([5], CLASSES), reduction="none")
    torch.testing.assert_close(ours, expected)
    for a, b in zip(*(torch.autograd.grad(loss.sum(), [real, fake]) for loss in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b)
    of_g = F.softplus(-seen_fake.scores[:, 0]) + class_loss(seen_fake.classes, c)
    torch.testing.assert_close(of_g, F.cross_entropy(everything[1], target, reduction="none"))


@pytest.mark.parametrize("classifier", ["auxiliary", "joint"])
def test_the_gradients_of_both_sides(tiny_data, classifier):
    first = FirstStep(acgan(tiny_data, f"system.classifier={classifier}", "system.weight=0.7"))
    system, x = first.system, first.context()

    def judged(images):
        out = system.D(images)
        return (out[:, 0], out[:, 1:]) if classifier == "auxiliary" else (out.exp().sum(dim=1).log(), out)

    latents = system.latents(x, "g")
    assert set(latents.c.argmax(dim=1).tolist()) <= set(range(CLASSES))
    score, classes = judged(system.G(latents.z, latents.c))
    loss = softplus(-score) + 0.7 * cross_entropy(classes, latents.c)
    agree(first.gradients("G"), first.expected("G", loss))

    latents = system.latents(x, "d")
    with torch.no_grad():
        fake = system.G(latents.z, latents.c)
    (score_real, classes_real), (score_fake, classes_fake) = judged(x.real), judged(fake)
    loss = softplus(-score_real) + softplus(score_fake) + 0.7 * cross_entropy(classes_real, x.condition)
    if classifier == "auxiliary":
        loss = loss + 0.7 * cross_entropy(classes_fake, latents.c)
    agree(first.gradients("D"), first.expected("D", loss))


@pytest.mark.parametrize("classifier", ["auxiliary", "joint"])
@pytest.mark.parametrize("name", ["dcgan", "stylegan2", "stylegan", "progan", "r3gan", "mlp"])
def test_every_pair_learns_the_classes_of_plain_colours(tmp_path_factory, name, classifier):
    """D's loss of the classes falls far below ln 3, whatever the pair: its head sees the picture's colour."""
    data = colours(tmp_path_factory)
    objective = "relativistic" if name == "r3gan" else "logistic"
    given = [f"model.name={name}", f"system.classifier={classifier}", f"loss.objective={objective}", "optim.d_lr=0.01"]
    given += ["model.mapping_layers=2"] if name not in ("dcgan", "progan", "r3gan") else []
    overrides = ["data.conditional=true", "system.name=acgan", *given, "loss.pl_weight=0", "loss.r1_gamma=0"]
    engine = engine_of(None, data, "train.dtype=float32", *overrides, "train.total_kimg=1")
    stats = [engine.step(batch).stats for batch in batches_of(engine, 60)]
    losses = [total / count for total, count in (each["class_loss_d"] for each in stats)]
    assert sum(losses[-5:]) / 5 < 0.35, losses
    total, count = stats[-1]["class_right"]
    assert total / count > 0.8


def colours(tmp_path_factory):
    """Pictures whose class is their colour."""
    folder = tmp_path_factory.getbasetemp() / "colours"
    if not folder.exists():
        dice = np.random.default_rng(0)
        for k, colour in enumerate(([200, 30, 30], [30, 200, 30], [30, 30, 200])):
            (folder / "in" / str(k)).mkdir(parents=True)
            for i in range(16):
                pixels = np.clip(np.array(colour) + dice.integers(-30, 30, [8, 8, 3]), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / "in" / str(k) / f"{i}.png")
        pack(folder / "in", folder / "out", resolution=8, labels="folders", format="png", progress=False)
    return folder / "out"


def test_weight_0_leaves_the_objective_alone(tiny_data):
    first = FirstStep(acgan(tiny_data, "system.weight=0"))
    gradients = first.gradients("D")
    last = next(name for name in reversed(gradients) if name.startswith("main"))
    assert not gradients[last][1:].any()
    assert gradients[last][0].any()


def test_what_it_asks_of_configuration_and_data(tiny_data, tmp_path):
    with pytest.raises(
        UsageError, match=r"system\.name=acgan learns classes.*data\.conditional=true.*--labels folders"
    ):
        acgan(tiny_data, "data.conditional=false")
    plain = tmp_path / "plain"
    for i in range(8):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / "in" / f"{i}.png")
    pack(tmp_path / "in", plain, resolution=8, progress=False)
    with pytest.raises(UsageError, match="has no labels: pack it with --labels"):
        acgan(plain)
    given = ["run=unused", f"data.url={tiny_data}", "resolution=8", "model.name=stylegan2"]
    config = load_config("systems/acgan", given)
    system = ACGAN(config, Pair(PlainGenerator, PlainDiscriminator, lambda *_: {}, lambda *_: {}))
    with pytest.raises(UsageError, match=r"model\.name=stylegan2 lacks.*`outputs`"):
        engine_of("systems/acgan", tiny_data, "model.name=stylegan2", system=system)
    with pytest.raises(UsageError, match=r"system\.weight is no key of system\.name=gan"):
        config_of("system.weight=2")


def test_vectors_are_no_classes(tmp_path):
    (tmp_path / "in").mkdir()
    lines = ["file,size,age"]
    for i in range(8):
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / "in" / f"{i}.png")
        lines.append(f"{i}.png,{i / 8},1")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    pack(tmp_path / "in", tmp_path / "out", resolution=8, labels=tmp_path / "labels.csv", progress=False)
    with pytest.raises(UsageError, match=r"learns classes, but the condition is the vector labels: .*--labels folders"):
        acgan(tmp_path / "out")


def test_its_steps_may_be_replayed(tiny_data):
    """The losses contain no numbers that change; a class derived from it has to say so itself."""
    first = FirstStep(acgan(tiny_data))
    assert first.system.constants(first.step) is not None
    derived: Any = type("Derived", (type(first.system),), {})
    first.system.__class__ = derived
    assert first.system.constants(first.step) is None
