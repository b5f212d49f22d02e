"""Does training in bfloat16 converge as in float32? `python benchmarks/convergence.py` trains the demo twice from the
same seed (about twice the demo's ten minutes; --kimg makes it shorter) and prints sliced Wasserstein distances.

`ratio` is the distance in float32 divided by the distance in bfloat16 at the same kimg. It is about 1 if both converge
alike, regardless of their speeds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FACES, DATA = Path("data") / "faces5000-64", Path("data") / "faces64"


def call(*command: str) -> None:
    result = subprocess.run([sys.executable, *command], cwd=ROOT)
    if result.returncode:
        sys.exit(result.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kimg", type=float, default=None, help="images in thousands, default the demo's whole schedule"
    )
    parser.add_argument("--every", type=float, default=2.0, help="kimg between two measurements")
    parser.add_argument("--images", type=int, default=2048, help="for each measurement")
    args = parser.parse_args()
    runs = {precision: Path("runs") / f"convergence-{precision}" for precision in ("fp32", "bf16")}
    if there := [str(run) for run in runs.values() if (ROOT / run).exists()]:
        sys.exit(f"error: {' and '.join(there)} would be continued, not run: remove or rename what is there")
    call("demo/faces.py", str(FACES), "--count", "5000", "--size", "64")
    call("-m", "stylegan_pg", "pack", str(FACES), str(DATA), "--resolution", "64", "--format", "png")
    curves: dict[str, dict[int, float]] = {}
    for precision, run in runs.items():
        overrides = [f"run={run}", f"metrics.every_kimg={args.every}", f"metrics.images={args.images}"]
        overrides += [f"model.low_precision={precision}", "model.low_precision_resolutions=4", f"data.url={DATA}"]
        overrides += [f"train.total_kimg={args.kimg}"] if args.kimg else []
        call("-m", "stylegan_pg", "train", "configs/demo.yaml", *overrides)
        lines = map(json.loads, (ROOT / run / "metrics.jsonl").read_text("utf-8").splitlines())
        curves[precision] = {line["nimg"]: line["swd"] for line in lines}
    print(f"{'kimg':>8} {'fp32':>9} {'bf16':>9} {'ratio':>7}")
    rows = []
    for nimg in sorted(curves["fp32"].keys() & curves["bf16"].keys()):
        full, low = curves["fp32"][nimg], curves["bf16"][nimg]
        rows.append({"case": f"swd {nimg / 1000:g} kimg", "ratio": round(full / low, 3), "fp32": full, "bf16": low})
        print(f"{nimg / 1000:8.1f} {full:9.2f} {low:9.2f} {full / low:7.3f}")
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
