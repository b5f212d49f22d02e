"""What the explorer shows of a generator: places between seeds, mixtures, directions, previews, moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from snapshots import built, saved

from stylegan_pg.checkpoint.snapshot import load_snapshot, save_snapshot
from stylegan_pg.errors import UsageError
from stylegan_pg.explorer.directions import COUNT, in_z, read_directions
from stylegan_pg.explorer.face import ROW, SEEDS, Face, Place, parse_face
from stylegan_pg.explorer.faces import PREVIEW_SEC, SAMPLES, Faces
from stylegan_pg.explorer.worker import SupersededError
from stylegan_pg.inference.generate import images_of, latents
from stylegan_pg.inference.latent_files import Directions, save_directions
from stylegan_pg.networks import NETWORKS, copy_same_names

# {name: how snapshots.built makes it}
KINDS: dict[str, dict[str, Any]] = {
    "stylegan2": {"name": "stylegan2"},
    "conditional": {"name": "stylegan2", "c_dim": 3},
    "fading": {"name": "stylegan2", "fade": True},
    "stylegan": {"name": "stylegan"},
    "progan": {"name": "progan", "c_dim": 3},
    "r3gan": {"name": "r3gan", "c_dim": 3},
    "stylegan3": {"name": "stylegan3"},
}


def faces_of(folder: Path, kind: str = "stylegan2", **more: Any) -> Faces:
    how = {**KINDS[kind], **more}
    changes = {"alpha": 0.3} if how.get("fade") else {}
    return Faces(load_snapshot(saved(folder / "G.safetensors", changes, **how)[1]))


def picture(faces: Faces, **face: Any) -> torch.Tensor:
    return faces.picture(Face(**face))


def near(a: torch.Tensor, b: torch.Tensor, levels: int = 1) -> bool:
    return a.shape == b.shape and int((a.int() - b.int()).abs().max()) <= levels


@pytest.mark.parametrize("kind", KINDS)
def test_a_face_is_what_sample_makes_of_its_seed(tmp_path, kind):
    faces = faces_of(tmp_path, kind)
    c = torch.eye(3)[1:2] if faces.G.c_dim else None
    psi = 0.7 if faces.has_w else 1.0
    (expected,) = images_of(faces.G, latents([5], faces.G.z_dim), c, psi=psi, noise="const")
    assert torch.equal(picture(faces, place=Place(5, c=1), psi=psi), expected[0])
    assert faces.has_w == (kind not in ("progan", "r3gan"))
    assert len(faces.facts()["layers"]) == (faces.G.num_ws if faces.has_w else 0)


def test_truncation_noise_and_cutoff_are_those_of_the_generator(tmp_path):
    faces = faces_of(tmp_path)
    z = latents([5], faces.G.z_dim)
    for psi, cutoff, noise in ((0.5, 2, "none"), (-0.5, None, "const"), (1.0, 1, "none")):
        (expected,) = images_of(faces.G, z, psi=psi, cutoff=cutoff, noise=noise)
        assert torch.equal(picture(faces, place=Place(5), psi=psi, cutoff=cutoff, noise=noise), expected[0])
    first, again, other = (picture(faces, noise="random", noise_seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("kind", ["stylegan2", "r3gan"])
def test_walks_go_from_seed_to_seed_without_a_jump(tmp_path, kind):
    faces = faces_of(tmp_path, kind)
    almost = 1 - 1e-7
    for place, goal in (
        (Place(7, right=almost), 8),
        (Place(7, up=almost), 7 + ROW),
        (Place(SEEDS - 1, right=almost, up=almost), ROW),
    ):
        assert near(picture(faces, place=place), picture(faces, place=Place(goal)))
    middle = picture(faces, place=Place(7, right=0.5))
    assert not near(middle, picture(faces, place=Place(7)))
    assert not near(middle, picture(faces, place=Place(8)))


def test_mixtures_of_normal_latents_stay_normal(tmp_path):
    faces = faces_of(tmp_path, "r3gan")
    codes = [faces.code(Face(place=Place(seed, right=0.5, up=0.5))).latent for seed in range(400)]
    assert torch.cat(codes).std() == pytest.approx(1, abs=0.06)  # a plain mean of four would have 0.5


def test_places_between_seeds_are_bilinear_in_w(tmp_path):
    faces = faces_of(tmp_path)
    w = faces.G.mapping(latents([3, 4, 3 + ROW, 4 + ROW], faces.G.z_dim))
    expected = 0.75 * (0.6 * w[0] + 0.4 * w[1]) + 0.25 * (0.6 * w[2] + 0.4 * w[3])
    found = faces.code(Face(place=Place(3, right=0.4, up=0.25))).latent
    torch.testing.assert_close(found, expected.expand(1, faces.G.num_ws, -1))


def test_mixing_takes_the_chosen_layers_of_the_other_face(tmp_path):
    faces = faces_of(tmp_path)
    a, b = faces.G.styles(latents([1], 8)), faces.G.styles(latents([2], 8))
    mixed = a.clone()
    mixed[:, [0, 3]] = b[:, [0, 3]]
    pair: dict[str, Any] = {"place": Place(1), "other": Place(2)}
    found = faces.code(Face(**pair, layers=(0, 3, 99))).latent
    torch.testing.assert_close(found, mixed)
    torch.testing.assert_close(
        faces.code(Face(**pair, layers=(3,), amount=0.25)).latent[:, 3], torch.lerp(a, b, 0.25)[:, 3]
    )
    assert torch.equal(picture(faces, **pair), picture(faces, place=Place(2)))
    assert torch.equal(picture(faces, **pair, layers=()), picture(faces, place=Place(1)))


@pytest.mark.parametrize("kind", ["progan", "r3gan"])
def test_faces_without_w_are_blended_on_great_circles(tmp_path, kind):
    faces = faces_of(tmp_path, kind)
    pair: dict[str, Any] = {"place": Place(1, c=0), "other": Place(2, c=2)}
    assert near(picture(faces, **pair, amount=0.0), picture(faces, place=Place(1, c=0)))
    assert near(picture(faces, **pair, amount=1.0), picture(faces, place=Place(2, c=2)))
    half = faces.code(Face(**pair, amount=0.5))
    ends = latents([1, 2], faces.G.z_dim)
    assert half.latent.norm() == pytest.approx(float(ends.norm(dim=1).mean()), rel=1e-5)
    assert half.c is not None
    torch.testing.assert_close(half.c, torch.tensor([[0.5, 0.0, 0.5]]))


@pytest.mark.parametrize("kind", ["progan", "r3gan"])
def test_directions_in_z_against_numpy(tmp_path, kind):
    """Those of the largest singular values of the first layer."""
    faces = faces_of(tmp_path, kind)
    first = faces.G.synthesis.b4.first if hasattr(faces.G, "synthesis") else faces.G.b4.first
    weight = first.linear.weight[:, :8] if kind == "r3gan" else first.weight[:8].flatten(1).t()
    rows = np.linalg.svd(weight.double().numpy())[2]
    found = in_z(faces.G)
    assert len(found) == min(COUNT, 8)
    for direction, row in zip(found, rows, strict=False):
        assert abs(direction.vector.double().numpy() @ row) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_generator_has_directions_that_change_it(tmp_path, kind):
    faces = faces_of(tmp_path, kind)
    names = list(faces.directions)
    dim = faces.G.w_dim if faces.has_w else faces.G.z_dim
    assert len(names) == (2 if faces.has_w else 1) * min(COUNT, dim)
    plain = faces.code(Face(place=Place(c=0)))
    for name in (names[0], names[-1]):
        moved = faces.code(Face(place=Place(c=0), directions={name: -2.0}))
        change = (moved.latent - plain.latent).reshape(-1, dim)
        torch.testing.assert_close(change, (-2 * faces.directions[name].vector).expand_as(change), atol=1e-5, rtol=1e-4)
    assert not near(picture(faces, place=Place(c=0), directions={names[0]: 3.0}), picture(faces, place=Place(c=0)))
    if faces.has_w:
        some = faces.code(Face(place=Place(c=0), directions={names[0]: 1.0}, direction_layers=(1,))).latent
        assert (some != plain.latent).any(dim=2)[0].tolist() == [i == 1 for i in range(faces.num_layers)]
    with pytest.raises(UsageError, match="no direction 'absent'"):
        faces.code(Face(directions={"absent": 1.0}))


def test_components_have_the_deviation_of_w(tmp_path):
    faces = faces_of(tmp_path, "conditional")
    c = torch.eye(3).repeat(SAMPLES // 3, 1)
    w = faces.G.mapping(torch.randn(len(c), 8, generator=torch.Generator().manual_seed(9)), c)
    vector = faces.directions["pca1"].vector
    assert float((w @ (vector / vector.norm())).std()) == pytest.approx(float(vector.norm()), rel=0.1)


def test_directions_of_a_file(tmp_path):
    path = tmp_path / "smile.safetensors"
    rows = {"one": torch.arange(8.0), "two": torch.randn(2, 8), "layered": torch.randn(1, 6, 8), "other": torch.ones(3)}
    save_file({**rows, "steps": torch.arange(8)}, path)
    G = load_snapshot(saved(tmp_path / "G.safetensors")[1])
    found = {d.name: d.vector for d in read_directions(path, G, 6, 8)}
    assert sorted(found) == ["smile/layered", "smile/one", "smile/two1", "smile/two2"]
    assert torch.equal(found["smile/one"], rows["one"])
    faces = Faces(G, [path])
    moved = faces.code(Face(directions={"smile/layered": 0.5})).latent
    torch.testing.assert_close(moved, faces.code(Face()).latent + 0.5 * rows["layered"])
    for bad in ({"x": torch.ones(3)}, {"x": torch.full([8], float("nan"))}):
        save_file(bad, path)
        with pytest.raises(UsageError, match=r"no directions for this generator: tensors \[8\]"):
            read_directions(path, G, 6, 8)
    path.write_bytes(b"not this")
    with pytest.raises(UsageError, match="holds no directions"):
        read_directions(path, G, 6, 8)


def test_directions_that_the_command_found(tmp_path):
    path, rows = tmp_path / "found.safetensors", torch.nn.functional.normalize(torch.randn(2, 1, 8), dim=2)
    save_directions(path, Directions(["smile", "age"], rows, [2.0, 0.5], [(0, 6), (1, 3)]))
    G = load_snapshot(saved(tmp_path / "G.safetensors")[1])
    found = {d.name: d.vector for d in read_directions(path, G, 6, 8)}
    assert list(found) == ["found/smile", "found/age"]
    torch.testing.assert_close(found["found/smile"], 2 * rows[0].expand(6, 8))
    assert found["found/age"].norm(dim=1).tolist() == pytest.approx([0, 0.5, 0.5, 0, 0, 0])
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UsageError, match=r"found\.safetensors"):
        read_directions(path, G, 6, 8)


def test_previews_are_pictures_of_the_smaller_network(tmp_path):
    """A generator that has not yet grown to 64x64 makes exactly the picture of the larger one's first layers."""
    G, description = built(64)
    small = NETWORKS["stylegan2"].G(**{**description["kwargs"], "resolution": 32})
    copy_same_names(small, G)
    save_snapshot(tmp_path / "large", G, description)
    kwargs = {**description["kwargs"], "resolution": 32}
    save_snapshot(tmp_path / "small", small, {**description, "kwargs": kwargs})
    large, grown = (Faces(load_snapshot(tmp_path / name)) for name in ("large", "small"))
    assert large.resolutions == [64, 32]
    assert torch.equal(large.picture(Face(psi=0.7), 32), grown.picture(Face(psi=0.7)))


