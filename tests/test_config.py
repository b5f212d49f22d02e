"""The configuration: what loads, what is refused and how it is told; every shipped file, and `train --dry-run`."""

import dataclasses
import itertools
import math
import re
import subprocess
import types
from pathlib import Path
from typing import Any

import harness
import pytest
import torch

from stylegan_pg.config import Config
from stylegan_pg.config.loading import check, configs_folder, load_config, to_plain, to_yaml
from stylegan_pg.config.schedule import phases, term_weight
from stylegan_pg.errors import UsageError
from stylegan_pg.networks import NETWORKS, NetworkShape
from stylegan_pg.planning.advice import of_configuration
from stylegan_pg.planning.plan import Machine, report
from stylegan_pg.training.resume import compare

SHIPPED = sorted(p.stem for p in configs_folder().glob("*.yaml"))
NEEDED = ["run=runs/x", "data.url=data/x", "train.total_kimg=1"]


def config_of(*overrides: str) -> Config:
    return load_config(None, [*NEEDED, *overrides])


def refused(*overrides: str) -> str:
    with pytest.raises(UsageError) as error:
        config_of(*overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


def file_of(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return harness.command(*arguments, cwd=folder)


# --- the shipped files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_load_by_name_and_by_path(name):
    config = load_config(name)
    assert load_config(configs_folder() / f"{name}.yaml") == config
    assert load_config(f"configs/{name}.yaml") == config
    plan = phases(config)
    assert plan[-1].resolution == config.resolution
    assert not plan[-1].fade
    assert plan[-1].end >= (config.train.total_kimg or 0) * 1000
    assert all(before.end == after.start for before, after in itertools.pairwise(plan))


def rows_of(text: str, config: Config) -> list[tuple[float, ...]]:
    """Of the table in a plan, for each phase: parameters of G and of D, GFLOPs per image, GiB."""
    number, rows = r"([\d,.]+)", []
    for phase in phases(config):
        row = rf"^{phase}\s+{phase.start / 1000:.9g}-{phase.end / 1000:.9g}\s+{phase.batch}\s+\d+"
        row += rf"\s+{phase.g_lr:g}/{phase.d_lr:g}\s+{number}\s+{number}\s+{number}\s+\S+\s+{number} GiB\s"
        match = re.search(row, text, re.MULTILINE)
        assert match, f"{row!r} is not in:\n{text}"
        rows.append(tuple(float(group.replace(",", "")) for group in match.groups()))
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_plans_of_shipped_configurations(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no data
    config = load_config(name)
    if config.growth.start:  # counting takes a second a phase: of growth, the last three phases will do
        config = load_config(name, [f"growth.start={config.resolution // 2}"])
    text = report(config, Machine(devices=8))
    assert "no such folder" in text  # the dataset is not there, and that is no reason to stop
    for phase, (g, d, gflops, gib) in zip(phases(config), rows_of(text, config), strict=True):
        shape = NetworkShape(phase.resolution, config.resolution, phase.fade, 3, 0, phase.mbstd_group)
        pair = NETWORKS[config.model.name]
        with torch.device("meta"):
            G, D = pair.G(**pair.g_kwargs(config.model, shape)), pair.D(**pair.d_kwargs(config.model, shape))
        assert [g, d] == [sum(p.numel() for p in net.parameters()) for net in (G, D)]
        # At least every weight used once in a forward and a backward pass; at least what Adam keeps.
        assert gflops * 1e9 > 6 * (g + d) / 2
        assert gib > 4 * 4 * (g + d) / 2**30 - 0.01


@pytest.mark.slow
def test_dry_run_changes_nothing(tmp_path):
    config = load_config("demo")
    result = command(tmp_path, "train", "demo", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.iterdir())
    assert to_yaml(config) in result.stdout
    rows_of(result.stdout, config)


# --- faults -----------------------------------------------------------------------------------------------------------


def test_unknown_keys_name_the_nearest(tmp_path):
    assert "'train.bacth'; did you mean 'train.batch'?" in refused("train.bacth=3")
    assert "'r1_gamma'; did you mean 'loss.r1_gamma'?" in refused("r1_gamma=3")
    assert "unknown key 'zzzzzz'" in refused("zzzzzz=3")
    assert "did you mean" not in refused("zzzzzz=3")
    path = file_of(tmp_path, "run: x\nlos:\n  r1_gamma: 3\n")
    with pytest.raises(UsageError, match=r"config\.yaml: unknown key 'los'; did you mean 'loss'\?"):
        load_config(path)


@pytest.mark.parametrize(
    "override",
    [
        "train.batch=many",
        "train.batch=1.5",
        "data.mirror=perhaps",
        "optim.g_lr=[1]",
        "train.batch_at={8: x}",
        "train.batch_at={x: 8}",
        "train.batch_at=5",
        "model.resample_filter=[1, x]",
        "loss.terms=[5]",
    ],
)
def test_values_of_a_wrong_type_are_refused_by_key(override):
    message = refused(override)
    assert message.startswith(f"{override}: {override.split('=')[0]}")


def test_a_value_in_place_of_a_section_is_refused():
    assert refused("train=5").startswith("train=5: ")


def test_what_is_no_configuration_file(tmp_path):
    cases = {
        "a: [1,\nb: 2": "not valid YAML",
        "seed: 1\nseed: 2": r"'seed' is there twice \(line 2\)",
        "\x00\x01": "not valid YAML",
        "- 1\n- 2": "not a mapping",
    }
    for text, message in cases.items():
        with pytest.raises(UsageError, match=message) as error:
            load_config(file_of(tmp_path, text))
        assert "config.yaml" in str(error.value)
        assert "\n" not in str(error.value)
    path = tmp_path / "latin1.yaml"
    path.write_bytes("run: caf\xe9".encode("latin-1"))
    with pytest.raises(UsageError, match=r"latin1\.yaml"):
        load_config(path)


@pytest.mark.parametrize("name", ["nothing", "nothing.yaml", "other/demo", "."])
def test_a_missing_file_names_the_shipped_ones(name):
    with pytest.raises(UsageError, match="no configuration") as error:
        load_config(name)
    assert all(shipped in str(error.value) for shipped in SHIPPED)


def test_what_must_be_given():
    with pytest.raises(UsageError, match=r"run is not set.*run=\.\.\."):
        load_config(None, ["data.url=x", "train.total_kimg=1"])
    with pytest.raises(UsageError, match=r"data\.url is not set.*data\.url=\.\.\."):
        load_config(None, ["run=x", "train.total_kimg=1"])
    with pytest.raises(UsageError, match=r"train\.total_kimg=None .* where nothing grows"):
        load_config(None, ["run=x", "data.url=x"])


def test_overrides_without_a_value_or_a_key():
    assert "'train.batch' is not of the form key=value" in refused("train.batch")
    assert "=5" in refused("=5")
    assert "train.batch=[1" in refused("train.batch=[1")


# Keys whose values start above 0, at 0, lie between 0 and 1, are one of a few words, and go by resolution.
ONE_UP = """model.z_dim model.w_dim model.mapping_layers model.channel_base model.channel_max model.mbstd_group
    growth.devices optim.g_lr optim.d_lr optim.eps loss.r1_every loss.pl_every loss.pl_batch_shrink ema.kimg train.batch
    train.check_ranks_every output.tick_kimg checkpoint.every_kimg checkpoint.keep checkpoint.max_failures
    metrics.images train.total_kimg optim.d_steps optim.g_steps"""
ZERO_UP = """seed data.workers model.mbstd_channels model.low_precision_resolutions growth.stable_kimg
    growth.fade_kimg loss.r1_gamma loss.pl_weight train.micro_batch train.threads output.grid_kimg
    output.snapshot_kimg metrics.every_kimg loss.d_clip"""
UNIT = "model.w_avg_beta optim.beta1 optim.beta2 loss.pl_decay loss.style_mixing"
CHOICES = """model.name model.g_architecture model.d_architecture model.low_precision growth.schedule growth.optimizer
    loss.objective train.device train.dtype"""
TABLES = """growth.stable_kimg_at growth.fade_kimg_at optim.lr_at optim.g_lr_at optim.d_lr_at loss.r1_gamma_at
    train.batch_at train.micro_batch_at"""


@pytest.fixture(scope="module")
def possible() -> Config:
    return config_of()


def changed(node: Any, key: str, value: Any) -> Any:
    """A copy of a configuration with one value changed: a tenth of the time of loading it again."""
    name, _, rest = key.partition(".")
    return dataclasses.replace(node, **{name: changed(getattr(node, name), rest, value) if rest else value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in ONE_UP.split() for value in (0, -1, math.inf)),
        *((key, value) for key in ZERO_UP.split() for value in (-1, math.nan)),
        *((key, value) for key in UNIT.split() for value in (-0.1, 1.1)),
        *((key, "nonsense") for key in CHOICES.split()),
        *((key, table) for key in TABLES.split() for table in ({12: 1}, {2: 1}, {8: -1}, {8: math.inf})),
        *(("resolution", value) for value in (0, 2, 48, -64)),
        *(("growth.start", value) for value in (0, 2, 12, 2048)),
        *(("growth.optimizer_at", table) for table in ({12: "carry"}, {8: "keep"})),
        ("model.channel_base", 512),
        ("model.resample_filter", [1]),
        ("model.resample_filter", [1, -1]),
        ("output.grid", [1]),
        ("output.grid", [0, 4]),
        ("output.grid", [1, 2, 3]),
        ("train.batch_at", {8: 0}),
        ("optim.beta1", 1),
        ("optim.beta2", 1),
        ("model.conv_clamp", 0),
        ("ema.rampup", 0),
        ("train.threads", 1025),
        ("model.mbstd_channels", 3),
    ],
)
def test_values_out_of_range_are_refused_by_key(possible, key, value):
    with pytest.raises(UsageError, match=rf"^{re.escape(key)}=.* is not possible: it must be "):
        check(changed(possible, key, value))


def test_values_out_of_range_are_refused_when_loading():
    for override in ("train.batch=0", "train.total_kimg=.inf", "growth.stable_kimg_at={8: .inf}", "optim.beta1=1"):
        assert refused(override).startswith(override.split("=")[0])
        assert "it must be" in refused(override)


def test_limits_that_are_possible():
    config_of(*(f"{key}=0" for key in ZERO_UP.split()), *(f"{key}=0" for key in UNIT.split()))
    config_of("model.w_avg_beta=1", "loss.style_mixing=1", "resolution=4", "growth.start=4", "ema.rampup=0.05")
    # Tables may go on above the resolution: half the resolution is one override.
    assert config_of("resolution=8", "train.batch_at={16: 4}").train.batch_at == {16: 4}


def test_terms_are_checked():
    assert config_of("loss.terms=[{name: r2, weight: 2, every: 4}]").loss.terms[0].every == 4
    assert "every=0" in refused("loss.terms=[{name: r2, every: 0}]")
    assert "target=0" in refused("loss.terms=[{name: gradient_penalty, target: 0}]")
    assert "weight=-1" in refused("loss.terms=[{name: drift, weight: -1}]")
    assert "weight_at=" in refused("loss.terms=[{name: drift, weight_at: {6: 1}}]")
    assert "weight_from=" in refused("loss.terms=[{name: drift, weight_from: {0: -1}}]")
    assert "gradient_penalty" in refused("loss.terms=[{name: gradient_penalti}]")
    assert "r1 is there twice" in refused("loss.terms=[{name: r1}]")
    assert config_of("loss.terms=[{name: r1}]", "loss.r1_gamma=0").loss.terms[0].name == "r1"
    assert "name" in refused("loss.terms=[{weight: 1}]")
    assert "unknown key 'weigth'; did you mean 'weight'?" in refused("loss.terms=[{name: r2, weigth: 1}]")
    assert "unknown key 'evry'; did you mean 'every'?" in refused("loss.terms=[{name: r2, evry: 1}]")
    assert "unknown key 'gamma'" in refused("loss.terms=[{name: r2, gamma: 1}]")
    assert "did you mean" not in refused("loss.terms=[{name: r2, gamma: 1}]")


# --- values -----------------------------------------------------------------------------------------------------------


def test_overrides_reach_every_kind_of_key(tmp_path):
    path = file_of(tmp_path, "run: x\ndata: {url: y}\ntrain: {total_kimg: 5, batch_at: {4: 512, 8: 256}}\n")
    config = load_config(
        path,
        [
            "train.batch_at.8=64",
            "train.batch_at.16=32",
            "optim.lr_at={8: 0.001}",
            "train.total_kimg=null",
            "growth.start=8",
            "data.url=s3://bucket/a=b",
            "data.mirror=true",
            "output.grid=[3, 2]",
            "optim.eps=1e-8",
            "seed=3",
            "seed=4",
        ],
    )
    assert config.train.batch_at == {4: 512, 8: 64, 16: 32}
    assert config.optim.lr_at == {8: 0.001}
    assert config.train.total_kimg is None
    assert config.growth.start == 8
    assert config.data.url == "s3://bucket/a=b"
    assert config.data.mirror is True
    assert config.output.grid == [3, 2]
    assert config.optim.eps == 1e-8
    assert config.seed == 4  # the last one counts


@pytest.mark.parametrize("name", [*SHIPPED, None])
def test_yaml_of_a_configuration_gives_it_back(name, tmp_path):
    extra = ["loss.terms=[{name: r2, weight_at: {8: 1.5}, every: 3}]", "optim.eps=1e-12", "run='a: b # c'"]
    config = config_of(*extra) if name is None else load_config(name)
    assert load_config(file_of(tmp_path, to_yaml(config))) == config


def test_terms_that_are_switched_off_are_left_out():
    assert [(t.name, t.weight, t.every) for t in config_of().loss.all_terms()] == [
        ("r1", 10, 16),
        ("path_length", 2, 4),
    ]
    assert config_of("loss.r1_gamma=0", "loss.pl_weight=0").loss.all_terms() == []
    terms = config_of("loss.r1_gamma=0", "loss.r1_gamma_at={8: 1}").loss.all_terms()
    assert [t.name for t in terms] == ["r1", "path_length"]


def test_configurations_are_frozen():
    config = config_of()
    for node, key in ((config, "seed"), (config.train, "batch")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(node, key, 5)


# --- the command line -------------------------------------------------------------------------------------------------


def test_faults_on_the_command_line_are_one_line(tmp_path):
    result = command(tmp_path, "train", "demo", "train.bacth=3")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == "error: train.bacth=3: unknown key 'train.bacth'; did you mean 'train.batch'?\n"
    assert not list(tmp_path.iterdir())


def test_a_table_given_as_a_whole_replaces_the_files(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("run: r\ndata: {url: u}\nresolution: 16\ngrowth: {start: 8}\ntrain: {batch_at: {8: 64, 16: 32}}\n")
    assert load_config(file, ["train.batch_at={}"]).train.batch_at == {}
    assert load_config(file, ["train.batch_at={16: 8}"]).train.batch_at == {16: 8}
    assert load_config(file, ["train.batch_at.16=8"]).train.batch_at == {8: 64, 16: 8}
    with pytest.raises(UsageError, match="nothing_at"):
        load_config(file, ["train.nothing_at={}"])


def test_tables_by_kimg_and_lists_are_replaced_too(tmp_path):
    text = "run: r\ndata: {url: u}\nloss: {r1_gamma_from: {10: 3, 20: 2}}\n"
    text += "model: {low_precision: auto, low_precision_at: [64, 32]}\n"
    file = file_of(tmp_path, text + "resolution: 64\ngrowth: {start: 8}\n")
    assert load_config(file).loss.r1_gamma_from == {10: 3.0, 20: 2.0}
    assert load_config(file, ["loss.r1_gamma_from={5: 1}"]).loss.r1_gamma_from == {5: 1.0}
    assert load_config(file, ["loss.r1_gamma_from={}"]).loss.r1_gamma_from == {}
    assert load_config(file, ["model.low_precision_at=null"]).model.low_precision_at is None
    assert load_config(file, ["model.low_precision_at=[16]"]).model.low_precision_at == [16]
    for override, message in {
        "loss.r1_gamma_from={-1: 2}": "loss.r1_gamma_from",
        "loss.r1_gamma_from={1: -2}": "loss.r1_gamma_from",
        "model.low_precision_at=[24]": "powers of two",
        "model.low_precision=fp32": "bf16, fp16 or auto",
    }.items():
        with pytest.raises(UsageError, match=message):
            load_config(file, [override])


def test_the_weight_of_a_term_by_kimg():
    term = config_of("loss.r1_gamma=9", "loss.r1_gamma_at={8: 1}", "loss.r1_gamma_from={2: 5, 3: 4}").loss.all_terms()[
        0
    ]
    weights = [
        term_weight(term, r, nimg) for r, nimg in ((8, 0), (16, 1999), (8, 2000), (16, 2999), (8, 3000), (4, 10**9))
    ]
    assert weights == [1, 9, 5, 5, 4, 4]


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


def test_what_is_possible_but_perhaps_not_meant_is_told():
    told = of_configuration(
        config_of("model.name=progan", "model.noise=false", "model.mapping_layers=2", "model.z_dim=64")
    )
    assert [line.split()[0] for line in told] == ["model.mapping_layers", "model.noise"]
    assert all("progan networks do not read it" in line for line in told)
    for name in SHIPPED:
        assert of_configuration(load_config(name)) == [], name
    ada = ("augment.mode=ada", "loss.objective=wgan", "loss.r1_gamma=0", "loss.terms=[{name: gradient_penalty}]")
    (line,) = of_configuration(config_of(*ada))
    assert "augment.mode=ada follows the signs" in line
    assert of_configuration(config_of("augment.mode=ada")) == []
