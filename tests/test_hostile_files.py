"""Untrusted files of tensors: they load with the contents that were written, or are refused with one message before
anything is built or allocated, and no code runs."""

import io
import json
import os
import pickle
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from stylegan_pg.checkpoint import tensor_file
from stylegan_pg.checkpoint.snapshot import load_snapshot, save_snapshot
from stylegan_pg.config import MODELS, StyleGAN2Config
from stylegan_pg.errors import UsageError
from stylegan_pg.metrics.weights import read_weights
from stylegan_pg.networks import NETWORKS, NetworkShape
from stylegan_pg.networks.ranges import RANGES, check_arguments


def built(name: str = "stylegan2") -> tuple[Any, dict[str, Any]]:
    config = StyleGAN2Config(z_dim=8, w_dim=8, mapping_layers=2, channel_base=64, channel_max=8)
    kwargs = NETWORKS[name].g_kwargs(config, NetworkShape(8, 8, False, 3, 0, 4))
    torch.manual_seed(0)
    G = NETWORKS[name].G(**kwargs).eval()
    return G, {"network": name, "kwargs": kwargs, "alpha": 1.0, "nimg": 5000, "label_names": []}


def one_message(path: Path, act: Callable[[], object]) -> str:
    with pytest.raises(UsageError) as error:
        act()
    text = str(error.value)
    assert str(path) in text
    assert text.isprintable()
    assert len(text) < 1000
    return text


# --- headers ----------------------------------------------------------------------------------------------------------


def with_header(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


WRONG_HEADERS: list[tuple[Any, int]] = [
    ({"a": entry(), "b": entry()}, 8),  # the tensors overlap
    ({"a": entry(offsets=(8, 16))}, 16),  # there is a gap
    ({"a": entry()}, 7),
    ({"a": entry()}, 9),
    ({"a": entry(shape=(2**40, 2**40))}, 8),
    ({"a": entry(shape=(2**62, 0), offsets=(0, 0))}, 0),
    ({"a": entry(shape=[0] * 1000, offsets=(0, 0))}, 0),
    ({"a": entry(shape=(-2,), offsets=(8, 0))}, 8),
    ({"a": entry(shape=(2.0,))}, 8),
    ({"a": entry(shape="2")}, 8),
    ({"a": entry(dtype="C64", offsets=(0, 16))}, 16),
    ({"a": entry(dtype=7)}, 8),
    ({"a": entry(offsets=(0, 8, 8))}, 8),
    ({"a": entry() | {"more": 1}}, 8),
    ({"a": 5}, 0),
    ({"__metadata__": {"a": 5}}, 0),
    ({"__metadata__": []}, 0),
    ([], 0),
    (b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), 8),
    (b"[" * 5000, 0),
    (b'{"\xff": 1}', 0),
    (b"{}}", 0),
]


@pytest.mark.parametrize("case", range(len(WRONG_HEADERS)))
def test_invalid_headers(tmp_path, case):
    header, length = WRONG_HEADERS[case]
    path = with_header(tmp_path / "x.safetensors", header, bytes(length))
    with pytest.raises(tensor_file.BadFileError) as error, tensor_file.opened(path):
        pass
    assert str(error.value).isprintable()
    one_message(path, lambda: load_snapshot(path))
    one_message(path, lambda: read_weights(path))


def test_invalid_lengths(tmp_path):
    for length in (0, 1, 3, 2**40, 2**64 - 1):
        path = with_header(tmp_path / "x.safetensors", {}, length=length)
        with pytest.raises(tensor_file.BadFileError), tensor_file.opened(path):
            pass


def test_pipes_and_folders_do_not_hang(tmp_path):
    os.mkfifo(path := tmp_path / "x.safetensors")
    one_message(path, lambda: read_weights(path))
    one_message(path, lambda: load_snapshot(path))


def test_files_of_the_safetensors_library(tmp_path):
    kinds = {f"{dtype}": torch.arange(6).reshape(2, 3).to(dtype) for dtype in tensor_file.DTYPES}
    kinds |= {"none": torch.zeros(0, 4), "one": torch.tensor(2.5), "nan": torch.tensor([float("nan"), 1])}
    save_file(kinds, tmp_path / "x.safetensors", {"a": "ä"})
    with tensor_file.opened(tmp_path / "x.safetensors") as file:
        found = file.read()
        assert file.metadata == {"a": "ä"}
    assert found.keys() == kinds.keys()
    for name, t in kinds.items():
        assert found[name].dtype == t.dtype
        torch.testing.assert_close(found[name], t, rtol=0, atol=0, equal_nan=True)