def test_previews_are_as_large_as_the_device_allows(tmp_path):
    faces = Faces(load_snapshot(saved(tmp_path / "G", resolution=128, channel_base=256)[1]))
    assert faces.resolutions == [128, 64, 32]
    fast, slow = 0.2 * PREVIEW_SEC, 2 * PREVIEW_SEC
    for measured, chosen in (
        ({}, 32),  # is measured first
        ({32: slow}, 32),
        ({32: fast}, 64),
        ({32: 0.9 * PREVIEW_SEC}, 32),  # twice the size will be too slow
        ({32: fast, 64: slow}, 32),
        ({32: fast, 64: fast}, 0),
        ({32: fast, 64: fast, 128: slow}, 64),
        ({128: fast}, 0),
    ):
        faces.seconds = dict(measured)
        assert faces.preview_resolution() == chosen, measured
    faces.seconds = {32: 100.0}
    faces.images(faces.code(Face()), resolution=32)
    assert faces.seconds[32] < 100


@pytest.mark.parametrize("kind", KINDS)
def test_an_outdated_picture_is_given_up_between_the_layers(tmp_path, kind):
    faces, asked = faces_of(tmp_path, kind), []
    code = faces.code(Face())

    def after_some() -> bool:
        asked.append(1)
        return len(asked) > 4

    expected = faces.images(code)
    faces.outdated = after_some
    with pytest.raises(SupersededError):
        faces.images(code._replace(move=torch.tensor([[0.1, 0.0, 0.0]])))
    faces.outdated = lambda: False
    assert torch.equal(faces.images(code), expected)  # nothing of the other one is left


