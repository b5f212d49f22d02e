"""A GAN of texts: G makes distributions over characters, and D judges them and one-hot real texts (Gulrajani et al.
2017, section 5.3). With the objective wgan and a gradient penalty this is the paper's character model; other objectives
and terms work as for pictures. The real texts are a text field of the dataset, the first line of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stylegan_pg.config import CharsConfig, Config, TextConfig
from stylegan_pg.data.conditions import Conditions
from stylegan_pg.data.datasets.index import DatasetIndex
from stylegan_pg.errors import UsageError
from stylegan_pg.networks import NetworkShape
from stylegan_pg.networks.chars import to_one_hot
from stylegan_pg.systems.gan import GAN
from stylegan_pg.untrusted import printable


class TextGAN(GAN):
    """The system of a configuration with system.name=text; model.name is chars."""

    text: str
    model: CharsConfig

    def use(self, config: Config) -> None:
        """
        Raises:
            UsageError: the configuration asks for what only pictures have.
        """
        super().use(config)
        assert isinstance(config.system, TextConfig)
        assert isinstance(config.model, CharsConfig)
        self.text, self.model = config.system.text, config.model
        if config.metrics.every_kimg or config.metrics.at_snapshots:
            raise UsageError(
                "system.name=text makes no pictures that metrics.names could measure: take metrics.every_kimg=0 and "
                "metrics.at_snapshots=false"
            )

    def look_at(self, index: DatasetIndex) -> None:
        """
        Raises:
            UsageError: the dataset has no such texts.
        """
        field = index.fields.get(self.text)
        if field is None or field.kind != "text":
            texts = [name for name, one in index.fields.items() if one.kind == "text"]
            raise UsageError(
                f"system.text={printable(self.text)}: {index.path} has no such text field (it has "
                f"{', '.join(texts) or 'none'}): pack it with --captions, or name another as system.text"
            )

    def fields(self) -> Sequence[str]:
        return [self.text]

    def real(self, fields: Mapping[str, Any]) -> torch.Tensor:
        """One-hot characters [n, alphabet, 1, length]."""
        like = fields["image"]
        lines = [(text.strip().splitlines() or [""])[0] for text in fields[self.text]]
        return to_one_hot(lines, self.model.alphabet, self.model.length).to(like.device, like.dtype)

    def build(self, form: NetworkShape, conditions: Conditions | None) -> None:
        super().build(form, conditions)
        self.image_shape = (self.G.img_channels, *self.G.img_size)
