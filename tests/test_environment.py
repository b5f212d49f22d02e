"""Environment variables of other programs: contradictory ranks and world sizes, and accelerate's configuration."""

import os

import harness
import pytest
import serving
import torch

from stylegan_pg.checkpoint import checkpoint
from stylegan_pg.distributed import environment, launcher
from stylegan_pg.distributed.launcher import Place
from stylegan_pg.errors import UsageError

# A user's configuration for other programs, and variables of other launchers.
FOREIGN = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_TORCH_DEVICE": "meta",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
}


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1, but no WORLD_SIZE: start it with"),
        ({"RANK": "0"}, "RANK=0, but no WORLD_SIZE"),
        ({"RANK": "1", "WORLD_SIZE": ""}, "RANK=1, but no WORLD_SIZE"),
        ({"LOCAL_RANK": "first"}, "LOCAL_RANK='first' is not a number"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE='many' is not a number"),
        ({"WORLD_SIZE": "\x1b[2J"}, r"WORLD_SIZE='\\x1b\[2J' is not a number"),
        ({"WORLD_SIZE": "2.0"}, "is not a number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 is no number of processes"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE=-1 is no number of processes"),
        ({"WORLD_SIZE": "1" + "0" * 30, "RANK": "0"}, "is no number of processes"),
        ({"PET_NNODES": "2"}, "PET_NNODES=2, but no RANK"),
        ({"PET_NNODES": "1:4"}, "PET_NNODES=1:4, but no RANK"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "2"}, "LOCAL_RANK=2 does not lie in LOCAL_WORLD_SIZE=2"),
        ({"WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK=2 does not lie"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "-1"}, "LOCAL_RANK=-1 does not lie"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a..b", "MASTER_PORT": "1"}, "MASTER_ADDR=a..b .* not known"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"}, "MASTER_PORT='x' is not"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "70000"}, "is no port"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "", "MASTER_PORT": "1"}, "without MASTER_ADDR"),
    ],
)
def test_impossible_ranks_and_world_sizes(env, words):
    with pytest.raises(UsageError, match=words) as caught:
        launcher.place(env)
    assert str(caught.value).isprintable()


def test_empty_and_irrelevant_variables():
    for env in ({"WORLD_SIZE": ""}, {"WORLD_SIZE": "", "RANK": "", "MASTER_ADDR": ""}, {"LOCAL_RANK": "0"}):
        assert launcher.place(env) == Place()
    assert launcher.place({"WORLD_SIZE": "1", "RANK": "0", "MASTER_PORT": "nonsense", "PET_NNODES": "3"}) == Place()


def test_accelerate_sees_only_rank_and_world_size(monkeypatch):
    for name, value in (FOREIGN | {"RANK": "7", "OMPI_COMM_WORLD_SIZE": "3", "LOCAL_RANK": "5"}).items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with environment.only_the_place(Place(1, 2, 1, 2, "here", 9), cpu=True):
        seen = {k: v for k, v in os.environ.items() if k not in before or before[k] != v}
        assert seen.pop("ACCELERATE_USE_CPU") == "true"
        assert seen == dict(zip(environment.OF_PLACES, ("1", "2", "1", "2", "here", "9"), strict=True))
        assert not [k for k in os.environ if k.startswith(("FSDP_", "OMPI_", "ACCELERATE_G", "ACCELERATE_M"))]
        os.environ["FSDP_LEFT"] = "by accelerate"
    assert dict(os.environ) == before
    with environment.only_the_place(Place(), cpu=False):
        assert not [k for k in os.environ if k.startswith(("RANK", "LOCAL_", "ACCELERATE_", "OMPI_"))]
    assert dict(os.environ) == before


def test_notes_about_variables():
    def told(*variables: dict[str, str]) -> list[str]:
        everyone = [{"host": f"h{i}", "variables": environment.noticed(v)} for i, v in enumerate(variables)]
        return environment.remarks(everyone)

    usual = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_CPU": "true"}
    assert told(usual, {}) == []
    assert told({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}) == []
    steps = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    (line,) = told({}, steps, steps)
    assert line.startswith("ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4, on rank 1 (h1), has no effect here: train.micro")
    (line,) = told({}, {"NVIDIA_TF32_OVERRIDE": "1"})
    assert line.startswith("rank 1 (h1) has NVIDIA_TF32_OVERRIDE=1, rank 0 has none: they round otherwise")
    (line,) = told({"MKL_CBWR": "AVX"}, {"MKL_CBWR": "AVX"}, {})
    assert line.startswith("rank 2 (h2) has no MKL_CBWR, rank 0 has MKL_CBWR=AVX")
    fast = {"ONEDNN_DEFAULT_FPMATH_MODE": "BF16"}
    (line,) = told(fast, fast)
    assert "rounds" in line or "round what the configuration says is fp32" in line
    assert told({"ONEDNN_DEFAULT_FPMATH_MODE": "STRICT"}) == []


@pytest.mark.distributed
def test_the_command_prints_one_message(tmp_path):
    args = points(tmp_path / "run")
    for env in ({"LOCAL_RANK": "1"}, {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "::1", "MASTER_PORT": "x"}):
        told = harness.command(*args, env=harness.environment() | env)
        assert (told.returncode, told.stderr.count("\n")) == (2, 1), told.stderr
        assert f"{list(env)[-1]}=" in told.stderr
    assert not (tmp_path / "run").exists()


def points(run, **changes) -> list[str]:
    """Return the command line of a run of a small network on points, which needs no data."""
    file = run.parent / f"{run.name}.yaml"
    file.write_text("resolution: 4\nmodel: {name: mlp, base: [1, 1]}\ndata: {url: 'points:ring', workers: 0}\n")
    values = {"run": run, "model.channel_max": 16, "model.mapping_layers": 2, "train.total_kimg": 0.064}
    values |= {"train.batch": 16, "train.threads": 1, "loss.pl_weight": 0, "output.grid_kimg": 0} | changes
    values |= {"output.trackers": "[]", "output.snapshot_kimg": 0}
    return ["train", str(file), *(f"{k}={v}" for k, v in values.items())]


def newest(run) -> dict[str, torch.Tensor]:
    _, tensors, _, _ = checkpoint.newest_good(run / "checkpoints")
    return tensors


def assert_same(a, b) -> None:
    first, second = newest(a), newest(b)
    assert first.keys() == second.keys() != set()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.distributed
def test_a_users_configuration_of_accelerate_changes_nothing(tmp_path):
    """It has no effect in one process, or if only one of two ranks has it."""
    clean = {k: v for k, v in harness.environment().items() if not k.startswith(environment.OF_ACCELERATE)}
    stray = clean | FOREIGN | {"LOCAL_RANK": "0", "WORLD_SIZE": ""}
    log = harness.finish(harness.start(points(tmp_path / "stray"), env=stray))
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4, on rank 0" in log
    assert "ACCELERATE_USE_FSDP=true" in log
    for name, foreign in (("pair", {}), ("odd", FOREIGN | {"NVIDIA_TF32_OVERRIDE": "1"})):
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(serving.free_port())}
        args = points(tmp_path / name)
        ranks = [
            harness.start(args, env=clean | place | {"RANK": str(i), "LOCAL_RANK": str(i)} | (foreign if i else {}))
            for i in range(2)
        ]
        log = "".join(map(harness.finish, ranks))
        assert ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4, on rank 1" in log) == (name == "odd")
        assert ("has NVIDIA_TF32_OVERRIDE=1, rank 0 has none" in log) == (name == "odd")
    assert_same(tmp_path / "pair", tmp_path / "odd")
