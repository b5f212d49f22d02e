"""Files of latents that `project` finds, and of directions that `directions` finds: safetensors with a description.

The description is JSON in the header, like that of a snapshot. Before tensors are read, names, shapes and dtypes are
checked against the generator for which the file is to be used. Loading runs no code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stylegan_pg import files
from stylegan_pg.checkpoint import tensor_file
from stylegan_pg.errors import UsageError
from stylegan_pg.inference.generate import writing
from stylegan_pg.untrusted import is_number, parse_json, printable

FORMAT = 1
KEY = "stylegan_pg_latents"  # of the description in the header
MOST_ROWS = 1 << 20
LONGEST_NAME = 200
MOST_DESCRIPTION = 1 << 26
LARGEST_STRENGTH = 1e4  # far beyond useful values
NOISE = "noise/"  # what names of tensors of noise begin with


@dataclass(frozen=True)
class Latents:
    """Latents of n pictures for one generator.

    Attributes:
        names: of the pictures, n of them.
        ws: [n, num_ws, w_dim], or None for a generator without `styles`.
        z: [n, z_dim], or None if the latents were found in w.
        c: conditions [n, c_dim] of a conditional generator, else None.
        noise: {name of a buffer of G.synthesis: [n, H, W]}.
        facts: further JSON values about them, for information.
    """

    names: list[str]
    ws: torch.Tensor | None = None
    z: torch.Tensor | None = None
    c: torch.Tensor | None = None
    noise: dict[str, torch.Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Directions:
    """k directions in w.

    Attributes:
        names: of the directions, k of them, all different.
        vectors: float32 [k, 1, w_dim], or [k, num_ws, w_dim] where they differ from layer to layer; of length 1 each.
        scales: length in w of a step of strength 1, k of them.
        layers: the first layer that a direction changes, and the one after the last; k of them.
        facts: further JSON values about them, for information.
    """

    names: list[str]
    vectors: torch.Tensor
    scales: list[float]
    layers: list[tuple[int, int]]
    facts: dict[str, Any] = field(default_factory=dict)

    def step(self, i: int, num_ws: int) -> torch.Tensor:
        """The change of ws, float32 [num_ws, w_dim], that strength 1 of direction i makes."""
        first, end = self.layers[i]
        inside = torch.zeros([num_ws, 1])
        inside[first:end] = self.scales[i]
        return self.vectors[i] * inside

    def index(self, text: str) -> int:
        """The number of a direction given by its name, or by its number, counted from 0.

        Raises:
            UsageError: there is none; the message lists the names.
        """
        if text in self.names:
            return self.names.index(text)
        if text.isdecimal() and int(text[:9]) < len(self.names):
            return int(text)
        known = ", ".join(self.names[:20]) + (", ..." if len(self.names) > 20 else "")
        raise UsageError(
            f"there is no direction {printable(repr(text), 80)}: give one of {printable(known)}, or a number from 0 to "
            f"{len(self.names) - 1}"
        )


def save_latents(path: Path, latents: Latents) -> None:
    """Write latents atomically. Raises UsageError or RunError if this fails, see generate.writing."""
    tensors = {name: t for name in ("ws", "z", "c") if (t := getattr(latents, name)) is not None}
    tensors |= {NOISE + name: t for name, t in latents.noise.items()}
    _save(path, tensors, {"kind": "latents", "names": latents.names, "facts": latents.facts})


def save_directions(path: Path, directions: Directions) -> None:
    """Write directions atomically. Raises UsageError or RunError if this fails, see generate.writing."""
    described = {"kind": "directions", "names": directions.names, "facts": directions.facts}
    described |= {"scales": directions.scales, "layers": [list(pair) for pair in directions.layers]}
    _save(path, {"directions": directions.vectors}, described)


def _save(path: Path, tensors: Mapping[str, torch.Tensor], described: Mapping[str, Any]) -> None:
    host = {name: t.detach().float().cpu().contiguous() for name, t in tensors.items()}
    text = json.dumps({"format": FORMAT, **described})
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic_write(path, sync=True) as file:
            tensor_file.write(file, host, {KEY: text, "blake2b": tensor_file.digest(host, text)})


def load_latents(path: Path, G: Any) -> Latents:
    """Read latents for a generator; the tensors are on the CPU.

    Raises:
        UsageError: the file does not exist, is damaged, holds something else, or does not fit the generator.
    """

    def expected(described: Mapping[str, Any], entries: Mapping[str, tensor_file.Entry]) -> dict[str, tuple[int, ...]]:
        count, shapes = len(described["names"]), {}
        if hasattr(G, "styles"):
            shapes["ws"] = (count, G.num_ws, G.w_dim)
            buffers = dict(G.synthesis.named_buffers())
            names = (name.removeprefix(NOISE) for name in entries if name.startswith(NOISE))
            shapes |= {NOISE + name: (count, *buffers[name].shape) for name in names if name.endswith("noise_const")}
        if "z" in entries or not shapes:
            shapes["z"] = (count, G.z_dim)
        if G.c_dim:
            shapes["c"] = (count, G.c_dim)
        return shapes

    described, tensors = _load(path, "latents", "stylegan-pg project SNAPSHOT PICTURES", expected)
    noise = {name.removeprefix(NOISE): t for name, t in tensors.items() if name.startswith(NOISE)}
    plain = {name: tensors.get(name) for name in ("ws", "z", "c")}
    return Latents(described["names"], **plain, noise=noise, facts=described["facts"])


def load_directions(path: Path, G: Any) -> Directions:
    """Read directions for a generator; the tensor is on the CPU.

    Raises:
        UsageError: the file does not exist, is damaged, holds something else, or does not fit the generator, which may
            have no w at all.
    """
    if not hasattr(G, "styles"):
        raise UsageError(f"{printable(path)}: directions change w, which this generator does not have")

    def expected(described: Mapping[str, Any], entries: Mapping[str, tensor_file.Entry]) -> dict[str, tuple[int, ...]]:
        count, scales, layers = len(described["names"]), described["scales"], described["layers"]
        if len(set(described["names"])) < count:
            raise ValueError("two of its directions have the same name")
        if not isinstance(scales, list) or len(scales) != count or not all(is_number(x, -1e9, 1e9) for x in scales):
            raise ValueError("its scales are no numbers, one for each direction")
        if not isinstance(layers, list) or len(layers) != count or not all(_is_range(x, G.num_ws) for x in layers):
            raise ValueError(f"its layers are no ranges within the {G.num_ws} layers of this generator")
        rows = entries["directions"].shape[1:2]
        return {"directions": (count, G.num_ws if rows == (G.num_ws,) else 1, G.w_dim)}

    described, tensors = _load(path, "directions", "stylegan-pg directions SNAPSHOT", expected)
    layers = [(first, end) for first, end in described["layers"]]
    scales = [float(scale) for scale in described["scales"]]
    return Directions(described["names"], tensors["directions"], scales, layers, described["facts"])


def _is_range(value: Any, most: int) -> bool:
    whole = isinstance(value, list) and len(value) == 2 and all(type(x) is int for x in value)
    return whole and 0 <= value[0] < value[1] <= most


def _load(path: Path, kind: str, made_by: str, expected: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read and check a file of a kind.

    Args:
        expected: a function of the description and the entries of the header that returns the expected shapes by name.
            It may raise ValueError or KeyError if they are unfit.
    """
    remedy = f"give a file that `{made_by}` has written for this generator"
    try:
        with tensor_file.opened(path) as file:
            text = file.metadata.get(KEY)
            if text is None:
                raise UsageError(f"{printable(path)} holds no {kind}: {remedy}")
            described = _described(path, text, kind, remedy)
            _check_entries(expected(described, file.entries), file.entries)
            tensors = file.read()
            if file.metadata.get("blake2b") != tensor_file.digest(tensors, text):
                raise tensor_file.BadFileError("its checksum does not match, it was damaged")
    except FileNotFoundError:
        raise UsageError(f"{printable(path)}: no such file; {remedy}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{printable(path)} does not fit this generator: {printable(error)}; {remedy}") from None
    except (tensor_file.BadFileError, OSError) as error:
        raise UsageError(f"{printable(path)} holds no {kind} ({printable(error)}): {remedy}") from None
    if not all(bool(t.isfinite().all()) for t in tensors.values()):
        raise UsageError(f"{printable(path)} holds numbers that are not finite: {remedy}")
    return described, {name: t.float() for name, t in tensors.items()}


