"""Adversarial removal of information: codes of pictures from which an inspector cannot read the run's condition.

G encodes pictures, and decodes codes together with the condition (Lample et al. 2017, "Fader Networks"); D, the
inspector, is trained to read the condition from codes, and the encoder against it, by the reversed gradient of the
inspector's loss (Ganin and Lempitsky 2015). What the code must still hold is the rest of the picture, and a further
field, if one is named. Inspector and encoder take turns, as D and G do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from stylegan_pg.config import Config, ScrubberConfig
from stylegan_pg.config.rounds import place_of
from stylegan_pg.data.conditions import Conditions
from stylegan_pg.data.datasets.index import DatasetIndex
from stylegan_pg.data.loader.derived import parse
from stylegan_pg.data.loader.loader import read_fields
from stylegan_pg.errors import UsageError
from stylegan_pg.losses.removal import inspection, relative_error, reversed_loss
from stylegan_pg.networks import NetworkShape, Pair
from stylegan_pg.systems.base import Context, Loss, Step, Update, Values
from stylegan_pg.systems.one_pair import OnePair
from stylegan_pg.untrusted import printable

LOOKED_AT = 512  # pictures from which the mean and the deviation of the kept field are computed
SMALLEST = 1e-4  # deviations below count as 1: there is nothing to tell


class Scrubber(OnePair):
    """The system of a configuration with system.name=scrubber; model.name is codes."""

    g_reports = ("picture_error", "keep_error", "removal_loss")
    d_reports = ("inspector_loss",)
    own: ScrubberConfig

    def __init__(self, config: Config, pair: Pair | None = None):
        super().__init__(config, pair)
        self.kept: torch.Tensor | None = None  # mean and deviation [2, kept] of the kept field

    def use(self, config: Config) -> None:
        """
        Raises:
            UsageError: the configuration asks for what this system does not have.
        """
        super().use(config)
        assert isinstance(config.system, ScrubberConfig)
        self.own = config.system
        if not config.data.conditional:
            raise UsageError(
                "system.name=scrubber removes the run's condition from codes: take data.conditional=true, and "
                "data.condition=class or the name of a vector field"
            )
        if config.loss.all_terms() or config.augment.mode != "none":
            raise UsageError(
                "system.name=scrubber has no D of pictures to regularise, or to augment pictures for: take "
                "loss.r1_gamma=0, loss.pl_weight=0, no loss.terms, and augment.mode=none"
            )

    def look_at(self, index: DatasetIndex) -> None:
        """
        Raises:
            UsageError: the field to be kept is not there, or has no numbers.
        """
        keep, data = self.own.keep, self.config.data
        if not keep:
            return
        field = index.fields.get(keep)
        if keep in data.derived:
            parse(data.derived[keep])
        elif field is None or not (field.kind == "vector" or field.kind == "image"):
            fit = [name for name, one in index.fields.items() if one.kind in ("vector", "image")]
            raise UsageError(
                f"system.keep={printable(keep)}: {index.path} has no such vector or picture (it has "
                f"{', '.join([*fit, *data.derived]) or 'none'}): pack it with --labels or --pair, or derive it from "
                "the picture, such as data.derived={ink: low 32}"
            )
        table = index.table(self.config.resolution)
        chosen = np.unique(np.linspace(0, len(table) - 1, min(LOOKED_AT, len(table))).astype(int)).tolist()
        values = read_fields(table, chosen, [keep], self.config.seed, {}, data.derived).fields[keep]
        values = values.double() if values.is_floating_point() else values.double() / 127.5 - 1
        deviation = values.flatten(1).std(dim=0, correction=0)
        self.kept = torch.stack([values.flatten(1).mean(dim=0), deviation.where(deviation > SMALLEST, 1.0)])

    def fields(self) -> Sequence[str]:
        return [self.own.keep] if self.own.keep else []

    def inputs(self) -> Sequence[str]:
        return ["image"]

    def images(self, G: Any, z: torch.Tensor, c: torch.Tensor | None, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The pictures decoded again from their codes."""
        return G(G.encode(inputs["image"]), c)

    def g_kwargs(self, form: NetworkShape) -> dict[str, Any]:
        return super().g_kwargs(form) | {"kept": 0 if self.kept is None else self.kept.shape[1]}

    def build(self, form: NetworkShape, conditions: Conditions | None) -> None:
        super().build(form, conditions)
        assert conditions is not None
        self.deviation: torch.Tensor | None = None
        if not conditions.are_classes:
            deviation = torch.from_numpy(conditions.values.astype(np.float64).std(axis=0))
            self.deviation = deviation.where(deviation > SMALLEST, 1.0)
        if self.kept is not None:
            self.G.kept_mean.copy_(self.kept[0])
            self.G.kept_deviation.copy_(self.kept[1])

    # ------------------------------------------------------------------------------------------------- losses

    def inspected(self, x: Context, codes: torch.Tensor) -> torch.Tensor:
        """The loss [n] of the inspector."""
        assert x.condition is not None
        deviation = None if self.deviation is None else x.to_device(self.deviation)
        return inspection(x.D(codes), x.condition, deviation)

    def encoder_loss(self, x: Context) -> Values:
        """What G minimises: the errors of the picture and of the kept field, and the inspector's loss, reversed.

        Of a vector, an inspector with an error above 1 is worse than one that says the mean; there is no gradient then.
        """
        codes = x.G.encode(x.real)
        picture = (x.G(codes, x.condition) - x.real).square().flatten(1).mean(dim=1)
        removal = self.inspected(x, codes)
        own, most = self.own, None if self.deviation is None else 1.0
        loss = own.picture_weight * picture + own.removal_weight * reversed_loss(removal, most)
        values = {"picture_error": picture, "removal_loss": removal}
        if self.kept is not None:
            error = relative_error(x.G.read(codes), x.field(own.keep).flatten(1), x.G.kept_deviation)
            loss, values["keep_error"] = loss + own.keep_weight * error, error
        return values | {"loss": loss}

    def inspector_loss(self, x: Context) -> Values:
        """What D minimises: its loss about the condition, given codes."""
        with torch.no_grad():
            codes = x.G.encode(x.real)
        loss = self.inspected(x, codes)
        return {"loss": loss, "inspector_loss": loss}

    # -------------------------------------------------------------------------------------------------- steps

    def updates(self, step: Step) -> Iterator[Update]:
        """`g_steps` steps of the encoder at the start of each round (config/rounds.py), and one of the inspector in
        each training step."""
        optim, group = self.config.optim, self.form.mbstd_group
        reports = tuple(name for name in self.g_reports if self.own.keep or name != "keep_error")
        for i in range(optim.g_steps if place_of(optim, step.number).step == 0 else 0):
            name = f"encoder's loss {i}" if i else "encoder's loss"
            yield Update("G", [Loss(name, self.encoder_loss, step.batch, group, reports=reports)])
        yield Update("D", [Loss("inspector's loss", self.inspector_loss, step.batch, group, reports=self.d_reports)])

    def trial(self, count: int, device: torch.device, dtype: torch.dtype) -> None:
        new = {"device": device, "dtype": dtype}
        codes = torch.zeros([count, self.G.z_dim], **new)
        (self.G(codes, torch.zeros([count, self.form.c_dim], **new)).sum() + self.D(codes).sum()).backward()
