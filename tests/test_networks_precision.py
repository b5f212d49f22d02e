"""Networks of every kind: second derivatives, export, bfloat16 and memory layouts."""

import copy
from typing import Any

import pytest
import torch
from nets import KINDS, close, discriminator, generator, normal

from stylegan_pg.losses import terms
from stylegan_pg.networks import copy_same_names, to_channels_last


def penalty(kind: str, term: str, layout: torch.memory_format) -> tuple[Any, Any]:
    """Return a network and a function that computes the value of a penalty."""
    if term == "path_length":
        G = generator(8, kind=kind)
        if layout == torch.channels_last:
            to_channels_last(G)
        y = normal(2, 3, 8, 8, seed=1) / 8
        ws = normal(2, G.num_ws, G.w_dim, seed=2).requires_grad_(True)
        return G, lambda: (terms.path_lengths(G.synthesis(ws), ws, y) - 0.1).square().sum()
    D = discriminator(8, kind=kind, fade=True)
    x = normal(4, 3, 8, 8).contiguous(memory_format=layout).requires_grad_(True)
    if term == "r1":
        return D, lambda: terms.r1(D(x, alpha=0.3), x).sum()

    def gradient_penalty() -> torch.Tensor:
        (gradient,) = torch.autograd.grad(D(x, alpha=0.3).sum(), x, create_graph=True)
        return (gradient.square().sum(dim=[1, 2, 3]).sqrt() - 1).square().sum()

    return D, gradient_penalty


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("term", ["r1", "gradient_penalty", "path_length"])
@pytest.mark.parametrize("kind", ["skip", "stylegan", "progan"])
def test_derivatives_of_penalties(kind, term, layout):
    """The derivative is compared with finite differences along a random direction of all parameters."""
    net, value = penalty(kind, term, layout)
    parameters = list(net.parameters())
    directions = [normal(*p.shape, seed=i) for i, p in enumerate(parameters)]
    gradients = torch.autograd.grad(value(), parameters, allow_unused=True)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True) if g is not None)
    values = []
    step = 1e-6
    for sign in (1, -2):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p += sign * step * d
        values.append(float(value().detach()))
    assert slope != 0
    assert abs((values[0] - values[1]) / (2 * step) - slope) < 1e-5 * abs(slope)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["skip", "stylegan", "progan"])
@torch.no_grad()
def test_export_of_the_inference_graph(kind):
    G, z = generator(8, kind=kind).float().eval(), normal(3, 8).float()
    program = torch.export.export(G, (z,), {"psi": 0.7})
    close(program.module()(z, psi=0.7), G(z, psi=0.7), 1e-6)


@pytest.mark.parametrize("kind", ["skip", "stylegan", "progan"])
def test_bfloat16_in_the_highest_resolutions(kind):
    low = {"kind": kind, "low_precision": "bf16", "low_precision_at": [8, 16]}
    G, D = generator(16, kind=kind).float(), discriminator(16, kind=kind).float()
    half_G, half_D = generator(16, 1, **low).float(), discriminator(16, 1, **low).float()
    copy_same_names(half_G, G)
    copy_same_names(half_D, D)
    assert {p.dtype for p in [*half_G.parameters(), *half_D.parameters()]} == {torch.float32}
    z = normal(4, 8).float()
    with torch.no_grad():
        image, half_image = G(z), half_G(z)
        assert half_image.dtype == torch.float32
        assert 0 < float((half_image - image).std() / image.std()) < 0.05
        logits, half_logits = D(image), half_D(image)
        assert half_logits.dtype == torch.float32
        assert 0 < float((half_logits - logits).abs().max() / logits.abs().max()) < 0.1
    half_D(half_G(z)).sum().backward()
    for p in [*half_G.parameters(), *half_D.parameters()]:
        assert p.grad is not None
        assert p.grad.dtype == torch.float32
        assert p.grad.isfinite().all()


