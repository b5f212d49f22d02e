"""Communication between launchers and the processes that they start, by environment variables and a folder.

Every launcher gives each process its place as RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. The scripts in
launch/ also name a folder on the node, $STYLEGAN_PG_AGENT. A file `stop` in it asks the processes to write a checkpoint
and stop (SIGUSR1 to the processes in `pid.LOCAL_RANK` ends their waits). Each process writes its exit code to
`exit.LOCAL_RANK` there, because torchrun and accelerate turn every code into 1.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from stylegan_pg.errors import DONE, TO_BE_CONTINUED, UsageError
from stylegan_pg.untrusted import printable

FOLDER = "STYLEGAN_PG_AGENT"
EXPECTED = "STYLEGAN_PG_WORLD"  # how many processes the launch script has asked for
# What schedulers call the number of processes that they started (Kubeflow: of nodes); each of these would be a world of
# its own without RANK.
COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PET_NNODES")
LARGEST_WORLD = 1 << 20
SCRIPTS = "STYLEGAN_PG_SCRIPTS"  # process ids of the launch scripts, each started by the one before it
START = "start it with torchrun, accelerate or the scripts in launch/"


class Place(NamedTuple):
    """The place of a process among the others; `local` is its rank within its node."""

    rank: int = 0
    world: int = 1
    local: int = 0
    local_world: int = 1
    address: str = ""  # of the master, with `port`; "" where there is one process
    port: int = 0


def place(env: Mapping[str, str] = os.environ) -> Place:
    """This process's place, from its environment.

    Raises:
        UsageError: variables are contradictory or missing, or the process would be alone by accident, so that several
            independent processes would train the same run.
    """
    rank, world = _number(env, "RANK", 0), _number(env, "WORLD_SIZE", 1)
    local, local_world = _number(env, "LOCAL_RANK", 0), _number(env, "LOCAL_WORLD_SIZE", 0)
    expected = _number(env, EXPECTED, world)
    if not 0 < world <= LARGEST_WORLD:
        raise UsageError(f"WORLD_SIZE={world} is no number of processes: {START}")
    if world != expected:
        raise UsageError(f"a world of {world} processes, but {expected} were asked for ({EXPECTED}): {START}")
    alone = "to train in one process all the same, set WORLD_SIZE=1"
    if not env.get("WORLD_SIZE"):
        for name in COUNTS:
            if _number({name: env.get(name, "").rpartition(":")[2]}, name, 1) > 1:  # a range (1:4) may go up to its end
                raise UsageError(
                    f"{name}={printable(env[name])}, but no RANK and WORLD_SIZE: each process would be a world of one; "
                    f"let one task per node {START.removeprefix('start it ')} ({alone})"
                )
        if env.get("MASTER_ADDR"):
            raise UsageError(
                f"MASTER_ADDR={printable(env['MASTER_ADDR'])}, but no RANK and WORLD_SIZE: a world of one by accident, "
                "as `accelerate launch --cpu --num_processes N` makes it; on CPUs use `ACCELERATE_USE_CPU=true "
                f"accelerate launch --multi_gpu --num_processes N` or launch/accelerate.sh ({alone})"
            )
        if env.get("RANK") or local:
            name = "RANK" if env.get("RANK") else "LOCAL_RANK"
            raise UsageError(f"{name}={printable(env[name])}, but no WORLD_SIZE: {START}; {alone}, or unset {name}")
    if not 0 <= rank < world:
        raise UsageError(f"RANK={rank} does not lie in WORLD_SIZE={world}: {START}")
    if world == 1:
        return Place()
    if not 0 <= local < (local_world or world) <= world:
        raise UsageError(
            f"LOCAL_RANK={local} does not lie in LOCAL_WORLD_SIZE={local_world or world} of WORLD_SIZE={world}: {START}"
        )
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not env.get(name):
            raise UsageError(f"WORLD_SIZE={world} without {name}: {START}")
    found = Place(
        rank,
        world,
        local,
        local_world or _number(env, "LOCAL_SIZE", 1),  # as DeepSpeed's launcher calls it
        env["MASTER_ADDR"],
        _number(env, "MASTER_PORT", 0),
    )
    _check_names(found, env)
    return found


def _check_names(at: Place, env: Mapping[str, str]) -> None:
    """Refuse names that do not resolve, or that resolve to the machine itself where others must reach it."""
    try:
        master = _addresses(at.address)
    except (OSError, UnicodeError) as error:  # the latter of names that no host can have
        raise UsageError(
            f"MASTER_ADDR={printable(at.address)} (port {at.port}) is not known on {socket.gethostname()}: {error}; "
            "give the address of the first node"
        ) from None
    if not 0 < at.port < 65536:
        raise UsageError(f"MASTER_PORT={at.port} is no port: 1 to 65535, the same on all nodes")
    spans = at.local_world < at.world and not all(a.startswith("127.") or a == "::1" for a in master)
    if spans and not env.get("GLOO_SOCKET_IFNAME"):
        own = socket.gethostname()
        try:
            mine = _addresses(own)
        except OSError:
            mine = {"127.0.0.1"}
        if all(a.startswith("127.") or a == "::1" for a in mine):
            raise UsageError(
                f"this node's name {own} leads to {', '.join(sorted(mine))}, where the other nodes cannot reach it: "
                "name the network interface in GLOO_SOCKET_IFNAME (see `ip address`), or mend /etc/hosts"
            )


def _addresses(name: str) -> set[str]:
    return {str(entry[4][0]) for entry in socket.getaddrinfo(name, None, proto=socket.IPPROTO_TCP)}


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, "").strip()
    try:
        return int(text) if text else default
    except ValueError:
        raise UsageError(f"the environment variable {name}={printable(repr(text), 80)} is not a number") from None


def is_alone(env: Mapping[str, str] = os.environ) -> bool:
    """Whether no variable says that there are other processes."""
    return env.get("WORLD_SIZE", "") in ("", "1")


def is_launched(detached: bool, env: Mapping[str, str] = os.environ) -> bool:
    """Whether the parent is a launcher, whose end must end this process, too.

    Args:
        detached: the process was started under nohup, so that a parent which is not known to be a launcher may end.
    """
    if "TORCHELASTIC_RUN_ID" in env or env.get(SCRIPTS):  # torchrun and accelerate; the scripts in launch/
        return True
    launchers = ("CROSS_RANK", "ACCELERATE_MIXED_PRECISION")  # DeepSpeed's and accelerate's, also of a single process
    return not detached and (not is_alone(env) or any(name in env for name in launchers))


def register() -> None:
    """Register this process in the launch script's folder, and remove the files of an earlier process at its place."""
    _write_number("exit", None)
    _write_number("pid", os.getpid())


def _write_number(what: str, value: int | None) -> None:
    """Write a number for the launch script on this node, or remove it (None)."""
    for path in _in_folder(f"{what}.{os.environ.get('LOCAL_RANK', '0')}"):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True) if value is None else path.write_text(f"{value}\n", "utf-8")


def asked_to_stop() -> bool:
    """Whether the launch script on this node wants the run to stop."""
    return any(path.exists() for path in _in_folder("stop"))


def ask_to_stop() -> None:
    """Request a stop on this node, because the launch script of another node has requested it."""
    for path in _in_folder("stop"):
        with contextlib.suppress(OSError):
            path.touch()


def leave(code: int) -> int:
    """Record this process's exit code for the launch script; returns the code to end with.

    Under a launch script, a run that can be continued ends with 0, because torchrun takes other codes for crashes and
    would start the processes again. The script reads the true code from the folder.
    """
    _write_number("pid", None)
    _write_number("exit", code)
    return DONE if code == TO_BE_CONTINUED and os.environ.get(FOLDER) else code


def _in_folder(name: str) -> list[Path]:
    """The file of that name in the launch script's folder, as a list; empty if no such script started this process."""
    folder = os.environ.get(FOLDER)
    return [Path(folder, name)] if folder else []
