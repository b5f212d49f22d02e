"""Base classes of metrics. A metric class defines the names it accepts, the data it reads, and how values are computed.

Each family of metrics is one class in a module of its own. An ImageMetric reads images, or the features that a network
computes from them; a GeneratorMetric calls the generator itself. `registry.METRICS` lists the classes, and the rest of
this package treats all of them alike. An instance is one metric under one name, such as fid50k_full.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from stylegan_pg.errors import UsageError
from stylegan_pg.metrics.accumulators import Accumulator, Rows

BLOCK = 64  # images (or other samples) per block; a block is a function of (seed, block number)
COUNT = r"[1-9]\d*k?"  # regular expression of a number of images in a metric's name
Latents = tuple[torch.Tensor, torch.Tensor | None]  # z [n, z_dim] and labels [n, c_dim]; no labels without classes


@dataclass(frozen=True)
class Settings:
    """The settings of a measurement.

    Attributes:
        device: The device of the networks. Images and statistics stay on the CPU.
        weights: Files with weights of the feature networks. Which network a file belongs to is recognised by the
            tensors in it.
        extractor: "pixels" or "package.module:function", a feature extractor that replaces Inception and VGG16. If
            empty, these two are used.
        precision: "fp32" or "bf16", the number format of the feature networks.
        batch: The number of images in one call of a network.
        seed: The seed of the latents, and of the random choice of real images if not all of them are used.
        cache: Whether statistics of real images are cached on disk.
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
    """A description of the images that one accumulator receives.

    Attributes:
        side: "real" or "fake" (generated).
        size: (height, width) in pixels.
        channels: 1, 3 or 4. RGBA images are composited over white before a metric sees them.
        seed: The seed of an accumulator's random choices.
    """

    side: str
    size: tuple[int, int]
    channels: int
    seed: int


@dataclass(frozen=True)
class Metric(ABC):
    """One metric under one name.

    Class attributes, which each family of metrics sets:
        kind: The name of the family. The names of its metrics begin with it.
        pattern: A regular expression that matches the metrics' names without their _psi suffix. It must have a group
            `count`, the number of samples; `fields_from_name` interprets the other groups.
        example: One matching name, for messages.
        default_count: The number of samples if the name contains none.
        counted_by_option: Whether --images and metrics.images set the number of samples if the name contains none.
        network: "inception" or "vgg16" for a metric of features, "lpips" for a distance of images, "" for no network.
        lower_is_better: Whether a lower value is better.
        ranked_value: The suffix of the value by which snapshots are ranked, for a metric with several values.
        min_side: The smallest supported height and width of images, in pixels.

    Attributes:
        name: The full name, under which results are reported.
        count: The number of generated samples: images, pairs of images, or paths.
        full: Whether all real images are used, rather than `count` of them.
        mirror: Whether mirrored copies of the real images are used as well.
        psi: The truncation (Karras et al. 2019, appendix B); 1 means none.
    """

    kind: ClassVar[str]
    pattern: ClassVar[str]
    example: ClassVar[str]
    default_count: ClassVar[int] = 0
    counted_by_option: ClassVar[bool] = False
    network: ClassVar[str] = ""
    lower_is_better: ClassVar[bool] = True
    ranked_value: ClassVar[str] = ""
    min_side: ClassVar[int] = 1

    name: str
    count: int
    full: bool = False
    mirror: bool = False
    psi: float = 1.0

    @classmethod
    def fields_from_name(cls, groups: Mapping[str, str | None]) -> dict[str, Any]:
        """Convert the groups of `pattern`, except `count`, to {attribute: value}.

        Args:
            groups: The matched text of each group; None for an optional group that the name does not contain.
        """
        return {key: bool(groups[key]) for key in ("full", "mirror") if key in groups}

    def samples(self, real_images: int) -> int:
        """Return the number of generated samples that are used, given the number of real images."""
        return self.count

    def images(self, real_images: int) -> int:
        """Return the number of images that must be generated, given the number of real images."""
        return self.samples(real_images)

    def check_size(self, size: tuple[int, int]) -> None:
        """Check that images of `size`, (height, width) in pixels, are large enough.

        Raises:
            UsageError: if they are too small for this metric.
        """
        least = self.min_side
        if min(size) < least:
            raise UsageError(
                f"{self.name} needs images of {least} pixels or more on each side, not {size[0]}x{size[1]}"
            )

    def check_count(self, images: int, source: str) -> None:  # noqa: B027 - optional to override
        """Check the number of real images.

        Args:
            images: The number of real images.
            source: "the dataset" or "the class", the subject of the error message.

        Raises:
            UsageError: if there are too few for this metric.
        """

    def check_generator(self, G: Any) -> None:  # noqa: B027 - optional to override
        """Check that the generator G has the methods that the metric calls.

        Raises:
            UsageError: if a method is missing.
        """

    @abstractmethod
    def compute(self, real: Any, generated: Any, settings: Settings) -> dict[str, float]:
        """Compute the metric's values on rank 0.

        Args:
            real, generated: The results of the accumulators of real and of generated images. `real` is None if the
                metric does not use real images.
            settings: Large computations can run on `settings.device`; random choices must be seeded by `settings.seed`.

        Returns:
            {suffix: value}. A value is reported under the metric's name followed by its suffix, which may be empty.
        """


