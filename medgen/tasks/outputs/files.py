"""Made scans into files, each with its mask on the same voxels, wherever the user's own dataset would have them."""

import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from medgen import io
from medgen.errors import ConfigError, DataError
from medgen.grid import Grid
from medgen.io.nifti import write_nifti
from medgen.scan import Header, Scale, Scan
from medgen.tasks.outputs.bids import bids_places, write_bids, write_sidecars
from medgen.tasks.outputs.layout import Layout
from medgen.tasks.outputs.tables import as_npz, write_dataset_json, write_manifest
from medgen.tasks.ways.base import Made
from medgen.tasks.worklist import own_name

_UNFINISHED = re.compile(r".*\.\d+\.part")
# Names of folders that mean something else than a class.
_TAKEN = re.compile(
    r"(images?|imgs?|scans?|volumes?|labels?|masks?|segs?|segmentations?|annotations?|arrays|bundle|privacy|train|val|test)"
    r"(tr|ts|va?l?)?",
    re.I,
)
_LARGEST = 2**15 - 1
# Parameter of scans that were drawn around the outlines of a patient's findings.
_OUTLINE = "shape of"


@dataclass(frozen=True)
class Facts:
    """What holds for all scans of a run.

    Args:
        model: name of the model, '' where none took part.
        weights_sha256: hash of its weights, '' likewise.
        seed: of the run.
        name: of the dataset that is written.
    """

    model: str = ""
    weights_sha256: str = ""
    seed: int = 0
    name: str = "Synthetic scans"


