"""What augmented folders are worth: labels, pairs, privacy, speed. Every row goes through the commands a user has.

Chests: PneumoniaMNIST; the official val split calibrates and is nobody's training scan, the official test split is
read once a row. Hippocampi: medgen's own splits by patient. A row is a file of its own in --work:

    python benchmarks/augmentation.py chests --minutes 15 --work WORK        # train, augment with both gates, TSTR
    python benchmarks/augmentation.py low-data --work WORK                   # 25 and 50 a class, 5 draws, small CNN
    python benchmarks/augmentation.py pairs --preset vae --work WORK         # joint pairs: does the mask fit?
    python benchmarks/augmentation.py segmentation --draw 0 --work WORK      # 15 volumes; --draw 0 to 4
    python benchmarks/augmentation.py thousand --preset vae --work WORK      # 1,000 volumes: memory, where time goes
    python benchmarks/augmentation.py report --work WORK                     # results/augmentation.json, tables
"""

import argparse
import json
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
from measure import keep, machine, shared_data, table

import medgen
from medgen.bundle import Bundle
from medgen.data.classic import classical_batch
from medgen.data.dataset import ScanDataset
from medgen.data.labels import label_map
from medgen.data.manifest import Manifest, index
from medgen.io.source import ReadOptions
from medgen.metrics.segmentation import dice, segment
from medgen.metrics.utility import TARGETS, balanced, class_auroc, decisions
from medgen.seeds import derived_seed
from medgen.tasks.conditions import told_of
from medgen.tasks.intake import training_scans

CLASSES = np.array([0, 1])
EACH, RESAMPLES = 1_100, 1_000
# Segmentation: training volumes of a draw, and steps of the segmenter.
VOLUMES, STEPS = 15, 400
LABELS = (1, 2)


def kept(work: Path, key: str, row: dict) -> None:
    (work / f"{key}.json").write_text(json.dumps({**row, "machine": machine()}, indent=1, default=float))
    print(key, json.dumps(row, default=float)[:1500], flush=True)


# -- chests ------------------------------------------------------------------------------------------


def chests() -> Path:
    return shared_data() / "medmnist" / "pneumoniamnist.npz"


