"""Building the kernels from outside: damaged caches, missing tools, killed and competing builders. Every case ends in
a working operation, or in strict mode in one clear error."""

import hashlib
import json
import os
import pstats
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import pytest
import torch

from stylegan_pg import files
from stylegan_pg.ops import build, native, recipes

pytestmark = pytest.mark.distributed

# One operation on numbers that are exact in every implementation; says which one it was.
PROBE = """
import torch
from stylegan_pg.ops import bias_act, native, setup_filter, upfirdn2d
x = torch.arange(32.0).reshape(1, 2, 4, 4)
y = upfirdn2d(x, setup_filter([1, 1]), down=2)
assert torch.equal(y[0, 0], torch.tensor([[2.5, 4.5], [10.5, 12.5]])), y
assert bias_act(x, torch.ones(2), act="relu", gain=1.0)[0, 1, 3, 3] == 32
choice = native.choose("cpu")
print(choice.name, choice.built.origin if choice.built else "-", choice.built.path if choice.built else "-")
"""


MEMOIZED = """#!/bin/sh
out=
for word in "$@"; do
    [ "$before" = -o ] && out=$word
    before=$word
done
[ -z "$out" ] && exec {cxx} "$@"
sleep "${{COMPILER_SLEEPS:-0}}"
kept={folder}/$(printf '%s\\n' "$@" | cksum | tr ' ' -)
[ -f "$kept" ] && exec cp "$kept" "$out"
{cxx} "$@" -O0 || exit
cp "$out" "$kept.$$" && mv "$kept.$$" "$kept"
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A cache that holds the finished library."""
    cache = tmp_path_factory.mktemp("cache")
    assert probe(cache)[0][:2] == ["cpu", "compiled"]
    return cache


@pytest.fixture(scope="module", autouse=True)
def _quick_compiler(tmp_path_factory):
    """The compiler without its optimiser, a tenth of the time; what it has made once, it gives again (all builders run
    it in folders of their own with relative names). A builder that is to be killed, or met, can be slowed."""
    folder = tmp_path_factory.mktemp("compiler")
    script = folder / "c++"
    script.write_text(MEMOIZED.format(cxx=recipes.cxx(), folder=folder))
    script.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", str(script))
        yield


def environment(cache: Path, **changes: str) -> dict[str, str]:
    own = {"STYLEGAN_PG_CACHE": str(cache), "STYLEGAN_PG_KERNELS": "auto", "STYLEGAN_PG_PREBUILT": ""}
    return harness.environment() | own | changes


def probe(cache: Path, *, code: int = 0, **changes: str) -> tuple[list[str], str]:
    """What PROBE printed, as words, and its errors."""
    done = program(PROBE, environment(cache, **changes))
    assert done.returncode == code, done.stderr
    return done.stdout.split(), done.stderr


def program(code: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A Python program, in a process of its own, from start to end."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "program.py"
        script.write_text(code)
        return harness.command(script=script, env=env)


def library_in(cache: Path) -> Path:
    (found,) = cache.glob("cpu-*/kernels.so")
    return found


def copy_of(cache: Path, to: Path) -> Path:
    shutil.copytree(cache, to)
    return to


def without_tools(folder: Path, *kept: str) -> str:
    """A PATH that holds no compiler."""
    folder.mkdir()
    for name in kept:
        (folder / name).symlink_to(str(shutil.which(name)))
    return str(folder)


def test_the_cached_library_is_used_again(built):
    library = library_in(built)
    before = library.stat().st_mtime_ns
    words, errors = probe(built)
    assert words == ["cpu", "cached", str(library)]
    assert errors == ""
    assert library.stat().st_mtime_ns == before
    assert not [p for p in built.iterdir() if p.name.startswith(".cpu")]  # no temporary folders left


def test_finding_it_takes_little_time(built):
    code = "import time, torch; from stylegan_pg.ops import build; t = time.perf_counter(); build.load('cpu'); "
    code += "print(time.perf_counter() - t)"
    times = [float(program(code, environment(built)).stdout) for _ in range(3)]
    assert min(times) < 0.3


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "no meta", "garbled meta"])
def test_a_damaged_cache_is_built_anew(built, tmp_path, damage):
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
    """A library from before is used; without one there is one warning, or in strict mode one error."""
    path = without_tools(tmp_path / "bin")
    assert probe(copy_of(built, tmp_path / "there"), CXX="", PATH=path)[0][:2] == ["cpu", "cached"]
    empty = tmp_path / "empty"
    words, errors = probe(empty, CXX="", PATH=path)
    assert words[0] == "reference"
    assert errors.count("warning:") == 1
    assert "no working C++ compiler" in errors
    assert "install g++" in errors
    assert "RunError: no cpu kernels" in probe(empty, code=1, CXX="", PATH=path, STYLEGAN_PG_KERNELS="strict")[1]
    assert probe(empty, CXX="", PATH=path, STYLEGAN_PG_KERNELS="reference") == (["reference", "-", "-"], "")