def _described(path: Path, text: str, kind: str, remedy: str) -> dict[str, Any]:
    described = parse_json(text, f"{printable(path)}: its description", remedy, max_bytes=MOST_DESCRIPTION)
    if not isinstance(described, dict) or described.get("kind") != kind:
        raise UsageError(f"{printable(path)} holds no {kind}: {remedy}")
    if described.get("format") != FORMAT:
        version = printable(described.get("format"), 40)
        raise UsageError(f"{printable(path)} is of format {version}, this version reads {FORMAT}: update stylegan-pg")
    names = described.get("names")
    if not isinstance(names, list) or not 0 < len(names) <= MOST_ROWS:
        raise UsageError(f"{printable(path)} names none of its {kind}, or too many: {remedy}")
    if not all(isinstance(name, str) and 0 < len(name) <= LONGEST_NAME for name in names):
        raise UsageError(f"{printable(path)} has names that are no short texts: {remedy}")
    return {**described, "facts": described["facts"] if isinstance(described.get("facts"), dict) else {}}


def _check_entries(expected: Mapping[str, tuple[int, ...]], entries: Mapping[str, tensor_file.Entry]) -> None:
    for name in sorted(expected.keys() | entries.keys()):
        if name not in entries:
            raise ValueError(f"it lacks {name}")
        if name not in expected:
            raise ValueError(f"it holds {printable(name, 80)}, which this generator does not have")
        found = entries[name]
        if found.shape != expected[name] or not found.dtype.is_floating_point:
            wanted = f"numbers of {list(expected[name])}"
            raise ValueError(f"{name} is {found.dtype} {list(found.shape)} where {wanted} are expected")


