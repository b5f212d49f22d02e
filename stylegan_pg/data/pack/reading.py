"""Reading the files that SOURCE lists, and telling what is damaged from what is gone and from what may come back.

A disk or server that goes away must not thin out a dataset, so whatever may pass ends the packing, to be continued. A
file is gone for good only if the very folder that held it is still there without it.
"""

import errno
import hashlib
import os

from stylegan_pg.data.pack.sources import BROKEN_LINK, CONTINUES, File, folder_id
from stylegan_pg.errors import RunError
from stylegan_pg.untrusted import printable

# Of the file itself, whatever the disk does: a folder in its place, links in a circle, a socket.
_OF_THE_FILE = (None, errno.EISDIR, errno.ELOOP, errno.ENXIO)


class Unreadable(Exception):  # noqa: N818 - what it is
    """A file that is damaged or is none: the message says why. Reading it again would not help."""


class Gone(Unreadable):
    """A file that was listed, and is no longer in its folder, which is still there."""


def read_listed(file: File) -> bytes:
    """The content of a file as SOURCE listed it.

    Raises:
        Gone, Unreadable: the file itself is to blame.
        RunError: SOURCE cannot be read just now (a disk or mount that went away, an expired ticket, no permission).
    """
    try:
        return file.read()
    except MemoryError:
        raise
    except OSError as error:
        if error.errno in _OF_THE_FILE:
            raise Unreadable(error.strerror or str(error)) from None
        if error.errno in BROKEN_LINK and _folder_is_there(file):
            if file.stamp:
                raise Gone("was there when SOURCE was listed, and is gone") from None
            raise Unreadable(str(error.strerror)) from None
        raise RunError(
            f"{printable(file.container)} cannot be read: {error.strerror or error}. SOURCE or this part of it went "
            f"away, or may not be read; packing stopped, so that nothing is left out. When it is back, {CONTINUES}"
        ) from error
    except Exception as error:  # damaged or encrypted zip members raise many things
        raise Unreadable(str(error) or type(error).__name__) from None


def digest_of(data: bytes) -> str:
    """A short name of some content."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _folder_is_there(file: File) -> bool:
    """Whether the folder of a missing file is the one that was listed: a mount point without its disk is another one.
    Archives are no folders; and what is back already had been away."""
    if file.folder is None or os.path.exists(file.container):
        return False
    try:
        now = folder_id(os.path.dirname(os.path.realpath(file.container)))
    except OSError:
        return False
    return file.folder in ("", now)
