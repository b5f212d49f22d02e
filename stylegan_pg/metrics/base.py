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
    """With what is measured.

    Attributes:
        device: where networks run; images and statistics are on the CPU.
        weights: files for the feature networks, recognised by what is in them.
        extractor: instead of Inception and VGG16, pixels or "package.module:function"; empty for those.
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
class ImageSet:
    """The images that one accumulator takes in.

    Attributes:
        side: "real" or "fake".
        size: (height, width) in pixels.
        channels: of the images before those with alpha are laid over white: 1, 3 or 4.
        seed: for whatever an accumulator chooses at random.
    """

    side: str
    size: tuple[int, int]
    channels: int
    seed: int


@dataclass(frozen=True)
class Metric(ABC):
    """One metric under one name.

    Class attributes, which a family of metrics sets:
        kind: the family, which its names begin with.
        pattern: regular expression of its names, without _psi. The group `count` is the number of images; `parts` reads
            the other groups.
        example: a name, for messages.
        default_count: of names without a number.
        counted_by_option: whether --images and metrics.images say the number where the name does not.
        network: "inception" or "vgg16", whose features are looked at, or "lpips", a distance of images; "" for none.
        lower_is_better: how values of different generators compare.
        headline: end of the name of the value that decides which snapshot is the best.
        least_side: pixels that images need at least on each side.

    Attributes:
        name: in full, what results are reported under.
        count: how many samples are generated: images, or pairs of them, or paths.
        full: whether the whole real set counts, rather than `count` images of it.
        mirror: whether the real images' mirrored copies count, too.
        psi: truncation, 1 for none.
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
        """The attributes that the groups of `pattern` stand for, apart from `count`; groups without text are None."""
        return {key: bool(groups[key]) for key in ("full", "mirror") if key in groups}

    def samples(self, real_images: int) -> int:
        """How many samples count, where the dataset has so many images."""
        return self.count

    def images(self, real_images: int) -> int:
        """How many images must be generated for that."""
        return self.samples(real_images)

    def check_size(self, size: tuple[int, int]) -> None:
        """
        Raises:
            UsageError: where images of this size (height, width) are too small.
        """
        least = self.least_side
        if min(size) < least:
            raise UsageError(
                f"{self.name} needs images of {least} pixels or more on each side, not {size[0]}x{size[1]}"
            )

    def check_count(self, images: int, whose: str) -> None:  # noqa: B027, any number does for most metrics
        """
        Raises:
            UsageError: where so many real images, of "the dataset" or "the class", are too few.
        """

    def check_generator(self, G: Any) -> None:  # noqa: B027, any generator makes images
        """
        Raises:
            UsageError: for a generator that cannot do what the metric asks of it.
        """

    @abstractmethod
    def compute(self, real: Any, generated: Any, tools: Tools) -> dict[str, float]:
        """The end of each value's name ("" for the metric itself) -> the value.

        Args:
            real, generated: what the accumulators' `result` gave; real is None where the metric compares with nothing.
            tools: `device` is where large computations can go, `seed` what random choices follow from.
        """


@dataclass(frozen=True)
class ImageMetric(Metric):
    """A metric of generated images, or of their features, which are the same for all metrics.

    Class attributes:
        feature: which of the network's features it looks at. A user's extractor gives "pool" in place of any.
        compares: whether the real images are looked at, too.
        accumulates: class of the accumulators. What they hold of real images is shared by all metrics that accumulate
            the same, and kept on disk where the accumulator has a `state`. A metric with an `observe` of its own shares
            it with no other kind, and nothing is kept.
    """

    feature: ClassVar[str] = "pool"
    compares: ClassVar[bool] = False
    accumulates: ClassVar[type[Accumulator]] = Rows

    def accumulator(self, images: ImageSet) -> Accumulator:
        """A new one for one of the two sides."""
        return self.accumulates()

    def observe(self, seen: torch.Tensor) -> torch.Tensor:
        """What the accumulator takes in of uint8 images [n, C, H, W], or of float32 features [n, d] where there is a
        network. Numbers and batches of images are even, so that a metric of pairs can take neighbours."""
        return seen


@dataclass(frozen=True)
class FeatureMetric(ImageMetric):
    """A comparison of a network's features of real and generated images: NAME50k, NAME50k_full, NAME50k_full_mirror.

    Class attributes:
        least_images: that the comparison needs on each side.
    """

    REAL_IMAGES: ClassVar[str] = r"(?P<full>_full)?(?P<mirror>_mirror)?"  # the end of such names
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
    """A metric that asks the generator itself, block by block, and compares with no real images."""

    @abstractmethod
    def probe(
        self, G: Any, network: Any, draw: Callable[[str], Latents], block: int, tools: Tools, how: Mapping[str, Any]
    ) -> Iterator[torch.Tensor]:
        """Values [n] of one block's samples, in their order and in batches of any size.

        Args:
            network: the loaded one, None where the metric has none.
            draw: latents and labels of the block's samples, which follow from a purpose's name and from the seed.
            block: its number, for whatever else is drawn at random.
            how: further arguments of the generator's synthesis (alpha).
        """
