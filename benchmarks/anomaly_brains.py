"""Anomaly scoring on 44 T1 brains, five folds by subject: painted and real lesions, false alarms, controls, speed.

python benchmarks/anomaly_brains.py --preset detector3d        # five trainings of three minutes, then eight

Every healthy scan, and every lesion painted into it, is judged by the detector (and by baselines) that learned from
other subjects: 25 of those to learn from, 2 to stop by, 8 to calibrate on. Lesions are painted into the file before it
is prepared, so they have a say in its intensity range. Nothing here chooses anything.
"""

import argparse
import csv
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from brains import folds
from measure import keep, shared_data, table

import medgen
from medgen import io
from medgen.bundle import Bundle
from medgen.data.dataset import ScanDataset, mask_view, real_view
from medgen.data.lesions import Mask, filled_body, mask_library, paint, place
from medgen.data.window import prepared
from medgen.io.source import ReadOptions
from medgen.metrics.detection import auroc
from medgen.metrics.localisation import voxel_counts
from medgen.report.pictures import overlay
from medgen.scan import Scan
from medgen.tasks.calibration import mask_threshold
from medgen.tasks.cases import refuse_overlap
from medgen.tasks.detection import DETECTOR, Case, Method, baselines, controlled, detector_of, measured
from medgen.tasks.intake import training_scans

RATE = 0.05
MILLILITRES = (2.0, 100.0)
CALIBRATION, STOP = 8, 2
KINDS = ("scaled", "iso", "warp", "hyper")
ILL = {
    "MS, patient 26": ("lesion_ms/mni2mm/patient26_T1", "lesion_ms/mni2mm/patient26_lesion"),
    "glioma, TCGA-FG-6692": ("lesion_glioma/mni2mm/TCGA-FG-6692_T1", "lesion_glioma/mni2mm/TCGA-FG-6692_seg-mav"),
}
OTHER = [f"lesion_ms/mni2mm/patient26_{name}" for name in ("T2", "FLAIR")]
OTHER += [f"lesion_glioma/mni2mm/TCGA-FG-6692_{name}" for name in ("T2", "FLAIR", "T1c")]


@dataclass(eq=False)
class Fold:
    """What learned from the other folds: methods by name, and what they say of healthy scans so far."""

    bundle: Bundle
    methods: dict[str, Method]
    subjects: list[str]
    seen: dict[tuple[str, int], tuple] = field(default_factory=dict)
    p: dict[tuple[str, str], float] = field(default_factory=dict)


# -- learning ------------------------------------------------------------------------------------------


def learned(files: dict[str, Path], held: list[str], folder: Path, preset: str, seed: int) -> Fold:
    """Train the preset, and the baselines on the same scans; a bundle that is there already is used."""
    rest = [s for s in files if s not in held]
    rest = [rest[n] for n in np.random.default_rng(seed).permutation(len(rest))]
    splits = dict.fromkeys(held, "test") | dict.fromkeys(rest, "train")
    splits |= dict.fromkeys(rest[:STOP], "val") | dict.fromkeys(rest[STOP : STOP + CALIBRATION], "calibration")
    folder.mkdir(parents=True, exist_ok=True)
    listed = folder / f"cohort{seed}.csv"
    with listed.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "case", "patient", "split"])
        writer.writerows([path, subject, subject, splits[subject]] for subject, path in files.items())
    place = folder / f"fold{seed}"
    if not (place / "bundle.json").exists():
        medgen.train(listed, place, preset=preset, seed=seed)
    bundle = Bundle.load(place)
    rows = training_scans(bundle, listed, ReadOptions())
    assert rows is not None, "a bundle of another cohort lies there"
    train, calibration = (ScanDataset(rows.split(name), bundle.recipe) for name in ("train", "calibration"))
    methods = [detector_of(bundle, RATE), *baselines(train, calibration, RATE)]
    return Fold(bundle, {one.name: one for one in methods}, held)


def case_of(bundle: Bundle, name: str, scan: Scan, mask: Scan | str | None = None, lesion: str = "") -> Case:
    """A scan as the bundle's models see it; `mask` in memory or on disk."""
    ready, real = prepared(scan, bundle.recipe)
    given = {} if real.all() else {"real": real_view(real)[None]}
    if isinstance(mask, Scan):
        where = real_view(mask.onto(ready.grid, outside=0).voxels[0] > 0).numpy()
    else:
        where = mask_view(mask, ready.grid)[0].numpy() > 0 if mask else None
    return Case(name, name, ready, given, where, lesion)


