"""What becomes one sample: a picture of SOURCE, the files that belong to it, and values that SOURCE or options give."""

from __future__ import annotations

import json
from typing import NamedTuple

from stylegan_pg.data.datasets.fields import CAPTION, MAX_TEXT, Field
from stylegan_pg.data.datasets.label_vectors import Vector
from stylegan_pg.data.pack.reading import Unreadable, digest_of, read_listed
from stylegan_pg.data.pack.source_files import File
from stylegan_pg.untrusted import printable


class Partner(NamedTuple):
    """A further picture or mask of a sample: the field's name and description, and the file."""

    name: str
    field: Field
    file: File


class Contents(NamedTuple):
    """The bytes of a sample's files, and its caption."""

    picture: bytes
    partners: tuple[bytes, ...]
    caption: str | None


class SourceSample(NamedTuple):
    """A picture with its class number (-1: none) and its further fields.

    partners: further pictures and masks. caption: its text, or the .txt file that holds it; None if the dataset has no
    captions, "" if this picture has none. vectors: names of fields with their numbers, each a float32.
    """

    picture: File
    label: int = -1
    partners: tuple[Partner, ...] = ()
    caption: File | str | None = None
    vectors: tuple[tuple[str, Vector], ...] = ()

    @property
    def path(self) -> str:
        """The picture's path within SOURCE."""
        return self.picture.path

    @property
    def files(self) -> list[File]:
        """The files besides the picture."""
        return [
            *(partner.file for partner in self.partners),
            *([self.caption] if isinstance(self.caption, File) else []),
        ]

    @property
    def version(self) -> str:
        """A text that changes with the content of any of the files, and with the values given."""
        given = [] if self._given is None else [self._given]
        return " ".join([*(f"{file.size} {file.stamp}" for file in (self.picture, *self.files)), *given])

    @property
    def _given(self) -> str | None:
        """A digest of the values that are in no file of its own."""
        values = {CAPTION: self.caption if isinstance(self.caption, str) else None, **dict(self.vectors)}
        there = {name: value for name, value in values.items() if value is not None}
        return digest_of(json.dumps(there).encode()) if there else None

    def read(self) -> tuple[Contents, str]:
        """Read all files -> their contents, and a digest of everything that the sample is made of.

        Raises:
            Gone, Unreadable: a file is the cause; RunError: as read_listed.
        """
        picture = read_listed(self.picture)
        others = [_read(file, f"its {partner.name}") for partner in self.partners for file in (partner.file,)]
        text = b"" if not isinstance(self.caption, File) else _read(self.caption, f"its {CAPTION}", MAX_TEXT)
        parts = [*others, *([text] if isinstance(self.caption, File) else [])]
        digest = digest_of(picture)
        if parts or self._given:
            digest = digest_of(" ".join([digest, *map(digest_of, parts), self._given or ""]).encode())
        return Contents(picture, tuple(others), self._text(text)), digest

    def _text(self, content: bytes) -> str | None:
        if not isinstance(self.caption, File):
            return self.caption
        try:
            return content.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise Unreadable(f"its {CAPTION} {printable(self.caption.path)} is no text in UTF-8") from None


def _read(file: File, what: str, most: int | None = None) -> bytes:
    """The content of a file beside the picture. Raises Unreadable, also if it is gone: only pictures are looked for
    again."""
    if most is not None and file.size > most:
        raise Unreadable(f"{what} {printable(file.path)} has {file.size} bytes, more than {most}")
    try:
        return read_listed(file)
    except Unreadable as error:
        raise Unreadable(f"{what} {printable(file.path)} cannot be read: {error}") from None
