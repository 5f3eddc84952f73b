"""What a scoring run writes about all scans at once: tables, most suspicious first, and one picture of the first."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from medgen.report.sheet import sheet
from medgen.tasks.findings import Finding, write_findings

# Scans in the picture of the most suspicious.
_SHOWN = 12


@dataclass(frozen=True)
class Scored:
    """What is said about one scan.

    Args:
        case: its name.
        score: how unusual it is in the score's own unit; what high and low mean depends on the score.
        unusual: distance of the score from the healthy scores' middle, in their spreads; either side where both are
            unusual.
        p: conformal p-value among held-out healthy scans; None with no calibration.
        flagged: p is at most the false-alarm rate asked for; None where it cannot be.
        z_max: highest value of the anomaly map; None without one.
        mask_mm3: volume above the calibrated threshold; None where there is none.
        findings: clusters of the map, largest first; None where the calibration knows of none.
        warnings: what is unusual about the file itself, or limits what is said.
        error: why it was not scored.
    """

    case: str
    score: float | None = None
    unusual: float | None = None
    p: float | None = None
    flagged: bool | None = None
    z_max: float | None = None
    mask_mm3: float | None = None
    findings: tuple[Finding, ...] | None = None
    warnings: tuple[str, ...] = ()
    error: str = ""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Scored":
        """From `asdict`, also after JSON."""
        told = values["findings"]
        listed = None if told is None else tuple(Finding(**one) for one in told)
        return cls(**{**values, "findings": listed, "warnings": tuple(values["warnings"])})


def suspicious_first(scans: Iterable[Scored]) -> tuple[Scored, ...]:
    """The order of a worklist: lowest p, then farthest from the healthy scores; those not scored last."""

    def place(scan: Scored) -> tuple[bool, float, float, str]:
        how = scan.score if scan.unusual is None else scan.unusual
        return bool(scan.error), 2.0 if scan.p is None else scan.p, -(how or 0.0), scan.case

    return tuple(sorted(scans, key=place))


def write_scores(scans: Sequence[Scored], stated: Mapping[str, Any], rate: float, folder: Path) -> None:
    """`scores.csv`, a row a scan, and `scores.json`, with every finding.

    Args:
        scans: in the order of the worklist.
        stated: what holds for the whole run, for `scores.json`.
        rate: `findings` in the table counts those whose p is at most this.
        folder: where to write.
    """
    with (folder / "scores.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["rank", *Scored.__dataclass_fields__])
        writer.writeheader()
        for rank, scan in enumerate(scans, 1):
            told = {name: getattr(scan, name) for name in Scored.__dataclass_fields__}
            if scan.findings is not None:
                told["findings"] = sum(one.p <= rate + 1e-12 for one in scan.findings)
            told |= {"rank": None if scan.error else rank, "warnings": "; ".join(scan.warnings)}
            writer.writerow({name: _cell(value) for name, value in told.items()})
    listed = {**stated, "scans": [asdict(scan) for scan in scans]}
    (folder / "scores.json").write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")


def write_pictures(scans: Sequence[Scored], folder: Path, *, title: str) -> None:
    """`findings.csv` and `worklist.png`, where there are maps."""
    if any(scan.findings is not None for scan in scans):
        write_findings(((scan.case, scan.findings or ()) for scan in scans), folder / "findings.csv")
    pictures = [folder / "pictures" / f"{own_name(scan.case)}.png" for scan in scans[:_SHOWN]]
    if there := [path for path in pictures if path.is_file()]:
        sheet(there, folder / "worklist.png", title=title)


def file_name(name: str) -> str:
    """A name that is safe as a file name on every system; other names may become the same."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name).strip(".")[:150] or "scan"


def own_name(case: str) -> str:
    """A safe file name that no other case has."""
    safe = file_name(case)
    return safe if safe == case else f"{safe}-{sha256(case.encode()).hexdigest()[:6]}"


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else value


__all__ = ["Scored", "file_name", "own_name", "suspicious_first", "write_pictures", "write_scores"]
