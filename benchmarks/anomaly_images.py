"""How well `detector2d` tells ill images from healthy ones: PneumoniaMNIST, and RetinaMNIST with nothing retuned.

Each data set: train on the healthy scans of the train split, calibrate on those of val, score the official test split
once. Everything is folded about the calibration scans, so no row knows whether ill scans score high or low. Beside the
detector stand its members, a detector that asks a flow alone, and what needs no model.

    python benchmarks/anomaly_images.py            # about 40 minutes: 3 of training a detector, 5 a flow
    python benchmarks/anomaly_images.py --choose   # how the members were chosen: no anomaly, no test scan
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import keep, shared_data, table

import medgen
from medgen.bundle import Bundle
from medgen.data.controls import CONTROLS
from medgen.data.dataset import Batch, ScanDataset
from medgen.io.source import ReadOptions
from medgen.metrics.detection import auroc
from medgen.metrics.intervals import conformal_interval
from medgen.nets.anomalies import KINDS, spoilt
from medgen.scores.base import Healthy
from medgen.tasks.calibration import p_value
from medgen.tasks.cases import cases_of, sorted_scans
from medgen.tasks.cohort import unlike
from medgen.tasks.detection import Method, baselines, controlled, detector_of, measured
from medgen.tasks.detector import Batches, Detector, Questions
from medgen.tasks.intake import require_training_scans

RATE, RATES, SPLITS, CALIBRATION = 0.05, (0.01, 0.05, 0.1, 0.2), 20, 135
# Of training each model when choosing.
CHOICE_MINUTES = 0.8
# Name, labels of ill scans (none: all but the healthy one), colour.
SETS = {"pneumonia": ((), False), "retina": (("2", "3", "4"), True)}
RESIDUAL = {"do": "residual", "of": "twin", "measure": "ssim"}
CANDIDATES: dict[str, dict[str, Any]] = {
    "residual": RESIDUAL,
    "residual, window 11": RESIDUAL | {"window": 11},
    "residual, sigma 1.5": RESIDUAL | {"sigma": 1.5},
    "residual, sigma 3": RESIDUAL | {"sigma": 3.0},
    "statistics": {"do": "statistics"},
    "hog": {"do": "hog", "how": "mahalanobis"},
    "hog, nearest": {"do": "hog"},
    "pca": {"do": "pca", "components": 64},
    "patches": {"do": "patches", "of": "twin"},
    "latent": {"do": "latent", "of": "twin"},
    "marks": {"do": "marks", "of": "marker"},
}
TOGETHER = (
    ("statistics", "hog"),
    ("statistics", "hog", "pca"),
    ("residual", "statistics", "hog", "pca"),
    ("residual, window 11", "statistics", "hog", "pca"),
    ("residual, sigma 3", "statistics", "hog", "pca"),
    ("residual", "statistics", "hog", "pca", "patches"),
    ("residual", "statistics", "hog", "pca", "patches", "latent", "hog, nearest"),
    ("residual", "statistics", "hog", "pca", "marks"),
)


def file_of(name: str) -> Path:
    return shared_data() / "medmnist" / f"{name}mnist.npz"


def options_of(name: str) -> ReadOptions:
    return ReadOptions(colour=SETS[name][1])


def trained(file: Path, place: Path, preset: str, minutes: float, seed: int, options: ReadOptions) -> Bundle:
    """A bundle, unless it is there already."""
    if not (place / "bundle.json").is_file():
        medgen.train(file, place, label="0", preset=preset, minutes=minutes, seed=seed, options=options)
    return Bundle.load(place)


def asking(name: str, detector: Detector, held: ScanDataset, *, two_sided: bool | None = None) -> Method:
    """A method of a detector, calibrated on scans that it has not learned from."""
    scores = np.concatenate([detector.examined(batch)[0] for batch in held.batches(64)])

    def ask(case):
        return float(detector.examined(Batch(case.x, real=case.given.get("real")))[0][0]), None

    return Method(name, ask, scores, detector.two_sided if two_sided is None else two_sided)


def alone(member: dict[str, Any]) -> Questions:
    """One member's columns together, as a detector of its own."""
    return Questions.of({"do": "states", "members": [member], "maps": False}, None)


def without_maps(bundle: Bundle) -> Method:
    """The bundle's detector; its maps are not measured here, and make no difference to its numbers."""
    whole = Detector.of(bundle)
    known = {name: tensor for name, tensor in whole.known.items() if name.startswith("score.")}
    quick = Detector(whole.models, Questions(whole.questions.score, None), known)
    told = detector_of(bundle, RATE)
    return replace(told, ask=lambda case: (float(quick.examined(Batch(case.x))[0][0]), None), level=None)