class Moved(nn.Module):
    """A generator whose ws are moved by a constant; everything else is as in the generator itself."""

    def __init__(self, G: Any, offset: torch.Tensor):
        """offset: [num_ws, w_dim]."""
        super().__init__()
        self.G = G
        self.register_buffer("offset", offset.to(next(G.parameters())))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("G"), name)

    def styles(self, *inputs: Any, **how: Any) -> torch.Tensor:
        """See growing.Generator.styles. Truncation comes first, so that it does not shorten the movement."""
        return self.G.styles(*inputs, **how) + self.offset

    def forward(
        self, z: torch.Tensor, c: torch.Tensor | None = None, *, psi: float = 1.0, cutoff: int | None = None, **how: Any
    ) -> torch.Tensor:
        alpha = getattr(self.G, "description", {}).get("alpha", 1.0)
        return self.G.synthesis(self.styles(z, c, psi=psi, cutoff=cutoff), **{"alpha": alpha, **how})


def parse_directions(texts: Sequence[str], strengths: Sequence[float], G: Any) -> torch.Tensor:
    """The change of ws, float32 [num_ws, w_dim], for directions given as FILE, FILE#NAME or FILE#NUMBER.

    Args:
        texts: the directions, whose changes are added up. Without a name, the first one of the file is taken.
        strengths: of each; one for all if there is only one.
        G: the generator.

    Raises:
        UsageError: as load_directions; or the numbers of texts and strengths differ, or strengths are too large.
    """
    if len(strengths) == 1:
        strengths = [*strengths] * len(texts)
    if len(strengths) != len(texts):
        raise UsageError(f"{len(texts)} directions and {len(strengths)} strengths: give one --strength for each")
    total = None
    for text, strength in zip(texts, strengths, strict=True):
        if not (math.isfinite(strength) and abs(strength) <= LARGEST_STRENGTH):
            raise UsageError(f"--strength {strength} is not possible: give a number such as 2 or -1.5")
        path, _, which = (text, "", "") if "#" not in text or Path(text).is_file() else text.rpartition("#")
        directions = load_directions(Path(path), G)
        step = strength * directions.step(directions.index(which) if which else 0, G.num_ws)
        total = step if total is None else total + step
    assert total is not None, "texts are not empty"
    return total
