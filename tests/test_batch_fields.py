"""The fields of a batch: which there are, that they belong together, and that (seed, nimg) alone decides them."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stylegan_pg.config.loading import load_config
from stylegan_pg.config.plain import to_yaml
from stylegan_pg.config.schedule import deal, phases
from stylegan_pg.data.conditions import condition_field, condition_size, conditions_of
from stylegan_pg.data.datasets.fields import Field
from stylegan_pg.data.datasets.mixture import load_dataset
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.datasets.sampler import Order
from stylegan_pg.data.loader import derived
from stylegan_pg.data.loader.loader import Batch, batches
from stylegan_pg.data.loader.parts import OrderedTable, parts_of
from stylegan_pg.data.pack.pack import pack
from stylegan_pg.errors import UsageError
from stylegan_pg.networks import Pair
from stylegan_pg.systems.gan import GAN
from stylegan_pg.training.batches import TrainingBatches
from stylegan_pg.training.devices import Devices
from stylegan_pg.training.engine import Engine
from stylegan_pg.training.train_state import TrainState

COUNT, OTHER_COUNT = 13, 9
START = ["run=r", "train.total_kimg=1"]
FIELDS = ["class", "small", "line", "holey", "noisy", "dull", "B", "B.class", "image@next", "class@next"]
DERIVED = {"small": "low 2", "line": "edges", "holey": "hole 0.5", "noisy": "noise 25", "dull": "grey"}


def packed(folder: Path, count: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    for i in range(count):
        file = folder / "in" / f"class{i % 3}" / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)
    pack(folder / "in", folder / "out", resolution=8, lowest=8, shard_size="1kB", workers=0, progress=False)
    return folder / "out"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Two datasets that have nothing to do with each other."""
    folder = tmp_path_factory.mktemp("fields")
    return packed(folder / "a", COUNT, 0), packed(folder / "b", OTHER_COUNT, 1)


def source(folder: Path, seed: int = 0) -> OrderedTable:
    table = load_index(str(folder)).table(8)
    return OrderedTable(table, Order(np.bincount(table.shard).tolist(), seed))


def read(folders: tuple[Path, Path], **how) -> list[Batch]:
    a, b = (source(folder, seed) for seed, folder in enumerate(folders))
    batch = how.setdefault("batch", 4)
    how = {"fields": FIELDS, "others": {"B": b}, "derived": DERIVED, "mirror": True, "workers": 0, **how}
    return list(batches(a.table, a.order, **{"start": 0, "end": 24, "share": range(batch), **how}))


def joined(shown: list[Batch], name: str) -> torch.Tensor:
    return torch.cat([batch.fields[name] for batch in shown])


def test_a_batch_holds_what_was_asked_for_and_nothing_else(folders):
    shapes = {name: tuple(t.shape) for name, t in read(folders)[0].fields.items()}
    picture = (4, 3, 8, 8)
    expected = {"image": picture, "B": picture, "image@next": picture, "noisy": picture, "small": (4, 3, 4, 4)}
    expected |= {"line": (4, 1, 8, 8), "dull": (4, 1, 8, 8), "holey": (4, 4, 8, 8)}
    assert shapes == expected | dict.fromkeys(("class", "B.class", "class@next"), (4,))
    assert read(folders, fields=[])[0].fields.keys() == {"image"}


def test_fields_do_not_depend_on_ranks_workers_or_where_reading_begins(folders):
    whole = read(folders)
    for how in ({"workers": 2}, {"start": 8}):
        again = read(folders, **how)
        for name in FIELDS:
            assert torch.equal(joined(again, name), joined(whole, name)[how.get("start", 0) :]), (how, name)
    for share in deal(4, 1, 3):
        part = read(folders, share=share)
        for whole_batch, mine in zip(whole, part, strict=True):
            for name in FIELDS:
                assert torch.equal(mine.fields[name], whole_batch.fields[name][share]), name


def test_conditions_are_made_of_the_flipped_picture(folders):
    plain, flipped = (read(folders, mirror=mirror) for mirror in (False, True))
    images, changed = joined(plain, "image"), joined(flipped, "image")
    turned = torch.tensor([not torch.equal(a, b) for a, b in zip(images, changed, strict=True)])
    assert 0 < int(turned.sum()) < len(turned)
    assert torch.equal(changed[turned], images[turned].flip(3))
    for name in ("small", "line", "dull"):
        there, here = joined(plain, name), joined(flipped, name)
        assert torch.equal(here[turned], there[turned].flip(3)), name


def test_the_next_image_of_the_global_batch_gives_a_mismatched_condition(folders):
    for batch in read(folders):
        for name in ("image", "class"):
            assert torch.equal(batch.fields[f"{name}@next"], batch.fields[name].roll(-1, dims=0))


