"""Sections with a class for each family: which keys they have, and what becomes of keys of another family."""

import dataclasses
import logging
from pathlib import Path

import pytest
import yaml
from configuring import config_of, file_of, refused

from stylegan_pg.augment import make
from stylegan_pg.config import (
    AUGMENTATIONS,
    MODELS,
    SYSTEMS,
    TERMS,
    ADAConfig,
    ModelConfig,
    ObjectiveName,
    ProGANConfig,
    renamed,
)
from stylegan_pg.config import families as source
from stylegan_pg.config.checks import check
from stylegan_pg.config.families import FAMILIES, fields_of, types_of
from stylegan_pg.config.loading import load_config
from stylegan_pg.config.plain import stored_keys, to_plain, to_yaml
from stylegan_pg.errors import UsageError
from stylegan_pg.losses import OBJECTIVES
from stylegan_pg.losses import TERMS as COMPUTED
from stylegan_pg.networks import NETWORKS, NetworkShape
from stylegan_pg.systems import catalogue

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(autouse=True)
def _announce_again(caplog):
    source.announce.cache_clear()
    renamed.announce.cache_clear()
    caplog.set_level(logging.INFO, "stylegan_pg")


class Watched:
    """A configuration that records which of its keys are read."""

    def __init__(self, config):
        self.config, self.read = config, set()

    def __getattr__(self, key):
        self.read.add(key)
        return getattr(self.config, key)


# --- which keys there are ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_family_has_the_keys_that_its_networks_read(name):
    """All of its own, and nothing else besides what all families have, of which the trainer reads the rest."""
    watched = Watched(MODELS[name](low_precision="bf16"))
    for kwargs in NETWORKS[name][2:]:
        kwargs(watched, NetworkShape(4, 4, False, 3, 0, 1))
    common = fields_of(ModelConfig).keys()
    assert watched.read - common == fields_of(MODELS[name]).keys() - common


def test_names_are_those_of_the_implementations():
    assert list(NETWORKS) == list(MODELS)
    assert list(COMPUTED) == list(TERMS)
    assert list(catalogue.SYSTEMS) == list(SYSTEMS)
    assert list(OBJECTIVES) == [name.value for name in ObjectiveName]
    assert [mode for mode, cls in AUGMENTATIONS.items() if make(cls()) is None] == ["none"]


@pytest.mark.parametrize("base", FAMILIES)
def test_a_key_of_several_classes_has_one_type_and_one_default(base):
    """Files are read before the class is known."""
    for cls in FAMILIES[base].classes.values():
        for name, field in fields_of(cls).items():
            assert types_of(cls)[name] == types_of(base)[name]
            if name != FAMILIES[base].selector:
                assert source.is_default(base, name, source.default_of(field))


def test_configurations_are_of_the_class_that_they_name():
    assert type(config_of("model=progan").model) is ProGANConfig
    assert type(config_of("augment=ada", "augment.p=0.1").augment) is ADAConfig
    assert [type(term) for term in config_of("loss.terms=[r2, dragan]").loss.terms] == [TERMS["r2"], TERMS["dragan"]]
    config = config_of()
    with pytest.raises(UsageError, match=r"^model\.name=mlp is not possible"):
        check(dataclasses.replace(config, model=dataclasses.replace(config.model, name="mlp")))


# --- keys of other families -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=progan", "model.mapping_layers=2"], "it belongs to stylegan2, stylegan, stylegan3, "),
        (["model.noise=false", "model.name=mlp"], "model.noise is no key of model.name=mlp; it belongs to stylegan2"),
        (["model={name: stylegan, g_architecture: orig}"], "it belongs to stylegan2"),
        (["augment.p=0.5"], "augment.p is no key of augment.mode=none; it belongs to ada, fixed"),
        (["augment=fixed", "augment.p=1", "augment.kimg=5"], "augment.mode=fixed; it belongs to ada"),
        (
            ["loss.terms=[{name: r2, target: 2}]"],
            "target is no key of the term r2; it belongs to gradient_penalty, dra",
        ),
    ],
)
def test_keys_of_other_families_are_refused_by_name(overrides, message, tmp_path):
    assert message in refused(*overrides)
    section, _, rest = overrides[0].partition(".")
    if len(overrides) == 1 and rest:
        key, _, value = rest.partition("=")
        path = file_of(tmp_path, f"run: r\ndata: {{url: u}}\ntrain: {{total_kimg: 1}}\n{section}: {{{key}: {value}}}\n")
        with pytest.raises(UsageError) as error:
            load_config(path)
        assert message in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=nothing"],
        ["augment=nothing"],
        ["augment.mode=adaptive", "augment.p=0.5"],
        ["loss.terms=[{name: nothing, target: 2}]"],
    ],
)
def test_families_that_do_not_exist_are_refused_with_those_that_do(overrides):
    assert "is not possible: it must be " in refused(*overrides)


