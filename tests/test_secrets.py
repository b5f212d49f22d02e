"""Secrets of URLs do not appear in files and messages, and describing a configuration starts no program."""

from pathlib import Path

import harness
import pytest
import serving
from packing import folder_of, packed, tar_of

from stylegan_pg.config import Config, DataConfig
from stylegan_pg.config.plain import to_plain, to_yaml
from stylegan_pg.data.datasets.foreign import expand
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.errors import UsageError
from stylegan_pg.urls import MASK, runs_command, same_server, shown, without_secrets

SECRET = "hunter2hunter2"


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        (f"https://me:{SECRET}@host:81/data", "https://host:81/data"),
        (f"http://{SECRET}@host/x.tar", "http://host/x.tar"),
        (f"https://h/x.tar?v=3&X-Amz-Signature={SECRET}&b=2", f"https://h/x.tar?v=3&X-Amz-Signature={MASK}&b=2"),
        (f"https://h/a.tar?sig={SECRET}::https://u:{SECRET}@h/b.tar", None),
        (f"pipe:curl -s -u me:{SECRET} https://h/x.tar", f"pipe:curl -s -u {MASK} https://h/x.tar"),
        (f"pipe:curl https://me:{SECRET}@h/x?token={SECRET}", None),
        (f"pipe:curl -H 'Authorization: Bearer {SECRET}' https://h/x", None),
        (f"pipe:wget --http-password={SECRET} -O - https://h/x", None),
        (f"pipe:bash -c 'AWS_SECRET_ACCESS_KEY={SECRET} aws s3 cp s3://b/k -'", None),
        (f"pipe:curl -ume:{SECRET} https://h/x", f"pipe:curl -u{MASK} https://h/x"),
        (f"pipe:curl --cookie id={SECRET} -b 'id={SECRET}' https://h/x", None),
        (f"pipe:curl -H 'Authorization: token {SECRET}' h", f"pipe:curl -H 'Authorization: token {MASK}' h"),
        (f"pipe:curl -H 'Cookie: a=b; c={SECRET}' h", None),
        (f"pipe:sshpass -p {SECRET} ssh h cat x.tar", f"pipe:sshpass -p {MASK} ssh h cat x.tar"),
        (f"https://me:{SECRET}@{SECRET}@host/x", "https://host/x"),
        (f"https://me:of/{SECRET}@host/x", "https://host/x"),
        (f"https://me:of?{SECRET}@host/x", "https://host/x"),
        (f"https://h/x.tar#token={SECRET}", f"https://h/x.tar#token={MASK}"),
        ("https://h:8080/faces@2x/x.tar::https://h:81/{0..9}@x.tar", "same"),
        ("https://h/x?mail=a:b@c", "same"),
        ("pipe:curl -H 'Authorization: Bearer $TOKEN' -b $JAR https://h/x", "same"),
        ("pipe:bash -c 'curl -u \"$AUTH\" --password=$PW https://h/x'", "same"),
        ("pipe:bash -c 'ls | sort -u names'", "same"),
        ("/data/faces?sig=1:2@3", "same"),
        ("s3://bucket/{000..099}.tar", "same"),
    ],
)
def test_secrets_are_removed_from_urls(url, kept):
    for text in (without_secrets(url), shown(url)):
        assert SECRET not in text
    if kept is not None:
        assert without_secrets(url) == (url if kept == "same" else kept)


def test_configurations_are_written_without_secrets():
    urls = {f"https://a:{SECRET}@h/x": 1.0, f"https://b:{SECRET}@h/x": 2.0, "plain": 3.0}
    config = Config(run="r", data=DataConfig(url=f"https://me:{SECRET}@h/x", mixture=urls))
    assert SECRET not in to_yaml(config) + str(to_plain(config))
    assert to_plain(config)["data"]["mixture"] == {"https://h/x": 3.0, "plain": 3.0}
    with pytest.raises(UsageError, match="lacks the secret"):
        load_index(without_secrets(f"https://h/x.tar?sig={SECRET}"))


def test_which_urls_are_of_the_same_server():
    assert same_server("http://a/x", "http://A:80/y")
    assert same_server("http://a/x", "https://a/y")
    for other in ("http://b/x", "http://a:8080/x", "http://a.b/x"):
        assert not same_server("http://a/x", other)
    assert not same_server("https://a/x", "http://a/x")
    assert not same_server("http://a:81/x", "https://a/x")


def texts_below(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in folder.rglob("*") if file.is_file()]


@pytest.mark.distributed
@pytest.mark.usefixtures("_own_cache")
def test_no_file_of_a_run_contains_the_password(tmp_path):
    packed(folder_of(tmp_path / "in", [f"{i:02d}.png" for i in range(40)]), tmp_path / "data", 16)
    with serving.http(tmp_path / "data", tmp_path / "books") as server:
        url = server.url.replace("//", f"//me:{SECRET}@")
        run, changes = tmp_path / "runs" / "run", {"data__url": url, "output__snapshot_kimg": 0.032}
        run.parent.mkdir()
        args = harness.arguments(run, Path("x"), **changes, train__total_kimg=0.064)
        Path(run.parent / "run.yaml").write_text(f"run: {run}\n")
        printed = harness.finish(harness.start(args))
        printed += harness.finish(
            harness.start([*args, "train.total_kimg=0.072"])
        )  # the same run, although its password is masked
        for command in (["data", "info", url], ["data", "check", url], ["train", *args[1:], "--dry-run"]):
            printed += harness.finish(harness.start(command))
    left = [*texts_below(tmp_path / "runs"), *texts_below(tmp_path / "cache")]
    assert len(left) > 8
    assert list(run.glob("snapshots/*.safetensors"))
    assert "continuing from" in printed
    assert SECRET not in printed
    assert not [text for text in left if SECRET.encode() in text]


def test_descriptions_start_no_program(tmp_path):
    marker = tmp_path / "made"
    of_url, of_mixture = (
        [f"data.url=pipe:touch {marker}"],
        ['data.url=""', f"data.mixture={{'pipe:touch {marker}': 1}}"],
    )
    for command in (["train", "demo", "--dry-run", "run=r", *of_url], ["plan", "demo", "run=r", *of_mixture]):
        done = harness.command(*command)
        assert done.returncode == 0, done.stderr
        assert "not run for a description" in done.stdout
    assert not marker.exists()
    for url in ("pipe:x", "{a,pipe:x}", "a.tar::pipe:x"):
        assert runs_command(url)
    for url in ("data/pipe:x", "a{b", "https://h/pipe:x.tar"):
        assert not runs_command(url)


def test_names_of_files_are_not_run_as_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "pipe:touch made;.tar"
    tar_of(tmp_path / "plain.tar", {"a.png": b"x"}).rename(name)
    (found,) = expand("*.tar")
    assert Path(found).samefile(name)
    assert not found.startswith("pipe:")
