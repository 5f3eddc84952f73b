"""`medgen score`: one number and one map per scan: does it belong?

The p-value places a scan's score among those of held-out healthy scans; the map shows how many healthy
standard deviations it lies from the healthy mean at each place (see `medgen.tasks.detector`).
"""

import csv
import json
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from medgen import io
from medgen.bundle import Bundle
from medgen.data.dataset import mask_view, model_view, real_view
from medgen.data.manifest import Manifest, Row, index
from medgen.data.window import flat
from medgen.errors import DataError, MedgenError, OutputError
from medgen.io.source import ReadOptions
from medgen.log import note, track
from medgen.report.pictures import overlay
from medgen.scan import Header, Scale, Scan
from medgen.tasks.calibration import folded, mask_threshold, normals_needed, p_value
from medgen.tasks.conditions import conditions_for, told_of
from medgen.tasks.detector import Detector, makes_maps
from medgen.tasks.intake import taken_in
from medgen.tasks.workspace import Workspace


@dataclass(frozen=True)
class Scored:
    """What is said about one scan.

    Args:
        case: its name.
        score: how far the scan is from its healthy twin, or how surprising it is: nats a voxel.
        unusual: distance of the score from the healthy scores' middle, in their spreads, either side.
        p: two-sided conformal p-value among held-out healthy scans; None with no calibration.
        flagged: p is at most the false-alarm rate asked for; None where it cannot be.
        z_max: highest value of the anomaly map.
        mask_mm3: volume above the calibrated threshold; None where there is none.
        warnings: what is unusual about the file itself.
        error: why it was not scored.
    """

    case: str
    score: float | None = None
    unusual: float | None = None
    p: float | None = None
    flagged: bool | None = None
    z_max: float | None = None
    mask_mm3: float | None = None
    warnings: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Scores:
    """All scans of a run, most suspicious first, and where the files are."""

    scans: tuple[Scored, ...]
    folder: Path
    rate: float
    calibration_scans: int
    notes: tuple[str, ...] = field(default_factory=tuple)

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

    `out` gets `scores.csv` and `scores.json` (most suspicious first), and per scan
    `maps/CASE_map.nii.gz` (healthy standard deviations from the healthy mean, on the scan's own grid,
    NaN where nothing was scored), `maps/CASE_mask.nii.gz` (where the calibration allows one) and
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
    detector = Detector.of(bundle)
    target = "cuda" if device in ("auto", "cuda") and torch.cuda.is_available() else "cpu"
    bundle.model.to(target)
    notes = _limits(bundle, rate, maps)
    for sentence in notes:
        note(sentence)
    settings = {"scans": str(Path(scans).resolve()), "weights": bundle.weights_sha256, "rate": rate, "maps": maps}
    work = Workspace(out, settings, force=force)
    run = _Run(bundle, detector, work.folder, rate, maps, options)
    with io.opened(scans) as place:
        manifest = index(place, options)
        work.record()
        for row in track(manifest.rows, "Scoring"):
            if row.case not in work.done:
                with work.writing():
                    scored = run.score(row, manifest)
                if scored.error:
                    note(f"Skipped {row.case}: {scored.error}")
                work.record(row.case, asdict(scored))
    found = [_from_journal(work.done[row.case]) for row in manifest.rows]
    ordered = sorted(found, key=lambda s: (bool(s.error), 2.0 if s.p is None else s.p, -(s.unusual or 0), s.case))
    result = Scores(tuple(ordered), Path(out), rate, int(bundle.calibration.get("scans", 0)), tuple(notes))
    if result.failed == len(result.scans):
        work.discard()
        raise DataError(f"None of the {len(result.scans)} scans could be scored; the first: {ordered[0].error}")
    with work.writing():
        _write_tables(result, work.folder)
    work.finish({"command": "score", "settings": settings, "notes": notes, "failed": result.failed})
    return result


