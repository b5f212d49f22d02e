"""The process group: the only module that calls torch.distributed.

All functions also work in a single process, where the collectives do nothing. Launchers (torchrun, accelerate, srun
with the usual variables) give each process its place by RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as td
from torch.distributed.rendezvous import rendezvous

from stylegan_pg.distributed import launcher
from stylegan_pg.errors import PeersLost, RunError, UsageError


class Waiting:
    """Measures the seconds in collectives, most of which are waits for slower ranks, between `go` and `pause`.

    On a GPU these are the seconds for which its stream stands still, as the CPU only enqueues a collective. They are
    measured by events before and after it, which `take` reads, so that no step waits for them.
    """

    def __init__(self):
        self.counting, self.seconds = False, 0.0
        self.stops: list[tuple[Any, Any]] = []  # events in the stream, before and behind each collective

    def go(self) -> None:
        self.counting = True

    def pause(self) -> None:
        self.counting = False

    @contextlib.contextmanager
    def within(self, device: torch.device) -> Iterator[None]:
        """Measure a block with a collective of tensors on a device, or with a stream's wait for one."""
        if not self.counting:
            yield
        elif device.type == "cuda":
            before, behind = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            yield
            behind.record()
            self.stops.append((before, behind))
        else:
            started = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - started

    def take(self) -> float:
        """The seconds measured since the last call."""
        seconds = self.seconds
        for before, behind in self.stops:
            behind.synchronize()
            seconds += before.elapsed_time(behind) / 1000
        self.seconds, self.stops = 0.0, []
        return seconds


waiting = Waiting()  # of this process
_CPU = torch.device("cpu")


def init(device: str = "auto", timeout: float = 600.0, join: float = 600.0) -> torch.device:
    """Join the process group that the environment describes, and choose this rank's device.

    Args:
        timeout: seconds after which a rank that no longer answers counts as lost.
        join: seconds that the ranks wait for each other at the start.

    Raises:
        UsageError: environment variables are contradictory, a name does not resolve, a port or a rank is in use, or
            `cuda` was requested and is not available.
        PeersLost: the other ranks did not join in time.
    """
    at = launcher.place()
    launcher.register()
    local = at.local
    use_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if use_cuda and not torch.cuda.is_available():
        raise UsageError("train.device=cuda, but torch finds no CUDA device: use train.device=auto or cpu")
    target = torch.device("cuda", local) if use_cuda else torch.device("cpu")
    if use_cuda:
        if local >= torch.cuda.device_count():
            raise UsageError(f"LOCAL_RANK={local}, but this node has {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(target)
    if at.world > 1 and not td.is_initialized():
        _join(at, "cpu:gloo,cuda:nccl" if use_cuda else "gloo", datetime.timedelta(seconds=join))
        _set_timeout(datetime.timedelta(seconds=timeout))
    return target


def _set_timeout(timeout: datetime.timedelta) -> None:
    """Set the timeout of the following collectives (the function has another name before torch 2.10)."""
    barrier()  # no rank continues before all have joined
    group = td.group.WORLD
    if hasattr(group, "set_timeout"):
        group.set_timeout(timeout)  # type: ignore[union-attr]  # not None, as just seen
    else:
        td.distributed_c10d._set_pg_timeout(timeout, group)


def _join(at: launcher.Place, backend: str, timeout: datetime.timedelta) -> None:
    where = f"rank {at.rank} on {socket.gethostname()}, MASTER_ADDR={at.address} MASTER_PORT={at.port}"
    try:
        store, _, _ = next(rendezvous("env://", timeout=timeout))
        # torchrun's agents number their processes themselves and keep the store when they start them again.
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and store.add(f"taken/{at.rank}", 1) > 1:
            raise UsageError(f"there are two processes of rank {at.rank}, this one {where}: give each node its own")
        td.init_process_group(backend, store=store, rank=at.rank, world_size=at.world, timeout=timeout)
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:300]
        if "EADDRINUSE" in reason or "address already in use" in reason.lower():
            raise UsageError(
                f"the port is taken ({where}): is there another process of rank 0, or another run on this node? Take "
                "another MASTER_PORT, the same on all nodes"
            ) from None
        raise PeersLost(
            f"the {at.world} processes did not find each other within train.join_sec={timeout.total_seconds():g} "
            f"({where}): {reason}. Are all nodes started, with the same MASTER_ADDR and MASTER_PORT, which a firewall "
            "lets through?"
        ) from None


def shutdown(*, failed: bool = False) -> None:
    """Leave the group, after a barrier unless this rank has failed; otherwise ranks that end first abort the others."""
    if is_joined():
        if not failed:
            td.barrier()
        td.destroy_process_group()


def is_joined() -> bool:
    """Whether this process belongs to a process group now."""
    return td.is_available() and td.is_initialized()


def rank() -> int:
    return td.get_rank() if is_joined() else 0


def world() -> int:
    return td.get_world_size() if is_joined() else 1


def is_main() -> bool:
    """Whether this rank is the one that prints and writes."""
    return rank() == 0


