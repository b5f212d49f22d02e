"""Messages at the start of a run: keys without effect, runs that end too early, and settings that may be mistakes."""

import itertools
import re
import shlex
import types

import harness
import pytest

from stylegan_pg.checkpoint import checkpoint
from stylegan_pg.config.loading import load_config
from stylegan_pg.config.plain import to_plain
from stylegan_pg.config.schedule import phase_at, phases, shortfall, term_weight
from stylegan_pg.errors import UsageError
from stylegan_pg.monitoring import status
from stylegan_pg.planning.advice import of_configuration, of_data, of_ranks, without_effect
from stylegan_pg.training.nonfinite import remedies
from stylegan_pg.training.resume import compare, running_state
from stylegan_pg.training.transfer import account, adopt

NEEDED = ["run=r", "data.url=d"]


def config_of(*overrides, name=None):
    return load_config(name, [*NEEDED, *overrides])


GROWING = ("resolution=32", "growth.start=8")


@pytest.mark.parametrize(
    ("others", "key", "words"),
    [
        (("optim.lr_at={8: 1, 16: 1, 32: 1}",), "optim.g_lr=0.1", r"nothing: optim.lr_at .* optim.lr_at.32=0.1$"),
        (("optim.lr_at={32: 1}", "optim.d_lr_at={16: 1}"), "optim.d_lr=0.1", "nothing at 16, 32: optim.lr_at goes"),
        (("optim.g_lr_at={32: 1}",), "optim.d_lr=0.1", ""),
        (("optim.g_lr_at={32: 1}",), "optim.lr_at.32=2", ""),  # it is D's in any case
        (("optim.g_lr_at={32: 1}", "optim.d_lr_at={32: 1}"), "optim.lr_at.32=2", "nothing: optim.d_lr_at goes before"),
        (("loss.r1_gamma_at={8: 1, 16: 1, 32: 1}",), "loss.r1_gamma=2", "nothing: loss.r1_gamma_at goes before it"),
        (("loss.r1_gamma_from={0: 1}",), "loss.r1_gamma=2", "nothing: loss.r1_gamma_from goes before it"),
        (("loss.r1_gamma_from={0: 1}",), "loss.r1_gamma_at={8: 1}", "nothing: loss.r1_gamma_from goes before it"),
        (("loss.r1_gamma_from={900: 1}",), "loss.r1_gamma=2", "nothing at 32: loss.r1_gamma_from"),
        (("train.batch_at={8: 16, 16: 8, 32: 4}",), "train.batch=4", "nothing: train.batch_at goes before it"),
        (("train.micro_batch_at={8: 4}",), "train.micro_batch=4", r"nothing at 8: .*give train.micro_batch_at.8=4"),
        (("growth.stable_kimg_at={8: 1, 16: 1, 32: 1}",), "growth.stable_kimg=2", "nothing: growth.stable_kimg_at"),
        (("train.total_kimg=9999",), "growth.stable_kimg_at.32=2", "nothing: no phase .* until train.total_kimg"),
        ((), "growth.stable_kimg_at.32=2", ""),
        ((), "growth.fade_kimg_at.8=2", "nothing: no phase of this run asks for it"),
        ((), "train.batch_at={4: 8, 8: 8}", "nothing at 4: no phase of this run asks for it"),
        ((), "train.zero_stage=2", "nothing: it is for train.engine=deepspeed"),
        (("augment.mode=fixed",), "augment.p=0.5", ""),
        ((), "metrics.names=[swd]", "nothing is measured: give metrics.every_kimg"),
        (("metrics.at_snapshots=true",), "metrics.names=[swd]", ""),
        ((), "model.low_precision=bf16", "give model.low_precision_resolutions too"),
        (("loss.r1_gamma=0", "loss.terms=[{name: r1}]"), "loss.r1_every=2", "R1 is off"),
        ((), "seed=3", ""),
    ],
)
def test_a_key_without_effect_is_reported(others, key, words):
    told = without_effect(None, [*NEEDED, *GROWING, *others, key])
    assert [line for line in told if not line.startswith(key)] == []
    assert len(told) == bool(words)
    assert all(re.search(words, line) for line in told)


def test_a_key_that_is_given_twice_counts_once():
    given = ["data=http://me:secret@host/x", *NEEDED, *GROWING, "train.batch=8", "metrics=swd", "train.batch=16"]
    again = "changes nothing: {} is given once more after it"
    assert without_effect(None, given) == [
        f"data=http://host/x {again.format('data.url')}",
        f"train.batch=8 {again.format('train.batch')}",
        "metrics=swd changes nothing: nothing is measured: give metrics.every_kimg or metrics.at_snapshots=true too",
    ]


