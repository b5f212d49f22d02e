"""The command `stylegan-pg metrics`, which measures a snapshot against a dataset: for several truncations, for each
class, and with a picture of the nearest real images."""

from __future__ import annotations

import contextlib
import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stylegan_pg.checkpoint.names import config_of, is_run
from stylegan_pg.checkpoint.snapshot import load_snapshot
from stylegan_pg.config.loading import load_config
from stylegan_pg.data.classes import class_names, parse_numbers
from stylegan_pg.data.conditions import conditions_for
from stylegan_pg.data.datasets.index import DatasetIndex
from stylegan_pg.data.datasets.mixture import load_dataset
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.images import save_image
from stylegan_pg.inference.generate import LARGEST_PSI, latents, writing
from stylegan_pg.metrics.base import Metric, Tools
from stylegan_pg.metrics.evaluate import Evaluator, Pictures, all_of
from stylegan_pg.metrics.features import check_precision
from stylegan_pg.metrics.gather import Networks
from stylegan_pg.metrics.neighbours import nearest_real
from stylegan_pg.metrics.registry import METRICS, parse
from stylegan_pg.untrusted import printable

MOST_STEPS = 1000
MOST_NEIGHBOURS = 1000


def parse_psi(text: str) -> list[float]:
    """Return the truncations that a text stands for: '0.7' is [0.7], '0.3:1.0:0.1' is [0.3, 0.4, ..., 1.0].

    Raises:
        UsageError: if the text is of another form.
    """
    try:
        parts = [float(part) for part in text.split(":")]
    except ValueError:
        parts = []
    possible = all(abs(part) <= LARGEST_PSI for part in parts)
    if len(parts) == 1 and possible:
        return parts
    if len(parts) == 3 and possible and parts[2] > 0 and parts[0] <= parts[1]:
        steps = math.floor((parts[1] - parts[0]) / parts[2] + 1e-9) + 1
        if steps <= MOST_STEPS:
            return [round(parts[0] + i * parts[2], 9) for i in range(steps)]
    raise UsageError(
        f"--psi {printable(repr(text), 60)} is not possible: give a number, or FROM:TO:STEP such as 0.3:1.0:0.1"
    )


def is_dataset(path: Path) -> bool:
    """Return whether a path is a packed dataset or a folder of tars, rather than a run's folder or a snapshot."""
    return path.is_dir() and ((path / "index.json").is_file() or not is_run(path))


def one_seed(text: str) -> int:
    """Return the seed that `--seed` or `--seeds` gives.

    Raises:
        UsageError: if it gives several numbers, or one that is no seed.
    """
    numbers = parse_numbers(text)
    if len(numbers) > 1:
        raise UsageError(f"--seed {printable(text, 60)}: a measurement has one seed, from which all its latents follow")
    latents(numbers, 1)  # refuses those that are too large
    return numbers[0]


def _dataset(snapshot: Path, data: str | None, base: tuple[int, int]) -> DatasetIndex:
    """Return the dataset to compare with: `data`, or the one that the config.yaml of the snapshot's run names."""
    if data is not None:
        return load_index(data, base)
    path = config_of(snapshot)
    if path is None:
        raise UsageError(f"{printable(snapshot)} lies in no run's folder: name the dataset to compare with by --data")
    config = load_config(path)
    urls = list(config.data.mixture) or [config.data.url]
    if any(url.startswith("pipe:") for url in urls):
        raise UsageError(
            f"{printable(path)} names a command as its data, which is not run unless you give it yourself: "
            f"--data {printable(urls[0])!r}"
        )
    try:
        return load_dataset(config)
    except UsageError as error:
        raise UsageError(f"the data of {printable(path)}: {error} (or name a dataset by --data)") from None