def pictures(place: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    data = np.load(place)
    return data[f"{split}_images"].astype(np.float32) / 255, data[f"{split}_labels"][:, 0].astype(np.int64)


def chest_row(minutes: float, work: Path) -> None:
    """A bundle, a folder of gated scans drawn from it, and learners that saw nothing else."""
    bundle, out = work / "chests_bundle", work / "chests_synthetic"
    if not bundle.exists():
        medgen.train(chests(), bundle, preset="r3gan", minutes=minutes)
    if not out.exists():
        medgen.augment(chests(), out, bundle=bundle, per_class=EACH)
    (x, y), (x_test, y_test) = pictures(chests(), "train"), pictures(chests(), "test")
    made = pictures(out / "synthetic.npz", "train")
    rows = balanced(y, seed=0, each=EACH)
    runs = {
        (arm, name): decisions(name, given, x_test, seed=0)
        for arm, given in {"real": (x[rows], y[rows]), "synthetic": made}.items()
        for name in TARGETS
    }

    def auroc(arm: str, which: np.ndarray) -> float:
        return float(
            np.mean(
                [np.mean([class_auroc(one[which], y_test[which], CLASSES) for one in runs[arm, n]]) for n in TARGETS]
            )
        )

    whole = np.arange(len(y_test))
    rng = np.random.default_rng(0)
    again = [rng.integers(len(y_test), size=len(y_test)) for _ in range(RESAMPLES)]
    ratios = [auroc("synthetic", which) / auroc("real", which) for which in again]
    single = {f"{a} {n}": np.mean([class_auroc(o, y_test, CLASSES) for o in runs[a, n]]) for a, n in runs}
    told = json.loads((out / "run.json").read_text())
    kept(work, "chests", {
        "real": auroc("real", whole), "synthetic": auroc("synthetic", whole), **single,
        "ratio": auroc("synthetic", whole) / auroc("real", whole),
        "interval": np.percentile(ratios, [2.5, 97.5]).tolist(),
        "train_minutes": Bundle.load(bundle).training["train_seconds"] / 60,
        **{name: told[name] for name in ("written", "rejected", "quality", "privacy", "seconds_of")},
    })  # fmt: skip


def low_data_row(preset: str, minutes: float, sizes: tuple[int, ...], work: Path) -> None:
    """Arms for the small network with 25 and 50 chests of each class; generators learn from those alone."""
    bundle = work / f"low_{preset}"
    if not bundle.exists():
        medgen.train(chests(), bundle, preset=preset, minutes=0.5)
    from medgen.tasks.study import Useful

    key = f"low-data-{preset}-{'-'.join(map(str, sizes))}"
    asked = Useful(ratios=(1, 5), learners=("cnn",), low_data=sizes, draws=5, minutes=minutes)
    found = medgen.evaluate(chests(), bundle, useful=asked, out=work / f"{key}_out")
    kept(work, key, {"preset": preset, "minutes": minutes, **found["utility"]})


# -- hippocampi --------------------------------------------------------------------------------------


def hippocampi() -> Path:
    return shared_data() / "hippocampus_msd"


def pairs_of(scans: Manifest, bundle: Bundle) -> tuple[np.ndarray, np.ndarray]:
    """Scans (n, 1, *space) and label maps (n, *space), prepared as the bundle's model sees them."""
    told = {**told_of(bundle.model.config), "classes": ()}
    data = ScanDataset(scans, bundle.recipe, **told)
    x = np.stack([data[n]["x"].numpy() for n in range(len(data))])
    return x[:, :1], np.stack([label_map(one[1:], LABELS) for one in x])


def joint_bundle(preset: str, minutes: float, work: Path) -> Path:
    place = work / f"hippocampi_{preset}"
    if not place.exists():
        medgen.train(hippocampi(), place, preset=preset, masks="joint", minutes=minutes)
    return place


def pairs_row(preset: str, minutes: float, work: Path) -> None:
    """A segmenter taught on real scans: does it find in made scans what their masks say, as it does in real ones?"""
    place = joint_bundle(preset, minutes, work)
    bundle = Bundle.load(place)
    known = training_scans(bundle, hippocampi(), ReadOptions())
    assert known is not None
    out = work / f"hippocampi_{preset}_pairs"
    if not out.exists():
        medgen.augment(hippocampi(), out, bundle=place, n=60)
    train, test = (pairs_of(known.split(name), bundle) for name in ("train", "test"))
    made = pairs_of(index(out / "manifest.csv"), bundle)
    # Taught once, of all training scans.
    drawn = segment(train, np.concatenate([test[0], made[0]]), labels=LABELS, steps=2 * STEPS, seed=0)
    scores = dice(drawn, np.concatenate([test[1], made[1]]), LABELS)
    rows = {"real": scores[: len(test[0])], "made": scores[len(test[0]) :]}
    told = json.loads((out / "run.json").read_text())
    rng = np.random.default_rng(0)
    again = [
        float(
            np.mean(rng.choice(rows["made"], len(rows["made"]))) / np.mean(rng.choice(rows["real"], len(rows["real"])))
        )
        for _ in range(RESAMPLES)
    ]
    kept(work, f"pairs-{preset}", {
        "real": rows["real"].mean(), "made": rows["made"].mean(), "ratio": rows["made"].mean() / rows["real"].mean(),
        "interval": np.percentile(again, [2.5, 97.5]).tolist(), "test_scans": len(rows["real"]),
        **{name: told[name] for name in ("written", "rejected", "quality", "privacy", "seconds_of")},
    })  # fmt: skip


def segmentation_row(draw: int, work: Path) -> None:
    """15 volumes alone, with classical augmentation, with pairs made of them by `medgen augment`, with both."""
    import csv

    everybody = index(hippocampi())
    rng = np.random.default_rng(derived_seed(15, draw))
    chosen = set(rng.permutation([row.case for row in everybody.split("train").rows])[:VOLUMES].tolist())
    place = work / f"hippocampi_{draw}"
    place.mkdir(exist_ok=True)
    table_of = place / "scans.csv"
    # Nobody else is in the table: neither generators nor gates know others.
    with table_of.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "path", "mask", "split"])
        rows = [row for row in everybody.rows if row.case in chosen]
        writer.writerows([row.case, everybody.locate(row.path), everybody.locate(row.mask), "train"] for row in rows)
    for how in ("morph", "sample"):
        if not (place / how).exists():
            medgen.augment(table_of, place / how, how=how, n=100, preset="gmm", seed=draw, masks="joint")
    bundle = Bundle.load(place / "sample" / "bundle")
    train, test = pairs_of(index(table_of), bundle), pairs_of(everybody.split("test"), bundle)
    val = pairs_of(everybody.split("val"), bundle)

    def taught(name: str, extra: tuple[np.ndarray, np.ndarray] | None, strength: float, share: float = 0.5) -> None:
        key = work / f"segmentation-{draw}-{name}.json"
        if key.exists():
            return
        given, weights = train, None
        if extra is not None:
            given = tuple(np.concatenate([a, b]) for a, b in zip(train, extra, strict=True))
            counts = (len(train[0]), len(extra[0]))
            weights = np.repeat([(1 - share) / counts[0], share / counts[1]], counts)

        def moved(x, maps, generator):
            return classical_batch(x, generator, strength, maps)

        began = time.monotonic()
        both = np.concatenate([val[0], test[0]])
        drawn = segment(
            given, both, labels=LABELS, steps=STEPS, seed=draw, weights=weights, augment=moved if strength else None
        )
        truth = np.concatenate([val[1], test[1]])
        scores = dice(drawn, truth, LABELS)
        row = {"val": scores[: len(val[0])].mean(), "test": scores[len(val[0]) :].tolist()}
        key.write_text(json.dumps({**row, "seconds": time.monotonic() - began}, default=float))
        print(draw, name, row["val"], np.mean(row["test"]), flush=True)

    taught("classical-1", None, 1.0)
    for how in ("morph", "sample"):
        taught(f"{how}-classical-1", pairs_of(index(place / how / "manifest.csv"), bundle), 1.0)
    taught("classical-0.5", None, 0.5)
    taught("none", None, 0)


