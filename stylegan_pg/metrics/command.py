"""The command `stylegan-pg metrics`. It measures a snapshot against a dataset, optionally for several truncations or
for each class, and shows samples beside their nearest real images."""

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
from stylegan_pg.inference.texts import refuse_texts
from stylegan_pg.metrics.base import Metric, Settings
from stylegan_pg.metrics.evaluate import DatasetAsGenerator, Evaluator, combined_error
from stylegan_pg.metrics.features import check_precision
from stylegan_pg.metrics.gather import Networks
from stylegan_pg.metrics.neighbours import nearest_real
from stylegan_pg.metrics.registry import METRICS, parse
from stylegan_pg.untrusted import printable

MAX_STEPS = 1000
MAX_NEIGHBOURS = 1000


def parse_psi(text: str) -> list[float]:
    """Parse truncations: '0.7' is [0.7], and '0.3:1.0:0.1' is [0.3, 0.4, ..., 1.0].

    Raises:
        UsageError: if the text has another form.
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
        if steps <= MAX_STEPS:
            return [round(parts[0] + i * parts[2], 9) for i in range(steps)]
    raise UsageError(
        f"--psi {printable(repr(text), 60)} is invalid: give a number, or FROM:TO:STEP such as 0.3:1.0:0.1"
    )


def is_dataset(path: Path) -> bool:
    """Return whether a path is a packed dataset or a folder of tars, rather than a run's folder or a snapshot."""
    return path.is_dir() and ((path / "index.json").is_file() or not is_run(path))


def parse_seed(text: str) -> int:
    """Parse the seed given by `--seed` or `--seeds`.

    Raises:
        UsageError: if the text contains several numbers, or a number that is too large for a seed.
    """
    numbers = parse_numbers(text)
    if len(numbers) > 1:
        raise UsageError(f"--seed {printable(text, 60)}: a measurement has one seed: give one number")
    latents(numbers, 1)  # raises UsageError for seeds that are too large
    return numbers[0]


def dataset_for(snapshot: Path, data: str | None, base: tuple[int, int]) -> DatasetIndex:
    """Return the dataset to compare with: `data`, or else the dataset in the config.yaml of the snapshot's run."""
    if data is not None:
        return load_index(data, base)
    path = config_of(snapshot)
    if path is None:
        raise UsageError(f"{printable(snapshot)} is not in the folder of a run: name the dataset by --data")
    config = load_config(path)
    urls = list(config.data.mixture) or [config.data.url]
    if any(url.startswith("pipe:") for url in urls):
        raise UsageError(
            f"the data of {printable(path)} is a command (pipe:), which runs only if you pass it yourself: "
            f"--data {printable(urls[0])!r}"
        )
    try:
        return load_dataset(config)
    except UsageError as error:
        raise UsageError(f"the data of {printable(path)}: {error} (or name a dataset by --data)") from None


def _load(path: Path, settings: Settings) -> tuple[Any, int]:
    """Return the generator of a snapshot, or the images of a packed dataset, and the resolution."""
    if path.is_dir():
        index = load_index(str(path))
        return DatasetAsGenerator(index.table(max(index.resolutions)), settings.seed), max(index.resolutions)
    G = load_snapshot(path, settings.device)
    return G, G.resolution


def check_match(G: Any, resolution: int, snapshot: Path, index: DatasetIndex) -> None:
    """Raise UsageError if a generator's images and a dataset cannot be compared; messages name `snapshot`."""
    channels = G.table.channels if isinstance(G, DatasetAsGenerator) else G.img_channels
    if index.channels != channels:
        raise UsageError(
            f"{snapshot} generates images with {channels} channels, {index.path} has {index.channels}: "
            "pack the dataset with --channels"
        )
    made, real = (
        G.table.image_size if isinstance(G, DatasetAsGenerator) else tuple(G.img_size),
        index.size_at(resolution),
    )
    if made != real:
        raise UsageError(
            f"{snapshot} generates images of {made[0]}x{made[1]} (rows x columns), {index.path} has "
            f"{real[0]}x{real[1]}: pack the dataset with the --base of the generated images"
        )
    if G.c_dim and getattr(G, "description", {}).get("condition"):
        conditions_for(index, index.table(resolution), G)  # says if the dataset has none that fit
        return
    if G.c_dim and len(index.label_names) != G.c_dim:
        raise UsageError(
            f"{snapshot} was trained with {G.c_dim} classes, {index.path} has {len(index.label_names)}: "
            "choose the dataset that the run trained on"
        )
    if G.c_dim and (names := class_names(G)) != list(index.label_names) and sorted(names) == sorted(index.label_names):
        raise UsageError(
            f"{snapshot} and {index.path} have the same classes in another order: pack the dataset in that order"
        )


