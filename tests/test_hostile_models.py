"""Hostile model files end in one line and leave no trace. tests/campaigns/hostile.py mutates valid ones at random."""

import functools
import io
import os
import pickle
import resource
import struct
import sys
import time
import zipfile
from pathlib import Path

import harness
import numpy as np
import public_layout as layout
import pytest
from snapshots import built

from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.interchange import importing, torch_files
from stylegan_pg.interchange.pickles import LONG_TEXT, MOST_NUMBER_KEYS, MOST_OPERATIONS, Refused
from stylegan_pg.networks.public_names import to_public

START, STOP = b"\x80\x04", b"."


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def named(module, name):
    return text(module) + text(name) + b"\x93"


def call(module, name, *arguments):
    return named(module, name) + b"(" + b"".join(arguments) + b"tR"


def whole(value):
    """A dictionary with a generator that is `value`."""
    return START + b"}" + text("G_ema") + value + b"s" + STOP


def number(n):
    return pickle.dumps(n, 2)[2:-1]


def legacy(content, facts=None, keys=b"]", numbers=b""):
    """A file of torch.save's older format with given pickles inside."""
    head = pickle.dumps(torch_files.MAGIC, 2) + pickle.dumps(1001, 2)
    return head + (facts or pickle.dumps({"little_endian": True}, 2)) + content + b"\x80\x02" + keys + STOP + numbers


def storage(count, key="0", kind="FloatStorage"):
    known = b"ctorch\n" + kind.encode() + b"\n"
    return b"(" + text("storage") + known + text(key) + text("cpu") + number(count) + b"tQ"


def tensor(store, shape, stride, offset=0):
    sizes = b"".join(b"(" + b"".join(number(n) for n in some) + b"t" for some in (shape, stride))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + store + number(offset) + sizes + b"\x89)tR"


def octets(data):
    return b"B" + struct.pack("<I", len(data)) + data


