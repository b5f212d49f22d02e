"""A generator as one function of tensors, traced by torch.export with a batch size that stays symbolic.

The function takes its inputs by name and returns images, float32 [N, img_channels, H, W] in about [-1, 1]:

- z [N, z_dim]: latents; or, with `inputs="w"`, ws [N, num_ws, w_dim] instead of z and c.
- c [N, c_dim], of conditional generators: one-hot classes, or vectors.
- psi [], and mask [num_ws]: truncation of the layers where the mask is 1, see `truncated`. A mask that begins with n
  ones and continues with zeros is the cutoff n. Generators without ws have neither.
- With `walk`, also to [N, z_dim], c_to [N, c_dim] and t []: images at t in [0, 1] on the way from (z, c) to (to, c_to),
  linear in w, or on great circles of z where there is no w.

All inputs are float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stylegan_pg.data.classes import class_names, conditions_at, example_conditions
from stylegan_pg.errors import UsageError
from stylegan_pg.networks import NETWORKS
from stylegan_pg.ops import plain_operations
from stylegan_pg.version import __version__

PRECISIONS, INPUTS, NOISE = ("fp32", "fp16"), ("z", "w"), ("const", "none")
FACTS = "stylegan_pg"  # the name of the metadata in exported files


@dataclass(frozen=True)
class Wanted:
    """What a program computes, and how.

    precision: "fp32", or "fp16" for 16 bits in all layers from 8x8 on, with weights and styles that are normalised
    where the networks provide this; the mapping, inputs and images have 32 bits. noise: "const", the noise images of
    the snapshot, or "none".
    """

    inputs: str = "z"
    precision: str = "fp32"
    noise: str = "const"
    walk: bool = False


def rebuilt(G: Any, precision: str) -> Any:
    """The network of a loaded snapshot with its weights, without the checks of its inputs, in another precision.

    Raises:
        UsageError: it has no convolutions that could compute in 16 bits.
    """
    description = G.description
    kwargs = dict(description["kwargs"])
    if "low_precision" not in kwargs:
        if precision != "fp32":
            raise UsageError(
                f"--precision {precision}: the network {description['network']} has no layers for it; take fp32"
            )
    else:
        low = [r for r in G.form.resolutions if r >= 8] if precision == "fp16" else []
        kwargs |= {"low_precision": precision if low else "fp32", "low_precision_at": low}
    network: Any = NETWORKS[description["network"]].G(**kwargs)
    network.load_state_dict(G.state_dict())
    return network.eval().requires_grad_(False)


def default_cutoff(G: Any) -> int:
    """The number of ws that the generator truncates by default."""
    return G.num_ws if G.truncation_cutoff is None else min(G.truncation_cutoff, G.num_ws)


def truncated(ws: torch.Tensor, w_avg: torch.Tensor, psi: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Truncation (Karras et al. 2019, section 2.2) of ws [N, num_ws, w_dim] where mask [num_ws] is 1: w_avg + psi (w -
    w_avg). This form of it leaves ws as they are, bit for bit, where psi is 1 or the mask is 0."""
    return ws + (w_avg - ws) * ((1 - psi) * mask)[:, None]


