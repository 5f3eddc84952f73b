"""Adversarial networks on chests and hippocampi: what samples are worth, how far they are from real scans, collapse.

PneumoniaMNIST at 28 x 28, class-conditional: models learn from the official train split and stop by the official val
split; learners trained on as many samples of both classes are tested on the official test split, beside learners
trained on real scans and on draws of a mixture of Gaussians. Distances of sets are to train scans, beside those of val
scans (the floor). Hippocampi (crops resized to 32 x 48 x 32): a fifth of the subjects is held out as the floor.

Every row is a file of its own in --work, and is not computed again where it is there:

    python benchmarks/gans.py chests r3gan2d --seed 0 --minutes 15 --work WORK
    python benchmarks/gans.py chests dcgan2d --seed 0 --minutes 15 --work WORK
    python benchmarks/gans.py baselines --work WORK
    python benchmarks/gans.py volumes r3gan3d --minutes 20 --work WORK
    python benchmarks/gans.py smoke --work WORK                       # every preset, 300 images
    python benchmarks/gans.py distances --work WORK                   # again, of weights that are there
    python benchmarks/gans.py report --work WORK                      # results/gans.json, tables
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from measure import keep, machine, peak_mb, shared_data, table
from PIL import Image

from medgen.config import load_preset, preset_names
from medgen.data.dataset import Batch, collate
from medgen.metrics.hog import hog_rows
from medgen.metrics.radiomics import radiomics
from medgen.metrics.sets import compare_sets
from medgen.metrics.utility import TARGETS, balanced, class_auroc, decisions
from medgen.models import build, config_of, family
from medgen.models.base import Model
from medgen.training.doctor import complaints
from medgen.training.fit import FitConfig, fit
from medgen.training.pace import images_in

CLASSES = ("normal", "pneumonia")
DRAWS, RESAMPLES = 3, 500
SPACE_3D = (32, 48, 32)


class Scans:
    """Scans in memory as `fit` takes them, with classes and given images where there are any."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor | None = None, given: torch.Tensor | None = None) -> None:
        self.x, self.y, self.given = x, y, given

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, n: int) -> dict:
        told = {"x": self.x[n], "cond": -1 if self.y is None else int(self.y[n]), "case": str(n)}
        return told if self.given is None else told | {"context": self.given[n]}

    def batches(self, size: int) -> Iterator[Batch]:
        for first in range(0, len(self), size):
            yield collate([self[n] for n in range(first, min(first + size, len(self)))])


def chests(split: str) -> Scans:
    data = np.load(shared_data() / "medmnist" / "pneumoniamnist.npz")
    x = torch.from_numpy(data[f"{split}_images"].astype(np.float32) / 255)[:, None]
    return Scans(x, torch.from_numpy(data[f"{split}_labels"][:, 0].astype(np.int64)))


def hippocampi() -> tuple[Scans, Scans]:
    """Crops on [0, 1] by each scan's percentiles: of the subjects to learn from, and of those held out."""
    from medgen import io

    found = []
    for path in sorted((shared_data() / "hippocampus_msd" / "images").rglob("*.nii*")):
        values = torch.from_numpy(np.ascontiguousarray(io.read(path).physical(), dtype=np.float32))
        low, high = np.percentile(values, [0.5, 99.5])
        whole = torch.nn.functional.interpolate(values[None], SPACE_3D, mode="trilinear")[0]
        found.append(((whole - low) / max(high - low, 1e-6)).clamp(0, 1))
    order = np.random.default_rng(0).permutation(len(found))
    held = len(found) // 5
    return tuple(Scans(torch.stack([found[n] for n in np.sort(rows)])) for rows in (order[held:], order[:held]))


def untrained(name: str, train: Scans) -> Model:
    """A preset's model for these scans; one that ignores classes is told them as a cGAN is."""
    values = dict(load_preset(name).model)
    if train.y is not None and values.get("condition") == "none":
        values["condition"] = "concat"
    shape, classes = tuple(train.x.shape[2:]), CLASSES if train.y is not None else ()
    return build(config_of({**values, "shape": shape, "channels": 1, "classes": classes}))


