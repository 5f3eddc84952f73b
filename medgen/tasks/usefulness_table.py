"""What was found about usefulness: as lines for people, and as files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medgen.report.curves import Point, curves
from medgen.tasks.arms import ALONE, BOTH, CHOSEN, CLASSICAL, REAL
from medgen.tasks.detection_table import table, write_csv
from medgen.tasks.study import MEAN

_SHOWN = (REAL, CLASSICAL, CHOSEN, BOTH, ALONE, "real + mixture")
_SAYS = {
    "helps": "learners do better with it", "no benefit": "the interval of the gain holds 0",
    "harms": "learners do worse with it", "cannot tell": "too few patients of a class were held out",
}  # fmt: skip
RESEARCH = "Research use only, not a medical device."


def lines(found: Mapping[str, Any]) -> list[str]:
    """The tables as Markdown, and a sentence for every arm that uses synthetic scans."""
    rows, measure = found["rows"], found["measure"]
    told = [
        "", f"USEFULNESS: {measure} on {found['test']} test scans of {found['patients']} patients; nothing was chosen "
        "on them",
    ]  # fmt: skip
    for size, learner in dict.fromkeys((row["size"], row["learner"]) for row in rows):
        mine = [row for row in rows if (row["size"], row["learner"]) == (size, learner)]
        draws = mine[0]["draws"]
        many = "all training scans" if size == "all" else f"{size} training scans{_each(found)}, {draws} draws"
        told += ["", f"{learner}, {many}:", "", *table([_cells(row) for row in mine], _columns(measure)), ""]
        told += [_sentence(row, measure) for row in mine if _synthetic(row["arm"])]
    return [*told, "", *_explained(rows), *found["notes"], RESEARCH]


def _each(found: Mapping[str, Any]) -> str:
    return "" if found["measure"] == "Dice" else " of each class"


def _synthetic(arm: str) -> bool:
    return "synthetic" in arm or arm == CHOSEN


def _columns(measure: str) -> dict[str, str]:
    return {
        "arm": "taught on", "value": measure, "gain": "gain over real", "verdict": "verdict",
        "over": "over real + classical", "chosen": "chosen",
    }  # fmt: skip


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "arm": row["arm"], "value": _said(row, "value"), "gain": _said(row, "gain", sign="+"),
        "verdict": row.get("gain_verdict", ""), "over": _said(row, "over_classical", sign="+"),
        "chosen": row["chosen"],
    }  # fmt: skip


def _said(row: Mapping[str, Any], name: str, sign: str = "") -> str:
    if name not in row:
        return ""
    low, high = row[f"{name}_interval"]
    shown = f"{row[name]:{sign}.3f}"
    return shown if low is None else f"{shown} ({low:{sign}.3f} to {high:{sign}.3f})"


def _sentence(row: Mapping[str, Any], measure: str) -> str:
    """The verdict on one arm."""
    if "gain" not in row:
        return ""
    said = f"{row['arm']}: {row['gain_verdict']} ({_SAYS[row['gain_verdict']]}; {_said(row, 'gain', '+')} {measure})."
    if "over_classical" in row:
        said += f" Over tuned classical transforms: {row['over_classical_verdict']}."
    if "share" in row:
        said += f" That is {_said(row, 'share')} of training on real scans."
    return said


def _explained(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    compared = sum(_synthetic(row["arm"]) and "gain" in row for row in rows)
    return [
        "( ): 95 % intervals, of test patients (and draws) drawn again, the same for both arms of a difference. 'no "
        "benefit': the interval of the gain holds 0. Scans that were made count together as much as the real ones at "
        "most. Classical transforms have the strength that was best on parts of the training scans.",
        f"{compared} arms with synthetic scans are compared: of so many some gain by chance. What counts is the row "
        f"'{CHOSEN}', whose mixture was decided before the test scans were looked at.",
    ]


def write(found: Mapping[str, Any], folder: Path) -> None:
    """utility.md, utility.csv, and a picture of the curve."""
    (folder / "utility.md").write_text("\n".join(lines(found)[1:]) + "\n", encoding="utf-8")
    write_csv(found["rows"], folder / "utility.csv")
    _picture(found, folder / "utility.png")


def _picture(found: Mapping[str, Any], path: Path) -> None:
    """The measure over synthetic scans for each real one, or over the number of training scans."""
    learners = dict.fromkeys(row["learner"] for row in found["rows"])
    learner = MEAN if MEAN in learners else next(iter(learners))
    rows = [row for row in found["rows"] if row["learner"] == learner]
    series: dict[str, list[Point]] = {}
    if rows[0]["size"] == "all":
        for row in rows:
            if row["arm"].startswith("real + ") and row["arm"].endswith(" x synthetic"):
                ratio = float(row["arm"].removeprefix("real + ").removesuffix(" x synthetic"))
                series.setdefault("real + synthetic", []).append(_point(ratio, row))
        across = [point[0] for point in series.get("real + synthetic", [])] or [1.0]
        for row in rows:
            if row["arm"] in (REAL, CLASSICAL):
                series[row["arm"]] = [_point(ratio, row) for ratio in (across[0], across[-1])]
        axis = "synthetic scans for each real one"
    else:
        for arm in _SHOWN:
            if several := [_point(float(row["size"]), row) for row in rows if row["arm"] == arm]:
                series[arm] = several
        axis = f"training scans{_each(found)}"
    curves(series, path, title=f"What synthetic scans are worth to learners ({learner})", axes=(axis, found["measure"]))


def _point(across: float, row: Mapping[str, Any]) -> Point:
    low, high = row["value_interval"]
    return (across, row["value"], *((row["value"],) * 2 if low is None else (low, high)))


__all__ = ["RESEARCH", "lines", "write"]