@pytest.mark.parametrize("term", ["r1", "gradient_penalty", "path_length"])
@pytest.mark.parametrize("kind", ["skip", "stylegan", "progan"])
def test_second_derivatives_in_bfloat16(kind, term):
    """The value of a term and its gradient are close to those in float32. The weights (the seed) are chosen such that
    rounding has little effect, which is not true for all weights."""
    build = generator if term == "path_length" else discriminator
    whole = build(16, 2, kind=kind).float()
    half = build(16, 1, kind=kind, low_precision="bf16", low_precision_at=[8, 16]).float()
    copy_same_names(half, whole)
    x, noise, u = normal(4, 3, 16, 16).float(), normal(4, 3, 16, 16, seed=1).float(), torch.linspace(0, 1, 4)

    def taken(net: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if term == "path_length":
            inputs = terms.GInputs(net.synthesis, net.styles(normal(4, 8, seed=2).float()), noise)
        else:
            inputs = terms.DInputs(lambda images, c: net(images), x, None, noise, None, u)
        loss = terms.TERMS[term].compute(inputs)["loss"]
        parameters = list(net.parameters())
        gradients = torch.autograd.grad(loss.sum(), parameters, allow_unused=True, materialize_grads=True)
        assert {g.dtype for g in gradients} == {torch.float32}
        return loss.detach(), torch.cat([g.flatten() for g in gradients])

    (loss, gradient), (half_loss, half_gradient) = taken(whole), taken(half)
    assert not torch.equal(loss, half_loss)
    assert float((half_loss - loss).abs().max()) < 0.1 * float(loss.max())
    # If rounding changes a sign before a leaky ReLU, the second derivative jumps, so the tolerance is wide.
    assert float(torch.cosine_similarity(half_gradient, gradient, dim=0)) > 0.85
    assert 0.85 < float(half_gradient.norm() / gradient.norm()) < 1.15


@pytest.mark.parametrize("kind", ["skip", "stylegan", "progan"])
def test_low_precision_applies_at_the_given_resolutions(kind):
    seen: dict[str, torch.dtype] = {}
    low = {"kind": kind, "low_precision": "bf16", "low_precision_at": [16]}
    G, D = generator(16, **low).float(), discriminator(16, **low).float()
    for player, blocks in (("G", G.synthesis), ("D", D)):
        for r in (4, 8, 16):
            name = f"{player}.b{r}"
            block = getattr(blocks, f"b{r}")
            block.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.dtype}))
    D(G(normal(4, 8).float()))
    assert [name for name, dtype in seen.items() if dtype == torch.bfloat16] == ["G.b16", "D.b16"]
    low |= {"low_precision": "fp16", "low_precision_at": [8, 16, 32]}
    for net in (generator(16, **low), discriminator(16, **low)):  # these cannot run on CPUs, but can be built there
        assert {p.dtype for p in net.parameters()} == {torch.float64}
        assert sorted(n for n, m in net.named_modules() if getattr(m, "dtype", None) == torch.float16) == sorted(
            n for n, _ in net.named_modules() if n.split(".")[-1] in ("b8", "b16")
        )


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_channels_last_gives_the_same_results(kind):
    G = generator(16, kind=kind, fade=True).float()
    D = discriminator(16, kind=kind, fade=True).float()
    other_G: Any = to_channels_last(copy.deepcopy(G))
    other_D: Any = to_channels_last(copy.deepcopy(D))
    layouts = []
    for block in (other_G.synthesis.b16, other_D.b8):
        block.register_forward_hook(
            lambda _, __, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
        )
    z = normal(4, 8).float()
    image = G(z, alpha=0.5)
    close(other_G(z, alpha=0.5), image, 1e-5)
    close(other_D(image.contiguous(memory_format=torch.channels_last), alpha=0.5), D(image, alpha=0.5), 1e-5)
    assert layouts == [True, True]
