"""The process group: the only module that calls torch.distributed.

Everything works the same in a single process, where the collectives do nothing. Launchers (torchrun, accelerate,
srun with the usual variables) tell each process its place through RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as td

from stylegan_pg.errors import PeersLost, RunError, UsageError


def _from_environment(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    try:
        return int(text) if text else default
    except ValueError:
        raise UsageError(f"the environment variable {name}={text!r} is not a number") from None


def init(device: str = "auto") -> torch.device:
    """Join the process group that the environment describes, and choose this rank's device.

    Raises:
        UsageError: contradictory environment variables, or `cuda` asked for where there is none.
    """
    world_size, rank_ = _from_environment("WORLD_SIZE", 1), _from_environment("RANK", 0)
    local = _from_environment("LOCAL_RANK", 0)
    if not 0 <= rank_ < world_size:
        raise UsageError(
            f"RANK={rank_} does not lie in WORLD_SIZE={world_size}: start this with torchrun or accelerate"
        )
    use_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if use_cuda and not torch.cuda.is_available():
        raise UsageError("train.device=cuda, but torch finds no CUDA device: use train.device=auto or cpu")
    target = torch.device("cuda", local) if use_cuda else torch.device("cpu")
    if use_cuda:
        if local >= torch.cuda.device_count():
            raise UsageError(f"LOCAL_RANK={local}, but this node has {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(target)
    if world_size > 1 and not td.is_initialized():
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise UsageError(f"WORLD_SIZE={world_size} without {name}: start this with torchrun or accelerate")
        backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
        td.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    return target


def shutdown(*, failed: bool = False) -> None:
    """Leave the group; after a barrier, without which ranks that end first abort the others (unless this one fails)."""
    if td.is_available() and td.is_initialized():
        if not failed:
            td.barrier()
        td.destroy_process_group()


def rank() -> int:
    return td.get_rank() if td.is_available() and td.is_initialized() else 0


def world() -> int:
    return td.get_world_size() if td.is_available() and td.is_initialized() else 1


def is_main() -> bool:
    """Whether this rank is the one that prints and writes."""
    return rank() == 0


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    """What torch.distributed raises when another rank is gone, as one message."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:200]
        raise PeersLost(f"rank {rank()} lost the other ranks, one of which failed or was stopped: {reason}") from None


def barrier() -> None:
    if world() > 1:
        with _peers():
            td.barrier()


def all_reduce(tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
    """Sum (or `max`) over the ranks, in place."""
    if world() > 1:
        with _peers():
            td.all_reduce(tensor, op=td.ReduceOp.MAX if op == "max" else td.ReduceOp.SUM)
    return tensor


def begin_sum(tensor: torch.Tensor) -> Callable[[], None]:
    """Start summing over the ranks, in place, and go on; the sum is there once what is returned has been called. All
    ranks begin the same sums in the same order."""
    if world() == 1:
        return lambda: None
    with _peers():
        work = td.all_reduce(tensor, async_op=True)

    def wait() -> None:
        with _peers():
            work.wait()  # type: ignore[union-attr]  # None only for ranks outside of the group

    return wait


def ensure_group() -> None:
    """A process group also for a single process, for libraries that want one."""
    if not td.is_initialized():
        store = td.HashStore()  # pyright: ignore[reportPrivateImportUsage] - in the documentation all the same
        td.init_process_group("gloo", store=store, rank=0, world_size=1)


def broadcast_object(value: Any, source: int = 0) -> Any:
    """Rank `source`'s value, on every rank. Between the ranks of one job only: never for data from outside."""
    if world() == 1:
        return value
    box = [value]
    with _peers():
        td.broadcast_object_list(box, src=source)
    return box[0]


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
    """Run a block without collectives on all ranks: where it fails on one, it fails on all, none is left waiting."""
    fault: Exception | None = None
    try:
        yield
    except Exception as error:  # whatever it is, the other ranks must hear of it
        fault = error
    told = gather_objects((type(fault).__name__, str(fault)) if fault else None)
    if fault is not None:
        raise fault
    for i, first in enumerate(told):
        if first:
            raise (UsageError if first[0] == "UsageError" else RunError)(f"rank {i}: {first[1]}")


@contextlib.contextmanager
def main_decides() -> Iterator[list[Any]]:
    """Run a block on rank 0 alone and have its fault raised by all, instead of leaving the others waiting.

    Yields a list: rank 0 puts its result in, and every rank finds it there after the block. Use as
    `with main_decides() as box: if is_main(): box.append(...)`.
    """
    box: list[Any] = []
    fault: BaseException | None = None
    try:
        yield box
    except Exception as error:  # whatever it is, the other ranks must hear of it
        fault = error
    told = (type(fault).__name__, str(fault)) if fault else None
    result, first = broadcast_object((list(box), told)) if world() > 1 else (list(box), told)
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
    """Stop if the ranks hold different values.

    Raises:
        RunError: naming the ranks that differ from rank 0.
    """
    if world() == 1:
        return
    hashes = gather_objects(parameters_hash(tensors))
    differing = [i for i, h in enumerate(hashes) if h != hashes[0]]
    if differing:
        raise RunError(
            f"{what} of ranks {differing} differ from rank 0's: unequal software, hardware faults or a bug; "
            "run the same command again to continue from the last checkpoint"
        )
