"""Log-likelihood where it is known: flows on random fields of 8 x 8 voxels, against the fields' own density.

'gaussian' is a smooth stationary Gaussian field with a little white noise; 'warped' is the same field pushed through
sinh(asinh(z) + 1/2) voxel by voxel, which no Gaussian fits. Reported is the mean over held-out draws of
(log p_model - log p_true) / dims: minus the Kullback-Leibler divergence in nats a dimension, 0 at best.

    python benchmarks/flow_fields.py --families flowmatch,flow --minutes 3
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from measure import keep, table
from torch import Tensor

from medgen.data.dataset import Batch, collate
from medgen.models import FAMILIES, build, config_of
from medgen.models.base import Model
from medgen.training.fit import FitConfig, fit, images_in

SIDE, LENGTH, NOISE, DRAWS = 8, 2.0, 0.1, 20_000
# What the families are told besides shape and kind; grey levels have no place here, as the fields are continuous.
SETTINGS: dict[str, dict[str, Any]] = {
    "flow": {"bits": 0, "steps": 8, "levels": 2, "width": 64},
    "flowmatch": {"bits": 0, "width": 32, "levels": 1, "probes": 8, "tolerance": 1e-4},
}
FIT = {"batch_size": 64, "learning_rate": 2e-3, "images": 400_000, "ema": 4000, "patience": 20}


class Fields:
    """Draws (n, 1, 8, 8) about 1/2, and their log density in nats."""

    def __init__(self, warped: bool) -> None:
        place = torch.stack(torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij"), -1).reshape(-1, 2)
        distance = torch.cdist(place.double(), place.double())
        covariance = torch.exp(-0.5 * (distance / LENGTH) ** 2) + NOISE**2 * torch.eye(SIDE**2)
        mean = torch.zeros(SIDE**2, dtype=torch.float64)
        self.field = torch.distributions.MultivariateNormal(mean, covariance)
        self.warped, self.scale = warped, 0.15

    @property
    def entropy(self) -> float:
        """Of the Gaussian field, nats a dimension, in units of x."""
        return float(self.field.entropy()) / SIDE**2 + math.log(self.scale)

    def draw(self, n: int, seed: int) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            z = self.field.sample((n,))
        z = torch.sinh(torch.asinh(z) + 0.5) if self.warped else z
        return (0.5 + self.scale * z).float().reshape(n, 1, SIDE, SIDE)

    def log_prob(self, x: Tensor) -> Tensor:
        y = (x.double().flatten(1) - 0.5) / self.scale
        z = torch.sinh(torch.asinh(y) - 0.5) if self.warped else y
        # dz/dy = cosh(asinh(y) - 1/2) / sqrt(1 + y^2)
        slope = torch.log(torch.cosh(torch.asinh(y) - 0.5)) - 0.5 * torch.log1p(y**2) if self.warped else 0 * y
        return self.field.log_prob(z) + (slope - math.log(self.scale)).sum(1)


class Drawn:
    """Scans in memory, with what `fit` asks of a dataset."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"case": str(index), "x": self.x[index], "cond": -1}

    def batches(self, size: int) -> Iterator[Batch]:
        for first in range(0, len(self), size):
            yield collate([self[n] for n in range(first, min(first + size, len(self)))])


def density(model: Model) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """log p(x) and its standard error, whichever the family offers."""
    if "scores_density" in model.abilities(model.config):
        return lambda x: (model.log_prob(x), torch.zeros(len(x)))
    return model.log_prob_estimate


def measured(kind: str, fields: Fields, *, minutes: float, held: int, seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    model = build(config_of({"kind": kind, "shape": (SIDE, SIDE), **SETTINGS.get(kind, {})}))
    train, val = Drawn(fields.draw(DRAWS, seed=1)), Drawn(fields.draw(512, seed=2))
    reached, settings = 0, FitConfig.model_validate(FIT)
    began = time.monotonic()
    if minutes:
        possible, _ = images_in(0.9 * minutes, model, train, settings, device="cpu")
        settings = settings.model_copy(update={"images": min(settings.images, possible)})
        reached = fit(model, train, val, settings, seed=seed, device="cpu", seconds=60 * minutes).seen
    else:
        model.initialise(Batch(train.x[:64]))
    seconds = time.monotonic() - began
    x, found, errors = fields.draw(held, seed=3), [], []
    began = time.monotonic()
    with torch.no_grad():
        for part in x.split(64):
            log_p, error = density(model.eval())(part)
            found.append(log_p.double())
            errors.append(error.double())
    gap = (torch.cat(found) - fields.log_prob(x)) / SIDE**2
    return {
        "images seen": reached,
        "training s": round(seconds, 1),
        "scoring s a scan": (time.monotonic() - began) / held,
        "true log p a dim": float(fields.log_prob(x).mean()) / SIDE**2,
        "model log p a dim": float(torch.cat(found).mean()) / SIDE**2,
        "gap": float(gap.mean()),
        "gap se": float(gap.std() / math.sqrt(held)),
        "worst scan's own se": float(torch.cat(errors).max()) / SIDE**2,
    }


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--families", default="flowmatch,flow")
    options.add_argument("--fields", default="gaussian,warped")
    options.add_argument("--minutes", type=float, default=3, help="of training, each; 0 for the start alone")
    options.add_argument("--held", type=int, default=512, help="draws the densities are compared on")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    began, rows = time.monotonic(), {}
    for name in chosen.fields.split(","):
        fields = Fields(name == "warped")
        for kind in chosen.families.split(","):
            if kind in FAMILIES:
                rows[f"{kind}, {name}"] = measured(
                    kind, fields, minutes=chosen.minutes, held=chosen.held, seed=chosen.seed
                )
    print(f"Entropy of the Gaussian field: {Fields(False).entropy:.4f} nats a dimension.")
    table([(name, *row.values()) for name, row in rows.items()], ("family, field", *next(iter(rows.values()))))
    if chosen.minutes:
        keep("flow_fields", {"side": SIDE, "minutes": chosen.minutes, "seed": chosen.seed, "found": rows}, began)


if __name__ == "__main__":
    main()
