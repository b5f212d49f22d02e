"""The type of a key determines what its value means: overrides and files that YAML itself would read as something else,
and files written by other people."""

import os
import subprocess
from pathlib import Path
from typing import Any

import harness
import pytest
from test_environment import points

from stylegan_pg.config.loading import load_config
from stylegan_pg.config.plain import to_yaml
from stylegan_pg.errors import UsageError

NEEDED = ["run=runs/x", "data.url=data/x", "train.total_kimg=1"]
BASE = "run: r\ndata: {url: u}\ntrain: {total_kimg: 1}\n"
ODD = [
    "00012",
    "1e3",
    "12:30:45",
    "on",
    "null",
    "[a]",
    "{x}",
    "${x}",
    "a${oc.env:HOME}b",
    "\\${x}",
    "2026-01-01",
    "0x10",
]
ODD += [
    "a #b",
    "&a b",
    "*a",
    "!!int x",
    "%d",
    "@x",
    "|",
    "a: b",
    "- a",
    "'",
    "'a' b",
    "~x",
    "???x",
    "caf\u00e9",
    "\udce9",
]


def got(key: str, *overrides: str, file: Path | None = None) -> Any:
    node: Any = load_config(file, [*([] if file else NEEDED), *overrides])
    for part in key.split("."):
        node = getattr(node, part)
    return node


def refused(file: Path | None, *overrides: str) -> str:
    with pytest.raises(UsageError) as error:
        got("run", *overrides, file=file)
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < 800  # one of them lists the shipped configurations
    return message


@pytest.mark.parametrize("text", ODD)
def test_strings_remain_strings(text, tmp_path):
    """Keys of type str accept these values on the command line, in files, and in the file that a run writes."""
    for key in ("run", "data.cache_dir", "init"):
        assert got(key, f"{key}={text}") == text
    config = load_config(None, [*NEEDED, f"run={text}", *([] if text[0] in "[{" else [f"metrics.names={text}"])])
    written = tmp_path / "written.yaml"
    written.write_text(to_yaml(config), "utf-8")
    assert load_config(written) == config
    if (
        not any(c in text for c in "#&*!%@|:'[{\\\udce9") and text[0] != "-"
    ):  # those that YAML itself reads as one scalar
        file = tmp_path / "given.yaml"
        file.write_text(BASE.replace("run: r", f"run: {text}"), "utf-8")
        assert got("run", file=file) == text


def test_quotes_of_yaml_are_removed():
    assert got("run", "run='a: b # c'") == "a: b # c"
    assert got("run", 'run="a b"') == "a b"
    assert got("init", "init=") == ""


def test_a_leading_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for key in ("run", "init", "data.url", "data.cache_dir"):
        assert got(key, f"{key}=~/x") == "/home/me/x"
        assert got(key, f"{key}=a~/x") == "a~/x"
    assert got("run", "run=~") == "/home/me"
    assert got("data.url", "data=~/{a,b}.tar::~/c.tar") == "/home/me/{a,b}.tar::/home/me/c.tar"
    assert got("data.url", "data=~/x") == "/home/me/x"
    assert got("metrics.weights", "metrics.weights=~/a.pth") == ["/home/me/a.pth"]
    assert got("metrics.weights", "metrics.weights=[~/a.pth, b]") == ["/home/me/a.pth", "b"]
    assert got("data.mixture", "data.url=", "data.mixture={~/a: 1, b: 2}") == {"/home/me/a": 1, "b": 2}
    assert got("metrics.best", "metrics.best=~/x") == "~/x"  # this key is not a path
    file = tmp_path / "c.yaml"
    file.write_text("run: ~/r\ndata: ~/d\ntrain: {total_kimg: 1}\n")
    assert (got("run", file=file), got("data.url", file=file)) == ("/home/me/r", "/home/me/d")


