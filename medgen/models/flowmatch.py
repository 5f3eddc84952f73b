"""Flow matching on straight paths, in two and three dimensions: scans from noise by an ordinary differential equation.

Lipman et al. 2023 ("Flow matching for generative modeling"), Liu et al. 2023 ("Flow straight and fast", rectified
flow). A network learns the mean velocity of the paths that lead from noise e to scans y:

    y_t = (1 - t) e + t y        loss = 1/2 |v(y_t, t) - (y - e)|^2        dy/dt = v(y, t)

y is a scan x standardised voxel by voxel. The velocity is that of a Gaussian field with the scans' mean and
spectrum, which is known in closed form (`medgen.prob.gaussian`), plus a network that starts at zero. Samples are
therefore sane before training, and since the equation is solved in coordinates in which the Gaussian part stands
still, only what the network adds costs steps and, in the density, needs estimating:

    log p(x) = log N(w_0; 0, 1) - integral_0^1 div(network) dt + log |dw_1/dx|

(the instantaneous change of variables, Chen et al. 2018, with Hutchinson's estimate of the divergence, Grathwohl
et al. 2019). With a condition the network also learns to do without it, and samples may follow it more than the
scans did (classifier-free guidance, Ho & Salimans 2022).
"""

from collections.abc import Callable, Iterator
from math import ceil, pi, prod
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from medgen.data.dataset import Batch
from medgen.errors import ConfigError, DataError
from medgen.models.abilities import Ability
from medgen.models.base import ConditionedConfig, Loss, Model, ModelConfig
from medgen.nets.told import Told, condition_table, context_image, require_context
from medgen.nets.unet import UNet
from medgen.prob.dequantisation import dequantised, nats_a_level, quantised
from medgen.prob.gaussian import GaussianPath
from medgen.prob.ode import EULER, HEUN, State, integrate, integrate_adaptively, lattice_probes, traces
from medgen.prob.transport import optimal_assignment
from medgen.seeds import derived_seed, seeded_noise, voxel_uniform

# Scans and voxels, at most, that are sampled or scored together.
_SCANS, _VOXELS = {2: 16, 3: 4}, 2**17