def test_defaults_of_other_families_are_left_out_with_one_line(tmp_path, caplog):
    path = file_of(
        tmp_path, "run: r\ndata: {url: u}\ntrain: {total_kimg: 1}\nmodel: {name: progan, mapping_layers: 8}\n"
    )
    load_config(path)
    (message,) = caplog.messages
    assert "model.mapping_layers is left out, because model.name=progan does not read it" in message
    assert load_config(path, ["augment.kimg=500", "loss.terms=[{name: r2, target: 1}]"]).augment.mode == "none"
    assert len(caplog.messages) == 3


def test_a_file_with_another_family_by_an_override(caplog):
    """Keys that fit the file's own networks are left out; those of the command line must fit the ones it chooses."""
    config = load_config("ada-small-data64", ["model=progan", "loss.r1_gamma=0"])
    assert config.model == ProGANConfig(z_dim=128, channel_max=128, low_precision="auto", channel_base=2048)
    (message,) = caplog.messages
    assert message.startswith("note: ada-small-data64: model.w_dim, model.mapping_layers are left out, because")
    with pytest.raises(UsageError, match=r"model\.w_dim is no key of model\.name=progan"):
        load_config("ada-small-data64", ["model=progan", "model.w_dim=64"])
    assert load_config("ada-small-data64", ["augment=none"]).augment == AUGMENTATIONS["none"]()


# --- stored configurations --------------------------------------------------------------------------------------------


def test_run_folders_of_earlier_versions_load(tmp_path, caplog):
    """Their config.yaml holds the keys of all families, at any value."""
    stored = yaml.safe_load((FIXTURES / "v0_1" / "run-ada" / "config.yaml").read_text())
    stored["model"] |= {"noise": False, "g_architecture": "orig"}
    stored["augment"] |= {"policy": "color"}
    stored["loss"]["terms"] = [{"name": "drift", "weight": 2.0, "target": 5.0}]
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(stored))
    config = load_config(run)
    assert config.model == ProGANConfig(z_dim=6, channel_max=4, channel_base=64)
    assert config.augment == ADAConfig(p=0.3, interval=2, kimg=0.1)
    assert config.loss.terms == [TERMS["drift"](weight=2.0)]
    assert caplog.messages == ["note: key output.tensorboard is now output.trackers"]
    # The file by its name, with a line for each section.
    assert load_config(run / "config.yaml", [f"run={run}"]) == config
    assert len(caplog.messages) == 4
    assert load_config(file_of(tmp_path, to_yaml(config))) == config


def test_configurations_in_checkpoints_of_earlier_versions():
    config = config_of("model=progan", "augment=ada", "augment.p=0.1", "loss.terms=[{name: r2, every: 3}]")
    plain = to_plain(config)
    now = stored_keys(plain)
    earlier = {**plain, "model": plain["model"] | {"w_dim": 6}, "augment": plain["augment"] | {"policy": "color"}}
    earlier["loss"] = plain["loss"] | {"terms": [{"name": "r2", "every": 3, "target": 1.0}]}
    del earlier["model"]["conv_clamp"], earlier["metrics"]  # as if they had been added since
    assert stored_keys(earlier) == now
    assert "model.w_dim" not in now
    assert now["loss.terms"] == [to_plain(TERMS["r2"](every=3))]
    strange = {"model": {"name": ["x"]}, "augment": 5, "loss": {"terms": [{"name": {}}]}}
    assert stored_keys(strange)["augment.mode"] == "none"
