"""The formats of exported programs: how each is written, and how a file of it is run again for the check.

- onnx: ONNX by PyTorch's exporter of exported programs; run by ONNX Runtime.
- torch: a package of torch.export (.pt2); run by PyTorch on any machine.
- aoti: the same compiled ahead of time for this machine's processor or GPU (AOTInductor); run by PyTorch from Python or
  C++, without a compiler.

Each file holds the program's facts (program.Program.facts) as JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.export.checking import Run
from stylegan_pg.export.program import FACTS, Program, traced
from stylegan_pg.untrusted import printable

OPSET = 18  # of ONNX; the newest that browsers' runtimes and converters of recent years all know
MOST_ONNX = (1 << 31) - (1 << 24)  # bytes of weights; a protobuf file ends at 2 GiB
INSTALL = "pip install 'stylegan-pg[export]'"


class Format(NamedTuple):
    """suffix: of the files. modules: Python modules that writing and running need. write: program, device -> file.
    load: of a file and a device, as a function that can be run."""

    suffix: str
    modules: tuple[str, ...]
    write: Callable[[Program, str, Path], None]
    load: Callable[[Path, str], Run]


def check_modules(kind: str) -> None:
    """
    Raises:
        UsageError: a module that the format needs is not installed.
    """
    for name in FORMATS[kind].modules:
        try:
            importlib.import_module(name)
        except ImportError:
            raise UsageError(f"--to {kind} needs {name}, which is not installed: {INSTALL}") from None


@contextlib.contextmanager
def converting(what: str) -> Iterator[None]:
    """Within the block, converters say nothing, and their failure becomes one message.

    Raises:
        RunError: the program cannot be converted. UsageError, OSError, MemoryError: as raised within.
    """
    quiet = [logging.getLogger(name) for name in ("torch", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [log.level for log in quiet]
    try:
        for log in quiet:
            log.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except (UsageError, RunError, OSError, MemoryError):
        raise
    except Exception as error:  # converters have many kinds of their own
        first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise RunError(f"{what} could not be made: {printable(first, 300)}") from error
    finally:
        for log, level in zip(quiet, levels, strict=True):
            log.setLevel(level)


# ----------------------------------------------------------------------------------------------------------------- ONNX


def _write_onnx(program: Program, device: str, path: Path) -> None:
    if (size := sum(t.nbytes for t in program.state_dict().values())) > MOST_ONNX:
        raise UsageError(f"the weights take {size >> 20} MiB, and an ONNX file ends at 2 GiB: take --to torch")
    exported = traced(program)
    made: Any = torch.onnx.export(
        exported, dynamo=True, opset_version=OPSET, input_names=program.names, output_names=["images"], verbose=False
    )
    _name_batch(made.model)
    facts = {**program.facts(), "opset": OPSET}
    made.model.metadata_props[FACTS] = json.dumps(facts)
    made.model.metadata_props["opset"] = str(OPSET)
    inputs = ", ".join(f"{name} {shape}" for name, shape in facts["inputs"].items())
    made.model.doc_string = f"Generator of stylegan_pg. Float32 inputs: {inputs}. Images in about [-1, 1]."
    made.save(path)


def _name_batch(model: Any) -> None:
    """Call the batch size "batch", which the exporter gives a name of its own."""
    import onnx_ir

    values = [*model.graph.inputs, *model.graph.outputs]
    for value in values:
        if value.shape and not isinstance(value.shape[0], int):
            value.shape = onnx_ir.Shape(["batch", *value.shape[1:]])


def _load_onnx(path: Path, device: str) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        (images,) = session.run(["images"], {name: t.numpy() for name, t in inputs.items()})
        return torch.from_numpy(images)

    return run


# -------------------------------------------------------------------------------------------------------------- PyTorch


def _write_torch(program: Program, device: str, path: Path) -> None:
    exported = traced(program, device)
    torch.export.save(exported, path, extra_files={f"{FACTS}.json": json.dumps(program.facts())})


def _load_torch(path: Path, device: str) -> Run:
    module = torch.export.load(path).module()
    return lambda inputs: _on(device, module, inputs)


def _write_aoti(program: Program, device: str, path: Path) -> None:
    from torch._inductor import aoti_compile_and_package

    how = {"aot_inductor.metadata": {FACTS: json.dumps(program.facts())}}
    with _without_tf32():
        aoti_compile_and_package(traced(program, device), package_path=str(path), inductor_configs=how)


def _load_aoti(path: Path, device: str) -> Run:
    from torch._inductor import aoti_load_package

    compiled = aoti_load_package(str(path))
    return lambda inputs: _on(device, compiled, inputs)


@torch.no_grad()
def _on(device: str, function: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with _without_tf32():
        return function(**{name: t.to(device) for name, t in inputs.items()}).cpu()


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """Convolutions on GPUs with all bits of float32, which the tolerance supposes."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


FORMATS = {
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _load_onnx),
    "torch": Format(".pt2", (), _write_torch, _load_torch),
    "aoti": Format(".aoti.pt2", (), _write_aoti, _load_aoti),
}
