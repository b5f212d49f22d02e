"""Labels by concatenation and by projection in the discriminators of the families, and further outputs for heads."""

from typing import Any

import pytest
import torch
from configuring import config_of
from first_step import batches_of, engine_of

from stylegan_pg.config import MODELS
from stylegan_pg.networks import NETWORKS, NetworkShape

FAMILIES = ["stylegan2", "stylegan", "progan", "stylegan3", "r3gan", "dcgan"]
CLASSES = 3


def discriminator(name, label, c_dim=CLASSES, channels=2, *, fade=False, **more) -> Any:
    cls: Any = MODELS[name]
    model = cls(channel_max=8, label=label)
    shape = NetworkShape(16, 16, fade, channels, c_dim, 4)
    return NETWORKS[name].D(**{**NETWORKS[name].d_kwargs(model, shape), **more}).double()


def inputs():
    torch.manual_seed(0)
    return torch.randn(4, 2, 16, 16).double(), torch.eye(CLASSES).double()[[0, 2, 1, 0]]


@pytest.mark.parametrize("fade", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_concatenated_labels_are_planes(name, fade):
    """The same weights in an unconditional network of pictures with as many channels more give the same scores."""
    images, c = inputs()
    if fade and name in ("dcgan", "stylegan3"):
        pytest.skip("it does not grow")
    D = discriminator(name, "concatenation", fade=fade)
    twin = discriminator(name, "projection", 0, 2 + CLASSES, fade=fade)
    twin.load_state_dict(D.state_dict())
    planes = c[:, :, None, None].expand(-1, -1, 16, 16)
    how = {"alpha": 1.0} if fade else {}  # then the down-sampled picture, whose planes end in zeros, has no weight
    scores = D(images, c, **how)
    torch.testing.assert_close(scores, twin(torch.cat([images, planes], dim=1), **how))
    assert (D(images, c.roll(1, 0), **how) - scores).abs().max() > 1e-6
    assert (D.img_channels, D.c_dim) == (2, CLASSES)
    with pytest.raises(ValueError, match="conditional"):
        D(images, **how)


@torch.no_grad()
def test_planes_of_a_fade_are_constant():
    """At half the resolution, too: the label is added after down-sampling."""
    images, c = inputs()
    D = discriminator("stylegan2", "concatenation", fade=True)
    seen = []
    D.b8.fromrgb.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    D(images, c, alpha=0.3)
    assert torch.equal(seen[0][:, 2:], c[:, :, None, None].expand(-1, -1, 8, 8))


@pytest.mark.parametrize("label", ["projection", "concatenation"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_further_outputs_stand_behind_the_score(name, label):
    """The score is that of the network without them."""
    images, c = inputs()
    D = discriminator(name, label, outputs=6)
    out = D(images, c)
    assert out.shape == (4, 6)
    plain = discriminator(name, label)
    state = {key: t if t.shape == D.state_dict()[key].shape else None for key, t in plain.state_dict().items()}
    cut = {key: D.state_dict()[key][: len(plain.state_dict()[key])] for key, t in state.items() if t is None}
    assert len(cut) in (1, 2)  # the last layer's weight, and its bias
    plain.load_state_dict({key: cut.get(key, t) for key, t in D.state_dict().items()})
    torch.testing.assert_close(plain(images, c), out[:, :1])
    assert (out[:, 1:].std(dim=0) > 0).all()


@pytest.mark.parametrize("label", ["projection", "concatenation"])
@pytest.mark.parametrize("name", ["stylegan2", "r3gan", "dcgan"])
def test_both_ways_are_trained(tiny_data, name, label):
    objective = "relativistic" if name == "r3gan" else "logistic"
    given = [f"model.name={name}", f"model.label={label}", f"loss.objective={objective}", "data.conditional=true"]
    given += ["model.mapping_layers=2"] if name == "stylegan2" else []
    engine = engine_of(None, tiny_data, *given, "loss.pl_weight=0", "loss.r1_every=1")
    before = {key: p.clone() for key, p in engine.state.D.named_parameters()}
    for batch in batches_of(engine, 2):
        assert not engine.step(batch).faults
    assert all(not torch.equal(before[key], p) for key, p in engine.state.D.named_parameters())


def test_the_key():
    assert getattr(config_of("model.label=concatenation").model, "label", "") == "concatenation"
    for name in FAMILIES:
        cls: Any = MODELS[name]
        model = cls(label="concatenation")
        assert NETWORKS[name].d_kwargs(model, NetworkShape(8, 8, False, 3, 2, 4))["label"] == "concatenation"
