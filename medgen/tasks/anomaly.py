"""`medgen score`: one number and one map per scan: does it belong?

The p-value places a scan's score among those of held-out healthy scans; the map shows how many healthy
standard deviations it lies from the healthy mean at each place (see `medgen.tasks.detector`).
"""

import json
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from medgen import io
from medgen.bundle import Bundle
from medgen.data.manifest import Manifest, Row
from medgen.data.window import flat
from medgen.errors import DataError, MedgenError, OutputError
from medgen.io.source import ReadOptions
from medgen.log import note, track
from medgen.report.pictures import overlay
from medgen.scan import Header, Scale, Scan
from medgen.tasks.calibration import mask_threshold, normals_needed, placed
from medgen.tasks.cohort import Group, groups, unlike, write_groups
from medgen.tasks.detector import Detector
from medgen.tasks.findings import Finding, findings
from medgen.tasks.intake import given_with, require_images, scans_for, taken_in
from medgen.tasks.norms import Norms
from medgen.tasks.worklist import Scored, own_name, suspicious_first, write_pictures, write_scores
from medgen.tasks.workspace import Workspace
from medgen.training.device import device_for


@dataclass(frozen=True)
class Scores:
    """All scans of a run, most suspicious first, and where the files are.

    Args:
        scans: what is said about each.
        folder: where the files are.
        rate: false-alarm rate of the flags.
        calibration_scans: held-out healthy scans that p-values are counted among.
        notes: what limits all that is said, in sentences.
        groups: counts by class, domain and covariates, where the scans differ in them.
    """

    scans: tuple[Scored, ...]
    folder: Path
    rate: float
    calibration_scans: int
    notes: tuple[str, ...] = ()
    groups: tuple[Group, ...] = ()

    @property
    def failed(self) -> int:
        """How many scans could not be scored."""
        return sum(bool(scan.error) for scan in self.scans)


def score(
    scans: str | Path,
    bundle: str | Path | Bundle,
    out: str | Path,
    *,
    rate: float = 0.05,
    maps: bool = True,
    device: str = "auto",
    options: ReadOptions = ReadOptions(),
    force: bool = False,
) -> Scores:
    """Score every scan of a file or folder against a bundle, and write scores, maps, masks and pictures.

    `out` gets `scores.csv` and `scores.json` (most suspicious first), `findings.csv` (what stands out in the maps),
    `worklist.png` (the most suspicious scans), `groups.csv` (counts by class, site, age, ..., where the scans differ in
    them), and per scan `maps/CASE_map.nii.gz` (healthy standard deviations from
    the healthy mean, on the scan's own grid, NaN where nothing was scored), `maps/CASE_scored.nii.gz` (1 where
    something was, written where something was not), `maps/CASE_mask.nii.gz` (where the calibration allows one) and
    `pictures/CASE.png`.

    Args:
        scans: file, folder, DICOM series, zip, .npz or CSV.
        bundle: made by `train`.
        out: a folder that must not exist.
        rate: false-alarm rate for `flagged`, and for marking anything at all in a healthy scan.
        maps: write maps, masks and pictures; False writes the numbers only.
        device: 'auto', 'cpu', 'cuda', 'mps'.
        options: how strict reading is.
        force: replace an existing output.

    Raises:
        BundleError, CapabilityError, DataError, OutputError.
    """
    if not isinstance(bundle, Bundle):
        bundle = Bundle.load(bundle)
    require_images(bundle, "score")
    detector = Detector.of(bundle)
    for model in bundle.models.values():
        model.to(device_for(device))
    notes = _limits(bundle, detector, rate, maps)
    for sentence in notes:
        note(sentence)
    settings = {"scans": str(Path(scans).resolve()), "weights": bundle.weights_sha256, "values": _values_of(bundle)}
    settings |= {"rate": rate, "maps": maps, "options": vars(options)}
    work = Workspace(out, settings, force=force)
    run = _Run(bundle, detector, Norms.of(bundle.calibration), work.folder, rate, maps, options)
    with io.opened(scans) as place:
        manifest = scans_for(bundle, place, options)
        work.record()
        for row in track(manifest.rows, "Scoring"):
            if row.case not in work.done:
                with work.writing():
                    scored = run.score(row, manifest)
                if scored.error:
                    note(f"Skipped {row.case}: {scored.error}")
                work.record(row.case, asdict(scored))
    ordered = suspicious_first(Scored.of(work.done[row.case]) for row in manifest.rows)
    normals = len(detector.scores)
    for sentence in unlike(np.asarray([scan.p for scan in ordered if scan.p is not None]), normals, rate):
        notes.append(sentence)
        note(sentence)
    told = groups(ordered, manifest.rows, normals, rate)
    result = Scores(ordered, Path(out), rate, normals, tuple(notes), told)
    if result.failed == len(result.scans):
        work.discard()
        raise DataError(f"None of the {len(result.scans)} scans could be scored; the first: {ordered[0].error}")
    with work.writing():
        _write(result, work.folder)
    work.finish({"command": "score", "settings": settings, "notes": notes, "failed": result.failed})
    return result


