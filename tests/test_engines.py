"""Both engines on several processes: sums that overlap the backward pass, ZeRO, checkpoints across engines, and what
happens when memory runs out."""

import os
import subprocess
import sys

import harness
import pytest
import torch

from stylegan_pg.checkpoint import checkpoint
from stylegan_pg.config.loading import load_config
from stylegan_pg.errors import UsageError
from stylegan_pg.files import cache_folder

pytestmark = pytest.mark.distributed

QUIET = harness.COMPARABLE | {
    "train__check_ranks_every": 1
}  # checks that all ranks have the same bits after every step
ZERO = {"train__engine": "deepspeed", "train__zero_stage": 2}


@pytest.fixture(scope="module")
def deepspeed():
    """DeepSpeed compiles a helper at its first run on a CPU, which takes two minutes. It is built once, in a persistent
    folder."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    before = dict(os.environ)
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache_folder() / "torch_extensions"))
    os.environ["DS_ACCELERATOR"] = "cpu"
    build = "from deepspeed.comm.torch import build_shm_op; build_shm_op()"
    subprocess.run([sys.executable, "-c", build], check=True, timeout=600, capture_output=True)
    yield
    os.environ.clear()
    os.environ.update(before)


def trained(run, data, ranks: int, **changes):
    harness.finish(harness.start(harness.arguments(run, data, **(QUIET | changes)), ranks=ranks))
    return [checkpoint.read(path)[0] for path in reversed(checkpoint.found(run / "checkpoints"))]


@pytest.fixture(scope="module")
def plain(tiny_data, tmp_path_factory):
    """The checkpoints of a run on two ranks with accelerate: R1, path length, growth and a fade."""
    return trained(tmp_path_factory.mktemp("plain") / "run", tiny_data, 2)


# Various passes, with GradientAllReduce and, on a copy of the network, with a plain sum per tensor after the passes.
SUMS = """
import copy, torch
from torch import nn
import torch.distributed as td
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.optim.grad_allreduce import GradientAllReduce

dist.init("cpu")
rank, world = dist.rank(), dist.world()
torch.manual_seed(0)
layers = [nn.Linear(16, 16) for _ in range(6)]
body = nn.Sequential(*[m for l in layers for m in (l, nn.Softplus())])
net = nn.ModuleDict({"body": body, "unused": nn.Linear(9, 9)})
plain = copy.deepcopy(net)
sums = GradientAllReduce(list(net.parameters()), 1.5 * 16 * 16 * 4 / 2**20)
assert len(sums.buckets) > 3, sums.buckets

def loss(net, x, kind):
    if kind == "penalty":  # the last bias is not reached
        x = x.requires_grad_(True)
        (g,) = torch.autograd.grad(net.body(x).sum(), x, create_graph=True)
        return g.square().sum()
    return net.body(x).square().sum()

early = {}
for step, (kind, passes) in enumerate([("main", 2), ("main", 1), ("penalty", 1), ("penalty", 3), ("main", 2)]):
    if step == 4:
        for n in (net, plain):
            n.body[2].requires_grad_(False)
    made = 0 if kind == "main" and step == 1 and rank == world - 1 else passes + (rank if step == 3 else 0)
    for n in (net, plain):
        n.zero_grad(set_to_none=True)
        torch.manual_seed(100 * step + rank)
        for k in range(made):
            if n is net and k == made - 1:
                sums.arm(kind)
            loss(n, torch.randn(4, 16), kind).backward()
    sums.finish(kind)
    early[step] = sums.early
    for (name, p), q in zip(net.named_parameters(), plain.parameters()):
        if not p.requires_grad:
            assert p.grad is None
            continue
        expected = torch.zeros_like(q) if q.grad is None else q.grad
        td.all_reduce(expected)
        same = torch.equal(p.grad, expected) if world == 2 else torch.allclose(p.grad, expected, rtol=1e-5, atol=1e-5)
        assert same, (step, name)
        dist.check_same([p.grad], name)
if rank == 0:
    print("early", early, len(sums.buckets))
    # The parameters without a gradient stop the first step's queue at its head; once the order is known they do not.
    assert early[0] == 0 and early[1] >= len(sums.buckets) - 2 and early[4] >= len(sums.buckets) - 2, early
