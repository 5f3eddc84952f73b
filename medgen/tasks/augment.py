"""`medgen augment`: learn a folder, write synthetic scans in the folder's own format.

No written scan is a copy of a training scan: each is compared with all of them, and copies are drawn again.
"""

import csv
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from medgen import io
from medgen.bundle import Bundle
from medgen.data.dataset import ScanDataset
from medgen.data.manifest import Manifest, Row
from medgen.data.window import real_voxels
from medgen.errors import CapabilityError, ConfigError, PrivacyError
from medgen.grid import Grid
from medgen.io.source import ReadOptions
from medgen.log import note, progress
from medgen.metrics.memorisation import CopyDetector, CopyTest
from medgen.models.abilities import Samples
from medgen.models.base import can
from medgen.report.pictures import contact_sheet
from medgen.scan import Scale, Scan
from medgen.seeds import derived_seed
from medgen.tasks.capabilities import families_that
from medgen.tasks.conditions import Masks, conditions_for, drawn_cells, masks_of, told_of
from medgen.tasks.intake import require_training_scans, require_whole
from medgen.tasks.learn import learn
from medgen.tasks.plan import Choices, Plan, plan_training
from medgen.tasks.worklist import file_name
from medgen.tasks.workspace import Workspace

Format = Literal["auto", "nifti", "dicom", "png", "npz"]
_FORMAT_OF = {"nifti": "nifti", "itk": "nifti", "dicom": "dicom", "raster": "png", "npz": "npz"}
# A scan that keeps coming out as a copy after this many draws means the model has memorised.
_MOST_DRAWS = 20
# What medgen wrote itself may be of three channels.
_OWN = ReadOptions(colour=True)


@dataclass(frozen=True)
class Augmented:
    """What was written.

    Args:
        folder: where.
        written: how many synthetic scans.
        copies_rejected: how many draws were discarded as copies of training scans.
        copy_test: how well copies are told on this dataset.
        format: of the files.
    """

    folder: Path
    written: int
    copies_rejected: int
    copy_test: CopyTest
    format: str


def augment(
    data: str | Path,
    out: str | Path,
    *,
    n: int | None = None,
    per_class: int | None = None,
    bundle: str | Path | None = None,
    format: Format = "auto",
    preset: str | Path | None = None,
    label: str | None = None,
    domain: str | None = None,
    overrides: Sequence[str] = (),
    minutes: float | None = 20,
    seed: int = 0,
    covariates: Sequence[str] = (),
    masks: Masks = "none",
    device: str = "auto",
    options: ReadOptions = ReadOptions(),
    force: bool = False,
) -> Augmented:
    """Learn the scans of a folder and write new ones beside nothing of theirs.

    `out` gets the synthetic scans in the layout of `data` (class sub-folders stay), `manifest.csv`,
    `contact_sheet.png`, `run.json` and the trained `bundle`. A model that is told covariates is told invented
    ones, which the manifest states; one that is given masks is given the training scans' in turn, and
    `masks` holds a copy beside each scan (that outline is a patient's, the scan is not).

    Args:
        data: a folder, zip, CSV or .npz of scans.
        out: a folder that must not exist.
        n: how many scans in all; default 20, or as many as there are classes times ten.
        per_class: how many of each class instead.
        bundle: use this trained bundle instead of learning; `data` then serves the copy test.
        format: 'auto' writes what `data` is made of.
        preset, label, domain, overrides, minutes, seed, covariates, masks, device, options: as for `train`.
        force: replace an existing output.

    Raises:
        DataError, ConfigError, CapabilityError, TrainingError, PrivacyError, OutputError.
    """
    choices = Choices(preset, label, domain, list(overrides), minutes, seed, list(covariates), masks)
    settings = {
        "data": str(Path(data).resolve()), "n": n, "per_class": per_class, "bundle": str(bundle), "format": format,
        **choices.settings(), "options": vars(options),
    }  # fmt: skip
    work = Workspace(out, settings, force=force)
    with io.opened(data) as place:
        given = None if bundle is None else Bundle.load(bundle)
        plan = plan_training(place, choices, options)
        require_whole(given.recipe if given else plan.recipe, given.name if given else plan.preset, "augment")
        if given:
            _require_sampling(given)
            # Copies are told by the splits of training, whatever this run's seed would make of the folder.
            plan = replace(plan, manifest=require_training_scans(given, place, options))
        _require_several({row.patient for row in plan.manifest.rows if row.split in ("train", "val")})
        wanted = _wanted(given.model.config.classes if given else plan.model.classes, n, per_class)
        chosen = _format(format, plan.manifest)
        first = f"use the bundle {Path(bundle).name}" if bundle else f"learn {len(plan.manifest.split('train'))} scans"
        bound = "" if bundle or minutes is None else f" for at most {minutes:g} minutes"
        note(f"Plan: {first}{bound}, then write {len(wanted)} synthetic scans ({chosen}) to {out}.")
        work.record()
        if given:
            trained = given
        elif "bundle" in work.done:
            trained = Bundle.load(work.folder / "bundle")
        else:
            trained = learn(plan, work, seed=seed, device=device, options=options, place=work.folder / "bundle")
            work.record("bundle")
        _require_sampling(trained)
        source = _Source(trained, seed, _seen(trained, plan.found.lattice), _masks(trained, plan, chosen, options))
        detector, test = _copy_detector(plan.manifest, trained, options, seed)
        with work.writing():
            written, rejected = _generate(source, wanted, chosen, detector, test, work)
            _finish_files(written, trained, chosen, work, seed)
        facts = {"written": len(written), "copies_rejected": rejected, "copy_test": test.to_dict()}
        work.finish({"command": "augment", "settings": settings, "weights_sha256": trained.weights_sha256, **facts})
        return Augmented(Path(out), len(written), rejected, test, chosen)


