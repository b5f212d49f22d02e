"""The predicted cost of a training step, determined by running one on tensors without data.

FLOPs are counted by torch's formulas over the forward and backward passes. Memory is that of the tensors which autograd
saves, of weights, gradients, the optimizers' moments and the EMA. Workspaces of kernels and the allocator's overhead
are not included, and neither is augmentation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, register_flop_formula

from stylegan_pg.config import Config, rounds
from stylegan_pg.config.schedule import Phase, weighs
from stylegan_pg.losses import TERMS, DInputs, GInputs, Term, objective_of, per_image, squared_norms
from stylegan_pg.networks import NetworkShape, declares, shown_to  # it registers the operators, too
from stylegan_pg.optim.moments import MOMENTS
from stylegan_pg.planning import averages
from stylegan_pg.planning.operations import NO_LAUNCH
from stylegan_pg.systems.catalogue import SYSTEMS

# Operations of a step that are not made here: latents, statistics and the moving average; and of an optimizer step.
AROUND, OPTIMIZER = 50, 10


@dataclass(frozen=True)
class Cost:
    """The cost of one phase. FLOPs (two per multiply-add) are per real image, and include lazy terms at their share."""

    g_parameters: int
    d_parameters: int
    flops_per_image: float
    fixed_bytes: int  # of weights, gradients, moments, EMA and further averages
    bytes_per_image: float  # of activations saved for the largest backward pass
    launches: float = 0.0  # operations of a step with one micro-batch, of lazy terms at their share


class _Saved:
    """Counts the bytes that autograd saves, each storage once, except for weights, whose size does not depend on the
    batch: tensors of their shapes, which may be scaled or of another dtype."""

    def __init__(self, weights: Iterable[torch.Tensor]):
        self.seen: dict[int, torch.Tensor] = {}
        self.weights = {t.shape for t in weights}

    def pack(self, t: torch.Tensor) -> torch.Tensor:
        if t.shape not in self.weights:
            self.seen[id(t.untyped_storage())] = t
        return t

    def bytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self.seen.values())


@register_flop_formula(torch.ops.stylegan_pg.upfirdn2d)
def _upfirdn2d_flops(x_shape, f_shape, up, down, *_, out_shape: Any = None, **__) -> int:
    """FLOPs of the polyphase form, in which each output uses the taps that do not meet inserted zeros."""
    return 2 * math.prod(out_shape) * math.ceil(f_shape[0] / up[1]) * math.ceil(f_shape[1] / up[0])


def _filtered_lrelu_flops(shape, first, second, up: int, down: int, mid, out) -> int:
    """FLOPs of two filters [k] or [kh, kw], or None, around the temporary rate `mid`, as of `_upfirdn2d_flops`. Filters
    [k] are applied along x and along y."""
    n, c, h, _ = shape
    products = 0
    for f, factor, (rows, columns), size in ((first, up, (h, mid[1]), mid), (second, 1, (out[0], mid[1]), out)):
        if f is not None and len(f) == 1:
            products += math.ceil(f[0] / factor) * (rows * columns + math.prod(size))
        elif f is not None:
            products += math.ceil(f[0] / factor) * math.ceil(f[1] / factor) * math.prod(size)
    return 2 * n * c * products


@register_flop_formula(torch.ops.stylegan_pg.filtered_lrelu)
def _filtered_lrelu_forward_flops(
    x_shape, up_filter, down_filter, _, up, down, padding, *__, out_shape: Any = None, **___
):
    taps = [(1, 1) if f is None else (f[0], f[-1]) for f in (up_filter, down_filter)]
    left, right, top, bottom = padding
    mid = x_shape[2] * up + top + bottom - taps[0][0] + 1, x_shape[3] * up + left + right - taps[0][1] + 1
    return _filtered_lrelu_flops(x_shape, up_filter, down_filter, up, down, mid, out_shape[0][2:])


@register_flop_formula(torch.ops.stylegan_pg.filtered_lrelu_gradient)
def _filtered_lrelu_gradient_flops(g_shape, _, first, second, up, down, offsets, mid, out, *__, **___):
    return _filtered_lrelu_flops(g_shape, first, second, up, down, mid, out)


@register_flop_formula(torch.ops.stylegan_pg.conv3x3)
def _conv3x3_flops(x_shape, w_shape, swapped, transposed, *_, out_shape: Any = None, **__) -> int:
    """FLOPs of the definition, as for all convolutions, even if a kernel needs fewer."""
    pixels = x_shape if transposed else out_shape
    return 2 * math.prod(w_shape) * pixels[0] * math.prod(pixels[2:])


@register_flop_formula(torch.ops.stylegan_pg.conv3x3_weight)
def _conv3x3_weight_flops(x_shape, dy_shape, *_, out_shape: Any = None, **__) -> int:
    return 2 * math.prod(out_shape) * dy_shape[0] * math.prod(dy_shape[2:])


@register_flop_formula(torch.ops.stylegan_pg.grouped_conv)
def _grouped_conv_flops(x_shape, w_shape, *_, out_shape: Any = None, **__) -> int:
    return 2 * math.prod(out_shape) * math.prod(w_shape[1:])


@register_flop_formula(torch.ops.stylegan_pg.grouped_conv_images)
def _grouped_conv_images_flops(dy_shape, w_shape, *_, out_shape: Any = None, **__) -> int:
    return 2 * math.prod(dy_shape) * math.prod(w_shape[1:])


@register_flop_formula(torch.ops.stylegan_pg.grouped_conv_weight)
def _grouped_conv_weight_flops(x_shape, dy_shape, *_, out_shape: Any = None, **__) -> int:
    return 2 * math.prod(dy_shape) * math.prod(out_shape[1:])


def _form(value: Any) -> Any:
    """The properties of an operator's argument that determine the form of its result, hashable."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.is_meta
    if isinstance(value, (list, tuple)):
        return tuple(map(_form, value))
    return type(value), value