@contextlib.contextmanager
def failures_as_run_error() -> Iterator[None]:
    """Convert I/O errors and out-of-memory errors within the block to a RunError.

    Raises:
        RunError: instead of those errors.
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
    settings: Settings,
) -> Iterator[dict[str, Any]]:
    """Measure a snapshot, or another packed dataset, against a packed dataset.

    Args:
        snapshot: A snapshot, or the folder of a packed dataset of generated images.
        data: The dataset to compare with; None for the dataset that the snapshot's run trains on.
        names: The names of the metrics.
        images: The number of generated images for metrics whose names contain none.
        psi: A truncation, or a range of truncations, as parse_psi accepts it.
        per_class: Whether each class is measured separately.
        neighbours: The number of samples that OUT/neighbours.png shows beside their nearest real images.
        out: The folder of pictures and tables; None for a folder beside the snapshot. A range of truncations is also
            written to OUT/truncation.png and OUT/truncation.csv.
        settings: The settings of the measurement.

    Yields:
        {"snapshot", "resolution", "psi", ["class"], "images", metric: value} on all ranks, for every psi and class for
        which at least one metric could be measured. At the end, an error is raised if some could not be measured.

    Raises:
        UsageError: if a metric is unknown, a snapshot or dataset cannot be read or they do not match, weights are
            missing, or there are too few images.
        RunError: if data becomes unreadable during the measurement, or memory runs out.
    """
    steps = parse_psi(psi)
    check_precision(settings.precision)
    metrics = [parse(name, images=images) for name in names]
    if images and not any(parse(name, images=images) != parse(name, images=images + 1) for name in names):
        counted = " and ".join(kind for kind, metric in METRICS.items() if metric.counted_by_option)
        raise UsageError(
            f"--images applies only to {counted} without a number in their names: give the number in the metric's name"
        )
    if neighbours > MAX_NEIGHBOURS:
        raise UsageError(f"--neighbours {neighbours} is too large: show at most {MAX_NEIGHBOURS} samples")
    request = Request(snapshot, [m.name for m in metrics], images, steps, per_class, neighbours)
    with failures_as_run_error():
        yield from _evaluate(request, data, out, settings)


@dataclass(frozen=True)
class Request:
    """The command's options, checked as far as possible without opening files."""

    snapshot: Path
    names: list[str]
    images: int | None
    psis: list[float]
    per_class: bool
    neighbours: int


def _evaluate(request: Request, data: str | None, out: Path | None, settings: Settings) -> Iterator[dict[str, Any]]:
    G, resolution, index = _open_inputs(request, data, settings)
    out = _output_folder(request, out)
    networks, missing, sweep = Networks(settings), {}, []
    for class_number in range(G.c_dim) if request.per_class else [None]:
        where = "" if class_number is None else f"class {printable(index.label_names[class_number], 80)}: "
        facts: dict[str, Any] = {"snapshot": str(request.snapshot), "resolution": resolution}
        try:
            evaluator = Evaluator(index, resolution, [], settings, class_number, networks)
        except UsageError as error:  # it is raised on all ranks alike
            missing[f"{where}{', '.join(request.names)}"] = error
            continue
        for psi, found in _sweep(G, evaluator, request):
            missing |= {where + name: why for name, why in evaluator.missing.items()}
            if found:
                images = [metric.samples(len(evaluator.real.ordinals)) for metric, _ in found]
                row = facts | {"psi": psi, "images": max(images)}
                row |= {} if class_number is None else {"class": index.label_names[class_number]}
                yield row | {name: number for _, numbers in found for name, number in numbers.items()}
                sweep += [] if request.per_class or len(request.psis) == 1 else [_row(psi, request, found)]
    yield from _draw(G, index, settings, sweep, request.neighbours, request.psis[0], out)
    if missing:
        raise combined_error(missing)


