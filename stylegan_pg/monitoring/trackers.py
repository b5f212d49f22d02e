"""Experiment trackers (`output.trackers`): TensorBoard, Weights & Biases, MLflow and whatever else accelerate supports.

The trackers themselves are accelerate's. This module adds what a run needs around them: where each keeps its files, how
a run that continues is found again, and that a fault in one of them ends it with a warning, but never the training.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stylegan_pg import files
from stylegan_pg.errors import UsageError
from stylegan_pg.images import to_pil
from stylegan_pg.untrusted import printable, read_json

log = logging.getLogger(__name__)

FILE = "trackers.json"  # in a run's folder: {name: the tracker's id of this run, "" if it has none}
PROJECT = "stylegan-pg"  # the project or experiment under which trackers list runs
LONGEST_ID = 200  # characters
TITLES = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases", "mlflow": "MLflow"}
PACKAGES = {"comet_ml": "comet-ml"}  # what pip calls a tracker's package, if that is not its name


def known() -> dict[str, Any]:
    """The tracker classes of the installed accelerate, by name."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    return dict(LOGGER_TYPE_TO_CLASS)


def check(names: Sequence[str]) -> None:
    """Check output.trackers.

    Raises:
        UsageError: accelerate has no such tracker, or a name is there twice.
    """
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"output.trackers: {printable(name, 80)} is there twice: name each tracker once")
    if unknown := [name for name in names if name not in known()]:
        shown, possible = printable(", ".join(unknown), 80), ", ".join(sorted(known()))
        raise UsageError(f"output.trackers: accelerate has no tracker {shown}: the possible ones are {possible}")


class Trackers:
    """The trackers of a run, on rank 0. The first fault of a tracker ends it until the next start, with one warning."""

    def __init__(self, names: Sequence[str], run: Path, nimg: int, config: Mapping[str, Any]):
        """
        Args:
            names: of accelerate's trackers.
            run: the run's folder.
            nimg: where the run starts or continues.
            config: {key: value} of the whole configuration, without secrets; it is stored at the first start.
        """
        self.trackers: dict[str, Any] = {}
        self.ids = _read_ids(run)
        for name in names:
            self._try(name, lambda name=name: self._start(name, run, nimg, config))

    def _start(self, name: str, run: Path, nimg: int, config: Mapping[str, Any]) -> None:
        from accelerate import PartialState

        PartialState()  # accelerate's own log needs it; there is one already, unless this is a test
        tracker = known()[name](**_options(name, run, nimg, self.ids.get(name, "")))
        tracker.start()
        self.trackers[name] = tracker
        if name == "tensorboard":
            _hide_writer_tracebacks()
        elif name == "wandb":
            tracker.tracker.define_metric("*", step_metric="nimg")
        if name not in self.ids:
            tracker.store_init_configuration({key: _plain(value) for key, value in config.items()})
        self.ids[name] = _id_of(name, tracker)
        with files.atomic_write(run / FILE) as file:
            file.write(json.dumps(self.ids).encode())

    def _try(self, name: str, function: Callable[[], object]) -> None:
        try:
            function()
        except Exception as error:  # a tracker may raise anything, but it is no part of the training
            self.trackers.pop(name, None)
            title = TITLES.get(name, name)
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            if isinstance(error, ImportError):
                remedy = f"run `pip install {PACKAGES.get(name, name)}`, or take {name} out of output.trackers"
            else:
                remedy = f"stats.jsonl has the same numbers; to avoid this, take {name} out of output.trackers"
            log.warning(f"no {title} log from here on ({reason}); training goes on; {remedy}")

    def scalars(self, values: Mapping[str, float], nimg: int) -> None:
        """Log those values that are finite."""
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        for name, tracker in list(self.trackers.items()):
            self._try(name, lambda name=name, tracker=tracker: _log_scalars(name, tracker, finite, nimg))

    def image(self, key: str, picture: torch.Tensor, nimg: int) -> None:
        """Log a uint8 image [C, H, W] to those trackers that can show images."""
        for name, tracker in list(self.trackers.items()):
            if show := IMAGES.get(name):
                self._try(name, lambda show=show, tracker=tracker: show(tracker, key, picture, nimg))

    def close(self) -> None:
        for name, tracker in list(self.trackers.items()):
            self._try(name, tracker.finish)
        self.trackers.clear()


