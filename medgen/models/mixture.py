"""Mixtures of Gaussians, of whole scans or of small patches, in two and three dimensions: nothing to train.

`over: components` is a Gaussian mixture over principal components with noise beyond them (`medgen.prob.subspace`);
with one Gaussian it is the Gaussian of the scans, its covariance made sound by a ridge or by Ledoit & Wolf's
shrinkage. `over: patches` makes each voxel a mixture of Gaussians given the voxels before it (`medgen.prob.patches`).
Both densities are exact, both are fitted in closed form or by expectation maximisation from all training scans at
once, in seconds; and each class has its own.

Grey values are whole numbers; noise fills the step between two of them, as in flows, so that log densities are
told per grey level and compare with theirs.
"""

from collections.abc import Iterable
from math import prod
from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor
from torch.distributions import Independent, Normal

from medgen.data.dataset import Batch
from medgen.errors import CapabilityError, DataError
from medgen.log import note
from medgen.models.abilities import Ability
from medgen.models.base import Loss, Model, ModelConfig, Player, conditional
from medgen.prob.dequantisation import dequantised, nats_a_level, quantised
from medgen.prob.patches import PatchMixture
from medgen.prob.point import Point
from medgen.prob.subspace import ShrinkageName, SubspaceMixture
from medgen.seeds import derived_seed, voxel_uniform

# Scans drawn together.
_MICRO_BATCH = {2: 16, 3: 2}
# Numbers of training scans that are kept in memory: a gigabyte.
_NUMBERS = 2**28
# Scans that principal components of larger scans are found from: time goes with the cube of the fewer of both.
_SCANS = 4096


