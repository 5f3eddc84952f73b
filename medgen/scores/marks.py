"""How surely a network that learned to find drawn anomalies marks a scan, and where."""

from typing import ClassVar, Literal, cast

import torch

from medgen.data.dataset import Batch
from medgen.models.abilities import Ability, Marks
from medgen.scores.base import Found, Known, Models, Score, hidden
from medgen.scores.reconstruction import Reduction, reduced


class Marked(Score):
    """Log-odds that voxels belong to an anomaly, as a segmenter sees it.

    Args:
        do: 'marks'.
        reduce: the mean of all real voxels, or of the highest half per cent of them.
    """

    by_place: ClassVar[bool] = False

    do: Literal["marks"] = "marks"
    reduce: Reduction = "tail"

    @property
    def needs(self) -> tuple[Ability, ...]:
        """Marking."""
        return ("marks",)

    @torch.no_grad()
    def __call__(self, models: Models, batch: Batch, known: Known) -> Found:
        """The log-odds and their mean, or the mean of the highest."""
        model = models[self.of]
        batch = batch.to(model.device)
        odds = cast(Marks, model).mark(batch.x, batch.cond)[:, 0]
        return Found(reduced(odds, batch.real, self.reduce)[:, None], hidden(odds, batch.real))


__all__ = ["Marked"]
