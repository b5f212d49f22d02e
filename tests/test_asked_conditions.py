"""`stylegan-pg sample --condition`: vectors by the names of their entries."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stylegan_pg.__main__ import main
from stylegan_pg.checkpoint.snapshot import load_snapshot, save_snapshot
from stylegan_pg.data.asked_conditions import ask_for, vector_of
from stylegan_pg.data.classes import class_names, conditions_at
from stylegan_pg.errors import UsageError

NAMES = ["hair_red", "glasses", "a,b", "x=1"]


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("", [0, 0, 0, 0]),
        ("glasses", [0, 1, 0, 0]),
        (" hair_red = 0.25 , glasses=0", [0.25, 0, 0, 0]),
        ("#1=-3, #0", [1, -3, 0, 0]),
        ('"a,b",x=1', [0, 0, 1, 1]),
        ("x=1=2", [0, 0, 0, 2]),
    ],
)
def test_entries_are_named_or_counted(text, row):
    assert vector_of(text, NAMES, 4, "attributes") == row


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hair", "'hair' is no entry of the vector attributes, which has hair_red, glasses"),
        ("#4", "'#4' is no entry of the vector"),
        ("glasses, glasses=0", "gives entry glasses=0 twice"),
        ("glasses=", "'glasses=' has no number behind ="),
        ("glasses=nan", "has no number"),
        ("glasses=1e39", "has no number"),
        ("glasses,", "'' is no entry"),
    ],
)
def test_what_cannot_be_a_condition_is_refused(text, message):
    with pytest.raises(UsageError, match=message):
        vector_of(text, NAMES, 4, "attributes")


def test_without_names_entries_are_counted():
    assert vector_of("#1=2", [], 3, "v") == [0, 2, 0]
    with pytest.raises(UsageError, match="vector v, which has #0 to #2"):
        vector_of("a", [], 3, "v")


@pytest.fixture
def attributes(snapshot: Path, tmp_path: Path) -> Path:
    """A snapshot whose three conditions are a vector of named entries."""
    G = load_snapshot(snapshot)
    description = {**G.description, "label_names": ["hair_red", "glasses", "age"], "condition": "attributes"}
    save_snapshot(path := tmp_path / "v.safetensors", G, {**description, "conditions": [[1.0, 0.0, 0.5]]})
    return path


def test_asked_conditions_take_the_place_of_examples(attributes):
    G = load_snapshot(attributes)
    ask_for(G, ["glasses, age=0.3", ""])
    assert class_names(G) == ["glasses, age=0.3", ""]
    assert torch.equal(conditions_at(G, [1, 0]), torch.tensor([[0, 0, 0], [0, 1, 0.3]]))


def test_the_command_makes_pictures_of_conditions(attributes, snapshot, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def sample(path: Path, *given: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["stylegan-pg", "sample", str(path), *map(str, given)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed, told = capsys.readouterr()
        return int(ended.value.code or 0), printed + told

    conditions = ("--condition", "glasses", "--condition", "hair_red=0.5, age")
    assert sample(attributes, "--seeds", "3,4", "--out", "out", *conditions)[0] == 0
    G = load_snapshot(attributes)
    for i, (name, c) in enumerate({"3-glasses": [0, 1, 0], "4-hair_red=0.5, age": [0.5, 0, 1]}.items()):
        z = torch.from_numpy(np.random.RandomState(3 + i).randn(1, G.z_dim)).float()
        expected = G(z, torch.tensor([c], dtype=torch.float32), psi=0.7, noise="const")[0]
        found = torch.from_numpy(np.array(Image.open(f"out/seed00000{name}.png"))).permute(2, 0, 1)
        assert ((expected.clamp(-1, 1) + 1) * 127.5 - found).abs().max() < 1
    assert sample(attributes, "--class-grid", "--seeds", "0", "--out", "grid", *conditions)[0] == 0
    for path, given, message in (
        (attributes, ("--condition", "hat"), "'hat' is no entry of the vector attributes, which has hair_red, glasses"),
        (attributes, (*conditions, "--labels", "0"), "give one of them"),
        (attributes, (*conditions, "--out-shards", "s"), "--condition: --out-shards writes a dataset"),
        (snapshot, conditions, "this generator has classes: choose them with --labels"),
    ):
        code, told = sample(path, "--seeds", "0", *given)
        assert (code, "Traceback" in told) == (2, False)
        assert message in told
