"""A scan as a bundle's model takes it: read, held against the contract, prepared."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from medgen import io
from medgen.bundle import Bundle
from medgen.data.dataset import given_view, model_view, real_view
from medgen.data.manifest import Manifest, Row, index
from medgen.data.recipe import Recipe
from medgen.data.window import flat, prepared, real_voxels, what_was_cut
from medgen.errors import BundleError, CapabilityError, DataError, PrivacyError
from medgen.grid import Grid
from medgen.io.source import ReadOptions
from medgen.scan import Scan
from medgen.tasks.conditions import conditions_for, told_of


@dataclass(frozen=True, eq=False)
class Intake:
    """One scan on its way into a model.

    Args:
        source: as it was read.
        ready: after the bundle's recipe.
        real: which voxels of `ready` were measured rather than padded.
        warnings: what is unusual about the file.
    """

    source: Scan
    ready: Scan
    real: Bool[np.ndarray, "i j k"]
    warnings: tuple[str, ...]

    @property
    def x(self) -> Float[Tensor, "1 c *space"]:
        """The voxels as the model sees them; the volume where it sees slices."""
        return model_view(self.ready)[None]


def taken_in(bundle: Bundle, path: str, options: ReadOptions) -> Intake:
    """Read and prepare the scan at `path`.

    Raises:
        DataError: it cannot be read, or shows nothing.
        BundleError: it is not what the bundle was trained on, or its model sees next to nothing of it.
    """
    source = io.read(path, options)
    seen = flat(source)
    warnings = bundle.contract.check(seen)
    warnings += _field_of_view(seen.grid, bundle.recipe.grid(seen))
    ready, real = prepared(seen, bundle.recipe)
    warnings += filter(None, [what_was_cut(seen, bundle.recipe)])
    return Intake(source, ready, real, tuple(warnings))


def given_with(
    bundle: Bundle, taken: Intake, row: Row, rows: Manifest, options: ReadOptions
) -> dict[str, Tensor | None]:
    """What the bundle's first model is given besides a scan: `cond` and `context` where it takes them, and `real`.

    Raises:
        DataError: the scan's mask cannot be read, or was drawn on another grid.
    """
    config = bundle.model.config
    told, given = told_of(config), dict[str, Tensor | None]()
    if told["covariates"]:
        given["cond"] = conditions_for(config, [row.label], [row.covariates])
    if told["context"]:
        path, grids = row.mask and rows.locate(row.mask), (flat(taken.source).grid, taken.ready.grid)
        given["context"] = given_view(path, *grids, told["labels"], options)[None]
    if not taken.real.all():
        given["real"] = real_view(taken.real)[None]
    return given


def scans_for(bundle: Bundle, data: str | Path, options: ReadOptions, *, seed: int = 0) -> Manifest:
    """The scans of a folder as the bundle takes them: joined as channels where it learned several of a patient so.

    Raises:
        DataError: there are no scans, or no patient has all that are joined.
    """
    return _as_learned(bundle, index(data, options, seed=seed))


def _as_learned(bundle: Bundle, found: Manifest) -> Manifest:
    learned = bundle.training.get("domains", ())
    # Where a folder does not tell domains apart, its files may hold all channels, and their readers say so.
    apart = len(learned) == 1 and learned[0] not in found.domains and set(learned[0].split("+")) <= set(found.domains)
    return found.of_domain(learned[0]) if apart else found


def training_scans(bundle: Bundle, data: str | Path, options: ReadOptions) -> Manifest | None:
    """The scans of a folder with the splits that training gave them; None where others were trained on."""
    told = bundle.training
    found = index(data, options, seed=int(told.get("seed", 0)))
    try:
        found = _as_learned(bundle, found)
    except DataError:
        return None
    known = {"label": told.get("labels"), "domain": told.get("domains")}
    rows = (row for row in found.rows if all(v is None or getattr(row, k) in v for k, v in known.items()))
    kept = replace(found, rows=tuple(rows))
    return kept if kept.hash() == told.get("manifest_sha256") else None


def require_training_scans(bundle: Bundle, data: str | Path, options: ReadOptions) -> Manifest:
    """The same, refusing other scans than those the bundle learned from.

    Raises:
        PrivacyError: copies of the bundle's patients could not be told among these scans.
    """
    found = training_scans(bundle, data, options)
    if found is None:
        raise PrivacyError(
            "The bundle did not learn from these scans, or scans were added or taken away since, so copies of its "
            "patients could not be told. Pass the folder as it was when it was trained on, or train again."
        )
    return found


def require_whole(recipe: Recipe, name: str, what: str) -> None:
    """Refuse what a model that sees slices cannot do with volumes; `what` as in 'cannot augment'.

    Raises:
        CapabilityError: the recipe cuts slices.
    """
    if recipe.slices:
        raise CapabilityError(
            f"{name} cannot {what}: it sees volumes slice by slice, so it scores them but makes none. "
            "Train a preset for volumes (3D in `medgen models`)."
        )


def require_images(bundle: Bundle, what: str) -> None:
    """Refuse what a model that learned scans and masks as pairs cannot do with a scan; `what` as in 'cannot score'.

    Raises:
        CapabilityError: a model of the bundle draws pairs.
    """
    if any(model.config.joint for model in bundle.models.values()):
        raise CapabilityError(
            f"{bundle.name} cannot {what}: it learned scans together with their masks, so it draws pairs, and takes no "
            f"scan alone. To {what}, train with --masks none."
        )


def _field_of_view(source: Grid, window: Grid) -> list[str]:
    """Refuse a scan that the model's window misses; warn when much of the window is empty.

    Raises:
        BundleError: less than a third of the window lies inside the scan.
    """
    inside = real_voxels(window, source).mean()
    if inside < 1 / 3:
        raise BundleError(
            f"Only {inside:.0%} of the model's field of view lies inside this scan: another body part, or another "
            "space than the training scans. Register it to their space, or train on scans like it."
        )
    return [f"only {inside:.0%} of the model's field of view lies inside the scan"] if inside < 0.8 else []


__all__ = [
    "Intake", "given_with", "require_images", "require_training_scans", "require_whole", "scans_for", "taken_in",
    "training_scans",
]  # fmt: skip
