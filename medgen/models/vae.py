"""The variational autoencoder, in two and three dimensions.

Kingma & Welling 2014 ("Auto-encoding variational Bayes"), with the decoder's noise learned (Rybkin
et al. 2021), so that reconstruction and prior are both in nats and need no balancing weight.

    log p(x) >= ELBO(x) = E_q(z|x) [ log p(x | z) ] - KL( q(z | x) || p(z) )

The code z is a vector for the whole scan, or a map with one short vector a block of voxels (`code:
map`), which keeps place and so reconstructs unseen anatomy. Encoder and decoder are each a linear map
plus a network that starts at zero. The linear maps begin as probabilistic PCA of the training scans
(or blocks), the optimal linear VAE (Tipping & Bishop 1999, equations 6 to 9; Lucas et al. 2019, "Don't
blame the ELBO"), so training starts where PCA ends and a code does not collapse.

p(z) is the standard normal, or a flow trained with the rest (`prior`; Chen et al. 2017, "Variational lossy
autoencoder", section 3.2): a neural spline flow on vectors, a coupling flow on maps. Without a flow, scans are
sampled from a Gaussian field fitted to the training codes (`medgen.prob.priors`).
"""

from collections.abc import Iterable
from math import prod
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.distributions import Independent, Normal
from zuko.flows import NSF

from medgen.data.dataset import Batch
from medgen.models.base import Ability, Loss, Model, ModelConfig, conditional
from medgen.models.flow import Flow
from medgen.nets.blocks import Decoder, Encoder, channels_last, from_blocks, to_blocks
from medgen.prob.divergences import kl_to_standard_normal, with_free_bits
from medgen.prob.likelihoods import LikelihoodName, best_log_scale, likelihood
from medgen.prob.point import Point
from medgen.prob.priors import CodeField, principal_components
from medgen.seeds import derived_seed, seeded_noise

# Scans decoded together when sampling; always this many, so that sample i never depends on n.
_MICRO_BATCH = {2: 16, 3: 1}


