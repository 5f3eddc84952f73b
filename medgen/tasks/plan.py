"""What a training run will do, decided before it does it: which scans, which model, how they are prepared."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import lcm
from pathlib import Path
from typing import Any

from medgen import io
from medgen.config import Preset, load_preset, preset_for, typed
from medgen.data.fingerprint import Fingerprint, auto_recipe, fingerprint
from medgen.data.manifest import Manifest, index
from medgen.data.recipe import Plane, Recipe, Respace
from medgen.data.window import flat
from medgen.errors import ConfigError, DataError, MedgenError
from medgen.io.source import ReadOptions
from medgen.log import note, track
from medgen.models import family
from medgen.models.base import Model, ModelConfig
from medgen.scan import Scan
from medgen.tasks.capabilities import takes
from medgen.tasks.conditions import Masks, condition_fields, mask_fields
from medgen.tasks.detector import Questions
from medgen.training.fit import FitConfig

# Scans read to find a recipe; a fingerprint needs no more.
_LOOKED_AT = 64
# Patients left out who are named one by one.
_NAMED = 10


@dataclass(frozen=True)
class Choices:
    """What a person decides about a training run.

    Args:
        preset: name or YAML file; None: the default for images or for volumes.
        label: learn one class only, such as 'normal'.
        domain: learn one modality or site only; 'T1w+T2w' learns one scan of each of a patient as channels.
        overrides: 'a.b=c' changes of the preset.
        minutes: training time to keep within on this machine; None: the preset's images.
        seed: decides splits, order, noise.
        covariates: columns of the manifest that the model is told, such as 'age' and 'sex'.
        masks: 'joint' learns scans together with their masks, 'given' draws scans for masks, 'auto' learns pairs where
            nearly all scans have a mask; 'none' leaves masks alone. A preset that is given an image is given masks.
    """

    preset: str | Path | None = None
    label: str | None = None
    domain: str | None = None
    overrides: Sequence[str] = ()
    minutes: float | None = 20
    seed: int = 0
    covariates: Sequence[str] = ()
    masks: Masks = "none"

    def settings(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"preset": str(self.preset)}


@dataclass(frozen=True, eq=False)
class Part:
    """One model of a run.

    Args:
        name: of the model in the bundle.
        preset: name of its preset.
        model: its config.
        fit: how to train it.
        share: of the training time, at most 1.
    """

    name: str
    preset: str
    model: ModelConfig
    fit: FitConfig
    share: float = 1.0


@dataclass(frozen=True, eq=False)
class Plan:
    """What a training run will do, before it does it.

    Args:
        manifest: the scans, with splits.
        preset: name of the preset.
        parts: the models.
        recipe: from scan to model input.
        questions: what detectors ask the models; None: what suits the model.
        found: the scans' fingerprint.
        minutes: training time to keep within, None for no bound.
    """

    manifest: Manifest
    preset: str
    parts: tuple[Part, ...]
    recipe: Recipe
    questions: Questions | None
    found: Fingerprint
    minutes: float | None

    @property
    def model(self) -> ModelConfig:
        """Config of the only model, or of the first."""
        return self.parts[0].model

    @property
    def fit(self) -> FitConfig:
        """How the only model, or the first, is trained."""
        return self.parts[0].fit

    def describe(self) -> dict[str, Any]:
        """Plain values for people and for JSON."""
        counts = {name: len(self.manifest.split(name)) for name in ("train", "val", "calibration", "test")}
        return {
            "scans": counts,
            "classes": list(self.model.classes),
            "preset": self.preset,
            **(self._part(self.parts[0]) if len(self.parts) == 1 else {p.name: self._part(p) for p in self.parts}),
            **({} if self.questions is None else self.questions.plain()),
            "recipe": self.recipe.model_dump(mode="json"),
            "minutes": self.minutes,
        }

    def _part(self, part: Part) -> dict[str, Any]:
        told = {"model": part.model.model_dump(mode="json"), "fit": part.fit.model_dump(mode="json")}
        return told if len(self.parts) == 1 else {"preset": part.preset, "share": part.share, **told}


@dataclass(frozen=True, eq=False)
class Look:
    """What was found in a folder before anything is decided.

    Args:
        manifest: the scans to learn from, with splits.
        found: their fingerprint.
        options: how strict reading was.
    """

    manifest: Manifest
    found: Fingerprint
    options: ReadOptions = field(default_factory=ReadOptions)

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
    return Look(manifest, fingerprint(_readable(manifest.split("train"), options)), options)


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
    found = look.found
    name, preset = _preset(choices, look.dims)
    dims, planes = preset.about.dims, _planes(preset, look)
    drafts = list(_drafts(name, preset, look, choices))
    recipe = _recipe(preset, found, _multiple(drafts, dims), planes)
    for draft in drafts:
        if takes(draft.kind.Config, "spacing") and "spacing" not in draft.values:
            # How far voxels lie apart decides the stride, which has a say in how far they may.
            draft.values["spacing"] = _spacing(recipe, found)[:dims]
            recipe = _recipe(preset, found, _multiple(drafts, dims), planes)
    if recipe.seen is None:
        raise ConfigError(f"{name}: the recipe needs a crop_or_pad step, so that every scan has one shape.")
    if len(recipe.seen) != dims:
        seen = " x ".join(map(str, recipe.seen))
        raise ConfigError(f"{name} is for {dims}D, but its recipe makes {seen}. Volumes need a slices step for 2D.")
    total, parts = sum(draft.share for draft in drafts), []
    for draft in drafts:
        config = typed(draft.kind.Config, {"shape": recipe.seen, **draft.values}, draft.preset, "model")
        settings = typed(FitConfig, draft.fit, draft.preset, "fit")
        parts.append(Part(draft.name, draft.preset, config, settings, draft.share / total))
    asked = Questions.of(preset.score, preset.map or preset.score) if preset.score or preset.map else None
    return Plan(look.manifest, name, tuple(parts), recipe, asked, found, choices.minutes)


@dataclass(frozen=True, eq=False)
class _Draft:
    """A model before the scans' shape is known."""

    name: str
    preset: str
    kind: type[Model]
    values: dict[str, Any]
    fit: dict[str, Any]
    share: float = 1.0


