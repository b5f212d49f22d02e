"""`stylegan-pg kernels`, and the agreement of all ranks on one implementation."""

import pstats
import subprocess
import sys
from typing import Any

import harness
import pytest
from building import environment

from stylegan_pg.ops import native, recipes

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("_fast_compiler")]


def test_output_and_exit_codes(built, tmp_path):
    """Commands end with os._exit after flushing their output, but not under a profiler, which must write its file."""
    command = ["-m", "stylegan_pg", "kernels", "status"]
    output = subprocess.check_output([sys.executable, *command], env=environment(built), text=True)
    assert output.startswith("STYLEGAN_PG_KERNELS=auto")
    assert "cpu bias_act: cpu kernels" in output
    assert ("cpu conv3x3: cpu kernels for bfloat16" in output) == (not recipes.has_bf16_instructions())
    words = " ".join([sys.executable, *command])
    for redirect, code in ((">&-", 0), ("2>&-", 0), ("> /dev/full", 1)):  # closed outputs, and a full disk
        done = subprocess.run(
            ["sh", "-c", f"{words} {redirect}"], env=environment(built), capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
    profile = ["-m", "cProfile", "-o", str(tmp_path / "profile")]
    assert subprocess.check_output([sys.executable, *profile, *command], env=environment(built), text=True) == output
    stats: Any = pstats.Stats(str(tmp_path / "profile"))
    assert any("tools.py" in place[0] for place in stats.stats)


def test_status_reports_a_missing_cache_folder(monkeypatch):
    def fails():
        raise PermissionError("/tmp/x could be written by others: set STYLEGAN_PG_CACHE")

    monkeypatch.setattr(native, "cache_folder", fails)
    monkeypatch.setattr(native, "choose", lambda device: native.Choice("reference", "no cache"))
    assert "cache none (/tmp/x could be written by others: set STYLEGAN_PG_CACHE)" in native.status()


def test_an_unknown_mode_is_a_usage_error():
    done = harness.command("kernels", env=harness.environment() | {"STYLEGAN_PG_KERNELS": "fast"}, expected=2)
    assert done.stderr.strip().startswith("error: STYLEGAN_PG_KERNELS='fast' is unknown: choose from auto")


def test_status_names_every_device():
    done = harness.command("kernels", expected=0)
    for line in ("cpu upfirdn2d: ", "cpu bias_act: ", "cpu filtered_lrelu: ", "cuda"):
        assert line in done.stdout


def test_bench_prints_its_table():
    command = ["kernels", "bench", "--seconds", "0", "--only", "up2 fp32 nchw 64"]
    done = harness.command(*command, expected=0)
    *_, head, row = done.stdout.splitlines()
    assert head.split()[0] == "case"
    assert row.startswith("up2 fp32 nchw 64")
    assert all(float(v) > 0 for v in row.split()[4:])
    done = harness.command(*command, "--device", "tpu", expected=2)
    assert "choose cpu or cuda" in done.stderr


# A program for two ranks, each of which has its own mode.
UNEQUAL = """
import os, sys
os.environ["STYLEGAN_PG_KERNELS"] = sys.argv[1 + int(os.environ["RANK"])]
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.errors import RunError
from stylegan_pg.ops import native
dist.init("cpu")
try:
    print(f"rank {dist.rank()} uses {native.agree('cpu')} now {native.choose('cpu').name}", flush=True)
except RunError as error:
    print(f"rank {dist.rank()} stops: {error}", flush=True)
dist.shutdown()
"""


@pytest.mark.parametrize("modes", [("auto", "auto"), ("auto", "reference"), ("strict", "auto")])
def test_ranks_agree_on_one_implementation(built, tmp_path, modes):
    script = tmp_path / "unequal.py"
    script.write_text(UNEQUAL)
    env = environment(built)
    if "strict" in modes:
        env |= {"STYLEGAN_PG_CACHE": str(tmp_path), "CXX": "/nowhere/c++"}
    done = harness.command(*modes, script=script, ranks=2, env=env, expected=0)
    for rank in (0, 1):
        if "strict" in modes:
            assert f"rank {rank} stops: rank 0: no cpu kernels: no working C++ compiler" in done.stdout
        else:
            name = "reference" if "reference" in modes else "cpu"
            assert f"rank {rank} uses {name} now {name}" in done.stdout
    assert ("ranks [1] have no kernels" in done.stderr) == (modes == ("auto", "reference"))