def trained(name: str, train: Scans, val: Scans, minutes: float, seed: int) -> tuple[Model, dict]:
    """A preset trained for so many minutes on this machine."""
    torch.manual_seed(seed)
    model = untrained(name, train)
    settings = FitConfig.model_validate(dict(load_preset(name).fit))
    model.initialise(next(train.batches(model.first_scans)))
    possible, seconds = images_in(0.9 * minutes, model, train, settings, device="cpu")
    settings = settings.model_copy(update={"images": min(settings.images, possible)})
    began = time.monotonic()
    reached = fit(model, train, val, settings, seed=seed, device="cpu", seconds=60 * minutes)
    health = model.health(train.batches(64))
    return model, {
        "preset": name,
        "seed": seed,
        "minutes": round((time.monotonic() - began) / 60, 2),
        "threads": torch.get_num_threads(),
        "images seen": reached.trained,
        "best at": reached.best_seen,
        "seconds an image": seconds,
        "health": health,
        "warnings": [*reached.warnings, *complaints(health)],
        "history": [[seen, held] for seen, _, held in reached.history],
        "peak_mb": round(peak_mb()),
        "machine": machine(),
    }


def test_aurocs(name: str, drawn: list[tuple[np.ndarray, np.ndarray]], work: Path) -> dict:
    """AUROC on test after training on each draw; decisions are kept for paired intervals."""
    test = chests("test")
    x, y = test.x[:, 0].numpy(), test.y.numpy()
    runs = {learner: [decisions(learner, one, x, seed=n) for n, one in enumerate(drawn)] for learner in TARGETS}
    np.savez_compressed(work / f"{name}.npz", y=y, **{key: np.concatenate(found) for key, found in runs.items()})
    return {key: [auroc_of(one, y) for one in found] for key, found in runs.items()}


def auroc_of(runs: np.ndarray, y: np.ndarray) -> float:
    return float(np.mean([class_auroc(one, y, np.array([0, 1])) for one in runs]))


def distances(model: Model, train: Scans, held: Scans, seed: int = 0) -> dict:
    """Of samples, and of held-out scans, to train scans: as many each, classes as in the held-out ones."""
    rng, rows = np.random.default_rng(seed), []
    if held.y is None:
        rows = rng.permutation(len(train))[: len(held)]
    else:
        for y in held.y.unique():
            rows.append(rng.permutation(np.flatnonzero(train.y.numpy() == int(y)))[: int((held.y == y).sum())])
        rows = np.concatenate(rows)
    made = model.sample(len(held), seed=seed, cond=held.y).clamp(0, 1)
    sets = (made, train.x[rows], held.x)
    features = {"radiomics": radiomics, "hog": hog_rows}
    return {name: compare_sets(*map(of, sets), seed=seed).to_dict() for name, of in features.items()}


def measured_again(work: Path) -> None:
    """Distances of every row whose weights are there; nothing is trained."""
    for place in sorted(work.glob("*.pt")):
        row = json.loads(place.with_suffix(".json").read_text())
        train, held = hippocampi() if place.stem.startswith("volumes") else (chests("train"), chests("val"))
        model = untrained(row["preset"], train)
        model.load_state_dict(torch.load(place, weights_only=True))
        row["distances"] = distances(model.eval(), train, held)
        place.with_suffix(".json").write_text(json.dumps(row, indent=1, default=float))


