"""The numbers that a checkpoint contains besides tensors: reading both formats, and rejecting wrong values."""

import json
from typing import Any

import pytest

from stylegan_pg.config import Config
from stylegan_pg.config.loading import load_config
from stylegan_pg.config.plain import to_plain
from stylegan_pg.errors import UsageError
from stylegan_pg.systems.gan import GAN
from stylegan_pg.systems.state import GANState, read_state
from stylegan_pg.training.resume import running_state
from stylegan_pg.training.running import RunningState, stored_states

# The names that versions up to 0.1 wrote, with all of their prefixes.
EARLIER = {
    "augment_p": 0.4, "_signs": 3.0, "_signed": 8.0, "pl_mean": 2.0, "loss_scale": 512.0, "_skipped": 1.5, "skipped": 2,
    "_clean_steps": 7, "_micro_batch_0_8": 4, "_micro_batch_1_8": 0, "_trains_b8.conv1.weight": 1,
}  # fmt: skip


def config_of(*overrides: str) -> Config:
    return load_config(None, ["run=runs/x", "data.url=data/x", "train.total_kimg=1", *overrides])


def test_the_earlier_format_is_read_into_the_typed_state():
    training, system = stored_states({"running_means": EARLIER})
    assert read_state(RunningState, training, "x") == RunningState(512.0, 7, 2, 1.5, {"0_8": 4})
    assert read_state(GANState, system, "x") == GANState(0.4, 3.0, 8, {"pl_mean": 2.0}, ["b8.conv1.weight"])
    assert stored_states({"running_means": {}}) == ({"micro_batches": {}}, {"thawed": [], "means": {}})


def test_the_state_of_a_gan_survives_a_checkpoint():
    ada = GAN(config_of("augment.mode=ada", "augment.p=0.1"))
    assert ada.statistics() == {"augment_p": 0.1}
    ada.running = GANState(0.4, 3.0, 8, {"pl_mean": 2.0}, ["b8.conv1.weight"])
    stored = json.loads(json.dumps(ada.state()))
    other = GAN(config_of("augment.mode=ada"))
    other.load_state(stored | {"means": {"pl_mean": 2.0, "of_another_system": 1.0}, "later": 5})
    assert other.running == ada.running
    assert other.statistics() == {"augment_p": 0.4, "pl_mean": 2.0}
    none = GAN(config_of())
    none.load_state(stored)
    assert none.running.augment_p is None  # without augmentation
    other.load_state({})
    assert other.running == GANState(0.4)  # a missing probability does not change the present one


@pytest.mark.parametrize("form", ["earlier", "typed"])
def test_numbers_are_reset_where_their_initial_value_was_changed(form):
    config = config_of("augment.mode=ada", "augment.p=0.1")
    state: dict[str, Any] = {"config": to_plain(config), "running_means": EARLIER}
    if form == "typed":
        state["training"], state["system"] = stored_states({"running_means": EARLIER})
    del state["config"]["train"]["loss_scale"]  # as before this key was introduced

    def kept(*overrides: str) -> list[str]:
        training, system = running_state(state, config_of(*overrides))
        assert training["clean_steps"] == 7
        assert system["means"] == {"pl_mean": 2.0}
        return [name for name in ("loss_scale", "augment_p") if name in training | system]

    ada = "augment.mode=ada"
    assert running_state(state, config) == stored_states(state)
    assert kept(ada, "augment.p=0.2") == ["loss_scale"]
    assert kept(ada, "augment.p=0.1", "train.loss_scale=64") == ["augment_p"]
    assert kept("augment.mode=fixed", "augment.p=0.1") == ["loss_scale"]
    assert state["running_means"] == EARLIER


@pytest.mark.parametrize(
    ("cls", "wrong"),
    [
        *((GANState, {"augment_p": value}) for value in (2, -0.1, "1", True, float("nan"))),
        *((GANState, {"means": value}) for value in ([], {"pl_mean": float("inf")}, {"pl_mean": None})),
        *((GANState, {"thawed": value}) for value in ("b8", [5], {})),
        *((GANState, {"signed": value}) for value in (-1, 0.5, 1 << 63)),
        *((RunningState, {"loss_scale": value}) for value in (0, None, 2.0**300)),
        *((RunningState, {"micro_batches": value}) for value in ({"0_0": -1}, {"0_0": 1.5}, [4])),
    ],
)
def test_values_out_of_range_are_rejected_by_name(cls, wrong):
    with pytest.raises(UsageError, match=f"^file: {next(iter(wrong))}"):
        read_state(cls, wrong, "file")