# --- snapshots --------------------------------------------------------------------------------------------------------


def mutated(data: bytes, header: int, dice: random.Random) -> bytes:
    """Return data in which some bytes are changed, removed or inserted, mostly in the header."""
    content = bytearray(data)
    for _ in range(dice.choice([1, 1, 2, 8])):
        place = dice.randrange(header if dice.random() < 0.8 else len(data)) % len(content)
        match dice.randrange(5):
            case 0:
                content[place] = dice.randrange(256)
            case 1 | 2:
                content[place] ^= 1 << dice.randrange(8)
            case 3:
                del content[place : place + dice.choice([1, 4, 100])]
            case _:
                content[place:place] = dice.randbytes(dice.choice([1, 4]))
    return bytes(content)


def test_mutated_snapshots_are_refused(tmp_path):
    path = tmp_path / "G.safetensors"
    save_snapshot(path, *built())
    good, expected = path.read_bytes(), load_snapshot(path).state_dict()
    header, dice, refused = 8 + int.from_bytes(good[:8], "little"), random.Random(0), 0
    for _ in range(150):
        path.write_bytes(mutated(good, header, dice))
        found, message = loaded_or_told(path)
        refused += bool(message)
        assert not message or (str(path) in message and message.isprintable())
        assert all(torch.equal(t, expected[name]) for name, t in found.items())
    assert refused > 100