def test_accepted_values(tmp_path):
    for text in ("{8:16}", "{8: 16}", "8:16", "{8: 16.0}", "{'8':16}"):
        assert got("train.batch_at", f"train.batch_at={text}") == {8: 16}
    assert got("train.batch_at", "train.batch_at={8:16, 16:8}") == {8: 16, 16: 8}
    assert got("train.batch_at", "train.batch_at=8:16,16:8") == {8: 16, 16: 8}
    assert got("optim.lr_at", "optim.lr_at={8:1e-3,16:.5}") == {8: 1e-3, 16: 0.5}
    assert got("growth.optimizer_at", "growth.optimizer_at={8:carry}") == {8: "carry"}
    assert got("data.url", "data=a/b") == "a/b"
    assert got("data.window", "data.window=8", "data=a/b") == 8
    assert got("model.name", "model=progan") == "progan"
    for text in ("swd,ms_ssim", "[swd, ms_ssim]", "[swd,ms_ssim]"):
        assert got("metrics.names", f"metrics.names={text}") == ["swd", "ms_ssim"]
    assert got("metrics.names", "metrics=swd") == ["swd"]
    assert got("output.grid", "output.grid=3,2") == [3, 2]
    assert [t.name for t in got("loss.terms", "loss.terms=r2,drift")] == ["r2", "drift"]
    assert got("train.batch", "train.batch=1e3") == 1000
    assert got("train.batch", "train={batch:8}") == 8
    assert got("seed", "seed=0012") == 12  # not read as an octal number
    assert got("data.mirror", "data.mirror=on") is True
    file = tmp_path / "c.yaml"
    file.write_text(
        "run: r\ndata: u\ntrain: {total_kimg: 1, batch_at: {8:16}}\nmetrics: {names: swd}\nloss:\noptim: null\n"
    )
    assert (got("train.batch_at", file=file), got("metrics.names", file=file)) == ({8: 16}, ["swd"])
    file.write_text("run: r\ndata: {mixture: {a: 1, b: 2}}\ntrain: {total_kimg: 1}\n")
    assert got("data.mixture", "data.mixture={c: 1}", file=file) == {"c": 1}  # as a whole
    assert got("data.mixture", "data.mixture.s3://c.d/e=3", file=file) == {"a": 1, "b": 2, "s3://c.d/e": 3}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train=5", "train is a section: give a key in it, such as train.total_kimg=VALUE"),
        ("train.batch_at={8=16}", "train.batch_at: '8=16' is not possible: it must be a whole number"),
        ("train.batch_at=[8, 16]", "a list is not possible: it must be a table, such as {8: 16, 16: 8}"),
        ("train.batch_at={8: 1, 08: 2}", "train.batch_at: 8 is there twice"),
        ("metrics.names={a: b}", "a table is not possible: it must be a list"),
        ("loss.terms=[{name: r2, name: drift}]", "'name' is there twice"),
        ("optim.g_lr=1e400", "it must be a finite number"),
        ("optim.g_lr=nan", "it must be a finite number"),
        ("train.batch=-inf", "it must be a whole number"),
        (f"seed={2**80}", "it must be a whole number below"),
        (f"seed={'9' * 10000}", "it must be a whole number"),
        (f"model.mapping_layers={2**40}", "it must be at most 256"),
        ("train.timeout_sec=1e15", "it must be at most"),
        ("metrics.precision=int4", "it must be fp32 or bf16"),
        ("data.mirror=null", "it must be true or false"),
        ("run=a\x1b[31m", "it must be a text without control characters"),
        ("\x1b[31m=3", "unknown key"),
        ("model=\u202e", "model.name=\\u202e is not possible: it must be"),
        ("loss.terms=[{name: \u202e}]", "loss.terms: \\u202e: name=\\u202e is not possible"),
        ("data.mixture={http://u:secret@h/: 0}", "data.mixture={'http://h/': 0.0} is not possible"),
        ("run.x=3", "unknown key 'run.x'; did you mean 'run'?"),
        ("train.batch_at=" + "[" * 1000 + "]" * 1000, "nested deeper"),
    ],
)  # fmt: skip
def test_messages_for_wrong_values(override, words):
    message = refused(None, override)
    assert words in message


BOMB = f"data: {{mixture: &a0 {{b: 1}}}}\ngrowth: {{stable_kimg_at: {{<<: [{', '.join(['*a0'] * 6000)}]}}}}\n"
NESTED = "".join(f"x{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BASE.replace("{total_kimg: 1}", "[1, 2]"), "train is a section: give a key in it.*line 3"),
        (BASE + "metrics: {names: {a: b}}\n", "metrics.names: a table is not possible.*line 4"),
        (BASE + "loss:\n  r1_every: 1\n  r1_every: 2\n", "'r1_every' is there twice .line 6"),
        (BASE + "los: {r1_every: 1}\n", "unknown key 'los'; did you mean 'loss'. .line 4"),
        (BASE + "seed: 1e400\n", "seed: '1e400' is not possible.*line 4"),
        ("run: r\ndata: &d {<<: *d, url: u}\n", "nested deeper than 16"),
        ("run: r\ndata: &d {mixture: *d}\n", "a table is not possible"),
        (BOMB, "more than 10000 values"),
        (f"x0: &a0 {{b: 1, c: 2, d: 3}}\n{NESTED}loss: {{<<: *a11}}\n", "unknown key 'x0'"),
        (BASE + f"loss:\n  <<: {{<<: [{', '.join(['{}'] * 12000)}]}}\n", "more than 10000 values"),
        (BASE + "metrics: {names: [" + "a," * 12000 + "]}\n", "more than 10000 values"),
        (BASE + "loss: !!python/object/apply:os.system ['touch hacked']\n", "the tag .* is not supported"),
        (BASE + '"\\e[31m": 1\n', r"a key: '\\x1b\[31m' is not possible"),
        (BASE.replace("run: r", 'run: "a\\0b"'), "without control characters"),
        (BASE.replace("run: r", "run: ???"), "run is not set"),
        (BASE + "? [a, b]\n: c\n", "a list or a table cannot be a key"),
        (BASE + "---\n" + BASE, "not valid YAML"),
        (BASE + "# " + "x" * 200_000, "more than 131072 bytes"),
        ("a: " + "[" * 300 + "]" * 300, "unknown key 'a'"),
        ("data: {mixture: " + "{a: " * 100 + "}" * 101, "a table is not possible"),
        ("data: " + "{<<: " * 100 + "}" * 100, "nested deeper"),
        ("- " * 50_000, "nested deeper"),
        ("", "run is not set"),
    ],
)
def test_files_that_are_not_configurations(text, words, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=words) as error:
        load_config(file)
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]


