"""Flow matching in the codes of an autoencoder, in two and three dimensions: large scans at a small price.

Rombach et al. 2022 ("High-resolution image synthesis with latent diffusion models"), Dao et al. 2023 ("Flow matching
in latent space"). A variational autoencoder with a code map is trained first; then the flow of noise to its codes:

    log p(x) >= E_q(z|x) [ log p(x | z) - log q(z | x) + log p(z) ],    log p(z) by flow matching

Scans are decoded from codes that the flow made, and restored by way of codes that were partly noise.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.distributions import Independent

from medgen.data.dataset import Batch
from medgen.models.abilities import Ability
from medgen.models.base import ConditionedConfig, Loss, Model, ModelConfig, Player, conditional
from medgen.models.flowmatch import FlowFields, FlowMatch
from medgen.models.vae import VAE
from medgen.seeds import derived_seed, seeded_noise

# Scans decoded together.
_MICRO_BATCH = {2: 16, 3: 1}


class LatentFlowMatch(Model):
    """A variational autoencoder and a flow-matching model of its codes.

    Example:
        >>> model = LatentFlowMatch(LatentFlowMatch.Config(shape=(32, 32), width=8, latent=4))
        >>> model.sample(3, seed=0).shape
        torch.Size([3, 1, 32, 32])
    """

    class Config(ConditionedConfig):
        """Flow matching in latent space.

        Args:
            kind: 'latentflowmatch'.
            latent: channels of the code map.
            width: the autoencoder's features at its finest level.
            levels: its halvings, after folding.
            fold: block size it turns into channels first.
            depth: its residual blocks a level.
            share: part of the run in which it is trained; the velocity has the rest.
            velocity: all there is to choose about flow matching on its codes.
        """

        kind: Literal["latentflowmatch"] = "latentflowmatch"
        latent: int = Field(default=8, ge=1)
        width: int = Field(default=32, ge=1)
        levels: int = Field(default=1, ge=0, le=16)
        fold: int = Field(default=2, ge=1)
        depth: int = Field(default=1, ge=0, le=64)
        share: float = Field(default=0.5, gt=0, lt=1)
        velocity: FlowFields = FlowFields(levels=1)

        @property
        def autoencoder_config(self) -> VAE.Config:
            """Of the autoencoder, which is told nothing but the scan."""
            names = ("shape", "channels", "latent", "width", "levels", "fold", "depth")
            return VAE.Config(code="map", **{name: getattr(self, name) for name in names})

        @property
        def velocity_config(self) -> FlowMatch.Config:
            """Of the flow of codes."""
            names = ("classes", "covariates", "context")
            told = {name: getattr(self, name) for name in names}
            shape = self.autoencoder_config.coarse
            return FlowMatch.Config(shape=shape, channels=self.latent, bits=0, **told, **self.velocity.model_dump())

        @model_validator(mode="after")
        def _divisible(self) -> "LatentFlowMatch.Config":
            stride = LatentFlowMatch.stride(dict(self))
            if any(n % stride for n in self.shape):
                raise ValueError(
                    f"shape {self.shape} must be divisible by {stride}: fold * 2**levels, of the autoencoder times of "
                    "the velocity"
                )
            return self

    config: "LatentFlowMatch.Config"
    begun: Tensor

    def __init__(self, config: "LatentFlowMatch.Config") -> None:
        super().__init__()
        self.config = config
        self.autoencoder = VAE(config.autoencoder_config)
        self.velocity = FlowMatch(config.velocity_config)
        self.register_buffer("begun", torch.tensor(False))

    @classmethod
    def stride(cls, values: dict[str, Any]) -> int:
        """The autoencoder's times the velocity's."""
        fields = cls.Config.model_fields
        fold, levels, inner = (values.get(name, fields[name].default) for name in ("fold", "levels", "velocity"))
        inner = inner if isinstance(inner, FlowFields) else FlowFields.model_validate(inner)
        return int(fold) * 2 ** int(levels) * inner.fold * 2**inner.levels

    @classmethod
    def abilities(cls, config: ModelConfig) -> frozenset[Ability]:
        """What the autoencoder can do, with better samples; the density is a bound."""
        return conditional(config, {"samples", "encodes", "decodes", "reconstructs", "restores", "bounds_density"})

    def players(self) -> list[Player]:
        """The autoencoder, then the velocity."""
        share = self.config.share
        return [
            Player("autoencoder", tuple(self.autoencoder.parameters()), until=share),
            Player("velocity", tuple(self.velocity.parameters()), since=share),
        ]

    # -- training ------------------------------------------------------------------------------------

    def initialise(self, batch: Batch) -> None:
        """The autoencoder's start from principal components, and the Gaussian field of the codes it then has."""
        self.autoencoder.initialise(batch)
        self._fit_path(batch)

    @torch.no_grad()
    def begin(self, player: str, batch: Batch) -> None:
        """The Gaussian field of the trained autoencoder's codes."""
        self._fit_path(batch)
        self.begun.fill_(True)

    @torch.no_grad()
    def _fit_path(self, batch: Batch) -> None:
        codes = []
        for n, part in enumerate(batch.x.split(_MICRO_BATCH[self.config.dims])):
            posterior = self.autoencoder.encode(part)
            noise = seeded_noise(tuple(posterior.mean.shape), seed=derived_seed(0, 2, n)).to(part.device)
            codes.append(posterior.mean + posterior.stddev * noise)
        self.velocity.initialise(Batch(torch.cat(codes), batch.cond))

    def forward(self, batch: Batch, player: str = "autoencoder") -> Loss:
        """The autoencoder's bound; or the velocity's loss on codes drawn from q(z | x)."""
        if player == "autoencoder":
            return self.autoencoder(batch)
        with torch.no_grad():
            codes = self.autoencoder.encode(batch.x).rsample()
        return self.velocity(Batch(codes, batch.cond, self._coarse(batch.context)))

    def validation_loss(self, batch: Batch) -> Float[Tensor, " b"]:
        """The bound under N(0, 1) while the autoencoder is trained, then under what the velocity is worth."""
        if not bool(self.begun):
            return self.autoencoder(batch).total
        posterior = self.autoencoder.encode(batch.x)
        z = posterior.rsample()
        rate = posterior.log_prob(z) + self.velocity(Batch(z, batch.cond, self._coarse(batch.context))).total
        return rate - self.autoencoder.decode(z).log_prob(batch.x)

    def _coarse(self, context: Tensor | None) -> Tensor | None:
        """The given image where codes are: means over their blocks."""
        if context is None:
            return None
        pool = nn.functional.avg_pool2d if self.config.dims == 2 else nn.functional.avg_pool3d
        return pool(context, self.autoencoder.config.stride)

    # -- abilities -----------------------------------------------------------------------------------

    def encode(
        self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None, context: Tensor | None = None
    ) -> Independent:
        """q(z | x) over code maps; neither condition nor given image matter to it."""
        return self.autoencoder.encode(x)

    def decode(
        self, z: Float[Tensor, "b *code"], cond: Tensor | None = None, context: Tensor | None = None
    ) -> Independent:
        """p(x | z), over scans; neither condition nor given image matter to it."""
        return self.autoencoder.decode(z)

    @torch.no_grad()
    def reconstruct(
        self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None, context: Tensor | None = None
    ) -> Float[Tensor, "b c *space"]:
        """The mean of p(x | z) at the mean of q(z | x)."""
        return self.autoencoder.reconstruct(x)

    @torch.no_grad()
    def sample(
        self, n: int, *, seed: int, cond: Tensor | None = None, context: Tensor | None = None
    ) -> Float[Tensor, "n c *space"]:
        """`n` scans: the mean of p(x | z) for codes that the velocity made of noise."""
        codes = self.velocity.sample(n, seed=seed, cond=cond, context=self._coarse(context))
        size = _MICRO_BATCH[self.config.dims]
        return self.in_micro_batches(n, size, lambda _, part: self.decode(part).mean, codes)

    @torch.no_grad()
    def restore(
        self, x: Float[Tensor, "b c *space"], *, strength: float = 0.5, seed: int = 0, cond: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Float[Tensor, "b c *space"]:  # fmt: skip
        """The scan decoded from its code after noise replaced `strength` of it and the velocity removed it again.

        0 is the reconstruction, 1 a new scan. The noise is the same for every scan.

        Raises:
            ConfigError: `strength` is not between 0 and 1.
            DataError: a voxel is not finite, or the scans or given images are not of the config's size.
        """
        code, coarse = self.encode(x).mean, self._coarse(context)
        return self.decode(self.velocity.restore(code, strength=strength, seed=seed, cond=cond, context=coarse)).mean

    @torch.no_grad()
    def elbo(
        self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None, context: Tensor | None = None
    ) -> Float[Tensor, " b"]:
        """A lower bound of log p(x) in nats, at one code drawn with the same noise for every scan.

        log p(z) is an estimate; the velocity's `probes` say how good a one.
        """
        posterior = self.encode(x)
        noise = seeded_noise((1, *posterior.event_shape), seed=derived_seed(0, 1)).to(x.device)
        z = posterior.mean + posterior.stddev * noise
        log_p, _ = self.velocity.log_prob_estimate(z, cond, self._coarse(context))
        return self.decode(z).log_prob(x) - posterior.log_prob(z) + log_p


__all__ = ["LatentFlowMatch"]
