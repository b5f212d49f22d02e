"""Projection: the search for latents, its distances, and the command with its files."""

import json
import math
import re
import shlex
from pathlib import Path

import av
import numpy as np
import pytest
import snapshots
import torch
from measuring import random_vgg16
from PIL import Image

from stylegan_pg.checkpoint.snapshot import load_snapshot, save_snapshot
from stylegan_pg.editing import distance as distances
from stylegan_pg.editing import projection
from stylegan_pg.editing.distance import ImageDistance, make_distance, pixel_embedding
from stylegan_pg.editing.projection import Settings, chosen_space, nearest, noise_penalty, project, psnr
from stylegan_pg.errors import UsageError
from stylegan_pg.images import to_uint8
from stylegan_pg.inference.generate import latents
from stylegan_pg.inference.latent_files import load_latents
from stylegan_pg.metrics.features import Distance
from stylegan_pg.metrics.lpips import LPIPS
from stylegan_pg.networks import NETWORKS

PIXELS = ImageDistance("pixels", [pixel_embedding])


def loaded(folder: Path, **how):
    """A generator as load_snapshot returns it, and its file."""
    _, path = snapshots.saved(folder / "G.safetensors", **how)
    return load_snapshot(path), path


def made(G, seeds, c=None) -> torch.Tensor:
    """The images of seeds, uint8."""
    with torch.no_grad():
        z = latents(seeds, G.z_dim)
        return to_uint8(G(z) if c is None else G(z, c))


def there(tensor: torch.Tensor | None) -> torch.Tensor:
    """A tensor that must have been found."""
    assert tensor is not None
    return tensor


