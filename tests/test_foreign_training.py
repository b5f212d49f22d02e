"""Training on a mixture of tars that webdataset wrote and a packed dataset, from the command line."""

import json
import random
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
import simplejpeg
import webdataset
from PIL import Image


@pytest.fixture
def tars(tmp_path) -> Path:
    """40 JPEGs of several sizes in four shards, with classes "0" to "2". One of them is damaged."""
    folder, rng = tmp_path / "tars", np.random.default_rng(0)
    folder.mkdir()
    writing: Any = webdataset  # which exports its names without types
    with writing.ShardWriter(str(folder / "a-%03d.tar"), maxcount=10, verbose=0) as writer:
        for i in range(40):
            small = Image.fromarray(rng.integers(0, 256, [4, 4, 3], dtype=np.uint8))
            pixels = np.asarray(small.resize((16 + 8 * (i % 3), 20), Image.Resampling.BICUBIC))
            data = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 95, "RGB", "444")
            writer.write({"__key__": f"{i:04d}", "jpg": data[: len(data) // (2 if i == 7 else 1)], "cls": i % 3})
    return folder


@pytest.mark.slow
@pytest.mark.distributed
def test_a_mixture_with_foreign_tars(tiny_data, tars, tmp_path):
    """A run on one rank is killed several times, with decoding processes. It ends with the weights of an undisturbed
    run, and reports the damaged picture once. On two ranks the same pictures are used."""
    before = {p.name: p.read_bytes() for p in tars.iterdir()}
    changes = {"data__url": "''", "data__mixture": f'{{"{tars}/a-{{000..003}}.tar": 1, "{tiny_data}": 2}}'}
    changes |= {"data__conditional": "true", "growth__stable_kimg": 0.064, "data__max_bad_share": 0.1}
    whole, killed, ranks = (tmp_path / name for name in ("whole", "killed", "ranks"))
    output = harness.finish(harness.start(harness.arguments(whole, tiny_data, **changes)))
    assert output.count("replaced a corrupt picture") >= 1
    args = harness.arguments(killed, tiny_data, **(changes | {"data__workers": 2}))
    assert harness.kill_until_done(args, killed, random.Random(0), most=2) == 2
    harness.assert_same_run(killed, whole)
    faults = [json.loads(line) for line in (whole / "data-faults.jsonl").read_text().splitlines()]
    assert {(f["kind"], f["source"][-6:]) for f in faults} == {("decode", ": 0007")}
    assert len({f["resolution"] for f in faults}) == len(faults) <= 2  # once for each resolution
    assert {p.name: p.read_bytes() for p in tars.iterdir()} == before  # nothing is written beside the tars

    harness.finish(harness.start(harness.arguments(ranks, tiny_data, **changes), ranks=2))
    reals = [(line["score_real"], line["nimg"]) for line in harness.stats(whole)][:1]
    assert reals == [(pytest.approx(line["score_real"], abs=1e-4), line["nimg"]) for line in harness.stats(ranks)][:1]
    assert harness.newest(ranks)[0]["G/mapping.embed.weight"].shape[1] == 6  # "0" to "2" and "a" to "c"