class Output:
    """A folder that made scans are written into, one after another.

    Args:
        folder: of the unfinished output.
        layout: how the dataset is built.
        facts: what holds for all scans.
    """

    def __init__(self, folder: Path, layout: Layout, facts: Facts) -> None:
        self.folder, self.layout, self.facts = folder, layout, facts
        self._swept = False
        self._as_read: tuple[tuple[Grid, str, int], Grid] | None = None

    def write(self, name: str, made: Made) -> dict[str, Any]:
        """Write a scan and its mask; what an interrupted run has left of them is replaced.

        Args:
            name: of the case, such as 'SYN-0001', unique in the folder.
            made: what to write.

        Returns:
            its row of the table, as plain values.

        Raises:
            DataError: its mask lies elsewhere or is no label map, its values are not finite, or its channels and
                labels are not those of the dataset.
            ConfigError: it has a mask, and .npz no place for one.
            OutputError: the format cannot hold it, or the disk is full.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*", name):
            raise ConfigError(f"A case is named by letters, digits and hyphens; found {name!r}.")
        self._sweep()
        scan = _sound(made, name, self.layout.format)
        mask = self._mask_of(scan, made, name)
        sources = [_pseudonym(one, "C") for one in made.sources]
        patient = _pseudonym(made.patient or ";".join(made.sources), "P") if made.origin == "derived" else name
        stem, label_stem = self._places(name, made, patient)
        paths = self._write_scan(scan, stem, made, patient)
        row: dict[str, Any] = {
            "case": name, "patient": patient, "path": ";".join(paths), "kind": self._kind(), "label": made.label,
            "mask": "", "domain": self.layout.domain, "covariates": dict(made.covariates), "origin": made.origin,
            "how": made.how, "model": "" if made.how == "classic" else self.facts.model,
            "weights_sha256": "" if made.how == "classic" else self.facts.weights_sha256, "seed": self.facts.seed,
            "sources": sources, "parameters": dict(made.parameters),
        }  # fmt: skip
        if mask is not None:
            row["mask"] = self._write_mask(mask, made, label_stem, paths[0])
        if self.layout.kind == "bids":
            row["patient"] = stem.partition("/")[0]
            write_sidecars(self.folder, row, self.layout)
        return row

    def finish(self, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Write what describes all scans; may be called again after an interruption.

        Args:
            rows: of `write`, in the order of the table. 'scores', a mapping of numbers, becomes columns.

        Returns:
            the rows with the paths that they have now: those of an .npz are items of it.

        Raises:
            DataError: the scans of an .npz are of several shapes.
            OutputError: the disk is full.
        """
        done = [dict(row) for row in rows]
        if self.layout.kind == "npz":
            done = as_npz(done, self.folder)
        if self.layout.kind == "nnunet":
            write_dataset_json(done, self.folder, self.layout, self.facts.name)
        if self.layout.kind == "bids":
            write_bids(done, self.folder, self.facts.name)
        write_manifest(done, self.folder)
        if self.layout.kind == "npz":
            shutil.rmtree(self.folder / "arrays", ignore_errors=True)
        return done

    # -- places --------------------------------------------------------------------------------------------

    def _kind(self) -> str:
        return {"nifti": "nifti", "png": "raster", "dicom": "dicom", "npz": "npz"}[self.layout.format]

    def _places(self, name: str, made: Made, patient: str) -> tuple[str, str]:
        """Where the scan and its mask go, without endings."""
        inside = f"{class_folder(made.label)}/" if made.label else ""
        match self.layout.kind:
            case "nnunet":
                return f"imagesTr/{name}", f"labelsTr/{name}"
            case "bids":
                return bids_places(name, patient, made, self.layout.mask)
            case "npz":
                return f"arrays/{name}", ""
            case "classes" if inside:
                return f"{inside}{name}", f"masks/{inside}{name}"
            case _:
                return f"images/{inside}{name}", f"labels/{inside}{name}"

    def _files(self, scan: Scan, stem: str) -> list[str]:
        """The file of each channel, or of all of them, without endings."""
        layout = self.layout
        png = layout.format == "png"
        colour = png and scan.channels == 3
        if layout.kind == "nnunet":
            count = 1 if colour else scan.channels
            if not colour and count != (len(layout.channels) or 1):
                told = ", ".join(layout.channels) or "one"
                raise DataError(
                    f"{stem}: expected the channels of dataset.json ({told}); found {scan.channels}. "
                    "Use a model of this dataset."
                )
            return [f"{stem}_{number:04d}" for number in range(count)]
        if layout.kind == "bids":
            named = scan.header.channels if len(scan.header.channels) == scan.channels > 1 else layout.suffixes
            if len(named) != scan.channels:
                raise DataError(f"{stem}: expected a channel for each of {', '.join(named)}; found {scan.channels}.")
            return [f"{stem}_{suffix}" for suffix in named]
        if scan.channels > 1 and not colour and layout.format in ("nifti", "png") and (layout.apart or png):
            return [f"{stem}_{number:04d}" for number in range(scan.channels)]
        return [stem]

    def _sweep(self) -> None:
        """Remove, once, what a run that was killed left unfinished."""
        if self._swept:
            return
        self._swept = True
        for parent, folders, names in os.walk(self.folder):
            for left in [one for one in folders if _UNFINISHED.fullmatch(one)]:
                shutil.rmtree(Path(parent, left))
                folders.remove(left)
            for left in (one for one in names if _UNFINISHED.fullmatch(one)):
                Path(parent, left).unlink()

    # -- scans ---------------------------------------------------------------------------------------------

    def _write_scan(self, scan: Scan, stem: str, made: Made, patient: str) -> list[str]:
        """Write the voxels; returns paths relative to the folder."""
        if self.layout.format == "dicom":
            return self._write_series(scan, stem, made, patient)
        if self.layout.format == "npz":
            scan = _as_picture(scan, stem)
        ending = {"npz": ".nii"}.get(self.layout.format, self.layout.ending)
        files = self._files(scan, stem)
        paths = []
        for number, file in enumerate(files):
            one = scan if len(files) == 1 else scan.channel(number)
            target = _free(self.folder / f"{file}{ending}")
            if self.layout.format == "png":
                io.write(one, target)
            else:
                write_nifti(one, target, description=_description(scan, made))
            paths.append(target.relative_to(self.folder).as_posix())
        return paths

    def _write_series(self, scan: Scan, stem: str, made: Made, patient: str) -> list[str]:
        from medgen.io.dicom.write import Provenance, write_series

        derived = made.origin == "derived"
        said = f"Scan made of a patient's scan ({made.how})" if derived else "Scan generated from noise by a model"
        network = made.how != "classic"
        told = Provenance(
            description=f"{said}; shows {'that patient' if derived else 'nobody'}",
            model=self.facts.model if network else "",
            weights_sha256=self.facts.weights_sha256 if network else "",
            seed=self.facts.seed,
            content="derived" if derived else "synthetic",
            synthetic_data=network,
        )
        target, single = _free(self.folder / stem), _free(self.folder / f"{stem}.dcm")
        written = write_series(scan, target, provenance=told, name=patient)
        if len(written) == 1:
            # An image of one file is named by it, as X-rays usually are.
            written[0].replace(single)
            target.rmdir()
            return [f"{stem}.dcm"]
        parts = sorted({file.parent for file in written}, key=lambda one: (len(one.name), one.name))
        return [part.relative_to(self.folder).as_posix() for part in parts]

    # -- masks ---------------------------------------------------------------------------------------------

    def _mask_of(self, scan: Scan, made: Made, name: str) -> Scan | None:
        """The mask as it is written, exactly on the scan's voxels."""
        if made.mask is None:
            if self.layout.kind == "nnunet":
                raise DataError(f"{name}: nnU-Net trains on scans with masks; this one has none. Learn with masks.")
            return None
        if self.layout.format == "npz":
            raise ConfigError("Scans with masks need a place for the masks, which .npz has not. Use --format nifti.")
        if not made.mask.grid.close(scan.grid, millimetres=1e-3 * max(1.0, *scan.grid.spacing)):
            raise DataError(
                f"{name}: a mask lies on its scan's grid; found a mask of {made.mask.grid.shape} voxels for a scan of "
                f"{scan.grid.shape}, or elsewhere in space. Nothing of it was written."
            )
        labels = _whole(made.mask, name)
        known = {0} | {n for value in self.layout.labels.values() for n in np.atleast_1d(value).tolist()}
        if self.layout.kind == "nnunet" and (strange := set(_present(labels)) - known):
            raise DataError(f"{name}: its mask holds the label {min(strange)}, which dataset.json does not name.")
        drawn = scan.header.synthetic and _OUTLINE not in made.parameters
        header = Header(space=scan.header.space, synthetic=drawn)
        return Scan(labels, scan.grid, Scale(), header, is_label=True)

    def _write_mask(self, mask: Scan, made: Made, stem: str, beside: str) -> str:
        if self.layout.format == "dicom":
            mask = self._on_series(mask, made.scan, beside)
        ending = ".png" if self.layout.format == "png" else self.layout.ending or ".nii.gz"
        target = _free(self.folder / f"{stem}{ending}")
        if self.layout.format == "png":
            io.write(mask, target)
        else:
            write_nifti(mask, target, description=_description(mask, made))
        return target.relative_to(self.folder).as_posix()

    def _on_series(self, mask: Scan, scan: Scan, series: str) -> Scan:
        """The mask on the voxels that a reader of the series gets, whose axes may run otherwise."""
        from medgen.io.dicom.place import laid_out

        key = (scan.grid, scan.header.modality, scan.header.space)
        if self._as_read is None or self._as_read[0] != key:
            self._as_read = (key, io.header(self.folder / series, io.ReadOptions(colour=True))[0])
        grid = self._as_read[1]
        if _same_box(mask.grid, grid):
            return mask.onto(grid, outside=0)
        # A picture without a place in space keeps its rows and columns.
        laid = laid_out(mask, None)
        if laid.grid.shape != grid.shape:
            raise DataError(f"{series}: its mask has {laid.grid.shape} voxels, the series {grid.shape}.")
        return replace(laid, grid=grid)


