"""The encoding of one sample: its picture and its further fields, at every resolution, and why it cannot be packed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stylegan_pg.data.datasets.arrays import written_array
from stylegan_pg.data.datasets.fields import CAPTION
from stylegan_pg.data.images.decode import BadPicture, lies_on
from stylegan_pg.data.pack.pyramid import Levels, PackOptions, mask_levels, picture_levels
from stylegan_pg.data.pack.reading import Gone, Unreadable
from stylegan_pg.data.pack.samples import Contents, Partner, SourceSample
from stylegan_pg.data.pack.source_files import CONTINUES
from stylegan_pg.errors import RunError
from stylegan_pg.untrusted import printable


class Result(NamedTuple):
    """An encoded sample, or the reason why there is none.

    images: encoded, from the lowest to the highest resolution; none where a file is unreadable. further: the same for
    each further field, one member for each resolution, which is empty where there is no caption.
    """

    images: list[bytes]
    reason: str  # why it is unreadable
    upscaled: bool
    digest: str = ""  # of the content of the sample's own files, as far as they were read
    gone: bool = False  # the file was listed, and is no longer there
    decided: tuple[str, ...] = ()  # what the owner of the picture may not expect
    further: dict[str, list[bytes]] = {}


def make(sample: SourceSample, recipe: PackOptions) -> Result:
    """Read one sample and encode it at every resolution. Raises RunError if SOURCE cannot be read at the moment."""
    try:
        contents, digest = sample.read()
        return _made(sample, contents, recipe)._replace(digest=digest)
    except Unreadable as error:
        return Result([], str(error), False, gone=isinstance(error, Gone))
    except MemoryError as error:
        raise RunError(
            f"{printable(sample.path)}: there is not enough memory for this picture. With fewer --workers, or where "
            f"there is more, {CONTINUES}; a smaller --max-pixels, with a new OUT, leaves it out"
        ) from error


def _made(sample: SourceSample, contents: Contents, recipe: PackOptions) -> Result:
    decided: list[str] = []
    try:
        levels = picture_levels(contents.picture, sample.path, recipe, recipe.channels, decided)
    except ValueError as error:  # BadPicture, and another shape than the dataset's
        return Result([], _reason(error), False)
    further: dict[str, list[bytes]] = {}
    for partner, data in zip(sample.partners, contents.partners, strict=True):
        try:
            further[partner.name] = _partner_levels(partner, data, recipe, levels.size, decided)
        except ValueError as error:
            return Result([], f"its {partner.name} {printable(partner.file.path)}: {_reason(error)}", False)
    if contents.caption is not None:
        further[CAPTION] = [contents.caption.encode()] * len(levels.images)
    for name, numbers in sample.vectors:
        further[name] = [written_array(np.array(numbers, np.float32))] * len(levels.images)
    return Result(levels.images, "", levels.upscaled, decided=tuple(decided), further=further)


def _reason(error: ValueError) -> str:
    remedy = " (see --max-pixels)" if isinstance(error, BadPicture) and error.kind == "size" else ""
    return f"{error}{remedy}"


def _partner_levels(
    partner: Partner, data: bytes, recipe: PackOptions, size: tuple[int, int], decided: list[str]
) -> list[bytes]:
    """A further picture or mask at every resolution. Raises ValueError if it does not lie on the picture."""
    about: list[str] = []
    if partner.field.kind == "mask":
        levels: Levels = mask_levels(data, partner.file.path, recipe)
    else:
        levels = picture_levels(data, partner.file.path, recipe, partner.field.channels, about)
    decided += (f"has a {partner.name} that {what}" for what in about)
    if not lies_on(levels.size, size):
        there, wanted = ("x".join(map(str, one)) for one in (levels.size, size))
        raise ValueError(f"is {there}, where the picture is {wanted} (width x height)")
    return levels.images
