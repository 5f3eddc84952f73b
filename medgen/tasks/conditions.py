"""What a model is told besides the scan itself: class, covariates, and the mask as an image."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medgen.data.covariates import Covariate, covariates_of
from medgen.data.dataset import ScanDataset, condition
from medgen.data.manifest import Manifest
from medgen.data.recipe import Recipe
from medgen.errors import ConfigError, DataError
from medgen.io.source import ReadOptions
from medgen.models.base import ModelConfig
from medgen.tasks.capabilities import families_with, takes


def condition_fields(
    family: type[ModelConfig], manifest: Manifest, covariates: Sequence[str], context: str | None
) -> dict[str, Any]:
    """Fields of a family's config that say what it is told besides the class.

    Args:
        family: the config's class.
        manifest: whose training scans are described.
        covariates: columns to condition on.
        context: 'mask' to give each scan's mask with it; None for nothing.

    Raises:
        ConfigError: the family takes no such thing.
        DataError: the scans have no such column, or no masks.
    """
    told: dict[str, Any] = {}
    kind = family.model_fields["kind"].default
    for field, asked in (("covariates", covariates), ("context", context)):
        if asked and not takes(family, field):
            raise ConfigError(f"{kind} takes no {field}. Families that do: {families_with(field)}.")
    if covariates:
        told["covariates"] = covariates_of(manifest, covariates)
    if context:
        told["context"] = 1
    return told


def check_context(config: ModelConfig, manifest: Manifest) -> None:
    """Refuse a model that is given images which the scans do not have.

    Raises:
        ConfigError: it wants more than one channel, which a mask does not have.
        DataError: no training scan has a mask.
    """
    channels = getattr(config, "context", 0)
    if channels > 1:
        raise ConfigError(f"model.context: a mask has 1 channel; found {channels}.")
    if channels and not any(row.mask for row in manifest.split("train").rows):
        raise DataError(
            "The model is to be given each scan's mask, but no training scan has one. Put masks beside the scans "
            "(SCAN_mask.nii.gz, or a column 'mask' in a CSV), or leave --context out."
        )


def told_of(config: ModelConfig) -> dict[str, Any]:
    """What a dataset must bring for a model of this config."""
    return {
        "classes": config.classes,
        "covariates": getattr(config, "covariates", ()),
        "context": bool(getattr(config, "context", 0)),
    }


def drawn_cells(covariates: Sequence[Covariate], seed: int) -> dict[str, str]:
    """Covariates of somebody who does not exist: numbers about the training scans' mean, words alike often."""
    rng = np.random.default_rng(seed)
    return {
        one.name: str(rng.choice(one.levels)) if one.levels else f"{rng.normal(one.mean, one.sd):.4g}"
        for one in covariates
    }


def conditions_for(config: ModelConfig, labels: Sequence[str], cells: Sequence[Mapping[str, str]]) -> Tensor | None:
    """What to tell a model of scans with these classes and covariates; None for nothing."""
    told = told_of(config)
    rows = [condition(a, b, told["classes"], told["covariates"]) for a, b in zip(labels, cells, strict=True)]
    if told["covariates"]:
        return torch.stack([torch.as_tensor(row) for row in rows])
    return torch.tensor(rows) if config.classes else None


def masks_of(manifest: Manifest, recipe: Recipe, options: ReadOptions) -> list[Tensor]:
    """The masks (1, *space) of the training scans that have one, prepared as the scans are.

    Raises:
        DataError: there is none.
    """
    rows = tuple(row for row in manifest.split("train").rows if row.mask)
    if not rows:
        raise DataError("The model draws scans for given masks, but no training scan of these data has a mask.")
    data = ScanDataset(replace(manifest, rows=rows), recipe, context=True, options=options)
    return [data[n]["context"] for n in range(len(data))]


__all__ = ["check_context", "condition_fields", "conditions_for", "drawn_cells", "masks_of", "told_of"]
