"""`stylegan-pg sample`: file names that do not collide, wrong options, full disks and devices."""

import resource
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from stylegan_pg.__main__ import main
from stylegan_pg.checkpoint.snapshot import load_snapshot, save_snapshot
from stylegan_pg.errors import UsageError


@pytest.fixture
def sampled(capsys, monkeypatch, tmp_path):
    """Return a function that runs the command in an empty folder and returns its exit code, the names of its files, and
    its output."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, list[str], str]:
        monkeypatch.setattr(sys, "argv", ["stylegan-pg", "sample", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed, told = capsys.readouterr()
        assert "Traceback" not in told
        return int(ended.value.code or 0), printed.split(), told

    return call


def test_files_of_classes_and_seeds_have_different_names(snapshot: Path, tmp_path: Path, sampled):
    G = load_snapshot(snapshot)
    odd = tmp_path / "odd.safetensors"
    save_snapshot(odd, G, {**G.description, "label_names": ["a/b", "A:B", "cat"]})
    for given, names in {
        ("--labels", "#0-2", "--seed", "5"): ["5-a_b-0", "5-A_B-1", "5-cat"],
        ("--labels", "cat", "--seeds", "5,6"): ["5-cat", "6-cat"],
        ("--labels", "a/b,A:B,cat", "--seeds", "1,2"): ["1-a_b-0", "2-A_B-1", "1-cat"],
        ("--labels", "cat", "--seeds", "1,1", "--noise", "random"): ["1-cat", "1-cat.2"],
        ("--seeds", "3"): ["3-a_b-0"],
    }.items():
        code, files, _ = sampled(odd, "--out", "out", *given)
        assert (code, files) == (0, [f"out/seed00000{name}.png" for name in names])
        assert all(Image.open(file).size == (16, 16) for file in files)
    assert len(list(Path("out").iterdir())) == 9
    # Without --out, next to the snapshot.
    assert sampled(odd, "--seeds", 0)[1] == [f"{tmp_path}/odd-pictures/seed000000-a_b-0.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "5-1"], "'5-1' is not a list of numbers"),
        (["--seeds", 2**64], "seeds lie between"),
        (["--seeds", "9" * 5000], "seeds lie between"),
        (["--seeds", ""], "'' is not a list of numbers"),
        (["--labels", ""], "'' is unknown"),
        (["--psi", "nan"], "psi=nan"),
        (["--psi", "1e30"], "psi=1e+30"),
        (["--cutoff", 99], "--cutoff 99 goes beyond the 6 layers"),
        (["--interpolate", 3, "--seeds", 4], "--seeds 4 is one"),
        (["--interpolate", 10**9, "--seeds", "4,5"], "pixels, more than"),
        (["--interpolate", 3, "--grid"], "--grid and --interpolate make different pictures"),
        (["--columns", 3], "--columns is of a picture of all"),
        (["--device", "gpu"], "device 'gpu'"),
        (["--device", "meta"], "device 'meta'"),
        (["--noise", "\udcff"], r"noise '\udcff'"),
        (["--out", "FILE"], "FILE cannot be written"),
    ],
)
def test_wrong_options(snapshot: Path, sampled, arguments, message):
    Path("FILE").write_text("in the way")
    code, files, told = sampled(snapshot, "--out", "out", *arguments)
    assert (code, files) == (2, [])
    assert message in told
    assert len(told.splitlines()) == 1
    assert not list(Path().glob("out/*"))


def test_more_columns_and_larger_batches_than_there_are_images(snapshot: Path, sampled):
    assert sampled(snapshot, "--out", "out", "--seeds", "0-2", "--grid", "--columns", 10**9, "--batch", 10**9)[0] == 0
    assert Image.open("out/grid.png").size == (48, 16)


def test_a_full_disk_is_not_a_bug(snapshot: Path, sampled):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        code, files, told = sampled(snapshot, "--out", "out", "--seeds", "0-2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (code, files) == (1, [])
    assert told.startswith("error: out cannot be written: ")
    assert not list(Path("out").iterdir())


def test_a_diverged_generator_gives_an_error(snapshot: Path, tmp_path: Path, sampled):
    G = load_snapshot(snapshot)
    with torch.no_grad():
        for parameter in G.synthesis.parameters():
            parameter.fill_(1e30)
    save_snapshot(tmp_path / "huge.safetensors", G, G.description)
    for how in ([], ["--grid"], ["--interpolate", 2]):
        code, files, told = sampled(tmp_path / "huge.safetensors", "--out", "out", "--seeds", "0-2", *how)
        assert (code, files) == (1, [])
        assert "images that are not finite" in told


def test_devices_in_python(snapshot: Path):
    for device in ("gpu", "cuda:99", "meta", 1.5, None):
        with pytest.raises(UsageError, match="device"):
            load_snapshot(snapshot, device)  # type: ignore[arg-type]  # that is what is tried
    assert load_snapshot(snapshot, torch.device("cpu")).c_dim == 3