def _options(name: str, run: Path, nimg: int, known_id: str) -> dict[str, Any]:
    """The arguments of a tracker's class. `known_id` is its id of this run at an earlier start, or ""."""
    folder = run.absolute() / name
    if name == "tensorboard":  # purge_step hides what an interrupted run had logged beyond its last checkpoint
        return {"run_name": name, "logging_dir": run, "purge_step": nimg + 1 if nimg else None}
    if name == "wandb":
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        again = {"id": known_id, "resume": "allow"} if known_id else {}
        settings = {"console": "off"}  # else it captures what this process prints
        return {"run_name": project, "name": run.absolute().name, "dir": str(run), "settings": settings, **again}
    if name == "mlflow":
        artifacts = _prepare_mlflow(folder)
        where = {"logging_dir": artifacts, "run_id": known_id or None, "run_name": run.absolute().name}
        return {"experiment_name": PROJECT, **where}
    if name == "dvclive":
        return {"dir": str(folder), "resume": bool(known_id or nimg), "save_dvc_exp": False}
    if known()[name].requires_logging_directory:
        return {"run_name": PROJECT, "logging_dir": str(folder)}
    return {"run_name": PROJECT}


def _prepare_mlflow(folder: Path) -> str | None:
    """Have MLflow write into a database in this folder, unless MLFLOW_TRACKING_URI names a place; returns the path for
    images, None for the place's own."""
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return None
    import mlflow  # pyright: ignore[reportMissingImports]

    folder.mkdir(exist_ok=True)
    mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
    return str(folder / "artifacts")


def _id_of(name: str, tracker: Any) -> str:
    """The tracker's id of this run, by which the next start finds it again."""
    if name == "wandb":
        return str(tracker.tracker.id)
    return str(tracker.tracker.info.run_id) if name == "mlflow" else ""


def _log_scalars(name: str, tracker: Any, values: Mapping[str, float], nimg: int) -> None:
    if name == "wandb":  # its own steps can only grow, but a run that continues goes back to its checkpoint
        tracker.log({"nimg": nimg, **values})
    elif name == "mlflow":
        tracker.log({_mlflow_key(key): value for key, value in values.items()}, step=nimg)
    else:
        tracker.log(dict(values), step=nimg)


def _mlflow_key(key: str) -> str:
    """MLflow knows no other characters in names."""
    return re.sub(r"[^\w\-. :/]", "_", key, flags=re.ASCII)


def _tensorboard_image(tracker: Any, key: str, picture: torch.Tensor, nimg: int) -> None:
    tracker.tracker.add_image(key, picture, nimg)


def _wandb_image(tracker: Any, key: str, picture: torch.Tensor, nimg: int) -> None:
    tracker.log({"nimg": nimg}, commit=False)
    tracker.log_images({key: [to_pil(picture)]})


def _mlflow_image(tracker: Any, key: str, picture: torch.Tensor, nimg: int) -> None:
    import mlflow  # pyright: ignore[reportMissingImports]

    mlflow.log_image(to_pil(picture), key=_mlflow_key(key), step=nimg)


def _aim_image(tracker: Any, key: str, picture: torch.Tensor, nimg: int) -> None:
    tracker.log_images({key: to_pil(picture)}, step=nimg)


def _clearml_image(tracker: Any, key: str, picture: torch.Tensor, nimg: int) -> None:
    tracker.log_images({key: np.asarray(to_pil(picture))}, step=nimg)


def _swanlab_image(tracker: Any, key: str, picture: torch.Tensor, nimg: int) -> None:
    tracker.log_images({key: [to_pil(picture)]}, step=nimg)


# What logs an image to a tracker. Trackers that are not here get numbers and the configuration only.
IMAGES: dict[str, Callable[[Any, str, torch.Tensor, int], None]] = {
    "tensorboard": _tensorboard_image,
    "wandb": _wandb_image,
    "mlflow": _mlflow_image,
    "aim": _aim_image,
    "clearml": _clearml_image,
    "swanlab": _swanlab_image,
}


def _plain(value: Any) -> bool | int | float | str:
    """A value as all trackers can store it."""
    return value if isinstance(value, (bool, int, float, str)) else json.dumps(value)


def _read_ids(run: Path) -> dict[str, str]:
    """The ids that an earlier start has left in the run's folder."""
    try:
        content = read_json(run / FILE, "trackers begin new logs")
        if isinstance(content, dict) and all(isinstance(x, str) and len(x) <= LONGEST_ID for x in content.values()):
            return content
        raise UsageError(f"{run / FILE} holds no ids: trackers begin new logs")
    except FileNotFoundError:
        return {}
    except (OSError, UsageError) as error:
        log.warning(str(error))
        return {}


@functools.cache
def _hide_writer_tracebacks() -> None:
    """TensorBoard's writing thread hands its faults over to the next call. It also raises them in the thread, where
    nobody can catch them, so they are not shown."""
    others = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not type(args.thread).__module__.startswith("tensorboard."):
            others(args)

    threading.excepthook = hook
