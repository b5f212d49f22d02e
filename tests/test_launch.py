"""launch/, with real processes: on hosts that are network namespaces, under a real Slurm, and on one machine."""

import os
import signal
import socket
import subprocess
import sys
import time

import clusters
import harness
import pytest
import serving
import yaml
from clusters import LAUNCH, Hosts, Slurm, wait_until
from conftest import ROOT

SCRIPTS = sorted(p for p in (*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")) if p.name != "lib.sh")
# 60 steps of a tiny network, most of them at 16x16, with a checkpoint after every second step.
LONGER = {"growth__stable_kimg_at": "{16: 0.416}", "output__grid_kimg": 0}
real_hosts = pytest.mark.skipif(bool(Hosts.missing()), reason=f"hosts as network namespaces: {Hosts.missing()}")
real_slurm = pytest.mark.skipif(bool(Slurm.missing()), reason=f"a Slurm of two nodes: {Slurm.missing()}")


def test_shellcheck():
    checker = os.path.join(os.path.dirname(sys.executable), "shellcheck")
    files = [*map(str, SCRIPTS), str(LAUNCH / "lib.sh"), str(ROOT / ".ci" / "run")]
    result = subprocess.run([checker, "-x", "-P", str(LAUNCH), *files], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_help(script):
    for words in (["--help"], []):
        result = subprocess.run([str(script), *words], capture_output=True, text=True, cwd="/")
        assert result.returncode == 0, result.stderr
        assert f"launch/{script.name}" in result.stdout
    assert script.name in (LAUNCH / "README.md").read_text("utf-8")


def test_wrong_environments(tmp_path):
    """The exit code is 2 with one line of output, before anything is started."""

    def fails(script: str, word: str, **env: str) -> None:
        how = {"capture_output": True, "text": True, "timeout": 60, "env": clusters.environment(**env)}
        result = subprocess.run([str(LAUNCH / script), "demo"], **how)
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
        assert word in result.stderr

    fails("torchrun.sh", "NPROC=many", NPROC="many")
    fails("torchrun.sh", "two nodes with NODE_RANK=0", NNODES="2", NODE_RANK="0", HEAD="192.0.2.1")
    fails("torchrun.sh", "not known", NNODES="2", NODE_RANK="1", HEAD="nowhere.invalid", NAME_TIMEOUT="1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        fails("torchrun.sh", f"PORT={port} is taken", NNODES="2", NODE_RANK="0", HEAD="127.0.0.1", PORT=port)
    temporary = tmp_path / f"stylegan_pg-{os.getuid()}"
    temporary.mkdir()
    temporary.chmod(0o777)
    private = {"STYLEGAN_PG_CACHE": "", "SLURM_TMPDIR": str(tmp_path)}
    fails("torchrun.sh", "could be written by others", NNODES="2", NODE_RANK="1", HEAD="127.0.0.1", **private)
    fails("accelerate.sh", "does not support ranges", NNODES="1:2")
    for script in ("torchrun.sh", "accelerate.sh"):
        fails(script, "NNODES=two", NNODES="two")
        fails(script, "NODE_RANK=first", NODE_RANK="first")
        fails(script, "NNODES=2 without HEAD", NNODES="2", NODE_RANK="1", HEAD="")
        for port in ("abc", "70000", "0"):
            fails(script, f"PORT={port} is no port", NNODES="2", HEAD="127.0.0.1", PORT=port)
        fails(script, "two nodes with NODE_RANK=0", NNODES="2", HEAD="192.0.2.1")
    fails("deepspeed.sh", "no hostfile", HOSTFILE="/nowhere/hosts")
    fails("slurm.sbatch", "sbatch")


def test_kubernetes():
    """The manifest passes on everything that torchrun.sh needs, and its numbers agree."""
    jobset = yaml.safe_load((LAUNCH / "kubernetes" / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (group,) = jobset["spec"]["replicatedJobs"]
    assert group["replicas"] == 1
    job = group["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy requires it
    (container,) = pod["containers"]
    env = {e["name"]: e.get("value") or e["valueFrom"]["fieldRef"]["fieldPath"] for e in container["env"]}
    assert env["NNODES"] == str(job["completions"])
    assert env["NPROC"] == container["resources"]["limits"]["nvidia.com/gpu"]
    # JobSet names its pods NAME-JOB-REPLICA-INDEX, in a service of the set's name.
    name = jobset["metadata"]["name"]
    assert env["HEAD"] == f"{name}-{group['name']}-0-0.{name}"
    assert jobset["spec"]["network"]["enableDNSHostnames"]
    assert env["NODE_RANK"] == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert container["ports"][0]["containerPort"] == int(env["PORT"])
    assert int(env["STOP_GRACE"]) < pod["terminationGracePeriodSeconds"]
    assert jobset["spec"]["failurePolicy"]["rules"] == [
        {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}  # otherwise it would restart all pods
    ]
    rules = {tuple(r["onExitCodes"]["values"]): r["action"] for r in job["podFailurePolicy"]["rules"][:2]}
    assert rules == {(2,): "FailJob", (75,): "Ignore"}
    assert {r["onExitCodes"]["containerName"] for r in job["podFailurePolicy"]["rules"][:2]} == {container["name"]}
    mounts, volumes = ({v["name"] for v in vs} for vs in (container["volumeMounts"], pod["volumes"]))
    assert mounts == volumes
    assert container["command"][0].endswith("/launch/torchrun.sh")
    assert container["args"][0] in {p.stem for p in (ROOT / "configs").glob("*.yaml")}


@pytest.mark.parametrize(
    ("codes", "end", "starts"),
    [("1 75 0", 0, 3), ("75 2", 2, 2), ("1 1 1 0", 1, 3), ("1 75 1 1 0", 0, 5)],
)
def test_supervise(codes, end, starts, tmp_path):
    """The supervised command ends with a sequence of exit codes."""
    (tmp_path / "codes").write_text("\n".join(codes.split()) + "\n")
    script = 'echo >> starts; code=$(head -n 1 codes); sed -i 1d codes; exit "$code"'
    env = os.environ | {"PAUSE": "0", "TRIES": "3"}
    command = [str(LAUNCH / "supervise.sh"), "bash", "-c", script]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode == end, result.stderr
    assert len((tmp_path / "starts").read_text()) == starts


@pytest.mark.distributed
def test_deepspeeds_launcher_without_ssh(tiny_data, tmp_path):
    """Each node starts its own part. Two processes run to the end, and another run is stopped."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    (tmp_path / "hosts").write_text("# one node\n127.0.0.1 slots=2\n")
    port = str(serving.free_port())
    env = clusters.environment(HOSTFILE=str(tmp_path / "hosts"), NODE_RANK="0", HEAD="127.0.0.1", PORT=port)
    args = harness.arguments(tmp_path / "run", tiny_data)[1:]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    harness.finish(subprocess.Popen([str(LAUNCH / "deepspeed.sh"), *args], env=env, **pipes))
    assert harness.newest(tmp_path / "run")[1]["environment"]["world"] == 2
    run = tmp_path / "stopped"
    args = harness.arguments(run, tiny_data, growth__stable_kimg_at="{16: 9}")[1:]
    process = subprocess.Popen([str(LAUNCH / "deepspeed.sh"), *args], env=env, **pipes)
    wait_until(lambda: harness.lines_of(run) >= 3, 180, "training", lambda: "")
    process.terminate()
    harness.finish(process, 75)


@pytest.mark.distributed
def test_a_stop_while_waiting_for_other_nodes(tmp_path):
    """Training has not begun. The script ends at once on both nodes, with the exit code of a stopped run."""
    where = {"NNODES": "2", "HEAD": "127.0.0.1", "PORT": str(serving.free_port()), "STYLEGAN_PG_CACHE": str(tmp_path)}
    for rank, wait in (("0", False), ("0", True), ("1", True)):
        env = clusters.environment(NODE_RANK=rank, **where)
        with open(tmp_path / "log", "w") as log:
            process = subprocess.Popen([str(LAUNCH / "torchrun.sh"), "demo"], stdout=log, stderr=log, env=env)
        time.sleep(2)  # building the kernels takes longer the first time
        if wait:
            wait_until(lambda: "kernels.so" in (tmp_path / "log").read_text(), 120, "its kernels", lambda: "")
            time.sleep(5)
        process.terminate()
        assert process.wait(60) == 75, (tmp_path / "log").read_text()


@pytest.mark.distributed
def test_stopping_a_supervised_run(tiny_data, tmp_path):
    """TERM to the supervisor passes through the launch script and torchrun to both ranks, and its exit code is
    theirs."""
    run = tmp_path / "run"
    args = harness.arguments(run, tiny_data, growth__stable_kimg_at="{16: 9}")[1:]
    command = [str(LAUNCH / "supervise.sh"), str(LAUNCH / "single.sh"), *args]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=clusters.environment(NPROC="2"))

    def told() -> str:
        return (tmp_path / "log").read_text()

    wait_until(lambda: harness.lines_of(run) >= 3, 180, "training", told)
    process.terminate()
    assert process.wait(120) == 75, told()
    assert "Traceback" not in told()
    assert harness.newest(run)[1]["environment"]["world"] == 2
    wrong = [str(LAUNCH / "single.sh"), *args, "train.batch=16"]  # the folder belongs to another run
    result = subprocess.run(wrong, capture_output=True, text=True, env=clusters.environment(MAX_RESTARTS="0"))
    assert result.returncode == 2, result.stderr
    assert "train.batch was 8, is 16" in result.stderr


@pytest.fixture(scope="module")
def undisturbed(tiny_data, tmp_path_factory):
    """Two ranks on this host, without any disturbance."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    harness.finish(harness.start(harness.arguments(run, tiny_data, **LONGER), ranks=2))
    return run


def ticks(run, count: int, hosts: Hosts, seconds: float = 240) -> None:
    wait_until(lambda: harness.lines_of(run) >= count, seconds, f"{count} ticks", hosts.logs)


@pytest.mark.slow
@pytest.mark.distributed
@real_hosts
def test_bad_network_and_a_killed_worker(undisturbed, tiny_data, tmp_path):
    """Two hosts: a link of 40 Mbit/s that is down for 30 s, then SIGKILL for a worker."""
    hosts, run = Hosts(2, tmp_path), tmp_path / "run"
    try:
        hosts.limit(1, "40mbit")
        args = harness.arguments(run, tiny_data, train__timeout_sec=120, **LONGER)[1:]
        for i in range(2):
            hosts.start(i, str(LAUNCH / "torchrun.sh"), *args)
        ticks(run, 4, hosts)
        hosts.cut_link(1)
        time.sleep(2)
        before = harness.lines_of(run)
        time.sleep(28)
        assert harness.lines_of(run) == before  # no rank continues alone
        hosts.restore_link(1)
        ticks(run, before + 8, hosts)
        worker = [p for p in hosts.pids(1, "stylegan_pg") if "torch.distributed.run" not in _words(p)]
        for pid in worker:
            os.kill(pid, signal.SIGKILL)
        assert worker
        hosts.join()
        assert "continuing from" in hosts.log(0) + hosts.log(1)
        harness.assert_same_run(run, undisturbed)
        assert hosts.sent(1) > 60 * sum(t.numel() * 4 for n, t in harness.newest(run)[0].items() if n[:2] == "D/")
    finally:
        hosts.close()


def _words(pid: int) -> list[str]:
    with open(f"/proc/{pid}/cmdline") as file:
        return file.read().split("\0")


@pytest.mark.slow
@pytest.mark.distributed
@real_hosts
def test_a_host_is_killed_and_restarted(undisturbed, tiny_data, tmp_path):
    """The first host, with torchrun's store, loses power. The step ends on the other host within the configured time,
    its supervisor restarts it, and when the first host is back, both continue."""
    hosts, run = Hosts(2, tmp_path), tmp_path / "run"
    command = [str(LAUNCH / "supervise.sh"), str(LAUNCH / "torchrun.sh")]
    command += harness.arguments(run, tiny_data, train__timeout_sec=15, **LONGER)[1:]
    env = {"PAUSE": "1", "JOIN_TIMEOUT": "90", "MAX_RESTARTS": "0"}
    try:
        for i in range(2):
            hosts.start(i, *command, **env)
        ticks(run, 8, hosts)
        killed = time.time()
        hosts.kill_host(0)
        wait_until(lambda: "lost the other ranks" in hosts.log(1), 15 + 15, "the other host to notice", hosts.logs)
        assert time.time() - killed > 10  # the timeout ended the step, because no connection was closed
        hosts.restore_link(0)
        hosts.start(0, *command, **env)
        hosts.join()
        harness.assert_same_run(run, undisturbed)
    finally:
        hosts.close()


@pytest.mark.slow
@pytest.mark.distributed
@real_hosts
def test_fewer_hosts_and_back(tiny_data, tmp_path):
    """Elastic training: one of two hosts is killed, the other continues alone, and the first one joins again."""
    hosts, run = Hosts(2, tmp_path), tmp_path / "run"
    changes = {"train__timeout_sec": 10, "growth__stable_kimg_at": "{16: 20}", "output__grid_kimg": 0}
    command = [str(LAUNCH / "torchrun.sh"), *harness.arguments(run, tiny_data, **changes)[1:]]
    try:
        for i in range(2):
            hosts.start(i, *command, NNODES="1:2")
        ticks(run, 4, hosts)
        hosts.kill_host(1)
        note = "continuing on 1 ranks what ran on 2"
        wait_until(lambda: note in hosts.log(0), 120, "the other host to go on", hosts.logs)
        hosts.restore_link(1)
        hosts.start(1, *command, NNODES="1:2")
        note = "continuing on 2 ranks what ran on 1"
        wait_until(lambda: note in hosts.log(0) + hosts.log(1), 120, "the host to be taken in", hosts.logs)
        ticks(run, harness.lines_of(run) + 4, hosts)
        (script,) = [p for p in hosts.pids(0, str(LAUNCH / "torchrun.sh")) if "unshare" not in _words(p)]
        os.kill(script, signal.SIGTERM)
        hosts.join(75)  # waits for both hosts
        assert harness.newest(run)[1]["environment"]["world"] == 2
    finally:
        hosts.close()


@pytest.mark.slow
@pytest.mark.distributed
@real_hosts
def test_accelerate_on_three_hosts(tiny_data, tmp_path):
    """A worker is killed during the run. The result is that of three ranks on one host."""
    changes = {"train__batch": 16, "train__total_kimg": 0.32, "growth__stable_kimg": 0.128, **LONGER}
    changes |= {"growth__stable_kimg_at": "{16: 0.16}"}
    whole, run = tmp_path / "whole", tmp_path / "run"
    harness.finish(harness.start(harness.arguments(whole, tiny_data, **changes), ranks=3))
    hosts = Hosts(3, tmp_path)
    try:
        args = harness.arguments(run, tiny_data, train__timeout_sec=60, **changes)[1:]
        for i in range(3):
            hosts.start(i, str(LAUNCH / "accelerate.sh"), *args)
        ticks(run, 6, hosts)
        worker = [p for p in hosts.pids(2, "stylegan_pg") if "accelerate.commands.launch" not in _words(p)]
        for pid in worker:
            os.kill(pid, signal.SIGKILL)
        assert worker
        hosts.join()
        harness.assert_same_run(run, whole)
    finally:
        hosts.close()


@pytest.mark.slow
@pytest.mark.distributed
@real_slurm
def test_slurm_preempts_and_requeues(undisturbed, tiny_data, tmp_path):
    """A job on two nodes is preempted by a job of a higher partition. It writes a checkpoint, is requeued, and ends
    like an undisturbed run."""
    run = tmp_path / "run"
    args = harness.arguments(run, tiny_data, **LONGER)[1:]
    slurm = Slurm(tmp_path)
    try:
        script = [str(LAUNCH / "slurm.sbatch"), *args]
        job = slurm.submit("--nodes=2", *script, GLOO_SOCKET_IFNAME="lo", STYLEGAN_PG_CACHE=str(tmp_path / "cache"))
        wait_until(lambda: harness.lines_of(run) >= 5, 240, "training", slurm.log)
        urgent = slurm.submit("-p", "high", "--nodes=2", "--cpus-per-task=2", "--wrap", "sleep 3")
        wait_until(lambda: slurm.state(urgent) == "COMPLETED", 240, "the urgent job", slurm.log)
        assert slurm.state(job) == "PENDING"
        stopped = harness.newest(run)[1]["nimg"]
        slurm("scontrol", "update", f"JobId={job}", "StartTime=now")  # otherwise the job is held for two minutes
        wait_until(lambda: slurm.state(job) in ("COMPLETED", "FAILED"), 240, "the end", slurm.log)
        log = (tmp_path / f"slurm-{job}.log").read_text()
        assert slurm.state(job) == "COMPLETED", log
        assert 0 < stopped < harness.newest(run)[1]["nimg"]
        for word in ("write a checkpoint", "back into the queue", "continuing from", "done: "):
            assert word in log
        harness.assert_same_run(run, undisturbed)
    finally:
        slurm.close()


@pytest.mark.slow
@pytest.mark.distributed
@real_slurm
def test_slurm_time_limit_and_scancel(tiny_data, tmp_path):
    """Before its time limit a job writes a checkpoint and is requeued. A cancelled job is not."""
    run = tmp_path / "run"
    args = harness.arguments(run, tiny_data, growth__stable_kimg_at="{16: 99}", output__grid_kimg=0)[1:]
    slurm = Slurm(tmp_path)
    try:
        how = ["--nodes=2", "--time=30", "--signal=B:USR1@60", str(LAUNCH / "slurm.sbatch"), *args]
        job = slurm.submit(*how, GLOO_SOCKET_IFNAME="lo", STYLEGAN_PG_CACHE=str(tmp_path / "cache"))
        log = tmp_path / f"slurm-{job}.log"
        # The start takes a time that depends on the machine, so the time limit is set once the job trains.
        wait_until(lambda: harness.lines_of(run) >= 2, 240, "training", slurm.log)
        slurm("scontrol", "update", f"JobId={job}", f"TimeLimit={slurm.minutes_running(job) + 2}")
        wait_until(lambda: log.exists() and "back into the queue" in log.read_text(), 240, "the requeue", slurm.log)
        stopped = harness.newest(run)[1]["nimg"]
        wait_until(lambda: slurm.state(job) == "PENDING", 60, "the queue", slurm.log)
        time.sleep(3)  # in the second of the requeue, Slurm would use the credentials of the old start
        # Otherwise it is held for two minutes, and soon stopped again.
        slurm("scontrol", "update", f"JobId={job}", "StartTime=now", "TimeLimit=20")
        wait_until(lambda: "continuing from" in log.read_text(), 240, "the second start", slurm.log)
        slurm("scancel", job)
        wait_until(lambda: slurm.state(job) == "CANCELLED", 240, "the end", slurm.log)
        time.sleep(5)
        assert slurm.state(job) == "CANCELLED"
        assert log.read_text().count("back into the queue") == 1
        assert harness.newest(run)[1]["nimg"] >= stopped > 0
    finally:
        slurm.close()
