"""Bounds of normal chests, bits per dimension: plain and hierarchical VAEs, and the plain one's priors.

PneumoniaMNIST at 28 x 28 in 256 grey levels, each with the same minutes of one processor for training and the same
noise of p(x | z), a discretised logistic. Checkpoints are chosen on a tenth of the train split; the official val and
test normals are only reported. A bound of one draw of the codes is bits of -ELBO; importance weighting of many draws
would make it tighter.

    python benchmarks/vae_bounds.py --minutes 8 --seeds 2
    python benchmarks/vae_bounds.py --minutes 1 --rows vae2d,betavae2d,vampvae2d --name vae_priors
"""

import argparse
import copy
import time
from functools import partial
from typing import Any

import numpy as np
import torch
from densities import GreyScans, bits_per_dim, nats, normals, stated
from measure import keep, table

from medgen.config import load_preset
from medgen.data.dataset import Batch
from medgen.models import build, config_of, family
from medgen.models.base import Model
from medgen.nets.blocks import count_parameters
from medgen.training.fit import FitConfig, fit

REPORTED = ("tenth", "val", "test", "ill")
GREY = {"likelihood": "discretised-logistic"}
# Name: preset, and what is different from it. The same optimiser for all.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "vae2d": ("vae2d", {}),
    "vae2d, 64 dimensions": ("vae2d", {"latent": 64}),
    "vae2d, code map": ("vae2d", {"code": "map", "latent": 8}),
    "hvae2d": ("hvae2d", {}),
    "hvae2d, one rung a level": ("hvae2d", {"steps": 1, "latent": 4}),
    "betavae2d": ("betavae2d", {}),
    "infovae2d": ("infovae2d", {}),
    "vampvae2d": ("vampvae2d", {}),
    "mixturevae2d": ("mixturevae2d", {}),
    "latentflow2d": ("latentflow2d", {}),
}
FIT = {"batch_size": 64, "learning_rate": 0.002, "warmup": 1000, "weight_decay": 0.0, "ema": 1500, "patience": 20}


def processor_seconds(model: Model, scans: GreyScans, settings: FitConfig) -> float:
    """Seconds of one processor that an image takes in training; others' work on the machine does not count."""
    trial = copy.deepcopy(model)
    batch = next(scans.batches(settings.batch_size))
    trial.initialise(batch)
    spent = []
    for _ in range(4):
        began = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=model.mixed_precision_pays):
            total = trial(batch).total.mean()
        total.backward()
        spent.append(time.process_time() - began)
    return 1.1 * min(spent[1:]) / settings.batch_size  # and a tenth for the optimiser and validation


def trained(name: str, scans: dict[str, np.ndarray], *, minutes: float, seed: int) -> tuple[Model, dict[str, float]]:
    """A row's model after so many minutes of one processor, with the checkpoint that is best on the tenth."""
    preset, changes = ROWS[name]
    torch.manual_seed(seed)
    values = {**load_preset(preset).model, **GREY, **changes, "shape": scans["train"].shape[1:]}
    model = build(config_of(values))
    settings = FitConfig.model_validate(FIT)
    train, held = GreyScans(scans["train"]), GreyScans(scans["tenth"])
    images = int(60 * minutes / processor_seconds(model, train, settings))
    began, wall = time.process_time(), time.monotonic()
    reached = fit(model, train, held, settings.model_copy(update={"images": images}), seed=seed, device="cpu")
    facts = {
        "processor minutes": (time.process_time() - began) / 60,
        "minutes": (time.monotonic() - wall) / 60,
        "images seen": reached.seen,
        "checkpoint": reached.best_seen,
        "parameters": count_parameters(model),
    }
    return model.eval(), facts


@torch.no_grad()
def parts(model: Model, levels: np.ndarray) -> dict[str, float]:
    """What distortion and rates cost, bits a voxel."""
    torch.manual_seed(0)
    x = GreyScans(levels).x
    terms = model(Batch(x)).terms
    return {name: float(term.mean()) / (x[0].numel() * np.log(2)) for name, term in terms.items() if name != "mmd"}


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--rows", default="vae2d,hvae2d", help=f"separated by semicolons or commas: {', '.join(ROWS)}")
    options.add_argument("--minutes", type=float, default=8, help="of one processor, for training; each row and seed")
    options.add_argument("--seeds", type=int, default=1)
    options.add_argument("--name", default="vae_bounds", help="of the results")
    options = options.parse_args()
    began, scans = time.monotonic(), normals()
    for preset, _ in ROWS.values():  # all code is read before the first row is trained
        family(load_preset(preset).model["kind"])
    names = options.rows.split(";") if ";" in options.rows else options.rows.split(",")
    rows, results = [], {}
    for name in names:
        for seed in range(options.seeds):
            model, facts = trained(name, scans, minutes=options.minutes, seed=seed)
            bits = {s: stated(bits_per_dim(partial(nats, model), GreyScans(scans[s]).x)) for s in REPORTED}
            health = model.health(GreyScans(scans["tenth"]).batches(64))
            results[f"{name}, seed {seed}"] = {
                "bits per dimension": bits, "parts": parts(model, scans["tenth"]), "health": health, **facts
            }  # fmt: skip
            shown = ("{mean:.3f} +- {se:.3f}".format(**bits[split]) for split in REPORTED)
            units = f"{health['active_units']:.0f} of {health['units']:.0f}"
            rows.append((f"{name}, seed {seed}", *shown, units, facts["processor minutes"], facts["images seen"]))
            print(*rows[-1], results[f"{name}, seed {seed}"]["parts"], flush=True)
            keep(options.name, {"threads": torch.get_num_threads(), "fit": FIT, **results}, began)
    heads = ("model", *(f"{split}, bits/dim" for split in REPORTED), "active units", "processor minutes", "images seen")
    table(rows, heads)


if __name__ == "__main__":
    main()