dist.shutdown()
"""


@pytest.mark.parametrize("ranks", [2, 4])
def test_sums_of_gradients(tmp_path, ranks):
    """With several passes, unequal numbers of them, double backward, and frozen and unreached parameters, the sums
    equal plain sums after the passes, on all ranks, and buckets are sent before the pass ends."""
    script = tmp_path / "sums.py"
    script.write_text(SUMS)
    assert "early" in harness.finish(harness.start([], ranks=ranks, script=script))


@pytest.mark.slow
def test_bucket_sizes_do_not_change_results(tiny_data, tmp_path, plain):
    """Sums of two ranks are the same bit for bit, however small the buckets are."""
    other = trained(tmp_path / "run", tiny_data, 2, train__bucket_mib=0.002)
    assert len(plain) == len(other) == 12
    for a, b in zip(plain, other, strict=True):
        assert all(torch.equal(t, b[name]) for name, t in a.items())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_deepspeed_equals_the_plain_sum(tiny_data, tmp_path, deepspeed, plain, stage):
    """Results agree after one step to 1e-6 of each tensor's largest value, and over a growth boundary and a fade to
    slightly more (sharded Adam rounds the last bit differently). All ranks have the same bits after every step."""
    ours = trained(tmp_path / "run", tiny_data, 2, **ZERO | {"train__zero_stage": stage, "train__total_kimg": 0.064})
    assert len(ours) == 8
    assert [t.keys() for t in ours] == [t.keys() for t in plain[:8]]
    assert harness.largest_difference(plain[0], ours[0]) < 1e-6
    assert max(harness.largest_difference(a, b) for a, b in zip(plain[:8], ours, strict=True)) < 1e-4


@pytest.mark.slow
def test_deepspeed_with_penalties_of_every_step(tiny_data, tmp_path, deepspeed):
    """R3GAN, whose penalties are computed in D's main pass."""
    r3gan = {"model__name": "r3gan", "model__group_width": 4, "loss__pl_weight": 0, "loss__r1_every": 1}
    r3gan |= {"loss__objective": "relativistic", "loss__terms": "[r2]", "train__total_kimg": 0.016}
    one, other = (trained(tmp_path / f"run{i}", tiny_data, 2, **r3gan, **how) for i, how in enumerate(({}, ZERO)))
    assert len(one) == len(other) == 2
    assert harness.largest_difference(one[0], other[0]) < 1e-5


def test_four_ranks(tiny_data, tmp_path, deepspeed):
    """Both engines support R1, path length, growth and half of a fade, although two of the four ranks have no share of
    a batch of two groups."""
    ours, *others = (
        trained(tmp_path / f"run{k}", tiny_data, 4, **how, train__total_kimg=0.048)
        for k, how in enumerate(({}, *(ZERO | {"train__zero_stage": stage} for stage in (1, 2))))
    )
    for other in others:
        assert harness.largest_difference(ours[0], other[0]) < 1e-6
        assert max(harness.largest_difference(a, b) for a, b in zip(ours, other, strict=True)) < 1e-4


@pytest.mark.slow
def test_deepspeed_on_other_numbers_of_ranks(tiny_data, tmp_path, deepspeed, plain):
    """The gradients of the first step (Adam's first moments, with beta1 = 0) agree on one, two and four ranks, of which
    two have no share of the batch. The generator's learning rate is tiny; otherwise its rounding would affect the
    discriminator's gradient."""
    changes = {"train__total_kimg": 0.008, "optim__g_lr": 1e-30, "loss__pl_weight": 0, "loss__r1_gamma": 0}
    one, *others = (trained(tmp_path / str(n), tiny_data, n, **(ZERO | changes))[0] for n in (0, 2, 4))
    for other in others:
        for part in ("opt_G/exp_avg/", "opt_D/exp_avg/"):
            assert any(name.startswith(part) for name in one)
            assert harness.largest_difference(one, other, part) < 1e-5


@pytest.mark.slow
def test_resuming_with_other_engines_and_numbers_of_ranks(tiny_data, tmp_path, deepspeed):
    """accelerate on two ranks, ZeRO 2 on one, ZeRO 1 on two, and accelerate on one continue each other's run, over
    growth boundaries with carried moments (so that parameters have different step counts). The result is that of an
    uninterrupted run."""
    changes = {"growth__optimizer": "carry"}
    straight = trained(tmp_path / "straight", tiny_data, 2, **changes)
    legs = [(2, {}), (0, ZERO), (2, ZERO | {"train__zero_stage": 1}), (0, {})]
    for (ranks, engine), end in zip(legs, (0.024, 0.048, 0.072, "null"), strict=True):
        parts = trained(tmp_path / "legs", tiny_data, ranks, **(changes | engine), train__total_kimg=end)
    assert len(straight) == len(parts) == 12
    counts = {float(t) for name, t in parts[-1].items() if name.startswith("opt_G/step/")}
    assert len(counts) > 1
    for a, b in zip(straight, parts, strict=True):
        assert a.keys() == b.keys()
        assert harness.largest_difference(a, b) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"train__zero_offload": "true"}, {"model__low_precision": "bf16"}])
