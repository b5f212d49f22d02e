"""Which resolutions are faster in bfloat16 on this machine: `model.low_precision: auto`.

That depends on the processor (only some multiply bfloat16 matrices), on the number of channels and on the size of the
pictures, so it is measured: one generator block and one discriminator block of each resolution, forward and backward,
in both formats. A table of what was measured is kept in the kernels' cache folder, and the choice in the run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from typing import Any

import torch

from stylegan_pg.config import Config
from stylegan_pg.networks import to_channels_last
from stylegan_pg.networks.stylegan2 import DiscriminatorBlock, SynthesisBlock, channels_at
from stylegan_pg.ops import native
from stylegan_pg.ops.build import cache_folder
from stylegan_pg.ops.recipes import BuildError, processor

WORTH_IT = 0.95  # of float32's time; with less to gain the exacter format is taken
REPEATS = 3


def candidates(config: Config) -> list[int]:
    """The resolutions that may be in low precision: the highest `low_precision_resolutions` (0: all) from 8 on."""
    count = config.model.low_precision_resolutions
    every = [config.resolution >> i for i in range(config.resolution.bit_length())]
    return [r for r in (every[:count] if count else every) if r >= 8]


def choose(config: Config, device: torch.device) -> tuple[list[int], str]:
    """The resolutions to compute in bfloat16, and a line that says why. Takes seconds where nothing is known yet."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return [], "this GPU has no bfloat16"
    known = _table(config, device)
    chosen = [r for r in candidates(config) if known[str(r)] < WORTH_IT]
    ratios = ", ".join(f"{r}: {known[str(r)]:.2f}" for r in candidates(config))
    return chosen, f"bf16 at {chosen or 'no resolution'}; its time over that of fp32: {ratios}"


def _table(config: Config, device: torch.device) -> dict[str, float]:
    """{resolution: bfloat16's time over float32's}, from the cache or measured now."""
    m = config.model
    key = {
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kernels": native.choose(device.type).why,
        "channels_last": config.train.channels_last,
        "model": [m.channel_base, m.channel_max, m.g_architecture, m.d_architecture, m.noise, list(m.resample_filter)],
        "batch": _batch(config, 1),
    }
    name = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=12).hexdigest()
    path, table = None, {}
    with contextlib.suppress(OSError, ValueError, BuildError):
        path = cache_folder() / f"precision-{name}.json"
        table = json.loads(path.read_text("utf-8"))
    table = {k: v for k, v in table.items() if isinstance(v, float)} if isinstance(table, dict) else {}
    missing = [r for r in candidates(config) if str(r) not in table]
    for r in missing:
        table[str(r)] = _ratio(config, r, device)
    if path and missing:
        with contextlib.suppress(OSError):
            temporary = path.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(table), "utf-8")
            temporary.replace(path)
    return table


def _batch(config: Config, resolution: int) -> int:
    """Images to measure with: one pass of the training, but not so many that large ones take minutes."""
    whole = config.train.micro_batch or config.train.batch
    return max(1, min(whole, 2**18 // resolution**2))


def _ratio(config: Config, resolution: int, device: torch.device) -> float:
    """bfloat16's time over float32's for the two blocks of a resolution; the best of interleaved repeats of each."""
    passes = {dtype: _passes(config, resolution, device, dtype) for dtype in (None, torch.bfloat16)}
    best = dict.fromkeys(passes, float("inf"))
    for repeat in range(REPEATS + 1):
        for dtype, run in passes.items():
            started = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat:  # the first warms up
                best[dtype] = min(best[dtype], time.perf_counter() - started)
    return round(best[torch.bfloat16] / best[None], 3)


def _passes(config: Config, r: int, device: torch.device, dtype: torch.dtype | None) -> Callable[[], None]:
    """Forward and backward of a generator's block and the discriminator's behind it."""
    m, n = config.model, _batch(config, r)
    low, high = (channels_at(x, m.channel_base, m.channel_max) for x in (r // 2, r))
    filter_ = tuple(m.resample_filter)
    layer: dict[str, Any] = {"use_noise": m.noise, "resample_filter": filter_, "clamp": m.conv_clamp}
    g_block: Any = SynthesisBlock(r, low, high, m.w_dim, 3, m.g_architecture, torgb=False, dtype=dtype, **layer)
    d_block: Any = DiscriminatorBlock(r, high, low, 3, m.d_architecture, False, dtype, filter_, m.conv_clamp)
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    if config.train.channels_last:
        g_block, d_block = to_channels_last(g_block), to_channels_last(d_block)
    g_block, d_block = g_block.to(device), d_block.to(device)
    x = torch.randn(n, low, r // 2, r // 2, device=device).contiguous(memory_format=layout).requires_grad_(True)
    ws = torch.randn(2, n, m.w_dim, device=device)

    def run() -> None:
        d_block(g_block(x, ws.unbind(), noise="random", generator=None)).float().sum().backward()

    return run
