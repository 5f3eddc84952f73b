"""What every score shares: from a prepared scan to numbers that say how unusual it is, and where.

A score is a frozen value (it is written in presets and bundles) and has no state: what it learned of healthy scans is
a dict of tensors, which the bundle keeps beside the weights.

    known = score.learn(models, healthy)        # once, after training
    found = score(models, batch, known)         # any time
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from medgen.data.dataset import Batch
from medgen.errors import CapabilityError
from medgen.models.abilities import Ability
from medgen.models.base import Model, each_class

Models = Mapping[str, Model]
Known = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Found:
    """What a score says of a batch.

    Args:
        values: one row of numbers a scan; a score that says one thing has one column.
        map: how unusual each voxel is, in the score's own unit; NaN where no voxel was scored; None where a score
            cannot say where.
    """

    values: Float[Tensor, "b k"]
    map: Float[Tensor, "b *space"] | None = None


@dataclass(frozen=True, eq=False)
class Healthy:
    """The scans a score learns from: calling either gives its batches once more, from the beginning.

    Args:
        train: what the models were trained on.
        held: scans that no model was trained on; the training scans again where there are no others.
    """

    train: Callable[[], Iterable[Batch]]
    held: Callable[[], Iterable[Batch]]


class Score(BaseModel):
    """One way to say how unusual a scan is.

    Args:
        do: which score.
        of: name of the detector's model that it asks.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Whether values below the healthy ones are as unusual as those above; else only high ones are.
    two_sided: ClassVar[bool] = False
    # Whether the map's healthy values differ from place to place; else it is relative to its place already.
    by_place: ClassVar[bool] = True

    do: str
    of: str = "model"

    @property
    def asks(self) -> tuple[str, ...]:
        """Names of the models it asks."""
        return (self.of,)

    @property
    def needs(self) -> tuple[Ability, ...]:
        """Abilities of which the model has at least one; empty where it asks no model."""
        return ()

    @property
    def names(self) -> tuple[str, ...]:
        """What each column of its values is called."""
        return (self.do,)

    def columns(self, models: Models) -> tuple[str, ...]:
        """`names`, unless what the columns are depends on the models."""
        return self.names

    def check(self, models: Models) -> None:
        """Refuse models that cannot give this score.

        Raises:
            CapabilityError: there is no such model, or it has none of the abilities.
        """
        if not self.needs:
            return
        if self.of not in models:
            raise CapabilityError(f"The score {self.do!r} asks a model {self.of!r}; there are {', '.join(models)}.")
        model = models[self.of]
        if not model.abilities(model.config) & set(self.needs):
            able = " or ".join(sorted(self.needs))
            raise CapabilityError(f"The score {self.do!r} takes a model that {able}; {model.config.kind} does not.")

    def learn(self, models: Models, healthy: Healthy) -> dict[str, Tensor]:
        """What it has to know of healthy scans."""
        return {}

    def __call__(self, models: Models, batch: Batch, known: Known) -> Found:
        """How unusual each scan of a batch is; a scan's numbers do not depend on the other scans."""
        raise TypeError(f"{type(self).__name__} does not say how it scores")

    def answer(self, models: Models, batch: Batch, known: Known, told: dict["Score", Found]) -> Found:
        """The same, where several scores ask about one batch: whoever is asked twice answers once.

        Args:
            models: by name.
            batch: prepared scans.
            known: what it learned of healthy scans; equal scores that learned from the same scans know the same.
            told: what was found in this batch so far, and afterwards what it finds as well.
        """
        if self not in told:
            told[self] = self(models, batch, known)
        return told[self]


def best_class(model: Model, batch: Batch, score: Callable[[Batch], Found]) -> Found:
    """What `score` finds under the class that suits each scan best: the lowest first column.

    A model of several classes is asked about each, whatever the scan's label says, so labelled and unlabelled
    scans are scored alike.
    """
    hypotheses = each_class(model.config, batch.cond, len(batch.x), model.device)
    found = [score(replace(batch, cond=cond)) for cond in hypotheses]
    if len(found) == 1:
        return found[0]
    values = torch.stack([one.values for one in found])
    nearest, rows = values[..., 0].argmin(0), torch.arange(len(batch.x), device=values.device)
    maps = [one.map for one in found if one.map is not None]
    return Found(values[nearest, rows], torch.stack(maps)[nearest, rows] if maps else None)


def real_mean(values: Float[Tensor, "b *space"], real: Bool[Tensor, "b *space"] | None) -> Float[Tensor, " b"]:
    """Mean of each map over its real voxels."""
    if real is None:
        return values.flatten(1).mean(1)
    return (values * real).flatten(1).sum(1) / real.flatten(1).sum(1).clamp(min=1)


def hidden(values: Float[Tensor, "b *space"], real: Bool[Tensor, "b *space"] | None) -> Float[Tensor, "b *space"]:
    """The map with NaN where nobody measured a voxel."""
    return values if real is None else values.masked_fill(~real, torch.nan)


def part(known: Known, prefix: str) -> dict[str, Tensor]:
    """What is known under `prefix.`."""
    return {name.removeprefix(f"{prefix}."): t for name, t in known.items() if name.startswith(f"{prefix}.")}


def prefixed(known: Known, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The same under `prefix.`, the inverse of `part`."""
    return ((f"{prefix}.{name}", tensor) for name, tensor in known.items())


__all__ = ["Found", "Healthy", "Known", "Models", "Score", "best_class", "hidden", "part", "prefixed", "real_mean"]