def test_keys_that_an_automatic_schedule_does_not_read():
    given = [*NEEDED, "train.batch=8", "optim.g_lr=0.001", "growth.devices=2"]
    (line,) = without_effect("stylegan2-growing256", given)
    assert re.match(r"train.batch=8 changes nothing: train.batch_at .*growth.schedule=auto fills in", line)


def test_weights_of_terms_that_are_fully_replaced_by_tables():
    tables = "{name: r2, weight: 3, weight_at: {8: 1, 16: 1, 32: 1}}, {name: drift, weight: 3, weight_at: {8: 1}}"
    told = without_effect(None, [*NEEDED, *GROWING, f"loss.terms=[{tables}]"])
    assert told == ["loss.terms: weight of r2 changes nothing: its weight_at goes before it"]
    told = without_effect(None, [*NEEDED, *GROWING, "loss.terms=[{name: r2, weight_at: {8: 1}, weight_from: {0: 2}}]"])
    assert told == ["loss.terms: weight_at of r2 changes nothing: its weight_from goes before it"]


@pytest.mark.parametrize("total", [1000, 3000, 6000, 8400])
def test_a_total_that_ends_during_growth_is_reported_with_a_sufficient_one(total):
    config = config_of(f"train.total_kimg={total}", name="ffhq1024")
    told = shortfall(config)
    assert str(phases(config)[-1]) in told
    assert "no whole generator of 1024x1024" in told
    enough = re.search(r"give (train\.total_kimg=[0-9.]+)$", told)
    assert enough
    assert shortfall(config_of(enough[1], name="ffhq1024")) == ""
    least = re.search(r"growing takes ([0-9.]+) kimg", told)
    assert least
    assert shortfall(config_of(f"train.total_kimg={least[1]}", name="ffhq1024")) == ""
    assert shortfall(config_of(f"train.total_kimg={float(least[1]) - 1}", name="ffhq1024"))


def test_growth_with_empty_phases_may_also_be_too_short():
    assert "no whole generator" in shortfall(
        config_of(*GROWING, "growth.stable_kimg_at.32=0", "growth.fade_kimg_at.32=0")
    )
    assert shortfall(config_of(*GROWING, "growth.stable_kimg_at.32=0")) == ""  # the fade is completed


def test_groups_ranks_and_labels():
    config = config_of(*GROWING, "train.batch=8", "train.batch_at={16: 7}")
    (line,) = of_configuration(config)
    assert "batch of 7 at 16x16" in line
    assert of_configuration(config_of(*GROWING, "train.batch_at={16: 7}", "model.mbstd_channels=0")) == []
    lines = of_ranks(phases(config), 3)  # 8 images are two groups of 4, 7 are seven
    assert len(lines) == 1
    assert "only 2 of the 3 ranks" in lines[0]
    assert "8x8 stable" in lines[0]
    assert "16x16" not in lines[0]
    assert of_ranks(phases(config), 2) == []
    labelled = types.SimpleNamespace(label_names=("cat", "d\x1bog"))
    assert "2 classes (cat, d\\x1bog)" in of_data(config, labelled)[0]  # type: ignore[arg-type]  # all that it reads
    assert of_data(config_of(*GROWING, "data.conditional=true"), labelled) == []  # type: ignore[arg-type]  # as above
    assert of_data(config, types.SimpleNamespace(label_names=())) == []  # type: ignore[arg-type]  # as above


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("demo", []),
        ("ffhq1024", []),
        ("stylegan-ffhq1024", []),
        ("stylegan2-growing256", []),
        ("stylegan2-ffhq256", ["loss.r1_gamma_from={0: 3, 100: 2}"]),
        ("stylegan2-ffhq256", ["model.low_precision=auto", "model.low_precision_at=[64, 128]", "loss.r1_gamma=0"]),
        ("stylegan2-ffhq256", ["optim.lr_at={256: 0.002}", "loss.r1_gamma_from={100: 2}"]),
    ],
)
def test_the_advice_for_a_diverged_run_works(name, given):
    config = config_of(*given, name=name)
    end = phases(config)[-1].end
    for nimg in (1000, end - 1):
        phase = phase_at(phases(config), nimg)
        r1, rates, *precision = remedies(config, phase, nimg)
        for keys in (r1, rates, *precision):
            overrides = [*given, *shlex.split(keys)]
            changed = config_of(*overrides, name=name)
            idle = [line for line in without_effect(name, [*NEEDED, *overrides]) if " changes nothing: " in line]
            idle = [line for line in idle if not line.endswith("once more after it")]  # the advice replaces these
            assert not [line for line in idle if line.split(" ")[0] in keys]
            now = phase_at(phases(changed), nimg)
            assert now.start == phase.start
            state = {"config": to_plain(config), "dataset": "d", "nimg": nimg, "phase": phase.index, "environment": {}}
            index = types.SimpleNamespace(identity="d", path="p")
            compare(state, changed, index, phases(changed), {})  # type: ignore[arg-type]  # continues
            if keys == r1:
                before, after = (
                    [term_weight(t, phase.resolution, nimg) for t in c.loss.all_terms() if t.name == "r1"]
                    for c in (config, changed)
                )
                assert sum(after) > sum(before)
            if keys == rates:
                assert (now.g_lr, now.d_lr) == pytest.approx((phase.g_lr / 2, phase.d_lr / 2))
        low = config.model
        assert bool(precision) == bool(low.low_precision_at or low.low_precision_resolutions)