# -- decisions -----------------------------------------------------------------------------------


def _require_sampling(bundle: Bundle) -> None:
    if not can(bundle.model, "samples"):
        raise CapabilityError(
            f"{bundle.name} cannot augment: it does not sample. Models that can: {families_that('samples')}."
        )


def _require_several(patients: Collection[str]) -> None:
    if len(patients) < 2:
        raise PrivacyError(
            f"There is {len(patients)} patient to learn from, so whatever a model draws shows that patient, and copies "
            "cannot be told. Add scans of more patients."
        )


def _masks(bundle: Bundle, plan: Plan, chosen: str, options: ReadOptions) -> list[Tensor]:
    """What a model that draws scans for given masks is given; empty for others."""
    if not told_of(bundle.model.config)["context"]:
        return []
    if chosen == "npz":
        raise ConfigError("Scans drawn for given masks need a place for the masks, which .npz has not. Use --format.")
    note("Scans are drawn for the training scans' masks in turn; masks/ will hold outlines of real findings.")
    return masks_of(plan.manifest, bundle.recipe, options, bundle.model.config.labels)


def _seen(bundle: Bundle, lattice: Grid | None) -> Grid:
    """The part of the model's window within the field of view of scans that all share one; else the window."""
    window = Grid.from_dict(bundle.contract.grid)
    places = np.argwhere(real_voxels(window, lattice)) if lattice else np.empty((0, 3))
    if not len(places):
        return window
    first, last = places.min(0), places.max(0)
    return window.crop(first.tolist(), (last - first + 1).tolist())


def _wanted(classes: Sequence[str], n: int | None, per_class: int | None) -> list[tuple[str, str]]:
    """(name, class) of every scan to write."""
    if per_class is not None and not classes:
        raise ConfigError("--per-class needs scans with classes (sub-folders, or a label column). Use --n.")
    if per_class is not None and n is not None:
        raise ConfigError("--n and --per-class exclude each other.")
    if per_class is None:
        total = n if n is not None else (10 * len(classes) if classes else 20)
        labels = [classes[i % len(classes)] if classes else "" for i in range(total)]
    else:
        labels = [name for name in classes for _ in range(per_class)]
    if not labels or min(len(labels), n if n is not None else 1) < 1:
        raise ConfigError("The number of scans to write must be at least 1.")
    digits = max(4, len(str(len(labels))))
    return [(f"SYN-{i + 1:0{digits}d}", label) for i, label in enumerate(labels)]


def _format(asked: Format, manifest: Manifest) -> str:
    kinds = [row.kind for row in manifest.rows]
    return _FORMAT_OF[max(sorted(set(kinds)), key=kinds.count)] if asked == "auto" else asked