class Mixture(Model):
    """A mixture of Gaussians; every variation is a field of its config.

    Example:
        >>> model = Mixture(Mixture.Config(shape=(16, 16), mixtures=2))
        >>> model.finalise([Batch(torch.rand(40, 1, 16, 16))])
        >>> model.sample(3, seed=0).shape
        torch.Size([3, 1, 16, 16])
    """

    class Config(ModelConfig):
        """A mixture of Gaussians.

        Args:
            kind: 'mixture'.
            over: 'components' (principal components of whole scans) or 'patches' (a voxel and those before it).
            mixtures: Gaussians a class; fewer where scans are few. 1 is a Gaussian.
            rank: components: principal components kept; the variance beyond them is spread evenly.
            lead: components: how many of them, from the first, the mixture is over, and are a scan's code; the
                others are Gaussian given those.
            shrinkage: components: of the covariance: 'ridge', 'ledoit-wolf' or 'none'.
            ridge: components: what is added to every variance, as a part of the mean variance; None: what makes
                a tenth of the scans likeliest.
            radius: patches: how far neighbours are, in voxels along each axis.
            position: patches: whether a voxel's place is part of its patch.
            patches: patches: how many are learned from.
            bits: grey values are whole numbers of so many bits; 0 for continuous data.
        """

        kind: Literal["mixture"] = "mixture"
        over: Literal["components", "patches"] = "components"
        mixtures: int = Field(default=5, ge=1, le=1024)
        rank: int = Field(default=256, ge=1, le=4096)
        lead: int = Field(default=32, ge=1, le=1024)
        shrinkage: ShrinkageName = "ridge"
        ridge: float | None = Field(default=None, ge=0)
        radius: int = Field(default=2, ge=1, le=8)
        position: bool = True
        patches: int = Field(default=100_000, ge=1)
        bits: int = Field(default=8, ge=0, le=16)

        @model_validator(mode="after")
        def _fits(self) -> "Mixture.Config":
            if self.ridge is not None and self.shrinkage != "ridge":
                raise ValueError(f"ridge is for shrinkage 'ridge', not {self.shrinkage!r}")
            return self

    config: "Mixture.Config"

    def __init__(self, config: "Mixture.Config") -> None:
        super().__init__()
        self.config = config
        classes = max(1, len(config.classes))
        self.density: SubspaceMixture | PatchMixture
        if config.over == "components":
            sizes = {"rank": config.rank, "components": config.mixtures, "lead": config.lead}
            self.density = SubspaceMixture(config.channels * prod(config.shape), **sizes, classes=classes)
        else:
            told = {"position": config.position, "bits": config.bits, "classes": classes}
            sizes = {"radius": config.radius, "components": config.mixtures}
            self.density = PatchMixture(config.shape, config.channels, **sizes, **told)

    @classmethod
    def abilities(cls, config: ModelConfig) -> frozenset[Ability]:
        """Both sample, score density and paint in; components make codes, patches say where the density comes from."""
        assert isinstance(config, Mixture.Config)
        both: set[Ability] = {"samples", "scores_density", "inpaints"}
        maps: set[Ability] = {"maps_density"}
        codes: set[Ability] = {"encodes", "decodes", "reconstructs", "restores"}
        return conditional(config, both | (maps if config.over == "patches" else codes))

    # -- fitting -----------------------------------------------------------------------------------

    def players(self) -> list[Player]:
        """Nobody: `finalise` does it all."""
        return []

    def forward(self, batch: Batch, player: str = "model") -> Loss:
        """The negative log density, nats a scan."""
        density = -self.log_prob(batch.x, batch.cond)
        return Loss(density, {"density": density})

    def validation_loss(self, batch: Batch) -> Float[Tensor, " b"]:
        """The negative log density."""
        return -self.log_prob(batch.x, batch.cond)

    def finalise(self, batches: Iterable[Batch]) -> None:
        """Fit the mixture to the training scans, or to as many of them as fit into memory, evenly chosen."""
        config = self.config
        numbers = config.channels * prod(config.shape)
        most = _NUMBERS // numbers
        if config.over == "components" and numbers > _SCANS:
            most = min(most, _SCANS)
        x, cond = _gathered(batches, max(2, most), bits=config.bits)
        if isinstance(self.density, PatchMixture):
            self.density.fit(x, cond, patches=config.patches)
            return
        step = 2.0**-config.bits if config.bits else 0.0
        shrinking = {"shrinkage": config.shrinkage, "ridge": config.ridge}
        self.density.fit(x.flatten(1), cond, **shrinking, noise=step**2 / 12)

    # -- abilities ---------------------------------------------------------------------------------

    @torch.no_grad()
    def log_prob(self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None) -> Float[Tensor, " b"]:
        """The exact log density of the dequantised scan per grey level, nats; the noise is always the same.

        Raises:
            DataError: the scans are not of the config's size.
        """
        if isinstance(self.density, PatchMixture):
            return self.log_prob_map(x, cond).double().flatten(1).sum(1).float()
        levels = nats_a_level(self.config.bits) * x[0].numel()
        return (self.density.log_prob(self._noised(x).flatten(1), cond) - levels).float()

    @torch.no_grad()
    def log_prob_map(self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None) -> Float[Tensor, "b 1 *space"]:
        """What each voxel adds to the log density given those before it in raster order, nats.

        Raises:
            CapabilityError: the mixture is over whole scans.
            DataError: the scans are not of the config's size.
        """
        if not isinstance(self.density, PatchMixture):
            raise CapabilityError(
                "A mixture over principal components has no density for each voxel. Use over: patches (patchgmm2d, "
                "patchgmm3d), or log_prob(x)."
            )
        density = self.density.log_prob_map(self._noised(x), cond)
        return (density - nats_a_level(self.config.bits) * self.config.channels).float()

    def _noised(self, x: Tensor) -> Tensor:
        """The dequantised scans."""
        expected, found = (self.config.channels, *self.config.shape), tuple(x.shape[1:])
        if found != expected:
            raise DataError(f"This mixture takes scans {expected}, channels first; found {found}. Crop or pad them.")
        u = voxel_uniform(tuple(x.shape[2:]), seed=0, channels=x.shape[1])
        return dequantised(x, u.to(x)[None].expand_as(x), self.config.bits)

    @torch.no_grad()
    def sample(self, n: int, *, seed: int, cond: Tensor | None = None) -> Float[Tensor, "n c *space"]:
        """`n` scans drawn from the density; of the classes as they come in training where none is asked for."""
        size = _MICRO_BATCH[self.config.dims]

        def draw(first: int, told: Tensor | None) -> Tensor:
            return self._finished(self.density.sample(size, seed=seed, first=first, cond=told))

        return self.in_micro_batches(n, size, draw, cond)

    def _finished(self, scans: Tensor) -> Float[Tensor, "n c *space"]:
        return quantised(scans.reshape(-1, self.config.channels, *self.config.shape), self.config.bits)

    @torch.no_grad()
    def inpaint(
        self, x: Float[Tensor, "b c *space"], hole: Bool[Tensor, "b 1 *space"], *, seed: int, cond: Tensor | None = None
    ) -> Float[Tensor, "b c *space"]:
        """`x` with the voxels of `hole` drawn anew, the others as they are.

        On components from the exact conditional density; on patches in raster order, by 32 particles that answer for
        the known voxels after the hole, too.
        """
        filled = []
        known = dequantised(x, torch.full_like(x, 0.5), self.config.bits)
        for number, (scan, where) in enumerate(zip(known, hole, strict=True)):
            told = None if cond is None else cond[number : number + 1]
            own = derived_seed(seed, number)
            if isinstance(self.density, PatchMixture):
                filled.append(self.density.inpaint(scan, where[0], seed=own, cond=told))
            else:
                filled.append(
                    self.density.inpaint(scan.flatten(), where.expand_as(scan).flatten(), seed=own, cond=told)
                )
        return torch.where(hole, self._finished(torch.stack(filled)), x)

    # -- codes -------------------------------------------------------------------------------------

    def _components(self) -> SubspaceMixture:
        if not isinstance(self.density, SubspaceMixture):
            raise CapabilityError(
                "A mixture over patches has no codes: it can neither encode, decode, reconstruct nor restore. "
                "Use over: components (gmm2d, gmm3d)."
            )
        return self.density

    def encode(self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None) -> Point:
        """The scan's leading principal components (b, lead), the same for all classes."""
        middle = dequantised(x, torch.full_like(x, 0.5), self.config.bits)
        return Point(self._components().codes(middle.flatten(1)))

    def decode(self, z: Tensor, cond: Tensor | None = None) -> Independent:
        """p(x | z) of codes (b, lead): their scan, and each voxel's spread about it in training scans."""
        density = self._components()
        shape = (-1, self.config.channels, *self.config.shape)
        mean = self._undone(density.expected(z)).reshape(shape)
        return Independent(Normal(mean, density.spread.reshape(shape).expand_as(mean)), mean.ndim - 1)

    def _undone(self, x: Tensor) -> Tensor:
        """From the middle of grey levels to scans on [0, 1], without rounding."""
        levels = 2**self.config.bits
        return (x * levels - 0.5) / (levels - 1) if self.config.bits else x

    def reconstruct(self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None) -> Float[Tensor, "b c *space"]:
        """The scan's leading principal components alone."""
        return self.decode(self.encode(x).mean).mean

    def restore(
        self, x: Float[Tensor, "b c *space"], *, strength: float = 1.0, seed: int = 0, cond: Tensor | None = None
    ) -> Float[Tensor, "b c *space"]:
        """The healthy twin: the leading components, drawn to where the mixture has its mass.

        Nothing is random here, so `seed` has no effect.
        """
        density, code = self._components(), self.encode(x).mean
        return self.decode(code + strength * (density.typical(code, cond) - code)).mean


def _gathered(batches: Iterable[Batch], most: int, *, bits: int) -> tuple[Tensor, Tensor | None]:
    """At most `most` scans, evenly chosen, at the middle of their grey levels, and their classes; all on the CPU."""
    kept: list[tuple[Tensor, Tensor | None]] = []
    step, seen = 1, 0
    for batch in batches:
        for row, scan in enumerate(batch.x):
            if seen % step == 0:
                middle = dequantised(scan.float(), torch.full_like(scan, 0.5, dtype=torch.float32), bits).cpu()
                kept.append((middle, None if batch.cond is None else batch.cond[row].cpu()))
            if len(kept) > most:
                kept, step = kept[::2], 2 * step
            seen += 1
    if len(kept) < seen:
        note(f"Fitting to {len(kept):,} of {seen:,} scans, evenly chosen: more do not fit into memory or minutes.")
    conds = [cond for _, cond in kept if cond is not None]
    return torch.stack([scan for scan, _ in kept]), torch.stack(conds) if conds else None


__all__ = ["Mixture"]
