"""`stylegan-pg metrics`: sweeps over truncation, classes, neighbours, images of other programs, and refused input."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import harness
import pytest
import torch
from PIL import Image

from stylegan_pg.__main__ import main
from stylegan_pg.data.pack.pack import pack
from stylegan_pg.errors import UsageError
from stylegan_pg.metrics.command import parse_psi


def test_psi_ranges():
    assert parse_psi("0.3:1.0:0.1") == [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert parse_psi("0.7") == [0.7]
    for text in ("", "a", "1:2", "1:0:0.1", "0:1:0", "0:1:1e-9", "nan", "0:inf:1"):
        with pytest.raises(UsageError, match="--psi"):
            parse_psi(text)


@pytest.fixture
def rows_of(capsys, monkeypatch):
    """A function that runs the command in this process, checks its exit code, and returns the printed rows."""

    def call(*arguments: object, expected: int = 0) -> list[dict]:
        monkeypatch.setattr(sys, "argv", ["stylegan-pg", "metrics", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert (ended.value.code or 0) == expected
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return call


@pytest.mark.slow
@pytest.mark.usefixtures("_own_cache")
def test_command_sweeps_truncation_and_shows_neighbours(tiny_data, snapshot, tmp_path):
    how = ["--data", tiny_data, "--extractor", "pixels", "--batch", 16, "--out", tmp_path]
    sweep = [*how, "--metrics", "fid32_full,pr323_full,swd16", "--psi", "0.5:1.0:0.25", "--neighbours", 3]
    arguments = ["metrics", *map(str, [snapshot, *sweep])]
    text = harness.finish(harness.start(arguments, stderr=subprocess.DEVNULL))
    *rows, drawn, table, shown = map(json.loads, text.splitlines())
    assert [row["psi"] for row in rows] == [0.5, 0.75, 1.0]
    for row in rows:
        suffix = "" if row["psi"] == 1 else f"_psi{row['psi']:g}"
        assert {f"fid32_full{suffix}@pixels", f"swd16{suffix}", f"swd16{suffix}_16"} <= row.keys()
        assert 0 <= row[f"pr323_full{suffix}_precision@pixels"] <= 1
    assert Image.open(drawn["picture"]).size[0] > 600
    with Path(table["table"]).open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["psi"]) for line in lines] == [0.5, 0.75, 1.0]
    assert float(lines[0]["fid32_full@pixels"]) == rows[0]["fid32_full_psi0.5@pixels"]
    assert Image.open(shown["picture"]).size == (8 * 16, 3 * 16)


@pytest.mark.parametrize(
    "error",
    [OSError("the server is gone"), MemoryError("out of memory"), torch.cuda.OutOfMemoryError("CUDA out of memory")],
)
@pytest.mark.usefixtures("_own_cache")
def test_lost_data_and_lack_of_memory_give_one_message(tiny_data, snapshot, monkeypatch, capsys, error):

    def fails(*args):
        raise error

    monkeypatch.setattr("stylegan_pg.metrics.real.read_batch", fails)
    how = ["--data", str(tiny_data), "--extractor", "pixels", "--metrics", "fid16_full"]
    monkeypatch.setattr(sys, "argv", ["stylegan-pg", "metrics", str(snapshot), *how])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    what = "the measurement ended early" if isinstance(error, OSError) else "fid16_full"
    assert capsys.readouterr().err == f"error: {what}: {type(error).__name__}: {error}\n"


@pytest.mark.usefixtures("_own_cache")
def test_a_dataset_that_does_not_match_the_generator(tiny_data, snapshot, tmp_path, monkeypatch, capsys):
    """One dataset lacks the generator's resolution, another has a different base grid."""
    for i, name in enumerate("abc" * 2):
        (tmp_path / "pictures" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 8), (40 * i, 0, 90)).save(tmp_path / "pictures" / name / f"{i}.png")
    source = str(tmp_path / "pictures")
    pack(source, tmp_path / "small", resolution=8, lowest=8, progress=False)
    pack(source, tmp_path / "wide", resolution=16, lowest=8, base=(4, 8), progress=False)
    for name, words in (("small", "has no resolution 16, only 8"), ("wide", "16x32")):
        arguments = [str(snapshot), "--data", str(tmp_path / name), "--extractor", "pixels", "--metrics", "fid4_full"]
        monkeypatch.setattr(sys, "argv", ["stylegan-pg", "metrics", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        message = capsys.readouterr().err
        assert ended.value.code == 2, message
        assert str(tmp_path / name) in message
        assert words in message
        assert message.count("\n") == 1


@pytest.mark.slow
@pytest.mark.usefixtures("_own_cache")
def test_command_for_classes_and_for_a_dataset_of_generated_images(tiny_data, snapshot, rows_of):
    how = ["--data", tiny_data, "--extractor", "pixels"]
    rows = rows_of(snapshot, *how, "--metrics", "fid20_full", "--per-class")
    assert [row["class"] for row in rows] == ["a", "b", "c"]
    assert len({row["fid20_full@pixels"] for row in rows}) == 3
    # The same dataset as generated and as real images: the distances are zero.
    (same,) = rows_of(tiny_data, *how, "--metrics", "fid96_full,kid96_full,pr963_full,swd96")
    assert same["fid96_full@pixels"] == pytest.approx(0, abs=1e-6)
    assert same["pr963_full_precision@pixels"] == same["pr963_full_recall@pixels"] == 1
    assert rows_of(tiny_data, *how, "--metrics", "fid97_full", expected=2) == []
    assert rows_of(tiny_data, *how, "--psi", "0.5", expected=2) == []
    assert rows_of(snapshot, *how, "--psi", "0.5:1", expected=2) == []
