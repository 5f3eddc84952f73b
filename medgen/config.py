"""Presets: a model, how to prepare scans for it and how to train it, as readable values.

Precedence: defaults, then the YAML file, then `--set a.b=c`.
"""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from medgen.data.recipe import Plane, Recipe
from medgen.errors import ConfigError

_PACKAGED = Path(__file__).parent / "presets"
_CHECKOUT = Path(__file__).parent.parent / "configs"
_MOST_BYTES = 100_000
_MOST_LEVELS = 30


class About(BaseModel):
    """What a person wants to know of a preset before using it; needs no torch to read.

    Args:
        title: one sentence.
        family: the kind of model.
        year: of the paper.
        paper: authors and title.
        dims: 2 for images, 3 for volumes.
        abilities: what the model can do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    family: str
    year: int
    paper: str
    dims: int = Field(ge=2, le=3)
    abilities: tuple[str, ...]


class Part(BaseModel):
    """One of several models that are trained together.

    Args:
        preset: another preset's name, for images or volumes as this one is.
        share: of the training time, beside the other models' shares.
        model, fit: fields that differ from that preset's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: str
    share: float = Field(default=1.0, gt=0)
    model: dict[str, Any] = Field(default_factory=dict)
    fit: dict[str, Any] = Field(default_factory=dict)


class Preset(BaseModel):
    """Everything that decides a training run besides the scans and the seed.

    Args:
        about: for people.
        model: fields of the family's config; shape, channels and classes follow from the scans.
        models: several models by name instead, for detectors; the first is what they are known for.
        score: how the models say that a scan is unusual; by default what suits the model.
        map: how they say where; by default as `score` does.
        recipe: 'auto' from the scans themselves, or steps.
        max_voxels: what an automatic recipe keeps a scan's size to; a slice's, where it sees slices.
        planes: which slices a preset for images sees of volumes.
        fit: fields of the training config.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    about: About
    model: dict[str, Any] = Field(default_factory=dict)
    models: dict[str, Part] = Field(default_factory=dict)
    score: dict[str, Any] | None = None
    map: dict[str, Any] | None = None
    recipe: str | Recipe = "auto"
    max_voxels: int = Field(default=1_000_000, ge=64)
    planes: tuple[Plane, ...] = Field(default=("sagittal", "coronal", "axial"), min_length=1)
    fit: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_or_several(self) -> "Preset":
        if bool(self.model) == bool(self.models):
            raise ValueError("a preset has either a model or several models")
        if self.models and not (self.score or self.map):
            raise ValueError("several models need a score or a map that says what they are asked")
        return self


def presets_folder() -> Path:
    """Where the YAML presets are: inside the installed package, or the checkout's configs/."""
    return _PACKAGED if _PACKAGED.is_dir() else _CHECKOUT


def preset_names() -> list[str]:
    """The presets that come with medgen."""
    return sorted(path.stem for path in presets_folder().glob("*.yaml"))


def preset_for(name: str | Path, dims: int) -> str | Path:
    """A preset's full name for images or volumes: 'vae' is vae2d or vae3d; full names and files stay as they are.

    Raises:
        ConfigError: it exists for the other kind of scans only.

    >>> preset_for("vae", 3)
    'vae3d'
    """
    full, other = f"{name}{dims}d", f"{name}{5 - dims}d"
    known = preset_names()
    if full not in known and other in known:
        raise ConfigError(f"There is no {name!r} in {dims}D, only {other}. Run `medgen models` for others.")
    return full if full in known and str(name) not in known else name


def load_preset(name: str | Path, overrides: Sequence[str] = ()) -> Preset:
    """A preset by name or YAML path, with `a.b=c` overrides.

    Raises:
        ConfigError: no such preset, unreadable YAML, an unknown key or a wrong value; says which.
    """
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else presets_folder() / f"{name}.yaml"
    if not path.is_file():
        close = difflib.get_close_matches(str(name), preset_names() + [one[:-2] for one in preset_names()], 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"There is no preset {str(name)!r}.{hint} Presets: {', '.join(preset_names())}.")
    values = _read_yaml(path)
    for override in overrides:
        _apply(values, override)
    return _validated(values, path.name)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path.name}: a preset is text in UTF-8; this file is not.") from error
    if len(text) > _MOST_BYTES:
        raise ConfigError(f"{path.name}: a preset is a short file; this one has {len(text):,} characters.")
    try:
        _check_tokens(text, path.name)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path.name}: not valid YAML: {str(error).splitlines()[0]}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path.name}: expected keys such as model: and fit:.")
    return values


def _check_tokens(text: str, name: str) -> None:
    """Refuse what a few bytes of YAML can do: nested aliases stand for gigabytes, deep nesting takes minutes."""
    opening = (yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken)
    opening += (yaml.BlockSequenceStartToken, yaml.BlockMappingStartToken)
    closing = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)
    depth = 0
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        if isinstance(token, yaml.AliasToken):
            raise ConfigError(f"{name}: YAML aliases (*name) are not allowed in a preset. Write the value out.")
        depth += isinstance(token, opening) - isinstance(token, closing)
        if depth > _MOST_LEVELS:
            raise ConfigError(f"{name}: a preset has a few levels; this file is nested more than {_MOST_LEVELS} deep.")


def _apply(values: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ConfigError(f"--set takes key=value, such as fit.images=5000; found {override!r}.")
    *parents, last = key.split(".")
    place = values
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise ConfigError(f"--set {override}: {parent} is a value and has no keys inside.")
    try:
        place[last] = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML. Quote it if it is text.") from error


def _validated(values: dict[str, Any], source: str) -> Preset:
    try:
        return Preset.model_validate(values)
    except ValidationError as error:
        raise explained(error, source, Preset) from error


def explained(error: ValidationError, source: str, model: type[BaseModel], prefix: str = "") -> ConfigError:
    """One line on what is wrong in a config, with a suggestion for a misspelt key."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    where = f"{prefix}{place}".rstrip(".")
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(first["loc"][-1]), list(model.model_fields), 1)
        hint = f" Did you mean {close[0]!r}?" if close else f" Keys: {', '.join(model.model_fields)}."
        return ConfigError(f"{source}: {where}: no such key.{hint}")
    return ConfigError(f"{source}: {where}: {first['msg']}; found {_short(first.get('input'))}.")


def typed(model: type[BaseModel], values: dict[str, Any], source: str, prefix: str) -> Any:
    """`values` as `model`, or a ConfigError that names the key.

    Raises:
        ConfigError: an unknown key or a wrong value.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise explained(error, source, model, f"{prefix}.") from error


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) < 80 else text[:77] + "..."


__all__ = [
    "About",
    "Part",
    "Preset",
    "explained",
    "load_preset",
    "preset_for",
    "preset_names",
    "presets_folder",
    "typed",
]
