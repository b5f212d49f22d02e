"""A generator held against a dataset: features -> statistics -> numbers, dealt out over the ranks.

Images come in blocks whose contents follow from (seed, number), and rank r takes every world-th block; what is gathered
of them merges exactly. So results depend neither on the ranks nor on the batch size, and the training's own random
streams are never touched.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import torch

from stylegan_pg.data.classes import one_hot
from stylegan_pg.data.datasets.index import DatasetIndex
from stylegan_pg.data.datasets.table import SampleTable
from stylegan_pg.data.loader.loader import Bad, read_batch
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.errors import PeersLost, RunError, UsageError
from stylegan_pg.inference.generate import images_of
from stylegan_pg.metrics import gather
from stylegan_pg.metrics.gather import Networks, Rows, Tools
from stylegan_pg.metrics.path_length import held, middle_mean, path_lengths
from stylegan_pg.metrics.protocol import LEAST_SIDE, NETWORK, Protocol
from stylegan_pg.metrics.real import RealSide, tell_bad
from stylegan_pg.metrics.statistics import frechet_distance, kernel_distance, precision_recall
from stylegan_pg.metrics.swd import sliced_wasserstein
from stylegan_pg.rng import generator

MOST_REASONS = 50  # in one message


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
        missing: protocol's name -> why it could not be measured the last time, a UsageError or RunError.
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
        self.missing: dict[str, UsageError | RunError] = {}
        self._bad: list[Bad] = []  # among this rank's Pictures

    def __call__(self, G: Any, **how: Any) -> dict[str, float]:
        """{metric: value} of G, on all ranks; `how` goes to its synthesis (alpha). A collective call.

        Raises:
            UsageError, RunError: on all ranks, where none of the metrics could be measured; also what `measure` raises.
        """
        values = self.measure(G, **how)
        if self.missing and not values:
            raise all_of(self.missing)
        return {name: value for found in values.values() for name, value in found.items()}

    def measure(self, G: Any, **how: Any) -> dict[str, dict[str, float]]:
        """{protocol's name: {metric: value}} of those that could be measured; `missing` says why others could not.

        Raises:
            OSError: on all ranks, where data is lost midway.
        """
        protocols, self.missing = list({p.name: p for p in self.protocols}.values()), {}
        for p in protocols:
            with self._costs(p.name):
                self._check(p, G)
        values: dict[str, dict[str, float]] = {}
        # Without TF32, whatever the training does: numbers and cached statistics are those of float32.
        with held([torch.backends.cudnn, torch.backends.cuda.matmul], "allow_tf32", False):
            able, self._bad = self._able([p for p in protocols if p.name not in self.missing]), []
            for psi, group in groupby(sorted(able, key=lambda p: p.psi), key=lambda p: p.psi):
                values |= self._of_one_psi(G, list(group), psi, how)
        if isinstance(G, Pictures):
            told = dist.gather_on_main({one.ordinal for one in self._bad})
            if bad := set().union(*told or ()):
                tell_bad(bad, "measured")
        return {p.name: values[p.name] for p in protocols if p.name in values}

    def _of_one_psi(
        self, G: Any, group: list[Protocol], psi: float, how: dict[str, Any]
    ) -> dict[str, dict[str, float]]:
        fakes, plain = {}, [p for p in group if p.kind != "ppl2"]
        if plain:
            with self._costs(*(p.name for p in plain)):
                with dist.together():
                    fakes, faults = self._generate(G, plain, psi, how)
                self._take_faults(faults)
        for p in group:
            if p.kind == "ppl2":
                with self._costs(p.name), dist.together():
                    fakes[p.name] = self._paths(G, p, how)
        values: dict[str, dict[str, float]] = {}
        for p in group:
            if p.name in self.missing:
                continue
            with self._costs(p.name):
                parts, real = dist.gather_on_main(fakes.pop(p.name)), self.real.of(p)
                with dist.main_decides() as box:
                    if parts is not None:
                        box.append(_finite(p, self._number(p, real, gather.merge(parts))))
                values[p.name] = box[0]
        return values

    @contextlib.contextmanager
    def _costs(self, *names: str) -> Iterator[None]:
        """A fault within, which all ranks raise, costs these metrics; but data that a rank has lost ends everything."""
        fault = None
        try:
            yield
        except PeersLost:
            raise
        except Exception as error:  # also what a user's extractor raises, and want of memory
            fault = error
        if fault is None:
            return
        if any(dist.gather_objects(isinstance(fault, OSError))):
            raise fault
        self.missing |= {name: _as_ours(fault) for name in names}

    def _take_faults(self, mine: dict[str, Exception]) -> None:
        """What cost metrics on some rank costs them on all."""
        told = dist.gather_objects({name: _as_ours(error) for name, error in mine.items()})
        for i, faults in enumerate(told):
            for name, fault in faults.items():
                where = f"rank {i}: " if i != dist.rank() else ""
                self.missing.setdefault(name, type(fault)(f"{where}{fault}"))

    def _check(self, p: Protocol, G: Any) -> None:
        self.real.check(p)
        if isinstance(G, Pictures) and self._images(p) > len(G.table):
            raise UsageError(f"{p.name} needs {self._images(p)} images, there are {len(G.table)}: use a smaller count")
        if p.kind == "ppl2" and not hasattr(G, "styles"):
            raise UsageError(f"{p.name} needs a generator with a latent space w")
        check_size(p, self.size)

    def _able(self, protocols: list[Protocol]) -> list[Protocol]:
        """Those whose networks are there, on all ranks: the others must not cost these their images."""
        faults: dict[str, Exception] = {}
        for p in protocols:
            if p.kind in NETWORK:
                try:
                    self.networks.of(p.kind)
                except Exception as error:  # one rank's alone, perhaps: all must leave the metric out
                    faults[p.name] = error
        self._take_faults(faults)
        return [p for p in protocols if p.name not in self.missing]

    # ------------------------------------------------------------------------------------------ generated images

    def _images(self, p: Protocol) -> int:
        """How many to generate; more than real ones would not count in a sliced distance."""
        return {"ms_ssim": 2 * p.count, "swd": min(p.count, len(self.real.mine))}.get(p.kind, p.count)

    def _generate(
        self, G: Any, protocols: list[Protocol], psi: float, how: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Exception]]:
        """What this rank's share of images gives, for every metric from the same ones; and what went wrong with one."""
        channels, faults = self.real.table.channels, {}
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
                    if first < wanted[p.name] and p.name not in faults:
                        some = images[: wanted[p.name] - first]
                        try:
                            gather.take_in(p, fakes[p.name], first, some, self.networks, known)
                        except Exception as error:  # whatever it is, the others can do without this one
                            faults[p.name] = error
                first += len(images)
        return fakes, faults

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


def check_size(p: Protocol, size: tuple[int, int]) -> None:
    """
    Raises:
        UsageError: where images of this size (height, width) are too small for a metric.
    """
    least = LEAST_SIDE.get(p.kind, 1)
    if min(size) < least:
        raise UsageError(f"{p.name} needs images of {least} pixels or more on each side, not {size[0]}x{size[1]}")


def reasons(missing: Mapping[str, Exception]) -> list[str]:
    """Why some metrics are missing, each reason once, with the names of those it holds for."""
    found: dict[str, list[str]] = {}
    for name, why in missing.items():
        text = " ".join(str(why).split()) or type(why).__name__
        where, _, metric = name.rpartition(": ")
        if text.startswith(metric):  # which names it itself
            found.setdefault(f"{where}: {text}" if where else text, [])
        else:
            found.setdefault(text, []).append(name)
    return [f"{', '.join(names)}: {text}" if names else text for text, names in found.items()]


def all_of(missing: Mapping[str, Exception]) -> Exception:
    """Why some metrics are missing, in one message: a RunError if any of them failed for an outside reason."""
    texts = reasons(missing)
    more = f"; and {len(texts) - MOST_REASONS} more" if len(texts) > MOST_REASONS else ""
    outside = any(isinstance(fault, RunError) for fault in missing.values())
    return (RunError if outside else UsageError)("; ".join(texts[:MOST_REASONS]) + more)


def _as_ours(error: Exception) -> UsageError | RunError:
    if isinstance(error, UsageError | RunError):
        return error
    return RunError(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def _finite(p: Protocol, found: dict[str, float]) -> dict[str, float]:
    for value in found.values():
        if not math.isfinite(value):
            raise RunError(f"{p.name} comes to {value}, which is no number to compare: its features are degenerate")
    return found


def better(kind: str, new: float, old: Sequence[float]) -> bool:
    """Whether a new value of a kind of metric is better than all the old ones; what is no number never counts."""
    sign = -1 if kind in ("is", "pr") else 1
    return math.isfinite(new) and all(sign * new < sign * value for value in old if math.isfinite(value))
