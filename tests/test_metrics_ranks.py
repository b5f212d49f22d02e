"""Results of metrics do not depend on the batch size or on the number of ranks."""

import hashlib
import json
from pathlib import Path
from unittest import mock

import harness
import pytest
import torch
from measuring import CPU, Painter, evaluator

from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.loader.reading import read_batch
from stylegan_pg.metrics import base, evaluate
from stylegan_pg.metrics.base import ImageMetric, Settings
from stylegan_pg.metrics.evaluate import DatasetAsGenerator
from stylegan_pg.metrics.neighbours import _nearest, nearest_real


@pytest.mark.usefixtures("_own_cache")
def test_results_do_not_depend_on_the_batch_size(pictures):
    names = "fid60_full,kid60_full,is60,pr603_full,swd60,ms_ssim20,fid60_mirror,fid60_psi0.5"
    first = evaluator(pictures[1], names, extractor="pixels", batch=64)(Painter())
    second = evaluator(pictures[1], names, extractor="pixels", batch=9, cache=False)(Painter())
    assert first.keys() == second.keys()
    assert len(first) == 14
    for name, value in first.items():
        assert second[name] == pytest.approx(value, rel=1e-6), name
    assert first["fid60_psi0.5@pixels"] != pytest.approx(first["fid60_full@pixels"], rel=1e-3)


NAMES = "fid60_full,kid60_full,is60,pr603_full,swd60,ms_ssim20"

RANKS = """
import hashlib, json, sys
sys.path[:0] = [{tests!r}]
from pathlib import Path
from measuring import CPU, Painter, evaluator
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.metrics import base
from stylegan_pg.metrics.command import _draw
from stylegan_pg.metrics.neighbours import nearest_real
base.BLOCK = 8  # every rank gets at least one block
dist.init("cpu")
values = evaluator({data!r}, {names!r}, extractor="pixels", batch=8, cache=False)(Painter())
class Broken(Painter):
    def forward(self, *args, **how):
        if dist.rank() == dist.world() - 1:
            raise MemoryError("out of memory on this rank")
        return super().forward(*args, **how)
try:
    evaluator({data!r}, "swd60")(Broken())
    fault = ""
except Exception as error:
    fault = str(error)
index, settings = load_index({data!r}), base.Settings(CPU, extractor="pixels", batch=8)
picture = nearest_real(Painter(), index, settings, 3, 1.0)
assert (picture is not None) == dist.is_main()
try:
    list(_draw(Painter(), index, settings, [], 2, 1.0, Path({data!r}, "index.json", "below")))
    unwritten = ""
except Exception as error:
    unwritten = str(error)
results = dist.gather_objects((values, fault, unwritten))
assert all(v == results[0][0] for v, *_ in results)
assert all("below cannot be written" in u for *_, u in results), results
if dist.is_main():
    near = hashlib.sha256(picture.numpy().tobytes()).hexdigest()
    print("RESULT", json.dumps([values, [f for _, f, _ in results], near]))
dist.shutdown()
"""


@pytest.mark.distributed
@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_ranks(pictures, tmp_path, monkeypatch):
    """The nearest real images do not depend on it either. A failure on one rank is raised on all ranks."""
    monkeypatch.setattr(base, "BLOCK", 8)  # the same value as in the script
    alone = evaluator(pictures[1], NAMES, extractor="pixels", batch=20, cache=False)(Painter())
    picture = nearest_real(Painter(), load_index(str(pictures[1])), Settings(CPU, extractor="pixels"), 3, 1.0)
    assert picture is not None
    script = tmp_path / "script.py"
    script.write_text(RANKS.format(tests=str(Path(__file__).parent), data=str(pictures[1]), names=NAMES))
    for ranks in (2, 3):
        done = harness.finish(harness.start([], ranks=ranks, script=script))
        line = next((s for s in done.splitlines() if s.startswith("RESULT")), None)
        assert line, done
        values, faults, near = json.loads(line.removeprefix("RESULT"))
        assert near == hashlib.sha256(picture.numpy().tobytes()).hexdigest()
        assert len(faults) == ranks
        assert all("out of memory on this rank" in fault for fault in faults)
        assert values.keys() == alone.keys()
        for name, value in values.items():
            assert value == pytest.approx(alone[name], rel=1e-6), name


def test_nearest_images_are_merged_in_a_fixed_order():
    """Among equal distances the lower ordinals win, no matter how the images were divided into parts."""
    distances = torch.tensor([[3.0, 1.0, 2.0, 1.0, 1.0, 0.5]])
    whole = _nearest([(distances, torch.arange(6)[None])], 4)
    assert [t.tolist() for t in whole] == [[[0.5, 1.0, 1.0, 1.0]], [[5, 1, 3, 4]]]
    for first in ([4, 5, 0], [1], [0, 1, 2, 3, 4, 5]):
        second = [i for i in range(6) if i not in first]
        parts = [_nearest([(distances[:, some], torch.tensor([some]))], 4) for some in (second, first) if some]
        assert [t.tolist() for t in _nearest(parts, 4)] == [t.tolist() for t in whole]


def test_a_measured_dataset_is_sampled_at_random(pictures):
    """A part of a dataset is a random sample, because its first images may all belong to one class."""
    table, seen = load_index(str(pictures[1])).table(64), []
    e = evaluator(pictures[1], "swd20", extractor="pixels", batch=8)

    def read(table, ordinals, bad):
        seen.extend(ordinals)
        return read_batch(table, ordinals, bad)

    with mock.patch.object(evaluate, "read_batch", read):
        e._generate(DatasetAsGenerator(table, 5), [m for m in e.metrics if isinstance(m, ImageMetric)], 1.0, {})
    assert len(set(seen)) == 20
    assert max(seen) > 40
    assert seen == DatasetAsGenerator(table, 5).order[:20]
    assert seen != DatasetAsGenerator(table, 6).order[:20]
    assert sorted(DatasetAsGenerator(table, 5).order) == list(range(64))