class FlowFields(BaseModel):
    """What there is to choose about flow matching, whatever it is that flows.

    Args:
        width: features at the finest level.
        levels: halvings, after folding.
        fold: block size turned into channels first; 2 makes volumes eight times cheaper.
        depth: residual blocks a level.
        attention: whether positions of the coarsest level look at one another.
        loss: 'nats', a bound of the negative log density; or 'velocity', half the squared error, which minds fine
            grain less.
        times: at which training looks: 'emergence', where the scans' frequencies come out of the noise; 'uniform';
            or 'logit-normal' (Esser et al. 2024), more of them in the middle.
        coupling: of noise to scans: 'independent', or 'optimal' in each batch among scans of equal condition
            (Tong et al. 2024, "Minibatch optimal transport"), for straighter paths; only with loss 'velocity', as
            the bound is one for independent noise.
        drop: how often training leaves the condition and the given image out, so that both ways are learned.
        method: 'heun' or 'euler' with fixed steps, or 'adaptive' (Dormand-Prince).
        steps: of the fixed methods, from noise to scan.
        tolerance: of the adaptive method, which densities always take.
        guidance: weight of the condition in samples: 0 leaves it out, 1 follows the scans, more exaggerates.
        probes: of the divergence in a density, on each lattice; 0 for the exact one, at one gradient a voxel.
        lattice: voxels between neighbours under one probe; there are lattice**dims times as many probes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: int = Field(default=32, ge=1)
    levels: int = Field(default=2, ge=0, le=16)
    fold: int = Field(default=1, ge=1)
    depth: int = Field(default=2, ge=1, le=64)
    attention: bool = True
    loss: Literal["nats", "velocity"] = "nats"
    times: Literal["emergence", "uniform", "logit-normal"] = "emergence"
    coupling: Literal["independent", "optimal"] = "independent"
    drop: float = Field(default=0.1, ge=0, lt=1)
    method: Literal["heun", "euler", "adaptive"] = "heun"
    steps: int = Field(default=16, ge=1)
    tolerance: float = Field(default=1e-2, gt=0, lt=1)
    guidance: float = Field(default=1.0, ge=0)
    probes: int = Field(default=2, ge=0)
    lattice: int = Field(default=1, ge=1, le=8)

    @model_validator(mode="after")
    def _means_something(self) -> "FlowFields":
        if self.coupling == "optimal" and self.loss == "nats":
            raise ValueError("with coupling 'optimal' the loss 'nats' bounds nothing; set loss: velocity")
        if self.probes == 1:
            raise ValueError(
                "one probe does not tell its standard error; take 2 or more, or 0 for the exact divergence"
            )
        return self


class FlowMatch(Model):
    """A flow-matching model; every variation is a field of its config.

    Example:
        >>> model = FlowMatch(FlowMatch.Config(shape=(16, 16), width=8, levels=1))
        >>> model.sample(3, seed=0).shape
        torch.Size([3, 1, 16, 16])
    """

    class Config(ConditionedConfig, FlowFields):
        """A flow-matching model.

        Args:
            kind: 'flowmatch'.
            bits: grey values are whole numbers of so many bits; 0 for continuous data.
        """

        kind: Literal["flowmatch"] = "flowmatch"
        bits: int = Field(default=8, ge=0, le=16)

        @property
        def stride(self) -> int:
            """What every axis of `shape` is a multiple of."""
            return self.fold * 2**self.levels

        @property
        def micro_batch(self) -> int:
            """Scans sampled together: always this many, so that sample i never depends on n."""
            return max(1, min(_SCANS[self.dims], _VOXELS // prod(self.shape)))

        @model_validator(mode="after")
        def _divisible(self) -> "FlowMatch.Config":
            if any(n % self.stride for n in self.shape):
                raise ValueError(f"shape {self.shape} must be divisible by fold * 2**levels = {self.stride}")
            return self

    config: "FlowMatch.Config"

    def __init__(self, config: "FlowMatch.Config") -> None:
        super().__init__()
        self.config = config
        channels, given = config.channels, config.context + (config.context > 0)
        # One number more than the condition has, which says that there is one.
        conditions = config.condition_width + 1 if config.condition_width else 0
        self.path = GaussianPath(channels, config.shape, conditions)
        self.net = UNet(
            config.dims,
            (3 * channels + given, channels),
            config.width,
            config.levels,
            fold=config.fold,
            depth=config.depth,
            conditions=conditions,
            attention=config.attention,
        )

    @classmethod
    def abilities(cls, config: ModelConfig) -> frozenset[Ability]:
        """Flow matching samples, restores and estimates its density."""
        return frozenset({"samples", "restores", "estimates_density"})

    # -- training ------------------------------------------------------------------------------------

    def initialise(self, batch: Batch) -> None:
        """The Gaussian field of the scans, in closed form."""
        u = torch.rand(batch.x.shape, generator=torch.Generator().manual_seed(0)).to(batch.x)
        x = dequantised(batch.x, u, self.config.bits)
        self.path.fit(x, self._told(len(x), batch.cond).table)

    def forward(self, batch: Batch, player: str = "model") -> Loss:
        """A bound of the negative log density, nats a scan; or half the velocity's squared error.

        With loss 'nats': -log p of the Gaussian, and what the network changes of it,

            -log p(x) <= -log p_G(x) + E[ t / (1 - t) (|v - (y - e)|^2 - |v_G - (y - e)|^2) ]

        over noise and uniform times, an equality for the best v (Kingma et al. 2021, "Variational diffusion models";
        Kong et al. 2023, "Information-theoretic diffusion", for the difference from a Gaussian). Other times enter
        with the inverse of their density as weight.
        """
        config, count = self.config, len(batch.x)
        y = self.path.standardised(dequantised(batch.x, torch.rand_like(batch.x), config.bits))
        noise, told = torch.randn_like(y), self._told(count, batch.cond, batch.context)
        if config.coupling == "optimal" and told.image is None:
            noise = noise[optimal_assignment(noise, y, told.table)]
        if self.training:
            told = told.where(torch.rand(count, device=y.device) >= config.drop)
        time, density = self._times(count)
        t = _over(time, y)
        linear, learned = self._velocities((1 - t) * noise + t * y, time, told)
        missed = (y - noise) - linear
        error = (missed - learned).square().flatten(1).sum(1)
        if config.loss == "velocity":
            return Loss(0.5 * error, {"velocity": 0.5 * error})
        weight = time / ((1 - time) * density).clamp(min=1e-12)
        gained = weight * (error - missed.square().flatten(1).sum(1))
        w = self.path.whiten(y, torch.ones_like(time), self.path.mean_for(told.table))
        gaussian = nats_a_level(config.bits) * y[0].numel() - self.path.log_prob(w)
        return Loss(gaussian + gained, {"gaussian": gaussian, "network": gained})

    def _times(self, count: int) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """A time from each of `count` equal parts of the chances, and the density of times there."""
        chances = ((torch.rand(1) + torch.arange(count) / count) % 1).to(self.device)
        if self.config.times == "uniform":
            return chances, torch.ones_like(chances)
        if self.config.times == "emergence":
            times = self.path.emerging(chances)
            return times, self.path.emergence(times)
        logits = torch.special.ndtri(chances.clamp(1e-6, 1 - 1e-6))
        times = torch.sigmoid(logits)
        return times, torch.exp(-0.5 * logits.square()) / (2 * pi) ** 0.5 / (times * (1 - times))

    # -- the velocity --------------------------------------------------------------------------------

    def _velocities(self, y: Tensor, time: Tensor, told: Told) -> tuple[Tensor, Tensor]:
        """The Gaussian's velocity, and what the network adds to it.

        The network sees the scan at unit variance, the scan that the Gaussian expects behind it, and the noise that
        would be behind it if scans were Gaussian.
        """
        path, mean, t = self.path, self.path.mean_for(told.table), _over(time, y)
        linear = path.velocity(y, time, mean)
        seen = [y / (t.square() + (1 - t).square()).sqrt(), y + (1 - t) * linear, path.whitened(y, time, mean)]
        if told.image is not None:
            seen.append(told.image)
        return linear, path.scaled(self.net(torch.cat(seen, dim=1), time, told.table).float(), time)

    def _guided(self, told: Told, guidance: float) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
        """The Gaussian's mean, and what the network adds, where the condition counts `guidance` times.

        v = v_without + guidance * (v_with - v_without) (Ho & Salimans 2022; `guidance` is their weight plus 1).
        """
        if guidance == 1 or (told.table is None and told.image is None):
            return self.path.mean_for(told.table), lambda y, time: self._velocities(y, time, told)[1]
        without = told.where(torch.zeros(told.count, dtype=torch.bool, device=self.device))
        if guidance == 0:
            return self._guided(without, 1.0)
        mean, added = self._guided(told, 1.0)
        mean_without, added_without = self._guided(without, 1.0)

        def mixed(y: Tensor, time: Tensor) -> Tensor:
            return torch.lerp(added_without(y, time), added(y, time), guidance)

        return torch.lerp(mean_without.expand_as(mean), mean, guidance), mixed

    def _follow(self, y: Tensor, since: float, told: Told) -> Tensor:
        """Scans at time 1, from standardised ones at time `since`."""
        config, path = self.config, self.path
        mean, added = self._guided(told, config.guidance)

        def rate(state: State, time: Tensor) -> State:
            return (path.carried(added(path.colour(state[0], time, mean), time), time),)

        state = (path.whiten(y, y.new_full((len(y),), since), mean),)
        if config.method == "adaptive":
            state = integrate_adaptively(rate, state, since, 1.0, tolerance=config.tolerance)
        else:
            times = torch.linspace(since, 1.0, max(1, ceil(config.steps * (1 - since))) + 1, device=y.device)
            state = integrate(rate, state, times, HEUN if config.method == "heun" else EULER)
        return quantised(path.scan(path.colour(state[0], y.new_ones(len(y)), mean)), config.bits)

    # -- abilities -----------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self, n: int, *, seed: int, cond: Tensor | None = None, context: Tensor | None = None
    ) -> Float[Tensor, "n c *space"]:
        """`n` scans; without `cond` and `context` like any of the training scans."""
        size = self.config.micro_batch
        shape = (size, self.config.channels, *self.config.shape)

        def draw(first: int, *told: Tensor | None) -> Tensor:
            noise = seeded_noise(shape, seed=derived_seed(seed, 1), first=first).to(self.device)
            return self._follow(noise, 0.0, self._told(size, *told))

        return self.in_micro_batches(n, size, draw, cond, context)

    @torch.no_grad()
    def restore(
        self, x: Float[Tensor, "b c *space"], *, strength: float = 0.5, seed: int = 0, cond: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Float[Tensor, "b c *space"]:  # fmt: skip
        """The scan after noise replaced `strength` of it and the model removed the noise again.

        What training scans do not have is unlikely to come back (Meng et al. 2022, "SDEdit"; Wyatt et al. 2022,
        "AnoDDPM"). 0 changes nothing, 1 gives a new scan. The noise is the same for every scan.

        Raises:
            ConfigError: `strength` is not between 0 and 1.
            DataError: a voxel is not finite, or the scans or given images are not of the config's size.
        """
        if not 0 <= strength <= 1:
            raise ConfigError(f"restore: strength lies between 0 (unchanged) and 1 (a new scan), not {strength}.")
        self._check(x)
        if strength == 0:
            return x.clone()
        noise = seeded_noise((1, *x.shape[1:]), seed=derived_seed(seed, 3)).to(x.device)
        y = self.path.standardised(dequantised(x, torch.full_like(x, 0.5), self.config.bits))
        mixed = strength * noise + (1 - strength) * y
        return torch.cat([self._follow(y, 1 - strength, told) for y, told in self._parts(mixed, cond, context)])

    @torch.no_grad()
    def log_prob_estimate(
        self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None, context: Tensor | None = None, *,
        seed: int = 0,
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:  # fmt: skip
        """log p(x) and the standard error that the probes leave, nats; with `bits` per grey level.

        Guidance plays no part. Dequantising noise and probes follow from the seed and are the same for every scan.

        Raises:
            ConfigError: the velocity cannot be followed to the config's tolerance.
            DataError: a voxel is not finite, or the scans or given images are not of the config's size.
        """
        self._check(x)
        u = voxel_uniform(tuple(x.shape[2:]), seed=seed, channels=x.shape[1]).to(x)
        probes = self._probes(derived_seed(seed, 2)).to(x)
        y = self.path.standardised(dequantised(x, u, self.config.bits))
        found = [self._log_densities(part, told, probes) for part, told in self._parts(y, cond, context)]
        base, changes = (torch.cat(parts) for parts in zip(*found, strict=True))
        log_p = base - nats_a_level(self.config.bits) * x[0].numel() + changes.mean(1).sum(1)
        repeats = changes.shape[1]
        error = (changes.var(1).sum(1) / repeats).sqrt() if self.config.probes else torch.zeros_like(log_p)
        return log_p, error

    def _log_densities(self, y: Tensor, told: Told, probes: Tensor) -> tuple[Tensor, Tensor]:
        """Of standardised scans: log p(x) were volumes kept, and how much they change, by repeat and lattice."""
        path, mean, (repeats, lattices) = self.path, self.path.mean_for(told.table), probes.shape[:2]

        def rate(state: State, time: Tensor) -> State:
            with torch.enable_grad():
                y_t = path.colour(state[0], time, mean).detach().requires_grad_()
                added = self._velocities(y_t, time, told)[1]
            parts = traces(added, y_t, probes.flatten(0, 1)).reshape(len(y), repeats, lattices)
            return path.carried(added.detach(), time), parts if self.config.probes else parts.sum(2, keepdim=True)

        w = path.whiten(y, y.new_ones(len(y)), mean)
        gathered = y.new_zeros(len(y), repeats, lattices if self.config.probes else 1)
        w, gathered = integrate_adaptively(rate, (w, gathered), 1.0, 0.0, tolerance=self.config.tolerance)
        return path.log_prob(w), gathered

    def _probes(self, seed: int) -> Float[Tensor, "repeats lattices c *space"]:
        config, shape = self.config, (self.config.channels, *self.config.shape)
        if config.probes:
            return lattice_probes(shape, repeats=config.probes, stride=config.lattice, seed=seed)
        return torch.eye(prod(shape)).reshape(1, -1, *shape)

    # -- conditions ------------------------------------------------------------------------

    def _told(self, count: int, cond: Tensor | None = None, context: Tensor | None = None) -> Told:
        config, device = self.config, self.device
        if context is not None:
            require_context(context, config.context, config.shape)
        numbers = condition_table(
            cond, count, classes=len(config.classes), numbers=config.condition_width, device=device
        )
        image = context_image(context, count, channels=config.context, space=config.shape, device=device)
        return Told(count, numbers, image)

    def _parts(self, x: Tensor, cond: Tensor | None, context: Tensor | None) -> Iterator[tuple[Tensor, Told]]:
        """A few scans at a time, and what is told of them."""
        size = self.config.micro_batch
        for first in range(0, len(x), size):
            given = (None if part is None else part[first : first + size] for part in (cond, context))
            yield x[first : first + size], self._told(len(x[first : first + size]), *given)

    def _check(self, x: Tensor) -> None:
        expected, found = (self.config.channels, *self.config.shape), tuple(x.shape[1:])
        if found != expected:
            raise DataError(f"This model takes scans {expected}, channels first; found {found}. Crop or pad them.")
        if not bool(torch.isfinite(x).all()):
            raise DataError(
                "Every voxel must be a finite number; some are NaN or infinite. Mend or leave out the scan."
            )


def _over(rows: Tensor, like: Tensor) -> Tensor:
    return rows.reshape(-1, *[1] * (like.ndim - 1))


__all__ = ["FlowFields", "FlowMatch"]
