"""RMSProp and SGD with numbers on the device, against PyTorch's own; their state in checkpoints and across growth; what
is refused."""

from __future__ import annotations

from typing import Any

import harness
import pytest
import torch
from configuring import config_of, file_of, refused
from torch import nn

from stylegan_pg.config.loading import load_config
from stylegan_pg.config.schedule import phases
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.loader.loader import batches
from stylegan_pg.optim import moments
from stylegan_pg.optim.adam import Rates
from stylegan_pg.optim.rmsprop_sgd import OPTIMIZERS, DeviceOptimizer
from stylegan_pg.planning.cost import cost_of
from stylegan_pg.training.devices import Devices
from stylegan_pg.training.engine import Engine
from stylegan_pg.training.train_state import TrainState

SHAPES = ((3, 4), (5,), ())
TINY = ["resolution=8", "growth.start=4", "growth.stable_kimg=0.032", "growth.fade_kimg=0.016", "model.z_dim=8"]
TINY += ["model.w_dim=8", "model.mapping_layers=2", "model.channel_base=64", "train.batch=8", "optim.beta2=0.9"]
TINY += ["loss.r1_every=2", "loss.r1_gamma=1"]
BOTH = {"rmsprop": ["optim.name=rmsprop"], "sgd": ["optim.name=sgd", "optim.beta1=0.5"]}


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=g, dtype=dtype)) for shape in SHAPES]


def gradients(step: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=g, dtype=dtype) * 10 ** (step % 3) for shape in SHAPES]


def rates_at(step: int) -> Rates:
    return Rates(0.001 * (1 + step), 0.1 * (1 + step), 0.9 + 0.009 * step)