def test_a_further_dataset_has_an_order_of_its_own(folders):
    b = source(folders[1], 1)
    shown = joined(read(folders, mirror=False, end=48), "B")
    expected = [b.order.at(n)[1] for n in range(48)]
    np.testing.assert_array_equal(shown, np.stack([b.table.image(i) for i in expected]))
    epochs = [expected[i : i + OTHER_COUNT] for i in range(0, 45, OTHER_COUNT)]
    assert all(sorted(epoch) == list(range(OTHER_COUNT)) for epoch in epochs)


def test_a_bad_sample_of_a_further_dataset_is_reported_with_its_name(folders, tmp_path):
    table = load_index(str(packed(tmp_path, OTHER_COUNT, 1))).table(8)
    with open(table.paths[table.shard[4]], "r+b") as file:
        file.seek(int(table.offset[4]) + 30)
        file.write(b"\0\0\0\0")
    b = OrderedTable(table, Order(np.bincount(table.shard).tolist(), 1))
    shown = read(folders, others={"B": b}, end=48)
    assert {(bad.dataset, bad.ordinal) for batch in shown for bad in batch.bad} == {("B", 4)}
    again = read(folders, others={"B": OrderedTable(table, b.order, frozenset({4}))}, end=48)
    assert not any(batch.bad for batch in again)
    assert torch.equal(joined(again, "B"), joined(shown, "B"))


# --- recipes of conditions --------------------------------------------------------------------------------------------


