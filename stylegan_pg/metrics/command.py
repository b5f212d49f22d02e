"""What `stylegan-pg metrics` does: a snapshot against a dataset, over truncation, over classes, beside its nearest real
images."""

from __future__ import annotations

import contextlib
import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from stylegan_pg import dist
from stylegan_pg.data.index import DatasetIndex, load_index
from stylegan_pg.data.stream import read_batch
from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.generate import images_of, labels_to_c, latents, save_image, tile
from stylegan_pg.metrics import gather
from stylegan_pg.metrics.evaluate import Evaluator, Pictures
from stylegan_pg.metrics.features import Extractor, load_extractor
from stylegan_pg.metrics.gather import Networks, Tools
from stylegan_pg.metrics.protocol import parse
from stylegan_pg.snapshot import load_snapshot

MOST_STEPS = 1000


def parse_psi(text: str) -> list[float]:
    """'0.7' -> [0.7]; '0.3:1.0:0.1' -> [0.3, 0.4, ..., 1.0].

    Raises:
        UsageError: for anything else.
    """
    try:
        parts = [float(part) for part in text.split(":")]
    except ValueError:
        parts = []
    if len(parts) == 1 and math.isfinite(parts[0]):
        return parts
    if len(parts) == 3 and all(map(math.isfinite, parts)) and parts[2] > 0 and parts[0] <= parts[1]:
        steps = math.floor((parts[1] - parts[0]) / parts[2] + 1e-9) + 1
        if steps <= MOST_STEPS:
            return [round(parts[0] + i * parts[2], 9) for i in range(steps)]
    raise UsageError(f"--psi {text!r} is not possible: give a number, or FROM:TO:STEP such as 0.3:1.0:0.1")


def _load(path: Path, tools: Tools) -> tuple[Any, int]:
    """A snapshot's generator, or the pictures of a packed dataset; and their resolution."""
    if path.is_dir():
        index = load_index(str(path))
        return Pictures(index.table(max(index.resolutions)), tools.seed), max(index.resolutions)
    G = load_snapshot(path, tools.device)
    return G, G.resolution


def _fit(G: Any, resolution: int, snapshot: Path, index: DatasetIndex) -> None:
    channels = G.table.channels if isinstance(G, Pictures) else G.img_channels
    if index.channels != channels:
        raise UsageError(f"{snapshot} makes images of {channels} channels, {index.path} has {index.channels}")
    made, real = G.table.image_size if isinstance(G, Pictures) else tuple(G.img_size), index.size_at(resolution)
    if made != real:
        raise UsageError(
            f"{snapshot} makes images of {made[0]}x{made[1]} (rows x columns), {index.path} has {real[0]}x{real[1]}: "
            "pack the dataset with the --base of the images"
        )
    if G.c_dim and len(index.label_names) != G.c_dim:
        raise UsageError(f"{snapshot} knows {G.c_dim} classes, {index.path} has {len(index.label_names)}")


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """
    Raises:
        RunError: for data that is lost midway, and want of memory.
    """
    try:
        yield
    except (OSError, MemoryError, torch.cuda.OutOfMemoryError) as error:
        reason = (str(error).splitlines() or [""])[0][:300]
        raise RunError(f"the measurement ended early: {type(error).__name__}: {reason}") from None


def evaluate_snapshot(
    snapshot: Path,
    data: str,
    *,
    names: Sequence[str],
    images: int | None,
    psi: str,
    per_class: bool,
    neighbours: int,
    out: Path | None,
    tools: Tools,
) -> Iterator[dict[str, Any]]:
    """Measure a snapshot, or another packed dataset, against a packed dataset.

    Yields {"snapshot", "resolution", "psi", ["class"], "images", metric: value} for every psi and class, on all ranks.

    With `neighbours` also OUT/neighbours.png, that many samples each beside its nearest real images; for several psi
    OUT/truncation.png and .csv.

    Raises:
        UsageError: unknown metrics, unreadable snapshots or datasets, ones that do not fit together, missing weights.
        RunError: for data that is lost midway, and want of memory.
    """
    steps = parse_psi(psi)
    for name in names:
        parse(name)
    with _told():
        yield from _evaluate(snapshot, data, names, images, steps, per_class, neighbours, out, tools)


