"""`medgen evaluate`: how good a bundle is on scans it has not learned from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from medgen import io
from medgen.bundle import Bundle
from medgen.data.dataset import ScanDataset
from medgen.data.lesions import KINDS_B
from medgen.data.manifest import Manifest, Row
from medgen.errors import ConfigError, DataError, MedgenError
from medgen.io.source import ReadOptions
from medgen.log import note
from medgen.tasks.calibration import normals_needed
from medgen.tasks.cases import cases_of, library_of, masks_in, painted, refuse_overlap, sorted_scans
from medgen.tasks.conditions import told_of
from medgen.tasks.detection import Case, Method, baselines, controlled, detector_of, measured
from medgen.tasks.detection_table import write
from medgen.tasks.detector import can_score
from medgen.tasks.generation import Drawn, generation, require_drawing
from medgen.tasks.generation import write as write_generation
from medgen.tasks.intake import require_images, scans_for, taken_in, training_scans
from medgen.tasks.quality import quality
from medgen.tasks.study import Useful
from medgen.tasks.usefulness import usefulness
from medgen.tasks.usefulness_table import write as write_usefulness
from medgen.tasks.workspace import Workspace
from medgen.training.device import device_for

# Healthy scans that baselines need to learn from, and volumes that control inputs are made of, at most.
_FEWEST, _MOST_CONTROLS = 3, {2: 500, 3: 24}


@dataclass(frozen=True)
class Asked:
    """What of detection a person decides.

    Args:
        paint: paint lesions into the healthy scans: 'own' for shapes of medgen's own, or a folder of drawn masks.
        kinds: of lesions to paint.
        healthy: labels of healthy scans; none: those that the bundle was trained on.
        ill: labels of ill scans; none: all others.
        rate: false-alarm rate of flags and masks.
        seed: of painted lesions, controls and intervals.
    """

    paint: str | None = None
    kinds: Sequence[str] = KINDS_B
    healthy: Sequence[str] = ()
    ill: Sequence[str] = ()
    rate: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.kinds) - set(KINDS_B)):
            raise ConfigError(f"There is no lesion of the kind {unknown[0]!r}. Kinds: {', '.join(KINDS_B)}.")


def evaluate(
    data: str | Path,
    bundle: str | Path | Bundle,
    *,
    split: Literal["test", "all"] = "test",
    label: str | None = None,
    domain: str | None = None,
    detection: Asked = Asked(),
    drawn: Drawn = Drawn(),
    useful: Useful | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    options: ReadOptions = ReadOptions(),
    force: bool = False,
) -> dict[str, Any]:
    """Bits per dimension, reconstruction, classification, detection, drawn scans: whichever the model is able to.

    Detection is measured where scans are ill (another label than the bundle was trained on, or a mask of findings) or
    lesions are painted; beside the detector stand baselines that need no model, and control inputs.

    Args:
        data: a folder, zip, CSV or .npz of scans.
        bundle: made by `train`.
        split: 'test' takes the scans that training set aside; 'all' takes every scan.
        label, domain: take these scans only, as in training; ill scans are those of `detection`.
        detection: who is healthy, what is painted.
        drawn: how many scans to draw and compare with held-out ones.
        useful: how to find out whether learners do better with synthetic scans; None: not.
        out: a folder for the tables of detection, drawn scans and usefulness, which must not exist; None: none.
        device: 'auto', 'cpu', 'cuda', 'mps'.
        options: how strict reading is.
        force: replace an existing output.

    Returns:
        Names and numbers (see `medgen.tasks.quality.quality`), with the bundle's hash and the split; 'detection' holds
        tables (see `medgen.tasks.detection.measured`), 'generation' what drawn scans are like (see
        `medgen.tasks.generation.generation`), 'utility' what they are worth (see `medgen.tasks.usefulness.usefulness`).

    Raises:
        BundleError, CapabilityError, DataError, ConfigError, OutputError.
    """
    if not isinstance(bundle, Bundle):
        bundle = Bundle.load(bundle)
    for model in bundle.models.values():
        model.to(device_for(device))
    settings = {"data": str(Path(data).resolve()), "weights": bundle.weights_sha256, "split": split, "label": label}
    settings |= {"domain": domain, "detection": vars(detection), "drawn": vars(drawn)}
    settings |= {} if useful is None else {"useful": vars(useful)}
    if drawn.scans:
        require_drawing(bundle)
    work = None if out is None else Workspace(out, settings, force=force)
    with io.opened(data) as place:
        known = training_scans(bundle, place, options)
        scans, left_out = _chosen(place, bundle, known, (split, label, domain), options)
        found = {"weights_sha256": bundle.weights_sha256, "split": split, "left_out": left_out}
        found |= _quality(bundle, scans, options)
        told = _detection(place, bundle, split, detection, options)
        made = generation(bundle, scans, known, drawn, options) if drawn.scans else {}
        if useful is not None:
            if work:
                work.record()
            kept = work and work.folder / "training"
            found["utility"] = usefulness(bundle, known, useful, options, device=device, kept=kept)
    # Each scan's numbers are for the files.
    each = told.pop("scans", [])
    if told:
        found["detection"] = told
    if made:
        found["generation"] = made
    if work:
        work.record()
        with work.writing():
            if told:
                write(told, each, work.folder)
            if made:
                write_generation(made, work.folder)
            if useful is not None:
                write_usefulness(found["utility"], work.folder)
        work.finish({"command": "evaluate", "settings": settings, "found": found})
    return found


def _chosen(
    place: str | Path, bundle: Bundle, known: Manifest | None, asked: tuple[str, str | None, str | None],
    options: ReadOptions,
) -> tuple[Manifest, int]:  # fmt: skip
    """The scans to evaluate on, of a split, label and domain, and how many do not suit the bundle."""
    split, label, domain = asked
    if split != "test":
        rows = scans_for(bundle, place, options).where(label=label, domain=domain)
    elif known is None:
        raise DataError(
            "The bundle did not learn from this folder as it is, so which of its scans were set aside cannot "
            "be told. Pass --split all if it has learned from none of them."
        )
    else:
        rows = known.where(label=label, domain=domain, split="test")
    chosen = replace(rows, rows=tuple(row for row in rows.rows if _fits(bundle, row, rows.locate(row.path), options)))
    if not len(chosen):
        raise DataError(f"None of {len(rows)} scans is left to evaluate on.")
    return chosen, len(rows) - len(chosen)


def _quality(bundle: Bundle, chosen: Manifest, options: ReadOptions) -> dict[str, Any]:
    """How good the model is at whatever it does besides detection."""
    scans = ScanDataset(chosen, bundle.recipe, **told_of(bundle.model.config), options=options)
    return quality(bundle.model, scans, temperature=bundle.calibration.get("temperature"))


def _fits(bundle: Bundle, row: Row, path: str, options: ReadOptions) -> bool:
    """Whether a scan is of the kind that the bundle was trained on; says why not."""
    classes = bundle.model.config.classes
    if classes and row.label not in classes:
        note(f"{row.case} is left out: the model knows {', '.join(classes)}; found {row.label or 'no class'}.")
        return False
    try:
        for warning in taken_in(bundle, path, options).warnings:
            note(f"{row.case}: {warning}.")
    except MedgenError as error:
        note(f"{row.case} is left out: {error}")
        return False
    return True


# -- detection -----------------------------------------------------------------------------------------


def _detection(place: str | Path, bundle: Bundle, split: str, asked: Asked, options: ReadOptions) -> dict[str, Any]:
    """How well ill scans are told from healthy ones; nothing where nobody is ill, or the bundle cannot say."""
    scored = "questions" in bundle.calibration or can_score(bundle.model)
    if not scored and asked.paint is None:
        return {}
    require_images(bundle, "detect anomalies")
    method = detector_of(bundle, asked.rate)
    library = library_of(asked.paint)
    refuse_overlap(bundle, asked.kinds if asked.paint else (), library)
    told = {"split": split, "healthy": asked.healthy, "ill": asked.ill, "all_healthy": asked.paint is not None}
    scans = sorted_scans(bundle, place, options, **told)
    if not scans.ill and asked.paint is None:
        return {}
    if bundle.training.get("mask_hashes"):
        refuse_overlap(bundle, (), masks_in(scans.ill))
    healthy = cases_of(bundle, scans.healthy, options)
    groups = {name: cases_of(bundle, rows, options, findings=True) for name, rows in scans.ill.items()}
    if asked.paint:
        groups |= painted(healthy, asked.kinds, library, seed=asked.seed)
    groups = {name: cases for name, cases in groups.items() if cases}
    if not groups:
        note("No ill scan could be prepared, so detection is not measured.")
        return {}
    notes, methods = [scans.says], [method]
    if min(len(scans.train), len(scans.held)) < _FEWEST:
        notes = [f"Baselines need {_FEWEST} healthy scans to learn from; found {len(scans.train)}: there are none."]
    else:
        train = ScanDataset(scans.train, bundle.recipe, options=options)
        held = train if scans.held is scans.train else ScanDataset(scans.held, bundle.recipe, options=options)
        methods += baselines(train, held, asked.rate)
    notes += _thoughts(healthy, methods, asked.rate)
    found = measured(methods, healthy, groups, rate=asked.rate, seed=asked.seed)
    if len(healthy) > 1:
        most = _MOST_CONTROLS[2 if healthy[0].ready.is_planar else 3]
        found["controls"] = controlled(methods, healthy[:most], seed=asked.seed)
    facts = {"healthy_scans": len(healthy), "rate": asked.rate, "notes": notes}
    if asked.paint:
        facts |= {"painted": list(asked.kinds), "masks": len(library) or "medgen's own shapes"}
    return facts | found


def _thoughts(healthy: Sequence[Case], methods: Sequence[Method], rate: float) -> list[str]:
    """What a reader should know before believing a number."""
    told = []
    if len(healthy) < 2:
        told.append("Too few healthy scans were set aside to tell ill ones from them: only maps are measured.")
    elif len(healthy) < 20:
        told.append(f"With {len(healthy)} healthy scans the numbers are rough: see the intervals.")
    if short := [len(method.healthy) for method in methods if len(method.healthy) < normals_needed(rate)]:
        told.append(
            f"A false-alarm rate of {rate:g} needs {normals_needed(rate)} calibration scans; there are {min(short)}, "
            "so no scan is flagged, no mask is drawn, and no rate is measured."
        )
    return told


__all__ = ["Asked", "evaluate"]
