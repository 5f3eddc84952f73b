"""How the user's own dataset is built, so that what is made can be built alike."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from medgen import io
from medgen.data.manifest import Manifest
from medgen.errors import ConfigError, DataError
from medgen.io.source import ReadOptions

Kind = Literal["flat", "classes", "images+labels", "nnunet", "bids", "table", "npz"]
Format = Literal["nifti", "dicom", "png", "npz"]
_FORMATS: dict[str, Format] = {"nifti": "nifti", "itk": "nifti", "dicom": "dicom", "raster": "png", "npz": "npz"}
# What BIDS calls anatomical images that need no more said of them than that.
_ANATOMY = {
    "T1w",
    "T2w",
    "PDw",
    "T2starw",
    "FLAIR",
    "inplaneT1",
    "inplaneT2",
    "PDT2",
    "angio",
    "T1map",
    "T2map",
    "UNIT1",
}
# What the description of a dataset says that is not about the dataset as a whole, or that is written anew.
_ANEW = {"name", "channel_names", "modality", "labels", "numTraining", "numTest", "file_ending"}


@dataclass(frozen=True)
class Layout:
    """How a dataset is built.

    Args:
        kind: scans in one folder, in a folder a class, images beside labels, nnU-Net's or BIDS's folders, listed in a
            table, or all in one .npz.
        format: of the files.
        channels: names of channels, as nnU-Net's dataset.json has them.
        labels: nnU-Net's names of labels, each one number, or the numbers of a region.
        suffixes: BIDS's names of what was measured, one a channel, such as 'T1w'.
        mask: what a mask is called in BIDS: 'dseg' or 'label-lesion_mask'.
        stripped: BIDS says of the scans that nothing but brain is left of them.
        ending: of scan files.
        apart: each channel has a file of its own.
        domain: of all scans, '' where there are several.
        extra: what else nnU-Net's dataset.json says of the dataset.

    Raises:
        ConfigError: the format does not go with the kind.
    """

    kind: Kind
    format: Format
    channels: tuple[str, ...] = ()
    labels: Mapping[str, Any] = field(default_factory=dict)
    suffixes: tuple[str, ...] = ()
    mask: str = "dseg"
    stripped: bool = False
    ending: str = ".nii.gz"
    apart: bool = False
    domain: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.kind == "npz") != (self.format == "npz"):
            raise ConfigError(f"A {self.kind} dataset does not hold {self.format} files. Use another --format.")
        if (self.kind, self.format) in (("nnunet", "dicom"), ("bids", "dicom"), ("bids", "png")):
            raise ConfigError(f"A {self.kind} dataset holds NIfTI files, not {self.format}. Use --format nifti.")


def layout_of(
    data: str | Path,
    manifest: Manifest,
    format: Literal["auto", "nifti", "dicom", "png", "npz"] = "auto",
    *,
    masked: bool | None = None,
) -> Layout:
    """How a dataset is built, and the nearest to it that files of another format can be.

    nnU-Net's and BIDS's folders hold NIfTI; other formats go into a folder a class. A dataset without masks is none
    for nnU-Net, and .npz has no place for masks.

    Args:
        data: as the user gave it.
        manifest: what was found in it.
        format: 'auto', as it is, or another.
        masked: whether each scan that will be written has a mask; None: as those there are.

    Raises:
        ConfigError: masks are to go into an .npz, or volumes into PNGs.
        DataError: nnU-Net's dataset.json is damaged.
    """
    own = _own(data, manifest)
    if masked is False and own.kind == "nnunet":
        own = Layout(_plain_kind(manifest), own.format, own.channels, ending=own.ending, domain=own.domain)
    if format not in ("auto", own.format):
        kind = "npz" if format == "npz" else own.kind
        if own.kind in ("nnunet", "bids", "npz") and format != "npz":
            kind = _plain_kind(manifest)
        own = Layout(kind, format, own.channels, suffixes=own.suffixes, apart=own.apart, domain=own.domain)
        if format == "png":
            _require_pictures(manifest)
    if own.format == "npz" and masked:
        raise ConfigError("Scans with masks need a place for the masks, which .npz has not. Use --format nifti.")
    return own if own.kind == "nnunet" else replace(own, ending=_ending(own.format))


def _require_pictures(manifest: Manifest) -> None:
    """Tell early, by the first scan, that volumes do not fit a PNG."""
    grid = io.header(manifest.locate(manifest.rows[0].path), ReadOptions(colour=True))[0]
    if grid.shape[2] > 1:
        raise ConfigError(f"A PNG holds a picture; these are volumes of {grid.shape[2]} slices. Use --format nifti.")


def _ending(format: Format) -> str:
    return {"nifti": ".nii.gz", "png": ".png", "npz": ".npz", "dicom": ""}[format]


def _plain_kind(manifest: Manifest) -> Kind:
    masks = any(row.mask for row in manifest.rows)
    return "classes" if manifest.labels else "images+labels" if masks else "flat"


def _own(data: str | Path, manifest: Manifest) -> Layout:
    """How the dataset itself is built."""
    format = _FORMATS[_most(row.kind for row in manifest.rows)]
    domain = manifest.domains[0] if len(manifest.domains) == 1 else ""
    apart = any(";" in row.path for row in manifest.rows)
    if format == "npz":
        return Layout("npz", "npz", domain=domain)
    if Path(data).suffix.lower() in (".csv", ".tsv"):
        return Layout("table", format, apart=apart, domain=domain)
    paths = [PurePosixPath(row.path.split(";")[0]) for row in manifest.rows]
    inside = sum(bool(re.fullmatch(r"images(tr|ts|val)", path.parent.name, re.I)) for path in paths)
    described = manifest.root / "dataset.json"
    if format != "dicom" and described.is_file() and 2 * inside > len(paths):
        return _nnunet(described, format, domain)
    if format == "nifti" and (bids := _bids(manifest, paths)) is not None:
        return bids
    kind = _plain_kind(manifest)
    if any(row.mask for row in manifest.rows) and any("images" in path.parts[:-1] for path in paths):
        kind = "images+labels"
    return Layout(kind, format, apart=apart, domain=domain)


def _most(words: Iterable[str]) -> str:
    counts = Counter(words)
    return max(sorted(counts), key=lambda word: counts[word])


# -- nnU-Net -------------------------------------------------------------------------------------------------


def _nnunet(file: Path, format: Format, domain: str) -> Layout:
    """What nnU-Net's description says; that of the Medical Segmentation Decathlon is older and told the same way."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        listed = told.get("channel_names") or told.get("modality") or {"0": "image"}
        channels = tuple(str(listed[key]) for key in sorted(listed, key=int))
        labels = _labels(told.get("labels") or {})
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise DataError(f"{file.name}: expected an nnU-Net description with channel_names; it is damaged.") from error
    extra = {key: value for key, value in told.items() if key not in _ANEW and _harmless(value)}
    order = told.get("regions_class_order")
    if isinstance(order, list) and all(isinstance(number, int) for number in order):
        extra["regions_class_order"] = order
    ending = ".png" if format == "png" else ".nii" if told.get("file_ending") == ".nii" else ".nii.gz"
    return Layout("nnunet", format, channels, labels, ending=ending, apart=True, domain=domain, extra=extra)


