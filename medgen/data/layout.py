"""What the names of files and folders say: patient, modality, class, mask, channel, official split.

Nothing here opens an image. Conventions understood: flat and nested folders, one folder a class, one
folder a patient, BIDS, nnU-Net, images/ with labels/, masks beside images, train/val/test folders.
"""

import csv
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from statistics import median

from medgen.errors import DataError
from medgen.io.source import Skipped, Source

_MODALITIES = {
    word: name
    for name, words in {
        "T1w": "t1 t1w t1n mprage inplanet1",
        "T1c": "t1c t1ce t1gd t1post t1km",
        "T2w": "t2 t2w inplanet2",
        "FLAIR": "flair t2flair t2f",
        "PDw": "pd pdw",
        "T2starw": "t2star t2starw",
        "SWI": "swi",
        "DWI": "dwi",
        "ADC": "adc",
        "bold": "bold",
        "asl": "asl",
        "MR": "mr mri",
        "CT": "ct cbct",
        "CTA": "cta",
        "PET": "pet",
        "US": "us",
        "DX": "dx cr xray cxr",
        "OCT": "oct",
    }.items()
    for word in words.split()
}
_ENTITY = re.compile("sub|ses|sample|task|acq|ce|trc|rec|dir|run|echo|flip|inv|part|space|res|den|desc|label|hemi")
_MASK = re.compile("masks?|seg|segm|segmentation|dseg|probseg|labels?|labelmap|roi")
# Words that name a finding as often as a drawing of one: only volumes are masks by such a name.
_FINDINGS = {"lesion", "lesions"}
_PLAIN = {"image", "img", "scan", "volume", "vol"}
_IMAGE_FOLDER = re.compile(r"(images?|imgs?|scans?|volumes?)(tr|ts|va?l?)?", re.I)
_MASK_FOLDER = re.compile(
    r"(labels?|masks?|segs?|segmentations?|annotations?|ground_?truths?|gts?)(tr|ts|va?l?)?", re.I
)
_PATIENT_FOLDER = re.compile(r"(sub|subj|subject|pat|patient|participant|case|pt|p|s|id)[-_ ]?\d\w*|sub-\w+", re.I)
_SESSION_FOLDER = re.compile(r"(ses|session|visit|scan)[-_ ]?\w*", re.I)
_ITEM = re.compile(r"(.*)#([0-9a-f]{8}|(?:train|val|test)/\d+)", re.S)
_BIDS_FOLDERS = {"anat", "func", "dwi", "fmap", "perf", "pet", "meg", "eeg", "derivatives", "sourcedata", "rawdata"}
_OWN_FOLDERS = (("bundle",), ("privacy",))
_SECOND_HAND = {"derivatives", "sourcedata", "code"}
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"} | {
    "test": "test",
    "testing": "test",
    "imagestr": "train",
    "imagesval": "val",
    "imagests": "test",
}


@dataclass
class Draft:
    """One scan (or mask) on its way to a row of the table."""

    source: Source
    path: str  # relative to the root, posix
    folders: tuple[str, ...]
    stem: str
    core: str = ""
    modality: str = ""
    entities: dict[str, str] = field(default_factory=dict)
    is_mask: bool = False
    patient: str = ""
    case: str = ""
    label: str = ""
    mask: str = ""
    domain: str = ""
    split: str = ""
    covariates: dict[str, str] = field(default_factory=dict)


def draft(source: Source, root: Path) -> Draft:
    """What one source's own name says."""
    path = relative(source.path, root)
    place, fragment = pieces(path)
    parts = tuple(part for part in place.split("/") if part not in (".", ""))
    is_folder = source.kind == "dicom" and bool(fragment)
    folders, name = (parts, "") if is_folder else (parts[:-1], parts[-1] if parts else "")
    stem = re.sub(r"\.(nii\.gz|[A-Za-z0-9]{1,5})$", "", name, flags=re.I) if source.kind != "dicom" else name
    made = Draft(source, path, folders, stem, label=source.label, split=source.split)
    if source.kind in ("nifti", "itk", "raster"):
        _parse(made)
    made.is_mask |= any(_MASK_FOLDER.fullmatch(folder) for folder in folders) and source.kind != "npz"
    made.patient = _patient(made, root)
    made.domain = made.modality or next((m for f in folders if (m := _MODALITIES.get(f.lower()))), "")
    if source.kind == "dicom":
        made.domain = source.modality
    elif source.kind == "npz":
        made.domain = stem
    made.split = made.split or next((s for f in reversed(folders) if (s := _SPLITS.get(f.lower()))), "")
    return made


