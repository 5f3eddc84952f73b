"""From a manifest and a recipe to batches, with MONAI's loading, caching and random transforms."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from monai.data import CacheDataset, ImageReader, PersistentDataset
from monai.transforms import Compose, RandAdjustContrast, RandAffine, RandFlip, RandGaussianNoise, Transform
from monai.utils import convert_to_tensor
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from medgen import io
from medgen.data.manifest import Manifest, Row
from medgen.data.recipe import Recipe
from medgen.errors import DataError, MedgenError
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
    """

    x: Float[Tensor, "b c *space"]
    cond: Int[Tensor, " b"] | Float[Tensor, "b numbers"] | None = None
    context: Float[Tensor, "b k *space"] | None = None
    cases: tuple[str, ...] = ()

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch elsewhere."""
        moved = {name: getattr(self, name) for name in ("x", "cond", "context")}
        return replace(self, **{name: t.to(device) for name, t in moved.items() if t is not None})


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
        """MONAI's transform."""
        turns = [self.rotate] * (3 if dims == 3 else 1)
        return RandAffine(
            prob=self.prob,
            rotate_range=turns,
            translate_range=[self.shift] * dims,
            scale_range=[self.scale] * dims,
            padding_mode="border",
        )


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
    """A manifest row to the dict that is cached: tensors and strings only, or the reason why not."""

    def __init__(self, recipe: Recipe, classes: Sequence[str], options: ReadOptions) -> None:
        self.recipe, self.classes, self.options = recipe, tuple(classes), options

    def __call__(self, row: Mapping[str, str]) -> dict[str, Any]:
        """{'case', 'x', 'cond'} or {'case', 'error'}."""
        try:
            scan = self.recipe(io.read(row["path"], self.options))
        except MedgenError as error:
            return {"case": row["case"], "path": row["path"], "error": str(error)}
        return {
            "case": row["case"],
            "path": row["path"],
            "x": model_view(scan).contiguous(),
            "cond": self.classes.index(row["label"]) if self.classes else -1,
            "scale": torch.tensor([scan.scale.slope, scan.scale.intercept], dtype=torch.float64),
        }


def model_view(scan: Scan) -> Float[Tensor, "c *space"]:
    """A copy of the voxels as a model sees them: an image loses its singleton axis."""
    return torch.tensor(scan.voxels[..., 0] if scan.is_planar else scan.voxels)


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
        options: how strict reading is.
        cache: a folder for prepared scans, reused while neither recipe, options nor file change.
    """

    def __init__(
        self,
        manifest: Manifest,
        recipe: Recipe,
        *,
        classes: Sequence[str] = (),
        options: ReadOptions = ReadOptions(),
        cache: Path | None = None,
    ) -> None:
        rows = [{"case": row.case, "path": manifest.locate(row.path), "label": row.label} for row in manifest.rows]
        key = hashlib.sha256(f"{recipe.model_dump_json()}{tuple(classes)}{options}".encode()).hexdigest()[:16]
        held = _held(rows, Prepare(recipe, classes, options), cache and cache / key)
        self.skipped: list[Skipped] = []
        self._items: list[int] = []
        for n in track(range(len(rows)), "Reading scans"):
            item = held[n]
            if "error" in item:
                note(f"Skipped {item['case']}: {item['error']}")
                self.skipped.append(Skipped(item["case"], item["error"]))
            else:
                self._items.append(n)
        self._held = held
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
    place = Path(row["path"].partition("#")[0])
    for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
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
            # Out comes MONAI's tensor with metadata, which nothing here needs and every later operation would copy.
            item["x"] = convert_to_tensor(self._augment(item["x"]), dtype=torch.float32, track_meta=False)
        return item


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
    conds = [int(item["cond"]) for item in items]
    return Batch(
        x=torch.stack([item["x"] for item in items]),
        cond=None if min(conds) < 0 else torch.tensor(conds),
        cases=tuple(item["case"] for item in items),
    )


__all__ = [
    "Affine", "Augment", "Batch", "Draws", "Flip", "Gamma", "Noise", "Prepare", "Row", "ScanDataset", "ScanReader",
    "collate", "loader", "model_view",
]  # fmt: skip
