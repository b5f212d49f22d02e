"""Reading single samples with retries, and replacing damaged ones.

No fault is silent. A sample whose bytes are wrong in every attempt is replaced by the next one in the dataset, in the
same way on every machine, and reported. A transient fault (an unavailable server, a busy disk) is retried for
data.patience seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from stylegan_pg.data.datasets.table import CorruptSample, SampleTable
from stylegan_pg.data.storage import shard_cache
from stylegan_pg.data.storage.retry import Retries
from stylegan_pg.errors import RunError
from stylegan_pg.untrusted import printable

IN_A_ROW = 1000  # consecutive bad samples after which the whole dataset is considered unusable

_T = TypeVar("_T")


class Bad(NamedTuple):
    """A damaged sample. `kind` is one of table.KINDS. `dataset` is the name of a further dataset (data.unpaired) or
    ""."""

    resolution: int
    ordinal: int
    kind: str
    shard: str
    reason: str
    dataset: str = ""

    def __str__(self) -> str:
        return f"sample {self.ordinal} in {printable(self.shard)}: {self.reason}"


def values_of(
    table: SampleTable, i: int, names: Sequence[str] = ("image",), out: Mapping[str, np.ndarray] | None = None
) -> dict[str, Any]:
    """Return the values of sample i's fields: "image", "class" (its number), and those of SampleTable.value. Pictures
    are written to the arrays in `out`, if there are any for them. Raises the exceptions of SampleTable.image."""
    memory = out or {}
    found: dict[str, Any] = {}
    for name in names:
        if name == "image":
            found[name] = table.image(i, memory.get(name))
        elif name == "class":
            found[name] = int(table.label[i])
        else:
            found[name] = table.value(name, i, memory.get(name))
    return found


def with_retries(table: SampleTable, i: int, read: Callable[[int], _T]) -> _T:
    """Call `read(i)`, which reads sample i of a table, with retries.

    Raises:
        CorruptSample: The bytes were wrong twice, the second time without the cache.
        OSError: The sample could not be read for data.patience seconds.
    """
    waiting, failures = Retries(shard_cache.settings().patience), 0
    while True:
        try:
            return read(i)
        except CorruptSample:
            failures += 1
            if failures == 2:
                raise
            table.report_damage(i)
        except OSError as fault:
            waiting.wait(fault)


def read_good(
    table: SampleTable, ordinal: int, known: Collection[int], read: Callable[[int], _T], dataset: str = ""
) -> tuple[_T, int, list[Bad]]:
    """Return `read(i)` for the sample at `ordinal`, or for the next good one.

    Ordinals in `known` are those of damaged samples that were reported before. They are skipped.

    Returns:
        The result, the ordinal of its sample, and the damaged samples that were found.

    Raises:
        OSError: See with_retries.
        RunError: No sample of the dataset, or none of IN_A_ROW consecutive samples, can be decoded.
    """
    bad: list[Bad] = []
    for i in ((ordinal + step) % len(table) for step in range(len(table))):
        if i not in known:
            try:
                return with_retries(table, i, read), i, bad
            except CorruptSample as error:
                bad.append(Bad(table.resolution, i, error.kind, error.shard, error.reason, dataset))
                if len(bad) == IN_A_ROW:
                    break
    why = f" (the last: {bad[-1]})" if bad else ""
    raise RunError(f"none of {len(bad) or len(table)} samples from {ordinal} on can be decoded{why}: repair the data")


def read_image(
    table: SampleTable, ordinal: int, known: Collection[int] = frozenset(), out: np.ndarray | None = None
) -> tuple[np.ndarray, int, list[Bad]]:
    """Read the picture at `ordinal`, [C, H, W], or the next good one. Result and errors are those of `read_good`."""
    return read_good(table, ordinal, known, lambda i: table.image(i, out))


def read_batch(table: SampleTable, ordinals: Sequence[int], bad: list[Bad] | None = None) -> torch.Tensor:
    """Read pictures, uint8 [n, C, H, W], by their ordinals. Replaced samples are appended to `bad`.

    Raises:
        OSError, RunError: See read_good.
    """
    read = [read_image(table, int(i)) for i in ordinals]
    if bad is not None:
        bad += [one for *_, problems in read for one in problems]
    return torch.from_numpy(np.stack([image for image, *_ in read]))