def foreign(count: int, size: int = 16) -> torch.Tensor:
    """Smooth pictures that no generator has made, uint8."""
    coarse = torch.rand([count, 3, 4, 4], generator=torch.Generator().manual_seed(7))
    return (torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic") * 255).clamp(0, 255).byte()


# ---------------------------------------------------------------------------------------------------- results


@pytest.mark.slow
@pytest.mark.parametrize(("name", "space"), [("stylegan2", "w"), ("stylegan2", "w+"), ("stylegan3", "w+")])
def test_pictures_of_the_generator_are_recovered(tmp_path, name, space):
    """64x64, over 30 dB within 200 steps."""
    seeds = range(1) if name == "stylegan3" else range(3)
    G, _ = loaded(tmp_path, resolution=64, name=name)
    found = project(G, made(G, seeds), PIXELS, Settings(space=space, steps=120 if name == "stylegan3" else 200))
    assert found.psnr.min() > 30
    assert torch.equal(found.images, to_uint8(G.synthesis(found.ws)))


@pytest.mark.parametrize("name", ["r3gan", "progan"])
def test_generators_without_w_are_projected_into_z(tmp_path, name):
    how = {"channels_at": {4: 8, 8: 8, 16: 8}, "group_width": 4, "blocks": 1} if name == "r3gan" else {"z_dim": 8}
    G, _ = loaded(tmp_path, name=name, **how)
    assert chosen_space(G, "w+") == "z"
    found = project(G, made(G, range(2)), PIXELS, Settings(steps=150, init="nearest"))
    assert there(found.z).shape == (2, G.z_dim)
    assert (found.distance < 0.2 * there(found.nearest)).all()
    assert torch.equal(found.images, to_uint8(G(found.z)))
    assert (found.ws is None) == (name == "r3gan")


@pytest.mark.parametrize("space", ["w", "w+"])
def test_other_pictures_get_closer_than_the_nearest_sample(tmp_path, space):
    G, _ = loaded(tmp_path)
    found = project(G, foreign(3), PIXELS, Settings(space=space, steps=100, init="mean"))
    sampled = nearest(G, PIXELS.embed(foreign(3).float() / 127.5 - 1), PIXELS, None, 5, 100)
    assert (found.distance < 0.9 * sampled.distance).all()
    apart = there(found.ws) - there(found.ws)[:, :1]
    assert (apart.abs().max() > 0.1) if space == "w+" else not apart.any()


def test_the_result_depends_on_the_seed_and_not_on_the_batch(tmp_path):
    G, _ = loaded(tmp_path)
    targets, how = made(G, range(4)), Settings(steps=40, seed=3, init="mean")
    together = project(G, targets, PIXELS, how)
    again = project(G, targets, PIXELS, how)
    alone = [project(G, one[None], PIXELS, how) for one in targets]
    assert torch.equal(there(together.ws), there(again.ws))
    assert torch.equal(together.curves, again.curves)
    torch.testing.assert_close(torch.cat([there(one.ws) for one in alone]), there(together.ws), rtol=0, atol=2e-3)
    torch.testing.assert_close(torch.cat([one.distance for one in alone]), together.distance, rtol=0.02, atol=1e-6)
    other = project(G, targets, PIXELS, Settings(steps=40, seed=4, init="mean"))
    assert (there(other.ws) - there(together.ws)).abs().max() > 2e-3


def test_the_generator_is_not_changed(tmp_path):
    G, _ = loaded(tmp_path, low_precision="bf16", low_precision_resolutions=2)
    before = {name: t.clone() for name, t in G.state_dict().items()}
    dtypes = [getattr(m, "dtype", None) for m in G.modules()]
    assert torch.bfloat16 in dtypes
    found = project(G, made(G, [0]), PIXELS, Settings(steps=5, optimize_noise=True))
    assert [getattr(m, "dtype", None) for m in G.modules()] == dtypes
    assert all(torch.equal(t, before[name]) for name, t in G.state_dict().items())
    assert found.images.shape == (1, 3, 16, 16)


def test_noise_inputs_are_found_and_stay_without_structure(tmp_path):
    """Noise that is optimised for pictures with details brings them closer, and has mean 0, variance 1 and little
    correlation of neighbours."""
    G, _ = loaded(tmp_path, resolution=32)
    with torch.no_grad():
        for name, p in G.named_parameters():
            if name.endswith("noise_strength"):
                p.fill_(0.5)
    targets = made(G, range(2))
    for name, noise in G.synthesis.named_buffers():
        if name.endswith("noise_const"):
            noise.copy_(torch.randn(noise.shape, generator=torch.Generator().manual_seed(1)))
    how = Settings(space="w", steps=60, init="mean")
    fixed = project(G, targets, PIXELS, how)
    free = project(G, targets, PIXELS, Settings(space="w", steps=60, init="mean", optimize_noise=True))
    assert fixed.noise == {}
    assert (free.distance < 0.5 * fixed.distance).all()
    for name, noise in free.noise.items():
        assert noise.shape == (2, *dict(G.synthesis.named_buffers())[name].shape)
        assert noise.mean(dim=[1, 2]).abs().max() < 1e-4
        torch.testing.assert_close(noise.square().mean(dim=[1, 2]), torch.ones(2), rtol=1e-3, atol=0)
        if noise.shape[1] == 32:
            assert (noise * noise.roll(1, dims=1)).mean(dim=[1, 2]).abs().max() < 0.01
    unbound = project(G, targets, PIXELS, Settings("w", steps=60, init="mean", optimize_noise=True, noise_weight=0))
    last = unbound.noise[name]
    assert (last * last.roll(1, dims=1)).mean(dim=[1, 2]).abs().max() > 0.03


def test_the_nearest_step_is_kept(tmp_path):
    """A learning rate that is far too high leaves every minimum; what is returned is the best of the last steps."""
    G, _ = loaded(tmp_path)
    found = project(G, made(G, range(3)), PIXELS, Settings(space="w", steps=60, init="mean", lr=8.0))
    without_noise = found.curves[45:]
    assert (found.distance <= 1.1 * without_noise.min(dim=0).values + 1e-4).all()
    one = project(G, made(G, [0]), PIXELS, Settings(space="w", steps=1, init="mean"))
    assert one.curves.shape == (1, 1)
    assert one.distance.isfinite().all()


def test_class_of_a_picture_is_found(tmp_path):
    G, _ = loaded(tmp_path, c_dim=3)
    c = torch.eye(3)[[2, 0, 1]]
    targets = made(G, [0, 1, 2], c)
    wanted = PIXELS.embed(targets.float() / 127.5 - 1)
    found = project(G, targets, PIXELS, Settings(steps=30))
    assert found.classes == nearest(G, wanted, PIXELS, None, 0, 64).classes
    given = project(G, targets, PIXELS, Settings(steps=30, init="nearest"), classes=[2, 0, 1])
    assert given.classes == [2, 0, 1]
    assert torch.equal(there(given.c), c)
    # The start is the nearest sample of the given class, up to the noise of the first step.
    own = nearest(G, wanted, PIXELS, [2, 0, 1], 0, 64)
    assert own.classes == [2, 0, 1]
    assert torch.equal(there(given.nearest), own.distance)


def test_nearest_of_samples_by_hand(tmp_path):
    G, _ = loaded(tmp_path)
    targets = foreign(2).float() / 127.5 - 1
    found = nearest(G, PIXELS.embed(targets), PIXELS, None, 11, 7, count=50)
    z = torch.randn([50, G.z_dim], generator=projection.generator(11, "projection-samples"))
    with torch.no_grad():
        each = torch.stack([PIXELS(G(z), [e.expand(50, -1) for e in PIXELS.embed(t[None])]) for t in targets], dim=1)
    torch.testing.assert_close(found.distance, each.min(dim=0).values)
    assert torch.equal(found.z, z[each.argmin(dim=0)])


# ---------------------------------------------------------------------------------------------------- formulas


def test_schedule():
    """The values of Karras et al. 2020, appendix D, at some of 1000 steps."""
    assert projection.rate(0, 1000) == 0
    assert projection.rate(25, 1000) == pytest.approx(0.5)
    assert projection.rate(500, 1000) == 1
    assert projection.rate(875, 1000) == pytest.approx(0.5)
    assert projection.rate(999, 1000) < 1e-4
    assert projection.noise_scale(0, 1000) == 0.05
    assert projection.noise_scale(375, 1000) == pytest.approx(0.05 / 4)
    assert projection.noise_scale(750, 1000) == projection.noise_scale(900, 1000) == 0
    assert projection.rate(0, 1) == 1


def test_noise_penalty_by_hand():
    x = np.random.default_rng(0).normal(size=(2, 16, 12))
    expected = np.zeros(2)
    for level in (x, x.reshape(2, 8, 2, 6, 2).sum(axis=(2, 4)) / 2):
        for axis in (1, 2):
            expected += (level * np.roll(level, 1, axis)).mean(axis=(1, 2)) ** 2
    found = noise_penalty([torch.from_numpy(x)[:, None]])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_psnr_by_hand():
    a = torch.full([2, 1, 4, 4], 100, dtype=torch.uint8)
    b = a.clone()
    b[0] += 10
    assert psnr(a, b)[0] == pytest.approx(10 * math.log10(255**2 / 100))
    assert psnr(a, b)[1] == math.inf


def test_pixel_distance_by_hand():
    a, b = torch.rand(2, 2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    levels = [(a - b).numpy()]
    while min(levels[-1].shape[2:]) >= 16:
        n, c, h, w = levels[-1].shape
        levels.append(levels[-1].reshape(n, c, h // 2, 2, w // 2, 2).mean(axis=(3, 5)))
    assert [level.shape[2] for level in levels] == [32, 16, 8]
    expected = np.mean([(level**2).mean(axis=(1, 2, 3)) for level in levels], axis=0)
    np.testing.assert_allclose(PIXELS(a, PIXELS.embed(b)).numpy(), expected, rtol=1e-5)
    torch.testing.assert_close(PIXELS.all_pairs(a, PIXELS.embed(b)).diagonal(), PIXELS(a, PIXELS.embed(b)))


def test_colours_out_of_range_hardly_count():
    a = torch.full([1, 3, 16, 16], 1.0)
    assert PIXELS(3 * a, PIXELS.embed(a)) < 1e-3
    assert PIXELS(3 * a, PIXELS.embed(-a)) > 3.9
    x = (3 * a).requires_grad_()
    PIXELS(x, PIXELS.embed(0 * a)).sum().backward()
    assert x.grad is not None
    assert (x.grad > 0).all()


def test_lpips_as_an_embedding(monkeypatch, tmp_path):
    """The embedding gives the distance of LPIPS itself, also for grey pictures, and finite gradients."""
    channels = [64, 128, 256, 512, 512]
    lin = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(channels)}
    module = Distance(LPIPS(lin, random_vgg16()), "")
    monkeypatch.setattr(distances, "load_distance", lambda files, device: module)
    G, _ = loaded(tmp_path)
    lpips, remark = make_distance(G, "auto")
    assert (lpips.name, remark) == ("LPIPS and pixels", "")
    a, b = 2 * torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 1
    with torch.no_grad():
        expected = module(a * 127.5 + 127.5, b * 127.5 + 127.5)
        found = lpips(a, lpips.embed(b)) - PIXELS(a, PIXELS.embed(b))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    black = torch.full([1, 3, 32, 32], -1.0).requires_grad_()
    lpips(black, [e.detach() for e in lpips.embed(b[:1])]).sum().backward()
    assert black.grad is not None
    assert black.grad.isfinite().all()
    assert lpips.embed(a[:, :1])[1].shape == lpips.embed(a)[1].shape
    lin["lin2.model.1.weight"] -= 0.5
    module.module.load_state_dict(lin, strict=False)
    with pytest.raises(UsageError, match="negative"):
        make_distance(G, "lpips")


# ---------------------------------------------------------------------------------------------------- discriminators


@pytest.mark.parametrize("name", ["stylegan2", "r3gan", "progan"])
def test_features_of_a_discriminator_do_not_depend_on_other_images(name):
    config = {"stylegan2": {}, "r3gan": {"channels_at": {4: 8, 8: 8, 16: 8}, "group_width": 4}, "progan": {}}[name]
    small = {} if name == "r3gan" else {"channel_base": 64, "channel_max": 8}
    from stylegan_pg.config import MODELS
    from stylegan_pg.networks import NetworkShape

    model = MODELS[name](mbstd_group=4, **small, **config)
    D = NETWORKS[name].D(**NETWORKS[name].d_kwargs(model, NetworkShape(16, 16, False, 3, 0, 4))).requires_grad_(False)
    embed = distances.discriminator_embedding(D)
    images = 2 * torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) - 1
    whole = embed(images)
    torch.testing.assert_close(torch.cat([embed(one[None]) for one in images]), whole, rtol=1e-4, atol=1e-6)
    assert whole.isfinite().all()
    assert ((whole[0] - whole[1]) ** 2).sum() > 1e-3
    assert embed(torch.nn.functional.interpolate(images, size=(8, 8))).shape == whole.shape


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory) -> Path:
    """The folder of a short run, within whose fade it ended."""
    import harness

    folder = tmp_path_factory.mktemp("projection") / "run"
    how = {"output__snapshot_kimg": 0.016, "train__total_kimg": 0.048, "data__conditional": "true"}
    harness.finish(harness.start(harness.arguments(folder, tiny_data, **how)))
    return folder


def test_pictures_are_projected_with_the_discriminator_of_the_run(run, tiny_data, tmp_path, capsys, monkeypatch):
    """The whole command: the newest snapshot and its D, pictures of other sizes, the class found, files and lines."""
    source = tmp_path / "pictures"
    source.mkdir()
    for i, image in enumerate(foreign(3, 24)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(source / f"{'abc'[i]}.png")
    Image.new("RGB", (40, 20)).save(source / "wide.png")
    (source / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 50)
    (source / "notes.txt").write_text("no picture")
    out = tmp_path / "out"
    arguments = ("--steps", 12, "--batch", 2, "--init", "nearest", "--out", out, "--video", "--fps", 24)
    code, printed, told = snapshots.command(capsys, monkeypatch, "project", run, source, *arguments)
    assert code == 0, told
    assert "features of D and pixels (D of " in told
    assert "left out" in told
    assert "wide.png is 40x20" in told
    assert "broken.png" in told
    assert len([line for line in printed.splitlines() if " dB, distance " in line and "nearest of 1000" in line]) == 3
    names = {path.name for path in out.iterdir()}
    assert names == {"latents.safetensors", "progress.png", *(f"{x}.{end}" for x in "abc" for end in ("png", "mp4"))}
    assert snapshots.pixels(out / "progress.png").shape[0] > 300
    with av.open(str(out / "b.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (512, 256, 24)
        assert sum(1 for _ in container.decode(stream)) == 13
    # `sample --ws` renders the right halves of the pairs.
    chosen = sorted((run / "snapshots").glob("*.safetensors"))[-1]
    again = snapshots.command(
        capsys, monkeypatch, "sample", run, "--ws", out / "latents.safetensors", "--out", out / "x"
    )
    assert again[0] == 0, again
    for x in "abc":
        pair = snapshots.pixels(out / f"{x}.png")
        assert pair.shape == (16, 32, 3)
        snapshots.near(pair[:, 16:], snapshots.pixels(out / "x" / f"{x}.png"))
    G = load_snapshot(chosen)
    found = load_latents(out / "latents.safetensors", G)
    assert found.names == ["a", "b", "c"]
    assert found.facts["space"] == "w+"
    assert there(found.c).sum(dim=1).tolist() == [1, 1, 1]
    assert len(found.facts["psnr"]) == 3
    json.dumps(found.facts, allow_nan=False)


def test_documented_commands(run, tmp_path, capsys, monkeypatch):
    """Those of the README and of docs/projection.md, with another run and fewer steps."""
    from test_readme import ROOT, commands

    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    Image.new("RGB", (16, 16), "red").save("pictures/a.png")
    found = commands("stylegan-pg project") + commands("stylegan-pg directions")
    found += [c for c in commands("stylegan-pg sample") if "--ws" in c or "--direction" in c]
    found = [c for c in found if "infogan" not in c]  # see test_infogan.py
    assert len(found) == 7
    for line in found:
        words = shlex.split(line.replace("runs/ffhq1024", str(run)).replace("4-7", "4-5"))[1:]
        if words[0] == "project":
            words = [word for word in words if word not in ("--steps", "500")] + ["--steps", "3", "--init", "mean"]
        assert snapshots.command(capsys, monkeypatch, *words)[0] == 0, line
    assert {"pictures", "projected", "directions", "changed", "rendered", "components"} <= {
        p.name for p in Path().iterdir()
    }
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "projection.md").read_text("utf-8"), re.DOTALL)
    _, path = loaded(tmp_path)
    code = code.replace("runs/ffhq1024/snapshots/025000kimg.safetensors", str(path)).replace("steps=200", "steps=3")
    names: dict = {}
    exec(code, names)
    assert names["images"].shape == (1, 3, 16, 16)


def test_discriminators_that_do_not_fit(run, tmp_path, capsys, monkeypatch):
    _, path = loaded(tmp_path, c_dim=3)
    image = tmp_path / "a.png"
    Image.new("RGB", (16, 16), "red").save(image)
    common = ("project", path, image, "--steps", 2, "--out", tmp_path / "out")

    def told(*more):
        return snapshots.command(capsys, monkeypatch, *common, *more)

    code, _, text = told("--discriminator", path)
    assert (code, len(text.splitlines())) == (2, 1)
    assert "not a checkpoint of this format" in text
    code, _, text = told("--discriminator", tmp_path / "none")
    assert code in (1, 2)
    assert len(text.splitlines()) == 1
    code, _, text = told("--distance", "discriminator")
    assert (code, text.count("\n")) == (2, 1)
    assert "no checkpoint is beside the snapshot" in text
    checkpoint = sorted((run / "checkpoints").glob("*.safetensors"))[-1]
    code, _, text = told("--discriminator", checkpoint)
    assert code == 0, text
    grey = tmp_path / "grey.safetensors"
    from stylegan_pg.config import StyleGAN2Config
    from stylegan_pg.networks import NetworkShape

    kwargs = NETWORKS["stylegan2"].g_kwargs(
        StyleGAN2Config(z_dim=8, w_dim=8, mapping_layers=1, channel_base=64, channel_max=8),
        NetworkShape(16, 16, False, 1, 0, 4),
    )
    save_snapshot(
        grey, NETWORKS["stylegan2"].G(**kwargs), {"network": "stylegan2", "kwargs": kwargs, "alpha": 1.0, "nimg": 0}
    )
    common = ("project", grey, image, "--steps", 2, "--out", tmp_path / "grey")
    code, _, text = told("--discriminator", checkpoint)
    assert (code, len(text.splitlines())) == (2, 1)
    assert "holds no discriminator of such images" in text
    code, _, text = told()
    assert code == 0, text
    assert snapshots.pixels(tmp_path / "grey" / "a.png").shape == (16, 32)


# ---------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["PICTURE", "--space", "q"], "space 'q' is unknown: choose w, w+, z"),
        (["PICTURE", "--init", "best"], "init 'best' is unknown: choose mean, nearest"),
        (["PICTURE", "--crop", "left"], "crop 'left' is unknown: choose none, center"),
        (["PICTURE", "--distance", "l1"], "distance 'l1' is unknown"),
        (["PICTURE", "--distance", "lpips"], "weights of lpips are missing"),
        (["PICTURE", "--weights", "PICTURE"], "PICTURE"),
        (["PICTURE", "--labels", "cow"], "'cow' is unknown"),
        (["PICTURE", "--labels", "a,b"], "2 classes for 1 pictures"),
        (["PICTURE", "--out", "PICTURE"], "cannot be written"),
        (["missing.png"], "missing.png: no such picture"),
        (["EMPTY"], "EMPTY holds no pictures"),
        (["TEXT"], "is not a picture of a supported format"),
        (["WIDE"], "give --crop center"),
        (["PICTURE", "--steps", "0"], "--steps"),
    ],
)
def test_wrong_options(snapshot, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STYLEGAN_PG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    Image.new("RGB", (16, 16), "red").save("PICTURE", format="PNG")
    Image.new("RGB", (40, 16), "red").save("WIDE", format="PNG")
    Path("TEXT").write_text("no picture")
    Path("EMPTY").mkdir()
    code, printed, told = snapshots.command(capsys, monkeypatch, "project", snapshot, *arguments)
    assert (code, printed) == (2, "")
    assert message in told
    assert "Traceback" not in told
    assert "--steps" in arguments or [line.split(":")[0] for line in told.splitlines()][-1:] == ["error"]
    assert told.count("error: ") == ("--steps" not in arguments)


def test_crop_names_and_orientation(tmp_path):
    """Names do not collide, EXIF orientation is applied, the central part is taken, small pictures are enlarged."""
    from stylegan_pg.editing.pictures import listed, pixels_of

    for place in ("a", "b", "A"):
        (tmp_path / place).mkdir()
    gradient = np.zeros([32, 64, 3], np.uint8)
    gradient[:, :, 0] = np.arange(64) * 4
    gradient[:16, :, 1] = 255
    picture = Image.fromarray(gradient)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    picture.save(tmp_path / "a" / "x.png")
    picture.save(tmp_path / "b" / "x.png", exif=exif)
    picture.resize((8, 4)).save(tmp_path / "A" / "X.bmp")
    picture.save(tmp_path / "progress.png")
    (tmp_path / ".hidden").mkdir()
    picture.save(tmp_path / ".hidden" / "y.png")
    found = listed([tmp_path, tmp_path / "a" / "x.png"])
    assert len(found) == 4
    assert sorted(one.name.casefold() for one in found) == ["progress.2", "x", "x.2", "x.3"]
    upright = pixels_of(tmp_path / "a" / "x.png", (16, 32), 3)
    assert upright.shape == (3, 16, 32)
    assert upright[0, 0, -1] > upright[0, 0, 0] + 200
    turned = pixels_of(tmp_path / "b" / "x.png", (32, 16), 3)
    assert turned[0, -1, 0] > turned[0, 0, 0] + 200
    assert turned[1, 0, -1] > 200 > 50 > turned[1, 0, 0]
    central = pixels_of(tmp_path / "a" / "x.png", (16, 16), 3, "center")
    assert 50 < central[0, 0, 0] < 80
    assert 175 < central[0, 0, -1] < 205
    assert pixels_of(tmp_path / "A" / "X.bmp", (16, 32), 1).shape == (1, 16, 32)
    assert pixels_of(tmp_path / "a" / "x.png", (16, 32), 4).shape == (4, 16, 32)


def test_noise_without_inputs_and_points(tmp_path, capsys, monkeypatch):
    _, path = loaded(tmp_path, noise=False)
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    code, _, told = snapshots.command(capsys, monkeypatch, "project", path, tmp_path / "a.png", "--optimize-noise")
    assert (code, len(told.splitlines())) == (2, 2)  # the first one says which distance is taken
    assert "no noise inputs" in told
