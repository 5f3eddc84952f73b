"""Densities of chests as a classifier of chests: p(class | x) by Bayes' rule, beside a small network told the classes.

PneumoniaMNIST at 28 x 28, as many pneumonias as normals in training. The checkpoint and the temperature are chosen on a
tenth of the train split; the official test split is reported once, with a bootstrap interval.

    python benchmarks/classify.py --presets gaussian2d,gmm2d,vae2d,flow2d --minutes 5
"""

import argparse
import time

import numpy as np
import torch
from densities import GreyScans
from measure import keep, shared_data, table

from medgen.config import load_preset
from medgen.data.dataset import Batch
from medgen.metrics.classification import (
    accuracy,
    best_temperature,
    expected_calibration_error,
    log_loss,
    one_versus_rest_auroc,
    tempered,
)
from medgen.models import build, config_of
from medgen.models.base import Model
from medgen.training.fit import FitConfig, fit
from medgen.training.pace import images_in

CLASSES = ("normal", "pneumonia")


class LabelledScans(GreyScans):
    """Grey levels with their classes."""

    def __init__(self, levels: np.ndarray, classes: np.ndarray) -> None:
        super().__init__(levels)
        self.classes = classes

    def __getitem__(self, index: int) -> dict:
        return super().__getitem__(index) | {"cond": int(self.classes[index])}


def chests() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Levels and classes: 'train' balanced, 'tenth' of the train split for choices, 'test' the official one."""
    data = np.load(shared_data() / "medmnist" / "pneumoniamnist.npz")
    levels, classes = data["train_images"], data["train_labels"][:, 0].astype(np.int64)
    rng = np.random.default_rng(0)
    normal, ill = (rng.permutation(np.flatnonzero(classes == c)) for c in (0, 1))
    ill = ill[: len(normal)]
    tenth = np.concatenate([rows[: len(rows) // 10] for rows in (normal, ill)])
    train = rng.permutation(np.concatenate([rows[len(rows) // 10 :] for rows in (normal, ill)]))
    test = (data["test_images"], data["test_labels"][:, 0].astype(np.int64))
    return {"train": (levels[train], classes[train]), "tenth": (levels[tenth], classes[tenth]), "test": test}


def density(preset: str, scans: dict, *, minutes: float, seed: int) -> Model:
    """A preset told the class, trained on both classes."""
    wanted = load_preset(preset)
    torch.manual_seed(seed)
    told = {"shape": (28, 28), "channels": 1, "classes": CLASSES}
    model = build(config_of({**wanted.model, **told}))
    settings = FitConfig.model_validate(wanted.fit)
    train, held = LabelledScans(*scans["train"]), LabelledScans(*scans["tenth"])
    if model.players():
        possible, _ = images_in(0.8 * minutes, model, train, settings, device="cpu")
        settings = settings.model_copy(update={"images": min(settings.images, possible)})
    fit(model, train, held, settings, seed=seed, device="cpu", seconds=60 * minutes)
    model.finalise(train.batches(64))
    return model.eval()


@torch.no_grad()
def told(model: Model, levels: np.ndarray) -> np.ndarray:
    """log p(class | x) of every scan."""
    x = GreyScans(levels).x
    return torch.cat([model.class_log_prob(part).double() for part in x.split(64)]).numpy()


def network(scans: dict, *, seed: int) -> dict[str, np.ndarray]:
    """log p(class | x) of a small convolutional network that learns the classes, best of its epochs on the tenth."""
    torch.manual_seed(seed)
    layers: list[torch.nn.Module] = []
    for inside, outside in ((1, 16), (16, 32), (32, 64)):
        layers += [torch.nn.Conv2d(inside, outside, 3, padding=1), torch.nn.BatchNorm2d(outside), torch.nn.ReLU()]
        layers += [torch.nn.MaxPool2d(2)]
    net = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Dropout(0.3), torch.nn.Linear(64 * 9, 2))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=1e-2)
    batch, best, kept = Batch(GreyScans(scans["train"][0]).x, torch.as_tensor(scans["train"][1])), np.inf, {}

    def chances(levels: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return net.eval()(GreyScans(levels).x).double().log_softmax(1).numpy()

    for _ in range(20):
        for rows in torch.randperm(len(batch.x)).split(64):
            shifted = torch.roll(batch.x[rows], tuple(torch.randint(-2, 3, (2,)).tolist()), (2, 3))
            loss = torch.nn.functional.cross_entropy(net.train()(shifted), batch.cond[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        held = log_loss(chances(scans["tenth"][0]), scans["tenth"][1])
        if held < best:
            best, kept = held, {name: chances(scans[name][0]) for name in ("tenth", "test")}
    return kept


def interval(found: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """95 % of bootstrap AUROCs."""
    rng = np.random.default_rng(0)
    draws = [rng.integers(len(true), size=len(true)) for _ in range(1000)]
    spread = np.quantile([one_versus_rest_auroc(found[rows], true[rows]) for rows in draws], [0.025, 0.975])
    return float(spread[0]), float(spread[1])


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--presets", default="gaussian2d,gmm2d,vae2d,flow2d")
    options.add_argument("--minutes", type=float, default=5, help="of training, each preset")
    options.add_argument("--seed", type=int, default=0)
    options = options.parse_args()
    began, scans, rows, results = time.monotonic(), chests(), [], {}

    def report(name: str, held: np.ndarray, test: np.ndarray) -> None:
        true = scans["test"][1]
        temperature = best_temperature(held, scans["tenth"][1])
        calm = tempered(test, temperature)
        low, high = interval(test, true)
        results[name] = {
            "AUROC": one_versus_rest_auroc(test, true), "AUROC 95 %": [low, high], "accuracy": accuracy(test, true),
            "ECE": expected_calibration_error(test, true), "temperature": temperature,
            "ECE tempered": expected_calibration_error(calm, true), "log loss tempered": log_loss(calm, true),
        }  # fmt: skip
        one = results[name]
        rows.append((
            name, f"{one['AUROC']:.3f} ({low:.3f} to {high:.3f})", f"{one['accuracy']:.3f}", f"{one['ECE']:.3f}",
            f"{temperature:.1f}", f"{one['ECE tempered']:.3f}", f"{one['log loss tempered']:.3f}",
        ))  # fmt: skip
        print(*rows[-1], flush=True)

    found = network(scans, seed=options.seed)
    report("small network, told the classes", found["tenth"], found["test"])
    for preset in filter(None, options.presets.split(",")):
        model = density(preset, scans, minutes=options.minutes, seed=options.seed)
        report(preset, told(model, scans["tenth"][0]), told(model, scans["test"][0]))
    table(rows, ("classifier", "AUROC on test", "accuracy", "ECE", "temperature", "ECE tempered", "log loss tempered"))
    keep("classify", {"scans": {name: len(one[1]) for name, one in scans.items()}, **results}, began)


if __name__ == "__main__":
    main()
