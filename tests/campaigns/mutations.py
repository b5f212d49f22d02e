"""Mutations of valid data: bytes, JSON trees, headers of tars, and tensors, all drawn from one random.Random."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import torch

NUMBERS = (-1, -512, 0, 1, 3, 255, 1 << 16, 1 << 31, 1 << 32, 1 << 40, 1 << 62, 1 << 63, 1 << 64, 10**30, -(1 << 63))
FRACTIONS = (0.5, -0.5, 1e300, -1e300, 1e-300, float("nan"), float("inf"), float("-inf"))


OFF = False  # if True, nothing is mutated; such data must be accepted, otherwise the campaign proves nothing


def nested(depth: int) -> Any:
    tree: Any = []
    for _ in range(depth):
        tree = [tree]
    return tree


def values(marker: str) -> list[Any]:
    """Return values that are invalid for most fields. Texts contain commands that would create the file `marker`."""
    texts = ["", " ", "a" * 5000, "\x1b[2J\x1b]0;x\x07", "\u202egnp.exe", "../../x", "/etc/passwd", "a\0b", "٣", "1e3"]
    texts += [f"pipe:touch {marker}", f"$(touch {marker})", "${oc.env:HOME}", "nan", "::", "{0..9}", "*", "file:///x"]
    trees = [[], {}, [[]], {"": {}}, [1, 2], ["a"], nested(30), [0] * 300]
    return [*NUMBERS, *FRACTIONS, *texts, None, True, False, *trees]


def tree(dice: random.Random, content: Any, marker: str, times: int = 1) -> Any:
    """Return a copy of a JSON tree in which some nodes are replaced, removed, duplicated or renamed."""
    content = copy.deepcopy(content)
    for _ in range(0 if OFF else times):
        places = [(content, key) for key in _keys(content)]
        for node, key in places:  # breadth first, and as it grows
            places += [(node[key], inner) for inner in _keys(node[key])][: 5000 - len(places)]
        if not places:
            return dice.choice(values(marker))
        node, key = dice.choice(places)
        kind = dice.random()
        if kind < 0.7:
            node[key] = dice.choice(values(marker))
        elif kind < 0.8 and isinstance(node[key], int | float) and not isinstance(node[key], bool):
            node[key] = node[key] + dice.choice((-1, 1, 0.5, 1 << 20))
        elif kind < 0.9:
            del node[key]
        elif isinstance(node, list):
            node.insert(key, node[key])
        else:
            node[dice.choice(["", "x", key + "x", "__class__"])] = node.pop(key)
    return content


def _keys(node: Any) -> list[Any]:
    return list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []


def text(dice: random.Random, content: Any, marker: str) -> bytes:
    """Return a JSON tree as text. It is mutated as a tree, and sometimes also as bytes, or nested extremely deep."""
    if dice.random() < 0.02 and not OFF:
        return b"[" * 100_000 + b"]" * 100_000
    made = json.dumps(tree(dice, content, marker, dice.choice((1, 1, 2, 5)))).encode()
    return octets(dice, made) if dice.random() < 0.2 else made


def octets(dice: random.Random, data: bytes, times: int = 0) -> bytes:
    """Return bytes of which some are flipped, overwritten, removed, inserted, moved or truncated."""
    made = bytearray(data)
    for _ in range(0 if OFF else times or dice.choice((1, 1, 1, 2, 4, 16))):
        at, span = dice.randrange(len(made) + 1), dice.choice((1, 2, 4, 8, 64, 512, 4096))
        kind = dice.randrange(8)
        if kind <= 2 and at < len(made):
            made[at] ^= 1 << dice.randrange(8)
        elif kind == 3:
            made[at : at + span] = dice.randbytes(min(span, len(made) - at))
        elif kind == 4:
            made[at : at + span] = dice.choice((b"\0", b"\xff", b"9", b" ")) * min(span, len(made) - at)
        elif kind == 5:
            del made[at : at + span]
        elif kind == 6:
            other = dice.randrange(len(made) + 1)
            made[at:at] = made[other : other + span]
        elif dice.random() < 0.3:
            del made[at:]
    return bytes(made)


def tar_header(dice: random.Random, data: bytes) -> bytes:
    """Return a tar in which one field of one header is changed, with a correct checksum."""
    made = bytearray(data)
    headers = [i for i in range(0, len(made) - 511, 512) if made[i + 257 : i + 262] == b"ustar"]
    if not headers or OFF:
        return octets(dice, data)
    at = dice.choice(headers)
    fields = [("name", 0, 100), ("mode", 100, 8), ("mtime", 136, 12), ("link", 157, 100), ("magic", 257, 8)]
    fields += [("size", 124, 12)] * 3 + [("type", 156, 1)] * 2 + [("prefix", 345, 155)]
    name, start, length = dice.choice(fields)
    if name in ("size", "mtime"):
        number = dice.choice(NUMBERS)
        field = b"%011o\0" % number if 0 <= number < 8**11 else b"\x80" + (number % (1 << 88)).to_bytes(11, "big")
        field = dice.choice((field, b"\xff" + b"\xff" * 10 + bytes([dice.randrange(256)]), b"-0000000001\0", b"1_0\0"))
    elif name == "type":
        field = dice.choice((b"0", b"1", b"2", b"3", b"5", b"6", b"L", b"K", b"S", b"x", b"g", b"V", b"\0", b"7"))
    else:
        texts = (b"../../x", b"\x1b[2J", b"a" * length, b"\xff" * length, b"", b"/etc/passwd", b"a.b.c.png")
        field = dice.choice(texts)
    made[at + start : at + start + length] = field[:length].ljust(length, b"\0")
    made[at + 148 : at + 156] = b" " * 8
    made[at + 148 : at + 156] = b"%06o\0 " % sum(made[at : at + 512])
    return bytes(made)


def tensors(dice: random.Random, content: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a dictionary of tensors in which one has another shape, dtype, values or name, or is missing."""
    made = dict(content)
    if OFF:
        return made
    name = dice.choice(sorted(made))
    t, kind = made[name], dice.randrange(8)
    if kind == 0:
        del made[name]
    elif kind == 1:
        made[dice.choice([name + "x", "x/" + name, "", "G/\x1b[2J"])] = made.pop(name)
    elif kind == 2:
        made[name] = t.flatten()[: dice.randrange(max(t.numel(), 1))].clone()
    elif kind == 3:
        made[name] = t.to(dice.choice([torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8]))
    elif kind == 4:
        made[name] = t.reshape(-1)[None].clone()
    elif kind == 5:
        made[name] = torch.cat([t.flatten(), t.flatten()])
    elif kind == 6 and t.is_floating_point():
        made[name] = torch.full(t.shape, dice.choice(FRACTIONS), dtype=torch.float64).to(t.dtype)
    else:
        made[name] = torch.zeros(dice.choice([[], [0], [1], [1, 0, 3], [1 << 20]]), dtype=t.dtype)
    return made