def reference_of(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """What torch has for `optim.name`, without its fused and foreach forms."""
    if name == "sgd":
        return torch.optim.SGD(parameters, foreach=False)
    return torch.optim.RMSprop(parameters, eps=1e-8, foreach=False)


def use(reference: torch.optim.Optimizer, name: str, rates: Rates) -> None:
    own = {"momentum": rates.beta1} if name == "sgd" else {"alpha": rates.beta2}
    reference.param_groups[0].update({"lr": rates.lr} | own)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_as_torch_computes_it(name):
    """With numbers that change at every step."""
    ours, theirs = parameters(), parameters()
    mine, reference = OPTIMIZERS[name](ours, rates_at(0), 1e-8), reference_of(name, theirs)
    for step in range(8):
        mine.use(rates_at(step))
        use(reference, name, rates_at(step))
        for a, b, grad in zip(ours, theirs, gradients(step), strict=True):
            a.grad, b.grad = grad.clone(), grad.clone()
        if step == 3:  # no gradient: the step leaves this one out
            ours[1].grad = theirs[1].grad = None
        mine.make_step(torch.zeros([]))
        reference.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
            if mine.moment in reference.state[b]:
                torch.testing.assert_close(
                    mine.state[a][mine.moment], reference.state[b][mine.moment], rtol=1e-12, atol=1e-12
                )
        assert all(mine.moment in reference.state[b] for b in theirs)


def test_without_momentum():
    ours, theirs = parameters(), parameters()
    mine, reference = OPTIMIZERS["sgd"](ours, Rates(0.01, 0, 0), 1e-8), torch.optim.SGD(theirs, lr=0.01)
    for step in range(3):
        for a, b, grad in zip(ours, theirs, gradients(step), strict=True):
            a.grad, b.grad = grad.clone(), grad.clone()
        mine.make_step(torch.zeros([]))
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("first", [0, 2])
def test_a_step_that_is_held_changes_nothing(name, first):
    """Also if it is the first one, and if gradients are not finite."""
    ours = parameters(torch.float32)
    mine: DeviceOptimizer = OPTIMIZERS[name](ours, rates_at(2), 1e-8)
    for step in range(first):
        for p, grad in zip(ours, gradients(step, torch.float32), strict=True):
            p.grad = grad
        mine.make_step(torch.zeros([]))
    before = [p.detach().clone() for p in ours]
    kept = [mine.state[p][mine.moment].clone() for p in ours] if first else [torch.zeros_like(p) for p in ours]
    for p, bad in zip(ours, (float("inf"), float("nan"), 1.0), strict=True):
        p.grad = torch.full_like(p, bad)
    mine.make_step(torch.ones([]))
    assert all(torch.equal(p, old) for p, old in zip(ours, before, strict=True))
    assert all(torch.equal(mine.state[p][mine.moment], old) for p, old in zip(ours, kept, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_numbers_stay_where_they_are(name):
    mine = OPTIMIZERS[name](parameters(), rates_at(0), 1e-8)
    places = [t.data_ptr() for t in (mine.lr, mine.beta1, mine.beta2)]
    mine.use(rates_at(5))
    assert [t.data_ptr() for t in (mine.lr, mine.beta1, mine.beta2)] == places
    assert tuple(t.item() for t in (mine.lr, mine.beta1, mine.beta2)) == rates_at(5)
    assert mine.host_numbers == ()


# --------------------------------------------------------------------------------------------------- in a run


def engine_of(data: Any, *overrides: str, phase: int = 0) -> Engine:
    config = load_config(None, [f"data.url={data}", "run=unused", *TINY, *overrides])
    state = TrainState(config, load_index(str(data)), Devices(config))
    state.enter(phases(config)[phase])
    state.nimg = state.current.start
    return Engine(state)


def train(engine: Engine, steps: int) -> dict[str, torch.Tensor]:
    state, p = engine.state, engine.state.current
    how: dict[str, Any] = {"share": state.micro_batches.share, "fields": state.fields, "workers": 0}
    data = batches(state.table, state.index.order(seed=0), start=state.nimg, end=p.end, batch=p.batch, **how)
    for _, batch in zip(range(steps), data, strict=False):
        assert not engine.step(batch).faults
    return {name: t.clone() for name, t in state.tensors().items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_checkpoint_continues_with_the_same_bits(tiny_data, name):
    whole = engine_of(tiny_data, *BOTH[name])
    train(whole, 2)
    middle = {key: t.clone() for key, t in whole.state.tensors().items()}
    other = engine_of(tiny_data, *BOTH[name])
    other.state.load(middle)
    other.state.nimg = whole.state.nimg
    other.state.system.load_state(whole.state.system.state())
    expected, found = train(whole, 2), train(other, 2)
    kept = {key for key in middle if key.startswith("opt_D/")}
    assert {key.split("/")[1] for key in kept} == {OPTIMIZERS[name].moment}
    assert any(middle[key].any() for key in kept)
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("carry", [True, False])
def test_moments_across_growth(tiny_data, name, carry):
    engine = engine_of(tiny_data, *BOTH[name], f"growth.optimizer={'carry' if carry else 'reset'}")
    before = train(engine, 3)
    engine.state.enter(phases(engine.state.config)[1])
    after = engine.state.tensors()
    kept = [key for key in before if key.startswith("opt_") and key in after]
    assert bool(kept) is carry
    assert all(torch.equal(before[key], after[key]) for key in kept)
    train(engine, 1)


def test_the_plan_counts_moments():
    """Adam has two numbers for each weight besides the weight and its gradient, the others one."""
    costs = {}
    for name in ("adam", "rmsprop", "sgd"):
        config = config_of("resolution=8", f"optim.name={name}")
        costs[name] = cost_of(config, phases(config)[0], 3, 0)
    adam = costs["adam"]
    weights = adam.g_parameters + adam.d_parameters
    assert adam.fixed_bytes == 4 * (5 * adam.g_parameters + 4 * adam.d_parameters)
    for name in OPTIMIZERS:
        assert adam.fixed_bytes - costs[name].fixed_bytes == 4 * weights


def test_lazy_terms_change_the_numbers_of_optimizers_that_divide_by_gradients(tiny_data):
    rates = {
        name: engine_of(tiny_data, *given, "optim.d_lr=0.01").state.rates("D")
        for name, given in {"adam": ["optim.name=adam"], **BOTH}.items()
    }
    assert rates["adam"] == rates["rmsprop"]
    assert tuple(rates["adam"]) == pytest.approx((0.01 * 2 / 3, 0, 0.9 ** (2 / 3)))
    assert rates["sgd"] == Rates(0.01, 0.5, 0.9)


# --------------------------------------------------------------------------------------------------- refusals


def test_what_is_refused():
    assert refused("optim.name=lion") == "optim.name=lion is not possible: it must be adam or rmsprop or sgd"
    message = refused("optim.name=rmsprop", "optim.beta1=0.5")
    assert message.startswith("optim.beta1=0.5 is not possible: it must be 0 with optim.name=rmsprop")
    message = refused("optim.name=sgd", "train.engine=deepspeed")
    assert message.startswith("optim.name=sgd needs train.engine=accelerate")


def test_a_state_of_another_optimizer_is_no_state(tiny_data):
    net = nn.Linear(2, 1)
    tensors = {f"exp_avg/{name}": torch.zeros_like(p) for name, p in net.named_parameters()}
    optimizer = OPTIMIZERS["sgd"](net.parameters(), rates_at(0), 1e-8)
    with pytest.raises(ValueError, match="exp_avg/weight is no part of the state of sgd"):
        moments.restore_optimizer(net, optimizer, tensors, "sgd")
    wrong = {"momentum_buffer/weight": torch.zeros(3)}
    with pytest.raises(ValueError, match="momentum_buffer/weight"):
        moments.restore_optimizer(net, optimizer, wrong, "sgd")
    assert not optimizer.state


def test_continuing_with_another_optimizer_is_refused(tiny_data, tmp_path):
    given = [
        "train",
        file_of(tmp_path, "resolution: 8\n"),
        f"run={tmp_path / 'run'}",
        f"data.url={tiny_data}",
        *TINY,
        "train.device=cpu",
        "train.threads=1",
    ]
    given += ["output.trackers=[]", "output.grid_kimg=0", "output.snapshot_kimg=0", "data.workers=0"]
    harness.command(*given, "train.total_kimg=0.016", "growth.start=null", "optim.name=rmsprop", expected=0)
    done = harness.command(*given, "train.total_kimg=0.032", "growth.start=null", "optim.name=adam", expected=2)
    (line,) = [line for line in done.stderr.splitlines() if "optim.name" in line and "another run" in line]
    assert "optim.name was rmsprop, is adam" in line
    assert "another run=FOLDER to start a new one" in line
