"""Metrics as a whole: against torch-fidelity's command line, over ranks and batches, and with bad input."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import harness
import numpy as np
import pytest
import torch
from measuring import CPU, Painter, evaluator, fidelity, packed, paint, random_vgg16
from packing import encoded, tar_of
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from stylegan_pg.checkpoint.snapshot import load_snapshot
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.loader.reading import read_batch
from stylegan_pg.errors import UsageError
from stylegan_pg.metrics import base, classifiers, evaluate, features, real_cache
from stylegan_pg.metrics.base import COUNT, FeatureMetric, ImageMetric, Tools
from stylegan_pg.metrics.evaluate import Evaluator, Pictures
from stylegan_pg.metrics.lpips import LPIPS
from stylegan_pg.metrics.neighbours import _nearest, nearest_real
from stylegan_pg.metrics.real import RealSide
from stylegan_pg.metrics.registry import METRICS, parse
from stylegan_pg.metrics.weights import WEIGHTS, sha256


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fid50k_full", ("fid", 50_000, True, False, 1)),
        ("fid50k", ("fid", 50_000, False, False, 1)),
        ("kid128_full_mirror_psi0.5", ("kid", 128, True, True, 0.5)),
        ("pr50k3_full", ("pr", 50_000, True, False, 1)),
        ("pr2563", ("pr", 256, False, False, 1)),
        ("is10k", ("is", 10_000, False, False, 1)),
        ("ppl2_wend", ("ppl2", 50_000, False, False, 1)),
        ("swd", ("swd", 8192, False, False, 1)),
        ("ms_ssim500", ("ms_ssim", 500, False, False, 1)),
    ],
)
def test_names_say_the_protocol(name, expected):
    p = parse(name)
    assert (p.kind, p.count, p.full, p.mirror, p.psi) == expected
    assert p.name == name
    if "psi" not in name:
        assert (parse(name, psi=0.7).name, parse(name, psi=0.7).psi) == (f"{name}_psi0.7", 0.7)


@pytest.mark.parametrize(
    "name", ["fid", "fid0", "fid50k_half", "is50k_full", "pr50k_full", "ppl2", "swd_", "", "fid-5"]
)
def test_names_that_mean_nothing(name):
    with pytest.raises(UsageError, match="unknown metric"):
        parse(name)


# ------------------------------------------------------------------------------------------- against torch-fidelity


@pytest.fixture(scope="module")
def few_pictures(tmp_path_factory) -> tuple[Path, Path]:
    """For networks, which take their time over each."""
    return packed(tmp_path_factory.mktemp("few"), 24)


@pytest.mark.slow
@pytest.mark.usefixtures("_own_cache")
def test_inception_metrics_are_torch_fidelitys(few_pictures, inception, tmp_path):
    """On the same files with the same weights; of fewer images than features."""
    folder, data = few_pictures
    e = evaluator(data, "fid16_full,kid16_full,is16", weights=(str(inception),), batch=10)
    G = Painter()
    ours = e(G)
    paint(e, G, 16, tmp_path / "fake")
    theirs = fidelity(folder, tmp_path / "fake", inception, "--fid", "--kid", "--isc", "--kid-subset-size", "16")
    mark = f"@{sha256(inception)[:8]}"
    assert set(ours) == {f"{n}{mark}" for n in ("fid16_full", "kid16_full", "kid16_full_std", "is16", "is16_std")}
    assert ours[f"fid16_full{mark}"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    assert ours[f"kid16_full{mark}"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert ours[f"is16{mark}"] == pytest.approx(theirs["inception_score_mean"], rel=1e-3)
    # With statistics from the cache, in other batches.
    again = evaluator(data, "fid16_full", weights=(str(inception),), batch=7)
    with mock.patch.object(RealSide, "_read", side_effect=AssertionError("the cache was not used")):
        assert again(G)[f"fid16_full{mark}"] == pytest.approx(ours[f"fid16_full{mark}"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("_own_cache")
def test_16_bits_move_the_number_a_little(few_pictures, inception):
    """And the name says so; what is cached of the real images in one precision does not serve the other."""
    values = {}
    for precision in ("fp32", "bf16"):
        values |= evaluator(few_pictures[1], "fid6", weights=(str(inception),), precision=precision)(Painter())
    mark = f"fid6@{sha256(inception)[:8]}"
    assert list(values) == [mark, f"{mark}@bf16"]
    change = values[f"{mark}@bf16"] / values[mark] - 1
    assert 1e-7 < abs(change) < 0.05
    assert len(list((Path(os.environ["STYLEGAN_PG_CACHE"]) / "metrics").iterdir())) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("Mixed_7c.branch3x3_2b.bn.bias"), r"no Mixed_7c\.branch3x3_2b\.bn\.bias"),
        (lambda s: s.pop("fc.weight"), "fc.weight"),
        (lambda s: s.update({"AuxLogits.fc.weight": torch.zeros(1)}), "AuxLogits.fc.weight"),
        (lambda s: s.update({"fc.weight": torch.zeros(1000, 2048)}), r"\[1000, 2048\]"),
        (lambda s: s.update({"Mixed_6a.branch3x3.bn.bias": torch.zeros(1)}), "shapes of Mixed_6a.branch3x3"),
        (lambda s: s.update({"Mixed_6a.branch3x3.conv.weight": torch.zeros(384, 7, 3, 3)}), "channels"),
    ],
)
def test_weights_that_inception_refuses(inception, change, message):
    state = torch.load(inception, weights_only=True)
    change(state)
    with pytest.raises(RuntimeError, match=message):
        classifiers.Inception(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_convolutions_are_the_plain_ones(inception, dtype):
    """Those that have no derivative, and those that have; at one size after another, and of several batches."""
    network = classifiers.Inception(torch.load(inception, weights_only=True)).to(dtype)
    for n, size in ((2, 64), (3, 32)):
        images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)
        with torch.no_grad():
            found = network(images)["pool"]
        expected = network(images)["pool"].detach()
        assert (found - expected).abs().max() <= (1e-5 if dtype == torch.float32 else 0.02) * expected.abs().max()


class Largest(TorchDispatchMode):
    """Bytes of the largest images or maps that any operation makes, and how many convolutions there were."""

    def __init__(self):
        super().__init__()
        self.nbytes = self.convolutions = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.ndim == 4 and out.shape[2] > 100:
            self.nbytes = max(self.nbytes, out.nbytes)
        self.convolutions += "conv" in str(function)
        return out


@pytest.mark.parametrize("name", ["inception", "vgg16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_give_what_the_whole_does(inception, monkeypatch, name, dtype):
    """Images are looked at a few at a time, so that glibc keeps the memory of each tensor for the next one."""
    if name == "inception":
        network, feature = classifiers.Inception(torch.load(inception, weights_only=True)), "pool"
    else:
        network, feature = classifiers.VGG16(random_vgg16()), "fc2"
    network = network.requires_grad_(False).eval().to(dtype).to(memory_format=torch.channels_last)
    most = 2 * network.LARGEST * dtype.itemsize
    for n, size in ((5, 64), (3, 1200)) if dtype == torch.float32 else ((3, 1200),):
        images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)
        monkeypatch.setattr(classifiers, "PIECE", 2**40)
        whole = network(images)[feature]
        monkeypatch.setattr(classifiers, "PIECE", max(most, 2 * 12 * size * size))
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        with torch.no_grad(), Largest() as seen:
            found = network(images)[feature]
        assert found.shape == whole.shape
        assert (found - whole).abs().max() <= (1e-5 if dtype == torch.float32 else 0.02) * whole.abs().max()
        assert seen.nbytes <= classifiers.PIECE
        assert seen.nbytes > classifiers.PIECE / 4
        assert seen.convolutions >= 13 * -(-n // 2)
    assert network(images[:0])[feature].shape == (0, whole.shape[1])


def test_distances_by_pieces(monkeypatch):
    channels = [64, 128, 256, 512, 512]
    lin = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(channels)}
    distance = features.Distance(LPIPS(lin, random_vgg16()), "")
    a, b = (255 * torch.rand(5, 3, 40, 32, generator=torch.Generator().manual_seed(i)) for i in range(2))
    with torch.no_grad():
        whole = distance(a, b)
        monkeypatch.setattr(classifiers, "PIECE", 2 * 4 * 64 * 40 * 32)
        torch.testing.assert_close(distance(a, b), whole, rtol=1e-5, atol=0)
    assert whole.shape == (5,)


@pytest.mark.parametrize("name", ["inception", "vgg16"])
def test_bf16_on_a_cpu_without_it(inception, tmp_path, monkeypatch, name):
    """The weights are rounded, and all else is float32: near both others, and kept apart from them."""
    file = inception
    if name == "vgg16":
        torch.save(random_vgg16(), file := tmp_path / "vgg.pth")
    images = torch.randint(0, 256, (2, 3, 48, 40), dtype=torch.uint8)
    found, identities = {}, set()
    for precision, has in (("fp32", False), ("bf16", False), ("bf16", True)):
        monkeypatch.setattr(features, "multiplies_bf16", lambda has=has: has)
        extractor = features.load_extractor(name, [file], CPU, precision)
        (found[precision, has],) = (v for k, v in extractor(images).items() if k in ("pool", "fc2"))
        identities.add(extractor.identity)
        assert extractor.mark.endswith("@bf16") == (precision == "bf16")
    exact, rounded, native = found.values()
    assert len(identities) == 3
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()
    assert 0 < (native - exact).abs().max() < 0.05 * exact.abs().max()


def test_a_measurement_starts_without_what_it_does_not_need():
    """Each of these takes as long to import as torch itself does, or half of it."""
    heavy = "torchvision torch_fidelity matplotlib tensorboard accelerate deepspeed webdataset"
    code = "import sys, stylegan_pg.metrics.command, stylegan_pg.metrics.features; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=harness.environment())
    assert "torch" in done.stdout.split()
    assert not set(heavy.split()) & set(done.stdout.split())


@pytest.mark.slow
@pytest.mark.usefixtures("_own_cache")
def test_precision_and_recall_are_torch_fidelitys(few_pictures, tmp_path):
    weights = tmp_path / "vgg.pth"
    torch.save(random_vgg16(), weights)
    folder, data = few_pictures
    e = evaluator(data, "pr163_full", weights=(str(weights),), batch=10)
    ours = e(Painter())
    paint(e, Painter(), 16, tmp_path / "fake")
    theirs = fidelity(folder, tmp_path / "fake", weights, "--prc", "--feature-extractor", "vgg16")
    mark = f"@{sha256(weights)[:8]}"
    assert ours[f"pr163_full_precision{mark}"] == pytest.approx(theirs["precision"], abs=1e-3)
    assert ours[f"pr163_full_recall{mark}"] == pytest.approx(theirs["recall"], abs=1e-3)
    assert 0 < theirs["precision"] < 1


@pytest.mark.slow
def test_lpips_is_torch_fidelitys():
    """Weights are handed over, not loaded by it; equal images have no distance, and noise a growing one."""
    torch.manual_seed(0)
    channels = [64, 128, 256, 512, 512]
    lin = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(channels)}
    distance = LPIPS(lin, random_vgg16())
    a = torch.rand(2, 3, 32, 32) * 255
    assert distance(a, a).flatten().tolist() == [0, 0]
    near, far = (distance(a, (a + s * torch.randn_like(a)).clamp(0, 255)) for s in (5, 60))
    assert (near < far).all()
    assert near.shape[0] == 2


def test_resizing_is_torch_fidelitys():
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as resize

    for h, w in ((64, 64), (33, 70), (299, 299), (512, 512)):
        x = torch.rand(2, 3, h, w) * 255
        ours = classifiers.resize_matrix(h, 299) @ x @ classifiers.resize_matrix(w, 299).t()
        torch.testing.assert_close(ours, resize(x, size=(299, 299), align_corners=False), rtol=0, atol=1e-3)


# ------------------------------------------------------------------------------------------------ the same in any way


@pytest.mark.usefixtures("_own_cache")
def test_results_do_not_depend_on_batches(pictures):
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
base.BLOCK = 8  # so that every rank has some
dist.init("cpu")
values = evaluator({data!r}, {names!r}, extractor="pixels", batch=8, cache=False)(Painter())
class Broken(Painter):
    def forward(self, *args, **how):
        if dist.rank() == dist.world() - 1:
            raise MemoryError("no room on this one")
        return super().forward(*args, **how)
try:
    evaluator({data!r}, "swd60")(Broken())
    fault = ""
except Exception as error:
    fault = str(error)
index, tools = load_index({data!r}), base.Tools(CPU, extractor="pixels", batch=8)
picture = nearest_real(Painter(), index, tools, 3, 1.0)
assert (picture is not None) == dist.is_main()
try:
    list(_draw(Painter(), index, tools, [], 2, 1.0, Path({data!r}, "index.json", "below")))
    unwritten = ""
except Exception as error:
    unwritten = str(error)
told = dist.gather_objects((values, fault, unwritten))
assert all(v == told[0][0] for v, *_ in told)
assert all("below cannot be written" in u for *_, u in told), told
if dist.is_main():
    near = hashlib.sha256(picture.numpy().tobytes()).hexdigest()
    print("RESULT", json.dumps([values, [f for _, f, _ in told], near]))
dist.shutdown()
"""


