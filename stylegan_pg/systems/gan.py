"""A generator against a discriminator: one G, one D, any objective and any regularisation terms.

G maps latents (and conditions) to images, D maps images (and conditions) to scores; `generator_loss` and
`discriminator_loss` say what each of them minimises. A term that is made at every step joins its side's main loss; one
that is made lazily, at every k-th step, has an optimizer step of its own behind it (Karras et al. 2020, appendix B).
R1 and R2 of every step take D's gradients from the passes of its main loss.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from stylegan_pg.config import Config, TermConfig, curves
from stylegan_pg.config.rounds import place_of
from stylegan_pg.config.schedule import blur_sigma, moves, term_weight
from stylegan_pg.data.conditions import Conditions
from stylegan_pg.errors import UsageError
from stylegan_pg.losses import TERMS, DInputs, GInputs, objective_of, per_image, squared_norms
from stylegan_pg.networks import NetworkShape, Pair
from stylegan_pg.networks.features import Captured, features_of
from stylegan_pg.networks.spectral import move_vectors
from stylegan_pg.systems.base import Context, Loss, Side, Step, Sums, Update, Values
from stylegan_pg.systems.draws import put_rows, rows_of
from stylegan_pg.systems.history import History
from stylegan_pg.systems.latents import Latents, styles
from stylegan_pg.systems.one_pair import OnePair


class GAN(OnePair):
    """The system of a configuration."""

    g_reports = ("loss_g",)  # names of values of the main losses whose means are logged
    d_reports = ("loss_d", "score_real", "score_fake", "sign_real")
    p_reports = ("prob_real", "prob_fake")  # of D's, where the objective has probabilities

    def __init__(self, config: Config, pair: Pair | None = None):
        super().__init__(config, pair)
        self.objective = objective_of(config.loss)
        self.terms = config.loss.all_terms()
        self.histories: dict[Side, History] = {}  # of the present phase

    def build(self, form: NetworkShape, conditions: Conditions | None) -> None:
        super().build(form, conditions)
        if any(TERMS[t.name].of_ws for t in self.terms) and not self.has_ws:
            raise UsageError(
                "loss.pl_weight: the generator has no ws, whose path lengths could be regularised; take "
                "loss.pl_weight=0 (and loss.terms without path_length)"
            )
        if any(TERMS[t.name].of_features for t in self.terms):
            features_of(self.D)  # raises where D has none
        self.histories = {}

    # ------------------------------------------------------------------------------------------------- losses

    def generator_loss(self, x: Context, turn: str) -> Values:
        """What G minimises: the objective of D's scores of generated images."""
        latents = self.latents(x, "g" + turn)
        real = None
        if self.objective.paired:  # the i-th generated image is compared with the i-th real one, of the same condition
            latents = latents._replace(c=x.condition)
        images, w = self.generate(x, latents, "g" + turn)
        if w is not None:
            x.add("w" + turn, w.detach().sum(dim=0))
        fake = self.score(x, "g" + turn, images, latents.c)
        if self.objective.paired:
            with torch.no_grad():
                real = self.score(x, "g-real" + turn, x.real, x.condition)
        loss = per_image(self.objective.g, fake, real)
        if self.config.loss.g_weight != 1:
            loss = loss * self.config.loss.g_weight
        further = self.generator_heads(x, latents, fake)
        return {"loss_g": loss, **further, "loss": loss + further["loss"] if further else loss}

    def discriminator_main(self, x: Context, due: list[TermConfig]) -> Values:
        """`discriminator_loss`, with one step of the vectors of spectral norm, the only one of a training step."""
        if self.config.model.d_spectral_norm:
            move_vectors(self.D)
        return self.discriminator_loss(x, due)

    def generator_main(self, x: Context, turn: str, due: list[TermConfig]) -> Values:
        """`generator_loss`, and the terms of D's features of the images that it makes."""
        with Captured(self.D) as seen:
            values = dict(self.generator_loss(x, turn))
        fake = seen.features[0]  # of the first pass, which is that of the generated images
        with torch.no_grad(), Captured(self.D) as seen:
            self.score(x, "g-real" + turn, x.real, x.condition)
        for term in due:
            found = TERMS[term.name].compute(fake, seen.features[0], self.form.mbstd_group, **term.options())
            values |= {**found, "loss": values["loss"] + found["loss"] * (self.factor(term, x) * term.every)}
        return values

    def discriminator_loss(self, x: Context, due: list[TermConfig]) -> Values:
        """What D minimises: the objective of its scores of real and generated images, and terms of these scores."""
        latents = self.latents(x, "d")
        if self.meets(due):
            latents = latents._replace(c=x.condition)
        with torch.no_grad():
            images, _ = self.generate(x, latents, "d")
        joint = self.joint(due)
        places = [TERMS[t.name].at for t in joint]
        given = {"real": x.real, "fake": images}
        given |= {place: given[place].detach().requires_grad_(True) for place in places}
        # In two passes, the gradients that a difference of scores gives D's last bias cancel exactly; and a gradient at
        # the images of one batch does not go through the other one.
        apart = self.objective.paired or len(places) == 1
        both = {"d-real": (given["real"], x.condition), "d-fake": (given["fake"], latents.c)}
        real, fake = self.score_both(x, both, apart=apart)
        loss = self.compare(x, real, fake, given)
        values = {
            "loss_d": loss,
            "score_real": per_image(lambda s: s, real),
            "score_fake": per_image(lambda s: s, fake),
            "sign_real": per_image(lambda s: s.detach().sign(), real),
        }
        if self.objective.probability is not None:
            given_to = zip(self.p_reports, (real, fake), strict=True)
            values |= {name: per_image(self.objective.probability, scores) for name, scores in given_to}
        for term in (t for t in due if TERMS[t.name].of_scores):
            found = TERMS[term.name].compute(real, fake, **term.options())
            loss = loss + found["loss"] * (self.factor(term, x) * term.every)
            values |= found
        if joint:  # the scores are differentiated at the images that they were computed of
            scores = {"real": real, "fake": fake}
            norms = squared_norms([scores[place] for place in places], [given[place] for place in places])
            inputs = self.discriminator_inputs(x, "d", norms=dict(zip(places, norms, strict=True)))
            for term in joint:
                found = TERMS[term.name].compute(inputs, **term.options())
                loss = loss + found["loss"] * self.factor(term, x)
                values |= found
        if any("fake" in TERMS[term.name].needs for term in due if term not in joint):
            put_rows(x.once("fake", lambda: torch.empty_like(x.step.real)), x.part, images)
        further = self.discriminator_heads(x, latents, real, fake)
        return {**values, **further, "loss": loss + further["loss"] if further else loss}

    def compare(self, x: Context, real: Any, fake: Any, images: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """D's loss [n] of what it returned for the images "real" and "fake"."""
        return per_image(self.objective.d, real, fake)

    def generator_heads(self, x: Context, latents: Latents, fake: Any) -> Values:
        """What G minimises of the further outputs of D, `fake` being what D returned for images of these latents: a
        "loss" [n] and values [n] for `g_reports`; empty for none."""
        return {}

    def discriminator_heads(self, x: Context, latents: Latents, real: Any, fake: Any) -> Values:
        """The same for D, which returned `real` for the real images and `fake` for images of these latents."""
        return {}

    def generator_term(self, x: Context, term: TermConfig, turn: str) -> Values:
        """A regularisation term on G, of images of its own."""
        if TERMS[term.name].of_pairs:
            return self.term_of_pairs(x, term, turn)
        ws = styles(self.G, self.latents(x, term.name + turn))[0]
        synthesis = partial(self.synthesize, x, purpose=term.name + turn)
        names = TERMS[term.name].keep.values()
        state = {name: x.number(name, partial(self.running_mean, name)) for name in names}
        inputs = GInputs(synthesis=synthesis, ws=ws, noise=self.noise(x, "pl" + turn), state=state)
        return TERMS[term.name].compute(inputs, **term.options())

    def term_of_pairs(self, x: Context, term: TermConfig, turn: str) -> Values:
        """A term on G, of images of pairs of latents with the same condition and the same per-pixel noise."""
        one, other = (self.latents(x, f"{term.name}-{k}{turn}")._replace(z_mix=None, cutoff=None) for k in "ab")
        images = [self.generate(x, z, term.name + turn)[0] for z in (one, other._replace(c=one.c))]
        return TERMS[term.name].compute(images, [one.z, other.z], **term.options())

    def weights_term(self, x: Context, term: TermConfig, side: Side) -> Values:
        """A term of the weights of a side."""
        history, weights = self.means_of_weights()[side], list(self.net[side].parameters())
        return TERMS[term.name].compute(weights, history.means, history.known(), len(x.part), **term.options())

    def discriminator_inputs(self, x: Context, purpose: str, **known: Any) -> DInputs:
        """The inputs of a regularisation term on D that every term has, and what is known besides."""
        return DInputs(D=partial(self.score, x, purpose), real=x.real, c=x.condition, **known)

    def discriminator_term(self, x: Context, term: TermConfig, due: list[TermConfig]) -> Values:
        """A regularisation term on D, of this step's real and generated images."""
        needs = TERMS[term.name].needs
        inputs = self.discriminator_inputs(x, term.name)
        if "fake" in needs:
            inputs.fake = rows_of(x.step.memory["fake"], x.part)
            inputs.c_fake = x.condition if self.meets(due) else self.latents(x, "d").c
        if "u" in needs:
            name, count = f"{term.name}-u", x.count
            inputs.u = x.draw(name, lambda streams: torch.rand([count], generator=streams(name), dtype=torch.float64))
        if "noise" in needs:
            inputs.noise = self.noise(x, term.name)
        return TERMS[term.name].compute(inputs, **term.options())

    # ---------------------------------------------------------------------------------------------------- steps

    def updates(self, step: Step) -> Iterator[Update]:
        """`g_steps` steps of G at the start of each round (config/rounds.py), and one of D in each training step."""
        turns, place = self.config.optim.g_steps, place_of(self.config.optim, step.number)
        for i in range(turns if place.step == 0 else 0):
            yield from self.generator_updates(step, place.round * turns + i, f"-{i}" if i else "")
        yield from self.discriminator_updates(step)

    def generator_updates(self, step: Step, number: int, turn: str) -> Iterator[Update]:
        """Step `number` of G in this phase; `turn` tells several steps at one nimg apart."""
        sums = {"w" + turn: torch.zeros_like(self.G.mapping.w_avg)} if self.has_ws else {}
        group, due = self.form.mbstd_group, self.due("G", number, step)
        within = [t for t in due if TERMS[t.name].joins]
        reports = self.g_reports + tuple(name for t in within for name in TERMS[t.name].reports)
        main = partial(self.generator_loss, turn=turn)
        if within:
            main = partial(self.generator_main, turn=turn, due=within)
        name = " + ".join(["main loss", *(t.name for t in within)])
        how = {"twice": bool(within), "counts": True, "sums": sums | self.made("G")}
        loss = Loss(name, main, step.batch, group, reports=reports, **how)
        own = [t for t in due if t not in within]
        terms = {t.name: partial(self.generator_term, term=t, turn=turn) for t in own}
        lengths = {"count": max(step.batch // self.config.loss.pl_batch_shrink, 1), "of_batch": False}  # without groups
        of_batch = {"count": step.batch, "group": group}
        yield from self.side("G", step, loss, own, terms, lambda t: lengths if TERMS[t.name].of_ws else of_batch)

    def discriminator_updates(self, step: Step) -> Iterator[Update]:
        """Step of D, as many as there are training steps."""
        due = self.due("D", step.number, step)
        joint = self.joint(due)
        within = [t for t in due if TERMS[t.name].of_scores or t in joint]
        reports = tuple(name for t in within for name in TERMS[t.name].reports)
        if self.objective.probability is not None and self.inherits_main_loss:
            reports = (*self.p_reports, *reports)
        main, group = partial(self.discriminator_main, due=due), self.form.mbstd_group
        name = " + ".join(["main loss", *(t.name for t in within)])
        how = {"twice": bool(joint), "counts": True, "sums": self.made("D")}
        loss = Loss(name, main, step.batch, group, reports=self.d_reports + reports, **how)
        own = [t for t in due if t not in within]
        terms = {t.name: partial(self.discriminator_term, term=t, due=due) for t in own}
        yield from self.side("D", step, loss, own, terms, lambda _: {"count": step.batch, "group": group})

    def made(self, side: Side) -> dict[str, torch.Tensor]:
        """What the main loss of a side announces, so that `after_step` learns whether its step was made."""
        return {f"made-{side}": torch.zeros_like(h.steps) for s, h in self.means_of_weights().items() if s == side}

    def means_of_weights(self) -> dict[Side, History]:
        """The mean of each side's weights in this phase, where a term compares them with it."""
        if not self.histories and any(TERMS[t.name].of_weights for t in self.terms):
            self.histories = {"G": History(self.G), "D": History(self.D)}  # now that the networks are on their device
        return self.histories

    def tensors(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        return {f"history_{side}": history.tensors for side, history in self.means_of_weights().items()}

    def side(
        self,
        side: Side,
        step: Step,
        main: Loss,
        due: list[TermConfig],
        values: Mapping[str, Callable[[Context], Values]],
        how: Callable[[TermConfig], dict[str, Any]],
    ) -> Iterator[Update]:
        """The main step, which the terms of every step join, and a step for each lazy term. `how` gives further
        arguments of a term's Loss."""
        limit = self.config.loss.d_clip if side == "D" else 0.0
        every, lazy = [main], []
        for t in due:
            term, reports, weight = values[t.name], TERMS[t.name].reports, self.weight(t, step)
            if TERMS[t.name].of_weights:
                term = partial(self.weights_term, term=t, side=side)
            if curves.is_curve(t.weight):
                term, weight = partial(self.weighted, term=t, values=term), 1.0
            loss = Loss(t.name, term, weight=weight * t.every, reports=reports, twice=True, **how(t))
            (lazy if t.every > 1 else every).append(loss)
        yield Update(side, every, limit)
        yield from (Update(side, [loss], limit) for loss in lazy)

    def due(self, side: Side, number: int, step: Step) -> list[TermConfig]:
        """The terms that count at step `number` of a side."""
        mine = [t for t in self.terms if side in TERMS[t.name].on]
        return [t for t in mine if number % t.every == 0 and self.weight(t, step) > 0]

    def joint(self, due: list[TermConfig]) -> list[TermConfig]:
        """The terms on D's gradients that are computed in its main pass: those of every step, unless a derived system
        has another main loss, or another way to compute terms."""
        inherited = self.inherits_main_loss and type(self).discriminator_term is GAN.discriminator_term
        return [t for t in due if inherited and t.every == 1 and TERMS[t.name].at]

    @property
    def inherits_main_loss(self) -> bool:
        """Whether D's main loss is the one of this class."""
        return type(self).discriminator_loss is GAN.discriminator_loss

    def weight(self, term: TermConfig, step: Step) -> float:
        return term_weight(term, step.resolution, step.nimg)

    def factor(self, term: TermConfig, x: Context) -> float | torch.Tensor:
        """The weight of a term; where it follows a curve, on the device, so that steps with it can be replayed."""
        if not curves.is_curve(term.weight):
            return self.weight(term, x.step)
        return x.number(f"weight of term {self.terms.index(term)}", partial(self.weight, term))

    def weighted(self, x: Context, term: TermConfig, values: Callable[[Context], Values]) -> Values:
        """The values of a term whose weight follows a curve, with the loss multiplied by it."""
        found = values(x)
        return {**found, "loss": found["loss"] * self.factor(term, x)}

    def running_mean(self, name: str, _: Step) -> float:
        return self.running.means.get(name, 0.0)

    def constants(self, step: Step) -> Hashable:
        """Those of GAN's own losses; a system derived from it may have others."""
        return self.own_constants(step) if type(self) is GAN else None

    def own_constants(self, step: Step) -> Hashable:
        """The numbers of the losses of this class, for systems whose further numbers do not change during a run."""
        weights = tuple(self.weight(t, step) for t in self.terms if not curves.is_curve(t.weight))
        sigma, noisy = blur_sigma(self.config, step.resolution, step.nimg), self.noise_at(step) > 0
        return (step.resolution, sigma, noisy, *weights)

    def moving(self, step: Step) -> str:
        return "loss.blur_sigma" if moves(self.config.loss, "blur_sigma", step.resolution, step.nimg) else ""

    def meets(self, due: list[TermConfig]) -> bool:
        """Whether a real and a generated image meet in a D step, and therefore have the same condition."""
        return self.objective.paired or any("u" in TERMS[term.name].needs for term in due)

    def optimizer_steps(self, side: Side) -> list[int]:
        mine = [t for t in self.terms if side in TERMS[t.name].on and not TERMS[t.name].joins]
        return [t.every for t in mine if t.every > 1]

    def not_compiled(self) -> list[str]:
        return [*(["D's main loss"] if self.joint(self.terms) else []), *(t.name for t in self.terms)]

    def after_step(self, step: Step, sums: Sums, tensors: Mapping[str, torch.Tensor]) -> None:
        """w_avg, the running means of terms and of weights, and ADA's p."""
        for name, total in tensors.items():
            if name.startswith("w"):
                self.G.mapping.w_avg.lerp_(total / step.batch, 1 - self.config.model.w_avg_beta)
        for side, history in self.means_of_weights().items():
            if f"made-{side}" in tensors:
                history.update(self.net[side])
        means = self.running.means
        for term in self.terms:
            for name, mean in TERMS[term.name].keep.items():
                if name in sums:
                    (total, count), before = sums[name], means.get(mean, 0.0)
                    means[mean] = before + self.config.loss.pl_decay * (total / count - before)
        self.adapt(step, *sums.get("sign_real", (0.0, 0)))
