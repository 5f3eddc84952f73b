"""`medgen score`: one number and one map per scan: does it belong?

The residual of a scan is 1 - SSIM between it and the model's reconstruction, at every voxel. The
score is its mean; the p-value places the score among held-out healthy scans; the map shows how many
healthy standard deviations the residual lies above the healthy mean at that place.
"""

import csv
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from medgen import io
from medgen.bundle import Bundle
from medgen.data.dataset import ScanDataset, model_view
from medgen.data.manifest import Manifest, index
from medgen.data.recipe import Recipe
from medgen.errors import BundleError, CapabilityError, DataError, MedgenError
from medgen.io.source import ReadOptions
from medgen.log import note, track
from medgen.metrics.image import ssim_map
from medgen.models import FAMILIES, family
from medgen.models.base import Model
from medgen.report.pictures import overlay
from medgen.scan import Header, Scale, Scan
from medgen.tasks.calibration import Normals, folded, mask_threshold, normals, normals_needed, p_value
from medgen.tasks.workspace import Workspace

# Beyond this many volumes the spread at a voxel is known well enough.
_MOST_MAPS = {2: 512, 3: 64}
_WINDOW = 7


@dataclass(frozen=True)
class Scored:
    """What is said about one scan.

    Args:
        case: its name.
        score: mean residual, 1 - SSIM, of the scan and its reconstruction.
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


@torch.no_grad()
def residual_map(model: Model, x: Float[Tensor, "b c *space"], cond: Tensor | None = None) -> Tensor:
    """1 - SSIM of scans and their reconstructions at every voxel, (b, *space).

    Raises:
        CapabilityError: the model does not reconstruct.
    """
    require_reconstruction(model)
    return (1 - ssim_map(x, model.reconstruct(x, cond).clamp(0, 1), window=_WINDOW))[:, 0]


def require_reconstruction(model: Model) -> None:
    """Refuse a model that cannot score anomalies, naming families that can.

    Raises:
        CapabilityError: the model does not reconstruct.
    """
    if "reconstructs" not in model.abilities(model.config):
        kind = model.config.kind
        able = [name for name in FAMILIES if "reconstructs" in family(name).abilities(model.config)]
        raise CapabilityError(
            f"{kind} cannot score anomalies: it does not reconstruct. Models that can: {', '.join(able)}."
        )


def calibrate(
    model: Model, recipe: Recipe, healthy: Manifest, options: ReadOptions
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What held-out healthy scans score, as plain numbers and tensors for the bundle."""
    if "reconstructs" not in model.abilities(model.config) or not len(healthy):
        return {}, {}
    try:
        data = ScanDataset(healthy, recipe, classes=model.config.classes, options=options)
    except DataError:
        return {}, {}
    maps, scores = [], []
    most = _MOST_MAPS[model.config.dims]
    for batch in data.batches(8 if model.config.dims == 3 else 64):
        residual = residual_map(model, batch.x, batch.cond)
        scores += residual.flatten(1).mean(1).tolist()
        maps.append(residual[: max(0, most - sum(map(len, maps)))].numpy())
    learnt = normals(np.concatenate(maps)) if len(scores) > 1 else None
    numbers = {"scores": scores, "scans": len(scores), "residual": "1 - SSIM", "window": _WINDOW}
    if learnt is None:
        return numbers, {}
    return numbers | {"maxima": learnt.maxima.tolist()}, {
        "mean": torch.from_numpy(learnt.mean),
        "sd": torch.from_numpy(learnt.sd),
    }


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
    `maps/CASE_map.nii.gz` (healthy standard deviations above the healthy mean, on the scan's own grid,
    NaN where nothing was scored), `maps/CASE_mask.nii.gz` (where the calibration allows one) and
    `pictures/CASE.png`.

    Args:
        scans: file, folder, DICOM series, .npz or CSV.
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
    require_reconstruction(bundle.model)
    target = "cuda" if device in ("auto", "cuda") and torch.cuda.is_available() else "cpu"
    bundle.model.to(target)
    manifest = index(scans, options)
    notes = _limits(bundle, rate)
    for sentence in notes:
        note(sentence)
    settings = {"scans": str(Path(scans).resolve()), "weights": bundle.weights_sha256, "rate": rate, "maps": maps}
    work = Workspace(out, settings, force=force)
    for row in track(manifest.rows, "Scoring"):
        if row.case not in work.done:
            scored = _one(bundle, manifest.locate(row.path), row.case, row.label, work.folder, rate, maps, options)
            if scored.error:
                note(f"Skipped {row.case}: {scored.error}")
            work.record(row.case, asdict(scored))
    found = [_from_journal(work.done[row.case]) for row in manifest.rows]
    ordered = sorted(found, key=lambda s: (bool(s.error), 2.0 if s.p is None else s.p, -(s.unusual or 0), s.case))
    result = Scores(tuple(ordered), Path(out), rate, int(bundle.calibration.get("scans", 0)), tuple(notes))
    if result.failed == len(result.scans):
        raise DataError(f"None of the {len(result.scans)} scans could be scored; the first: {ordered[0].error}")
    _write_tables(result, work.folder)
    work.finish({"command": "score", "settings": settings, "notes": notes, "failed": result.failed})
    return result


