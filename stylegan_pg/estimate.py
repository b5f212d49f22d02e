"""What a configuration will cost, found out by running one training step on tensors without data.

FLOPs are counted by torch's own counter over the forward and backward passes; memory is what autograd keeps plus
weights, gradients, Adam's moments and the EMA. Kernels' workspaces and the allocator's slack come on top.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from stylegan_pg.config import Config
from stylegan_pg.data.index import load_index
from stylegan_pg.errors import UsageError
from stylegan_pg.losses import OBJECTIVES, TERMS, DInputs, GInputs
from stylegan_pg.networks import NETWORKS, NetworkShape  # which registers the operators, too
from stylegan_pg.schedule import Phase, largest_divisor, phases
from stylegan_pg.settings import to_yaml


@dataclass(frozen=True)
class Cost:
    """Of one phase. FLOPs (a multiply-add counts two) are per real image, lazy terms at their share."""

    g_parameters: int
    d_parameters: int
    flops_per_image: float
    fixed_bytes: int  # weights, gradients, moments, EMA
    bytes_per_image: float  # activations kept for the largest backward pass


class _Saved:
    """Counts the bytes that autograd keeps, each storage once."""

    def __init__(self):
        self.seen: dict[int, torch.Tensor] = {}

    def pack(self, t: torch.Tensor) -> torch.Tensor:
        self.seen[id(t.untyped_storage())] = t
        return t

    def bytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self.seen.values())


@register_flop_formula(torch.ops.stylegan_pg.upfirdn2d)
def _upfirdn2d_flops(x_shape, f_shape, up, down, *_, out_shape: Any = None, **__) -> int:
    """Of the polyphase form: of a filter's taps, each output meets those that do not fall on inserted zeros."""
    return 2 * math.prod(out_shape) * math.ceil(f_shape[0] / up[1]) * math.ceil(f_shape[1] / up[0])


def cost_of(config: Config, phase: Phase, channels: int, classes: int) -> Cost:
    """Measures one step on one minibatch-stddev group, on the meta device: it takes no memory to speak of."""
    shape = NetworkShape(phase.resolution, config.resolution, phase.fade, channels, classes, phase.mbstd_group)
    n, pair = phase.mbstd_group, NETWORKS[config.model.name]
    objective = OBJECTIVES[config.loss.objective]
    with torch.device("meta"):
        G: Any = pair.G(**pair.g_kwargs(config.model, shape))
        D: Any = pair.D(**pair.d_kwargs(config.model, shape))
        z, c = torch.randn(n, config.model.z_dim), torch.randn(n, classes) if classes else None
        real = torch.randn(n, channels, *G.img_size)

        def g_main() -> torch.Tensor:
            return objective.g(D(G(z, c), c)).sum()

        def d_main() -> torch.Tensor:
            with torch.no_grad():
                fake = G(z, c)
            return objective.d(D(real, c), D(fake, c)).sum()

        def term_loss(name: str) -> torch.Tensor:
            if TERMS[name].on == "D":
                # Through a view, as the FLOP counter's hooks cannot stand a leaf as a module's input.
                through_view = DInputs(lambda x, c: D(x.view_as(x), c), real, c)
                return TERMS[name].compute(through_view)["loss"].sum()
            inputs = GInputs(G.synthesis, G.styles(z, c), torch.randn_like(real))
            return TERMS[name].compute(inputs)["loss"].sum()

        flops, peak = 0.0, 0
        passes = [("G", g_main, 1.0), ("D", d_main, 1.0)]
        for term in config.loss.all_terms():
            share = 1 / config.loss.pl_batch_shrink if TERMS[term.name].on == "G" else 1.0
            passes.append((TERMS[term.name].on, lambda name=term.name: term_loss(name), share / term.every))
        for player, forward, weight in passes:
            G.requires_grad_(player == "G")
            D.requires_grad_(player == "D")
            saved = _Saved()
            with FlopCounterMode(display=False) as counter:
                with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda t: t):
                    loss = forward()
                kept = saved.bytes()
                loss.backward()
            flops += weight * counter.get_total_flops() / n
            peak = max(peak, kept)
            G.zero_grad()
            D.zero_grad()
    sizes = [sum(p.numel() for p in net.parameters()) for net in (G, D)]
    width = 8 if config.train.dtype == "float64" else 4
    own = 5 * sizes[0] + 4 * sizes[1]  # weights, gradient, two moments; and G_ema
    return Cost(sizes[0], sizes[1], flops, own * width, max(peak - width * sum(sizes), 0) / n * (width / 4))


def describe(config: Config) -> str:
    """The resolved configuration and a table of the phases with what they cost, as text.

    Without a dataset at data.url, RGB images without labels are assumed and the text says so.
    """
    try:
        index = load_index(config.data.url)
        channels, classes = index.channels, len(index.label_names) if config.data.conditional else 0
        about = f"{index.count} images, resolutions {', '.join(map(str, index.resolutions))}, {channels} channels"
        about += f", {classes} classes" if classes else ""
    except UsageError as error:
        channels, classes = 3, 0
        about = f"not there yet ({error}); RGB without labels is assumed below"
    plan = phases(config)
    lines = [to_yaml(config), f"dataset: {about}", ""]
    head = ("phase", "kimg", "batch", "micro", "lr G/D", "G params", "D params", "GFLOPs/img", "memory")
    rows: list[tuple[str, ...]] = [head]
    total = 0.0
    for phase in plan:
        cost = cost_of(config, phase, channels, classes)
        total += cost.flops_per_image * (phase.end - phase.start)
        at_once = phase.micro_batch or phase.batch
        at_once = max(largest_divisor(phase.batch, phase.mbstd_group), min(at_once, phase.batch))
        memory = (cost.fixed_bytes + cost.bytes_per_image * at_once) / 2**30
        rows.append(
            (
                str(phase),
                f"{phase.start / 1000:g}-{phase.end / 1000:g}",
                str(phase.batch),
                str(phase.micro_batch or "all"),
                f"{phase.g_lr:g}/{phase.d_lr:g}",
                f"{cost.g_parameters:,}",
                f"{cost.d_parameters:,}",
                f"{cost.flops_per_image / 1e9:.2f}",
                f"{memory:.2f} GiB",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines += ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [
        "",
        f"{plan[-1].end / 1000:g} kimg, {total:.3g} FLOPs in all. GFLOPs/img counts the whole training step per real "
        "image; memory is an estimate for one device that takes `micro` images (or the whole batch) at a time.",
    ]
    return "\n".join(lines)