def pieces(path: str) -> tuple[str, str]:
    """The file or folder, and the series or item in it that follows '#', '' for none."""
    found = _ITEM.fullmatch(path)
    return (found[1], found[2]) if found else (path, "")


def relative(path: str, root: Path) -> str:
    """A posix path from `root`, or the path as it is where it lies elsewhere."""
    place, fragment = pieces(path)
    inside = Path(place).relative_to(root) if Path(place).is_relative_to(root) else Path(place)
    return inside.as_posix() + (f"#{fragment}" if fragment else "")


def _parse(made: Draft) -> None:
    """Split a stem at its underscores into entities, modality, mask words and the rest."""
    tokens, rest = made.stem.split("_"), []
    volume = made.source.kind != "raster"
    for number, token in enumerate(tokens):
        word, (key, dash, value) = token.lower(), token.partition("-")
        if dash and _ENTITY.fullmatch(key.lower()):
            made.entities[key.lower()] = value
        elif (
            _MASK.fullmatch(word)
            or key.lower() in ("seg", "mask")
            or (word in _FINDINGS and volume and _follows(number, tokens))
        ):
            made.is_mask = True
        elif word in _MODALITIES and len(tokens) + volume > 1:
            made.modality = made.modality or _MODALITIES[word]
        elif word not in _PLAIN:
            rest.append(token)
    front, dash, last = rest[-1].rpartition("-") if rest else ("", "", "")
    if dash and not made.modality and last.lower() in _MODALITIES:
        made.modality, rest[-1] = _MODALITIES[last.lower()], front
    made.core = "_".join(rest)


def _follows(number: int, tokens: Sequence[str]) -> bool:
    return number > 0 or len(tokens) == 1


def _patient(made: Draft, root: Path) -> str:
    """Whose scan it is, '' where neither the file nor a name tells."""
    if made.source.kind in ("dicom", "npz"):
        return made.source.patient
    if "sub" in made.entities:
        return f"sub-{made.entities['sub']}"
    for folder in made.folders:
        if _PATIENT_FOLDER.fullmatch(folder):
            return folder
    if made.modality and re.search(r"\d", made.core):
        return made.core
    if not made.core:
        # Nothing but 'T1' or 'scan': the folder is one patient's.
        return next((folder for folder in reversed(made.folders) if not _generic(folder)), root.name)
    return ""


def _generic(folder: str) -> bool:
    fixed = folder.lower() in _BIDS_FOLDERS or folder.lower() in _MODALITIES or folder.lower() in _SPLITS
    return fixed or any(p.fullmatch(folder) for p in (_IMAGE_FOLDER, _MASK_FOLDER, _SESSION_FOLDER))


# -- many files together ---------------------------------------------------------------------------


def arranged(sources: Iterable[Source], root: Path) -> tuple[list[Draft], list[Skipped]]:
    """Scans with patient, label, mask, domain and official split, and what is no scan of its own."""
    drafts = [draft(source, root) for source in sources]
    # In the table ';' separates the files of one case.
    skipped = [Skipped(one.source.path, "a ';' in its name: rename it") for one in drafts if ";" in one.path]
    drafts = [one for one in drafts if ";" not in one.path]
    if (root / "run.json").is_file() or (root / "manifest.csv").is_file():
        own = [one for one in drafts if one.path == "contact_sheet.png" or one.folders[:1] in _OWN_FOLDERS]
        skipped += [Skipped(one.source.path, "a picture of a report") for one in own]
        drafts = [one for one in drafts if one not in own]
    channels = _channel_names(root)
    drafts = _joined(drafts, channels, skipped)
    scans, masks = [d for d in drafts if not d.is_mask], [d for d in drafts if d.is_mask]
    first_hand = [scan for scan in scans if not set(scan.folders) & _SECOND_HAND]
    if first_hand:
        reason = "derived from other scans here"
        skipped += [Skipped(scan.source.path, reason) for scan in scans if set(scan.folders) & _SECOND_HAND]
        scans = first_hand
    _name_cases(scans)
    _give_masks(scans, masks, skipped)
    _give_classes(scans)
    _give_covariates(scans, root)
    if len({scan.split for scan in scans} - {""}) < 2:
        for scan in scans:
            scan.split = ""
    return scans, skipped