@contextlib.contextmanager
def _peers(device: torch.device = _CPU) -> Iterator[None]:
    """Turn torch.distributed's exceptions for a lost rank into PeersLost, and measure the time of the block."""
    try:
        with waiting.within(device):
            yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:200]
        raise PeersLost(f"rank {rank()} lost the other ranks, one of which failed or was stopped: {reason}") from None


def barrier() -> None:
    if world() > 1:
        with _peers():
            td.barrier()


def all_reduce(tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
    """Sum a tensor over the ranks in place (or take the maximum), and return it. A collective call."""
    if world() > 1:
        with _peers(tensor.device):
            td.all_reduce(tensor, op=td.ReduceOp.MAX if op == "max" else td.ReduceOp.SUM)
    return tensor


def begin_sum(tensor: torch.Tensor) -> Callable[[], None]:
    """Start to sum a tensor over the ranks in place. The returned function waits for the sum. All ranks must start the
    same sums in the same order."""
    if world() == 1:
        return lambda: None
    with _peers():
        work = td.all_reduce(tensor, async_op=True)

    def wait() -> None:
        with _peers(tensor.device):
            work.wait()  # type: ignore[union-attr]  # None only for ranks outside of the group

    return wait


def ensure_group() -> None:
    """Create a process group also for a single process, for libraries that require one."""
    if not td.is_initialized():
        store = td.HashStore()  # pyright: ignore[reportPrivateImportUsage] - in the documentation all the same
        td.init_process_group("gloo", store=store, rank=0, world_size=1)


def broadcast_object(value: Any, source: int = 0) -> Any:
    """Rank `source`'s value, on every rank. It is pickled, so it must never contain data from outside the job."""
    if world() == 1:
        return value
    box = [value]
    with _peers():
        td.broadcast_object_list(box, src=source)
    return box[0]


def broadcast_tensors(tensors: dict[str, torch.Tensor], source: int) -> dict[str, torch.Tensor]:
    """Rank `source`'s tensors, by name, on every rank; they are on the CPU."""
    if world() == 1:
        return tensors
    forms = broadcast_object([(name, t.dtype, t.shape) for name, t in tensors.items()], source)
    received = {}
    for name, dtype, shape in forms:
        t = tensors[name].contiguous() if rank() == source else torch.empty(shape, dtype=dtype)
        if t.numel():
            with _peers():
                td.broadcast(t.reshape(-1).view(torch.uint8), src=source)
        received[name] = t
    return received


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in order of rank, on every rank."""
    if world() == 1:
        return [value]
    out: list[Any] = [None] * world()
    with _peers():
        td.all_gather_object(out, value)
    return out


def gather_on_main(value: Any) -> list[Any] | None:
    """Every rank's value, in order of rank, on rank 0; None on the others."""
    if world() == 1:
        return [value]
    out: list[Any] | None = [None] * world() if is_main() else None
    with _peers():
        td.gather_object(value, out)
    return out


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Run a block without collectives on all ranks; if it fails on one, it raises on all, so that none is left
    waiting."""
    fault: Exception | None = None
    try:
        yield
    except Exception as error:  # whatever it is, the other ranks must hear of it
        fault = error
    faults = gather_objects((type(fault).__name__, str(fault)) if fault else None)
    if fault is not None:
        raise fault
    for i, first in enumerate(faults):
        if first:
            raise (UsageError if first[0] == "UsageError" else RunError)(f"rank {i}: {first[1]}")


@contextlib.contextmanager
def main_decides() -> Iterator[list[Any]]:
    """Run a block on rank 0; its exceptions are raised on all ranks, so that none is left waiting.

    Yields a list: what rank 0 puts into it is in it on every rank after the block. Use as
    `with main_decides() as box: if is_main(): box.append(...)`.
    """
    box: list[Any] = []
    fault: BaseException | None = None
    try:
        yield box
    except Exception as error:  # whatever it is, the other ranks must hear of it
        fault = error
    described = (type(fault).__name__, str(fault)) if fault else None
    result, first = broadcast_object((list(box), described)) if world() > 1 else (list(box), described)
    if fault is not None:
        raise fault
    if first is not None:
        raise (UsageError if first[0] == "UsageError" else RunError)(first[1])
    box[:] = result


def parameters_hash(tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for t in tensors:
        digest.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_same(tensors: Iterable[torch.Tensor], what: str) -> None:
    """Check that all ranks have the same values, by hashes. A collective call.

    Raises:
        RunError: with the ranks that differ from rank 0, and both hashes.
    """
    if world() == 1:
        return
    hashes = gather_objects(parameters_hash(tensors))
    differing = [i for i, h in enumerate(hashes) if h != hashes[0]]
    if differing:
        raise RunError(
            f"{what} of ranks {differing} differ from rank 0's ({hashes[differing[0]]} on rank {differing[0]}, "
            f"{hashes[0]} on rank 0): unequal software, hardware faults or a bug; "
            "run the same command again to continue from the last checkpoint"
        )
