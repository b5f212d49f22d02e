"""Draw a folder of cartoon faces. They are the demo's training set and are drawn here, so that nothing is downloaded.

The drawings are "ToonHead" by Johan Melin (CC BY 4.0), combined by DiceBear from a seed. The same seed always gives the
same face. Usage: python demo/faces.py OUT --count 5000 --size 64
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib.resources import files
from pathlib import Path

STYLE = "toon-head"
# The faces are simple enough to be learnt in minutes at 64x64, but varied enough that thousands rarely repeat: large
# heads with shoulders, distinct colours of skin, hair and background, mostly open eyes, and mouths that are visible on
# any skin, without beards, which would hide them.
OPTIONS = {
    "scale": 1.05,
    "backgroundColor": ["8ecae6", "fdf0c4", "95d5b2", "f4a6b0", "cdb4f6"],
    "skinColor": ["99673f", "b07a52", "dda582", "f5cfb3"],
    "hairColor": ["231815", "5a3220", "b5562a", "e0b95f"],
    "clothesColor": ["1d4ed8", "15803d", "f97316", "db2777", "6d28d9", "b91c1c", "f1f5f9", "334155"],
    "hairVariant": {"sideComed": 3, "spiky": 3, "undercut": 3, "bun": 2},
    "rearHairProbability": 50,
    "beardProbability": 0,
    "eyesVariant": {"wide": 4, "happy": 1},
    "eyebrowsVariant": {"neutral": 2, "raised": 1, "sad": 1},
    "mouthVariant": {"laugh": 4, "angry": 3, "agape": 2},
}
SUPERSAMPLING = 2


def load_style():
    """Return the drawing parts of the style. If the demo's packages are missing, exit with a message."""
    try:
        from dicebear import Style
    except ImportError:
        sys.exit("error: the demo's packages are missing: pip install 'stylegan-pg[demo]'")
    return Style(_description())


def _description() -> dict:
    return json.loads(files("dicebear_styles").joinpath(f"{STYLE}.json").read_text("utf-8"))


@functools.cache
def _style():
    return load_style()


def render(seed: str, size: int):
    """Return one face as an RGB Pillow image of size x size, scaled down from a larger drawing."""
    import resvg_py
    from dicebear import Avatar
    from PIL import Image

    svg = Avatar(_style(), {**OPTIONS, "seed": seed}).to_string()
    large = size * SUPERSAMPLING
    png = resvg_py.svg_to_bytes(svg_string=svg, width=large, height=large, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png)), formats=("PNG",)).convert("RGB").reduce(SUPERSAMPLING)


def _write(task: tuple[str, int, int, Path]) -> None:
    prefix, number, size, folder = task
    path = folder / f"{number:06d}.png"
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        render(f"{prefix}-{number}", size).save(temporary, format="PNG")
        temporary.replace(path)  # a killed run leaves only complete files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--seed", default="0", help="seed of the faces")
    parser.add_argument("--workers", type=int, default=None)
    args = parser.parse_args()
    load_style()
    args.out.mkdir(parents=True, exist_ok=True)
    note, how = args.out / ".options", json.dumps([OPTIONS, args.size, args.seed], sort_keys=True)
    if any(args.out.glob("*.png")) and (not note.is_file() or note.read_text("utf-8") != how):
        sys.exit(f"error: {args.out} holds faces that were drawn otherwise: remove it and what was packed from it")
    note.write_text(how, "utf-8")
    meta = _description()["meta"]
    credit = (
        f"Faces: {meta['source']['name']} by {meta['creator']['name']} ({meta['source']['url']}), licensed under "
        f"{meta['license']['name']} ({meta['license']['url']}), drawn by DiceBear."
    )
    (args.out / "CREDITS.txt").write_text(credit + "\n", "utf-8")
    print(credit)
    from tqdm import tqdm

    tasks = [(args.seed, i, args.size, args.out) for i in range(args.count)]
    with ProcessPoolExecutor(args.workers) as pool:
        for _ in tqdm(pool.map(_write, tasks, chunksize=50), total=len(tasks), desc="faces", unit="img"):
            pass


if __name__ == "__main__":
    main()
