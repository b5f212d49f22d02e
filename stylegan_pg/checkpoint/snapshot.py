"""Snapshots: a generator for use, in one file without code.

A safetensors file holds the weights of G_ema. Its header holds a JSON description from which the network is built, so
the two cannot be separated. A checkpoint (checkpoint.py), in contrast, is for continuing a run.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stylegan_pg import files
from stylegan_pg.checkpoint import tensor_file
from stylegan_pg.data.classes import class_names, condition, vector_condition
from stylegan_pg.errors import UsageError
from stylegan_pg.networks import NETWORKS, accepted
from stylegan_pg.untrusted import finite_number, is_number, parse_json, printable, whole_number

FORMAT = 1


def save_snapshot(path: Path, G_ema: torch.nn.Module, description: Mapping[str, Any]) -> None:
    """Write a snapshot atomically.

    Args:
        path: of the file.
        G_ema: the generator.
        description: JSON values. `network`, `kwargs` and `alpha` are needed to build the network again; the rest
            (nimg, label names, the run's configuration) is for information.

    Raises:
        OSError: for example when the disk is full; no partial file remains.
    """
    write_snapshot(path, G_ema.state_dict(), description)


def write_snapshot(path: Path, tensors: Mapping[str, torch.Tensor], description: Mapping[str, Any]) -> None:
    """Write a snapshot of a generator's state dict; otherwise as save_snapshot."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    text = json.dumps({"format": FORMAT, "checksum": "blake2b", **description})
    meta = {"stylegan_pg": text, "blake2b": tensor_file.digest(tensors, text)}
    path.parent.mkdir(exist_ok=True)  # without parents: the run's folder may have been moved away
    with files.atomic_write(path, sync=True) as file:
        tensor_file.write(file, tensors, meta)


def choose_device(device: torch.device | str) -> torch.device:
    """The torch device of a name: auto (CUDA if available), cpu, cuda, cuda:0, or any other that torch knows.

    Raises:
        UsageError: the name is unknown, or the device is not available.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        if chosen.type == "meta":
            raise ValueError("nothing is computed there")
        torch.empty(0, device="cpu" if chosen.type == "cuda" else chosen)
    except (RuntimeError, TypeError, ValueError, AssertionError, NotImplementedError):
        raise UsageError(f"device {printable(repr(device))} is not possible: auto, cpu, cuda or cuda:0") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {chosen}: torch finds no CUDA device; use auto or cpu")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {chosen}: torch finds {torch.cuda.device_count()} CUDA devices, the first is cuda:0")
    return chosen


def load_snapshot(
    path: str | Path, device: torch.device | str = "cpu", *, network: type[torch.nn.Module] | None = None
) -> Any:
    """Load the generator of a snapshot: `G(z, c, psi=0.7)` returns images [N, C, H, W] in about [-1, 1].

    z is [N, G.z_dim]. c of a conditional generator is [N, G.c_dim], one-hot, or numbers or names of classes (see
    `classes.condition`). `G.description` is the snapshot's description (label names, nimg, configuration). The noise
    inputs are constant unless `noise="random"` is given. A snapshot taken within a fade uses the alpha of that moment.

    Args:
        path: of the snapshot.
        device: to load it on; auto, cpu, cuda or a torch device.
        network: the generator's class, if it does not belong to this package; a file never makes code be imported.

    Raises:
        UsageError: the file does not exist, is not a snapshot, is damaged or of a newer format, or the device is not
            available. The generator raises it for z or c that it cannot take.
    """
    device = choose_device(device)
    path = Path(path)
    with _opened(path) as (file, text):
        description, G = _described(path, text, torch.device(device), file.entries, network)
        tensors = _verified(path, file, description, text)
    G.load_state_dict(tensors, assign=True)
    G = G.to(device, torch.float32)
    check_finite(path, G.state_dict())
    G.description = description
    if hasattr(G, "mapping") or network is None:
        names = None if "condition" in description else class_names(G)
        if hasattr(G, "mapping"):
            G.mapping.register_forward_pre_hook(partial(_fitting, G.z_dim, G.c_dim, names))
        else:  # of this package, without ws
            G.register_forward_pre_hook(partial(_fitting_itself, G.z_dim, G.c_dim, names), with_kwargs=True)
    if description["kwargs"].get("fade"):
        G.register_forward_pre_hook(partial(_at_alpha, float(description["alpha"])), with_kwargs=True)
    return G.eval().requires_grad_(False)


def read_description(path: Path) -> dict[str, Any]:
    """The description of a snapshot, whatever its network is; its weights are not read.

    Raises:
        UsageError: the file does not exist, is no snapshot, or of a newer format.
    """
    with _opened(path) as (_, text):
        return _parsed(path, text)


def read_snapshot(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The description of a snapshot and its tensors on the CPU, in their stored dtypes, whatever its network is.

    Raises:
        UsageError: as read_description; the file is damaged, or holds numbers that are not finite.
    """
    with _opened(path) as (file, text):
        description = _parsed(path, text)
        tensors = _verified(path, file, description, text)
    check_finite(path, tensors)
    return description, tensors


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[tensor_file.TensorFile, str]]:
    """Open a snapshot -> (the file, the text of its description). Faults of the file within the block become one
    message."""
    if not path.is_file():
        raise UsageError(f"{printable(path)}: no such file; give a snapshot, RUN/snapshots/*.safetensors")
    try:
        with tensor_file.opened(path) as file:
            text = file.metadata.get("stylegan_pg")
            if text is None:
                raise UsageError(
                    f"{printable(path)} is not a snapshot (a checkpoint?): give RUN/snapshots/*.safetensors"
                )
            yield file, text
    except (tensor_file.BadFileError, OSError) as error:
        raise UsageError(
            f"{printable(path)} is no snapshot, or a damaged one ({error}); take another of the run's"
        ) from None


