"""`stylegan-pg configs` and `stylegan-pg config`: lists of configurations and keys."""

import re
import subprocess

import harness
import pytest

from stylegan_pg.config import Config, keys
from stylegan_pg.config.loading import configs_folder, load_config, shipped_configs
from stylegan_pg.errors import UsageError


def command(*args: str) -> subprocess.CompletedProcess:
    return harness.command(*args)


def test_the_commands_and_their_help():
    listed = command("configs")
    assert (listed.returncode, listed.stderr) == (0, "")
    told = dict(line.split(maxsplit=1) for line in listed.stdout.splitlines())
    systems = {f"systems/{p.stem}" for p in (configs_folder() / "systems").glob("*.yaml")}
    assert told.keys() == {p.stem for p in configs_folder().glob("*.yaml")} | systems
    assert told["ffhq1024"] == "FFHQ at 1024x1024 with a StyleGAN2 pair that grows"
    one = command("config", "train.batch")
    assert (one.returncode, one.stdout.count("\n")) == (0, 1)
    assert re.fullmatch(r"train\.batch=32 +whole number above 0; images per step, over all devices\n", one.stdout)
    wrong = command("config", "train.bacth")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "there is no key 'train.bacth'; did you mean 'train.batch'?" in wrong.stderr
    shown = " ".join(command("train", "--help").stdout.split())
    assert "`stylegan-pg configs` lists the shipped configurations, `stylegan-pg config` all keys." in shown


def test_every_key_is_listed_with_its_default_and_a_comment():
    lines = keys.describe()
    leaves = [key for key in keys.known() if key not in keys.types_of(Config) or "." in key]
    leaves += ["run", "seed", "resolution", "init"]
    assert sorted(line.split("=")[0] for line in lines) == sorted(leaves)
    for line in lines:
        assert re.fullmatch(r"[a-z0-9_.]+=.* (text|whole|number|true|list|table|one of|some of).*; \S.*", line), line
    given = [re.split(r"  +", line)[0] for line in lines]
    defaults = [g for g in given if not g.startswith(("run=", "data.url="))]
    defaults = [re.sub(r"\] .*", "]", g) for g in defaults]
    needed = ["run=x", "data.url=y", "growth.start=8"]
    assert load_config(None, [*defaults, *needed]) == load_config(None, needed)  # all listed keys can be set


def test_sections_single_names_and_terms():
    assert [line.split("=")[0] for line in keys.describe("ema")] == [
        "ema.kimg",
        "ema.kimg_at",
        "ema.kimg_from",
        "ema.rampup",
        "ema.profiles",
        "ema.every_kimg",
    ]
    assert [line.split("=")[0] for line in keys.describe("kimg")] == ["augment.kimg", "ema.kimg"]
    terms = keys.describe("loss.terms")
    assert [line.split("=")[0].strip() for line in terms[1:4]] == ["name", "weight", "every"]
    assert "gradient_penalty" in terms[-1]
    with pytest.raises(UsageError, match=r"no key '\\x1b'"):
        keys.describe("\x1b")


def test_comments_of_shipped_files_begin_with_a_line_for_the_list():
    for name, about in shipped_configs().items():
        assert 20 < len(about) < 160, name
        assert not about.endswith((".", ":")), name