def zipped(members, method=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(f"archive/{name}", data)
    return out.getvalue()


def evil(marker, protocol=2):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    return pickle.dumps(Evil(), protocol)


def reads_as_module(marker):
    state = b"}" + text("_modules") + b"}" + text("a") + b"h\x00ss"
    return START + b"cR3GAN.Networks\nGenerator\n)\x81q\x00" + state + b"b" + STOP


@functools.lru_cache
def attacks(marker):
    """{name: (bytes, a part of the message)}"""
    touch = text(f"touch {marker}")
    bad = evil(marker)
    names = {
        "os.system": ("os", "system"),
        "posix": ("posix", "system"),
        "eval": ("builtins", "eval"),
        "exec": ("builtins", "exec"),
        "import": ("builtins", "__import__"),
        "getattr": ("builtins", "getattr"),
        "popen": ("subprocess", "Popen"),
        "shutil": ("shutil", "rmtree"),
        "torch.load": ("torch", "load"),
        "torch.hub": ("torch.hub", "load"),
        "dotted": ("torch._utils", "os.system"),
        "globals": ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        "through modules": ("torch", "_utils.warnings.sys.modules"),
        "class of a class": ("collections", "OrderedDict.__class__"),
        "numpy's exec": ("numpy.testing._private.utils", "runstring"),
        "escape": ("\x1b[2J\u202e", "x"),
        "empty": ("", ""),
    }
    found = {name: (whole(call(*pair, touch)), "refers to") for name, pair in names.items()}
    found |= {
        "protocol 0": (f"cos\nsystem\n(S'touch {marker}'\ntR.".encode(), "is no model file"),
        "protocol 2": (bad, "refers to posix.system"),
        "as a class": (START + named("os", "system") + b"(" + touch + b"t\x81.", "refers to os.system"),
        "inst": (START + b"(" + touch + b"ios\nsystem\n.", "INST"),
        "obj": (START + b"(" + named("builtins", "set") + touch + b"o.", "operation OBJ"),
        "newobj_ex": (START + named("builtins", "set") + b")}\x92.", "NEWOBJ_EX"),
        "ext1": (START + b"\x82\x01.", "EXT1"),
        "ext2": (START + b"\x83\x01\x00.", "EXT2"),
        "ext4": (START + b"\x84\x01\x00\x00\x00.", "EXT4"),
        "persistent id": (whole(text("x") + b"Q"), "outside of its pickle"),
        "persistent text": (START + b"Px\n.", "PERSID"),
        "buffer": (START + b"\x97.", "NEXT_BUFFER"),
        "protocol 9": (b"\x80\x09N.", "protocol 9"),
        "call of a text": (START + text("os.system") + b")R.", "no function"),
        "call of a dtype": (START + named("torch", "float32") + b")R.", "no function"),
        "nested torch.load": (whole(call("torch.storage", "_load_from_bytes", octets(legacy(bad)))), "posix.system"),
        "nested facts": (whole(call("torch.storage", "_load_from_bytes", octets(legacy(b"N.", bad)))), "posix.system"),
        "nested zip": (
            whole(call("torch.storage", "_load_from_bytes", octets(zipped({"data.pkl": bad})))),
            "posix.system",
        ),
        "nested plain pickle": (whole(call("torch.storage", "_load_from_bytes", octets(bad))), "did not write"),
        "nested twice": (
            whole(call("torch.storage", "_load_from_bytes", octets(legacy(call("torch.storage", "_load_from_bytes"))))),
            "refers to torch.storage._load_from_bytes",
        ),
        "module of older torch": (
            zipped({"data.pkl": START + b"(" + text("module") + text("x") + text("y") + text("z") + b"tQ."}),
            "other than storages",
        ),
        "zip": (zipped({"data.pkl": bad}), "posix.system"),
        "script": (zipped({"data.pkl": START + b"N.", "constants.pkl": b""}), "TorchScript"),
        "objects in numpy": (pickle.dumps({"G_ema": np.array([print], dtype=object)}), "numpy array of Python objects"),
        "objects as bytes": (
            START + named("numpy", "dtype") + b"(" + text("O8") + b"\x89\x88tR.",
            "numpy array of Python objects",
        ),
        "records in numpy": (pickle.dumps({"G": np.zeros(2, [("a", "f4")])}), "numpy array of the dtype V4"),
        "zip bomb": (zipped({"data.pkl": b"\0" * 5_000_000}, zipfile.ZIP_DEFLATED), "compressed"),
        "bomb as a storage": (
            zipped({"data.pkl": START + storage(10**6) + STOP, "data/0": bytes(4_000_000)}, zipfile.ZIP_DEFLATED),
            "compressed",
        ),
        "10 TB storage": (zipped({"data.pkl": START + storage(10**13) + STOP, "data/0": b"1234"}), "are declared"),
        "10 TB storage, older": (legacy(START + storage(10**13) + STOP, None, b"(" + text("0") + b"l."), "LIST"),
        "10 TB storage, old": (
            legacy(START + storage(10**13) + STOP, None, b"]" + text("0") + b"a", struct.pack("<q", 10**13)),
            "is cut off",
        ),
        "10 TB bytes": (START + b"\x8e" + struct.pack("<Q", 10**13) + b"x.", "is cut off"),
        "10 TB text": (START + b"\x8d" + struct.pack("<Q", 10**13) + b"x.", "is cut off"),
        "10 TB bytearray": (START + b"\x96" + struct.pack("<Q", (1 << 64) - 1) + b"x.", "is cut off"),
        "made bytes": (whole(call("builtins", "bytes", number(10**13))), "makes bytes"),
        "made bytearray": (whole(call("builtins", "bytearray", number(10**13))), "makes bytes"),
        "size below 0": (whole(call("torch", "Size", b"(" + number(-1) + b"t")), "size below 0"),
        "long number": (START + b"\x8b" + struct.pack("<i", 1 << 20) + bytes(1 << 20) + STOP, "whole number of"),
        "negative length": (START + b"\x8b" + struct.pack("<i", -5) + STOP, "is cut off"),
        "codec": (whole(call("_codecs", "encode", text("x"), text("rot13"))), "encodes something"),
        "key twice": (START + b"}(" + text("a") + b"N" + text("a") + b"Nu.", "occurs twice"),
        "list as a key": (START + b"}]Ns.", "list as a key"),
        "tuple as a key": (START + b"}))\x86Ns.", "tuple as a key"),
        "fraction as a key": (START + b"}G" + struct.pack(">d", 0.5) + b"Ns.", "float as a key"),
        "record as a key": (START + b"}" + call("R3GAN.Networks", "Generator") + b"Ns.", "Module as a key"),
        "colliding keys": (
            START + b"}(" + b"".join(number((i << 61) - i) + b"N" for i in range(MOST_NUMBER_KEYS + 9)) + b"u.",
            "more number keys",
        ),
        "colliding members": (
            START + b"\x8f(" + b"".join(number((i << 61) - i) for i in range(MOST_NUMBER_KEYS + 9)) + b"\x90.",
            "more number keys",
        ),
        "odd items": (START + b"}(" + text("a") + b"u.", "is damaged"),
        "state of a function": (START + named("torch", "Size") + b"}b.", "a state to a Function"),
        "state of a text": (START + text("a") + b"}b.", "a state to a str"),
        "slots": (
            START + call("R3GAN.Networks", "Generator") + b"}" + text("__class__") + b"Ns}\x86b}b.",
            "a state that is no table",
        ),
        "slots alone": (START + call("R3GAN.Networks", "Generator") + b"N}\x86b.", "a state that is no table"),
        "constructor of a text": (
            START + call("copyreg", "_reconstructor", named("torch", "Size"), named("builtins", "object"), text("x")),
            "of a value",
        ),
        "recalled": (START + b"j\xff\xff\xff\xff.", "recalls the value 4294967295"),
        "many operations": (START + b"N0" * MOST_OPERATIONS + STOP, "operations"),
        "bytes behind storages": (legacy(START + b"N" + STOP, numbers=b"x"), "1 bytes follow"),
        "marks alone": (START + b"(" * 500_000, "is damaged"),
        "nothing on the stack": (START + b"R.", "is damaged"),
        "pop of nothing": (START + b"0.", "is damaged"),
        "module in itself": (reads_as_module(marker), "more modules"),
        "storage in two ways": (
            zipped({"data.pkl": START + storage(1) + storage(1, kind="HalfStorage") + b"\x86.", "data/0": b"1234"}),
            "in two ways",
        ),
        "another order of bytes": (legacy(b"N.", pickle.dumps({"little_endian": False}, 2)), "order of bytes"),
        "name without an end": (START + b"c" + b"x" * 10_000, "does not end"),
        "bad text": (START + b"X\x01\x00\x00\x00\xff.", "not UTF-8"),
    }
    return found


@pytest.fixture(scope="module")
def marker(tmp_path_factory):
    return tmp_path_factory.mktemp("trace") / "marker"


@pytest.mark.parametrize("name", attacks("marker"))
def test_attacks_leave_no_trace(name, marker, tmp_path):
    data, message = attacks(marker)[name]
    path = tmp_path / "model.pkl"
    path.write_bytes(data)
    begin = time.process_time()
    with pytest.raises(UsageError, match=message) as error:
        importing.read(path).generator("G_ema")
    assert time.process_time() - begin < 10
    shown = str(error.value)
    assert "\n" not in shown
    assert shown.isprintable()
    assert len(shown) < 600
    assert os.listdir(tmp_path) == ["model.pkl"]
    assert not marker.exists()


def test_source_text_in_a_file_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "SOURCE", f"open({str(tmp_path / 'marker')!r}, 'w').close()\n")
    made = layout.module(to_public(built(16)[0]), {}, "Generator")
    path = layout.write(tmp_path / "model.pkl", {"G_ema": made}, 4)
    assert b"marker" in path.read_bytes()
    before = set(sys.modules)
    importing.read(path).generator("G_ema")
    assert os.listdir(tmp_path) == ["model.pkl"]
    assert not {name for name in set(sys.modules) - before if name.startswith(("dnnlib", "torch_utils", "R3GAN"))}


