"""An interpreter of pickles that imports nothing and calls nothing but functions of this package.

A pickle is a program for a small stack machine (Python's module pickletools describes its operations). Python's own
unpickler imports whatever the program names and calls it. This one looks each name up in a table of exact (module,
name) pairs that the caller gives, and refuses the file at the first name that is not there. What the table holds are
functions that check their arguments and return inert records (names.py, inert.py), never the real classes.

Everything that a file can make grow is limited before memory is taken: the number of operations, the text that is
decoded, the digits of whole numbers, and the keys that are numbers, whose hashes an author can make collide. Bytes stay
views of the file. Protocols 2 to 5 are read, which is what Python 3 and torch write.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stylegan_pg.untrusted import printable

MOST_OPERATIONS = 1_000_000  # published files have some 100,000
MOST_TEXT = 64 << 20  # bytes of text that are decoded
LONG_TEXT = 1 << 20  # bytes; longer texts stay undecoded: protocol 2 stores bytes in this form
MOST_NUMBER_LENGTH = 64  # bytes of a whole number
MOST_NUMBER_KEYS = 5_000  # of all dictionaries and sets together
SMALL = 256  # bytes; shorter byte strings are copied out of the file, so that they can be compared


class Refused(Exception):  # noqa: N818 - it names what happened to the file
    """A file is not read. The message says why, as the end of a sentence that begins with the file's name."""


@dataclass
class Budget:
    """What one file may use, with all pickles inside of it."""

    operations: int = MOST_OPERATIONS
    text: int = MOST_TEXT
    number_keys: int = MOST_NUMBER_KEYS
    encoded: int = 0  # bytes that may still be made of texts, see inert.encode; set to the size of the file

    def take(self, what: str, amount: int) -> None:
        """
        Raises:
            Refused: nothing is left.
        """
        left = getattr(self, what) - amount
        if left < 0:
            raise Refused(f"has more {what.replace('_', ' ')} than any model file needs")
        setattr(self, what, left)


@dataclass(frozen=True)
class Function:
    """A name that a file may call: `call(*arguments)` returns an inert value, or raises Refused."""

    module: str
    name: str
    call: Callable[..., Any]


@dataclass(frozen=True)
class LongText:
    """A text of more than LONG_TEXT bytes, not decoded: UTF-8."""

    utf8: memoryview


class Buildable:
    """What a pickle may give a state to."""

    def build(self, state: Any) -> None:
        """
        Raises:
            Refused: the state does not fit.
        """
        raise NotImplementedError


Table = Mapping[tuple[str, str], Any]
_UNFIT = (TypeError, ValueError, AttributeError, OverflowError)  # of functions whose arguments are anything


