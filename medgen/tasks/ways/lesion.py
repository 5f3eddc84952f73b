"""Lesions put into training scans, with the exact mask of each, or taken out of them: healthy twins."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from medgen.bundle import Bundle
from medgen.data.classic import stored_as
from medgen.data.labels import read_labels
from medgen.data.lesions import SIZES, Contrast, Kind, Lesion, Mask, Size, drawn_mask
from medgen.data.manifest import Row
from medgen.data.window import flat, real_voxels
from medgen.errors import CapabilityError, ConfigError, DataError, MedgenError
from medgen.log import note, track
from medgen.models.abilities import Inpaints, Restores
from medgen.models.base import can
from medgen.scan import Scan
from medgen.tasks.capabilities import families_that
from medgen.tasks.conditions import conditions_for
from medgen.tasks.intake import Intake, require_whole, taken_in
from medgen.tasks.ways.base import Made, Material
from medgen.tasks.ways.classic import voxels_of
from medgen.tasks.ways.sources import (
    Source,
    Sources,
    covariates_kept,
    patient_name,
    read_source,
    seed_of,
    seen,
    source_name,
)

Direction = Literal["auto", "insert", "remove"]
# What looks like disease; blurred tissue and missing slices look like faults of a scanner.
KINDS: tuple[Kind, ...] = ("hyper", "hypo", "scaled", "iso", "warp", "transplant")
# How often a lesion is drawn anew where the first draw does not fit the scan.
_TRIES = 8
# Voxels beyond a mask's edge that are filled, too: a drawn edge lies within the change it marks.
_MARGIN = 1


class LesionWay:
    """A lesion painted into a scan that has none, or what a model puts in place of one that a mask marks.

    Painted lesions need no model. To take one out the model fills the mask, widened by a voxel, and every voxel
    beyond that stays as it was. What is written down is enough to do it again.

    Args:
        material: what scans are made of; with a bundle whose model in-paints or restores, to take lesions out.
        direction: 'insert', 'remove', or 'auto': each scan whichever suits it and the model can do.
        kinds: of lesions to paint; those that `medgen evaluate` paints: what is trained with them is tested with
            others.
        library: drawn masks as shapes, from `medgen.data.lesions.mask_library`; 'own' for the training scans' own;
            none for shapes of medgen's own.
        ill_label: class of scans that were given a lesion; None: the class that they had.
        healthy_label: class of scans that had one taken out; None: the class that they had.

    Raises:
        CapabilityError: lesions are to be taken out, and the model cannot do that.
        ConfigError: there is no such direction or kind.
        DataError: no scan suits.
    """

    def __init__(
        self,
        material: Material,
        direction: Direction = "auto",
        *,
        kinds: Sequence[Kind] = KINDS,
        library: Sequence[Mask] | Literal["own"] = (),
        ill_label: str | None = None,
        healthy_label: str | None = None,
    ) -> None:
        if direction not in get_args(Direction):
            raise ConfigError(f"A lesion's direction is one of {', '.join(get_args(Direction))}; found {direction!r}.")
        if not kinds or set(kinds) - set(get_args(Kind)):
            raise ConfigError(f"Kinds of lesions are some of {', '.join(get_args(Kind))}; found {tuple(kinds)}.")
        bundle = material.bundle
        if direction == "remove" or (direction == "auto" and bundle is not None and _able(bundle)):
            require_removing(bundle)
        self._material, self._kinds = material, tuple(kinds)
        self._relabel = {"insert": ill_label, "remove": healthy_label}
        self._ill = _marked(material)
        # The smallest label there is stands for the lesions that are painted.
        self._value = min((value for values in self._ill.values() for value in values), default=1)
        self._library, self._owners = self._shapes(library)
        self._sources = Sources(
            self._suiting(direction), lambda row: read_source(row, material.manifest, material.options),
            seed=seed_of(material.seed, "lesion"), size=voxels_of,
        )  # fmt: skip

    @property
    def labels(self) -> Sequence[str]:
        """Classes of what can be made."""
        return self._sources.labels

    def make(self, label: str, first: int, count: int) -> list[Made]:
        """Candidates `first` to `first + count - 1`; number i depends on (seed, label, i) alone.

        Raises:
            DataError: no scan of the class suits.
        """
        numbers = range(first, first + count)
        return [self._sources.made(label, i, lambda _, source, i=i: self._made(label, i, source)) for i in numbers]

    def _made(self, label: str, i: int, source: Source) -> Made:
        seed = seed_of(self._material.seed, "lesion", label, i)
        change = self._removed if source.row.case in self._ill else self._inserted
        scan, mask, facts, others = change(source, seed)
        sources = tuple(dict.fromkeys(source_name(row, self._material.key) for row in (source.row, *others)))
        return Made(
            x=seen(scan, self._material.recipe), scan=scan, label=label, mask=mask,
            covariates=covariates_kept(source.row, self._material), how="lesion", sources=sources,
            patient=patient_name(source.row, self._material.key), parameters=facts,
        )  # fmt: skip

    # -- which scans -------------------------------------------------------------------------------

    def _suiting(self, direction: Direction) -> dict[str, list[Row]]:
        """Scans by the class of what is made of them."""
        bundle, found = self._material.bundle, dict[str, list[Row]]()
        removes = direction == "remove" or (direction == "auto" and bundle is not None and _able(bundle))
        named = bool(self._material.manifest.labels)
        for row in self._material.manifest.rows:
            way = "remove" if row.case in self._ill else "insert"
            new = self._relabel[way]
            if (way == "remove" and not removes) or (way == "insert" and direction == "remove"):
                continue
            # Of a class that says so already, what is not marked may be there none the less.
            if (new is not None and row.label == new) or (named and not row.label):
                continue
            found.setdefault(row.label if new is None else new, []).append(row)
        if not found:
            wanted = "with a mask that marks something" if direction == "remove" else "without a finding"
            raise DataError(
                f"No training scan suits: expected scans {wanted}, found {len(self._ill)} of "
                f"{len(self._material.manifest)} with findings. Choose another direction, or another way."
            )
        return found

    def _shapes(self, library: Sequence[Mask] | Literal["own"]) -> tuple[tuple[Mask, ...], Mapping[str, Row]]:
        """Drawn masks, and whose they are where they are training scans'."""
        if library != "own":
            return tuple(cast("Sequence[Mask]", library)), {}
        manifest, owners, masks = self._material.manifest, dict[str, Row](), list[Mask]()
        for row in track([row for row in manifest.rows if row.case in self._ill], "Reading masks"):
            one = drawn_mask(manifest.locate(row.mask))
            masks.append(one)
            owners.setdefault(one.sha256, row)
        if not masks:
            raise DataError("The training scans' own masks were asked for as shapes, but none marks anything.")
        return tuple(masks), owners

    # -- put in ------------------------------------------------------------------------------------

    def _inserted(self, source: Source, seed: int) -> tuple[Scan, Scan, dict[str, Any], tuple[Row, ...]]:
        """The scan with a lesion, its mask, what was painted, and whose shape it has."""
        rng, scan, last = np.random.default_rng(seed), flat(source.scan), ""
        for _ in range(_TRIES):
            lesion = self._drawn(rng)
            try:
                ill, mask, shape = lesion.painted(scan, self._library)
            except DataError as error:
                last = str(error)
                continue
            kind = np.uint8 if self._value < 256 else np.int16
            drawn = mask.with_voxels(mask.voxels.astype(kind) * kind(self._value)).onto(source.scan.grid, outside=0)
            facts = {
                "direction": "insert", "kind": lesion.kind, "size": lesion.size, "contrast": lesion.contrast,
                "seed": lesion.seed, "drawn_mask": shape, "voxels": int(mask.voxels.sum()),
                "millilitres": round(float(mask.voxels.sum()) * mask.grid.voxel_volume / 1000, 4),
            }  # fmt: skip
            owner = (self._owners[shape],) if shape in self._owners else ()
            return ill.onto(source.scan.grid, outside=0), drawn, facts, owner
        raise DataError(f"{_TRIES} lesions in a row did not fit; the last: {last}")

    def _drawn(self, rng: np.random.Generator) -> Lesion:
        """A lesion of any kind, size and contrast; of drawn masks a size that there is."""
        held = [name for name, (low, high) in SIZES.items() if any(low <= m.millilitres < high for m in self._library)]
        sizes = held if self._library and held else list(SIZES)
        kind, size = self._kinds[rng.integers(len(self._kinds))], cast(Size, sizes[rng.integers(len(sizes))])
        contrast = cast(Contrast, get_args(Contrast)[rng.integers(3)])
        return Lesion(kind, size, contrast, int(rng.integers(2**31)))

    # -- taken out ---------------------------------------------------------------------------------

    def _removed(self, source: Source, seed: int) -> tuple[Scan, Scan, dict[str, Any], tuple[Row, ...]]:
        """The scan with its marked voxels filled, an empty mask, and what filled them."""
        material, bundle = self._material, self._material.bundle
        assert bundle is not None
        assert source.mask is not None
        taken = taken_in(bundle, material.manifest.locate(source.row.path), material.options)
        scan, mask = flat(source.scan), flat(source.mask)
        hole = _widened(mask.voxels[0] > 0)
        if not real_voxels(scan.grid, taken.ready.grid)[hole].all():
            raise DataError("a part of what its mask marks lies outside the model's field of view.")
        marked = Scan(hole[None].astype(np.uint8), scan.grid, is_label=True)
        # A voxel of the model's for each that is filled, and those about it that interpolation looks at.
        where = _widened(marked.onto(taken.ready.grid, outside=0).voxels[0] > 0)
        where |= _reached(marked, taken.ready)
        label = self._relabel["remove"]
        told = source.row.label if label is None else label
        filled, by = _filled(bundle, taken, where, source.row, told, seed)
        new = filled.onto(scan.grid, outside=filled.scale.intercept).physical()
        old = scan.physical()
        low, high = (np.nanmin(old, axis=(1, 2, 3), keepdims=True), np.nanmax(old, axis=(1, 2, 3), keepdims=True))
        made = stored_as(scan, np.where(hole, np.clip(new, low, high), np.nan_to_num(old, nan=float(low.min()))))
        voxels = np.where(hole, made.voxels, scan.voxels)
        twin = replace(scan.with_header(synthetic=True), voxels=voxels).onto(source.scan.grid, outside=0)
        empty = source.mask.with_voxels(np.zeros_like(source.mask.voxels))
        facts = {
            "direction": "remove", "filled_by": by, "seed": seed, "voxels": int(hole.sum()), "margin": _MARGIN,
            "weights_sha256": bundle.weights_sha256,
        }  # fmt: skip
        return twin, empty, facts, ()


