"""The allow-list: the names that model files may refer to, and the functions that make inert records of them.

It has what public checkpoints of StyleGAN2-ADA, StyleGAN3 and R3GAN refer to, as torch and numpy of different versions
write it. Every function checks its arguments, which may be anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from stylegan_pg.interchange.inert import (
    FORMS,
    MOST_ELEMENTS,
    Array,
    ArrayType,
    Module,
    Opaque,
    Storage,
    StorageType,
    Tensor,
    is_octets,
    sizes_of,
)
from stylegan_pg.interchange.pickles import Budget, Function, LongText, Refused
from stylegan_pg.untrusted import printable

# ---------------------------------------------------------------------------------------------------- Python's own


def _encode(budget: Budget) -> Callable[..., bytes]:
    """The bytes that protocols below 3 store as a text, of which each character is one byte."""
    known: dict[int, tuple[LongText, bytes]] = {}  # with the text, so that its id is not used again

    def encode(text: Any, encoding: Any) -> bytes:
        if encoding not in ("latin1", "latin-1") or not isinstance(text, str | LongText):
            raise Refused("encodes something other than bytes in a text")
        if isinstance(text, LongText) and id(text) in known:
            return known[id(text)][1]
        budget.take("encoded", len(text.utf8) if isinstance(text, LongText) else len(text))
        made = (text if isinstance(text, str) else str(text.utf8, "utf-8")).encode("latin-1")
        if isinstance(text, LongText):
            known[id(text)] = text, made
        return made

    return encode


def _as_bytes(given: Any = b"") -> Any:
    if not is_octets(given):  # bytes(n) would make n bytes
        raise Refused("makes bytes of something that is none")
    return given


def _sets(budget: Budget) -> Callable[..., set[Any]]:
    def as_set(items: Any = ()) -> set[Any]:
        if type(items) not in (list, tuple) or not all(type(item) in (str, int) for item in items):
            raise Refused("makes a set of something other than names")
        budget.take("operations", len(items))
        budget.take("number_keys", sum(type(item) is int for item in items))
        return set(items)

    return as_set


def _tables(budget: Budget) -> Callable[..., dict[str, Any]]:
    def as_table(items: Any = ()) -> dict[str, Any]:
        if type(items) not in (list, tuple):
            _no_table()
        budget.take("operations", len(items))
        made: dict[str, Any] = {}
        for key, value in items:
            if type(key) is not str or key in made:
                _no_table()
            made[key] = value
        return made

    return as_table


def _no_table() -> Any:
    raise Refused("makes a table of something that is none")


def _reconstructor(cls: Any, base: Any, state: Any) -> Any:
    """copyreg's way to make an object without calling its constructor."""
    if not isinstance(cls, Function) or not isinstance(base, Function):
        raise Refused("makes an object of something that is no class")
    if state not in (None, {}):
        raise Refused(f"makes a {cls.name} of a value")
    return cls.call()


# ---------------------------------------------------------------------------------------------------- networks


def _persistent(meta: Any) -> Module:
    """A module of the published networks, which are stored with the source text of their classes."""
    if type(meta) is not dict or meta.get("type") != "class":
        raise Refused("holds a persistent object that is no module")
    name, state = meta.get("class_name"), meta.get("state")
    if type(name) is not str or type(state) is not dict:
        raise Refused("holds a persistent object without a class name or state")
    return Module(name, state)


def _class(name: str) -> Callable[[], Module]:
    return lambda: Module(name)


# ---------------------------------------------------------------------------------------------------- tensors


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Tensor:
    """What follows (whether it requires a gradient, hooks) has no meaning here."""
    if not isinstance(storage, Storage) or type(offset) is not int or not 0 <= offset <= MOST_ELEMENTS:
        raise Refused("holds a tensor without numbers")
    made = Tensor(storage, offset, sizes_of(shape), sizes_of(stride))
    if len(made.shape) != len(made.stride):
        raise Refused("holds a tensor whose shape and strides do not fit")
    return made


def _rebuild_parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise Refused("holds a parameter that is no tensor")
    return data


def _rebuild_from_type(function: Any, kind: Any, arguments: Any, _: Any) -> Any:
    rebuilds = isinstance(function, Function) and function.call in (_rebuild_tensor, _rebuild_parameter)
    if not rebuilds or type(arguments) is not tuple or type(kind) is not Opaque:
        raise Refused("rebuilds something that is no tensor")
    return function.call(*arguments)


def _text(value: Any, *_: Any) -> str:
    if type(value) is not str:
        raise Refused("holds a device that is no name")
    return value


def _numpy_type(kind: Any, *_: Any) -> ArrayType:
    if type(kind) is not str or kind not in FORMS:
        what = "Python objects" if type(kind) is str and kind.startswith("O") else f"the dtype {printable(kind, 40)}"
        raise Refused(f"holds a numpy array of {what}; only those of plain numbers are read")
    return ArrayType(kind)


def _numpy_empty(kind: Any, shape: Any, _: Any) -> Array:
    if not isinstance(kind, Opaque) or kind.name != "ndarray":
        raise Refused("makes a numpy array of another class")
    return Array()


