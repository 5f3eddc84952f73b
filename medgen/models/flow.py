"""The multi-scale coupling flow, in two and three dimensions: an exact density and an exact inverse.

A bijection f maps a scan to Gaussian noise of the same size (Dinh et al. 2015, "NICE"; Dinh et al. 2017,
"Density estimation using Real NVP"; Kingma & Dhariwal 2018, "Glow"; Durkan et al. 2019, "Neural spline flows"):

    log p(x) = log N(f(x); 0, 1) + log |det df/dx|

Every level squeezes blocks of voxels into channels, applies `steps` of ActNorm, channel mixing and a coupling,
and gives half of its channels away, as noise after being standardised by the other half.

Grey values are whole numbers. Noise fills the step between two of them (dequantisation), so that the density of

    x~ = (round(x (2^bits - 1)) + u) / 2^bits,   u in [0, 1)

is finite. It is told per grey level: bits a dimension are -log_prob / (dims * log 2). With uniform u this is the
exact density of x~; with u from a second flow (Ho et al. 2019, "Flow++", equation 6) a lower bound of log P(x).
"""

from math import prod
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from medgen.data.dataset import Batch
from medgen.errors import CapabilityError, DataError
from medgen.models.abilities import Ability
from medgen.models.base import ConditionedConfig, Loss, Model, ModelConfig, conditional
from medgen.nets.blocks import from_blocks, spread, squeezed, squeezes
from medgen.nets.conditioner import Conditioner, Guide
from medgen.nets.told import require_context
from medgen.prob.bijections import Chain, Coupling, CouplingName, Mix, MixingName
from medgen.prob.dequantisation import dequantised, grey, level_densities, log_normal, nats_a_level, quantised
from medgen.prob.point import Point
from medgen.seeds import derived_seed, seeded_noise, voxel_uniform

# Scans sampled together.
_MICRO_BATCH = {2: 16, 3: 1}
_BINS = 8
# Voxels that tell ActNorm where to start: enough, and no more memory than training takes.
_VOXELS = 2**20
# Channels of the feature map that couplings are told besides the scan.
_GUIDE = 16


