"""Which scans of a folder are healthy and which are ill, and lesions painted where nobody is ill."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, get_args

import numpy as np

from medgen.bundle import Bundle
from medgen.data.dataset import mask_view, real_view
from medgen.data.lesions import KINDS_B, SIZES, Contrast, Kind, Lesion, Mask, Size, drawn_mask, mask_library
from medgen.data.manifest import Manifest, Row
from medgen.errors import DataError, MedgenError
from medgen.io.source import ReadOptions
from medgen.log import note, track
from medgen.seeds import derived_seed
from medgen.tasks.conditions import told_of
from medgen.tasks.detection import Case
from medgen.tasks.intake import given_with, scans_for, taken_in, training_scans

OWN = "own"
# Healthy scans that lesions of a kind are painted into, at most: images, volumes.
_MOST = {2: 500, 3: 24}


@dataclass(frozen=True, eq=False)
class Sorted:
    """The scans of a folder by what they are good for.

    Args:
        healthy: no method has learned from them.
        ill: by name of the group.
        train: healthy scans that baselines learn from.
        held: healthy scans that baselines are calibrated on.
        says: where baselines learned.
    """

    healthy: Manifest
    ill: Mapping[str, Manifest]
    train: Manifest
    held: Manifest
    says: str


def sorted_scans(
    bundle: Bundle,
    data: str | Path,
    options: ReadOptions,
    *,
    split: str = "test",
    healthy: Sequence[str] = (),
    ill: Sequence[str] = (),
    all_healthy: bool = False,
) -> Sorted:
    """Tell healthy scans from ill ones by label, and by masks of findings.

    In the folder that the bundle learned from, its test split is healthy, and baselines learn from its training and
    calibration splits. In another folder they learn from every second healthy patient; the rest are tested.

    Args:
        bundle: what it was trained on counts as healthy.
        data: a folder, or whatever `index` takes.
        options: how strict reading is.
        split: 'test' takes ill scans of that split only, where the folder is the one learned from.
        healthy: labels of healthy scans; none: those that the bundle was trained on.
        ill: labels of ill scans; none: all others.
        all_healthy: whether scans without label and mask are healthy, too.
    """
    known = training_scans(bundle, data, options)
    told = bundle.training
    rows = scans_for(bundle, data, options, seed=int(told.get("seed", 0)))
    labels = set(healthy or told.get("labels", ("",)))
    # Masks of organs are no findings: a model that learned from scans with masks learned what they show.
    learned = known.split("train") if known else None
    findings = not (any(row.mask for row in learned.rows) if learned else bundle_is_told_masks(bundle))
    domains = told.get("domains") if known else None

    def is_healthy(row: Row) -> bool:
        return not (findings and row.mask) and (row.label in labels or (all_healthy and not row.label))

    def group(row: Row) -> str:
        if domains is not None and row.domain not in domains:
            return ""
        if row.label and row.label not in labels:
            return row.label if not ill or row.label in ill else ""
        return "with findings" if findings and row.mask else ""

    ones = [row for row in rows.rows if group(row) and not (known and split == "test" and row.split != "test")]
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in ones:
        groups[group(row)].append(row)
    if len(groups) > 1:
        groups["all ill"] = ones
    sick = {name: replace(rows, rows=tuple(members)) for name, members in sorted(groups.items())}
    if known:
        parts = {name: _only(known.split(name), is_healthy) for name in ("test", "train", "calibration")}
        says = "Baselines learned from the bundle's training scans and were calibrated on its calibration scans."
        return Sorted(parts["test"], sick, parts["train"], parts["calibration"], says)
    others = _only(rows, is_healthy)
    taught = set(others.patients[::2])
    train = _only(others, lambda row: row.patient in taught)
    rest = _only(others, lambda row: row.patient not in taught)
    says = (
        f"The bundle did not learn from this folder, so baselines learned from {len(train)} of its {len(others)} "
        "healthy scans and were calibrated on the same, each without itself; all methods are tested on the others."
    )
    return Sorted(rest, sick, train, train, says)


def bundle_is_told_masks(bundle: Bundle) -> bool:
    """Whether one of its models is given each scan's mask, or learned them."""
    return any(told_of(model.config)["context"] or model.config.labels for model in bundle.models.values())


def _only(rows: Manifest, wanted) -> Manifest:
    return replace(rows, rows=tuple(row for row in rows.rows if wanted(row)))


def cases_of(bundle: Bundle, rows: Manifest, options: ReadOptions, *, findings: bool = False) -> list[Case]:
    """The scans prepared; those that cannot be are named and left out.

    Args:
        bundle: whose recipe and contract.
        rows: which scans.
        options: how strict reading is.
        findings: read their masks, too.
    """
    found = []
    for row in track(rows.rows, "Reading scans"):
        try:
            found.append(_case(bundle, row, rows, options, findings))
        except MedgenError as error:
            note(f"{row.case} is left out: {error}")
    return found


