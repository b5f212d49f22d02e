"""The formats of hostile.py that are model files of other programs: pickles, files of torch.save, safetensors.

Pickles are mutated as bytes, and also operation by operation, which keeps more of them valid, and in the pickles that
are inside of their storages.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import random
import zipfile
from pathlib import Path

import mutations
import public_layout as layout
import torch
from hostile_data import Reader, into
from safetensors.torch import save, save_file
from snapshots import built

from stylegan_pg.interchange.command import import_file
from stylegan_pg.networks.public_names import to_public

SMALL = {"channel_max": 2, "channel_base": 8, "z_dim": 2, "w_dim": 2, "mapping_layers": 1}
NAMES = ("os system", "builtins eval", "builtins getattr", "torch load", "numpy.core.multiarray _reconstruct")
NAMES += ("torch._utils _rebuild_tensor_v2", "torch.storage _load_from_bytes", "builtins bytearray", "torch Size")
NAMES += (
    "collections OrderedDict",
    "copyreg _reconstructor",
    "builtins set",
    "torch._utils os.system",
    "_codecs encode",
)


def _public(name: str, **how: object) -> dict[str, torch.Tensor]:
    small = {key: value for key, value in SMALL.items() if name != "r3gan" or key in ("channel_max", "z_dim")}
    return to_public(built(8, name=name, **{**small, **how})[0])


def _pickles() -> list[bytes]:
    """Valid files of each layout, in each protocol."""
    made = []
    with layout.originals():
        for protocol, (name, nested) in enumerate(
            [("stylegan2", True), ("stylegan3", False), ("r3gan", False), ("stylegan2", False)], start=2
        ):
            kwargs = {"channel_base": 8, "channel_max": 2, "num_fp16_res": 0}
            kwargs = {} if name == "r3gan" else {"synthesis_kwargs": layout.EasyDict(kwargs)} if nested else kwargs
            net = layout.module(_public(name), kwargs, "Generator", inner=name == "r3gan")
            data = layout.EasyDict(path="x", resolution=8)
            whole = {"G_ema": net, "augment_pipe": layout.augment_pipe(0.5), "training_set_kwargs": data}
            made.append(pickle.dumps(whole, protocol))
    return made


def operations(dice: random.Random, data: bytes, marker: str) -> bytes:
    """A pickle of which some operations are removed, repeated, swapped, given other arguments, or replaced by a call of
    another name."""
    if mutations.OFF:
        return data
    places = [place for _, _, place in pickletools.genops(data)]
    pieces = [data[a:b] for a, b in zip(places, [*places[1:], len(data)], strict=True)]
    for _ in range(dice.choice((1, 1, 2, 4))):
        at, other = dice.randrange(len(pieces)), dice.randrange(len(pieces))
        kind = dice.randrange(8)
        if kind == 0:
            pieces[at] = b""
        elif kind == 1:
            pieces[at] *= dice.choice((2, 2, 3, 1000))
        elif kind == 2:
            pieces[at], pieces[other] = pieces[other], pieces[at]
        elif kind == 3:
            pieces[at] = pieces[other]
        elif kind == 4:
            module, name = dice.choice(NAMES).split()
            pieces[at] = f"c{module}\n{name}\n".encode() + dice.choice((b"", b")R", b"X\x01\0\0\0a\x85R", b")\x81"))
        elif kind == 5:
            number = dice.choice(mutations.NUMBERS)
            pieces[at] = pickle.dumps(number, 2)[2:-1] if dice.random() < 0.5 else pieces[at][:1] + dice.randbytes(8)
        elif kind == 6:
            pieces[at] = dice.choice((b"N", b"}", b"]", b")", b"(", b"0", b"b", b"R", b"Q", b"\x88", b"\x8f", b"\x94"))
        else:
            command = f"touch {marker}".encode()
            pieces[at] = b"cos\nsystem\nX" + len(command).to_bytes(4, "little") + command + b"\x85R"
    return b"".join(pieces)


def pickles(base: Path) -> Reader:
    wholes = _pickles()

    def read(dice: random.Random, folder: Path, marker: str) -> None:
        data, kind = dice.choice(wholes), dice.random()
        inner = data.find(b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")  # of a storage, which is mutated together with its frame
        if kind < 0.5:
            data = operations(dice, data, marker)
        elif kind < 0.7 and inner > 0:
            begin, end = inner, min(inner + dice.choice((64, 400)), len(data))
            data = data[:begin] + mutations.octets(dice, data[begin:end]) + data[end:]
        else:
            data = mutations.octets(dice, data)
        list(import_file(into(folder, "net.pkl", data), folder / "out.safetensors"))

    return read


def torch_files(base: Path) -> Reader:
    public = _public("stylegan2")
    wholes = []
    for zipped in (True, False):
        for content in (public, {"G_ema": public, "kwargs": {"conv_clamp": 256}}):
            out = io.BytesIO()
            torch.save(content, out, _use_new_zipfile_serialization=zipped)
            wholes.append(out.getvalue())

    def read(dice: random.Random, folder: Path, marker: str) -> None:
        data, kind = dice.choice(wholes), dice.random()
        if kind < 0.6 and data[:2] == b"PK":
            out = io.BytesIO()
            method = zipfile.ZIP_DEFLATED if dice.random() < 0.05 and not mutations.OFF else zipfile.ZIP_STORED
            with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", method) as new:
                for member in old.infolist():
                    content = old.read(member)
                    if member.filename.endswith("data.pkl"):
                        content = operations(dice, content, marker)
                    elif dice.random() < 0.02:
                        content = mutations.octets(dice, content)
                    new.writestr(member.filename, content)
            data = out.getvalue()
        elif kind < 0.8 and data[:2] == b"PK":  # the directory, at the end
            data = data[:-2000] + mutations.octets(dice, data[-2000:])
        else:
            data = mutations.octets(dice, data)
        list(import_file(into(folder, "net.pt", data), folder / "out.safetensors"))

    return read


def public_safetensors(base: Path) -> Reader:
    public = {name: t.clone() for name, t in _public("stylegan2").items()}
    whole = save(public, {"conv_clamp": "256"})

    def read(dice: random.Random, folder: Path, marker: str) -> None:
        path = folder / "net.safetensors"
        if dice.random() < 0.5:
            path.write_bytes(mutations.octets(dice, whole))
        else:
            value = "256" if mutations.OFF else str(dice.choice(mutations.values(marker)))
            save_file(mutations.tensors(dice, public), path, {dice.choice(["conv_clamp", "kwargs"]): value})
        list(import_file(path, folder / "out.safetensors"))

    return read


MODELS = {"pickle": pickles, "torch": torch_files, "public": public_safetensors}