def test_binary_files_and_other_encodings(tmp_path):
    file = tmp_path / "c.yaml"
    for data in (b"\x89PNG\r\n\x1a\n" + bytes(100), os.urandom(5000), "run: caf\xe9".encode("latin-1"), b"\0"):
        file.write_bytes(data)
        assert "not valid YAML" in refused(file)
    for data in (BASE.encode("utf-8-sig"), BASE.encode("utf-16"), BASE.replace("\n", "\r\n").encode()):
        file.write_bytes(data)
        assert got("data.url", file=file) == "u"


def test_merging_tables_in_a_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "run: r\ndata: {url: u}\n"
        "train: {total_kimg: 1, batch_at: &b {8: 1, 16: 2}, micro_batch_at: {<<: *b, 8: 3}}\noptim: {lr_at: *b}\n"
    )
    assert got("train.micro_batch_at", file=file) == {8: 3, 16: 2}
    assert got("optim.lr_at", file=file) == {8: 1, 16: 2}


def test_a_folder_with_a_configuration_is_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moved").mkdir()
    assert "this folder has no config.yaml" in refused(tmp_path / "moved")
    config = load_config(None, [*NEEDED, "run=old/place", "seed=5"])
    (tmp_path / "moved" / "config.yaml").write_text(to_yaml(config))
    for folder in ("moved", "./moved", "moved/", tmp_path / "moved"):
        found = load_config(folder)
        assert found.seed == 5
        assert Path(found.run).resolve() == tmp_path / "moved"
    assert load_config("moved", ["run=new"]).run == "new"
    assert load_config("moved/config.yaml").run == "old/place"
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "config.yaml").write_text(to_yaml(config))
    assert load_config("demo").seed == 0  # the shipped one
    assert load_config("./demo").seed == 5


def test_paths_of_the_command_line(tmp_path):
    """`~` as an argument and as the value of an option, where the shell does not expand it."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "c.yaml").write_text(BASE.replace("run: r", "run: ~/r"))
    env = harness.environment() | {"HOME": str(tmp_path / "home")}

    def command(*args: str) -> subprocess.CompletedProcess:
        return harness.command(*args, cwd=tmp_path, env=env)

    told = command("train", "~/c.yaml", "data=~/none", "sed=1")
    assert "unknown key 'sed'" in told.stderr
    told = command("train", "~/c.yaml", "data=~/none")
    assert str(tmp_path / "home" / "none") in told.stderr
    (tmp_path / "home" / "pictures").mkdir()
    (tmp_path / "home" / "pictures" / "a.png").touch()
    told = command("pack", "~/pictures", "~/out", "--resolution", "8", "--labels=~/l.json")
    assert told.returncode == 2
    assert str(tmp_path / "home" / "l.json") in told.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["home"]


@pytest.mark.distributed
def test_a_run_folder_can_be_continued_from_anywhere(tmp_path):
    run = tmp_path / "first"
    harness.finish(harness.start(points(run)))
    (tmp_path / "elsewhere").mkdir()
    run.rename(tmp_path / "moved")
    more = ["train", "../moved", "train.total_kimg=0.128"]
    log = harness.finish(harness.start(more, cwd=tmp_path / "elsewhere"))
    assert "continuing from ../moved/checkpoints/" in log
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()].count("first") == 0
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert load_config(tmp_path / "moved").train.total_kimg == 0.128


def test_keys_without_a_configuration():
    with pytest.raises(UsageError, match=r"no configuration 'run=x' \(the configuration comes before the keys\)"):
        load_config("run=x", ["data.url=y"])
