"""output.trackers: what accelerate's trackers get of a run, and what happens where one of them does not work."""

import json
import os
import struct
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stylegan_pg.config import renamed
from stylegan_pg.config.loading import load_config
from stylegan_pg.errors import UsageError
from stylegan_pg.monitoring import trackers
from stylegan_pg.monitoring.trackers import Trackers

NEEDED = ["run=r", "data.url=u", "train.total_kimg=1"]
CONFIG = {"train.batch": 8, "model.base": [4, 4], "growth.start": None, "train.tf32": False, "run": "r"}
PICTURE = torch.arange(3 * 8 * 8, dtype=torch.uint8).reshape(3, 8, 8)


class Fake:
    """A tracker that remembers what it is given."""

    requires_logging_directory = False
    calls: list[tuple[str, Any]] = []

    def __init__(self, **options: Any):
        Fake.calls = [("options", options)]

    def start(self) -> None:
        Fake.calls.append(("start", None))

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        Fake.calls.append(("config", values))

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        if 3.0 in values.values():
            raise RuntimeError("the server\nis away")
        Fake.calls.append(("log", (values, step)))

    def finish(self) -> None:
        Fake.calls.append(("finish", None))


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(trackers, "known", lambda: {"fake": Fake, "other": Fake})
    return Fake


def test_a_tracker_gets_the_configuration_once_and_finite_numbers(fake, tmp_path):
    for nimg in (0, 8):
        used = Trackers(["fake"], tmp_path, nimg, CONFIG)
        used.scalars({"loss": 0.5, "bad": float("nan"), "count": 2}, nimg)
        used.image("fakes", PICTURE, nimg)  # which this tracker cannot show
        used.close()
        used.scalars({"loss": 0.1}, nimg)
        stored = {"train.batch": 8, "model.base": "[4, 4]", "growth.start": "null", "train.tf32": False, "run": "r"}
        assert fake.calls == [
            ("options", {"run_name": "stylegan-pg"}),
            ("start", None),
            *([("config", stored)] if nimg == 0 else []),
            ("log", ({"loss": 0.5, "count": 2}, nimg)),
            ("finish", None),
        ]


def test_a_tracker_that_fails_costs_one_warning_and_the_others_go_on(fake, tmp_path, caplog):
    used = Trackers(["fake", "other"], tmp_path, 0, CONFIG)
    used._try("fake", lambda: used.trackers["fake"].log({"loss": 3.0}))
    used.scalars({"loss": 1.0}, 8)
    assert list(used.trackers) == ["other"]
    assert fake.calls[-1] == ("log", ({"loss": 1.0}, 8))
    used.close()
    (message,) = caplog.messages
    assert message == (
        "no fake log from here on (the server is away); training goes on; stats.jsonl has the same numbers; to avoid "
        "this, take fake out of output.trackers"
    )


@pytest.mark.parametrize(
    "content", ["", "5", '{"fake": 5}', '{"fake": "%s"}' % ("x" * 300), '{"fake": ["a"]}', "[" * 9999]
)
def test_stored_ids_that_are_no_ids_are_ignored(fake, content, tmp_path, caplog):
    (tmp_path / "trackers.json").write_text(content)
    Trackers(["fake"], tmp_path, 8, CONFIG).close()
    (message,) = caplog.messages
    assert message.endswith("trackers begin new logs")
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"fake": ""}


def test_only_trackers_that_accelerate_has_are_accepted():
    trackers.check(["tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive"])
    with pytest.raises(UsageError, match=r"accelerate has no tracker tensorbord: the possible ones are aim, clearml"):
        trackers.check(["tensorbord"])
    with pytest.raises(UsageError, match="wandb is there twice"):
        trackers.check(["wandb", "tensorboard", "wandb"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("output.tensorboard=false", []),
        ("output.tensorboard=true", ["tensorboard"]),
        ("output.trackers=wandb,mlflow", ["wandb", "mlflow"]),
        ("output.trackers=[]", []),
        ("train.batch=8", ["tensorboard"]),
    ],
)
def test_the_key_of_earlier_versions_is_translated_with_one_line(override, expected, tmp_path, caplog):
    renamed.announce.cache_clear()
    path = tmp_path / "old.yaml"
    key, _, value = override.partition("=")
    path.write_text(f"{key.split('.')[0]}: {{{key.split('.')[1]}: {value if '[' in value else value.split(',')[0]}}}\n")
    for config in (load_config(None, [*NEEDED, override]), load_config(path, [*NEEDED, override])):
        assert config.output.trackers == expected
    lines = ["note: key output.tensorboard is now output.trackers"] if "tensorboard=" in override else []
    assert caplog.messages == lines


def test_a_package_that_is_missing_costs_one_warning_that_says_how_to_install_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "comet_ml", None)  # what an import of it then raises is ImportError
    used = Trackers(["comet_ml"], tmp_path, 0, CONFIG)
    used.scalars({"loss": 1.0}, 8)
    used.close()
    (message,) = caplog.messages
    assert message.startswith("no comet_ml log from here on (")
    assert "run `pip install comet-ml`, or take comet_ml out of output.trackers" in message


