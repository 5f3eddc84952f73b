"""What the density benchmarks share: PneumoniaMNIST's normal chests in grey levels, and bits per dimension."""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from measure import keep, shared_data, table
from torch import Tensor

from medgen.config import Preset, load_preset
from medgen.data.dataset import Batch, collate
from medgen.metrics.detection import auroc
from medgen.models import build, config_of, family
from medgen.models.base import Model
from medgen.nets.blocks import count_parameters
from medgen.training.fit import FitConfig, fit, images_in

LEVELS = 256
REPORTED = ("tenth", "val", "test", "ill")


def normals() -> dict[str, np.ndarray]:
    """Grey levels (n, 28, 28) of the normal chests.

    'tenth' is a fixed tenth of the official train split and 'train' the rest; whatever is chosen is chosen on
    the tenth. 'val' and 'test' are the official splits, to be reported once; 'ill' is the test split's pneumonia.
    """
    data = np.load(shared_data() / "medmnist" / "pneumoniamnist.npz")
    found = {name: data[f"{name}_images"][data[f"{name}_labels"][:, 0] == 0] for name in ("train", "val", "test")}
    found["ill"] = data["test_images"][data["test_labels"][:, 0] == 1]
    order = np.random.default_rng(0).permutation(len(found["train"]))
    tenth, rest = np.split(order, [len(order) // 10])
    return {**found, "train": found["train"][rest], "tenth": found["train"][tenth]}


class GreyScans:
    """Grey levels (n, *space) as prepared scans on [0, 1], with what `fit` asks of a dataset."""

    def __init__(self, levels: np.ndarray) -> None:
        self.x = torch.from_numpy(levels.astype(np.float32))[:, None] / (LEVELS - 1)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        scale = torch.tensor([float(LEVELS - 1), 0.0], dtype=torch.float64)
        return {"case": str(index), "x": self.x[index], "cond": -1, "scale": scale}

    def batches(self, size: int) -> Iterator[Batch]:
        for first in range(0, len(self), size):
            yield collate([self[n] for n in range(first, min(first + size, len(self)))])


def trained(
    preset: Preset, train: np.ndarray, held: np.ndarray, *, minutes: float, seed: int
) -> tuple[Model, dict[str, float]]:
    """A preset trained on grey levels (n, *space) within the minutes, with the checkpoint chosen on `held`."""
    began, worked = time.monotonic(), time.process_time()
    torch.manual_seed(seed)
    values = {**preset.model, "shape": train.shape[1:], "channels": 1}
    grey = {"bits": 8} if "bits" in family(preset.model["kind"]).Config.model_fields else {}
    model = build(config_of(values | grey))
    settings = FitConfig.model_validate(preset.fit)
    possible, _ = images_in(0.8 * minutes, model, GreyScans(train), settings, device="cpu")
    settings = settings.model_copy(update={"images": min(settings.images, possible)})
    reached = fit(model, GreyScans(train), GreyScans(held), settings, seed=seed, device="cpu", seconds=60 * minutes)
    facts = {"images seen": reached.seen, "checkpoint": reached.best_seen, "parameters": count_parameters(model)}
    # Where other work shares the machine, minutes by the clock say little of what training takes.
    spent = {"minutes": (time.monotonic() - began) / 60, "processor minutes": (time.process_time() - worked) / 60}
    return model.eval(), facts | spent


class Report:
    """Bits per dimension of one density after another, printed and kept.

    Args:
        scans: what `normals` gives.
    """

    def __init__(self, scans: dict[str, np.ndarray]) -> None:
        self.scans, self.rows = scans, []
        self.results: dict[str, Any] = {"scans": {name: len(levels) for name, levels in scans.items()}}

    def add(self, name: str, bits: dict[str, np.ndarray], **facts: object) -> None:
        """Bits of every scan, split by split."""
        found = {split: stated(values) for split, values in bits.items()}
        # Does an ill chest cost more bits than a healthy one? Below 0.5 it costs fewer.
        facts["AUROC of bits"] = auroc(bits["test"], bits["ill"])
        self.results[name] = {"bits per dimension": found, **facts}
        shown = ("{mean:.3f} +- {se:.3f}".format(**found[s]) if s in found else "" for s in REPORTED)
        self.rows.append((name, *shown, facts["AUROC of bits"]))
        print(*self.rows[-1], flush=True)

    def train(self, options: argparse.Namespace) -> None:
        """Presets with every seed, as `density_options` says."""
        for preset in filter(None, options.presets.split(",")):
            for seed in range(options.seeds):
                wanted = load_preset(preset, options.set)
                splits = self.scans["train"], self.scans["tenth"]
                model, facts = trained(wanted, *splits, minutes=options.minutes, seed=seed)
                bits = {s: bits_per_dim(partial(nats, model), GreyScans(self.scans[s]).x) for s in REPORTED}
                self.add(f"{preset}, seed {seed}", bits, **facts)

    def keep(self, name: str, began: float) -> None:
        """Print the table and keep the results."""
        table(self.rows, ("density", *(f"{split}, bits/dim" for split in REPORTED), "AUROC of bits, ill over test"))
        keep(name, {"threads": torch.get_num_threads(), **self.results}, began)


def density_options(name: str, presets: str = "") -> argparse.Namespace:
    """What a density benchmark is asked for."""
    options = argparse.ArgumentParser()
    options.add_argument("--presets", default=presets, help="medgen presets, separated by commas")
    options.add_argument("--minutes", type=float, default=10, help="of training, each preset and seed")
    options.add_argument("--seeds", type=int, default=1)
    options.add_argument("--set", nargs="*", default=[], help="overrides of every preset, such as fit.ema=5000")
    options.add_argument("--name", default=name, help="of the file in results/")
    return options.parse_args()


def nats(model: Model, x: Tensor) -> Tensor:
    """-log p of 8-bit scans; of a lower bound of log p where the family has no more to give."""
    exact = "scores_density" in model.abilities(model.config)
    return -(model.log_prob(x) if exact else model.elbo(x))


@torch.no_grad()
def bits_per_dim(nats: Callable[[Tensor], Tensor], x: Tensor, *, size: int = 128) -> np.ndarray:
    """Bits per dimension of every scan of `x` (n, c, *space), where `nats` is -log p of a batch."""
    found = torch.cat([nats(part).double() for part in x.split(size)])
    return (found / (x[0].numel() * math.log(2))).numpy()


def stated(bits: np.ndarray) -> dict[str, float]:
    """Mean over scans and its standard error."""
    return {"mean": float(bits.mean()), "se": float(bits.std(ddof=1) / math.sqrt(len(bits)))}