@dataclass(frozen=True)
class ImageMetric(Metric):
    """A metric of generated images or of their features. All metrics of one measurement use the same images.

    Class attributes:
        feature: The name of the network's output that the metric uses. If a user's extractor replaces the network, its
            output "pool" is used for every metric.
        uses_real_images: Whether the metric also uses real images.
        accumulator_class: The class of the accumulators. All metrics that accumulate the same features with the same
            class share the statistics of real images, which are cached on disk if the class is `cacheable`. The
            statistics of a metric that overrides `observe` are not shared with other families and never cached on
            disk, because the code of `observe` may change between runs.
    """

    feature: ClassVar[str] = "pool"
    uses_real_images: ClassVar[bool] = False
    accumulator_class: ClassVar[type[Accumulator]] = Rows

    def accumulator(self, images: ImageSet) -> Accumulator:
        """Return a new accumulator for the real or for the generated images."""
        return self.accumulator_class()

    def observe(self, seen: torch.Tensor) -> torch.Tensor:
        """Return the values [n, ...] that are passed to the accumulator.

        Args:
            seen: float32 features [n, d] if the metric has a network, otherwise uint8 images [n, C, H, W]. Batches of
                generated images start at an even image number and have an even size (except the last), so that a
                metric of pairs can pair each even image with the next one.
        """
        return seen


@dataclass(frozen=True)
class FeatureMetric(ImageMetric):
    """A comparison of the features of real and of generated images. Its names are NAME50k, NAME50k_full and
    NAME50k_full_mirror.

    Class attributes:
        REAL_IMAGES: A regular expression of the suffixes _full and _mirror.
        min_images: The smallest possible number of real and of generated images.
    """

    REAL_IMAGES: ClassVar[str] = r"(?P<full>_full)?(?P<mirror>_mirror)?"
    uses_real_images: ClassVar[bool] = True
    min_images: ClassVar[int] = 0

    def check_count(self, images: int, source: str) -> None:
        available = images * (1 + self.mirror)
        if not self.full and self.count > available:
            advice = f"use {self.kind}..._full, or a smaller count"
            raise UsageError(f"{self.name} needs {self.count} real images, {source} has {available}: {advice}")
        least = self.min_images
        if min(available, self.count) < least:
            raise UsageError(
                f"{self.name} needs at least {least} real and {least} generated images, {source} has {available}: "
                "remove this metric"
            )


@dataclass(frozen=True)
class GeneratorMetric(Metric):
    """A metric that calls the generator itself, block by block, and uses no real images."""

    @abstractmethod
    def probe(
        self,
        G: Any,
        network: Any,
        draw: Callable[[str], Latents],
        block: int,
        settings: Settings,
        synthesis_args: Mapping[str, Any],
    ) -> Iterator[torch.Tensor]:
        """Yield the values [n] of the samples of one block, in order and in batches of any size.

        Args:
            G: The generator.
            network: The loaded network, or None if the metric has none.
            draw: A function that returns latents and labels for the block's samples. Its argument is a purpose, which
                can be any text; the latents are a function of the purpose, the block and the seed.
            block: The number of the block, to seed further random numbers.
            settings: The settings of the measurement.
            synthesis_args: Further arguments of the generator's synthesis, such as alpha.
        """
