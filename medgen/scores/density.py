"""How surprising a scan is to a density, and what corrects it for scans that surprise little because they are simple.

Smooth scans surprise a density of healthy ones less than healthy scans do, though they may be ill (Nalisnick et al.
2019, "Do deep generative models know what they don't know?"). So surprise counts both ways, or is compared with
something that knows how simple a scan is.
"""

from typing import ClassVar, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from medgen.data.dataset import Batch
from medgen.errors import CapabilityError
from medgen.metrics.image import local_mean
from medgen.models.abilities import Ability, MapsDensity
from medgen.models.base import Model, can
from medgen.scores.base import Found, Healthy, Known, Models, Score, best_class, hidden, real_mean
from medgen.scores.likelihoods import DENSITIES, bits_per_dim, given, log_density
from medgen.scores.statistics import statistic

# Edge length of the window over which a map is averaged, in voxels.
_WINDOW = 5


class DensityScore(Score):
    """A score of whatever has a density."""

    @property
    def needs(self) -> tuple[Ability, ...]:
        """A density: exact, bounded or estimated."""
        return tuple(DENSITIES)


class Surprise(DensityScore):
    """-log p(x), exact, its bound or its estimate, nats a real voxel and channel; both ends are unusual.

    The map is the local mean of each voxel's part, where a model tells it, nats a voxel. A model of several classes
    is asked about each, and the least surprising counts.

    Args:
        do: 'surprise'.
    """

    two_sided: ClassVar[bool] = True

    do: Literal["surprise"] = "surprise"

    @torch.no_grad()
    def __call__(self, models: Models, batch: Batch, known: Known) -> Found:
        """Surprise under the class that suits each scan best."""
        return surprise(models[self.of], batch)


class Typicality(DensityScore):
    """How far a scan's surprise is from that of healthy scans, either way, in their standard deviations.

        | -log p(x) - mean |  /  sd            of held-out healthy scans

    Nalisnick et al. 2019, "Detecting out-of-distribution inputs to deep generative models using typicality", equation
    5, for one scan at a time.

    Args:
        do: 'typicality'.
    """

    do: Literal["typicality"] = "typicality"

    @torch.no_grad()
    def learn(self, models: Models, healthy: Healthy) -> dict[str, Tensor]:
        """Mean and standard deviation of the surprise of held-out healthy scans."""
        found = torch.cat([surprise(models[self.of], batch).values[:, 0].double() for batch in healthy.held()])
        # Scans that are all alike leave a spread of nothing, by which nobody can divide.
        spread = found.std(correction=0).clamp(min=1e-6)
        return {"mean": found.mean().float().cpu(), "sd": spread.float().cpu()}

    @torch.no_grad()
    def __call__(self, models: Models, batch: Batch, known: Known) -> Found:
        """The distance from healthy surprise."""
        found = surprise(models[self.of], batch).values
        return Found((found - known["mean"].to(found)).abs() / known["sd"].to(found))


class Complexity(DensityScore):
    """Surprise beyond what a lossless code that knows nothing of anatomy needs for the scan, bits a voxel and channel.

        S(x) = -log2 p(x) - L(x),      L: the length of its PNG (of a volume, slice by slice)

    Serrà et al. 2020, "Input complexity and out-of-distribution detection with likelihood-based generative models",
    equation 2. Simple scans are cheap to both, so what is left is what is odd about them.

    Args:
        do: 'complexity'.
    """

    do: Literal["complexity"] = "complexity"

    @torch.no_grad()
    def __call__(self, models: Models, batch: Batch, known: Known) -> Found:
        """The difference, under the class that suits each scan best."""
        model, batch = models[self.of], batch.to(models[self.of].device)
        coded = 8 * statistic("png", batch.x) / batch.x[0].numel()
        found = best_class(model, batch, lambda told: Found(bits_per_dim(model, told)[0][:, None]))
        return Found(found.values - coded[:, None])


class Background(DensityScore):
    """How much more surprising a scan is than to a model that knows how such images look, but not healthy anatomy.

        -(log p(x) - log p_background(x)),   nats a real voxel and channel

    Ren et al. 2019, "Likelihood ratios for out-of-distribution detection", equation 3; there the background model is
    trained on scans with random grey values here and there.

    Args:
        do: 'background'.
        against: name of the background model.
    """

    do: Literal["background"] = "background"
    against: str = "background"

    @property
    def asks(self) -> tuple[str, ...]:
        """Both models."""
        return (self.of, self.against)

    def check(self, models: Models) -> None:
        """Refuse models without a density, and a background that speaks of other grey levels.

        Raises:
            CapabilityError: one of the two is missing or has no density, or their densities are of different things.
        """
        super().check(models)
        Surprise(of=self.against).check(models)
        levels = [models[name].config.grey_levels for name in self.asks]
        if levels[0] != levels[1]:
            raise CapabilityError(
                f"A ratio is of densities of the same values; {self.of!r} is of {levels[0]} grey levels and "
                f"{self.against!r} of {levels[1]} (0: continuous). Train both with the same bits or likelihood."
            )

    @torch.no_grad()
    def __call__(self, models: Models, batch: Batch, known: Known) -> Found:
        """The log ratio; its map where both models have one."""
        one, other = (surprise(models[name], batch) for name in self.asks)
        if one.map is None or other.map is None:
            batch = Batch(batch.x, batch.cond, batch.context)
            one, other = (surprise(models[name], batch, maps=False) for name in self.asks)
            return Found(one.values - other.values.to(one.values))
        return Found(one.values - other.values.to(one.values), one.map - other.map.to(one.map))


def surprise(model: Model, batch: Batch, *, maps: bool = True) -> Found:
    """-log p(x) under the class that suits each scan best: nats a real voxel and channel, and its map."""

    def found(told: Batch) -> Found:
        if not maps or not can(model, "maps_density"):
            return Found(-log_density(model, told)[0][:, None])
        each = -cast(MapsDensity, model).log_prob_map(told.x, told.cond, **given(told))
        value = real_mean(each[:, 0], told.real) / told.x.shape[1]
        return Found(value[:, None], hidden(_local(each, told.real)[:, 0], told.real))

    return best_class(model, batch.to(model.device), found)


def _local(values: Float[Tensor, "b 1 *space"], real: Tensor | None) -> Float[Tensor, "b 1 *space"]:
    """Mean over the real voxels around each voxel."""
    if real is None:
        return local_mean(values, _WINDOW)
    weight = real[:, None].to(values)
    return local_mean(values * weight, _WINDOW) / local_mean(weight, _WINDOW).clamp(min=1e-6)


__all__ = ["Background", "Complexity", "DensityScore", "Surprise", "Typicality", "surprise"]