def _values_of(bundle: Bundle) -> str:
    """sha256 of what decides its answers besides the weights: configs, recipe, contract and calibration."""
    stated: dict[str, Any] = {name: model.config.model_dump(mode="json") for name, model in bundle.models.items()}
    parts = (stated, bundle.recipe.model_dump(mode="json"), bundle.contract.model_dump(mode="json"), bundle.calibration)
    digest = sha256(json.dumps(parts, sort_keys=True).encode())
    for name, tensor in sorted(bundle.tensors.items()):
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def _limits(bundle: Bundle, detector: Detector, rate: float, maps: bool) -> list[str]:
    count = len(detector.scores)
    told = []
    if maps and not detector.makes_maps:
        told.append(f"{bundle.name} says how unusual a scan is, not where: there are no maps.")
    if count < 2:
        told.append("The bundle was calibrated on no healthy scan: scores have no p-value and maps are not drawn.")
    elif count < normals_needed(rate):
        told.append(
            f"A false-alarm rate of {rate:g} needs {normals_needed(rate)} held-out healthy scans; the bundle has "
            f"{count}. Scans are not flagged and no mask is drawn; the smallest "
            f"possible p-value is {1 / (count + 1):.3f}."
        )
    return told


@dataclass(frozen=True, eq=False)
class _Run:
    """What scoring one scan needs to know of the whole run."""

    bundle: Bundle
    detector: Detector
    norms: Norms | None
    folder: Path
    rate: float
    maps: bool
    options: ReadOptions

    def score(self, row: Row, manifest: Manifest) -> Scored:
        """Score one scan and write its files; whatever is wrong with it becomes its `error`."""
        try:
            found = taken_in(self.bundle, manifest.locate(row.path), self.options)
            source, ready = found.source, found.ready
            score, z = self.detector(found.x, **given_with(self.bundle, found, row, manifest, self.options))
            if not np.isfinite(score):
                raise DataError("The model has no finite score for this scan: look at it, it may be of another kind.")
            scored = self._placed(row, score, found.warnings)
            if z is None or not np.isfinite(z).any():
                return scored
            z_map = z.reshape(ready.grid.shape)
            scored = replace(scored, z_max=round(float(np.nanmax(z_map)), 3), findings=self._listed(z_map, ready))
            return self._written(source, ready, z_map, scored) if self.maps else scored
        except OutputError:
            raise  # the disk is to blame, not the scan
        except MedgenError as error:
            return Scored(row.case, error=str(error))

    def _placed(self, row: Row, score: float, warnings: tuple[str, ...]) -> Scored:
        """The score among those of healthy scans, of the scan's age and sex where they are known."""
        if self.norms is not None:
            warnings = (*warnings, *self.norms.limits(row.covariates))
        known, two_sided = self.detector.scores, self.detector.two_sided
        place = placed(known, score, two_sided=two_sided, norms=self.norms, cells=row.covariates)
        if place is None:
            return Scored(row.case, score=score, warnings=warnings)
        flagged = bool(place.p <= self.rate + 1e-12) if place.among >= normals_needed(self.rate) else None
        return Scored(row.case, score, place.unusual, place.p, flagged, warnings=warnings)

    def _listed(self, z_map: Float[np.ndarray, "i j k"], ready: Scan) -> tuple[Finding, ...] | None:
        """What stands out in the map; None where no clusters of healthy scans are known."""
        known = self.detector.normals
        return None if known is None or not len(known.largest) else findings(z_map, ready.grid, known, self.rate)

    def _written(self, source: Scan, ready: Scan, z_map: Float[np.ndarray, "i j k"], scored: Scored) -> Scored:
        """Put map, masks and picture on the source's grid."""
        told = source.header
        header = Header(modality=told.modality, space=told.space, synthetic=told.synthetic)
        on_model = Scan(z_map[None], ready.grid, Scale(unit="z"), header)
        on_source = on_model.onto(source.grid, outside=float("nan"))
        for name in ("maps", "pictures"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        name, z = own_name(scored.case), on_source.voxels

        def write_mask(kind: str, where: Bool[np.ndarray, "1 i j k"]) -> None:
            mask = Scan(where.astype(np.uint8), source.grid, Scale(), header, is_label=True)
            io.write(mask, self.folder / "maps" / f"{name}_{kind}.nii.gz")

        io.write(on_source, self.folder / "maps" / f"{name}_map.nii.gz")
        if not np.isfinite(z).all():
            write_mask("scored", np.isfinite(z))
        known = self.detector.normals
        threshold = None if known is None else mask_threshold(known.maxima, self.rate)
        if threshold is not None:
            marked = np.nan_to_num(z, nan=-np.inf) > threshold
            write_mask("mask", marked)
            scored = replace(scored, mask_mm3=round(float(marked.sum()) * source.grid.voxel_volume, 3))
        said = "no p-value" if scored.p is None else f"p = {scored.p:.3f}"
        title = f"{scored.case}: score {scored.score:.4g}, {said}, highest z {scored.z_max:.1f}"
        overlay(flat(source), flat(on_source), self.folder / "pictures" / f"{name}.png", title=title)
        return scored


def _write(result: Scores, folder: Path) -> None:
    """Tables and the picture of the most suspicious."""
    stated = {
        "research_use_only": "Research use only, not a medical device.",
        "rate": result.rate,
        "calibration_scans": result.calibration_scans,
        "notes": result.notes,
        "groups": [asdict(group) for group in result.groups],
    }
    if result.groups:
        write_groups(result.groups, folder / "groups.csv")
    write_scores(result.scans, stated, result.rate, folder)
    if (folder / "pictures").is_dir():
        write_pictures(result.scans, folder, title=f"Most suspicious of {len(result.scans)} scans first")


__all__ = ["Scored", "Scores", "score"]