def test_recipes_compute_what_they_say():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    blocks = image.reshape(4, 2, 4, 2, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(derived.low(image, 2), blocks, atol=0.51)
    reference = np.asarray(Image.fromarray(image).convert("L")).astype(int)
    np.testing.assert_allclose(derived.grey(image)[:, :, 0], reference, atol=1)
    flat, step = np.full([8, 8, 3], 90, np.uint8), np.zeros([8, 8, 3], np.uint8)
    step[:, 4:] = 100
    assert not derived.edges(flat).any()
    assert derived.edges(step)[4, :, 0].tolist() == [0, 0, 0, 100, 100, 0, 0, 0]
    with_hole = derived.hole(image, 0.5, np.random.default_rng(1))
    inside = with_hole[:, :, 3] == 255
    assert inside.sum() == 16
    np.testing.assert_array_equal(with_hole[:, :, :3][~inside], image[~inside])
    assert (with_hole[:, :, :3][inside] == derived.FILL).all()
    grey = np.full([64, 64, 3], 128, np.uint8)
    assert derived.noise(grey, 10, np.random.default_rng(2)).std() == pytest.approx(10, rel=0.05)


@pytest.mark.parametrize("text", ["", "sepia", "low", "low 3", "low x", "low 2 4", "grey 1", "hole 1", "noise -1"])
def test_impossible_recipes_are_named(text):
    with pytest.raises(UsageError, match=r"data\.derived: "):
        derived.parse(text)


def test_a_picture_that_blocks_do_not_divide_is_refused(folders):
    with pytest.raises(UsageError, match="low 16 does not divide pictures of 8x8"):
        read(folders, fields=["small"], derived={"small": "low 16"})


@pytest.mark.parametrize(
    ("fields", "others", "recipes", "message"),
    [
        (["caption"], (), {}, "training needs the field 'caption', which the data does not have"),
        (["B.caption"], ("B",), {}, "training needs the field 'B.caption'"),
        (["caption@next"], (), {}, "training needs the field 'caption@next'"),
        ([], ("image",), {}, "data.unpaired: 'image' is not possible, because a field of that name exists"),
        ([], ("B",), {"B": "grey"}, "data.derived: 'B' is not possible, because a field of that name exists"),
        ([], (), {"a b": "grey"}, "data.derived: 'a b' is not possible, because names"),
    ],
)
def test_unknown_and_ambiguous_fields_are_named(folders, fields, others, recipes, message):
    first = source(folders[0])
    with pytest.raises(UsageError, match=message):
        parts_of(fields, first, dict.fromkeys(others, first), recipes)


# --- several datasets in a configuration ------------------------------------------------------------------------------


def test_further_datasets_are_part_of_the_identity(folders):
    def opened(*more: str):
        return load_dataset(load_config(None, [*START, f"data.url={folders[0]}", *more]))

    alone, both, renamed = (
        opened(),
        opened(f"data.unpaired={{B: {folders[1]}}}"),
        opened(f"data.unpaired={{C: {folders[1]}}}"),
    )
    assert len({index.identity for index in (alone, both, renamed)}) == 3
    assert both.others["B"].count == OTHER_COUNT
    assert both.count == COUNT


def test_a_further_dataset_must_have_the_resolutions_of_the_first(folders, tmp_path):
    Image.fromarray(np.zeros([16, 16, 3], np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "in" / "a.png")
    pack(tmp_path / "in", tmp_path / "out", resolution=16, lowest=16, workers=0, progress=False)
    config = load_config(None, [*START, f"data.url={folders[0]}", f"data.unpaired={{B: {tmp_path}/out}}"])
    with pytest.raises(UsageError, match=r"data.unpaired: B: .*out lacks the resolution 8"):
        load_dataset(config)


def test_secrets_of_further_datasets_stay_out_of_files():
    config = load_config(None, [*START, "data.url=a", "data.unpaired={B: 'https://me:secret@host/b'}"])
    assert "secret" not in to_yaml(config)


# --- systems that read fields -----------------------------------------------------------------------------------------


class Enlarger(torch.nn.Module):
    """A generator that makes a picture of its small copy and of a picture of a further dataset."""

    def __init__(self):
        super().__init__()
        self.small, self.other = torch.nn.ConvTranspose2d(3, 3, 4, 2, 1), torch.nn.Conv2d(3, 3, 3, 1, 1)

    def forward(self, small: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self.small(small) + self.other(other)


class Critic(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.score = torch.nn.Linear(192, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.score(images.flatten(1))


class Changing(GAN):
    def fields(self):
        return ["small", "B", "class@next"]

    def generate(self, x, latents, purpose):
        assert x.field("class@next").shape == (len(x.part),)
        return self.G(x.field("small"), x.field("B")), None


def trained(folders: tuple[Path, Path], micro_batch: int) -> dict[str, torch.Tensor]:
    given = [*START, "resolution=8", f"data.url={folders[0]}", f"data.unpaired={{B: {folders[1]}}}"]
    given += ["data.derived={small: low 2}", "train.batch=8", "train.dtype=float64", "loss.pl_weight=0"]
    given += [f"train.micro_batch={micro_batch}", "train.device=cpu", "model.mbstd_group=2", "data.workers=0"]
    config = load_config(None, given)
    index, plan, devices = load_dataset(config), phases(config), Devices(config)
    pair = Pair(Enlarger, Critic, lambda *_: {}, lambda *_: {})
    state = TrainState(config, index, devices, Changing(config, pair))
    state.enter(plan[0])
    engine, data = Engine(state), TrainingBatches(config, index, devices, plan)
    data.check(state.fields)
    for _, (_, batch) in zip(range(3), data.batches(0, state.fields), strict=False):
        assert not engine.step(batch).faults
    return {name: t.clone() for name, t in state.tensors().items()}


def test_micro_batches_get_their_own_rows_of_each_field(folders):
    whole, parts = trained(folders, 0), trained(folders, 2)
    assert whole.keys() == parts.keys()
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("field", ["vector", "class"])
def test_vectors_are_conditions(folders, field):
    """A vector takes the place of classes, in the batch and among the conditions for generated images."""
    index = load_index(str(folders[0]))
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal([COUNT, 5]).astype(np.float32)
    fields = {"vector": Field("vector", size=5)}
    table = dataclasses.replace(index.table(8), fields=fields, vectors={"vector": vectors})
    index = dataclasses.replace(index, fields=fields)
    chosen = condition_field(index, field)
    conditions = conditions_of(index, table, chosen)
    expected = vectors if field == "vector" else np.eye(3, dtype=np.float32)[table.label]
    np.testing.assert_array_equal(conditions.at(range(COUNT)), expected)
    order = Order(np.bincount(table.shard).tolist(), 0)
    how = {"start": 0, "end": 8, "batch": 8, "share": range(8), "workers": 0}
    (batch,) = batches(table, order, fields=[chosen], **how)
    np.testing.assert_array_equal(conditions.of(batch.fields[chosen]), expected[[order.at(i)[1] for i in range(8)]])
    assert conditions.size == condition_size(index, chosen) == expected.shape[1]
    assert len(conditions.examples(4)) == (4 if field == "vector" else 0)


def test_which_field_is_the_condition(folders):
    index = load_index(str(folders[0]))
    fields = {"a": Field("vector", size=5), "b": Field("vector", size=2), "caption": Field("text")}
    several = dataclasses.replace(index, fields=fields, label_names=())
    assert condition_field(dataclasses.replace(index, fields=fields)) == "class"
    assert condition_field(dataclasses.replace(several, fields={"a": fields["a"]})) == "a"
    for named, wanted, message in ((several, "", "several vectors"), (several, "caption", "no such class or vector")):
        with pytest.raises(UsageError, match=message):
            condition_field(named, wanted)