def loaded_or_told(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    try:
        return load_snapshot(path).state_dict(), ""
    except UsageError as error:
        return {}, str(error)


def test_checksums_of_snapshots(tmp_path):
    G, description = built()
    path = tmp_path / "G.safetensors"
    save_snapshot(path, G, description)
    with tensor_file.opened(path) as file:
        meta, tensors = file.metadata, file.read()
    old = json.dumps({"format": 1, **description})
    save_file(tensors, path, {"stylegan_pg": old})  # the format of earlier versions
    assert torch.equal(load_snapshot(path).mapping.fc0.weight, G.mapping.fc0.weight)
    changed = tensors | {"mapping.fc0.weight": tensors["mapping.fc0.weight"] + 1}
    for found, said in (
        (changed, meta),
        (tensors, {"stylegan_pg": meta["stylegan_pg"]}),
        (tensors, meta | {"blake2b": ""}),
    ):
        save_file(found, path, said)
        assert "its checksum does not match" in one_message(path, lambda: load_snapshot(path))
    save_file(tensors, path, meta | {"stylegan_pg": old})
    assert "its checksum does not match" in one_message(path, lambda: load_snapshot(path))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_not_finite(tmp_path, value):
    G, description = built()
    G = G.double()
    G.synthesis.b8.conv1.weight.data[1, 2, 0, 1] = value
    save_snapshot(tmp_path / "G.safetensors", G, description)
    text = one_message(tmp_path / "G.safetensors", lambda: load_snapshot(tmp_path / "G.safetensors"))
    assert "not finite, in synthesis.b8.conv1.weight" in text


WRONG_ARGUMENTS: dict[str, list[Any]] = {
    "resample_filter": [[], [0], [1, -1], [float("nan")], [1] * 100_000, [1e300, 1], ["1"], "1331", None, [[1, 3], 3]],
    "mapping_layers": [2**40, -1, 2.0, True, "8", None],
    "resolution": [0, 2, 12, 2**40, 16.0, "8"],
    "base": [[4], [0, 4], [2**40, 4], "44", [4, 4, 4]],
    "channel_base": [0, 4, 2**62, 1e9],
    "channel_max": [0, -8, 2**40, 10**400],
    "img_channels": [0, 2**40],
    "c_dim": [-1, 2**40],
    "z_dim": [0, 2**40, [8]],
    "w_dim": [0, 2**40, {}],
    "architecture": ["skipped", 5, ["skip"]],
    "low_precision": ["int8", None, []],
    "low_precision_at": [5, [3], [2**40], ["8"], [8] * 1000],
    "conv_clamp": [0, -1, float("nan"), float("inf"), "256"],
    "fade": ["", 1, None],
    "use_noise": ["no", 0],
}


@pytest.mark.parametrize("name", WRONG_ARGUMENTS)
def test_arguments_out_of_range(tmp_path, name):
    G, description = built()
    path = tmp_path / "G.safetensors"
    for value in WRONG_ARGUMENTS[name]:
        kwargs = {**description["kwargs"], name: value}
        with pytest.raises(ValueError, match=name):
            NETWORKS["stylegan2"].G(**kwargs)
        save_snapshot(path, G, {**description, "kwargs": kwargs})
        assert name in one_message(path, lambda: load_snapshot(path))


@pytest.mark.parametrize(
    "changes",
    [
        {"alpha": 2}, {"alpha": float("nan")}, {"alpha": True}, {"nimg": -1}, {"nimg": "5"}, {"label_names": [1]},
        {"label_names": {"a": 1}}, {"network": ["stylegan2"]}, {"network": "\x1b[2J"}, {"kwargs": [["resolution", 8]]},
        {"format": "\x1b[2J"}, {"format": [1]},
    ],
)  # fmt: skip
def test_descriptions_with_a_wrong_structure(tmp_path, changes):
    G, description = built()
    save_snapshot(tmp_path / "G.safetensors", G, {**description, **changes})
    one_message(tmp_path / "G.safetensors", lambda: load_snapshot(tmp_path / "G.safetensors"))


def test_unknown_tensors(tmp_path):
    G, description = built()
    tensors, path = G.state_dict(), tmp_path / "G.safetensors"
    name = "mapping.fc0.weight"
    for change in ({name: tensors[name][:1]}, {name: tensors[name].long()}, {"\x1b": tensors[name].clone()}):
        found = {k: v.contiguous() for k, v in (tensors | change).items()}
        save_file(found, path, {"stylegan_pg": json.dumps({"format": 1, **description})})
        assert "does not fit the weights" in one_message(path, lambda: load_snapshot(path))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_argument_has_a_range(name):
    shape = NetworkShape(8, 8, True, 3, 2, 4)
    for kwargs in (NETWORKS[name].g_kwargs(MODELS[name](), shape), NETWORKS[name].d_kwargs(MODELS[name](), shape)):
        assert not kwargs.keys() - RANGES.keys()
        check_arguments(kwargs)


# --- weights of feature networks --------------------------------------------------------------------------------------


class Trap:
    """An object whose pickle, or whose TorchScript layer, would write a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_in_both_formats_of_torch_save(tmp_path, zipped):
    torch.save({"a": torch.ones(3)}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert torch.equal(read_weights(tmp_path / "w.pth")["a"], torch.ones(3))


def test_weight_files_that_contain_programs(tmp_path, monkeypatch):
    path, sprung = tmp_path / "w.pth", tmp_path / "sprung"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), str(path))
    calls: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *a, **k: calls.append(a))
        assert "TorchScript, a program and not weights; if you trust the file, load it" in one_message(
            path, lambda: read_weights(path)
        )
        with tarfile.open(path, "w") as tar:  # old versions of torch.load unpack tars
            tar.addfile(tarfile.TarInfo("storages"), io.BytesIO())
        one_message(path, lambda: read_weights(path))
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(10**7))
        assert "is compressed, or larger when unpacked" in one_message(path, lambda: read_weights(path))
        for stored in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # a bytearray of 8 GiB that torch.load would allocate
            with zipfile.ZipFile(path, "w", stored) as archive:
                archive.writestr(
                    "a/data.pkl", b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x02\x85R." + b"  " * 200
                )
            assert (
                "contains objects other than tensors" in (text := one_message(path, lambda: read_weights(path)))
                or "compressed" in text
            )
        path.write_bytes(b"")
        one_message(path, lambda: read_weights(path))
        assert not calls
    for content in (Trap(sprung), {"a": Trap(sprung)}):
        path.write_bytes(pickle.dumps(content, 2))
        text = one_message(path, lambda: read_weights(path))
        torch.save(content, path)
        assert one_message(path, lambda: read_weights(path)) == text
        assert "weights_only" not in text  # the message must not explain how to run the code
    assert not sprung.exists()


@pytest.mark.parametrize("content", [{1: torch.ones(2)}, {"a": torch.ones(2).to_sparse()}, {"a": 1}, [torch.ones(2)]])
def test_weight_files_without_a_dictionary_of_plain_tensors(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    assert "no dictionary of tensors" in one_message(tmp_path / "w.pth", lambda: read_weights(tmp_path / "w.pth"))