class Flow(Model):
    """A coupling flow; every variation is a field of its config.

    Example:
        >>> model = Flow(Flow.Config(shape=(16, 16), width=8, steps=2, levels=2))
        >>> model.sample(3, seed=0).shape
        torch.Size([3, 1, 16, 16])
    """

    class Config(ConditionedConfig):
        """A flow.

        Args:
            kind: 'flow'.
            coupling: 'additive' (NICE), 'affine' (Real NVP, Glow) or 'spline' (neural spline flows).
            mixing: of channels between couplings: 'conv' (learned, Glow) or 'permutation' (fixed).
            steps: couplings a level.
            levels: squeezes; each halves every axis that is sampled about as finely as the finest. With 0
                channels are mixed where they are, which suits maps of many channels.
            width: features inside a coupling.
            kernels: widths of a coupling's three convolutions.
            spacing: mm along each modelled axis, where it differs; coarse axes are squeezed later.
            position: learn a feature vector for each place, at most so many along an axis, interpolated
                between; for scans that lie alike. 0 for none.
            bits: grey values are whole numbers of so many bits; 0 for continuous data.
            dequantisation: noise between grey values: 'uniform', or 'variational' (learned; a bound).
            memory: 'store' activations, or 'recompute' them in the backward pass.
            temperature: standard deviation of the noise that samples are made of.
        """

        kind: Literal["flow"] = "flow"
        coupling: CouplingName = "affine"
        mixing: MixingName = "conv"
        steps: int = Field(default=8, ge=1, le=256)
        levels: int = Field(default=2, ge=0, le=16)
        width: int = Field(default=64, ge=1)
        kernels: tuple[int, int, int] = (3, 1, 3)
        spacing: tuple[float, ...] = ()
        position: int = Field(default=0, ge=0, le=256)
        bits: int = Field(default=8, ge=0, le=16)
        dequantisation: Literal["uniform", "variational"] = "uniform"
        memory: Literal["store", "recompute"] = "store"
        temperature: float = Field(default=1.0, gt=0)

        @property
        def blocks(self) -> tuple[tuple[int, ...], ...]:
            """Factors along each axis, level by level."""
            if self.levels == 0:
                return ((1,) * self.dims,)
            alone = tuple(n == 1 for n in self.shape)
            return squeezes(self.spacing or (1.0,) * self.dims, self.levels, alone)

        @model_validator(mode="after")
        def _fits(self) -> "Flow.Config":
            if self.spacing and (len(self.spacing) != self.dims or min(self.spacing) <= 0):
                raise ValueError(f"spacing needs {self.dims} positive numbers, not {self.spacing}")
            if any(kernel < 1 or kernel % 2 == 0 for kernel in self.kernels):
                raise ValueError(f"kernels must be odd, not {self.kernels}")
            whole = [prod(factors) for factors in zip(*self.blocks, strict=True)]
            if any(n % factor for n, factor in zip(self.shape, whole, strict=True)):
                raise ValueError(f"shape {self.shape} must be divisible by {tuple(whole)}")
            channels = self.channels
            for factors in self.blocks:
                channels *= prod(factors)
                if channels < 2:
                    raise ValueError(f"shape {self.shape} leaves a coupling one channel; nothing can be kept and moved")
                channels -= channels // 2
            if self.dequantisation == "variational" and not self.bits:
                raise ValueError("variational dequantisation needs bits: continuous data has no grey levels")
            return self

    config: "Flow.Config"

    def __init__(self, config: "Flow.Config") -> None:
        super().__init__()
        self.config = config
        chains, guides = [], []
        channels, block = config.channels, (1,) * config.dims
        for level, factors in enumerate(config.blocks):
            channels *= prod(factors)
            block = tuple(a * b for a, b in zip(block, factors, strict=True))
            last = level == len(config.blocks) - 1
            guide = _guide(config, block)
            guides.append(guide)
            chains.append(_chain(config, channels, given=guide is not None, last=last))
            channels -= 0 if last else channels // 2
        self.chains = cast("list[Chain]", nn.ModuleList(chains))
        self.guides = cast("list[Guide | None]", nn.ModuleList(guides))
        self.noise = _Noise(config) if config.dequantisation == "variational" else None

    @classmethod
    def stride(cls, values: dict[str, Any]) -> int | tuple[int, ...]:
        """Two to the number of levels; fewer along axes that `spacing` says are coarse."""
        levels = int(values.get("levels", cls.Config.model_fields["levels"].default))
        spacing = values.get("spacing")
        if not spacing or not levels:
            return 2**levels
        return tuple(prod(f) for f in zip(*squeezes(tuple(spacing), levels, (False,) * len(spacing)), strict=True))

    @classmethod
    def abilities(cls, config: ModelConfig) -> frozenset[Ability]:
        """A flow samples, encodes, decodes and scores density, exactly unless its dequantisation is learned."""
        assert isinstance(config, Flow.Config)
        density: Ability = "scores_density" if config.dequantisation == "uniform" else "bounds_density"
        return conditional(config, {"samples", "encodes", "decodes", "maps_density", density})

    @property
    def mixed_precision_pays(self) -> bool:
        """Networks inside couplings are most of the work; the bijections themselves stay in full precision."""
        return True

    # -- the bijection -------------------------------------------------------------------------------

    def to_noise(
        self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None, context: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Noise of every level, finest first, and each level's ladj map (b, 1, *positions).

        Raises:
            DataError: the scans, or the images given with them, are not of the config's size.
        """
        expected, found = (self.config.channels, *self.config.shape), tuple(x.shape[1:])
        if found != expected:
            raise DataError(f"This flow takes scans {expected}, channels first; found {found}. Crop or pad them.")
        noises, ladjs = [], []
        for factors, chain, given in zip(self.config.blocks, self.chains, self._told(cond, context), strict=True):
            x, ladj = chain(squeezed(x, factors), given)
            kept = x.shape[1] - (0 if chain is self.chains[-1] else x.shape[1] // 2)
            x, noise = x[:, :kept], x[:, kept:]
            noises.append(noise)
            ladjs.append(ladj)
        noises[-1] = x
        return noises, ladjs

    def from_noise(
        self, noises: list[Tensor], cond: Tensor | None = None, context: Tensor | None = None
    ) -> Float[Tensor, "b c *space"]:
        """The exact inverse of `to_noise`."""
        x = noises[-1]
        levels = zip(self.config.blocks, self.chains, self._told(cond, context), noises, strict=True)
        for factors, chain, given, noise in reversed(list(levels)):
            x = x if noise is noises[-1] else torch.cat([x, noise], 1)
            x = from_blocks(chain.inverse(x, given).movedim(1, -1), factors)
        return x

    def _told(self, cond: Tensor | None, context: Tensor | None) -> list[Tensor | None]:
        """What couplings of every level are told."""
        require_context(context, self.config.context, self.config.shape)
        told, block = [], (1,) * self.config.dims
        for factors, guide in zip(self.config.blocks, self.guides, strict=True):
            block = tuple(a * b for a, b in zip(block, factors, strict=True))
            if not isinstance(guide, Guide):
                told.append(None)
                continue
            seen = None if context is None else squeezed(context, block)
            told.append(guide(cond, seen, guide.place((0,) * len(block), guide.extent, guide.extent)))
        return told

    # -- training ------------------------------------------------------------------------------------

    def initialise(self, batch: Batch) -> None:
        """ActNorm from what reaches it."""
        batch = batch.first(max(2, _VOXELS // prod(self.config.shape)))
        with torch.no_grad():
            u = torch.rand(batch.x.shape, generator=torch.Generator().manual_seed(0)).to(batch.x)
            x = dequantised(batch.x, u, self.config.bits)
            told = self._told(batch.cond, batch.context)
            for factors, chain, given in zip(self.config.blocks, self.chains, told, strict=True):
                x = chain.initialise(squeezed(x, factors), given)
                x = x[:, : x.shape[1] - x.shape[1] // 2]

    def forward(self, batch: Batch, player: str = "model") -> Loss:
        """The negative log density, nats a scan."""
        if self.noise is None:
            u, ladj = torch.rand_like(batch.x) if self.config.bits else batch.x, None
        else:
            u, ladj = self.noise(grey(batch.x, self.config.bits), torch.randn_like(batch.x))
        terms = {f"level {n}": -part.flatten(1).sum(1) for n, part in enumerate(self._parts(batch, u))}
        terms["grey levels"] = torch.full_like(terms["level 0"], nats_a_level(self.config.bits) * batch.x[0].numel())
        if ladj is not None:
            terms["dequantisation"] = ladj.flatten(1).sum(1)
        return Loss(torch.stack(list(terms.values())).sum(0), terms)

    def _parts(self, batch: Batch, u: Tensor) -> list[Float[Tensor, "b 1 *positions"]]:
        """The log density of the dequantised scan, level by level and position by position."""
        noises, ladjs = self.to_noise(dequantised(batch.x, u, self.config.bits), batch.cond, batch.context)
        return [log_normal(noise) + ladj for noise, ladj in zip(noises, ladjs, strict=True)]

    # -- abilities -----------------------------------------------------------------------------------

    def log_prob(
        self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None, context: Tensor | None = None
    ) -> Float[Tensor, " b"]:
        """The exact log density of the dequantised scan per grey level, nats; the noise is always the same.

        Raises:
            CapabilityError: the dequantisation is learned, so that there is a bound (`elbo`) only.
        """
        if self.noise is not None:
            raise CapabilityError("With variational dequantisation a flow bounds its density: ask for elbo(x).")
        return self.log_prob_map(x, cond, context).flatten(1).sum(1)

    def elbo(
        self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None, context: Tensor | None = None
    ) -> Float[Tensor, " b"]:
        """A lower bound of log P(x) over grey values, nats, by one draw of the noise, which is always the same.

        Raises:
            CapabilityError: the dequantisation is uniform, so that there is an exact density (`log_prob`).
        """
        if self.noise is None:
            raise CapabilityError("With uniform dequantisation a flow's density is exact: ask for log_prob(x).")
        return self.log_prob_map(x, cond, context).flatten(1).sum(1)

    @torch.no_grad()
    def log_prob_map(
        self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None, context: Tensor | None = None
    ) -> Float[Tensor, "b 1 *space"]:
        """Each voxel's part of the log density, nats; what belongs to a block of voxels is shared by them."""
        space = tuple(x.shape[2:])
        found = x.new_full((len(x), 1, *space), -nats_a_level(self.config.bits) * x.shape[1])
        u, extra = self._between(x)
        if extra is not None:
            found = found - spread(extra, space)
        for part in self._parts(Batch(x, cond, context), u):
            found = found + spread(part, space)
        return found

    def density_parts(
        self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None, context: Tensor | None = None
    ) -> dict[str, Float[Tensor, " b"]]:
        """What the log density, or its bound, is the sum of, nats: of each level its noise and its volume."""
        u, extra = self._between(x)
        noises, ladjs = self.to_noise(dequantised(x, u, self.config.bits), cond, context)
        found = level_densities(noises, ladjs, [nats_a_level(self.config.bits) * z.shape[1] for z in noises])
        return found if extra is None else found | {"dequantisation": -extra.flatten(1).sum(1)}

    def noise_maps(
        self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None, context: Tensor | None = None
    ) -> list[Float[Tensor, "b _ *_"]]:
        """The noise of every level on its own positions, finest first: white, of scans like the training scans."""
        return self.to_noise(dequantised(x, self._between(x)[0], self.config.bits), cond, context)[0]

    def _between(self, x: Float[Tensor, "b c *space"]) -> tuple[Tensor, Tensor | None]:
        """Noise between grey values, always the same; and log q(u | x) by position where it is learned."""
        u = voxel_uniform(tuple(x.shape[2:]), seed=0, channels=x.shape[1]).to(x)[None].expand_as(x)
        if self.noise is None:
            return u, None
        return self.noise(grey(x, self.config.bits), torch.special.ndtri(u.double()).to(x))

    def encode(
        self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None, context: Tensor | None = None
    ) -> Point:
        """The scan's noise (b, dims), which is certain once the dequantisation is."""
        u = torch.full_like(x, 0.5)
        noises, _ = self.to_noise(dequantised(x, u, self.config.bits), cond, context)
        return Point(torch.cat([noise.flatten(1) for noise in noises], 1))

    def decode(self, z: Float[Tensor, "b dims"], cond: Tensor | None = None, context: Tensor | None = None) -> Point:
        """The scan behind noise."""
        sizes, noises = self._noise_shapes(), []
        for shape, part in zip(sizes, z.split([prod(shape) for shape in sizes], 1), strict=True):
            noises.append(part.reshape(-1, *shape))
        return Point(quantised(self.from_noise(noises, cond, context), self.config.bits))

    def _noise_shapes(self) -> list[tuple[int, ...]]:
        """(channels, *positions) of every level's noise."""
        shapes, channels, space = [], self.config.channels, self.config.shape
        for factors in self.config.blocks:
            channels *= prod(factors)
            space = tuple(n // factor for n, factor in zip(space, factors, strict=True))
            shapes.append((channels // 2, *space))
            channels -= channels // 2
        return [*shapes[:-1], (shapes[-1][0] + channels, *shapes[-1][1:])]

    @torch.no_grad()
    def sample(
        self, n: int, *, seed: int, cond: Tensor | None = None, context: Tensor | None = None
    ) -> Float[Tensor, "n c *space"]:
        """`n` scans: noise of the config's temperature through the inverse."""
        size, voxels = _MICRO_BATCH[self.config.dims], self.config.channels * prod(self.config.shape)

        def draw(first: int, *told: Tensor | None) -> Tensor:
            noise = seeded_noise((size, voxels), seed=derived_seed(seed, 1), first=first).to(self.device)
            return self.decode(self.config.temperature * noise, *told).mean

        return self.in_micro_batches(n, size, draw, cond, context)


class _Noise(nn.Module):
    """u in (0, 1) for every voxel, from noise and the grey values about it: sigmoid of four couplings."""

    def __init__(self, config: Flow.Config) -> None:
        super().__init__()
        self.block, self.bits = config.blocks[0], config.bits
        channels = config.channels * prod(self.block)
        extent = [n // size for n, size in zip(config.shape, self.block, strict=True)]
        self.guide = Guide(config.dims, _GUIDE, seen=channels, extent=extent)
        steps = [
            step
            for _ in range(4)
            for step in (Mix(channels, "conv"), _coupling(config, channels, "affine", given=True))
        ]
        self.chain = Chain(steps)

    def forward(self, levels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """u, and log q(u | x) as a map (b, 1, *positions)."""
        z = squeezed(noise, self.block)
        y, ladj = self.chain(z, self.guide(None, squeezed(levels / 2**self.bits, self.block), None))
        inside = nn.functional.logsigmoid(y) + nn.functional.logsigmoid(-y)
        u = from_blocks(torch.sigmoid(y).movedim(1, -1), self.block)
        return u.clamp(1e-6, 1 - 1e-6), log_normal(z) - ladj - inside.sum(1, keepdim=True)


# -- parts -----------------------------------------------------------------------------------------


def _guide(config: Flow.Config, block: tuple[int, ...]) -> Guide | None:
    if not (config.condition_width or config.context or config.position):
        return None
    extent = [n // size for n, size in zip(config.shape, block, strict=True)]
    seen = config.context * prod(block)
    return Guide(config.dims, _GUIDE, numbers=config.condition_width, seen=seen, extent=extent, places=config.position)


def _coupling(
    config: Flow.Config, channels: int, kind: CouplingName, *, given: bool, keep: int | None = None
) -> Coupling:
    keep = channels // 2 if keep is None else keep
    outside = (channels - keep) * Coupling.parameters_of(kind, _BINS)
    told = _GUIDE if given else 0
    network = Conditioner(config.dims, keep, outside, config.width, given=told, kernels=config.kernels)
    return Coupling(network, keep, kind, _BINS)


def _chain(config: Flow.Config, channels: int, *, given: bool, last: bool) -> Chain:
    """A level: its steps, then what is given away standardised by what is kept (or, last, by what is told)."""
    steps: list[Mix | Coupling] = []
    for _ in range(config.steps):
        steps += [Mix(channels, config.mixing), _coupling(config, channels, config.coupling, given=given)]
    steps.append(Mix(channels, config.mixing))
    if not last:
        steps.append(_coupling(config, channels, "affine", given=given, keep=channels - channels // 2))
    elif given:
        steps.append(_coupling(config, channels, "affine", given=True, keep=0))
    return Chain(steps, recompute=config.memory == "recompute")


__all__ = ["Flow"]
