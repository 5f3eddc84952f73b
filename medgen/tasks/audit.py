"""What written scans give away about the patients a model learned from, and what must not leave with them.

Only scans from noise are asked: derived ones show their sources, and say so. What shows or names patients is kept in a
folder of its own beside the output: thumbnails of copies that were not written, and whose scans derived ones are.
"""

import csv
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medgen.bundle import Bundle
from medgen.data.manifest import Manifest
from medgen.errors import OutputError
from medgen.log import note
from medgen.metrics.membership import Closeness, likelihood_attack
from medgen.metrics.spaces import shrunk
from medgen.models.base import can
from medgen.report.duplicates import duplicate_sheet
from medgen.tasks.gates import Verdict
from medgen.tasks.looks import Known, log_densities, told_nothing_more
from medgen.tasks.ways.base import Made
from medgen.tasks.ways.sources import patient_name, source_name
from medgen.tasks.workspace import Workspace

# Scans that closeness is told of at a time; pairs in the picture of copies; scans a likelihood attack compares.
_AT_ONCE, _MOST_SHOWN, _MOST_ATTACKED = {2: 64, 3: 8}, 24, 500
_README = (
    "# Patients\n\nThis folder shows or names people: copies of their scans, which were not written, or of whose scans "
    "others were made.\nKeep it where those scans are kept; do not hand it on with the output beside it.\n"
)


@dataclass(frozen=True, eq=False)
class _Copy:
    made: Made
    verdict: Verdict
    name: str


class Audit:
    """Sees every scan that is written, and every copy that is not.

    Args:
        known: everybody the model may have learned from.
        held: scans it never saw; None where there are none.
        bundle: whose scans they are; None where no model made them.
        work: the unfinished run, whose journal lists copies.
        key: salt of pseudonyms, as the material's.
        seed: of who is compared.
    """

    def __init__(
        self, known: Known, held: Known | None, bundle: Bundle | None, work: Workspace, *, key: str, seed: int
    ) -> None:
        self._known, self._held, self._bundle, self._seed = known, held, bundle, seed
        self._work, self._key, self._kept = work, key, work.folder / "training" / "kept"
        self._dims = known.x.ndim - 2
        self._closeness: Closeness | None = None
        self._next: list[Tensor] = []
        self._copies: list[_Copy] = []

    # -- what it sees --------------------------------------------------------------------------

    def kept(self, made: Made, name: str) -> None:
        """A scan that is written. What of it is compared is kept until the run is finished, should it be resumed."""
        if made.origin == "synthetic":
            small = shrunk(made.x[None])[0]
            self._kept.mkdir(parents=True, exist_ok=True)
            np.save(self._kept / f"{name}.npy", small.numpy())
            self._add(small)

    def copied(self, made: Made, verdict: Verdict, name: str) -> None:
        """A candidate that copies a training scan: it is listed, and not written."""
        nearest = source_name(self._known.rows[verdict.nearest], self._key)
        self._work.record(f"copy {name}", {"candidate": name, "nearest": nearest, **verdict.facts})
        if len(self._copies) < _MOST_SHOWN:
            self._copies.append(_Copy(made, verdict, name))

    def recall(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take in what an interrupted run wrote already."""
        for row in rows:
            if row["origin"] == "synthetic":
                self._add(torch.from_numpy(np.load(self._kept / f"{row['case']}.npy")))

    def _add(self, small: Tensor) -> None:
        self._next.append(small)
        if len(self._next) >= _AT_ONCE[self._dims]:
            self._compare()

    def _compare(self) -> None:
        if self._closeness is None:
            held = self._held
            self._closeness = Closeness(
                self._known.x, self._known.patients,
                None if held is None else held.x, () if held is None else held.patients, seed=self._seed,
            )  # fmt: skip
        self._closeness.add(torch.stack(self._next))
        self._next = []

    # -- what it says --------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """Closeness to patients and what attacks find, as plain values; empty where nothing came from noise."""
        if self._next:
            self._compare()
        if self._closeness is None:
            return {}
        return {"closeness": self._closeness.report().to_dict(), **self._likelihood()}

    def _likelihood(self) -> dict[str, Any]:
        """What knowing the model's densities tells about who was learned from; nothing where it has none."""
        if self._bundle is None or self._held is None or len(self._held) < 4:
            return {}
        model = self._bundle.model
        if not (told_nothing_more(model) and can(model, "scores_density", "bounds_density")):
            return {}
        order = np.random.default_rng(self._seed).permutation(len(self._known))
        count = min(len(self._held), len(self._known), _MOST_ATTACKED)
        members, others = self._known.take(order[:count]), self._held.take(np.arange(count))
        found = [log_densities(model, side.x, side.labels) for side in (members, others)]
        return {"likelihood_attack": likelihood_attack(*found, seed=self._seed).to_dict()}

    # -- what must not leave -------------------------------------------------------------------

    def private(self, train: Manifest, rows: Sequence[Mapping[str, Any]]) -> Path | None:
        """Write what shows or names patients beside the output; None where there is nothing.

        Args:
            train: the scans that derived ones are made of.
            rows: of everything that was written.
        """
        copies = [facts for name, facts in self._work.done.items() if name.startswith("copy ")]
        used = {source for row in rows for source in row["sources"]}
        place = private_place(self._work.out)
        if not copies and not used:
            # Of an earlier run, which this one replaces.
            shutil.rmtree(place, ignore_errors=True)
            return None
        part = place.with_name(place.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        (part / "README.md").write_text(_README, encoding="utf-8")
        if copies:
            _table(copies, part / "copies.csv")
            note(f"{len(copies)} candidates copied a training scan and were not written: see {place.name}.")
        if self._copies:
            self._show(part / "copies.png")
        if used:
            told = [
                {
                    "source": source_name(row, self._key), "patient": patient_name(row, self._key), "case": row.case,
                    "path": row.path,
                }
                for row in train.rows
            ]  # fmt: skip
            _table([row for row in told if row["source"] in used], part / "sources.csv")
        if place.exists():
            shutil.rmtree(place)
        os.replace(part, place)
        return place

    def _show(self, path: Path) -> None:
        pairs = []
        for copy in self._copies:
            n = copy.verdict.nearest
            nearest = source_name(self._known.rows[n], self._key)
            facts = ", ".join(f"{name} {value:.2f}" for name, value in copy.verdict.facts.items() if name[:2] == "r_")
            pairs.append((copy.made.x, self._known.x[n], f"{copy.name} and {nearest}: {facts}"))
        duplicate_sheet(pairs, path)


def private_place(out: Path) -> Path:
    """Where what must not leave with `out` is kept."""
    return out.with_name(out.name + ".private")


def require_private(out: str | Path, *, force: bool) -> None:
    """Refuse to replace what an earlier run keeps private.

    Raises:
        OutputError: there is such a folder, and no output beside it that `force` lets replace.
    """
    place = private_place(Path(out))
    if place.exists() and not force:
        raise OutputError(f"{place} exists already, of an earlier run. Move it away, or pass --force to replace it.")


def _table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), restval="")
        writer.writeheader()
        writer.writerows(rows)


__all__ = ["Audit", "private_place", "require_private"]