@pytest.mark.distributed
@pytest.mark.slow
def test_results_do_not_depend_on_ranks(pictures, tmp_path, monkeypatch):
    """Nor do the nearest real images. And a fault on one rank is every rank's, with none left waiting."""
    monkeypatch.setattr(base, "BLOCK", 8)  # as in the script
    alone = evaluator(pictures[1], NAMES, extractor="pixels", batch=20, cache=False)(Painter())
    picture = nearest_real(Painter(), load_index(str(pictures[1])), Tools(CPU, extractor="pixels"), 3, 1.0)
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
        assert all("no room on this one" in fault for fault in faults)
        assert values.keys() == alone.keys()
        for name, value in values.items():
            assert value == pytest.approx(alone[name], rel=1e-6), name


# -------------------------------------------------------------------------------------------------------- path length


class Squares(torch.nn.Module):
    def forward(self, a, b):
        return (a - b).square().mean(dim=[1, 2, 3])


@pytest.mark.usefixtures("_own_cache")
def test_path_length(tiny_data, snapshot):
    """With a distance that is known: images that move by as much as w does."""
    G = load_snapshot(snapshot)
    e = Evaluator(load_index(str(tiny_data)), 16, [parse("ppl2_wend40"), parse("ppl2_zfull40")], Tools(CPU, batch=9))
    e.networks._loaded["lpips"] = features.Distance(Squares(), "")
    first = e(G)
    assert list(first) == ["ppl2_wend40", "ppl2_zfull40"]
    assert all(0 < value < 1e9 for value in first.values())
    e.tools = Tools(CPU, batch=40)
    for name, value in e(G).items():
        assert value == pytest.approx(first[name], rel=0.05)  # small differences of images, in float32


