"""Untrusted run folders and calls: checkpoints with correct checksums and wrong contents, arbitrary logs, operators
called by name. There is one message, no traceback, and no access out of bounds."""

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import arguments, finish, newest, start

from stylegan_pg.checkpoint import checkpoint
from stylegan_pg.errors import UsageError
from stylegan_pg.monitoring.figures import curves
from stylegan_pg.monitoring.loggers import cut_back
from stylegan_pg.monitoring.status import collect, render
from stylegan_pg.ops import native, setup_filter
from stylegan_pg.optim import moments
from stylegan_pg.training.resume import check_state
from stylegan_pg.training.transfer import read
from stylegan_pg.untrusted import text_lines

SHORT = {"growth__start": "null", "resolution": 8, "train__total_kimg": 0.016, "output__grid_kimg": 0}


@pytest.fixture(scope="module")
def original(tmp_path_factory, tiny_data) -> Path:
    """The folder of a run of two steps."""
    run = tmp_path_factory.mktemp("runs") / "run"
    finish(start(arguments(run, tiny_data, **SHORT)))
    return run


@pytest.fixture
def run(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.distributed
def test_moments_with_wrong_shapes(run, tiny_data):
    tensors, state = newest(run)
    name = "opt_G/exp_avg/synthesis.b8.conv1.weight"
    checkpoint.write(checkpoint.found(run / "checkpoints")[0], tensors | {name: tensors[name].flatten()[:1]}, state)
    output = finish(start(arguments(run, tiny_data, **SHORT | {"train__total_kimg": 0.032})), expected=2)
    assert (
        "exp_avg/synthesis.b8.conv1.weight is torch.float32 [1] where torch.float32 [8, 8, 3, 3] is expected" in output
    )
    assert "Traceback" not in output


def trained() -> tuple[torch.nn.Linear, torch.optim.Optimizer, dict[str, torch.Tensor]]:
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    return net, optimizer, moments.optimizer_tensors(net, optimizer)


@pytest.mark.parametrize(
    "change",
    [
        {"exp_avg/weight": torch.zeros(1)}, {"exp_avg_sq/weight": torch.zeros(2, 4)},
        {"exp_avg/bias": torch.zeros(2, 1)},
        {"exp_avg/weight": torch.zeros(2, 3).double()}, {"exp_avg/weight": torch.zeros(2, 3).bool()},
        {"step/weight": torch.zeros(2, 3)}, {"step/weight": torch.tensor(-1.0)}, {"step/weight": torch.tensor(3)},
        {"step/weight": torch.tensor(3.0).bfloat16()}, {"step/weight": torch.tensor(3.0).double()},
        {"step/weight": torch.tensor(float("nan"))}, {"max_exp_avg_sq/weight": torch.zeros(2, 3)},
        {"step/weight": None},
        {"exp_avg_sq/bias": None},
    ],
)  # fmt: skip
def test_invalid_optimizer_states(change):
    net, optimizer, tensors = trained()
    wrong = {name: t for name, t in (tensors | change).items() if t is not None}
    with pytest.raises(ValueError, match=next(iter(change)).split("/")[1]):
        moments.restore_optimizer(net, optimizer, wrong)
    moments.restore_optimizer(net, optimizer, tensors | {"exp_avg/gone": torch.zeros(1)})
    assert torch.equal(optimizer.state[net.weight]["exp_avg"], tensors["exp_avg/weight"])


# What is wrong in the form in which earlier versions wrote the running state.
EARLIER_NUMBERS = [None, [], {"augment_p": 2}, {"augment_p": "1"}, {"loss_scale": 0}, {"pl_mean": float("inf")}]
EARLIER_NUMBERS += [{"_signed": float("nan")}, {"_micro_batch_0_0": -1}]
WRONG: dict[str, list[Any]] = {
    "nimg": [None, -8, 2**70, 8.0, True],
    "phase": [None, -1, 2**40],
    "dataset": [None, 5],
    "training": [None, [], {"loss_scale": 0}, {"micro_batches": 5}],
    "system": [None, [], {"augment_p": 2}, {"augment_p": "1"}, {"means": {"pl_mean": float("inf")}}],
    "averages": [None, [], {"average0.1": -1}, {"average0.1": 2**60}, {"average0.1": 1.5}, {"average\x1b": "1"}],
    "means": [None, {"a": 1}, {"a": [1.0]}, {"a": ["1", 1]}, {"a": [1.0, -1]}],
    "bad_samples": [None, {}, [5], [[1, 2]], [["1", 2, "a", "b", "c"]]],
    "environment": [None, {}, {"threads": 0}, {"threads": 2**40}, {"threads": 1, "torch": [1]}],
    "config": [None, [], {}, {"model": {}, "train": 5, "loss": {}}],
}


def test_ranges_of_a_checkpoint(original):
    state = newest(original)[1]
    check_state(state, "x")
    earlier = {key: value for key, value in state.items() if key not in ("training", "system")}
    check_state(earlier, "x")
    assert state.keys() == {*WRONG, "running_means"}
    wrong = [state | {key: value} for key, values in WRONG.items() for value in values]
    wrong += [earlier | {"running_means": value} for value in EARLIER_NUMBERS]
    wrong += [{key: value for key, value in state.items() if key != gone} for gone in ("training", "system")]
    for changed in wrong:
        with pytest.raises(UsageError, match=r"^x") as error:
            check_state(changed, "x")
        assert str(error.value).isprintable()
    for path, value in {
        ("model", "low_precision_at"): "8", ("model", "low_precision"): ["fp32"], ("train", "channels_last"): 7,
        ("loss", "terms"): [5],
    }.items():  # fmt: skip
        changed = copy.deepcopy(state)
        changed["config"][path[0]][path[1]] = value
        with pytest.raises(UsageError, match=path[1]):
            check_state(changed, "x")


def test_a_checkpoint_with_an_invalid_state(tmp_path):
    path = checkpoint.path_for(tmp_path, 8)
    for state in ([], "x", 5):
        checkpoint.write(path, {}, state)  # type: ignore[arg-type]  # that is the point
        with pytest.raises(checkpoint.BadCheckpointError, match="its state is no table"):
            checkpoint.read(path)


def test_initial_weights_that_are_not_finite(original, tmp_path):
    from stylegan_pg.config import StyleGAN2Config

    tensors, state = newest(original)
    path = tmp_path / "000000000016.safetensors"
    bad = tensors["G/mapping.fc0.weight"].clone()
    bad[0, 0] = float("nan")
    checkpoint.write(path, tensors | {"G/mapping.fc0.weight": bad}, state)
    with pytest.raises(UsageError, match=r"no finite numbers in G/mapping\.fc0\.weight"):
        read(str(path), StyleGAN2Config())
    for config in (None, {}, {"model": 5}, {"model": {"name": "\x1b"}}):
        checkpoint.write(path, tensors, state | {"config": config})
        with pytest.raises(UsageError, match=r"networks, model\.name is stylegan2"):
            read(str(path), StyleGAN2Config())


def test_files_with_similar_names_are_ignored(tmp_path):
    for stem in ("²", "٣٣٣٣٣٣٣٣٣٣٣٣", "9" * 200, "1e9", "-00000000001", "000000000016 (copy)"):
        (tmp_path / f"{stem}.safetensors").write_bytes(b"x")
    checkpoint.write(checkpoint.path_for(tmp_path, 16), {}, {"nimg": 16})
    checkpoint.write(checkpoint.path_for(tmp_path, 10**13), {}, {"nimg": 10**13})
    assert [p.stem for p in checkpoint.found(tmp_path)] == ["10000000000000", "000000000016"]
    checkpoint.rotate(tmp_path, 1)
    assert [p.stem for p in checkpoint.found(tmp_path)] == ["10000000000000"]


# --- logs -------------------------------------------------------------------------------------------------------------

GARBAGE = [
    b"\x00\xff\xfe\x1b[2J", b"{", b"[1, 2]", b"5", b"null", b'"nimg"', b'{"nimg": "16"}', b'{"nimg": -1}', b"[" * 5000,
    b'{"nimg": true, "img_per_sec": 3}', b'{"nimg": 1e999}', b'{"nimg": ' + b"9" * 5000 + b"}", b"x" * (3 << 20),
    b'{"nimg": 16, "img_per_sec": "fast", "phase": ["\\u001b"], "alpha": "x", "resolution": {}, "swd": "low"}',
    b'{"nimg": 16, "img_per_sec": NaN, "swd": Infinity, "alpha": null, "resolution": 8, "$\\\\frac{$": 1.5}',
]  # fmt: skip


@pytest.mark.parametrize("place", range(2))
def test_arbitrary_logs(run, place):
    good = (run / "stats.jsonl").read_bytes()
    text = b"\n".join(GARBAGE)
    for name in ("stats.jsonl", "metrics.jsonl", "log.txt"):
        before = (run / name).read_bytes() if (run / name).exists() else b""
        (run / name).write_bytes(before + text if place else text + b"\n" + before)
    facts = collect(run)
    json.dumps(facts)
    told = render(facts)
    assert told.replace("\n", "").isprintable()
    assert facts["nimg"] == 16
    assert curves(run / "metrics.jsonl") is not None
    cut_back(run / "stats.jsonl", 1 << 60)
    for line in good.splitlines():
        assert (run / "stats.jsonl").read_bytes().count(line) == 1
    assert b"xxx" not in (run / "stats.jsonl").read_bytes()


RANK = {"host": "h", "pid": 1, "device": "cpu", "img_per_sec": 1, "own_sec_per_img": 1, "busy": 1, "queued": 0.5}
RANKS = [5, [5], [{}], [RANK | {"img_per_sec": "1"}], [RANK | {"own_sec_per_img": None}], [RANK | {"pid": "1"}]]
NO_JSON = [b"", b"\xff", b"[" * 10**5, b'{"ranks": NaN}', b"5", b"[]", b"{}"]


def change_status(run: Path, **changes: Any) -> None:
    path = run / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_damaged(run: Path, name: str) -> None:
    facts = collect(run)
    assert facts["ranks"] == facts["stragglers"] == []
    assert facts["nimg"] == 16  # from stats.jsonl
    assert facts["starts"] is facts["faults"] is None
    (damaged,) = facts["damaged"]
    assert name in damaged
    assert f"damaged     {damaged}" in render(facts)


@pytest.mark.parametrize(
    "content", [*NO_JSON, b'{"format": "1"}', b'{"format": true}', b'{"format": 2}', b'{"format": 1}']
)
def test_a_status_file_that_holds_anything(run, content):
    (run / "status.json").write_bytes(content)
    assert_damaged(run, "status.json")


@pytest.mark.parametrize(
    "changes",
    [
        *({"ranks": ranks} for ranks in RANKS),
        *({"nimg": value} for value in (None, -1, True, 0.5, 1 << 60, "16")),
        *({"alpha": value} for value in (-0.1, 2, "1", [])),
        *({"last_faults": value} for value in ("text", [1], ["x"] * 100, None)),
        *({"img_per_sec": value} for value in (-1, 1e300, "fast", True)),
        {"state": "asleep"}, {"state": ["done"]}, {"phase": 8}, {"starts": -1}, {"starts": 0.5}, {"faults": None},
        {"checkpoint": "x"}, {"updated": "now"}, {"started": -1}, {"restarted": None}, {"end": None},
    ],
)  # fmt: skip
def test_a_status_file_with_values_that_are_not_possible(run, changes):
    assert collect(run)["damaged"] == []
    change_status(run, **changes)
    assert_damaged(run, "status.json")
    assert next(iter(changes)) in collect(run)["damaged"][0]


@pytest.mark.parametrize("content", [*NO_JSON, *(json.dumps({"ranks": ranks}).encode() for ranks in RANKS)])
def test_ranks_of_an_earlier_version_that_hold_anything(run, content):
    (run / "status.json").unlink()
    (run / "ranks.json").write_bytes(content)
    assert_damaged(run, "ranks.json")


def test_escapes_in_texts_are_shown(run):
    rank = RANK | {"host": "a\x1b[2J", "device": "c\ru"}
    change_status(run, ranks=[rank], last_faults=["warning: \x1b[1m"], faults=1, phase="8x8\x07")
    shown = render(collect(run))
    assert "a\\x1b[2J:1 c\\ru" in shown
    assert shown.replace("\n", "").isprintable()


def test_folders_and_pipes_in_place_of_files(run):
    for name in ("log.txt", "stats.jsonl", "status.json"):
        (run / name).unlink()
    (run / "log.txt").mkdir()
    os.mkfifo(run / "stats.jsonl")
    (run / "status.json").symlink_to("status.json")
    (run / "ranks.json").mkdir()
    (run / "checkpoints" / "999999999999.safetensors").mkdir()
    (run / "checkpoints" / "999999999998.safetensors").symlink_to("nowhere")
    facts = collect(run)
    assert len(facts["damaged"]) == 3
    assert facts["checkpoint_nimg"] == 16
    assert "not a regular file" in render(facts)


def test_only_the_end_of_a_long_log_is_read(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("".join(f"line {i}\n" for i in range(100)) + "cut")
    assert list(text_lines(path, last=25)) == ["line 98", "line 99", "cut"]
    assert len(list(text_lines(path))) == 101
    assert list(text_lines(tmp_path / "none")) == []


# --- operators called by name -----------------------------------------------------------------------------------------

OPS = torch.ops.stylegan_pg
X, F = torch.ones(2, 3, 4, 4), setup_filter([1, 3, 3, 1])
TAIL = (X, torch.zeros(3), torch.ones(2, 3), torch.zeros(2, 1, 4, 4), "lrelu", 1.0, None, 1)
B = X.bfloat16()
W = torch.ones(5, 3, 3, 3)


def tail(**changes: Any) -> tuple[Any, ...]:
    names = ("x", "bias", "scale", "noise", "act", "gain", "clamp", "dim")
    return tuple(changes.get(name, value) for name, value in zip(names, TAIL, strict=True))


CALLS: list[Callable[[], object]] = [
    lambda: OPS.upfirdn2d(X, torch.zeros(0, 0), [1, 1], [1, 1], [0] * 4, False, 1.0),
    lambda: OPS.upfirdn2d(X, torch.ones(1, 2000), [1, 1], [1, 1], [2000] * 4, False, 1.0),
    lambda: OPS.upfirdn2d(X, F, [1, 0], [1, 1], [2] * 4, False, 1.0),
    lambda: OPS.upfirdn2d(X, F, [1, 1], [-1, 1], [2] * 4, False, 1.0),
    lambda: OPS.upfirdn2d(X, F, [2**40, 1], [2**40, 1], [2] * 4, False, 1.0),
    lambda: OPS.upfirdn2d(X, F, [1, 1], [1, 1], [-(2**40), 2**40, 2, 2], False, 1.0),
    lambda: OPS.upfirdn2d(X, F, [1, 1], [1, 1], [-9, 2, 2, 2], False, 1.0),
    lambda: OPS.upfirdn2d(X[0], F, [1, 1], [1, 1], [2] * 4, False, 1.0),
    *(lambda c=c: OPS.bias_act(*tail(**c)) for c in (
        {"bias": torch.zeros(2)}, {"scale": torch.ones(1, 4)}, {"noise": torch.zeros(2, 1, 4, 3)}, {"dim": -1},
        {"dim": 4}, {"act": "gelu"}, {"clamp": -1.0}, {"clamp": float("nan")}, {"scale": torch.ones(3)},
    )),
    lambda: OPS.bias_act_slope(X[:1], *TAIL),
    lambda: OPS.bias_act_curvature(X, X[:, :1], *TAIL),
    lambda: OPS.bias_act_backward(X[..., :3], *TAIL, [True] * 3),
    lambda: OPS.bias_act_backward(X, *tail(noise=None), [True] * 3),
    lambda: OPS.bias_act_backward(X, *TAIL, [True] * 2),
    lambda: OPS.conv3x3(B, W[:, :2], False, False, 1, [4, 4]),
    lambda: OPS.conv3x3(B, W[:, :, :2], False, False, 1, [4, 4]),
    lambda: OPS.conv3x3(B, W, True, False, 1, [4, 4]),
    lambda: OPS.conv3x3(B, W, False, False, 1, [400, 4]),
    lambda: OPS.conv3x3(B, W, False, True, 2, [11, 9]),
    lambda: OPS.conv3x3(B, W, False, False, 3, [1, 1]),
    lambda: OPS.conv3x3_weight(B, B[:1], False, 1),
    lambda: OPS.conv3x3_weight(B, B[:, :, :3], False, 1),
    lambda: OPS.conv3x3_weight(B, B, False, 2),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(CALLS)))
def test_operators_called_by_name_check_their_arguments(case):
    assert native.choose("cpu").name
    with pytest.raises(ValueError, match=r"upfirdn2d|bias_act|conv3x3"):
        CALLS[case]()


@pytest.mark.parametrize("taps", [[], [0.0], [1, -1], [float("nan"), 1], [float("inf")]])
def test_invalid_filters(taps):
    with pytest.raises(ValueError, match="taps"):
        setup_filter(taps)
