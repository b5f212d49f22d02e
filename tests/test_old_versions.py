"""Files of earlier versions: datasets, stopped runs, snapshots and configurations, used from the command line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import harness
import pytest
import yaml
from golden import reading

from stylegan_pg.config import TERMS
from stylegan_pg.config.families import SECTIONS, class_of, fields_of
from stylegan_pg.config.renamed import RENAMED

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
VERSIONS = sorted(path.name for path in (TESTS / "fixtures").iterdir())
# Values of keys that an automatic schedule fills in.
FILLED_IN = ("growth", "optim", "train.batch_at", "train.micro_batch_at")


@pytest.fixture(scope="module", params=VERSIONS)
def version(request, tmp_path_factory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Return the folder of a version, the present results for it, and the results recorded then."""
    original = TESTS / "fixtures" / request.param
    copy = tmp_path_factory.mktemp("old") / request.param
    shutil.copytree(original, copy)
    command = [sys.executable, str(TESTS / "golden" / "fixtures.py"), "--read", str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, env=harness.environment())
    assert done.returncode == 0, done.stderr
    return original, json.loads(done.stdout), json.loads((original / "expected.json").read_text())


def test_stopped_runs_continue_to_the_recorded_end(version):
    """Compared in float64, up to rounding. One of the runs was stopped in a fade, and one had two processes."""
    _, found, expected = version
    assert found["runs"].keys() == expected["runs"].keys()
    for name, then in expected["runs"].items():
        now = found["runs"][name]
        assert reading.unlike(then.pop("sums"), now.pop("sums"), 1e-9) == []
        before, line = then.pop("last_line"), now.pop("last_line")  # to which statistics may have been added
        assert {key: line.get(key) for key in before} == pytest.approx(before, rel=1e-7, abs=1e-9)
        assert now == then


def test_snapshots_give_the_same_images(version):
    """Compares the mean of each channel, because a few pixels may be rounded differently."""
    _, found, expected = version
    assert found["pictures"].keys() == expected["pictures"].keys()
    for name, then in expected["pictures"].items():
        assert len(then) == len(found["pictures"][name]) == 4
        for picture, mean in zip(found["pictures"][name], then, strict=True):
            assert picture == pytest.approx(mean, abs=0.1), name


def test_snapshots_have_the_same_metrics(version):
    _, found, expected = version
    assert found["metrics"].keys() == expected["metrics"].keys()
    for name, then in expected["metrics"].items():
        assert {key: found["metrics"][name][key] for key in then} == pytest.approx(then, rel=1e-3), name


def test_configurations_mean_the_same(version):
    """Every key that the version had, with the value that it was given, except for keys of other networks, modes of
    augmentation and terms, which the version stored without reading them; and the same phases."""
    folder, found, expected = version
    assert found["plans"].keys() == expected["plans"].keys()
    for name, then in expected["plans"].items():
        given = yaml.safe_load((folder / f"{name}.yaml").read_text())
        given, now = json.loads(json.dumps(given)), found["plans"][name]  # keys of tables become strings
        assert now["phases"] == then["phases"] != []
        for key, value in flat(given).items():
            if key in RENAMED:
                new = RENAMED[key]
                assert key not in flat(now["keys"])
                assert flat(now["keys"])[new.new] == new.value(value)
                continue
            section, _, key_there = key.partition(".")
            if section in SECTIONS and key_there not in fields_of(class_of(SECTIONS[section], given[section])):
                assert key not in flat(now["keys"])
                continue
            wanted = flat(then["keys"])[key]
            if key == "loss.terms":
                wanted = [{k: v for k, v in t.items() if k in fields_of(TERMS[t["name"]])} for t in wanted]
            has: Any = flat(now["keys"]).get(key)
            if key == "loss.terms":  # to which keys may have been added
                has = [{k: t[k] for k in before} for t, before in zip(has, wanted, strict=True)]
            assert has == wanted, key
            assert flat(then["keys"])[key] == value or key.startswith(FILLED_IN) or key == "loss.terms"


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and prefix == "":
            out |= flat(value, f"{key}.")
        else:
            out[prefix + key] = value
    return out
