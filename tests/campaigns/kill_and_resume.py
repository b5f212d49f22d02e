"""A long campaign of kills: `python tests/campaigns/kill_and_resume.py [ROUNDS]`, a few minutes a round.

Each round trains a tiny growing run to its end under SIGKILLs at random steps and compares all it leaves (weights,
EMA, optimisers, logs, pictures) with an uninterrupted run, bit for bit. CI runs one such round.
"""

import random
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness

from stylegan_pg.data.pack import pack


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        (base / "pictures").mkdir()
        dice = np.random.default_rng(0)
        for i in range(96):
            Image.fromarray(dice.integers(0, 256, [32, 32, 3], dtype=np.uint8)).save(base / "pictures" / f"{i}.png")
        pack(str(base / "pictures"), base / "data", resolution=32, format="png", workers=0, progress=False)
        whole = base / "whole"
        harness.finish(harness.start(harness.arguments(whole, base / "data")))
        total = 0
        for i in range(rounds):
            run = base / f"round{i}"
            kills = harness.kill_until_done(harness.arguments(run, base / "data"), run, random.Random(i))
            harness.assert_same_run(run, whole)
            total += kills
            print(f"round {i + 1} of {rounds}: {kills} kills, {total} in all, all the same", flush=True)


if __name__ == "__main__":
    main()