def _load(path: Path, tools: Tools) -> tuple[Any, int]:
    """Return a snapshot's generator, or the images of a packed dataset, and their resolution."""
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
    if G.c_dim and getattr(G, "description", {}).get("condition"):
        conditions_for(index, index.table(resolution), G)  # says if the dataset has none that fit
        return
    if G.c_dim and len(index.label_names) != G.c_dim:
        raise UsageError(f"{snapshot} knows {G.c_dim} classes, {index.path} has {len(index.label_names)}")
    if G.c_dim and (names := class_names(G)) != list(index.label_names) and sorted(names) == sorted(index.label_names):
        raise UsageError(
            f"{snapshot} and {index.path} have the same classes in another order: pack them in the same one"
        )


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Turn errors of reading data and of memory within the block into one message.

    Raises:
        RunError: in place of those errors.
    """
    try:
        yield
    except (OSError, MemoryError, torch.cuda.OutOfMemoryError) as error:
        reason = (str(error).splitlines() or [""])[0][:300]
        raise RunError(f"the measurement ended early: {type(error).__name__}: {reason}") from None


def evaluate_snapshot(
    snapshot: Path,
    data: str | None,
    *,
    names: Sequence[str],
    images: int | None,
    psi: str,
    per_class: bool,
    neighbours: int,
    out: Path | None,
    tools: Tools,
) -> Iterator[dict[str, Any]]:
    """Measure a snapshot, or another packed dataset, against a packed dataset (None: the one that its run trains on).

    Yields {"snapshot", "resolution", "psi", ["class"], "images", metric: value} for every psi and class of which
    something could be measured, on all ranks. What could not be measured is raised in the end.

    `neighbours` is the number of samples that OUT/neighbours.png shows beside their nearest real images. Several psi
    also give OUT/truncation.png and OUT/truncation.csv.

    Raises:
        UsageError: if a metric is unknown, a snapshot or dataset cannot be read or does not fit the other, weights are
            missing, or there are too few images.
        RunError: if data is lost midway, or memory runs out.
    """
    steps = parse_psi(psi)
    check_precision(tools.precision)
    metrics = [parse(name, images=images) for name in names]
    if images and not any(parse(name, images=images) != parse(name, images=images + 1) for name in names):
        counted = " and ".join(kind for kind, metric in METRICS.items() if metric.counted_by_option)
        raise UsageError(f"--images is for {counted} without a number in their names: the other names say how many")
    if neighbours > MOST_NEIGHBOURS:
        raise UsageError(f"--neighbours {neighbours} makes a picture of more than {MOST_NEIGHBOURS} rows: show fewer")
    wanted = Wanted(snapshot, [m.name for m in metrics], images, steps, per_class, neighbours)
    with _told():
        yield from _evaluate(wanted, data, out, tools)


@dataclass(frozen=True)
class Wanted:
    """What the command's options ask for, checked as far as possible without opening files."""

    snapshot: Path
    names: list[str]
    images: int | None
    steps: list[float]
    per_class: bool
    neighbours: int


def _evaluate(wanted: Wanted, data: str | None, out: Path | None, tools: Tools) -> Iterator[dict[str, Any]]:
    G, resolution, index = _opened(wanted, data, tools)
    out = _folder(wanted, out)
    networks, missing, sweep = Networks(tools), {}, []
    for only in range(G.c_dim) if wanted.per_class else [None]:
        where = "" if only is None else f"class {printable(index.label_names[only], 80)}: "
        facts: dict[str, Any] = {"snapshot": str(wanted.snapshot), "resolution": resolution}
        try:
            evaluator = Evaluator(index, resolution, [], tools, only, networks)
        except UsageError as error:  # the same on all ranks
            missing[f"{where}{', '.join(wanted.names)}"] = error
            continue
        for psi, found in _sweep(G, evaluator, wanted):
            missing |= {where + name: why for name, why in evaluator.missing.items()}
            if found:
                images = [metric.samples(len(evaluator.real.mine)) for metric, _ in found]
                row = facts | {"psi": psi, "images": max(images)}
                row |= {} if only is None else {"class": index.label_names[only]}
                yield row | {name: number for _, numbers in found for name, number in numbers.items()}
                sweep += [] if wanted.per_class or len(wanted.steps) == 1 else [_row(psi, wanted, found)]
    yield from _draw(G, index, tools, sweep, wanted.neighbours, wanted.steps[0], out)
    if missing:
        raise all_of(missing)


