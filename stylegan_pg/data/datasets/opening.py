"""Opening a dataset by its URL: a packed dataset, WebDataset tars of other programs, or synthetic points."""

import glob
import os

from stylegan_pg.data.datasets.foreign import load_foreign
from stylegan_pg.data.datasets.index import DatasetIndex, parse_index
from stylegan_pg.data.datasets.points import PREFIX, load_points
from stylegan_pg.data.datasets.shard_index import read_at_start
from stylegan_pg.data.images.decode import SQUARE
from stylegan_pg.data.storage import remote
from stylegan_pg.data.storage.patterns import WILD, literal
from stylegan_pg.errors import UsageError
from stylegan_pg.urls import MASK, shown


def load_index(url: str, base: tuple[int, int] = SQUARE) -> DatasetIndex:
    """The index of a dataset.

    Args:
        url: a packed dataset (its folder or the index.json in it, local, http(s):// or s3://); tars of other programs
            (foreign.py: a folder of them, one, a brace pattern, pipe:COMMAND); or `points:NAME`.
        base: rows and columns at resolution 4, to which foreign pictures are cropped; a packed dataset states its own.

    Raises:
        UsageError: there is no dataset, or it is incomplete, damaged, edited or of another format version.
        RunError: a server does not answer.
    """
    url = str(url)
    there = literal(url)
    if there is not None:  # an existing path, which may contain special characters
        url = there
    if MASK in url and remote.is_remote(url):
        raise UsageError(
            f"{shown(url)} lacks the secret in place of which {MASK} stands, as it was kept out of a file: give the "
            "whole URL, or let names, passwords and tokens come from ~/.netrc and the environment"
        )
    if url.startswith(PREFIX):
        return load_points(url)
    url = url.removeprefix("file://")
    local = "://" not in url and not url.startswith("pipe:")
    folder = url.removesuffix("/index.json") if url != "index.json" else "."
    several = there is None and ("::" in url or any(sign in url for sign in ("{" + WILD if local else "{*")))
    tar = url.endswith(".tar") and not os.path.isdir(url) if there else shown(url).endswith(".tar")
    packed = not (several or tar or (url.startswith("pipe:") and not there))
    if local and packed:
        if os.path.isfile(folder):
            raise UsageError(f"{folder} is no uncompressed tar and no folder: unpack .tar.gz and the like first")
        if not os.path.isdir(folder):
            raise UsageError(
                f"{folder}: no such folder; give the folder that `stylegan-pg pack SOURCE OUT` wrote (OUT), or "
                "WebDataset tars"
            )
        packed = os.path.exists(f"{folder}/index.json") or not glob.glob(f"{glob.escape(folder)}/*.tar")
    if not packed:
        return load_foreign(url, base)
    file = f"{folder.rstrip('/')}/index.json" if folder != "/" else "/index.json"
    try:
        text = read_at_start(file).decode()
    except FileNotFoundError:
        raise UsageError(
            f"{folder} has no index.json: it is not a packed dataset, or its packing was interrupted: "
            "run stylegan-pg pack again"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{shown(file)} cannot be read: {error}" if local else f"{error}: no packed dataset can be read there"
        ) from error
    return parse_index(file.removesuffix("/index.json") or "/", text)
