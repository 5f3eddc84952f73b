"""What a density says in parts: scale by scale, the whiteness of its noise, and where its gradient points.

One number, log p(x), hides that a scan is too smooth on one scale and too rough on another. Its parts, and
statistics of the noise that a flow turns a scan into, tell such scans apart; their joint distribution over healthy
scans is a density of states (Morningstar et al. 2021, "Density of states estimation for out of distribution
detection").
"""

from collections.abc import Callable
from typing import ClassVar, Literal, Protocol, cast

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from medgen.data.dataset import Batch
from medgen.errors import CapabilityError
from medgen.metrics.image import local_mean
from medgen.models.base import Model
from medgen.scores.base import Found, Known, Models, Score, best_class, hidden
from medgen.scores.likelihoods import given

# Edge length of the window over which a gradient's map is averaged, in voxels.
_WINDOW = 5
# Below any gradient and any variance that says something.
_LEAST = 1e-12


Statistic = Literal["variance", "kurtosis", "correlation"]


class TellsParts(Protocol):
    """Says what its log density, or bound, is the sum of; gradients pass through it."""

    def density_parts(self, x: Tensor, cond: Tensor | None = None) -> dict[str, Float[Tensor, " b"]]:
        """The parts, nats a scan, by name."""
        ...


class TellsNoise(Protocol):
    """Turns a scan into noise that is white if the scan is like the training scans."""

    def noise_maps(self, x: Tensor, cond: Tensor | None = None) -> list[Tensor]:
        """The noise of every level, (b, c, *positions), finest first."""
        ...


class _PartsScore(Score):
    """A score of models that have a method, which is not an ability as nothing else asks for it."""

    method: ClassVar[str] = "density_parts"
    families: ClassVar[str] = "flow, pyramidflow, vae, hvae"

    two_sided: ClassVar[bool] = True

    def check(self, models: Models) -> None:
        """Refuse models that do not tell the parts.

        Raises:
            CapabilityError: there is no such model, or its density has no parts.
        """
        if self.of not in models:
            raise CapabilityError(f"The score {self.do!r} asks a model {self.of!r}; there are {', '.join(models)}.")
        if not hasattr(models[self.of], self.method):
            raise CapabilityError(
                f"The score {self.do!r} takes a model whose density has parts: {self.families}; "
                f"{models[self.of].config.kind} does not."
            )


class Scales(_PartsScore):
    """The parts of log p(x), nats a voxel and channel: one column each, of which both ends are unusual.

    Of a flow, every level's noise log N(z; 0, 1) and its volume log |det|; of a VAE the likelihood log p(x | z) and
    what the codes cost, on every lattice of a hierarchical one. Parts add up to log p(x), or its bound.

    Args:
        do: 'scales'.
    """

    do: Literal["scales"] = "scales"

    def columns(self, models: Models) -> tuple[str, ...]:
        """The model's own names for its parts."""
        return tuple(_parts(models[self.of], _nothing(models[self.of])))

    @torch.no_grad()
    def __call__(self, models: Models, batch: Batch, known: Known) -> Found:
        """The parts under the class that suits each scan best."""
        model = models[self.of]

        def found(told: Batch) -> Found:
            return Found(torch.stack([*_parts(model, told).values()], 1) / told.x[0].numel())

        return _likeliest(model, batch, found)


class Whiteness(_PartsScore):
    """Statistics of the noise that a flow turns a scan into, level by level; both ends are unusual.

        log variance, excess kurtosis, and correlation of neighbours along each axis

    A flow's noise is white for scans like the training ones. What is smoother than they are has too little variance on
    fine levels, what is out of place is correlated (compare Kirichenko et al. 2020, "Why normalizing flows fail to
    detect out-of-distribution data").

    Args:
        do: 'whiteness'.
        keep: which statistics. With all parts of the density (`Scales`), the variance says little more.
    """

    method: ClassVar[str] = "noise_maps"
    families: ClassVar[str] = "flow, pyramidflow"

    do: Literal["whiteness"] = "whiteness"
    keep: tuple[Statistic, ...] = Field(default=("variance", "kurtosis", "correlation"), min_length=1)

    def columns(self, models: Models) -> tuple[str, ...]:
        """Level and statistic."""
        model = models[self.of]
        levels = [_whiteness(noise, self.keep) for noise in _noises(model, _nothing(model))]
        return tuple(f"level {number}: {name}" for number, level in enumerate(levels) for name in level)

    @torch.no_grad()
    def __call__(self, models: Models, batch: Batch, known: Known) -> Found:
        """The statistics under the class that suits each scan best."""
        model = models[self.of]

        def found(told: Batch) -> Found:
            levels = [_whiteness(noise, self.keep) for noise in _noises(model, told)]
            return Found(torch.stack([one for level in levels for one in level.values()], 1))

        return _likeliest(model, batch, found)


