"""Environment variables that were set for other programs and would change what is computed here.

A user's configuration of accelerate reaches every process that `accelerate launch` starts, and shell profiles may
differ between nodes. Therefore accelerate sees only the variables of this process's place, and variables that change
rounding are reported.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stylegan_pg.distributed.launcher import Place

OF_ACCELERATE = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_", "FP8_")
OF_PLACES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OF_MPI = ("PMI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "MPI_LOCAL")  # accelerate reads a process's place from these
# Settings of accelerate without effect here: values that request nothing, and the key to use instead.
INSTEAD = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "train.micro_batch says how a batch is divided"),
    "ACCELERATE_GRADIENT_CLIPPING": ("none", "gradients are not clipped"),
    "ACCELERATE_MIXED_PRECISION": ("no", "model.low_precision says what is computed in bf16 or fp16"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "train.compile hands passes to torch.compile"),
    "ACCELERATE_USE_DEEPSPEED": ("false", "train.engine=deepspeed chooses DeepSpeed, train.zero_stage how"),
    "ACCELERATE_USE_FSDP": ("false", "train.engine=deepspeed shares Adam's moments out"),
    "ACCELERATE_USE_MEGATRON_LM": ("false", "train.engine chooses what sums gradients"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("false", "train.engine chooses what sums gradients"),
    "ACCELERATE_USE_SAGEMAKER": ("false", "train.engine chooses what sums gradients"),
    "ACCELERATE_TORCH_DEVICE": ("", "train.device chooses the device"),
}
# Libraries round differently with these; those that request less than fp32 are reported even if all ranks have them.
ROUNDING = (
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "CUBLAS_WORKSPACE_CONFIG",
    "STYLEGAN_PG_KERNELS",
)
COARSE = {"NVIDIA_TF32_OVERRIDE": ("0",), "ONEDNN_DEFAULT_FPMATH_MODE": ("STRICT",)}
COARSE["DNNL_DEFAULT_FPMATH_MODE"] = COARSE["ONEDNN_DEFAULT_FPMATH_MODE"]


def noticed(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables known to this module whose values have an effect."""
    asking = {name for name, (nothing, _) in INSTEAD.items() if env.get(name, "").lower() not in ("", nothing)}
    return {name: value for name, value in env.items() if value and (name in asking or name in ROUNDING)}


def remarks(everyone: Sequence[Mapping[str, Any]]) -> list[str]:
    """Remarks about the variables of all ranks, given each rank's "host" and its `noticed` variables as "variables"."""
    first: Mapping[str, str] = everyone[0]["variables"]
    found_remarks: dict[str, str] = {}
    for rank, other in enumerate(everyone):
        found: Mapping[str, str] = other["variables"]
        who = f"rank {rank} ({other['host']})"
        for name in [*found, *(name for name in first if name not in found)]:
            value = f"{name}={found[name]}" if name in found else f"no {name}"
            if name in INSTEAD:
                if name in found:
                    found_remarks.setdefault(name, f"{value}, on {who}, has no effect here: {INSTEAD[name][1]}")
            elif found.get(name) != first.get(name):
                ours = f"{name}={first[name]}" if name in first else "none"
                found_remarks[name] = (
                    f"{who} has {value}, rank 0 has {ours}: they round otherwise; set it alike on all nodes"
                )
            elif name in COARSE and found[name].upper() not in COARSE[name]:
                found_remarks.setdefault(
                    name, f"{value} makes libraries round what the configuration says is fp32: unset it"
                )
    return list(found_remarks.values())


@contextlib.contextmanager
def only_the_place(at: Place, *, cpu: bool) -> Iterator[None]:
    """Within this block the environment contains, of all variables for launchers and accelerate, only this process's
    place."""
    removed = {name: os.environ.pop(name) for name in _seen_by_accelerate()}
    if at.world > 1:
        values = (at.rank, at.world, at.local, at.local_world, at.address, at.port)
        os.environ.update(zip(OF_PLACES, map(str, values), strict=True))
    if cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # else accelerate looks for devices to pair with the ranks
    try:
        yield
    finally:
        for name in _seen_by_accelerate():  # it sets some itself
            del os.environ[name]
        os.environ.update(removed)


def _seen_by_accelerate() -> list[str]:
    names = [k for k in os.environ if k in OF_PLACES or k.startswith((*OF_ACCELERATE, *OF_MPI))]
    return [k for k in names if k != "ACCELERATE_CPU_AFFINITY"]  # which changes nothing but speed
