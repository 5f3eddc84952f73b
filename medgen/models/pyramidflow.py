"""The pyramid flow: one small conditional flow per scale of a Haar pyramid, trained on patches, exact on any size.

A scan is its coarse version and the details that lead from each scale to the next finer one (Yu, Derpanis &
Brubaker 2020, "Wavelet Flow", equation 3):

    log p(x) = log p(x_L) + sum over levels l [ log p(d_l | x_(l+1)) ] + const,   x_l <-> (x_(l+1), d_l)

Every level is a local flow: `reach` positions about a voxel decide what happens to it and nothing else does. So each
level trains alone, on patches that carry real neighbours in a margin as wide as the reach and count their loss
only inside, weighted so that it is, on average, that of the whole scan. Scans of any size are scored, sampled
and sharpened tile by tile, which agree: noise is a function of (seed, absolute voxel).
"""

from collections.abc import Callable
from math import prod
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from medgen.data.dataset import Batch
from medgen.errors import CapabilityError, DataError
from medgen.models.abilities import Ability
from medgen.models.base import ConditionedConfig, Loss, Model, ModelConfig, Player, conditional
from medgen.nets.blocks import channels_last, from_blocks, spread, squeezed, squeezes
from medgen.nets.conditioner import Conditioner, Guide
from medgen.nets.haar import haar, haar_ladj, unhaar
from medgen.nets.told import require_context
from medgen.nets.windows import Window, cut, drawn_window, tiles
from medgen.prob.bijections import Chain, Coupling, Mix
from medgen.prob.dequantisation import dequantised, level_densities, log_normal, nats_a_level, quantised
from medgen.seeds import derived_seed, voxel_normal, voxel_uniform

_BINS = 8
# Positions that tell ActNorm where to start; channels of the feature map that couplings are told besides the details.
_VOXELS, _GUIDE = 2**20, 32