def test_path_length_is_measured_in_full_precision(tiny_data, snapshot):
    """Rounding to 8 bits of mantissa would be hundreds of times as long as a step."""
    index, lengths = load_index(str(tiny_data)), []
    for at in ([], [8, 16]):
        G = load_snapshot(snapshot)
        blocks = {r: getattr(G.synthesis, f"b{r}") for r in G.synthesis.resolutions}
        for r, block in blocks.items():
            block.dtype = torch.bfloat16 if r in at else None
        e = Evaluator(index, 16, [parse("ppl2_wend16")], Tools(CPU))
        e.networks._loaded["lpips"] = features.Distance(Squares(), "")
        lengths.append(e(G)["ppl2_wend16"])
        assert [blocks[r].dtype for r in at] == [torch.bfloat16] * len(at)
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-3)


# ------------------------------------------------------------------------------------------------------------ faults


@pytest.mark.usefixtures("_own_cache")
def test_a_damaged_cache_entry_is_computed_anew(pictures, capsys):
    first = evaluator(pictures[1], "fid20_full,kid20_full", extractor="pixels")(Painter())
    entries = sorted((Path(os.environ["STYLEGAN_PG_CACHE"]) / "metrics").iterdir())
    assert len(entries) == 2
    for spoil in (lambda data: data[: len(data) // 2], lambda data: data[:-9] + b"\x01" * 9, lambda data: b"junk"):
        for path in entries:
            path.write_bytes(spoil(path.read_bytes()))
        capsys.readouterr()
        assert evaluator(pictures[1], "fid20_full,kid20_full", extractor="pixels")(Painter()) == first
        assert capsys.readouterr().err.count("damaged and computed anew") == 2
    assert evaluator(pictures[1], "fid20_full,kid20_full", extractor="pixels")(Painter()) == first
    assert capsys.readouterr().err == ""
    with mock.patch.object(real_cache, "save", side_effect=OSError("No space left on device")):
        other = evaluator(pictures[1], "fid20_full_mirror", extractor="pixels")
        assert other(Painter())
    assert "could not be kept: No space left" in capsys.readouterr().err


@pytest.mark.usefixtures("_own_cache")
def test_without_a_cache_metrics_are_measured_all_the_same(pictures, capsys):
    def fails():
        raise PermissionError("/tmp/x could be written by others: set STYLEGAN_PG_CACHE")

    with mock.patch.object(real_cache, "cache_folder", fails):
        assert evaluator(pictures[1], "fid20_full", extractor="pixels")(Painter())
    (warning,) = capsys.readouterr().err.splitlines()
    assert "could not be kept: /tmp/x could be written by others" in warning


def test_the_nearest_are_merged_in_a_fixed_order():
    """Of those that are equally near, the first ones; whatever part they came in, and with parts of any width."""
    distances = torch.tensor([[3.0, 1.0, 2.0, 1.0, 1.0, 0.5]])
    whole = _nearest([(distances, torch.arange(6)[None])], 4)
    assert [t.tolist() for t in whole] == [[[0.5, 1.0, 1.0, 1.0]], [[5, 1, 3, 4]]]
    for first in ([4, 5, 0], [1], [0, 1, 2, 3, 4, 5]):
        second = [i for i in range(6) if i not in first]
        parts = [_nearest([(distances[:, some], torch.tensor([some]))], 4) for some in (second, first) if some]
        assert [t.tolist() for t in _nearest(parts, 4)] == [t.tolist() for t in whole]


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/stylegan_pg_evil",))


@pytest.mark.usefixtures("_own_cache")
def test_faults_of_weights_and_data(pictures, inception, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    evil, junk, other = tmp_path / "evil.pth", tmp_path / "junk.pth", tmp_path / "other.pth"
    torch.save({"Mixed_7c.branch_pool.conv.weight": Evil()}, evil)
    junk.write_bytes(b"not weights at all")
    torch.save({"weight": torch.zeros(3)}, other)
    half = torch.load(inception, weights_only=True)
    half["Mixed_7c.branch_pool.conv.weight"] = torch.zeros(1, 1, 1, 1)
    torch.save(half, tmp_path / "half.pth")
    published = tmp_path / WEIGHTS["inception"].file
    published.write_bytes(inception.read_bytes())
    cases = {
        "but not their checksum": ("fid20_full", {"weights": (str(published),)}),
        "weights of inception are missing: fetch https://": ("fid20_full", {}),
        "weights of vgg16 are missing": ("pr203_full", {"weights": (str(inception),)}),
        "weights of lpips are missing": ("ppl2_wend20", {}),
        "does not exist": ("fid20_full", {"weights": (str(tmp_path / "nothing.pth"),)}),
        "evil.pth cannot be read": ("fid20_full", {"weights": (str(evil),)}),
        "junk.pth cannot be read": ("fid20_full", {"weights": (str(junk),)}),
        "other.pth fits none of inception, vgg16, lpips": ("fid20_full", {"weights": (str(other),)}),
        "half.pth does not fit inception": ("fid20_full", {"weights": (str(tmp_path / "half.pth"),)}),
        "needs 90 real images, the dataset has 64": ("fid90", {"extractor": "pixels"}),
        "cannot be had: ModuleNotFoundError": ("fid20_full", {"extractor": "no_such_module:make"}),
        "extractor '../x.py' is not possible": ("fid20_full", {"extractor": "../x.py"}),
        "precision 'fp4'": ("fid20_full", {"precision": "fp4"}),
    }
    for message, (names, tools) in cases.items():
        G = Painter()
        G.styles = None  # type: ignore[assignment]  # as if it had them
        with pytest.raises(UsageError, match="(?s).*" + message.replace("(", r"\(").replace("?", r"\?")) as caught:
            evaluator(pictures[1], names, **tools)(G)
        assert "\n" not in str(caught.value)
    assert not Path("/tmp/stylegan_pg_evil").exists()
    with pytest.raises(UsageError, match="latent space"):
        evaluator(pictures[1], "ppl2_wend20")(Painter())


@pytest.mark.usefixtures("_own_cache")
def test_what_needs_no_network_is_measured_all_the_same(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    e = evaluator(pictures[1], "fid60_full,swd16,fid60_full,pr323_full")
    assert set(e(Painter())) == {"swd16_64", "swd16_32", "swd16_16", "swd16"}
    assert set(e.missing) == {"fid60_full", "pr323_full"}
    with pytest.raises(UsageError, match="inception are missing"):
        evaluator(pictures[1], "fid60_full")(Painter())


def factory():
    """An extractor of the user's: the mean colour."""
    return lambda images: images.float().mean(dim=[2, 3])


@pytest.mark.usefixtures("_own_cache")
def test_an_extractor_of_the_users(pictures):
    values = evaluator(pictures[1], "fid40_full", extractor="test_metrics:factory")(Painter())
    assert list(values) == ["fid40_full@test_metrics:factory"]
    assert evaluator(pictures[1], "fid40_full", extractor="test_metrics:factory")(Painter()) == values


class Colours(torch.nn.Module):
    """The mean colour, weighted."""

    def __init__(self, weight: float = 1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full([3], weight))

    def forward(self, images):
        return images.float().mean(dim=[2, 3]) * self.weight


def module():
    return Colours()


def named():
    """With a name for caches that says all of it."""
    made = Colours()
    made.identity = "colours 1"  # type: ignore[assignment]  # modules have any attributes
    return made


def layered():
    """With a layer that happens to be called so."""
    made = Colours()
    made.identity = torch.nn.Identity()
    return made


def exported():
    batch = torch.export.Dim("batch", min=2, max=1024)
    example = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    return torch.export.export(Colours(), (example,), dynamic_shapes=({0: batch},)).module()


@pytest.mark.usefixtures("_own_cache")
def test_extractors_that_are_modules(pictures):
    """Also exported ones, whose mode cannot be set. On disk is kept only what has a name, as edited code with the same
    weights would meet it."""
    kept, values = Path(os.environ["STYLEGAN_PG_CACHE"]) / "metrics", []
    for name, count in (("module", 0), ("exported", 0), ("layered", 0), ("named", 1)):
        values += evaluator(pictures[1], "fid40_full", extractor=f"test_metrics:{name}")(Painter()).values()
        assert len(list(kept.glob("*"))) == count, name
    assert values == pytest.approx(values[:1] * 4, rel=1e-5)


class ColourDistance(ImageMetric):
    """colour500: the distance of the mean colours of the real images and of 500 generated ones, in grey levels."""

    kind, example = "colour", "colour500"
    pattern = f"colour(?P<count>{COUNT})(?P<full>_full)?"
    compares = True

    def observe(self, seen):
        return seen.float().mean(dim=[2, 3])

    def compute(self, real, generated, tools):
        return {"": float((real.double().mean(dim=0) - generated.double().mean(dim=0)).norm())}


class ColourVariance(FeatureMetric):
    """variance500: the mean variance of Inception's features of 500 generated images."""

    kind, example = "variance", "variance500"
    pattern = f"variance(?P<count>{COUNT}){FeatureMetric.REAL_IMAGES}"
    network = "inception"
    lower_is_better = False

    def compute(self, real, generated, tools):
        return {"": float(generated.var(dim=0).mean()), "_real": float(real.var(dim=0).mean())}


@pytest.mark.usefixtures("_own_cache")
def test_a_new_metric_is_one_class(pictures, monkeypatch):
    """Named, measured against all or some real images, truncated and explained like the others."""
    for metric in (ColourDistance, ColourVariance):
        monkeypatch.setitem(METRICS, metric.kind, metric)
    with pytest.raises(UsageError, match=r"swd, ms_ssim, colour500, variance500; counts"):
        parse("colour")
    names = "colour30,colour30_full,colour30_psi0.5,variance30_full,kid30_full"
    values = evaluator(pictures[1], names, extractor="pixels", batch=7)(Painter())
    ends = ("", "_full", "_psi0.5")
    assert {f"colour30{end}" for end in ends} | {"variance30_full@pixels", "variance30_full_real@pixels"} <= set(values)
    images = read_batch(load_index(str(pictures[1])).table(64), list(range(64))).double()
    painted = evaluator(pictures[1], "swd30")._latents(Painter(), "metric-z", 0, 30)[0]
    fake = (Painter()(painted) * 127.5 + 127.5).round().clamp(0, 255).double()
    expected = float((images.mean(dim=[0, 2, 3]) - fake.mean(dim=[0, 2, 3])).norm())
    assert values["colour30_full"] == pytest.approx(expected, rel=1e-3)
    assert values["colour30"] != values["colour30_full"]
    kept = list((Path(os.environ["STYLEGAN_PG_CACHE"]) / "metrics").iterdir())
    assert len(kept) == 1  # the features, which kid30_full and variance30_full share; the code of `observe` may change


@pytest.mark.usefixtures("_own_cache")
def test_an_extractor_without_the_feature_is_named(pictures):
    other = mock.patch.object(features, "pixels", lambda images: {"fc2": torch.zeros(len(images), 4)})
    with other, pytest.raises(UsageError, match="the extractor pixels gives fc2, but no 'pool'"):
        evaluator(pictures[1], "fid40_full", extractor="pixels")(Painter())
    with other, pytest.raises(UsageError, match="the extractor pixels gives fc2, but no 'pool'"):
        nearest_real(Painter(), load_index(str(pictures[1])), Tools(CPU, extractor="pixels"), 3, 1.0)


def test_weights_without_a_published_hash_are_marked(tmp_path, monkeypatch):
    """By both files, unless a file is the published one; the published name alone proves nothing, and is no fault."""
    lin, vgg = tmp_path / WEIGHTS["lpips"].file, tmp_path / "vgg.pth"
    torch.save({"lin0.model.1.weight": torch.ones(1)}, lin)
    torch.save({"classifier.3.weight": torch.ones(1)}, vgg)
    monkeypatch.setattr("stylegan_pg.metrics.lpips.LPIPS", lambda lin, vgg: torch.nn.Identity())
    shas = {path: sha256(path)[:8] for path in (lin, vgg)}
    assert features.load_distance([lin, vgg], CPU).mark == f"@{shas[lin]}@{shas[vgg]}"
    monkeypatch.setitem(WEIGHTS, "vgg16", dataclasses.replace(WEIGHTS["vgg16"], sha256=shas[vgg]))
    assert features.load_distance([lin, vgg], CPU).mark == f"@{shas[lin]}"


# --------------------------------------------------------------------------------------------------- damaged, foreign


@pytest.mark.usefixtures("_own_cache")
def test_damaged_pictures_are_told_and_spoil_no_cache(pictures, tmp_path, capsys):
    data = Path(shutil.copytree(pictures[1], tmp_path / "data"))
    table = load_index(str(data)).table(64)
    for ordinal in (3, 50):
        path = Path(table.paths[table.shard[ordinal]])
        content = bytearray(path.read_bytes())
        content[int(table.offset[ordinal]) + 20] ^= 1
        path.write_bytes(content)
    evaluator(data, "fid40_full,kid40_full,swd40", extractor="pixels")(Painter())
    warnings = capsys.readouterr().err
    assert warnings.count("warning: 2 of the real images are damaged") == warnings.count("warning:") == 1
    assert not list((Path(os.environ["STYLEGAN_PG_CACHE"]) / "metrics").glob("*"))
    evaluator(pictures[1], "fid64_full", extractor="pixels")(Pictures(table, 0))
    assert capsys.readouterr().err.count("warning: 2 of the measured images are damaged") == 1


@pytest.mark.usefixtures("_own_cache")
def test_what_is_kept_of_foreign_tars_is_not_that_of_others_alike(tmp_path):
    """Of the same names and sizes, with other pictures."""
    found = []
    for seed, folder in ((0, "a"), (1, "b"), (1, "a")):
        (tmp_path / folder).mkdir(exist_ok=True)
        rng, members = np.random.default_rng(seed), {}
        for i in range(8):
            levels = rng.integers(0, 256, [3], dtype=np.uint8)
            members[f"{i}.png"] = encoded(Image.fromarray(np.tile(levels, (64, 64, 1))), compress_level=0)
        path = tar_of(tmp_path / folder / "0.tar", members)
        os.utime(path, (1e9 + len(found), 1e9 + len(found)))
        found.append(evaluator(tmp_path / folder, "fid8_full", extractor="pixels")(Painter()))
    assert found[1] == found[2]
    assert found[0] != found[1]
    assert len(list((Path(os.environ["STYLEGAN_PG_CACHE"]) / "metrics").iterdir())) == 3


def test_some_of_a_datasets_pictures_are_a_sample_of_all(pictures):
    """Not the first ones, which may be of one class; all ranks and batch sizes take the same."""
    table, seen = load_index(str(pictures[1])).table(64), []
    e = evaluator(pictures[1], "swd20", extractor="pixels", batch=8)

    def read(table, ordinals, bad):
        seen.extend(ordinals)
        return read_batch(table, ordinals, bad)

    with mock.patch.object(evaluate, "read_batch", read):
        e._generate(Pictures(table, 5), [m for m in e.metrics if isinstance(m, ImageMetric)], 1.0, {})
    assert len(set(seen)) == 20
    assert max(seen) > 40
    assert seen == Pictures(table, 5).order[:20]
    assert seen != Pictures(table, 6).order[:20]
    assert sorted(Pictures(table, 5).order) == list(range(64))
