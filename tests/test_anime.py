"""System anime: the losses of attributes, DRAGAN's uniform noise, and what is said about unfit data."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from stylegan_pg import Pair
from stylegan_pg.config.loading import load_config
from stylegan_pg.data.conditions import Conditions
from stylegan_pg.errors import UsageError
from stylegan_pg.losses.terms import DInputs, dragan_term, near_images
from stylegan_pg.networks import NETWORKS, NetworkShape
from stylegan_pg.systems.anime import Anime, attribute_loss, share_right
from stylegan_pg.systems.draws import Streams, mapped

COUNT, K = 6, 3
VECTORS = np.array([[1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 1, 0]], np.float32)


def softplus(x: torch.Tensor) -> torch.Tensor:
    """log(1 + exp(x)), by its definition."""
    return torch.log1p(torch.exp(x))


def cross_entropy(logits: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """-sum_k a log p + (1 - a) log(1 - p) with p = 1 / (1 + exp(-logit)), [N]."""
    p = 1 / (1 + torch.exp(-logits))
    return -(a * torch.log(p) + (1 - a) * torch.log(1 - p)).sum(dim=1)


def test_the_loss_of_attributes_is_the_binary_cross_entropy():
    logits = (3 * torch.randn(5, 4, dtype=torch.float64)).requires_grad_(True)
    a = torch.randint(2, [5, 4]).double()
    ours, theirs = attribute_loss(logits, a), cross_entropy(logits, a)
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn(5, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((ours * weights).sum(), logits)
    torch.testing.assert_close(gradient, weights[:, None] * (torch.sigmoid(logits) - a))
    assert attribute_loss(torch.tensor([[800.0, -800.0]]), torch.tensor([[0.0, 1.0]])).tolist() == [1600.0]
    assert share_right(torch.tensor([[1.0, -2.0, 3.0, -1.0]]), torch.tensor([[1.0, 0.0, 0.0, 1.0]])).tolist() == [0.5]


# ------------------------------------------------------------------------------------------------------ both sides


@dataclass
class Micro:
    """One micro-batch that is the whole batch, as a loss sees it."""

    real: torch.Tensor
    condition: torch.Tensor
    step: Any
    count: int = COUNT
    index: int = 0
    alpha: float = 1.0
    drawn: dict[Any, Any] = field(default_factory=dict)

    @property
    def rows(self) -> list[int]:
        return list(range(self.count))

    def draw(self, key: Any, make: Any) -> Any:
        if key not in self.drawn:
            self.drawn[key] = mapped(make(Streams(0, 0)), torch.Tensor.double)
        return self.drawn[key]

    def rng(self, purpose: str, *key: int, device: Any = "cpu") -> torch.Generator:
        return torch.Generator().manual_seed(len(purpose))

    def once(self, key: Any, make: Any) -> Any:
        return make()

    def to_device(self, t: torch.Tensor) -> torch.Tensor:
        return t.double()


def system(**changes: object) -> Anime:
    given = {"resolution": 8, "model.g_channels": 4, "model.blocks": 1, "model.channel_max": 8, "model.z_dim": 4}
    given |= {"model.mbstd_group": COUNT, "train.batch": COUNT, "system.adversarial_weight": "null"}
    given |= {"run": "unused", **changes}
    made = Anime(load_config("systems/anime", [f"{key}={value}" for key, value in given.items()]))
    torch.manual_seed(1)
    made.build(NetworkShape(8, 8, False, 3, K, COUNT), Conditions("attributes", K, VECTORS))
    made.G.double()
    made.D.double()
    return made


def micro() -> Micro:
    dice = torch.Generator().manual_seed(3)
    real = torch.rand(COUNT, 3, 8, 8, generator=dice, dtype=torch.float64) * 2 - 1
    step = SimpleNamespace(rank=0, device=torch.device("cpu"), resolution=8, nimg=0, number=0, memory={}, real=real)
    return Micro(real, torch.from_numpy(VECTORS[[0, 1, 2, 3, 0, 1]]).double(), step)


@pytest.mark.parametrize(
    ("changes", "adversarial", "of_d", "of_g"),
    [
        ({}, K, 1, 1),
        ({"system.adversarial_weight": 2, "system.attribute_weight": 0.5, "system.g_attribute_weight": 3}, 2, 0.5, 3),
        ({"system.g_attribute_weight": 0}, K, 1, 0),
    ],
)
def test_both_losses_and_their_gradients(changes, adversarial, of_d, of_g):
    made, x = system(**changes), cast(Any, micro())
    found = made.generator_loss(x, "")
    latents = cast(Any, made.latents(x, "g"))
    output = made.D(made.G(latents.z, latents.c))
    assert output.shape == (COUNT, 1 + K)
    expected = adversarial * softplus(-output[:, 0]) + of_g * cross_entropy(output[:, 1:], latents.c)
    torch.testing.assert_close(found["loss"], expected)
    torch.testing.assert_close(found["loss_g"], softplus(-output[:, 0]))
    weights = [*made.G.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad(t.sum(), weights) for t in (found["loss"], expected)), strict=True):
        torch.testing.assert_close(ours, theirs)

    found = made.discriminator_loss(x, [])
    latents = cast(Any, made.latents(x, "d"))
    with torch.no_grad():
        fake = made.G(latents.z, latents.c)
    real, fake = made.D(x.real), made.D(fake)
    expected = adversarial * (softplus(-real[:, 0]) + softplus(fake[:, 0]))
    expected = expected + of_d * (cross_entropy(real[:, 1:], x.condition) + cross_entropy(fake[:, 1:], latents.c))
    torch.testing.assert_close(found["loss"], expected)
    weights = [*made.D.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad(t.sum(), weights) for t in (found["loss"], expected)), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(found["attribute_loss_d"], cross_entropy(real[:, 1:], x.condition))


def test_attributes_that_are_drawn_are_those_of_real_images():
    made, x = system(), cast(Any, micro())
    rows = {tuple(row) for row in cast(Any, made.latents(x, "g")).c.tolist()}
    assert rows <= {tuple(row) for row in VECTORS.tolist()}
    assert len(rows) > 1


# ----------------------------------------------------------------------------------------------------------- DRAGAN


def test_uniform_noise_has_the_deviation_of_each_image():
    dice = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.1, 1.0, 3.0, 0.0], dtype=torch.float64)[:, None, None, None]
    real = torch.randn(4, 3, 16, 16, generator=dice, dtype=torch.float64) * scale
    noise = torch.randn(real.shape, generator=dice, dtype=torch.float64)
    moved = near_images(real, noise, "uniform") - real
    for image, change, n in zip(real, moved, noise, strict=True):
        deviation = (image - image.mean()).square().mean().sqrt()
        phi = torch.distributions.Normal(0.0, 1.0).cdf(n)
        torch.testing.assert_close(change, 0.5 * deviation * phi)
    u = moved[:3] / moved[:3].amax(dim=(1, 2, 3), keepdim=True)
    assert u.min() >= 0
    assert abs(float(u.mean()) - 0.5) < 0.02
    for i in range(4):  # an image does not depend on the others in its batch
        alone = near_images(real[i : i + 1], noise[i : i + 1], "uniform")
        torch.testing.assert_close(alone, real[i : i + 1] + moved[i : i + 1])
    torch.testing.assert_close(near_images(real, noise, "normal"), real + 0.25 * noise)


@pytest.mark.parametrize("law", ["normal", "uniform"])
def test_the_penalty_is_that_of_the_gradient_near_images(law):
    """Of D(x) = |x|^2 / 2, whose gradient is x."""
    real, noise = (torch.randn(3, 2, 4, 4, dtype=torch.float64) for _ in range(2))
    found = dragan_term(DInputs(lambda x, c: x.square().sum(dim=(1, 2, 3)) / 2, real, None, noise=noise), noise=law)
    norm = near_images(real, noise, law).flatten(1).norm(dim=1)
    torch.testing.assert_close(found["dragan_norm"], norm)
    torch.testing.assert_close(found["loss"], (norm - 1).square())


# -------------------------------------------------------------------------------------------------------- bad input


def test_a_run_without_conditions_is_refused():
    with pytest.raises(UsageError, match=r"attributes of pictures: pack a CSV .*--vector attributes=FILE.csv"):
        Anime(load_config("systems/anime", ["data.conditional=false", "run=unused"]))


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        (
            Conditions("class", K, np.array([0, 1])),
            "the condition is the class: pack a CSV .*data.condition=attributes",
        ),
        (Conditions("pose", K, VECTORS / 2), "the vector pose holds 0.5: pack a CSV"),
    ],
)
def test_unfit_conditions_are_refused(conditions, message):
    made = Anime(load_config("systems/anime", ["run=unused"]))
    with pytest.raises(UsageError, match=message):
        made.build(NetworkShape(8, 8, False, 3, K, 4), conditions)


def test_a_discriminator_without_further_outputs_is_refused():
    class Plain(nn.Module):
        def __init__(self, **_: object):
            super().__init__()

    kind = NETWORKS["srresnet"]
    config = load_config("systems/anime", ["run=unused"])
    made = Anime(config, Pair(kind.G, Plain, kind.g_kwargs, kind.d_kwargs))
    with pytest.raises(UsageError, match="an argument `outputs`"):
        made.build(NetworkShape(8, 8, False, 3, K, 4), Conditions("attributes", K, VECTORS))
