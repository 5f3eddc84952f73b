"""From a manifest and a recipe to batches, with MONAI's loading, caching and random transforms."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from monai.data import CacheDataset, ImageReader, PersistentDataset
from monai.transforms import Compose, RandAdjustContrast, RandFlip, RandGaussianNoise, Transform
from monai.utils import convert_to_tensor
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from medgen import io
from medgen.data.covariates import Covariate
from medgen.data.manifest import Manifest, Row
from medgen.data.motion import RandMove
from medgen.data.recipe import Recipe
from medgen.data.window import flat, prepared, what_was_cut
from medgen.errors import DataError, MedgenError
from medgen.grid import Grid
from medgen.io.source import ReadOptions, Skipped
from medgen.log import note, track
from medgen.scan import Scan
from medgen.seeds import derived_seed


@dataclass
class Batch:
    """What a model sees.

    Args:
        x: (b, c, *space), two axes of space for images, three for volumes.
        cond: what is known of each scan: class indices (b,), or a table (b, numbers) of classes and
            covariates; None without.
        context: (b, k, *space) an image given with each scan, such as a mask; None without.
        cases: names.
        real: (b, *space), False for voxels that nobody measured: padding; None: all were.
    """

    x: Float[Tensor, "b c *space"]
    cond: Int[Tensor, " b"] | Float[Tensor, "b numbers"] | None = None
    context: Float[Tensor, "b k *space"] | None = None
    cases: tuple[str, ...] = ()
    real: Bool[Tensor, "b *space"] | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch elsewhere."""
        moved = {name: getattr(self, name) for name in ("x", "cond", "context", "real")}
        return replace(self, **{name: t.to(device) for name, t in moved.items() if t is not None})

    def first(self, count: int) -> "Batch":
        """Its first scans alone."""
        told = {name: getattr(self, name) for name in ("x", "cond", "context", "cases", "real")}
        return replace(self, **{name: t[:count] for name, t in told.items() if t is not None})


# -- random augmentation -------------------------------------------------------------------------


