"""What every family of models shares: its config, its loss, its players and its abilities."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from medgen.data.covariates import Covariate
from medgen.data.dataset import Batch
from medgen.errors import CapabilityError
from medgen.models.abilities import Ability


class ModelConfig(BaseModel):
    """Fields every family has; a family fixes its `kind` and adds its own numbers.

    Args:
        kind: name of the family, such as 'vae'.
        shape: voxels along each modelled axis: two for images, three for volumes.
        channels: values per voxel.
        classes: names of the classes to condition on; empty for an unconditional model.
        labels: of masks, in ascending order: where the model is given an image (`context`), what each channel of it
            marks; else the last channels of a scan are theirs, and the model draws scans and masks as pairs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    shape: tuple[int, ...] = Field(min_length=2, max_length=3)
    channels: int = Field(default=1, ge=1)
    classes: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()

    @property
    def joint(self) -> bool:
        """Whether it learns scans together with their masks."""
        return bool(self.labels) and not getattr(self, "context", 0)

    @property
    def images(self) -> int:
        """How many of its channels are a scan's own; the others are labels'."""
        return self.channels - len(self.labels) if self.joint else self.channels

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
        if list(self.labels) != sorted({label for label in self.labels if label > 0}):
            raise ValueError(f"labels are positive whole numbers in ascending order, each once; found {self.labels}")
        if self.images < 1:
            raise ValueError(f"{self.channels} channels have no room for a scan beside {len(self.labels)} labels")
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


class CodedConfig(CovariateConfig):
    """A family whose convolutions make a code of a scan: fold, then halve `levels` times.

    Args:
        code: 'vector' (few numbers for the whole scan) or 'map' (numbers per coarse position).
        latent: length of the vector, or channels of the map.
        width: features at the finest level.
        levels: halvings between scan and code, after folding.
        fold: block size turned into channels first; 2 makes volumes eight times cheaper.
        depth: residual blocks a level.
    """

    code: Literal["vector", "map"] = "vector"
    latent: int = Field(default=16, ge=1)
    width: int = Field(default=32, ge=1)
    levels: int = Field(default=2, ge=0, le=16)
    fold: int = Field(default=1, ge=1)
    depth: int = Field(default=1, ge=0, le=64)

    @property
    def stride(self) -> int:
        """Voxels along an axis per code position; every axis of `shape` is a multiple of it."""
        return self.fold * 2**self.levels

    @property
    def coarse(self) -> tuple[int, ...]:
        """Feature positions along each axis at the coarsest level."""
        return tuple(n // self.stride for n in self.shape)

    @property
    def code_shape(self) -> tuple[int, ...]:
        """(latent, *positions); a vector is a map with one position."""
        return (self.latent, *(self.coarse if self.code == "map" else (1,) * self.dims))

    @model_validator(mode="after")
    def _divisible(self) -> "CodedConfig":
        if any(n % self.stride for n in self.shape):
            raise ValueError(f"shape {self.shape} must be divisible by fold * 2**levels = {self.stride}")
        return self


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


def can(model: "Model", *abilities: Ability) -> bool:
    """Whether a model has any of these abilities."""
    return not model.abilities(model.config).isdisjoint(abilities)


def class_indices(config: ModelConfig, cond: Tensor | None) -> Int[Tensor, " b"] | None:
    """Class indices of a condition of either form, indices or rows; None where no class is told."""
    classes = len(config.classes)
    if cond is None or not classes:
        return None
    return cond if cond.ndim == 1 else cond[:, :classes].argmax(1)


@dataclass
class Loss:
    """What a player pays for a batch: `total` (b,), and its named parts (b,)."""

    total: Float[Tensor, " b"]
    terms: dict[str, Float[Tensor, " b"]] = field(default_factory=dict)


@dataclass(frozen=True)
class Player:
    """A set of parameters trained together, and when: in images seen, or below 1 as a part of the run.

    Overlapping spans train in turn (a GAN); consecutive spans are stages, each of which goes on from the best weights
    of the one before. `until` None: to the end. `rate` multiplies the learning rate.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    since: float = 0
    until: float | None = None
    every: int = 1
    rate: float = 1.0


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
        """What every axis of a scan must be a multiple of with these `values`: one number, or one for each axis.

        fold * 2**levels of a family whose config has both; 1 of others, unless they know better.
        """
        fields = cls.Config.model_fields
        if not fields.keys() >= {"fold", "levels"}:
            return 1
        fold, levels = (int(values.get(name, fields[name].default)) for name in ("fold", "levels"))
        return fold * 2**levels

    @property
    def mixed_precision_pays(self) -> bool:
        """Whether bfloat16 trains faster where a machine has it; small networks on images gain nothing."""
        return self.config.dims == 3

    @property
    def first_scans(self) -> int:
        """How many scans at most `initialise` is shown."""
        return 64

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

    def pulse(self, batch: Batch) -> dict[str, float]:
        """Cheap numbers about how training goes, asked at every validation of the averaged weights.

        `batch` has up to 64 real scans; it is asked in eval mode, without gradients and with the same randomness every
        time. It tells nothing of players whose time is over. `medgen.training.doctor` knows what these mean:

            variety     mean distance between generated scans over that between real ones
            coverage    share of real scans that have a generated one among their neighbours
            real_above  share of pairs in which the critic rates the real scan above the generated one; with it the
                        loss is one of players who chase each other, and its course says nothing
        """
        return {}

    def in_micro_batches(
        self, n: int, size: int, draw: Callable[..., Float[Tensor, "size c *space"]], *given: Tensor | None
    ) -> Float[Tensor, "n c *space"]:
        """`n` scans of `draw(first, *given)`, which makes `size` at a time: always so many, so that n decides no scan.

        Args:
            n: how many scans.
            size: how many at a time; the last time the last row of what is given is repeated.
            draw: makes scans first, first + 1, ...
            given: what is told of every scan, a row each; None stays None.
        """
        drawn = []
        for first in range(0, n, size):
            rows = torch.arange(first, first + size).clamp(max=n - 1)
            told = [None if each is None else each[rows.to(each.device)].to(self.device) for each in given]
            drawn.append(draw(first, *told)[: n - first])
        return torch.cat(drawn)

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


__all__ = [
    "CodedConfig",
    "ConditionedConfig",
    "CovariateConfig",
    "Loss",
    "Model",
    "ModelConfig",
    "Player",
    "can",
    "class_indices",
    "conditional",
    "each_class",
]