class Gradient(_PartsScore):
    """How steep log p is at the scan: the log of its gradient's root mean square; both ends are unusual.

    By 'scan', with respect to grey values, nats a unit of grey; its map is the local mean of its size. By
    'parameters', one column for each group of the model's parameters, as in Dauncey et al. 2024, "Approximations to
    the Fisher information metric of deep generative models for out-of-distribution detection", equation 9; scans are
    asked about one at a time, which takes as long as training on them.

    Args:
        do: 'gradient'.
        by: with respect to what.
        depth: parts of a parameter's name by which parameters are grouped.
    """

    do: Literal["gradient"] = "gradient"
    by: Literal["scan", "parameters"] = "scan"
    depth: int = Field(default=2, ge=1)

    def columns(self, models: Models) -> tuple[str, ...]:
        """'gradient', or the groups of parameters."""
        model = models[self.of]
        return ("gradient",) if self.by == "scan" else tuple(self._of_parameters(model, _nothing(model)))

    def __call__(self, models: Models, batch: Batch, known: Known) -> Found:
        """Its size under the class that suits each scan best."""
        model = models[self.of]
        found = self._by_scan if self.by == "scan" else self._by_parameters
        return _likeliest(model, batch, lambda told: found(model, told))

    def _by_scan(self, model: Model, batch: Batch) -> Found:
        slope = _slope(model, batch)
        each = local_mean(slope.norm(dim=1, keepdim=True), _WINDOW)[:, 0]
        return Found((slope.flatten(1).square().mean(1) + _LEAST).log()[:, None] / 2, hidden(each, batch.real))

    def _by_parameters(self, model: Model, batch: Batch) -> Found:
        rows = [[*self._of_parameters(model, one).values()] for one in batch.each()]
        return Found(torch.tensor(rows, device=batch.x.device))

    @torch.enable_grad()
    def _of_parameters(self, model: Model, batch: Batch) -> dict[str, float]:
        """Log of the root mean square of one scan's gradient, group by group."""
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        total = torch.stack([*_parts(model, batch).values()]).sum()
        slopes = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
        sums: dict[str, tuple[float, int]] = {}
        for (name, _), slope in zip(named, slopes, strict=True):
            if slope is not None:
                group = ".".join(name.split(".")[: self.depth])
                energy, count = sums.get(group, (0.0, 0))
                sums[group] = (energy + float(slope.double().square().sum()), count + slope.numel())
        return {g: float(torch.tensor(e / n + _LEAST).log()) / 2 for g, (e, n) in sums.items()}


# -- one hypothesis ----------------------------------------------------------------------------------------


def _parts(model: Model, batch: Batch) -> dict[str, Float[Tensor, " b"]]:
    return cast(TellsParts, model).density_parts(batch.x, batch.cond, **given(batch))


def _noises(model: Model, batch: Batch) -> list[Tensor]:
    return cast(TellsNoise, model).noise_maps(batch.x, batch.cond, **given(batch))


@torch.enable_grad()
def _slope(model: Model, batch: Batch) -> Float[Tensor, "b c *space"]:
    """The gradient of log p with respect to each scan; scans do not know of each other."""
    x = batch.x.detach().clone().requires_grad_()
    total = torch.stack([*_parts(model, Batch(x, batch.cond, batch.context)).values()]).sum()
    return torch.autograd.grad(total, x)[0]


def _whiteness(noise: Float[Tensor, "b c *positions"], keep: tuple[Statistic, ...]) -> dict[str, Float[Tensor, " b"]]:
    """What would be 0 of white noise, over all channels and positions."""
    away = noise - noise.flatten(1).mean(1).reshape(-1, *[1] * (noise.ndim - 1))
    rows = away.flatten(1)
    variance = rows.square().mean(1).clamp(min=_LEAST)
    found: dict[str, Tensor] = {}
    if "variance" in keep:
        found["log variance"] = variance.log()
    if "kurtosis" in keep:
        found["kurtosis"] = rows.pow(4).mean(1) / variance.square() - 3
    for axis, name in enumerate("ijk"[: noise.ndim - 2], 2):
        if "correlation" in keep and noise.shape[axis] > 1:
            pairs = away.narrow(axis, 1, noise.shape[axis] - 1) * away.narrow(axis, 0, noise.shape[axis] - 1)
            found[f"correlation along {name}"] = pairs.flatten(1).mean(1) / variance
    return found


def _likeliest(model: Model, batch: Batch, columns: Callable[[Batch], Found]) -> Found:
    """`columns` under the class that makes each scan likeliest."""

    def found(told: Batch) -> Found:
        one = columns(told)
        with torch.no_grad():
            density = torch.stack([*_parts(model, told).values()]).sum(0) if model.config.classes else one.values[:, 0]
        return Found(torch.cat([-density[:, None], one.values], 1), one.map)

    best = best_class(model, batch.to(model.device), found)
    return Found(best.values[:, 1:], best.map)


def _nothing(model: Model) -> Batch:
    """An empty scan, which has the same columns as any other."""
    config = model.config
    width, context = getattr(config, "condition_width", 0), getattr(config, "context", 0)
    space, device = config.shape, model.device
    return Batch(
        torch.zeros(1, config.channels, *space, device=device),
        torch.zeros(1, width, device=device) if width else None,
        torch.zeros(1, context, *space, device=device) if context else None,
    )


__all__ = ["Gradient", "Scales", "Statistic", "TellsNoise", "TellsParts", "Whiteness"]
