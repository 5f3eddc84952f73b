"""What mixtures of Gaussians are worth on PneumoniaMNIST: synthetic scans for learners, bits for densities.

Utility: as many real chests of both classes are drawn, learners are trained on them and on as many scans drawn
from a mixture fitted to the same chests class by class, and tested on the official test split. The mixtures'
sizes were chosen on the official val split, with the support vector machine; test is only reported.

Density: bits per dimension of normal chests at 8 bit; sizes were chosen on a fixed tenth of the train split.

    OMP_NUM_THREADS=1 python benchmarks/utility.py --seeds 3      # about half an hour, most of it the networks'
"""

import argparse
import time
from functools import partial

import numpy as np
import torch
from densities import GreyScans, bits_per_dim, nats, normals, stated
from measure import keep, shared_data, table

from medgen.config import load_preset
from medgen.data.dataset import Batch
from medgen.metrics.detection import auroc
from medgen.metrics.utility import LEARNERS, TARGETS, balanced, class_auroc, decisions
from medgen.models import build, config_of
from medgen.models.base import Model

GENERATORS = {"gaussian2d": [], "gmm2d": []}
DENSITIES = {
    "gaussian2d": [],
    "gaussian2d, ridge": ["model.shrinkage=ridge"],
    "gmm2d": [],
    "patchgmm2d": [],
}
CLASSES = np.array([0, 1])


def scans(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Chests on [0, 1] and their classes, 1 for pneumonia."""
    data = np.load(shared_data() / "medmnist" / "pneumoniamnist.npz")
    return data[f"{split}_images"].astype(np.float32) / 255, data[f"{split}_labels"][:, 0].astype(np.int64)


def fitted(name: str, overrides: list[str], x: np.ndarray, y: np.ndarray | None = None) -> Model:
    """A preset of the family 'mixture' fitted to scans, class by class where classes are given."""
    classes = () if y is None else ("normal", "pneumonia")
    values = load_preset(name.partition(",")[0], overrides).model
    model = build(config_of({**values, "shape": x.shape[1:], "channels": 1, "classes": classes, "bits": 8}))
    model.finalise([Batch(torch.from_numpy(x)[:, None], None if y is None else torch.from_numpy(y))])
    return model.eval()


def mean_auroc(runs: list[np.ndarray], y: np.ndarray) -> float:
    return float(np.mean([class_auroc(one, y, CLASSES) for one in runs]))


def utility(seeds: int, learners: list[str]) -> tuple[list[tuple], dict]:
    """AUROC on test after training on real and on synthetic scans, over draws of both."""
    (x, y), (x_test, y_test) = scans("train"), scans("test")
    runs: dict[tuple[str, str], list[np.ndarray]] = {}
    by_seed: dict[tuple[str, str], list[float]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in GENERATORS}
    for seed in range(seeds):
        rows = balanced(y, seed=seed)
        sets = {"real": x[rows]}
        for name, overrides in GENERATORS.items():
            began = time.monotonic()
            model = fitted(name, overrides, x[rows], y[rows])
            sets[name] = model.sample(len(rows), seed=seed, cond=torch.from_numpy(y[rows]))[:, 0].numpy()
            seconds[name].append(time.monotonic() - began)
        for name, drawn in sets.items():
            for learner in learners:
                found = list(decisions(learner, (drawn, y[rows]), x_test, seed=seed))
                runs.setdefault((name, learner), []).extend(found)
                by_seed.setdefault((name, learner), []).append(mean_auroc(found, y_test))
                print(seed, name, learner, f"{by_seed[name, learner][-1]:.4f}", flush=True)
    resamples = [np.random.default_rng(n).integers(len(y_test), size=len(y_test)) for n in range(500)]
    boot = {
        key: np.array([mean_auroc([one[rows] for one in found], y_test[rows]) for rows in resamples])
        for key, found in runs.items()
    }
    shown, results = [], {"scans each class": len(rows) // 2, "seconds to fit and draw": seconds}
    for name in ("real", *GENERATORS):
        line = [name]
        for learner in learners:
            key = (name, learner)
            low, high = np.percentile(boot[key], [2.5, 97.5])
            facts = {"mean": np.mean(by_seed[key]), "seeds": by_seed[key], "interval": [low, high]}
            if name != "real":
                facts["less than real"] = np.percentile(boot["real", learner] - boot[key], [2.5, 97.5]).tolist()
            results.setdefault(name, {})[learner] = facts
            line.append(f"{facts['mean']:.3f} ({low:.3f} to {high:.3f})")
        shown.append(tuple(line))
    return shown, results


def densities() -> tuple[list[tuple], dict]:
    """Bits per dimension of normal chests, after fitting to all of the train split."""
    levels, rows, results = normals(), [], {}
    train = GreyScans(np.concatenate([levels["train"], levels["tenth"]])).x[:, 0].numpy()
    for name, overrides in DENSITIES.items():
        began = time.monotonic()
        model = fitted(name, overrides, train)
        seconds = time.monotonic() - began
        bits = {s: bits_per_dim(partial(nats, model), GreyScans(levels[s]).x) for s in ("val", "test", "ill")}
        found = {split: stated(values) for split, values in bits.items()}
        facts = {"seconds to fit": seconds, "AUROC of bits": auroc(bits["test"], bits["ill"])}
        results[name] = {"bits per dimension": found, **facts}
        rows.append((name, *("{mean:.3f} +- {se:.3f}".format(**found[s]) for s in bits), *facts.values()))
        print(*rows[-1], flush=True)
    return rows, results


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--seeds", type=int, default=3, help="draws of the real scans and of the synthetic ones")
    options.add_argument("--learners", nargs="+", default=list(LEARNERS), help=f"targets: {', '.join(TARGETS)}")
    options = options.parse_args()
    began = time.monotonic()
    bits, measured = densities()
    rows, useful = utility(options.seeds, options.learners)
    table(bits, ("density", "val, bits/dim", "test", "ill", "seconds to fit", "AUROC of bits, ill over test"))
    table(rows, ("trained on", *(f"{learner}, AUROC on test" for learner in options.learners)))
    keep("utility", {"threads": torch.get_num_threads(), "seeds": options.seeds, "density": measured, **useful}, began)


if __name__ == "__main__":
    main()
