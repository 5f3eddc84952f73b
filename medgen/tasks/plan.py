"""What a training run will do, decided before it does it: which scans, which model, how they are prepared."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import lcm
from pathlib import Path
from typing import Any, Literal

from medgen import io
from medgen.config import Preset, load_preset, preset_for, typed
from medgen.data.fingerprint import Fingerprint, auto_recipe, fingerprint
from medgen.data.manifest import Manifest, index
from medgen.data.recipe import Recipe, Respace
from medgen.data.window import flat
from medgen.errors import ConfigError, DataError, MedgenError
from medgen.io.source import ReadOptions
from medgen.log import note, track
from medgen.models import family
from medgen.models.base import ModelConfig
from medgen.scan import Scan
from medgen.tasks.capabilities import takes
from medgen.tasks.conditions import check_context, condition_fields
from medgen.training.fit import FitConfig

# Scans read to find a recipe; a fingerprint needs no more.
_LOOKED_AT = 64


@dataclass(frozen=True)
class Choices:
    """What a person decides about a training run.

    Args:
        preset: name or YAML file; None: the default for images or for volumes.
        label: learn one class only, such as 'normal'.
        domain: learn one modality or site only.
        overrides: 'a.b=c' changes of the preset.
        minutes: training time to keep within on this machine; None: the preset's images.
        seed: decides splits, order, noise.
        covariates: columns of the manifest that the model is told, such as 'age' and 'sex'.
        context: 'mask' gives the model each scan's mask; None for nothing.
    """

    preset: str | Path | None = None
    label: str | None = None
    domain: str | None = None
    overrides: Sequence[str] = ()
    minutes: float | None = 20
    seed: int = 0
    covariates: Sequence[str] = ()
    context: Literal["mask"] | None = None

    def settings(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"preset": str(self.preset)}


@dataclass(frozen=True, eq=False)
class Plan:
    """What a training run will do, before it does it.

    Args:
        manifest: the scans, with splits.
        preset: name of the preset.
        model: config of the model.
        recipe: from scan to model input.
        fit: how to train.
        found: the scans' fingerprint.
        minutes: training time to keep within, None for no bound.
    """

    manifest: Manifest
    preset: str
    model: ModelConfig
    recipe: Recipe
    fit: FitConfig
    found: Fingerprint
    minutes: float | None

    def describe(self) -> dict[str, Any]:
        """Plain values for people and for JSON."""
        counts = {name: len(self.manifest.split(name)) for name in ("train", "val", "calibration", "test")}
        return {
            "scans": counts,
            "classes": list(self.model.classes),
            "preset": self.preset,
            "model": self.model.model_dump(mode="json"),
            "recipe": self.recipe.model_dump(mode="json"),
            "fit": self.fit.model_dump(mode="json"),
            "minutes": self.minutes,
        }


@dataclass(frozen=True, eq=False)
class Look:
    """What was found in a folder before anything is decided.

    Args:
        manifest: the scans to learn from, with splits.
        found: their fingerprint.
    """

    manifest: Manifest
    found: Fingerprint

    @property
    def dims(self) -> int:
        """2 for images, 3 for volumes."""
        return 2 if self.found.planar else 3


def look_at(data: str | Path, choices: Choices = Choices(), options: ReadOptions = ReadOptions()) -> Look:
    """Which scans there are to learn from, and what they are like.

    Raises:
        DataError: nothing to learn from.
    """
    manifest = _chosen(index(data, options, seed=choices.seed), choices.label, choices.domain)
    note(manifest.summary())
    return Look(manifest, fingerprint(_readable(manifest.split("train"), options)))


def plan_training(data: str | Path, choices: Choices = Choices(), options: ReadOptions = ReadOptions()) -> Plan:
    """Look at the scans and decide everything; nothing is written.

    Raises:
        DataError: nothing to learn from.
        ConfigError: the preset does not fit.
    """
    return planned(look_at(data, choices, options), choices)


def planned(look: Look, choices: Choices = Choices()) -> Plan:
    """Decide everything about scans that have been looked at.

    Raises:
        ConfigError: the preset does not fit.
    """
    found, manifest = look.found, look.manifest
    name, preset = _preset(choices, look.dims)
    kind = family(str(preset.model.get("kind")))
    given = {"channels": found.channels, "classes": _classes(manifest)}
    given |= condition_fields(kind.Config, manifest, choices.covariates, choices.context)
    values = {**given, **preset.model}
    recipe = _recipe(preset, found, kind.stride(values))
    if takes(kind.Config, "spacing") and "spacing" not in values:
        # How far voxels lie apart decides the stride, which has a say in how far they may.
        values["spacing"] = _spacing(recipe, found)[: look.dims]
        recipe = _recipe(preset, found, kind.stride(values))
    if recipe.shape is None:
        raise ConfigError(f"{name}: the recipe needs a crop_or_pad step, so that every scan has one shape.")
    config = typed(kind.Config, {"shape": recipe.shape[: look.dims], **values}, name, "model")
    check_context(config, manifest)
    settings = typed(FitConfig, preset.fit, name, "fit")
    return Plan(manifest, name, config, recipe, settings, found, choices.minutes)


def shared_recipe(look: Look, choices: Sequence[Choices]) -> Recipe:
    """A recipe that suits the presets of all `choices`: the size of the smallest, multiples of every stride.

    Raises:
        ConfigError: a preset does not fit.
    """
    presets = [_preset(one, look.dims)[1] for one in choices]
    configs = [planned(look, one).model for one in choices]
    strides = [family(one.kind).stride(one.model_dump()) for one in configs]
    each = [(stride,) * look.dims if isinstance(stride, int) else stride for stride in strides]
    multiple = tuple(lcm(*axis) for axis in zip(*each, strict=True))
    return auto_recipe(look.found, multiple=multiple, max_voxels=min(preset.max_voxels for preset in presets))


def _preset(choices: Choices, dims: int) -> tuple[str, Preset]:
    """The preset, for images or volumes as asked."""
    name = str(preset_for(choices.preset or "vae", dims))
    preset = load_preset(name, choices.overrides)
    if preset.about.dims != dims:
        kind = {2: "images", 3: "volumes"}[dims]
        raise ConfigError(
            f"Preset {name!r} is for {preset.about.dims}D; these are {kind}. Run `medgen models` for others."
        )
    return name, preset


def _chosen(manifest: Manifest, label: str | None, domain: str | None) -> Manifest:
    """The scans to learn from: one class or domain where asked, else the largest domain."""
    if label is not None:
        if label not in manifest.labels:
            raise DataError(f"There is no class {label!r}. Classes: {', '.join(manifest.labels) or 'none'}.")
        manifest = manifest.where(label=label)
    if domain is not None:
        if domain not in manifest.domains:
            raise DataError(f"There is no domain {domain!r}. Domains: {', '.join(manifest.domains) or 'none'}.")
        manifest = manifest.where(domain=domain)
    elif len(manifest.domains) > 1:
        largest = max(manifest.domains, key=lambda name: len(manifest.where(domain=name)))
        note(f"The scans are of several kinds ({', '.join(manifest.domains)}); learning {largest}. --domain chooses.")
        manifest = manifest.where(domain=largest)
    unseen = sorted(set(manifest.labels) - set(manifest.split("train").labels))
    if unseen and manifest.split("train").labels:
        note(f"No scan is left to learn {', '.join(unseen)} from: left out. Three more of each would do.")
        manifest = replace(manifest, rows=tuple(row for row in manifest.rows if row.label not in unseen))
    if not len(manifest.split("train")):
        raise DataError(f"No scan of {manifest.root} is left for training; {len(manifest)} were found.")
    return manifest


def _readable(manifest: Manifest, options: ReadOptions) -> Iterator[Scan]:
    """The first scans that can be read; whatever cannot is named when the dataset is built.

    Raises:
        DataError: none of them can be read; says why not the first.
    """
    seen, first = 0, None
    for row in track(manifest.rows[: 2 * _LOOKED_AT], "Looking at scans"):
        if seen >= _LOOKED_AT:
            return
        try:
            yield flat(io.read(manifest.locate(row.path), options))
            seen += 1
        except MedgenError as error:
            first = first or error
    if not seen:
        raise DataError(f"None of {len(manifest)} scans in {manifest.root.name} could be read; the first: {first}")


def _recipe(preset: Preset, found: Fingerprint, stride: int | tuple[int, ...]) -> Recipe:
    if isinstance(preset.recipe, Recipe):
        return preset.recipe
    if preset.recipe != "auto":
        raise ConfigError(f"recipe: takes 'auto' or steps; found {preset.recipe!r}.")
    return auto_recipe(found, multiple=stride, max_voxels=preset.max_voxels)


def _classes(manifest: Manifest) -> tuple[str, ...]:
    """The classes to tell apart: all of them, where every scan has one and there are several."""
    return manifest.labels if len(manifest.labels) > 1 and all(row.label for row in manifest.rows) else ()


def _spacing(recipe: Recipe, found: Fingerprint) -> tuple[float, float, float]:
    """Millimetres between voxels of the prepared scans."""
    respaced = [step.spacing for step in recipe.steps if isinstance(step, Respace)]
    return respaced[-1] if respaced else found.spacing


__all__ = ["Choices", "Look", "Plan", "look_at", "plan_training", "planned", "shared_recipe"]