def _drafts(name: str, preset: Preset, look: Look, choices: Choices) -> Iterator[_Draft]:
    """The models of a preset, with what follows from the scans."""
    given = {"channels": look.found.channels}
    if not preset.models:
        kind = family(str(preset.model.get("kind")))
        given |= {"classes": _classes(look.manifest)}
        given |= condition_fields(kind.Config, look.manifest, choices.covariates)
        values = {**given, **preset.model}
        sliced = bool(_planes(preset, look))
        told = mask_fields(kind, values, look.manifest, choices.masks, sliced=sliced, options=look.options)
        yield _Draft("model", name, kind, values | told, preset.fit)
        return
    if choices.covariates or choices.masks in ("given", "joint"):
        raise ConfigError(f"{name}: a detector of several models is told nothing besides the scan. Leave that out.")
    for part, told in preset.models.items():
        theirs = load_preset(preset_for(told.preset, preset.about.dims))
        values = {**given, **theirs.model, **told.model}
        kind = family(str(values.get("kind")))
        yield _Draft(part, told.preset, kind, values, {**theirs.fit, **told.fit}, told.share)


def _multiple(drafts: Sequence[_Draft], dims: int) -> tuple[int, ...]:
    """What every axis of a scan must be a multiple of, for all models."""
    strides = [draft.kind.stride(draft.values) for draft in drafts]
    each = [(stride,) * dims if isinstance(stride, int) else stride for stride in strides]
    return tuple(lcm(*axis) for axis in zip(*each, strict=True))


def shared_recipe(look: Look, choices: Sequence[Choices]) -> Recipe:
    """A recipe that suits the presets of all `choices`: the size of the smallest, multiples of every stride.

    Raises:
        ConfigError: a preset does not fit.
    """
    presets = [_preset(one, look.dims)[1] for one in choices]
    kinds = {(preset.about.dims, _planes(preset, look)) for preset in presets}
    if len(kinds) > 1:
        raise ConfigError("Some presets see volumes, others slices, or other slices. Compare those that see the same.")
    dims, planes = next(iter(kinds))
    configs = [part.model for one in choices for part in planned(look, one).parts]
    strides = [family(one.kind).stride(one.model_dump()) for one in configs]
    each = [(stride,) * dims if isinstance(stride, int) else stride for stride in strides]
    multiple = tuple(lcm(*axis) for axis in zip(*each, strict=True))
    most = min(preset.max_voxels for preset in presets)
    return auto_recipe(look.found, multiple=multiple, max_voxels=most, planes=planes)


