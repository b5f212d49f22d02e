"""The shipped configurations: they load, their plans are plausible, and YAML of a configuration gives it back."""

import itertools
import re

import harness
import pytest
import torch
from configuring import SHIPPED, config_of, file_of

from stylegan_pg.config import Config
from stylegan_pg.config.loading import configs_folder, load_config
from stylegan_pg.config.plain import to_yaml
from stylegan_pg.config.schedule import Phase, learning_rate, phases
from stylegan_pg.networks import NETWORKS, NetworkShape
from stylegan_pg.planning.advice import of_configuration
from stylegan_pg.planning.plan import Machine, report


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


def learning_rates(config: Config, side: str, phase: Phase) -> str:
    """The learning rate of a phase, or those of its first and last step."""
    ends = (learning_rate(config, side, phase.resolution, nimg) for nimg in (phase.start, phase.end - phase.batch))
    return ">".join(dict.fromkeys(f"{rate:g}" for rate in ends))


def rows_of(text: str, config: Config) -> list[tuple[float, ...]]:
    """Of the table in a plan, for each phase: parameters of G and of D, GFLOPs per image, GiB."""
    number, rows = r"([\d,.]+)", []
    for phase in phases(config):
        row = rf"^{phase}\s+{phase.start / 1000:.9g}-{phase.end / 1000:.9g}\s+{phase.batch}\s+\d+"
        rates = [learning_rates(config, side, phase) for side in ("G", "D")]
        row += rf"\s+{'/'.join(rates)}\s+{number}\s+{number}\s+{number}\s+\S+\s+{number} GiB\s"
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
    result = harness.command("train", "demo", "--dry-run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.iterdir())
    assert to_yaml(config) in result.stdout
    rows_of(result.stdout, config)


@pytest.mark.parametrize("name", [*SHIPPED, None])
def test_yaml_of_a_configuration_gives_it_back(name, tmp_path):
    extra = ["loss.terms=[{name: r2, weight_at: {8: 1.5}, every: 3}]", "optim.eps=1e-12", "run='a: b # c'"]
    config = config_of(*extra) if name is None else load_config(name)
    assert load_config(file_of(tmp_path, to_yaml(config))) == config


def test_shipped_configurations_cause_no_remarks():
    for name in SHIPPED:
        assert of_configuration(load_config(name)) == [], name
    ada = ("augment.mode=ada", "loss.objective=wgan", "loss.r1_gamma=0", "loss.terms=[{name: gradient_penalty}]")
    (line,) = of_configuration(config_of(*ada))
    assert "augment.mode=ada follows the signs" in line
    assert of_configuration(config_of("augment.mode=ada")) == []