def _case(bundle: Bundle, row: Row, rows: Manifest, options: ReadOptions, findings: bool) -> Case:
    taken = taken_in(bundle, rows.locate(row.path), options)
    given = given_with(bundle, taken, row, rows, options)
    mask = None
    if findings and row.mask:
        mask = mask_view(rows.locate(row.mask), taken.ready.grid, options)[0].numpy() > 0
    return Case(row.case, row.patient, taken.ready, given, mask, covariates=row.covariates)


# -- painting ------------------------------------------------------------------------------------------


def refuse_overlap(bundle: Bundle, kinds: Sequence[str], masks: Sequence[Mask]) -> None:
    """Refuse to test on kinds of anomalies, or drawn masks, that the bundle was trained with.

    Raises:
        DataError: there are such; says which.
    """
    if same := sorted(set(bundle.training.get("anomaly_kinds", ())) & set(kinds)):
        raise DataError(
            f"The bundle was trained to find {', '.join(same)}: lesions of that kind cannot test it. Choose other "
            f"--kinds of {', '.join(KINDS_B)}."
        )
    known = set(bundle.training.get("mask_hashes", ()))
    if same := [mask.name for mask in masks if mask.sha256 in known]:
        raise DataError(
            f"The bundle was trained with {len(same)} of these {len(masks)} masks, {same[0]} among them, so they "
            "cannot test it. Take them out of the folder."
        )


def masks_in(rows: Mapping[str, Manifest]) -> tuple[Mask, ...]:
    """The drawn masks of ill scans."""
    paths = {members.locate(row.mask) for members in rows.values() for row in members.rows if row.mask}
    return tuple(drawn_mask(path) for path in sorted(paths))


def library_of(paint: str | Path | None) -> tuple[Mask, ...]:
    """The masks to paint from; none for shapes of medgen's own."""
    return () if paint is None or str(paint) == OWN else mask_library(paint)


def painted(
    healthy: Sequence[Case], kinds: Sequence[str], library: Sequence[Mask], *, seed: int = 0
) -> dict[str, list[Case]]:
    """A lesion of each kind in each healthy scan; sizes and contrasts take turns, and scans, too, where they are few.

    Args:
        healthy: prepared scans.
        kinds: of `KINDS_B`.
        library: masks to choose from; empty for shapes of medgen's own.
        seed: decides shapes, places and textures.

    Raises:
        DataError: not one lesion of a kind could be painted.
    """
    if not healthy:
        raise DataError("No healthy scan is left to paint lesions into. Add scans, or choose another --split.")
    sizes: list[Size] = [size for size, (low, high) in SIZES.items() if _held(library, low, high)]
    if not sizes:
        raise DataError(f"None of {len(library)} masks is of a size to paint: {SIZES['small'][0]:g} to 100 mL.")
    most = _MOST[2 if healthy[0].ready.is_planar else 3]
    contrasts: tuple[Contrast, ...] = get_args(Contrast)
    count = min(most, max(len(healthy), len(sizes) * len(contrasts)))
    found: dict[str, list[Case]] = {}
    for number, kind in enumerate(track(list(kinds), "Painting lesions")):
        reasons = []
        found[kind] = []
        for n in range(count):
            case = healthy[n % len(healthy)]
            # A Latin square: few scans still have lesions of every size and every contrast.
            size, contrast = sizes[n % len(sizes)], contrasts[-1 - (n // len(sizes) + n) % len(contrasts)]
            lesion = Lesion(cast(Kind, kind), size, contrast, derived_seed(seed, number, n))
            try:
                ready, mask, _ = lesion.painted(case.ready, library)
            except DataError as error:
                reasons.append(str(error))
                continue
            where = real_view(mask.voxels[0] > 0).numpy()
            told = f"{kind}, {size}, {contrast} contrast"
            found[kind].append(replace(case, ready=ready, mask=np.asarray(where), lesion=told))
        if not found[kind]:
            raise DataError(f"No lesion of the kind {kind} could be painted. The first reason: {reasons[0]}")
        if reasons:
            note(f"{kind}: {len(reasons)} of {count} lesions could not be painted. The first: {reasons[0]}")
    return found


def _held(library: Sequence[Mask], low: float, high: float) -> bool:
    """Whether there is a mask of the size; shapes of medgen's own have every size."""
    return not library or any(low <= one.millilitres < high for one in library)


__all__ = [
    "OWN", "Sorted", "bundle_is_told_masks", "cases_of", "library_of", "masks_in", "painted", "refuse_overlap",
    "sorted_scans",
]  # fmt: skip
