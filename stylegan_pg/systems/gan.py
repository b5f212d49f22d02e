"""A generator against a discriminator: one G, one D, any objective and any regularisation terms.

G maps latents (and labels) to images, D maps images (and labels) to scores; `generator_loss` and `discriminator_loss`
say what each of them minimises. A term that is made at every step joins its side's main loss; one that is made lazily,
at every k-th step, has an optimizer step of its own behind it (Karras et al. 2020, appendix B).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from stylegan_pg import augment
from stylegan_pg.config import Config, TermConfig
from stylegan_pg.config.schedule import size_at, term_weight
from stylegan_pg.data.conditions import Conditions
from stylegan_pg.errors import UsageError
from stylegan_pg.losses import OBJECTIVES, TERMS, DInputs, GInputs, per_image
from stylegan_pg.networks import NETWORKS, NetworkShape, Pair, accepted
from stylegan_pg.networks.growing import frozen
from stylegan_pg.networks.normalization import group_batch_norms
from stylegan_pg.rng import generator
from stylegan_pg.systems.base import Context, Loss, Side, Step, Sums, System, Update, Values
from stylegan_pg.systems.latents import Latents, draw, styles
from stylegan_pg.systems.state import GANState, read_state


class GAN(System):
    """The system of a configuration, with the networks that it names or a pair of the caller's."""

    def __init__(self, config: Config, pair: Pair | None = None):
        self.given = pair
        self.use(config)
        self.objective = OBJECTIVES[config.loss.objective]
        self.terms = config.loss.all_terms()
        self.augment = augment.make(config.augment)
        self.running = GANState(augment_p=config.augment.p if self.augment else None)

    def use(self, config: Config) -> None:
        self.config, self.pair = config, self.given or NETWORKS[config.model.name]

    def build(self, form: NetworkShape, conditions: Conditions | None) -> None:
        self.form, self.conditions, model = form, conditions, self.config.model
        self.G_kwargs = self.pair.g_kwargs(model, form)
        self.G, self.D = self.pair.G(**self.G_kwargs), self.pair.D(**self.pair.d_kwargs(model, form))
        if not hasattr(self.G, "z_dim"):
            self.G.z_dim = model.z_dim
        for side, net in self.net.items():
            setattr(self, side, group_batch_norms(net, form.mbstd_group))
        self.image_shape = (form.img_channels, *size_at(form.resolution, model.base))
        if any(TERMS[t.name].on == "G" for t in self.terms) and not self.has_ws:
            raise UsageError(
                "loss.pl_weight: the generator has no ws, whose path lengths could be regularised; take "
                "loss.pl_weight=0 (and loss.terms without path_length)"
            )

    @property
    def has_ws(self) -> bool:
        """Whether G has a mapping to ws, which style mixing, truncation and path length work on."""
        return hasattr(self.G, "mapping") and hasattr(self.G, "synthesis")

    # ------------------------------------------------------------------------------------------------- losses

    def generator_loss(self, x: Context, turn: str) -> Values:
        """What G minimises: the objective of D's scores of generated images."""
        latents = self.latents(x, "g" + turn)
        scores_real = None
        if self.objective.paired:  # the i-th generated image is compared with the i-th real one, of the same class
            latents = latents._replace(c=x.condition)
        fake, w = self.generate(x, latents, "g" + turn)
        if w is not None:
            x.add("w" + turn, w.detach().sum(dim=0))
        scores = self.score(x, "g" + turn, fake, latents.c)
        if self.objective.paired:
            with torch.no_grad():
                scores_real = self.score(x, "g-real" + turn, x.real, x.condition)
        loss = per_image(self.objective.g, scores, scores_real)
        return {"loss": loss, "loss_g": loss}

    def discriminator_loss(self, x: Context, due: list[TermConfig]) -> Values:
        """What D minimises: the objective of its scores of real and generated images, and terms of these scores."""
        latents = self.latents(x, "d")
        if self.meets(due):
            latents = latents._replace(c=x.condition)
        with torch.no_grad():
            fake, _ = self.generate(x, latents, "d")
        scores_real = self.score(x, "d-real", x.real, x.condition)
        scores_fake = self.score(x, "d-fake", fake, latents.c)
        loss = per_image(self.objective.d, scores_real, scores_fake)
        values = {
            "loss_d": loss,
            "score_real": per_image(torch.clone, scores_real),
            "score_fake": per_image(torch.clone, scores_fake),
            "sign_real": per_image(lambda s: s.detach().sign(), scores_real),
        }
        for term in due:
            if TERMS[term.name].of_scores:
                found = TERMS[term.name].compute(scores_real, scores_fake)
                values |= {name: v for name, v in found.items() if name != "loss"}
                loss = loss + found["loss"] * (self.weight(term, x.step) * term.every)
        if any("fake" in TERMS[term.name].needs for term in due):
            x.once("fake", lambda: torch.empty_like(x.step.real))[x.part] = fake
        return {"loss": loss, **values}

    def generator_term(self, x: Context, term: TermConfig, turn: str) -> Values:
        """A regularisation term on G, of images of its own."""
        ws = styles(self.G, self.latents(x, term.name + turn))[0]
        synthesis = partial(self.synthesize, x, purpose=term.name + turn)
        inputs = GInputs(synthesis=synthesis, ws=ws, noise=self.noise(x, "pl" + turn), state=self.running.means)
        return TERMS[term.name].compute(inputs, target=term.target)

    def discriminator_term(self, x: Context, term: TermConfig, due: list[TermConfig]) -> Values:
        """A regularisation term on D, of this step's real and generated images."""
        needs = TERMS[term.name].needs
        inputs = DInputs(D=partial(self.score, x, term.name), real=x.real, c=x.condition)
        if "fake" in needs:
            inputs.fake = x.step.memory["fake"][x.part]
            inputs.c_fake = x.condition if self.meets(due) else self.latents(x, "d").c
        if "u" in needs:
            u = torch.rand([x.count], generator=x.rng(f"{term.name}-u"), dtype=torch.float64)
            inputs.u = x.to_device(u[x.rows])
        if "noise" in needs:
            inputs.noise = self.noise(x, term.name)
        return TERMS[term.name].compute(inputs, target=term.target)

    # --------------------------------------------------------------------------------------- images and scores

    def latents(self, x: Context, purpose: str) -> Latents:
        """This micro-batch's rows of the latents that are drawn for a purpose."""
        mixing = self.config.loss.style_mixing
        drawn = x.once(("latents", purpose), lambda: draw(x.rng(purpose), x.count, self.G, mixing, self.conditions))
        return drawn.pick(x.rows, x.to_device)

    def generate(self, x: Context, latents: Latents, purpose: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Images [n, C, H, W] of about [-1, 1], and the w [n, w_dim] that they were made of, or None."""
        if self.has_ws:
            ws, w = styles(self.G, latents)
            return self.synthesize(x, ws, purpose), w
        given = [latents.z] if latents.c is None else [latents.z, latents.c]
        return self.G(*given, **accepted(self.G, **self.how(x, purpose))), None

    def synthesize(self, x: Context, ws: torch.Tensor, purpose: str) -> torch.Tensor:
        """Images [n, C, H, W] of ws [n, num_ws, w_dim]."""
        return self.G.synthesis(ws, **self.how(x, purpose))

    def how(self, x: Context, purpose: str) -> dict[str, Any]:
        """The fade's alpha, and per-pixel noise, the one thing that depends on how a batch is dealt out."""
        noise = x.rng(f"noise-{purpose}", x.step.rank, x.index, device=x.step.device)
        return {"alpha": x.step.alpha, "noise": "random", "generator": noise}

    def score(self, x: Context, purpose: str, images: torch.Tensor, c: torch.Tensor | None = None) -> Any:
        """What D makes of images [n, C, H, W] with conditions c, augmented as is drawn for this purpose."""
        if self.augment is not None:
            maker, p, size = self.augment, self.running.augment_p or 0.0, (images.shape[2], images.shape[3])
            key = ("augment", purpose)
            drawn = x.once(key, lambda: maker.draw(x.count, p, x.rng(f"augment-{purpose}"), size))
            images = maker.apply(images, augment.pick(drawn, x.rows))
        given = [images] if c is None else [images, c]
        return self.D(*given, **accepted(self.D, alpha=x.step.alpha))

    def noise(self, x: Context, purpose: str) -> torch.Tensor:
        """N(0, 1) of the images' shape, drawn for each image by itself."""
        noise = [torch.randn(self.image_shape, generator=x.rng(purpose, i)) for i in x.rows]
        return x.to_device(torch.stack(noise))

    # ---------------------------------------------------------------------------------------------------- steps

    def updates(self, step: Step) -> Iterator[Update]:
        """`g_steps` steps of G in every `d_steps`-th training step, and one of D in each."""
        optim = self.config.optim
        rounds, rest = divmod(step.number, optim.d_steps)
        for i in range(optim.g_steps if rest == 0 else 0):
            yield from self.generator_updates(step, rounds * optim.g_steps + i, f"-{i}" if i else "")
        yield from self.discriminator_updates(step)

    def generator_updates(self, step: Step, number: int, turn: str) -> Iterator[Update]:
        """Step `number` of G in this phase; `turn` tells several steps at one nimg apart."""
        count = max(step.batch // self.config.loss.pl_batch_shrink, 1)
        sums = {"w" + turn: torch.zeros_like(self.G.mapping.w_avg)} if self.has_ws else {}
        main = partial(self.generator_loss, turn=turn)
        loss = Loss("main loss", main, step.batch, self.form.mbstd_group, reports=("loss_g",), sums=sums)
        how = {"count": count, "of_batch": False}  # fewer images, which need no minibatch-stddev groups
        due = self.due("G", number, step)
        terms = {t.name: partial(self.generator_term, term=t, turn=turn) for t in due}
        yield from self.side("G", step, loss, due, terms, **how)

    def discriminator_updates(self, step: Step) -> Iterator[Update]:
        """Step of D, as many as there are training steps."""
        due = self.due("D", step.number, step)
        reports = ("loss_d", "score_real", "score_fake", "sign_real")
        reports += tuple(name for t in due if TERMS[t.name].of_scores for name in TERMS[t.name].reports)
        main = partial(self.discriminator_loss, due=due)
        loss = Loss("main loss", main, step.batch, self.form.mbstd_group, reports=reports)
        own = [t for t in due if not TERMS[t.name].of_scores]
        terms = {t.name: partial(self.discriminator_term, term=t, due=due) for t in own}
        yield from self.side("D", step, loss, own, terms, count=step.batch, group=self.form.mbstd_group)

    def side(
        self,
        side: Side,
        step: Step,
        main: Loss,
        due: list[TermConfig],
        values: Mapping[str, Callable[[Context], Values]],
        **how: Any,
    ) -> Iterator[Update]:
        """The main step, which the terms of every step join, and a step for each lazy term."""
        limit = self.config.loss.d_clip if side == "D" else 0.0
        losses = [
            Loss(
                t.name,
                values[t.name],
                weight=self.weight(t, step) * t.every,
                reports=TERMS[t.name].reports,
                twice=True,
                **how,
            )
            for t in due
        ]
        lazy = [loss for t, loss in zip(due, losses, strict=True) if t.every > 1]
        yield Update(side, [main, *(loss for loss in losses if loss not in lazy)], limit)
        yield from (Update(side, [loss], limit) for loss in lazy)

    def due(self, side: Side, number: int, step: Step) -> list[TermConfig]:
        """The terms that count at step `number` of a side."""
        mine = [t for t in self.terms if TERMS[t.name].on == side]
        return [t for t in mine if number % t.every == 0 and self.weight(t, step) > 0]

    def weight(self, term: TermConfig, step: Step) -> float:
        return term_weight(term, step.resolution, step.nimg)

    def meets(self, due: list[TermConfig]) -> bool:
        """Whether a real and a generated image meet in a D step, and therefore are of the same class."""
        return self.objective.paired or any("u" in TERMS[term.name].needs for term in due)

    def optimizer_steps(self, side: Side) -> list[int]:
        mine = [t for t in self.terms if TERMS[t.name].on == side and not TERMS[t.name].of_scores]
        return [t.every for t in mine if t.every > 1]

    # -------------------------------------------------------------------------------- what follows from sums, state

    def after_step(self, step: Step, sums: Sums, tensors: Mapping[str, torch.Tensor]) -> None:
        """w_avg, the running means of terms, and ADA's p."""
        for total in tensors.values():
            self.G.mapping.w_avg.lerp_(total / step.batch, 1 - self.config.model.w_avg_beta)
        means = self.running.means
        for term in self.terms:
            for name, mean in TERMS[term.name].keep.items():
                if name in sums:
                    (total, count), before = sums[name], means.get(mean, 0.0)
                    means[mean] = before + self.config.loss.pl_decay * (total / count - before)
        if self.config.augment.mode == "ada":
            self.adapt(step, *sums.get("sign_real", (0.0, 0)))

    def adapt(self, step: Step, signs: float, count: int) -> None:
        """Gather the signs of D's scores of real images, and every few steps move ADA's p by them."""
        a, now = self.config.augment, self.running
        now.signs, now.signed = now.signs + signs, now.signed + count
        if (step.number + 1) % a.interval == 0 and now.signed:
            mean = now.signs / now.signed
            now.augment_p = augment.adjust(now.augment_p or 0.0, mean, step.batch, a.interval, a.target, a.kimg)
            now.signs, now.signed = 0.0, 0

    def frozen(self) -> dict[str, torch.nn.Parameter]:
        """The highest resolutions of D (train.freeze_d), but for what `init` lacked."""
        found = frozen(self.D, self.config.train.freeze_d) if self.config.train.freeze_d else []
        return {name: p for name, p in found if name not in self.running.thawed}

    def lacks(self, names: set[str]) -> None:
        """
        Raises:
            UsageError: if these are all that should be frozen.
        """
        found = [name for name, _ in frozen(self.D, self.config.train.freeze_d)]
        lacking = [name for name in found if name in names]
        if found and lacking == found:
            raise UsageError(
                f"train.freeze_d={self.config.train.freeze_d} has nothing to keep: init={self.config.init} does "
                f"not hold D/{found[0]} and what else it stands for; give a checkpoint, and where that is of a "
                "lower resolution, a larger train.freeze_d"
            )
        self.running.thawed = sorted({*self.running.thawed, *lacking})

    def compiled(self) -> list[torch.nn.Module]:
        return [self.G.synthesis if self.has_ws else self.G, self.D]

    def not_compiled(self) -> list[str]:
        return [t.name for t in self.terms]

    def trial(self, count: int, device: torch.device, dtype: torch.dtype) -> None:
        new = {"device": device, "dtype": dtype}
        c = [torch.zeros([count, self.form.c_dim], **new)] if self.form.c_dim else []
        how = {"alpha": 1.0, "noise": "random", "generator": generator(self.config.seed, "compile", device=device)}
        if self.has_ws:
            images = self.G.synthesis(torch.zeros([count, self.G.num_ws, self.G.w_dim], **new), **how)
        else:
            images = self.G(torch.zeros([count, self.G.z_dim], **new), *c, **accepted(self.G, **how))
        per_image(torch.clone, self.D(images, *c, **accepted(self.D, alpha=1.0))).sum().backward()

    def statistics(self) -> dict[str, float]:
        p = self.running.augment_p
        return ({} if p is None else {"augment_p": p}) | self.running.means

    def state(self) -> dict[str, Any]:
        return self.running.plain()

    def check_state(self, state: Mapping[str, Any], named: str) -> None:
        read_state(GANState, state, named)

    def load_state(self, state: Mapping[str, Any]) -> None:
        read = read_state(GANState, state, "the state of the GAN")
        if self.running.augment_p is None or read.augment_p is None:
            read.augment_p = self.running.augment_p
        known = {mean for term in TERMS.values() for mean in term.keep.values()}
        read.means = {name: value for name, value in read.means.items() if name in known}
        self.running = read

    def snapshot_description(self) -> dict[str, Any]:
        named = {module.G: name for name, module in NETWORKS.items()}
        kind = self.pair.G
        return {"network": named.get(kind, f"{kind.__module__}.{kind.__qualname__}"), "kwargs": self.G_kwargs}
