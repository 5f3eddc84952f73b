"""The variational autoencoder, in two and three dimensions.

Kingma & Welling 2014 ("Auto-encoding variational Bayes"), with the decoder's noise learned (Rybkin
et al. 2021), so that reconstruction and prior are both in nats and need no balancing weight.

    log p(x) >= ELBO(x) = E_q(z|x) [ log p(x | z) ] - KL( q(z | x) || p(z) )

The code z is a vector for the whole scan, or a map with one short vector a block of voxels (`code:
map`), which keeps place and so reconstructs unseen anatomy. Encoder and decoder are each a linear map
plus a network that starts at zero. The linear maps begin as probabilistic PCA of the training scans
(or blocks), the optimal linear VAE (Tipping & Bishop 1999, equations 6 to 9; Lucas et al. 2019, "Don't
blame the ELBO"), so training starts where PCA ends and a code does not collapse.

p(z) is the standard normal, or is trained with the rest (`prior`): a flow (Chen et al. 2017, "Variational lossy
autoencoder", section 3.2), which is a neural spline flow on vectors and a coupling flow on maps; a mixture of
Gaussians; or a VampPrior, the mixture of what the encoder makes of learned pseudo-inputs (Tomczak & Welling 2018).
Under the standard normal, scans are sampled from a Gaussian field fitted to the training codes (`medgen.prob.priors`).

With `mmd` the codes of a batch are besides drawn to the prior as a whole (Zhao et al. 2019, "InfoVAE", equation 6).
"""

from collections.abc import Iterable
from math import prod
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from medgen.data.dataset import Batch
from medgen.models.abilities import Ability
from medgen.models.base import CodedConfig, Loss, Model, ModelConfig, class_indices, conditional
from medgen.models.flow import Flow
from medgen.nets.blocks import Decoder, Encoder, channels_last, from_blocks, to_blocks
from medgen.prob.divergences import activity, kl_to_standard_normal, mmd, with_free_bits
from medgen.prob.learned import CodeMixture, CodeSpline, FlowPrior, PriorConfig, VampPrior, pseudo_inputs
from medgen.prob.likelihoods import LikelihoodName, best_log_scale, likelihood
from medgen.prob.priors import CodeField, principal_components
from medgen.seeds import derived_seed, seeded_noise

# Scans decoded together when sampling.
_MICRO_BATCH = {2: 16, 3: 1}
# Noise begins no smaller than this, where it still learns.
_LEAST_LOG_SCALE = -5.0
# Codes whose discrepancy from the prior is computed at a time.
_MOST_CODES = 512


