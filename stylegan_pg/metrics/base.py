"""What a metric is: a class that says which names it has, what it looks at, and how it becomes numbers.

Each family of metrics is one module with one class: an ImageMetric, which looks at images or at a network's features of
them, or a GeneratorMetric, which asks the generator itself for what it needs. `registry.METRICS` lists the classes, and
everything else here treats all of them alike. An instance is one metric under one name, such as fid50k_full.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from stylegan_pg.errors import UsageError
from stylegan_pg.metrics.accumulators import Accumulator, Rows

BLOCK = 64  # images, or other samples, whose contents follow from (seed, number of the block)
COUNT = r"[1-9]\d*k?"  # a number of images in a metric's name
Latents = tuple[torch.Tensor, torch.Tensor | None]  # z [n, z_dim], and labels [n, c_dim] where there are classes


@dataclass(frozen=True)
class Tools:
    """The settings of a measurement.

    Attributes:
        device: The device of the networks. Images and statistics stay on the CPU.
        weights: Files with weights of the feature networks, which are recognised by their contents.
        extractor: "pixels" or "package.module:function", which replaces Inception and VGG16; empty for those two.
        precision: "fp32" or "bf16", the number format of the feature networks.
        batch: The number of images in one call of a network.
        seed: The seed of the latents, and of the choice of real images where not all are taken.
        cache: Whether statistics of real images are kept on disk.
    """

    device: torch.device
    weights: tuple[str, ...] = ()
    extractor: str = ""
    precision: str = "fp32"
    batch: int = 32
    seed: int = 0
    cache: bool = True


@dataclass(frozen=True)
class ImageSet:
    """The images that one accumulator takes in.

    Attributes:
        side: "real" or "fake" (generated).
        size: (height, width) in pixels.
        channels: 1, 3 or 4; images of 4 are laid over white before they are looked at.
        seed: The seed of whatever an accumulator chooses at random.
    """

    side: str
    size: tuple[int, int]
    channels: int
    seed: int


@dataclass(frozen=True)
class Metric(ABC):
    """One metric under one name.

    Class attributes, which a family of metrics sets:
        kind: The name of the family, with which the names of its metrics begin.
        pattern: A regular expression of the metrics' names without _psi. The group `count` must exist and is the number
            of samples; `parts` reads the other groups.
        example: One such name, for messages.
        default_count: The number of samples for names that give none.
        counted_by_option: Whether --images and metrics.images set that number.
        network: "inception" or "vgg16" for a metric of features, "lpips" for a distance of images, "" for no network.
        lower_is_better: Whether the generator with the lower value is the better one.
        headline: The end of the name of the value by which snapshots are compared.
        least_side: The least height and width of images, in pixels.

    Attributes:
        name: The full name, under which results are reported.
        count: The number of generated samples: images, pairs of images, or paths.
        full: Whether all real images count, rather than `count` of them.
        mirror: Whether mirrored copies of the real images count as well.
        psi: The truncation (Karras et al. 2019, appendix B), 1 for none.
    """

    kind: ClassVar[str]
    pattern: ClassVar[str]
    example: ClassVar[str]
    default_count: ClassVar[int] = 0
    counted_by_option: ClassVar[bool] = False
    network: ClassVar[str] = ""
    lower_is_better: ClassVar[bool] = True
    headline: ClassVar[str] = ""
    least_side: ClassVar[int] = 1

    name: str
    count: int
    full: bool = False
    mirror: bool = False
    psi: float = 1.0

    @classmethod
    def parts(cls, groups: Mapping[str, str | None]) -> dict[str, Any]:
        """Return the attributes that the groups of `pattern`, apart from `count`, stand for; a group is None where the
        name lacks it."""
        return {key: bool(groups[key]) for key in ("full", "mirror") if key in groups}

    def samples(self, real_images: int) -> int:
        """Return how many samples count if the dataset has so many images."""
        return self.count

    def images(self, real_images: int) -> int:
        """Return how many images must be generated if the dataset has so many."""
        return self.samples(real_images)

    def check_size(self, size: tuple[int, int]) -> None:
        """Check the size of the images, (height, width) in pixels.

        Raises:
            UsageError: if they are too small for this metric.
        """
        least = self.least_side
        if min(size) < least:
            raise UsageError(
                f"{self.name} needs images of {least} pixels or more on each side, not {size[0]}x{size[1]}"
            )

    def check_count(self, images: int, whose: str) -> None:  # noqa: B027, any number does for most metrics
        """Check the number of real images; `whose` is "the dataset" or "the class", for the message.

        Raises:
            UsageError: if there are too few for this metric.
        """

    def check_generator(self, G: Any) -> None:  # noqa: B027, any generator makes images
        """Check that the generator has the methods that the metric calls.

        Raises:
            UsageError: if it lacks one.
        """

    @abstractmethod
    def compute(self, real: Any, generated: Any, tools: Tools) -> dict[str, float]:
        """Return {end of a value's name: value}, where the end "" stands for the metric's own name.

        Args:
            real, generated: The results of the two sides' accumulators. `real` is None if the metric does not compare.
            tools: Large computations can run on `tools.device`; random choices must follow from `tools.seed`.
        """


@dataclass(frozen=True)
class ImageMetric(Metric):
    """A metric of generated images or of their features. All metrics of one measurement look at the same images.

    Class attributes:
        feature: The name of the network's output that the metric looks at; a user's extractor gives "pool" for any.
        compares: Whether the real images are looked at as well.
        accumulates: The class of the accumulators. Their statistics of real images are shared by all metrics that
            accumulate the same features in the same way, and kept on disk if the class is `lasting`. The statistics of
            a metric with its own `observe` are shared with no other kind and never kept on disk, because that code can
            change between runs.
    """

    feature: ClassVar[str] = "pool"
    compares: ClassVar[bool] = False
    accumulates: ClassVar[type[Accumulator]] = Rows

    def accumulator(self, images: ImageSet) -> Accumulator:
        """Return a new accumulator for one side of the comparison."""
        return self.accumulates()

    def observe(self, seen: torch.Tensor) -> torch.Tensor:
        """Return what the accumulator takes in.

        Args:
            seen: float32 features [n, d] where the metric has a network, otherwise uint8 images [n, C, H, W]. Batches
                of generated images start at even numbers and are even, so that a metric of pairs can take neighbours.
        """
        return seen


@dataclass(frozen=True)
class FeatureMetric(ImageMetric):
    """A comparison of a network's features of real and generated images: NAME50k, NAME50k_full, NAME50k_full_mirror.

    Class attributes:
        REAL_IMAGES: The regular expression of the end of such names.
        least_images: The least number of images on each side.
    """

    REAL_IMAGES: ClassVar[str] = r"(?P<full>_full)?(?P<mirror>_mirror)?"
    compares: ClassVar[bool] = True
    least_images: ClassVar[int] = 0

    def check_count(self, images: int, whose: str) -> None:
        there = images * (1 + self.mirror)
        if not self.full and self.count > there:
            advice = f"use {self.kind}..._full, or a smaller count"
            raise UsageError(f"{self.name} needs {self.count} real images, {whose} has {there}: {advice}")
        least = self.least_images
        if min(there, self.count) < least:
            raise UsageError(
                f"{self.name} needs at least {least} images of each kind, {whose} has {there}: leave it away"
            )


@dataclass(frozen=True)
class GeneratorMetric(Metric):
    """A metric that calls the generator itself, block by block, and does not look at real images."""

    @abstractmethod
    def probe(
        self, G: Any, network: Any, draw: Callable[[str], Latents], block: int, tools: Tools, how: Mapping[str, Any]
    ) -> Iterator[torch.Tensor]:
        """Yield values [n] of one block's samples, in order and in batches of any size.

        Args:
            network: The loaded network, or None if the metric has none.
            draw: A function from a purpose, any text, to latents and labels of the block's samples. They follow from
                the purpose, the block and the seed.
            block: The number of the block, for whatever else is drawn at random.
            how: Further arguments of the generator's synthesis (alpha).
        """
