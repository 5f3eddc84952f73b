"""A trained model as a folder that can be shipped: weights, values, and nothing that can run.

    weights.safetensors      parameters of every model, `name.parameter`
    calibration.safetensors  what held-out healthy scans looked like, where there were any
    bundle.json              configs, recipe, input contract, calibration, training facts, hashes, its own among them
    README.md                the model card
    preview.png              generated scans

Every hash and the input contract are checked before anything is built.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from medgen.data.recipe import Recipe
from medgen.errors import BundleError, ConfigError, GeometryError, OutputError
from medgen.grid import Grid
from medgen.models import build, config_of
from medgen.models.base import Model, ModelConfig
from medgen.scan import Scale, Scan

FORMAT = 1
_FILES = ("weights.safetensors", "calibration.safetensors")
_VALUES = "bundle.json"


class Contract(BaseModel):
    """What a scan must be for a bundle to have something to say about it.

    Args:
        modality: DICOM's two-letter code, '' where the training files told none.
        unit: of the physical values, such as 'HU'.
        channels: values per voxel.
        planar: images rather than volumes.
        spacing: median mm of the training scans.
        low, high: range that the training scans' physical values span.
        integers: the training files stored whole numbers, so generated ones do too.
        slope, intercept: median Scale of the prepared training scans, a number or one a channel; gives generated scans
            their unit.
        grid: where generated scans lie.
        space: NIfTI xform code of that grid.
        body_part: such as 'BRAIN'.
        names: of the channels, such as the domains that were joined; empty where there is nothing to tell.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    modality: str = ""
    unit: str = ""
    channels: int = 1
    planar: bool = False
    spacing: tuple[float, float, float]
    low: float
    high: float
    integers: bool = False
    slope: float | tuple[float, ...] = 1.0
    intercept: float | tuple[float, ...] = 0.0
    grid: dict
    space: int = 1
    body_part: str = ""
    names: tuple[str, ...] = ()

    @field_validator("grid")
    @classmethod
    def _places(cls, grid: dict) -> dict:
        try:
            Grid.from_dict(grid)
        except (GeometryError, KeyError, TypeError) as error:
            raise ValueError(f"not a grid: {error}") from error
        return grid

    @model_validator(mode="after")
    def _one_a_channel(self) -> "Contract":
        if np.shape(self.slope) != np.shape(self.intercept) or np.shape(self.slope) not in ((), (self.channels,)):
            raise ValueError(f"slope and intercept: expected numbers, or one for each of {self.channels} channels")
        if self.names and len(self.names) != self.channels:
            raise ValueError(f"names: expected {self.channels}, one a channel, not {len(self.names)}")
        return self

    def check(self, scan: Scan) -> list[str]:
        """Refuse a scan of another kind; return warnings about one that is merely unusual.

        Raises:
            BundleError: other modality, unit, channels, dimensions or value range than trained on.
        """
        told = scan.header.modality
        if told and self.modality and told != self.modality:
            raise BundleError(
                f"The model was trained on {self.modality}; this scan is {told}. Use a bundle for {told}."
            )
        if scan.scale.unit != self.unit and scan.scale.unit and self.unit:
            raise BundleError(f"The model was trained on values in {self.unit}; this scan is in {scan.scale.unit}.")
        if scan.channels != self.channels or scan.is_planar != self.planar:
            kind = {True: "an image", False: "a volume"}
            raise BundleError(
                f"The model takes {kind[self.planar]} with {self.channels} channel(s); "
                f"this is {kind[scan.is_planar]} with {scan.channels}."
            )
        return self._check_values(scan) + self._check_spacing(scan)

    def _check_values(self, scan: Scan) -> list[str]:
        span = self.high - self.low
        values = scan.physical()
        known = values[np.isfinite(values)]
        if not known.size:
            raise BundleError("No voxel of this scan was measured: all are padding or not a number.")
        low, high = float(known.min()), float(known.max())
        if self.low >= 0 and low < -0.05 * span:
            raise BundleError(
                f"The model was trained on values from {self.low:g} to {self.high:g}; this scan goes down to {low:g}. "
                "It looks like another modality or unit (Hounsfield units are negative in air)."
            )
        if self.unit == "HU" and self.low <= -500 < low:
            raise BundleError(
                f"The model was trained on Hounsfield units from {self.low:g}; this scan starts at {low:g}."
            )
        if self.unit != "HU" and not (0.02 * span < high - low < 50 * span):
            return [f"values span {high - low:g}, training scans spanned {span:g}"]
        return []

    def _check_spacing(self, scan: Scan) -> list[str]:
        if scan.is_planar:
            return []
        here, there = sorted(scan.grid.spacing), sorted(self.spacing)
        if any(not 0.4 < a / b < 2.5 for a, b in zip(here, there, strict=True)):
            told = " x ".join(f"{s:.3g}" for s in scan.grid.spacing)
            return [f"spacing {told} mm is far from the training scans' {' x '.join(f'{s:.3g}' for s in there)} mm"]
        return []

    def physical_scan(self, values: Any, recipe_scale: Scale | None = None) -> Scan:
        """A generated scan (c, *space) on the bundle's grid, in the training scans' unit."""
        from medgen.scan import Header

        grid = Grid.from_dict(self.grid)
        scale = recipe_scale or Scale(self.slope, self.intercept, self.unit)
        voxels = values.reshape(values.shape[0], *grid.shape)
        names = self.names if len(self.names) == len(voxels) else ()
        header = Header(self.modality, self.body_part, self.space, synthetic=True, channels=names)
        return Scan(voxels, grid, scale, header)


