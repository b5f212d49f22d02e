"""Building the CUDA kernels on machines without a GPU: wrong compilers, GPU architectures, prebuilt libraries."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from building import environment, program

from stylegan_pg.ops import recipes

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("_fast_compiler")]


PROBE_CUDA = """
from stylegan_pg.ops import native
choice = native.choose("cuda")
print(choice.name, "|", choice.reason, "|", choice.remedy)
"""

# The choice of kernels in auto mode, then in strict mode, then the command `kernels build`.
PROBE_ALL = f"""
import os, sys
from stylegan_pg.__main__ import main
from stylegan_pg.errors import RunError
{PROBE_CUDA}
os.environ["STYLEGAN_PG_KERNELS"] = "strict"
native.mode.cache_clear()  # the variable is read only once
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
    """Create a CUDA_HOME whose nvcc prints `version` for --version, and otherwise runs `body`."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f'#!/bin/sh\n[ "$1" = --version ] && {{ echo "{version}"; exit 0; }}\n{body}\n')
    nvcc.chmod(0o755)
    return str(folder)


@needs_cuda_build
@pytest.mark.parametrize(
    ("version", "body", "reason", "remedy"),
    [
        (None, "", "nvcc is missing from", "install the CUDA toolkit"),
        ("exit", "", "does not run", "install the CUDA toolkit"),
        (
            "release 11.8, V11.8.89",
            "",
            f"belongs to CUDA 11.8, PyTorch to CUDA {torch.version.cuda}",
            "set CUDA_HOME to a CUDA",
        ),
        (
            "release 99.1, V99.1.0",
            "",
            f"belongs to CUDA 99.1, PyTorch to CUDA {torch.version.cuda}",
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
def test_wrong_cuda_compilers(tmp_path, version, body, reason, remedy):
    """The reference is used, with one warning that names cause and remedy; in strict mode there is one error."""
    home = str(tmp_path / "nowhere")
    if version == "exit":
        home = cuda_toolkit(tmp_path / "toolkit", body="exit 1")
        Path(home, "bin", "nvcc").write_text("#!/bin/sh\nexit 1\n")
    elif version:
        home = cuda_toolkit(tmp_path / "toolkit", version, body)
    env = environment(tmp_path / "cache", CUDA_HOME=home)
    done = program(PROBE_ALL, env)
    first, strict = done.stdout.splitlines()
    name, cause, advice = first.split(" | ")
    assert name == "reference"
    assert reason in cause
    assert remedy in advice
    assert strict.startswith("no cuda kernels: ")
    assert strict.endswith("(STYLEGAN_PG_KERNELS=strict)")
    warning, error = done.stderr.splitlines()
    assert warning.startswith("plain PyTorch replaces the cuda kernels: ")
    assert done.returncode == 1
    assert error.startswith("error: no cuda kernels: ")
    assert reason in error


def test_a_pytorch_without_cuda_is_named(monkeypatch):
    monkeypatch.setattr("torch.version.cuda", None)
    assert recipes.cuda_recipe().problem == ("this PyTorch was built without CUDA", "install a PyTorch for CUDA")


def test_architectures_to_compile_for(monkeypatch):
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
def test_cuda_kernels_built_without_a_gpu(tmp_path):
    """The library loads, and a launch fails with a CUDA error. As a prebuilt library it is used on machines without a
    compiler, if it contains code for all their GPUs."""
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
    probe = f"""{PROBE_CUDA}
import torch
from stylegan_pg.ops import calls
calls.BiasAct(choice.kernels, torch.ones(2, 3), None, None, None, "relu", 1.0, None, 1).elementwise(0)
"""
    env |= {"TORCH_CUDA_ARCH_LIST": "9.0", "CUDA_HOME": str(tmp_path), "STYLEGAN_PG_PREBUILT": str(tmp_path / "p")}
    env["STYLEGAN_PG_CACHE"] = str(tmp_path / "other")
    done = subprocess.run([sys.executable, "-c", probe], env=env, capture_output=True, text=True)
    assert done.stdout.startswith("cuda | prebuilt:"), done.stdout + done.stderr
    assert "the launch failed with CUDA error" in done.stderr
    env["TORCH_CUDA_ARCH_LIST"] = "8.6"
    assert (
        subprocess.run([sys.executable, "-c", probe], env=env, capture_output=True, text=True).stdout[:9] == "reference"
    )
