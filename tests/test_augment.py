"""Augmentation in general: identity at p = 0, ranks, derivatives, the controller, settings."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from augmenting import made, off, pictures

from stylegan_pg import augment
from stylegan_pg.augment import diffaugment
from stylegan_pg.config import ADAConfig, AugmentConfig, Config, DataConfig, DiffAugmentConfig, TrainConfig
from stylegan_pg.config.checks import check
from stylegan_pg.config.fields import choices_of
from stylegan_pg.errors import UsageError
from stylegan_pg.rng import generator


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_identity_at_p_zero_and_same_form_at_p_one(channels, layout, dtype):
    images = pictures(3, channels, 12, 8, dtype).contiguous(memory_format=layout)
    a = made()
    same = a.apply(images, a.draw(3, 0.0, torch.Generator(), (12, 8)))
    assert torch.equal(same, images)
    other = a.apply(images, a.draw(3, 1.0, torch.Generator(), (12, 8)))
    assert not torch.equal(other, images)
    for result in (same, other):
        assert (result.shape, result.dtype, result.stride()) == (images.shape, images.dtype, images.stride())
    assert other.isfinite().all()


def test_unaffected_images_of_a_batch_are_unchanged():
    images, count = pictures(64, 3, 8, 8), 0
    a = made(pipeline="bgc")
    params = a.draw(64, 0.15, generator(0, "x"), (8, 8))
    result, neutral = a.apply(images, params), off("bgc", 1)
    for i in range(64):
        alone = augment.pick(params, [i])
        if untouched := all(torch.equal(alone[k], neutral[k]) for k in alone):
            assert torch.equal(result[i], images[i])
        else:
            assert not torch.equal(result[i], images[i])
        count += untouched
    assert 3 < count < 50


def test_no_augmentation_is_none():
    assert augment.make(AugmentConfig()) is None


@pytest.mark.parametrize("mode", ["fixed", "diffaugment"])
def test_ranks_give_the_same_images_as_one_process(mode):
    a = made(mode=mode)
    images = pictures(16, 3, 16, 16, torch.float64)
    params = a.draw(16, 0.4, generator(3, "deal", 512), (16, 16))
    assert all(len(v) == 16 and v.device.type == "cpu" for v in params.values())
    whole = a.apply(images, params)
    for ranks in (2, 4, 16):
        for rank in range(ranks):
            mine = list(range(rank, 16, ranks))
            part = a.apply(images[mine], augment.pick(params, mine))
            assert torch.allclose(part, whole[mine], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("mode", "pipeline"), [("fixed", "b"), ("fixed", "g"), ("fixed", "c"), ("fixed", "bgcfno"), ("diffaugment", "b")]
)
def test_twice_differentiable(mode, pipeline):
    a = made(mode=mode, **({"pipeline": pipeline} if mode == "fixed" else {}))
    x = pictures(2, 3, 4, 5, torch.float64).requires_grad_(True)
    params = a.draw(2, 0.8, generator(5, "grad"), (4, 5))

    def f(images):  # the square gives a second derivative that is not zero
        return a.apply(images, params).square()

    assert torch.autograd.gradcheck(f, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x,), fast_mode=True)


def test_a_gradient_penalty_through_augmentation_has_a_gradient():
    """This is R1 as in training: a gradient for the images before augmentation, differentiated for D's weights."""
    x = pictures(4, 3, 8, 8, torch.float64).requires_grad_(True)
    weight = torch.randn(
        [1, 3, 3, 3], dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True
    )
    a = made(pipeline="bgc")
    params = a.draw(4, 0.8, generator(1, "r1"), (8, 8))

    def penalty(weight):
        scores = torch.nn.functional.conv2d(a.apply(x, params), weight).tanh().sum()
        (gradient,) = torch.autograd.grad(scores, x, create_graph=True)
        return gradient.square().sum()

    assert torch.autograd.gradcheck(penalty, (weight,), fast_mode=True)


def test_the_controller_goes_from_zero_to_one_in_the_given_kimg():
    p, images = 0.0, 0
    while p < 1:
        p = augment.adjust(p, 0.9, batch=64, interval=4, target=0.6, kimg=500)
        images += 64 * 4
    assert images == pytest.approx(500_000, abs=2 * 256)
    assert augment.adjust(1.0, 1.0, 64, 4, 0.6, 500) == 1
    assert augment.adjust(0.0, -1.0, 64, 4, 0.6, 500) == 0
    assert augment.adjust(0.3, 0.6, 64, 4, 0.6, 500) == 0.3


@pytest.mark.parametrize("start", [0.0, 1.0])
@pytest.mark.parametrize("target", [0.2, 0.6])
def test_the_controller_reaches_its_target(start, target):
    """The mean sign of D falls with p as 0.95 - 1.2 p, with the noise of a finite batch."""
    random, p, history = np.random.default_rng(0), start, []
    for _ in range(3000):
        signs = random.random(4 * 64) < (1 + 0.95 - 1.2 * p) / 2
        p = augment.adjust(p, float(signs.mean() * 2 - 1), 64, 4, target, 500)
        history.append(p)
    last = np.array(history[-500:])
    assert 0.95 - 1.2 * last.mean() == pytest.approx(target, abs=0.02)
    assert last.std() < 0.02


def test_configuration_and_implementation_have_the_same_names():
    """Each letter and each policy that the configuration allows draws parameters of its own."""
    letters, policies = choices_of(ADAConfig, "pipeline"), choices_of(DiffAugmentConfig, "policy")
    of_letters = [frozenset(off(letter, 1)) for letter in letters]
    of_policies = [frozenset(diffaugment.draw(name, 1, torch.Generator(), (8, 8))) for name in policies]
    assert all(of_letters + of_policies)
    assert (len(set(of_letters)), len(set(of_policies))) == (len(letters), len(policies)) == (6, 3)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mode", "adaptive"),
        ("p", 1.5),
        ("target", -2.0),
        ("target", math.nan),
        ("interval", 0),
        ("kimg", 0.0),
        ("pipeline", "bgx"),
        ("pipeline", "bb"),
        ("pipeline", ""),
        ("policy", "color,colour"),
        ("policy", "color,color"),
    ],
)
def test_impossible_settings_are_refused(key, value):
    config = Config(run="runs/x", data=DataConfig(url="x"), train=TrainConfig(total_kimg=1.0))
    check(config)
    cls = DiffAugmentConfig if key == "policy" else ADAConfig
    with pytest.raises(UsageError, match=rf"augment\.{key}"):
        check(dataclasses.replace(config, augment=cls(**{key: value})))