def class_folder(label: str) -> str:
    """The folder of a class: its name, where every system can have such a folder.

    >>> class_folder("Healthy control"), class_folder("../up").startswith(".")
    ('Healthy control', False)
    """
    if _TAKEN.fullmatch(label):
        return f"class-{label}"
    plain = re.fullmatch(r"[^\W_][^\x00-\x1f<>:\"/\\|?*;#]{0,98}", label) and label[-1] not in ". "
    return label if plain and not label.endswith(".part") else own_name(label)


def _pseudonym(name: str, letter: str) -> str:
    """The name where it is a pseudonym; else one, as it may be somebody's."""
    told = re.fullmatch(rf"{letter}-[0-9a-f]{{12}}", name)
    return name if told else f"{letter}-{sha256(name.encode()).hexdigest()[:12]}"


def _description(scan: Scan, made: Made) -> str:
    """What a NIfTI header says of a scan; '' leaves it to the writer."""
    if scan.is_label and _OUTLINE in made.parameters:
        return "A patient's outlines; the scan around them is synthetic"
    if made.origin == "synthetic":
        return ""
    return f"SYNTHETIC: made of a patient's scan ({made.how})" if scan.header.synthetic else "A patient's scan, changed"


def _sound(made: Made, name: str, format: str) -> Scan:
    """The scan as it is written: finite, and marked where it shows nobody."""
    scan = made.scan
    if scan.voxels.dtype.kind == "f" and not np.isfinite(scan.voxels).all():
        raise DataError(f"{name}: expected finite values; found NaN or infinity. Nothing of it was written.")
    if scan.valid is not None and (format != "dicom" or scan.valid.all()):
        # What nobody measured keeps the number it has: a NaN would be refused by whoever trains on it.
        scan = replace(scan, valid=None)
    return scan.with_header(synthetic=True) if made.origin == "synthetic" else scan


