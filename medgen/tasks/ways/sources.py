"""Training scans in turn: read when needed and held while they are few, each named by a pseudonym."""

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Float
from torch import Tensor

from medgen import io
from medgen.data.dataset import model_view
from medgen.data.labels import read_labels
from medgen.data.manifest import Manifest, Row
from medgen.data.recipe import Recipe
from medgen.data.window import flat, prepared
from medgen.errors import BundleError, DataError, GeometryError, LeakageError, PrivacyError
from medgen.grid import Grid
from medgen.io.source import ReadOptions
from medgen.log import note
from medgen.scan import Scan
from medgen.seeds import derived_seed
from medgen.tasks.ways.base import Material

T = TypeVar("T")
U = TypeVar("U")

# Voxels of the scans that are held at a time; one scan is held however large it is.
_HELD = 2**24
# Older ages can tell who somebody is.
_OLDEST, _SEXES = 89, ("f", "m", "o", "u", "female", "male", "other", "unknown")


@dataclass(frozen=True, eq=False)
class Source:
    """A training scan as it was read.

    Args:
        row: what the data tell of it.
        scan: on its own grid, in its own unit.
        mask: its label map on that grid; None where there is none.
    """

    row: Row
    scan: Scan
    mask: Scan | None


def secret_of(manifest: Manifest) -> str:
    """What a dataset's pseudonyms are salted with: names that only those who hold the dataset can list.

    Splits and labels do not matter, so it is the same whatever the seed. Unlike `Manifest.hash`, which a bundle tells,
    it is never written anywhere: who guesses a name cannot check the guess.

    Args:
        manifest: of the whole dataset.
    """
    rows = sorted(json.dumps([row.case, row.patient, row.path]) for row in manifest.rows)
    return sha256("\n".join(["pseudonyms", *rows]).encode()).hexdigest()


def source_name(row: Row, key: str) -> str:
    """A case's pseudonym: its own name may be somebody's.

    >>> source_name(Row("Doe", "Doe", "a.nii.gz", "nifti"), key="")
    'C-5405bf980fa0'
    """
    return f"C-{_digest(key, row.case, row.patient)}"


def patient_name(row: Row, key: str) -> str:
    """A patient's pseudonym, the same for all their scans, so that what is made of one can be kept together."""
    return f"P-{_digest(key, row.patient)}"


def covariates_kept(row: Row, material: Material) -> dict[str, str]:
    """What may be said of a scan made of this one: age, sex, and what a model was told.

    Other columns of the data may name a person, and stay behind.
    """
    told = getattr(material.bundle.model.config, "covariates", ()) if material.bundle else ()
    known = {one.name: one for one in told}
    kept = {}
    for name, cell in row.covariates.items():
        one = known.get(name)
        if one is not None and one.words:
            # Of a text the words that many patients share, and no other.
            kept[name] = " ".join(word for word, there in zip(one.words, one.numbers(cell), strict=True) if there)
        elif (one is not None and not one.refusal(cell)) or _harmless(name.lower(), cell.strip().lower()):
            kept[name] = cell
    return kept


def _harmless(name: str, cell: str) -> bool:
    """Whether this is somebody's age or sex, and nothing else."""
    if name == "age":
        return cell.replace(".", "", 1).isdigit() and float(cell) <= _OLDEST
    return name == "sex" and cell in _SEXES


def _digest(*parts: str) -> str:
    return sha256("\n".join(parts).encode()).hexdigest()[:12]


def seed_of(seed: int, *parts: str | int) -> int:
    """A seed from numbers and words, such as the way, the class and the number of a candidate."""
    numbers = [one if isinstance(one, int) else int(sha256(one.encode()).hexdigest()[:15], 16) for one in parts]
    return derived_seed(seed, *numbers)