def sheet(made: torch.Tensor, path: Path, real: torch.Tensor | None = None) -> None:
    """Two rows of samples; below two rows of real scans where given, for the eye and not for the repository."""

    def rows(x: torch.Tensor) -> np.ndarray:
        flat = x[:32, 0] if x.ndim == 4 else x[:32, 0, :, :, x.shape[4] // 2]
        return np.concatenate([np.concatenate(list(flat[n : n + 16].numpy()), 1) for n in (0, 16)], 0)

    parts = [rows(made)]
    parts += [] if real is None else [np.ones((4, parts[0].shape[1])), rows(real)]
    image = Image.fromarray((np.concatenate(parts, 0).clip(0, 1) * 255).astype(np.uint8))
    image.resize((image.width * 3, image.height * 3), Image.Resampling.NEAREST).save(path)


def chest_row(name: str, seed: int, minutes: float, work: Path) -> None:
    train, val = chests("train"), chests("val")
    model, row = trained(name, train, val, minutes, seed)
    drawn, last = [], None
    for draw in range(DRAWS):
        y = train.y[balanced(train.y.numpy(), seed=draw)]
        last = model.sample(len(y), seed=1000 + draw, cond=y).clamp(0, 1)
        drawn.append((last[:, 0].numpy(), y.numpy()))
    key = f"chests-{name}-{seed}-{minutes:g}"
    torch.save(model.state_dict(), work / f"{key}.pt")
    row["distances"] = distances(model, train, val)
    row["test"] = test_aurocs(key, drawn, work)
    mixed = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:32]
    made = model.sample(32, seed=1, cond=train.y[mixed])
    sheet(made, work / f"{key}.png", train.x[mixed])
    sheet(made, work / f"{key}-generated.png")
    (work / f"{key}.json").write_text(json.dumps(row, indent=1, default=float))


def baseline_rows(work: Path) -> None:
    """Learners trained on real scans, and on draws of the mixture and of the Gaussian, fitted to all train scans."""
    train, val = chests("train"), chests("val")
    for name in ("real", "gmm2d", "gaussian2d"):
        if (work / f"baseline-{name}.json").exists():
            continue
        began, drawn, row = time.monotonic(), [], {}
        model = None
        if name != "real":
            values = {**load_preset(name).model, "shape": (28, 28), "channels": 1, "classes": CLASSES}
            model = build(config_of(values))
            model.finalise([Batch(train.x, train.y)])
            model.eval()
            row["distances"] = distances(model, train, val)
        for draw in range(DRAWS):
            rows = balanced(train.y.numpy(), seed=draw)
            y = train.y[rows]
            x = train.x[rows] if model is None else model.sample(len(y), seed=1000 + draw, cond=y).clamp(0, 1)
            drawn.append((x[:, 0].numpy(), y.numpy()))
        row |= {"test": test_aurocs(f"baseline-{name}", drawn, work), "seconds": time.monotonic() - began}
        (work / f"baseline-{name}.json").write_text(json.dumps(row, indent=1, default=float))


def volume_row(name: str, seed: int, minutes: float, work: Path) -> None:
    train, held = hippocampi()
    model, row = trained(name, train, held, minutes, seed)
    row |= {"scans": [len(train), len(held)], "distances": distances(model, train, held)}
    key = f"volumes-{name}-{seed}-{minutes:g}"
    torch.save(model.state_dict(), work / f"{key}.pt")
    made = model.sample(32, seed=1)
    sheet(made, work / f"{key}.png", train.x)
    sheet(made, work / f"{key}-generated.png")
    (work / f"{key}.json").write_text(json.dumps(row, indent=1, default=float))


def smoke_rows(work: Path) -> None:
    """Every preset sees 300 images: is the loss finite, do samples differ?"""
    images, volumes = chests("train"), hippocampi()[0]
    for name in [one for one in preset_names() if load_preset(one).about.family == "gan"]:
        place = work / f"smoke-{name}.json"
        if place.exists():
            continue
        preset = load_preset(name)
        values, planar = dict(preset.model), preset.about.dims == 2
        stride = family("gan").stride(values)
        scans = images if planar else volumes
        x = scans.x[(..., *(slice(0, n - n % stride) for n in scans.x.shape[2:]))]
        # What is given is the brightest part of the scan, as a mask.
        data = Scans(x, scans.y, (x > x.median()).float() if values.get("context") else None)
        shape, classes = tuple(x.shape[2:]), CLASSES if planar else ()
        model = build(config_of({**values, "shape": shape, "channels": 1, "classes": classes}))
        settings = FitConfig(**{**preset.fit, "images": 300, "batch_size": 20, "warmup": 20, "validations": 2})
        began = time.monotonic()
        reached = fit(model, data, None, settings, seed=0, device="cpu")
        given = {} if data.given is None else {"context": data.given[:8]}
        made = model.sample(8, seed=0, cond=torch.arange(8) % 2 if classes else None, **given)
        finite = all(np.isfinite(loss) for _, loss, _ in reached.history) and bool(torch.isfinite(made).all())
        over, within = float(made.std(0).mean()), float(made.flatten(1).std(1).mean())
        row = {"finite": finite, "spread over samples": over, "spread within": within}
        place.write_text(json.dumps(row | {"seconds": time.monotonic() - began}, default=float))
        print(name, row, flush=True)


