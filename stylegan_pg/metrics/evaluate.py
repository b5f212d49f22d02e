"""A generator held against a dataset: features -> statistics -> numbers, dealt out over the ranks.

Images, generated and real, come in blocks of 64 whose contents follow from (seed, number), and rank r takes every
world-th block; what is gathered of them merges exactly. So results depend neither on the ranks nor on the batch size,
and the training's own random streams are never touched. What is known of the real images is cached.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch

from stylegan_pg import dist
from stylegan_pg.data.index import DatasetIndex, SampleTable
from stylegan_pg.data.stream import one_hot, read_batch
from stylegan_pg.errors import UsageError
from stylegan_pg.generate import images_of
from stylegan_pg.metrics import real_cache
from stylegan_pg.metrics.path_length import middle_mean, path_lengths
from stylegan_pg.metrics.protocol import NETWORK, Protocol
from stylegan_pg.metrics.similarity import ms_ssim
from stylegan_pg.metrics.statistics import (
    InceptionScore,
    Moments,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from stylegan_pg.metrics.swd import PatchCollector, sliced_wasserstein
from stylegan_pg.rng import derive, generator

BLOCK = 64
FEATURE = {"fid": "pool", "kid": "pool", "is": "logits", "pr": "fc2"}


@dataclass(frozen=True)
class Tools:
    """With what is measured.

    Attributes:
        device: where networks run; images and statistics are on the CPU.
        weights: files for the feature networks, recognised by what is in them.
        extractor: instead of Inception and VGG16, "package.module:function"; empty for those.
        precision: of the feature networks, fp32 or bf16.
        batch: images at a time.
        seed: which latents, and which real images where not all are taken.
        cache: whether what is computed of real images is kept on disk.
    """

    device: torch.device
    weights: tuple[str, ...] = ()
    extractor: str = ""
    precision: str = "fp32"
    batch: int = 32
    seed: int = 0
    cache: bool = True


@dataclass(frozen=True)
class Pictures:
    """A packed dataset in a generator's place: images that somebody else has made."""

    table: SampleTable
    c_dim = 0


class Rows:
    """Features kept as they are, in the order of their images."""

    def __init__(self):
        self.parts: dict[int, torch.Tensor] = {}

    def add(self, first: int, rows: torch.Tensor) -> None:
        self.parts[first] = rows

    def merge(self, other: Rows) -> None:
        self.parts |= other.parts

    def all(self) -> torch.Tensor:
        return torch.cat([self.parts[first] for first in sorted(self.parts)])