def require_removing(bundle: Bundle | None) -> None:
    """Refuse a bundle whose model cannot fill what a mask marks.

    Raises:
        ConfigError: there is no bundle.
        CapabilityError: it neither in-paints nor restores, sees slices, or is given masks.
    """
    if bundle is None:
        raise ConfigError("Lesions are taken out by a model: give a bundle, or choose 'insert'.")
    if not can(bundle.model, "inpaints", "restores"):
        raise CapabilityError(
            f"{bundle.name} cannot take lesions out: it neither inpaints nor restores. Models that do: "
            f"{families_that('inpaints', 'restores')}."
        )
    require_whole(bundle.recipe, bundle.name, "take lesions out")
    if getattr(bundle.model.config, "context", 0):
        raise CapabilityError(
            f"{bundle.name} cannot take lesions out: it draws scans for masks that it is given. Train a preset that is "
            "given none."
        )


def _able(bundle: Bundle) -> bool:
    try:
        require_removing(bundle)
    except CapabilityError:
        return False
    return True


def _marked(material: Material) -> dict[str, Int[np.ndarray, " k"]]:
    """The labels in each training scan's mask, for scans whose mask marks anything."""
    found = {}
    manifest = material.manifest
    for row in track([row for row in manifest.rows if row.mask], "Looking at masks"):
        try:
            held = np.unique(read_labels(manifest.locate(row.mask), material.options).voxels)
        except MedgenError as error:
            note(f"Skipped {row.case}: {error}")
            continue
        if held.any():
            found[row.case] = held[held > 0]
    return found