def test_tensorboard_gets_the_configuration_at_the_first_start_only(tmp_path):
    for nimg in (0, 8, 16):
        Trackers(["tensorboard"], tmp_path, nimg, CONFIG).close()
    (stored,) = (tmp_path / "tensorboard").glob("*/hparams.yml")
    assert "train.batch: 8" in stored.read_text()
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"tensorboard": ""}


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format behind a header of 7 bytes: blocks of 32 KiB with parts of records, each
    of which has a checksum (4 bytes), its length (2) and its kind (1: whole, 2: first, 3: middle, 4: last part)."""
    place, parts = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # no room for a header
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


def read_wandb(file: Path) -> dict[str, Any]:
    """Configuration, history and run id of the file that Weights & Biases has written offline."""
    from wandb.proto import wandb_internal_pb2  # pyright: ignore[reportMissingImports]

    found: dict[str, Any] = {"history": [], "config": {}, "ids": set()}
    for data in leveldb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
        record.ParseFromString(data)
        if record.HasField("run"):
            found["ids"].add(record.run.run_id)
        for item in record.config.update if record.HasField("config") else record.run.config.update:
            found["config"][item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        if record.HasField("history"):
            row = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            found["history"].append({key: json.loads(text) for key, text in row.items()})
    return found


@pytest.mark.slow
@pytest.mark.distributed
def test_weights_and_biases_offline(tiny_data, tmp_path):
    """A run that was stopped and continued is one run there, with the numbers and grids of its files."""
    pytest.importorskip("wandb", reason="wandb is not installed (pip install stylegan-pg[trackers])")
    run = tmp_path / "run"
    env = harness.environment() | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    how = {"output__trackers": "wandb", "growth__start": "null", "output__grid_kimg": 0.016}
    for total in (0.016, 0.032):
        harness.finish(harness.start(harness.arguments(run, tiny_data, **how, train__total_kimg=total), env=env))
    files = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime)
    first, second = map(read_wandb, files)
    assert first["ids"] == second["ids"] == {json.loads((run / "trackers.json").read_text())["wandb"]}
    assert first["config"]["train.batch"] == 8
    assert first["config"]["run"] == str(run)
    rows = [row for part in (first, second) for row in part["history"]]
    written = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    logged = [row for row in rows if "loss_g" in row]
    assert [row["nimg"] for row in logged] == [line["nimg"] for line in written] == [8, 16, 24, 32]
    for row, line in zip(logged, written, strict=True):
        assert {key: row[key] for key in ("loss_d", "img_per_sec", "lr_g")} == pytest.approx(
            {key: line[key] for key in ("loss_d", "img_per_sec", "lr_g")}
        )
    assert [row["nimg"] for row in rows if "fakes/count" in row] == [0, 16, 32]
    assert len(list((run / "wandb").rglob("media/images/fakes_*.png"))) == 3


@pytest.mark.slow
def test_mlflow_in_the_runs_folder(tmp_path):
    """In a process of its own, as MLflow takes a while and leaves threads behind."""
    pytest.importorskip("mlflow", reason="mlflow is not installed (pip install stylegan-pg[trackers])")
    program = """
        import sys, torch
        from pathlib import Path
        from stylegan_pg.monitoring.trackers import Trackers
        run = Path(sys.argv[1])
        for nimg in (0, 8):
            used = Trackers(["mlflow"], run, nimg, {"train.batch": 8, "model.base": [4, 4]})
            used.scalars({"loss": 0.5 + nimg, "metrics/fid20@pixels": 2.0}, nimg)
            used.image("fakes", torch.zeros([3, 8, 8], dtype=torch.uint8), nimg)
            used.close()
        import mlflow
        (found,) = mlflow.search_runs(experiment_names=["stylegan-pg"], output_format="list")
        history = mlflow.MlflowClient().get_metric_history(found.info.run_id, "loss")
        assert [(m.step, m.value) for m in history] == [(0, 0.5), (8, 8.5)], history
        assert found.data.metrics["metrics/fid20_pixels"] == 2.0
        assert found.data.params == {"train.batch": "8", "model.base": "[4, 4]"}
        print(found.info.run_id)
    """
    env = harness.environment() | {"MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONPATH": os.pathsep.join([str(ROOT)])}
    env.pop("MLFLOW_TRACKING_URI", None)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    assert json.loads((tmp_path / "trackers.json").read_text())["mlflow"] == done.stdout.strip()
    assert (tmp_path / "mlflow" / "mlflow.db").is_file()
    assert len(list((tmp_path / "mlflow" / "artifacts").rglob("*fakes*.png"))) == 2


def test_tensorboard_has_numbers_and_images_by_nimg(tmp_path):
    used = Trackers(["tensorboard"], tmp_path, 0, CONFIG)
    for nimg in (8, 16):
        used.scalars({"loss": nimg / 4, "bad": float("inf")}, nimg)
    used.image("fakes", PICTURE[:1], 16)
    used.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(8, 2.0), (16, 4.0)]
    assert board.Tags()["scalars"] == ["loss"]
    assert [e.step for e in board.Images("fakes")] == [16]
