"""Finds the newest checkpoint that any rank can read and sends it to all ranks, with or without a shared file system.

Rank 0 writes checkpoints into its own folder. If the nodes do not share that folder, and ranks are assigned to nodes in
another order than last time, the newest checkpoint may be on another node. So one rank of each node looks for it, and
the one that has the newest sends it to the others.
"""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from stylegan_pg.checkpoint import checkpoint, history
from stylegan_pg.checkpoint.run_folder import RunFolder
from stylegan_pg.distributed import process_group as dist

log = logging.getLogger(__name__)

SHOWN = 4  # ranks of many, in messages


@dataclass(frozen=True)
class Views:
    """The hosts of all ranks, and the ranks that look for checkpoints: rank 0, and for each other folder the first rank
    that sees it."""

    hosts: list[str]
    owners: list[int]


def claim(folder: RunFolder, config: dict[str, Any], restart: bool) -> Views:
    """Lock the run's folder on rank 0, move its outputs aside on `restart`, and find out which ranks share it.

    What was moved aside, and ranks that do not share the folder, are logged. A collective call.

    Raises:
        UsageError: as RunFolder.claim and history.restart, on all ranks.
    """
    with dist.main_decides() as box:
        if dist.is_main():
            folder.claim()
            anew, line = history.restart(folder.path, config) if restart else (False, "")
            if line:
                log.info(line)
            box[:] = [folder.sign(), anew]
    word, anew = box
    place = (socket.gethostname(), str(folder.path.absolute()))
    sees = dist.is_main() or folder.is_signed(word)
    everyone = dist.gather_objects((place, sees))
    apart = [rank for rank, (where, sees) in enumerate(everyone) if not (sees or where == everyone[0][0])]
    first: dict[tuple[str, str], int] = {}
    for rank in apart:
        first.setdefault(everyone[rank][0], rank)
    seen = Views([host for (host, _), _ in everyone], [0, *first.values()])
    if anew:
        with dist.together():
            if dist.rank() in first.values():  # outputs on other nodes are moved aside, too
                history.move_aside(folder.path)
    if apart:
        who = ", ".join(f"{rank} ({seen.hosts[rank]})" for rank in apart[:SHOWN])
        more = f" and {len(apart) - SHOWN} more" if len(apart) > SHOWN else ""
        log.warning(
            f"the run's folder is not shared: rank {who}{more} cannot see {folder.path} of rank 0 on "
            f"{seen.hosts[0]}, which alone gets checkpoints, logs and snapshots; put run= on a file system that all "
            "nodes share"
        )
    return seen


@dataclass(frozen=True)
class Found:
    """The checkpoint to continue from, or an empty path; the same on all ranks."""

    path: str = ""
    where: str = ""  # the run's folder, and the rank that sees it if that is not rank 0
    holder: int = 0
    problems: list[str] = field(default_factory=list)  # with newer ones
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


def find(run: Path, seen: Views) -> Found:
    """Find the newest good checkpoint in the folder of any rank and send it to all ranks. A collective call.

    Raises:
        UsageError, RunError: as checkpoint.newest_good, on all ranks.
    """
    mine, path = Found(), None
    with dist.together():
        if dist.rank() in seen.owners:
            path, tensors, state, problems = checkpoint.newest_good(run / "checkpoints")
            mine = Found(str(path or ""), str(run), dist.rank(), problems, tensors, state)
    looks = dist.gather_objects((int(path.stem) if path else -1, mine.problems))
    numbers, problems = [number for number, _ in looks], [problem for _, some in looks for problem in some]
    holder = numbers.index(max(numbers))
    if numbers[holder] < 0:
        return Found()
    path, where, state = dist.broadcast_object((mine.path, mine.where, mine.state), holder)
    if holder:
        where = f"{where} of rank {holder} ({seen.hosts[holder]})"
    return Found(path, where, holder, problems, dist.broadcast_tensors(mine.tensors, holder), state)
