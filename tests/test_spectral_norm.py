"""Spectral normalisation of discriminators: torch's numbers, every family, one step of its vectors in each step."""

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from first_step import FirstStep, agree, batches_of, engine_of
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import is_parametrized

from stylegan_pg.config import MODELS
from stylegan_pg.networks import NETWORKS, NetworkShape
from stylegan_pg.networks.spectral import SpectralNorm, add_spectral_norm, move_vectors
from stylegan_pg.training.buffers import changing_buffers

ARGUMENTS = {
    "dense": (lambda: nn.Linear(5, 7), [3, 5]),
    "convolution": (lambda: nn.Conv2d(4, 6, 3), [3, 4, 5, 5]),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), [3, 4, 5, 5]),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3), [3, 4, 5, 5]),
}


def norms_of(net: Any) -> list[tuple[SpectralNorm, torch.Tensor]]:
    """The parametrisations of a network with the weights that they normalise."""
    chains = [chain for layer in net.modules() if is_parametrized(layer) for chain in layer.parametrizations.values()]
    return [(norm, chain.original) for chain in chains for norm in chain]


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_it_is_that_of_torch(kind):
    """Outputs, gradients and vectors over several passes of torch's, each of which moves its vectors."""
    torch.manual_seed(4)
    make, shape = ARGUMENTS[kind]
    layer = make().double()
    theirs: Any = spectral_norm(copy.deepcopy(layer))
    ours: Any = add_spectral_norm(copy.deepcopy(layer))
    (norm, original), reference = norms_of(ours)[0], theirs.parametrizations.weight[0]
    reference._u.copy_(norm.u)
    reference._v.copy_(norm.v)
    for _ in range(3):
        x = torch.randn(shape).double()
        move_vectors(ours)
        results = [net(x) for net in (theirs, ours)]
        torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)
        noise = torch.randn_like(results[0])
        a, b = theirs.parametrizations.weight.original, original
        gradients = [torch.autograd.grad((y * noise).sum(), w) for y, w in zip(results, (a, b), strict=True)]
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(norm.u, reference._u, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(norm.v, reference._v, rtol=1e-10, atol=1e-12)
        with torch.no_grad():
            for weight in (a, b):
                weight.add_(0.1 * gradients[0][0])


def test_second_derivatives():
    torch.manual_seed(5)
    layer: Any = add_spectral_norm(nn.Linear(3, 2).double())
    weight = layer.parametrizations.weight.original
    norm = layer.parametrizations.weight[0]
    assert torch.autograd.gradgradcheck(norm, weight.detach().clone().requires_grad_(True))


def has_label(name):
    return "label" in {field.name for field in dataclasses.fields(MODELS[name])}


@pytest.mark.parametrize(
    ("name", "label"),
    [(n, label) for n in NETWORKS for label in (["projection", "concatenation"] if has_label(n) else [""])],
)
def test_all_weights_of_every_family_have_norm_one_where_they_are_used(name, label):
    """Those of layers with equalised learning rate after the multiplication with their constant."""
    torch.manual_seed(6)
    keys = {"label": label} if label else {}
    model, shape = MODELS[name](channel_max=16, **keys), NetworkShape(8, 8, False, 3, 2, 4)
    D: Any = NETWORKS[name].D(**NETWORKS[name].d_kwargs(model, shape)).double()
    plain = {name for name, p in D.named_parameters() if p.ndim > 1}
    add_spectral_norm(D)
    names = {name.removesuffix(".original").replace("parametrizations.", "") for name, p in D.named_parameters()
             if name.endswith(".original")}  # fmt: skip
    assert names == plain
    for _ in range(200):
        move_vectors(D)
    layers: list[Any] = [layer for layer in D.modules() if is_parametrized(layer)]
    for layer in layers:
        for key, chain in layer.parametrizations.items():
            used = getattr(layer, key) * getattr(layer, f"{key}_gain", 1.0)
            matrix = chain[0].matrix(used.detach())
            assert float(torch.linalg.matrix_norm(matrix, ord=2)) == pytest.approx(1, rel=3e-3)
    if not (label or name == "mlp"):
        return  # other inputs or outputs, see the families' own tests
    scores = D(torch.randn(4, 3, 8, 8).double(), torch.eye(2).double()[[0, 1, 1, 0]])
    assert scores.isfinite().all()
    gradients = torch.autograd.grad(scores.square().sum(), list(D.parameters()), allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in gradients)
    assert len(changing_buffers([D])) >= 2 * len(plain)


def test_the_scale_of_a_layer_with_equalised_learning_rate_has_no_effect():
    torch.manual_seed(7)
    model, shape = MODELS["stylegan2"](channel_max=8), NetworkShape(8, 8, False, 3, 0, 4)
    D: Any = add_spectral_norm(NETWORKS["stylegan2"].D(**NETWORKS["stylegan2"].d_kwargs(model, shape)).double())
    x = torch.randn(4, 3, 8, 8).double()
    before = D(x)
    with torch.no_grad():
        for norm, weight in norms_of(D):
            weight.mul_(3)
            assert norm.dim == 0
    torch.testing.assert_close(D(x), before)


def spectral(data, *overrides):
    given = ["model.d_spectral_norm=true", "optim.d_steps=1", *overrides]
    return engine_of("systems/sngan", data, *given)


def test_vectors_move_once_in_a_step(tiny_data):
    """However many passes D has: two of its own, those of two steps of G, of R1 and of micro-batches."""
    terms = "loss.terms=[{name: gradient_penalty, weight: 1}]"
    engine = spectral(
        tiny_data,
        "optim.g_steps=2",
        "loss.r1_gamma=1",
        "loss.r1_every=2",
        terms,
        "train.micro_batch=4",
        "model.mbstd_group=4",
    )
    for batch in batches_of(engine, 3):
        before = [(norm.u.clone(), norm.v.clone(), w.detach().clone()) for norm, w in norms_of(engine.state.D)]
        assert before
        assert not engine.step(batch).faults
        for (norm, _), (_, v, weight) in zip(norms_of(engine.state.D), before, strict=True):
            matrix = norm.matrix(weight)
            u = matrix @ v / (matrix @ v).norm()
            torch.testing.assert_close(norm.u, u, rtol=1e-9, atol=1e-12)
            v = matrix.t() @ u
            torch.testing.assert_close(norm.v, v / v.norm(), rtol=1e-9, atol=1e-12)


def test_forward_passes_change_nothing(tiny_data):
    D = spectral(tiny_data).state.D.train()
    before = [t.clone() for t in changing_buffers([D])]
    D(torch.randn(4, 3, 8, 8).double()).sum().backward()
    assert all(map(torch.equal, before, changing_buffers([D])))


def test_the_gradients_of_a_step_are_those_of_torch(tiny_data):
    """D's, with the hinge loss: one iteration, then torch's module without further ones."""
    first = FirstStep(spectral(tiny_data))
    system, x = first.system, first.context()
    found = first.gradients("D")
    twin: Any = type(first.state.D)(**system.d_kwargs(system.form)).double()
    names = {name.replace("parametrizations.", "").removesuffix(".original"): p
             for name, p in first.state.D.named_parameters()}  # fmt: skip
    twin.load_state_dict({name: p.detach() for name, p in names.items()})
    for layer, (norm, _) in zip([m for m in twin.main if hasattr(m, "weight")], norms_of(first.state.D), strict=True):
        spectral_norm(layer)
        module = layer.parametrizations.weight[0]
        module._u.copy_(norm.u)
        module._v.copy_(norm.v)
    latents = system.latents(x, "d")
    with torch.no_grad():
        fake = system.G(latents.z)
        twin(fake)  # moves the vectors
    twin.eval()  # and now they stay
    loss = F.relu(1 - twin(x.real)) + F.relu(1 + twin(fake))
    gradients = torch.autograd.grad(loss.mean(), list(twin.parameters()))
    expected = dict(zip(dict(twin.named_parameters()), gradients, strict=True))
    agree(found, expected)


def test_a_weight_of_zeros_gets_a_direction():
    layer: Any = nn.Linear(400, 30, bias=False)
    nn.init.zeros_(layer.weight)
    add_spectral_norm(layer)
    assert float(layer.parametrizations.weight.original.detach().std()) == pytest.approx(1 / math.sqrt(400), rel=0.1)
    assert layer(torch.randn(2, 400)).isfinite().all()


def test_without_the_key_nothing_is_normalised(tiny_data):
    engine = spectral(tiny_data, "model.d_spectral_norm=false")
    assert not norms_of(engine.state.D)
    assert not changing_buffers([engine.state.D])