def _open_inputs(request: Request, data: str | None, settings: Settings) -> tuple[Any, int, DatasetIndex]:
    """Return the generator or dataset to measure, its resolution, and the dataset to compare with.

    Raises:
        UsageError: if they cannot be read, do not match each other, or do not match the options.
    """
    snapshot = request.snapshot
    G, resolution = _load(snapshot, settings)
    refuse_texts(G, "metrics", snapshot)
    rows, columns = G.table.image_size if isinstance(G, DatasetAsGenerator) else tuple(G.img_size)
    index = dataset_for(snapshot, data, (rows * 4 // resolution, columns * 4 // resolution))
    check_match(G, resolution, snapshot, index)
    if request.per_class and not G.c_dim:
        raise UsageError(f"--per-class needs a generator with classes: {printable(snapshot)} is unconditional")
    if isinstance(G, DatasetAsGenerator) and (request.neighbours or request.psis != [1.0]):
        raise UsageError(f"--psi and --neighbours need a generator: {printable(snapshot)} is a dataset")
    return G, resolution, index


def _output_folder(request: Request, out: Path | None) -> Path | None:
    """Return the folder of pictures and tables. It is created if any are requested."""
    if request.neighbours or len(request.psis) > 1:
        out = out or request.snapshot.parent / f"{request.snapshot.stem}-metrics"
        with dist.main_decides(), writing(out):
            if dist.is_main():
                out.mkdir(parents=True, exist_ok=True)
    return out


Found = list[tuple[Metric, dict[str, float]]]


def _sweep(G: Any, evaluator: Evaluator, request: Request) -> Iterator[tuple[float, Found]]:
    """Yield each psi with its results. Statistics of real images are computed once for every psi. A metric whose name
    contains a psi is measured only once."""
    stated: dict[str, dict[str, float]] = {}
    for i, psi in enumerate(request.psis):
        metrics = [parse(name, psi=psi, images=request.images) for name in request.names]
        evaluator.metrics = [m for m in metrics if i == 0 or m.name not in request.names or m.psi == psi == 1]
        values = evaluator.measure(G)
        if i == 0:
            stated = {name: found for name, found in values.items() if name in request.names}
        values = stated | values
        yield psi, [(m, values[m.name]) for m in {m.name: m for m in metrics}.values() if m.name in values]


def _row(psi: float, request: Request, found: Found) -> dict[str, Any]:
    """Return one row of the table over psi. Its column names contain a psi only if the requested metric's name does."""
    row: dict[str, Any] = {"psi": psi}
    values = {metric.name: numbers for metric, numbers in found}
    for name in request.names:
        full = parse(name, psi=psi, images=request.images).name
        row |= {name + key.removeprefix(full): number for key, number in values.get(full, {}).items()}
    return row


def _draw(
    G: Any,
    index: DatasetIndex,
    settings: Settings,
    sweep: list[dict[str, Any]],
    neighbours: int,
    psi: float,
    out: Path | None,
) -> Iterator[dict[str, Any]]:
    """Write the requested pictures and tables, and yield {"picture" or "table": path} on all ranks. All ranks must
    iterate over this generator."""
    if sweep and out is not None:
        with dist.main_decides():
            if dist.is_main():
                _write_sweep(sweep, out)
        yield {"picture": str(out / "truncation.png")}
        yield {"table": str(out / "truncation.csv")}
    if neighbours and out is not None:
        path = out / "neighbours.png"
        picture = nearest_real(G, index, settings, neighbours, psi)
        with dist.main_decides(), writing(out):
            if picture is not None:
                save_image(picture, path)
        yield {"picture": str(path)}


def _write_sweep(sweep: list[dict[str, Any]], out: Path) -> None:
    from stylegan_pg.monitoring.figures import draw_sweep  # imported late, because matplotlib is slow to import

    columns = dict.fromkeys(name for row in sweep for name in row)
    with writing(out):
        draw_sweep(sweep, out / "truncation.png")
        with (out / "truncation.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, list(columns), restval="")
            table.writeheader()
            table.writerows(sweep)