def between(a: torch.Tensor, b: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """For each row, what inference.generate.between computes: from a [N, d] to b at t [], on great circles."""
    length_a, length_b = (v.norm(dim=1, keepdim=True).clamp(min=1e-12) for v in (a, b))
    u, v = a / length_a, b / length_b
    cosine = (u * v).sum(dim=1, keepdim=True)
    across = v - cosine * u
    across = across / across.norm(dim=1, keepdim=True).clamp(min=1e-12)
    angle = t * cosine.clamp(-1, 1).acos()
    return (u * angle.cos() + across * angle.sin()) * (length_a + t * (length_b - length_a))


class Program(nn.Module):
    """The function. `G` is a network as `rebuilt` returns it; alpha is that of its snapshot."""

    def __init__(self, G: Any, wanted: Wanted, alpha: float):
        super().__init__()
        self.G, self.wanted = G, wanted
        self.styled = hasattr(G, "styles")
        self.how: dict[str, Any] = {"alpha": alpha} if G.description["kwargs"].get("fade") else {}
        if wanted.inputs == "w" and not self.styled:
            raise UsageError("--inputs w: this generator has no ws; take z")

    @property
    def names(self) -> list[str]:
        """The names of the inputs in order."""
        names = ["ws"] if self.wanted.inputs == "w" else ["z", "c"] if self.G.c_dim else ["z"]
        if self.wanted.walk:
            names = [*names, "to", *(["c_to"] if self.G.c_dim else []), "t"]
        return [*names, "psi", "mask"] if self.styled else names

    def shape(self, name: str, batch: Any) -> list[Any]:
        """The shape of an input, which begins with `batch` if each image has its own."""
        G = self.G
        if name == "ws":
            return [batch, G.num_ws, G.w_dim]
        sizes = {"z": [batch, G.z_dim], "to": [batch, G.z_dim], "c": [batch, G.c_dim], "c_to": [batch, G.c_dim]}
        return [G.num_ws] if name == "mask" else sizes.get(name, [])

    def forward(
        self,
        z: torch.Tensor | None = None,
        c: torch.Tensor | None = None,
        ws: torch.Tensor | None = None,
        to: torch.Tensor | None = None,
        c_to: torch.Tensor | None = None,
        t: torch.Tensor | None = None,
        psi: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Images, float32 [N, img_channels, H, W]; those of `names` must be given, and no others."""
        G = self.G
        if not self.styled:
            if to is not None and t is not None:
                z = between(z, to, t)  # type: ignore[arg-type]  # it belongs to the inputs, as `to` does
                c = None if c is None else c + t * (c_to - c)  # type: ignore[operator]  # both or none
            return G(z, c, **self.how).float()
        if ws is None:
            w = G.mapping(z, c)
            if to is not None and t is not None:
                w = w + t * (G.mapping(to, c_to) - w)
            ws = w[:, None].repeat(1, G.num_ws, 1)
        assert ws is not None
        assert psi is not None
        assert mask is not None
        ws = truncated(ws, G.mapping.w_avg, psi, mask)
        return G.synthesis(ws, noise=self.wanted.noise, **self.how).float()

    def facts(self) -> dict[str, Any]:
        """What a user of the exported file needs to know, and the snapshot's description; JSON values."""
        G, description = self.G, self.G.description
        facts = {
            "format": 1,
            "stylegan_pg": __version__,
            "inputs": {name: self.shape(name, "batch") for name in self.names},
            "outputs": {"images": ["batch", G.img_channels, *G.img_size]},
            "range": [-1, 1],
            "precision": self.wanted.precision,
            "noise": self.wanted.noise if has_noise(G) else "none",
        }
        if self.styled:
            n = default_cutoff(G)
            facts["default_mask"] = [1] * n + [0] * (G.num_ws - n)
        if G.c_dim:
            facts["conditions"] = "vectors" if "condition" in description else "classes"
        return {**facts, "description": dict(description)}


def has_noise(G: Any) -> bool:
    """Whether a generator has noise images."""
    return any(name.endswith("noise_const") for name, _ in G.named_buffers())


def program_of(G: Any, wanted: Wanted) -> Program:
    """The function of a loaded snapshot.

    Raises:
        UsageError: the generator does not have what is wanted.
    """
    network = rebuilt(G, wanted.precision)
    network.description = G.description
    return Program(network, wanted, float(G.description["alpha"])).eval()


def example(program: Program, batch: int = 2, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Inputs with random latents."""
    dice = torch.Generator().manual_seed(0)
    found = {name: torch.randn(program.shape(name, batch), generator=dice) for name in program.names}
    found |= {name: torch.tensor(0.5) for name in ("psi", "t") if name in found}
    return {name: t.to(device) for name, t in found.items()}


@torch.no_grad()
def traced(program: Program, device: torch.device | str = "cpu") -> torch.export.ExportedProgram:
    """The function as an exported program of ordinary PyTorch operations, for any batch size from 1 on."""
    program = program.to(device)
    inputs = example(program, device=device)
    batch = torch.export.Dim("batch", min=1)
    shapes = {name: None if name in ("psi", "mask", "t") else {0: batch} for name in inputs}
    with plain_operations():
        return torch.export.export(program, (), inputs, dynamic_shapes=shapes, strict=False)


def conditions(G: Any, count: int) -> torch.Tensor | None:
    """Conditions [count, c_dim] for trials: different classes, or the snapshot's examples; None if G takes none."""
    if not G.c_dim:
        return None
    examples = example_conditions(G)
    known = len(class_names(G)) if examples is None else len(examples)
    return conditions_at(G, [(1 + 3 * i) % known for i in range(count)])
