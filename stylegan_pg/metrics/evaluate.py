"""The evaluation of a generator against a dataset: all ranks accumulate features, and rank 0 computes the values.

Images are generated in blocks. The content of a block is a function of the seed and the block number. Of W ranks,
rank r processes the blocks r, r + W, r + 2 W, ..., and accumulators merge exactly. Results therefore depend neither on
the number of ranks nor on the batch size. The random streams of training are not used.
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
from stylegan_pg.metrics.base import GeneratorMetric, ImageMetric, ImageSet, Latents, Metric, Settings
from stylegan_pg.metrics.gather import Networks
from stylegan_pg.metrics.path_length import temporarily_set
from stylegan_pg.metrics.real import RealSide, warn_damaged
from stylegan_pg.rng import generator

MAX_REASONS = 50  # reasons in one error message


@dataclass(frozen=True)
class DatasetAsGenerator:
    """A packed dataset of images from another program, which is measured in place of a generator.

    The images are used in a random order that is a function of `seed`, because the first images in the order of packing
    may all belong to one class.
    """

    table: SampleTable
    seed: int
    c_dim = 0

    @cached_property
    def order(self) -> list[int]:
        return torch.randperm(len(self.table), generator=generator(self.seed, "metric-pictures")).tolist()


class Evaluator:
    """Measures generators against one resolution of a dataset. Statistics of the real images are computed once.

    Args:
        index, resolution: The dataset and the resolution.
        metrics: The metrics to measure. The attribute can be changed between measurements.
        settings: The settings of the measurement.
        only_class: The class to which real and generated images are restricted; None for all classes.
        networks: Feature networks to share with other evaluators.
        condition: The field from which conditions are taken (data.condition), or "" for the field that the generator's
            description or the dataset suggests.

    Attributes:
        missing: {metric's name: error} of metrics that could not be measured the last time. An error is a UsageError or
            a RunError.
    """

    def __init__(
        self,
        index: DatasetIndex,
        resolution: int,
        metrics: Sequence[Metric],
        settings: Settings,
        only_class: int | None = None,
        networks: Networks | None = None,
        condition: str = "",
    ):
        self.metrics, self.settings, self.resolution = list(metrics), settings, resolution
        self.size, self.index, self.condition = index.size_at(resolution), index, condition
        self.networks = networks or Networks(settings)
        self.real = RealSide(index, resolution, self.networks, only_class)
        self.missing: dict[str, UsageError | RunError] = {}
        self._bad: list[Bad] = []  # damaged images of a DatasetAsGenerator that this rank has read

    def __call__(self, G: Any, **synthesis_args: Any) -> dict[str, float]:
        """Return {name: value} of the generator G on all ranks, which must all call this.

        Args:
            G: The generator, or a DatasetAsGenerator.
            synthesis_args: Further arguments of the generator's synthesis, such as alpha.

        Raises:
            UsageError, RunError: on all ranks, if none of the metrics could be measured.
            OSError: on all ranks, if data becomes unreadable during the measurement.
        """
        values = self.measure(G, **synthesis_args)
        if self.missing and not values:
            raise combined_error(self.missing)
        return {name: value for found in values.values() for name, value in found.items()}

    def measure(self, G: Any, **synthesis_args: Any) -> dict[str, dict[str, float]]:
        """Return {metric's name: {name: value}} of the metrics that could be measured. `missing` then contains the
        errors of the others. All ranks must call this.

        Raises:
            OSError: on all ranks, if data becomes unreadable during the measurement.
        """
        metrics, self.missing = list({m.name: m for m in self.metrics}.values()), {}
        for metric in metrics:
            with self._recording_failure(metric.name):
                self._check(metric, G)
        values: dict[str, dict[str, float]] = {}
        # TF32 is off even if training uses it, so that results and cached statistics are those of float32.
        with temporarily_set([torch.backends.cudnn, torch.backends.cuda.matmul], "allow_tf32", False):
            able, self._bad = self._with_loaded_networks([m for m in metrics if m.name not in self.missing]), []
            for psi, group in groupby(sorted(able, key=lambda m: m.psi), key=lambda m: m.psi):
                values |= self._measure_psi(G, list(group), psi, synthesis_args)
        if isinstance(G, DatasetAsGenerator):
            damaged = dist.gather_on_main({one.ordinal for one in self._bad})
            if bad := set().union(*damaged or ()):
                warn_damaged(bad, "measured")
        return {m.name: values[m.name] for m in metrics if m.name in values}

    def _measure_psi(
        self, G: Any, group: list[Metric], psi: float, synthesis_args: dict[str, Any]
    ) -> dict[str, dict[str, float]]:
        fakes: dict[str, Accumulator] = {}
        if plain := [m for m in group if isinstance(m, ImageMetric)]:
            with self._recording_failure(*(m.name for m in plain)):
                with dist.together():
                    fakes, faults = self._generate(G, plain, psi, synthesis_args)
                self._share_failures(faults)
        for metric in group:
            if isinstance(metric, GeneratorMetric):
                with self._recording_failure(metric.name), dist.together():
                    fakes[metric.name] = self._probe(G, metric, synthesis_args)
        values: dict[str, dict[str, float]] = {}
        for metric in group:
            if metric.name not in self.missing:
                with self._recording_failure(metric.name):
                    values[metric.name] = self._values_of(metric, fakes.pop(metric.name))
        return values

    def _values_of(self, metric: Metric, fake: Accumulator) -> dict[str, float]:
        """Return {name: value} on all ranks. `fake` is the accumulator of the images that this rank has generated."""
        parts, real = dist.gather_on_main(fake), self.real.result(metric)
        with dist.main_decides() as box:
            if parts is not None:
                found = metric.compute(real, gather.merge(parts).result(), self.settings)
                name_suffix = self.networks.get(metric.network).name_suffix if metric.network else ""
                named = {f"{metric.name}{end}{name_suffix}": value for end, value in found.items()}
                box.append(_require_finite(metric, named))
        return box[0]

    @contextlib.contextmanager
    def _recording_failure(self, *names: str) -> Iterator[None]:
        """Store an error within the block, which is raised on all ranks, as the reason why these metrics are missing.
        An OSError on any rank ends the whole measurement."""
        fault = None
        try:
            yield
        except PeersLost:
            raise
        except Exception as error:  # a user's extractor can raise anything; MemoryError is caught as well
            fault = error
        if fault is None:
            return
        if any(dist.gather_objects(isinstance(fault, OSError))):
            raise fault
        self.missing |= {name: _as_package_error(fault) for name in names}

    def _share_failures(self, mine: dict[str, Exception]) -> None:
        """Gather the errors {metric's name: error} of all ranks, and store them as reasons why metrics are missing."""
        gathered = dist.gather_objects({name: _as_package_error(error) for name, error in mine.items()})
        for i, faults in enumerate(gathered):
            for name, fault in faults.items():
                where = f"rank {i}: " if i != dist.rank() else ""
                self.missing.setdefault(name, type(fault)(f"{where}{fault}"))

    def _check(self, metric: Metric, G: Any) -> None:
        self.real.check(metric)
        if isinstance(G, DatasetAsGenerator) and (wanted := self._image_count(metric)) > len(G.table):
            raise UsageError(
                f"{metric.name} needs {wanted} images, the measured dataset has {len(G.table)}: use a smaller count"
            )
        metric.check_generator(G)
        metric.check_size(self.size)

    def _with_loaded_networks(self, metrics: list[Metric]) -> list[Metric]:
        """Load the networks of the metrics, and return the metrics whose networks could be loaded on all ranks. This
        happens before any image is generated."""
        faults: dict[str, Exception] = {}
        for metric in metrics:
            if metric.network:
                try:
                    self.networks.get(metric.network)
                except Exception as error:  # it may occur on one rank only, but all ranks must omit the metric
                    faults[metric.name] = error
        self._share_failures(faults)
        return [m for m in metrics if m.name not in self.missing]

    # ------------------------------------------------------------------------------------------ generated images

    def _image_count(self, metric: Metric) -> int:
        """Return the number of images that must be generated for a metric."""
        return metric.images(len(self.real.ordinals))

    def _generate(
        self, G: Any, metrics: list[ImageMetric], psi: float, synthesis_args: dict[str, Any]
    ) -> tuple[dict[str, Accumulator], dict[str, Exception]]:
        """Generate this rank's share of the images, which all metrics use. Return {metric's name: accumulator}, and
        {metric's name: error} of metrics that failed."""
        images = ImageSet("fake", self.size, self.real.table.channels, self.settings.seed)
        fakes, faults = {m.name: m.accumulator(images) for m in metrics}, {}
        wanted = {m.name: self._image_count(m) for m in metrics}
        largest_first = sorted(metrics, key=lambda m: -wanted[m.name])  # its features are reused by the other metrics
        total = max(wanted.values(), default=0)
        for first, made in self._generated_batches(G, total, psi, synthesis_args):
            known: dict[str, Any] = {}
            for metric in largest_first:
                if first < wanted[metric.name] and metric.name not in faults:
                    some = made[: wanted[metric.name] - first]
                    try:
                        gather.observe_images(metric, fakes[metric.name], first, some, self.networks, known)
                    except Exception as error:  # the other metrics are measured nevertheless
                        faults[metric.name] = error
        return fakes, faults

    def _generated_batches(
        self, G: Any, total: int, psi: float, synthesis_args: dict[str, Any]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield this rank's share of `total` images in batches: the number of the first image, and uint8
        [n, C, H, W]."""
        batch = -(-self.settings.batch // 2) * 2  # even, because metrics of pairs combine neighbouring images
        for block in gather.own_blocks(total):
            first = block * base.BLOCK
            if isinstance(G, DatasetAsGenerator):
                made = read_batch(G.table, G.order[first : min(first + base.BLOCK, total)], self._bad).split(batch)
            else:
                z, c = self._latents(G, "metric-z", block, total)
                made = images_of(G, z, c, batch=batch, psi=psi, **synthesis_args)
            for images in made:
                yield first, images
                first += len(images)

    def _conditions(self, G: Any) -> Conditions:
        return conditions_for(self.index, self.real.table, G, self.condition)

    def _latents(self, G: Any, purpose: str, block: int, total: int) -> Latents:
        """Return latents and labels of the images of a block. Labels have the same frequencies as in the dataset."""
        size, real = base.BLOCK, self.real
        numbers = np.arange(block * size, min((block + 1) * size, total))
        z = torch.randn([size, G.z_dim], generator=generator(self.settings.seed, purpose, block))[: len(numbers)]
        if not G.c_dim:
            return z, None
        order = torch.randperm(len(real.ordinals), generator=generator(self.settings.seed, "metric-labels")).numpy()
        return z, self._conditions(G).at(real.ordinals[order[numbers % len(order)]])

    def _probe(self, G: Any, metric: GeneratorMetric, synthesis_args: dict[str, Any]) -> Rows:
        """Accumulate the values of this rank's share of a metric's samples."""
        network = self.networks.get(metric.network) if metric.network else None
        accumulator = Rows()
        for block in gather.own_blocks(metric.count):
            first = block * base.BLOCK
            draw = partial(self._latents, G, block=block, total=metric.count)
            for values in metric.probe(G, network, draw, block, self.settings, synthesis_args):
                accumulator.add(values, first)
                first += len(values)
        return accumulator


def reasons(missing: Mapping[str, Exception]) -> list[str]:
    """Return the reasons why metrics are missing. Each reason is listed once, after the names of all its metrics."""
    found: dict[str, list[str]] = {}
    for name, why in missing.items():
        text = " ".join(str(why).split()) or type(why).__name__
        where, _, metric = name.rpartition(": ")
        if text.startswith(metric):  # the text already contains the metric's name
            found.setdefault(f"{where}: {text}" if where else text, [])
        else:
            found.setdefault(text, []).append(name)
    return [f"{', '.join(names)}: {text}" if names else text for text, names in found.items()]


def combined_error(missing: Mapping[str, Exception]) -> Exception:
    """Return one error that combines the reasons why metrics are missing. It is a RunError if any of them is one."""
    texts = reasons(missing)
    more = f"; and {len(texts) - MAX_REASONS} more" if len(texts) > MAX_REASONS else ""
    outside = any(isinstance(fault, RunError) for fault in missing.values())
    return (RunError if outside else UsageError)("; ".join(texts[:MAX_REASONS]) + more)


def _as_package_error(error: Exception) -> UsageError | RunError:
    """Return the error itself if it is a UsageError or RunError, otherwise a RunError that names the error's type."""
    if isinstance(error, UsageError | RunError):
        return error
    return RunError(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def _require_finite(metric: Metric, found: dict[str, float]) -> dict[str, float]:
    """Return `found` unchanged.

    Raises:
        RunError: if a value is not finite.
    """
    for value in found.values():
        if not math.isfinite(value):
            raise RunError(f"{metric.name} is {value}, not a finite number: the features of the images are degenerate")
    return found


def better(metric: Metric, new: float, old: Sequence[float]) -> bool:
    """Return whether the new value of a metric is finite and better than all finite old values."""
    sign = 1 if metric.lower_is_better else -1
    return math.isfinite(new) and all(sign * new < sign * value for value in old if math.isfinite(value))