# -- what it all says --------------------------------------------------------------------------------


def paired(work: Path, key: str, other: str) -> dict:
    """Mean of the target learners' AUROC, its ratio to and difference from another row's, with paired intervals."""
    one, two = (np.load(work / f"{name}.npz") for name in (key, other))
    y = one["y"]
    rng, ratios, gains = np.random.default_rng(0), [], []

    def mean(found: np.lib.npyio.NpzFile, rows: np.ndarray) -> float:
        return float(np.mean([auroc_of(found[learner][:, rows], y[rows]) for learner in TARGETS]))

    for _ in range(RESAMPLES):
        rows = np.concatenate([rng.choice(np.flatnonzero(y == c), int((y == c).sum())) for c in (0, 1)])
        a, b = mean(one, rows), mean(two, rows)
        ratios.append(a / b)
        gains.append(a - b)
    every = np.arange(len(y))
    a, b = mean(one, every), mean(two, every)
    ends = {"ratio": np.percentile(ratios, [2.5, 97.5]).tolist(), "gain": np.percentile(gains, [2.5, 97.5]).tolist()}
    return {"auroc": a, "other": b, "ratio": a / b, "gain": a - b, "intervals": ends}


def ratios(row: dict) -> list:
    """Coverage and Fréchet distance over their floor, of radiomics and of HOG each."""
    found = row.get("distances")
    names = [(metric, features) for metric in ("coverage", "frechet") for features in ("radiomics", "hog")]
    return [found[features]["measures"][metric]["ratio"] if found else "" for metric, features in names]


def report(work: Path, began: float) -> None:
    rows = {path.stem: json.loads(path.read_text()) for path in sorted(work.glob("*.json"))}
    shown = []
    for key, row in rows.items():
        if "test" in row:
            row["against real"] = paired(work, key, "baseline-real")
            row["against mixture"] = paired(work, key, "baseline-gmm2d")
            found = ratios(row)
            gain = row["against mixture"]
            low, high = gain["intervals"]["gain"]
            said = (gain["auroc"], row["against real"]["ratio"], f"{gain['gain']:.4f} ({low:.4f} to {high:.4f})")
            shown.append((key, *said, *found))
    told = ("coverage, of floor: radiomics", "HOG", "Frechet, of floor: radiomics", "HOG")
    table(shown, ("row", "test AUROC, svm and cnn", "of real", "over the mixture", *told))
    table([(key, *ratios(row)) for key, row in rows.items() if key.startswith("volumes")], ("row", *told))
    smoke = {key: row for key, row in rows.items() if key.startswith("smoke")}
    table([(key, *row.values()) for key, row in smoke.items()], ("preset", "finite", "over", "within", "seconds"))
    keep("gans", {"rows": rows}, began)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("what", choices=("chests", "baselines", "volumes", "smoke", "distances", "report"))
    options.add_argument("preset", nargs="?", default="r3gan2d")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--minutes", type=float, default=15)
    options.add_argument("--work", type=Path, required=True)
    asked = options.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    if asked.what in ("chests", "volumes"):
        key = f"{asked.what}-{asked.preset}-{asked.seed}-{asked.minutes:g}"
        if not (asked.work / f"{key}.json").exists():
            run = chest_row if asked.what == "chests" else volume_row
            run(asked.preset, asked.seed, asked.minutes, asked.work)
    elif asked.what == "report":
        report(asked.work, began)
    else:
        {"baselines": baseline_rows, "smoke": smoke_rows, "distances": measured_again}[asked.what](asked.work)


if __name__ == "__main__":
    main()
