"""Measures what is faster on this machine, for `train.channels_last: null` and `model.low_precision: auto`.

Both depend on the processor (only some multiply bfloat16 matrices), on the number of channels and on the size of the
pictures, so they are measured: one generator block and one discriminator block of each resolution, forward and
backward. The measurements are cached in the kernels' cache folder, and the choice is stored in the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from stylegan_pg import files
from stylegan_pg.config import Config, ConvolutionalConfig, GrowingConfig, PlainConfig
from stylegan_pg.config.schedule import at, size_at
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.errors import UsageError
from stylegan_pg.files import cache_folder
from stylegan_pg.networks import NETWORKS, NetworkShape, to_channels_last
from stylegan_pg.networks.modulation import styles_of
from stylegan_pg.ops import native
from stylegan_pg.ops.recipes import has_bf16_instructions, processor
from stylegan_pg.untrusted import read_json

WORTH_IT = 0.95  # of float32's time; if the gain is smaller, the more accurate format is taken
REPEATS = 3
WITHOUT_INSTRUCTIONS = 64  # the least resolution to try bf16 at on a CPU that has no instructions for it
# Keys of a model that have no effect on the time of its blocks, or that are chosen here.
NO_EFFECT = ("z_dim", "mapping_layers", "w_avg_beta", "mbstd_group", "mbstd_channels", "low_precision")
NO_EFFECT += ("low_precision_at", "low_precision_resolutions")
LAYOUTS = {True: "nhwc", False: "nchw"}  # by channels_last


def resolve(config: Config, device: torch.device, stored: dict[str, Any] | None) -> tuple[Config, str]:
    """Fill in the keys that the configuration leaves to measurement.

    Args:
        stored: the configuration of the run that is continued, as nested dictionaries. Its choices are taken over. None
            for a new run, for which they are measured (some seconds, unless the measurements are cached).

    Returns:
        The configuration, and a line about the choices, "" if there were none.
    """
    notes = []
    convolves = isinstance(config.model, ConvolutionalConfig)
    if isinstance(config.model, PlainConfig) or not convolves:  # they have no blocks that could be measured
        train = dataclasses.replace(config.train, channels_last=bool(config.train.channels_last))
        low = config.model.low_precision if convolves and config.model.low_precision != "auto" else "fp32"
        return dataclasses.replace(config, train=train, model=dataclasses.replace(config.model, low_precision=low)), ""
    if config.train.channels_last is None:
        if stored:
            last = stored["train"].get("channels_last")
        else:
            last, why = _or(choose_layout, config, device, True)
            notes.append(why)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, channels_last=last))
    if config.model.low_precision == "auto" and config.model.low_precision_at is None:
        if stored and stored["model"].get("low_precision") == "auto":
            low = stored["model"].get("low_precision_at")
        else:
            low, why = _or(choose_precision, config, device, [])
            notes.append(why)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, low_precision_at=low))
    return config, "; ".join(notes)


def _or(choose: Callable[[Config, torch.device], tuple[Any, str]], config, device, default: Any) -> tuple[Any, str]:
    """What `choose` returns, or the default if memory is too small to measure."""
    try:
        return choose(config, device)
    except torch.cuda.OutOfMemoryError:
        return default, f"{choose.__name__}: not enough memory to measure, so {default}"


def candidates(config: Config) -> list[int]:
    """The resolutions that may be in low precision: the highest `low_precision_resolutions` (0: all) from 8 on."""
    count = config.model.low_precision_resolutions
    every = [config.resolution >> i for i in range(config.resolution.bit_length())]
    return [r for r in (every[:count] if count else every) if r >= 8]


def choose_layout(config: Config, device: torch.device) -> tuple[bool, str]:
    """Whether channels_last is the faster layout over all resolutions, and a line with the reason."""
    every = [r for r in (config.resolution >> i for i in range(config.resolution.bit_length())) if r >= 8]
    if not every:
        return True, "layout nhwc: 4x4 is too small to measure"
    times = _times(config, device, [(r, LAYOUTS[last], "fp32") for r in every for last in (True, False)])
    nhwc, nchw = (sum(times[r, layout, "fp32"] for r in every) for layout in ("nhwc", "nchw"))
    last = nhwc <= nchw
    return last, f"layout {LAYOUTS[last]}: channels_last takes {nhwc / nchw:.2f} of the other's time"


def choose_precision(config: Config, device: torch.device) -> tuple[list[int], str]:
    """The resolutions to compute in bfloat16, and a line with the reason."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return [], "this GPU has no bfloat16"
    every = candidates(config)
    if device.type == "cpu" and not has_bf16_instructions():  # only ops/conv3x3 can make it faster
        every = [r for r in every if r >= WITHOUT_INSTRUCTIONS]
        if not every or not config.train.channels_last or native.choose("cpu").kernels is None:
            wanted = f"and needs {WITHOUT_INSTRUCTIONS}x{WITHOUT_INSTRUCTIONS}, kernels and channels_last"
            return [], f"bf16 at no resolution: this CPU has no instructions for it, {wanted}"
    layout = LAYOUTS[bool(config.train.channels_last)]
    times = _times(config, device, [(r, layout, p) for r in every for p in ("fp32", "bf16")])
    ratios = {r: times[r, layout, "bf16"] / times[r, layout, "fp32"] for r in every}
    chosen = [r for r, ratio in ratios.items() if ratio < WORTH_IT]
    shares = ", ".join(f"{r}: {ratio:.2f}" for r, ratio in ratios.items())
    return chosen, f"bf16 at {chosen or 'no resolution'}; its time over that of fp32: {shares}"


