"""Training scans as codes of a bundle's model, and codes as scans like one of them, with masks where it draws pairs."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from medgen.data.dataset import model_view
from medgen.data.labels import label_channels, label_map
from medgen.data.manifest import Row
from medgen.data.window import flat
from medgen.errors import CapabilityError, ConfigError, DataError
from medgen.models.abilities import Decodes, Encodes
from medgen.models.base import can
from medgen.scan import Scale, Scan
from medgen.tasks.capabilities import families_that
from medgen.tasks.conditions import conditions_for
from medgen.tasks.derived import derived_scan
from medgen.tasks.intake import Intake, require_whole, taken_in
from medgen.tasks.ways.base import Material
from medgen.tasks.ways.sources import read_mask, refuse_burned_in
from medgen.training.device import device_for


@dataclass(frozen=True, eq=False)
class Read:
    """A training scan as a model takes it.

    Args:
        row: what the data tell of it.
        taken: the scan, read and prepared.
        x: its values, and those of its labels where the model draws pairs.
    """

    row: Row
    taken: Intake
    x: Float[Tensor, "1 c *space"]

    @property
    def size(self) -> int:
        """Numbers held."""
        return self.taken.source.voxels.size + self.taken.ready.voxels.size + self.x.numel()


class Coding:
    """A model between scans and codes, told of each scan what the data tell.

    Args:
        material: with a bundle.
        what: the task, for the sentence that refuses others.
        device: 'auto', 'cpu', 'cuda', 'mps'.

    Raises:
        CapabilityError: the model does not encode and decode, sees slices, or is given masks.
        ConfigError: there is no bundle.
    """

    def __init__(self, material: Material, what: str, device: str) -> None:
        if material.bundle is None:
            raise ConfigError(f"To {what} takes a trained model: give a bundle.")
        bundle = material.bundle
        if not (can(bundle.model, "encodes") and can(bundle.model, "decodes")):
            lacking = "encode" if not can(bundle.model, "encodes") else "decode"
            raise CapabilityError(
                f"{bundle.name} cannot {what}: it does not {lacking}. Models that do: {families_that('decodes')}."
            )
        require_whole(bundle.recipe, bundle.name, what)
        if getattr(bundle.model.config, "context", 0):
            raise CapabilityError(
                f"{bundle.name} cannot {what}: it is given an image with every scan, without which a code says "
                "nothing. Train a preset that is given none."
            )
        self._material, self.bundle, self.device = material, bundle, device_for(device)
        self.model = bundle.model.to(self.device)
        self.config = self.model.config

    def read(self, row: Row) -> Read:
        """A training scan, prepared.

        Raises:
            DataError, BundleError: it cannot be read, or is not what the model learned from.
        """
        manifest, options = self._material.manifest, self._material.options
        path = manifest.locate(row.path)
        refuse_burned_in(row, path)
        taken = taken_in(self.bundle, path, options)
        if not self.config.joint:
            return Read(row, taken, taken.x)
        mask = read_mask(row, taken.source.grid, manifest, options)
        if mask is None:
            raise DataError("the model learned scans together with their masks, and this one has none.")
        drawn = flat(mask).onto(taken.ready.grid, outside=0).voxels[0].astype(np.int32)
        ramps = model_view(Scan(label_channels(drawn, self.config.labels), taken.ready.grid))
        return Read(row, taken, torch.cat([taken.x, ramps[None]], 1))

    def told(self, read: Read, changes: Mapping[str, str] | None = None) -> Tensor | None:
        """What the model is told of a scan, some of it changed.

        Raises:
            DataError: its class is none that the model knows.
        """
        label = read.row.label
        if self.config.classes and label not in self.config.classes:
            raise DataError(f"its class is none that the model was told: {', '.join(self.config.classes)}.")
        cond = conditions_for(self.config, [label], [{**read.row.covariates, **(changes or {})}])
        return None if cond is None else cond.to(self.device)

    @torch.no_grad()
    def encode(self, read: Read, cond: Tensor | None) -> Float[Tensor, "1 *code"]:
        """The mean of q(z | x)."""
        return cast(Encodes, self.model).encode(read.x.to(self.device), cond).mean

    @torch.no_grad()
    def decode(self, z: Float[Tensor, "1 *code"], cond: Tensor | None) -> Float[Tensor, "c *space"]:
        """The mean of p(x | z), values in [0, 1], labels' channels included."""
        return cast(Decodes, self.model).decode(z, cond).mean[0].clamp(0, 1).cpu()

    def is_noise(self, z: Float[Tensor, "1 *code"]) -> bool:
        """Whether a code is the noise behind a scan, with as many numbers as the scan, and not a summary of it."""
        numbers = self.config.channels * prod(self.config.shape)
        return can(self.model, "scores_density") and z.ndim == 2 and z.numel() == numbers

    def scan(self, values: Float[Tensor, "c *space"], like: Intake, scale: Scale) -> tuple[Scan, Scan | None]:
        """Decoded values on the grid of a scan, in its unit, and their mask where the model draws pairs."""
        made = derived_scan(values[: self.config.images], like, scale)
        return made, self.mask(values, like)

    def mask(self, values: Float[Tensor, "c *space"], like: Intake) -> Scan | None:
        """The label map of decoded values on the grid of a scan; None where the model draws none."""
        if not self.config.joint:
            return None
        drawn = label_map(values[self.config.images :].numpy(), self.config.labels)
        kind = np.uint8 if max(self.config.labels) < 256 else np.int16
        voxels = drawn.astype(kind).reshape(1, *like.ready.grid.shape)
        return Scan(voxels, like.ready.grid, header=like.source.header, is_label=True).onto(
            like.source.grid, outside=0
        ).with_header(synthetic=True, padding=None, channels=())  # fmt: skip


__all__ = ["Coding", "Read"]