def _channel_names(root: Path) -> list[str] | None:
    """Channels that an nnU-Net dataset.json lists, in order; None without such a file."""
    file = root / "dataset.json"
    if not file.is_file():
        return None
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
        listed = described.get("channel_names") or described.get("modality") or {}
        return [str(listed[key]) for key in sorted(listed, key=int)]
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise DataError(f"{file.name}: expected an nnU-Net description with channel_names; it is damaged.") from error


def _joined(drafts: list[Draft], names: list[str] | None, skipped: list[Skipped]) -> list[Draft]:
    """nnU-Net: case_0000, case_0001, ... below imagesTr or imagesTs become one draft with ';' in its path."""
    kept: list[Draft] = []
    groups: dict[tuple, list[Draft]] = defaultdict(list)
    domain = "+".join(_MODALITIES.get(name.lower(), name) for name in names or [])
    for one in drafts:
        split = re.fullmatch(r"(.+)_(\d{4})", one.stem)
        if one.is_mask or not any(re.fullmatch(r"images(tr|ts|val)", folder, re.I) for folder in one.folders):
            kept.append(one)
            continue
        one.domain = one.domain or domain
        if split and one.source.kind != "dicom":
            groups[one.folders, split[1]].append(one)
        else:
            kept.append(one)
    if any(group[0].stem[-4:] != "0000" for group in groups.values()) and names is None:
        return drafts  # the numbers count cases, not channels
    for (_, stem), group in groups.items():
        expected = [f"{n:04d}" for n in range(len(names) if names else len(group))]
        if [one.stem[-4:] for one in group] != expected:
            found = ", ".join(one.stem[-4:] for one in group)
            skipped.append(Skipped(group[0].source.path, f"channels {', '.join(expected)} expected, found {found}"))
            continue
        first = group[0]
        first.path, first.stem, first.core = ";".join(one.path for one in group), stem, stem
        first.source = replace(first.source, files=tuple(file for one in group for file in one.source.files))
        kept.append(first)
    return kept


def _name_cases(scans: list[Draft]) -> None:
    """A name for each scan, unique, and never a DICOM folder's, which may be somebody's."""
    stems, places = Counter(scan.stem for scan in scans), Counter(scan.folders for scan in scans)
    for scan in scans:
        fragment = pieces(scan.path)[1]
        if scan.source.kind == "dicom":
            scan.case = f"{scan.patient or 'series'}-{fragment or sha256(scan.path.encode()).hexdigest()[:8]}"
        elif scan.source.kind == "npz":
            scan.case = f"{scan.stem}-{fragment.replace('/', '-')}"
        elif stems[scan.stem] == 1 and (scan.core or "sub" in scan.entities):
            scan.case = scan.stem
        else:
            scan.case = "_".join(filter(None, (*(scan.folders or (scan.patient,)), scan.stem)))
        lonely = stems[scan.stem] > 1 and places[scan.folders] == 1 and not re.search(r"\d", scan.stem)
        if lonely and not scan.patient and scan.source.kind != "dicom":
            scan.patient = scan.folders[-1] if scan.folders else ""
    taken = Counter(scan.case for scan in scans)
    for scan in scans:
        if taken[scan.case] > 1:
            scan.case += f"-{sha256(scan.path.encode()).hexdigest()[:8]}"
        scan.patient = scan.patient or scan.case


def _give_masks(scans: list[Draft], masks: list[Draft], skipped: list[Skipped]) -> None:
    """Each mask to the scans it fits best; a scan keeps the first of several."""
    tables = [defaultdict(list) for _ in range(5)]
    for scan in scans:
        for table, key in zip(tables, _mask_keys(scan), strict=True):
            table[key].append(scan)
    matched = []
    for mask in masks:
        if mask.entities.get("desc", "").lower() == "brain" or "brain" in mask.core.lower().split("_")[1:]:
            skipped.append(Skipped(mask.source.path, "a brain mask, not one of findings"))
            continue
        fits = [table.get(key, []) for table, key in zip(tables, _mask_keys(mask), strict=True)]
        if len({scan.patient for scan in fits[-1]}) > 1:
            fits[-1] = []  # a folder of several patients does not tell whose mask it is
        level = next((level for level, scans in enumerate(fits) if scans), None)
        if level is None:
            skipped.append(Skipped(mask.source.path, "a mask that fits no scan here"))
        else:
            matched.append((level, len(mask.core), mask.path, mask.source.path, fits[level]))
    for _, _, path, place, fitting in sorted(matched, key=lambda match: match[:3]):
        free = [scan for scan in fitting if not scan.mask]
        for scan in free:
            scan.mask = path
        if not free:
            skipped.append(Skipped(place, f"another mask of {fitting[0].case}"))