def _copy_detector(
    manifest: Manifest, bundle: Bundle, options: ReadOptions, seed: int
) -> tuple[CopyDetector, CopyTest]:
    """Compare with everybody the model may have learnt from; the threshold comes from those it did not."""
    known = manifest.split("train")
    rows = (*known.rows, *manifest.split("val").rows)
    held = tuple(row for row in manifest.rows if row.split in ("calibration", "test"))
    owners = {row.case: row.patient for row in rows}
    train = ScanDataset(_part(manifest, rows), bundle.recipe, options=options)
    items = [train[i] for i in range(len(train))]
    _require_several({owners[item["case"]] for item in items})
    detector = CopyDetector(torch.stack([item["x"] for item in items]), [owners[item["case"]] for item in items])
    if not held:
        note("No held-out scan: copies are told with the threshold r = 0.5.")
        return detector, CopyTest(0.5, 0.0, {}, 0, False)
    new = ScanDataset(_part(manifest, held), bundle.recipe, options=options)
    count = min(len(new), 200 if bundle.contract.planar else 40)
    copies = 20 if bundle.contract.planar else 8
    test = detector.calibrate(torch.stack([new[i]["x"] for i in range(count)]), copies=copies, seed=seed)
    if not test.reliable:
        worst = min(test.copies_caught, key=lambda kind: test.copies_caught[kind])
        note(
            f"On these scans copies are told imperfectly: {test.held_out_flagged:.0%} of held-out scans look like "
            f"copies, {test.copies_caught[worst]:.0%} of {worst} copies are caught. Do not rely on the screening alone."
        )
    return detector, test


def _part(manifest: Manifest, rows: Sequence[Row]) -> Manifest:
    return replace(manifest, rows=tuple(rows))


# -- generation ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Source:
    """Where synthetic scans come from.

    Args:
        bundle: what draws them.
        seed: decides everything.
        grid: what of the model's window is written: padding is not.
        masks: to draw scans for, in turn; empty where the model takes none.
    """

    bundle: Bundle
    seed: int
    grid: Grid
    masks: Sequence[Tensor]

    def cells(self, index: int) -> dict[str, str]:
        """The covariates of scan `index`."""
        return drawn_cells(told_of(self.bundle.model.config)["covariates"], derived_seed(self.seed, index))

    def mask(self, index: int) -> Tensor | None:
        """The mask (1, *space) of scan `index`."""
        return self.masks[index % len(self.masks)] if self.masks else None

    def draw(self, index: int, draw: int, label: str) -> Tensor:
        """Values (c, *space) in [0, 1]."""
        model, mask = self.bundle.model, self.mask(index)
        given = {} if mask is None else {"context": mask[None]}
        cond = conditions_for(model.config, [label], [self.cells(index)])
        seed = derived_seed(self.seed, index, draw)
        return cast(Samples, model).sample(1, seed=seed, cond=cond, **given)[0].clamp(0, 1)


def _generate(
    source: _Source,
    wanted: Sequence[tuple[str, str]],
    chosen: str,
    detector: CopyDetector,
    test: CopyTest,
    work: Workspace,
) -> tuple[list[dict[str, Any]], int]:
    """Draw, screen and write every scan not in the journal; a copy is drawn again under the next number."""
    rejected = 0
    with progress("Generating", len(wanted)) as bar:
        for index, (name, label) in enumerate(wanted):
            if f"scan {name}" not in work.done:
                values, draws, ratio = _new_scan(source, index, label, detector, test)
                place = _write(source, values, name, label, chosen, work.folder)
                row = {"case": name, "patient": name, "path": place, "label": label, "draws": draws, "r": ratio}
                if (mask := source.mask(index)) is not None:
                    row["mask"] = _write_mask(source, mask, name, chosen, work.folder)
                work.record(f"scan {name}", row | {"covariates": source.cells(index)})
            rejected += work.done[f"scan {name}"]["draws"] - 1
            bar.advance()
    return [work.done[f"scan {name}"] for name, _ in wanted], rejected


def _new_scan(
    source: _Source, index: int, label: str, detector: CopyDetector, test: CopyTest
) -> tuple[Tensor, int, float]:
    for draw in range(_MOST_DRAWS):
        values = source.draw(index, draw, label)
        ratio = detector.nearest(values)[0]
        if ratio >= test.threshold:
            return values, draw + 1, round(ratio, 4)
    raise PrivacyError(
        f"{_MOST_DRAWS} draws in a row copied training scans: the model has memorised them. Nothing was written. "
        "Train on more scans, or for a shorter time."
    )