class PyramidFlow(Model):
    """A Haar pyramid of local conditional flows; every variation is a field of its config.

    Example:
        >>> model = PyramidFlow(PyramidFlow.Config(shape=(16, 16), width=8, steps=2, levels=1))
        >>> model.sample(2, seed=0, shape=(32, 24)).shape
        torch.Size([2, 1, 32, 24])
    """

    class Config(ConditionedConfig):
        """A pyramid flow.

        Args:
            kind: 'pyramidflow'.
            coupling: 'affine' or 'spline'.
            steps: couplings a level; each reaches one position further.
            levels: halvings of the scan; the coarsest version has a flow of its own.
            width: features inside a coupling.
            spacing: mm along each modelled axis, where it differs; coarse axes are halved later.
            position: learn a feature vector for each place, at most so many along an axis, interpolated
                between; for scans that lie alike. 0 for none.
            bits: grey values are whole numbers of so many bits; 0 for continuous data.
            patch: positions along an axis that a training patch has at every level, margins included.
            tile: positions along an axis that are scored or sampled at once.
            memory: 'store' activations, or 'recompute' them in the backward pass.
            temperature: standard deviation of the noise that samples are made of.
        """

        kind: Literal["pyramidflow"] = "pyramidflow"
        coupling: Literal["affine", "spline"] = "affine"
        steps: int = Field(default=4, ge=1, le=64)
        levels: int = Field(default=2, ge=1, le=12)
        width: int = Field(default=48, ge=1)
        spacing: tuple[float, ...] = ()
        position: int = Field(default=16, ge=0, le=256)
        bits: int = Field(default=8, ge=0, le=16)
        patch: int = Field(default=32, ge=4)
        tile: int = Field(default=32, ge=4)
        memory: Literal["store", "recompute"] = "store"
        temperature: float = Field(default=1.0, gt=0)

        @property
        def blocks(self) -> tuple[tuple[int, ...], ...]:
            """Factors along each axis from every level to the next, the last one's squeeze included."""
            alone = tuple(n == 1 for n in self.shape)
            return squeezes(self.spacing or (1.0,) * self.dims, self.levels + 1, alone)

        @property
        def whole(self) -> tuple[int, ...]:
            """What every axis of a scan must be divisible by."""
            return tuple(prod(factors) for factors in zip(*self.blocks, strict=True))

        @model_validator(mode="after")
        def _fits(self) -> "PyramidFlow.Config":
            if self.spacing and (len(self.spacing) != self.dims or min(self.spacing) <= 0):
                raise ValueError(f"spacing needs {self.dims} positive numbers, not {self.spacing}")
            if any(n % factor for n, factor in zip(self.shape, self.whole, strict=True)):
                raise ValueError(f"shape {self.shape} must be divisible by {self.whole}")
            if any(prod(factors) < 2 for factors in self.blocks):
                raise ValueError(f"shape {self.shape} cannot be halved {self.levels + 1} times")
            if self.patch < 2 * (self.steps + 2) + 4:
                raise ValueError(f"patch {self.patch} leaves no core inside margins of {self.steps + 2} positions")
            return self

    config: "PyramidFlow.Config"

    def __init__(self, config: "PyramidFlow.Config") -> None:
        super().__init__()
        self.config = config
        self.levels = cast("list[_Level]", nn.ModuleList(_Level(config, n) for n in range(config.levels + 1)))

    @classmethod
    def stride(cls, values: dict[str, Any]) -> int | tuple[int, ...]:
        """Two to the number of levels and one; fewer along axes that `spacing` says are coarse."""
        levels = 1 + int(values.get("levels", cls.Config.model_fields["levels"].default))
        spacing = values.get("spacing")
        if not spacing:
            return 2**levels
        return tuple(prod(f) for f in zip(*squeezes(tuple(spacing), levels, (False,) * len(spacing)), strict=True))

    @classmethod
    def abilities(cls, config: ModelConfig) -> frozenset[Ability]:
        """A pyramid flow samples and scores density, exactly and voxel by voxel."""
        return conditional(config, {"samples", "scores_density", "maps_density"})

    def players(self) -> list[Player]:
        """Every level trains alone."""
        return [Player(f"level {n}", tuple(level.parameters())) for n, level in enumerate(self.levels)]

    @property
    def mixed_precision_pays(self) -> bool:
        """As for `flow`."""
        return True

    # -- training ------------------------------------------------------------------------------------

    def forward(self, batch: Batch, player: str = "level 0") -> Loss:
        """The negative log density of one level, nats a scan, estimated without bias from a patch of each scan."""
        number = int(player.removeprefix("level "))
        x = dequantised(batch.x, torch.rand_like(batch.x), self.config.bits)
        told, weights, positions = self._patches(x, batch, number)
        noise, ladj = self.levels[number](*told)
        nats = -((log_normal(noise) + ladj) * weights).flatten(1).sum(1) + self._constant(number) * positions
        return Loss(nats, {player: nats})

    def _patches(self, x: Tensor, batch: Batch, number: int) -> tuple[tuple[Any, ...], Tensor, int]:
        """What a level sees of a random patch of each scan, what its positions count for, and how many a scan has."""
        require_context(batch.context, self.config.context, x.shape[2:])
        level = self.levels[number]
        details, coarse, context = self._at(x, batch.context, number)
        space = tuple(details.shape[2:])
        size = tuple(min(self.config.patch, n) for n in space)
        drawn = [drawn_window(space, size, level.reach) for _ in range(len(x))]
        windows = [window for window, _ in drawn]

        def each(values: Tensor) -> Tensor:
            return torch.stack([v[w.index] for v, w in zip(values, windows, strict=True)])

        places = [level.guide.place(w.origin, size, space) for w in windows]
        place = torch.cat([one for one in places if one is not None]) if level.guide.places is not None else None
        weights = torch.stack([weight for _, weight in drawn]).to(x)
        seen = [None if values is None else each(values) for values in (coarse, context)]
        return (each(details), seen[0], batch.cond, seen[1], place), weights, prod(space)

    def validation_loss(self, batch: Batch) -> Float[Tensor, " b"]:
        """The negative log density of whole scans, all levels together."""
        return -self.log_prob(batch.x, batch.cond, batch.context)

    def initialise(self, batch: Batch) -> None:
        """ActNorm of every level from what reaches it on patches, as in training."""
        batch = batch.first(max(2, _VOXELS // min(prod(batch.x.shape[2:]), self.config.patch**self.config.dims)))
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            x = dequantised(batch.x, torch.rand(batch.x.shape).to(batch.x), self.config.bits)
            for number, level in enumerate(self.levels):
                level.initialise(*self._patches(x, batch, number)[0])

    def _at(self, x: Tensor, context: Tensor | None, number: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """A level's details, the coarser scan they are told, and the given image on their positions."""
        for factors in self.config.blocks[:number]:
            x = haar(x, factors)[0]
            context = None if context is None else haar(context, factors)[0]
        factors = self.config.blocks[number]
        given = None if context is None else squeezed(context, factors)
        if number == self.config.levels:
            return squeezed(x, factors), None, given
        coarse, details = haar(x, factors)
        return details, coarse, given

    def _constant(self, number: int) -> float:
        """Nats a position of this level that grey levels cost, less what the pyramid's own transform gives."""
        config, last = self.config, number == self.config.levels
        ladj = 0.0 if last else haar_ladj(config.channels, config.blocks[number])
        return nats_a_level(config.bits) * self.levels[number].channels - ladj

    # -- density -------------------------------------------------------------------------------------

    @torch.no_grad()
    def log_prob(
        self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None, context: Tensor | None = None
    ) -> Float[Tensor, " b"]:
        """The exact log density of the dequantised scan per grey level, nats; the noise is always the same.

        Raises:
            DataError: the scan's axes are not divisible by the pyramid's factors, or `context` is not of its size.
        """
        return torch.stack([*self.density_parts(x, cond, context).values()]).sum(0)

    def density_parts(
        self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None, context: Tensor | None = None
    ) -> dict[str, Float[Tensor, " b"]]:
        """What the log density is the sum of, nats: of each level its noise and its volume."""
        walked, costs = self._walked(x, cond, context), [self._constant(n) for n in range(len(self.levels))]
        return level_densities([noise for noise, _ in walked], [ladj for _, ladj in walked], costs)

    def noise_maps(
        self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None, context: Tensor | None = None
    ) -> list[Float[Tensor, "b _ *_"]]:
        """The noise of every level on its own positions, finest first: white, of scans like the training scans."""
        return [noise for noise, _ in self._walked(x, cond, context)]

    def log_prob_map(
        self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None, context: Tensor | None = None
    ) -> Float[Tensor, "b 1 *space"]:
        """Each voxel's part of the log density, nats, all scales together."""
        return torch.stack(self.log_prob_maps(x, cond, context)).sum(0)

    @torch.no_grad()
    def log_prob_maps(
        self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None, context: Tensor | None = None
    ) -> list[Float[Tensor, "b 1 *space"]]:
        """Each voxel's part of the log density scale by scale, finest first; the last is the coarsest scan's."""
        space, walked = tuple(x.shape[2:]), enumerate(self._walked(x, cond, context))
        return [spread(log_normal(noise) + ladj - self._constant(n), space) for n, (noise, ladj) in walked]

    def _walked(self, x: Tensor, cond: Tensor | None, context: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Noise and ladj of every level on its own positions, computed tile by tile."""
        self._check(tuple(x.shape[2:]), context)
        u = voxel_uniform(tuple(x.shape[2:]), seed=0, channels=x.shape[1]).to(x)
        x = dequantised(x, u[None].expand_as(x), self.config.bits)
        found = []
        for number, level in enumerate(self.levels):
            details, coarse, given = self._at(x, context, number)

            def scored(window: Window, level=level, details=details, coarse=coarse, given=given) -> Tensor:
                place = level.guide.place(window.origin, window.size, tuple(details.shape[2:]))
                return torch.cat(level(cut(details, window), cut(coarse, window), cond, cut(given, window), place), 1)

            out = self._tiled(x.new_empty(len(x), level.channels + 1, *details.shape[2:]), level.reach, scored)
            found.append((out[:, :-1], out[:, -1:]))
        return found

    def _tiled(self, out: Tensor, reach: int, of: Callable[[Window], Tensor]) -> Tensor:
        """Fill `out` with what `of` gives for every tile, margins cut off."""
        for window in tiles(tuple(out.shape[2:]), self.config.tile, reach):
            out[window.core_in_whole] = of(window)[window.core_in_window]
        return out

    def _check(self, space: tuple[int, ...], context: Tensor | None) -> None:
        require_context(context, self.config.context, space)
        if any(n % factor for n, factor in zip(space, self.config.whole, strict=True)):
            raise DataError(
                f"A pyramid flow of {self.config.levels} levels takes scans whose axes are divisible by "
                f"{self.config.whole}; this one has {space}. Pad it, or train with fewer levels."
            )

    # -- sampling ------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self, n: int, *, seed: int, cond: Tensor | None = None, context: Tensor | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> Float[Tensor, "n c *space"]:  # fmt: skip
        """`n` scans, coarsest scale first, tile by tile.

        Args:
            n: how many.
            seed: scan i depends on (seed, i).
            cond: conditions, one row a scan.
            context: given images, one a scan.
            shape: voxels along each axis; the training scans' by default.

        Raises:
            DataError: `shape` is not divisible by the pyramid's factors, or `context` is not of it.
        """
        space = shape or self.config.shape
        self._check(tuple(space), context)
        top = tuple(size // factor for size, factor in zip(space, self.config.whole, strict=True))
        drawn = []
        for i in range(n):
            told = [None if given is None else given[i : i + 1] for given in (cond, context)]
            blocks = self._drawn(self.config.levels, None, top, derived_seed(seed, i), *told)
            x = from_blocks(blocks.movedim(1, -1), self.config.blocks[-1])
            drawn.append(self._sharpened(x, self.config.levels, derived_seed(seed, i), *told))
        return quantised(torch.cat(drawn), self.config.bits)

    @torch.no_grad()
    def sharpen(
        self, coarse: Float[Tensor, "b c *coarse"], *, seed: int, levels: int = 1, cond: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Float[Tensor, "b c *space"]:  # fmt: skip
        """Draw the details that a scan lacks: from the scale `levels` halvings down to the finest.

        Args:
            coarse: block means of a scan on [0, 1], `levels` halvings coarser than the training scans.
            seed: row i depends on (seed, i).
            levels: scales to add, at most the pyramid's.
            cond, context: as for `sample`; context at the finest scale.

        Raises:
            CapabilityError: the pyramid has fewer levels.
            DataError: `context` is not of the finest scale.
        """
        if not 1 <= levels <= self.config.levels:
            raise CapabilityError(f"This pyramid flow adds 1 to {self.config.levels} scales; asked for {levels}.")
        factors = [prod(block) for block in zip(*self.config.blocks[:levels], strict=True)]
        space = tuple(n * factor for n, factor in zip(coarse.shape[2:], factors, strict=True))
        require_context(context, self.config.context, space)
        coarse = coarse.to(self.device)
        half = 0.5 / 2**self.config.bits if self.config.bits else 0.0
        scale = (2**self.config.bits - 1) / 2**self.config.bits if self.config.bits else 1.0
        drawn = []
        for i in range(len(coarse)):
            told = [None if given is None else given[i : i + 1] for given in (cond, context)]
            drawn.append(self._sharpened(coarse[i : i + 1] * scale + half, levels, derived_seed(seed, i), *told))
        return quantised(torch.cat(drawn), self.config.bits)

    def _sharpened(self, x: Tensor, levels: int, seed: int, cond: Tensor | None, context: Tensor | None) -> Tensor:
        for number in reversed(range(levels)):
            details = self._drawn(number, x, tuple(x.shape[2:]), seed, cond, context)
            x = unhaar(x, details, self.config.blocks[number])
        return x

    def _drawn(
        self, number: int, coarse: Tensor | None, space: tuple[int, ...], seed: int, cond: Tensor | None,
        context: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """One level's details for one scan, given the coarser one."""
        level, device = self.levels[number], self.device
        given = None if context is None else self._at(context, context.to(device), number)[2]
        cond = None if cond is None else cond.to(device)

        def drawn(window: Window) -> Tensor:
            noise = voxel_normal(
                window.size, seed=derived_seed(seed, number), origin=window.origin, channels=level.channels
            ).to(device)
            place = level.guide.place(window.origin, window.size, space)
            noise = self.config.temperature * noise[None]
            return level.inverse(noise, cut(coarse, window), cond, cut(given, window), place)

        return self._tiled(torch.empty(1, level.channels, *space, device=device), level.reach, drawn)


class _Level(nn.Module):
    """One scale: details (or, last, the coarsest scan's blocks) given the coarser scan, condition and place."""

    def __init__(self, config: PyramidFlow.Config, number: int) -> None:
        super().__init__()
        factors, dims, last = config.blocks[number], config.dims, number == config.levels
        self.channels = config.channels * (prod(factors) - (not last))
        whole = [prod(f) for f in zip(*config.blocks[: number + 1], strict=True)]
        extent = tuple(n // factor for n, factor in zip(config.shape, whole, strict=True))
        seen = (0 if last else config.channels) + config.context * prod(factors)
        self.guide = Guide(
            dims, _GUIDE, numbers=config.condition_width, seen=seen, extent=extent, places=config.position
        )
        steps: list[Mix | Coupling] = [self._coupling(config, 0, "affine")]
        for _ in range(config.steps):
            steps += [Mix(self.channels, "conv"), self._coupling(config, self.channels // 2, config.coupling)]
        steps += [Mix(self.channels, "conv"), self._coupling(config, 0, "affine")]
        self.chain = Chain(steps, recompute=config.memory == "recompute")
        # Each coupling but the first and the last sees its direct neighbours.
        self.reach = self.guide.reach + config.steps
        channels_last(self, dims)

    def _coupling(self, config: PyramidFlow.Config, keep: int, kind: Literal["affine", "spline"]) -> Coupling:
        outside = (self.channels - keep) * Coupling.parameters_of(kind, _BINS)
        kernels = (3, 1, 1) if keep else (1, 1, 1)
        network = Conditioner(config.dims, keep, outside, config.width, given=_GUIDE, kernels=kernels)
        return Coupling(network, keep, kind, _BINS)

    def told(self, coarse: Tensor | None, cond: Tensor | None, context: Tensor | None, place: Tensor | None) -> Tensor:
        """What couplings are told, (b or 1, guide, *positions or ones)."""
        seen = [part for part in (coarse, context) if part is not None]
        return self.guide(cond, torch.cat(seen, 1) if seen else None, place)

    def forward(self, details: Tensor, *told: Tensor | None) -> tuple[Tensor, Float[Tensor, "b 1 *positions"]]:
        """Noise, and ladj at every position."""
        return self.chain(details, self.told(*told))

    def inverse(self, noise: Tensor, *told: Tensor | None) -> Tensor:
        """Details from noise."""
        return self.chain.inverse(noise, self.told(*told))

    def initialise(self, details: Tensor, *told: Tensor | None) -> None:
        """ActNorm."""
        self.chain.initialise(details, self.told(*told))


__all__ = ["PyramidFlow"]
