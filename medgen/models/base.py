"""What every family of models shares: its config, its loss, its players and its abilities."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.distributions import Distribution

from medgen.data.covariates import Covariate
from medgen.data.dataset import Batch
from medgen.errors import CapabilityError

# What a model can do; tasks ask for these words and never for a class.
Ability = Literal[
    "samples", "encodes", "decodes", "reconstructs", "scores_density", "estimates_density", "bounds_density",
    "maps_density", "restores", "translates", "classifies", "inpaints",
]  # fmt: skip


class ModelConfig(BaseModel):
    """Fields every family has; a family fixes its `kind` and adds its own numbers.

    Args:
        kind: name of the family, such as 'vae'.
        shape: voxels along each modelled axis: two for images, three for volumes.
        channels: values per voxel.
        classes: names of the classes to condition on; empty for an unconditional model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    shape: tuple[int, ...] = Field(min_length=2, max_length=3)
    channels: int = Field(default=1, ge=1)
    classes: tuple[str, ...] = ()

    @property
    def dims(self) -> int:
        """2 for images, 3 for volumes."""
        return len(self.shape)

    @property
    def grey_levels(self) -> int:
        """Of how many grey values its density is; 0: of continuous values on [0, 1]."""
        if getattr(self, "likelihood", "") == "discretised-logistic":
            return 256
        bits = getattr(self, "bits", 0)
        return 2**bits if bits else 0

    @model_validator(mode="after")
    def _positive(self) -> "ModelConfig":
        if min(self.shape) < 1:
            raise ValueError(f"shape must be positive, not {self.shape}")
        return self


class CovariateConfig(ModelConfig):
    """A family that takes more than a class to say p(x | condition).

    With covariates, `cond` is a float table (b, `condition_width`): one 0 or 1 a class, then each
    covariate's numbers. Without, class indices (b,) will do.

    Args:
        covariates: what else to condition on; none by default.
    """

    covariates: tuple[Covariate, ...] = ()

    @property
    def condition_width(self) -> int:
        """Numbers a scan's condition has."""
        return len(self.classes) + sum(covariate.width for covariate in self.covariates)


class ConditionedConfig(CovariateConfig):
    """A family that may be given an image with every scan, too.

    Args:
        context: channels of that image, which is on the same voxels, such as a mask, a blurred scan or
            another modality; 0 for none.
    """

    context: int = Field(default=0, ge=0)


def conditional(config: ModelConfig, abilities: set[Ability]) -> frozenset[Ability]:
    """These abilities, and 'classifies' where a density is told apart by class: p(y | x) follows by Bayes."""
    told: set[Ability] = {"scores_density", "bounds_density"}
    more: set[Ability] = {"classifies"} if abilities & told and len(config.classes) > 1 else set()
    return frozenset(abilities | more)


def each_class(config: ModelConfig, cond: Tensor | None, count: int, device: torch.device) -> list[Tensor | None]:
    """Conditions that say of `count` scans that they are of each class in turn, with the covariates of `cond`.

    One condition where the config has no classes.
    """
    classes = len(config.classes)
    if not getattr(config, "covariates", ()):
        return [torch.full((count,), c, dtype=torch.long, device=device) for c in range(classes)] or [None]
    width = getattr(config, "condition_width", 0)
    told = torch.zeros(count, width, device=device) if cond is None or cond.ndim == 1 else cond
    if not classes:
        return [told]
    each = torch.eye(classes, device=device)
    return [torch.cat([each[c].expand(count, -1), told[:, classes:]], 1) for c in range(classes)]


@dataclass
class Loss:
    """What a player pays for a batch: `total` (b,), and its named parts (b,)."""

    total: Float[Tensor, " b"]
    terms: dict[str, Float[Tensor, " b"]] = field(default_factory=dict)


