"""Held-out bits per dimension of 44 T1 brains at 2 mm, five folds: Gaussians, a plain flow and the pyramid flow.

python benchmarks/flow_brains.py --minutes 4       # each model, each fold
"""

import argparse
import itertools
import math
import time
from functools import partial

import numpy as np
from brains import folds
from densities import LEVELS, GreyScans, bits_per_dim, nats, stated, trained
from measure import keep, peak_mb, shared_data, table

from medgen import io
from medgen.config import load_preset
from medgen.data.dataset import model_view
from medgen.tasks.learn import Choices, plan_training

PYRAMID, PLAIN = "waveletflow3d", "glow3d"


class RidgeGaussian:
    """Voxels standardised by their spread (at least `floor` grey values; 0: left alone), covariance S + ridge * I.

    Everything goes through the n x n Gram matrix; the density is exact, of values plus uniform noise.
    """

    def __init__(self, train: np.ndarray, floor: float, ridge: float) -> None:
        flat = train.reshape(len(train), -1).astype(np.float32)
        self.mean, self.ridge = flat.mean(0) + 0.5, ridge
        self.spread = np.maximum(flat.std(0, ddof=1), floor) if floor else np.ones_like(self.mean)
        rows = (flat + 0.5 - self.mean) / self.spread / math.sqrt(len(flat) - 1)
        values, vectors = np.linalg.eigh((rows @ rows.T).astype(np.float64))
        kept = values > 1e-6 * values[-1]
        self.values = values[kept]
        self.axes = (vectors[:, kept].T @ rows / np.sqrt(self.values)[:, None]).astype(np.float32)

    def bits(self, levels: np.ndarray, seed: int = 0) -> np.ndarray:
        dims = self.mean.size
        noise = np.random.default_rng(seed).random((len(levels), dims), dtype=np.float32)
        rows = (levels.reshape(len(levels), -1) + noise - self.mean) / self.spread
        along = (rows @ self.axes.T).astype(np.float64) ** 2
        share = self.values / (self.values + self.ridge)
        square = ((rows.astype(np.float64) ** 2).sum(1) - (along * share).sum(1)) / self.ridge
        volume = dims * math.log(self.ridge) + np.log1p(self.values / self.ridge).sum() + 2 * np.log(self.spread).sum()
        return 0.5 * (square + volume + dims * math.log(2 * math.pi)) / (dims * math.log(2))


def best_gaussian(train: np.ndarray, stop: np.ndarray, floors: list[float]) -> tuple[RidgeGaussian, dict]:
    """Floor and ridge chosen on the scans that also stop the flows' training."""
    grid = itertools.product(floors, np.geomspace(1e-2, 1e3 if floors == [0.0] else 3, 11))
    tried = [(RidgeGaussian(train, f, r).bits(stop).mean(), f, float(r)) for f, r in grid]
    _, floor, ridge = min(tried)
    return RidgeGaussian(train, floor, ridge), {"floor": floor, "ridge": ridge}


def prepared() -> dict[str, np.ndarray]:
    """Grey levels (1, *space) of every subject, by the recipe that `medgen train` would choose."""
    folder = shared_data() / "brain_t1_ds002748" / "mni2mm"
    recipe = plan_training(folder, Choices(preset=PYRAMID)).recipe
    files = {path.name.split("_")[0]: path for path in sorted(folder.glob("*.nii.gz"))}
    scans = {name: model_view(recipe(io.read(path))).numpy() for name, path in files.items()}
    return {name: np.round(x * (LEVELS - 1)).astype(np.uint8) for name, x in scans.items()}


def one_fold(scans: dict[str, np.ndarray], held: list[str], minutes: float, seed: int) -> dict[str, dict]:
    rest = [name for name in scans if name not in held]
    # Three training subjects choose checkpoints, floors and ridges; the held-out fold takes no part.
    stop = sorted(np.random.default_rng(seed).permutation(rest)[:3])
    train = np.concatenate([scans[name] for name in rest if name not in stop])
    stopping, test = (np.concatenate([scans[name] for name in names]) for names in (stop, held))
    found = {}
    for name, floors in (("ridge Gaussian", [0.0]), ("ridge Gaussian, voxels standardised", [0.3, 1.0, 3.0])):
        density, chosen = best_gaussian(train, stopping, floors)
        found[name] = {"bits": density.bits(test).tolist(), **chosen}
    for preset in (PLAIN, PYRAMID):
        model, facts = trained(load_preset(preset), train, stopping, minutes=minutes, seed=seed)
        bits = bits_per_dim(partial(nats, model), GreyScans(test).x, size=1)
        found[preset] = {"bits": bits.tolist(), **facts}
    return found


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--folds", type=int, default=5)
    options.add_argument("--only", type=int, default=None, help="run the first so many folds")
    options.add_argument("--minutes", type=float, default=4, help="of training, each model and fold")
    options = options.parse_args()
    began, scans, results = time.monotonic(), prepared(), []
    for number, held in enumerate(folds(list(scans), options.folds, 0)[: options.only]):
        results.append(one_fold(scans, held, options.minutes, number))
        means = {name: float(np.mean(row["bits"])) for name, row in results[-1].items()}
        print(f"fold {number}: " + ", ".join(f"{name} {bits:.3f}" for name, bits in means.items()), flush=True)
    rows, kept = [], {}
    for name in results[0]:
        bits = np.concatenate([fold[name]["bits"] for fold in results])
        kept[name] = stated(bits)
        gap = np.concatenate([np.subtract(f[name]["bits"], f[PYRAMID]["bits"]) for f in results])
        behind = "" if name == PYRAMID else "{mean:+.3f} +- {se:.3f}".format(**stated(gap))
        rows.append((name, "{mean:.3f} +- {se:.3f}".format(**kept[name]), behind))
    table(rows, ("density", "held-out bits/dim", f"behind {PYRAMID}, paired"))
    keep("flow_brains", {"bits per dimension": kept, "folds": results, "peak_mb": peak_mb()}, began)


if __name__ == "__main__":
    main()
