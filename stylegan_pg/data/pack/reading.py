"""Reading the files listed in SOURCE, and distinguishing damaged files, missing files, and passing faults.

A disk or server that disappears must not reduce a dataset, so a fault that may pass ends the packing, which can be
continued. A file counts as missing only if the same folder still exists without it.
"""

import errno
import hashlib
import os

from stylegan_pg.data.pack.source_files import BROKEN_LINK, CONTINUES, File, folder_id
from stylegan_pg.errors import RunError
from stylegan_pg.untrusted import printable

# Of the file itself, whatever the disk does: a folder in its place, links in a circle, a socket.
_OF_THE_FILE = (None, errno.EISDIR, errno.ELOOP, errno.ENXIO)


class Unreadable(Exception):  # noqa: N818 - what it is
    """A file is damaged or not a regular file; the message says why. Reading it again would not help."""


class Gone(Unreadable):
    """A file that was listed is no longer in its folder, which still exists."""


def read_listed(file: File) -> bytes:
    """The content of a listed file.

    Raises:
        Gone, Unreadable: the file itself is the cause.
        RunError: SOURCE cannot be read at the moment (a missing disk or mount, an expired ticket, no permission).
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
    """A short digest of some content."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _folder_is_there(file: File) -> bool:
    """Whether the folder of a missing file still exists and is the listed one; a mount point without its disk is
    another folder. False for members of archives, and if the file exists again."""
    if file.folder is None or os.path.exists(file.container):
        return False
    try:
        now = folder_id(os.path.dirname(os.path.realpath(file.container)))
    except OSError:
        return False
    return file.folder in ("", now)
