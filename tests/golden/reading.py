"""The contents of a run's folder in a comparable form, read without the package that wrote it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

# The keys of stats.jsonl and metrics.jsonl that measure time and memory.
TIMES = ("img_per_sec", "eta_sec", "elapsed_sec", "memory_mib", "seconds")


def newest_checkpoint(run: Path) -> Path:
    """Return the checkpoint with the highest nimg in a run's folder."""
    return max((run / "checkpoints").glob("*.safetensors"), key=lambda path: int(path.stem))


def final_snapshot(run: Path) -> Path:
    """Return the last snapshot by name that is not marked as the best."""
    return max(path for path in (run / "snapshots").glob("*.safetensors") if not path.name.startswith("best"))


def tensors_of(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return all tensors of a safetensors file, and the texts in its header."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def digest(t: torch.Tensor) -> dict[str, Any]:
    """Return shape, dtype and SHA-256 of a tensor's bytes, and the sum and the sum of squares of its values, in float64
    without rounding errors of the summation."""
    values = t.double().flatten().tolist()
    data = t.contiguous().flatten().view(torch.uint8) if t.numel() else t.new_empty(0, dtype=torch.uint8)
    return {
        "shape": list(t.shape),
        "dtype": str(t.dtype).removeprefix("torch."),
        "sha256": hashlib.sha256(data.numpy().tobytes()).hexdigest(),
        "sum": math.fsum(values),
        "squares": math.fsum(v * v for v in values),
    }


def sums(digests: Mapping[str, Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return {name: [number of values, their sum, their sum of squares]} of digests, to twelve digits."""
    return {
        name: [math.prod(d["shape"]), float(f"{d['sum']:.12g}"), float(f"{d['squares']:.12g}")]
        for name, d in digests.items()
    }


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a recording that other machines reproduce up to rounding: nimg, phase, the sums of the
    networks' weights, and the numbers in the last line of statistics."""
    networks = {name: d for name, d in found["tensors"].items() if not name.startswith("opt_") and d["shape"]}
    last = {key: value for key, value in found["stats"][-1].items() if isinstance(value, int | float)}
    return {
        "nimg": found["nimg"],
        "phase": found["phase"],
        "lines": len(found["stats"]),
        "last_line": last,
        "sums": sums(networks),
    }


def compact(tree: Any) -> str:
    """Return JSON in which each list of numbers is on one line."""
    text = json.dumps(tree, indent=0)
    return re.sub(r"\[[^\[\]{}]*\]", lambda match: re.sub(r"\s+", " ", match[0]), text) + "\n"


WEIGHTS = ("G/", "D/", "G_ema/")
ROUNDING = 1e-6  # a step of Adam is about the learning rate, 1e-3


def unlike(expected: Mapping[str, list[float]], found: Mapping[str, list[float]], tolerance: float) -> list[str]:
    """Return the tensors whose sums differ, as lines of text. The tolerance is relative to the largest possible sum of
    values with this mean square. Weights that have moved from 0 only by rounding are considered equal, such as a bias
    before a normalisation: its gradient is 0 up to rounding, which Adam divides by its own magnitude."""
    lines = [f"{name} is in one of them only" for name in sorted(expected.keys() ^ found.keys())]
    for name in sorted(expected.keys() & found.keys()):
        (count, total, squares), (other_count, other_total, other_squares) = expected[name], found[name]
        moved = math.sqrt(max(squares, other_squares) / max(count, 1))
        if count == other_count and name.startswith(WEIGHTS) and moved < ROUNDING:
            continue
        scale = math.sqrt(count * squares) + 1e-30
        apart = max(abs(total - other_total) / scale, abs(squares - other_squares) / (squares + 1e-30))
        if count != other_count or not apart <= tolerance:
            lines.append(f"{name}: sums {total} and {squares}, now {other_total} and {other_squares} ({apart:.1e})")
    return lines


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a .jsonl file, without times."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def pixels(path: Path) -> str:
    """Return the SHA-256 of a picture's mode, size and decoded pixels."""
    with Image.open(path) as image:
        head = f"{image.mode} {image.size}".encode()
        return hashlib.sha256(head + np.asarray(image).tobytes()).hexdigest()


def pictures_in(folder: Path) -> dict[str, str]:
    return {path.name: pixels(path) for path in sorted(folder.glob("*.png"))}


def recording(run: Path) -> dict[str, Any]:
    """Return everything in a run's folder that must stay the same: numbers by name, as JSON values. Configuration and
    versions are in `about`, apart from the numbers."""
    tensors, header = tensors_of(newest_checkpoint(run))
    state = json.loads(header["state"])
    snapshot = final_snapshot(run)
    weights, description = tensors_of(snapshot)
    told = json.loads(description["stylegan_pg"])
    about = {"environment": state.pop("environment"), "config": state.pop("config")}
    about["snapshot"] = {key: told.pop(key) for key in ("config", "stylegan_pg") if key in told}
    return {
        "about": about,
        "nimg": state["nimg"],
        "phase": state["phase"],
        "state": state,
        "tensors": {name: digest(t) for name, t in tensors.items()},
        "snapshot": {name: digest(t) for name, t in weights.items()},
        "snapshot_description": told,
        "snapshot_names": sorted(path.name for path in (run / "snapshots").iterdir()),
        "stats": lines_of(run / "stats.jsonl"),
        "metrics": lines_of(run / "metrics.jsonl"),
        "samples": pictures_in(run / "samples"),
    }


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return a tree of dictionaries and lists as {"a.0.b": value}."""
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, list) and tree:
        items = list(enumerate(tree))
    else:
        return {prefix: tree}
    out: dict[str, Any] = {} if items else {f"{prefix}/(empty)": True}
    for key, value in items:
        out |= flat(value, f"{prefix}/{key}" if prefix else str(key))
    return out


def differences(a: dict[str, Any], b: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Compare two recordings of one case. Return the numbers that differ; and keys of the state, the descriptions and
    the configuration that exist in only one of them, or that describe another way of making the run."""
    one, two = flat(a), flat(b)
    numbers, others = [], []
    for key in sorted(one.keys() | two.keys()):
        if key in one and key in two and repr(one[key]) == repr(two[key]):
            continue
        text = f"{key}: {one.get(key, '(missing)')} != {two.get(key, '(missing)')}"
        lone = key not in one or key not in two
        loose = key.startswith(("about/", "arguments/")) or (
            lone and key.startswith(("state/", "snapshot_description/", "stats/"))
        )
        (others if loose else numbers).append(text)
    return numbers, others