def _opened(wanted: Wanted, data: str | None, tools: Tools) -> tuple[Any, int, DatasetIndex]:
    """Return what is measured, its resolution, and the dataset to compare with.

    Raises:
        UsageError: if they cannot be read, do not fit together, or do not fit the options.
    """
    snapshot = wanted.snapshot
    G, resolution = _load(snapshot, tools)
    rows, columns = G.table.image_size if isinstance(G, Pictures) else tuple(G.img_size)
    index = _dataset(snapshot, data, (rows * 4 // resolution, columns * 4 // resolution))
    _fit(G, resolution, snapshot, index)
    if wanted.per_class and not G.c_dim:
        raise UsageError(f"--per-class: {printable(snapshot)} is unconditional")
    if isinstance(G, Pictures) and (wanted.neighbours or wanted.steps != [1.0]):
        raise UsageError(f"--psi and --neighbours need a generator, and {printable(snapshot)} is a dataset")
    return G, resolution, index


def _folder(wanted: Wanted, out: Path | None) -> Path | None:
    """Return the folder of pictures and tables; it is created if any are asked for."""
    if wanted.neighbours or len(wanted.steps) > 1:
        out = out or wanted.snapshot.parent / f"{wanted.snapshot.stem}-metrics"
        with dist.main_decides(), writing(out):
            if dist.is_main():
                out.mkdir(parents=True, exist_ok=True)
    return out


Found = list[tuple[Metric, dict[str, float]]]


def _sweep(G: Any, evaluator: Evaluator, wanted: Wanted) -> Iterator[tuple[float, Found]]:
    """Yield each psi with the results for it. Statistics of real images serve every psi; a metric whose name states its
    psi is measured once."""
    stated: dict[str, dict[str, float]] = {}
    for i, psi in enumerate(wanted.steps):
        metrics = [parse(name, psi=psi, images=wanted.images) for name in wanted.names]
        evaluator.metrics = [m for m in metrics if i == 0 or m.name not in wanted.names or m.psi == psi == 1]
        values = evaluator.measure(G)
        if i == 0:
            stated = {name: found for name, found in values.items() if name in wanted.names}
        values = stated | values
        yield psi, [(m, values[m.name]) for m in {m.name: m for m in metrics}.values() if m.name in values]


def _row(psi: float, wanted: Wanted, found: Found) -> dict[str, Any]:
    """Return a line of the table over psi, whose columns name psi only if the metric's name states it."""
    row: dict[str, Any] = {"psi": psi}
    values = {metric.name: numbers for metric, numbers in found}
    for name in wanted.names:
        full = parse(name, psi=psi, images=wanted.images).name
        row |= {name + key.removeprefix(full): number for key, number in values.get(full, {}).items()}
    return row


def _draw(
    G: Any,
    index: DatasetIndex,
    tools: Tools,
    sweep: list[dict[str, Any]],
    neighbours: int,
    psi: float,
    out: Path | None,
) -> Iterator[dict[str, Any]]:
    """Write the pictures and tables that are asked for, and yield {"picture" or "table": path} on all ranks, which must
    all iterate over this."""
    if sweep and out is not None:
        with dist.main_decides():
            if dist.is_main():
                _write_sweep(sweep, out)
        yield {"picture": str(out / "truncation.png")}
        yield {"table": str(out / "truncation.csv")}
    if neighbours and out is not None:
        path = out / "neighbours.png"
        picture = nearest_real(G, index, tools, neighbours, psi)
        with dist.main_decides(), writing(out):
            if picture is not None:
                save_image(picture, path)
        yield {"picture": str(path)}


def _write_sweep(sweep: list[dict[str, Any]], out: Path) -> None:
    from stylegan_pg.monitoring.figures import draw_sweep  # matplotlib takes its time

    columns = dict.fromkeys(name for row in sweep for name in row)
    with writing(out):
        draw_sweep(sweep, out / "truncation.png")
        with (out / "truncation.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, list(columns), restval="")
            table.writeheader()
            table.writerows(sweep)
