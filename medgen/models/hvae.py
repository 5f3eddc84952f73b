"""The hierarchical variational autoencoder, in two and three dimensions: codes on lattices from coarse to fine.

Sønderby et al. 2016 ("Ladder variational autoencoders"), Kingma et al. 2016, Child 2021 ("Very deep VAEs"). Codes are
drawn from the top down, each told what those above it said, both when a scan is made and when it is read:

    log p(x) >= E_q [ log p(x | z) ] - sum over rungs of E_q KL( q(z_l | x, z_>l) || p(z_l | z_>l) )

Every rung speaks of what is left to say: its posterior is stated relative to its prior (Vahdat & Kautz 2020, "NVAE"),
and read off the innovation, the scan minus what the rungs above expect of it. A picture is kept from rung to rung, to
which each adds; at first every rung is probabilistic PCA of the blocks that the rungs above left over.

A code is told in units of its prior, so that all codes are N(0, 1) before a scan is seen.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from medgen.data.dataset import Batch
from medgen.errors import ConfigError
from medgen.models.abilities import Ability
from medgen.models.base import CovariateConfig, Loss, Model, ModelConfig, conditional
from medgen.nets.blocks import channels_last, conv, from_blocks, spread, squeezed
from medgen.nets.ladder import Entrance, Rung
from medgen.prob.divergences import activity, kl_to_standard_normal
from medgen.prob.likelihoods import LikelihoodName, best_log_scale, likelihood
from medgen.prob.priors import principal_components
from medgen.seeds import derived_seed, seeded_noise

# Scans decoded together when sampling.
_MICRO_BATCH = {2: 16, 3: 1}
# Noise that closed forms assume at least, on [0, 1]: half a grey level of 8 bits.
_LEAST_NOISE = (0.5 / 255) ** 2
# Noise begins no smaller than this, where it still learns (log of 1.7 grey levels of 8 bits).
_LEAST_LOG_SCALE = -5.0
# Scans' worth of belief that all places are equally noisy.
_DOUBT = 8
# The most a voxel's log sigma differs from what is usual of its place.
_MOST_SCALE = 4.0


@dataclass(frozen=True)
class _Path:
    """Codes from the top down (in units of their priors), their posteriors where a scan was seen, and p(x | z)."""

    codes: list[Tensor]
    posteriors: list[Independent]
    likelihood: Independent


class HVAE(Model):
    """A hierarchical variational autoencoder.

    Example:
        >>> model = HVAE(HVAE.Config(shape=(16, 16), width=8, latent=2, levels=2))
        >>> model.sample(3, seed=0).shape
        torch.Size([3, 1, 16, 16])
    """

    class Config(CovariateConfig):
        """A hierarchical VAE.

        Args:
            kind: 'hvae'.
            latent: channels of every map of codes.
            whole: length of a code for the whole scan, above all maps; 0 for none. It takes `whole` numbers a voxel,
                so it is for images and small volumes.
            width: features.
            levels: lattices, each half as fine as the one below it.
            steps: rungs on every lattice.
            fold: voxels along an axis a position of the finest lattice stands for.
            depth: residual blocks of a rung, of inference and of generation each.
            position: learn features for each place; for scans that lie alike.
            likelihood: noise of p(x | z), whose scale is learned for each voxel. Discretised, p is of 256 grey values.
            beta: weight of the KL terms; 1 is the evidence lower bound.
            free_bits: nats every lattice may cost without being pushed towards its prior.
            warmup: part of training over which the KL terms' weight rises to `beta`.
            temperature: standard deviation of the codes that samples are made of.
        """

        kind: Literal["hvae"] = "hvae"
        latent: int = Field(default=8, ge=1)
        whole: int = Field(default=0, ge=0)
        width: int = Field(default=64, ge=1)
        levels: int = Field(default=3, ge=1, le=16)
        steps: int = Field(default=1, ge=1, le=64)
        fold: int = Field(default=2, ge=1)
        depth: int = Field(default=1, ge=0, le=64)
        position: bool = True
        likelihood: LikelihoodName = "discretised-logistic"
        beta: float = Field(default=1.0, ge=0)
        free_bits: float = Field(default=0.0, ge=0)
        warmup: float = Field(default=0.0, ge=0, le=1)
        temperature: float = Field(default=1.0, gt=0)

        @property
        def stride(self) -> int:
            """Voxels along an axis per position of the coarsest lattice; every axis of `shape` is a multiple of it."""
            return self.fold * 2 ** (self.levels - 1)

        @property
        def blocks(self) -> tuple[tuple[int, ...], ...]:
            """Voxels along each axis that a position stands for, lattice by lattice from the top down."""
            maps = tuple((self.fold * 2**level,) * self.dims for level in reversed(range(self.levels)))
            return (self.shape, *maps) if self.whole else maps

        @model_validator(mode="after")
        def _divisible(self) -> "HVAE.Config":
            if any(n % self.stride for n in self.shape):
                raise ValueError(f"shape {self.shape} must be divisible by fold * 2**(levels - 1) = {self.stride}")
            return self

    config: "HVAE.Config"

    def __init__(self, config: "HVAE.Config") -> None:
        super().__init__()
        self.config = config
        dims, channels, width = config.dims, config.channels, config.width
        entrances, rungs = [], []
        for number, block in enumerate(config.blocks):
            positions = tuple(n // size for n, size in zip(config.shape, block, strict=True))
            alone = bool(config.whole) and number == 0
            told = {"conditions": config.condition_width, "position": config.position}
            entrances.append(Entrance(dims, width, positions, channels * prod(block), **told))
            for _ in range(1 if alone else config.steps):
                latent = config.whole if alone else config.latent
                rungs.append(Rung(dims, width, latent, block, channels=channels, depth=config.depth))
        self.entrances = cast("list[Entrance]", nn.ModuleList(entrances))
        self.rungs = cast("list[Rung]", nn.ModuleList(rungs))
        self.top = nn.Parameter(torch.zeros(1, width, *[1] * dims))
        self.template = nn.Parameter(torch.zeros(1, channels, *config.shape))
        self.slow_log_scale = nn.Parameter(torch.zeros(channels))
        self.place_log_scale = nn.Parameter(torch.zeros(1, channels, *config.shape))
        self.to_log_scale = conv(dims, width, channels * config.fold**dims, 1)
        for parameter in self.to_log_scale.parameters():
            nn.init.zeros_(parameter)
        channels_last(self, dims)

    @classmethod
    def stride(cls, values: dict[str, Any]) -> int:
        """Fold times two to the number of halvings."""
        fold, levels = (int(values.get(name, cls.Config.model_fields[name].default)) for name in ("fold", "levels"))
        return fold * 2 ** (levels - 1)

    @classmethod
    def abilities(cls, config: ModelConfig) -> frozenset[Ability]:
        """A hierarchical VAE samples, encodes, decodes, reconstructs, restores and bounds its density by voxel."""
        return conditional(
            config,
            {"samples", "encodes", "decodes", "reconstructs", "restores", "bounds_density", "maps_density"},
        )

    @property
    def mixed_precision_pays(self) -> bool:
        """Convolutions are nearly all of the work."""
        return True

    # -- from the top down -------------------------------------------------------------------------------

    def _lattices(self) -> list[int]:
        """Which lattice each rung is on, 0 the finest."""
        return [self.config.blocks[::-1].index(rung.block) for rung in self.rungs]

    def _shapes(self) -> list[tuple[int, ...]]:
        """Of each rung's codes."""
        space = self.config.shape
        return [(r.latent, *(n // size for n, size in zip(space, r.block, strict=True))) for r in self.rungs]

    def _path(
        self,
        draw: Callable[[int, Independent | None], Tensor],
        count: int,
        cond: Tensor | None,
        x: Float[Tensor, "b c *space"] | None = None,
    ) -> _Path:
        """Walk down the ladder; `draw(number, posterior)` says each rung's code, with no posterior without a scan."""
        h = self.top.expand(count, *self.top.shape[1:])
        picture = self.template.expand(count, *self.template.shape[1:])
        codes, posteriors, before = [], [], ()
        entrances = iter(self.entrances)
        for number, rung in enumerate(self.rungs):
            if rung.block != before:
                h, before = next(entrances)(h, squeezed(self._seen(picture), rung.block), cond), rung.block
            mean, scale, shown = rung.expected(h)
            posterior = None if x is None else rung.posterior(h, x - self._seen(picture + shown))
            u = draw(number, posterior)
            codes.append(u)
            if posterior is not None:
                posteriors.append(posterior)
            h, picture = rung(h, mean + scale * u, picture)
        return _Path(codes, posteriors, self._likelihood(h, picture))

    def _seen(self, picture: Tensor) -> Tensor:
        """The picture on the scans' scale, where inference looks at it; never far off the scale."""
        return torch.sigmoid(picture) if self.config.likelihood == "bernoulli" else picture.clamp(-1, 2)

    def _likelihood(self, h: Tensor, picture: Tensor) -> Independent:
        offset = self.to_log_scale(nn.functional.silu(h)).float()
        offset = from_blocks(offset.movedim(1, -1), (self.config.fold,) * self.config.dims)
        usual = 10 * self.slow_log_scale.reshape(1, -1, *[1] * self.config.dims)
        log_scale = usual + _MOST_SCALE * torch.tanh((self.place_log_scale + offset) / _MOST_SCALE)
        return likelihood(self.config.likelihood, picture, log_scale)

    def _rates(self, posteriors: list[Independent]) -> list[Float[Tensor, "b latent *positions"]]:
        return [kl_to_standard_normal(posterior) for posterior in posteriors]

    # -- training ----------------------------------------------------------------------------------------

    def forward(self, batch: Batch, player: str = "model") -> Loss:
        """The negative evidence lower bound, nats a scan; terms: the distortion, and what each lattice costs."""
        config = self.config
        path = self._path(lambda _, q: cast("Independent", q).rsample(), len(batch.x), batch.cond, batch.x)
        terms = {"distortion": -path.likelihood.log_prob(batch.x)}
        for lattice, rate in zip(self._lattices(), self._rates(path.posteriors), strict=True):
            name = f"rate of level {lattice}"
            terms[name] = terms.get(name, 0) + rate.flatten(1).sum(1)
        weight = config.beta
        if self.training and config.warmup:
            weight = weight * min(1.0, self.progress / config.warmup)
        rates = [term.clamp(min=config.free_bits) for name, term in terms.items() if name != "distortion"]
        return Loss(terms["distortion"] + weight * torch.stack(rates).sum(0), terms)

    def initialise(self, batch: Batch) -> None:
        """Start from probabilistic PCA of what each rung is left with, in closed form, and from the best noise."""
        logits = self.config.likelihood == "bernoulli"
        with torch.no_grad():
            mean = batch.x.mean(0, keepdim=True)
            self.template.copy_(torch.logit(mean.clamp(0.01, 0.99)) if logits else mean)
            picture = self.template.expand_as(batch.x)
            for rung in self.rungs:
                left = batch.x - self._seen(picture)
                _start(rung, left, slope=4.0 if logits else 1.0)
                picture = picture + rung.shown(rung.gain(squeezed(left, rung.block).movedim(1, -1)).movedim(-1, 1))
            seen = self._seen(picture)
            best = best_log_scale(self.config.likelihood, batch.x, seen)
            self.slow_log_scale.copy_(best.clamp(min=_LEAST_LOG_SCALE) / 10)
            # Each place's own noise, as sure as there are scans to tell.
            usual = (batch.x - seen).square().mean((0, *range(2, seen.ndim)), keepdim=True).clamp(min=_LEAST_NOISE)
            here = ((batch.x - seen).square().sum(0, keepdim=True) + _DOUBT * usual) / (len(seen) + _DOUBT)
            self.place_log_scale.copy_(0.5 * (here / usual).log())

    @torch.no_grad()
    def health(self, batches: Iterable[Batch]) -> dict[str, float]:
        """How many channels of codes tell scans apart (Burda et al. 2016, section 5.2), in all and on each lattice."""
        codes = [self._split(self.encode(batch.x, batch.cond).mean) for batch in batches]
        found: dict[str, float] = {"active_units": 0, "units": 0}
        for number, lattice in enumerate(self._lattices()):
            active = int((activity(torch.cat([one[number] for one in codes])) > 0.01).sum())
            for name, value in (("active_units", active), ("units", self.rungs[number].latent)):
                found[name] += value
                found[f"level {lattice}: {name}"] = found.get(f"level {lattice}: {name}", 0) + value
        return found

    # -- abilities ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, n: int, *, seed: int, cond: Tensor | None = None) -> Float[Tensor, "n c *space"]:
        """`n` scans: the mean of p(x | z) for codes drawn from the top down."""
        size, total = _MICRO_BATCH[self.config.dims], sum(prod(shape) for shape in self._shapes())

        def draw(first: int, told: Tensor | None) -> Tensor:
            u = self.config.temperature * seeded_noise((size, total), seed=derived_seed(seed, 1), first=first)
            return self.decode(u.to(self.device), told).mean

        return self.in_micro_batches(n, size, draw, cond)

    def encode(self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None) -> Distribution:
        """q over all codes (b, dims) from the top down, in units of their priors, along the path of their means.

        What the lower rungs say depends on what the upper ones drew; here those draw their means, so that
        decode(encode(x).mean) is the reconstruction.
        """
        path = self._path(lambda _, q: cast("Independent", q).mean, len(x), cond, x)
        loc = torch.cat([q.mean.flatten(1) for q in path.posteriors], 1)
        scale = torch.cat([q.stddev.flatten(1) for q in path.posteriors], 1)
        return Independent(Normal(loc, scale, validate_args=False), 1)

    def decode(self, z: Float[Tensor, "b dims"], cond: Tensor | None = None) -> Independent:
        """p(x | z) of codes in units of their priors, which are N(0, 1)."""
        codes = self._split(z)
        return self._path(lambda number, _: codes[number], len(z), cond).likelihood

    def _split(self, z: Float[Tensor, "b dims"]) -> list[Tensor]:
        shapes = self._shapes()
        parts = z.split([prod(shape) for shape in shapes], 1)
        return [part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]

    @torch.no_grad()
    def reconstruct(self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None) -> Float[Tensor, "b c *space"]:
        """The mean of p(x | z) where every code is its posterior's mean."""
        return self._path(lambda _, q: cast("Independent", q).mean, len(x), cond, x).likelihood.mean

    @torch.no_grad()
    def restore(
        self, x: Float[Tensor, "b c *space"], *, strength: float = 1.0, seed: int = 0, cond: Tensor | None = None
    ) -> Float[Tensor, "b c *space"]:
        """The healthy twin: what the topmost lattice says of the scan, with details as they usually are below it.

        Codes below the top are drawn to their priors' means by `strength`, as Havtorn et al. 2021 do to see what
        upper levels know. Nothing is random here, so `seed` has no effect.

        Raises:
            ConfigError: `strength` is not between 0 and 1.
        """
        if not 0 <= strength <= 1:
            raise ConfigError(f"strength lies between 0 and 1, not {strength}.")
        lattices = self._lattices()
        kept = [1.0 if lattice == lattices[0] else 1.0 - strength for lattice in lattices]
        return self._path(lambda n, q: kept[n] * cast("Independent", q).mean, len(x), cond, x).likelihood.mean

    @torch.no_grad()
    def elbo(self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None) -> Float[Tensor, " b"]:
        """A lower bound of log p(x) in nats, by one draw of all codes with the same noise for every scan."""
        return self.log_prob_map(x, cond).flatten(1).sum(1)

    def density_parts(self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None) -> dict[str, Tensor]:
        """What the bound is the sum of, nats: the likelihood log p(x | z), and what the codes of each lattice cost."""
        path = self._noisy(x, cond, [False] * len(self.rungs))
        found = {"likelihood": path.likelihood.log_prob(x)}
        for lattice, rate in zip(self._lattices(), self._rates(path.posteriors), strict=True):
            name = f"rate of level {lattice}"
            found[name] = found.get(name, 0) - rate.flatten(1).sum(1)
        return found

    def rate(self, posterior: Independent, z: Tensor, cond: Tensor | None = None) -> Float[Tensor, " b"]:
        """What codes (b, dims) cost, nats: KL(q || p), whatever code was drawn."""
        return kl_to_standard_normal(posterior).flatten(1).sum(1)

    @torch.no_grad()
    def elbo_from_level(
        self, x: Float[Tensor, "b c *space"], level: int, cond: Tensor | None = None
    ) -> Float[Tensor, " b"]:
        """The bound where lattices below `level` draw their codes from the prior, unseen the scan; 0 is `elbo`.

        elbo(x) - elbo_from_level(x, k) says how much of a scan's likelihood its upper levels do not know of
        (Havtorn et al. 2021, "Hierarchical VAEs know what they don't know", equation 8).

        Raises:
            ConfigError: there is no such lattice.
        """
        lattices = self._lattices()
        if not 0 <= level <= lattices[0]:
            raise ConfigError(f"This model has levels 0 (finest) to {lattices[0]}, not {level}.")
        path = self._noisy(x, cond, [lattice < level for lattice in lattices])
        found = path.likelihood.log_prob(x)
        for lattice, rate in zip(lattices, self._rates(path.posteriors), strict=True):
            found = found - (lattice >= level) * rate.flatten(1).sum(1)
        return found

    @torch.no_grad()
    def log_prob_map(self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None) -> Float[Tensor, "b 1 *space"]:
        """Each voxel's part of the bound, nats: log p(x | z) there, less its share of what codes cost."""
        path = self._noisy(x, cond, [False] * len(self.rungs))
        found = path.likelihood.base_dist.log_prob(x).sum(1, keepdim=True)
        for rate in self._rates(path.posteriors):
            found = found - spread(rate.sum(1, keepdim=True), tuple(x.shape[2:]))
        return found

    def _noisy(self, x: Tensor, cond: Tensor | None, unseen: list[bool]) -> _Path:
        """The path of codes that are drawn with noise that is the same for all scans; some from their prior."""
        shapes = self._shapes()

        def draw(number: int, posterior: Independent | None) -> Tensor:
            noise = seeded_noise((1, *shapes[number]), seed=derived_seed(0, number)).to(x)
            if unseen[number] or posterior is None:
                return noise.expand(len(x), *shapes[number])
            return posterior.mean + posterior.stddev * noise

        return self._path(draw, len(x), cond, x)


def _start(rung: Rung, left: Float[Tensor, "b c *space"], *, slope: float) -> None:
    """Probabilistic PCA of the innovations `left`, block by block (Tipping & Bishop 1999).

    Args:
        rung: whose codes these are to be.
        left: what the rungs above leave to say.
        slope: of the picture's scale over the scans' (4 for logits).
    """
    rows = squeezed(left, rung.block).movedim(1, -1).flatten(0, -2)
    # Few scans span few directions: more would fit their noise, and leave none to be seen.
    pca = principal_components(rows, min(rung.latent, rows.shape[1], max(1, len(rows) // 4)))
    noise = pca.residual.clamp(min=_LEAST_NOISE)
    strength = (pca.variances - noise).clamp(min=0).sqrt()
    total, found = strength.square() + noise, len(strength)
    rung.show.weight[:, :found] = slope * (pca.directions * strength[:, None]).T
    rung.gain.weight[:found] = pca.directions * (strength / total)[:, None]
    cast("Tensor", rung.to_code.bias)[rung.latent : rung.latent + found] = 0.5 * (noise / total).log()


__all__ = ["HVAE"]
