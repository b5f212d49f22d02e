"""Every pair in every format, up to full size: `python tests/campaigns/exports.py [--sizes 64,256,1024] [--only TEXT]`.

Each case writes a snapshot with random weights, exports it as the command line does, which runs the result and compares
it with the generator, and prints the largest difference as a share of the range of the images. The networks have the
channels of the published ones, but for the variants, which are small. The exit code is 1 if an export fails. At the end
there is a line of JSON for each case.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from exporting import snapshot

from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.export.command import export

PAIRS: dict[str, dict[str, Any]] = {
    "stylegan2-skip": {"name": "stylegan2"},
    "stylegan2-resnet": {"name": "stylegan2", "g_architecture": "resnet"},
    "stylegan2-orig": {"name": "stylegan2", "g_architecture": "orig"},
    "stylegan": {"name": "stylegan", "channel_base": 16384},
    "progan": {"name": "progan", "channel_base": 16384},
    "stylegan3-t": {"name": "stylegan3"},
    "stylegan3-r": {"name": "stylegan3", "equivariance": "rotation", "channel_base": 65536, "channel_max": 1024},
    "r3gan": {"name": "r3gan"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "classes": {"classes": 3},
    "vectors": {"vectors": True},
    "grey": {"channels": 1},
    "rgba": {"channels": 4},
    "wide": {"base": [3, 5]},
    "fade": {"fade": True},
    "clamp": {"conv_clamp": 256.0},
    "bf16": {"low_precision": "bf16", "low_precision_resolutions": 2},
}
HOW: dict[str, dict[str, Any]] = {
    "": {},
    "w": {"inputs": "w"},
    "no noise": {"noise": "none"},
    "fp16": {"precision": "fp16"},
}


def cases(sizes: list[int], formats: list[str]) -> Iterator[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """Name, format, arguments of `snapshot`, and options of the export."""
    for size in sizes:
        for pair, given in PAIRS.items():
            for to in formats:
                yield f"{to} {pair} {size}", to, {**given, "resolution": size, "small": False}, {}
    for pair, given in PAIRS.items():
        for variant, more in VARIANTS.items():
            if variant == "fade" and pair.startswith("stylegan3"):
                continue
            for to in formats:
                for word, how in HOW.items():
                    small = {key: value for key, value in given.items() if not key.startswith("channel")}
                    name = " ".join(filter(None, (to, pair, variant, word)))
                    yield name, to, {**small, **more, "resolution": 32}, how


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="64,256,1024", help="of the full networks; empty for none")
    parser.add_argument("--formats", default="onnx,torch,aoti")
    parser.add_argument("--only", default="", help="cases whose name matches this regular expression")
    args = parser.parse_args()
    sizes = [int(size) for size in args.sizes.split(",") if size]
    failed, rows = 0, []
    for name, to, made, how in cases(sizes, args.formats.split(",")):
        if not re.search(args.only, name) or (how.get("inputs") == "w" and made["name"] == "r3gan"):
            continue
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                path = snapshot(Path(folder, "G.safetensors"), **made)
                said = " ".join(export(path, to, **how))
                found = re.search(r"difference from PyTorch: (\S+)", said)
                row: dict[str, Any] = {"case": name, "difference": float(found[1]) if found else None}
            except (UsageError, RunError) as error:
                failed += 1
                row = {"case": name, "failed": str(error)}
        row["seconds"] = round(time.perf_counter() - begin, 1)
        rows.append(row)
        print(f"{name:44} {row.get('difference', row.get('failed'))}  {row['seconds']} s", flush=True)
    for row in rows:
        print(json.dumps(row))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
