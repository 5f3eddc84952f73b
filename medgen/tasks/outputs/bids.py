"""What BIDS wants to know of a dataset of made scans: a derivative dataset, each of whose files says what it is.

Gorgolewski et al. 2016, "The brain imaging data structure, a format for organizing and describing outputs of
neuroimaging experiments".
"""

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from medgen.io.atomic import replacing
from medgen.tasks.outputs.layout import Layout
from medgen.tasks.outputs.tables import write_json
from medgen.tasks.ways.base import Made

# What of medgen's own is no part of BIDS.
_IGNORED = (
    "manifest.csv",
    "run.json",
    "journal.json",
    "*.part",
    "contact_sheet.png",
    "bundle",
    "bundle/**",
    "privacy*",
    "privacy*/**",
    "*.npz",
)
_DESCRIBED = {
    "participant_id": "Nobody, or the pseudonym of the patient whose scan was changed",
    "age": "Age that the scan was made for; of nobody where origin is synthetic",
    "sex": "Sex that the scan was made for; of nobody where origin is synthetic",
    "group": "Class that the scan was made for",
    "origin": "synthetic: generated from noise, shows nobody; derived: made of a patient's scan, shows that patient",
}


def bids_places(name: str, patient: str, made: Made, mask: str) -> tuple[str, str]:
    """Where a scan goes, up to its suffix, and its mask: a subject of its own, or a session of the patient it shows.

    'sub-SYN0001/anat/sub-SYN0001' for a scan that shows nobody; for a derived one with a lesion
    'sub-P<hash>/ses-SYN0002/anat/sub-P<hash>_ses-SYN0002_desc-lesion'.

    Args:
        name: of the case.
        patient: name or pseudonym.
        made: the scan.
        mask: entity, if any, and suffix of masks.
    """
    subject, session = f"sub-{_plain(patient)}", f"ses-{_plain(name)}"
    if made.origin == "synthetic":
        stem = f"{subject}/anat/{subject}"
        return stem, f"{stem}_{mask}"
    stem, desc = f"{subject}/{session}/anat/{subject}_{session}", f"desc-{_plain(made.how)}"
    label, _, suffix = mask.rpartition("_")
    return f"{stem}_{desc}", "_".join(filter(None, (stem, label, desc, suffix)))


def _plain(name: str) -> str:
    """Letters and digits: nothing else may stand in a BIDS label."""
    return "".join(c for c in name if c.isalnum() and c.isascii())


def write_sidecars(folder: Path, row: Mapping[str, Any], layout: Layout) -> None:
    """Beside every file of a scan, and its mask, what they are."""
    derived = row["origin"] == "derived"
    said = f"made of a patient's scan ({row['how']}); shows that patient" if derived else "generated; shows nobody"
    told: dict[str, Any] = {"Description": f"Scan {said}. Research use only.", "SyntheticData": True}
    if row["model"]:
        told |= {"GeneratorModel": row["model"], "WeightsSHA256": row["weights_sha256"]}
    told["Seed"] = row["seed"]
    told["SkullStripped"] = layout.stripped
    for path in row["path"].split(";"):
        write_json(told, folder / f"{path.removesuffix('.nii.gz')}.json")
    if row["mask"]:
        of = {"Description": f"Mask of a scan {said}.", "SyntheticData": True}
        if layout.mask.endswith("_mask"):
            of["Type"] = "Lesion"
        write_json(of, folder / f"{row['mask'].removesuffix('.nii.gz')}.json")


def write_bids(rows: Sequence[Mapping[str, Any]], folder: Path, name: str) -> None:
    """The description of the dataset, its participants, and what of medgen's own is no part of it."""
    made_by = {"Name": "medgen", "Version": version("medgen"), "Description": "Generative models of medical scans"}
    told = {
        "Name": name,
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [made_by],
        "Authors": ["The medgen developers", "The person who ran medgen"],
    }
    write_json(told, folder / "dataset_description.json")
    _write_participants(rows, folder)
    (folder / ".bidsignore").write_text("\n".join(_IGNORED) + "\n", encoding="utf-8")
    readme = folder / "README.md"
    if not readme.exists():
        readme.write_text(
            f"# {name}\n\nScans that medgen made, for research. Sidecars and `participants.tsv` say which were\n"
            "generated from noise, and show nobody, and which were made of patients' scans, and show them.\n",
            encoding="utf-8",
        )


def _write_participants(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """A line a subject: what all of its scans have in common."""
    people: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for row in rows:
        person = people[row["patient"]]
        told = {**row.get("covariates", {}), "origin": row["origin"]}
        if row["label"]:
            told["group"] = row["label"]
        for column, value in told.items():
            person[column].add(str(value))
    columns = sorted({column for person in people.values() for column in person})
    with (
        replacing(folder / "participants.tsv", force=True) as part,
        part.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["participant_id", *columns])
        for name, person in people.items():
            values = [person.get(column, set()) for column in columns]
            writer.writerow([name, *(next(iter(value)) if len(value) == 1 else "n/a" for value in values)])
    described = {
        column: {"Description": _DESCRIBED.get(column, "Told by the dataset that was learned")} for column in columns
    }
    write_json(described, folder / "participants.json")


__all__ = ["bids_places", "write_bids", "write_sidecars"]
