"""Reading single samples with retries, and replacing those whose bytes are bad.

No fault is silent. A sample whose bytes are bad every time is replaced by the next one in the dataset, on every machine
alike, and reported. A fault that may pass (a server that is down, a busy disk) is retried for the configured patience.
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

IN_A_ROW = 1000  # consecutive bad samples, after which the dataset itself must be wrong

_T = TypeVar("_T")


class Bad(NamedTuple):
    """A sample whose bytes are bad every time; `kind` is one of table.KINDS, `dataset` the name of a further dataset
    (data.unpaired), or ""."""

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
    """The values of sample i's fields: "image", "class" (its number), and those of SampleTable.value. Pictures are
    written to `out` where it has memory for them. Raises as SampleTable.image."""
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
    """`read(i)`, which reads sample i of a table, with retries.

    Raises:
        CorruptSample: the bytes were bad twice, the second time read from the source itself.
        OSError: the sample could not be read for the configured patience.
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
    """`read(i)` for the sample at `ordinal`, or for the next good one.

    Ordinals in `known` are known to be bad; they are skipped without reading and not reported.

    Returns:
        The result, the ordinal of its sample, and the samples that were found to be bad.

    Raises:
        OSError: as with_retries.
        RunError: nothing in the dataset, or IN_A_ROW consecutive samples, can be decoded.
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
    raise RunError(f"none of {len(bad) or len(table)} samples from {ordinal} on can be decoded{why}: mend the dataset")


def read_image(
    table: SampleTable, ordinal: int, known: Collection[int] = frozenset(), out: np.ndarray | None = None
) -> tuple[np.ndarray, int, list[Bad]]:
    """The picture at `ordinal`, or the next good one: [C, H, W]. Result and errors are those of `read_good`."""
    return read_good(table, ordinal, known, lambda i: table.image(i, out))


def read_batch(table: SampleTable, ordinals: Sequence[int], bad: list[Bad] | None = None) -> torch.Tensor:
    """Read pictures uint8 [n, C, H, W] by their ordinals; replaced samples are appended to `bad`.

    Raises:
        OSError, RunError: as read_good.
    """
    read = [read_image(table, int(i)) for i in ordinals]
    if bad is not None:
        bad += [one for *_, problems in read for one in problems]
    return torch.from_numpy(np.stack([image for image, *_ in read]))
