"""The vector-quantised autoencoder, in two and three dimensions: scans as maps of symbols, and how likely those are.

van den Oord et al. 2017 ("Neural discrete representation learning"). An encoder's vector at every position of a coarse
map is replaced by the nearest of `codes` vectors; a decoder makes the scan of them, with its noise learned (Rybkin et
al. 2021). Once both are trained, so is a prior of code maps in raster order: a gated PixelCNN (van den Oord et al.
2016), or a decoder-only transformer (Esser et al. 2021; Pinaya et al. 2022, "Unsupervised brain imaging 3D anomaly
detection and segmentation with transformers"). A scan has one code map z(x), so the evidence has a bound of two terms:

    log p(x) = log sum over z of p(x | z) p(z) >= log p(x | z(x)) + log p(z(x))

Encoder and decoder are each a linear map plus a network that starts at zero; with the codebook they begin as vector
quantisation of the scans' blocks in their principal components (k-means), so training starts where that ends.
"""

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.distributions import Independent

from medgen.data.dataset import Batch
from medgen.errors import DataError
from medgen.models.abilities import Ability
from medgen.models.base import CodedConfig, Loss, Model, ModelConfig, Player, conditional
from medgen.nets.blocks import Decoder, Encoder, channels_last, from_blocks, spread, to_blocks
from medgen.nets.codebook import Codebook, straight_through
from medgen.nets.codeprior import CodePrior, PixelPrior, SequencePrior, redrawn
from medgen.nets.told import condition_table
from medgen.prob.likelihoods import LikelihoodName, best_log_scale, likelihood
from medgen.prob.point import Point
from medgen.prob.priors import principal_components
from medgen.seeds import derived_seed, voxel_uniform

# Scans drawn together.
_MICRO_BATCH = {2: 16, 3: 4}
# How often in training the prior is not told a scan's condition, so that it knows scans of no known one, too.
_UNTOLD = 0.1
# Fillings of a hole to choose among; scans that tell how far off reconstructions are at the start.
_TRIES, _FEW = 8, 8


class PixelCNNPrior(BaseModel):
    """p(z) as gated causal convolutions.

    Args:
        kind: 'pixelcnn'.
        width: features.
        depth: layers.
        kernel: width of a convolution, positions.
        dropout: part of the features left out in training.
        rate: its learning rate over the autoencoder's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["pixelcnn"] = "pixelcnn"
    width: int = Field(default=64, ge=1)
    depth: int = Field(default=5, ge=1, le=64)
    kernel: int = Field(default=3, ge=3, le=15)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    rate: float = Field(default=3.0, gt=0)


class TransformerPrior(BaseModel):
    """p(z) as a decoder-only transformer.

    Args:
        kind: 'transformer'.
        width: features, a multiple of `heads`.
        depth: layers.
        heads: of attention.
        dropout: part of the features left out in training.
        rate: its learning rate over the autoencoder's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["transformer"] = "transformer"
    width: int = Field(default=128, ge=1)
    depth: int = Field(default=4, ge=1, le=64)
    heads: int = Field(default=4, ge=1)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    rate: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _heads_divide(self) -> "TransformerPrior":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be divisible by heads = {self.heads}")
        return self