def methods_of(name: str, bundle: Bundle, flow: Bundle) -> tuple[list[Method], Any]:
    """All rows of a table, the detector first; and the scans, sorted by what they are good for."""
    options = options_of(name)
    scans = sorted_scans(bundle, file_of(name), options, ill=SETS[name][0])
    train, held = (ScanDataset(rows, bundle.recipe, options=options) for rows in (scans.train, scans.held))
    methods = [without_maps(bundle)]
    for one, stands in ((bundle, ""), (flow, "flow, ")):
        rows = joint_scans(one, file_of(name), options)
        healthy = Healthy(Batches(train), Batches(ScanDataset(rows, one.recipe, options=options)))
        for member in one.calibration["questions"]["score"]["members"]:
            plain = Detector(one.models, alone(member)).learned(healthy)
            methods.append(asking(f"{stands}{member['do']} alone", plain, held))
    methods.append(replace(without_maps(flow), name="flowdetector2d"))
    surprise = Detector(flow.models, Questions.of({"do": "surprise", "of": "flow"}, None))
    methods.append(asking("flow, -log p", surprise, held, two_sided=False))
    methods.append(replace(methods[-1], name="flow, -log p, both sides", two_sided=True))
    return [*methods, *baselines(train, held, RATE)], scans


def joint_scans(bundle: Bundle, file: Path, options: ReadOptions):
    """The tenth of the training scans that the scores' joint distribution is learned from."""
    return require_training_scans(bundle, file, options).split("val")


def table_of(name: str, bundle: Bundle, flow: Bundle) -> dict[str, Any]:
    """Everything about one data set and one seed; the only place where test scans are looked at."""
    methods, scans = methods_of(name, bundle, flow)
    options = options_of(name)
    healthy = cases_of(bundle, scans.healthy, options)
    rows = scans.ill.get("all ill") or next(iter(scans.ill.values()))
    ill = cases_of(bundle, rows, options)
    print(f"{name}: {len(healthy)} healthy and {len(ill)} ill test scans", flush=True)
    found = measured(methods, healthy, {"ill": ill}, rate=RATE)
    listed = found.pop("scans")
    warned = {}
    for method in methods:
        p = {
            group: np.asarray([one["p"] for one in listed if one["method"] == method.name and one["group"] == group])
            for group in ("healthy", "ill")
        }
        told = unlike(p["healthy"], len(method.healthy), RATE)
        every = unlike(np.concatenate([*p.values()]), len(method.healthy), RATE)
        warned[method.name] = {"healthy alone": told, "all": every}
    found["warned"] = warned
    found["controls"] = controlled(methods, healthy[::2])
    return found


def show(name: str, found: dict[str, Any]) -> None:
    """Two tables in markdown."""
    false = {row["method"]: row for row in found["false_positives"]}
    rows = []
    for row in found["rows"]:
        mine = false[row["method"]]
        rate, wide = mine.get("flagged", float("nan")), mine.get("flagged_interval", (np.nan, np.nan))
        rows.append((
            row["method"], f"{row['auroc']:.3f} ({row['auroc_interval'][0]:.3f} to {row['auroc_interval'][1]:.3f})",
            row["average_precision"], row["sensitivity"], f"{rate:.3f} ({wide[0]:.3f} to {wide[1]:.3f})",
            "yes" if found["warned"][row["method"]]["healthy alone"] else "no",
        ))  # fmt: skip
    print(f"\n{name}")
    head = ("row", "AUROC, 95 %", "AP", "sensitivity", "healthy flagged at 5 %", "warned")
    table(rows, head)
    controls = [(r["method"], *(r[c] for c in CONTROLS), r["mean"], ", ".join(r["below"])) for r in found["controls"]]
    table(controls, ("row", *CONTROLS, "mean", "below chance"))


def false_alarms(work: Path, minutes: float) -> list[dict[str, Any]]:
    """Trained on half of the training normals; the other half is split 20 times into calibration and test scans."""
    data = np.load(file_of("pneumonia"))
    chests = data["train_images"][data["train_labels"][:, 0] == 0]
    order, half = np.random.default_rng(0).permutation(len(chests)), len(chests) // 2
    file = work / "half.npz"
    labels = {part: np.zeros((n, 1), np.uint8) for part, n in (("train", half), ("val", len(chests) - half))}
    np.savez(
        file, train_images=chests[order[:half]], train_labels=labels["train"],
        val_images=chests[order[half:]], val_labels=labels["val"],
    )  # fmt: skip
    bundle = trained(file, work / "half", "detector2d", minutes, 0, ReadOptions())
    scores, rows = Detector.of(bundle).scores, []
    for alpha in RATES:
        rates = []
        for split in range(SPLITS):
            turn = np.random.default_rng(split).permutation(len(scores))
            known, new = scores[turn[:CALIBRATION]], scores[turn[CALIBRATION:]]
            p = np.asarray([p_value(known, one, two_sided=False) for one in new])
            rates.append(float((p <= alpha + 1e-12).mean()))
        low, high = conformal_interval(CALIBRATION, len(scores) - CALIBRATION, alpha)
        error = float(np.std(rates, ddof=1) / np.sqrt(SPLITS))
        wanted = (alpha - 1 / (CALIBRATION + 1) - 2 * error, alpha + 2 * error)
        rows.append({
            "alpha": alpha, "mean": float(np.mean(rates)), "error": error, "wanted": wanted,
            "inside": bool(wanted[0] <= np.mean(rates) <= wanted[1]), "interval": (low, high),
            "runs_inside": int(sum(low <= rate <= high for rate in rates)), "rates": rates,
        })  # fmt: skip
    print()
    head = ("alpha", "mean rate", "s.e.", "runs inside")
    table([(r["alpha"], r["mean"], r["error"], f"{r['runs_inside']} of {SPLITS}") for r in rows], head)
    return rows