def painted(scan: Scan, kinds: Sequence[str], library: Sequence[Mask], seed: int) -> dict[str, tuple[Scan, Scan]]:
    """The scan with a lesion of each kind, at high contrast, all where one drawn mask of 2 to 100 mL lies in it."""
    rng, body = np.random.default_rng(seed), filled_body(scan)
    for n in rng.permutation(len(library)):
        shape = place(io.read(library[n].path), scan.grid, body)
        held = shape.sum() * scan.grid.voxel_volume / 1000
        if MILLILITRES[0] <= held <= MILLILITRES[1] and held >= 0.5 * library[n].millilitres:
            break
    else:
        raise SystemExit("No drawn mask fits the scan.")
    rngs = (np.random.default_rng([seed, n]) for n, _ in enumerate(kinds))
    return {k: paint(scan, shape, kind=k, contrast="high", rng=r) for k, r in zip(kinds, rngs, strict=True)}


# -- all folds together --------------------------------------------------------------------------------


def together(name: str, parts: Sequence[Fold], healthy: Sequence[Case]) -> Method:
    """The method that judges each subject as its own fold's does; masks at the level of all healthy scans' maxima."""
    home = {subject: fold for fold in parts for subject in fold.subjects}
    known = {id(case) for case in healthy}

    def ask(case: Case) -> tuple[float, np.ndarray | None]:
        fold, key = home[case.patient], (name, id(case))
        if key in fold.seen:
            return fold.seen[key]
        method = fold.methods[name]
        value, found = method.ask(case)
        unusual, p = method.placed(value, case)
        if id(case) in known:
            fold.seen[key], fold.p[name, case.patient] = (unusual, found), p
        return unusual, found

    highest = [np.nanmax(found) for _, found in map(ask, healthy) if found is not None]
    return Method(name, ask, np.zeros(0), level=mask_threshold(np.asarray(highest), RATE) if highest else None)


def within_folds(rows: list[dict], scans: list[dict], parts: Sequence[Fold]) -> None:
    """Add to each row the mean over folds of the AUROC inside a fold, where one detector gave all the numbers."""
    values = {(one["method"], one["group"], one["case"]): one["unusual"] for one in scans}
    for row in rows:
        inside = []
        for fold in parts:
            groups = [[values.get((row["method"], g, s)) for s in fold.subjects] for g in ("healthy", row["ill"])]
            inside.append(auroc(*(np.asarray([v for v in group if v is not None]) for group in groups)))
        row["auroc_within_folds"] = float(np.mean(inside))


def alarms(parts: Sequence[Fold], method: Method, healthy: Sequence[Case]) -> dict:
    """How often healthy scans are called unusual: by the scans of other folds, and by their own detector's eight.

    That all 44 scores, each left out in turn, give the right rate says nothing: ranks always do. Between folds, each
    with a detector of its own, it does. What to expect if all are alike comes of random numbers in place of scores.
    """
    number = {subject: n for n, fold in enumerate(parts) for subject in fold.subjects}
    home = np.asarray([number[case.patient] for case in healthy])
    asked = [method.ask(case) for case in healthy]
    values, top = np.asarray([one[0] for one in asked]), [one[1] for one in asked]
    own = np.asarray([parts[n].p[method.name, case.patient] for n, case in zip(home, healthy, strict=True)])
    theirs = home[:, None] == np.repeat(np.arange(len(parts)), CALIBRATION)

    def by_chance(rng: np.random.Generator) -> np.ndarray:
        return _p(rng.random(len(values)), rng.random(theirs.shape[1]), theirs)

    found: dict = {"own calibration": _alarms(own, by_chance, CALIBRATION)}
    if len(parts) > 1:
        others = home[:, None] != home

        def among_folds(rng: np.random.Generator) -> np.ndarray:
            scores = rng.random(len(values))
            return _p(scores, scores, others)

        found["other folds"] = _alarms(_p(values, values, others), among_folds, int(others.sum(1).min()))
        if top[0] is not None:
            highest = np.asarray([np.nanmax(one) for one in top])
            levels = [mask_threshold(highest[others[n]], RATE) for n in range(len(values))]
            found["marked"] = float(
                np.mean([level is not None and h > level for h, level in zip(highest, levels, strict=True)])
            )
    return found


def _p(values: np.ndarray, known: np.ndarray, compared: np.ndarray) -> np.ndarray:
    """Conformal p-value of each value among the known ones it is compared with."""
    return (1 + ((known >= values[:, None] - 1e-9) & compared).sum(1)) / (1 + compared.sum(1))


