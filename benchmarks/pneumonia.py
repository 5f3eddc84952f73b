"""One-class detection on PneumoniaMNIST: learn the normals, score the official test split, sign-free.

Every score is folded about the official validation normals (two-sided), so no row knows whether ill
scans score high or low; nothing else is chosen. The test split is used once, to report.

    python benchmarks/pneumonia.py            # three seeds, at most three minutes of training each
"""

import argparse
import io
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measure import keep, shared_data, table
from PIL import Image
from skimage.feature import hog
from sklearn.neighbors import NearestNeighbors

import medgen
from medgen.bundle import Bundle
from medgen.metrics.detection import auroc
from medgen.tasks.calibration import folded, p_value
from medgen.tasks.detector import Detector


def gradient_energy(images: np.ndarray) -> np.ndarray:
    dy, dx = np.gradient(images, axis=(1, 2))
    return np.log((dx**2 + dy**2).mean((1, 2)))


def png_bytes(images: np.ndarray) -> np.ndarray:
    def size(one: np.ndarray) -> int:
        held = io.BytesIO()
        Image.fromarray(one.astype(np.uint8)).save(held, "PNG", optimize=True)
        return held.tell()

    return np.asarray([size(one) for one in images], float)


def hog_features(images: np.ndarray) -> np.ndarray:
    return np.stack([hog(one / 255, orientations=8, pixels_per_cell=(7, 7), cells_per_block=(2, 2)) for one in images])


def interval(healthy: np.ndarray, ill: np.ndarray, draws: int = 1000) -> tuple[float, float]:
    """95 % bootstrap interval of the AUROC over scans."""
    rng = np.random.default_rng(0)
    found = [auroc(rng.choice(healthy, len(healthy)), rng.choice(ill, len(ill))) for _ in range(draws)]
    return tuple(np.percentile(found, [2.5, 97.5]))


def fold(scores: np.ndarray, normals: np.ndarray) -> np.ndarray:
    return np.asarray([folded(normals, one)[1] for one in scores])


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--minutes", type=float, default=3)
    options.add_argument("--latent", type=int, nargs="+", default=[16, 8], help="lengths of the code vector")
    options = options.parse_args()
    began = time.monotonic()
    file = shared_data() / "medmnist" / "pneumoniamnist.npz"
    data = np.load(file)
    labels = {name: data[f"{name}_labels"][:, 0] for name in ("train", "val", "test")}
    train = data["train_images"][labels["train"] == 0].astype(float)
    normals = data["val_images"][labels["val"] == 0].astype(float)
    test, ill = data["test_images"].astype(float), labels["test"] == 1
    neighbours = NearestNeighbors(n_neighbors=5).fit(hog_features(train))
    baselines = {
        "mean intensity": lambda x: x.mean((1, 2)),
        "gradient energy": gradient_energy,
        "PNG size": png_bytes,
        "HOG-kNN": lambda x: neighbours.kneighbors(hog_features(x))[0].mean(1),
    }
    rows, results = [], {}
    for name, score in baselines.items():
        scores = fold(score(test), score(normals))
        value = auroc(scores[~ill], scores[ill])
        rows.append((name, value, "{:.3f}-{:.3f}".format(*interval(scores[~ill], scores[ill]))))
        results[name] = value
    x = torch.from_numpy((test / 255).astype(np.float32)).transpose(1, 2)[:, None]
    for latent in options.latent:
        name = f"VAE, {latent} latent dimensions, 1 - SSIM"
        values, false_alarms, minutes = [], [], []
        for seed in range(options.seeds):
            with tempfile.TemporaryDirectory() as work:
                started, place = time.monotonic(), Path(work) / "model"
                wanted = [f"model.latent={latent}"]
                medgen.train(file, place, label="0", minutes=options.minutes, seed=seed, overrides=wanted)
                minutes.append((time.monotonic() - started) / 60)
                detector = Detector.of(Bundle.load(place))
            raw = np.asarray([detector(one[None])[0] for one in x])
            scores = fold(raw, detector.scores)
            values.append(auroc(scores[~ill], scores[ill]))
            p = np.asarray([p_value(detector.scores, one) for one in raw[~ill]])
            false_alarms.append(float((p <= 0.05).mean()))
            low, high = interval(scores[~ill], scores[ill])
            rows.append((f"{name}, seed {seed}", values[-1], f"{low:.3f}-{high:.3f}"))
        results[name] = {"auroc": values, "minutes": minutes, "test normals with p <= 0.05": false_alarms}
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        print(f"{name}: {np.mean(values):.3f} +- {sd:.3f}; minutes {np.round(minutes, 2)}", flush=True)
    table(rows, ("score (two-sided about validation normals)", "AUROC", "95 % interval"))
    keep("pneumonia", {"auroc": results}, began)


if __name__ == "__main__":
    main()
