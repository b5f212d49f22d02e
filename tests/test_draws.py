"""Random inputs of a step's losses, drawn beforehand and moved together."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from stylegan_pg.rng import generator
from stylegan_pg.systems.draws import Draws, Request, mapped, moved, put_rows, rows_of, slices

CPU = torch.device("cpu")


class Pair(NamedTuple):
    z: torch.Tensor
    more: torch.Tensor | None


@pytest.mark.parametrize(
    ("rows", "count"),
    [([], 0), ([3], 1), ([0, 1, 2], 1), ([1, 3, 5], 1), ([5, 3], 2), ([0, 1, 4, 5, 8, 9], 3), ([2, 2], 2)],
)
def test_rows(rows, count):
    t = torch.arange(20.0).reshape(10, 2)
    assert len(slices(rows)) == count
    assert torch.equal(rows_of(t, rows), t[rows])
    new = torch.zeros(10, 2)
    put_rows(new, rows, t[rows])
    assert torch.equal(new[rows], t[rows])
    assert int(new.any(dim=1).sum()) == len({row for row in rows if t[row].any()})


def test_everything_arrives_in_its_form_and_dtype():
    tree = {"a": Pair(torch.randn(3, 2), None), "b": [torch.arange(4), (torch.ones(2, dtype=torch.bool),)], "c": None}
    there = moved(tree, CPU, torch.float64)
    assert type(there["a"]) is Pair
    assert (there["a"].more, there["c"]) == (None, None)
    assert torch.equal(there["a"].z, tree["a"].z.double())  # type: ignore[union-attr]  # a Pair
    assert torch.equal(there["b"][0], tree["b"][0])  # type: ignore[index]  # a list
    assert there["b"][1][0].dtype == torch.bool
    assert mapped(tree, lambda t: t.shape[0])["b"] == [4, (2,)]


def drawing(log: list[int]) -> Request:
    def make(streams: Any) -> Pair:
        log.append(1)
        return Pair(torch.rand([8], generator=streams("z")), torch.rand([8, 2], generator=streams("more", 3)))

    return Request(make, [1, 3, 5])


def expected(nimg: int) -> torch.Tensor:
    return torch.rand([8], generator=generator(7, "z", nimg))[[1, 3, 5]]


def test_what_was_prepared_is_what_would_have_been_drawn():
    draws, log = Draws(CPU, torch.float32), []
    draws.prepare("kind", 7, 0)  # nothing is known yet
    draws.begin("kind", 7, 0)
    first = draws.get("key", drawing(log))
    assert torch.equal(first.z, expected(0))
    assert draws.get("key", drawing(log)) is first
    assert len(log) == 1
    draws.prepare("kind", 7, 8)
    assert len(log) == 2
    assert draws.get("key", drawing(log)) is first  # the present step goes on
    draws.begin("kind", 7, 8)
    assert torch.equal(draws.get("key", drawing(log)).z, expected(8))
    assert len(log) == 2


@pytest.mark.parametrize("other", [("kind", 7, 16), ("other", 7, 8), ("kind", 8, 8), None])
def test_what_was_prepared_for_another_step_is_not_used(other):
    draws, log = Draws(CPU, torch.float32), []
    draws.begin("kind", 7, 0)
    draws.get("key", drawing(log))
    draws.prepare("kind", 7, 8)
    if other is None:
        draws.discard()
    kind, seed, nimg = other or ("kind", 7, 8)
    draws.begin(kind, seed, nimg)
    assert len(log) == 2 + (kind == "kind")  # drawn at once, if it is known what
    value = draws.get("key", drawing(log)).z
    assert len(log) == 3
    assert torch.equal(value, torch.rand([8], generator=generator(seed, "z", nimg))[[1, 3, 5]])