Case = tuple[int, str, str]  # resolution, layout, precision


def _times(config: Config, device: torch.device, cases: list[Case]) -> dict[Case, float]:
    """Seconds, from the cache or measured now; pairs of cases are measured in turns."""
    m, kernels = config.model, native.choose(device.type)
    key = {
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kernels": kernels.built.path.parent.name if kernels.built else kernels.name,
        "model": {name: value for name, value in dataclasses.asdict(m).items() if name not in NO_EFFECT},
        "exactness": [config.train.tf32, config.train.deterministic],
        "batch": [
            _batch(config, r) for r in (config.resolution >> i for i in range(config.resolution.bit_length() - 2))
        ],
    }
    name = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=12).hexdigest()
    path, table = None, {}
    with contextlib.suppress(OSError, UsageError):
        path = cache_folder() / f"tuning-{name}.json"
        table = read_json(path, "it is measured again")
    table = {k: v for k, v in table.items() if isinstance(v, float) and v > 0} if isinstance(table, dict) else {}
    names = {case: " ".join(map(str, case)) for case in cases}
    pairs = [cases[i : i + 2] for i in range(0, len(cases), 2)]
    missing = [pair for pair in pairs if any(names[case] not in table for case in pair)]
    for pair in missing:
        table |= {names[case]: t for case, t in _measure(config, device, pair).items()}
    if path and missing:
        with contextlib.suppress(OSError), files.atomic_write(path) as file:
            file.write(json.dumps(table).encode())
    return {case: table[name] for case, name in names.items()}


def _batch(config: Config, resolution: int) -> int:
    """The number of images to measure with: one pass of a rank, limited so that large images do not take minutes."""
    t = config.train
    share = math.ceil(at(resolution, t.batch_at, t.batch) / dist.world())
    whole = at(resolution, t.micro_batch_at, t.micro_batch) or share
    return max(1, min(whole, share, 2**18 // resolution**2))


def _measure(config: Config, device: torch.device, cases: list[Case]) -> dict[Case, float]:
    """Seconds of each, the best of interleaved repeats."""
    passes = {case: _passes(config, device, *case) for case in cases}
    best = dict.fromkeys(passes, float("inf"))
    for repeat in range(REPEATS + 1):
        for case, run in passes.items():
            started = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat:  # the first warms up
                best[case] = min(best[case], time.perf_counter() - started)
    return best


def _passes(config: Config, device: torch.device, r: int, layout: str, precision: str) -> Callable[[], None]:
    """Forward and backward of the generator's layers of a resolution and the discriminator's block behind them."""
    n, fp32 = _batch(config, r), precision == "fp32"
    low: dict[str, Any] = {"low_precision": precision, "low_precision_at": [] if fp32 else [r]}
    assert isinstance(config.model, ConvolutionalConfig)
    model, pair = dataclasses.replace(config.model, **low), NETWORKS[config.model.name]
    grows = isinstance(model, GrowingConfig)
    full = r if grows else config.resolution  # the layers of other networks depend on it
    shape = NetworkShape(full, full, False, 3, 0, 1)
    with torch.device("meta"):
        G: Any = pair.G(**pair.g_kwargs(model, shape))
        D: Any = pair.D(**pair.d_kwargs(model, shape))

    def placed(part: torch.nn.Module) -> Any:
        part = _alone(part)
        return (to_channels_last(part) if layout == "nhwc" else part).to(device)

    def noise(channels: int, size: tuple[int, int]) -> torch.Tensor:
        x = torch.randn(n, channels, *size, device=device)
        x = x.contiguous(memory_format=torch.channels_last) if layout == "nhwc" else x
        return x.requires_grad_(True)

    d_block = placed(getattr(D, f"b{r}"))
    if not grows:
        layers = [placed(layer) for layer in G.synthesis.layers if layer.rate == r]
        inputs = [noise(layer.weight.shape[1], layer.in_size) for layer in layers]
        shown, w = noise(d_block.conv0.weight.shape[1], size_at(r, model.base)), torch.randn(n, G.w_dim, device=device)
        gain = torch.ones([], device=device)

        def run_layers() -> None:
            total = d_block(shown).float().sum()
            for layer, x in zip(layers, inputs, strict=True):
                (style,) = styles_of([layer], w[:, None], [0])
                total = total + layer(x, style, gain).float().sum()
            total.backward()

        return run_layers
    synthesis, form = getattr(G, "synthesis", None), G.form  # R3GAN has no synthesis
    g_block, x = placed(getattr(synthesis or G, f"b{r}")), noise(form.channels(r // 2), form.size(r // 2))
    ws = torch.randn(n, 3, getattr(G, "w_dim", 0), device=device)

    def run() -> None:
        if synthesis is None:
            y = g_block(x)
        else:
            (styles,) = synthesis.block_styles([g_block], ws)
            y = g_block(x, styles, noise="random", generator=None)
        d_block(y).float().sum().backward()

    return run


def _alone(block: torch.nn.Module) -> Any:
    """A block of a network on the meta device, with random weights of its own on the CPU."""
    block.load_state_dict({name: torch.randn(t.shape) for name, t in block.state_dict().items()}, assign=True)
    return block
