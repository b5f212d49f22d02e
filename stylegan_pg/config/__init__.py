"""The configuration: its schema, how it is loaded and checked, and the schedule that follows from it."""

from stylegan_pg.config.schema import (
    AugmentConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EmaConfig,
    GrowthConfig,
    LossConfig,
    MetricsConfig,
    ModelConfig,
    OptimConfig,
    OutputConfig,
    TermConfig,
    TrainConfig,
)

__all__ = [
    "AugmentConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EmaConfig",
    "GrowthConfig",
    "LossConfig",
    "MetricsConfig",
    "ModelConfig",
    "OptimConfig",
    "OutputConfig",
    "TermConfig",
    "TrainConfig",
]