@dataclass(frozen=True, eq=False)
class Bundle:
    """One or several trained models with what is needed to use them.

    Args:
        models: by name.
        recipe: from a scan to a model's input.
        contract: which scans the models understand.
        calibration: numbers about held-out healthy scans, empty where there were none.
        tensors: arrays that belong to the calibration.
        training: facts: patients, manifest hash, images seen, seed, minutes, device.
        metrics: measured on held-out scans.
        licence: of the weights, as the trainer states it.
        weights_sha256: of the weights file, '' before saving.
    """

    models: Mapping[str, Model]
    recipe: Recipe
    contract: Contract
    calibration: dict[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    licence: str = "not stated"
    weights_sha256: str = ""

    @property
    def model(self) -> Model:
        """The only model, or the first of several: what a detector is known for."""
        return next(iter(self.models.values()))

    @property
    def name(self) -> str:
        """The families inside, such as 'vae'."""
        return "+".join(model.config.kind for model in self.models.values())

    def save(self, folder: Path) -> str:
        """Write the bundle's files into an existing folder; returns the sha256 of the weights.

        Raises:
            OutputError: the disk is full, or refuses.
        """
        try:
            return self._written(folder)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"Cannot write the bundle {folder.name}: {error}. Free some space, run again.") from error

    def _written(self, folder: Path) -> str:
        weights = {f"{name}.{key}": _plain(t) for name, m in self.models.items() for key, t in m.state_dict().items()}
        save_file(weights, folder / _FILES[0])
        if self.tensors:
            save_file({name: _plain(t) for name, t in self.tensors.items()}, folder / _FILES[1])
        hashes = {name: _sha256(folder / name) for name in _FILES if (folder / name).exists()}
        stated = {
            "format": FORMAT,
            "medgen": version("medgen"),
            "models": {name: model.config.model_dump(mode="json") for name, model in self.models.items()},
            "recipe": self.recipe.model_dump(mode="json"),
            "contract": self.contract.model_dump(mode="json"),
            "calibration": self.calibration,
            "training": self.training,
            "metrics": self.metrics,
            "licence": self.licence,
            "intended_use": "Research use only, not a medical device.",
            "sha256": hashes,
        }
        stated["sha256"] = hashes | {_VALUES: signature(stated)}
        (folder / _VALUES).write_text(json.dumps(stated, indent=1) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(_card(stated, self._draws), encoding="utf-8")
        return hashes[_FILES[0]]

    @property
    def _draws(self) -> bool:
        return any("samples" in model.abilities(model.config) for model in self.models.values())

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "cpu") -> "Bundle":
        """Read a bundle, refusing anything that is not exactly what was saved.

        Raises:
            BundleError: no bundle, another format, a hash that differs, unknown models, missing weights.
        """
        folder = Path(folder)
        stated = _read_json(folder)
        _check_hashes(folder, stated.sha256)
        try:
            configs = {name: config_of(config) for name, config in stated.models.items()}
            weights = load_file(folder / _FILES[0], device=device)
            tensors = load_file(folder / _FILES[1]) if _FILES[1] in stated.sha256 else {}
            _check_weights(configs, weights)
            models = {}
            for name, config in configs.items():
                model = build(config)
                model.load_state_dict(_part(weights, name))
                models[name] = model.to(device).eval()
        except (ValidationError, ConfigError, SafetensorError, RuntimeError) as error:
            why = _told(error) if isinstance(error, ValidationError) else str(error).strip().splitlines()[0]
            raise BundleError(f"{folder.name}: bundle.json and the weights do not belong together ({why}).") from error
        return cls(
            models=models,
            recipe=stated.recipe,
            contract=stated.contract,
            calibration=stated.calibration,
            tensors=tensors,
            training=stated.training,
            metrics=stated.metrics,
            licence=stated.licence,
            weights_sha256=stated.sha256[_FILES[0]],
        )


