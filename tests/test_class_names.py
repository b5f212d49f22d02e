"""Names of classes: on the command line, in file names, and as arguments of a generator in Python."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from stylegan_pg.checkpoint.snapshot import load_snapshot
from stylegan_pg.data.classes import file_names, parse_classes
from stylegan_pg.errors import UsageError


def named(*names: str) -> Any:
    return SimpleNamespace(c_dim=len(names), description={"label_names": list(names)})


@pytest.mark.parametrize(
    ("names", "text", "places"),
    [
        # A name that looks like a number is a name.
        (("1", "2", "3", "10"), "1,2", [0, 1]),
        (("1", "2", "3", "10"), "10", [3]),
        (("1", "2", "3", "10"), "#1-2", [1, 2]),
        (("1", "2", "3", "10"), "index:0,#1-#2,index:2-3,10", [0, 1, 2, 2, 3, 3]),
        (("01", "02", "10"), "01,10", [0, 2]),
        (("1-2", "#0", "index:1"), "1-2,#0,index:1", [0, 1, 2]),
        # Explicit numbers of classes, and texts that are not numbers.
        (("0", "1", "2"), "0-2,1", [0, 1, 2, 1]),
        (("cat", "dog", "owl"), "owl, cat,1,0-1", [2, 0, 1, 0, 1]),
        # Commas, quotes, spaces, and accents in two forms.
        (("a,b", "a", "b"), "a,b", [0]),
        (("a,b", "a", "b"), '"a,b",b', [0, 2]),
        (("big cat", "d\u00e9j\u00e0"), "big cat,de\u0301ja\u0300", [0, 1]),
    ],
)
def test_names_take_precedence_over_numbers(names, text, places):
    assert parse_classes(named(*names), text) == places


@pytest.mark.parametrize(
    ("names", "text", "message"),
    [
        (("1", "2", "3", "10"), "0,1", r"'0' is not the name of any .*\(1, 2, 3, 10\).*write #0 for a position"),
        (("1", "2", "3", "10"), "1-2", "write #1-2 for a position"),
        (("01", "02"), "1", "write #1 for a position"),
        (("cat", "dog"), "#2", "position 2 is not one of the 2 classes"),
        (("cat", "dog"), "#" + "9" * 5000, "is not one of the 2 classes"),
        (("cat", "dog"), "#1-0", "goes backwards"),
        (("cat", "dog"), "cat,,dog", "'' is unknown"),
        (("cat", "dog"), "", "'' is unknown"),
        (("cat", "dog"), "cow\x1b[2J", r"'cow\\x1b\[2J' is unknown"),
        (("cat", "dog", "cat"), "cat", "2 classes are named 'cat': choose by position, #0, #2"),
        ((), "cat", "unconditional"),
    ],
)
def test_unknown_classes(names, text, message):
    with pytest.raises(UsageError, match=message):
        parse_classes(named(*names), text)


def test_file_names_tell_classes_apart():
    """File names of classes differ even on file systems that ignore case, whatever the names contain."""
    names = [
        "a/b",
        "a:b",
        "A_B",
        "a_b-1",
        "Cat",
        "cat",
        "owl",
        "",
        "..",
        "x" * 300,
        "x" * 301,
        "\ud800",
        "e\u0301",
        "\u00e9",
    ]
    files = file_names(names)
    assert files[6] == "owl"
    assert len({name.casefold() for name in files}) == len(names)
    for name in files:
        assert name
        assert len(f"seed4294967295-{name}.999.png".encode()) < 200
        assert not set(name) & set('/\\:*?"<>|\0')
        assert not name.endswith((".", " "))
    assert files[:3] == ["a_b-0", "a_b-1_", "A_B-2"]
    assert file_names(names) == files


@torch.no_grad()
def test_conditions_in_python(snapshot: Path):
    """Numbers, names, lists and integer tensors have the same meaning as the corresponding one-hot tensor."""
    G = load_snapshot(snapshot)  # it has the classes a, b, c
    z = torch.randn(3, G.z_dim)
    same = {
        (2, 0, 1): ([2, 0, 1], ["c", "a", "b"], torch.tensor([2, 0, 1]), np.array([2, 0, 1])),
        (1, 1, 1): (1, "b", torch.tensor([1, 1, 1], dtype=torch.int32)),
    }
    for places, forms in same.items():
        expected = G(z, torch.eye(3)[list(places)])
        one_hot = torch.eye(3, dtype=torch.long)[list(places)]
        for c in (*forms, one_hot, one_hot.bool(), one_hot.double(), one_hot.half()):
            assert torch.equal(G(z, c), expected), c
    assert torch.equal(G(z.double(), 1), G(z, 1))
    assert torch.equal(copy.deepcopy(G).double()(z, 1).float().sign(), G(z, 1).sign())
    refused = {
        "c is missing": None,
        "c is in the range 0 to 3, but this generator has the classes 0 to 2": [0, 1, 3],
        "c is in the range -1 to 0": torch.tensor([-1, 0, 0]),
        "'cow' is not a class": ["a", "cow", "b"],
        r"shape \[2\]": [0, 1],
        r"shape \[3, 2\]": torch.zeros(3, 2),
        r"shape \[3\] and type float32": torch.tensor([0.0, 1.0, 2.0]),
        "c cannot be used": object(),
        "complex": torch.zeros(3, 3, dtype=torch.complex64),
    }
    for message, c in refused.items():
        with pytest.raises(UsageError, match=message) as caught:
            G(z, c)
        assert "\n" not in str(caught.value)
    for bad in (torch.randn(3, 5), torch.randn(8), "z"):
        with pytest.raises(UsageError, match=r"^z "):
            G(bad, 1)