@dataclass(frozen=True)
class Player:
    """A set of parameters trained together, and when: in images seen, or below 1 as a part of the run.

    Overlapping spans train in turn (a GAN); consecutive spans are stages, each of which goes on from the best weights
    of the one before. `until` None: to the end.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    since: float = 0
    until: float | None = None
    every: int = 1


class Model(nn.Module):
    """A family: `forward(batch, player)` is the loss, `players` says who is trained when.

    `progress` tells a loss how far training is, from 0 to 1, for weights that rise with it.
    """

    Config: ClassVar[type[ModelConfig]]
    config: ModelConfig
    progress: float = 1.0

    @classmethod
    def abilities(cls, config: ModelConfig) -> frozenset[Ability]:
        """What a model of this config can do."""
        raise TypeError(f"{cls.__name__} does not say what it can do")

    @classmethod
    def stride(cls, values: dict[str, Any]) -> int | tuple[int, ...]:
        """What every axis of a scan must be a multiple of with these `values`: one number, or one for each axis."""
        return 1

    @property
    def mixed_precision_pays(self) -> bool:
        """Whether bfloat16 trains faster where a machine has it; small networks on images gain nothing."""
        return self.config.dims == 3

    @property
    def device(self) -> torch.device:
        """Where its numbers are."""
        return next(chain(self.parameters(), self.buffers())).device

    def players(self) -> list[Player]:
        """Who is trained; by default everything at once, all the time. Nobody where all has a closed form."""
        return [Player("model", tuple(self.parameters()))]

    def validation_loss(self, batch: Batch) -> Float[Tensor, " b"]:
        """What decides when training stops; the first player's loss unless a family knows better."""
        return self(batch, self.players()[0].name).total

    def initialise(self, batch: Batch) -> None:
        """Data-dependent initialisation, once, before training."""

    def begin(self, player: str, batch: Batch) -> None:
        """Data-dependent initialisation of a player whose time begins after others'."""

    def finalise(self, batches: Iterable[Batch]) -> None:
        """What is fitted in closed form after training, such as a prior over codes."""

    def health(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Numbers that tell whether training went astray, such as how many code dimensions say anything."""
        return {}

    @torch.no_grad()
    def class_log_prob(
        self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None, context: Tensor | None = None
    ) -> Float[Tensor, "b k"]:
        """log p(y | x) of each class, by Bayes' rule with classes equally likely beforehand.

            p(y | x) = p(x | y) / sum over classes y' of p(x | y')

        With a bound in place of log p(x | y), an approximation. Densities of many voxels are seldom wrong a little:
        the chances are near 0 and 1, and want a temperature (`medgen.metrics.classification`) to mean anything.

        Args:
            x: scans.
            cond: rows (b, condition_width) whose covariates are used; the class in them is not.
            context: what is given with each scan.

        Raises:
            CapabilityError: the model has no classes, or no density.
        """
        able = self.abilities(self.config)
        if "classifies" not in able:
            raise CapabilityError(
                f"This {self.config.kind} cannot classify: that takes a density and two or more classes; "
                f"it has {len(self.config.classes)}. Train a density on scans with classes."
            )
        density: Any = self
        density = density.log_prob if "scores_density" in able else density.elbo
        given = {} if context is None else {"context": context}
        told = [density(x, one, **given) for one in each_class(self.config, cond, len(x), x.device)]
        return torch.stack(told, 1).log_softmax(1)


@runtime_checkable
class Samples(Protocol):
    """Draws new scans."""

    def sample(self, n: int, *, seed: int, cond: Tensor | None = None) -> Float[Tensor, "n c *space"]:
        """`n` scans; scan i depends on (seed, i) and its condition, never on n."""
        ...


@runtime_checkable
class Encodes(Protocol):
    """Maps a scan to a distribution over codes."""

    def encode(self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None) -> Distribution:
        """q(z | x)."""
        ...


@runtime_checkable
class Decodes(Protocol):
    """Maps a code to a distribution over scans."""

    def decode(self, z: Tensor, cond: Tensor | None = None) -> Distribution:
        """p(x | z)."""
        ...


@runtime_checkable
class Reconstructs(Protocol):
    """Returns the scan as the model would have it."""

    def reconstruct(self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None) -> Float[Tensor, "b c *space"]:
        """The model's version of `x`, on the same grid."""
        ...


@runtime_checkable
class Restores(Protocol):
    """Returns the nearest healthy twin of a scan."""

    def restore(
        self, x: Float[Tensor, "b c *space"], *, strength: float = 1.0, seed: int = 0, cond: Tensor | None = None
    ) -> Float[Tensor, "b c *space"]:
        """`x` without what the training scans do not have; `strength` 0 changes nothing but detail."""
        ...


@runtime_checkable
class ScoresDensity(Protocol):
    """Gives the exact log density."""

    def log_prob(self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None) -> Float[Tensor, " b"]:
        """log p(x), nats."""
        ...


@runtime_checkable
class MapsDensity(Protocol):
    """Says where in a scan its log density comes from."""

    def log_prob_map(self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None) -> Float[Tensor, "b 1 *space"]:
        """Each voxel's part of log p(x), nats; the parts sum to `log_prob` (or to `elbo`)."""
        ...


@runtime_checkable
class EstimatesDensity(Protocol):
    """Estimates the log density, and says how well."""

    def log_prob_estimate(
        self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None, *, seed: int = 0
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """An estimate of log p(x) and its standard error, nats."""
        ...


@runtime_checkable
class BoundsDensity(Protocol):
    """Gives a lower bound of the log density."""

    def elbo(self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None) -> Float[Tensor, " b"]:
        """A lower bound of log p(x), nats."""
        ...


@runtime_checkable
class Classifies(Protocol):
    """Says how likely each class is."""

    def class_log_prob(
        self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None, context: Tensor | None = None
    ) -> Float[Tensor, "b k"]:
        """log p(y | x)."""
        ...


@runtime_checkable
class Inpaints(Protocol):
    """Draws what belongs into a hole of a scan."""

    def inpaint(
        self, x: Float[Tensor, "b c *space"], hole: Bool[Tensor, "b 1 *space"], *, seed: int, cond: Tensor | None = None
    ) -> Float[Tensor, "b c *space"]:
        """`x` with the voxels of `hole` drawn anew, given the others, which stay as they are."""
        ...


__all__ = [
    "Ability",
    "BoundsDensity",
    "Classifies",
    "ConditionedConfig",
    "CovariateConfig",
    "Decodes",
    "Encodes",
    "EstimatesDensity",
    "Inpaints",
    "Loss",
    "MapsDensity",
    "Model",
    "ModelConfig",
    "Player",
    "Reconstructs",
    "Restores",
    "Samples",
    "ScoresDensity",
    "conditional",
    "each_class",
]