# -- what a model fills --------------------------------------------------------------------------------


@torch.no_grad()
def _filled(
    bundle: Bundle, taken: Intake, where: Bool[np.ndarray, "i j k"], row: Row, label: str, seed: int
) -> tuple[Scan, str]:
    """The prepared scan with what the model has in place of some voxels, and which ability filled them."""
    model, config = bundle.model, bundle.model.config
    if config.classes and label not in config.classes:
        raise DataError(f"its class is none of those that the model was told: {', '.join(config.classes)}.")
    x = taken.x
    if config.joint:
        # Told that nothing is marked.
        x = torch.cat([x, x.new_zeros(1, len(config.labels), *x.shape[2:])], 1)
    cond = conditions_for(config, [label], [row.covariates])
    place = torch.from_numpy(where.reshape(x.shape[2:]))[None, None]
    if can(model, "inpaints"):
        drawn, by = cast(Inpaints, model).inpaint(x, place, seed=seed, cond=cond), "inpaints"
        values = drawn.clamp(0, 1)
    else:
        drawn, by = cast(Restores, model).restore(x, seed=seed, cond=cond), "restores"
        values = _joined(x, drawn, place).clamp(0, 1)
    values = torch.where(place, values, x)[0, : config.images].cpu().numpy().astype(np.float32)
    return taken.ready.with_voxels(values.reshape(-1, *taken.ready.grid.shape)), by


