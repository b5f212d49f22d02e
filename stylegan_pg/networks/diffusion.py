"""The diffusion that a denoising diffusion GAN reverses in a few steps: its schedule, the posterior of a step, and the
chain from noise to a picture (Xiao et al. 2022, "Tackling the Generative Learning Trilemma with Denoising Diffusion
GANs", section 3 and appendix A).

A picture x_0 becomes noise in T steps. With index t from 0 to T, x_t = a_t x_0 + s_t noise, where a_t^2 + s_t^2 = 1;
x_{t+1} follows from x_t with the variance beta_{t+1}. At t = T next to nothing of the picture is left. The generator
guesses x_0 from x_{t+1}, and x_t is drawn from the posterior q(x_t | x_{t+1}, x_0), for t = T - 1, ..., 0.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import nn

FIRST_TIME = 1e-3  # of the continuous process, whose last time is 1
FIRST_BETA = 1e-8


class Diffusion:
    """The schedule of T steps, all numbers float64.

    Args:
        steps: T, 1 or more. beta_min, beta_max: the rates of the continuous, variance preserving process at its begin
            and end (Song et al. 2021, "Score-Based Generative Modeling", equation 32).

    Raises:
        ValueError: T is less than 1, or a rate is not above 0.
    """

    def __init__(self, steps: int, beta_min: float = 0.1, beta_max: float = 20.0):
        if steps < 1 or beta_min <= 0 or beta_max <= 0:
            raise ValueError(f"no diffusion has {steps} steps and the rates {beta_min} and {beta_max}")
        self.steps, self.beta_min, self.beta_max = steps, beta_min, beta_max

    @cached_property
    def betas(self) -> torch.Tensor:
        """beta_0 to beta_T: [T + 1]."""
        numbers = torch.arange(self.steps + 1, dtype=torch.float64, device="cpu") / self.steps
        time = FIRST_TIME + (1 - FIRST_TIME) * numbers
        kept = torch.exp(-time.square() * (self.beta_max - self.beta_min) / 2 - time * self.beta_min)
        return torch.cat([kept.new_tensor([FIRST_BETA]), 1 - kept[1:] / kept[:-1]])

    @cached_property
    def forward(self) -> torch.Tensor:
        """For each t from 0 to T - 1, the factors of x_0 and noise in x_t, and of x_t and noise in x_{t+1}: [T, 4]."""
        own = (1 - self.betas).sqrt()
        own[0] = 1  # as the authors' code has it in float32, where beta_0 is rounded away: x_0 is the picture itself
        whole = own.cumprod(dim=0)
        return torch.stack([whole, (1 - whole.square()).sqrt(), own.roll(-1), self.betas.sqrt().roll(-1)], dim=1)[:-1]

    @cached_property
    def posterior(self) -> torch.Tensor:
        """For each t from 0 to T - 1, the factors of x_0, x_{t+1} and noise in x_t: [T, 3] (Ho et al. 2020, equations 6
        and 7). They follow from beta_1 to beta_T, and the last step, to x_0, adds no noise."""
        betas = self.betas[1:]
        kept = (1 - betas).cumprod(dim=0)
        before = torch.cat([kept.new_ones([1]), kept[:-1]])
        of_x0 = betas * before.sqrt() / (1 - kept)
        of_next = (1 - before) * (1 - betas).sqrt() / (1 - kept)
        return torch.stack([of_x0, of_next, (betas * (1 - before) / (1 - kept)).sqrt()], dim=1)


def columns(factors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The columns of factors [N, K], each [N, 1, 1, 1], to multiply pictures with."""
    return factors[:, :, None, None, None].unbind(dim=1)


def diffused(
    x0: torch.Tensor, noise: torch.Tensor, next_noise: torch.Tensor, factors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x_t and x_{t+1} of pictures x0 [N, C, H, W] with noises N(0, 1) of their shape; `factors` [N, 4] are the rows of
    Diffusion.forward for each picture's t."""
    of_x0, of_noise, of_xt, of_next = columns(factors)
    xt = of_x0 * x0 + of_noise * noise
    return xt, of_xt * xt + of_next * next_noise


def posterior(x0: torch.Tensor, x_next: torch.Tensor, noise: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """A sample x_t of q(x_t | x_{t+1}, x_0), all [N, C, H, W]; `factors` [N, 3] are the rows of Diffusion.posterior for
    each picture's t."""
    of_x0, of_next, of_noise = columns(factors)
    return of_x0 * x0 + of_next * x_next + of_noise * noise


def time_embedding(t: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Whole numbers t [N] -> [N, size]: sines, then cosines, of t times frequencies from 1 to 1/10000; an odd size ends
    with a 0."""
    half = size // 2
    exponents = torch.arange(half, device=t.device, dtype=dtype) * (-math.log(10000) / max(half - 1, 1))
    angles = t.to(dtype)[:, None] * exponents.exp()
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, size % 2))


class ReverseChain(nn.Module):
    """A generator that goes from noise to pictures in T steps: z [N, z_dim] of N(0, 1) -> [N, C, H, W].

    z holds everything random of the chain, one after another: the latents of the T steps, the noisiest step first; x_T;
    and the noise of each step but the last. Pictures are therefore a smooth function of z alone, whatever the batch,
    the machine and the format that the generator is exported to. z_dim is T (step_z_dim + C H W).

    Attributes:
        denoiser: the network that is trained: denoiser(x_next [N, C, H, W], t int64 [N], z [N, step_z_dim]) -> x_0.
    """

    def __init__(self, denoiser: nn.Module, diffusion: Diffusion, step_z_dim: int, shape: tuple[int, int, int]):
        super().__init__()
        self.denoiser, self.diffusion, self.steps = denoiser, diffusion, diffusion.steps
        self.step_z_dim, self.shape = step_z_dim, shape
        self.img_channels, self.img_size, self.c_dim = shape[0], shape[1:], 0
        self.z_dim = diffusion.steps * (step_z_dim + math.prod(shape))
        self.factors: list[list[float]] = diffusion.posterior.tolist()

    def as_trained(self, z: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        """The one pass of a training step, for predictions of its cost; `forward` makes T."""
        x = z[:, -math.prod(self.shape) :].unflatten(1, self.shape)
        return self.denoiser(x, torch.zeros([len(z)], dtype=torch.long, device=z.device), z[:, : self.step_z_dim])

    def forward(self, z: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        latents, noise = z.split([self.steps * self.step_z_dim, self.steps * math.prod(self.shape)], dim=1)
        latents = latents.unflatten(1, (self.steps, self.step_z_dim)).unbind(dim=1)
        x, *noises = noise.unflatten(1, (self.steps, *self.shape)).unbind(dim=1)
        for t, latent in zip(reversed(range(self.steps)), latents, strict=True):
            of_x0, of_next, of_noise = self.factors[t]
            at = torch.full([z.shape[0]], t, dtype=torch.long, device=z.device)  # len() would fix the size of an export
            x0 = self.denoiser(x, at, latent)
            x = of_x0 * x0 + of_next * x
            if t:  # the last step adds none
                x = x + of_noise * noises[self.steps - 1 - t]
        return x