def _is_functional(func: Any) -> bool:
    """Whether an operator's results are new tensors: neither views nor changed arguments."""
    return not func._schema.is_mutable and all(r.alias_info is None for r in func._schema.returns)


class Meter(TorchDispatchMode):
    """Counts FLOPs on the meta device. PyTorch computes the form of each result in Python, which takes most of the
    time. Layers and phases repeat each other, so the forms are cached: five times as fast as FlopCounterMode."""

    def __init__(self):
        super().__init__()
        self.flops = self.launches = 0
        self.functional: dict[Any, bool] = {}
        self.known: dict[Any, tuple[int, list[Any]]] = {}  # (operator, arguments) -> FLOPs, forms of the results

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and disabling the compiler for each call takes a fifth of the time

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.launches += func.overloadpacket.__name__ not in NO_LAUNCH
        if func not in self.functional:
            self.functional[func] = _is_functional(func)
        if not self.functional[func]:
            return func(*args, **kwargs)  # costs no FLOPs and little time
        key = (func, _form(args), tuple((name, _form(value)) for name, value in kwargs.items()))
        if key in self.known:
            flops, forms = self.known[key]
            self.flops += flops
            made = [f and torch.empty_strided(f[0], f[1], dtype=f[2], device="meta") for f in forms]
            return made[0] if len(made) == 1 else tuple(made)
        result = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        flops = count(*args, **kwargs, out_val=result) if count else 0
        self.flops += flops
        outputs = result if isinstance(result, tuple) else (result,)
        if all(o is None or (type(o) is torch.Tensor and o.is_meta) for o in outputs):
            self.known[key] = (flops, [None if o is None else (o.shape, o.stride(), o.dtype) for o in outputs])
        return result


