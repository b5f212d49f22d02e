"""The numbers that a checkpoint keeps besides tensors: of the training loop, and those of the system."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from stylegan_pg.systems.state import a_count, a_number, a_table, must

SMALLEST_SCALE, LARGEST_SCALE = 2.0**-200, 2.0**200
MICRO_BATCH, THAWED = "_micro_batch_", "_trains_"  # how names began in `running_means`
# Names in `running_means`, and the fields that hold these numbers now.
TRAINING = {
    "loss_scale": "loss_scale",
    "_clean_steps": "clean_steps",
    "skipped": "skipped",
    "_skipped": "skipped_lately",
}
SYSTEM = {"augment_p": "augment_p", "_signs": "signs", "_signed": "signed"}
COUNTS = ("clean_steps", "skipped", "signed")


@dataclass
class RunningState:
    """What the training loop changes from step to step besides networks and optimizers."""

    loss_scale: float = field(default=1.0, metadata=must(a_number(SMALLEST_SCALE, LARGEST_SCALE)))
    clean_steps: int = field(default=0, metadata=must(a_count()))  # since the last overflow or change of the loss scale
    skipped: int = field(default=0, metadata=must(a_count()))  # steps left out because something was not finite
    skipped_lately: float = field(default=0.0, metadata=must(a_number()))  # the same, which good steps reduce again
    # the micro-batches that were found to fit into memory, by TrainState.phase_key
    micro_batches: dict[str, int] = field(default_factory=dict, metadata=must(a_table(a_count(1 << 31))))

    def plain(self) -> dict[str, Any]:
        """The state as JSON values."""
        return asdict(self)


def stored_states(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the fields of RunningState, those of the system's state) in a checkpoint's header, neither checked."""
    if "training" in checkpoint:
        return checkpoint["training"], checkpoint["system"]
    return _of_running_means(checkpoint["running_means"])


def _of_running_means(numbers: Mapping[str, float]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same of a checkpoint without these parts, which kept all numbers in one table: names with a leading
    underscore were not logged, and those of prefixes were lists."""
    training: dict[str, Any] = {new: numbers[old] for old, new in TRAINING.items() if old in numbers}
    system: dict[str, Any] = {new: numbers[old] for old, new in SYSTEM.items() if old in numbers}
    sizes = {k.removeprefix(MICRO_BATCH): int(v) for k, v in numbers.items() if k.startswith(MICRO_BATCH)}
    training["micro_batches"] = {key: size for key, size in sizes.items() if size}
    system["thawed"] = [name.removeprefix(THAWED) for name in numbers if name.startswith(THAWED)]
    known = {*TRAINING, *SYSTEM}
    system["means"] = {k: v for k, v in numbers.items() if k not in known and not k.startswith("_")}
    for part in (training, system):
        part |= {name: int(part[name]) for name in COUNTS if name in part}
    return training, system
