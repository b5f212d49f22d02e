"""The random parameters of augmentation follow the published distributions."""

import math
from typing import Any

import pytest
import torch
from augmenting import ALL, off

from stylegan_pg.augment import ada, diffaugment
from stylegan_pg.rng import generator

N = 20_000

LN2 = math.log(2)

# {parameter: (fraction of non-neutral values among the active ones, standard deviation when active, function of the
# value to which the standard deviation applies)}
DISTRIBUTIONS: dict[str, tuple[float, float, Any]] = {
    "flip": (1 / 2, 1 / 2, None),
    "turns": (3 / 4, math.sqrt(15 / 12), None),
    "shift": (1, 0.125 / math.sqrt(3) * 256, None),
    "scale": (1, 0.2 * LN2, torch.log),
    "pre_rotation": (1, math.pi / math.sqrt(3), None),
    "stretch": (1, 0.2 * LN2, torch.log),
    "post_rotation": (1, math.pi / math.sqrt(3), None),
    "move": (1, 0.125 * 256, None),
    "brightness": (1, 0.2, None),
    "contrast": (1, 0.5 * LN2, torch.log),
    "luma_flip": (1 / 2, 1 / 2, None),
    "hue": (1, math.pi / math.sqrt(3), None),
    "saturation": (1, 1.0 * LN2, torch.log),
    "noise": (1, 0.1 * math.sqrt(1 - 2 / math.pi), None),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_parameters_follow_the_published_distributions(name, p):
    share, spread, function = DISTRIBUTIONS[name]
    params, neutral = ada.draw(ALL, N, p, generator(0, "laws"), (256, 256)), off(ALL, 1)
    value, neutral = params[name].double(), neutral[name].double()
    on = (value != neutral).reshape(N, -1).any(dim=1)
    probability = 1 - math.sqrt(1 - p) if "rotation" in name else p
    assert on.double().mean().item() == pytest.approx(probability * share, abs=0.013)
    if share == 1:  # otherwise a neutral value may be active or inactive, so only p = 1 can be checked
        value = value[on]
    elif p < 1:
        return
    value = function(value) if function else value
    assert value.std().item() == pytest.approx(spread, rel=0.03)
    if name in ("scale", "stretch", "contrast", "saturation", "hue", "brightness", "move", "shift"):
        assert value.mean().item() == pytest.approx(0, abs=4 * spread / math.sqrt(N * p))


def test_rotations_together_have_probability_p():
    params = ada.draw("g", N, 0.36, generator(0, "r"), (8, 8))
    both = (params["pre_rotation"] != 0) | (params["post_rotation"] != 0)
    assert both.double().mean().item() == pytest.approx(0.36, abs=0.013)


def test_multipliers_change_the_probability_of_their_operation_only():
    factors = {"hue": 0.5, "rotation": 0.25, "cutout": 0.0, "flip": 4.0, "bands": 0.5}
    params, plain = (ada.draw(ALL, N, 0.4, generator(0, "m"), (8, 8), given) for given in (factors, None))
    changed = ("hue", "pre_rotation", "post_rotation", "cutout", "flip", "bands")
    assert [name for name, t in plain.items() if not torch.equal(t, params[name])] == [
        *("flip", "pre_rotation", "post_rotation", "hue", "bands", "cutout")
    ]
    neutral = off(ALL, 1)
    on = {name: (params[name] != neutral[name]).reshape(N, -1).any(dim=1).double() for name in changed[:3]}
    assert on["hue"].mean().item() == pytest.approx(0.2, abs=0.013)
    both = (on["pre_rotation"] + on["post_rotation"]) > 0
    assert both.double().mean().item() == pytest.approx(0.1, abs=0.01)
    assert (params["cutout"][:, 2] == 0).all()
    assert params["flip"].mean().item() == pytest.approx(0.5, abs=0.013)  # always made, and a flip in half of the cases
    assert (params["bands"] != 1).any(dim=1).double().mean().item() == pytest.approx(1 - 0.8**4, abs=0.013)


def test_bands_and_cutout_follow_the_published_distributions():
    params = ada.draw("fo", N, 0.3, generator(0, "f"), (256, 256))
    on = params["bands"] != 1
    assert on.any(dim=1).double().mean().item() == pytest.approx(1 - 0.7**4, abs=0.013)
    one = params["bands"][(params["bands"][:, 1:3] == params["bands"][:, :1]).all(dim=1) & on.any(dim=1)].double()
    gain = (one[:, 3] / one[:, 0]).log()  # only the highest band is active; the normalisation cancels in the ratio
    assert gain.std().item() == pytest.approx(LN2, rel=0.06)
    power = (one.square() * torch.tensor([10, 1, 1, 1]) / 13).sum(dim=1)
    assert torch.allclose(power, torch.ones_like(power), atol=1e-5)
    assert (params["cutout"][:, 2] > 0).double().mean().item() == pytest.approx(0.3, abs=0.013)
    assert params["cutout"][:, :2].std(dim=0).tolist() == pytest.approx([12**-0.5] * 2, rel=0.03)
    assert set(params["cutout"][:, 2].tolist()) == {0.0, 0.5}


def test_shifts_scale_with_the_sides_of_the_image():
    params = ada.draw("bg", N, 1.0, generator(0, "s"), (64, 512))
    assert params["shift"].abs().amax(dim=0).tolist() == [64, 8]
    assert params["move"].std(dim=0).tolist() == pytest.approx([64, 8], rel=0.03)


def test_operations_active_at_a_lower_p_are_the_same_at_a_higher_p():
    neutral, previous = off(ALL, 1), off(ALL, 256)
    for p in (0.0, 0.1, 0.5, 0.9, 1.0):
        g = generator(0, "nested")
        params = ada.draw(ALL, 256, p, g, (8, 8))
        for name, value in params.items():
            if name in ("noise_seed", "bands"):
                continue  # noise_seed has no neutral value, and bands are a product of four gains
            before = previous[name]
            stayed = (before == neutral[name]) if name != "cutout" else before[:, 2:].expand(-1, 3) == 0
            assert (stayed | (before == value)).all(), name
        previous = params
        assert torch.rand(1, generator=g) == torch.rand(1, generator=_after(256))


def _after(count: int) -> torch.Generator:
    g = generator(0, "nested")
    ada.draw(ALL, count, 0.7, g, (8, 8))
    return g


def test_diffaugment_draws_the_published_ranges():
    params = diffaugment.draw("color,translation,cutout", N, generator(0, "d"), (64, 128))
    for name, (low, high) in {"brightness": (-0.5, 0.5), "saturation": (0, 2), "contrast": (0.5, 1.5)}.items():
        assert low <= params[name].min() < low + 0.01 * (high - low)
        assert high >= params[name].max() > high - 0.01 * (high - low)
    assert params["shift"].amax(dim=0).tolist() == [16, 8]
    assert params["shift"].amin(dim=0).tolist() == [-16, -8]
    assert set(diffaugment.draw("color", 1, torch.Generator(), (8, 8))) == {"brightness", "saturation", "contrast"}
