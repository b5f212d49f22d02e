"""Denoising diffusion GAN (Xiao et al. 2022, "Tackling the Generative Learning Trilemma with Denoising Diffusion
GANs").

A diffusion makes noise of a picture in T large steps (networks/diffusion.py). G guesses the picture x_0 from x_{t+1}
and a latent, and x_t is drawn from the posterior q(x_t | x_{t+1}, x_0). D tells such an x_t from the true one, given
x_{t+1} and t. Because of the latent, G can model the many pictures that a noisy one may stem from, so that few steps
are enough. Pictures come from G's reverse chain, which is its forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch

from stylegan_pg.config import Config, TermConfig
from stylegan_pg.config.rounds import place_of
from stylegan_pg.data.conditions import Conditions
from stylegan_pg.errors import UsageError
from stylegan_pg.losses import TERMS, per_image, squared_norms
from stylegan_pg.networks import NetworkShape, Pair
from stylegan_pg.networks.diffusion import Diffusion, ReverseChain, diffused, posterior
from stylegan_pg.systems.base import Context, Loss, Side, Step, Update, Values
from stylegan_pg.systems.draws import Streams
from stylegan_pg.systems.gan import GAN

MOST_DRAWN = 4096  # numbers of a picture whose noise is drawn on the host


class Denoising(NamedTuple):
    """One step of the chain for each of some pictures."""

    t: torch.Tensor  # int64 [n]
    xt: torch.Tensor  # [n, C, H, W], the true x_t
    x_next: torch.Tensor  # x_{t+1}
    guess: torch.Tensor  # G's of x_0
    fake: torch.Tensor  # x_t from the posterior of that guess


class DDGAN(GAN):
    """G and D are trained with the objective of D's scores of (x_t, x_{t+1}), at a t and noises of each picture's own.

    R1 is a penalty on D's gradient at the true x_t only. It joins D's main loss at every `loss.r1_every`-th step, with
    the weight `loss.r1_gamma` and without the factor `r1_every`, as in the authors' code. D is trained first.
    """

    def __init__(self, config: Config, pair: Pair | None = None):
        super().__init__(config, pair)
        if self.objective.paired:
            raise UsageError(
                f"loss.objective={config.loss.objective} is not possible with system.name=ddgan, whose real and "
                "generated pictures are not compared in pairs: take loss.objective=logistic"
            )
        if others := [t.name for t in self.terms if t.name != "r1"]:
            raise UsageError(
                f"the term {others[0]} is not possible with system.name=ddgan, which has R1 alone (loss.r1_gamma): "
                "leave it away, with loss.pl_weight=0 and loss.terms=[]"
            )

    def build(self, form: NetworkShape, conditions: Conditions | None) -> None:
        if form.c_dim:
            raise UsageError(
                "data.conditional=true is not possible with system.name=ddgan, whose networks take no conditions: set "
                "data.conditional=false"
            )
        super().build(form, conditions)
        if not isinstance(self.G, ReverseChain):
            raise UsageError(
                "system.name=ddgan needs a generator that removes noise step by step: take model.name=ddgan for "
                "pictures, or model.name=ddgan_mlp for points"
            )
        self.diffusion: Diffusion = self.G.diffusion

    # ------------------------------------------------------------------------------------------------- losses

    def denoising(self, x: Context, purpose: str) -> Denoising:
        """Steps of the chain for this micro-batch's real pictures, at times and noises that are drawn for a purpose."""
        count, size, diffusion = x.count, self.G.step_z_dim, self.diffusion

        def make(streams: Streams) -> dict[str, torch.Tensor]:
            g = streams(f"denoising-{purpose}")
            t = torch.randint(diffusion.steps, [count], generator=g)
            z = torch.randn([count, size], generator=g)
            return {"t": t, "z": z, "forward": diffusion.forward[t], "posterior": diffusion.posterior[t]}

        drawn = x.draw(("denoising", purpose), make)
        noise_t, noise_next, noise_posterior = self.noises(x, purpose, 3)
        xt, x_next = diffused(x.real, noise_t, noise_next, drawn["forward"])
        guess = self.G.denoiser(x_next, drawn["t"], drawn["z"])
        fake = posterior(guess, x_next, noise_posterior, drawn["posterior"])
        return Denoising(drawn["t"], xt, x_next, guess, fake)

    def noises(self, x: Context, purpose: str, count: int) -> list[torch.Tensor]:
        """`count` tensors of N(0, 1) of the real pictures' shape. Those of small pictures are drawn on the host for the
        whole batch, because a stream for each picture would take longer than the training step."""
        purposes = [f"denoising-{purpose}-{i}" for i in range(count)]
        if math.prod(self.image_shape) > MOST_DRAWN:
            return [self.noise(x, name) for name in purposes]
        shape = [x.count, *self.image_shape]
        return x.draw(
            ("noises", purpose), lambda streams: [torch.randn(shape, generator=streams(name)) for name in purposes]
        )

    def generator_loss(self, x: Context, turn: str) -> Values:
        step = self.denoising(x, "g" + turn)
        loss = per_image(self.objective.g, self.D(step.fake, step.t, step.x_next), None)
        return {"loss_g": loss, "loss": loss}

    def discriminator_loss(self, x: Context, due: list[TermConfig]) -> Values:
        with torch.no_grad():
            step = self.denoising(x, "d")
        xt = step.xt.requires_grad_(bool(due))
        real, fake = (self.D(one, step.t, step.x_next) for one in (xt, step.fake))
        loss = per_image(self.objective.d, real, fake)
        values = {
            "loss_d": loss,
            "score_real": per_image(lambda s: s, real),
            "score_fake": per_image(lambda s: s, fake),
            "sign_real": per_image(lambda s: s.detach().sign(), real),
        }
        for term in due:
            penalty = squared_norms([real], [xt])[0]
            loss, values["r1_penalty"] = loss + penalty / 2 * self.factor(term, x), penalty
        return {**values, "loss": loss}

    # -------------------------------------------------------------------------------------------------- steps

    def updates(self, step: Step) -> Iterator[Update]:
        """A step of D, then, at the start of each round (config/rounds.py), `g_steps` of G."""
        turns, place = self.config.optim.g_steps, place_of(self.config.optim, step.number)
        yield from self.discriminator_updates(step)
        for i in range(turns if place.step == 0 else 0):
            yield from self.generator_updates(step, place.round * turns + i, f"-{i}" if i else "")

    def discriminator_updates(self, step: Step) -> Iterator[Update]:
        due = self.due("D", step.number, step)
        name = " + ".join(["main loss", *(t.name for t in due)])
        reports = (*self.d_reports, *(name for t in due for name in TERMS[t.name].reports))
        values, group = partial(self.discriminator_loss, due=due), self.form.mbstd_group
        loss = Loss(name, values, step.batch, group, reports=reports, twice=bool(due), counts=True)
        yield Update("D", [loss], self.config.loss.d_clip)

    def optimizer_steps(self, side: Side) -> list[int]:
        """None besides the main ones: R1 has no step of its own."""
        return []

    def compiled(self) -> list[torch.nn.Module]:
        return [self.G.denoiser, self.D]

    def trial(self, count: int, device: torch.device, dtype: torch.dtype) -> None:
        new = {"device": device, "dtype": dtype}
        x, t = torch.zeros([count, *self.image_shape], **new), torch.zeros([count], dtype=torch.long, device=device)
        z = torch.zeros([count, self.G.step_z_dim], **new)
        self.D(self.G.denoiser(x, t, z), t, x).sum().backward()
