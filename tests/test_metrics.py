"""Metrics as a whole: against torch-fidelity's command line, over ranks and batches, with bad input, in training."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import harness
import numpy as np
import pytest
import torch
from PIL import Image

from stylegan_pg.config import ModelConfig
from stylegan_pg.data.index import load_index
from stylegan_pg.data.pack import pack
from stylegan_pg.errors import UsageError
from stylegan_pg.generate import save_image
from stylegan_pg.metrics import features, real_cache
from stylegan_pg.metrics.command import parse_psi
from stylegan_pg.metrics.evaluate import Evaluator
from stylegan_pg.metrics.gather import Tools
from stylegan_pg.metrics.periodic import Periodic
from stylegan_pg.metrics.protocol import parse
from stylegan_pg.metrics.real import RealSide
from stylegan_pg.networks import NETWORKS, NetworkShape
from stylegan_pg.networks.stylegan2 import SynthesisBlock
from stylegan_pg.settings import load_config
from stylegan_pg.snapshot import load_snapshot, save_snapshot

CPU = torch.device("cpu")


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


def test_psi_ranges():
    assert parse_psi("0.3:1.0:0.1") == [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert parse_psi("0.7") == [0.7]
    for text in ("", "a", "1:2", "1:0:0.1", "0:1:0", "0:1:1e-9", "nan", "0:inf:1"):
        with pytest.raises(UsageError, match="--psi"):
            parse_psi(text)


# -------------------------------------------------------------------------------------------------------- generators


class Painter(torch.nn.Module):
    """Stands in for a generator: smooth pictures that follow from z alone, at any batch size to the bit."""

    z_dim, c_dim, img_channels = 12, 0, 3

    def __init__(self, resolution: int = 64):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.resolution = resolution

    def forward(self, z, c=None, *, psi=1.0, alpha=1.0):
        small = (psi * z).reshape(-1, 3, 2, 2)
        return torch.nn.functional.interpolate(small, self.resolution, mode="bilinear")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> tuple[Path, Path]:
    """A folder of 64 pictures of 64x64, and the dataset packed from it."""
    folder = tmp_path_factory.mktemp("real")
    rng = np.random.default_rng(4)
    for i in range(64):
        small = rng.integers(0, 256, [5, 5, 3], dtype=np.uint8)
        Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")
    out = tmp_path_factory.mktemp("packed") / "real"
    pack(str(folder), out, resolution=64, lowest=8, format="png", workers=0, progress=False)
    return folder, out


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> Path:
    """Weights of a random Inception, of which features vary as a trained one's do."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    torch.manual_seed(7)
    with (
        mock.patch.object(module, "load_state_dict_from_url"),
        mock.patch.object(module.FeatureExtractorInceptionV3, "load_state_dict"),
    ):
        network = module.FeatureExtractorInceptionV3("random", ["2048"])
    for m in network.modules():
        if isinstance(m, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
        if isinstance(m, torch.nn.BatchNorm2d):
            m.register_buffer("running_mean", 0.1 * torch.randn(m.num_features))
            m.register_buffer("running_var", 0.7 * torch.rand(m.num_features) + 0.7)
            m.weight.data.uniform_(0.8, 1.2)
            m.bias.data.normal_(0, 0.1)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STYLEGAN_PG_CACHE", str(tmp_path / "cache"))


def evaluator(data: Path, names: str, **tools) -> Evaluator:
    return Evaluator(load_index(str(data)), 64, [parse(n) for n in names.split(",")], Tools(CPU, **tools))


def paint(e: Evaluator, G: Painter, count: int, folder: Path) -> None:
    """The images that an evaluator has a generator make, as files."""
    folder.mkdir()
    for block in range(-(-count // 64)):
        z, _ = e._latents(G, "metric-z", block, count)
        for i, image in enumerate((G(z) * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)):
            save_image(image, folder / f"{block * 64 + i:03d}.png")


def fidelity(real: Path, fake: Path, weights: Path, *options: str) -> dict[str, float]:
    """torch-fidelity's command line."""
    command = [sys.executable, "-m", "torch_fidelity.fidelity", "--input1", str(fake), "--input2", str(real), "--json"]
    command += ["--cpu", "--feature-extractor-weights-path", str(weights), "--no-cache", "--batch-size", "16", *options]
    result = subprocess.run(command, capture_output=True, text=True, env=harness.environment())
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout[result.stdout.index("{") :])


@pytest.mark.slow
@pytest.mark.usefixtures("_own_cache")
def test_inception_metrics_are_torch_fidelitys(pictures, inception, tmp_path):
    """On the same files with the same weights; of fewer images than features."""
    folder, data = pictures
    e = evaluator(data, "fid40_full,kid40_full,is40", weights=(str(inception),), batch=20)
    G = Painter()
    ours = e(G)
    paint(e, G, 40, tmp_path / "fake")
    theirs = fidelity(folder, tmp_path / "fake", inception, "--fid", "--kid", "--isc", "--kid-subset-size", "40")
    mark = f"@{features._sha256(inception)[:8]}"
    assert set(ours) == {f"{n}{mark}" for n in ("fid40_full", "kid40_full", "kid40_full_std", "is40", "is40_std")}
    assert ours[f"fid40_full{mark}"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    assert ours[f"kid40_full{mark}"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert ours[f"is40{mark}"] == pytest.approx(theirs["inception_score_mean"], rel=1e-3)
    # With statistics from the cache, in other batches.
    again = evaluator(data, "fid40_full", weights=(str(inception),), batch=7)
    with mock.patch.object(RealSide, "_read", side_effect=AssertionError("the cache was not used")):
        assert again(G)[f"fid40_full{mark}"] == pytest.approx(ours[f"fid40_full{mark}"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("_own_cache")
def test_precision_and_recall_are_torch_fidelitys(pictures, tmp_path):
    import torchvision

    torch.manual_seed(3)
    network = torchvision.models.vgg16()
    for m in network.modules():
        if isinstance(m, torch.nn.Linear):
            torch.nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
    weights = tmp_path / "vgg.pth"
    torch.save(network.state_dict(), weights)
    folder, data = pictures
    e = evaluator(data, "pr323_full", weights=(str(weights),), batch=20)
    ours = e(Painter())
    paint(e, Painter(), 32, tmp_path / "fake")
    theirs = fidelity(folder, tmp_path / "fake", weights, "--prc", "--feature-extractor", "vgg16")
    mark = f"@{features._sha256(weights)[:8]}"
    assert ours[f"pr323_full_precision{mark}"] == pytest.approx(theirs["precision"], abs=1e-3)
    assert ours[f"pr323_full_recall{mark}"] == pytest.approx(theirs["recall"], abs=1e-3)
    assert 0 < theirs["precision"] < 1


def test_resizing_is_torch_fidelitys():
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as resize

    for h, w in ((64, 64), (33, 70), (299, 299), (512, 512)):
        x = torch.rand(2, 3, h, w) * 255
        ours = features.resize_matrix(h, 299) @ x @ features.resize_matrix(w, 299).t()
        torch.testing.assert_close(ours, resize(x, size=(299, 299), align_corners=False), rtol=0, atol=1e-3)


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


RANKS = """
import json, sys, torch
sys.path[:0] = [{tests!r}]
from test_metrics import CPU, Painter, Tools, Evaluator, load_index, parse
from stylegan_pg import dist
from stylegan_pg.metrics import gather
gather.BLOCK = 8  # so that every rank has some
dist.init("cpu")
names = "fid60_full,kid60_full,is60,pr603_full,swd60,ms_ssim20"
index = load_index({data!r})
tools = Tools(CPU, extractor="pixels", batch=8, cache=False)
values = Evaluator(index, 64, [parse(n) for n in names.split(",")], tools)(Painter())
class Broken(Painter):
    def forward(self, *args, **how):
        if dist.rank() == dist.world() - 1:
            raise MemoryError("no room on this one")
        return super().forward(*args, **how)
try:
    Evaluator(index, 64, [parse("swd60")], Tools(CPU))(Broken())
    fault = ""
except Exception as error:
    fault = str(error)
told = dist.gather_objects((values, fault))
assert all(v == told[0][0] for v, _ in told)
if dist.is_main():
    print("RESULT", json.dumps([values, [f for _, f in told]]))
dist.shutdown()
"""


@pytest.mark.distributed
@pytest.mark.slow
def test_results_do_not_depend_on_ranks(pictures, tmp_path):
    """And a fault on one rank is every rank's, with none left waiting."""
    script = tmp_path / "script.py"
    script.write_text(RANKS.format(tests=str(Path(__file__).parent), data=str(pictures[1])))
    results = []
    for ranks in (1, 2, 3):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        command = [sys.executable, *launcher, str(script)]
        done = subprocess.run(command, capture_output=True, text=True, env=harness.environment(), timeout=240)
        line = next((s for s in done.stdout.splitlines() if s.startswith("RESULT")), None)
        assert line, done.stderr
        results.append(json.loads(line.removeprefix("RESULT")))
        assert len(results[-1][1]) == ranks
        assert all("no room on this one" in fault for fault in results[-1][1])
    for values, _ in results[1:]:
        assert values.keys() == results[0][0].keys()
        for name, value in values.items():
            assert value == pytest.approx(results[0][0][name], rel=1e-6), name


# ------------------------------------------------------------------------------------------------------ command line


def rows_of(*arguments, expected: int = 0) -> list[dict]:
    """What `stylegan-pg metrics` prints, in a process of its own."""
    text = harness.finish(harness.start(["metrics", *map(str, arguments)], stderr=subprocess.DEVNULL), expected)
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory) -> Path:
    """Of a generator with three classes, 16x16."""
    how: dict[str, Any] = {"z_dim": 8, "w_dim": 8, "mapping_layers": 2, "channel_base": 64, "channel_max": 8}
    pair = NETWORKS["stylegan2"]
    kwargs = pair.g_kwargs(ModelConfig(**how), NetworkShape(16, 16, False, 3, 3, 4))
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("snapshot") / "G.safetensors"
    description = {"network": "stylegan2", "kwargs": kwargs, "alpha": 1.0, "nimg": 1, "label_names": ["a", "b", "c"]}
    save_snapshot(path, pair.G(**kwargs).eval(), description)
    return path


@pytest.mark.slow
@pytest.mark.usefixtures("_own_cache")
def test_command_sweeps_truncation_and_shows_neighbours(tiny_data, snapshot, tmp_path):
    how = ["--data", tiny_data, "--extractor", "pixels", "--batch", 16, "--out", tmp_path]
    sweep = [*how, "--metrics", "fid32_full,pr323_full,swd16", "--psi", "0.5:1.0:0.25", "--neighbours", 3]
    *rows, drawn, table, shown = rows_of(snapshot, *sweep)
    assert [row["psi"] for row in rows] == [0.5, 0.75, 1.0]
    for row in rows:
        suffix = "" if row["psi"] == 1 else f"_psi{row['psi']:g}"
        assert {f"fid32_full{suffix}@pixels", f"swd16{suffix}", f"swd16{suffix}_16"} <= row.keys()
        assert 0 <= row[f"pr323_full{suffix}_precision@pixels"] <= 1
    assert Image.open(drawn["picture"]).size[0] > 600
    with Path(table["table"]).open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["psi"]) for line in lines] == [0.5, 0.75, 1.0]
    assert float(lines[0]["fid32_full@pixels"]) == rows[0]["fid32_full_psi0.5@pixels"]
    assert Image.open(shown["picture"]).size == (8 * 16, 3 * 16)


@pytest.mark.slow
@pytest.mark.usefixtures("_own_cache")
def test_command_for_classes_and_for_pictures_of_others(tiny_data, snapshot):
    how = ["--data", tiny_data, "--extractor", "pixels"]
    rows = rows_of(snapshot, *how, "--metrics", "fid20_full", "--per-class")
    assert [row["class"] for row in rows] == ["a", "b", "c"]
    assert len({row["fid20_full@pixels"] for row in rows}) == 3
    # A dataset in the generator's place: nothing is nearer to it than itself.
    (same,) = rows_of(tiny_data, *how, "--metrics", "fid96_full,kid96_full,pr963_full,swd96")
    assert same["fid96_full@pixels"] == pytest.approx(0, abs=1e-6)
    assert same["pr963_full_precision@pixels"] == same["pr963_full_recall@pixels"] == 1
    assert rows_of(tiny_data, *how, "--metrics", "fid97_full", expected=2) == []
    assert rows_of(tiny_data, *how, "--psi", "0.5", expected=2) == []
    assert rows_of(snapshot, *how, "--psi", "0.5:1", expected=2) == []


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


@pytest.mark.slow
def test_lpips_is_torch_fidelitys(tmp_path):
    """Weights are handed over, not loaded by it; equal images have no distance, and noise a growing one."""
    import torchvision

    torch.manual_seed(0)
    vgg = torchvision.models.vgg16().state_dict()
    channels = [64, 128, 256, 512, 512]
    lin = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(channels)}
    distance = features.lpips(lin, vgg)
    a = torch.rand(2, 3, 32, 32) * 255
    assert distance(a, a).flatten().tolist() == [0, 0]
    near, far = (distance(a, (a + s * torch.randn_like(a)).clamp(0, 255)) for s in (5, 60))
    assert (near < far).all()
    assert near.shape[0] == 2


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
    published = tmp_path / features.WEIGHTS["inception"].file
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


def factory():
    """An extractor of the user's: the mean colour."""
    return lambda images: images.float().mean(dim=[2, 3])


@pytest.mark.usefixtures("_own_cache")
def test_an_extractor_of_the_users(pictures):
    values = evaluator(pictures[1], "fid40_full", extractor="test_metrics:factory")(Painter())
    assert list(values) == ["fid40_full@test_metrics:factory"]
    assert evaluator(pictures[1], "fid40_full", extractor="test_metrics:factory")(Painter()) == values


# ----------------------------------------------------------------------------------------------------------- training


@pytest.mark.slow
@pytest.mark.distributed
def test_evaluation_leaves_training_alone(tiny_data, tmp_path, monkeypatch):
    """Bit for bit; with one that fails for lack of weights, too. The best snapshot is kept, with curves."""
    monkeypatch.setenv("STYLEGAN_PG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    names = {
        "none": {},
        "measured": {
            "metrics__every_kimg": 0.016,
            "metrics__names": "[fid32_full,swd]",
            "metrics__extractor": "pixels",
        },
        "failing": {"metrics__every_kimg": 0.016, "metrics__names": "[fid32_full]"},
    }
    runs, printed = {}, {}
    for name, changes in names.items():
        runs[name] = tmp_path / name
        changes = {"metrics__images": 32, **changes}
        printed[name] = harness.finish(harness.start(harness.arguments(runs[name], tiny_data, **changes), ranks=2))
    harness.assert_same_run(runs["none"], runs["measured"])
    harness.assert_same_run(runs["none"], runs["failing"])
    assert "the weights of inception are missing" in printed["failing"]
    assert "training goes on" in printed["failing"]
    rows = [json.loads(line) for line in (runs["measured"] / "metrics.jsonl").read_text().splitlines()]
    assert [row["nimg"] for row in rows] == [16, 32, 48, 64, 80, 96]
    best = min((row for row in rows if row["resolution"] == 16), key=lambda row: row["fid32_full@pixels"])
    link = runs["measured"] / "snapshots" / "best.safetensors"
    assert link.resolve().name == f"best-{best['nimg']:09d}img.safetensors"
    assert len(list(link.parent.glob("best-*"))) == 1
    assert Image.open(runs["measured"] / "metrics.png").size[0] > 300


@pytest.mark.usefixtures("_own_cache")
def test_what_needs_no_network_is_measured_all_the_same(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    e = evaluator(pictures[1], "fid60_full,swd16,fid60_full,pr323_full")
    assert set(e(Painter())) == {"swd16_64", "swd16_32", "swd16_16", "swd16"}
    assert set(e.missing) == {"fid60_full", "pr323_full"}
    with pytest.raises(UsageError, match="inception are missing"):
        evaluator(pictures[1], "fid60_full")(Painter())


def test_path_length_is_measured_in_full_precision(tiny_data, snapshot):
    """Rounding to 8 bits of mantissa would be hundreds of times as long as a step."""
    index, lengths = load_index(str(tiny_data)), []
    for at in ([], [8, 16]):
        G = load_snapshot(snapshot)
        blocks = [m for m in G.modules() if isinstance(m, SynthesisBlock)]
        for block in blocks:
            block.dtype = torch.bfloat16 if block.resolution in at else None
        e = Evaluator(index, 16, [parse("ppl2_wend16")], Tools(CPU))
        e.networks._loaded["lpips"] = features.Distance(Squares(), "")
        lengths.append(e(G)["ppl2_wend16"])
        assert [b.dtype for b in blocks if b.resolution in at] == [torch.bfloat16] * len(at)
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-3)


def test_the_best_so_far(tmp_path):
    """By its first metric, within a resolution; lines that were cut off and numbers that are none do not count."""
    config = load_config(
        None, ["run=x", "data.url=y", "resolution=16", "metrics.names=[fid20,swd]", "train.total_kimg=1"]
    )
    periodic, log = Periodic(config, mock.Mock()), tmp_path / "metrics.jsonl"
    best = []
    for resolution, value in ((8, 3.0), (16, 9.0), (16, float("nan")), (16, 8.0), (16, 8.0), (16, 8.5), (16, 2.0)):
        with log.open("a") as file:
            file.write(json.dumps({"nimg": 1, "resolution": resolution, "fid20@pixels": value}) + '\n{"nim\n')
        best.append(periodic.is_best(log, {"fid20_std@pixels": 0.0, "fid20@pixels": value}))
    assert best == [True, True, False, True, False, False, True]
    assert not periodic.is_best(tmp_path / "nothing", {"fid20": 1.0})
    with pytest.raises(UsageError, match=r"metrics\.best"):
        Periodic(load_config(None, ["run=x", "data.url=y", "train.total_kimg=1", "metrics.best=kid20"]), mock.Mock())
