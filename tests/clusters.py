"""A cluster on this machine, for the tests of launch/: hosts as network namespaces, and a Slurm of two nodes.

Both need root; each says why it cannot be had, for the tests to skip.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import harness
from conftest import ROOT

LAUNCH = ROOT / "launch"


def environment(**more: str) -> dict[str, str]:
    import sys

    kept = {k: v for k, v in harness.environment().items() if not k.startswith(("STYLEGAN_PG_WORLD", "SLURM_"))}
    return kept | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "NPROC": "1"} | more


def run(*command: str, check: bool = True) -> str:
    result = subprocess.run(command, capture_output=True, text=True, env=environment())
    if check and result.returncode:
        raise RuntimeError(f"{' '.join(command)}: {result.stdout}{result.stderr}")
    return result.stdout


def wait_until(condition, seconds: float, what: str, log=lambda: "") -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, f"waited {seconds} s for {what}\n{log()}"
        time.sleep(0.05)


class Hosts:
    """`count` hosts 10.77.N.1, .2, ... on a bridge. Each is a network namespace with an interface eth0 and a name that
    all hosts know."""

    def __init__(self, count: int, folder: Path):
        self.tag = f"sg{os.getpid() % 10000}"
        self.folder, self.net = folder, f"10.77.{os.getpid() % 250}"
        self.hosts: dict[int, subprocess.Popen] = {}
        self.bridge = f"{self.tag}b"
        self.count = count
        try:
            run("ip", "link", "add", self.bridge, "type", "bridge")
            run("ip", "link", "set", self.bridge, "up")
            for i in range(count):
                self._make(i)
        except BaseException:  # also Ctrl-C: it is raised again
            self.close()
            raise

    @staticmethod
    def missing() -> str:
        if os.geteuid() or not shutil.which("ip"):
            return "needs root and the ip command (iproute2)"
        made = subprocess.run(["ip", "netns", "add", f"sgtry{os.getpid()}"], capture_output=True, text=True)
        subprocess.run(["ip", "netns", "delete", f"sgtry{os.getpid()}"], capture_output=True)
        return f"cannot make network namespaces here: {made.stderr.strip()}" if made.returncode else ""

    def _make(self, i: int) -> None:
        name, end = f"{self.tag}h{i}", f"{self.tag}v{i}"
        run("ip", "netns", "add", name)
        run("ip", "link", "add", end, "type", "veth", "peer", "name", "eth0", "netns", name)
        run("ip", "link", "set", end, "master", self.bridge, "up")
        for words in (["addr", "add", f"{self.address(i)}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
            run("ip", "-n", name, *words)
        run("ip", "-n", name, "link", "set", "lo", "up")
        names = Path("/etc/netns", name, "hosts")  # `ip netns exec` mounts it as /etc/hosts
        names.parent.mkdir(parents=True)
        known = [f"{self.address(k)} {self.tag}h{k}" for k in range(self.count)]
        names.write_text("\n".join(["127.0.0.1 localhost", *known, ""]))

    def address(self, i: int) -> str:
        return f"{self.net}.{i + 1}"

    def start(self, i: int, *command: str, **env: str) -> subprocess.Popen:
        """Start a command on host i, with its output in host-I.log. All its child processes are killed with it."""
        more = {"HEAD": self.address(0), "NODE_RANK": str(i), "LOCAL_ADDR": self.address(i), "NNODES": str(self.count)}
        more |= {"GLOO_SOCKET_IFNAME": "eth0", "PORT": "29511"} | env
        with open(self.folder / f"host-{i}.log", "a") as log:
            # In a PID namespace, killing the first process kills all others, as if a machine failed.
            self.hosts[i] = subprocess.Popen(
                [
                    "ip",
                    "netns",
                    "exec",
                    f"{self.tag}h{i}",
                    "unshare",
                    "--uts",
                    "--pid",
                    "--fork",
                    "--kill-child",
                    "--mount-proc",
                    "bash",
                    "-c",
                    f'echo {self.tag}h{i} >/proc/sys/kernel/hostname && exec "$@"',
                    "bash",
                    *command,
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(**more),
                start_new_session=True,
            )
        return self.hosts[i]

    def log(self, i: int) -> str:
        path = self.folder / f"host-{i}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def logs(self) -> str:
        return "\n".join(f"--- host {i}\n{self.log(i)[-4000:]}" for i in range(self.count))

    def pids(self, i: int, word: str) -> list[int]:
        """Return the processes on host i whose command line contains the word."""
        found = []
        for pid in run("ip", "netns", "pids", f"{self.tag}h{i}").split():
            try:
                if word in Path("/proc", pid, "cmdline").read_text().split("\0"):
                    found.append(int(pid))
            except OSError:
                continue
        return found

    def kill_host(self, i: int) -> None:
        """Simulate a power failure: the host sends no more packets, not even to close connections, and all its
        processes are killed. start() after restore_link() brings it back."""
        self.cut_link(i)
        for pid in run("ip", "netns", "pids", f"{self.tag}h{i}").split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.hosts[i].wait()

    def cut_link(self, i: int) -> None:
        run("ip", "link", "set", f"{self.tag}v{i}", "down")

    def restore_link(self, i: int) -> None:
        run("ip", "link", "set", f"{self.tag}v{i}", "up")

    def limit(self, i: int, rate: str) -> None:
        """Limit the rate of host i's link in both directions."""
        how = ["root", "tbf", "rate", rate, "burst", "32kbit", "latency", "400ms"]
        run("tc", "qdisc", "add", "dev", f"{self.tag}v{i}", *how)
        run("ip", "netns", "exec", f"{self.tag}h{i}", "tc", "qdisc", "add", "dev", "eth0", *how)

    def sent(self, i: int) -> int:
        """Return the number of bytes that host i has sent."""
        return int(run("ip", "netns", "exec", f"{self.tag}h{i}", "cat", "/sys/class/net/eth0/statistics/tx_bytes"))

    def join(self, expected: int = 0, timeout: float = 240) -> None:
        """Wait for the commands of all hosts, and check their exit codes."""
        for i, process in self.hosts.items():
            wait_until(lambda p=process: p.poll() is not None, timeout, f"host {i} to end", self.logs)
        codes = {i: p.returncode for i, p in self.hosts.items()}
        assert set(codes.values()) == {expected}, f"{codes}\n{self.logs()}"

    def close(self) -> None:
        for i in self.hosts:
            self.kill_host(i)
        for i in range(self.count):
            subprocess.run(["ip", "netns", "delete", f"{self.tag}h{i}"], capture_output=True)
            shutil.rmtree(f"/etc/netns/{self.tag}h{i}", ignore_errors=True)
            subprocess.run(["ip", "link", "delete", f"{self.tag}v{i}"], capture_output=True)
        subprocess.run(["ip", "link", "delete", self.bridge], capture_output=True)


SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=5
MinJobAge=600
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=90 OverSubscribe=NO
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF OverSubscribe=NO
"""


class Slurm:
    """A controller and two nodes, n1 and n2, with two partitions: jobs in `high` take nodes from jobs in `low`."""

    PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")

    def __init__(self, folder: Path):
        self.folder = folder
        self.processes: list[subprocess.Popen] = []
        for name in ("spool-n1", "spool-n2", "state"):
            (folder / name).mkdir()
        folder.chmod(0o755)
        with socket.socket() as a, socket.socket() as b, socket.socket() as c:
            sockets = (a, b, c)
            for s in sockets:
                s.bind(("127.0.0.1", 0))
            ports = [s.getsockname()[1] for s in sockets]
        host = socket.gethostname().split(".")[0]
        (folder / "slurm.conf").write_text(SLURM_CONF.format(folder=folder, host=host, ports=ports))
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        try:
            self._start("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket",
                        f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log",
                        f"--seed-file={folder}/munged.seed")  # fmt: skip
            wait_until((folder / "munge.socket").exists, 20, "munged", self.log)
            self._start("slurmctld", "-D", "-f", str(folder / "slurm.conf"))
            for node in ("n1", "n2"):
                self._start("slurmd", "-D", "-N", node, "-f", str(folder / "slurm.conf"))
            ready = ("idle", "idle")
            wait_until(lambda: tuple(self("sinfo", "-h", "-N", "-p", "low", "-o", "%t", check=False).split()) == ready,
                       60, "the nodes", self.log)  # fmt: skip
        except BaseException:  # also Ctrl-C: it is raised again
            self.close()
            raise

    @classmethod
    def missing(cls) -> str:
        lacking = [name for name in cls.PROGRAMS if not shutil.which(name)]
        if os.geteuid() or lacking:
            return f"needs root and Slurm (apt packages slurm-wlm and munge; missing: {', '.join(lacking) or 'root'})"
        return ""

    def _start(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}.out", "a") as log:
            self.processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=self.environment()))

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        return environment(SLURM_CONF=str(self.folder / "slurm.conf"), **(more or {}))

    def __call__(self, *command: str, check: bool = True, env: Mapping[str, str] | None = None) -> str:
        result = subprocess.run(command, capture_output=True, text=True, env=self.environment(env), cwd=self.folder)
        if check and result.returncode:
            raise RuntimeError(f"{' '.join(command)}: {result.stdout}{result.stderr}{self.log()}")
        return result.stdout

    def submit(self, *words: str, **env: str) -> str:
        """Run sbatch, and return the number of the job."""
        return self("sbatch", "--parsable", *words, env=env).strip()

    def state(self, job: str) -> str:
        shown = self("scontrol", "show", "job", job, check=False)
        return shown.split("JobState=")[1].split()[0] if "JobState=" in shown else ""

    def minutes_running(self, job: str) -> int:
        """Return for how many whole minutes a job has been running."""
        hours, minutes, _ = self("scontrol", "show", "job", job).split("RunTime=")[1].split()[0].split(":")
        return 60 * int(hours) + int(minutes)

    def log(self) -> str:
        paths = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
        return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')[-3000:]}" for p in sorted(paths))

    def close(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