def _evaluate(
    snapshot: Path,
    data: str,
    names: Sequence[str],
    images: int | None,
    steps: list[float],
    per_class: bool,
    neighbours: int,
    out: Path | None,
    tools: Tools,
) -> Iterator[dict[str, Any]]:
    G, resolution = _load(snapshot, tools)
    rows, columns = G.table.image_size if isinstance(G, Pictures) else tuple(G.img_size)
    index = load_index(data, (rows * 4 // resolution, columns * 4 // resolution))
    _fit(G, resolution, snapshot, index)
    if per_class and not G.c_dim:
        raise UsageError(f"--per-class: {snapshot} is unconditional")
    if isinstance(G, Pictures) and (neighbours or steps != [1.0]):
        raise UsageError(f"--psi and --neighbours need a generator, and {snapshot} is a dataset")
    if (neighbours or len(steps) > 1) and out is None:
        out = snapshot.parent / f"{snapshot.stem}-metrics"
    classes: list[int | None] = [*range(G.c_dim)] if per_class else [None]
    rows, networks, missing = [], Networks(tools), {}
    for only in classes:
        evaluator = Evaluator(index, resolution, [], tools, only, networks)
        for value in steps:
            # What is known of the real images serves every psi.
            evaluator.protocols = [parse(name, psi=value, images=images) for name in names]
            facts = {"snapshot": str(snapshot), "resolution": resolution, "psi": value}
            facts["images"] = max(
                p.count if p.kind != "swd" else min(p.count, len(evaluator.real.mine)) for p in evaluator.protocols
            )
            facts |= {} if only is None else {"class": index.label_names[only]}
            found = evaluator(G)
            missing |= evaluator.missing
            yield facts | found
            suffix = "" if value == 1 else f"_psi{value:g}"
            rows.append({"psi": value} | {name.replace(suffix, "", 1): number for name, number in found.items()})
    yield from _draw(G, index, tools, rows if len(steps) > 1 and not per_class else [], neighbours, steps[0], out)
    if missing:
        raise UsageError("; ".join(dict.fromkeys(missing.values())))


def _draw(
    G: Any,
    index: DatasetIndex,
    tools: Tools,
    sweep: list[dict[str, Any]],
    neighbours: int,
    psi: float,
    out: Path | None,
) -> Iterator[dict[str, Any]]:
    """The pictures and tables that were asked for: {"picture" or "table": path}, on all ranks. A collective call."""
    if sweep and out is not None:
        with dist.main_decides():
            if dist.is_main():
                _write_sweep(sweep, out)
        yield {"picture": str(out / "truncation.png")}
        yield {"table": str(out / "truncation.csv")}
    if neighbours and out is not None:
        path = out / "neighbours.png"
        picture = nearest_real(G, index, tools, neighbours, psi)
        with dist.main_decides(), _writing(out):
            if picture is not None:
                save_image(picture, path)
        yield {"picture": str(path)}


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error}") from None


def _write_sweep(sweep: list[dict[str, Any]], out: Path) -> None:
    from stylegan_pg.metrics.figures import draw_sweep  # matplotlib takes its time

    with _writing(out):
        draw_sweep(sweep, out / "truncation.png")
        with (out / "truncation.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, list(sweep[0]), restval="")
            table.writeheader()
            table.writerows(sweep)


def nearest_real(
    G: Any, index: DatasetIndex, tools: Tools, count: int, psi: float, nearest: int = 7
) -> torch.Tensor | None:
    """One picture uint8 [C, H, W], on rank 0: in each row a sample and the real images nearest to it in feature space
    (whether a generator repeats what it was shown). A collective call, whose result does not depend on the ranks.

    Raises:
        UsageError: for an extractor that cannot be had, or gives no "pool".
    """
    table = index.table(G.resolution)
    nearest = min(nearest, len(table))
    with dist.together():
        extract = load_extractor(tools.extractor or "inception", tools.weights, tools.device, tools.precision)
        z, c = latents(range(count), G.z_dim), labels_to_c(G, None, count)
        samples = torch.cat(list(images_of(G, z, c, batch=tools.batch, psi=psi)))
        wanted = torch.cat([_pool(extract, part) for part in samples.split(tools.batch)])
        best, which = torch.empty([count, 0]), torch.empty([count, 0], dtype=torch.int64)
        for block in gather.share(len(table)):
            end = min((block + 1) * gather.BLOCK, len(table))
            for part in torch.arange(block * gather.BLOCK, end).split(tools.batch):
                distance = torch.cdist(wanted, _pool(extract, read_batch(table, part.tolist())))
                best, which = _nearest([(best, which), (distance, part.expand(count, -1))], nearest)
    parts, picture = dist.gather_on_main((best, which)), None
    with dist.main_decides():
        if parts is not None:
            _, which = _nearest(parts, nearest)
            rows = [torch.cat([samples[i : i + 1], read_batch(table, which[i].tolist())]) for i in range(count)]
            picture = tile(torch.cat(rows), nearest + 1)
    return picture


def _pool(extract: Extractor, images: torch.Tensor) -> torch.Tensor:
    return gather.feature_of(extract(images), "pool", extract.identity)


def _nearest(parts: list[Any], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of several (distances, ordinals), [n, some] each, the `count` nearest, those that came first where some are
    equally near."""
    distances, ordinals = (torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
    first = ordinals.argsort(dim=1)
    distances, ordinals = distances.gather(1, first), ordinals.gather(1, first)
    distances, near = distances.sort(dim=1, stable=True)
    return distances[:, :count], ordinals.gather(1, near)[:, :count]
