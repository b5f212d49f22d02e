"""Pictures of one generator for the page: w of places, mixtures, directions, previews.

A face becomes a `Code`, the generator's input in the space in which faces are mixed: ws for a generator with a learned
mapping, z for others (R3GAN, Progressive GAN). Codes are interpolated by videos.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from stylegan_pg.data.classes import class_names, conditions_at, example_conditions
from stylegan_pg.editing.directions import Samples, sampled_w
from stylegan_pg.errors import UsageError
from stylegan_pg.explorer.directions import Direction, in_w, in_z, read_directions
from stylegan_pg.explorer.face import Face, Place
from stylegan_pg.explorer.worker import SupersededError
from stylegan_pg.images import to_uint8
from stylegan_pg.inference.generate import between, finite, latents
from stylegan_pg.networks import accepted
from stylegan_pg.ops import upsample2d

CACHED = 4096  # latents of seeds that are kept
KEPT = 8  # pictures
PREVIEW_SEC = 0.12  # a preview may take so long; larger ones are not made
GROWTH = 3  # how many times as long twice the resolution takes, about
SAMPLES = 4096  # of w, whose principal components are taken
SMALLEST_PREVIEW, MOST_REDUCED = 32, 16  # pixels; and how many times smaller than the whole picture


class Code(NamedTuple):
    """Inputs of a generator. latent [N, num_ws, w_dim], or [N, z_dim] for one without w; c [N, c_dim], or None where
    the latent includes the condition; move [N, 3]: see Face.move."""

    latent: torch.Tensor
    c: torch.Tensor | None
    move: torch.Tensor


class Faces:
    """One generator, and what is kept of it. It is used by one thread at a time."""

    def __init__(self, G: Any, direction_files: Sequence[Path] = (), outdated: Callable[[], bool] = lambda: False):
        """
        Args:
            G: as load_snapshot returns it.
            direction_files: safetensors files with further directions.
            outdated: asked between the layers; if it is true, a picture is given up with SupersededError.

        Raises:
            UsageError: the generator makes points, not pictures.
        """
        if G.img_channels not in (1, 3, 4):
            raise UsageError("this generator makes points, not pictures: use it from Python")
        self.G, self.direction_files = G, direction_files
        place = next(G.parameters())
        self.device, self.dtype = place.device, place.dtype
        # Progressive GAN's w is z on a sphere: mixtures of z are treated as those of other normal latents.
        self.has_w = hasattr(G, "styles") and any(True for _ in G.mapping.parameters())
        self.num_layers: int = G.num_ws if self.has_w else 1
        self.names = class_names(G) if G.c_dim else []
        self.examples = example_conditions(G) if G.c_dim else None
        self.alpha = float(getattr(G, "description", {}).get("alpha", 1.0))
        self.input = getattr(getattr(G, "synthesis", None), "input", None)
        self.moves = hasattr(self.input, "transform")
        self.seconds: dict[int, float] = {}  # for one picture, by resolution
        self.outdated = outdated
        for module in G.modules():
            module.register_forward_pre_hook(self._go_on)
        self._latents: OrderedDict[Any, torch.Tensor] = OrderedDict()
        self._pictures: OrderedDict[Any, torch.Tensor] = OrderedDict()

    def _go_on(self, *_: Any) -> None:
        if self.outdated():
            raise SupersededError

    # ------------------------------------------------------------------------------------------------ what it offers

    def facts(self) -> dict[str, Any]:
        """What the page has to know, as JSON values."""
        G, description = self.G, getattr(self.G, "description", {})
        return {
            "network": str(description.get("network", type(G).__name__)),
            "nimg": description.get("nimg"),
            "height": G.img_size[0],
            "width": G.img_size[1],
            "channels": G.img_channels,
            "z_dim": G.z_dim,
            "has_w": self.has_w,
            "layers": self._layer_names(),
            "c_dim": G.c_dim,
            "classes": self.names if self.examples is None else [],
            "examples": [] if self.examples is None else self.examples.tolist(),
            "noise": any(name.endswith("noise_const") for name, _ in G.named_buffers()),
            "moves": self.moves,
            "cutoff": getattr(G, "truncation_cutoff", None),
            "previews": self.resolutions[1:],
            "parameters": sum(p.numel() for p in G.parameters()),
        }

    def _layer_names(self) -> list[str]:
        """A name for each w: the size of the layer that takes it."""
        if not self.has_w:
            return []
        synthesis = self.G.synthesis
        if hasattr(synthesis, "layers") and hasattr(synthesis, "names"):  # StyleGAN3: the input, then the layers
            return ["in", *(name.split("_")[1] for name in synthesis.names)][: self.num_layers]
        sizes = getattr(synthesis, "resolutions", None)
        if not sizes:
            return [str(i) for i in range(self.num_layers)]
        each = max(1, self.num_layers // len(sizes))
        return [str(sizes[min(i // each, len(sizes) - 1)]) for i in range(self.num_layers)]

    @functools.cached_property
    def directions(self) -> dict[str, Direction]:
        """The directions of this generator by name.

        Raises:
            UsageError: a given file holds none for this generator.
        """
        found = in_w(self.G, self._samples()) if self.has_w else in_z(self.G)
        dim = self.G.w_dim if self.has_w else self.G.z_dim
        for path in self.direction_files:
            found += read_directions(path, self.G, self.num_layers, dim)
        return {direction.name: direction for direction in found}

    def _samples(self) -> Samples:
        """w of normal latents; of a conditional generator, of all conditions in turn."""
        return sampled_w(self.G, SAMPLES, 0, range(len(self.names)) if self.G.c_dim else ())

    # --------------------------------------------------------------------------------------------------------- codes

    @torch.no_grad()
    def code(self, face: Face) -> Code:
        """The generator's input for a face, of batch size 1.

        Raises:
            UsageError: the face names a condition or a direction that this generator does not have.
        """
        latent, c = self._at(face.place)
        if face.other is not None:
            latent, c = self._mixed((latent, c), self._at(face.other), face.amount, face.layers)
        if self.has_w and face.psi != 1:
            cutoff = face.cutoff if face.cutoff is not None else self.G.truncation_cutoff
            cutoff = self.num_layers if cutoff is None else cutoff
            low = torch.lerp(self.G.mapping.w_avg.to(latent), latent[:cutoff], face.psi)
            latent = torch.cat([low, latent[cutoff:]])
        for name, amount in face.directions.items():
            latent = self._moved(latent, name, amount, face.direction_layers)
        return Code(latent[None], None if c is None else c[None], torch.tensor([face.move], dtype=torch.float64))

    def _moved(self, latent: torch.Tensor, name: str, amount: float, layers: Sequence[int] | None) -> torch.Tensor:
        if amount == 0:
            return latent
        if name not in self.directions:
            raise UsageError(f"this generator has no direction {name[:80]!r}: choose one of those that the page lists")
        change = amount * self.directions[name].vector.to(latent)
        if not self.has_w:
            return latent + change
        return latent + self._mask(layers)[:, None].to(latent) * change

    def _mask(self, layers: Sequence[int] | None) -> torch.Tensor:
        mask = torch.zeros(self.num_layers) if layers is not None else torch.ones(self.num_layers)
        for i in layers or ():
            if i < self.num_layers:
                mask[i] = 1
        return mask

    def _mixed(self, a: Any, b: Any, amount: float, layers: Sequence[int] | None) -> Any:
        if self.has_w:
            return torch.lerp(a[0], b[0], amount * self._mask(layers)[:, None].to(a[0])), None
        t = a[0].new_tensor([[amount]])
        return between(a[0], b[0], t)[0], None if a[1] is None else torch.lerp(a[1], b[1], amount)

    def _at(self, place: Place) -> tuple[torch.Tensor, torch.Tensor | None]:
        """ws [num_ws, w_dim] and None; or z [z_dim] and the condition."""
        c = self._condition(place.c)
        corners = place.corners()
        rows = torch.stack([self._latent(seed, place.c, c) for seed, _ in corners])
        weights = rows.new_tensor([weight for _, weight in corners])
        if self.has_w:
            return (weights @ rows).expand(self.num_layers, -1), None
        # A mixture of normal latents has the variance of each of them if its weights are on the unit sphere.
        return (weights / weights.norm()) @ rows, c

    def _latent(self, seed: int, key: Any, c: torch.Tensor | None) -> torch.Tensor:
        """w, or z, of a seed; the mapping is made once."""
        key = (seed, key if self.has_w else None)
        if key not in self._latents:
            z = latents([seed], self.G.z_dim).to(self.device, self.dtype)
            self._latents[key] = (self.G.mapping(z, None if c is None else c[None]) if self.has_w else z)[0]
            if len(self._latents) > CACHED:
                self._latents.popitem(last=False)
        self._latents.move_to_end(key)
        return self._latents[key]

    def _condition(self, c: int | tuple[float, ...] | None) -> torch.Tensor | None:
        """The condition [c_dim] of a place; the first class or example if it names none."""
        if not self.G.c_dim:
            return None  # the page may keep a class while another generator is looked at
        if isinstance(c, tuple):
            if self.examples is None or len(c) != self.G.c_dim:
                what = f"a list of {self.G.c_dim} numbers" if self.examples is not None else "the number of a class"
                raise UsageError(f"the condition of this generator is {what}")
            return torch.tensor(c).to(self.device, self.dtype)
        if (c or 0) >= len(self.names):
            raise UsageError(f"there is no class or example {c}: this generator has {len(self.names)}, from 0")
        return conditions_at(self.G, [c or 0])[0].to(self.device, self.dtype)

    def interpolated(self, a: Code, b: Code, t: Sequence[float]) -> Code:
        """Codes [n] between two codes of batch size 1, at each t in [0, 1]: linear in w, on great circles in z."""
        at = torch.tensor(t, dtype=torch.float64)[:, None]
        w = at.to(a.latent)
        latent = torch.lerp(a.latent, b.latent, w[:, :, None]) if self.has_w else between(a.latent[0], b.latent[0], w)
        c = None if a.c is None or b.c is None else torch.lerp(a.c, b.c, w)
        turn = (b.move[:, 2] - a.move[:, 2] + 180) % 360 - 180  # the short way round
        move = torch.cat([torch.lerp(a.move[:, :2], b.move[:, :2], at), a.move[:, 2:] + at * turn[:, None]], dim=1)
        return Code(latent, c, move)

    # ------------------------------------------------------------------------------------------------------ pictures

    @torch.no_grad()
    def images(self, code: Code, noise: str = "const", noise_seed: int = 0, resolution: int = 0) -> torch.Tensor:
        """uint8 [N, C, H, W] on the CPU for codes.

        Args:
            resolution: 0, or one of `facts`' previews, for which the layers beyond it are left out.

        Raises:
            RunError: the images are not finite.
        """
        started = time.perf_counter()
        random = torch.Generator(self.device).manual_seed(noise_seed) if noise == "random" else None
        how: dict[str, Any] = {"noise": noise, "generator": random}
        with self._transformed(code.move):
            if not self.has_w:
                made = self.G(code.latent, *([] if code.c is None else [code.c]), **accepted(self.G, **how))
            elif resolution:
                made = coarse(self.G.synthesis, code.latent, resolution, **how)
            else:
                made = self.G.synthesis(code.latent, **accepted(self.G.synthesis, alpha=self.alpha, **how))
        images = to_uint8(finite(made)).cpu()
        took, size = (time.perf_counter() - started) / len(images), resolution or self.G.resolution
        before = self.seconds.get(size, took)
        self.seconds[size] = min(took, 0.5 * (took + before))  # something else may have delayed the slower one
        return images

    def picture(self, face: Face, resolution: int = 0) -> torch.Tensor:
        """uint8 [C, H, W] on the CPU; see `images`. The last few are kept, because the page asks for a picture again
        when it settles, and to save it."""
        key = repr(face), resolution
        if key not in self._pictures:
            self._pictures[key] = self.images(self.code(face), face.noise, face.noise_seed, resolution)[0]
            if len(self._pictures) > KEPT:
                self._pictures.popitem(last=False)
        self._pictures.move_to_end(key)
        return self._pictures[key]

    def preview_resolution(self) -> int:
        """The resolution for a preview, 0 for the whole picture: the largest one that has been fast enough, or the next
        one, if that has not been measured and will probably be so. At first, the lowest one is measured."""
        sizes = self.resolutions[::-1]
        fast = [i for i, size in enumerate(sizes) if self.seconds.get(size, PREVIEW_SEC + 1) <= PREVIEW_SEC]
        chosen = fast[-1] if fast else 0
        if fast and chosen + 1 < len(sizes) and sizes[chosen + 1] not in self.seconds:
            chosen += GROWTH * self.seconds[sizes[chosen]] <= PREVIEW_SEC
        return 0 if sizes[chosen] == self.G.resolution else sizes[chosen]

    @functools.cached_property
    def resolutions(self) -> list[int]:
        """The resolutions at which pictures can be made, the highest first. A network of skip connections has a
        picture at each of its resolutions; others have that of the highest one only."""
        synthesis: Any = getattr(self.G, "synthesis", None)
        if not self.has_w or not getattr(synthesis, "skips", False):
            return [self.G.resolution]
        smallest = max(SMALLEST_PREVIEW, self.G.resolution // MOST_REDUCED)
        smaller = [r for r in synthesis.resolutions if smallest <= r < self.G.resolution]
        return [self.G.resolution, *reversed(smaller)]

    @contextlib.contextmanager
    def _transformed(self, move: torch.Tensor) -> Iterator[None]:
        """Set the transformation of StyleGAN3's input to a move [N, 3] for the block. The network's matrix takes
        coordinates of the result to those of the waves, so it is the inverse of the picture's motion; y points
        downwards."""
        if not self.moves or not bool(move.any()):
            yield
            return
        input_: Any = self.input
        before = input_.transform
        angle = torch.deg2rad(move[:, 2])
        matrix = torch.zeros(len(move), 3, 3, dtype=torch.float64)
        cos, sin = angle.cos(), angle.sin()
        matrix[:, 0, 0], matrix[:, 0, 1], matrix[:, 1, 0], matrix[:, 1, 1] = cos, -sin, sin, cos
        matrix[:, 2, 2] = 1
        right, up = move[:, 0], -move[:, 1]
        matrix[:, 0, 2] = -(cos * right - sin * up)
        matrix[:, 1, 2] = -(sin * right + cos * up)
        input_.transform = matrix.to(before)
        try:
            yield
        finally:
            input_.transform = before


def coarse(synthesis: Any, ws: torch.Tensor, resolution: int, **noise: Any) -> torch.Tensor:
    """The picture [N, C, h, w] that a network of skip connections has summed up to a resolution, which is not its
    highest one: the following layers add finer details to it, and may change its colours a little."""
    blocks = [getattr(synthesis, f"b{r}") for r in synthesis.resolutions if r <= resolution]
    x = img = None
    for block, styles in zip(blocks, synthesis.block_styles(blocks, ws), strict=True):
        x = block(x, styles, **noise)
        if hasattr(block, "torgb"):
            rgb = synthesis.rgb(block, x, styles).to(ws.dtype)
            img = rgb if img is None else upsample2d(img, synthesis.filter) + rgb
    if img is None:
        raise UsageError(f"this generator has no picture of resolution {resolution}")
    return img


def eased(t: float) -> float:
    """0 to 1 with a slow beginning and end, for t in [0, 1]."""
    return 0.5 - 0.5 * math.cos(math.pi * t)