def speed(bundle: Bundle, work: Path) -> dict[str, float]:
    """Images a second: scores and maps in batches of 64, and as `medgen score` does it, with files and without."""
    detector, data = Detector.of(bundle), np.load(file_of("pneumonia"))
    images = data["train_images"][:256]
    x = torch.from_numpy(images / 255).float().transpose(1, 2)[:, None]
    file = work / "some.npz"
    np.savez(file, test_images=images[:128], test_labels=np.zeros((128, 1), np.uint8))
    found = {"batches": rate_of(lambda: [detector.examined(Batch(one)) for one in x.split(64)], len(x))}
    for maps in (False, True):
        place = work / f"scored{maps}"
        name = "medgen score with maps and pictures" if maps else "medgen score"
        found[name] = rate_of(lambda p=place, m=maps: medgen.score(file, bundle, p, maps=m, force=True), 128)
    print("images a second:", {name: round(value, 1) for name, value in found.items()}, flush=True)
    return found


def rate_of(work: Callable[[], Any], count: int) -> float:
    began = time.perf_counter()
    work()
    return count / (time.perf_counter() - began)


# -- choosing --------------------------------------------------------------------------------------------


def chosen(name: str, twin: Bundle, marker: Bundle) -> list[dict[str, Any]]:
    """AUROC of kinds A drawn into the calibration scans against those scans, for candidates alone and together."""
    options, models = options_of(name), {"twin": twin.model, "marker": marker.model}
    scans = sorted_scans(twin, file_of(name), options)
    rows = (scans.train, joint_scans(twin, file_of(name), options), scans.held)
    train, val, held = (ScanDataset(one, twin.recipe, options=options) for one in rows)
    healthy, x = Healthy(Batches(train), Batches(val)), torch.cat([batch.x for batch in held.batches(64)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = {kind: torch.cat([spoilt(x, (kind,), least=1).x for _ in range(2)]) for kind in KINDS}
        drawn["all kinds"] = torch.cat([spoilt(x, least=1).x for _ in range(3)])
    found = []
    for members in (*((one,) for one in CANDIDATES), *TOGETHER):
        told = [CANDIDATES[one] for one in members]
        score = {"do": "states", "members": told, "maps": False}
        detector = Detector(models, Questions.of(score, None)).learned(healthy)

        def scored(images, detector=detector):
            return np.concatenate([detector.examined(Batch(one))[0] for one in images.split(64)])

        dark = scored(x)
        found.append({"members": " + ".join(members), **{k: auroc(dark, scored(one)) for k, one in drawn.items()}})
    print(f"\n{name}")
    table([tuple(row.values()) for row in found], tuple(found[0]))
    return found


def choose(work: Path) -> None:
    began, found = time.monotonic(), {}
    for name in SETS:
        parts = [
            trained(file_of(name), work / f"{name}_{preset}", preset, CHOICE_MINUTES, 0, options_of(name))
            for preset in ("autoencoder2d", "segmenter2d")
        ]
        found[name] = chosen(name, *parts)
    keep("anomaly_images_choice", {"pseudo_auroc": found}, began)


def main() -> None:
    parsed = argparse.ArgumentParser()
    parsed.add_argument("--minutes", type=float, default=3)
    parsed.add_argument("--flow-minutes", type=float, default=5)
    parsed.add_argument("--seeds", type=int, default=1)
    parsed.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parsed.add_argument("--work", type=Path, help="folder of bundles; those that are there are not trained again")
    parsed.add_argument("--choose", action="store_true", help="measure candidates on drawn anomalies instead")
    wanted = parsed.parse_args()
    with tempfile.TemporaryDirectory() as empty:
        work = wanted.work or Path(empty)
        if wanted.choose:
            return choose(work)
        began, told = time.monotonic(), {}
        for name in wanted.sets:
            flow = trained(
                file_of(name), work / f"{name}_flowdetector2d_0", "flowdetector2d", wanted.flow_minutes, 0,
                options_of(name),
            )  # fmt: skip
            told[name] = []
            for seed in range(wanted.seeds):
                place = work / f"{name}_detector2d_{seed}"
                bundle = trained(file_of(name), place, "detector2d", wanted.minutes, seed, options_of(name))
                found = table_of(name, bundle, flow)
                show(f"{name}, seed {seed}", found)
                facts = {part: one.training.get("minutes") for part, one in (("detector", bundle), ("flow", flow))}
                told[name].append({"seed": seed, "minutes": facts, **found})
        told["speed"] = speed(Bundle.load(work / "pneumonia_detector2d_0"), Path(empty))
        told["false_alarms"] = false_alarms(work, wanted.minutes)
    keep("anomaly_images", told, began)


if __name__ == "__main__":
    main()
