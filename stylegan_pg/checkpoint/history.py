"""Protects the outputs of an earlier training in a run's folder that has no checkpoint to continue from.

A training that was killed before its first checkpoint simply starts again, as it repeats the same steps. The outputs of
a longer one must not be overwritten because its checkpoints are missing: starting is refused, or the outputs are moved
aside on request (--restart).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from stylegan_pg.checkpoint import checkpoint, status_file
from stylegan_pg.checkpoint.names import kimg
from stylegan_pg.checkpoint.status_file import Status
from stylegan_pg.errors import UsageError

# The outputs of a training. The status and the log are moved last, because `lost_its_checkpoints` reads them.
OUTPUTS = ("checkpoints", "snapshots", "averages", "samples", "tensorboard", "wandb", "mlflow", "aim", "dvclive")
OUTPUTS += ("trackers.json", "config.yaml", "ranks.json")
OUTPUTS += ("data-faults.jsonl", "metrics.png", "metrics.jsonl", "stats.jsonl", "log.txt", "status.json")
NO_SIGN = ("config.yaml", "ranks.json", "trackers.json", "status.json", "log.txt")  # of any run
# Lines of log.txt, without their time, which show that a run of an earlier version (without status.json) had a
# checkpoint.
WRITTEN = re.compile(
    r"the checkpoint at [^:]*: written|continuing from |(done|stopped; [^:]*): .* at (?!0(\.0)? )[0-9]"
)
RESTARTED = "restarted with --restart"
MEASURED = (("model", "low_precision_at"), ("train", "channels_last"))  # keys that a run fills in when it starts


def _status(run: Path) -> Status | None:
    """The content of status.json, None if it cannot be used."""
    try:
        return status_file.read(run)
    except (OSError, UsageError):
        return None


def _lines(run: Path) -> list[str]:
    """The lines of log.txt without their times."""
    try:
        log = (run / "log.txt").read_text("utf-8", errors="replace")
    except OSError:
        return []
    return [line.split(" ", 2)[-1] for line in log.splitlines()]


def left(run: Path) -> list[Path]:
    """The outputs that exist and are not empty. Temporary files are not counted."""
    there = [run / name for name in OUTPUTS]
    return [
        path for path in there if (any(path.glob("[!.]*")) if path.is_dir() else path.exists() and path.stat().st_size)
    ]


def lost_its_checkpoints(run: Path) -> bool:
    """Whether a training in this folder had checkpoints, none of which exists now."""
    if checkpoint.found(run / "checkpoints"):
        return False
    if status := _status(run):
        began = status.state in ("stopped", "done") and status.nimg > 0
        return began or status.checkpoint is not None or any((run / "checkpoints").glob("*.bad"))
    lines = _lines(run)
    if lines:
        return any(WRITTEN.match(line) for line in lines) or any((run / "checkpoints").glob("*.bad"))
    return any(path.name not in NO_SIGN for path in left(run))


def check(run: Path) -> list[str]:
    """Return a line for the log if a training that was killed before its first checkpoint has left outputs.

    Raises:
        UsageError: if that training had checkpoints; the message lists the outputs and the remedies.
    """
    there = left(run)
    if not lost_its_checkpoints(run):
        began = any(path.name == "log.txt" for path in there)
        return ["note: an earlier start ended before its first checkpoint; its steps are made again"] if began else []
    bad = sorted((run / "checkpoints").glob("*.bad"))
    aside = f" ({len(bad)} are put aside as NAME.bad, damaged or diverged)" if bad else ""
    snapshots = sorted((run / "snapshots").glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
    init = f" (with init={snapshots[-1]} to start from what it had learned)" if snapshots else ""
    raise UsageError(
        f"{run} holds what an earlier training has left ({', '.join(map(_described, there))}), but no checkpoint to "
        f"continue from{aside}. Put its checkpoints back to continue it, take another run=FOLDER{init}, or add "
        f"--restart, which moves all of this into {_aside(run)} and begins anew"
    )


def _described(path: Path) -> str:
    if path.is_dir():
        count = sum(1 for _ in path.iterdir())
        return f"{path.name}/ with {count} file{'s' * (count != 1)}"
    if path.name == "stats.jsonl":
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError, TypeError):
            last = json.loads(path.read_text("utf-8").splitlines()[-1])
            return f"{path.name} up to {kimg(last['nimg'])} kimg"
    return path.name


def _aside(run: Path) -> Path:
    """The first folder name before-N that does not exist."""
    number = 1
    while (run / f"before-{number}").exists():
        number += 1
    return run / f"before-{number}"


def restart(run: Path, config: dict[str, Any]) -> tuple[bool, str]:
    """Move the outputs of a run aside (--restart) -> (whether this was done, a line for the log).

    The same command may be given again, for example by a supervisor after an interruption. A run that was restarted
    with the same configuration therefore continues.

    Raises:
        UsageError: the outputs cannot be moved.
    """
    measured = {section: {**config.get(section, {}), key: None} for section, key in MEASURED}  # in RUN/config.yaml
    text = json.dumps(config | measured, sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
    mark = f"{RESTARTED} (settings {digest})"
    status = _status(run)
    done = status is not None and status.restarted == digest
    if status is None or status.starts is None:  # the run was begun by an earlier version
        done = done or any(line.startswith(mark) for line in _lines(run))
    if done and not lost_its_checkpoints(run):
        return False, (
            "note: --restart has been done with these settings, and the run goes on; to begin anew once more, move its "
            f"folder {run} away, or take another run=FOLDER"
        )
    aside = move_aside(run)
    try:
        status_file.write(run, Status(restarted=digest))
    except OSError as error:
        raise UsageError(f"run={run} cannot be written: {error}") from None
    return True, f"{mark}: {f'what was here is in {aside} now' if aside else 'nothing was here'}"


def move_aside(run: Path) -> Path | None:
    """Move all outputs into a new subfolder and return it, or None if there were no outputs.

    Raises:
        UsageError: the outputs cannot be moved.
    """
    there, aside = [path for path in (run / name for name in OUTPUTS) if path.exists()], _aside(run)
    if not there:
        return None
    try:
        aside.mkdir()
        for path in there:
            path.rename(aside / path.name)
    except OSError as error:
        raise UsageError(f"--restart: the outputs in {run} cannot be moved into {aside}: {error}") from None
    return aside
