"""The table of a dataset: which scans there are, whose, of what, and which split each patient is in.

The saved CSV is the record. A patient in it never moves; new patients are added around it.
"""

import csv
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from os.path import relpath
from pathlib import Path

from medgen.data.copies import leaders
from medgen.data.layout import Draft, arranged, pieces
from medgen.data.splits import QUOTAS, SPLITS, assigned
from medgen.data.tables import covariates, drafts_of_table, read_table
from medgen.errors import DataError, LeakageError
from medgen.io import find
from medgen.io.source import ReadOptions, Skipped

_COLUMNS = ("case", "patient", "path", "kind", "label", "mask", "domain", "split")
_KINDS = ("nifti", "itk", "raster", "npz", "dicom")


@dataclass(frozen=True)
class Row:
    """One scan.

    Args:
        case: its name, unique in the table.
        patient: whose it is; equal to `case` where nothing tells.
        path: what `medgen.io.read` takes, relative to the root where it lies inside; several files that are the
            channels of one case are joined by ';'.
        kind: which reader it needs.
        label: class, '' where there is none.
        mask: path of the mask of findings, '' where there is none.
        domain: modality, protocol or site.
        covariates: anything else that is known, such as age and sex.
        split: 'train', 'val', 'calibration', 'test' or ''.
    """

    case: str
    patient: str
    path: str
    kind: str
    label: str = ""
    mask: str = ""
    domain: str = ""
    covariates: Mapping[str, str] = field(default_factory=dict)
    split: str = ""

    def __post_init__(self) -> None:
        if not (self.case and self.patient and self.path):
            raise DataError(
                f"Each scan needs a case, a patient and a path; one is missing for {self.case or self.path}."
            )
        if self.split not in ("", *SPLITS):
            raise DataError(f"{self.case}: a split is one of {', '.join(SPLITS)}, or empty; found {self.split!r}.")
        if self.kind not in _KINDS:
            raise DataError(f"{self.case}: a kind is one of {', '.join(_KINDS)}; found {self.kind!r}.")