def _numpy_frombuffer(data: Any, kind: Any, shape: Any, order: Any = "C", *_: Any) -> Array:
    made = Array()
    made.fill(shape, kind, data)
    if order != "C" and len(made.shape) > 1:
        made.data = b""
    return made


def _numpy_scalar(kind: Any, data: Any) -> int | float | None:
    made = Array()
    made.fill((), kind, data)
    found = made.values(1)
    return found[0] if found else None


# ---------------------------------------------------------------------------------------------------- the allow-list

DTYPES = {
    "float64": torch.float64,
    "double": torch.float64,
    "float32": torch.float32,
    "float": torch.float32,
    "float16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "long": torch.int64,
    "int32": torch.int32,
    "int": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LAYERS = {
    "torch.nn.modules.container": ("ModuleList", "Sequential", "ModuleDict"),
    "torch.nn.modules.linear": ("Linear", "Identity"),
    "torch.nn.modules.conv": ("Conv2d",),
    "torch.nn.modules.activation": ("LeakyReLU", "ReLU"),
    "torch.nn.modules.module": ("Module",),
    "R3GAN.Networks": (
        *("Generator", "Discriminator", "GeneratorStage", "DiscriminatorStage", "ResidualBlock", "Convolution"),
        *("UpsampleLayer", "DownsampleLayer", "GenerativeBasis", "DiscriminativeBasis"),
    ),
    "R3GAN.FusedOperators": ("BiasedActivation", "BiasedActivationReference", "BiasedActivationCUDA"),
    "R3GAN.Resamplers": tuple(
        f"{kind}{way}{where}"
        for kind in ("Interpolative", "Inplace")
        for way in ("Upsampler", "Downsampler")
        for where in ("", "Reference", "CUDA")
    ),
}


def _named(modules: Iterable[str], name: str, value: Any) -> dict[tuple[str, str], Any]:
    if callable(value) and not isinstance(value, torch.dtype):
        return {(module, name): Function(module, name, value) for module in modules}
    return {(module, name): value for module in modules}


def names(budget: Budget, load_from_bytes: Callable[[Any], Any] | None) -> dict[tuple[str, str], Any]:
    """The allow-list for one file.

    Args:
        budget: of the file.
        load_from_bytes: reads a file of torch.save inside of another pickle; None where none may be.
    """
    builtins, numpy = ("builtins", "__builtin__"), ("numpy.core.multiarray", "numpy._core.multiarray")
    as_set, as_table = _sets(budget), _tables(budget)
    found: dict[tuple[str, str], Any] = {
        **_named(["_codecs"], "encode", _encode(budget)),
        **_named(builtins, "bytes", _as_bytes),
        **_named(builtins, "bytearray", _as_bytes),
        **_named(builtins, "set", as_set),
        **_named(builtins, "frozenset", lambda items=(): frozenset(as_set(items))),
        **_named(builtins, "object", _class("object")),
        **_named(builtins, "dict", as_table),
        **_named(["copyreg", "copy_reg"], "_reconstructor", _reconstructor),
        **_named(["collections"], "OrderedDict", as_table),
        **_named(["dnnlib.util", "dnnlib"], "EasyDict", as_table),
        **_named(["torch_utils.persistence"], "_reconstruct_persistent_obj", _persistent),
        **_named(["torch._utils"], "_rebuild_tensor", _rebuild_tensor),
        **_named(["torch._utils"], "_rebuild_tensor_v2", _rebuild_tensor),
        **_named(["torch._utils"], "_rebuild_parameter", _rebuild_parameter),
        **_named(["torch._utils"], "_rebuild_parameter_with_state", _rebuild_parameter),
        **_named(["torch._tensor"], "_rebuild_from_type_v2", _rebuild_from_type),
        **_named(["torch"], "Size", lambda sizes=(): sizes_of(sizes)),
        **_named(["torch"], "device", _text),
        **_named(numpy, "_reconstruct", _numpy_empty),
        **_named(numpy, "scalar", _numpy_scalar),
        **_named(["numpy.core.numeric", "numpy._core.numeric"], "_frombuffer", _numpy_frombuffer),
        **_named(["numpy"], "dtype", _numpy_type),
        ("numpy", "ndarray"): Opaque("ndarray"),
        ("torch", "Tensor"): Opaque("Tensor"),
        ("torch.nn.parameter", "Parameter"): Opaque("Parameter"),
        ("torch.nn.parameter", "Buffer"): Opaque("Buffer"),
        ("torch.storage", "UntypedStorage"): StorageType(torch.uint8),
        ("torch.storage", "_UntypedStorage"): StorageType(torch.uint8),
    }
    if load_from_bytes is not None:
        found |= _named(["torch.storage"], "_load_from_bytes", load_from_bytes)
    found |= {("torch", name): dtype for name, dtype in DTYPES.items()}
    found |= {("torch", name): Opaque(name) for name in ("contiguous_format", "channels_last", "preserve_format")}
    found |= {("torch", name): StorageType(dtype) for name, dtype in STORAGES.items()}
    found |= {("numpy", name): Opaque(name) for name in ("float32", "float64", "int32", "int64", "uint8")}
    for module, classes in _LAYERS.items():
        for name in classes:
            found |= _named([module], name, _class(name))
    return found