def _whole(mask: Scan, name: str) -> Integer[np.ndarray, "1 i j k"]:
    """Labels in the smallest type that holds them."""
    plain = mask.voxels.dtype.kind in "bui" and (mask.scale.slope, mask.scale.intercept) == (1, 0)
    values = mask.voxels if plain else np.rint(mask.physical())
    low, high = values.min(), values.max()
    if mask.channels != 1 or not (plain or np.array_equal(values, mask.physical())) or not 0 <= low <= high <= _LARGEST:
        raise DataError(f"{name}: a mask holds one label a voxel, whole numbers from 0 to {_LARGEST}; found others.")
    return values.astype(np.uint8 if high < 256 else np.int16)


def _present(labels: Integer[np.ndarray, "1 i j k"]) -> Sequence[int]:
    return np.flatnonzero(np.bincount(labels.ravel(order="K"))).tolist()


def _as_picture(scan: Scan, stem: str) -> Scan:
    """The scan as an .npz holds it: physical values, which are all that it holds."""
    if scan.channels != 1 and not (scan.is_planar and scan.channels == 3):
        raise ConfigError(f"{Path(stem).name}: an .npz holds one channel, or a colour picture; found {scan.channels}.")
    plain = (scan.scale.slope, scan.scale.intercept) == (1, 0)
    return scan if plain else scan.with_voxels(scan.physical(), scale=Scale(unit=scan.scale.unit))


def _same_box(one: Grid, other: Grid) -> bool:
    """Whether two grids have the same corners, in whatever order."""
    apart = np.linalg.norm(one.corners()[:, None] - other.corners()[None], axis=2)
    return bool(max(apart.min(0).max(), apart.min(1).max()) < 1e-2 * min(one.spacing))


def _free(target: Path) -> Path:
    """The path, with nothing in its place, in a folder that exists."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)
    return target


__all__ = ["Facts", "Output", "class_folder"]
