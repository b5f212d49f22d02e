"""What is reported, refused or passed over when a run continues with another configuration than its checkpoint's."""

import types

from configuring import config_of

from stylegan_pg.config.plain import to_plain
from stylegan_pg.config.schedule import phases
from stylegan_pg.training.resume import compare


def test_checkpoints_from_before_a_key_was_there_continue_without_a_word():
    config = config_of("loss.terms=[{name: r2, every: 3}]", "growth.start=8", "resolution=16")
    plan = phases(config)
    old = to_plain(config)
    del old["loss"]["r1_gamma_from"], old["train"]["compile"], old["model"]["low_precision_at"]
    del old["loss"]["terms"][0]["weight_from"]
    state = {"config": old, "dataset": "d", "nimg": 64, "phase": 0, "environment": {}}
    index = types.SimpleNamespace(identity="d", path="p")
    assert compare(state, config, index, plan, {}) == []  # type: ignore[arg-type]  # all that it reads of an index
    changed = config_of("loss.terms=[{name: r2, every: 4}]", "growth.start=8", "resolution=16", "train.compile=true")
    notes = compare(state, changed, index, plan, {})  # type: ignore[arg-type]  # as above
    assert [n.split(" was")[0] for n in notes] == ["loss.terms", "train.compile"]


def test_a_cpu_that_computes_bf16_in_another_way_is_told_where_it_matters():
    index = types.SimpleNamespace(identity="d", path="p")
    for override, notes in (("fp32", 0), ("bf16", 1), ("auto", 0)):
        at = ["model.low_precision_at=[]"] if override == "auto" else []
        config = config_of("growth.start=8", "resolution=16", f"model.low_precision={override}", *at)
        state = {"config": to_plain(config), "dataset": "d", "nimg": 64, "phase": 0, "environment": {"bf16": True}}
        told = compare(state, config, index, phases(config), {"bf16": False})  # type: ignore[arg-type]  # as above
        assert len(told) == notes
        assert all("bf16 was True, is now False" in text for text in told)