class Interpreter:
    """Runs one pickle: `Interpreter(...).run()` returns the object, and `at` is then the place behind it.

    Args:
        data: the file.
        at: where the pickle begins.
        table: what names stand for: Function, or any inert value. A value that is not a Function cannot be called.
        budget: is reduced by what the pickle uses.
        persistent: what a persistent id (of torch.save: a storage) stands for; None where there are none.
    """

    def __init__(
        self,
        data: memoryview,
        at: int,
        table: Table,
        budget: Budget,
        persistent: Callable[[Any], Any] | None = None,
    ):
        self.data, self.at, self.table, self.budget, self.persistent = data, at, table, budget, persistent
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """
        Raises:
            Refused: the pickle is damaged, too large, or does something that no model file needs.
        """
        operations = _OPERATIONS
        try:
            while True:
                code = self.data[self.at]
                self.at += 1
                self.budget.operations -= 1
                if self.budget.operations < 0:
                    raise Refused(f"has more than {MOST_OPERATIONS} operations, more than any model file needs")
                if code == STOP:
                    return self.stack.pop()
                act = operations.get(code)
                if act is None:
                    raise Refused(_unknown(code))
                act(self)
        except IndexError:  # nothing is left of the file, or on the stack
            raise Refused("is damaged: its pickle ends early, or takes what is not there") from None

    # ------------------------------------------------------------------------------------------------ reading

    def take(self, count: int) -> memoryview:
        """The next `count` bytes."""
        if count < 0 or count > len(self.data) - self.at:
            raise Refused(f"is cut off or damaged: it ends before the {count} bytes that its pickle announces")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        """A line of ASCII text, without its end."""
        piece = bytes(self.data[self.at : self.at + 512])
        end = piece.find(b"\n")
        if end < 0 or not piece[:end].isascii():
            raise Refused("is damaged: a name in its pickle does not end, or is no plain text")
        self.at += end + 1
        return piece[:end].decode("ascii")

    def text(self, length: int) -> str | LongText:
        data = self.take(length)
        if length > LONG_TEXT:
            return LongText(data)
        self.budget.take("text", length)
        try:
            return str(data, "utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise Refused("is damaged: a text in its pickle is not UTF-8") from None

    def octets(self, length: int) -> bytes | memoryview:
        data = self.take(length)
        return bytes(data) if length <= SMALL else data

    def long(self, length: int) -> int:
        if length > MOST_NUMBER_LENGTH:
            raise Refused(f"holds a whole number of {length} bytes")
        return int.from_bytes(self.take(length), "little", signed=True)

    # ------------------------------------------------------------------------------------------------ the stack

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        """What was pushed since the last mark, which is removed."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def top(self, kind: type) -> Any:
        """The topmost value, which must be of a type."""
        value = self.stack[-1]
        if type(value) is not kind:
            raise Refused(f"is damaged: its pickle treats something else as a {kind.__name__}")
        return value

    def wrap(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def extend(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def put(self, items: list[Any]) -> None:
        """Put keys and values, in turn, into the dictionary on top."""
        target = self.top(dict)
        if len(items) % 2:
            raise IndexError
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.check_key(key)
            if key in target:
                raise Refused(f"holds a dictionary in which the key {printable(repr(key), 60)} occurs twice")
            target[key] = value

    def check_key(self, key: Any) -> None:
        """A text, or a whole number. Texts have random hashes; numbers, which can be made to collide, are few."""
        if type(key) is not str:
            if type(key) is not int:
                raise Refused(f"holds a dictionary or set with a {type(key).__name__} as a key")
            self.budget.take("number_keys", 1)

    def members(self, items: list[Any]) -> list[Any]:
        for item in items:
            self.check_key(item)
        return items

    def keep(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def recall(self, place: int) -> None:
        if place not in self.memo:
            raise Refused(f"is damaged: its pickle recalls the value {place}, which it has not kept")
        self.stack.append(self.memo[place])

    # ------------------------------------------------------------------------------------------------ names and calls

    def name(self, module: Any, name: Any) -> None:
        """Push what a name stands for. The pair must be in the table as it is; a dot in it has no meaning."""
        if type(module) is not str or type(name) is not str:
            raise Refused("is damaged: a name in its pickle is no text")
        found = self.table.get((module, name), self)
        if found is self:
            raise Refused(_foreign(module, name))
        self.stack.append(found)

    def call(self) -> None:
        arguments = self.stack.pop()
        function = self.stack.pop()
        if not isinstance(function, Function) or type(arguments) is not tuple:
            raise Refused("calls something that is no function")
        try:
            self.stack.append(function.call(*arguments))
        except _UNFIT:
            raise Refused(f"calls {function.module}.{function.name} with arguments that do not fit") from None

    def build(self) -> None:
        """Give the object on top its state. Dictionaries have none; torch keeps versions of layers in it."""
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is dict and (state is None or type(state) is dict):
            return
        if not isinstance(target, Buildable):
            raise Refused(f"gives a state to a {type(target).__name__}, which has none")
        try:
            target.build(state)
        except _UNFIT:
            raise Refused(f"gives a {type(target).__name__} a state that does not fit") from None

    def stored(self) -> None:
        given = self.stack.pop()
        if self.persistent is None:
            raise Refused("refers to objects outside of its pickle")
        self.stack.append(self.persistent(given))


def _foreign(module: str, name: str) -> str:
    whole = printable(f"{module}.{name}", 120)
    if module.startswith("dnnlib.tflib"):
        return f"is of the TensorFlow version of StyleGAN ({whole}): convert it with that project's script for PyTorch"
    return f"refers to {whole}, which is not among the names that model files need; nothing in it was run"


def _unknown(code: int) -> str:
    known = next((op for op in pickletools.opcodes if op.code == chr(code)), None)
    if known is None:
        return f"is damaged, or no pickle: {code:#04x} is no operation"
    if known.proto < 2 and known.name not in ("INST", "OBJ", "PERSID", "EXT1"):
        return f"uses the operation {known.name} of an old pickle protocol: write it with protocol 2 to 5"
    return f"uses the operation {known.name}, which no model file needs"


def _protocol(m: Interpreter) -> None:
    if (version := m.number("<B")) > 5:
        raise Refused(f"is a pickle of protocol {version}; 2 to 5 are known")


def _global(m: Interpreter) -> None:
    module = m.line()
    m.name(module, m.line())


def _stack_global(m: Interpreter) -> None:
    name = m.stack.pop()
    m.name(m.stack.pop(), name)


def _set_items(m: Interpreter) -> None:
    m.put(m.since_mark())


def _set_item(m: Interpreter) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    m.put([key, value])


def _add_items(m: Interpreter) -> None:
    items = m.members(m.since_mark())
    m.top(set).update(items)


STOP = ord(".")
_OPERATIONS: dict[int, Callable[[Interpreter], Any]] = {
    0x80: _protocol,
    0x95: lambda m: m.take(8),  # FRAME: a hint how much to read at once
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("J"): lambda m: m.push(m.number("<i")),
    ord("K"): lambda m: m.push(m.number("<B")),
    ord("M"): lambda m: m.push(m.number("<H")),
    0x8A: lambda m: m.push(m.long(m.number("<B"))),
    0x8B: lambda m: m.push(m.long(m.number("<i"))),
    ord("G"): lambda m: m.push(m.number(">d")),
    ord("C"): lambda m: m.push(m.octets(m.number("<B"))),
    ord("B"): lambda m: m.push(m.octets(m.number("<I"))),
    0x8E: lambda m: m.push(m.octets(m.number("<Q"))),
    0x96: lambda m: m.push(m.octets(m.number("<Q"))),
    0x8C: lambda m: m.push(m.text(m.number("<B"))),
    ord("X"): lambda m: m.push(m.text(m.number("<I"))),
    0x8D: lambda m: m.push(m.text(m.number("<Q"))),
    ord("]"): lambda m: m.push([]),
    ord("a"): lambda m: m.extend([m.stack.pop()]),
    ord("e"): lambda m: m.extend(m.since_mark()),
    ord(")"): lambda m: m.push(()),
    ord("t"): lambda m: m.push(tuple(m.since_mark())),
    0x85: lambda m: m.wrap(1),
    0x86: lambda m: m.wrap(2),
    0x87: lambda m: m.wrap(3),
    ord("}"): lambda m: m.push({}),
    ord("s"): _set_item,
    ord("u"): _set_items,
    0x8F: lambda m: m.push(set()),
    0x90: _add_items,
    0x91: lambda m: m.push(frozenset(m.members(m.since_mark()))),
    ord("("): lambda m: m.mark(),
    ord("0"): lambda m: m.stack.pop(),
    ord("1"): lambda m: m.since_mark(),
    ord("2"): lambda m: m.push(m.stack[-1]),
    ord("h"): lambda m: m.recall(m.number("<B")),
    ord("j"): lambda m: m.recall(m.number("<I")),
    ord("q"): lambda m: m.keep(m.number("<B")),
    ord("r"): lambda m: m.keep(m.number("<I")),
    0x94: lambda m: m.keep(len(m.memo)),
    ord("c"): _global,
    0x93: _stack_global,
    ord("R"): lambda m: m.call(),
    0x81: lambda m: m.call(),  # NEWOBJ: Function.call stands for a class's __new__, too
    ord("b"): lambda m: m.build(),
    ord("Q"): lambda m: m.stored(),
}
