"""From a manifest and a recipe to batches, with MONAI's loading, caching and random transforms."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from monai.data import CacheDataset, ImageReader, PersistentDataset
from monai.transforms import Compose
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from medgen import io
from medgen.data.covariates import Covariate
from medgen.data.manifest import Manifest, Row
from medgen.data.motion import Augment, augmented
from medgen.data.prepare import Prepare, condition, given_view, mask_view, model_view, real_view
from medgen.data.recipe import Place, Recipe, Slices, foreground_level
from medgen.errors import DataError
from medgen.io.source import ReadOptions, Skipped
from medgen.log import note, track
from medgen.scan import Scan
from medgen.seeds import derived_seed

# A slice with less than this part of the body that the fullest slice of its plane shows is not learned from.
_LEAST = 0.05


@dataclass
class Batch:
    """What a model sees.

    Args:
        x: (b, c, *space), two axes of space for images, three for volumes; where a model learns masks with the scans,
            its last channels are label channels.
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
        return self._through(lambda values: values.to(device))

    def first(self, count: int) -> "Batch":
        """Its first scans alone."""
        return self._rows(slice(count))

    def each(self) -> Iterator["Batch"]:
        """Its scans one at a time.

        >>> [one.cases for one in Batch(torch.zeros(2, 1, 4, 4), cases=("a", "b")).each()]
        [('a',), ('b',)]
        """
        return (self._rows(slice(n, n + 1)) for n in range(len(self.x)))

    def _rows(self, which: slice) -> "Batch":
        return replace(self._through(lambda values: values[which]), cases=self.cases[which])

    def _through(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same with its tensors changed."""
        held = {name: getattr(self, name) for name in ("x", "cond", "context", "real")}
        return replace(self, **{name: change(values) for name, values in held.items() if values is not None})


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


def _held(rows: list[dict[str, Any]], prepare: Prepare, folder: Path | None) -> Dataset[dict[str, Any]]:
    """Prepared scans by number, kept in memory or in a folder."""
    if folder is None:
        return CacheDataset(rows, prepare, progress=False, num_workers=1, copy_cache=False)
    return PersistentDataset(rows, prepare, cache_dir=folder, hash_func=_content_key)


class ScanDataset(Dataset):
    """Prepared scans in memory, or in `cache` when given; unreadable ones are left out and named.

    Where the recipe says slices, its items are those of the volumes, but for slices that show hardly any of the body;
    a volume is held once, and its slices are cut when they are asked for.

    Args:
        manifest: which scans.
        recipe: how they become tensors.
        classes: labels in the order of their indices; empty for none.
        covariates: what else of a row the model is told.
        context: give each scan's mask with it, zeros where it has none.
        labels: of the masks: what is given, or, without `context`, channels after each scan's own.
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
        labels: Sequence[int] = (),
        options: ReadOptions = ReadOptions(),
        cache: Path | None = None,
    ) -> None:
        prepare = Prepare(recipe, classes, covariates, context, labels, options)
        rows = [prepare.row(row, manifest) for row in manifest.rows]
        decides = f"{recipe.model_dump_json()}{tuple(classes)}{tuple(covariates)}{context}{tuple(labels)}{options}"
        key = hashlib.sha256(decides.encode()).hexdigest()[:16]
        held = _held(rows, prepare, cache and cache / key)
        self.skipped: list[Skipped] = []
        # Of every item its row, and its place where the item is a slice.
        self._items: list[tuple[int, Place | None]] = []
        warned: list[str] = []
        for n in track(range(len(rows)), "Reading scans"):
            item = held[n]
            if "error" in item:
                note(f"Skipped {item['case']}: {item['error']}")
                self.skipped.append(Skipped(item["case"], item["error"]))
            else:
                self._items += [(n, place) for place in _learned_from(item, recipe.slices)]
                warned += [f"{item['case']}: {item['warning']}"] if item["warning"] else []
        self._held, self._slices = held, recipe.slices
        if warned:
            note(f"The recipe's range does not suit {len(warned)} of {len(rows)} scans; the first is {warned[0]}.")
        if not self._items:
            raise DataError(f"None of the {len(rows)} scans could be prepared. Check the messages above.")

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, place = self._items[index]
        item = self._held[number]
        return item if place is None or self._slices is None else _slice_of(item, place, self._slices)

    def volumes(self) -> "ScanDataset":
        """The same scans whole, whatever the recipe says of slices; nothing is read again."""
        whole = copy(self)
        whole._items = [(number, None) for number in dict.fromkeys(number for number, _ in self._items)]
        return whole

    def batches(self, size: int) -> Iterator[Batch]:
        """All items once, in order."""
        for first in range(0, len(self), size):
            yield collate([self[n] for n in range(first, min(first + size, len(self)))])


def framed(values: Shaped[Tensor, "*lead i j k"], place: Place, frame: tuple[int, int]) -> Shaped[Tensor, "*lead h w"]:
    """One slice of a volume in the middle of a frame, zeros (False) about it."""
    cut = values[place.index]
    shown = cut.new_zeros(*cut.shape[:-2], *frame)
    shown[place.inside] = cut
    return shown


def _slice_of(item: Mapping[str, Any], place: Place, slices: Slices) -> dict[str, Any]:
    """One slice of a prepared volume as an item of its own."""
    frame = slices.frame(item["x"].shape[1:])
    given = item if "real" in item else {**item, "real": _all_real(item["x"])}
    shown = {name: framed(given[name], place, frame) for name in ("x", "context", "real") if name in given}
    told = {**item, **shown, "case": f"{item['case']}#{place.name}"}
    return told if not shown["real"].all() else {name: value for name, value in told.items() if name != "real"}


def shows_body(
    x: Float[Tensor, "c i j k"], real: Bool[Tensor, "i j k"] | None, slices: Slices
) -> Bool[np.ndarray, " slices"]:
    """Which slices of a prepared volume show more than hardly any of the body, in the order of their places."""
    values = x[0].cpu().numpy()
    inside = np.ones(values.shape, dtype=bool) if real is None else real.cpu().numpy()
    return slices.shares(inside & (values > foreground_level(values[inside]))) > _LEAST


def _learned_from(item: Mapping[str, Any], slices: Slices | None) -> list[Place | None]:
    """The places of an item that are items of their own; None is the whole."""
    if slices is None:
        return [None]
    shown = shows_body(item["x"], item.get("real"), slices)
    return [place for place, body in zip(slices.places(item["x"].shape[1:]), shown, strict=True) if body]


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
            item |= augmented(item, self._augment)
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
    "Batch", "Draws", "Prepare", "Row", "ScanDataset", "ScanReader", "collate", "condition", "framed", "given_view",
    "loader", "mask_view", "model_view", "real_view", "shows_body",
]  # fmt: skip