def _limits(bundle: Bundle, rate: float, maps: bool) -> list[str]:
    count = int(bundle.calibration.get("scans", 0))
    told = []
    if maps and not makes_maps(bundle.model):
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
    folder: Path
    rate: float
    maps: bool
    options: ReadOptions

    def score(self, row: Row, manifest: Manifest) -> Scored:
        """Score one scan and write its files; whatever is wrong with it becomes its `error`."""
        try:
            found = taken_in(self.bundle, manifest.locate(row.path), self.options)
            source, ready = found.source, found.ready
            score, z = self._detected(ready, found.real, row, manifest)
            scored = self._placed(row.case, score, found.warnings)
            if z is None:
                return scored
            scored = replace(scored, z_max=round(float(np.nanmax(z)), 3))
            return self._written(source, ready, z, scored) if self.maps else scored
        except OutputError:
            raise  # the disk is to blame, not the scan
        except MedgenError as error:
            return Scored(row.case, error=str(error))

    def _detected(
        self, ready: Scan, real: Bool[np.ndarray, "i j k"], row: Row, manifest: Manifest
    ) -> tuple[float, Float[np.ndarray, "*space"] | None]:
        """Score and z-map, with whatever the model is told besides the scan."""
        model = self.detector.model
        told = told_of(model.config)
        given: dict[str, Tensor | None] = {}
        if told["covariates"]:
            given["cond"] = conditions_for(model.config, [row.label], [row.covariates])
        if told["context"]:
            given["context"] = mask_view(row.mask and manifest.locate(row.mask), ready.grid, self.options)[None]
        if not real.all():
            given["real"] = real_view(real)[None]
        return self.detector(model_view(ready)[None], **given)

    def _placed(self, case: str, score: float, warnings: tuple[str, ...]) -> Scored:
        """The score among those of healthy scans."""
        known = self.detector.scores
        if len(known) < 2:
            return Scored(case, score=score, warnings=warnings)
        p = p_value(known, score)
        flagged = bool(p <= self.rate + 1e-12) if len(known) >= normals_needed(self.rate) else None
        return Scored(case, score, folded(known, score)[1], p, flagged, warnings=warnings)

    def _written(self, source: Scan, prepared: Scan, z: Float[np.ndarray, "*space"], scored: Scored) -> Scored:
        """Put map, mask and picture on the source's grid."""
        told = source.header
        header = Header(modality=told.modality, space=told.space, synthetic=told.synthetic)
        on_model = Scan(z.reshape(1, *prepared.grid.shape), prepared.grid, Scale(unit="z"), header)
        on_source = on_model.onto(source.grid, outside=float("nan"))
        for name in ("maps", "pictures"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        name = file_name(scored.case)
        if name != scored.case:
            # Other names may have become the same.
            name += f"-{sha256(scored.case.encode()).hexdigest()[:6]}"
        io.write(on_source, self.folder / "maps" / f"{name}_map.nii.gz")
        known = self.detector.normals
        threshold = None if known is None else mask_threshold(known.maxima, self.rate)
        if threshold is not None:
            marked = np.nan_to_num(on_source.voxels, nan=-np.inf) > threshold
            mask = Scan(marked.astype(np.uint8), source.grid, Scale(), header, is_label=True)
            io.write(mask, self.folder / "maps" / f"{name}_mask.nii.gz")
            scored = replace(scored, mask_mm3=round(float(marked.sum()) * source.grid.voxel_volume, 3))
        said = "no p-value" if scored.p is None else f"p = {scored.p:.3f}"
        title = f"{scored.case}: score {scored.score:.4g}, {said}, highest z {scored.z_max:.1f}"
        overlay(flat(source), flat(on_source), self.folder / "pictures" / f"{name}.png", title=title)
        return scored


def file_name(case: str) -> str:
    """A case name that is safe as a file name on every system."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in case).strip(".")[:150] or "scan"


def _from_journal(values: dict[str, Any]) -> Scored:
    return Scored(**{**values, "warnings": tuple(values["warnings"])})


def _write_tables(result: Scores, folder: Path) -> None:
    columns = list(asdict(result.scans[0]))
    with (folder / "scores.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for scan in result.scans:
            writer.writerow({k: "; ".join(v) if k == "warnings" else _cell(v) for k, v in asdict(scan).items()})
    stated = {
        "research_use_only": "Research use only, not a medical device.",
        "rate": result.rate,
        "calibration_scans": result.calibration_scans,
        "notes": result.notes,
        "scans": [asdict(scan) for scan in result.scans],
    }
    (folder / "scores.json").write_text(json.dumps(stated, indent=1) + "\n", encoding="utf-8")


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else value


__all__ = ["Scored", "Scores", "file_name", "score"]
