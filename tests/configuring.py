"""Small configurations for tests."""

from pathlib import Path

import pytest

from stylegan_pg.config import Config
from stylegan_pg.config.loading import configs_folder, load_config
from stylegan_pg.errors import UsageError

SHIPPED = sorted(path.stem for path in configs_folder().glob("*.yaml"))
SYSTEMS = sorted(path.stem for path in (configs_folder() / "systems").glob("*.yaml"))
NEEDED = ["run=runs/x", "data.url=data/x", "train.total_kimg=1"]


def config_of(*overrides: str) -> Config:
    """The defaults with some overrides."""
    return load_config(None, [*NEEDED, *overrides])


def refused(*overrides: str) -> str:
    """The message about overrides that are refused, which is a single line."""
    with pytest.raises(UsageError) as error:
        config_of(*overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


def file_of(folder: Path, text: str) -> Path:
    """A YAML file with a text."""
    path = folder / "config.yaml"
    path.write_text(text)
    return path