def cost_of(config: Config, phase: Phase, channels: int, classes: int, meter: Meter | None = None) -> Cost:
    """Measure one step on one minibatch-stddev group, on the meta device, which needs almost no memory. Terms count if
    they have a weight at the phase's end.

    It is faster with a `meter` that has measured other phases.
    """
    meter = meter or Meter()
    shape = NetworkShape(phase.resolution, config.resolution, phase.fade, channels, classes, phase.mbstd_group)
    n, system = phase.mbstd_group, SYSTEMS[config.system.name](config)
    objective = objective_of(config.loss)
    with torch.device("meta"):
        G: Any = system.pair.G(**system.g_kwargs(shape))
        D: Any = system.pair.D(**system.d_kwargs(shape))
        z, c = torch.randn(n, getattr(G, "z_dim", config.model.z_dim)), torch.randn(n, classes) if classes else None
        real, fake, noise = (torch.randn(n, G.img_channels, *G.img_size) for _ in range(3))
        u = torch.rand(n)

    weighted = [t for t in config.loss.all_terms() if weighs(t, phase)]
    joint = [t for t in weighted if t.every == 1 and TERMS[t.name].at]  # as in systems/gan.py
    make, judge = (getattr(net, "as_trained", net) for net in (G, D))  # networks whose forward pass is not a step's

    def g_main() -> torch.Tensor:
        scores_real = None
        if objective.paired:
            with torch.no_grad():
                scores_real = judge(real, c)
        elif any(TERMS[t.name].of_features for t in weighted):
            with torch.no_grad():
                judge(real, c)
        return per_image(objective.g, judge(shown_to(D, G, make(z, c)), c), scores_real).sum()

    def d_main() -> torch.Tensor:
        with torch.no_grad():
            if declares(getattr(G, "synthesis", G), "followed_batch"):
                fake = G.synthesis(G.styles(z, c), followed_batch=n)
            else:
                fake = make(z, c)
        places = [TERMS[t.name].at for t in joint]
        images = {"real": shown_to(D, G, real), "fake": shown_to(D, G, fake)}
        images |= {place: images[place].detach().requires_grad_(True) for place in places}
        if objective.paired or len(places) == 1 or not declares(D, "batches"):
            scores = {place: judge(one, c) for place, one in images.items()}
        else:
            both = [torch.cat([*images.values()]), *([] if c is None else [torch.cat([c, c])])]
            scores = dict(zip(images, D(*both, batches=2).chunk(2), strict=True))
        loss = per_image(objective.d, scores["real"], scores["fake"]).sum()
        if joint:
            norms = squared_norms([scores[place] for place in places], [images[place] for place in places])
            inputs = DInputs(judge, real, c, norms=dict(zip(places, norms, strict=True)))
            loss = loss + sum(TERMS[t.name].compute(inputs)["loss"].sum() for t in joint)
        return loss

    def term_loss(term: Term) -> torch.Tensor:
        if term.of_pairs:
            return term.compute([G(z, c), G(-z, c)], [z, -z])["loss"].sum()
        on_g = term.on == "G"
        inputs = GInputs(G.synthesis, G.styles(z, c), noise) if on_g else DInputs(judge, real, c, fake, c, u, noise)
        return term.compute(inputs)["loss"].sum()

    flops, peak, launches = 0.0, 0.0, float(AROUND)
    g_share = rounds.g_share(config.optim, (phase.end - phase.start) // phase.batch)
    passes: list[tuple[str, Callable[[], torch.Tensor], float, float]]  # trained side, share of steps and of images
    passes = [("G", g_main, g_share, 1.0), ("D", d_main, 1.0, 1.0)]
    for term, spec in ((t, TERMS[t.name]) for t in weighted if t not in joint):
        if not spec.joins and not spec.of_weights:  # those of weights cost little
            often, images = (
                (g_share, 1 / config.loss.pl_batch_shrink if spec.of_ws else 1.0) if spec.on == "G" else (1.0, 1.0)
            )
            passes.append((spec.on, partial(term_loss, spec), often / term.every, images))
    sizes = [sum(p.numel() for p in net.parameters()) for net in (G, D)]
    for player, forward, often, images in passes:
        G.requires_grad_(player == "G")
        D.requires_grad_(player == "D")
        weights = itertools.chain(G.parameters(), D.parameters())
        saved, before, made = _Saved(weights), meter.flops, meter.launches
        with meter, torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda t: t):
            loss = forward()
        peak = max(peak, images / n * saved.bytes())
        with meter:
            loss.backward()
        flops += often * images / n * (meter.flops - before)
        launches += often * (meter.launches - made + OPTIMIZER)
        G.zero_grad()
        D.zero_grad()
    width = 8 if config.train.dtype == "float64" else 4
    copies = 2 + len(MOMENTS[config.optim.name])  # weights, gradients, moments
    own = (copies + 1) * sizes[0] + copies * sizes[1]  # and G_ema
    own += len(config.ema.profiles) * averages.COPIES * sizes[0]
    launches += len(config.ema.profiles) * averages.LAUNCHES
    return Cost(sizes[0], sizes[1], flops, own * width, peak * width / 4, launches)