def test_deepspeed_with(tiny_data, tmp_path, deepspeed, changes):
    """Adam on the host, and networks in bfloat16, give the same results as without DeepSpeed."""
    short = {"train__total_kimg": 0.016} | {k: v for k, v in changes.items() if k != "train__zero_offload"}
    ours = trained(tmp_path / "zero", tiny_data, 2, **(ZERO | changes | short))
    plain = trained(tmp_path / "plain", tiny_data, 2, **short)
    assert harness.largest_difference(plain[0], ours[0]) < 1e-6
    assert harness.largest_difference(plain[1], ours[1]) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_deepspeed_with_fp16(tiny_data, tmp_path, stage):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    half = {
        "model__low_precision": "fp16",
        "train__device": "cuda",
        "train__total_kimg": 0.016,
        "train__engine": "deepspeed",
    }
    ours = trained(tmp_path / "zero", tiny_data, 0, **half, train__zero_stage=stage)
    plain = trained(tmp_path / "plain", tiny_data, 0, **(half | {"train__engine": "accelerate"}))
    assert harness.largest_difference(plain[0], ours[0], "G/") < 1e-3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.zero_stage=3"], "differentiate twice"),
        (["train.zero_stage=4"], "must be 0, 1 or 2"),
        (["train.zero_stage=0", "train.zero_offload=true"], "needs train.zero_stage=1 or 2"),
        (["train.engine=deepspeed", "train.dtype=float64"], "needs train.engine=accelerate"),
        (["train.engine=horovod"], "accelerate or deepspeed"),
    ],
)
def test_unsupported_options_of_the_engines(overrides, message):
    with pytest.raises(UsageError, match=message):
        load_config(None, ["run=r", "data.url=d", "train.total_kimg=1", *overrides])


def test_without_deepspeed(tiny_data, tmp_path):
    script = tmp_path / "without.py"
    script.write_text(
        "import sys\nsys.modules['deepspeed'] = None\nfrom stylegan_pg import __main__\n__main__.main()\n"
    )
    args = harness.arguments(tmp_path / "run", tiny_data, **(QUIET | ZERO))
    output = harness.finish(harness.start(args, script=script), expected=2)
    assert "pip install 'stylegan-pg[deepspeed]'" in output
    assert "Traceback" not in output


# Run in place of the command line. On the last rank, at one step, there is memory for so many images; or the passes of
# the whole run have none left once the first bucket is on its way.
SHORT = """
import sys, torch
from stylegan_pg import __main__
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.systems.gan import GAN
from stylegan_pg.optim.grad_allreduce import GradientAllReduce
from stylegan_pg.optim.optimizer_step import NetworkOptimizer

where, room = sys.argv.pop(1), int(sys.argv.pop(1))
when = 0 if where == "path_length" else 16  # where that term is due, in the first phase
last = lambda: dist.rank() == dist.world() - 1
synthesize, send, at, once = GAN.synthesize, GradientAllReduce._send, [], []
apply = NetworkOptimizer._apply
def no_moments(self, held):
    if where == "adam" and at == [16] and last():
        raise torch.OutOfMemoryError("injected")
    apply(self, held)
def small(self, x, ws, purpose):
    at[:] = [x.step.nimg]
    if where == purpose and x.step.nimg == when and last() and len(ws) > room:
        raise torch.OutOfMemoryError("injected")
    return synthesize(self, x, ws, purpose)
def full(self, b):
    if where == "backward" and last() and at == [16] and len(self.flying) == 1 and not once:
        once.append(True)
        raise torch.OutOfMemoryError("injected")
    return send(self, b)
GAN.synthesize, GradientAllReduce._send, NetworkOptimizer._apply = small, full, no_moments
sys.argv = ["stylegan-pg", *sys.argv[1:]]
__main__.main()
"""
ROOMY = {"train__batch": 16, "train__total_kimg": 0.048, "checkpoint__every_kimg": 0.016, "train__bucket_mib": 0.002}


def run_short(folder, data, where, room, expected=0, **changes):
    script = folder / "short.py"
    script.write_text(SHORT)
    args = harness.arguments(folder / "run", data, **(QUIET | ROOMY | changes))
    return harness.finish(harness.start([where, str(room), *args], ranks=2, script=script), expected)


DOUBLE = {"train__dtype": "float64", "loss__pl_batch_shrink": 1}