def _labels(told: Mapping[str, Any]) -> dict[str, Any]:
    """Names of labels and their numbers, background first; older files have it the other way round."""
    if told and all(key.isdecimal() for key in told):
        told = {str(name): int(number) for number, name in told.items()}
    found = {
        str(name): [int(n) for n in value] if isinstance(value, list) else int(value) for name, value in told.items()
    }
    rest = {name: value for name, value in found.items() if value != 0}
    return {"background": 0, **rest}


def _harmless(value: object) -> bool:
    """Whether a fact about a dataset is one word, number or sentence, and no place in somebody's files."""
    if isinstance(value, str):
        return not re.match(r"[./~\\]|[A-Za-z]:[\\/]", value) and "\\" not in value
    return isinstance(value, (bool, int, float))


# -- BIDS ----------------------------------------------------------------------------------------------------


def _bids(manifest: Manifest, paths: list[PurePosixPath]) -> Layout | None:
    """BIDS, where the scans are anatomical images of subjects."""
    named = [
        path for path in paths if path.name.startswith("sub-") and any(p.startswith("sub-") for p in path.parts[:-1])
    ]
    if 2 * len(named) <= len(paths):
        return None
    suffixes = []
    for row in manifest.rows:
        files = [PurePosixPath(part).name.split(".")[0].rpartition("_")[2] for part in row.path.split(";")]
        suffixes.append(" ".join(files))
    names = tuple(_most(suffixes).split())
    if not names or set(names) - _ANATOMY or len(set(names)) < len(names):
        return None
    masks = [row.mask.split(".")[0].rpartition("_")[2] for row in manifest.rows if row.mask]
    mask = "label-lesion_mask" if masks and _most(masks) in ("mask", "roi") else "dseg"
    domain = manifest.domains[0] if len(manifest.domains) == 1 else ""
    stripped = any(_stripped(manifest.root / path) for path in paths[:20])
    return Layout("bids", "nifti", (), {}, names, mask, stripped, apart=len(names) > 1, domain=domain)


def _stripped(scan: Path) -> bool:
    """Whether the sidecar of a scan says that it shows the brain alone."""
    sidecar = scan.with_name(f"{scan.name.split('.')[0]}.json")
    try:
        told = json.loads(sidecar.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(told, dict) and told.get("SkullStripped") is True


__all__ = ["Format", "Kind", "Layout", "layout_of"]
