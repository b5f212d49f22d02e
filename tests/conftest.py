"""What every test shares: thread counts, the reference numbers, which tests need what."""

import contextlib
import ctypes
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch is imported, and inherited by the processes that tests start: the same bits everywhere, and room for
# ranks side by side on a small machine. Tests that run beside others (pytest -n) take one thread.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
# Threads that wait do not keep a processor busy: tests share processors with the processes that they start, and with
# other tests. Otherwise a training step takes 5 times as long beside two other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# A shell that starts the tests in the background lets them ignore Ctrl-C, and so would the processes that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch

from stylegan_pg.distributed import stopping
from stylegan_pg.monitoring import logs

ROOT = Path(__file__).resolve().parent.parent


# The slowest files run first, the longest at the very beginning. Otherwise one worker could still be busy with one of
# them when the others have finished. (The Makefile keeps this order with --no-loadscope-reorder.)
SLOWEST = """
launch engines faults metrics_fidelity build build_cuda shim kernel_mutants streaming_training orphans shapes recipes
gpu leftovers ranks golden old_versions engine_steps conv3x3 train readme transfer metrics_training restart step
hostile console foreign_training start_notes small_sets environment servers metrics_ranks metrics_classifiers bias_act
filtered_lrelu kernels_command metric_shapes
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}.py": place for place, name in enumerate(SLOWEST.split())}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device: torch.cuda.is_available() is false here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def _kernels() -> Iterator[None]:
    """Build the kernels once. Processes with a separate cache use them as prebuilt kernels."""
    from stylegan_pg.files import cache_folder
    from stylegan_pg.ops import build

    with contextlib.suppress(build.BuildError):  # tests that need the kernels report the error
        build.load("cpu")
    with pytest.MonkeyPatch.context() as patch:
        if not os.environ.get("STYLEGAN_PG_PREBUILT"):
            patch.setenv("STYLEGAN_PG_PREBUILT", str(cache_folder()))
        yield


@pytest.fixture(autouse=True)
def _restore_signal_handlers() -> Iterator[None]:
    """Undo changes of a test that trains in this process. Otherwise, processes that later tests fork would inherit its
    handlers."""
    handlers = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    yield
    if stopping._requests.listens:
        signal.set_wakeup_fd(-1)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    stopping._requests = stopping._Requests()  # its thread, if there is one, keeps waiting for signals


@pytest.fixture(autouse=True)
def _logs_are_shown() -> Iterator[None]:
    """Log records appear on standard error, as they do under the command line, and caplog holds them, too. Handlers
    that a test leaves behind are removed."""
    logger = logging.getLogger(logs.ROOT)
    with logs.to_console():
        logger.propagate = True
        yield
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    """The folder of numbers that the original implementations computed. It is beside the checkout."""
    path = ROOT.parent / "shared" / "parity"
    if not path.is_dir():
        pytest.skip("no reference numbers: ../shared/parity does not exist beside this checkout")
    return path


# Datasets made once for the whole session go below.


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed dataset of 96 pictures in three classes, at 4x4 to 32x32."""
    import numpy as np
    from PIL import Image

    from stylegan_pg.data.pack.pack import pack

    source = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for i in range(96):
        folder = source / "abc"[i % 3]
        folder.mkdir(exist_ok=True)
        small = random.integers(0, 256, [4, 4, 3], dtype=np.uint8)
        Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")
    out = tmp_path_factory.mktemp("packed") / "tiny"
    pack(str(source), out, resolution=32, format="png", workers=0, progress=False)
    return out


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of 64 pictures of 64x64, and the dataset packed from it."""
    from measuring import packed

    return packed(tmp_path_factory.mktemp("real"), 64)


@pytest.fixture(scope="session")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights of a random Inception."""
    from measuring import random_inception

    return random_inception(tmp_path_factory.mktemp("weights") / "inception.pth")