class FlowPrior(BaseModel):
    """p(z) as a flow.

    Args:
        steps: transforms of a vector (autoregressive splines), couplings of a map.
        width: features inside them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(default=3, ge=1, le=64)
    width: int = Field(default=64, ge=1)


class VAE(Model):
    """A variational autoencoder; every variation is a field of its config.

    Example:
        >>> model = VAE(VAE.Config(shape=(16, 16), width=8, levels=2, latent=4))
        >>> model.sample(3, seed=0).shape
        torch.Size([3, 1, 16, 16])
    """

    class Config(ModelConfig):
        """A VAE.

        Args:
            kind: 'vae'.
            code: 'vector' (few numbers for the whole scan) or 'map' (numbers per coarse position).
            latent: length of the vector, or channels of the map.
            width: features at the finest level.
            levels: halvings between scan and code, after folding.
            fold: block size turned into channels first; 2 makes volumes eight times cheaper.
            depth: residual blocks a level.
            likelihood: noise of p(x | z).
            beta: weight of the KL term; 1 is the evidence lower bound.
            free_bits: nats every latent dimension may cost without being pushed towards the prior.
            prior: a flow over codes; none is the standard normal.
        """

        kind: Literal["vae"] = "vae"
        code: Literal["vector", "map"] = "vector"
        latent: int = Field(default=16, ge=1)
        width: int = Field(default=32, ge=1)
        levels: int = Field(default=2, ge=0, le=16)
        fold: int = Field(default=1, ge=1)
        depth: int = Field(default=1, ge=0, le=64)
        likelihood: LikelihoodName = "gaussian"
        beta: float = Field(default=1.0, ge=0)
        free_bits: float = Field(default=0.0, ge=0)
        prior: FlowPrior | None = None

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
        def _divisible(self) -> "VAE.Config":
            if any(n % self.stride for n in self.shape):
                raise ValueError(f"shape {self.shape} must be divisible by fold * 2**levels = {self.stride}")
            if self.prior and self.free_bits:
                raise ValueError("free_bits are counted a dimension, which a flow prior does not tell apart; set one")
            if self.prior and self.code == "map" and self.latent < 2:
                raise ValueError("a flow prior over a map couples channels; latent must be 2 or more")
            return self

    config: "VAE.Config"

    def __init__(self, config: "VAE.Config") -> None:
        super().__init__()
        self.config = config
        dims, classes = config.dims, len(config.classes)
        sizes = {"fold": config.fold, "depth": config.depth, "classes": classes}
        self.encoder = Encoder(dims, config.channels, config.width, config.levels, **sizes)
        self.decoder = Decoder(dims, config.channels, config.width, config.levels, **sizes)
        # What one code position stands for: a block of voxels, and a block of coarse features.
        positions = config.code_shape[1:]
        self.scan_block = tuple(n // p for n, p in zip(config.shape, positions, strict=True))
        self.feature_block = tuple(n // p for n, p in zip(config.coarse, positions, strict=True))
        voxels = config.channels * prod(self.scan_block)
        features = self.encoder.width * prod(self.feature_block)
        self.linear_in = nn.Linear(voxels, config.latent)
        self.linear_out = nn.Linear(config.latent, voxels)
        self.to_code = nn.Linear(features, 2 * config.latent)
        self.from_code = nn.Linear(config.latent, features)
        self.template = nn.Parameter(torch.zeros(1, config.channels, *config.shape))
        self.slow_log_scale = nn.Parameter(torch.zeros(config.channels))
        self.field = CodeField(config.code_shape, max(1, classes))
        self.prior = _prior(config)
        for parameter in (*self.to_code.parameters(), *self.decoder.head[0].parameters()):
            nn.init.zeros_(parameter)
        channels_last(self, dims)

    @classmethod
    def stride(cls, values: dict[str, Any]) -> int:
        """Fold times two to the number of levels."""
        defaults = {name: field.default for name, field in cls.Config.model_fields.items()}
        filled = defaults | values
        return int(filled["fold"]) * 2 ** int(filled["levels"])

    @classmethod
    def abilities(cls, config: ModelConfig) -> frozenset[Ability]:
        """A VAE samples, encodes, decodes, reconstructs, restores and bounds its density."""
        return conditional(config, {"samples", "encodes", "decodes", "reconstructs", "restores", "bounds_density"})

    @property
    def log_scale(self) -> Float[Tensor, " c"]:
        """Log sigma of p(x | z) a channel; ten times its parameter, as it has further to go than a weight."""
        return 10 * self.slow_log_scale

    # -- distributions -------------------------------------------------------------------------

    def encode(self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None) -> Independent:
        """q(z | x), a factorised Gaussian over codes (b, latent, *positions)."""
        mean = torch.sigmoid(self.template) if self.config.likelihood == "bernoulli" else self.template
        linear = self.linear_in(to_blocks(x - mean, self.scan_block))
        learned = self.to_code(to_blocks(self.encoder(x, cond), self.feature_block))
        shift, log_scale = learned.float().movedim(-1, 1).chunk(2, dim=1)
        loc = linear.float().movedim(-1, 1) + shift
        return Independent(Normal(loc, log_scale.clamp(-7, 3).exp(), validate_args=False), loc.ndim - 1)

    def decode(self, z: Float[Tensor, "b *code"], cond: Tensor | None = None) -> Independent:
        """p(x | z), over scans (b, c, *space)."""
        rows = z.movedim(1, -1)
        linear = from_blocks(self.linear_out(rows), self.scan_block)
        learned = self.decoder(from_blocks(self.from_code(rows), self.feature_block), cond)
        return likelihood(self.config.likelihood, self.template + linear + learned.float(), self.log_scale)

    # -- training ------------------------------------------------------------------------------

    def forward(self, batch: Batch, player: str = "model") -> Loss:
        """The negative evidence lower bound, nats a scan."""
        posterior = self.encode(batch.x, batch.cond)
        z = posterior.rsample()
        distortion = -self.decode(z, batch.cond).log_prob(batch.x)
        rate = self._rate(posterior, z, batch.cond, self.config.free_bits)
        return Loss(distortion + self.config.beta * rate, {"distortion": distortion, "rate": rate})

    def _rate(self, posterior: Independent, z: Tensor, cond: Tensor | None, free_bits: float) -> Float[Tensor, " b"]:
        """What codes cost, nats: KL(q || p), or log q(z) - log p(z) at the drawn code under a flow."""
        if self.prior is None:
            return with_free_bits(kl_to_standard_normal(posterior), free_bits)
        return posterior.log_prob(z) + self.prior(Batch(z, cond)).total

    def initialise(self, batch: Batch) -> None:
        """Start from probabilistic PCA of the scans (of their blocks, for a map), in closed form."""
        with torch.no_grad():
            mean = batch.x.mean(0, keepdim=True)
            rows = to_blocks(batch.x - mean, self.scan_block).flatten(0, -2)
            pca = principal_components(rows, self.config.latent)
            self.template.copy_(mean)
            # Posterior mean and spread of the linear model: M^-1 W^T (x - m) and sigma^2 M^-1.
            strength = (pca.variances - pca.residual).clamp(min=1e-12).sqrt()
            self.linear_out.weight.copy_((pca.directions * strength[:, None]).T)
            self.linear_in.weight.copy_(pca.directions * (strength / pca.variances)[:, None])
            self.linear_in.bias.zero_()
            self.linear_out.bias.zero_()
            self.to_code.bias[self.config.latent :] = 0.5 * (pca.residual / pca.variances).log()
            if self.config.likelihood == "bernoulli":
                self.template.copy_(torch.logit(mean.clamp(0.01, 0.99)))
                self.linear_out.weight.mul_(4.0)  # the slope of the logit at one half
            output = self.decode(self.encode(batch.x, batch.cond).mean, batch.cond).mean
            self.slow_log_scale.copy_(best_log_scale(self.config.likelihood, batch.x, output) / 10)
            if isinstance(self.prior, Flow):
                # As training will see them: the means of codes that tell nothing have no spread to be normalised by.
                posterior = self.encode(batch.x, batch.cond)
                noise = seeded_noise(tuple(posterior.mean.shape), seed=0).to(posterior.mean)
                self.prior.initialise(Batch(posterior.mean + posterior.stddev * noise, batch.cond))

    def finalise(self, batches: Iterable[Batch]) -> None:
        """Fit the Gaussian field that sampling draws codes from."""
        codes, spreads, conds = [], [], []
        with torch.no_grad():
            for batch in batches:
                posterior = self.encode(batch.x, batch.cond)
                codes.append(posterior.mean)
                spreads.append(posterior.variance)
                conds.append(torch.zeros(len(batch.x), dtype=torch.long) if batch.cond is None else batch.cond.cpu())
        self.field.fit(torch.cat(codes), torch.cat(spreads), torch.cat(conds))

    # -- abilities -----------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, n: int, *, seed: int, cond: Tensor | None = None) -> Float[Tensor, "n c *space"]:
        """`n` scans: the mean of p(x | z) for z from the flow prior, or else from the fitted code field."""
        size = _MICRO_BATCH[self.config.dims]
        drawn = []
        for first in range(0, n, size):
            last = torch.arange(first, first + size).clamp(max=n - 1)
            chosen = None if cond is None else cond[last].to(self.log_scale.device)
            codes = self._codes(size, seed, first, chosen)
            drawn.append(self.decode(codes.to(self.log_scale.device), chosen).mean[: n - first])
        return torch.cat(drawn)

    def _codes(self, count: int, seed: int, first: int, cond: Tensor | None) -> Float[Tensor, "count *code"]:
        """Codes first, first + 1, ... of this seed."""
        if self.prior is None:
            return self.field.sample(count, seed=seed, first=first, cond=cond)
        noise = seeded_noise((count, prod(self.config.code_shape)), seed=derived_seed(seed, 1), first=first)
        return self.prior.decode(noise.to(self.log_scale.device), cond).mean.reshape(-1, *self.config.code_shape)

    @torch.no_grad()
    def reconstruct(self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None) -> Float[Tensor, "b c *space"]:
        """The mean of p(x | z) at the mean of q(z | x)."""
        return self.decode(self.encode(x, cond).mean, cond).mean

    @torch.no_grad()
    def restore(
        self, x: Float[Tensor, "b c *space"], *, strength: float = 1.0, seed: int = 0, cond: Tensor | None = None
    ) -> Float[Tensor, "b c *space"]:
        """The healthy twin: the scan decoded from what its code shares with the training scans' codes.

        A code map can describe a lesion it has never seen; its projection onto the principal
        components of the training codes cannot. Nothing is random here, so `seed` has no effect.
        """
        code = self.encode(x, cond).mean
        healthy = self.field.projected(code, cond)
        return self.decode(code + strength * (healthy - code), cond).mean

    @torch.no_grad()
    def elbo(self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None) -> Float[Tensor, " b"]:
        """A lower bound of log p(x) in nats, at the posterior mean's reconstruction noise.

        One sample of z drawn from q, with the same noise for every scan, so that evaluation is repeatable and
        does not depend on a scan's place in the batch.
        """
        posterior = self.encode(x, cond)
        noise = seeded_noise((1, *posterior.mean.shape[1:]), seed=0).to(x.device)
        z = posterior.mean + posterior.stddev * noise
        return self.decode(z, cond).log_prob(x) - self._rate(posterior, z, cond, -torch.inf)


class _VectorFlow(nn.Module):
    """A neural spline flow over code vectors, autoregressive, told the class (Durkan et al. 2019; zuko's)."""

    def __init__(self, config: VAE.Config, prior: FlowPrior) -> None:
        super().__init__()
        self.classes = len(config.classes)
        hidden = (prior.width, prior.width)
        self.flow = NSF(config.latent, context=self.classes, transforms=prior.steps, hidden_features=hidden)

    def _told(self, cond: Tensor | None, z: Tensor) -> Tensor | None:
        if not self.classes:
            return None
        if cond is None:  # of no known class: equally of each
            return z.new_full((len(z), self.classes), 1 / self.classes)
        return nn.functional.one_hot(cond, self.classes).to(z)

    def forward(self, batch: Batch) -> Loss:
        """-log p(z), nats, of codes `batch.x`."""
        rows = batch.x.flatten(1)
        with torch.autocast(rows.device.type, enabled=False):
            return Loss(-self.flow(self._told(batch.cond, rows)).log_prob(rows))

    def decode(self, noise: Float[Tensor, "b latent"], cond: Tensor | None = None) -> Point:
        """Codes behind standard normal noise."""
        return Point(self.flow(self._told(cond, noise)).transform.inv(noise))


def _prior(config: VAE.Config) -> "_VectorFlow | Flow | None":
    if config.prior is None:
        return None
    if config.code == "vector":
        return _VectorFlow(config, config.prior)
    fields = {"shape": config.coarse, "channels": config.latent, "classes": config.classes}
    return Flow(Flow.Config(**fields, bits=0, levels=0, steps=config.prior.steps, width=config.prior.width))


__all__ = ["VAE", "FlowPrior"]
