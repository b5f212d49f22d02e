"""A folder with a page that generates pictures in the browser, by ONNX Runtime Web, without any server of its own.

It holds the page and its scripts (the files of `page/` beside this module), the generator as ONNX, and the runtime's
files. The page loads nothing from elsewhere. The runtime is the npm package onnxruntime-web, of one version, whose
archive is accepted by its checksum only.
"""

from __future__ import annotations

import hashlib
import html
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from stylegan_pg.data.classes import class_names, example_conditions
from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.export.program import Program
from stylegan_pg.files import atomic_write, cache_folder
from stylegan_pg.untrusted import printable

MODEL, RUNTIME = "generator.onnx", "ort"
PAGE = Path(__file__).parent / "page"
VERSION = "1.30.0"
SHA512 = (
    "ab4cbe26baedba45d2cec05610c71c55fa97db92d19a8b171c5f8269126683ca"
    "590a5cdc57bb2f35ce2b298de32f4d956fb42644c0ecd528a0a91e025c07ca61"
)
FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
MOST_FILE = 1 << 28  # bytes of one file of the runtime
FETCH_SEC = 600


def check_generator(G: Any) -> None:
    """
    Raises:
        UsageError: the generator makes points instead of pictures.
    """
    if G.img_channels not in (1, 3, 4):
        raise UsageError("--to web: this generator makes points, not pictures; take --to onnx")


def runtime_files(given: Path | None, fetch: bool) -> dict[str, bytes]:
    """The runtime's files by name: from a folder, from the cache, or with `fetch` by npm.

    Raises:
        UsageError: there are none, the folder lacks one, or npm is missing.
        RunError: npm fails, or what it fetches is not the expected archive.
    """
    if given is not None:
        return _from_folder(given)
    archive = _cached()
    if archive is None:
        if not fetch:
            raise UsageError(
                f"--to web needs onnxruntime-web {VERSION}: give --fetch to get it with npm, or --ort-web FOLDER"
            )
        archive = _fetched()
    return _from_archive(archive)


def _from_folder(folder: Path) -> dict[str, bytes]:
    for place in (folder / "dist", folder / "node_modules" / "onnxruntime-web" / "dist", folder):
        if all((place / name).is_file() for name in FILES):
            return {name: (place / name).read_bytes() for name in FILES}
    raise UsageError(
        f"--ort-web {printable(folder)}: there is no {FILES[0]} with {', '.join(FILES[1:])}; give the folder of the "
        f"npm package onnxruntime-web, such as node_modules/onnxruntime-web, of version {VERSION} or near"
    )


def _archive_name() -> str:
    return f"onnxruntime-web-{VERSION}.tgz"


def _cached() -> Path | None:
    """The archive in the cache; None if there is none or its checksum differs."""
    path = cache_folder() / _archive_name()
    return path if path.is_file() and _checksum(path) == SHA512 else None


def _checksum(path: Path) -> str:
    found = hashlib.sha512()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _fetched() -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise UsageError("--fetch needs npm, which is not installed: install it, or give --ort-web FOLDER")
    with tempfile.TemporaryDirectory(prefix="stylegan_pg-npm-") as folder:
        # `pack` downloads one archive: it neither installs what that depends on nor runs its scripts.
        command = [npm, "pack", f"onnxruntime-web@{VERSION}", "--ignore-scripts", "--silent"]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=FETCH_SEC)
        except subprocess.TimeoutExpired:
            raise RunError(f"npm has not fetched onnxruntime-web within {FETCH_SEC} s: try again later") from None
        path = Path(folder, _archive_name())
        if done.returncode or not path.is_file():
            why = next((line for line in (done.stderr or done.stdout).splitlines() if line.strip()), "no message")
            raise RunError(f"npm could not fetch onnxruntime-web {VERSION}: {printable(why, 200)}")
        if _checksum(path) != SHA512:
            raise RunError(f"npm fetched an onnxruntime-web {VERSION} with another checksum: it is not used")
        target = cache_folder() / path.name
        with atomic_write(target) as file, open(path, "rb") as source:
            shutil.copyfileobj(source, file)
        return target


def _from_archive(path: Path) -> dict[str, bytes]:
    """The files of an archive whose checksum is known. Nothing is unpacked to the disk."""
    with tarfile.open(path, "r:gz") as archive:
        found = {}
        for name in FILES:
            member = archive.getmember(f"package/dist/{name}")
            file = archive.extractfile(member) if member.isfile() and member.size < MOST_FILE else None
            if file is None:
                raise RunError(f"{path} lacks {name}")
            found[name] = file.read()
    return found


def write(program: Program, folder: Path, runtime: dict[str, bytes], *, title: str) -> None:
    """Write the page beside its model.

    Args:
        program: the function that was exported to `folder`/MODEL, with a walk.
        folder: exists. runtime: the runtime's files by name. title: of the page.
    """
    (folder / RUNTIME).mkdir()
    for name, content in runtime.items():
        (folder / RUNTIME / name).write_bytes(content)
    (folder / RUNTIME / "LICENSE").write_text(
        "ONNX Runtime Web. Copyright (c) Microsoft Corporation. Licensed under the MIT License.\n"
        "https://opensource.org/license/mit\n"
    )
    facts = _facts(program)
    for source in sorted(PAGE.iterdir()):
        if source.suffix not in (".html", ".css", ".js"):
            continue
        text = source.read_text("utf-8")
        if source.suffix == ".html":
            text = text.replace("{{title}}", html.escape(title)).replace("{{facts}}", _in_script(facts))
        (folder / source.name).write_text(text, encoding="utf-8")


def _facts(program: Program) -> dict[str, Any]:
    """What the page needs to know."""
    G = program.G
    facts = program.facts()
    del facts["description"]
    examples = example_conditions(G)
    return {
        **facts,
        "model": MODEL,
        "z_dim": G.z_dim,
        "c_dim": G.c_dim,
        "size": list(G.img_size),
        "channels": G.img_channels,
        "styled": program.styled,
        "names": class_names(G) if G.c_dim else [],
        "examples": None if examples is None else examples.tolist(),
        "runtime": VERSION,
    }


def _in_script(value: Any) -> str:
    """JSON that can neither end the script element around it nor begin a comment there."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
