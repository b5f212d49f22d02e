"""Rows about what codes, styles and texts hold: scrubber, can, wgan-gp text."""

from __future__ import annotations

import io
import json
import math
import random
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn

from rows import digits
from rows.trial import DATA, Check, Measured, Row, samples, sheet, trained
from stylegan_pg import pack
from stylegan_pg.config.loading import load_config
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.inference.texts import texts_of
from stylegan_pg.metrics.ngrams import distinct_share, ngram_divergence
from stylegan_pg.rng import generator
from stylegan_pg.systems.base import Context, Values
from stylegan_pg.systems.can import CAN, entropy
from stylegan_pg.systems.latents import Latents

# --- scrubber -------------------------------------------------------------------------------------------------------

LEAK, KEPT = Check("fresh classifier", 0.35, at_most=True), Check("R2 of ink", 0.8)


def fresh_classifier(codes: torch.Tensor, classes: torch.Tensor, held: torch.Tensor, truth: torch.Tensor) -> float:
    """The share of the held-out codes whose class a classifier finds that is trained on codes alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(codes.shape[1], 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
        net.append(nn.Linear(256, 10))
        optimizer = torch.optim.Adam(net.parameters(), 1e-3, weight_decay=1e-4)
        for _ in range(60):
            for part in torch.randperm(len(codes)).split(64):
                loss = F.cross_entropy(net(codes[part]), classes[part])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return float((net(held).argmax(dim=1) == truth).float().mean())


def r_squared(codes: torch.Tensor, values: torch.Tensor, held: torch.Tensor, truth: torch.Tensor) -> float:
    """R^2 on held-out codes of a linear regression of values [n] from codes [n, d]."""
    a, b = (torch.cat([c.double(), torch.ones(len(c), 1, dtype=torch.float64)], dim=1) for c in (codes, held))
    weights = torch.linalg.solve(a.T @ a + 1e-3 * torch.eye(a.shape[1]), a.T @ values.double())
    return float(1 - (b @ weights - truth.double()).square().mean() / truth.double().var(correction=0))


def scrubber(seed: int, folder: Path, off: bool) -> Measured:
    """Codes of digits without the digit, but with its ink. Off: the inspector's gradient is not reversed."""
    given = [f"data.url={digits.packed() / 'train'}", f"seed={seed}", *(["system.removal_weight=0"] if off else [])]
    G = trained("systems/scrubber", given, folder / "run").state.G_ema
    images, classes = digits.real("train")
    held, truth = digits.real("held-out")
    with torch.no_grad():
        codes, theirs = G.encode(images), G.encode(held)
        each = G(theirs[:8].repeat_interleave(10, dim=0), torch.eye(10).repeat(8, 1))
    ink = [part.mean(dim=[1, 2, 3]) for part in (images, held)]
    values = {
        LEAK.name: fresh_classifier(codes, classes, theirs, truth),
        KEPT.name: r_squared(codes, ink[0], theirs, ink[1]),
    }
    pictures = torch.cat([torch.cat([held[i : i + 1], each[10 * i : 10 * i + 10]]) for i in range(8)])
    return Measured(values, picture=sheet(pictures, columns=22))


# --- can ------------------------------------------------------------------------------------------------------------

STYLES = ("adventurer", "avataaars", "big-ears", "bottts", "fun-emoji", "micah", "pixel-art", "toon-head")
DRAWINGS, SIDE = 2400, 32
AMBIGUOUS, KNOWN = Check("H samples / ln K", 0.4), Check("H real / ln K", 0.1, at_most=True)


def drawings() -> Path:
    """A packed dataset of drawings whose class is their style."""
    out = DATA / f"styles{SIDE}"
    if (out / "index.json").exists():
        return out
    import resvg_py
    from dicebear import Avatar, Style

    pictures, credits = DATA / f"styles{SIDE}.pictures", []
    for name in STYLES:
        description = json.loads(files("dicebear_styles").joinpath(f"{name}.json").read_text("utf-8"))
        style, place, meta = Style(description), pictures / name, description["meta"]
        place.mkdir(parents=True, exist_ok=True)
        credits.append(f"{name}: {meta['source']['name']} by {meta['creator']['name']}, {meta['license']['name']}")
        for i in range(DRAWINGS // len(STYLES)):
            how = {"seed": f"{name}-{i}", "backgroundColor": ["ffffff"]}
            svg = Avatar(style, how).to_string()
            png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * SIDE, height=2 * SIDE, skip_system_fonts=True)
            Image.open(io.BytesIO(bytes(png))).convert("RGB").reduce(2).save(place / f"{i:04d}.png")
    new = DATA / f"styles{SIDE}.new"
    pack(pictures, new, resolution=SIDE, labels="folders", format="png", lowest=SIDE, workers=1, progress=False)
    (new / "CREDITS.txt").write_text("\n".join(credits) + "\n", "utf-8")
    new.rename(out)
    shutil.rmtree(pictures)
    return out


