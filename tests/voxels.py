"""The smallest density there is, for tests of what tasks do with one: an independent Gaussian at every voxel.

Its mean moves with the condition and with the given image, by weights that are set and not learned, so that every
score can be told by hand. Add it to `medgen.models.FAMILIES` as 'voxels'.
"""

from math import log, pi
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from medgen.data.dataset import Batch
from medgen.models.base import ConditionedConfig, Loss, Model
from medgen.seeds import seeded_noise

FAMILY = "voxels:Voxels"
ABILITIES = {
    "map": {"scores_density", "maps_density", "samples"},
    "density": {"scores_density", "samples"},
    "bound": {"bounds_density", "samples"},
    "estimate": {"estimates_density", "samples"},
    "nothing": set(),
}


class Voxels(Model):
    """x ~ N(mean + shift, sd) at every voxel; shift = 0.1 sum(cond) + 0.2 context."""

    class Config(ConditionedConfig):
        """`shows` says which abilities it declares, `step` its stride along each axis."""

        kind: Literal["voxels"] = "voxels"
        shows: Literal["map", "density", "bound", "estimate", "nothing"] = "map"
        step: tuple[int, ...] = (4, 4, 4)
        bits: int = 0

    def __init__(self, config: "Voxels.Config") -> None:
        super().__init__()
        self.config = config
        self.mean = nn.Parameter(torch.zeros(config.channels, *config.shape))
        self.register_buffer("sd", torch.ones(config.channels, *config.shape))

    @classmethod
    def abilities(cls, config: Any) -> frozenset:
        return frozenset(ABILITIES[config.shows])

    @classmethod
    def stride(cls, values: dict[str, Any]) -> tuple[int, ...]:
        return tuple(values.get("step", (4, 4, 4)))

    def initialise(self, batch: Batch) -> None:
        self.mean.data.copy_(batch.x.mean(0))
        self.sd.copy_(batch.x.std(0).clamp(min=0.05))

    def forward(self, batch: Batch, player: str = "model") -> Loss:
        nats = -self._map(batch.x, batch.cond, batch.context).flatten(1).sum(1)
        return Loss(nats, {"density": nats})

    def _shift(self, x: Tensor, cond: Tensor | None, context: Tensor | None) -> Tensor:
        """What the condition adds: (b, 1, *space)."""
        if self.config.condition_width:
            assert cond is not None
            cond = cond if cond.is_floating_point() else nn.functional.one_hot(cond, self.config.condition_width)
            weights = torch.arange(1, self.config.condition_width + 1) * 0.1
            shift = (cond * weights.to(x)).sum(1).reshape(-1, *[1] * (x.ndim - 1))
        else:
            assert cond is None
            shift = torch.zeros(1).to(x)
        assert (context is None) == (self.config.context == 0)
        return shift if context is None else shift + 0.2 * context

    def _map(self, x: Tensor, cond: Tensor | None, context: Tensor | None) -> Tensor:
        z = (x - self.mean - self._shift(x, cond, context)) / self.sd
        return (-0.5 * z**2 - self.sd.log() - 0.5 * log(2 * pi)).sum(1, keepdim=True)

    @torch.no_grad()
    def log_prob_map(self, x: Tensor, cond: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        return self._map(x, cond, context)

    @torch.no_grad()
    def log_prob(self, x: Tensor, cond: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        return self._map(x, cond, context).flatten(1).sum(1)

    elbo = log_prob

    @torch.no_grad()
    def log_prob_estimate(
        self, x: Tensor, cond: Tensor | None = None, context: Tensor | None = None, *, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        noise = seeded_noise((len(x), 1), seed=seed)[:, 0].to(x)
        return self.log_prob(x, cond, context) + noise, torch.ones_like(noise)

    @torch.no_grad()
    def sample(self, n: int, *, seed: int, cond: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        noise = seeded_noise((n, *self.mean.shape), seed=seed)
        return self.mean + self._shift(noise, cond, context) + self.sd * noise


def preset(folder: Path, dims: int, recipe: str = "auto", **model: Any) -> Path:
    """A preset of the family, which trains for a moment and hardly at all."""
    fields = "".join(f"  {name}: {value}\n" for name, value in ({"kind": "voxels"} | model).items())
    path = folder / f"voxels{dims}d.yaml"
    path.write_text(
        "about: {title: Gaussian voxels, family: voxels, year: 1809, paper: Gauss, "
        f"dims: {dims}, abilities: [samples]}}\nmodel:\n{fields}recipe: {recipe}\n"
        "fit: {images: 8, batch_size: 8, learning_rate: 0.000001, precision: float32}\n"
    )
    return path


__all__ = ["ABILITIES", "FAMILY", "Voxels", "preset"]
