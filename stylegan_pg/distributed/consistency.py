"""Checks that all ranks of a run agree: in configuration, dataset, code and clock."""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stylegan_pg.config import Config
from stylegan_pg.config.plain import flat, to_plain
from stylegan_pg.distributed import environment
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.errors import UsageError
from stylegan_pg.version import __version__

# Keys whose values may differ between nodes.
OF_A_NODE = ("run", "data.url", "data.mixture", "data.workers", "data.cache_dir", "data.cache_gib", "metrics.weights")
CLOCK = 60.0  # seconds by which clocks may differ


def facts(config: Config, dataset: str) -> dict[str, Any]:
    """The facts about this process that are compared among the ranks; `dataset` is the dataset's identity."""
    return {
        "host": socket.gethostname(),
        "config": {k: v for k, v in flat(to_plain(config)).items() if not k.startswith(OF_A_NODE)},
        "dataset": dataset,
        "code": {"stylegan_pg": f"{__version__} ({code_digest()})", "torch": str(torch.__version__)},
        "variables": environment.noticed(),
        "time": time.time(),
    }


def code_digest() -> str:
    """A digest of the package's sources, 12 hexadecimal digits."""
    digest, root = hashlib.blake2b(digest_size=6), Path(__file__).parent.parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def differences(everyone: Sequence[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Compare the `facts` of all ranks, in order of rank, with those of rank 0 -> (faults, warnings)."""
    faults: dict[str, None] = {}  # without duplicates, as the ranks of a node mostly have the same fault
    first, warnings = everyone[0], {}
    for rank, other in enumerate(everyone):
        who = f"rank {rank} ({other['host']})"
        a, b = first["config"], other["config"]
        keys = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
        if keys:
            examples = ", ".join(f"{k}={b.get(k)} where rank 0 has {a.get(k)}" for k in keys[:4])
            faults[f"{who} has another configuration: {examples}"] = None
        if first["dataset"] != other["dataset"]:
            faults[f"{who} has other data than rank 0 under data.url"] = None
        for name, version in other["code"].items():
            if first["code"].get(name) != version:
                faults[f"{who} runs {name} {version}, rank 0 {first['code'].get(name)}"] = None
        ahead = other["time"] - first["time"]
        if abs(ahead) > CLOCK and other["host"] not in warnings:
            side = "ahead of" if ahead > 0 else "behind"
            warnings[other["host"]] = (
                f"the clock of {other['host']} is {abs(ahead):.0f} seconds {side} that of {first['host']}: "
                "certificates and signed URLs may be refused there; set it (chronyc makestep, timedatectl set-ntp true)"
            )
    return list(faults), [*warnings.values(), *environment.remarks(everyone)]


def check(config: Config, dataset: str) -> list[str]:
    """Compare all ranks at the start; returns warnings. A collective call.

    Raises:
        UsageError: on all ranks, with the ranks that differ from rank 0 and what differs.
    """
    dist.barrier()  # so that all ranks read their clocks at the same time
    faults, warnings = differences(dist.gather_objects(facts(config, dataset)))
    if faults:
        more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise UsageError(
            f"the processes do not belong together: {'; '.join(faults[:8])}{more}. Start all nodes with the same "
            "command, code and data"
        )
    return warnings