# -- a thousand --------------------------------------------------------------------------------------


def thousand_row(preset: str, format: str, work: Path, count: int = 1_000) -> None:
    """Resident memory every second of `medgen augment`, and where its time went."""
    out = work / f"thousand_{preset}_{format}"
    command = ["medgen", "augment", str(hippocampi()), "-m", str(work / f"hippocampi_{preset}"), "-o", str(out)]
    began, seen = time.monotonic(), []
    run = subprocess.Popen([*command, "-n", str(count), "--format", format, "-q"])

    def watch() -> None:
        while run.poll() is None:
            status = Path(f"/proc/{run.pid}/status")
            if status.exists():
                lines = [line for line in status.read_text().splitlines() if line.startswith("VmRSS")]
                made = len(list((out.with_name(out.name + ".part")).glob("*/SYN-*")))
                seen.append((time.monotonic() - began, int(lines[0].split()[1]) / 1024 if lines else 0, made))
            time.sleep(2)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run.wait()
    watcher.join()
    told = json.loads((out / "run.json").read_text())
    spent = told["seconds_of"]
    growing = [mb for _, mb, made in seen if made >= 100]
    slope = np.polyfit([made for *_, made in seen if made >= 100], growing, 1)[0] if len(growing) > 2 else 0.0
    kept(work, f"thousand-{preset}-{format}", {
        "written": told["written"], "seconds": time.monotonic() - began, "seconds_of": spent,
        "share_not_waiting": 1 - spent["waiting"] / sum(spent.values()),
        "share_making": spent["making"] / sum(spent.values()),
        "mb_at_100": growing[0] if growing else None, "mb_at_end": growing[-1] if growing else None,
        "mb_a_scan": slope, "rejected": told["rejected"], "privacy": told["privacy"],
    })  # fmt: skip


# -- what it all says --------------------------------------------------------------------------------


def paired(a: np.ndarray, b: np.ndarray) -> tuple[float, list[float]]:
    """Mean difference over draws and test scans, and its interval by resampling both."""
    rng, gains = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        draws, scans = rng.integers(len(a), size=len(a)), rng.integers(a.shape[1], size=a.shape[1])
        gains.append(float((a[draws][:, scans] - b[draws][:, scans]).mean()))
    return float((a - b).mean()), np.percentile(gains, [2.5, 97.5]).tolist()


def segmentation_table(work: Path) -> dict:
    names = sorted({p.stem.split("-", 2)[2] for p in work.glob("segmentation-*-*.json")})
    found = {}
    for name in names:
        rows = [json.loads(p.read_text()) for p in sorted(work.glob(f"segmentation-?-{name}.json"))]
        found[name] = {"val": np.mean([r["val"] for r in rows]), "test": np.asarray([r["test"] for r in rows])}
    best = max((n for n in found if n.startswith("classical")), key=lambda n: found[n]["val"])
    told = {}
    for name, row in found.items():
        gain, interval = paired(row["test"], found[best]["test"])
        told[name] = {
            "draws": len(row["test"]), "val": row["val"], "test": row["test"].mean(),
            f"over {best}": gain, "interval": interval,
        }  # fmt: skip
    return told


def report(work: Path, began: float) -> None:
    rows = {p.stem: json.loads(p.read_text()) for p in sorted(work.glob("*.json")) if not p.stem.startswith("segm")}
    for row in rows.values():
        row.pop("machine", None)
    if list(work.glob("segmentation-*-*.json")):
        rows["segmentation"] = segmentation_table(work)
        table(
            [(name, *row.values()) for name, row in rows["segmentation"].items()],
            ("arm", "draws", "val", "test", "over classical", "interval"),
        )
    keep("augmentation", {"rows": rows}, began)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("row", choices=["chests", "low-data", "pairs", "segmentation", "thousand", "report"])
    options.add_argument("--minutes", type=float, default=12)
    options.add_argument("--preset", default="r3gan")
    options.add_argument("--draw", type=int, default=0)
    options.add_argument("--sizes", type=int, nargs="+", default=[25, 50], help="chests of each class")
    options.add_argument("--format", default="nifti")
    options.add_argument("--work", type=Path, required=True)
    options = options.parse_args()
    began, work = time.monotonic(), options.work
    work.mkdir(parents=True, exist_ok=True)
    match options.row:
        case "chests":
            chest_row(options.minutes, work)
        case "low-data":
            low_data_row(options.preset, options.minutes, tuple(options.sizes), work)
        case "pairs":
            pairs_row(options.preset, options.minutes, work)
        case "segmentation":
            segmentation_row(options.draw, work)
        case "thousand":
            thousand_row(options.preset, options.format, work)
        case "report":
            report(work, began)


if __name__ == "__main__":
    main()
