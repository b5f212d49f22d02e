"""stylegan_pg: from a folder of pictures to an exported high-resolution generator.

PLACES lists the names of the Python API and their modules. A name is imported at its first use, so that
`import stylegan_pg` and `stylegan-pg --help` do not import torch.
"""

from importlib import import_module
from typing import Any

from stylegan_pg.version import __version__ as __version__

PLACES = {
    "GAN": "systems.gan",  # the system of one generator and one discriminator
    "Pair": "networks",  # the classes of a generator and a discriminator, and functions that return their arguments
    "codes_of": "inference.codes",  # the codes of a dataset's pictures, of an encoder
    "load_config": "config.loading",
    "load_snapshot": "checkpoint.snapshot",
    "pack": "data.pack.pack",
    "train": "training.run",
}


def __getattr__(name: str) -> Any:
    if name in PLACES:
        return getattr(import_module(f"stylegan_pg.{PLACES[name]}"), name)
    raise AttributeError(f"module 'stylegan_pg' has no attribute {name!r}")