def _alarms(p: np.ndarray, by_chance: Callable[[np.random.Generator], np.ndarray], known: int) -> dict:
    """Rates at every alpha, the mean and where 95 % of runs lie if p comes by chance."""
    alphas = np.arange(1, known + 1) / (known + 1)
    rng = np.random.default_rng(0)
    runs = np.asarray([(by_chance(rng)[:, None] <= alphas + 1e-12).mean(0) for _ in range(2000)])
    rate, (low, high) = (p[:, None] <= alphas + 1e-12).mean(0), np.quantile(runs, [0.025, 0.975], axis=0)
    far = np.maximum(rate - alphas, alphas - 1 / (known + 1) - rate)
    return {
        "alphas": alphas.tolist(), "rates": rate.tolist(), "low": low.tolist(), "high": high.tolist(),
        "outside": int(((rate < low - 1e-12) | (rate > high + 1e-12)).sum()),
        "beyond_2se": int((far > 2 * runs.std(0) + 1e-12).sum()),
    }  # fmt: skip


# -- real lesions, other modalities, speed -------------------------------------------------------------


def on_disk(stem: str) -> Path:
    return shared_data() / f"{stem}_space-MNI_res-2.nii.gz"


def real_lesions(parts: Sequence[Fold]) -> list[dict]:
    """Each fold's methods on scans of two patients from other scanners: means over folds, and the range of the AP."""
    rows = []
    for name, (scan, mask) in ILL.items():
        source = io.read(on_disk(scan))
        cases = [case_of(fold.bundle, name, source, str(on_disk(mask))) for fold in parts]
        warned = sorted({text for fold in parts for text in fold.bundle.contract.check(source)})
        for method in parts[0].methods:
            found = []
            for fold, case in zip(parts, cases, strict=True):
                value, seen = fold.methods[method].ask(case)
                if seen is not None and case.mask is not None:
                    counts = voxel_counts([seen], [case.mask])
                    p = fold.methods[method].placed(value, case)[1]
                    found.append((counts.average_precision(), counts.best_dice(), counts.aupro(), p))
            if found:
                ap, dice, aupro, p = np.mean(found, 0)
                ends = [float(end(row[0] for row in found)) for end in (min, max)]
                row = {"ill": name, "method": method, "voxel_ap": ap, "over_folds": ends, "best_dice": dice}
                share = float(np.mean([np.mean(case.mask) for case in cases]))
                rows.append(row | {"aupro": aupro, "p": p, "lesion_share": share, "warnings": warned})
    return rows


def other_modalities(parts: Sequence[Fold], all_folds: Sequence[Method], healthy: Sequence[Case]) -> list[dict]:
    """The share of healthy scans, of the same fold, that each scan of another modality scores above."""
    rows = []
    for method in all_folds:
        row: dict = {"method": method.name}
        for stem in OTHER:
            source, below = io.read(on_disk(stem)), []
            for fold in parts:
                case = case_of(fold.bundle, fold.subjects[0], source)
                mine = np.asarray([method.ask(one)[0] for one in healthy if one.patient in fold.subjects])
                below.append(auroc(mine, np.asarray([method.ask(case)[0]])))
            row[Path(stem).name] = float(np.mean(below))
        rows.append(row)
    return rows


def speed(fold: Fold, cases: Sequence[Case], threads: Sequence[int] = (1, 2)) -> dict:
    """Seconds the detector takes for a prepared brain, the median."""
    before, told = torch.get_num_threads(), {}
    for count in threads:
        torch.set_num_threads(count)
        took = []
        for case in cases:
            began = time.perf_counter()
            fold.methods[DETECTOR].ask(case)
            took.append(time.perf_counter() - began)
        told[f"{count} threads"] = float(np.median(took))
    torch.set_num_threads(before)
    return told