@pytest.fixture(scope="module")
def roomy(tiny_data, tmp_path_factory):
    """A run in float64 that never runs out of memory."""
    run = tmp_path_factory.mktemp("roomy") / "run"
    trained(run, tiny_data, 2, **(ROOMY | DOUBLE))
    return run


@pytest.mark.slow
@pytest.mark.parametrize("where", ["g", "path_length", "d", "backward"])
def test_out_of_memory(tiny_data, tmp_path, roomy, where):
    """Memory runs out on one rank, in a pass of G, a lazy term, a pass of D, or during all-reduce. All ranks halve the
    micro-batch, and the run continues as if it had always had this size (up to rounding in float64)."""
    output = run_short(tmp_path, tiny_data, where, 4, **DOUBLE)
    assert output.count("the micro-batch is now 4 instead of 8, the batch still 16") == 1
    assert "the micro-batch is now 4" in (tmp_path / "run" / "log.txt").read_text()
    tensors, state = harness.newest(tmp_path / "run")
    assert state["training"]["micro_batches"]["0_0"] == 4  # a resumed run must have the same bits
    assert harness.largest_difference(harness.newest(roomy)[0], tensors) < 1e-9
    lines, expected = harness.stats(tmp_path / "run"), harness.stats(roomy)
    for a, b in zip(lines, expected, strict=True):
        assert a == {k: pytest.approx(v, rel=1e-9) if isinstance(v, float) else v for k, v in b.items()}


@pytest.mark.slow
def test_out_of_memory_under_deepspeed(tiny_data, tmp_path, deepspeed):
    output = run_short(tmp_path, tiny_data, "g", 4, **ZERO)
    assert output.count("the micro-batch is now 4 instead of 8") == 1
    straight = trained(tmp_path / "straight", tiny_data, 2, **(ROOMY | ZERO))
    assert harness.largest_difference(straight[0], harness.newest(tmp_path / "run")[0]) > 0
    first = checkpoint.read(checkpoint.path_for(tmp_path / "run" / "checkpoints", 16))[0]
    assert harness.largest_difference(straight[0], first) < 1e-6


def test_out_of_memory_with_the_smallest_micro_batch(tiny_data, tmp_path):
    """Both ranks stop and print a remedy; the last checkpoint exists."""
    output = run_short(tmp_path, tiny_data, "g", 3, expected=1)
    assert "cannot be halved: a minibatch-stddev group is 4. Lower model.mbstd_group" in output
    assert harness.newest(tmp_path / "run")[1]["nimg"] == 16
    assert output.count("Traceback") <= 1  # torchrun's own, about its processes


def test_out_of_memory_in_the_optimiser(tiny_data, tmp_path):
    """A smaller micro-batch would not help. There is one message on that rank, the other rank is informed, and the last
    checkpoint exists."""
    output = run_short(tmp_path, tiny_data, "adam", 4, expected=1)
    assert "out of memory in the optimiser's step of a network of" in output
    assert "train.zero_stage=1" in output
    assert "lost the other ranks" in output
    assert harness.newest(tmp_path / "run")[1]["nimg"] == 16
    assert output.count("Traceback") <= 1  # torchrun's own, about its processes


EARLY = """
import sys
import torch
from stylegan_pg import __main__
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.systems.gan import GAN

score, once = GAN.score_both, []
def short(self, x, batches, **how):
    if x.step.nimg == 16 and dist.rank() == dist.world() - 1 and not once:
        once.append(True)
        raise torch.OutOfMemoryError("injected")
    return score(self, x, batches, **how)
GAN.score_both = short
sys.argv = ["stylegan-pg", *sys.argv[1:]]
__main__.main()
"""


@pytest.mark.parametrize("every", [1, 2])
def test_out_of_memory_before_what_later_losses_need(tiny_data, tmp_path, every):
    """A rank is short in D's main loss, before it has kept the generated images for R2, which is a loss of the same
    update or of the next one. The statistics that it announces are those of the other rank."""
    script = tmp_path / "early.py"
    script.write_text(EARLY)
    terms = f"[{{name: r2, weight: 1, every: {every}}}]"
    changes = QUIET | ROOMY | DOUBLE | {"loss__terms": terms}
    output = harness.finish(
        harness.start(harness.arguments(tmp_path / "run", tiny_data, **changes), ranks=2, script=script)
    )
    assert output.count("the micro-batch is now 4 instead of 8, the batch still 16") == 1
    harness.finish(harness.start(harness.arguments(tmp_path / "straight", tiny_data, **changes), ranks=2))
    straight, ours = (harness.newest(tmp_path / name)[0] for name in ("straight", "run"))
    assert harness.largest_difference(straight, ours) < 1e-9