class Evaluator:
    """Measures generators by some protocols against one resolution of a dataset; the real side is computed once.

    Args:
        index, resolution: the dataset.
        protocols: what to measure.
        only_class: against, and of, this class alone.

    Raises (its methods):
        UsageError: on all ranks, where weights are missing or a dataset is too small for a protocol.
    """

    def __init__(
        self,
        index: DatasetIndex,
        resolution: int,
        protocols: Sequence[Protocol],
        tools: Tools,
        only_class: int | None = None,
    ):
        self.table: SampleTable = index.table(resolution)
        self.dataset, self.resolution = f"{index.identity}-{resolution}", resolution
        self.protocols, self.tools, self.only_class = list(protocols), tools, only_class
        self.mine = np.arange(len(self.table))
        if only_class is not None:
            self.mine = np.flatnonzero(self.table.label == only_class)
        if not len(self.mine):
            raise UsageError(f"the dataset has no image of class {only_class}")
        self._networks: dict[str, Any] = {}
        self._reals: dict[str, Any] = {}  # on rank 0

    def __call__(self, G: Any, **how: Any) -> dict[str, float]:
        """{metric: value} of G, on all ranks; `how` goes to its synthesis (alpha). A collective call."""
        for p in self.protocols:
            self._check(p, G)
        values: dict[str, float] = {}
        for psi, group in groupby(sorted(self.protocols, key=lambda p: p.psi), key=lambda p: p.psi):
            some = list(group)
            with dist.together():
                fakes = {p.name: self._gatherer(p) for p in some}
                self._generate(G, [p for p in some if p.kind != "ppl2"], fakes, psi, how)
                for p in some:
                    if p.kind == "ppl2":
                        self._paths(G, p, fakes[p.name], how)
            for p in some:
                fake, real = _merged(fakes.pop(p.name)), self._real(p)
                with dist.main_decides() as box:
                    if dist.is_main():
                        box.append(self._number(p, real, fake))
                values |= box[0]
        return values

    # ------------------------------------------------------------------------------------------ what is gathered

    def network(self, kind: str) -> Any:
        """The extractor, or the distance, that a metric looks at images with."""
        from stylegan_pg.metrics import features

        name = self.tools.extractor if kind != "ppl2" and self.tools.extractor else NETWORK[kind]
        if name not in self._networks:
            if name == "lpips":
                lin, vgg = (features.find_weights(n, self.tools.weights)[1] for n in ("lpips", "vgg16"))
                distance = features.lpips(lin, vgg)
                self._networks[name] = lambda a, b: distance(a.cpu(), b.cpu())
            else:
                self._networks[name] = features.load_extractor(
                    name, self.tools.weights, self.tools.device, self.tools.precision
                )
        return self._networks[name]

    def _feature(self, kind: str) -> str:
        return "pool" if self.tools.extractor else FEATURE[kind]

    def _gatherer(self, p: Protocol) -> Any:
        if p.kind == "swd":
            return PatchCollector(self.resolution, self.table.channels, seed=derive(self.tools.seed, "fake"))
        if p.kind in ("kid", "pr", "ppl2", "ms_ssim"):
            return Rows()
        return InceptionScore(p.count) if p.kind == "is" else _Lazy()

    def _add(self, p: Protocol, gatherer: Any, first: int, images: torch.Tensor, known: dict[str, Any]) -> None:
        """Images with numbers from `first` on; `known` holds the features that were already computed of them."""
        if p.kind == "swd":
            gatherer.add(images, first)
        elif p.kind == "ms_ssim":  # of pairs: the even numbers with the odd ones behind them
            gatherer.add(first, ms_ssim(images[0::2], images[1::2]))
        else:
            network = self.network(p.kind)
            if network.identity not in known:
                known[network.identity] = network(images)
            rows = known[network.identity][self._feature(p.kind)][: len(images)]
            if p.kind == "is":
                gatherer.add(range(first, first + len(rows)), rows)
            else:
                gatherer.add(first, rows)

    def _generate(self, G: Any, protocols: list[Protocol], fakes: dict[str, Any], psi: float, how: Any) -> None:
        wanted = {p.name: self._images(p) for p in protocols}
        total = max(wanted.values(), default=0)
        batch = -(-self.tools.batch // 2) * 2  # even: similarity is of neighbours
        for block in _share(total):
            first = block * BLOCK
            if isinstance(G, Pictures):
                made = read_batch(G.table, range(first, min(first + BLOCK, total))).split(batch)
            else:
                z, c = self._latents(G, "metric-z", block, total)
                made = images_of(G, z, c, batch=batch, psi=psi, **how)
            for images in made:
                known: dict[str, Any] = {}
                for p in sorted(protocols, key=lambda p: -wanted[p.name]):
                    if first < wanted[p.name]:
                        self._add(p, fakes[p.name], first, images[: wanted[p.name] - first], known)
                first += len(images)

    def _images(self, p: Protocol) -> int:
        """How many to generate; more than real ones would not count in a sliced distance."""
        return {"ms_ssim": 2 * p.count, "swd": min(p.count, len(self.mine))}.get(p.kind, p.count)

    def _latents(self, G: Any, purpose: str, block: int, total: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """z and c of the images of a block; labels are drawn as often as the dataset has them."""
        seed, numbers = self.tools.seed, np.arange(block * BLOCK, min((block + 1) * BLOCK, total))
        z = torch.randn([BLOCK, G.z_dim], generator=generator(seed, purpose, block))[: len(numbers)]
        if not G.c_dim:
            return z, None
        order = torch.randperm(len(self.mine), generator=generator(seed, "metric-labels")).numpy()
        return z, one_hot(self.table.label[self.mine[order[numbers % len(order)]]], G.c_dim)

    def _paths(self, G: Any, p: Protocol, lengths: Rows, how: dict[str, Any]) -> None:
        distance = self.network("ppl2")
        for block in _share(p.count):
            ends = [self._latents(G, f"metric-path-{i}", block, p.count) for i in range(2)]
            z, c, n = torch.stack([z for z, _ in ends]), ends[0][1], len(ends[0][0])
            t = torch.zeros(n)
            if p.where == "full":
                t = torch.rand([BLOCK], generator=generator(self.tools.seed, "metric-path-t", block))[:n]
            for i in range(0, n, self.tools.batch):
                part = slice(i, i + self.tools.batch)
                condition = None if c is None else c[part]
                given = {"space": p.space, "psi": p.psi, **how}
                lengths.add(block * BLOCK + i, path_lengths(G, distance, z[:, part], t[part], condition, **given))

    # --------------------------------------------------------------------------------------------- the real side

    def _check(self, p: Protocol, G: Any) -> None:
        if p.kind in ("fid", "kid", "pr") and not p.full and p.count > len(self.mine) * (1 + p.mirror):
            raise UsageError(
                f"{p.name} needs {p.count} real images, the dataset has {len(self.mine)}: use {p.kind}..._full, or a "
                "smaller count"
            )
        if isinstance(G, Pictures) and self._images(p) > len(G.table):
            raise UsageError(f"{p.name} needs {self._images(p)} images, there are {len(G.table)}: use a smaller count")
        if p.kind == "ppl2" and not hasattr(G, "styles"):
            raise UsageError(f"{p.name} needs a generator with a latent space w")

    def _ordinals(self, p: Protocol) -> np.ndarray:
        """Which real images, in which order."""
        if p.full:
            return self.mine
        order = torch.randperm(len(self.mine), generator=generator(self.tools.seed, "swd-real")).numpy()
        return self.mine[order[: p.count]]

    def _real(self, p: Protocol) -> Any:
        """What is known of the real images that a metric compares with, on rank 0; None on the others."""
        if p.kind in ("is", "ppl2", "ms_ssim"):
            return None
        side = {"fid": "moments", "kid": "rows", "pr": "rows", "swd": "patches"}[p.kind]
        facts = [side, self.dataset, str(self.only_class)]
        facts += ["all" if p.full else f"{p.count} of seed {self.tools.seed}", f"mirror {p.mirror}"]
        if p.kind != "swd":
            with dist.together():
                facts += [self.network(p.kind).identity, self._feature(p.kind)]
        key = " | ".join(facts)
        with dist.main_decides() as box:
            if dist.is_main():
                if key not in self._reals and self.tools.cache and p.kind != "swd":
                    self._recall(key, side)
                box.append(key in self._reals)
        if not box[0]:
            with dist.together():
                mine = self._read(p)
            real = _merged(mine)
            if dist.is_main():
                self._reals[key] = real.descriptors() if p.kind == "swd" else real
                if self.tools.cache and p.kind != "swd":
                    self._keep(key, real)
        return self._reals.get(key)

    def _read(self, p: Protocol) -> Any:
        """This rank's share of the real images; mirrored copies come behind all others."""
        gatherer = self._gatherer(p)
        if p.kind == "swd":
            gatherer = PatchCollector(self.resolution, self.table.channels, seed=derive(self.tools.seed, "real"))
        ordinals = self._ordinals(p)
        jobs = [b * BLOCK + i for b in _share(len(ordinals)) for i in range(0, BLOCK, self.tools.batch)]
        jobs = [first for first in jobs if first < len(ordinals)]

        def read(first: int) -> torch.Tensor:
            until = min(first + self.tools.batch, first // BLOCK * BLOCK + BLOCK)
            return read_batch(self.table, ordinals[first:until].tolist())

        with ThreadPoolExecutor(1) as reader:  # the next images are decoded while these are looked at
            pending = [reader.submit(read, first) for first in jobs[:2]]
            for k, first in enumerate(jobs):
                images = pending.pop(0).result()
                pending += [reader.submit(read, i) for i in jobs[k + 2 : k + 3]]
                self._add(p, gatherer, first, images, {})
                if p.mirror:
                    self._add(p, gatherer, len(ordinals) + first, images.flip(3), {})
        return gatherer

    def _recall(self, key: str, side: str) -> None:
        try:
            found = real_cache.load(key)
            if found is not None:
                rows = Rows()
                if side == "rows":
                    rows.add(0, found["rows"])
                self._reals[key] = rows if side == "rows" else _Lazy(Moments.from_state(found))
        except (ValueError, KeyError) as error:
            print(f"warning: a cached statistic is damaged and computed anew ({error})", file=sys.stderr)

    def _keep(self, key: str, real: Any) -> None:
        try:
            real_cache.save(key, {"rows": real.all()} if isinstance(real, Rows) else real.moments().state())
        except OSError as error:
            print(f"warning: statistics of the real images could not be kept: {error}", file=sys.stderr)

    # ---------------------------------------------------------------------------------------------- the numbers

    def _number(self, p: Protocol, real: Any, fake: Any) -> dict[str, float]:
        if p.kind == "swd":
            found = sliced_wasserstein(real if real else {}, fake.descriptors(), seed=self.tools.seed)
            return {p.name + name.removeprefix("swd"): value for name, value in found.items()}
        if p.kind == "ms_ssim":
            return {p.name: float(fake.all().double().mean())}
        if p.kind == "ppl2":
            return {p.name: middle_mean(fake.all())}
        name, mark = p.name, self.network(p.kind).mark
        if p.kind == "fid":
            return {name + mark: frechet_distance(real.moments(), fake.moments())}
        if p.kind == "pr":
            precision, recall = precision_recall(real.all(), fake.all())
            return {f"{name}_precision{mark}": precision, f"{name}_recall{mark}": recall}
        mean, deviation = kernel_distance(real.all(), fake.all()) if p.kind == "kid" else fake.score()
        return {name + mark: mean, f"{name}_std{mark}": deviation}


class _Lazy:
    """Moments of features whose width shows when the first of them come."""

    def __init__(self, found: Moments | None = None):
        self.found = found

    def add(self, _first: int, rows: torch.Tensor) -> None:
        self.found = self.found or Moments(rows.shape[1])
        self.found.add(rows)

    def merge(self, other: _Lazy) -> None:
        if self.found is None:
            self.found = other.found
        elif other.found is not None:
            self.found.merge(other.found)

    def moments(self) -> Moments:
        assert self.found is not None
        return self.found


def _share(total: int) -> Iterator[int]:
    """This rank's blocks."""
    yield from range(dist.rank(), -(-total // BLOCK), dist.world())


def _merged(mine: Any) -> Any:
    """All ranks' parts as one, on rank 0."""
    parts = dist.gather_on_main(mine)
    if parts is None:
        return None
    for part in parts[1:]:
        parts[0].merge(part)
    return parts[0]