class _Stated(BaseModel):
    """What bundle.json says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1]
    medgen: str
    models: dict[str, dict[str, Any]] = Field(min_length=1)
    recipe: Recipe
    contract: Contract
    calibration: dict[str, Any]
    training: dict[str, Any]
    metrics: dict[str, Any]
    licence: str
    intended_use: str
    sha256: dict[str, str]


def _read_json(folder: Path) -> _Stated:
    place = folder / _VALUES
    if not place.is_file():
        found = "no bundle.json inside" if folder.is_dir() else "nothing" if not folder.exists() else "a file"
        raise BundleError(f"{folder} should be a bundle folder made by `medgen train`; found {found}.")
    try:
        stated = json.loads(place.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{place} is damaged: not valid JSON. Copy the bundle again.") from error
    if not isinstance(stated, dict) or stated.get("format") != FORMAT:
        raise BundleError(f"{place} is not a bundle of format {FORMAT}. It was made by another version of medgen.")
    try:
        told = _Stated.model_validate(stated)
    except ValidationError as error:
        raise BundleError(f"{place} is damaged or tampered with: {_told(error)}. Copy the bundle again.") from error
    if _FILES[0] not in told.sha256:
        raise BundleError(f"{place} states no sha256 of the weights, so they cannot be trusted.")
    if told.sha256.get(_VALUES) != signature(stated):
        raise BundleError(
            f"{place} is not what was saved (its sha256 differs): damaged, changed by hand, or of an earlier version. "
            "Copy the bundle again from where it was trained, or train again."
        )
    return told


def signature(stated: Mapping[str, Any]) -> str:
    """sha256 of what bundle.json says, but for that hash itself; how it is laid out does not matter."""
    hashes = {name: value for name, value in stated["sha256"].items() if name != _VALUES}
    plain = json.loads(json.dumps({**stated, "sha256": hashes}))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _told(error: ValidationError) -> str:
    """Where the first mistake is, and what it is."""
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"


def _check_hashes(folder: Path, stated: Mapping[str, str]) -> None:
    for name, expected in stated.items():
        if name == _VALUES:
            continue
        if name not in _FILES:
            raise BundleError(f"{folder.name}/bundle.json lists {name!r}, which no bundle contains.")
        if not (folder / name).is_file():
            raise BundleError(f"{folder.name}: {name} is missing. Copy the whole bundle folder.")
        if _sha256(folder / name) != expected:
            raise BundleError(
                f"{folder.name}/{name} is not the file that was saved (its sha256 differs): damaged or tampered "
                "with. Copy the bundle again from where it was trained."
            )


def _check_weights(configs: Mapping[str, ModelConfig], weights: Mapping[str, Tensor]) -> None:
    """Refuse weights of other names, shapes or no finite value; a config cannot ask for more memory than they take."""
    with torch.device("meta"):
        models = {name: build(config) for name, config in configs.items()}
    shapes = {f"{name}.{key}": t.shape for name, model in models.items() for key, t in model.state_dict().items()}
    if shapes != {name: tensor.shape for name, tensor in weights.items()}:
        raise RuntimeError("names or shapes differ")
    if bad := [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]:
        raise RuntimeError(f"{bad[0]} is not finite")


def _part(weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): tensor for key, tensor in weights.items() if key.startswith(f"{name}.")}


def _card(stated: Mapping[str, Any], draws: bool) -> str:
    contract, training = stated["contract"], stated["training"]
    rows = [("modality", contract["modality"] or "not told"), ("unit", contract["unit"] or "arbitrary")]
    rows += [(key.replace("_", " "), value) for key, value in training.items() if not isinstance(value, list | dict)]
    rows += [(key.replace("_", " "), value) for key, value in stated["metrics"].items()]
    families = ", ".join(config["kind"] for config in stated["models"].values())
    picture = "![generated scans](preview.png)\n\nThe picture shows generated scans, nobody's.\n\n" if draws else ""
    warnings = "".join(f"**{sentence}**\n\n" for sentence in training.get("warnings", ()))
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    return (
        f"# medgen bundle: {families}\n\n**Research use only, not a medical device.**\n\n"
        f"{warnings}{picture}"
        f"| | |\n|---|---|\n{table}\n| licence | {stated['licence']} |\n\n"
        "Score scans with `medgen score SCANS -m THIS_FOLDER -o OUT`, "
        "generate more with `medgen augment FOLDER -m THIS_FOLDER -o OUT`.\n"
    )


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


__all__ = ["Bundle", "Contract", "signature"]
