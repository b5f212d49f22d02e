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
