"""What a model can do, as one-method protocols; tasks ask for these and never for a class."""

from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import Distribution

# What a model can do; tasks ask for these words and never for a class.
Ability = Literal[
    "samples", "encodes", "decodes", "reconstructs", "scores_density", "estimates_density", "bounds_density",
    "maps_density", "restores", "translates", "classifies", "inpaints", "marks", "perceives",
]  # fmt: skip


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


@runtime_checkable
class Marks(Protocol):
    """Says where a scan does not look like healthy ones."""

    def mark(self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None) -> Float[Tensor, "b 1 *space"]:
        """Log-odds that each voxel belongs to an anomaly."""
        ...


@runtime_checkable
class Perceives(Protocol):
    """Says what its critic sees in a scan."""

    def perceive(self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None) -> Float[Tensor, "b w"]:
        """Features of each scan, learned to tell real scans from generated ones."""
        ...


__all__ = [
    "Ability",
    "BoundsDensity",
    "Classifies",
    "Decodes",
    "Encodes",
    "EstimatesDensity",
    "Inpaints",
    "MapsDensity",
    "Marks",
    "Perceives",
    "Reconstructs",
    "Restores",
    "Samples",
    "ScoresDensity",
]