def _joined(
    x: Float[Tensor, "1 c *space"], drawn: Float[Tensor, "1 c *space"], place: Bool[Tensor, "1 1 *space"]
) -> Float[Tensor, "1 c *space"]:
    """What was drawn, brought to the level of what surrounds each place: mean difference within 3 voxels about it."""
    from scipy.ndimage import gaussian_filter

    hole = place[0, 0].numpy()
    ring = np.asarray(_widened(hole, 3) & ~hole, dtype=np.float64)
    weight = gaussian_filter(ring, 3.0)
    level = torch.zeros_like(drawn)
    for n in range(x.shape[1]):
        off = (x - drawn)[0, n].cpu().double().numpy()
        usual = float((off * ring).sum() / max(ring.sum(), 1))
        near = gaussian_filter(off * ring, 3.0)
        level[0, n] = torch.from_numpy(np.where(weight > 1e-3, near / np.maximum(weight, 1e-3), usual))
    return drawn + level


def _widened(mask: Bool[np.ndarray, "*space"], voxels: int = _MARGIN) -> Bool[np.ndarray, "*space"]:
    """A mask grown by whole voxels along every axis that has several."""
    from scipy.ndimage import binary_dilation

    structure = np.ones([3 if n > 1 else 1 for n in mask.shape])
    return np.asarray(binary_dilation(mask, structure, iterations=voxels))


def _reached(marked: Scan, ready: Scan) -> Bool[np.ndarray, "i j k"]:
    """Voxels of the prepared scan next to any marked one, however much coarser or finer the model sees."""
    places = ready.grid.index(marked.grid.world(np.argwhere(marked.voxels[0])))
    near = np.zeros(ready.grid.shape, dtype=bool)
    for up in np.ndindex(2, 2, 2):
        at = np.floor(places).astype(int) + up
        fits = ((at >= 0) & (at < ready.grid.shape)).all(1)
        near[tuple(at[fits].T)] = True
    return near


__all__ = ["KINDS", "Direction", "LesionWay", "require_removing"]