def pictures(folder: Path, fold: Fold, cases: dict[str, Case]) -> None:
    """Scans under the detector's maps; of real people's scans, so not for a repository."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, case in cases.items():
        value, z = fold.methods[DETECTOR].ask(case)
        if z is not None:
            overlay(case.ready, Scan(z[None], case.ready.grid), folder / f"{name}.png", title=f"{name}: {value:.2f}")


# -- telling -------------------------------------------------------------------------------------------


def show(found: dict) -> None:
    def of(row: dict, name: str, *, interval: bool = False) -> str:
        if row.get(name) is None:
            return ""
        ends = row[f"{name}_interval"] if interval else None
        return f"{row[name]:.3f}" + (f" ({ends[0]:.2f} to {ends[1]:.2f})" if ends else "")

    names = ("voxel_ap", "auroc", "average_precision", "best_dice", "dice", "aupro")
    told = [
        (row["ill"], row["method"], *(of(row, n, interval=n in names[:2]) for n in (*names, "auroc_within_folds")))
        for row in found["rows"]
    ]
    heads = ("voxel AP", "image AUROC", "image AP", "best Dice", "Dice at 5 %", "AUPRO@30", "AUROC in folds")
    table(told, ("lesion", "method", *heads))
    table([(r["ill"], r["method"], r["voxel_ap"], r["best_dice"], r["aupro"], r["p"]) for r in found["real"]],
          ("real lesion", "method", "voxel AP", "best Dice", "AUPRO@30", "mean p"))  # fmt: skip
    for name in ("controls", "other_modalities"):
        heads = [head for head in found[name][0] if head not in ("scans", "below")]
        table([tuple(row[head] for head in heads) for row in found[name]], tuple(heads))
    for method, told in found["false_alarms"].items():
        for how, one in told.items():
            if how == "marked":
                print(f"{method}: anything marked in {one:.1%} of healthy scans at {RATE:.0%}")
            else:
                far = f"{one['outside']} outside the interval, {one['beyond_2se']} beyond 2 standard errors"
                print(f"{method}, {how}: of {len(one['alphas'])} alphas {far}")
    print(f"training {found['minutes_a_fold']:.1f} minutes a fold; seconds a brain {found['seconds_a_brain']}")


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--preset", default="detector3d")
    options.add_argument("--folds", type=int, default=5, help="run the first so many of five")
    options.add_argument("--kinds", default=",".join(KINDS))
    options.add_argument("--controls", type=int, default=24, help="healthy scans that controls are made of")
    options.add_argument("--bundles", type=Path, help="keep trained bundles here, and use those that are there")
    options.add_argument("--pictures", type=Path, help="a folder for maps of a few scans")
    options.add_argument("--name", default="anomaly_brains")
    options = options.parse_args()
    began, kinds = time.monotonic(), options.kinds.split(",")
    folder = shared_data() / "brain_t1_ds002748" / "mni2mm"
    files = {path.name.split("_")[0]: path for path in sorted(folder.glob("*.nii.gz"))}
    library = mask_library(shared_data() / "lesion_masks_soop")
    parts, healthy, groups = [], [], {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as work:
        for seed, held in enumerate(folds(list(files), 5, 0)[: options.folds]):
            fold = learned(files, held, options.bundles or Path(work), options.preset, seed)
            refuse_overlap(fold.bundle, kinds, library)
            parts.append(fold)
            for subject in held:
                scan = io.read(files[subject])
                healthy.append(case_of(fold.bundle, subject, scan))
                for kind, (ill, mask) in painted(scan, kinds, library, list(files).index(subject)).items():
                    groups[kind].append(case_of(fold.bundle, subject, ill, mask, kind))
            print(f"fold {seed}: {time.monotonic() - began:.0f} s", flush=True)
    methods = [together(name, parts, healthy) for name in parts[0].methods]
    found = measured(methods, healthy, groups, rate=RATE)
    scans = found.pop("scans")
    within_folds(found["rows"], scans, parts)
    volume = healthy[0].ready.grid.voxel_volume / 1000
    found |= {
        "preset": options.preset,
        "folds": len(parts),
        "lesion_ml": [float(case.mask.sum() * volume) for case in groups[kinds[0]]],
        "false_alarms": {one.name: alarms(parts, one, healthy) for one in methods},
        "real": real_lesions(parts),
        "controls": controlled(methods, healthy[: options.controls]),
        "other_modalities": other_modalities(parts, methods, healthy),
        "seconds_a_brain": speed(parts[0], groups[kinds[0]][:5]),
        "minutes_a_fold": float(np.mean([fold.bundle.training["minutes"] for fold in parts])),
        "calibration": CALIBRATION,
    }
    found.pop("false_positives")
    if options.pictures:
        first = {"healthy": healthy[0]} | {kind: cases[0] for kind, cases in groups.items()}
        real = {n.split(",")[0]: case_of(parts[0].bundle, n, io.read(on_disk(scan))) for n, (scan, _) in ILL.items()}
        pictures(options.pictures, parts[0], first | real)
    show(found)
    keep(options.name, found, began)


if __name__ == "__main__":
    main()
