"""The commands of README.md and docs/ are run unchanged except for paths and sizes."""

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
from exploring import a_run, explored
from PIL import Image

README = (ROOT / "README.md").read_text("utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SUBCOMMANDS = ("pack", "train", "plan", "sample", "metrics", "data", "config", "status")
SUBCOMMANDS += ("mix", "interpolate", "video")  # see test_editing.py
SUBCOMMANDS += ("explore", "import")
SUBCOMMANDS += ("project", "directions")
SUBCOMMANDS += ("ema", "average")
SUBCOMMANDS += ("export",)
GUIDES = [*DOCUMENTS, ROOT / "kernels" / "README.md", ROOT / "launch" / "README.md"]


def commands(prefix: str) -> list[str]:
    """Return the shell commands of the documents that begin with a prefix, each once, in the order of the documents."""
    text = "\n".join(path.read_text("utf-8") for path in DOCUMENTS)
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    blocks = [block.replace("\\\n", "") for block in blocks]
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return list(dict.fromkeys(line for line in lines if line.startswith(prefix)))


def test_every_kind_of_command_is_run_by_a_test():
    """A new command in a document must be added to one of the tests below."""
    known = ("make ", "pip install .", "pip install 'stylegan-pg[ui,video]'", "sbatch ", "launch/", "torchrun ")
    known += ("python -m http.server ",)
    known += ("python demo/avatars.py ", "python demo/digits.py ")  # see test_avatars.py and test_digits.py
    known += tuple(f"stylegan-pg {name}" for name in SUBCOMMANDS)
    assert [line for line in commands("") if line and not line.startswith(known)] == []


def test_make_targets_exist():
    assert len(commands("make")) > 5
    for command in [*commands("make"), "make demo-long"]:
        result = subprocess.run(["make", "-n", *command.split()[1:]], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr


def described(tree: str) -> set[str]:
    """Return the modules of the annotated tree as paths below stylegan_pg/. A folder is written to the left of its
    modules."""
    found, outer, inner = set(), "", ""
    for line in tree.splitlines()[1:]:
        if heading := re.match(r"( +)(\w+)/ ", line):
            outer, inner = (heading[2], "") if len(heading[1]) == 2 else (outer, heading[2])
        elif re.match(r"  \w", line):
            outer = inner = ""
        elif not line.startswith("  "):
            break
        found |= {"/".join(filter(None, [outer, inner, name])) for name in re.findall(r"\w+\.py", line)}
    return found


def test_the_tree_describes_every_module():
    """Each module is next to its folder, and every described module exists."""
    modules = {p.relative_to(ROOT / "stylegan_pg").as_posix() for p in (ROOT / "stylegan_pg").rglob("*.py")}
    tree = README.split("```\nstylegan_pg/")[1].split("```")[0]
    assert described(tree) == {name for name in modules if not name.endswith("__init__.py")}


def test_every_configuration_is_listed():
    for path in (ROOT / "configs").glob("*.yaml"):
        assert f"`{path.stem}`" in README, path


@pytest.mark.distributed
@pytest.mark.slow
def test_from_a_folder_to_pictures(tmp_path):
    """Runs pack, plan, dry run, train, torchrun, transfer, sample, metrics and the Python lines, with a tiny model
    instead of FFHQ's."""
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
            return harness.command(*words[1:], cwd=tmp_path, expected=0).stdout
        assert words[0] == "torchrun"
        words = ["-m", "torch.distributed.run", *words[1:]]
        env = harness.environment() | {"PYTHONPATH": str(ROOT)}
        result = subprocess.run([sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
        return result.stdout

    (pack,) = (command for command in commands("stylegan-pg pack") if "--pair" not in command)  # see test_fields.py
    run(pack.replace("~/pictures", str(tmp_path / "pictures")).replace("--resolution 1024", "--resolution 32"))
    trained = [command for command in commands("stylegan-pg train") if "systems/" not in command]  # test_systems.py
    dry, train, others, transfer = trained
    assert "1024x1024 stable" in run(dry)
    run(f"{train} {overrides}")
    (snapshot,) = (p for p in (tmp_path / "runs" / "mine" / "snapshots").iterdir() if "best" not in p.name)
    single, *_ = commands("torchrun")
    run(f"{single.replace('--nproc-per-node 8', '--nproc-per-node 2')} {overrides}")
    published = "runs/ffhq1024/snapshots/025000kimg.safetensors"
    elsewhere = ("--out-shards", "--ws", "--direction")  # see test_editing.py and test_projection.py
    elsewhere += ("runs/infogan", "--condition", "--arithmetic")  # test_systems.py, test_anime.py, test_arithmetic.py
    sample, classes = (line for line in commands("stylegan-pg sample") if not any(word in line for word in elsewhere))
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
    for command in commands("stylegan-pg config"):
        assert "loss.r1_gamma" in run(command)
    (status,) = commands("stylegan-pg status")
    assert "done" in run(status.replace("runs/ffhq1024", "runs/mine"))
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


def test_the_explorer(tmp_path):
    """Runs the documented command, which serves the page."""
    (command,) = commands("stylegan-pg explore")
    run = a_run(tmp_path)
    with explored(*shlex.split(command.replace("runs/ffhq1024", str(run)))[2:]) as site:
        assert b"<title>" in site.get("/").content


def anchors(path: Path) -> set[str]:
    """Return the fragments with which links refer to the headings of a Markdown file."""
    headings = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_have_existing_targets(path):
    """The files, headings and pictures that a document refers to exist in the repository."""
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8")):
        if not target.startswith("https://"):
            name, _, fragment = target.partition("#")
            other = (path.parent / name).resolve() if name else path
            assert other.exists(), target
            assert not fragment or fragment in anchors(other), target


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_that_documents_name_exist(path):
    """Names such as `data/loader/loader.py` are relative to the root, the package or the document's folder."""
    roots = [ROOT, ROOT / "stylegan_pg", path.parent, ROOT / "stylegan_pg" / "ops"]
    for name in re.findall(r"`([\w/.-]+\.(?:py|sh|cpp|h|cuh|sbatch))`", path.read_text("utf-8")):
        found = any((root / name).is_file() or list(root.glob(f"*/{name}")) for root in roots)
        assert found, f"{path.name} names {name}"
