"""The configuration: values that load, values that are refused, and the messages about them."""

import dataclasses

import harness
import pytest
from configuring import SHIPPED, config_of, file_of, refused

from stylegan_pg.config.loading import load_config
from stylegan_pg.config.schedule import term_weight
from stylegan_pg.errors import UsageError

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
    result = harness.command("train", "demo", "train.bacth=3", cwd=tmp_path)
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
