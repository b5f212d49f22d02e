"""What every test shares: thread counts, the reference numbers, which tests need what."""

import os
from pathlib import Path

# Before torch is imported, and inherited by the processes that tests start: two threads give the same bits everywhere
# and leave ranks side by side room on a small machine.
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device: torch.cuda.is_available() is false here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    """The folder of numbers computed by the original implementations, which lies beside the checkout."""
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

    from stylegan_pg.data.pack import pack

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
