"""How far a scan is from those that a model learned from, told in several ways; each is a test of the quality gate.

appearance   features that need no model (`medgen.metrics.appearance`)
critic       what a model's critic sees, where it says
density      log density of scans given their class, or the bound a model has of it: too likely is unusual, too
mask         1 - Dice of the mask and what a small network, taught on the training pairs, finds in the scan
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from medgen.data.dataset import ScanDataset
from medgen.data.labels import label_map
from medgen.data.manifest import Manifest, Row
from medgen.data.recipe import Recipe
from medgen.io.source import ReadOptions
from medgen.metrics.appearance import Appearance, Look
from medgen.metrics.segmentation import Segmenter, dice
from medgen.models.abilities import Perceives
from medgen.models.base import Model, can
from medgen.tasks.conditions import conditions_for, told_of
from medgen.tasks.ways.base import Made

_AT_ONCE = 32


@dataclass(frozen=True, eq=False)
class Seen:
    """Scans as a model sees them.

    Args:
        x: image channels.
        labels: classes.
        maps: label maps; None where they are not known on these voxels.
    """

    x: Float[Tensor, "n c *space"]
    labels: tuple[str, ...]
    maps: Int[np.ndarray, "n *space"] | None = None

    @classmethod
    def of(cls, made: Sequence[Made]) -> "Seen":
        """Scans that were made."""
        maps = [one.seen for one in made if one.seen is not None]
        both = np.stack(maps) if len(maps) == len(made) else None
        return cls(torch.stack([one.x for one in made]), tuple(one.label for one in made), both)


# How far scans are from the training scans, (n,).
Far = Callable[[Seen], np.ndarray]


@dataclass(frozen=True, eq=False)
class Known:
    """Real scans as a model sees them.

    Args:
        x: (n, c, *space), image channels only.
        rows: what the data tell of each.
        maps: their label maps, where they are asked for.
    """

    x: Float[Tensor, "n c *space"]
    rows: tuple[Row, ...]
    maps: Int[np.ndarray, "n *space"] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def patients(self) -> tuple[str, ...]:
        """Whose they are."""
        return tuple(row.patient for row in self.rows)

    @property
    def labels(self) -> tuple[str, ...]:
        """Their classes."""
        return tuple(row.label for row in self.rows)

    @property
    def seen(self) -> Seen:
        """The scans without their owners."""
        return Seen(self.x, self.labels, self.maps)

    def take(self, which: Int[np.ndarray, " m"]) -> "Known":
        """Some of them."""
        maps = None if self.maps is None else self.maps[which]
        return Known(self.x[torch.from_numpy(which)], tuple(self.rows[n] for n in which), maps)


def known_scans(
    manifest: Manifest, splits: Sequence[str], recipe: Recipe, options: ReadOptions, labels: Sequence[int] = ()
) -> Known | None:
    """The scans of some splits, prepared, with maps of `labels`; None where there are none."""
    rows = tuple(row for row in manifest.rows if row.split in splits)
    if not rows:
        return None
    data = ScanDataset(replace(manifest, rows=rows), recipe, labels=tuple(labels), options=options)
    items = [data[n] for n in range(len(data))]
    of = {row.case: row for row in rows}
    x = torch.stack([item["x"] for item in items])
    images = x.shape[1] - len(labels)
    maps = np.stack([label_map(one.numpy(), labels) for one in x[:, images:]]) if labels else None
    return Known(x[:, :images], tuple(of[item["case"]] for item in items), maps)


# -- looks -----------------------------------------------------------------------------------------


def apart(look: Appearance) -> Far:
    """Mahalanobis' distance by a look."""
    return lambda seen: look.distance(look.rows(seen.x))


def critics(model: Model) -> Look:
    """What a model's critic sees in scans."""

    @torch.no_grad()
    def look(x: Float[Tensor, "n c *space"]) -> Float[np.ndarray, "n d"]:
        parts = [cast(Perceives, model).perceive(part.to(model.device)).cpu() for part in x.split(_AT_ONCE)]
        return torch.cat(parts).flatten(1).double().numpy()

    return look


def unusual(model: Model, held: Known) -> Far:
    """How far log densities are from the middle of held-out ones."""
    usual = float(np.median(log_densities(model, held.x, held.labels)))
    return lambda seen: np.abs(log_densities(model, seen.x, seen.labels) - usual)


def misfit(known: Known, labels: Sequence[int], *, seed: int) -> Far:
    """How badly masks fit their scans."""
    assert known.maps is not None
    taught = Segmenter((known.x.numpy(), known.maps), labels=labels, seed=seed)

    def far(seen: Seen) -> Float[np.ndarray, " n"]:
        assert seen.maps is not None
        return 1 - dice(taught.maps(seen.x.numpy()), seen.maps, labels)

    return far


def told_nothing_more(model: Model) -> bool:
    """Whether a model is told nothing of a scan but its class."""
    told = told_of(model.config)
    return not (told["context"] or told["covariates"] or model.config.labels)


@torch.no_grad()
def log_densities(model: Model, x: Float[Tensor, "n c *space"], labels: Sequence[str]) -> Float[np.ndarray, " n"]:
    """Log density of each scan given its class, or the bound that the model has of it, nats."""
    cond = conditions_for(model.config, labels, [{} for _ in labels])
    density: Any = model
    density = density.log_prob if can(model, "scores_density") else density.elbo
    found = []
    for first in range(0, len(x), _AT_ONCE):
        which = slice(first, first + _AT_ONCE)
        told = None if cond is None else cond[which].to(model.device)
        found.append(density(x[which].to(model.device), told).cpu())
    return torch.cat(found).double().numpy()


__all__ = [
    "Far", "Known", "Seen", "apart", "critics", "known_scans", "log_densities", "misfit", "told_nothing_more",
    "unusual",
]  # fmt: skip
