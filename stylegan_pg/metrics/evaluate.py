"""A generator held against a dataset: features -> statistics -> numbers, dealt out over the ranks.

Images come in blocks whose contents follow from (seed, number), and rank r takes every world-th block; what is gathered
of them merges exactly. So results depend neither on the ranks nor on the batch size, and the training's own random
streams are never touched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import torch

from stylegan_pg import dist
from stylegan_pg.data.index import DatasetIndex
from stylegan_pg.data.stream import Bad, one_hot, read_batch
from stylegan_pg.data.table import SampleTable
from stylegan_pg.errors import UsageError
from stylegan_pg.generate import images_of
from stylegan_pg.metrics import gather
from stylegan_pg.metrics.gather import Networks, Rows, Tools
from stylegan_pg.metrics.path_length import held, middle_mean, path_lengths
from stylegan_pg.metrics.protocol import LEAST_SIDE, NETWORK, Protocol
from stylegan_pg.metrics.real import RealSide, tell_bad
from stylegan_pg.metrics.statistics import frechet_distance, kernel_distance, precision_recall
from stylegan_pg.metrics.swd import sliced_wasserstein
from stylegan_pg.rng import generator


@dataclass(frozen=True)
class Pictures:
    """A packed dataset in a generator's place: images that somebody else has made, in an order that follows from a
    seed (as they were packed, the first ones could be all of one kind)."""

    table: SampleTable
    seed: int
    c_dim = 0

    @cached_property
    def order(self) -> list[int]:
        return torch.randperm(len(self.table), generator=generator(self.seed, "metric-pictures")).tolist()


class Evaluator:
    """Measures generators by some protocols against one resolution of a dataset; the real side is computed once.

    Args:
        index, resolution: the dataset.
        protocols: what to measure.
        tools: with what.
        only_class: against, and of, this class alone.
        networks: feature networks that are already loaded.

    Attributes:
        missing: metric -> why it could not be measured the last time, its network being missing.

    Raises (its methods):
        UsageError: on all ranks, where a dataset is too small for a protocol, or all their networks are missing.
    """

    def __init__(
        self,
        index: DatasetIndex,
        resolution: int,
        protocols: Sequence[Protocol],
        tools: Tools,
        only_class: int | None = None,
        networks: Networks | None = None,
    ):
        self.protocols, self.tools, self.resolution = list(protocols), tools, resolution
        self.size = index.size_at(resolution)
        self.networks = networks or Networks(tools)
        self.real = RealSide(index, resolution, self.networks, only_class)
        self.missing: dict[str, str] = {}
        self._bad: list[Bad] = []  # among this rank's Pictures

    def __call__(self, G: Any, **how: Any) -> dict[str, float]:
        """{metric: value} of G, on all ranks; `how` goes to its synthesis (alpha). A collective call."""
        protocols = list({p.name: p for p in self.protocols}.values())
        for p in protocols:
            self._check(p, G)
        values: dict[str, float] = {}
        # Without TF32, whatever the training does: numbers and cached statistics are those of float32.
        with held([torch.backends.cudnn, torch.backends.cuda.matmul], "allow_tf32", False):
            able, self._bad = self._able(protocols), []
            for psi, group in groupby(sorted(able, key=lambda p: p.psi), key=lambda p: p.psi):
                some = list(group)
                with dist.together():
                    fakes = self._generate(G, [p for p in some if p.kind != "ppl2"], psi, how)
                    fakes |= {p.name: self._paths(G, p, how) for p in some if p.kind == "ppl2"}
                for p in some:
                    parts, real = dist.gather_on_main(fakes.pop(p.name)), self.real.of(p)
                    with dist.main_decides() as box:
                        if parts is not None:
                            box.append(self._number(p, real, gather.merge(parts)))
                    values |= box[0]
        if isinstance(G, Pictures):
            told = dist.gather_on_main({one.ordinal for one in self._bad})
            if bad := set().union(*told or ()):
                tell_bad(bad, "measured")
        return values

    def _check(self, p: Protocol, G: Any) -> None:
        self.real.check(p)
        if isinstance(G, Pictures) and self._images(p) > len(G.table):
            raise UsageError(f"{p.name} needs {self._images(p)} images, there are {len(G.table)}: use a smaller count")
        if p.kind == "ppl2" and not hasattr(G, "styles"):
            raise UsageError(f"{p.name} needs a generator with a latent space w")
        least = LEAST_SIDE.get(p.kind, 1)
        if min(self.size) < least:
            height, width = self.size
            raise UsageError(f"{p.name} needs images of {least} pixels or more on each side, not {height}x{width}")

    def _able(self, protocols: list[Protocol]) -> list[Protocol]:
        """Those whose networks are there, on all ranks: the others must not cost these their images."""
        faults: dict[str, str] = {}
        for p in protocols:
            if p.kind in NETWORK:
                try:
                    self.networks.of(p.kind)
                except Exception as error:  # one rank's alone, perhaps: all must leave the metric out
                    faults[p.name] = str(error)
        self.missing = {name: why for told in dist.gather_objects(faults) for name, why in told.items()}
        if protocols and len(self.missing) == len(protocols):
            raise UsageError("; ".join(dict.fromkeys(self.missing.values())))
        return [p for p in protocols if p.name not in self.missing]

    # ------------------------------------------------------------------------------------------ generated images

    def _images(self, p: Protocol) -> int:
        """How many to generate; more than real ones would not count in a sliced distance."""
        return {"ms_ssim": 2 * p.count, "swd": min(p.count, len(self.real.mine))}.get(p.kind, p.count)

    def _generate(self, G: Any, protocols: list[Protocol], psi: float, how: dict[str, Any]) -> dict[str, Any]:
        """What this rank's share of images gives, for every metric from the same ones."""
        channels = self.real.table.channels
        fakes = {p.name: gather.gatherer(p, self.size, channels, self.tools.seed, "fake") for p in protocols}
        wanted = {p.name: self._images(p) for p in protocols}
        total = max(wanted.values(), default=0)
        batch = -(-self.tools.batch // 2) * 2  # even: similarity is of neighbours
        for block in gather.share(total):
            first = block * gather.BLOCK
            if isinstance(G, Pictures):
                made = read_batch(G.table, G.order[first : min(first + gather.BLOCK, total)], self._bad).split(batch)
            else:
                z, c = self._latents(G, "metric-z", block, total)
                made = images_of(G, z, c, batch=batch, psi=psi, **how)
            for images in made:
                known: dict[str, Any] = {}
                for p in sorted(protocols, key=lambda p: -wanted[p.name]):
                    if first < wanted[p.name]:
                        some = images[: wanted[p.name] - first]
                        gather.take_in(p, fakes[p.name], first, some, self.networks, known)
                first += len(images)
        return fakes

    def _latents(self, G: Any, purpose: str, block: int, total: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """z and c of the images of a block; labels are drawn as often as the dataset has them."""
        size, real = gather.BLOCK, self.real
        numbers = np.arange(block * size, min((block + 1) * size, total))
        z = torch.randn([size, G.z_dim], generator=generator(self.tools.seed, purpose, block))[: len(numbers)]
        if not G.c_dim:
            return z, None
        order = torch.randperm(len(real.mine), generator=generator(self.tools.seed, "metric-labels")).numpy()
        return z, one_hot(real.table.label[real.mine[order[numbers % len(order)]]], G.c_dim)

    def _paths(self, G: Any, p: Protocol, how: dict[str, Any]) -> Rows:
        distance, lengths = self.networks.of("ppl2"), Rows()
        given = {"alpha": getattr(G, "description", {}).get("alpha", 1.0), **how, "space": p.space, "psi": p.psi}
        for block in gather.share(p.count):
            ends = [self._latents(G, f"metric-path-{i}", block, p.count) for i in range(2)]
            z, c, n = torch.stack([z for z, _ in ends]), ends[0][1], len(ends[0][0])
            t = torch.zeros(n)
            if p.where == "full":
                t = torch.rand([gather.BLOCK], generator=generator(self.tools.seed, "metric-path-t", block))[:n]
            for i in range(0, n, self.tools.batch):
                part = slice(i, i + self.tools.batch)
                condition = None if c is None else c[part]
                found = path_lengths(G, distance, z[:, part], t[part], condition, **given)
                lengths.add(block * gather.BLOCK + i, found)
        return lengths

    # ---------------------------------------------------------------------------------------------- the numbers

    def _number(self, p: Protocol, real: Any, fake: Any) -> dict[str, float]:
        if p.kind == "swd":
            found = sliced_wasserstein(real, fake.descriptors(), seed=self.tools.seed)
            return {p.name + name.removeprefix("swd"): value for name, value in found.items()}
        if p.kind == "ms_ssim":
            return {p.name: float(fake.all().double().mean())}
        name, mark = p.name, self.networks.of(p.kind).mark
        if p.kind == "ppl2":
            return {name + mark: middle_mean(fake.all())}
        if p.kind == "fid":
            return {name + mark: frechet_distance(real.moments(), fake.moments())}
        if p.kind == "pr":
            device = self.tools.device  # all distances between two large sets
            precision, recall = precision_recall(real.all().to(device), fake.all().to(device))
            return {f"{name}_precision{mark}": precision, f"{name}_recall{mark}": recall}
        mean, deviation = kernel_distance(real.all(), fake.all()) if p.kind == "kid" else fake.score()
        return {name + mark: mean, f"{name}_std{mark}": deviation}


def better(kind: str, new: float, old: Sequence[float]) -> bool:
    """Whether a new value of a kind of metric is better than all the old ones; what is no number never counts."""
    sign = -1 if kind in ("is", "pr") else 1
    return math.isfinite(new) and all(sign * new < sign * value for value in old if math.isfinite(value))