def _mask_keys(one: Draft) -> list[tuple]:
    """Five ways in which a mask and a scan may belong together, the surest first."""
    folder = tuple(name for name in map(_neutral, one.folders) if name)
    space = one.entities.get("space", "").lower()
    space = "" if space in _MODALITIES or space in ("orig", "native", "individual") else space
    session = one.entities.get("ses", "")
    told = one.patient if one.patient != one.case else one.path
    subject = one.entities.get("sub", "")
    own = tuple(sorted((k, v) for k, v in one.entities.items() if k not in ("desc", "label", "space", "res", "den")))
    return [
        (folder, one.core, own, space, one.modality),
        (folder, one.core, subject, session, space),
        # A mask is named like the file or the folder of the DICOM series that it belongs to.
        (folder, one.stem.removesuffix(".dcm") if one.source.kind == "dicom" else one.core if one.is_mask else None),
        (told, session, space),
        (folder, space),
    ]


def _neutral(folder: str) -> str:
    """'imagesTr' and 'labelsTr' both become 'tr'; other names stay."""
    found = _IMAGE_FOLDER.fullmatch(folder) or _MASK_FOLDER.fullmatch(folder)
    return (found[2] or "").lower() if found else folder


def _give_classes(scans: list[Draft]) -> None:
    """Labels from sub-folders, wherever two or more siblings look like classes."""
    below: dict[tuple[str, ...], list[Draft]] = defaultdict(list)
    for scan in scans:
        for depth in range(len(scan.folders) + 1):
            below[scan.folders[:depth]].append(scan)
    for parent, inside in below.items():
        children: dict[str, set[str]] = defaultdict(set)
        for scan in inside:
            children[scan.folders[len(parent)] if len(scan.folders) > len(parent) else ""].add(scan.patient)
        direct = all(len(scan.folders) == len(parent) + 1 for scan in inside)
        shared = sum(map(len, children.values())) > len(set().union(*children.values()))
        several = len(children) > 1 and median(map(len, children.values())) >= 2
        if direct and several and not shared and not any(_generic(c) or _PATIENT_FOLDER.fullmatch(c) for c in children):
            for scan in inside:
                scan.label = scan.label or scan.folders[-1]


def _give_covariates(scans: list[Draft], root: Path) -> None:
    """Columns of participants.tsv, in the root or beside it, for the patients it lists."""
    people = _participants(root)
    sites = {row["site"] for row in people.values() if row.get("site")}
    for scan in scans:
        scan.covariates = dict(people.get(scan.patient, {}))
        if "ses" in scan.entities:
            scan.covariates["session"] = scan.entities["ses"]
        if len(sites) > 1 and scan.covariates.get("site"):
            scan.domain = f"{scan.domain}@{scan.covariates['site']}".lstrip("@")


def _participants(root: Path) -> dict[str, dict[str, str]]:
    file = next((f for f in (root / "participants.tsv", root.parent / "participants.tsv") if f.is_file()), None)
    if file is None:
        return {}
    people = {}
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        for row in csv.DictReader(stream, delimiter="\t"):
            known = {
                _column(k): v.strip() for k, v in row.items() if k and v and v.strip().lower() not in ("n/a", "nan", "")
            }
            name = known.pop("participant_id", "")
            if known.get("sex", "").lower() in ("m", "male", "f", "female"):
                known["sex"] = known["sex"][0].upper()
            people[name if name.startswith("sub-") else f"sub-{name}"] = known
    return people


def _column(name: str) -> str:
    """A covariate's name: sex for gender, and none of the names that the table itself uses."""
    word = name.strip().lower()
    if word in ("sex", "gender"):
        return "sex"
    if word in ("age", "site", "participant_id"):
        return word
    return f"participant_{word}" if word in RESERVED else name.strip()


# Columns of a table of scans that medgen made; what stands from the first of them on is no covariate.
MADE = ("origin", "how", "model", "weights_sha256", "seed", "sources", "parameters")
RESERVED = ("case", "patient", "path", "kind", "label", "mask", "domain", "split", "root")


__all__ = ["MADE", "RESERVED", "Draft", "arranged", "draft", "pieces", "relative"]
