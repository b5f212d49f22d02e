"""Which length of averaging is best: averages of many relative widths at one moment of a run, measured by metrics."""

from __future__ import annotations

import csv
import io
import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stylegan_pg import files
from stylegan_pg.checkpoint.snapshot import load_snapshot
from stylegan_pg.config.schema import NARROWEST, WIDEST
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.editing.averages import Made, Moment, check_out, make, moment_of, path_of, remark_on
from stylegan_pg.errors import UsageError
from stylegan_pg.inference.generate import writing
from stylegan_pg.metrics.base import Metric, Settings
from stylegan_pg.metrics.command import check_match, dataset_for, failures_as_run_error
from stylegan_pg.metrics.evaluate import Evaluator, better, combined_error
from stylegan_pg.metrics.features import check_precision
from stylegan_pg.metrics.registry import parse
from stylegan_pg.optim.profiles import Combination
from stylegan_pg.untrusted import printable

MOST_WIDTHS = 1000
MOST_BYTES = 1 << 31  # of sums in float64 that are held at the same time


@dataclass(frozen=True)
class Row:
    """What was measured of one width: {name: value}, of several metrics."""

    width: float
    residual: float
    values: dict[str, float]

    def plain(self) -> dict[str, float]:
        return {"width": self.width, "residual": self.residual, **self.values}


def parse_widths(text: str) -> list[float]:
    """Parse FROM:TO:STEP: "0.02:0.20:0.02" is [0.02, 0.04, ..., 0.2].

    Raises:
        UsageError: the text has another form, or a width is not possible.
    """
    try:
        low, high, step = (float(part) for part in text.split(":"))
        count = math.floor((high - low) / step + 1e-9) + 1 if math.isfinite(step) and step > 0 else 0
        if NARROWEST <= low <= high <= WIDEST and 0 < count <= MOST_WIDTHS:
            return [round(low + i * step, 9) for i in range(count)]
    except (ValueError, OverflowError):
        pass
    raise UsageError(
        f"--sweep {printable(repr(text), 60)} is not possible: give FROM:TO:STEP, such as 0.02:0.20:0.02, with widths "
        f"from {NARROWEST} to {WIDEST}, and at most {MOST_WIDTHS} of them"
    )


def sweep(
    run: Path,
    widths: Sequence[float],
    at: float | None,
    *,
    names: Sequence[str],
    data: str | None,
    images: int | None,
    out: Path | None,
    settings: Settings,
) -> Iterator[str]:
    """Measure the averages of several widths at one moment, and keep the best one as a snapshot.

    Args:
        run, at: as of averages.moment_of.
        names: of the metrics; the first one decides which width is the best.
        data: a packed dataset; None for the one that the run trains on.
        images: as of the command `metrics`.
        out: the snapshot; None for RUN/snapshots/ema-WIDTH-MOMENT.safetensors. The figure and the table are written
            into the folder ema-sweep-MOMENT (OUT-sweep) beside it.

    Yields:
        The lines of a table as they become known, then the paths of the figure, the table as CSV, and the snapshot; on
        all ranks, which must all iterate over this.

    Raises:
        UsageError, RunError: as of averages.post_hoc and of the command `metrics`; at the end if a metric could not be
            measured.
    """
    check_precision(settings.precision)
    metrics = [parse(name, images=images) for name in names]
    if out is not None:
        check_out(out, [run])
    moment = moment_of(run, at)
    combinations = [moment.combination(width) for width in widths]
    rows: list[Row] = []
    best: tuple[Row, Made] | None = None
    missing: dict[str, Exception] = {}
    columns: list[str] = []
    with failures_as_run_error():
        for row, made, reasons in _measured(moment, widths, combinations, metrics, data, settings):
            missing |= reasons
            if metrics[0].name in reasons:
                raise combined_error(missing)
            if not columns:
                columns = list(row.values)
                yield _line(["width", "residual", *columns])
            yield _line([f"{row.width:g}", f"{row.residual:.2g}", *(_number(row.values.get(n)) for n in columns)])
            rows.append(row)
            before = [_ranked(metrics[0], other.values) for other in rows[:-1]]
            if better(metrics[0], _ranked(metrics[0], row.values), before):
                best = row, made
    if best is None:
        raise combined_error(missing) if missing else UsageError(f"{metrics[0].name} is not a number for any width")
    path = out or path_of(moment, best[0].width)
    folder = path.parent / (f"{out.stem}-sweep" if out else f"ema-sweep-{path.stem.rpartition('-')[2]}")
    with dist.main_decides():
        if dist.is_main():
            _write(rows, folder)
            best[1].save(path)
    yield f"picture: {folder / 'widths.png'}"
    yield f"table: {folder / 'widths.csv'}"
    yield f"best by {metrics[0].name}: width {best[0].width:g}, {path}"
    if remark := remark_on(moment, best[0].width, combinations[list(widths).index(best[0].width)]):
        yield f"note: {remark}"
    if missing:
        raise combined_error(missing)


def _measured(
    moment: Moment,
    widths: Sequence[float],
    combinations: Sequence[Combination],
    metrics: Sequence[Metric],
    data: str | None,
    settings: Settings,
) -> Iterator[tuple[Row, Made, dict[str, Any]]]:
    """Each width with its generator, and why metrics could not be measured. As many widths are made at once as fit
    into memory; statistics of real images are computed once."""
    evaluator, together = None, 1
    made: list[Made] = []
    for i, (width, combination) in enumerate(zip(widths, combinations, strict=True)):
        if not made:
            made = make(moment, widths[i : i + together], combinations[i : i + together])
            together = max(1, MOST_BYTES // (8 * max(1, sum(t.numel() for t in made[0].tensors.values()))))
        one = made.pop(0)
        G = _loaded(one, settings)
        if evaluator is None:
            rows, columns = G.img_size
            index = dataset_for(moment.folder, data, (rows * 4 // G.resolution, columns * 4 // G.resolution))
            check_match(G, G.resolution, moment.newest.path, index)
            evaluator = Evaluator(index, G.resolution, metrics, settings)
        values = {name: value for found in evaluator.measure(G).values() for name, value in found.items()}
        yield Row(width, combination.residual, values), one, dict(evaluator.missing)


def _loaded(made: Made, settings: Settings) -> Any:
    """The generator, built from a temporary snapshot with all checks of load_snapshot."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made.safetensors"
        made.save(path)
        return load_snapshot(path, settings.device)


def _ranked(metric: Metric, values: dict[str, float]) -> float:
    """The value by which widths are compared; NaN if it was not measured."""
    pattern = re.escape(metric.name + metric.ranked_value) + r"(@.*)?"
    return next((value for name, value in values.items() if re.fullmatch(pattern, name)), math.nan)


def _line(cells: Sequence[str]) -> str:
    return "  ".join(cell.ljust(12) for cell in cells).rstrip()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def _write(rows: Sequence[Row], folder: Path) -> None:
    from stylegan_pg.monitoring.figures import draw_sweep  # imported late, because matplotlib is slow to import

    plain = [row.plain() for row in rows]
    columns = dict.fromkeys(name for row in plain for name in row)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        draw_sweep(plain, folder / "widths.png", "width", "relative width of the average")
        text = io.StringIO()
        table = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(plain)
        with files.atomic_write(folder / "widths.csv") as file:
            file.write(text.getvalue().encode())