DEEP = 100_000
NESTED = {
    "lists": b"]" * DEEP + b"a" * (DEEP - 1),
    "tuples": b")" + b"\x85" * DEEP,
    "dictionaries": b"".join([b"}" + text("a")] * DEEP) + b"N" + b"s" * DEEP,
    "parameters": named("torch._utils", "_rebuild_parameter") * DEEP + b")" + b"R" * DEEP,
    "modules": b"cR3GAN.Networks\nGenerator\nq\x00"
    + b"".join([b"h\x00)\x81}" + text("_modules") + b"}" + text("a")] * (DEEP // 10))
    + b"N"
    + b"ssb" * (DEEP // 10),
    "marks": b"(" * DEEP + b"t" * DEEP,
}


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize("place", ["G_ema", "training_set_kwargs"])
def test_deep_nesting(name, place, tmp_path):
    path = tmp_path / "model.pkl"
    good = b"}" + text("a") + tensor_bytes() + b"s"
    path.write_bytes(START + b"}" + text(place) + NESTED[name] + b"s" + text("G") + good + b"s" + STOP)
    with pytest.raises(UsageError) as error:
        importing.read(path).generator("G")
    assert "\n" not in str(error.value)


def tensor_bytes():
    payload = legacy(START + storage(4) + STOP, None, b"]" + text("0") + b"a", struct.pack("<q4f", 4, 1, 2, 3, 4))
    return tensor(call("torch.storage", "_load_from_bytes", octets(payload)), [4], [1])


@pytest.mark.parametrize(
    ("shape", "stride", "offset", "message"),
    [
        ([10**13], [1], 0, "beyond all bounds"),
        ([1 << 38, 8], [0, 0], 0, "declares the tensor"),
        ([5], [1], 0, "declares the tensor"),
        ([4], [0], 4, "lies outside"),
        ([2], [1 << 39], 0, "lies outside"),
        ([2], [2], 2, "lies outside"),
        ([-1], [1], 0, "below 0"),
        ([4], [-1], 3, "below 0"),
        ([2, 2], [1], 0, "shape and strides"),
        ([1] * 9, [1] * 9, 0, "shape is none"),
    ],
)
def test_tensors_that_are_larger_than_their_file(shape, stride, offset, message):
    payload = legacy(START + storage(4) + STOP, None, b"]" + text("0") + b"a", struct.pack("<q4f", 4, 1, 2, 3, 4))
    store = call("torch.storage", "_load_from_bytes", octets(payload))
    data = START + tensor(store, shape, stride, offset) + STOP
    with pytest.raises(Refused, match=message):
        torch_files.materialize(torch_files.read(memoryview(data)), "x")


def test_many_names_for_one_tensor(tmp_path):
    """A thousand tensors that all are one storage of a megabyte would take a gigabyte."""
    payload = legacy(
        START + storage(1 << 18) + STOP, None, b"]" + text("0") + b"a", struct.pack("<q", 1 << 18) + bytes(1 << 20)
    )
    made = tensor(call("torch.storage", "_load_from_bytes", octets(payload)), [1 << 18], [1])
    named_all = b"".join(text(f"n{i}") + b"h\x00s" for i in range(1000))
    path = tmp_path / "model.pkl"
    path.write_bytes(START + made + b"q\x000}" + text("G_ema") + b"}" + named_all + b"s" + STOP)
    with pytest.raises(UsageError, match="more than it can hold"):
        importing.read(path).generator("G_ema")


def test_repeated_references_do_not_multiply(tmp_path):
    """Lists of lists that double at each level have 2^60 entries when they are written out."""
    doubled = b"]q\x00" + b"".join(b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(60))
    path = tmp_path / "model.pkl"
    good = b"}" + text("a") + tensor_bytes() + b"s"
    path.write_bytes(START + b"}" + text("training_set_kwargs") + doubled + b"s" + text("G") + good + b"s" + STOP)
    begin = time.process_time()
    with pytest.raises(UsageError):
        importing.read(path).generator("G")
    assert time.process_time() - begin < 2


def test_every_truncation_is_refused(tmp_path):
    made = layout.module(to_public(built(8, channel_max=2)[0]), {"synthesis_kwargs": {}}, "Generator")
    for protocol in (2, 4):
        data = layout.write(tmp_path / "model.pkl", {"G_ema": made}, protocol).read_bytes()
        for length in range(0, len(data), 97):
            (tmp_path / "model.pkl").write_bytes(data[:length])
            with pytest.raises(UsageError) as error:
                importing.read(tmp_path / "model.pkl")
            assert "\n" not in str(error.value)


def test_the_plain_values_of_a_pickle_are_those_that_python_reads():
    """For what needs no names, the interpreter and Python's own unpickler agree."""
    shared = ["a", 1]
    values = [None, True, False, 0, 255, 65535, -1, 1 << 31, -(1 << 40), 1 << 100, 0.5, -1e300, "", "ä\u20ac\U0001f600"]
    values += ["x" * 300, [], [1, [2, [3]]], (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {}, {"a": {"b": [1]}, 5: 6}]
    values += [{"a", "b"}, frozenset({"c", 3}), [shared, shared], {"same": shared, "again": shared}, list(range(3000))]
    values += [{str(i): i for i in range(3000)}, b"", b"abc", bytes(range(256)), bytearray(b"xyz")]
    for protocol in (2, 3, 4, 5):
        for value in values:
            data = pickle.dumps(value, protocol)
            assert torch_files.read(memoryview(data)) == pickle.loads(data), (value, protocol)
        long = b"\xff\x00" * (LONG_TEXT // 2 + 1)  # protocol 2 stores it as a text
        assert bytes(torch_files.read(memoryview(pickle.dumps(long, protocol)))) == long
        both = torch_files.read(memoryview(pickle.dumps([shared, shared], protocol)))
        assert both[0] is both[1]


def holder(entries, children):
    """A generator with many children, which are all one module with many empty entries."""
    name = b"cR3GAN.Networks\nGenerator\n)\x81"
    empty = b"".join(text(f"e{i}") + b"N" for i in range(entries))
    inner = name + b"}" + text("_modules") + b"}(" + empty + b"usbq\x00"
    outer = b"".join(text(f"c{i}") + b"h\x00" for i in range(children))
    return inner + b"0" + name + b"}" + text("_modules") + b"}(" + outer + b"usb"


@pytest.mark.parametrize(("entries", "children"), [(100_000, 4_000), (10, 100_000), (4_000, 4_000)])
def test_one_module_in_many_places(entries, children, tmp_path):
    path = tmp_path / "model.pkl"
    path.write_bytes(whole(holder(entries, children)))
    begin = time.process_time()
    with pytest.raises(UsageError, match="more modules than"):
        importing.read(path)
    assert time.process_time() - begin < 5


@pytest.mark.distributed
def test_the_commands_refuse_in_one_line(tmp_path, tiny_data):
    marker = tmp_path / "marker"
    path = tmp_path / "model.pkl"
    path.write_bytes(evil(marker))
    done = harness.command("import", path, expected=2)
    assert "refers to posix.system" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    args = harness.arguments(tmp_path / "run", tiny_data, init=path)
    told = harness.finish(harness.start(args), expected=2)
    assert f"init={path} refers to posix.system" in told
    assert "Traceback" not in told
    assert not marker.exists()


def test_memory_is_limited(tmp_path):
    """The largest structures that a small file can ask for stay below 1 GiB, in a process that may not have more."""
    cases = [
        START + b"\x8f" * (MOST_OPERATIONS - 10) + STOP,
        START + b"}" * (MOST_OPERATIONS - 10) + STOP,
        START + b"(" * (MOST_OPERATIONS - 10) + STOP,
        START + b"N" + b"\x94" * (MOST_OPERATIONS - 10) + STOP,
        START + b"N" + b"".join(b"r" + struct.pack("<I", i << 12) for i in range(900_000)) + STOP,
        START + text("ab" * 400_000) + b"q\x000" + call("_codecs", "encode", b"h\x00", text("latin1")) * 3000 + STOP,
    ]
    for i, data in enumerate(cases):
        (tmp_path / f"{i}.pkl").write_bytes(data)
    status = Path("/proc/self/status").read_text()
    used = next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmData"))
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + (1 << 30), before[1]))
    try:
        for i in range(len(cases)):
            with pytest.raises((UsageError, RunError)) as error:
                importing.read(tmp_path / f"{i}.pkl")
            assert "more memory" not in str(error.value)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