def turning(kernel: int) -> Faces:
    """StyleGAN3 with random weights at 64x64, whose pictures have contrast."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        how: dict[str, Any] = {"z_dim": 8, "w_dim": 8, "channel_base": 1024, "channel_max": 16}
        G: Any = NETWORKS["stylegan3"].G(resolution=64, kernel=kernel, radial=kernel == 1, **how)
    G.eval().requires_grad_(False)
    last = G.synthesis.layers[-1]
    last.weight *= 0.4 / float(G(latents([0], 8)).std())
    assert float(G(latents([0], 8)).std()) == pytest.approx(0.4, rel=0.01)
    return Faces(G)


def interior(image: torch.Tensor) -> torch.Tensor:
    return image[:, 20:44, 20:44].double()


def decibels(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(10 * torch.log10(255**2 / (interior(a) - interior(b)).square().mean()))


def test_stylegan3_moves_to_the_right_and_upwards():
    faces = turning(3)
    still = picture(faces)
    assert torch.equal(still, picture(faces, move=(0.0, 0.0, 0.0)))
    for move, shift in (((6 / 64, 0.0, 0.0), (0, 6)), ((0.0, 6 / 64, 0.0), (-6, 0))):
        moved = picture(faces, move=move)
        right, wrong = still.roll(shift, (1, 2)), still.roll([-s for s in shift], (1, 2))
        assert decibels(moved, right) > max(30, decibels(moved, wrong) + 10)
    assert torch.equal(faces.G.synthesis.input.transform, torch.eye(3))


def test_stylegan3_turns_counterclockwise_before_it_moves():
    faces = turning(1)
    still = picture(faces)
    turned = picture(faces, move=(0.0, 0.0, 90.0))
    assert decibels(turned, still.rot90(1, (1, 2))) > max(30, decibels(turned, still.rot90(-1, (1, 2))) + 10)
    both = picture(faces, move=(6 / 64, 0.0, 90.0))
    assert decibels(both, still.rot90(1, (1, 2)).roll(6, 2)) > 30


def test_interpolated_codes(tmp_path):
    faces = faces_of(tmp_path)
    a, b = (faces.code(Face(place=Place(seed), move=(0.0, 0.1, turn))) for seed, turn in ((1, 170.0), (2, -170.0)))
    codes = faces.interpolated(a, b, [0.0, 0.25, 1.0])
    torch.testing.assert_close(codes.latent, torch.cat([a.latent, torch.lerp(a.latent, b.latent, 0.25), b.latent]))
    assert codes.move[:, 2].tolist() == pytest.approx([170, 175, 190])  # the short way round


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_rgba_pictures_that_are_not_square(tmp_path, channels):
    G, description = built()
    kwargs = {**description["kwargs"], "img_channels": channels, "base": [4, 6]}
    G = NETWORKS["stylegan2"].G(**kwargs)
    save_snapshot(tmp_path / "G", G, {**description, "kwargs": kwargs})
    faces = Faces(load_snapshot(tmp_path / "G"))
    assert picture(faces).shape == (channels, 16, 24)
    assert (faces.facts()["width"], faces.facts()["height"], faces.facts()["channels"]) == (24, 16, channels)


def test_conditions_that_are_vectors(tmp_path):
    rows = [[0.5, -1.0, 2.0], [1.0, 1.0, 0.0]]
    _, path = saved(tmp_path / "G", {"label_names": [], "condition": "age", "conditions": rows}, c_dim=3)
    faces = Faces(load_snapshot(path))
    assert faces.facts()["examples"] == rows
    assert faces.facts()["classes"] == []
    assert torch.equal(picture(faces, place=Place(c=1)), picture(faces, place=Place(c=(1.0, 1.0, 0.0))))
    assert not torch.equal(picture(faces, place=Place(c=1)), picture(faces, place=Place(c=(1.0, 1.0, 3.0))))
    for c, message in ((2, "no class or example 2"), ((1.0,), "a list of 3 numbers")):
        with pytest.raises(UsageError, match=message):
            faces.code(Face(place=Place(c=c)))


def test_points_are_refused(tmp_path):
    kwargs = {"resolution": 4, "img_size": [1, 1], "img_channels": 2, "z_dim": 4, "width": 8, "hidden": 1}
    save_snapshot(tmp_path / "G", NETWORKS["mlp"].G(**kwargs), {"network": "mlp", "kwargs": kwargs, "alpha": 1.0})
    with pytest.raises(UsageError, match="makes points, not pictures"):
        Faces(load_snapshot(tmp_path / "G"))


def test_faces_of_the_page_are_parsed():
    everything = {
        "place": {"seed": 4, "right": 0.5, "up": 0.25, "c": [1, 2.5]},
        "other": {"seed": 9, "c": 1},
        "amount": 0.5,
        "layers": [0, 2],
        "psi": -0.5,
        "cutoff": 3,
        "noise": "random",
        "noise_seed": 7,
        "directions": {"pca1": 2},
        "direction_layers": [1],
        "move": [0.1, 0, -90],
    }
    face = parse_face(everything)
    assert face.place == Place(4, 0.5, 0.25, (1.0, 2.5))
    assert face.other == Place(9, c=1)
    assert (face.layers, face.direction_layers, face.move) == ((0, 2), (1,), (0.1, 0.0, -90.0))
    assert parse_face({}) == Face()
    assert parse_face({"other": None, "layers": None, "cutoff": None}) == Face()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "face is no JSON object"),
        ({"psy": 1}, "unknown name 'psy'"),
        ({"psi": "1"}, "psi is '1'"),
        ({"psi": 1e9}, "psi is 1000000000.0"),
        ({"psi": True}, "psi is True"),
        ({"psi": float("nan")}, "psi is nan"),
        ({"amount": -1}, "amount is -1"),
        ({"cutoff": -1}, "cutoff is -1"),
        ({"cutoff": 1.5}, "cutoff is 1.5"),
        ({"noise": "loud"}, "noise 'loud' is not possible"),
        ({"noise": ["none"]}, "noise"),
        ({"noise_seed": 1 << 32}, "noise_seed is 4294967296"),
        ({"place": None}, "place is no JSON object"),
        ({"place": {"seed": -1}}, "place.seed is -1"),
        ({"place": {"seed": 1 << 32}}, "place.seed"),
        ({"place": {"right": 1}}, "place.right is 1"),
        ({"place": {"c": "cat"}}, "place.c is 'cat'"),
        ({"place": {"c": [1, "2"]}}, "place.c is no list"),
        ({"place": {"path": "/etc"}}, "unknown name 'path'"),
        ({"other": 3}, "other is no JSON object"),
        ({"layers": "all"}, "layers is no list"),
        ({"layers": [1.5]}, "layers is 1.5"),
        ({"layers": [0] * 100_000}, "layers is no list"),
        ({"directions": ["pca1"]}, "directions is no JSON object"),
        ({"directions": {"pca1": 1e6}}, "an amount of directions"),
        ({"move": [0, 0]}, "move is no list of three"),
        ({"move": [0, 0, 1e9]}, "a number of move"),
    ],
)
def test_impossible_faces_are_refused(content, message):
    with pytest.raises(UsageError, match=message):
        parse_face(content)