def _write_mask(source: _Source, mask: Tensor, name: str, chosen: str, folder: Path) -> str:
    """Write the mask that a scan was drawn for; returns its path relative to `folder`."""
    drawn = source.bundle.contract.physical_scan(mask.numpy().astype(np.uint8), Scale()).onto(source.grid, outside=0)
    target = folder / "masks" / f"{name}{'.png' if chosen == 'png' else '.nii.gz'}"
    target.parent.mkdir(exist_ok=True)
    target.unlink(missing_ok=True)
    io.write(replace(drawn, is_label=True), target)
    return target.relative_to(folder).as_posix()


def _write(source: _Source, values: Tensor, name: str, label: str, chosen: str, folder: Path) -> str:
    """Write one scan into the layout; returns its path relative to `folder`."""
    bundle = source.bundle
    scan = synthetic_scan(bundle, values).onto(source.grid, outside=0)
    place = Path(file_name(label)) if label else Path("images" if chosen in ("nifti", "png") else "")
    (folder / place).mkdir(parents=True, exist_ok=True)
    if chosen == "dicom":
        from medgen.io.dicom.write import Provenance, write_series

        made = Provenance(
            description="Scan generated from noise by a model; shows nobody",
            model=bundle.name,
            weights_sha256=bundle.weights_sha256,
            seed=source.seed,
            content="synthetic",
        )
        target = folder / place / name
        if not target.exists():
            write_series(scan, target, provenance=made, name=name)
        return (place / name).as_posix()
    if chosen == "npz":
        target = folder / "arrays" / f"{name}.nii.gz"
        target.parent.mkdir(exist_ok=True)
        io.write(scan, target)
        return target.relative_to(folder).as_posix()
    suffix = {"nifti": ".nii.gz", "png": ".png"}[chosen]
    target = folder / place / f"{name}{suffix}"
    target.unlink(missing_ok=True)
    io.write(scan, target)
    return target.relative_to(folder).as_posix()


def synthetic_scan(bundle: Bundle, values: Tensor) -> Scan:
    """Generated values (c, *space) as a scan in the training scans' unit, whole numbers where theirs were."""
    scan = bundle.contract.physical_scan(values.cpu().numpy().astype(np.float32))
    if not bundle.contract.integers:
        return scan
    physical = np.round(scan.physical())
    low, high = physical.min(), physical.max()
    kind = next(
        k for k in (np.uint8, np.int16, np.uint16, np.int32) if np.iinfo(k).min <= low and high <= np.iinfo(k).max
    )
    return scan.with_voxels(physical.astype(kind), scale=Scale(unit=bundle.contract.unit))


def _finish_files(written: Sequence[dict[str, Any]], bundle: Bundle, chosen: str, work: Workspace, seed: int) -> None:
    """The manifest, the contact sheet, and the .npz that collects small arrays."""
    shown = [io.read(work.folder / row["path"], _OWN) for row in written[:24]]
    title = f"SYNTHETIC: {len(written)} scans generated by {bundle.name}, seed {seed}"
    contact_sheet(shown, work.folder / "contact_sheet.png", title=title)
    if chosen == "npz":
        written = _as_npz(written, work.folder)
    columns = ["case", "patient", "path", "label", "split", "synthetic", "r"]
    columns += [name for name in ("mask", *written[0]["covariates"]) if name in written[0] | written[0]["covariates"]]
    with (work.folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows({"split": "train", "synthetic": "yes", **row, **row["covariates"]} for row in written)


def _as_npz(written: Sequence[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    import shutil

    from medgen.io.raster import as_pictures, write_npz

    scans = [io.read(folder / row["path"], _OWN) for row in written]
    labels = sorted({row["label"] for row in written})
    ids = np.asarray([[int(row["label"]) if row["label"].isdigit() else labels.index(row["label"])] for row in written])
    (folder / "synthetic.npz").unlink(missing_ok=True)
    write_npz(folder / "synthetic.npz", {"train": as_pictures(scans)}, {"train": ids})
    shutil.rmtree(folder / "arrays")
    return [{**row, "path": f"synthetic.npz#train/{n}"} for n, row in enumerate(written)]


__all__ = ["Augmented", "augment", "synthetic_scan"]
