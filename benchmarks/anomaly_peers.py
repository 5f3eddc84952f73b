"""Other people's detectors beside `detector2d`: the same images, the same calibration scans, the same folding.

PyOD's detectors and a Glow of normflows see the normals of the train split; anomalib's models that need no pretrained
weights see them at 64 x 64 in three channels, their backbone with random weights. What is not installed is skipped.

    pip install pyod anomalib normflows; python benchmarks/anomaly_peers.py
"""

import argparse
import importlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from anomaly_images import RATE, SETS, file_of
from measure import keep, table
from torch.nn import functional

from medgen.metrics.detection import auroc, average_precision, sensitivity_at
from medgen.metrics.intervals import bootstrap_interval, patients_drawn
from medgen.tasks.calibration import folded, p_value

# Module and class of each, with what its authors call for when there is one answer.
PYOD = {
    "KNN": ("knn", {}), "IForest": ("iforest", {"random_state": 0}), "LOF": ("lof", {"novelty": True}),
    "ECOD": ("ecod", {}), "COPOD": ("copod", {}), "PCA": ("pca", {"random_state": 0}), "OCSVM": ("ocsvm", {}),
}  # fmt: skip
ANOMALIB = {"Padim": "padim", "Patchcore": "patchcore"}
LAYERS = ["layer1", "layer2", "layer3"]
# Healthy images to scores of others.
Peer = Callable[[np.ndarray], Callable[[np.ndarray], np.ndarray]]


def pyod(name: str, train: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    module, settings = PYOD[name]
    found = getattr(importlib.import_module(f"pyod.models.{module}"), name)(**settings)
    found.fit(train.reshape(len(train), -1))
    return lambda images: found.decision_function(images.reshape(len(images), -1))


def anomalib(name: str, train: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    module = importlib.import_module(f"anomalib.models.image.{ANOMALIB[name]}.torch_model")
    kind = getattr(module, f"{name}Model")
    torch.manual_seed(0)
    model = kind(layers=LAYERS if name == "Padim" else LAYERS[1:], backbone="resnet18", pre_trained=False)

    @torch.no_grad()
    def seen(images: np.ndarray) -> list[Any]:
        return [model(functional.interpolate(one, 64, mode="bilinear")) for one in in_colour(images).split(64)]

    model.train()
    seen(train)
    if name == "Padim":
        model.fit()
    else:
        model.subsample_embedding(0.01)
    model.eval()
    return lambda images: torch.cat([one.pred_score.reshape(-1) for one in seen(images)]).numpy()


def in_colour(images: np.ndarray) -> torch.Tensor:
    x = torch.from_numpy(images).float()
    return x[:, None].repeat(1, 3, 1, 1) if x.ndim == 3 else x.movedim(-1, 1)


def glow(train: np.ndarray, *, seconds: float) -> Callable[[np.ndarray], np.ndarray]:
    """-log p, of grey images."""
    from flow_peer import BATCH, SIZE, Peer, Runner

    edge = (SIZE - train.shape[1]) // 2

    def levels(images: np.ndarray) -> torch.Tensor:
        x = torch.from_numpy((images * 255).round()).float()[:, None]
        return functional.pad(x, (edge,) * 4, mode="replicate")

    x = levels(train)
    torch.manual_seed(0)
    runner = Runner(Peer(x[:BATCH]), {"train": x[::10].new_empty(0), "tenth": x[::10]}, seconds=seconds)
    keep_out = torch.arange(len(x)) % 10 == 0
    runner.scans["train"] = x[~keep_out]
    while runner.spent < seconds:
        runner.train(seconds / 5)
    runner.net.load_state_dict(runner.weights)
    return lambda images: torch.cat([runner.net.nats(one) for one in levels(images).split(64)]).detach().numpy()


def peers(seconds: float, colour: bool) -> Iterator[tuple[str, Peer]]:
    """Those that are installed; says which are not."""
    groups: dict[str, list[tuple[str, Peer]]] = {
        "pyod": [(f"PyOD {name}", partial(pyod, name)) for name in PYOD],
        "anomalib": [(f"anomalib {name}, random weights", partial(anomalib, name)) for name in ANOMALIB],
        "normflows": [] if colour else [("normflows Glow, -log p", partial(glow, seconds=seconds))],
    }
    for package, members in groups.items():
        try:
            importlib.import_module("anomalib.models" if package == "anomalib" else package)
        except (ImportError, RuntimeError) as error:
            print(f"{package} is skipped: it cannot be imported here ({str(error).splitlines()[0]}).", flush=True)
            continue
        yield from members


def scores_of(values: dict[str, np.ndarray], two_sided: bool) -> dict[str, Any]:
    """Numbers of the official test scans, folded about the calibration scans or as they are."""
    known = values["val"]
    dark, ill = (
        np.asarray([folded(known, one, two_sided=two_sided)[1] for one in values[part]]) for part in ("healthy", "ill")
    )
    flagged = np.mean([p_value(known, one, two_sided=two_sided) <= RATE for one in values["healthy"]])
    both, n = np.concatenate([dark, ill]), len(dark)
    names = [str(one) for one in range(len(both))]
    strata = ["healthy"] * n + ["ill"] * len(ill)
    draws = patients_drawn(names, np.random.default_rng(0), strata=strata, draws=500)
    interval = bootstrap_interval(lambda d: auroc(both[d[d < n]], both[d[d >= n]]), draws)
    return {
        "auroc": auroc(dark, ill), "auroc_interval": interval, "average_precision": average_precision(dark, ill),
        "sensitivity": sensitivity_at(dark, ill), "flagged": float(flagged),
    }  # fmt: skip


def measured(name: str, seconds: float) -> list[dict[str, Any]]:
    ill, colour = SETS[name]
    data = np.load(file_of(name))
    labels = {part: data[f"{part}_labels"][:, 0] for part in ("train", "val", "test")}
    images = {part: data[f"{part}_images"].astype(np.float64) / 255 for part in labels}
    wanted = np.isin(labels["test"], [int(one) for one in ill] or [1])
    train = images["train"][labels["train"] == 0]
    parts = {"val": images["val"][labels["val"] == 0]}
    parts |= {"healthy": images["test"][labels["test"] == 0], "ill": images["test"][wanted]}
    rows = []
    for peer, learn in peers(seconds, colour):
        began = time.perf_counter()
        score = learn(train)
        spent = time.perf_counter() - began
        values = {part: np.asarray(score(x), np.float64) for part, x in parts.items()}
        for sides, two_sided in (("", False), (", both sides", True)):
            rows.append({"peer": peer + sides, "train_seconds": spent, **scores_of(values, two_sided)})
        print(f"{peer}: {rows[-2]['auroc']:.3f}, both sides {rows[-1]['auroc']:.3f}, {spent:.1f} s", flush=True)
    return rows


def main() -> None:
    parsed = argparse.ArgumentParser()
    parsed.add_argument("--seconds", type=float, default=120, help="of training a normflows Glow")
    parsed.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    wanted = parsed.parse_args()
    began, found = time.monotonic(), {}
    for name in wanted.sets:
        found[name] = measured(name, wanted.seconds)
        print(f"\n{name}")
        table(
            [
                (r["peer"], "{:.3f} ({:.3f} to {:.3f})".format(r["auroc"], *r["auroc_interval"]),
                 r["average_precision"], r["sensitivity"], r["flagged"])
                for r in found[name]
            ],
            ("peer", "AUROC, 95 %", "AP", "sensitivity", "healthy flagged at 5 %"),
        )  # fmt: skip
    keep("anomaly_peers", {"peers": found}, began)


if __name__ == "__main__":
    main()
