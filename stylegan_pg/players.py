"""The two players and one step of their game.

A step computes what follows from (seed, nimg): latents, labels and mixing cut-offs are drawn for the global batch by
every rank, which then takes its share (schedule.deal). Losses are summed and divided by the global batch.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import sys
from functools import partial
from typing import Any, NamedTuple

import torch

from stylegan_pg import checkpoint, dist, ema
from stylegan_pg.config import Config, TermConfig
from stylegan_pg.data.index import DatasetIndex, SampleTable
from stylegan_pg.data.stream import Batch, one_hot
from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.losses import OBJECTIVES, TERMS, DInputs, GInputs
from stylegan_pg.networks import NETWORKS, copy_same_names, to_channels_last
from stylegan_pg.ops import downsample2d, upsample2d
from stylegan_pg.parallel import Parallel
from stylegan_pg.rng import derive, generator
from stylegan_pg.schedule import Phase, deal, ema_beta, lazy_ratio, term_weight
from stylegan_pg.snapshot import NetworkShape, discriminator_kwargs, generator_kwargs


class Draw(NamedTuple):
    """What the generator is given, for a global batch or a share of it."""

    z: torch.Tensor  # [n, z_dim]
    z_mix: torch.Tensor | None  # [n, z_dim], the second latent of style mixing
    cutoff: torch.Tensor | None  # [n], the first layer that takes it
    c: torch.Tensor | None  # [n, c_dim]

    def pick(self, indices: list[int], device: torch.device, dtype: torch.dtype) -> Draw:
        def take(t: torch.Tensor | None) -> torch.Tensor | None:
            return None if t is None else t[indices].to(device, dtype if t.is_floating_point() else t.dtype)

        return Draw(*map(take, self))  # type: ignore[arg-type]  # z is never None


class Players:
    """G, D, G_ema and their optimisers in one phase, and the steps that change them."""

    G: Any  # of the classes in NETWORKS, whose attributes torch.nn.Module does not declare
    D: Any
    G_ema: Any
    opt_G: torch.optim.Optimizer
    opt_D: torch.optim.Optimizer

    def __init__(self, config: Config, index: DatasetIndex, parallel: Parallel):
        """
        Raises:
            UsageError: where configuration and dataset do not fit together.
        """
        self.index, self.parallel = index, parallel
        self.device, self.dtype = parallel.device, getattr(torch, config.train.dtype)
        self.use(config)
        self.classes = len(index.label_names) if config.data.conditional else 0
        if config.data.conditional and not self.classes:
            raise UsageError(f"data.conditional=true, but {index.path} has no labels: pack it with --labels")
        self.objective = OBJECTIVES[config.loss.objective]
        self.terms = config.loss.all_terms()
        for term in self.terms:
            if term.name not in TERMS:
                raise UsageError(f"loss.terms: unknown term {term.name!r}: choose from {', '.join(TERMS)}")
        self.nimg = 0
        self.phase: Phase | None = None
        self.state: dict[str, float] = {}  # running means that terms keep, such as pl_mean
        self.sums: dict[str, torch.Tensor] = {}
        self.said: set[str] = set()

    def use(self, config: Config) -> None:
        """Take a configuration, before the first phase."""
        self.config = config
        self.model = config.model
        if self.device.type == "cpu" and self.model.low_precision == "fp16":
            self.model = dataclasses.replace(self.model, low_precision="fp32")  # CPUs have no fp16 convolutions

    # ------------------------------------------------------------------------------------------------ phases

    @property
    def alpha(self) -> float:
        return self.current.alpha(self.nimg)

    @property
    def current(self) -> Phase:
        assert self.phase is not None, "enter a phase first"
        return self.phase

    def enter(self, phase: Phase) -> None:
        """Build the networks of a phase; they take over what the ones before them had under the same names."""
        old = (self.G, self.D, self.G_ema, self.opt_G, self.opt_D) if self.phase else None
        model = self.model
        shape = NetworkShape(
            phase.resolution, self.config.resolution, phase.fade, self.index.channels, self.classes, phase.mbstd_group
        )
        make_G, make_D = NETWORKS[model.name]
        self.G_kwargs = generator_kwargs(model, shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self.config.seed, "init", phase.index))
            G, D = make_G(**self.G_kwargs), make_D(**discriminator_kwargs(model, shape))
        if old:
            copy_same_names(G, old[0])
            copy_same_names(D, old[1])
        self.G, self.D = (self._place(net) for net in (G, D))
        self.G_ema = copy.deepcopy(self.G).eval().requires_grad_(False)
        if old:
            copy_same_names(self.G_ema, old[2])
        self.opt_G, self.opt_D = self._optimizer(self.G, "G", phase.g_lr), self._optimizer(self.D, "D", phase.d_lr)
        if old and phase.optimizer == "carry":
            checkpoint.restore_optimizer(self.G, self.opt_G, checkpoint.optimizer_tensors(old[0], old[3]))
            checkpoint.restore_optimizer(self.D, self.opt_D, checkpoint.optimizer_tensors(old[1], old[4]))
        self.phase = phase
        self.table: SampleTable = self.index.table(phase.resolution)
        dist.check_same([*self.G.parameters(), *self.D.parameters()], f"the networks at the start of {phase}")

        self.share = deal(phase.batch, phase.mbstd_group, dist.world())[dist.rank()]
        passes = math.ceil(len(self.share) / phase.micro_batch) if phase.micro_batch else 1
        self.parts = self._passes(self.share, phase.mbstd_group, passes)
        if self.config.train.compile and not phase.fade:  # in a fade alpha changes at every step
            self._compile()

    def _compile(self) -> None:
        """Have torch.compile take over the main passes; what differentiates twice stays eager, since it cannot do that.

        What cannot be compiled here (no compiler, an operation it does not know) runs eagerly after one message.
        """
        if not hasattr(torch.compiler, "set_stance"):
            self._say_once("train.compile needs torch 2.6 or newer: everything runs eagerly")
            return
        from torch._dynamo import config as dynamo  # not at the top: it takes a while

        # One frame serves all layers of a kind, each of another size.
        limit = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"
        setattr(dynamo, limit, max(getattr(dynamo, limit), 64))
        self.G.synthesis.compile(dynamic=False)
        self.D.compile(dynamic=False)
        fault = ""
        try:
            count = max(map(len, self.parts), default=0)
            ws = torch.zeros([count, self.G.num_ws, self.G.w_dim], device=self.device, dtype=self.dtype)
            c = torch.zeros([count, self.classes], device=self.device, dtype=self.dtype) if self.classes else None
            if count:
                self.score(self.synthesize(ws, "compile", 0), c).sum().backward()
        except Exception as error:  # of many classes, from many layers
            fault = f"rank {dist.rank()}: {(str(error).strip() or type(error).__name__).splitlines()[0][:300]}"
        for net in (self.G, self.D):
            net.zero_grad(set_to_none=True)
        if faults := [f for f in dist.gather_objects(fault) if f]:  # all or none: the slowest rank sets the pace
            self.G.synthesis._compiled_call_impl = self.D._compiled_call_impl = None
            self._say_once(f"train.compile: {self.current} cannot be compiled here and runs eagerly: {faults[0]}")
        elif self.terms:
            names = ", ".join(t.name for t in self.terms)
            self._say_once(f"train.compile: what differentiates twice cannot be compiled and runs eagerly: {names}")

    def _say_once(self, note: str) -> None:
        if dist.is_main() and note not in self.said:
            print(f"note: {note}", file=sys.stderr)
        self.said.add(note)

    def _place(self, net: torch.nn.Module) -> torch.nn.Module:
        net = net.to(self.device, self.dtype)
        return to_channels_last(net) if self.config.train.channels_last else net

    def _optimizer(self, net: torch.nn.Module, player: str, lr: float) -> torch.optim.Optimizer:
        ratio = lazy_ratio([t.every for t in self.terms if TERMS[t.name].on == player and t.every > 1])
        o = self.config.optim
        return self.parallel.adam(net.parameters(), lr * ratio, o.beta1**ratio, o.beta2**ratio, o.eps)

    def _passes(self, share: list[int], group: int, passes: int) -> list[list[int]]:
        """The positions within this rank's share that make up each pass: whole groups, at most `passes` times."""
        return [part for part in deal(len(share), group, min(passes, len(share) // group)) if part] if share else []

    # ------------------------------------------------------------------------------------------------- steps

    def draw(self, purpose: str, count: int) -> Draw:
        """Latents, mixing cut-offs and labels of a global batch, from (seed, purpose, nimg)."""
        g = generator(self.config.seed, purpose, self.nimg)
        z = torch.randn([count, self.G.z_dim], generator=g)
        z_mix = cutoff = c = None
        if self.config.loss.style_mixing > 0:
            num_ws: int = self.G.num_ws
            z_mix = torch.randn(z.shape, generator=g)
            cutoff = torch.randint(1, num_ws, [count], generator=g)
            mixed = torch.rand([count], generator=g) < self.config.loss.style_mixing
            cutoff = torch.where(mixed, cutoff, num_ws)
        if self.classes:
            ordinals = torch.randint(len(self.table), [count], generator=g)
            c = one_hot(self.table.label[ordinals.numpy()], self.classes)
        return Draw(z, z_mix, cutoff, c)

    def styles(self, x: Draw) -> tuple[torch.Tensor, torch.Tensor]:
        """ws [n, num_ws, w_dim], mixed (Karras et al. 2019, section 3.1), and the w of the first latent."""
        w = self.G.mapping(x.z, x.c)
        ws = w[:, None].expand(-1, self.G.num_ws, -1)
        if x.z_mix is not None and x.cutoff is not None:
            second = self.G.mapping(x.z_mix, x.c)[:, None]
            layer = torch.arange(ws.shape[1], device=ws.device)[None, :, None]
            ws = torch.where(layer < x.cutoff[:, None, None], ws, second)
        return ws, w

    def synthesize(self, ws: torch.Tensor, purpose: str, part: int) -> torch.Tensor:
        """Images at the fade's alpha. The per-pixel noise is the one thing that depends on how a batch is dealt out."""
        noise = generator(self.config.seed, f"noise-{purpose}", self.nimg, dist.rank(), part, device=self.device)
        return self.G.synthesis(ws, alpha=self.alpha, noise="random", generator=noise)

    def score(self, images: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
        return self.D(images, c, alpha=self.alpha)

    def step(self, batch: Batch, *, stop: bool = False) -> tuple[dict[str, tuple[float, int]], bool]:
        """Train on this rank's share of one batch of real images and advance nimg by the global batch.

        Returns {name: (sum, count)} of what was observed, over all ranks, and whether any rank was asked to `stop`.

        Raises:
            RunError: if a loss is not finite.
        """
        self.g_step()
        self.d_step(batch)
        beta = ema_beta(self.current.batch, self.nimg, self.config.ema.kimg, self.config.ema.rampup)
        ema.update(self.G_ema, self.G, beta)
        result = self._reduce_step(stop)
        self.nimg += self.current.batch
        return result

    def g_step(self) -> None:
        """One step of the generator, and its lazy terms where they are due."""
        self.D.requires_grad_(False)
        draw = self.draw("g", self.current.batch)
        w_sum = torch.zeros_like(self.G.mapping.w_avg)
        for k, part in enumerate(self.parts):
            x = draw.pick([self.share[i] for i in part], self.device, self.dtype)
            ws, w = self.styles(x)
            w_sum += w.detach().sum(dim=0)
            scores = self.score(self.synthesize(ws, "g", k), x.c)
            loss = self.objective.g(scores)
            self.observe(loss_g=loss)
            self.parallel.backward(loss.sum() / self.current.batch)
        self._finish_player("G", self.G, self.opt_G, self._g_term)
        w_mean = dist.all_reduce(w_sum) / self.current.batch
        self.G.mapping.w_avg.lerp_(w_mean, 1 - self.config.model.w_avg_beta)
        self.D.requires_grad_(True)

    def d_step(self, batch: Batch) -> None:
        """One step of the discriminator, and its lazy terms where they are due."""
        self.G.requires_grad_(False)
        draw = self.draw("d", self.current.batch)
        real, condition = self.real_images(batch)
        for k, part in enumerate(self.parts):
            x = draw.pick([self.share[i] for i in part], self.device, self.dtype)
            with torch.no_grad():
                fake = self.synthesize(self.styles(x)[0], "d", k)
            c = None if condition is None else condition[part]
            scores_real, scores_fake = self.score(real[part], c), self.score(fake, x.c)
            loss = self.objective.d(scores_real, scores_fake)
            self.observe(loss_d=loss, score_real=scores_real, score_fake=scores_fake)
            self.parallel.backward(loss.sum() / self.current.batch)
        self._finish_player("D", self.D, self.opt_D, partial(self._d_term, real=real, condition=condition))
        self.G.requires_grad_(True)

    def _finish_player(self, player: str, net: torch.nn.Module, optimizer: torch.optim.Optimizer, backward) -> None:
        """The player's terms: those of every step join the main loss, each lazy one has a step of its own."""
        mine = [t for t in self.terms if TERMS[t.name].on == player]
        for term in mine:
            if term.every == 1:
                backward(term)
        self.parallel.step(net, optimizer)
        for term in mine:
            if term.every > 1 and self.current.step(self.nimg) % term.every == 0:
                backward(term)
                self.parallel.step(net, optimizer)

    def _d_term(self, term: TermConfig, *, real: torch.Tensor, condition: torch.Tensor | None) -> None:
        for part in self.parts:
            inputs = DInputs(self.score, real[part], None if condition is None else condition[part])
            with self._eager():
                self._term_backward(term, TERMS[term.name].compute(inputs), self.current.batch)

    def _g_term(self, term: TermConfig) -> None:
        """Runs on fewer images where the configuration says so; they need no minibatch-stddev groups."""
        count = self._term_count(term)
        draw = self.draw(term.name, count)
        share = deal(count, 1, dist.world())[dist.rank()]
        for k, part in enumerate(self._passes(share, 1, max(len(self.parts), 1))):
            chosen = [share[i] for i in part]
            x = draw.pick(chosen, self.device, self.dtype)
            r, channels = self.current.resolution, self.index.channels
            noise = [  # by sample, so that it does not depend on how the batch is dealt out
                torch.randn([channels, r, r], generator=generator(self.config.seed, "pl", self.nimg, i)) for i in chosen
            ]
            inputs = GInputs(
                synthesis=partial(self.synthesize, purpose=term.name, part=k),
                ws=self.styles(x)[0],
                noise=torch.stack(noise).to(self.device, self.dtype),
                state=self.state,
            )
            with self._eager():
                self._term_backward(term, TERMS[term.name].compute(inputs), count)

    def _eager(self) -> contextlib.AbstractContextManager:
        """Where torch.compile is not to be used."""
        on = self.config.train.compile and hasattr(torch.compiler, "set_stance")
        return torch.compiler.set_stance("force_eager") if on else contextlib.nullcontext()

    def _term_count(self, term: TermConfig) -> int:
        """Images of a global batch that a term is computed on."""
        on_g = TERMS[term.name].on == "G"
        return max(self.current.batch // self.config.loss.pl_batch_shrink, 1) if on_g else self.current.batch

    def _term_backward(self, term: TermConfig, values: dict[str, torch.Tensor], count: int) -> None:
        weight = term_weight(term, self.current.resolution, self.nimg) * term.every
        self.observe(**{k: v for k, v in values.items() if k != "loss"})
        self.parallel.backward(values["loss"].sum() * (weight / count))

    def real_images(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """uint8 -> [-1, 1]; within a fade blended with their own down- and up-sampled copy, as G's images are."""
        layout = torch.channels_last if self.config.train.channels_last else torch.contiguous_format
        real = batch.image.to(self.device).to(self.dtype).div(127.5).sub(1).contiguous(memory_format=layout)
        if self.current.fade:
            f = self.D.filter
            real = torch.lerp(upsample2d(downsample2d(real, f), f), real, self.alpha)
        c = None if batch.condition is None else batch.condition.to(self.device, self.dtype)
        return real, c

    # ------------------------------------------------------------------------------------ statistics of a step

    def observe(self, **values: torch.Tensor) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().double().sum()

    def _reduce_step(self, stop: bool) -> tuple[dict[str, tuple[float, int]], bool]:
        """Sum what this step observed, and the wish to stop, over the ranks; update the terms' running means."""
        counts = dict.fromkeys(["loss_d", "loss_g", "score_fake", "score_real"], self.current.batch)
        for term in self.terms:
            if self.current.step(self.nimg) % term.every == 0:
                counts.update(dict.fromkeys(TERMS[term.name].reports, self._term_count(term)))
        zero = torch.zeros([], dtype=torch.float64, device=self.device)
        vector = torch.stack([*(self.sums.get(name, zero) for name in counts), zero + stop])
        values = dist.all_reduce(vector).tolist()
        self.sums = {}
        stats = {name: (total, count) for (name, count), total in zip(counts.items(), values, strict=False)}
        for name, (total, count) in stats.items():
            if not math.isfinite(total) and self.parallel.half_precision and name not in ("loss_g", "loss_d"):
                continue  # an overflow in a term's half-precision pass, which the step has clipped
            if not math.isfinite(total):
                raise RunError(
                    f"{name} is not finite at nimg {self.nimg} ({self.phase}): training has diverged. Run the same "
                    "command again from the last checkpoint with a larger loss.r1_gamma or a smaller learning rate"
                )
            for term in self.terms:
                kept = TERMS[term.name].keep.get(name)
                if kept:
                    before, decay = self.state.get(kept, 0.0), self.config.loss.pl_decay
                    self.state[kept] = before + decay * (total / count - before)
        return {k: v for k, v in stats.items() if math.isfinite(v[0])}, values[-1] > 0

    # ----------------------------------------------------------------------------------------- for checkpoints

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that a checkpoint keeps of the players, by part and name."""
        return checkpoint.flatten(
            {
                "G": self.G.state_dict(),
                "D": self.D.state_dict(),
                "G_ema": self.G_ema.state_dict(),
                "opt_G": checkpoint.optimizer_tensors(self.G, self.opt_G),
                "opt_D": checkpoint.optimizer_tensors(self.D, self.opt_D),
            }
        )

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of `tensors`, in a phase of the same form.

        Raises:
            UsageError: if the networks are of another form.
        """
        for name, net in (("G", self.G), ("D", self.D), ("G_ema", self.G_ema)):
            try:
                net.load_state_dict(checkpoint.part_of(tensors, name))
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:300]
                raise UsageError(f"the checkpoint's {name} is not the configuration's: {reason}") from None
        checkpoint.restore_optimizer(self.G, self.opt_G, checkpoint.part_of(tensors, "opt_G"))
        checkpoint.restore_optimizer(self.D, self.opt_D, checkpoint.part_of(tensors, "opt_D"))