class VQVAE(Model):
    """A vector-quantised autoencoder with a prior of its codes; every variation is a field of its config.

    Example:
        >>> model = VQVAE(VQVAE.Config(shape=(16, 16), width=8, latent=4, codes=16))
        >>> model.sample(3, seed=0).shape
        torch.Size([3, 1, 16, 16])
    """

    class Config(CodedConfig):
        """A VQ-VAE.

        Args:
            kind: 'vqvae'.
            codes: vectors of the codebook.
            likelihood: noise of p(x | z).
            commitment: weight of the encoder's distance from its codes.
            decay: part of the codebook that a step of training keeps.
            revive: a code begins anew when it is used less than this part of an equal share; 0: never.
            share: part of the run in which the autoencoder is trained; the prior has the rest.
            prior: of the code map.
        """

        kind: Literal["vqvae"] = "vqvae"
        codes: int = Field(default=256, ge=2, le=65536)
        code: Literal["map"] = "map"
        latent: int = Field(default=32, ge=1)
        likelihood: LikelihoodName = "gaussian"
        commitment: float = Field(default=0.25, ge=0)
        decay: float = Field(default=0.99, gt=0, lt=1)
        revive: float = Field(default=0.02, ge=0, lt=1)
        share: float = Field(default=0.5, gt=0, lt=1)
        prior: Annotated[PixelCNNPrior | TransformerPrior, Field(discriminator="kind")] = PixelCNNPrior()

    config: "VQVAE.Config"

    def __init__(self, config: "VQVAE.Config") -> None:
        super().__init__()
        self.config = config
        sizes = {"fold": config.fold, "depth": config.depth, "classes": 0}
        self.encoder = Encoder(config.dims, config.channels, config.width, config.levels, **sizes)
        self.decoder = Decoder(config.dims, config.channels, config.width, config.levels, **sizes)
        self.block = (config.stride,) * config.dims
        voxels = config.channels * self.block[0] ** config.dims
        self.linear_in = nn.Linear(voxels, config.latent)
        self.linear_out = nn.Linear(config.latent, voxels)
        self.to_code = nn.Linear(self.encoder.width, config.latent)
        self.from_code = nn.Linear(config.latent, self.decoder.width)
        self.template = nn.Parameter(torch.zeros(1, config.channels, *config.shape))
        self.slow_log_scale = nn.Parameter(torch.zeros(config.channels))
        self.codebook = Codebook(config.codes, config.latent, decay=config.decay, revive=config.revive)
        for parameter in (*self.to_code.parameters(), *self.decoder.head[0].parameters()):
            nn.init.zeros_(parameter)
        self.prior = _prior(config)
        channels_last(self, config.dims)

    @classmethod
    def abilities(cls, config: ModelConfig) -> frozenset[Ability]:
        """All but exact densities and translation; it classifies by what the prior says under each class."""
        known: set[Ability] = {
            "samples", "encodes", "decodes", "reconstructs", "restores", "bounds_density", "maps_density", "inpaints"
        }  # fmt: skip
        return conditional(config, known)

    def players(self) -> list[Player]:
        """The autoencoder, then the prior; the codebook follows the encoder by itself."""
        prior, share = tuple(self.prior.parameters()), self.config.share
        rest = tuple(p for name, p in self.named_parameters() if not name.startswith("prior."))
        return [Player("codes", rest, until=share), Player("prior", prior, since=share, rate=self.config.prior.rate)]

    @property
    def log_scale(self) -> Float[Tensor, " c"]:
        """Log sigma of p(x | z) a channel; ten times its parameter, as it has further to go than a weight."""
        return 10 * self.slow_log_scale

    # -- distributions -------------------------------------------------------------------------------

    def code_map(self, x: Float[Tensor, "b c *space"]) -> Int[Tensor, "b *positions"]:
        """z(x): which code stands at each position."""
        with torch.no_grad():
            return self.codebook(self._said(x))

    def encode(self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None) -> Point:
        """The codes' vectors (b, latent, *positions), which are certain; the condition does not matter to them."""
        return Point(self.codebook.look_up(self.code_map(x)))

    def decode(self, z: Float[Tensor, "b d *positions"], cond: Tensor | None = None) -> Independent:
        """p(x | z), over scans, for vectors of codes or what lies between; the condition does not matter to it."""
        rows = z.movedim(1, -1)
        linear = from_blocks(self.linear_out(rows), self.block)
        learned = self.decoder(self.from_code(rows).movedim(-1, 1))
        return likelihood(self.config.likelihood, self.template + linear + learned.float(), self.log_scale)

    def _said(self, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b d *positions"]:
        """The encoder's vectors, before they are quantised."""
        mean = torch.sigmoid(self.template) if self.config.likelihood == "bernoulli" else self.template
        linear = self.linear_in(to_blocks(x - mean, self.block))
        return (linear.float() + self.to_code(self.encoder(x).movedim(1, -1)).float()).movedim(-1, 1)

    def _told(self, cond: Tensor | None, count: int) -> Tensor | None:
        numbers, classes = self.config.condition_width, len(self.config.classes)
        return condition_table(cond, count, classes=classes, numbers=numbers, device=self.log_scale.device)

    # -- training ------------------------------------------------------------------------------------

    def forward(self, batch: Batch, player: str = "codes") -> Loss:
        """What the scan costs given its codes, nats, and how far the encoder is from them; or what the codes cost."""
        if player == "prior":
            told = self._told(batch.cond, len(batch.x))
            if told is not None and self.training:
                told = told * (torch.rand(len(told), 1, device=told.device) >= _UNTOLD)
            cost = -self._code_parts(self.code_map(batch.x), told).flatten(1).sum(1)
            return Loss(cost, {"codes": cost})
        z = self._said(batch.x)
        chosen = self.codebook(z)
        quantised = self.codebook.look_up(chosen)
        distortion = -self.decode(straight_through(z, quantised)).log_prob(batch.x)
        apart = (z - quantised).square().flatten(1).mean(1) * batch.x[0].numel()
        if self.training:
            self.codebook.update(z, chosen)
        terms = {"distortion": distortion, "commitment": self.config.commitment * apart}
        return Loss(terms["distortion"] + terms["commitment"], terms)

    def validation_loss(self, batch: Batch) -> Float[Tensor, " b"]:
        """The negative bound; before the prior is trained, its codes are equally likely and cost the same anywhere."""
        return -self.elbo(batch.x, batch.cond)

    @torch.no_grad()
    def initialise(self, batch: Batch) -> None:
        """Start from k-means of the principal components of the scans' blocks."""
        config = self.config
        mean = batch.x.mean(0, keepdim=True)
        pca = principal_components(to_blocks(batch.x - mean, self.block).flatten(0, -2), config.latent)
        size = pca.variances.mean().sqrt().clamp(min=1e-6)
        self.template.copy_(mean)
        self.linear_in.weight.copy_(pca.directions / size)
        self.linear_out.weight.copy_((pca.directions * size).T)
        self.linear_in.bias.zero_()
        self.linear_out.bias.zero_()
        if config.likelihood == "bernoulli":
            self.template.copy_(torch.logit(mean.clamp(0.01, 0.99)))
            self.linear_out.weight.mul_(4.0)  # the slope of the logit at one half
        # The networks say nothing yet; so the linear map is all of the encoder, and few scans tell the noise.
        self.codebook.initialise(self.linear_in(to_blocks(batch.x - mean, self.block)).flatten(0, -2))
        few = batch.first(_FEW).x
        self.slow_log_scale.copy_(best_log_scale(config.likelihood, few, self.reconstruct(few)) / 10)

    @torch.no_grad()
    def begin(self, player: str, batch: Batch) -> None:
        """The prior starts from how often each code is used."""
        if player == "prior":
            used = torch.bincount(self.code_map(batch.x).flatten(), minlength=self.config.codes)
            self.prior.bias.copy_(((used + 0.1) / (used + 0.1).sum()).log())

    @torch.no_grad()
    def health(self, batches: Iterable[Batch]) -> dict[str, float]:
        """How many of the codes these scans use, and how many it would be were all used alike (the perplexity)."""
        # Codes that are equal are one.
        _, kind = torch.unique(self.codebook.vectors, dim=0, return_inverse=True)
        used = torch.zeros(self.config.codes, dtype=torch.float64)
        for batch in batches:
            used += torch.bincount(kind[self.code_map(batch.x)].flatten(), minlength=self.config.codes).cpu()
        perplexity = float(torch.special.entr(used / used.sum().clamp(min=1)).sum().exp())
        in_use = float((used > 0).sum())
        return {"codes_used": in_use, "codes": float(self.config.codes), "code_perplexity": perplexity}

    # -- abilities -----------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, n: int, *, seed: int, cond: Tensor | None = None) -> Float[Tensor, "n c *space"]:
        """`n` scans: the mean of p(x | z) for code maps drawn from the prior."""
        size = _MICRO_BATCH[self.config.dims]

        def draw(first: int, told: Tensor | None) -> Tensor:
            uniform = torch.stack([self._uniform(derived_seed(seed, 1, first + i)) for i in range(size)])
            codes = torch.zeros(uniform.shape, dtype=torch.long, device=self.device)
            every = torch.ones_like(codes, dtype=torch.bool)
            codes = redrawn(self.prior, codes, every, uniform.to(self.device), self._told(told, size))
            return self.decode(self.codebook.look_up(codes)).mean

        return self.in_micro_batches(n, size, draw, cond)

    def _uniform(self, seed: int) -> Float[Tensor, "*positions"]:
        return voxel_uniform(self.config.coarse, seed=seed)[0]

    @torch.no_grad()
    def reconstruct(self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None) -> Float[Tensor, "b c *space"]:
        """The mean of p(x | z) at the scan's codes."""
        return self.decode(self.encode(x).mean).mean

    @torch.no_grad()
    def restore(
        self, x: Float[Tensor, "b c *space"], *, strength: float = 0.02, seed: int = 0, cond: Tensor | None = None
    ) -> Float[Tensor, "b c *space"]:
        """The healthy twin: codes that the prior finds unlikely are drawn anew, in raster order (Pinaya et al. 2022).

        A code is unlikely where it and all codes no likelier than it have a probability of at most `strength`
        together, given the codes before it. 0 redraws none, 1 all. The noise is the same for every scan.

        Raises:
            DataError: `strength` is not between 0 and 1.
        """
        if not 0 <= strength <= 1:
            raise DataError(f"strength is the probability of codes to draw anew, from 0 to 1; found {strength}.")
        told, codes = self._told(cond, len(x)), self.code_map(x)
        log_p = self.prior(codes, told)
        own = log_p.gather(1, codes[:, None])
        tail = torch.where(log_p <= own, log_p.exp(), 0.0).sum(1)
        free = (tail <= strength) & (strength > 0) if strength < 1 else torch.ones_like(codes, dtype=torch.bool)
        uniform = self._uniform(derived_seed(seed, 2)).to(x.device).expand(codes.shape)
        return self.decode(self.codebook.look_up(redrawn(self.prior, codes, free, uniform, told))).mean

    @torch.no_grad()
    def inpaint(
        self, x: Float[Tensor, "b c *space"], hole: Bool[Tensor, "b 1 *space"], *, seed: int, cond: Tensor | None = None
    ) -> Float[Tensor, "b c *space"]:
        """`x` with the voxels of `hole` drawn anew, the others as they are.

        Codes that touch the hole are drawn in raster order, given those before them; of several such fillings z one
        is taken in proportion to what they leave out: the probability of the codes after them, and of the voxels
        about the hole, given them (sampling-importance-resampling, Rubin 1987). So for many fillings z is a draw of
        p(z | known codes and voxels). The encoder does not see what is in the hole.
        """
        blank = torch.sigmoid(self.template) if self.config.likelihood == "bernoulli" else self.template
        codes, told = self.code_map(torch.where(hole, blank, x)), self._told(cond, len(x))
        free = to_blocks(hole.float(), self.block).amax(-1) > 0
        noise = torch.stack([self._uniform(derived_seed(seed, 3, n)) for n in range(_TRIES)]).to(x.device)
        # All fillings at once, (tries * b, *positions).
        many, open_many = (t.repeat(_TRIES, *[1] * self.config.dims) for t in (codes, free))
        told_many = None if told is None else told.repeat(_TRIES, 1)
        fillings = redrawn(self.prior, many, open_many, noise.repeat_interleave(len(x), 0), told_many)
        scans, weights = [], []
        for filling in fillings.split(len(x)):
            told_scan = self.decode(self.codebook.look_up(filling))
            around = torch.where(hole, 0.0, _voxel_log_prob(told_scan, x)).flatten(1).sum(1)
            after = torch.where(free, 0.0, self._code_parts(filling, told)[:, 0]).flatten(1).sum(1)
            scans.append(told_scan.mean)
            weights.append(around + after)
        cumulated = torch.stack(weights, 1).double().softmax(1).cumsum(1)
        at = float(voxel_uniform((1, 1), seed=derived_seed(seed, 4)))
        best = (cumulated < at).sum(1).clamp(max=_TRIES - 1)
        chosen = torch.stack(scans, 1)[torch.arange(len(x), device=x.device), best]
        return torch.where(hole, chosen, x)

    def elbo(self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None) -> Float[Tensor, " b"]:
        """A lower bound of log p(x), nats: of the scan given its codes, and of the codes."""
        return self.log_prob_map(x, cond).flatten(1).sum(1)

    @torch.no_grad()
    def log_prob_map(self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None) -> Float[Tensor, "b 1 *space"]:
        """Each voxel's part of the bound, nats; what a code costs is shared by the voxels of its block."""
        codes = self.code_map(x)
        voxels = _voxel_log_prob(self.decode(self.codebook.look_up(codes)), x)
        return voxels + spread(self._code_parts(codes, self._told(cond, len(x))), tuple(x.shape[2:]))

    @torch.no_grad()
    def code_log_prob(self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None) -> Float[Tensor, " b"]:
        """log p(z(x)), the exact log probability of the scan's code map, nats."""
        return self.code_log_prob_map(x, cond).flatten(1).sum(1)

    @torch.no_grad()
    def code_log_prob_map(
        self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None
    ) -> Float[Tensor, "b 1 *positions"]:
        """Each code's part of it, given the codes before, nats."""
        return self._code_parts(self.code_map(x), self._told(cond, len(x)))

    def _code_parts(self, codes: Int[Tensor, "b *positions"], told: Tensor | None) -> Float[Tensor, "b 1 *positions"]:
        return self.prior(codes, told).gather(1, codes[:, None])


def _voxel_log_prob(told: Independent, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b 1 *space"]:
    """log p(x | z), voxel by voxel."""
    return told.base_dist.log_prob(x).sum(1, keepdim=True)


def _prior(config: VQVAE.Config) -> CodePrior:
    # Of a condition, one number more says that it is known.
    numbers = config.condition_width + 1 if config.condition_width else 0
    fields = config.prior.model_dump(exclude={"kind", "rate"})
    kind = PixelPrior if config.prior.kind == "pixelcnn" else SequencePrior
    return kind(config.codes, config.coarse, numbers=numbers, **fields)


__all__ = ["VQVAE", "PixelCNNPrior", "TransformerPrior"]
