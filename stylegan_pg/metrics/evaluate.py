"""The comparison of a generator with a dataset: features are accumulated on all ranks, and numbers computed on rank 0.

Images come in blocks whose contents follow from the seed and the number of the block. Rank r takes every world-th
block, and accumulators merge exactly. So results depend neither on the number of ranks nor on the batch size, and the
random streams of training are never touched.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import Any

import numpy as np
import torch

from stylegan_pg.data.conditions import Conditions, conditions_for
from stylegan_pg.data.datasets.index import DatasetIndex
from stylegan_pg.data.datasets.table import SampleTable
from stylegan_pg.data.loader.reading import Bad, read_batch
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.errors import PeersLost, RunError, UsageError
from stylegan_pg.inference.generate import images_of
from stylegan_pg.metrics import base, gather
from stylegan_pg.metrics.accumulators import Accumulator, Rows
from stylegan_pg.metrics.base import GeneratorMetric, ImageMetric, ImageSet, Latents, Metric, Tools
from stylegan_pg.metrics.gather import Networks
from stylegan_pg.metrics.path_length import held
from stylegan_pg.metrics.real import RealSide, tell_bad
from stylegan_pg.rng import generator

MOST_REASONS = 50  # in one message


@dataclass(frozen=True)
class Pictures:
    """A packed dataset in place of a generator: images that another program has made. Their order follows from a seed,
    because the first ones in the order of packing could be all of one kind."""

    table: SampleTable
    seed: int
    c_dim = 0

    @cached_property
    def order(self) -> list[int]:
        return torch.randperm(len(self.table), generator=generator(self.seed, "metric-pictures")).tolist()


class Evaluator:
    """Measures generators by some metrics against one resolution of a dataset. The real side is computed once.

    Args:
        index, resolution: The dataset.
        metrics: What to measure; can be changed between measurements.
        tools: The settings of the measurement.
        only_class: The class to which real and generated images are restricted, None for all.
        networks: Feature networks that may be loaded already.
        condition: The field that conditions are taken from (data.condition), "" for what the generator's description or
            the dataset suggests.

    Attributes:
        missing: {metric's name: why it could not be measured the last time}, a UsageError or RunError.
    """

    def __init__(
        self,
        index: DatasetIndex,
        resolution: int,
        metrics: Sequence[Metric],
        tools: Tools,
        only_class: int | None = None,
        networks: Networks | None = None,
        condition: str = "",
    ):
        self.metrics, self.tools, self.resolution = list(metrics), tools, resolution
        self.size, self.index, self.condition = index.size_at(resolution), index, condition
        self.networks = networks or Networks(tools)
        self.real = RealSide(index, resolution, self.networks, only_class)
        self.missing: dict[str, UsageError | RunError] = {}
        self._bad: list[Bad] = []  # among this rank's Pictures

    def __call__(self, G: Any, **how: Any) -> dict[str, float]:
        """Return {name: value} of the generator G, on all ranks, which must all call this.

        Args:
            how: Further arguments of its synthesis (alpha).

        Raises:
            UsageError, RunError: on all ranks, if none of the metrics could be measured.
            OSError: on all ranks, if data is lost midway.
        """
        values = self.measure(G, **how)
        if self.missing and not values:
            raise all_of(self.missing)
        return {name: value for found in values.values() for name, value in found.items()}

    def measure(self, G: Any, **how: Any) -> dict[str, dict[str, float]]:
        """Return {metric's name: {name: value}} of the metrics that could be measured; `missing` says why others could
        not. All ranks must call this.

        Raises:
            OSError: on all ranks, if data is lost midway.
        """
        metrics, self.missing = list({m.name: m for m in self.metrics}.values()), {}
        for metric in metrics:
            with self._costs(metric.name):
                self._check(metric, G)
        values: dict[str, dict[str, float]] = {}
        # Without TF32, whatever the training does: numbers and cached statistics are those of float32.
        with held([torch.backends.cudnn, torch.backends.cuda.matmul], "allow_tf32", False):
            able, self._bad = self._able([m for m in metrics if m.name not in self.missing]), []
            for psi, group in groupby(sorted(able, key=lambda m: m.psi), key=lambda m: m.psi):
                values |= self._of_one_psi(G, list(group), psi, how)
        if isinstance(G, Pictures):
            told = dist.gather_on_main({one.ordinal for one in self._bad})
            if bad := set().union(*told or ()):
                tell_bad(bad, "measured")
        return {m.name: values[m.name] for m in metrics if m.name in values}

    def _of_one_psi(self, G: Any, group: list[Metric], psi: float, how: dict[str, Any]) -> dict[str, dict[str, float]]:
        fakes: dict[str, Accumulator] = {}
        if plain := [m for m in group if isinstance(m, ImageMetric)]:
            with self._costs(*(m.name for m in plain)):
                with dist.together():
                    fakes, faults = self._generate(G, plain, psi, how)
                self._take_faults(faults)
        for metric in group:
            if isinstance(metric, GeneratorMetric):
                with self._costs(metric.name), dist.together():
                    fakes[metric.name] = self._probe(G, metric, how)
        values: dict[str, dict[str, float]] = {}
        for metric in group:
            if metric.name not in self.missing:
                with self._costs(metric.name):
                    values[metric.name] = self._compared(metric, fakes.pop(metric.name))
        return values

    def _compared(self, metric: Metric, fake: Accumulator) -> dict[str, float]:
        """Return {name: value}, on all ranks, given this rank's part of the generated side."""
        parts, real = dist.gather_on_main(fake), self.real.of(metric)
        with dist.main_decides() as box:
            if parts is not None:
                found = metric.compute(real, gather.merge(parts).result(), self.tools)
                mark = self.networks.of(metric.network).mark if metric.network else ""
                named = {f"{metric.name}{end}{mark}": value for end, value in found.items()}
                box.append(_finite(metric, named))
        return box[0]

    @contextlib.contextmanager
    def _costs(self, *names: str) -> Iterator[None]:
        """Record an error within the block, which all ranks raise, as the reason why these metrics are missing. An
        error of reading data ends the whole measurement."""
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
        """Record the errors of single metrics on any rank as reasons why they are missing on all ranks."""
        told = dist.gather_objects({name: _as_ours(error) for name, error in mine.items()})
        for i, faults in enumerate(told):
            for name, fault in faults.items():
                where = f"rank {i}: " if i != dist.rank() else ""
                self.missing.setdefault(name, type(fault)(f"{where}{fault}"))

    def _check(self, metric: Metric, G: Any) -> None:
        self.real.check(metric)
        if isinstance(G, Pictures) and (wanted := self._images(metric)) > len(G.table):
            raise UsageError(f"{metric.name} needs {wanted} images, there are {len(G.table)}: use a smaller count")
        metric.check_generator(G)
        metric.check_size(self.size)

    def _able(self, metrics: list[Metric]) -> list[Metric]:
        """Return the metrics whose networks can be loaded on all ranks, before any image is generated."""
        faults: dict[str, Exception] = {}
        for metric in metrics:
            if metric.network:
                try:
                    self.networks.of(metric.network)
                except Exception as error:  # one rank's alone, perhaps: all must leave the metric out
                    faults[metric.name] = error
        self._take_faults(faults)
        return [m for m in metrics if m.name not in self.missing]

    # ------------------------------------------------------------------------------------------ generated images

    def _images(self, metric: Metric) -> int:
        """Return how many images must be generated for a metric."""
        return metric.images(len(self.real.mine))

    def _generate(
        self, G: Any, metrics: list[ImageMetric], psi: float, how: dict[str, Any]
    ) -> tuple[dict[str, Accumulator], dict[str, Exception]]:
        """Return {metric's name: accumulator} of this rank's share of images, which are the same for all metrics, and
        {metric's name: error} of those that failed."""
        images = ImageSet("fake", self.size, self.real.table.channels, self.tools.seed)
        fakes, faults = {m.name: m.accumulator(images) for m in metrics}, {}
        wanted = {m.name: self._images(m) for m in metrics}
        largest = sorted(metrics, key=lambda m: -wanted[m.name])  # whose features serve the others
        total = max(wanted.values(), default=0)
        for first, made in self._made(G, total, psi, how):
            known: dict[str, Any] = {}
            for metric in largest:
                if first < wanted[metric.name] and metric.name not in faults:
                    some = made[: wanted[metric.name] - first]
                    try:
                        gather.take_in(metric, fakes[metric.name], first, some, self.networks, known)
                    except Exception as error:  # whatever it is, the others can do without this one
                        faults[metric.name] = error
        return fakes, faults

    def _made(self, G: Any, total: int, psi: float, how: dict[str, Any]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield this rank's share of so many images in batches: the number of the first one, and uint8 [n, C, H, W]."""
        batch = -(-self.tools.batch // 2) * 2  # even: similarity is of neighbours
        for block in gather.share(total):
            first = block * base.BLOCK
            if isinstance(G, Pictures):
                made = read_batch(G.table, G.order[first : min(first + base.BLOCK, total)], self._bad).split(batch)
            else:
                z, c = self._latents(G, "metric-z", block, total)
                made = images_of(G, z, c, batch=batch, psi=psi, **how)
            for images in made:
                yield first, images
                first += len(images)

    def _conditions(self, G: Any) -> Conditions:
        return conditions_for(self.index, self.real.table, G, self.condition)

    def _latents(self, G: Any, purpose: str, block: int, total: int) -> Latents:
        """Return latents and labels of the images of a block. Labels are as frequent as in the dataset."""
        size, real = base.BLOCK, self.real
        numbers = np.arange(block * size, min((block + 1) * size, total))
        z = torch.randn([size, G.z_dim], generator=generator(self.tools.seed, purpose, block))[: len(numbers)]
        if not G.c_dim:
            return z, None
        order = torch.randperm(len(real.mine), generator=generator(self.tools.seed, "metric-labels")).numpy()
        return z, self._conditions(G).at(real.mine[order[numbers % len(order)]])

    def _probe(self, G: Any, metric: GeneratorMetric, how: dict[str, Any]) -> Rows:
        """Return the accumulated values of this rank's share of a metric's samples."""
        network = self.networks.of(metric.network) if metric.network else None
        into = Rows()
        for block in gather.share(metric.count):
            first = block * base.BLOCK
            draw = partial(self._latents, G, block=block, total=metric.count)
            for values in metric.probe(G, network, draw, block, self.tools, how):
                into.add(values, first)
                first += len(values)
        return into


def reasons(missing: Mapping[str, Exception]) -> list[str]:
    """Return why some metrics are missing: each reason once, with the names of the metrics that it holds for."""
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
    """Return one error that says why metrics are missing. It is a RunError if any of the reasons is one."""
    texts = reasons(missing)
    more = f"; and {len(texts) - MOST_REASONS} more" if len(texts) > MOST_REASONS else ""
    outside = any(isinstance(fault, RunError) for fault in missing.values())
    return (RunError if outside else UsageError)("; ".join(texts[:MOST_REASONS]) + more)


def _as_ours(error: Exception) -> UsageError | RunError:
    """Return the error itself if it is one of the package's, otherwise a RunError that names its type."""
    if isinstance(error, UsageError | RunError):
        return error
    return RunError(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def _finite(metric: Metric, found: dict[str, float]) -> dict[str, float]:
    """Return the values.

    Raises:
        RunError: if one of them is not finite.
    """
    for value in found.values():
        if not math.isfinite(value):
            raise RunError(
                f"{metric.name} comes to {value}, which is no number to compare: its features are degenerate"
            )
    return found


def better(metric: Metric, new: float, old: Sequence[float]) -> bool:
    """Return whether a new value of a metric is finite and better than all finite old ones."""
    sign = 1 if metric.lower_is_better else -1
    return math.isfinite(new) and all(sign * new < sign * value for value in old if math.isfinite(value))
