"""A folder that can be uploaded to a model hub as it is: the snapshot, a model card, a sample grid and config.json."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from stylegan_pg.checkpoint.names import kimg
from stylegan_pg.checkpoint.snapshot import load_snapshot
from stylegan_pg.data.classes import class_names
from stylegan_pg.errors import RunError
from stylegan_pg.images import name_rows, over_white, save_image, tile
from stylegan_pg.inference.generate import grid_inputs, images_of
from stylegan_pg.untrusted import is_number, json_lines

SNAPSHOT, CARD, CONFIG, GRID = "model.safetensors", "README.md", "config.json", "samples.png"
NAMES = {
    "stylegan2": "StyleGAN2",
    "stylegan": "StyleGAN",
    "progan": "Progressive GAN",
    "stylegan3": "StyleGAN3",
    "r3gan": "R3GAN",
    "dcgan": "DCGAN",
    "srresnet": "SRResNet",
    "began": "BEGAN",
    "ddgan": "denoising diffusion GAN",
    "ddgan_mlp": "denoising diffusion GAN for points",
    "mlp": "multi-layer perceptrons",
    "codes": "an encoder and a decoder",
    "chars": "residual convolutions over characters",
}
PAPERS = {
    "stylegan2": "1912.04958",
    "stylegan": "1812.04948",
    "progan": "1710.10196",
    "stylegan3": "2106.12423",
    "r3gan": "2501.05441",
    "dcgan": "1511.06434",
    "began": "1703.10717",
    "ddgan": "2112.07804",
}
FACTS = ("nimg", "resolution", "images", "seconds")  # of a line in metrics.jsonl, beside the metrics
PSI = 0.7
INTENDED = (
    "Research, teaching and artistic work with generated pictures. The pictures imitate the training data with its "
    "gaps and biases, and may resemble single pictures of it. Do not present them as photographs of real people or "
    "events, and do not use them to deceive, defame or impersonate."
)


def recorded_metrics(snapshot: Path, nimg: int) -> dict[str, float]:
    """The metrics that the run around a snapshot, RUN/snapshots/FILE, has recorded at its nimg; {} if there are none.
    Of several measurements the last one counts."""
    found: dict[str, float] = {}
    for folder in snapshot.resolve().parents[:2]:
        path = folder / "metrics.jsonl"
        if not path.is_file():
            continue
        try:
            for _, row in json_lines(path):
                if row["nimg"] == nimg:
                    found |= {k: v for k, v in row.items() if k not in FACTS and is_number(v, -1e30, 1e30)}
        except OSError:
            continue
        return found
    return {}


def write(G: Any, snapshot: Path, folder: Path, *, title: str, licence: str, batch: int = 8) -> None:
    """Write the folder of a loaded snapshot.

    Args:
        G: the loaded snapshot. snapshot: its file, which is copied byte for byte.
        folder: is created.
        title: of the model card. licence: an identifier of the hub, such as cc-by-4.0.

    Raises:
        RunError: the generator makes images that are not finite. OSError: as of files.
    """
    folder.mkdir()
    shutil.copyfile(snapshot, folder / SNAPSHOT)
    description = G.description
    (folder / CONFIG).write_text(
        json.dumps({"model_type": "stylegan_pg", **description}, indent=1) + "\n", encoding="utf-8"
    )
    pictured = G.img_channels in (1, 3, 4)
    if pictured:
        _grid(G, folder / GRID, batch)
    metrics = recorded_metrics(snapshot, description.get("nimg", -1))
    card = _card(G, title, licence, metrics, snapshot.stem, pictured)
    (folder / CARD).write_text(card, encoding="utf-8", errors="backslashreplace")


def _grid(G: Any, path: Path, batch: int) -> None:
    """A sample grid; a row for each class, or for an even selection of many."""
    height, width = G.img_size
    columns, rows = min(max(2048 // width, 2), 8), min(max(1024 // height, 2), 8)
    names = class_names(G)
    chosen = list(range(len(names))) if len(names) <= rows else [i * len(names) // rows for i in range(rows)]
    if chosen:
        rows = len(chosen)
    if "condition" in G.description:
        examples = torch.tensor(G.description["conditions"], dtype=torch.float32)
        z, c = grid_inputs(G, columns, rows)[0], examples[chosen].repeat_interleave(columns, 0)
    else:
        z, c = grid_inputs(G, columns, rows, chosen)
    how = {"psi": PSI} if hasattr(G, "styles") else {}
    picture = over_white(tile(torch.cat(list(images_of(G, z, c, batch=batch, **how))), columns)[None])[0]
    save_image(name_rows(picture, [names[k] for k in chosen]) if chosen else picture, path)


def _plain(text: str) -> str:
    """A text that cannot change the layout of Markdown around it."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(text.split()))


def _last_part(url: str) -> str:
    """The name of a dataset, without the folders or the server where it lies."""
    return url.rstrip("/").rsplit("/", 1)[-1].partition("?")[0]