@dataclass(frozen=True)
class Manifest:
    """A dataset as a table; immutable.

    Args:
        rows: the scans.
        skipped: what was found and left out, and why.
        root: the folder that relative paths start from.

    Raises:
        DataError: two rows have one case name.
        LeakageError: a patient is in two splits.

    >>> table = Manifest((Row("a", "p", "a.nii.gz", "nifti", split="train"),), (), Path("data"))
    >>> table.split("train").patients
    ('p',)
    """

    rows: tuple[Row, ...]
    skipped: tuple[Skipped, ...]
    root: Path

    def __post_init__(self) -> None:
        if double := [case for case, times in Counter(row.case for row in self.rows).items() if times > 1]:
            raise DataError(f"Each case name stands for one scan; {double[0]} appears more than once.")
        first: dict[str, Row] = {}
        for row in self.rows:
            other = first.setdefault(row.patient, row)
            if other.split != row.split:
                raise LeakageError(
                    f"{other.case} ({other.split or 'no split'}) and {row.case} ({row.split or 'no split'}) are of one "
                    "patient. Give all scans of a patient the same split."
                )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def patients(self) -> tuple[str, ...]:
        """Everybody, sorted."""
        return tuple(sorted({row.patient for row in self.rows}))

    @property
    def labels(self) -> tuple[str, ...]:
        """Classes there are, sorted, without the empty one."""
        return tuple(sorted({row.label for row in self.rows} - {""}))

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains there are, sorted, without the empty one."""
        return tuple(sorted({row.domain for row in self.rows} - {""}))

    def split(self, name: str) -> "Manifest":
        """The part of one split."""
        return self.where(split=name)

    def where(self, *, label: str | None = None, split: str | None = None, domain: str | None = None) -> "Manifest":
        """The rows that agree with everything given."""
        wanted = {"label": label, "split": split, "domain": domain}
        rows = (row for row in self.rows if all(v is None or getattr(row, k) == v for k, v in wanted.items()))
        return replace(self, rows=tuple(rows))

    def of_domain(self, name: str) -> "Manifest":
        """The rows of a domain; where none is called 'T1w+T2w', those that two domains of these names join to.

        Raises:
            DataError: there is no such domain, or no patient has a scan of each.
        """
        if name in self.domains:
            return self.where(domain=name)
        parts = name.split("+")
        if len(parts) == 1 or not set(parts) <= set(self.domains):
            names = ", ".join(self.domains) or "none"
            raise DataError(f"There is no domain {name!r}. Domains: {names}; 'A+B' joins two of them as channels.")
        return self.joined(parts)

    def joined(self, names: Sequence[str]) -> "Manifest":
        """A row for each patient and session, whose channels are one scan of each of these domains, in their order.

        The mask is that of the first channel that has one. Who lacks a domain is left out and named, and so are all but
        the first scan of a domain.

        Raises:
            DataError: a domain is named twice, or no patient has a scan of each.
        """
        if len(set(names)) < len(names):
            raise DataError(f"Each domain makes one channel; {'+'.join(names)} names one twice.")
        visits: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
        for row in sorted(self.rows, key=lambda row: row.path):
            if row.domain in names:
                visits[_visit(row)][row.domain].append(row)
        rows, skipped = [], []
        for visit, found in sorted(visits.items()):
            if lacking := [name for name in names if name not in found]:
                skipped.append(Skipped(visit, f"no {' and no '.join(lacking)} to join"))
                continue
            rows.append(_as_channels(visit, [found[name][0] for name in names]))
            more = [row for name in names for row in found[name][1:]]
            skipped += [Skipped(row.case, f"one {row.domain} of this session is joined already") for row in more]
        if not rows:
            raise DataError(
                f"No patient has a scan of each of {', '.join(names)}. Scans of one patient are known by sub-NAME in "
                "their names, by a folder a patient, or by a column 'patient' in a CSV."
            )
        return replace(self, rows=tuple(rows), skipped=(*self.skipped, *skipped))

    def locate(self, path: str) -> str:
        """The full path of a row's `path` or `mask`, as `medgen.io.read` takes it."""
        return ";".join(str(self.root / part) for part in path.split(";"))

    def hash(self) -> str:
        """sha256 of the rows in any order; the root does not matter, so a moved dataset keeps its hash."""
        rows = sorted(json.dumps(_cells(row), sort_keys=True) for row in self.rows)
        return sha256("\n".join(rows).encode()).hexdigest()

    def summary(self) -> str:
        """What there is, for people: scans and patients by domain, class and split, and what was left out."""
        own = sum(row.patient == row.case and not row.patient.startswith("sub-") for row in self.rows)
        lines = [f"{len(self.rows)} scans of {len(self.patients)} patients in {self.root.name or self.root}"]
        if own:
            lines.append(f"  nothing tells whose {own} of them are: each of these files counts as its own patient")
        groups = sorted({(row.domain, row.label) for row in self.rows})
        for domain, label in groups:
            here = self.where(domain=domain, label=label)
            counts = {name: len(here.split(name).patients) for name in (*SPLITS, "")}
            shares = ", ".join(f"{name or 'no split'} {count}" for name, count in counts.items() if count)
            named = ", ".join(part for part in (domain, label) if part) or "all"
            lines.append(f"  {named}: {len(here)} scans; patients: {shares}")
        if masks := sum(bool(row.mask) for row in self.rows):
            lines.append(f"  {masks} scans have a mask")
        reasons = Counter(skip.reason for skip in self.skipped)
        lines += [f"  left out: {count} x {reason}" for reason, count in reasons.most_common(6)]
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write the CSV, at once or not at all; it names the root relative to itself."""
        from medgen.io.atomic import replacing

        path = Path(path)
        extra = sorted({name for row in self.rows for name in row.covariates})
        root = _way(self.root, path.parent)
        with replacing(path, force=True) as part, part.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, [*_COLUMNS, *extra, "root"], lineterminator="\n", restval="")
            writer.writeheader()
            writer.writerows({**_cells(row), "root": root} for row in self.rows)

    @classmethod
    def load(cls, path: str | Path) -> "Manifest":
        """Read what `save` wrote; files are not looked for.

        Raises:
            DataError: no such file, or not such a table.
            LeakageError: a patient is in two splits.
        """
        root, lines = read_table(Path(path))
        if missing := set(_COLUMNS) - set(lines[0] if lines else _COLUMNS):
            raise DataError(f"{Path(path).name}: expected a saved manifest; it lacks {', '.join(sorted(missing))}.")
        rows = [Row(**{k: line[k] for k in _COLUMNS}, covariates=covariates(line)) for line in lines]
        return cls(tuple(rows), (), root)


def index(
    path: str | Path,
    options: ReadOptions = ReadOptions(),
    *,
    quotas: Mapping[str, float] = QUOTAS,
    seed: int = 0,
    known: Manifest | None = None,
) -> Manifest:
    """The table of a folder, a file, or a CSV with a column `path`.

    Patients, ordered by sha256(seed, patient), fill the quotas of every class and domain. Of fewer than
    four patients the first goes to train, the second to calibration, the third to test; a class that
    small beside larger ones goes to test, calibration, train. Scans with identical files count as one
    patient's, and move together. Official train/val/test parts (.npz, folders) are kept: 'val' becomes
    calibration and a tenth of the training patients val, so that nothing held out has been trained on.

    Args:
        path: a folder (flat, nested, DICOM, classes, BIDS, nnU-Net, images/ with labels/), one scan,
            an .npz, or a CSV with columns path[, case, patient, label, mask, domain, split, ...]; all
            other columns are covariates.
        options: how strict reading is.
        quotas: share of each split.
        seed: another number, another draw.
        known: an earlier manifest of this data, whose patients keep their splits.

    Raises:
        DataError: nothing there, or no scans among it.
        LeakageError: splits that are given put one patient, or copies of one file, in two places.
        ConfigError: quotas make no sense.
    """
    path = Path(path)
    if path.is_file() and path.suffix.lower() in (".csv", ".tsv"):
        root, drafts, skipped = drafts_of_table(path, options)
        _one_part(drafts, "but the table separates them. Give all scans of a patient the same split.")
        given, official = {one.patient: one.split for one in drafts if one.split}, {}
    else:
        found = find(path, options)
        if not found.sources:
            raise DataError(_nothing(path, found.skipped))
        base, _ = pieces(str(path))
        root = Path(base) if Path(base).is_dir() else Path(base).parent
        drafts, left_out = arranged(found.sources, root)
        skipped = (*found.skipped, *left_out)
        if not drafts:
            raise DataError(f"{path.name}: {len(found.sources)} masks, but no scan they belong to.")
        given, official = {}, {one.patient: one.split for one in drafts if one.split}
        _one_part(drafts, "but the dataset's own parts separate them. Move all scans of a patient into one part.")
    if known:
        given = {row.patient: row.split for row in known.rows if row.split} | given
    splits = _placed(drafts, given, official, options, quotas=quotas, seed=seed)
    return Manifest(tuple(_rows(drafts, splits)), tuple(skipped), root)


def _nothing(path: Path, skipped: Iterable[Skipped]) -> str:
    endings = Counter(Path(skip.path).suffix.lower() or "no ending" for skip in skipped)
    seen = ", ".join(f"{count} x {ending}" for ending, count in endings.most_common(5)) or "no files at all"
    reasons = Counter(skip.reason for skip in skipped if skip.reason != "not a scan")
    why = f" ({reasons.most_common(1)[0][0]})" if reasons else ""
    return (
        f"{path.name or path}: no scan found. Looked for NIfTI, NRRD/MetaImage, PNG/JPEG/TIFF, .npz and DICOM "
        f"(by content); found {seen}{why}."
    )


def _one_part(drafts: Iterable[Draft], what_to_do: str) -> None:
    """Refuse given splits that separate the scans of one patient."""
    parts: dict[str, Draft] = {}
    for one in drafts:
        other = parts.setdefault(one.patient, one) if one.split else one
        if other.split != one.split:
            raise LeakageError(
                f"{other.case} ({other.split}) and {one.case} ({one.split}) are of one patient, {what_to_do}"
            )


def _visit(row: Row) -> str:
    """Whose scan it is, and of which session where that is told."""
    session = re.search(r"(?:^|[/_\\])(ses-[A-Za-z0-9]+)(?:[/_\\]|$)", row.path)
    told = session[1] if session else row.covariates.get("session", "")
    return f"{row.patient}_{told}" if told else row.patient


def _as_channels(visit: str, channels: Sequence[Row]) -> Row:
    first = channels[0]
    covariates = {name: cell for row in reversed(channels) for name, cell in row.covariates.items()}
    return replace(
        first,
        case=visit,
        path=";".join(row.path for row in channels),
        label=next((row.label for row in channels if row.label), ""),
        mask=next((row.mask for row in channels if row.mask), ""),
        domain="+".join(row.domain for row in channels),
        covariates=covariates,
    )


# -- splits ----------------------------------------------------------------------------------------


def _placed(
    drafts: list[Draft],
    given: Mapping[str, str],
    official: Mapping[str, str],
    options: ReadOptions,
    *,
    quotas: Mapping[str, float],
    seed: int,
) -> dict[str, str]:
    """A split for each patient; patients who share a file are placed as one."""
    leader = leaders(drafts, options)
    members: dict[str, list[Draft]] = defaultdict(list)
    for one in drafts:
        members[leader[one.patient]].append(one)
    strata = {
        name: (tuple(sorted({one.label for one in ones})), tuple(sorted({one.domain for one in ones})))
        for name, ones in members.items()
    }
    fixed: dict[str, str] = {}
    learn: set[str] = set()
    for name, ones in members.items():
        told = {given[one.patient]: one.case for one in ones if one.patient in given}
        if len(told) > 1:
            (a, one), (b, other) = list(told.items())[:2]
            raise LeakageError(
                f"{one} ({a}) and {other} ({b}) hold copies of one file, or are of one patient. Remove one copy, or "
                "give both the same split."
            )
        parts = {official[one.patient] for one in ones if one.patient in official}
        if told:
            fixed[name] = next(iter(told))
        elif parts & {"val", "test"}:
            fixed[name] = "test" if "test" in parts else "calibration"
        elif parts:
            learn.add(name)
    rest = {name: stratum for name, stratum in strata.items() if name not in learn}
    splits = assigned(rest, fixed, quotas=quotas, seed=seed)
    if learn:
        has_calibration = "calibration" in fixed.values()
        shares = {"train": 0.9, "val": 0.1} if has_calibration else {"train": 0.7, "val": 0.1, "calibration": 0.2}
        splits |= assigned({name: strata[name] for name in learn}, {}, quotas=shares, seed=seed)
    return {patient: splits[name] for patient, name in leader.items()}


def _rows(drafts: list[Draft], splits: Mapping[str, str]) -> Iterable[Row]:
    for one in drafts:
        yield Row(
            case=one.case,
            patient=one.patient,
            path=one.path,
            kind=one.source.kind,
            label=one.label,
            mask=one.mask,
            domain=one.domain,
            covariates=one.covariates,
            split=splits.get(one.patient, one.split),
        )


# -- tables ----------------------------------------------------------------------------------------


def _cells(row: Row) -> dict[str, str]:
    return {**{name: getattr(row, name) for name in _COLUMNS}, **row.covariates}


def _way(root: Path, start: Path) -> str:
    """How to get from `start` to `root`; absolute where no relative way exists."""
    try:
        return Path(relpath(root.resolve(), start.resolve())).as_posix()
    except ValueError:  # another drive
        return root.resolve().as_posix()


__all__ = ["Manifest", "Row", "index"]