@pytest.fixture(scope="session")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a snapshot: a generator with three classes, 16x16."""
    from stylegan_pg.checkpoint.snapshot import save_snapshot
    from stylegan_pg.config import StyleGAN2Config
    from stylegan_pg.networks import NETWORKS, NetworkShape

    how: dict[str, Any] = {"z_dim": 8, "w_dim": 8, "mapping_layers": 2, "channel_base": 64, "channel_max": 8}
    pair = NETWORKS["stylegan2"]
    kwargs = pair.g_kwargs(StyleGAN2Config(**how), NetworkShape(16, 16, False, 3, 3, 4))
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("snapshot") / "G.safetensors"
    description = {"network": "stylegan2", "kwargs": kwargs, "alpha": 1.0, "nimg": 1, "label_names": ["a", "b", "c"]}
    save_snapshot(path, pair.G(**kwargs).eval(), description)
    return path


@pytest.fixture(scope="session")
def unconditional(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A small generator of 16x16 images without classes, and the file of its snapshot."""
    from snapshots import saved

    return saved(tmp_path_factory.mktemp("unconditional") / "new" / "G.safetensors")


@pytest.fixture(scope="session")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A small generator of 16x16 images in three classes, and the file of its snapshot."""
    from snapshots import saved

    return saved(tmp_path_factory.mktemp("conditional") / "G.safetensors", c_dim=3)


@pytest.fixture(scope="session", params=[1, 3, 4], ids=["grey", "rgb", "rgba"])
def shaped_dataset(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, torch.Tensor]:
    """A dataset of pictures that are not square, of one, three or four channels, and the pictures."""
    from shapes import pack_shapes

    return pack_shapes(tmp_path_factory.mktemp("shapes"), request.param)


@pytest.fixture(scope="session")
def compiled_operations() -> list[Path]:
    """The folders of compiled kernels in the user's cache. They are built if necessary."""
    from stylegan_pg.files import cache_folder
    from stylegan_pg.ops import native

    native.choose("cpu")
    return [folder for folder in cache_folder().glob("cpu-*") if folder.is_dir()]


@pytest.fixture(params=["kernels", "formulas"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The implementation of the operators in this test: the compiled kernels, or plain PyTorch without kernels."""
    from stylegan_pg.ops import native

    if request.param == "formulas":
        monkeypatch.setattr(native, "compiled", lambda x: None)
    elif native.choose("cpu").built is None:
        pytest.skip(f"no compiled kernels here: {native.choose('cpu').reason}")
    return request.param


@pytest.fixture(scope="session")
def fast_compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A C++ compiler for tests that build kernels; see building.MEMOIZED."""
    from building import MEMOIZED

    from stylegan_pg.ops import recipes

    script = tmp_path_factory.mktemp("compiler") / "c++"
    script.write_text(MEMOIZED.format(cxx=recipes.cxx(), folder=script.parent))
    script.chmod(0o755)
    return script


@pytest.fixture(scope="session")
def built(fast_compiler: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with a finished library of CPU kernels, built by `fast_compiler`."""
    from building import probe

    cache = tmp_path_factory.mktemp("cache")
    assert probe(cache, CXX=str(fast_compiler))[0][:2] == ["cpu", "compiled"]
    return cache


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The CUDA kernels, compiled for the CPU with kernels/shim/cuda.h."""
    from shimmed import compile_library

    from stylegan_pg.ops import recipes

    if recipes.cxx() is None:
        pytest.skip("no C++ compiler")
    return compile_library(recipes.kernels_folder(), tmp_path_factory.mktemp("shim") / "shim.so")


@pytest.fixture
def _fast_compiler(fast_compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `fast_compiler` the compiler of this process and of the processes that it starts."""
    monkeypatch.setenv("CXX", str(fast_compiler))


@pytest.fixture
def _own_cache(compiled_operations: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that contains only the compiled kernels, which each process would otherwise need half a minute to
    build."""
    own = tmp_path / "cache"
    own.mkdir()
    for folder in compiled_operations:
        (own / folder.name).symlink_to(folder)
    monkeypatch.setenv("STYLEGAN_PG_CACHE", str(own))