def _preset(choices: Choices, dims: int) -> tuple[str, Preset]:
    """The preset, for images or volumes as asked."""
    name = str(preset_for(choices.preset or "vae", dims))
    preset = load_preset(name, choices.overrides)
    if preset.about.dims > dims:
        raise ConfigError(f"Preset {name!r} is for 3D; these are images. Run `medgen models` for others.")
    return name, preset


def _planes(preset: Preset, look: Look) -> tuple[Plane, ...]:
    """The slices that a preset for images sees of volumes; none of images, nor where it is for volumes."""
    return preset.planes if preset.about.dims < look.dims else ()


def _chosen(manifest: Manifest, label: str | None, domain: str | None) -> Manifest:
    """The scans to learn from: one class or domain where asked, else the largest domain."""
    if domain is not None:
        manifest = _of_domain(manifest, domain)
    if label is not None:
        if label not in manifest.labels:
            raise DataError(f"There is no class {label!r}. Classes: {', '.join(manifest.labels) or 'none'}.")
        manifest = manifest.where(label=label)
    if domain is None and len(manifest.domains) > 1:
        largest = max(manifest.domains, key=lambda name: len(manifest.where(domain=name)))
        note(f"The scans are of several kinds ({', '.join(manifest.domains)}); learning {largest}. --domain chooses.")
        manifest = manifest.where(domain=largest)
    unseen = sorted(set(manifest.labels) - set(manifest.split("train").labels))
    if unseen and manifest.split("train").labels:
        note(f"No scan is left to learn {', '.join(unseen)} from: left out. Three more of each would do.")
        manifest = replace(manifest, rows=tuple(row for row in manifest.rows if row.label not in unseen))
    train = manifest.split("train")
    few = [name for name in train.labels if len(train.where(label=name).patients) == 1]
    if few and len(train.patients) > 1:
        note(f"One patient is left to learn {', '.join(few)} from: whatever is drawn of that class shows this patient.")
    if not len(train):
        raise DataError(f"No scan of {manifest.root} is left for training; {len(manifest)} were found.")
    return manifest


def _of_domain(manifest: Manifest, domain: str) -> Manifest:
    """The scans of a domain, or those of several joined by '+' as the channels of one; says who was left out."""
    chosen = manifest.of_domain(domain)
    left_out = [f"{skip.path} ({skip.reason})" for skip in chosen.skipped[len(manifest.skipped) :]]
    if left_out:
        more = f" and {len(left_out) - _NAMED} more" if len(left_out) > _NAMED else ""
        note(f"Left out: {', '.join(left_out[:_NAMED])}{more}.")
    return chosen


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


def _recipe(preset: Preset, found: Fingerprint, stride: int | tuple[int, ...], planes: Sequence[Plane] = ()) -> Recipe:
    if isinstance(preset.recipe, Recipe):
        return preset.recipe
    if preset.recipe != "auto":
        raise ConfigError(f"recipe: takes 'auto' or steps; found {preset.recipe!r}.")
    return auto_recipe(found, multiple=stride, max_voxels=preset.max_voxels, planes=planes)


def _classes(manifest: Manifest) -> tuple[str, ...]:
    """The classes to tell apart: all of them, where every scan has one and there are several."""
    return manifest.labels if len(manifest.labels) > 1 and all(row.label for row in manifest.rows) else ()


def _spacing(recipe: Recipe, found: Fingerprint) -> tuple[float, float, float]:
    """Millimetres between voxels of the prepared scans."""
    respaced = [step.spacing for step in recipe.steps if isinstance(step, Respace)]
    return respaced[-1] if respaced else found.spacing


__all__ = ["Choices", "Look", "Part", "Plan", "look_at", "plan_training", "planned", "shared_recipe"]
