"""Building the CPU kernels: damaged caches, missing tools, killed and concurrent builders. Every case ends in a working
operation, or in strict mode in one clear error."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import harness
import pytest
from building import PROBE, copy_of, environment, library_in, probe, program, without_tools

from stylegan_pg import files
from stylegan_pg.ops import build, recipes

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("_fast_compiler")]


def test_the_cached_library_is_used_again(built):
    library = library_in(built)
    before = library.stat().st_mtime_ns
    words, errors = probe(built)
    assert words == ["cpu", "cached", str(library)]
    assert errors == ""
    assert library.stat().st_mtime_ns == before
    assert not [p for p in built.iterdir() if p.name.startswith(".cpu")]  # no temporary folders left


def test_loading_a_cached_library_is_fast(built):
    code = "import time, torch; from stylegan_pg.ops import build; t = time.perf_counter(); build.load('cpu'); "
    code += "print(time.perf_counter() - t)"
    times = [float(program(code, environment(built)).stdout) for _ in range(3)]
    assert min(times) < 0.3


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "no meta", "garbled meta"])
def test_a_damaged_library_is_built_again(built, tmp_path, damage):
    cache = copy_of(built, tmp_path / "cache")
    library = library_in(cache)
    data = bytearray(library.read_bytes())
    if damage == "truncated":
        library.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        library.write_bytes(data)
    elif damage == "empty":
        library.write_bytes(b"")
    elif damage == "no meta":
        (library.parent / "meta.json").unlink()
    else:
        (library.parent / "meta.json").write_text('{"checksum": ')
    assert probe(cache)[0] == ["cpu", "compiled", str(library)]
    assert probe(cache)[0] == ["cpu", "cached", str(library)]


def test_no_compiler(built, tmp_path):
    """A cached library is used. Without one there is one warning, or in strict mode one error."""
    path = without_tools(tmp_path / "bin")
    assert probe(copy_of(built, tmp_path / "cache"), CXX="", PATH=path)[0][:2] == ["cpu", "cached"]
    empty = tmp_path / "empty"
    words, errors = probe(empty, CXX="", PATH=path)
    assert words[0] == "reference"
    assert errors.count("plain PyTorch replaces the cpu kernels") == 1
    assert "no working C++ compiler" in errors
    assert "install g++" in errors
    assert "RunError: no cpu kernels" in probe(empty, code=1, CXX="", PATH=path, STYLEGAN_PG_KERNELS="strict")[1]
    assert probe(empty, CXX="", PATH=path, STYLEGAN_PG_KERNELS="reference") == (["reference", "-", "-"], "")


def test_a_compiler_that_fails(tmp_path):
    """The log contains the output of the compiler, and the message names the log."""
    broken = tmp_path / "c++"
    says = '[ "$1" = --version ] && { echo broken 1.0; exit 0; }'
    broken.write_text(f"#!/bin/sh\n{says}\necho error: out of order; exit 1\n")
    broken.chmod(0o755)
    words, errors = probe(tmp_path / "cache", CXX=str(broken))
    assert words[0] == "reference"
    (log,) = (tmp_path / "cache").glob("*.log")
    assert str(log) in errors
    assert "out of order" in log.read_text()
    assert "out of order" in errors
    done = harness.command("kernels", "build", env=environment(tmp_path / "cache", CXX=str(broken)), expected=1)
    assert done.stderr.startswith("error: no cpu kernels: compiling the cpu kernels failed")


def test_a_cache_that_cannot_be_written(tmp_path):
    """A private temporary folder is used instead."""
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "tmp").mkdir()
    words, errors = probe(tmp_path / "file" / "cache", TMPDIR=str(tmp_path / "tmp"))
    assert words[:2] == ["cpu", "compiled"]
    assert words[2].startswith(str(tmp_path / "tmp" / f"stylegan_pg-{os.getuid()}"))
    assert errors == ""


def test_a_temporary_folder_that_others_can_write_is_refused(tmp_path):
    """Other users could place a library there, which this process would run."""
    open_to_all = tmp_path / f"stylegan_pg-{os.getuid()}"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    (tmp_path / "file").write_text("in the way")
    words, errors = probe(tmp_path / "file" / "cache", TMPDIR=str(tmp_path))
    assert words[0] == "reference"
    assert "could be written by others" in errors


def test_prebuilt_libraries_are_preferred(built, tmp_path):
    prebuilt = tmp_path / "prebuilt"
    done = harness.command("kernels", "build", "--into", prebuilt, env=environment(built), expected=0)
    assert "copied to" in done.stdout
    cache = tmp_path / "cache"
    path = without_tools(tmp_path / "bin")
    assert probe(cache, STYLEGAN_PG_PREBUILT=str(prebuilt), CXX="", PATH=path)[0][:2] == ["cpu", "prebuilt"]
    meta_file = library_in(prebuilt).parent / "meta.json"
    meta = json.loads(meta_file.read_text())
    meta_file.write_text(json.dumps(meta | {"architecture": "another processor"}))
    assert probe(cache, STYLEGAN_PG_PREBUILT=str(prebuilt), CXX="", PATH=path)[0][0] == "reference"


def test_a_killed_builder_does_not_block_the_next_one(tmp_path):
    cache = tmp_path / "cache"
    process = subprocess.Popen(
        [sys.executable, "-c", PROBE], env=environment(cache, COMPILER_SLEEPS="30"), start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not list(cache.glob(".cpu-*/*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(cache.glob("cpu-*/kernels.so"))
    assert probe(cache)[0][:2] == ["cpu", "compiled"]


def test_two_concurrent_builders_build_one_library(tmp_path):
    cache = tmp_path / "cache"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = environment(cache, COMPILER_SLEEPS="1")
    both = [subprocess.Popen([sys.executable, "-c", PROBE], env=env, **pipes) for _ in range(2)]
    words = [p.communicate(timeout=300)[0].split() for p in both]
    assert sorted(w[1] for w in words) == ["cached", "compiled"]
    assert library_in(cache)


def test_waiting_for_a_lock_is_limited(tmp_path, monkeypatch):
    lock = tmp_path / "lock"
    holder = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); "
    holder += "time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", holder, str(lock)], stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    monkeypatch.setattr(build, "LOCK_TIMEOUT", 0.3)
    started = time.monotonic()
    with build._lock(lock):
        assert 0.3 <= time.monotonic() - started < 10
    process.kill()
    process.wait()


def test_a_lock_file_of_another_user_is_ignored(tmp_path):
    """A folder is used in place of a file without permissions, because root could open the file."""
    (tmp_path / "lock").mkdir()
    with build._lock(tmp_path / "lock"):
        pass


def test_a_missing_cache_folder_is_one_message(tmp_path):
    with pytest.raises(recipes.BuildError, match=r"cannot be written: .*set STYLEGAN_PG_CACHE"):
        build._compile(recipes.cpu_recipe(), tmp_path / "gone" / "cpu-0")


def test_a_user_without_a_home_directory(tmp_path, monkeypatch):
    """This occurs in containers with a numeric user. A chosen cache folder is used, otherwise a temporary folder."""

    def fails():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", fails)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("STYLEGAN_PG_CACHE", str(tmp_path / "chosen"))
    assert files.cache_folder() == tmp_path / "chosen"
    monkeypatch.delenv("STYLEGAN_PG_CACHE")
    assert files.cache_folder() == tmp_path / f"stylegan_pg-{os.getuid()}"


def test_a_compiler_with_launcher_and_options(tmp_path, monkeypatch):
    """$CXX may contain a launcher and options. Options are part of a library's key; nvcc gets the compiler only."""
    compiler, launcher = tmp_path / "my c++", tmp_path / "launcher"
    compiler.write_text(f'#!/bin/sh\nexec {recipes.cxx()} "$@"\n')
    launcher.write_text('#!/bin/sh\nexec "$@"\n')
    for path in (compiler, launcher):
        path.chmod(0o755)
    names = set()
    for text, words in {
        str(compiler): [str(compiler)],  # a path with a space in it
        f"'{compiler}' -O0": [str(compiler), "-O0"],
        f"{launcher} '{compiler}' -O0 -g": [str(launcher), str(compiler), "-O0", "-g"],
    }.items():
        monkeypatch.setenv("CXX", text)
        recipe = recipes.cpu_recipe()
        assert list(recipes.cxx_command()) == words
        assert recipes.cxx() == str(compiler)
        assert list(recipe.compile[: len(words)]) == list(recipe.link[: len(words)]) == words
        assert recipe.problem is None
        assert f"-ccbin={compiler}" in recipes.cuda_recipe().compile
        names.add(build._folder_name(recipe))
    assert len(names) == 3
    assert probe(tmp_path / "cache")[0][:2] == ["cpu", "compiled"]
    for text in ("no-such-compiler -O0", "'unclosed", "  "):
        monkeypatch.setenv("CXX", text)
        assert recipes.cxx_command() == ()
        assert recipes.cpu_recipe().problem


def test_the_key_of_a_library_covers_all_its_inputs(monkeypatch):
    recipe = recipes.cpu_recipe()
    assert {"sources", "torch", "cuda", "python", "compiler", "flags", "architecture"} <= recipe.meta.keys()
    name = build._folder_name(recipe)
    monkeypatch.setattr("torch.__version__", "9.9.9")
    assert build._folder_name(recipes.cpu_recipe()) != name
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted((recipes.kernels_folder() / "cpu").iterdir()):
        digest.update(f"cpu/{path.name}".encode() + b"\0" + path.read_bytes())
    assert recipe.meta["sources"] == digest.hexdigest()
