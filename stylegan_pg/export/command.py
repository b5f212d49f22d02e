"""What `stylegan-pg export` does: it writes a snapshot in another format, and checks the result by running it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from stylegan_pg.checkpoint.snapshot import choose_device, load_snapshot
from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.export import checking, hub, public, web
from stylegan_pg.export.formats import FORMATS, OPSET, check_modules, converting
from stylegan_pg.export.outputs import making
from stylegan_pg.export.program import INPUTS, NOISE, PRECISIONS, Wanted, has_noise, program_of, rebuilt
from stylegan_pg.inference.generate import writing
from stylegan_pg.untrusted import printable

log = logging.getLogger(__name__)

KINDS = (*FORMATS, "public", "hub", "web")
# Which of the options each kind has; the others must not be given.
OPTIONS = {
    "onnx": {"precision", "inputs", "noise"},
    "torch": {"precision", "inputs", "noise", "device"},
    "aoti": {"precision", "inputs", "noise", "device"},
    "public": set(),
    "hub": {"title", "licence"},
    "web": {"precision", "noise", "title", "ort_web", "fetch"},
}


class Asked(NamedTuple):
    """The options of the command; None (or False) where they were not given."""

    precision: str | None = None
    inputs: str | None = None
    noise: str | None = None
    device: str | None = None
    title: str | None = None
    licence: str | None = None
    ort_web: Path | None = None
    fetch: bool = False


def export(snapshot: Path, to: str, out: Path | None = None, **options: Any) -> Iterator[str]:
    """Write a snapshot in another format; yields lines that say what was written and how it was checked.

    Args:
        snapshot: a file. to: one of KINDS.
        out: a file or, for hub and web, a folder; None for one beside the snapshot.
        options: see Asked.

    Raises:
        UsageError: the options or the snapshot are wrong, the format cannot express the generator, a package is
            missing, or `out` cannot be written.
        RunError: the conversion failed, the result differs from the generator (it is removed), or the disk is full.
    """
    asked = _checked(to, Asked(**options))
    G = load_snapshot(snapshot)
    with _enough_memory():
        if to in FORMATS:
            yield from _program(G, snapshot, to, out, asked)
        elif to == "public":
            yield from _public(G, snapshot, out)
        elif to == "hub":
            folder = out or _place(snapshot, f"{snapshot.stem}-hub")
            title = asked.title or snapshot.stem
            with writing(folder), making(folder) as path:
                hub.write(G, snapshot, path, title=title, licence=asked.licence or "")
                hub.check(G, path)
            yield f"{folder}: checked by loading it; add what is missing in {hub.CARD} before you upload it"
            yield from _local_names(G)
        else:
            yield from _web(G, snapshot, out, asked)


def _checked(to: str, asked: Asked) -> Asked:
    if to not in KINDS:
        raise UsageError(f"--to {printable(repr(to))} is unknown: choose from {', '.join(KINDS)}")
    given = {name for name, value in asked._asdict().items() if value not in (None, False)}
    if wrong := sorted(given - OPTIONS[to]):
        name = {"ort_web": "--ort-web", "licence": "--license"}.get(wrong[0], f"--{wrong[0]}")
        kinds = " and ".join(kind for kind in KINDS if wrong[0] in OPTIONS[kind])
        raise UsageError(f"{name} has no effect on --to {to}: it is an option of {kinds}")
    for name, known in (("precision", PRECISIONS), ("inputs", INPUTS), ("noise", NOISE)):
        value = getattr(asked, name)
        if value is not None and value not in known:
            raise UsageError(f"--{name} {printable(repr(value))} is not possible: {', '.join(known)}")
    if to in FORMATS:
        check_modules(to)
    elif to == "web":
        check_modules("onnx")
    return asked


def _place(snapshot: Path, name: str) -> Path:
    """Where a result is written by default: RUN/exports/NAME for a snapshot of a run, otherwise beside it."""
    if snapshot.parent.name != "snapshots":
        return snapshot.with_name(name)
    folder = snapshot.parent.parent / "exports"
    with writing(folder):
        folder.mkdir(exist_ok=True)
    return folder / name


def _program(G: Any, snapshot: Path, to: str, out: Path | None, asked: Asked) -> Iterator[str]:
    form = FORMATS[to]
    path = out or _place(snapshot, snapshot.stem + form.suffix)
    last = form.suffix[form.suffix.rindex(".") :]
    if path.suffix != last:  # PyTorch reads its packages by this suffix only
        raise UsageError(f"--out {printable(path)}: a file of --to {to} is named *{last}")
    device = str(choose_device(asked.device or "cpu"))
    wanted = Wanted(asked.inputs or "z", asked.precision or "fp32", asked.noise or "const")
    program = program_of(G, wanted)
    if asked.noise and not has_noise(G):
        yield f"note: --noise {asked.noise} has no effect, as this generator has no noise images"
    yield from _remarks(G, wanted.precision)
    if to == "aoti":
        log.info("compiling, which may take minutes")
    with writing(path), making(path) as temporary:
        with converting(path.name):
            form.write(program, device, temporary)
            run = form.load(temporary, device)
        found = _compared(run, G, program, path.name)
        size = temporary.stat().st_size
    inputs = ", ".join(program.names)
    opset = f", opset {OPSET}" if to == "onnx" else ""
    yield f"{path}: {size / 1e6:.1f} MB, inputs {inputs}{opset}"
    yield found


def _compared(run: checking.Run, G: Any, program: Any, name: str) -> str:
    exact = rebuilt(G, "fp32")
    try:
        worst, count = checking.check(run, exact, program, name)
    except (UsageError, RunError, OSError, MemoryError):
        raise
    except Exception as error:  # a runtime that cannot run the file has errors of its own
        first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise RunError(f"{name} was written but cannot be run, and was removed: {printable(first, 300)}") from error
    tolerance = checking.TOLERANCE[program.wanted.precision]
    return (
        f"largest difference from PyTorch: {worst:.1e} of the range of the images (limit {tolerance:g}), in {count} "
        "trials with batches of 1 to 5"
    )


def _remarks(G: Any, precision: str) -> Iterator[str]:
    low = G.description["kwargs"].get("low_precision", "fp32")
    if precision == "fp32" and low != "fp32" and G.description["kwargs"].get("low_precision_at"):
        yield f"note: the snapshot computes in {low} where it was trained so; the export computes in fp32 throughout"


def _public(G: Any, snapshot: Path, out: Path | None) -> Iterator[str]:
    base = out or _place(snapshot, f"{snapshot.stem}-public")
    paths = [base] if base.suffix in (*public.SUFFIXES, ".pth") else [Path(f"{base}{s}") for s in public.SUFFIXES]
    for path in paths:
        with writing(path), making(path) as temporary:
            public.write(G, temporary)
            public.check(G, temporary)
        yield f"{path}: tensors under the public names; read back, tensors and images are equal"
    if (given := public.arguments(G)) is not None:
        yield f"arguments of the public generator: {given}"


def _web(G: Any, snapshot: Path, out: Path | None, asked: Asked) -> Iterator[str]:
    folder = out or _place(snapshot, f"{snapshot.stem}-web")
    web.check_generator(G)
    if folder.is_dir() and any(folder.iterdir()):  # before the runtime is fetched
        raise UsageError(f"--out {printable(folder)} is a folder with content: remove it, or give another")
    runtime = web.runtime_files(asked.ort_web, asked.fetch)
    program = program_of(G, Wanted("z", asked.precision or "fp32", asked.noise or "const", walk=True))
    yield from _remarks(G, program.wanted.precision)
    with writing(folder), making(folder) as path:
        path.mkdir()
        with converting(f"{folder.name}/{web.MODEL}"):
            FORMATS["onnx"].write(program, "cpu", path / web.MODEL)
            run = FORMATS["onnx"].load(path / web.MODEL, "cpu")
        found = _compared(run, G, program, f"{folder.name}/{web.MODEL}")
        web.write(program, path, runtime, title=asked.title or snapshot.stem)
        size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    yield f"{folder}: {size / 1e6:.1f} MB; serve it with `python -m http.server --directory {folder}`"
    yield found


def _local_names(G: Any) -> Iterator[str]:
    """A note about names of this machine that the snapshot's configuration contains, which would be published."""
    config = G.description.get("config")
    if not isinstance(config, dict):
        return
    data = config.get("data")
    named = [config.get("run"), data.get("url") if isinstance(data, dict) else None, config.get("init")]
    if local := [str(name) for name in named if name and str(name).startswith("/")]:
        yield f"note: the snapshot's configuration contains local paths: {printable(', '.join(local), 200)}"


@contextlib.contextmanager
def _enough_memory() -> Iterator[None]:
    try:
        yield
    except (MemoryError, torch.cuda.OutOfMemoryError, RuntimeError) as error:
        short = isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or "allocate memory" in str(error)
        if not short:
            raise
        raise RunError("there is not enough memory for this export: free some, or take another machine") from None