class VAE(Model):
    """A variational autoencoder; every variation is a field of its config.

    Example:
        >>> model = VAE(VAE.Config(shape=(16, 16), width=8, levels=2, latent=4))
        >>> model.sample(3, seed=0).shape
        torch.Size([3, 1, 16, 16])
    """

    class Config(CodedConfig):
        """A VAE.

        Args:
            kind: 'vae'.
            likelihood: noise of p(x | z).
            beta: weight of the KL term; 1 is the evidence lower bound (Higgins et al. 2017, "beta-VAE").
            free_bits: nats every latent dimension may cost without being pushed towards the prior.
            warmup: part of training over which the KL term's weight rises to `beta` (Bowman et al. 2016).
            mmd: weight of the discrepancy between the codes of a batch and the prior.
            prior: of codes, trained with the rest; none is the standard normal.
        """

        kind: Literal["vae"] = "vae"
        likelihood: LikelihoodName = "gaussian"
        beta: float = Field(default=1.0, ge=0)
        free_bits: float = Field(default=0.0, ge=0)
        warmup: float = Field(default=0.0, ge=0, le=1)
        mmd: float = Field(default=0.0, ge=0)
        prior: PriorConfig | None = None

        @model_validator(mode="after")
        def _fits(self) -> "VAE.Config":
            if self.prior and self.free_bits:
                raise ValueError("free_bits are counted by dimension, which a learned prior does not tell apart")
            if isinstance(self.prior, FlowPrior) and self.code == "map" and self.latent < 2:
                raise ValueError("a flow prior over a map couples channels; latent must be 2 or more")
            return self

    config: "VAE.Config"

    def __init__(self, config: "VAE.Config") -> None:
        super().__init__()
        self.config = config
        dims = config.dims
        sizes = {"fold": config.fold, "depth": config.depth, "classes": config.condition_width}
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
        self.field = CodeField(config.code_shape, max(1, len(config.classes)))
        self.prior = _prior(config)
        vamp = config.prior.components if isinstance(config.prior, VampPrior) else 0
        self.pseudo = nn.Parameter(torch.zeros(vamp, config.channels, *config.shape)) if vamp else None
        for parameter in (*self.to_code.parameters(), *self.decoder.head[0].parameters()):
            nn.init.zeros_(parameter)
        channels_last(self, dims)

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
        shift, log_scale = learned.to(x).movedim(-1, 1).chunk(2, dim=1)
        loc = linear.to(x).movedim(-1, 1) + shift
        return Independent(Normal(loc, log_scale.clamp(-7, 3).exp(), validate_args=False), loc.ndim - 1)

    def decode(self, z: Float[Tensor, "b *code"], cond: Tensor | None = None) -> Independent:
        """p(x | z), over scans (b, c, *space)."""
        rows = z.movedim(1, -1)
        linear = from_blocks(self.linear_out(rows), self.scan_block)
        learned = self.decoder(from_blocks(self.from_code(rows), self.feature_block), cond)
        return likelihood(self.config.likelihood, self.template + linear + learned.to(z), self.log_scale)

    # -- training ------------------------------------------------------------------------------

    def forward(self, batch: Batch, player: str = "model") -> Loss:
        """The negative evidence lower bound, nats a scan; with `mmd`, the batch's discrepancy for each scan, too."""
        config, posterior = self.config, self.encode(batch.x, batch.cond)
        z = posterior.rsample()
        distortion = -self.decode(z, batch.cond).log_prob(batch.x)
        rate = self.rate(posterior, z, batch.cond, config.free_bits)
        rising = min(1.0, self.progress / config.warmup) if self.training and config.warmup else 1.0
        total, terms = distortion + config.beta * rising * rate, {"distortion": distortion, "rate": rate}
        if config.mmd:
            terms["mmd"] = self._discrepancy(z, batch.cond).expand(len(z))
            total = total + config.mmd * terms["mmd"]
        return Loss(total, terms)

    def rate(
        self, posterior: Independent, z: Tensor, cond: Tensor | None = None, free_bits: float = -torch.inf
    ) -> Float[Tensor, " b"]:
        """What codes cost, nats: KL(q || p), or log q(z) - log p(z) at the drawn code under a learned prior."""
        if self.prior is None:
            return with_free_bits(kl_to_standard_normal(posterior), free_bits)
        if isinstance(self.prior, CodeMixture):
            return posterior.log_prob(z) - self.prior.log_prob(z.flatten(1), cond, self._pseudo_posteriors())
        if isinstance(self.prior, CodeSpline):
            return posterior.log_prob(z) - self.prior.log_prob(z.flatten(1), cond)
        return posterior.log_prob(z) + self.prior(Batch(z, cond)).total

    def _pseudo_posteriors(self) -> Independent | None:
        """q(z | u_k) of the pseudo-inputs, of which nothing else is known; None without."""
        return None if self.pseudo is None else self.encode(self.pseudo)

    def _discrepancy(self, z: Float[Tensor, "b *code"], cond: Tensor | None) -> Float[Tensor, ""]:
        """Between the codes of a batch, position by position, and as many of the prior."""
        with torch.no_grad():
            noise = torch.randn_like(z).flatten(1)
            drawn = self._from_noise(torch.rand(len(z), device=z.device), noise, cond).reshape(z.shape)
        rows, others = (one.movedim(1, -1).flatten(0, -2) for one in (z, drawn))
        kept = torch.randperm(len(rows), device=rows.device)[:_MOST_CODES]
        return mmd(rows[kept], others[kept])

    def initialise(self, batch: Batch) -> None:
        """Start from probabilistic PCA of the scans (of their blocks, for a map), in closed form."""
        with torch.no_grad():
            mean = batch.x.mean(0, keepdim=True)
            rows = to_blocks(batch.x - mean, self.scan_block).flatten(0, -2)
            # Few scans span few directions: more would fit their noise, and leave none to be seen.
            told = min(self.config.latent, max(1, len(rows) // 4))
            pca = principal_components(rows, told)
            self.template.copy_(mean)
            # Posterior mean and spread of the linear model: M^-1 W^T (x - m) and sigma^2 M^-1.
            strength = (pca.variances - pca.residual).clamp(min=1e-12).sqrt()
            for parameter in (*self.linear_in.parameters(), *self.linear_out.parameters()):
                parameter.zero_()
            self.linear_out.weight[:, :told] = (pca.directions * strength[:, None]).T
            self.linear_in.weight[:told] = pca.directions * (strength / pca.variances)[:, None]
            self.to_code.bias[self.config.latent :][:told] = 0.5 * (pca.residual / pca.variances).log()
            if self.config.likelihood == "bernoulli":
                self.template.copy_(torch.logit(mean.clamp(0.01, 0.99)))
                self.linear_out.weight.mul_(4.0)  # the slope of the logit at one half
            output = self.decode(self.encode(batch.x, batch.cond).mean, batch.cond).mean
            best = best_log_scale(self.config.likelihood, batch.x, output)
            self.slow_log_scale.copy_(best.clamp(min=_LEAST_LOG_SCALE) / 10)
            self._start_prior(batch)

    def _start_prior(self, batch: Batch) -> None:
        """From codes as training will see them: means of codes that tell nothing have no spread to begin with."""
        posterior = self.encode(batch.x, batch.cond)
        noise = seeded_noise(tuple(posterior.mean.shape), seed=0).to(posterior.mean)
        codes = posterior.mean + posterior.stddev * noise
        if isinstance(self.prior, Flow):
            self.prior.initialise(Batch(codes, batch.cond))
        elif self.pseudo is not None:
            self.pseudo.copy_(pseudo_inputs(batch.x, len(self.pseudo)))
        elif isinstance(self.prior, CodeMixture):
            self.prior.start(codes.flatten(1))

    def finalise(self, batches: Iterable[Batch]) -> None:
        """Fit the Gaussian field that restores scans, and that sampling draws codes from without a learned prior."""
        codes, spreads, conds = [], [], []
        with torch.no_grad():
            for batch in batches:
                posterior = self.encode(batch.x, batch.cond)
                codes.append(posterior.mean)
                spreads.append(posterior.variance)
                index = class_indices(self.config, batch.cond)
                conds.append(torch.zeros(len(batch.x), dtype=torch.long) if index is None else index.cpu())
        self.field.fit(torch.cat(codes), torch.cat(spreads), torch.cat(conds))

    @torch.no_grad()
    def health(self, batches: Iterable[Batch]) -> dict[str, float]:
        """How many channels of the code tell scans apart (Burda et al. 2016): with none, the posterior collapsed."""
        codes = torch.cat([self.encode(batch.x, batch.cond).mean for batch in batches])
        return {"active_units": float((activity(codes) > 0.01).sum()), "units": float(self.config.latent)}

    # -- abilities -----------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, n: int, *, seed: int, cond: Tensor | None = None) -> Float[Tensor, "n c *space"]:
        """`n` scans: the mean of p(x | z) for z from the learned prior, or else from the fitted code field."""
        size = _MICRO_BATCH[self.config.dims]

        def draw(first: int, told: Tensor | None) -> Tensor:
            return self.decode(self._codes(size, seed, first, told).to(self.device), told).mean

        return self.in_micro_batches(n, size, draw, cond)

    def _codes(self, count: int, seed: int, first: int, cond: Tensor | None) -> Float[Tensor, "count *code"]:
        """Codes first, first + 1, ... of this seed."""
        if self.prior is None:
            return self.field.sample(count, seed=seed, first=first, cond=class_indices(self.config, cond))
        noise = seeded_noise((count, prod(self.config.code_shape)), seed=derived_seed(seed, 1), first=first)
        chance = torch.special.ndtr(seeded_noise((count,), seed=derived_seed(seed, 2), first=first))
        return self._from_noise(chance.to(self.device), noise.to(self.device), cond)

    def _from_noise(
        self, chance: Float[Tensor, " b"], noise: Float[Tensor, "b size"], cond: Tensor | None
    ) -> Float[Tensor, "b *code"]:
        """Codes of the prior from noise: uniform, which chooses among Gaussians, and normal."""
        codes = noise
        if isinstance(self.prior, CodeMixture):
            codes = self.prior.draw(chance, noise, cond, self._pseudo_posteriors())
        elif isinstance(self.prior, CodeSpline):
            codes = self.prior.draw(noise, cond)
        elif self.prior is not None:
            codes = self.prior.decode(noise, cond).mean
        return codes.reshape(-1, *self.config.code_shape)

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
        healthy = self.field.projected(code, class_indices(self.config, cond))
        return self.decode(code + strength * (healthy - code), cond).mean

    @torch.no_grad()
    def elbo(self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None) -> Float[Tensor, " b"]:
        """A lower bound of log p(x) in nats, at the posterior mean's reconstruction noise.

        One sample of z drawn from q, with the same noise for every scan, so that evaluation is repeatable and
        does not depend on a scan's place in the batch.
        """
        return torch.stack([*self.density_parts(x, cond).values()]).sum(0)

    def density_parts(
        self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None
    ) -> dict[str, Float[Tensor, " b"]]:
        """What the bound is the sum of, nats: the likelihood log p(x | z), and what the code costs."""
        posterior = self.encode(x, cond)
        noise = seeded_noise((1, *posterior.mean.shape[1:]), seed=0).to(x.device)
        z = posterior.mean + posterior.stddev * noise
        return {"likelihood": self.decode(z, cond).log_prob(x), "rate": -self.rate(posterior, z, cond)}


def _prior(config: VAE.Config) -> "CodeSpline | CodeMixture | Flow | None":
    prior, told = config.prior, {"classes": config.classes, "covariates": config.covariates}
    if prior is None:
        return None
    size, numbers = prod(config.code_shape), config.condition_width
    if not isinstance(prior, FlowPrior):
        return CodeMixture(size, prior.components, conditions=numbers, given=isinstance(prior, VampPrior))
    if config.code == "vector":
        sizes = {"steps": prior.steps, "width": prior.width}
        return CodeSpline(size, **sizes, classes=len(config.classes), conditions=numbers)
    fields = {"shape": config.coarse, "channels": config.latent, "bits": 0, "levels": 0}
    return Flow(Flow.Config(**fields, **told, steps=prior.steps, width=prior.width))


__all__ = ["VAE"]
