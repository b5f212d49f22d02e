"""The three generations, each with a different objective, terms and augmentation: a run can be killed at any time and
continued, and its result does not depend on the number of processes."""

import random

import harness
import pytest
import torch

from stylegan_pg import load_snapshot

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# Grows from 4x4 to 16x16. Without noise inputs, because only these depend on how a batch is divided.
GROWING = {
    "model__noise": "false",
    "train__dtype": "float64",
    "growth__start": 4,
    "growth__stable_kimg": 0.016,
    "growth__fade_kimg": 0.024,
    "output__grid_kimg": 0,
}
GENERATIONS = {
    "progan": {
        "model__name": "progan",
        "loss__objective": "wgan",
        "loss__r1_gamma": 0,
        "loss__pl_weight": 0,
        "loss__terms": "[{name: gradient_penalty, weight: 10}, {name: drift, weight: 0.001}]",
        "augment__mode": "ada",
        "augment__p": 0.3,
        "augment__interval": 2,
        "augment__kimg": 0.1,
        "augment__target": -1,
    },
    "stylegan": {
        "model__name": "stylegan",
        "loss__pl_weight": 0,
        "loss__terms": "[{name: dragan, weight: 0.1, every: 2}]",
        "optim__d_steps": 2,
        "optim__g_steps": 2,
        "growth__optimizer": "carry",
        "augment__mode": "diffaugment",
    },
    "r3gan": {
        "model__name": "r3gan",
        "model__group_width": 4,
        "data__conditional": "true",
        "loss__objective": "relativistic",
        "loss__pl_weight": 0,
        "loss__r1_every": 1,
        "loss__terms": "[{name: r2, weight: 1}]",
        "augment__mode": "fixed",
        "augment__p": 0.5,
        "augment__pipeline": "bgco",
        "augment__multipliers": "{hue: 0.5, saturation: 0.5, cutout: 0.8}",
    },
    "stylegan2": {
        "data__conditional": "true",
        "loss__objective": "relativistic",
        "loss__terms": "[{name: r2, weight: 1, every: 2}]",
    },
}


def arguments(run, data, name):
    return harness.arguments(run, data, **(GROWING | GENERATIONS[name]))


@pytest.fixture(scope="module", params=GENERATIONS)
def straight(request, tiny_data, tmp_path_factory):
    """Return the name of a generation and its uninterrupted run."""
    run = tmp_path_factory.mktemp("straight") / request.param
    harness.finish(harness.start(arguments(run, tiny_data, request.param)))
    return request.param, run


def test_killed_in_any_phase(straight, tiny_data, tmp_path):
    name, whole = straight
    run = tmp_path / "run"
    assert harness.kill_until_done(arguments(run, tiny_data, name), run, random.Random(7), most=4) > 0
    harness.assert_same_run(whole, run)


def test_ranks_and_micro_batches(straight, tiny_data, tmp_path):
    name, whole = straight
    one, state = harness.newest(whole)
    # StyleGAN's instance norm removes the effect of the constant's bias, so that its gradient is only rounding.
    one = {k: t for k, t in one.items() if not k.endswith("b4.input.bias")}
    for how, ranks in (({}, 2), ({"train__micro_batch": 4}, 0)):
        run = tmp_path / f"ranks{ranks}"
        args = harness.arguments(run, tiny_data, **(GROWING | GENERATIONS[name] | how))
        harness.finish(harness.start(args, ranks=ranks))
        other, other_state = harness.newest(run)
        assert harness.largest_difference(one, other) < 1e-9
        assert other_state["running_means"] == pytest.approx(state["running_means"], rel=1e-9)
        assert other_state["training"] == state["training"]


def test_files_of_a_run(straight):
    name, whole = straight
    lines = harness.stats(whole)
    assert [line["resolution"] for line in lines] == sorted(line["resolution"] for line in lines)
    assert {line["phase"] for line in lines} == {f"{r}x{r} {p}" for r in (8, 16) for p in ("fade", "stable")} | {
        "4x4 stable"
    }
    expected = {
        "progan": {"gp_norm", "augment_p", "sign_real"},
        "stylegan": {"dragan_norm", "r1_penalty"},
        "r3gan": {"r1_penalty", "r2_penalty"},
        "stylegan2": {"r1_penalty", "r2_penalty", "pl_length"},
    }
    assert expected[name] <= set().union(*lines)
    if name == "progan":
        p = [line["augment_p"] for line in lines]
        assert p == sorted(p)  # ADA increases p: the mean sign is above a target of -1
        assert p[0] < 0.5 < p[-1]
    G = load_snapshot(next((whole / "snapshots").glob("*.safetensors")))
    images = G(torch.randn(2, G.z_dim), torch.eye(G.c_dim)[:2] if G.c_dim else None)
    assert images.shape == (2, 3, 16, 16)
    assert torch.isfinite(images).all()