class Sources(Generic[T]):
    """Training scans in an order that is shuffled for every pass, so that all are used evenly.

    Args:
        rows: by class of what will be made.
        load: reads one; what it refuses is named once and left out.
        seed: decides the order.
        size: voxels of what `load` gives, so that few are held.

    Raises:
        LeakageError: a scan is of another split than training.
    """

    def __init__(
        self, rows: Mapping[str, Sequence[Row]], load: Callable[[Row], T], *, seed: int, size: Callable[[T], int]
    ) -> None:
        if any(row.split not in ("", "train") for several in rows.values() for row in several):
            raise LeakageError("Scans are made of training scans alone; found a source of another split. Leave it out.")
        self._rows, self._load, self._seed, self._size = rows, load, seed, size
        self._held: OrderedDict[str, T] = OrderedDict()
        self._refused: dict[str, str] = {}
        self._named: set[str] = set()

    @property
    def labels(self) -> tuple[str, ...]:
        """Classes there are scans for."""
        return tuple(sorted(self._rows))

    def made(self, label: str, i: int, make: Callable[[Row, T], U]) -> U:
        """What `make` makes of candidate i's source; of the next of that pass where one cannot serve.

        Raises:
            DataError: there is no such class, or none of its scans can serve.
        """
        first = ""
        for row in self.order(label, i):
            try:
                return make(row, self.get(row))
            except (DataError, BundleError) as error:
                first = first or f"{row.case}: {error}"
                self._tell(row, error)
        of = f" of class {label!r}" if label else ""
        raise DataError(f"None of the {len(self._rows[label])} training scans{of} can be used; the first: {first}")

    def order(self, label: str, i: int) -> Iterator[Row]:
        """Candidate i's source, then the others of its pass.

        Raises:
            DataError: there is no such class.
        """
        rows = self._rows.get(label, ())
        if not rows:
            known = ", ".join(repr(one) for one in self.labels) or "none"
            raise DataError(f"No training scan can become one of class {label!r}. Classes that can be made: {known}.")
        turn, place = divmod(i, len(rows))
        order = np.random.default_rng(seed_of(self._seed, "order", label, turn)).permutation(len(rows))
        for n in range(len(rows)):
            yield rows[int(order[(place + n) % len(rows)])]

    def get(self, row: Row) -> T:
        """What `load` makes of a scan.

        Raises:
            DataError, BundleError: it refuses the scan.
        """
        if row.case in self._refused:
            raise DataError(self._refused[row.case])
        if row.case in self._held:
            self._held.move_to_end(row.case)
            return self._held[row.case]
        try:
            found = self._load(row)
        except (DataError, BundleError) as error:
            self._tell(row, error)
            self._refused[row.case] = str(error)
            raise
        self._held[row.case] = found
        while len(self._held) > 1 and sum(map(self._size, self._held.values())) > _HELD:
            self._held.popitem(last=False)
        return found

    def another(self, label: str, own: Row, rng: np.random.Generator, fits: Callable[[T], bool] = lambda _: True) -> T:
        """A scan of another patient of the class, in an order that `rng` decides.

        Raises:
            DataError: none can be used, or fits.
        """
        others = [row for row in self._rows[label] if row.patient != own.patient]
        for n in rng.permutation(len(others)):
            try:
                found = self.get(others[n])
            except (DataError, BundleError):
                continue
            if fits(found):
                return found
        raise DataError("no scan of another patient of its class can be used.")

    def _tell(self, row: Row, error: Exception) -> None:
        """Name a scan that cannot serve, once."""
        if row.case not in self._named:
            self._named.add(row.case)
            note(f"Skipped {row.case}: {error}")


def by_class(manifest: Manifest) -> dict[str, Sequence[Row]]:
    """Scans of each class; all under '' where there are no classes."""
    if not manifest.labels:
        return {"": manifest.rows} if manifest.rows else {}
    return {label: manifest.where(label=label).rows for label in manifest.labels}


def read_source(row: Row, manifest: Manifest, options: ReadOptions) -> Source:
    """A scan and its mask.

    Raises:
        DataError: it cannot be read, has text burned in, or its mask was drawn on another grid.
    """
    path = manifest.locate(row.path)
    refuse_burned_in(row, path)
    scan = io.read(path, options)
    return Source(row, scan, read_mask(row, scan.grid, manifest, options))


def read_mask(row: Row, grid: Grid, manifest: Manifest, options: ReadOptions) -> Scan | None:
    """A scan's label map on its grid; None where it has none.

    Raises:
        GeometryError: it was drawn on another grid.
        DataError: it cannot be read, or is no label map.
    """
    if not row.mask:
        return None
    drawn = read_labels(manifest.locate(row.mask), options)
    work = flat_grid(grid)
    if not drawn.grid.close(work, millimetres=1e-3 * max(1.0, *grid.spacing)):
        raise GeometryError(
            f"A mask lies on its scan's grid; found a mask of {drawn.grid.shape} voxels for a scan of {grid.shape}, or "
            "one in another place. Resample the mask onto the scan (nearest neighbour), or take the mask away."
        )
    kind = np.uint8 if drawn.voxels.max() < 256 else np.int16
    return replace(drawn, voxels=drawn.voxels.astype(kind), grid=work).onto(grid, outside=0)


def flat_grid(grid: Grid) -> Grid:
    """A scan's grid as `medgen.data.window.flat` has it."""
    return flat(Scan(np.broadcast_to(np.uint8(0), (1, *grid.shape)), grid)).grid


def refuse_burned_in(row: Row, path: str) -> None:
    """Refuse a scan with text in its pixels, which what is made of it would show too.

    Raises:
        PrivacyError: it has.
    """
    if row.kind != "dicom":
        return
    from medgen.io.dicom.origin import read_origin

    for part in path.split(";"):
        for source in io.find(part).sources:
            if read_origin(source.files).burned_in == "YES":
                raise PrivacyError(
                    f"{row.case} has text burned into its pixels, which may name the patient, and which scans made of "
                    "it would show. Cover it first."
                )


def seen(scan: Scan, recipe: Recipe) -> Float[Tensor, "c *space"]:
    """What a model sees of a scan.

    Raises:
        DataError: nothing, as it is constant.
    """
    return model_view(prepared(flat(scan), recipe)[0])


__all__ = [
    "Source",
    "Sources",
    "by_class",
    "covariates_kept",
    "flat_grid",
    "patient_name",
    "read_mask",
    "read_source",
    "refuse_burned_in",
    "secret_of",
    "seed_of",
    "seen",
    "source_name",
]
