"""The README's commands, run as they stand there but for paths and sizes."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import harness
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

README = (ROOT / "README.md").read_text("utf-8")


def commands(prefix: str) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    blocks = [block.replace("\\\n", "") for block in blocks]
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith(prefix)]


def test_make_targets_exist():
    for command in [*commands("make"), "make demo-long", "make setup", "make test-quick", "make lint types imports"]:
        result = subprocess.run(["make", "-n", *command.split()[1:]], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr


def test_every_file_in_the_tree_is_described():
    tree = README.split("```\nstylegan_pg/")[1]
    for path in sorted((ROOT / "stylegan_pg").rglob("*.py")):
        assert path.name == "__init__.py" or path.stem in tree, path
    for path in (ROOT / "configs").glob("*.yaml"):
        assert f"`{path.stem}`" in README, path


@pytest.mark.distributed
@pytest.mark.slow
def test_from_a_folder_to_pictures(tmp_path):
    """pack, plan, dry run, train, torchrun, transfer, sample, metrics, and the Python lines, with a tiny model in place
    of FFHQ's."""
    dice = np.random.default_rng(0)
    for i in range(40):
        folder = tmp_path / "pictures" / ("cat", "dog")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(dice.integers(0, 256, [40, 32, 3], dtype=np.uint8)).save(folder / f"{i}.jpg")
    tiny = {k: v for k, v in harness.TINY.items() if "." in k or k == "resolution"}
    tiny |= {"resolution": 32, "growth.start": 16, "loss.r1_gamma_at": "{}", "train.batch_at": "{}"}
    tiny |= {"train.total_kimg": 0.064, "train.micro_batch_at": "{}", "model.low_precision": "fp32"}
    overrides = " ".join(f"{k}={v}" for k, v in tiny.items()) + " metrics.images=16 train.device=cpu"

    def run(command: str) -> str:
        words = shlex.split(command)
        if words[0] == "stylegan-pg":
            words = ["-m", "stylegan_pg", *words[1:]]
        else:
            assert words[0] == "torchrun"
            words = ["-m", "torch.distributed.run", *words[1:]]
        env = harness.environment() | {"PYTHONPATH": str(ROOT)}
        result = subprocess.run([sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
        return result.stdout

    (pack,) = commands("stylegan-pg pack")
    run(pack.replace("~/pictures", str(tmp_path / "pictures")).replace("--resolution 1024", "--resolution 32"))
    dry, train, transfer, others = commands("stylegan-pg train")
    assert "1024x1024 stable" in run(dry)
    run(f"{train} {overrides}")
    (snapshot,) = (p for p in (tmp_path / "runs" / "mine" / "snapshots").iterdir() if "best" not in p.name)
    single, *_ = commands("torchrun")
    run(f"{single.replace('--nproc-per-node 8', '--nproc-per-node 2')} {overrides}")
    published = "runs/ffhq1024/snapshots/025000kimg.safetensors"
    sample, classes = commands("stylegan-pg sample")
    for command in [sample, *commands("stylegan-pg metrics")]:
        assert published in command
        run(command.replace(published, str(snapshot)))
    assert (tmp_path / "pictures" / "grid.png").exists()

    (checkpoint, *_) = (tmp_path / "runs" / "mine" / "checkpoints").glob("*.safetensors")
    transfer = transfer.replace("runs/ffhq256/checkpoints/000025000000.safetensors", str(checkpoint))
    run(f"{transfer.replace('data/cats', 'data/ffhq1024')} {overrides} growth.start=null data.conditional=true")
    (labelled,) = (p for p in (tmp_path / "runs" / "cats" / "snapshots").iterdir() if "best" not in p.name)
    run(classes.replace("runs/animals/snapshots/best.safetensors", str(labelled)))
    assert (tmp_path / "pictures" / "classes.png").exists()
    (plan,) = commands("stylegan-pg plan")
    assert "1024x1024 fade" in run(plan)
    assert (tmp_path / "plan.png").exists()

    (tmp_path / "tars").mkdir()
    for i in range(2):
        shutil.copy(tmp_path / "data" / "ffhq1024" / "r0032" / "00000.tar", tmp_path / "tars" / f"cats-00{i}.tar")
    assert "dataset: 80 images, resolutions 4, 8, 16, 32" in run(others.replace("063", "001") + " --dry-run")
    info, check, bench = commands("stylegan-pg data")
    assert "2 classes: cat 20, dog 20" in run(info)
    assert (tmp_path / "sheet.png").exists()
    assert "40 images, all good" in run(check)
    assert "images/s" in run(bench.replace("063", "001").replace("256", "32 --seconds 0.1"))

    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code = code.replace(published, os.path.relpath(snapshot, tmp_path)) + "\nassert images.shape == (4, 3, 32, 32)"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert result.returncode == 0


def test_pictures_in_the_readme_exist():
    for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert Path(ROOT, name).is_file(), name