def _card(G: Any, title: str, licence: str, metrics: dict[str, float], stem: str, pictured: bool) -> str:
    description, config = G.description, G.description.get("config") or {}
    data = config.get("data") or {} if isinstance(config, dict) else {}
    network = description["network"]
    names = [] if "condition" in description else class_names(G)
    url = str(data.get("url") or "")
    dataset = _last_part(url) or ("a mixture" if data.get("mixture") else "unknown")
    task = "unconditional-image-generation"
    front: dict[str, Any] = {
        "license": licence or "unknown",
        "library_name": "stylegan_pg",
        "pipeline_tag": task,
        "tags": ["gan", "image-generation", network, *(["conditional"] if G.c_dim else [])],
    }
    if metrics:
        results = [{"type": name, "name": name, "value": value} for name, value in metrics.items()]
        where = {"name": dataset, "type": dataset}
        front["model-index"] = [
            {"name": title, "results": [{"task": {"type": task}, "dataset": where, "metrics": results}]}
        ]
    rows, columns = G.img_size
    nimg = description.get("nimg")
    facts = [
        ("Network", NAMES.get(network, network)),
        ("Images", f"{columns}x{rows}, {G.img_channels} channels"),
        ("Conditions", _conditions(G, names)),
        ("Trained on", f"{dataset}" + (", mirrored" if data.get("mirror") else "")),
        ("Images shown to the discriminator", "unknown" if nimg is None else f"{kimg(nimg)} thousand"),
        ("Parameters", f"{sum(p.numel() for p in G.parameters()):,}"),
    ]
    if description["kwargs"].get("fade"):
        facts.append(("Fade", f"within a fade between resolutions, alpha {description['alpha']:.3f}"))
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---\n",
        f"# {_plain(title)}\n",
        f"A generator of pictures ({NAMES.get(network, network)}), trained with stylegan_pg.\n",
        f"![Samples]({GRID})\n" if pictured else "",
        "| | |\n|---|---|\n" + "".join(f"| {name} | {_plain(value)} |\n" for name, value in facts),
        "## Use\n\n```python\nimport torch, stylegan_pg\n\n"
        f'G = stylegan_pg.load_snapshot("{SNAPSHOT}")\n'
        f"images = G(torch.randn(4, G.z_dim){_call(G)})  # [4, {G.img_channels}, {rows}, {columns}] in about [-1, 1]\n"
        "```\n\nThe file holds tensors and a description in JSON. Loading it runs no code.\n",
        f"## Intended use\n\n{INTENDED}\n",
        "## Training\n\n" + _training(config),
        "## Metrics\n\n" + _metrics(metrics),
        "## Licence\n\n" + (f"{_plain(licence)}\n" if licence else "Not stated yet: set `license` at the top.\n"),
    ]
    if network in PAPERS:
        parts.append(f"## Reference\n\n{NAMES[network]}: https://arxiv.org/abs/{PAPERS[network]}\n")
    return "\n".join(part for part in parts if part)


def _conditions(G: Any, names: list[str]) -> str:
    if not G.c_dim:
        return "none"
    if "condition" in G.description:
        return f"vectors of {G.c_dim} numbers ({G.description['condition']})"
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"{G.c_dim} classes: {shown}"


def _call(G: Any) -> str:
    if not G.c_dim:
        return ", psi=0.7" if hasattr(G, "styles") else ""
    c = "torch.zeros(4, G.c_dim)" if "condition" in G.description else "0"
    return f", {c}" + (", psi=0.7" if hasattr(G, "styles") else "")


def _training(config: Any) -> str:
    if not isinstance(config, dict) or not config:
        return "The configuration is not recorded in the snapshot.\n"
    kept = {key: config[key] for key in ("resolution", "seed", "model", "growth", "optim", "loss", "augment", "ema")
            if key in config}  # fmt: skip
    text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True).replace("```", "'''")
    which = f"The configuration, as far as it concerns networks and losses (all of it is in {CONFIG})"
    return f"{which}:\n\n```yaml\n{text}```\n"


def _metrics(metrics: dict[str, float]) -> str:
    if not metrics:
        return "None are recorded for this snapshot.\n"
    rows = "".join(f"| {_plain(name)} | {value:.4g} |\n" for name, value in metrics.items())
    return f"| metric | value |\n|---|---|\n{rows}"


@torch.no_grad()
def check(G: Any, folder: Path) -> None:
    """Read the folder back: its snapshot must make the same images, and its card and config.json must be readable.

    Raises:
        RunError: something is wrong.
    """
    again = load_snapshot(folder / SNAPSHOT)
    if again.description != G.description or any(
        not torch.equal(t, again.state_dict()[name]) for name, t in G.state_dict().items()
    ):
        raise RunError(f"{folder.name}/{SNAPSHOT} differs from the snapshot when it is read back, and was removed")
    text = (folder / CARD).read_text("utf-8")
    front = yaml.safe_load(text.split("---\n")[1])
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    if not front.get("license") or config.get("network") != G.description["network"]:
        raise RunError(f"{folder.name} cannot be read back, and was removed")
