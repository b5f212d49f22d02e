"""Several ranks compute what one process computes (docs/architecture.md, invariant 2)."""

import os
import re
import subprocess
import sys

import harness
import pytest
import torch

from stylegan_pg.checkpoint import checkpoint

pytestmark = pytest.mark.distributed

QUIET = harness.COMPARABLE


def trained(folder, data, ranks: int, **changes):
    run = folder / f"ranks{ranks}"
    harness.finish(harness.start(harness.arguments(run, data, **(QUIET | changes)), ranks=ranks))
    return run


@pytest.mark.slow
def test_float64_does_not_depend_on_the_number_of_ranks(tiny_data, tmp_path):
    """20 steps with R1, path length, growth and a fade. Three ranks get unequal shares of the four groups, and four
    ranks get one each."""
    changes = {
        "train__dtype": "float64",
        "train__batch": 16,
        "growth__stable_kimg": 0.112,
        "growth__fade_kimg": 0.096,
    }
    one, *others = (harness.newest(trained(tmp_path, tiny_data, n, **changes))[0] for n in (0, 2, 3, 4))
    for other in others:
        assert harness.largest_difference(one, other) < 1e-9
    (tmp_path / "micro").mkdir()
    micro = trained(tmp_path / "micro", tiny_data, 0, train__micro_batch=4, **changes)
    assert harness.largest_difference(one, harness.newest(micro)[0]) < 1e-9


def test_float32_first_gradients(tiny_data, tmp_path):
    """With beta1 = 0, Adam's first moment is the gradient itself. The generator's learning rate is tiny, so that
    rounding in its update does not reach the discriminator's gradient."""
    changes = {
        "train__total_kimg": 0.008,
        "loss__r1_gamma": 0,
        "loss__pl_weight": 0,
        "optim__g_lr": 1e-30,
    }
    one, two = (harness.newest(trained(tmp_path, tiny_data, n, **changes))[0] for n in (0, 2))
    for part in ("opt_G/exp_avg/", "opt_D/exp_avg/"):
        assert any(name.startswith(part) for name in one)
        assert harness.largest_difference(one, two, part) < 1e-5


def test_two_ranks_equal_one_process_with_two_micro_batches(tiny_data, tmp_path):
    """Bit for bit, in float32, at every checkpoint."""
    two = trained(tmp_path, tiny_data, 2)
    one = trained(tmp_path, tiny_data, 0, train__micro_batch=4)
    pairs = list(zip(*(checkpoint.found(run / "checkpoints") for run in (one, two)), strict=True))
    assert len(pairs) == 12
    for a, b in pairs:
        (tensors_a, state_a), (tensors_b, state_b) = checkpoint.read(a), checkpoint.read(b)
        different = [n for n, t in tensors_a.items() if not torch.equal(t, tensors_b[n])]
        assert not different, f"{a.name}: {different[:3]}"
        assert (state_a["training"], state_a["system"]) == (state_b["training"], state_b["system"])
    assert harness.stats(one) == harness.stats(two)


def test_continuing_with_a_different_number_of_ranks(tiny_data, tmp_path):
    """A run of two ranks is finished by one process, with the same batches and a note about it."""
    first = {"train__dtype": "float64", "train__total_kimg": 0.048}
    run = trained(tmp_path, tiny_data, 2, **first)
    again = harness.arguments(run, tiny_data, **(QUIET | first | {"train__total_kimg": "null"}))
    output = harness.finish(harness.start(again))
    assert "continuing on 1 ranks what ran on 2" in output
    (tmp_path / "straight").mkdir()
    straight = trained(tmp_path / "straight", tiny_data, 0, train__dtype="float64")
    assert harness.largest_difference(harness.newest(straight)[0], harness.newest(run)[0]) < 1e-9


def test_accelerate_launch(tiny_data, tmp_path):
    """The other supported launcher starts the same ranks."""
    args = harness.arguments(tmp_path / "run", tiny_data, **(QUIET | {"train__total_kimg": 0.016}))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    env = harness.environment() | {"ACCELERATE_USE_CPU": "true", "MASTER_PORT": str(20000 + os.getpid() % 20000)}
    process = subprocess.Popen(
        [*command, "--main_process_port", env["MASTER_PORT"], "-m", "stylegan_pg", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
    )
    harness.finish(process)
    assert harness.newest(tmp_path / "run")[1]["environment"]["world"] == 2


# Run under torchrun instead of the command line. It changes rank 1's D by the smallest float32 step, once.
DRIFTING = """
import sys, torch
from stylegan_pg import __main__
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.training.engine import Engine

step = Engine.step
def drifting(self, batch, **how):
    result = step(self, batch, **how)
    if self.state.nimg == 24 and dist.rank() == 1:
        p = next(self.state.D.parameters())
        with torch.no_grad():
            p.view(-1)[0] = torch.nextafter(p.view(-1)[0], torch.tensor(9.0))
    return result
Engine.step = drifting
sys.argv = ["stylegan-pg", *sys.argv[1:]]
__main__.run()
"""


@pytest.mark.parametrize("drift", [False, True])
def test_parameters_are_the_same_on_all_ranks(tiny_data, tmp_path, drift):
    """Compared after every step in float32, across a growth boundary and a fade. A difference of a single bit is
    detected and named."""
    changes = {"train__check_ranks_every": 1, "growth__stable_kimg": 0.016, "growth__fade_kimg": 0.032}
    args = harness.arguments(tmp_path / "run", tiny_data, **(QUIET | changes))
    if not drift:
        harness.finish(harness.start(args, ranks=3))
        return
    script = tmp_path / "drifting.py"
    script.write_text(DRIFTING)
    output = harness.finish(harness.start(args, ranks=2, script=script), expected=1)
    told = re.search(
        r"error: the parameters at nimg 24 of ranks \[1\] differ from rank 0's "
        r"\(([0-9a-f]{32}) on rank 1, ([0-9a-f]{32}) on rank 0\)",
        output,
    )
    assert told, output
    assert told[1] != told[2]
    assert (
        max(state["nimg"] for state in harness.stats(tmp_path / "run")) < 24
    )  # nothing was written after the difference