class _Augment(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    prob: float = Field(default=0.5, gt=0, le=1)


class Flip(_Augment):
    """Mirror along one axis; only where left and right may be exchanged."""

    do: Literal["flip"] = "flip"
    axis: int = Field(default=0, ge=0, le=2)

    def transform(self, dims: int) -> Transform:
        """MONAI's transform."""
        return RandFlip(prob=self.prob, spatial_axis=self.axis)


class Affine(_Augment):
    """Small rotation (radians), shift (voxels) and scaling (fraction)."""

    do: Literal["affine"] = "affine"
    rotate: float = 0.05
    shift: float = 2.0
    scale: float = 0.05

    def transform(self, dims: int) -> Transform:
        """What MONAI's `RandAffine` does, seven times faster on small images."""
        return RandMove(self.prob, rotate=self.rotate, shift=self.shift, scale=self.scale)


class Noise(_Augment):
    """White noise of at most this standard deviation."""

    do: Literal["noise"] = "noise"
    std: float = 0.02

    def transform(self, dims: int) -> Transform:
        """MONAI's transform."""
        return RandGaussianNoise(prob=self.prob, std=self.std)


class Gamma(_Augment):
    """Contrast x ** gamma."""

    do: Literal["gamma"] = "gamma"
    low: float = 0.8
    high: float = 1.25

    def transform(self, dims: int) -> Transform:
        """MONAI's transform."""
        return RandAdjustContrast(prob=self.prob, gamma=(self.low, self.high))


Augment = Annotated[Flip | Affine | Noise | Gamma, Field(discriminator="do")]


# -- loading -------------------------------------------------------------------------------------


class ScanReader(ImageReader):
    """Plugs medgen's strict reading into MONAI: `LoadImage(reader=ScanReader())`.

    Gives physical values (c, i, j, k), channel first, with the RAS+ affine.
    """

    def __init__(self, options: ReadOptions = ReadOptions()) -> None:
        super().__init__()
        self.options = options

    def verify_suffix(self, filename: Sequence[str] | str) -> bool:
        """Whatever medgen reads."""
        return True

    def read(self, data: Sequence[str | Path] | str | Path, **kwargs: Any) -> Scan | list[Scan]:
        """One scan, or a list for a list of paths."""
        if isinstance(data, str | Path):
            return io.read(data, self.options)
        scans = [io.read(path, self.options) for path in data]
        return scans[0] if len(scans) == 1 else scans

    def get_data(self, scan: Scan | list[Scan]) -> tuple[np.ndarray, dict]:
        """Physical values and MONAI's metadata."""
        scans = scan if isinstance(scan, list) else [scan]
        if any(not other.grid.close(scans[0].grid) for other in scans):
            raise DataError("Channels of one case lie on different grids. Bring them onto one grid first.")
        values = np.concatenate([one.physical() for one in scans])
        return values, {
            "affine": scans[0].grid.affine.copy(),
            "original_affine": scans[0].grid.affine.copy(),
            "spatial_shape": np.asarray(scans[0].grid.shape),
            "original_channel_dim": 0,
            "space": "RAS",
        }


class Prepare(Transform):
    """A manifest row to the dict that is cached: tensors, whole numbers and text only, or the reason why not.

    Args:
        recipe: how scans become tensors.
        classes: labels in the order of their indices; empty for none.
        covariates: what else of a row the model is told.
        context: give the row's mask with the scan.
        options: how strict reading is.
    """

    def __init__(
        self,
        recipe: Recipe,
        classes: Sequence[str] = (),
        covariates: Sequence[Covariate] = (),
        context: bool = False,
        options: ReadOptions = ReadOptions(),
    ) -> None:
        self.recipe, self.classes, self.covariates = recipe, tuple(classes), tuple(covariates)
        self.context, self.options = context, options

    def row(self, row: Row, manifest: Manifest) -> dict[str, str]:
        """What of a manifest's row decides the prepared scan."""
        told = {"case": row.case, "path": manifest.locate(row.path), "label": row.label}
        told |= {f"covariate {one.name}": row.covariates.get(one.name, "") for one in self.covariates}
        return told | ({"mask": row.mask and manifest.locate(row.mask)} if self.context else {})

    def __call__(self, row: Mapping[str, str]) -> dict[str, Any]:
        """{'case', 'path', 'x', 'cond', 'scale', 'warning'[, 'context', 'real']} or {'case', 'path', 'error'}."""
        try:
            source = flat(io.read(row["path"], self.options))
            scan, real = prepared(source, self.recipe)
            given = {"context": mask_view(row["mask"], scan.grid, self.options)} if self.context else {}
        except MedgenError as error:
            return {"case": row["case"], "path": row["path"], "error": str(error)}
        if not real.all():
            given["real"] = real_view(real)
        cells = {one.name: row[f"covariate {one.name}"] for one in self.covariates}
        return {
            "case": row["case"],
            "path": row["path"],
            "x": model_view(scan).contiguous(),
            "cond": condition(row["label"], cells, self.classes, self.covariates),
            "scale": torch.tensor([scan.scale.slope, scan.scale.intercept], dtype=torch.float64),
            "warning": what_was_cut(source, scan, self.recipe),
            **given,
        }


def model_view(scan: Scan) -> Float[Tensor, "c *space"]:
    """A copy of the voxels as a model sees them: an image loses its singleton axis."""
    return torch.tensor(scan.voxels[..., 0] if scan.is_planar else scan.voxels)


def real_view(real: Bool[np.ndarray, "i j k"]) -> Bool[Tensor, "*space"]:
    """A mask as a model sees it."""
    return torch.tensor(real[..., 0] if real.shape[2] == 1 else real)


def mask_view(path: str, grid: Grid, options: ReadOptions = ReadOptions()) -> Float[Tensor, "1 *space"]:
    """A mask of findings on a prepared scan's grid, 1 where there is any and 0 elsewhere; zeros without a `path`."""
    if not path:
        return model_view(Scan(np.zeros((1, *grid.shape), np.float32), grid))
    found = flat(io.read(path, options))
    drawn = np.any(found.voxels > 0, axis=0, keepdims=True).astype(np.float32)
    return model_view(Scan(drawn, found.grid, is_label=True).onto(grid, outside=0))


def condition(
    label: str, cells: Mapping[str, str], classes: Sequence[str], covariates: Sequence[Covariate]
) -> int | Float[Tensor, " numbers"]:
    """What a model is told of a scan: its class's index, -1 where there are none; with covariates a row of numbers.

    The row holds one 0 or 1 a class (all 0 for a label it does not know), then each covariate's numbers.
    """
    if not covariates:
        return classes.index(label) if classes else -1
    told = [float(label == name) for name in classes]
    return torch.tensor(told + [number for one in covariates for number in one.numbers(cells.get(one.name, ""))])


def _held(rows: list[dict[str, Any]], prepare: Prepare, folder: Path | None) -> Dataset[dict[str, Any]]:
    """Prepared scans by number, kept in memory or in a folder."""
    if folder is None:
        return CacheDataset(rows, prepare, progress=False, num_workers=1, copy_cache=False)
    return PersistentDataset(rows, prepare, cache_dir=folder, hash_func=_content_key)


class ScanDataset(Dataset):
    """Prepared scans in memory, or in `cache` when given; unreadable ones are left out and named.

    Args:
        manifest: which scans.
        recipe: how they become tensors.
        classes: labels in the order of their indices; empty for none.
        covariates: what else of a row the model is told.
        context: give each scan's mask with it, zeros where it has none.
        options: how strict reading is.
        cache: a folder for prepared scans, reused while neither recipe, options nor file change.
    """

    def __init__(
        self,
        manifest: Manifest,
        recipe: Recipe,
        *,
        classes: Sequence[str] = (),
        covariates: Sequence[Covariate] = (),
        context: bool = False,
        options: ReadOptions = ReadOptions(),
        cache: Path | None = None,
    ) -> None:
        prepare = Prepare(recipe, classes, covariates, context, options)
        rows = [prepare.row(row, manifest) for row in manifest.rows]
        decides = f"{recipe.model_dump_json()}{tuple(classes)}{tuple(covariates)}{context}{options}"
        key = hashlib.sha256(decides.encode()).hexdigest()[:16]
        held = _held(rows, prepare, cache and cache / key)
        self.skipped: list[Skipped] = []
        self._items: list[int] = []
        warned: list[str] = []
        for n in track(range(len(rows)), "Reading scans"):
            item = held[n]
            if "error" in item:
                note(f"Skipped {item['case']}: {item['error']}")
                self.skipped.append(Skipped(item["case"], item["error"]))
            else:
                self._items.append(n)
                warned += [f"{item['case']}: {item['warning']}"] if item["warning"] else []
        self._held = held
        if warned:
            note(f"The recipe's range does not suit {len(warned)} of {len(rows)} scans; the first is {warned[0]}.")
        if not self._items:
            raise DataError(f"None of the {len(rows)} scans could be prepared. Check the messages above.")

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._held[self._items[index]]

    def batches(self, size: int) -> Iterator[Batch]:
        """All scans once, in order."""
        for first in range(0, len(self), size):
            yield collate([self[n] for n in range(first, min(first + size, len(self)))])


def _content_key(row: Mapping[str, str]) -> bytes:
    """A cache key that changes when the file does."""
    digest = hashlib.sha256(repr(sorted(row.items())).encode())
    for path in (row["path"], row.get("mask", "")):
        place = Path(path.partition("#")[0])
        for file in sorted(place.rglob("*")) if path and place.is_dir() else [place]:
            if file.is_file():
                status = file.stat()
                digest.update(f"{file.name}{status.st_size}{status.st_mtime_ns}".encode())
    return digest.hexdigest().encode()


class Draws(Dataset):
    """Training order as a function: draw t is a scan and its random augmentation, given (seed, t).

    Every scan comes once per pass, in an order of that pass. Because nothing else decides, a resumed
    run sees what an uninterrupted one would have seen.
    """

    def __init__(self, dataset: ScanDataset, augment: Sequence[Augment], *, seed: int) -> None:
        self._dataset, self._seed = dataset, seed
        dims = dataset[0]["x"].ndim - 1
        self._augment = Compose([step.transform(dims) for step in augment]) if augment else None

    def __getitem__(self, draw: int) -> dict[str, Any]:
        turn, place = divmod(draw, len(self._dataset))
        order = np.random.default_rng(derived_seed(self._seed, 1, turn)).permutation(len(self._dataset))
        item = dict(self._dataset[int(order[place])])
        if self._augment:
            self._augment.set_random_state(seed=derived_seed(self._seed, 2, draw) % 2**32)
            item |= _augmented(item, self._augment)
        return item


def _augmented(item: Mapping[str, Any], augment: Compose) -> dict[str, Tensor]:
    """The scan after all steps; what lies on its voxels moves with it and keeps its values."""
    x, channels = item["x"], len(item["x"])
    beside = {name: item[name].reshape(-1, *x.shape[1:]) for name in ("context", "real") if name in item}
    for step in augment.transforms:
        if isinstance(step, RandMove | RandFlip):
            moved = step(torch.cat([x, *(values.float() for values in beside.values())]))
            # Out comes MONAI's tensor with metadata, which nothing here needs and every later operation would copy.
            moved = convert_to_tensor(moved, dtype=torch.float32, track_meta=False)
            x, *parts = moved.split([channels, *map(len, beside.values())])
            beside = {name: part > 0.5 for name, part in zip(beside, parts, strict=True)}
        else:
            x = convert_to_tensor(step(x), dtype=torch.float32, track_meta=False)
    return {"x": x} | {name: values.reshape(item[name].shape).to(item[name]) for name, values in beside.items()}


def loader(draws: Draws, which: range, batch_size: int, *, workers: int = 0) -> DataLoader:
    """Batches of the given draws, in order."""
    return DataLoader(
        draws,
        batch_size=batch_size,
        sampler=which,
        num_workers=workers,
        collate_fn=collate,
        # Without one of its own it draws from torch's global state.
        generator=torch.Generator(),
    )


def collate(items: Sequence[Mapping[str, Any]]) -> Batch:
    """Dicts to a Batch."""
    conds = [item["cond"] for item in items]
    rows = isinstance(conds[0], Tensor)
    padded = any("real" in item for item in items)
    return Batch(
        x=torch.stack([item["x"] for item in items]),
        cond=torch.stack(conds) if rows else None if min(conds) < 0 else torch.tensor(conds),
        context=torch.stack([item["context"] for item in items]) if "context" in items[0] else None,
        cases=tuple(item["case"] for item in items),
        real=torch.stack([item.get("real", _all_real(item["x"])) for item in items]) if padded else None,
    )


def _all_real(x: Float[Tensor, "c *space"]) -> Bool[Tensor, "*space"]:
    return torch.ones(x.shape[1:], dtype=torch.bool)


__all__ = [
    "Affine", "Augment", "Batch", "Draws", "Flip", "Gamma", "Noise", "Prepare", "Row", "ScanDataset",
    "ScanReader", "collate", "condition", "loader", "mask_view", "model_view", "real_view",
]  # fmt: skip