def _limits(bundle: Bundle, rate: float) -> list[str]:
    count = int(bundle.calibration.get("scans", 0))
    if count < 2:
        return ["The bundle was calibrated on no healthy scan: scores have no p-value and maps are not drawn."]
    if count < normals_needed(rate):
        return [
            f"A false-alarm rate of {rate:g} needs {normals_needed(rate)} held-out healthy scans; the bundle has "
            f"{count}. Scans are not flagged and no mask is drawn; the smallest "
            f"possible p-value is {1 / (count + 1):.3f}."
        ]
    return []


def _one(
    bundle: Bundle, path: str, case: str, label: str, folder: Path, rate: float, maps: bool, options: ReadOptions
) -> Scored:
    try:
        source = io.read(path, options)
        warnings = bundle.contract.check(source)
        prepared = bundle.recipe(source)
        warnings += _field_of_view(source, prepared)
        cond = _cond(bundle.model, label)
        x = torch.from_numpy(np.ascontiguousarray(model_view(prepared)))[None].to(bundle.model.template.device)
        residual = residual_map(bundle.model, x, cond)[0].cpu().numpy()
        scored = _numbers(bundle, case, float(residual.mean()), rate, tuple(warnings))
        healthy = _normals(bundle)
        if healthy is None:
            return scored
        z = healthy.z_map(residual).reshape(1, *prepared.grid.shape).astype(np.float32)
        scored = replace(scored, z_max=round(float(z.max()), 3))
        return _written(source, prepared, z, scored, healthy, folder, rate) if maps else scored
    except MedgenError as error:
        return Scored(case, error=str(error))


def _numbers(bundle: Bundle, case: str, score: float, rate: float, warnings: tuple[str, ...]) -> Scored:
    known = np.asarray(bundle.calibration.get("scores", []))
    if len(known) < 2:
        return Scored(case, score=score, warnings=warnings)
    p = p_value(known, score)
    flagged = bool(p <= rate + 1e-12) if len(known) >= normals_needed(rate) else None
    return Scored(case, score, folded(known, score)[1], p, flagged, warnings=warnings)


def _written(
    source: Scan, prepared: Scan, z: np.ndarray, scored: Scored, healthy: Normals, folder: Path, rate: float
) -> Scored:
    """Put map, mask and picture on the source's grid into `folder`."""
    header = Header(modality=source.header.modality, space=source.header.space, synthetic=source.header.synthetic)
    on_source = Scan(z, prepared.grid, Scale(unit="z"), header).onto(source.grid, outside=float("nan"))
    on_source = on_source.with_voxels(on_source.voxels.astype(np.float32))
    (folder / "maps").mkdir(exist_ok=True)
    (folder / "pictures").mkdir(exist_ok=True)
    name = file_name(scored.case)
    io.write(on_source, folder / "maps" / f"{name}_map.nii.gz")
    threshold = mask_threshold(healthy.maxima, rate)
    if threshold is not None:
        marked = np.nan_to_num(on_source.voxels, nan=-np.inf) > threshold
        mask = Scan(marked.astype(np.uint8), source.grid, Scale(), header, is_label=True)
        io.write(mask, folder / "maps" / f"{name}_mask.nii.gz")
        scored = replace(scored, mask_mm3=round(float(marked.sum()) * source.grid.voxel_volume, 3))
    said = "no p-value" if scored.p is None else f"p = {scored.p:.3f}"
    title = f"{scored.case}: score {scored.score:.4f}, {said}, highest z {scored.z_max:.1f}"
    overlay(source, on_source, folder / "pictures" / f"{name}.png", title=title)
    return scored


def _field_of_view(source: Scan, prepared: Scan) -> list[str]:
    """Refuse a scan that the model's window misses; warn when much of the window is empty.

    Raises:
        BundleError: less than a third of the window lies inside the scan.
    """
    window = np.stack(np.meshgrid(*[np.linspace(0, n - 1, 9) for n in prepared.grid.shape], indexing="ij"), -1)
    index_of = source.grid.index(prepared.grid.world(window.reshape(-1, 3)))
    inside = ((index_of > -0.51) & (index_of < np.asarray(source.grid.shape) - 0.49)).all(1).mean()
    if inside < 1 / 3:
        raise BundleError(
            f"Only {inside:.0%} of the model's field of view lies inside this scan: another body part, or another "
            "space than the training scans. Register it to their space, or train on scans like it."
        )
    return [f"only {inside:.0%} of the model's field of view lies inside the scan"] if inside < 0.8 else []


def _cond(model: Model, label: str) -> Tensor | None:
    """The class index of a labelled scan; an unlabelled one is scored without a class."""
    classes = model.config.classes
    return torch.tensor([classes.index(label)]) if label in classes else None


def _normals(bundle: Bundle) -> Normals | None:
    if "mean" not in bundle.tensors:
        return None
    mean, sd = bundle.tensors["mean"].numpy(), bundle.tensors["sd"].numpy()
    return Normals(mean, sd, np.asarray(bundle.calibration["maxima"]))


def file_name(case: str) -> str:
    """A case name that is safe as a file name on every system."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in case).strip(".") or "scan"


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


__all__ = ["Scored", "Scores", "calibrate", "file_name", "require_reconstruction", "residual_map", "score"]