class Certain(CAN):
    """CAN the other way round, as AC-GAN has it: G makes pictures whose style D is certain of."""

    def generator_heads(self, x: Context, latents: Latents, fake: Any) -> Values:
        loss = F.cross_entropy(fake.styles, fake.styles.argmax(dim=1), reduction="none")
        return {"loss": loss, "ambiguity": loss}


def can(seed: int, folder: Path, off: bool) -> Measured:
    """Pictures whose style D cannot tell. Off: G asks for a style instead."""
    url = drawings()
    given = [f"data.url={url}", f"seed={seed}"]
    system = Certain(load_config("systems/can", given)) if off else None
    trainer = trained("systems/can", given, folder / "run", system=system)
    state, index = trainer.state, load_index(str(url))
    table, chosen = index.table(SIDE), torch.randperm(index.count, generator=generator(seed, "real pictures"))[:512]
    real = torch.from_numpy(np.stack([table.image(int(i)) for i in chosen])).float() / 127.5 - 1
    made = samples(trainer, 512, seed)
    with torch.no_grad():  # in batches as in training, whose statistics D normalises by
        of_real, of_made = (
            torch.cat([entropy(state.D(part).styles) for part in images.split(state.current.batch)])
            for images in (real, made)
        )
    values = {AMBIGUOUS.name: float(of_made.mean()), KNOWN.name: float(of_real.mean())}
    return Measured(
        {name: value / math.log(len(STYLES)) for name, value in values.items()}, picture=sheet(made[:64], columns=32)
    )


# --- wgan-gp text ---------------------------------------------------------------------------------------------------

CAPTIONS, GENERATED, LENGTH = 5000, 1000, 40
SIMILAR, DISTINCT = Check("4-gram JS", 0.55, at_most=True), Check("distinct", 0.9)


def caption(dice: random.Random) -> str:
    """A sentence about a person, of five attributes."""
    age, who = dice.choice(["old", "young", "tall", "small"]), dice.choice(["woman", "man", "girl", "boy"])
    colour = dice.choice(["red", "black", "brown", "blond", "grey", "white", "green", "blue"])
    what = dice.choice(["hair", "hat", "scarf", "coat", "eyes", "shirt"])
    mood = dice.choice(["smiling", "laughing", "frowning", "yawning", "singing"])
    return f"{age} {who} with {colour} {what}, {mood}"


def captions(folder: Path) -> Path:
    """A packed dataset of tiny pictures with captions."""
    dice = random.Random(0)
    (folder / "pictures").mkdir()
    texts = {f"{i:05d}.png": caption(dice) for i in range(CAPTIONS)}
    for name in texts:
        Image.new("L", (4, 4)).save(folder / "pictures" / name)
    (folder / "captions.json").write_text(json.dumps(texts), "utf-8")
    pack(folder / "pictures", folder / "captions", resolution=4, channels=1, format="png",
         captions=folder / "captions.json", workers=1, progress=False)  # fmt: skip
    return folder / "captions"


def text(seed: int, folder: Path, off: bool) -> Measured:
    """Captions, character by character. Off: the critic's gradient is not penalised."""
    given = [f"data.url={captions(folder)}", f"seed={seed}", "resolution=4", f"model.length={LENGTH}"]
    trainer = trained("systems/text", given + (["loss.terms=[]"] if off else []), folder / "run")
    G = trainer.state.G_ema
    z = torch.randn([GENERATED, G.z_dim], generator=generator(seed, "samples of a row"))
    made, dice = texts_of(G, z), random.Random(1)
    values = {SIMILAR.name: ngram_divergence(made, [caption(dice) for _ in range(5000)])}
    dice = random.Random(2)
    values[DISTINCT.name] = distinct_share(made) / distinct_share([caption(dice) for _ in range(GENERATED)])
    return Measured(values, {"examples": made[:4]}, written(made[:8]))


def written(lines: list[str], width: int = 1024, height: int = 14) -> np.ndarray:
    """Texts as a picture, uint8 [H, W, 3]."""
    picture = Image.new("RGB", (width, height * -(-len(lines) // 2)), "white")
    for i, line in enumerate(lines):
        ImageDraw.Draw(picture).text((4 + i % 2 * width // 2, i // 2 * height), line, fill="black")
    return np.asarray(picture)


ROWS = [
    Row("scrubber", scrubber, [LEAK, KEPT], off="the inspector's gradient is not reversed"),
    Row("can", can, [AMBIGUOUS, KNOWN], off="G asks for a style that D is certain of, as in AC-GAN"),
    Row("wgan-gp text", text, [SIMILAR, DISTINCT], off="the critic's gradient is not penalised"),
]
