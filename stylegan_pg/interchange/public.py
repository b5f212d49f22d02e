"""What a model file holds: its networks by name, with the arguments of their constructors, and facts about training."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from stylegan_pg.checkpoint.tensor_file import is_finite
from stylegan_pg.interchange.inert import Array, Module, Opaque, Tensor
from stylegan_pg.interchange.pickles import Refused
from stylegan_pg.interchange.torch_files import materialize
from stylegan_pg.untrusted import is_number, printable

PARTS = ("G_ema", "G", "D")
MOST_MODULES, MOST_TENSORS, MOST_DEPTH = 5_000, 20_000, 32  # of one network
MOST_ENTRIES = 200_000  # of the tables of all its modules; one module may be inside of several
_TABLES = ("_parameters", "_buffers", "_modules")
MOST_VALUES, MOST_TEXT = 2_000, 1_000  # of one description; characters of one of its texts
# Attributes of modules that change what they compute. The public classes keep them beside their tensors, and they tell
# more than the arguments, whose defaults differ from version to version.
FACTS = {
    *("conv_clamp", "use_fp16", "num_fp16_res", "activation", "num_critical", "channel_base", "channel_max"),
    *("margin_size", "output_scale", "bias_gain", "DataType"),
}


@dataclass
class Network:
    """A network of a file: its tensors under their public names, the arguments of its constructor as JSON values, and
    {path of a module: {attribute: value}} of the attributes in FACTS."""

    tensors: dict[str, Tensor | torch.Tensor]
    kwargs: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    shown: str = ""  # the name of its class

    def state(self, part: str, most_bytes: int) -> dict[str, torch.Tensor]:
        """The tensors, float32 on the CPU, by public name.

        Raises:
            Refused: they are damaged, not finite, no numbers, or together larger than `most_bytes`.
        """
        sizes = [_bytes(t) for t in self.tensors.values()]
        if sum(sizes) > most_bytes:
            raise Refused(f"declares {sum(sizes)} bytes of tensors for {part}, more than it can hold")
        made = {}
        for name, t in self.tensors.items():
            made[name] = t if isinstance(t, torch.Tensor) else materialize(t, f"{part}.{name}")
            if not made[name].is_floating_point():
                made.pop(name)  # counters and flags: no parameter of the networks is one
                continue
            made[name] = made[name].to(torch.float32)
            if not is_finite(made[name]):
                raise Refused(f"holds numbers that are not finite, in {part}.{printable(name, 80)}")
        return made


def _bytes(t: Tensor | torch.Tensor) -> int:
    dtype = t.dtype if isinstance(t, torch.Tensor) else t.storage.dtype
    return math.prod(t.shape) * max(dtype.itemsize, 4)


@dataclass
class Found:
    """What a file holds. `data`: the arguments of the dataset it was trained on; `nimg`: 0 where it does not say;
    `label_names`: of its classes, where it knows them."""

    parts: dict[str, Network]
    augment_p: float | None = None
    data: dict[str, Any] = field(default_factory=dict)
    nimg: int = 0
    label_names: list[str] = field(default_factory=list)


def look(content: Any) -> Found:
    """Find the networks in the content of a file, see torch_files.read.

    Raises:
        Refused: there are none.
    """
    if isinstance(content, Module):  # a generator alone
        content = {"G_ema": content}
    if type(content) is not dict:
        raise Refused("holds no table of networks")
    parts = {part: _network(part, content[part]) for part in PARTS if content.get(part) is not None}
    if not parts:
        return Found(of_state_dict(content, plain(content.get("kwargs"))))
    nimg = content.get("cur_nimg")
    found = Found(parts, _augment_p(content.get("augment_pipe")))
    data = plain(content.get("training_set_kwargs"))
    found.data = data if isinstance(data, dict) else {}
    found.nimg = nimg if type(nimg) is int and 0 <= nimg < 1 << 53 else 0
    return found


def of_state_dict(content: Mapping[str, Any], kwargs: Any = None) -> dict[str, Network]:
    """The networks of a table from names to tensors: names may begin with G_ema., G. or D.; else it is one network.

    Raises:
        Refused: there are no tensors.
    """
    tensors = {name: t for name, t in content.items() if isinstance(t, Tensor | torch.Tensor) and type(name) is str}
    if not tensors or len(tensors) > len(PARTS) * MOST_TENSORS:
        raise Refused("holds no networks: neither G_ema, G nor D, nor tensors")
    kwargs = kwargs if isinstance(kwargs, dict) else {}
    parts: dict[str, Network] = {}
    for part in PARTS:
        own = {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}
        if own:
            parts[part] = Network(own, kwargs)
    if not parts:
        of_d = any(name.startswith(("b4.", "Model.ExtractionLayer.")) for name in tensors)
        parts["D" if of_d else "G_ema"] = Network(tensors, kwargs)
    return parts


def _network(part: str, value: Any) -> Network:
    if isinstance(value, Module):
        return flatten(value, part)
    if (
        type(value) is dict
        and 0 < len(value) <= MOST_TENSORS
        and all(isinstance(t, Tensor) and type(n) is str for n, t in value.items())
    ):
        return Network(dict(value))
    raise Refused(f"holds a {part} that is no network")


def flatten(top: Module, part: str) -> Network:
    """A module and those inside of it -> tensors and facts by path. Buffers that are not saved are left out.

    Raises:
        Refused: it is no module of torch, contains itself, or is beyond all bounds.
    """
    kwargs = plain(top.state.get("_init_kwargs"))
    found = Network({}, kwargs if isinstance(kwargs, dict) else {}, shown=printable(top.shown, 60))
    waiting: list[tuple[str, Module, int]] = [("", top, 0)]
    entries = 0
    while waiting:
        prefix, module, depth = waiting.pop()
        entries += sum(len(table) for kind in _TABLES if isinstance(table := module.state.get(kind), dict))
        if depth > MOST_DEPTH or len(found.facts) + len(waiting) >= MOST_MODULES or entries > MOST_ENTRIES:
            raise Refused(f"holds a {part} of more modules than any network has")
        known = {name: module.state[name] for name in FACTS & module.state.keys()}
        simple = {n: plain(v) for n, v in known.items() if not isinstance(v, dict | list | tuple)}
        found.facts[prefix.removesuffix(".")] = {n: v for n, v in simple.items() if not isinstance(v, list)}
        temporary = module.state.get("_non_persistent_buffers_set")
        for kind in ("_parameters", "_buffers"):
            for name, t in _table(module, kind, part):
                if t is None or (kind == "_buffers" and isinstance(temporary, set) and name in temporary):
                    continue
                if not isinstance(t, Tensor) or len(found.tensors) >= MOST_TENSORS:
                    raise Refused(f"holds a {part} with something other than tensors, or with too many")
                found.tensors[prefix + name] = t
        for name, inner in _table(module, "_modules", part):
            if inner is not None and not isinstance(inner, Module):
                raise Refused(f"holds a {part} with something other than modules inside")
            if inner is not None:
                waiting.append((f"{prefix}{name}.", inner, depth + 1))
    if not found.tensors:
        raise Refused(f"holds a {part} without tensors")
    return found


def _table(module: Module, kind: str, part: str) -> list[tuple[str, Any]]:
    table = module.state.get(kind, {})
    if type(table) is not dict or not all(type(name) is str and re.fullmatch(r"\w{1,100}", name) for name in table):
        raise Refused(f"holds a {part} whose {kind} are no table")
    return list(table.items())


def _augment_p(value: Any) -> float | None:
    """The probability of augmentation, which ADA moves; of an augmentation pipeline, or in a table."""
    table = value.state.get("_buffers") if isinstance(value, Module) else value
    p = table.get("p") if type(table) is dict else None
    if isinstance(p, Tensor):
        p = float(materialize(p, "augment_pipe.p").reshape([])) if p.shape in ((), (1,)) else None
    return float(p) if p is not None and is_number(p, 0, 1) else None


def plain(value: Any) -> Any:
    """A value of a file as JSON values, without tensors, long texts and what is nested deeply."""
    left = [MOST_VALUES]

    def converted(value: Any, depth: int) -> Any:
        left[0] -= 1
        if left[0] < 0 or depth > 8:
            return None
        simple = value is None or isinstance(value, bool | int | float)
        if simple or (isinstance(value, str) and len(value) <= MOST_TEXT):
            return value
        if isinstance(value, torch.dtype):
            return str(value).removeprefix("torch.")
        if isinstance(value, Opaque):
            return value.name
        if isinstance(value, Array):
            numbers = value.values()
            return numbers[0] if numbers and not value.shape else numbers
        if isinstance(value, list | tuple):
            return [converted(inner, depth + 1) for inner in value[: max(left[0], 0) + 1]]
        if isinstance(value, dict):
            some = list(value.items()) if len(value) <= MOST_VALUES else []
            return {str(key)[:100]: converted(inner, depth + 1) for key, inner in some}
        return None

    return converted(value, 0)
