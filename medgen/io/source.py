"""What reading agrees on: how strict to be, and what one found-but-unread scan is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class ReadOptions:
    """How reading treats what is wrong with a file; the default is to refuse, never to guess.

    Args:
        on_gap: uneven or missing slices: 'error', 'fill' (missing slices become unmeasured voxels),
            or 'resample' (onto even spacing).
        on_tilt: sheared slices (gantry tilt): 'error', 'shear' (keep a sheared grid) or 'resample'.
        on_nan: voxels that are not finite: 'error', or 'zero'.
        xform: a NIfTI whose sform and qform disagree: 'error', 'sform' or 'qform'.
        polarity: 'stored' keeps MONOCHROME1 values, 'normalise' turns them so that bright is dense.
        real_world: apply DICOM's Real World Value Mapping instead of the Modality LUT.
        colour: accept RGB as three channels.
        force: accept DICOM without preamble.
        max_voxels: refuse anything larger, before allocating.
    """

    on_gap: Literal["error", "fill", "resample"] = "error"
    on_tilt: Literal["error", "shear", "resample"] = "error"
    on_nan: Literal["error", "zero"] = "error"
    xform: Literal["error", "sform", "qform"] = "error"
    polarity: Literal["stored", "normalise"] = "stored"
    real_world: bool = False
    colour: bool = False
    force: bool = False
    max_voxels: int = 2**31


@dataclass(frozen=True)
class Source:
    """One scan on disk, found but not read.

    Args:
        path: what `medgen.io.read` takes: 'a.nii.gz', 'folder', 'folder#1a2b3c4d' (one of several
            DICOM series in a folder), 'x.npz#train/12'.
        kind: which reader it needs.
        files: every file it is made of, in reading order.
        patient: a pseudonymous key shared by the scans of one patient, '' where the file cannot tell.
        modality: DICOM's two-letter code where the file tells.
        label: class label where the file tells (.npz).
        split: 'train', 'val' or 'test' where the file tells (.npz).
    """

    path: str
    kind: Literal["nifti", "itk", "raster", "npz", "dicom"]
    files: tuple[Path, ...]
    patient: str = ""
    modality: str = ""
    label: str = ""
    split: str = ""


@dataclass(frozen=True)
class Skipped:
    """A file or series that was left out, and why, in a sentence."""

    path: str
    reason: str


@dataclass(frozen=True)
class Found:
    """What a folder holds."""

    sources: tuple[Source, ...]
    skipped: tuple[Skipped, ...]


__all__ = ["Found", "ReadOptions", "Skipped", "Source"]
