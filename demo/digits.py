"""Pack the handwritten digits that scikit-learn contains: 1,797 real pictures of 8x8 grey pixels, with their classes.

They are enlarged to SIZE x SIZE. Four of five are packed as OUT/train, and the others as OUT/held-out. The digits are
from the UCI repository (E. Alpaydin and C. Kaynak 1998, "Optical Recognition of Handwritten Digits", CC BY 4.0). Usage:
python demo/digits.py OUT --size 32
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

CREDIT = (
    "Digits: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository "
    "(https://doi.org/10.24432/C50P49), licensed under CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/), as "
    "scikit-learn contains them."
)
HELD_OUT = 5  # every fifth picture


def pack_digits(out: Path, size: int, channels: int = 1) -> None:
    """Write OUT/train and OUT/held-out, unless they exist already."""
    from PIL import Image
    from sklearn.datasets import load_digits

    from stylegan_pg import pack

    pictures, classes = load_digits(return_X_y=True)
    for part, held_out in (("train", False), ("held-out", True)):
        if (out / part / "index.json").exists():
            continue
        with tempfile.TemporaryDirectory() as folder:
            for i, (digit, name) in enumerate(zip(pictures.reshape(-1, 8, 8), classes, strict=True)):
                if (i % HELD_OUT == 0) != held_out:
                    continue
                picture = Image.fromarray((digit * 255 / 16).round().astype("uint8"))
                place = Path(folder, str(name), f"{i:04d}.png")
                place.parent.mkdir(exist_ok=True)
                picture.resize((size, size), Image.Resampling.BICUBIC).save(place)
            pack(folder, out / f"{part}.new", resolution=size, channels=channels, format="png", labels="folders",
                 lowest=size, workers=0, progress=False)  # fmt: skip
        shutil.rmtree(out / part, ignore_errors=True)  # which a killed run may have left
        (out / f"{part}.new").rename(out / part)
    (out / "CREDITS.txt").write_text(CREDIT + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=32, help="a power of two, 8 or more")
    args = parser.parse_args()
    pack_digits(args.out, args.size)
    print(CREDIT)


if __name__ == "__main__":
    main()
