"""What `stylegan-pg project` does: pictures in, latents and a report out."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from stylegan_pg.checkpoint.snapshot import choose_device, load_snapshot
from stylegan_pg.data.classes import class_names, parse_classes
from stylegan_pg.editing import pictures as reading
from stylegan_pg.editing.distance import KINDS, make_distance
from stylegan_pg.editing.projection import INITS, SAMPLES, SPACES, Projection, Settings, chosen_space, project
from stylegan_pg.editing.projection_report import Progress, Video
from stylegan_pg.editing.video_file import pyav
from stylegan_pg.errors import UsageError
from stylegan_pg.images import save_image
from stylegan_pg.inference.generate import writing
from stylegan_pg.inference.latent_files import Latents, save_latents
from stylegan_pg.inference.sampling import enough_memory
from stylegan_pg.untrusted import printable

log = logging.getLogger(__name__)

LATENTS = "latents.safetensors"
FIGURE = "progress.png"


class Asked(NamedTuple):
    """The options of the command that Settings does not hold."""

    labels: str | None
    crop: str
    distance: str
    weights: tuple[Path, ...]
    discriminator: Path | None
    batch: int
    video: bool
    fps: int


def project_files(
    snapshot: Path, paths: Sequence[Path], out: Path | None, *, device: str, settings: Settings, **asked: Any
) -> Iterator[str]:
    """Project pictures; yields lines with what was found and written.

    The folder gets NAME.png, a picture beside what the generator makes of its latents; LATENTS, which grows with every
    batch; a figure of the progress; and with `video` NAME.mp4.

    Args:
        snapshot: a file.
        paths: pictures, or folders of them.
        out: a folder; None for one beside the snapshot, NAME-projected.
        settings, asked: see Settings and Asked.

    Raises:
        UsageError: options, snapshot or pictures are invalid, or the folder cannot be written.
        RunError: the disk is full, memory is short, or the generator has diverged.
    """
    wanted = Asked(**asked)
    for name, value, known in (
        ("space", settings.space, SPACES),
        ("init", settings.init, INITS),
        ("crop", wanted.crop, reading.CROPS),
        ("distance", wanted.distance, KINDS),
    ):
        if value not in known:
            raise UsageError(f"{name} {printable(repr(value), 60)} is unknown: choose {', '.join(known)}")
    if wanted.video:
        pyav()
    G = load_snapshot(snapshot, choose_device(device))
    if G.img_channels not in (1, 3, 4):
        raise UsageError(f"{printable(snapshot)} makes points, not pictures: there is nothing to project")
    settings = dataclasses.replace(settings, space=chosen_space(G, settings.space))
    if settings.space == "z":
        log.info("this generator has no mapping to w: pictures are projected into z")
    pictures = reading.listed(paths)
    classes = _classes(G, wanted.labels, len(pictures))
    distance, remark = make_distance(
        G, wanted.distance, weights=wanted.weights, discriminator=wanted.discriminator, snapshot=snapshot
    )
    if remark:
        log.info(remark)
    folder = snapshot.parent / f"{snapshot.stem}-projected" if out is None else out
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    early = {int(settings.steps * share) for share in (0.1, 0.25, 0.5)} - {0}
    progress, found = Progress(settings.steps), _Found(snapshot, G, settings, distance.name)
    bar = tqdm(
        total=settings.steps * len(pictures),
        unit="step",
        dynamic_ncols=True,
        disable=not sys.stderr.isatty(),
        leave=False,
    )
    with bar, enough_memory(wanted.batch), writing(folder):
        read = reading.read(pictures, G, wanted.crop)
        while some := list(itertools.islice(read, wanted.batch)):
            names = [pictures[i].name for i, _ in some]
            targets = torch.stack([pixels for _, pixels in some])
            chosen = None if classes is None else [classes[i] for i, _ in some]
            progress.begin(targets)
            with contextlib.ExitStack() as stack:
                video = None
                if wanted.video:
                    files = [folder / f"{name}.mp4" for name in names]
                    video = stack.enter_context(Video(files, targets, settings.steps, wanted.fps))

                def observe(step: int, images: torch.Tensor, distances: torch.Tensor, video: Any = video) -> None:
                    progress.step(step, images)
                    if video is not None:
                        video.step(step, images)
                    text = f"distance {float(distances.mean()):.4f}"
                    bar.set_postfix_str(text, refresh=False)
                    bar.update(len(distances))
                    if bar.disable and step in early:
                        log.info(f"step {step} of {settings.steps}: {text}")

                def sampled(done: int, count: int) -> None:
                    bar.set_postfix_str(f"sample {done} of {count}")

                result = project(
                    G,
                    targets,
                    distance,
                    settings,
                    classes=chosen,
                    batch=max(wanted.batch, 16),
                    observe=observe,
                    sampled=sampled,
                )
                if video is not None:
                    video.show(result.images)
            found.add(names, result)
            progress.end(names, result.curves, result.images)
            for name, target, image in zip(names, targets, result.images, strict=True):
                save_image(torch.cat([target, image], dim=2), folder / f"{name}.png")
            save_latents(folder / LATENTS, found.latents())
            yield from found.lines(names, result)
        progress.draw(folder / FIGURE)
    yield str(folder / LATENTS)
    yield str(folder / FIGURE)


def _classes(G: Any, labels: str | None, count: int) -> list[int] | None:
    """The class of each picture, None if they are to be found."""
    if labels is None:
        return None
    chosen = parse_classes(G, labels)
    if len(chosen) not in (1, count):
        raise UsageError(f"--labels gives {len(chosen)} classes for {count} pictures: give one, or one for each")
    return chosen * count if len(chosen) == 1 else chosen


class _Found:
    """Gathers the results of batches of pictures."""

    def __init__(self, snapshot: Path, G: Any, settings: Settings, distance: str):
        self.G, self.settings = G, settings
        self.names: list[str] = []
        self.results: list[Projection] = []
        self.facts = {
            "snapshot": printable(snapshot.name),
            "nimg": G.description.get("nimg"),
            "resolution": list(G.img_size),
            "space": settings.space,
            "steps": settings.steps,
            "init": settings.init,
            "seed": settings.seed,
            "distance": distance,
        }

    def add(self, names: Sequence[str], result: Projection) -> None:
        self.names += names
        self.results.append(result)

    def latents(self) -> Latents:
        """All of them as one file holds them."""

        def joined(name: str) -> torch.Tensor | None:
            parts = [getattr(result, name) for result in self.results]
            return None if parts[0] is None else torch.cat(parts)

        noise = {name: torch.cat([r.noise[name] for r in self.results]) for name in self.results[0].noise}
        numbers = {
            "psnr": [_number(x) for r in self.results for x in r.psnr.tolist()],
            "distances": [_number(x) for r in self.results for x in r.distance.tolist()],
        }
        return Latents(self.names, joined("ws"), joined("z"), joined("c"), noise, self.facts | numbers)

    def lines(self, names: Sequence[str], result: Projection) -> Iterator[str]:
        """A line for each picture."""
        for i, name in enumerate(names):
            text = f"{printable(name)}: PSNR {float(result.psnr[i]):.2f} dB, distance {float(result.distance[i]):.4g}"
            text += f" (at the start {float(result.start[i]):.4g}"
            if result.nearest is not None:
                text += f", nearest of {SAMPLES} samples {float(result.nearest[i]):.4g}"
            text += ")"
            if result.classes is not None:
                text += f", class {printable(class_names(self.G)[result.classes[i]], 60)}"
            yield text


def _number(x: float) -> float | None:
    """x rounded for a file, None for infinity."""
    return None if x in (float("inf"), float("-inf")) else float(f"{x:.6g}")
