"""What a model is told besides the scan itself: class, covariates, and the mask as an image or as channels."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from medgen.data.covariates import Covariate, covariates_of
from medgen.data.dataset import ScanDataset, condition
from medgen.data.labels import label_values
from medgen.data.manifest import Manifest
from medgen.data.recipe import Recipe
from medgen.errors import ConfigError, DataError
from medgen.io.source import ReadOptions
from medgen.log import note
from medgen.models.base import Model, ModelConfig
from medgen.tasks.capabilities import families_that, families_with, takes

# What a model learns of masks: pairs (joint), scans for masks (given), or nothing.
Masks = Literal["auto", "none", "given", "joint"]
# With a smaller share of scans that have a mask, learning pairs would leave too many scans out.
_MOST_HAVE_ONE = 0.9


def condition_fields(family: type[ModelConfig], manifest: Manifest, covariates: Sequence[str]) -> dict[str, Any]:
    """Fields of a family's config that say what it is told besides the class.

    Args:
        family: the config's class.
        manifest: whose training scans are described.
        covariates: columns to condition on.

    Raises:
        ConfigError: the family takes no such thing.
        DataError: the scans have no such column.
    """
    if not covariates:
        return {}
    _require(family, "covariates")
    return {"covariates": covariates_of(manifest, covariates)}


def mask_fields(
    family: type[Model], values: Mapping[str, Any], manifest: Manifest, masks: Masks, *, sliced: bool,
    options: ReadOptions,
) -> dict[str, Any]:  # fmt: skip
    """Fields of a family's config that say what it learns of masks: their labels, and how many channels they make.

    Args:
        family: which models.
        values: the fields there are; a `context` says that the model is given masks, whatever `masks` says.
        manifest: whose training scans' masks are looked at.
        masks: 'joint' learns scans and masks as pairs, 'given' scans for masks; 'auto' pairs where nine of ten
            training scans have a mask and the model draws whole scans, else nothing.
        sliced: whether the model sees volumes slice by slice.
        options: how strict reading is.

    Raises:
        ConfigError: the family does no such thing.
        DataError: the scans have no masks, or masks that are no label maps.
    """
    given = masks == "given" or bool(values.get("context", 0))
    train = manifest.split("train")
    if given:
        return _given(family.Config, values, train, masks, options)
    if masks == "none" or (masks == "auto" and not _pairs_suit(family, values, train, sliced)):
        return {}
    if not any(row.mask for row in train.rows):
        raise DataError(
            "The model is to learn scans together with their masks, but no training scan has one. Put masks beside the "
            "scans (SCAN_mask.nii.gz, or a column 'mask' in a CSV), or train with --masks none."
        )
    if sliced or not _samples(family, values):
        why = "sees volumes slice by slice" if sliced else "does not draw scans"
        raise ConfigError(
            f"This {family.Config.model_fields['kind'].default} {why}, so it cannot learn to draw scans together with "
            f"their masks. Families that can: {families_that('samples')}, those for volumes where scans are volumes."
        )
    try:
        labels = label_values(train, options)
    except DataError as error:
        if masks == "joint":
            raise
        note(f"{error} Learning the scans without their masks.")
        return {}
    missing = sum(not row.mask for row in train.rows)
    told = f"; {missing} training scans without a mask are left out" if missing else ""
    note(f"Learning scans together with their masks (labels {', '.join(map(str, labels))}){told}.")
    return {"labels": labels, "channels": values["channels"] + len(labels)}


def _given(
    config: type[ModelConfig], values: Mapping[str, Any], train: Manifest, masks: Masks, options: ReadOptions
) -> dict[str, Any]:
    if masks == "joint":
        raise ConfigError(
            "This model draws scans for masks that it is given, so it learns no pairs. Leave --masks joint out, or "
            "choose another preset."
        )
    _require(config, "context")
    if not any(row.mask for row in train.rows):
        raise DataError(
            "The model is to be given each scan's mask, but no training scan has one. Put masks beside the scans "
            "(SCAN_mask.nii.gz, or a column 'mask' in a CSV), or train a preset that is given none, with --masks none."
        )
    labels = label_values(train, options)
    channels = int(values.get("context", 0))
    if channels not in (0, 1, len(labels)):
        raise ConfigError(
            f"model.context: takes a channel for each label of the masks ({', '.join(map(str, labels))}); "
            f"expected {len(labels)}, found {channels}. Leave it out."
        )
    return {"labels": labels, "context": len(labels)}


def _pairs_suit(family: type[Model], values: Mapping[str, Any], train: Manifest, sliced: bool) -> bool:
    have = sum(bool(row.mask) for row in train.rows)
    return 0 < have >= _MOST_HAVE_ONE * len(train) and not sliced and _samples(family, values)


def _samples(family: type[Model], values: Mapping[str, Any]) -> bool:
    return "samples" in family.abilities(family.Config.model_construct(**{"shape": (1, 1), **values}))


def _require(family: type[ModelConfig], field: str) -> None:
    if not takes(family, field):
        kind = family.model_fields["kind"].default
        raise ConfigError(f"{kind} takes no {field}. Families that do: {families_with(field)}.")


def told_of(config: ModelConfig) -> dict[str, Any]:
    """What a dataset must bring for a model of this config."""
    return {
        "classes": config.classes,
        "covariates": getattr(config, "covariates", ()),
        "context": bool(getattr(config, "context", 0)),
        "labels": config.labels,
    }


def checked_cells(covariates: Sequence[Covariate], given: Mapping[str, str]) -> dict[str, str]:
    """Covariates that a person gives, by name, if a model knows them.

    Raises:
        ConfigError: a name or a word is unknown, or a number is none; says which there are.
    """
    known = {one.name: one for one in covariates}
    for name, cell in given.items():
        if name not in known:
            names = ", ".join(known) or "none"
            raise ConfigError(f"The model is told no {name!r}. It is told: {names}.")
        if wrong := known[name].refusal(cell):
            raise ConfigError(wrong)
    return dict(given)


def drawn_cells(covariates: Sequence[Covariate], seed: int) -> dict[str, str]:
    """Covariates of somebody who does not exist: numbers about the training scans' mean, levels alike often.

    Of a text every word by itself, as often as the training scans have it.
    """
    rng = np.random.default_rng(seed)
    return {one.name: _drawn_cell(one, rng) for one in covariates}


def _drawn_cell(one: Covariate, rng: np.random.Generator) -> str:
    if one.words:
        return " ".join(word for word, share in zip(one.words, one.shares, strict=True) if rng.random() < share)
    return str(rng.choice(one.levels)) if one.levels else f"{rng.normal(one.mean, one.sd):.4g}"


def conditions_for(config: ModelConfig, labels: Sequence[str], cells: Sequence[Mapping[str, str]]) -> Tensor | None:
    """What to tell a model of scans with these classes and covariates; None for nothing."""
    told = told_of(config)
    rows = [condition(a, b, told["classes"], told["covariates"]) for a, b in zip(labels, cells, strict=True)]
    if told["covariates"]:
        return torch.stack([torch.as_tensor(row) for row in rows])
    return torch.tensor(rows) if config.classes else None


def masks_of(manifest: Manifest, recipe: Recipe, options: ReadOptions, labels: Sequence[int] = ()) -> list[Tensor]:
    """The masks (k, *space) of the training scans that have one, prepared as the scans are, 0 or 1 for each label.

    Args:
        manifest: whose training scans.
        recipe: how scans are prepared.
        options: how strict reading is.
        labels: of the model's config; none: 1 wherever anything is marked.

    Raises:
        DataError: there is none.
    """
    rows = tuple(row for row in manifest.split("train").rows if row.mask)
    if not rows:
        raise DataError("The model draws scans for given masks, but no training scan of these data has a mask.")
    data = ScanDataset(replace(manifest, rows=rows), recipe, context=True, labels=labels, options=options)
    return [data[n]["context"] for n in range(len(data))]


__all__ = [
    "Masks", "checked_cells", "condition_fields", "conditions_for", "drawn_cells", "mask_fields", "masks_of", "told_of",
]  # fmt: skip