def _verified(path: Path, file: tensor_file.TensorFile, description: Mapping[str, Any], text: str) -> Any:
    """Read all tensors and verify the checksum."""
    tensors = file.read()
    announced, present = description.get("checksum"), file.metadata.get("blake2b")  # older snapshots have none
    if (announced or present) and present != tensor_file.digest(tensors, text):
        raise UsageError(
            f"{printable(path)} is a damaged snapshot (its checksum does not match); take another of the run's"
        )
    return tensors


def check_finite(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """
    Raises:
        UsageError: one of the tensors of a snapshot holds NaN or infinity.
    """
    for name, t in tensors.items():
        if not tensor_file.is_finite(t):
            name = printable(name, 80)
            raise UsageError(
                f"{printable(path)} holds numbers that are not finite, in {name}; take another snapshot of the run's"
            )


MISFIT, REMEDY = "the description does not fit the weights", "take another snapshot of the run's"


def _parsed(path: Path, text: str) -> dict[str, Any]:
    """The description of a snapshot.

    Raises:
        UsageError: it is no table, or of another format.
    """
    try:
        description = parse_json(text, f"{MISFIT}: it", REMEDY, max_bytes=tensor_file.MOST_HEADER, finite=False)
        if not isinstance(description, dict) or "format" not in description:
            raise UsageError(f"{MISFIT}: it has no format; {REMEDY}")
        if description["format"] != FORMAT:
            version = printable(description["format"], 40)
            raise UsageError(f"this is of snapshot format {version}, this version reads {FORMAT}: update stylegan-pg")
    except UsageError as error:
        raise UsageError(f"{printable(path)}: {error}") from None
    return description


def _described(
    path: Path,
    text: str,
    device: torch.device,
    entries: Mapping[str, tensor_file.Entry],
    network: type[torch.nn.Module] | None,
) -> tuple[dict[str, Any], Any]:
    """Parse a description and build its generator on the meta device.

    No random numbers are drawn, so the caller's random state does not change, and no memory is allocated before the
    weights are known to fit.

    Raises:
        UsageError: the description does not fit the weights.
    """
    description = _parsed(path, text)
    try:
        kwargs = dict(description["kwargs"])
        names = description.get("label_names") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("label_names is no list of names")
        _check_examples(description)
        finite_number(description["alpha"], 0, 1, f"{MISFIT}: alpha", REMEDY)
        whole_number(description.get("nimg", 0), 0, 1 << 53, f"{MISFIT}: nimg", REMEDY)
        if device.type == "cpu" and kwargs.get("low_precision") == "fp16":
            kwargs["low_precision"] = "fp32"  # CPUs have no fp16 convolutions
        with torch.device("meta"):
            G: Any = _class_of(description["network"], network)(**kwargs)
        expected = {name: tuple(t.shape) for name, t in G.state_dict().items()}
        expected_types = {name: t.dtype for name, t in G.state_dict().items()}
        if any(len(row) != getattr(G, "c_dim", len(row)) for row in description.get("conditions", [])):
            raise ValueError(f"its examples of conditions are not of length {G.c_dim}")
        if expected.keys() != entries.keys():
            raise ValueError(f"{min(expected.keys() ^ entries.keys())} is in one of them only")
        for name, shape in expected.items():
            whole = not expected_types[name].is_floating_point
            if entries[name].shape != shape or (not whole and not entries[name].dtype.is_floating_point):
                found = f"{entries[name].dtype} {list(entries[name].shape)}"
                raise ValueError(f"{name} is {found} where numbers of {list(shape)} are expected")
        return description, G
    except UsageError as error:
        raise UsageError(f"{printable(path)}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise UsageError(f"{printable(path)}: {MISFIT}: {printable(error)}; {REMEDY}") from None


def _check_examples(description: dict[str, Any]) -> None:
    """Raises ValueError if the examples of conditions are no vectors of finite numbers."""
    rows, field = description.get("conditions", []), description.get("condition", "")
    if not isinstance(field, str) or not isinstance(rows, list) or ("condition" in description) != bool(rows):
        raise ValueError("its examples of conditions are no vectors of a named field")
    for row in rows:
        if not isinstance(row, list) or not all(is_number(value, -3e38, 3e38) for value in row):
            raise ValueError("an example of its conditions is no list of finite numbers")


def _class_of(name: Any, network: type[torch.nn.Module] | None) -> type[torch.nn.Module]:
    if network is not None:
        return network
    if name not in NETWORKS:
        raise UsageError(
            f"the generator is of class {printable(name, 120)}, which is none of this package's: give it as "
            "load_snapshot(..., network=CLASS)"
        )
    return NETWORKS[name].G


def _fitting(z_dim: int, c_dim: int, names: list[str] | None, module: Any, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
    """A hook that checks latents and conditions and moves them to the generator's device and dtype. `names` are those
    of the classes, None where conditions are vectors."""
    z, c = (*inputs, None)[:2]
    place = next(iter(module.state_dict().values()))
    like = {"device": place.device, "dtype": place.dtype}
    try:
        z = torch.as_tensor(z).to(**like)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"z cannot be used ({printable(error)}): give a tensor [N, {z_dim}]") from None
    if z.ndim != 2 or z.shape[1] != z_dim:
        raise UsageError(f"z has shape {list(z.shape)}: this generator takes latents [N, {z_dim}]")
    c = vector_condition(c, len(z), c_dim) if names is None else condition(c, len(z), names)
    return z, None if c is None else c.to(**like)


def _fitting_itself(
    z_dim: int, c_dim: int, names: list[str] | None, G: Any, inputs: tuple[Any, ...], given: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """`_fitting` for a generator without ws, whose inputs may be given by name. What other generators take besides is
    left out."""
    if given.get("psi", 1.0) != 1.0:
        raise UsageError(f"psi={given['psi']}: this generator has no ws, so there is nothing to truncate; take psi=1")
    inputs = (*inputs, *(given[name] for name in ("z", "c")[len(inputs) :] if name in given))
    how = {name: value for name, value in given.items() if name not in ("z", "c")}
    return _fitting(z_dim, c_dim, names, G, inputs), accepted(G, **how)


def _at_alpha(alpha: float, _: torch.nn.Module, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {"alpha": alpha, **given}
