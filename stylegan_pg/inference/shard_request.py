"""A request of `sample --out-shards`: which samples a dataset of generated images has, and how it is compared with
another request."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stylegan_pg.data.classes import parse_classes, parse_numbers
from stylegan_pg.data.images.decode import size_at
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.errors import UsageError
from stylegan_pg.inference.generate import latents
from stylegan_pg.inference.look import Look
from stylegan_pg.untrusted import printable

MOST_SEEDS = 1 << 32
MOST_IMAGES = 1000  # of a shard by default; fewer where they would have more bytes than this:
SHARD_BYTES = 256_000_000  # of the uncompressed pixels of a shard


@dataclass(frozen=True)
class Request:
    """The samples to generate; `classes` is empty for an unconditional generator."""

    seeds: Sequence[int]
    classes: Sequence[int]
    count: int
    per_shard: int
    how: dict[str, Any]  # psi, cutoff, noise

    @property
    def shards(self) -> int:
        return -(-self.count // self.per_shard)

    def samples(self, shard: int) -> range:
        """The numbers of the samples of a shard."""
        return range(shard * self.per_shard, min((shard + 1) * self.per_shard, self.count))

    def seed(self, i: int) -> int:
        return self.seeds[i % len(self.seeds)]

    def label(self, i: int) -> int | None:
        return self.classes[i % len(self.classes)] if self.classes else None


def checked_seeds(seeds: str | None, count: int | None) -> Sequence[int]:
    """The seeds of a text such as "0-63" (None: these); of a request by count, the only one in the text (None: 0) and
    those that follow it, as a range, which takes no memory.

    Raises:
        UsageError: The text is not a list of seeds, or does not go with the count, or a seed would not be below 2^32.
    """
    numbers: Sequence[int] = parse_numbers(seeds) if seeds is not None else range(1 if count is not None else 64)
    latents([max(numbers)], 1)  # refuses those that are too large
    if count is None:
        return numbers
    if len(numbers) > 1:
        raise UsageError(f"--count {count} and --seeds {printable(seeds)}: give one seed, the first, or omit --count")
    if not 1 <= count <= MOST_SEEDS - numbers[0]:
        raise UsageError(
            f"--count {count}: give 1 to {MOST_SEEDS - numbers[0]} images, as seeds lie below {MOST_SEEDS}"
        )
    return range(numbers[0], numbers[0] + count)


def request_for(
    G: Any,
    snapshot: Path,
    seeds: Sequence[int],
    count: int | None,
    labels: str | None,
    look: Look,
    per_shard: int | None,
) -> Request:
    """Check the options for a generator, and return the request. `count` is that of the seeds and labels if it is None.

    Raises:
        UsageError: The generator makes no pictures that a packed dataset can hold, or does not know a label.
    """
    if G.img_channels not in (1, 3, 4):
        raise UsageError(f"{printable(snapshot)} makes points, not pictures: use it from Python")
    rows, columns = (side * 4 // G.resolution for side in G.img_size)
    if tuple(G.img_size) != size_at(G.resolution, (rows, columns)):
        raise UsageError(f"{printable(snapshot)} makes pictures of a shape that packed datasets cannot have")
    if per_shard is not None and per_shard < 1:
        raise UsageError(f"--shard-images {per_shard}: give 1 or more")
    classes = parse_classes(G, labels)
    if count is None:
        count = max(len(seeds), len(classes)) if labels is not None else len(seeds)
    pixels = G.img_channels * G.img_size[0] * G.img_size[1]
    fitting = max(1, min(MOST_IMAGES, SHARD_BYTES // pixels))
    how = {"psi": float(look.psi), "cutoff": look.cutoff, "noise": look.noise}
    return Request(seeds, classes, count, per_shard or fitting, how)


def plan_of(G: Any, request: Request) -> dict[str, Any]:
    """What determines every image but for rounding, as JSON values."""
    kwargs = json.dumps(G.description["kwargs"], sort_keys=True).encode()
    return {
        "generated": True,
        "network": f"{G.description['network']} {hashlib.sha256(kwargs).hexdigest()[:16]}",
        "weights": dist.parameters_hash(G.state_dict().values()),
        "alpha": G.description.get("alpha", 1.0),
        "seeds": _told(request.seeds),
        "classes": _told(request.classes),
        "count": request.count,
        "images per shard": request.per_shard,
        **request.how,
    }


def _told(numbers: Sequence[int]) -> str:
    """Numbers as a short text that differs for different numbers."""
    if not numbers:
        return "none"
    if isinstance(numbers, range) or list(numbers) == list(range(numbers[0], numbers[0] + len(numbers))):
        return f"{numbers[0]}-{numbers[-1]}"
    text = ",".join(map(str, numbers))
    return text if len(text) <= 60 else f"{text[:30]}... (SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:16]})"