def test_the_loss_scale_of_another_precision_is_reset():
    config = config_of(*GROWING, "model.low_precision=fp16", "model.low_precision_resolutions=1")
    state = {"config": to_plain(config), "running_means": {"loss_scale": 4096.0, "pl_mean": 1.0}}
    assert running_state(state, config)[0]["loss_scale"] == 4096
    training, system = running_state(state, config_of(*GROWING))
    assert "loss_scale" not in training
    assert system["means"] == {"pl_mean": 1.0}


def test_incomplete_transfers_are_reported_with_numbers():
    import torch

    def net(*sizes):
        return torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))

    def told(G, state, why=""):
        new = [f"G/{name}" for name in adopt(types.SimpleNamespace(**vars(G), c_dim=0, state_dict=G.state_dict), state)]
        return account({"G": G}, new, {"G": state}, "file", why)

    source = net(8, 8, 4).state_dict()
    assert told(net(8, 8, 4), source) == (["taken over from it: 108 of the 108 numbers of G"], [])
    _, (poor,) = told(net(8, 8, 16), source, ": its run had model.x=4")
    assert poor == "file gave only 72 of the 216 numbers of G: its run had model.x=4"
    with pytest.raises(UsageError, match=r"init=file has no layer that fits.*model\.x=4"):
        told(net(9, 8, 5), source, ": its run had model.x=4")  # only the first bias has the same shape
    lines, _ = account({"G": net(8, 8), "D": net(8, 1)}, ["D/0.weight", "D/0.bias"], {"G": {}}, "file", "")
    assert lines[1] == "note: D starts anew, as file is a snapshot: a checkpoint holds both networks"


@pytest.mark.distributed
def test_a_run_and_its_continuation_report_all_notes(tiny_data, tmp_path):
    """The output of the first start, and then of a start with another precision, a key without effect, and an init=
    that comes too late."""
    run = tmp_path / "run"
    how = {"output__grid_kimg": 0, "optim__lr_at": "{8: 0.001, 16: 0.001}", "train__total_kimg": 0.024}
    harness.finish(harness.start(harness.arguments(run, tiny_data, **how)))
    log = (run / "log.txt").read_text()
    assert "3 classes (a, b, c)" in log
    assert "ends in 8x8 stable, and gives no whole generator of 16x16" in log
    facts = status.collect(run)
    assert facts["faults"] == 0
    assert "give train.total_kimg=0.096" in status.render(facts)
    low = {"model__low_precision": "bf16", "model__low_precision_resolutions": 1}
    more = {"optim__g_lr": 0.5, "init": "nowhere.safetensors", "train__total_kimg": "null"}
    told = harness.finish(harness.start(harness.arguments(run, tiny_data, **(how | low | more))))
    assert "model.low_precision was fp32, is now bf16" in told
    assert "the bits are not those of a run that kept it" in told
    assert "optim.g_lr=0.5 changes nothing: optim.lr_at goes before it" in told
    assert "init=nowhere.safetensors changes nothing: the run was begun with no init=" in told
    assert load_config(run / "config.yaml").init == ""
    assert checkpoint.found(run / "checkpoints")[0].stem == f"{96:012d}"
    assert "falls short" not in status.render(status.collect(run))
