"""One step of the game between G and D.

A step computes what follows from (seed, nimg): latents, labels, mixing cut-offs and augmentations are drawn for the
global batch by every rank, which then takes its share (schedule.deal). Losses are summed and divided by the global
batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from stylegan_pg import augment
from stylegan_pg.config import Config, TermConfig
from stylegan_pg.config.schedule import deal, ema_beta, term_weight
from stylegan_pg.data.datasets.index import DatasetIndex
from stylegan_pg.data.loader.loader import Batch
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.losses import OBJECTIVES, TERMS, DInputs, GInputs
from stylegan_pg.ops import downsample2d, upsample2d
from stylegan_pg.optim import ema
from stylegan_pg.optim.optimizer_step import OUT_OF_MEMORY, out_of_memory
from stylegan_pg.rng import generator
from stylegan_pg.systems.latents import Draw, draw, styles
from stylegan_pg.training.compilation import eager
from stylegan_pg.training.devices import Parallel
from stylegan_pg.training.stats import Observed
from stylegan_pg.training.train_state import Players

FP16_SCALE = 65536.0
PATIENCE = 2000  # steps without an overflow, after which the loss scale is doubled


class Game(Players):
    """The players of a phase, and the steps that change them."""

    def __init__(self, config: Config, index: DatasetIndex, parallel: Parallel):
        """
        Raises:
            UsageError: where configuration and dataset do not fit together.
        """
        super().__init__(config, index, parallel)
        self.objective = OBJECTIVES[config.loss.objective]
        self.augment = augment.make(config.augment)
        if self.augment:
            self.state["augment_p"] = config.augment.p
        self.observed = Observed()
        self.faults: list[str] = []  # what the last step left out, and why
        self.overflows: list[str] = []  # what it left out as the loss scale was too high
        self.moved = False  # whether anything has moved in it
        self.began_bad = False  # whether there was a fault before that: the state it started with is to blame
        self.notes: list[str] = []  # what else happened in it
        half = self.model.low_precision == "fp16"
        self.state["loss_scale"] = config.train.loss_scale or (FP16_SCALE if half else 1.0)

    def draw(self, purpose: str, count: int) -> Draw:
        """Latents, mixing cut-offs and labels of a global batch, from (seed, purpose, nimg)."""
        key, labels = (self.config.seed, purpose, self.nimg), self.table.label if self.classes else None
        return draw(key, count, self.G, self.config.loss.style_mixing, labels, self.classes)

    def synthesize(self, ws: torch.Tensor, purpose: str, part: int) -> torch.Tensor:
        """Images at the fade's alpha. The per-pixel noise is the one thing that depends on how a batch is dealt out."""
        noise = generator(self.config.seed, f"noise-{purpose}", self.nimg, dist.rank(), part, device=self.device)
        return self.G.synthesis(ws, alpha=self.alpha, noise="random", generator=noise)

    def scorer(self, purpose: str, rows: list[int]) -> Callable[..., torch.Tensor]:
        """D(images, c) at the fade's alpha, of images that stand at `rows` of the global batch: augmented as drawn
        for this purpose and these rows."""
        if self.augment is None:
            return partial(self.D, alpha=self.alpha)
        key = generator(self.config.seed, f"augment-{purpose}", self.nimg)
        p = self.config.augment.p if self.config.augment.mode == "fixed" else self.state["augment_p"]
        drawn = self.augment.draw(self.current.batch, p, key, self.G.img_size)
        mine = augment.pick(drawn, rows)

        def score(images: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
            assert self.augment is not None
            return self.D(self.augment.apply(images, mine), c, alpha=self.alpha)

        return score

    def step(
        self, batch: Batch, *, stop: Callable[[], bool] = lambda: False
    ) -> tuple[dict[str, tuple[float, int]], bool]:
        """Train on this rank's share of one batch of real images and advance nimg by the global batch.

        Where a loss or a gradient is not finite, that player does not move, and `faults` says so; `notes` says if
        memory ran out and micro-batches were halved.

        Returns {name: (sum, count)} of what was observed, over all ranks, and whether any rank wants to `stop`, which
        is asked once the work is done.
        """
        self.faults, self.overflows, self.notes, self.parallel.scale = [], [], [], self.state["loss_scale"]
        self.moved = self.began_bad = False
        real, condition = self.real_images(batch)
        rounds, rest = divmod(self.current.step(self.nimg), self.config.optim.d_steps)
        if rest == 0:
            for i in range(self.config.optim.g_steps):
                self.g_step(real, condition, rounds * self.config.optim.g_steps + i, f"-{i}" if i else "")
        self.d_step(real, condition, self.current.step(self.nimg))
        beta = ema_beta(self.current.batch, self.nimg, self.config.ema.kimg, self.config.ema.rampup)
        ema.update(self.G_ema, self.G, beta)
        stats, bad, stopping = self.observed.reduce(self.device, stop())
        if bad and self.faults:
            self.faults.append(f"not finite: {', '.join(bad)}")
        self._rescale()
        self._keep_means(stats)
        if self.config.augment.mode == "ada":
            self._steer(*stats.get("sign_real", (0.0, 0)))
        self.nimg += self.current.batch
        return stats, stopping

    def g_step(self, real: torch.Tensor, condition: torch.Tensor | None, number: int, turn: str = "") -> None:
        """Step `number` of the generator in this phase, and its lazy terms where they are due; `turn` tells several
        steps at one nimg apart."""
        self.D.requires_grad_(False)
        drawn = self.draw("g" + turn, self.current.batch)
        w_sum = torch.zeros_like(self.G.mapping.w_avg)

        def main() -> torch.Tensor:
            self.observed.expect(self.current.batch, "loss_g")
            total = torch.zeros([], device=self.device)
            w_sum.zero_()
            for k, part in enumerate(self.parts):
                rows = [self.share[i] for i in part]
                x = drawn.pick(rows, self.device, self.dtype)
                if self.objective.paired:
                    x = x._replace(c=self._rows(condition, part))
                ws, w = styles(self.G, x)
                w_sum.add_(w.detach().sum(dim=0))
                scores = self.scorer("g" + turn, rows)(self.synthesize(ws, "g" + turn, k), x.c)
                scores_real = None
                if self.objective.paired:
                    with torch.no_grad():
                        scores_real = self.scorer("g-real" + turn, rows)(real[part], self._rows(condition, part))
                loss = self.objective.g(scores, scores_real)
                self.observed.add(loss_g=loss)
                total = total + loss.detach().sum()
                self.learners["G"].backward(loss.sum() / self.current.batch)
            return total

        if self._turn("G", number, main, partial(self._g_term, turn=turn)):
            w_mean = dist.all_reduce(w_sum) / self.current.batch
            self.G.mapping.w_avg.lerp_(w_mean, 1 - self.config.model.w_avg_beta)
        self.D.requires_grad_(True)

    def d_step(self, real: torch.Tensor, condition: torch.Tensor | None, number: int) -> None:
        """Step `number` of the discriminator in this phase, and its lazy terms where they are due."""
        self.G.requires_grad_(False)
        for p in self.frozen().values():
            p.requires_grad_(False)
        drawn = self.draw("d", self.current.batch)
        due = self._due("D", number)
        # Where a real and a generated image meet, they are of the same class.
        paired = self.objective.paired or any("u" in TERMS[t.name].needs for t in due)
        of_scores = [t for t in due if TERMS[t.name].of_scores]
        keep = any("fake" in TERMS[t.name].needs for t in due)
        fakes: list[torch.Tensor] = []  # of this rank's share, in the order of the reals
        c_fakes = None if drawn.c is None else drawn.c[self.share].to(self.device, self.dtype)

        def main() -> torch.Tensor:
            self.observed.expect(self.current.batch, "loss_d", "score_real", "score_fake", "sign_real")
            self.observed.expect(self.current.batch, *(name for t in of_scores for name in TERMS[t.name].reports))
            total = torch.zeros([], device=self.device)
            fakes[:] = [torch.empty_like(real)] if keep else []
            for k, part in enumerate(self.parts):
                rows = [self.share[i] for i in part]
                x = drawn.pick(rows, self.device, self.dtype)
                if paired:
                    x = x._replace(c=self._rows(condition, part))
                with torch.no_grad():
                    fake = self.synthesize(styles(self.G, x)[0], "d", k)
                scores_real = self.scorer("d-real", rows)(real[part], self._rows(condition, part))
                scores_fake = self.scorer("d-fake", rows)(fake, x.c)
                loss = self.objective.d(scores_real, scores_fake)
                self.observed.add(
                    loss_d=loss, score_real=scores_real, score_fake=scores_fake, sign_real=scores_real.detach().sign()
                )
                for term in of_scores:
                    values = TERMS[term.name].compute(scores_real, scores_fake)
                    self.observed.add(**{name: v for name, v in values.items() if name != "loss"})
                    loss = loss + values["loss"].reshape(loss.shape) * (self._weight(term) * term.every)
                total = total + loss.detach().sum()
                self.learners["D"].backward(loss.sum() / self.current.batch)
                if keep:
                    fakes[0][part] = fake
            return total

        c_fake = condition if paired else c_fakes
        of_images = partial(self._d_term, real=real, condition=condition, fakes=fakes, c_fake=c_fake)
        self._turn("D", number, main, of_images)
        self.D.requires_grad_(True)
        self.G.requires_grad_(True)

    def _turn(
        self,
        player: str,
        number: int,
        main: Callable[[], torch.Tensor],
        add: Callable[[TermConfig], torch.Tensor],
    ) -> bool:
        """The player's main step, which terms of every step join (`add` makes their passes), and a step of its own
        for each lazy one. Returns whether the main step was made."""
        mine = [t for t in self._due(player, number) if not TERMS[t.name].of_scores]
        often = [t for t in mine if t.every == 1]

        def both() -> torch.Tensor:
            total = main()
            for term in often:
                total = total + add(term)
            return total

        what = " + ".join(["main loss", *(t.name for t in often)])
        moved = self._move(player, what, lambda: len(self.parts) + sum(len(self._parts_of(t)) for t in often), both)
        for term in mine:
            if term.every > 1:
                self._move(player, term.name, lambda t=term: len(self._parts_of(t)), partial(add, term))
        return moved

    def _move(self, player: str, what: str, count: Callable[[], int], passes: Callable[[], torch.Tensor]) -> bool:
        """One optimiser's step: `passes` makes `count` backward passes and returns the sum of their losses. False,
        with a fault or an overflow noted, if it was skipped.

        If a rank runs out of memory, all ranks halve the micro-batch and make their passes again.

        Raises:
            RunError: out of memory with the smallest micro-batch there is.
        """
        learner, before = self.learners[player], self.observed.so_far()
        while True:
            learner.begin(what, count())
            total, short = torch.zeros([], device=self.device), False
            try:
                total = passes()
            except RuntimeError as error:  # handled below, where nothing holds on to what the passes made
                if not out_of_memory(error):
                    raise
                short = True
            if short and self.device.type == "cuda":
                torch.cuda.empty_cache()
            fault = learner.step(total, short)
            if fault != OUT_OF_MEMORY:
                break
            self.observed.back_to(before)
            self.halve(f"{player}, {what}")
        if fault and fault != "the loss" and self.parallel.scale > 1:  # losses are looked at before they are scaled
            self.overflows.append(f"{player}, {what}: {fault}")
        elif fault:
            where = fault if fault == "the loss" else f"the gradient of {fault}"
            self.faults.append(f"{player}, {what}: {where} is not finite")
            self.began_bad = self.began_bad or not self.moved
        else:
            self.moved = True
            if player == "D" and self.config.loss.d_clip:
                learner.clip(self.config.loss.d_clip)  # what is frozen stays
        return not fault

    def _d_term(
        self,
        term: TermConfig,
        *,
        real: torch.Tensor,
        condition: torch.Tensor | None,
        fakes: list[torch.Tensor],
        c_fake: torch.Tensor | None,
    ) -> torch.Tensor:
        """Gradients of a term on D; returns its sum over this rank's images."""
        spec, batch, seed = TERMS[term.name], self.current.batch, self.config.seed
        u = torch.rand([batch], generator=generator(seed, f"{term.name}-u", self.nimg), dtype=torch.float64)
        total = torch.zeros([], device=self.device)
        self.observed.expect(batch, *spec.reports)
        for part in self._parts_of(term):
            rows = [self.share[i] for i in part]
            inputs = DInputs(
                D=self.scorer(term.name, rows),
                real=real[part],
                c=self._rows(condition, part),
                fake=fakes[0][part] if "fake" in spec.needs else None,
                c_fake=self._rows(c_fake, part) if "fake" in spec.needs else None,
                u=u[rows].to(self.device, self.dtype) if "u" in spec.needs else None,
                noise=self._noise(term.name, rows) if "noise" in spec.needs else None,
            )
            total = total + self._term_backward(term, inputs, batch)
        return total

    def _g_term(self, term: TermConfig, *, turn: str) -> torch.Tensor:
        """As _d_term, on G. Runs on fewer images where the configuration says so; they need no minibatch-stddev
        groups."""
        count, share = self._share_of(term)
        drawn = self.draw(term.name + turn, count)
        total = torch.zeros([], device=self.device)
        self.observed.expect(count, *TERMS[term.name].reports)
        for k, part in enumerate(self._parts_of(term)):
            rows = [share[i] for i in part]
            inputs = GInputs(
                synthesis=partial(self.synthesize, purpose=term.name + turn, part=k),
                ws=styles(self.G, drawn.pick(rows, self.device, self.dtype))[0],
                noise=self._noise("pl" + turn, rows),
                state=self.state,
            )
            total = total + self._term_backward(term, inputs, count)
        return total

    def _share_of(self, term: TermConfig) -> tuple[int, list[int]]:
        """How many images a term sees, and the positions of this rank's among them."""
        if TERMS[term.name].on == "D":
            return self.current.batch, self.share
        count = max(self.current.batch // self.config.loss.pl_batch_shrink, 1)
        return count, deal(count, 1, dist.world())[dist.rank()]

    def _parts_of(self, term: TermConfig) -> list[list[int]]:
        """The passes of a term, as positions within this rank's share."""
        if TERMS[term.name].on == "D":
            return self.parts
        return self._passes(self._share_of(term)[1], 1, max(len(self.parts), 1))

    def _term_backward(self, term: TermConfig, inputs: DInputs | GInputs, count: int) -> torch.Tensor:
        with eager(self.config.train.compile):
            values = TERMS[term.name].compute(inputs, target=term.target)
            self.observed.add(**{k: v for k, v in values.items() if k != "loss"})
            self.learners[TERMS[term.name].on].backward(
                values["loss"].sum() * (self._weight(term) * term.every / count)
            )
        return values["loss"].detach().sum()

    def _due(self, player: str, number: int) -> list[TermConfig]:
        """The terms that count at step `number` of a player."""
        return [t for t in self._terms_of(player) if number % t.every == 0 and self._weight(t) > 0]

    def _weight(self, term: TermConfig) -> float:
        return term_weight(term, self.current.resolution, self.nimg)

    def _noise(self, purpose: str, rows: list[int]) -> torch.Tensor:
        """N(0, 1) of the images' shape, by sample, so that it does not depend on how the batch is dealt out."""
        shape, seed = [self.index.channels, *self.G.img_size], self.config.seed
        noise = [torch.randn(shape, generator=generator(seed, purpose, self.nimg, i)) for i in rows]
        return torch.stack(noise).to(self.device, self.dtype)

    @staticmethod
    def _rows(condition: torch.Tensor | None, part: list[int]) -> torch.Tensor | None:
        return None if condition is None else condition[part]

    def real_images(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """uint8 -> [-1, 1]; within a fade blended with their own down- and up-sampled copy, as G's images are."""
        layout = torch.channels_last if self.config.train.channels_last else torch.contiguous_format
        if batch.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(batch.ready)
        real = batch.image.to(self.device)
        if not real.is_floating_point():
            real = real.to(self.dtype).div(127.5).sub(1)
        real = real.to(self.dtype).contiguous(memory_format=layout)
        if self.current.fade:
            f = self.D.filter
            real = torch.lerp(upsample2d(downsample2d(real, f), f), real, self.alpha)
        c = None if batch.condition is None else batch.condition.to(self.device, self.dtype)
        return real, c

    def _rescale(self) -> None:
        """Halve the loss scale after an overflow, which is no fault; double it after a long time without one."""
        scale = self.state["loss_scale"]
        if self.overflows:
            self.state |= {"loss_scale": scale / 2, "_clean_steps": 0}
        elif self.model.low_precision == "fp16" and not self.faults:
            self.state["_clean_steps"] = self.state.get("_clean_steps", 0) + 1
            if self.state["_clean_steps"] >= PATIENCE:
                self.state |= {"loss_scale": min(2 * scale, max(FP16_SCALE, scale)), "_clean_steps": 0}

    def _steer(self, signs: float, count: int) -> None:
        """Gather the signs of D's scores of real images, and every few steps move ADA's p by them."""
        a, state, step = self.config.augment, self.state, self.current.step(self.nimg) + 1
        state["_signs"], state["_signed"] = state.get("_signs", 0.0) + signs, state.get("_signed", 0) + count
        if step % a.interval == 0 and state["_signed"]:
            mean = state["_signs"] / state["_signed"]
            p = augment.adjust(state["augment_p"], mean, self.current.batch, a.interval, a.target, a.kimg)
            state |= {"augment_p": p, "_signs": 0.0, "_signed": 0}

    def _keep_means(self, stats: dict[str, tuple[float, int]]) -> None:
        """Update the running means that terms ask for."""
        for term in self.terms:
            for name, kept in TERMS[term.name].keep.items():
                if name in stats:
                    (total, count), before = stats[name], self.state.get(kept, 0.0)
                    self.state[kept] = before + self.config.loss.pl_decay * (total / count - before)