def test_a_compiler_that_fails(tmp_path):
    """The log holds what it said, and the message names the log."""
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
    """A private temporary folder stands in."""
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "tmp").mkdir()
    words, errors = probe(tmp_path / "file" / "cache", TMPDIR=str(tmp_path / "tmp"))
    assert words[:2] == ["cpu", "compiled"]
    assert words[2].startswith(str(tmp_path / "tmp" / f"stylegan_pg-{os.getuid()}"))
    assert errors == ""


def test_a_temporary_folder_of_others_is_refused(tmp_path):
    """Whoever can write there could have us run their code."""
    open_to_all = tmp_path / f"stylegan_pg-{os.getuid()}"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    (tmp_path / "file").write_text("in the way")
    words, errors = probe(tmp_path / "file" / "cache", TMPDIR=str(tmp_path))
    assert words[0] == "reference"
    assert "could be written by others" in errors


def test_how_commands_end(built, tmp_path):
    """Commands leave by os._exit, before which all they have said is out; but not where somebody still has to tell."""
    command = ["-m", "stylegan_pg", "kernels", "status"]
    told = subprocess.check_output([sys.executable, *command], env=environment(built), text=True)
    assert told.startswith("STYLEGAN_PG_KERNELS=auto")
    assert "cpu bias_act: cpu kernels" in told
    assert ("cpu conv3x3: cpu kernels for bfloat16" in told) == (not recipes.multiplies_bf16())
    words = " ".join([sys.executable, *command])
    for redirect, code in ((">&-", 0), ("2>&-", 0), ("> /dev/full", 1)):  # nobody listens; a disk that is full
        done = subprocess.run(
            ["sh", "-c", f"{words} {redirect}"], env=environment(built), capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
    profile = ["-m", "cProfile", "-o", str(tmp_path / "profile")]
    assert subprocess.check_output([sys.executable, *profile, *command], env=environment(built), text=True) == told
    stats: Any = pstats.Stats(str(tmp_path / "profile"))
    assert any("cli.py" in place[0] for place in stats.stats)


def test_prebuilt_libraries_come_first(built, tmp_path):
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


def test_a_builder_that_is_killed_leaves_the_next_one_free(tmp_path):
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


def test_two_builders_at_once_make_one_library(tmp_path):
    cache = tmp_path / "cache"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = environment(cache, COMPILER_SLEEPS="1")
    both = [subprocess.Popen([sys.executable, "-c", PROBE], env=env, **pipes) for _ in range(2)]
    words = [p.communicate(timeout=300)[0].split() for p in both]
    assert sorted(w[1] for w in words) == ["cached", "compiled"]
    assert library_in(cache)


def test_a_lock_that_is_held_too_long_does_not_stop_the_work(tmp_path, monkeypatch):
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


def test_a_lock_of_another_users_does_not_stop_the_work(tmp_path):
    """A folder stands in for a file that may not be opened, which root could."""
    (tmp_path / "lock").mkdir()
    with build._lock(tmp_path / "lock"):
        pass


def test_a_cache_that_is_gone_is_one_message(tmp_path):
    with pytest.raises(recipes.BuildError, match=r"cannot be written: .*set STYLEGAN_PG_CACHE"):
        build._compile(recipes.cpu_recipe(), tmp_path / "gone" / "cpu-0")


def test_a_user_without_a_home(tmp_path, monkeypatch):
    """As in containers that run as a number: a chosen cache needs none, a temporary folder stands in for the other."""

    def fails():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", fails)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("STYLEGAN_PG_CACHE", str(tmp_path / "chosen"))
    assert files.cache_folder() == tmp_path / "chosen"
    monkeypatch.delenv("STYLEGAN_PG_CACHE")
    assert files.cache_folder() == tmp_path / f"stylegan_pg-{os.getuid()}"


def test_no_cache_at_all_is_told_by_the_command(monkeypatch):
    def fails():
        raise PermissionError("/tmp/x could be written by others: set STYLEGAN_PG_CACHE")

    monkeypatch.setattr(native, "cache_folder", fails)
    monkeypatch.setattr(native, "choose", lambda device: native.Choice("reference", "no cache"))
    assert "cache none (/tmp/x could be written by others: set STYLEGAN_PG_CACHE)" in native.status()


def test_a_compiler_with_launcher_and_options(tmp_path, monkeypatch):
    """$CXX as build systems have it; options are part of a library's key, and nvcc gets the compiler alone."""
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
        names.add(build._name(recipe))
    assert len(names) == 3
    assert probe(tmp_path / "cache")[0][:2] == ["cpu", "compiled"]
    for text in ("no-such-compiler -O0", "'unclosed", "  "):
        monkeypatch.setenv("CXX", text)
        assert recipes.cxx_command() == ()
        assert recipes.cpu_recipe().problem


def test_the_key_holds_what_a_library_is_made_of(monkeypatch):
    recipe = recipes.cpu_recipe()
    assert {"sources", "torch", "cuda", "python", "compiler", "flags", "architecture"} <= recipe.meta.keys()
    name = build._name(recipe)
    monkeypatch.setattr("torch.__version__", "9.9.9")
    assert build._name(recipes.cpu_recipe()) != name
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted((recipes.kernels_folder() / "cpu").iterdir()):
        digest.update(f"cpu/{path.name}".encode() + b"\0" + path.read_bytes())
    assert recipe.meta["sources"] == digest.hexdigest()


def test_unknown_mode_is_bad_usage():
    done = harness.command("kernels", env=harness.environment() | {"STYLEGAN_PG_KERNELS": "fast"}, expected=2)
    assert done.stderr.strip().startswith("error: STYLEGAN_PG_KERNELS='fast' is unknown: choose from auto")


# --- CUDA, whose compiler can be wrong in more ways; none needs a GPU -----------------------------------------------

PROBE_CUDA = "from stylegan_pg.ops import native; c = native.choose('cuda'); print(c.name, '|', c.why, '|', c.remedy)"
# The same, then in strict mode, then the command.
PROBE_ALL = f"""
import os, sys
from stylegan_pg.__main__ import main
from stylegan_pg.errors import RunError
{PROBE_CUDA}
os.environ["STYLEGAN_PG_KERNELS"] = "strict"
native.mode.cache_clear()  # it is read once
try:
    native.choose("cuda")
except RunError as error:
    print(error)
sys.argv = ["stylegan-pg", "kernels", "build", "--device", "cuda"]
main()
"""
VERSION = f"Cuda compilation tools, release {torch.version.cuda}, V{torch.version.cuda}.1"
needs_cuda_build = pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch was built without CUDA")


def cuda_toolkit(folder: Path, version: str = VERSION, body: str = "exit 1") -> str:
    """A CUDA_HOME whose nvcc says `version`, and otherwise does `body`."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f'#!/bin/sh\n[ "$1" = --version ] && {{ echo "{version}"; exit 0; }}\n{body}\n')
    nvcc.chmod(0o755)
    return str(folder)


@needs_cuda_build
@pytest.mark.parametrize(
    ("version", "body", "why", "remedy"),
    [
        (None, "", "nvcc is missing from", "install the CUDA toolkit"),
        ("exit", "", "does not run", "install the CUDA toolkit"),
        (
            "release 11.8, V11.8.89",
            "",
            f"is of CUDA 11.8, PyTorch of CUDA {torch.version.cuda}",
            "set CUDA_HOME to a CUDA",
        ),
        (
            "release 99.1, V99.1.0",
            "",
            f"is of CUDA 99.1, PyTorch of CUDA {torch.version.cuda}",
            "set CUDA_HOME to a CUDA",
        ),
        (
            VERSION,
            "echo 'x.cu: fatal error: cuda_fp16.h: No such file' >&2; exit 1",
            "cuda_fp16.h",
            "whole CUDA toolkit",
        ),
        (
            VERSION,
            "echo '#error -- unsupported GNU version! gcc 99' >&2; exit 1",
            "unsupported GNU",
            "CXX to an older g++",
        ),
        (
            VERSION,
            "echo \"nvcc fatal error: Unsupported gpu architecture 'compute_80'\"; exit 1",
            "Unsupp",
            "newer CUDA",
        ),
        (VERSION, "kill -9 $$", "compiling the cuda kernels failed", "read the log"),
    ],
)
def test_an_nvcc_that_is_wrong(tmp_path, version, body, why, remedy):
    """One warning that names the cause and the remedy, and the reference; in strict mode one error."""
    home = str(tmp_path / "nowhere")
    if version == "exit":
        home = cuda_toolkit(tmp_path / "toolkit", body="exit 1")
        Path(home, "bin", "nvcc").write_text("#!/bin/sh\nexit 1\n")
    elif version:
        home = cuda_toolkit(tmp_path / "toolkit", version, body)
    env = environment(tmp_path / "cache", CUDA_HOME=home)
    done = program(PROBE_ALL, env)
    first, strict = done.stdout.splitlines()
    name, cause, cure = first.split(" | ")
    assert name == "reference"
    assert why in cause
    assert remedy in cure
    assert strict.startswith("no cuda kernels: ")
    assert strict.endswith("(STYLEGAN_PG_KERNELS=strict)")
    warning, error = done.stderr.splitlines()
    assert warning.startswith("warning: plain PyTorch stands in for the cuda kernels: ")
    assert done.returncode == 1
    assert error.startswith("error: no cuda kernels: ")
    assert why in error


def test_a_pytorch_without_cuda_says_so(monkeypatch):
    monkeypatch.setattr("torch.version.cuda", None)
    assert recipes.cuda_recipe().problem == ("this PyTorch was built without CUDA", "install a PyTorch for CUDA")


def test_which_gpus_the_kernels_are_for(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert recipes.architectures((13, 0)) == ["10.0", "10.0+PTX", "8.0", "9.0"]
    assert recipes.architectures((12, 4)) == ["8.0", "9.0", "9.0+PTX"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6;9.0a+PTX")
    assert recipes.architectures((13, 0)) == ["8.6", "9.0a", "9.0a+PTX"]
    flags = [f for f in recipes.cuda_recipe().compile if "gencode" in f]
    assert flags[1:] == ["-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_90a,code=compute_90a"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Ampere")
    with pytest.raises(recipes.BuildError, match="'Ampere' is unknown"):
        recipes.architectures((13, 0))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda i: (9, 0))
    assert recipes.architectures((13, 0)) == ["9.0"]


@pytest.mark.slow
@needs_cuda_build
@pytest.mark.skipif(recipes.nvcc() is None, reason="nvcc is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: tests/test_gpu.py")
def test_cuda_kernels_built_where_there_is_no_gpu(tmp_path):
    """They load; a launch says what is missing; as prebuilt ones they serve machines with some of their GPUs, and no
    compiler."""
    command = [
        sys.executable,
        "-m",
        "stylegan_pg",
        "kernels",
        "build",
        "--device",
        "cuda",
        "--into",
        str(tmp_path / "p"),
    ]
    env = environment(tmp_path / "cache", TORCH_CUDA_ARCH_LIST="8.0 9.0+PTX", CXX=str(recipes.cxx()))
    assert "cuda: compiled" in subprocess.check_output(command, env=env, text=True)
    probe = PROBE_CUDA + "; import torch; from stylegan_pg.ops import calls; x = torch.ones(2, 3); "
    probe += "calls.Tail(c.kernels, x, None, None, None, 'relu', 1.0, None, 1).elementwise(0)"
    env |= {"TORCH_CUDA_ARCH_LIST": "9.0", "CUDA_HOME": str(tmp_path), "STYLEGAN_PG_PREBUILT": str(tmp_path / "p")}
    env["STYLEGAN_PG_CACHE"] = str(tmp_path / "other")
    done = subprocess.run([sys.executable, "-c", probe], env=env, capture_output=True, text=True)
    assert done.stdout.startswith("cuda | prebuilt:"), done.stdout + done.stderr
    assert "the launch failed with CUDA error" in done.stderr
    env["TORCH_CUDA_ARCH_LIST"] = "8.6"
    assert (
        subprocess.run([sys.executable, "-c", probe], env=env, capture_output=True, text=True).stdout[:9] == "reference"
    )


def test_status_names_every_device():
    done = harness.command("kernels", expected=0)
    for line in ("cpu upfirdn2d: ", "cpu bias_act: ", "cuda"):
        assert line in done.stdout


def test_bench_prints_its_table():
    command = ["kernels", "bench", "--seconds", "0", "--only", "up2 fp32 nchw 64"]
    done = harness.command(*command, expected=0)
    *_, head, row = done.stdout.splitlines()
    assert head.split()[0] == "case"
    assert row.startswith("up2 fp32 nchw 64")
    assert all(float(v) > 0 for v in row.split()[4:])
    done = harness.command(*command, "--device", "tpu", expected=2)
    assert "choose cpu or cuda" in done.stderr


# Under torchrun: rank 1 is told another mode than rank 0.
UNEQUAL = """
import os, sys
os.environ["STYLEGAN_PG_KERNELS"] = sys.argv[1 + int(os.environ["RANK"])]
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.errors import RunError
from stylegan_pg.ops import native
dist.init("cpu")
try:
    print(f"rank {dist.rank()} uses {native.agree('cpu')} now {native.choose('cpu').name}", flush=True)
except RunError as error:
    print(f"rank {dist.rank()} stops: {error}", flush=True)
dist.shutdown()
"""


@pytest.mark.parametrize("modes", [("auto", "auto"), ("auto", "reference"), ("strict", "auto")])
def test_ranks_agree_on_one_implementation(built, tmp_path, modes):
    script = tmp_path / "unequal.py"
    script.write_text(UNEQUAL)
    env = environment(built)
    if "strict" in modes:
        env |= {"STYLEGAN_PG_CACHE": str(tmp_path), "CXX": "/nowhere/c++"}
    done = harness.command(*modes, script=script, ranks=2, env=env, expected=0)
    for rank in (0, 1):
        if "strict" in modes:
            assert f"rank {rank} stops: rank 0: no cpu kernels: no working C++ compiler" in done.stdout
        else:
            name = "reference" if "reference" in modes else "cpu"
            assert f"rank {rank} uses {name} now {name}" in done.stdout
    assert ("ranks [1] have no kernels" in done.stderr) == (modes == ("auto", "reference"))
