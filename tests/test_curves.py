"""Numbers that change with nimg: curves, tables by kimg and by resolution, how they are given, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from configuring import config_of, file_of, refused
from PIL import Image
from safetensors import safe_open

from stylegan_pg.__main__ import main
from stylegan_pg.config import Config, OptimConfig, curves
from stylegan_pg.config.checks import check
from stylegan_pg.config.keys import describe
from stylegan_pg.config.loading import load_config
from stylegan_pg.config.plain import stored_keys, to_plain, to_yaml
from stylegan_pg.config.schedule import (
    augment_p,
    automatic,
    blur_sigma,
    ema_beta,
    ema_half_life,
    learning_rate,
    moves,
    number,
    phases,
    term_weight,
)
from stylegan_pg.errors import UsageError
from stylegan_pg.planning import plan, schedules
from stylegan_pg.planning.advice import of_configuration, without_effect
from stylegan_pg.planning.cost import Cost
from stylegan_pg.training.nonfinite import remedies

SHARED = Path(__file__).resolve().parents[2] / "shared" / "parity-systems"
WARM_UP = "[{from: 1e-5, to: 1e-3, kimg: 10}, {from: 1e-3, to: 1e-4, kimg: 20, start: 50, shape: cosine}]"


def curve(ends: tuple[float, float], mimg: float) -> str:
    a, b = ends
    return f"{{from: {a}, to: {b}, kimg: {1000 * mimg}, shape: cosine}}"


# --- published values ---------------------------------------------------------------------------------------------

PUBLISHED = {  # length in Mimg; gamma; half-life in kimg; probability (Huang et al. 2024)
    "CIFAR10": (20, (0.05, 0.005), 5000, 0.55),
    "FFHQ-64": (20, (2, 0.2), 500, 0.3),
    "FFHQ-256": (20, (150, 15), 500, 0.3),
    "ImageNet-32": (200, (0.5, 0.05), 50_000, 0.5),
    "ImageNet-64": (200, (1, 0.1), 50_000, 0.4),
}


def published(name: str, batch: int) -> Config:
    mimg, gamma, half_life, p = PUBLISHED[name]
    return config_of(
        f"train.batch={batch}",
        f"train.total_kimg={mimg * 1200}",
        "loss.objective=relativistic",
        f"loss.r1_gamma={curve(gamma, mimg)}",
        f"loss.terms=[{{name: r2, weight: {curve(gamma, mimg)}}}]",
        "loss.r1_every=1",
        "loss.pl_weight=0",
        *(f"optim.{side}_lr={curve((2e-4, 5e-5), mimg)}" for side in "gd"),
        f"optim.beta2={curve((0.9, 0.99), mimg)}",
        f"ema.kimg={curve((0, half_life), mimg)}",
        f"augment={{mode: fixed, p: {curve((0, p), mimg)}}}",
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_r3gan(name):
    file = SHARED / "r3gan_schedules.safetensors"
    if not file.exists():
        pytest.skip(f"{file.name} is not there")
    with safe_open(str(file), "np") as stored:
        batch = json.loads(stored.metadata()["batch_per_preset"])[name]
        prefix = f"out.{name}."
        columns = {key.removeprefix(prefix): stored.get_tensor(key) for key in stored.keys() if key.startswith(prefix)}  # noqa: SIM118
    config = published(name, batch)
    r = config.resolution
    points = columns.pop("images_seen")
    r1, r2 = config.loss.all_terms()
    ours: dict[str, Any] = {
        "lr": lambda n: learning_rate(config, "G", r, n),
        "gamma": lambda n: term_weight(r1, r, n),
        "beta2": lambda n: number(config.optim, "beta2", r, n),
        "augment_probability": lambda n: augment_p(config, r, n),
        "ema_half_life_images": lambda n: 1000 * ema_half_life(config, r, n),
        "ema_beta": lambda n: ema_beta(batch, n, ema_half_life(config, r, n), config.ema.rampup),
    }
    assert ours.keys() == columns.keys()
    assert len(points) == 9
    for key, get in ours.items():
        np.testing.assert_allclose([get(n) for n in points], columns[key], rtol=1e-12, atol=0, err_msg=key)
    assert all(term_weight(r1, r, n) == term_weight(r2, r, n) for n in points)
    assert all(learning_rate(config, "D", r, n) == learning_rate(config, "G", r, n) for n in points)


# --- values -------------------------------------------------------------------------------------------------------


def test_a_warm_up_and_a_decay():
    config = config_of(f"optim.g_lr={WARM_UP}")

    def rate(kimg: float) -> float:
        return learning_rate(config, "G", 64, kimg * 1000)

    assert rate(0) == 1e-5
    assert rate(2.5) == pytest.approx(1e-5 + 0.25 * (1e-3 - 1e-5))
    assert rate(10) == rate(30) == rate(50) == 1e-3
    assert rate(60) == pytest.approx((1e-3 + 1e-4) / 2)
    assert rate(55) == pytest.approx(1e-4 + (1e-3 - 1e-4) * (1 + math.cos(math.pi / 4)) / 2)
    assert rate(70) == rate(1e6) == 1e-4
    assert learning_rate(config, "D", 64, 5000) == 0.002
    late = config_of("optim.g_lr={from: 1, to: 2, kimg: 1, start: 5}")
    assert [learning_rate(late, "G", 64, n) for n in (0, 5000, 5500, 6000)] == [1, 1, 1.5, 2]


def test_a_jump_between_curves():
    config = config_of("ema.kimg=[{from: 1, to: 2, kimg: 1}, {from: 10, to: 0, kimg: 1, start: 2}]")
    values = [ema_half_life(config, 8, n) for n in (0, 999, 1000, 1999, 2000, 2500, 3000, 4000)]
    assert values == [1, pytest.approx(1.999), 2, 2, 10, 5, 0, 0]


def test_values_stay_between_the_ends_and_follow_from_nimg_alone():
    rng = random.Random(0)
    for _ in range(300):
        a, b = rng.choice([(0, 1), (0.9, 0.99), (1e-30, 1e30), (5, 5)])
        one = {"from": a, "to": b, "kimg": rng.uniform(1e-3, 1e6), "shape": rng.choice(["linear", "cosine"])}
        value = curves.completed([one], "x")
        places = [rng.uniform(-1, 2e3) * one["kimg"] for _ in range(20)]
        first = [curves.at(value, n) for n in places]
        order = list(range(20))
        rng.shuffle(order)
        assert [curves.at(value, places[i]) for i in order] == [first[i] for i in order]
        assert all(a <= v <= b for v in first)
        ordered = [curves.at(value, n) for n in sorted(places)]
        assert ordered == sorted(ordered)


def test_precedence_and_where_a_number_moves():
    given = ["loss.r1_gamma={from: 4, to: 0, kimg: 100}", "loss.r1_gamma_at={16: 7}", "loss.r1_gamma_from={60: 9}"]
    term = config_of(*given).loss.r1()
    assert [term_weight(term, 8, n) for n in (0, 50_000, 59_999)] == [4, 2, pytest.approx(4 * 0.40001)]
    assert [term_weight(term, 16, n) for n in (0, 50_000, 60_000)] == [7, 7, 9]
    assert term_weight(term, 8, 60_000) == 9
    assert [moves(term, "weight", 8, n) for n in (0, 59_999, 60_000)] == [True, True, False]
    assert not moves(term, "weight", 16, 100)
    assert not moves(config_of("loss.r1_gamma={from: 4, to: 0, kimg: 1}").loss.r1(), "weight", 8, 1000)


@pytest.mark.parametrize(
    ("key", "get"),
    [
        ("optim.g_lr", lambda c, r, n: learning_rate(c, "G", r, n)),
        ("optim.d_lr", lambda c, r, n: learning_rate(c, "D", r, n)),
        ("optim.beta2", lambda c, r, n: number(c.optim, "beta2", r, n)),
        ("loss.r1_gamma", lambda c, r, n: term_weight(c.loss.r1(), r, n)),
        ("loss.pl_weight", lambda c, r, n: term_weight(c.loss.path_length(), r, n)),
        ("ema.kimg", lambda c, r, n: ema_half_life(c, r, n)),
        ("augment.p", lambda c, r, n: augment_p(c, r, n)),
        ("loss.blur_sigma", lambda c, r, n: blur_sigma(c, r, n)),
    ],
)
def test_every_number_has_a_curve_and_both_tables(key, get):
    mode = ["augment.mode=fixed"] if key == "augment.p" else []
    tables = [f"{key}_at={{16: 0.3}}", f"{key}_from={{2: 0.4, 5: 0.5}}"]
    config = config_of(*mode, f"{key}={{from: 0.1, to: 0.2, kimg: 1}}", *tables)
    assert [get(config, 8, n) for n in (0, 500, 1000, 1999)] == pytest.approx([0.1, 0.15, 0.2, 0.2])
    assert [get(config, 16, n) for n in (0, 1999)] == [0.3, 0.3]
    assert [get(config, r, n) for r in (8, 16) for n in (2000, 4999, 5000)] == [0.4, 0.4, 0.5] * 2


def test_terms_that_only_a_curve_or_a_table_asks_for():
    assert [t.name for t in config_of("loss.r1_gamma=0", "loss.pl_weight=0").loss.all_terms()] == []
    for off in ("{from: 0, to: 0, kimg: 1}", "0"):
        assert not config_of(f"loss.r1_gamma={off}").loss.r1().is_used
    for key in ("loss.r1_gamma={from: 0, to: 1, kimg: 1}", "loss.r1_gamma_from={5: 1}", "loss.r1_gamma_at={8: 1}"):
        given = [*(["loss.r1_gamma=0"] if "_" in key[14:] else []), "loss.pl_weight=0"]
        assert [t.name for t in config_of(*given, key).loss.all_terms()] == ["r1"]
    (term,) = config_of("loss.r1_gamma=0", "loss.pl_weight=0", "loss.pl_weight_at={8: 1}").loss.all_terms()
    assert (term.name, term_weight(term, 8, 0), term_weight(term, 16, 0)) == ("path_length", 1, 0)


def test_the_automatic_schedule_scales_curves_like_constants():
    given = ["growth.schedule=auto", "train.total_kimg=12000", "optim.d_lr=0.001"]
    constant = config_of(*given, "optim.g_lr=0.001")
    curved = config_of(*given, "optim.g_lr={from: 0.001, to: 0.0005, kimg: 12000}")
    assert automatic(curved) == curved
    assert not constant.optim.lr_scale_at
    phases_ = phases(curved)
    for a, b in zip(phases(constant), phases_, strict=True):
        assert (a.start, a.end, a.batch, a.d_lr) == (b.start, b.end, b.batch, b.d_lr)
        assert b.g_lr == pytest.approx(a.g_lr * (1 - a.start / 24e6))
    assert learning_rate(curved, "G", 1024, 12e6) == pytest.approx(0.0015)
    table = config_of(*given, "optim.g_lr={from: 0.001, to: 0.0005, kimg: 12000}", "optim.lr_at={1024: 0.01}")
    assert learning_rate(table, "G", 1024, 12e6) == 0.01


# --- how they are given ---------------------------------------------------------------------------------------------


def test_files_and_overrides(tmp_path):
    text = (
        "run: r\ndata: {url: u}\ntrain: {total_kimg: 1}\noptim:\n"
        "  g_lr: {from: 2e-4, to: 5e-5, kimg: 20000, shape: cosine}\n"
        "  beta2:\n  - {from: .9, to: .99, kimg: 5}\n  - {from: .99, to: .999, kimg: 5}\n"
        "loss:\n  terms: [{name: r2, weight: {from: 1, to: 2, kimg: 3}}]\n"
    )
    file = file_of(tmp_path, text)
    config = load_config(file)
    whole = {"from": 2e-4, "to": 5e-5, "kimg": 20000.0, "shape": "cosine", "start": 0.0}
    assert config.optim.g_lr == [whole]
    assert [one["start"] for one in config.optim.beta2] == [0, 5]
    assert config.loss.terms[0].weight == [{"from": 1, "to": 2, "kimg": 3, "shape": "linear", "start": 0}]
    changed = load_config(file, ["optim.g_lr.to=1e-5", "optim.beta2.1.kimg=7", "optim.beta2.0.kimg=6"])
    assert changed.optim.g_lr == [whole | {"to": 1e-5}]
    assert [(one["kimg"], one["start"]) for one in changed.optim.beta2] == [(6, 0), (7, 6)]
    assert load_config(file, ["optim.g_lr=0.1"]).optim.g_lr == 0.1
    assert load_config(file, ["optim.g_lr=0.1", "optim.g_lr.from=1", "optim.g_lr.to=2", "optim.g_lr.kimg=3"]).optim.g_lr
    assert load_config(file, [f"optim={{g_lr: {WARM_UP}}}"]).optim.g_lr[1]["start"] == 50
    # What a run writes is read back as it is, also once more.
    for given in (config, changed):
        written = tmp_path / "written.yaml"
        written.write_text(to_yaml(given))
        assert load_config(written) == given
        assert stored_keys(json.loads(json.dumps(to_plain(given))))["optim.g_lr"] == given.optim.g_lr
    assert yaml.safe_load(to_yaml(config))["optim"]["g_lr"] == [whole]


def test_configurations_of_earlier_versions_are_read(tmp_path):
    plain = yaml.safe_load(to_yaml(config_of("augment.mode=fixed", "augment.p=0.5", "optim.g_lr=0.1")))
    for section, key in (("optim", "g_lr_from"), ("optim", "beta2_at"), ("ema", "kimg_at"), ("augment", "p_from")):
        del plain[section][key]
    del plain["loss"]["blur_sigma"]
    config = load_config(file_of(tmp_path, yaml.safe_dump(plain)))
    assert (config.optim.g_lr, augment_p(config, 8, 10**9), config.loss.blur_sigma) == (0.1, 0.5, 0)
    assert stored_keys(plain)["optim.g_lr_from"] == {}
    assert stored_keys(plain)["loss.blur_sigma"] == 0


CURVE = "{from: %s, to: %s, kimg: 5}"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.g_lr={from: 1, to: 2}", "optim.g_lr.kimg is not set: a curve needs from, to and kimg"),
        ("optim.g_lr={from: 1, kimg: 2}", "optim.g_lr.to is not set"),
        ("optim.g_lr.to=2", "optim.g_lr.from is not set"),
        ("optim.g_lr={from: 1, to: 2, kimg: 0}", "optim.g_lr.kimg=0.0 is not possible: it must be above 0"),
        ("optim.g_lr={from: 1, to: 2, kimg: -3}", "optim.g_lr.kimg=-3.0"),
        ("optim.g_lr={from: 1, to: 2, kimg: 1e12}", "at most 1e+09"),
        ("optim.g_lr={from: 1, to: 2, kimg: inf}", "optim.g_lr.kimg: 'inf' is not possible: it must be a finite"),
        ("optim.g_lr={from: nan, to: 2, kimg: 1}", "optim.g_lr.from: 'nan'"),
        ("optim.g_lr={from: x, to: 2, kimg: 1}", "optim.g_lr.from: 'x' is not possible: it must be a number"),
        ("optim.g_lr={from: [1], to: 2, kimg: 1}", "optim.g_lr.from: a list is not possible: it must be a number"),
        (
            "optim.g_lr={from: 1, to: 2, kimg: 1, shape: cosinus}",
            "optim.g_lr.shape=cosinus is not possible: it must be",
        ),
        ("optim.g_lr={from: 1, to: 2, kimg: 1, start: -1}", "optim.g_lr.start=-1.0 is not possible: it must be 0 or"),
        ("optim.g_lr={from: 1, to: 2, kimgs: 1}", "a curve has no 'kimgs'; did you mean 'kimg'?"),
        ("optim.g_lr={from: 1, from: 2, kimg: 1}", "'from' is there twice"),
        ("optim.g_lr.shap=cosine", "a curve has no 'shap'; did you mean 'shape'? (it has from, to,"),
        ("optim.g_lr.3.to=1", "optim.g_lr.3: there are 1 curves"),
        ("optim.g_lr=[]", "optim.g_lr=[] is not possible: it must be a number, or a curve {from: A"),
        ("optim.g_lr=[1, 2]", "optim.g_lr.0: '1' is not possible: it must be a curve, such as"),
        (f"optim.g_lr=[{CURVE % (1, 2)}, {{from: 1, to: 2, kimg: 5, start: 4.9}}]", "optim.g_lr.1.start=4.9 is not"),
        (f"optim.g_lr=[{CURVE % (1, 2)}, {{from: 1, to: 2, kimg: 5, start: 4.9}}]", "curves must not overlap"),
        (f"optim.g_lr=[{', '.join([CURVE % (1, 2)] * 65)}]", "optim.g_lr has 65 curves: give at most 64"),
        (f"optim.g_lr={CURVE % (0, 1)}", "optim.g_lr.from=0 is not possible: it must be above 0"),
        (f"optim.d_lr={CURVE % (1, 0)}", "optim.d_lr.to=0 is not possible: it must be above 0"),
        (f"optim.d_lr=[{CURVE % (1, 1)}, {CURVE % (1, -1)}]", "optim.d_lr.1.to=-1 is not possible"),
        (f"optim.beta2={CURVE % (0.9, 1)}", "optim.beta2.to=1 is not possible: it must be below 1"),
        (f"ema.kimg={CURVE % (-1, 1)}", "ema.kimg.from=-1 is not possible: it must be 0 or more"),
        (f"loss.r1_gamma={CURVE % (1, -1)}", "loss.r1_gamma.to=-1 is not possible"),
        (f"loss.terms=[{{name: r2, weight: {CURVE % (1, -1)}}}]", "loss.terms: r2: weight.to=-1 is not possible"),
        ("loss.terms=[{name: r2, weight: {from: 1}}]", "loss.terms: r2: weight.to is not set"),
        (f"augment={{mode: fixed, p: {CURVE % (0, 1.5)}}}", "augment.p.to=1.5 is not possible: it must be between 0"),
        (f"augment={{mode: fixed, p: {CURVE % (0, 0)}}}", "it must be above 0 with augment.mode=fixed"),
        (f"augment={{mode: ada, p: {CURVE % (0, 0.5)}}}", "augment.mode=ada chooses the probability itself"),
        ("augment={mode: ada, p_at: {8: 0.5}}", "augment.p_at is no key of augment.mode=ada; it belongs to fixed"),
        (f"augment={{mode: diffaugment, p: {CURVE % (0, 0.5)}}}", "augment.p is no key of augment.mode=diffaugment"),
        ("augment={mode: fixed, p: 0.5, p_from: {8: 1.5}}", "augment.p_from={8: 1.5} is not possible"),
        ("optim.beta2_at={8: 1}", "optim.beta2_at={8: 1.0} is not possible: it must be a table of numbers below 1"),
        ("loss.blur_sigma=171", "loss.blur_sigma=171.0 is not possible: it must be at most 170"),
        (f"optim.beta1={CURVE % (0, 0.5)}", "optim.beta1: "),
        ("optim.beta2.1.kimg=1", "optim.beta2.1: there are 1 curves"),
    ],
)
def test_what_is_refused(override, words):
    assert words in refused(override)


def test_an_override_says_which_curve_it_means():
    message = refused(f"optim.g_lr={WARM_UP}", "optim.g_lr.to=1")
    assert "optim.g_lr has 2 curves: say which one, as in optim.g_lr.0.to=1" in message


def test_curves_made_in_python_are_checked():
    config = config_of()
    for value, words in (
        ("0.1", "must be a number, or a curve"),
        ([{"from": 1}], r"g_lr\.to is not set"),
        (None, "g_lr=None is not possible"),
    ):
        wrong = dataclasses.replace(config, optim=OptimConfig(g_lr=value))
        with pytest.raises(UsageError, match=words):
            check(wrong)


def test_the_description_of_a_key():
    lines = describe("ema.kimg")
    assert lines[0].startswith("ema.kimg=10 ")
    assert "number above 0, or a curve; half-life" in lines[0]
    assert "{from: A, to: B, kimg: LENGTH, shape: cosine}" in lines[1]
    assert "linear or cosine" in lines[2]
    assert len(describe("train.batch")) == 1


# --- notes, remedies, plans -----------------------------------------------------------------------------------------


def test_notes_about_curves_without_effect():
    given = ["run=r", "data.url=d", "resolution=16", "growth.start=8"]
    tables = ["optim.lr_at={8: 1, 16: 1}", "ema.kimg_from={0: 5}"]
    told = without_effect(None, [*given, *tables, f"optim.g_lr={WARM_UP}", "optim.g_lr.0.to=0.01"])
    assert len(told) == 2
    assert all("changes nothing: optim.lr_at goes before it" in line for line in told)
    (line,) = without_effect(None, [*given, *tables, "ema.kimg={from: 0, to: 500, kimg: 20000}"])
    assert "ema.kimg_from goes before it" in line
    assert without_effect(None, [*given, "ema.kimg={from: 0, to: 500, kimg: 20000}"]) == []
    (line,) = of_configuration(config_of("train.total_kimg=64", "ema.kimg={from: 0, to: 500, kimg: 128}"))
    assert line == "ema.kimg: its curve ends at 128 kimg, the run at 64, where it has come to 250"
    (line,) = of_configuration(config_of("loss.terms=[{name: r2, weight: {from: 1, to: 2, kimg: 2}}]"))
    assert "the weight of r2: its curve ends at 2 kimg, the run at 1.024" in line


@pytest.mark.parametrize(
    "given",
    [
        [f"optim.g_lr={WARM_UP}", "loss.r1_gamma={from: 4, to: 1, kimg: 100}"],
        ["optim.g_lr={from: 1, to: 2, kimg: 3}", "optim.d_lr_from={1: 0.5}", "loss.r1_gamma_from={0: 3, 100: 2}"],
        ["optim.g_lr_at={1024: 0.3}", "loss.r1_gamma_at={1024: 3}"],
    ],
)
def test_remedies_change_the_number_that_holds(given):
    config, nimg = config_of(*given, "train.total_kimg=100"), 60_000
    (phase,) = phases(config)
    r1, rates = remedies(config, phase, nimg)[:2]
    other = config_of(*given, "train.total_kimg=100", *shlex.split(f"{r1} {rates}"))
    for side in "GD":
        assert learning_rate(other, side, 1024, nimg) == pytest.approx(learning_rate(config, side, 1024, nimg) / 2)
    before, after = (term_weight(c.loss.r1(), 1024, nimg) for c in (config, other))
    assert after == pytest.approx(2 * before)


CHANGING = [f"optim.g_lr={WARM_UP}", "optim.beta2={from: 0.9, to: 0.99, kimg: 100, shape: cosine}"]
CHANGING += ["loss.r1_gamma={from: 4, to: 0, kimg: 100}", "ema.kimg={from: 0, to: 500, kimg: 100}"]
CHANGING += ["augment={mode: fixed, p: {from: 0, to: 0.4, kimg: 50}}", "loss.blur_sigma={from: 10, to: 0, kimg: 50}"]
CHANGING += ["train.total_kimg=100", "train.batch=20", "resolution=64", "loss.terms=[{name: r2, weight_from: {60: 2}}]"]


def test_the_table_of_a_plan():
    head, kimg, *rows = schedules.rows(config_of(*CHANGING))
    assert head == ["numbers that change", "0%", "25%", "50%", "75%", "100%"]
    assert kimg == ["kimg", "0", "25", "50", "75", "100"]
    found = {row[0]: row[1:] for row in rows}
    assert found["optim.g_lr"] == ["1e-05", "0.001", "0.001", "0.0001", "0.0001"]
    assert found["loss.r1_gamma"] == ["4", "3", "2", "1", "0"]
    assert found["ema.kimg"] == ["0", "125", "250", "375", "500"]
    assert found["augment.p"] == ["0", "0.2", "0.4", "0.4", "0.4"]
    assert found["loss.blur_sigma"] == ["10", "5", "0", "0", "0"]
    assert found["weight of r2"] == ["1", "1", "1", "2", "2"]
    assert float(found["EMA's beta"][2]) == pytest.approx(0.5 ** (20 / 250_000))
    assert found.keys().isdisjoint({"optim.d_lr", "resolution", "batch", "loss.pl_weight"})
    assert schedules.rows(config_of()) == []
    grown = schedules.rows(config_of("resolution=16", "growth.start=8", "ema.rampup=0.05", "train.total_kimg=1300"))
    assert {row[0] for row in grown[2:]} == {"resolution", "ema.kimg", "EMA's beta"}


def test_learning_rates_in_the_table_of_phases(monkeypatch):
    monkeypatch.setattr(plan, "cost_of", lambda *_: Cost(1, 1, 1.0, 1, 1.0))
    made = plan.make_plan(config_of(*CHANGING, "optim.d_lr=0.01"), plan.Machine())
    (row,) = [line.split() for line in plan.table(made).splitlines() if line.startswith("64x64")]
    assert "1e-05>0.0001/0.01" in row
    assert [g for _, g, _ in made.rates(made.rows[0].phase, parts=4)][0::4] == [1e-5, 1e-4]


def test_the_figure_of_a_plan(tmp_path, monkeypatch, capsys):
    model = ["model.channel_base=64", "model.z_dim=8", "model.w_dim=8", "model.mapping_layers=1"]
    file = file_of(tmp_path, "run: r\ndata: {url: none}\n")
    out = tmp_path / "numbers.png"
    arguments = ["plan", str(file), *model, *CHANGING, "--figure", str(out)]
    monkeypatch.setattr(sys, "argv", ["stylegan-pg", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert "numbers that change " in text
    assert "numbers that do not change: optim.d_lr 0.002, loss.pl_weight 2\n" in text
    assert f"picture: {out}" in text
    picture = np.asarray(Image.open(out).convert("RGB")).astype(int)
    blue = (abs(picture - [31, 119, 180]).max(axis=2) < 40).astype(int)
    assert picture.shape[0] > 500
    high, wide = (size // 3 for size in blue.shape)  # eight numbers change: three lines of three axes
    parts = [blue[i * high : (i + 1) * high, k * wide : (k + 1) * wide].sum() for i in range(3) for k in range(3)]
    assert all(part > 50 for part in parts[:8])
    assert parts[8] == 0
    monkeypatch.setattr(sys, "argv", ["stylegan-pg", *arguments[:-1], str(tmp_path / "numbers.jpg")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "--figure" in capsys.readouterr().err
