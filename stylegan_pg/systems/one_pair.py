"""One generator and one discriminator: how they are built, how they make and score images, and what is kept of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from stylegan_pg import augment
from stylegan_pg.augment import blur
from stylegan_pg.config import ADAConfig, Config, FixedConfig
from stylegan_pg.config.schedule import augment_p, blur_sigma, instance_noise, size_at
from stylegan_pg.data.conditions import Conditions
from stylegan_pg.errors import UsageError
from stylegan_pg.losses import TERMS, per_image
from stylegan_pg.networks import NETWORKS, NetworkShape, Pair, accepted, declares
from stylegan_pg.networks.growing import frozen
from stylegan_pg.networks.normalization import group_batch_norms
from stylegan_pg.networks.spectral import add_spectral_norm
from stylegan_pg.rng import generator
from stylegan_pg.systems.base import Context, Step, System
from stylegan_pg.systems.draws import Streams
from stylegan_pg.systems.latents import Latents, draw, styles
from stylegan_pg.systems.state import GANState, read_state


class OnePair(System):
    """The networks that a configuration names, or a pair of the caller's, with augmentation in front of D."""

    def __init__(self, config: Config, pair: Pair | None = None):
        self.given = pair
        self.use(config)
        self.augment = augment.make(config.augment)
        self.running = GANState(augment_p=self.first_p())

    def use(self, config: Config) -> None:
        self.config, self.pair = config, self.given or NETWORKS[config.model.name]

    def first_p(self) -> float | None:
        """The probability of augmentation at the start of a run, None without augmentation; 0 for DiffAugment, which
        has none."""
        if self.augment is None:
            return None
        return augment_p(self.config, self.config.growth.start or self.config.resolution, 0) or 0.0

    def build(self, form: NetworkShape, conditions: Conditions | None) -> None:
        self.form, self.conditions, model = form, conditions, self.config.model
        self.G_kwargs = self.g_kwargs(form)
        self.G, self.D = self.pair.G(**self.G_kwargs), self.pair.D(**self.d_kwargs(form))
        for name, value in {"z_dim": model.z_dim, "c_dim": form.c_dim}.items():  # which plain networks may lack
            if not hasattr(self.G, name):
                setattr(self.G, name, value)
        for side, net in self.net.items():
            setattr(self, side, group_batch_norms(net, form.mbstd_group))
        if model.d_spectral_norm:
            add_spectral_norm(self.D)
        self.image_shape = (form.img_channels, *size_at(form.resolution, model.base))

    def g_kwargs(self, form: NetworkShape) -> dict[str, Any]:
        """The arguments of G for a phase, as JSON values. A derived system adds what follows from its own keys and from
        the data."""
        return self.pair.g_kwargs(self.config.model, form)

    def d_kwargs(self, form: NetworkShape) -> dict[str, Any]:
        """The same for D."""
        return self.pair.d_kwargs(self.config.model, form)

    def references(self) -> int:
        return getattr(self.D, "references", 0)

    def refer(self, images: torch.Tensor, c: torch.Tensor | None) -> None:
        for net in self.net.values():
            net.refer(images, c)

    @property
    def has_ws(self) -> bool:
        """Whether G has a mapping to ws, which style mixing, truncation and path length work on."""
        return hasattr(self.G, "mapping") and hasattr(self.G, "synthesis")

    def latents(self, x: Context, purpose: str) -> Latents:
        """This micro-batch's rows of the latents that are drawn for a purpose."""
        mixing, count = self.config.loss.style_mixing, x.count
        return x.draw(
            ("latents", purpose), lambda streams: draw(streams(purpose), count, self.G, mixing, self.conditions)
        )

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
        """The fade's alpha, and per-pixel noise, the one thing that depends on how a batch is dealt out. A generator
        that follows statistics of its activations does so in the images of the purpose "d", which every step makes
        once, of the whole batch."""
        noise = x.rng(f"noise-{purpose}", x.step.rank, x.index, device=x.step.device)
        how = {"alpha": x.alpha, "noise": "random", "generator": noise}
        if purpose == "d" and declares(self.G.synthesis if self.has_ws else self.G, "followed_batch"):
            how["followed_batch"] = x.count
        return how

    def score(self, x: Context, purpose: str, images: torch.Tensor, c: torch.Tensor | None = None) -> Any:
        """What D makes of images [n, C, H, W] with conditions c, blurred and augmented as is drawn for this purpose."""
        images = self.shown(x, purpose, images)
        given = [images] if c is None else [images, c]
        return self.judged(self.D(*given, **accepted(self.D, alpha=x.alpha)))

    def judged(self, output: Any) -> Any:
        """What D's output means: scores, or a named tuple of `scores` and what heads say."""
        return output

    def score_both(
        self, x: Context, batches: Mapping[str, tuple[torch.Tensor, torch.Tensor | None]], *, apart: bool = False
    ) -> list[Any]:
        """`score` for two batches of images and conditions, by purpose; in one pass if D can tell them apart, unless
        `apart` asks for two."""
        if apart or not declares(self.D, "batches"):
            return [self.score(x, purpose, *batch) for purpose, batch in batches.items()]
        images = torch.cat([self.shown(x, purpose, images) for purpose, (images, _) in batches.items()])
        c = [c for _, c in batches.values() if c is not None]
        given = [images, torch.cat(c)] if c else [images]
        return [self.judged(part) for part in self.D(*given, **accepted(self.D, alpha=x.alpha, batches=2)).chunk(2)]

    def shown(self, x: Context, purpose: str, images: torch.Tensor) -> torch.Tensor:
        """Images as D sees them: blurred by loss.blur_sigma, then augmented, then with noise by loss.instance_noise."""
        return self.with_noise(x, purpose, self.augmented(x, purpose, self.blurred(x, images)))

    def with_noise(self, x: Context, purpose: str, images: torch.Tensor) -> torch.Tensor:
        """Images with Gaussian noise of the standard deviation that this step has, drawn for each image and purpose
        (Arjovsky and Bottou 2017, section 3; Sonderby et al. 2017, instance noise)."""
        if self.noise_at(x.step) == 0:
            return images
        noise = self.noise(x, f"instance-{purpose}")
        return images + noise * x.number("instance noise", self.noise_at)

    def noise_at(self, step: Step) -> float:
        """The standard deviation of the noise that D sees at a step."""
        return instance_noise(self.config, step.resolution, step.nimg)

    def blurred(self, x: Context, images: torch.Tensor) -> torch.Tensor:
        """Images blurred as loss.blur_sigma asks for at this step (Karras et al. 2021, configuration R)."""
        sigma = blur_sigma(self.config, x.step.resolution, x.step.nimg)
        if blur.radius(sigma) == 0:
            return images
        taps = x.once("taps of the blur", lambda: blur.taps(sigma, x.step.device))
        return blur.blur(images, taps)

    def augmented(self, x: Context, purpose: str, images: torch.Tensor) -> torch.Tensor:
        """Images as they are augmented for this purpose."""
        if self.augment is None:
            return images
        maker, count, size, channels = self.augment, x.count, (images.shape[2], images.shape[3]), images.shape[1]

        resolution = x.step.resolution

        def make(streams: Streams) -> augment.Params:
            p = self.probability(resolution, streams.nimg) or 0.0
            params = maker.draw(count, p, streams(f"augment-{purpose}"), size)
            return maker.instructions(params, size, channels)

        return maker.perform(images, x.draw(("augment", purpose), make))

    def probability(self, resolution: int, nimg: int) -> float | None:
        """The probability of augmentation: a function of nimg for augment.mode=fixed, otherwise the present one."""
        return (
            augment_p(self.config, resolution, nimg)
            if isinstance(self.config.augment, FixedConfig)
            else self.running.augment_p
        )

    def noise(self, x: Context, purpose: str) -> torch.Tensor:
        """N(0, 1) of the images' shape, drawn on the device for each image by itself."""
        device = x.step.device
        noise = [
            torch.randn(self.image_shape, generator=x.rng(purpose, i, device=device), device=device) for i in x.rows
        ]
        return x.to_device(torch.stack(noise))

    def adapt(self, step: Step, signs: float, count: int) -> None:
        """For augment.mode=ada, add up the signs of D's scores of real images, and every few steps move p by them
        (Karras et al. 2020, ADA, section 3.1). For fixed, keep the p of this step for the statistics."""
        a, now = self.config.augment, self.running
        if isinstance(a, FixedConfig):
            now.augment_p = augment_p(self.config, step.resolution, step.nimg)
        if not isinstance(a, ADAConfig):
            return
        now.signs, now.signed = now.signs + signs, now.signed + count
        if (step.number + 1) % a.interval == 0 and now.signed:
            mean = now.signs / now.signed
            now.augment_p = augment.adjust(now.augment_p or 0.0, mean, step.batch, a.interval, a.target, a.kimg)
            now.signs, now.signed = 0.0, 0

    def draws_depend_on(self) -> float | None:
        """The probability of augmentation, unless it follows from nimg."""
        return None if isinstance(self.config.augment, FixedConfig) else self.running.augment_p

    def frozen(self) -> dict[str, torch.nn.Parameter]:
        """The highest resolutions of D (train.freeze_d), but for what `init` lacked."""
        found = frozen(self.D, self.config.train.freeze_d) if self.config.train.freeze_d else []
        return {name: p for name, p in found if name not in self.running.thawed}

    def start_augmenting(self, p: float) -> bool:
        """Only where ADA moves the probability, and the configuration does not say where it begins."""
        if not isinstance(self.config.augment, ADAConfig) or self.config.augment.p:
            return False
        self.running.augment_p = p
        return True

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

    def trial(self, count: int, device: torch.device, dtype: torch.dtype) -> None:
        new = {"device": device, "dtype": dtype}
        c = [torch.zeros([count, self.form.c_dim], **new)] if self.form.c_dim else []
        alpha = torch.ones([], **new) if self.form.fade else 1.0
        how = {"alpha": alpha, "noise": "random", "generator": generator(self.config.seed, "compile", device=device)}
        if self.has_ws:
            images = self.G.synthesis(torch.zeros([count, self.G.num_ws, self.G.w_dim], **new), **how)
        else:
            images = self.G(torch.zeros([count, self.G.z_dim], **new), *c, **accepted(self.G, **how))
        per_image(torch.clone, self.D(images, *c, **accepted(self.D, alpha=alpha))).sum().backward()

    def statistics(self) -> dict[str, float]:
        p = self.running.augment_p
        return ({} if p is None else {"augment_p": p}) | self.running.means

    def state(self) -> dict[str, Any]:
        return self.running.plain()

    def check_state(self, state: Mapping[str, Any], named: str) -> None:
        read_state(type(self.running), state, named)

    def load_state(self, state: Mapping[str, Any]) -> None:
        read = read_state(type(self.running), state, "the state of the GAN")
        if self.running.augment_p is None or read.augment_p is None:
            read.augment_p = self.running.augment_p
        known = {mean for term in TERMS.values() for mean in term.keep.values()}
        read.means = {name: value for name, value in read.means.items() if name in known}
        self.running = read

    def snapshot_description(self) -> dict[str, Any]:
        named = {module.G: name for name, module in NETWORKS.items()}
        kind = self.pair.G
        return {"network": named.get(kind, f"{kind.__module__}.{kind.__qualname__}"), "kwargs": self.G_kwargs}
