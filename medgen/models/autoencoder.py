"""Autoencoders in two and three dimensions: the cheap baseline of reconstruction, denoising and dimension reduction.

    z = e(x),    x' = d(z),    loss = how far x' is from x

Encoder and decoder are each a linear map plus a network that starts at zero, as in the VAE; the linear maps begin as
principal components of the training scans (or of their blocks, for a code map), the optimal linear autoencoder
(Baldi & Hornik 1989), with codes of unit variance. Variations are fields of the config:

    noise        coarse noise is added while training and has to be removed (Vincent et al. 2010, "Stacked denoising
                 autoencoders"; Kascenas et al. 2022, "Denoising autoencoders for unsupervised anomaly detection in
                 brain MRI")
    skips        a U-Net in place of the code, for denoising
    uncertainty  the decoder also says how far off it may be at each voxel: AE-U (Mao et al. 2020, "Abnormality
                 detection in chest X-ray images using uncertainty prediction autoencoders", equation 3)
    loss         squared or absolute error, or structural similarity (Bergmann et al. 2019, "Improving unsupervised
                 defect segmentation by applying structural similarity to autoencoders")
    memory       codes are put together from a few learned ones (MemAE, Gong et al. 2019; `medgen.nets.memory`)

Scans are sampled by way of a Gaussian mixture fitted to the training codes (a Gaussian field for a code map). There is
no density: only the uncertain decoder is a distribution, and it is one given the code.
"""

from collections.abc import Iterable
from math import prod
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.distributions import Distribution

from medgen.data.dataset import Batch
from medgen.errors import CapabilityError
from medgen.metrics.image import ssim_map
from medgen.models.abilities import Ability
from medgen.models.base import CodedConfig, Loss, Model, ModelConfig, class_indices
from medgen.nets.blocks import Decoder, Encoder, channels_last, from_blocks, to_blocks
from medgen.nets.memory import Memory, address_entropy
from medgen.nets.noise import foreground_noise
from medgen.nets.told import condition_table
from medgen.nets.unet import UNet
from medgen.prob.divergences import activity
from medgen.prob.likelihoods import likelihood
from medgen.prob.mixtures import GaussianMixture
from medgen.prob.point import Point
from medgen.prob.priors import CodeField, principal_components

# Scans decoded together when sampling.
_MICRO_BATCH = {2: 16, 3: 1}
# Gong et al. 2019, equation 10: weight of the addresses' entropy beside the error of a voxel.
_ENTROPY = 0.0002


class Autoencoder(Model):
    """An autoencoder; every variation is a field of its config.

    Example:
        >>> model = Autoencoder(Autoencoder.Config(shape=(16, 16), width=8, latent=4))
        >>> model.reconstruct(torch.zeros(3, 1, 16, 16)).shape
        torch.Size([3, 1, 16, 16])
    """

    class Config(CodedConfig):
        """An autoencoder.

        Args:
            kind: 'autoencoder'.
            loss: 'l2', the squared error, 'l1', the absolute error, both of grey values on [0, 1]; 'ssim', one minus
                the structural similarity, without unit. Summed over voxels and channels.
            uncertainty: predict the variance of every voxel, too; the loss is then -log N(x; x', s^2), nats.
            noise: standard deviation of the coarse noise's values, on grey values; 0 for none.
            coarseness: voxels between those values along each axis; values between are interpolated.
            skips: a U-Net, which has no code.
            memory: codes kept in memory; 0 for no memory.
            mixture: Gaussians a class that sampled vectors come from, at most.
        """

        kind: Literal["autoencoder"] = "autoencoder"
        loss: Literal["l2", "l1", "ssim"] = "l2"
        uncertainty: bool = False
        noise: float = Field(default=0.0, ge=0)
        coarseness: int = Field(default=8, ge=1)
        skips: bool = False
        memory: int = Field(default=0, ge=0)
        mixture: int = Field(default=5, ge=1)

        @model_validator(mode="after")
        def _consistent(self) -> "Autoencoder.Config":
            if self.uncertainty and self.loss != "l2":
                raise ValueError(f"uncertainty brings its own loss, a Gaussian's; found loss {self.loss!r}")
            if self.skips and not self.noise:
                raise ValueError("skips let every scan through unchanged; without noise there is nothing to learn")
            if self.skips and (self.uncertainty or self.memory):
                raise ValueError("skips go round the code: neither uncertainty nor memory says anything with them")
            return self

    config: "Autoencoder.Config"

    def __init__(self, config: "Autoencoder.Config") -> None:
        super().__init__()
        self.config = config
        dims, channels, numbers = config.dims, config.channels, config.condition_width
        if config.skips:
            told = numbers + 1 if numbers else 0
            self.unet = UNet(
                dims, (channels, channels), config.width, config.levels, fold=config.fold, depth=config.depth,
                conditions=told,
            )  # fmt: skip
            return
        sizes = {"fold": config.fold, "depth": config.depth, "classes": numbers}
        outputs = 2 * channels if config.uncertainty else channels
        self.encoder = Encoder(dims, channels, config.width, config.levels, **sizes)
        self.decoder = Decoder(dims, outputs, config.width, config.levels, **sizes)
        # What one code position stands for: a block of voxels, and a block of coarse features.
        positions = config.code_shape[1:]
        self.scan_block = tuple(n // p for n, p in zip(config.shape, positions, strict=True))
        self.feature_block = tuple(n // p for n, p in zip(config.coarse, positions, strict=True))
        voxels = channels * prod(self.scan_block)
        features = self.encoder.width * prod(self.feature_block)
        self.linear_in = nn.Linear(voxels, config.latent)
        self.linear_out = nn.Linear(config.latent, voxels)
        self.to_code = nn.Linear(features, config.latent)
        self.from_code = nn.Linear(config.latent, features)
        self.template = nn.Parameter(torch.zeros(1, channels, *config.shape))
        self.log_variance = nn.Parameter(torch.zeros(channels)) if config.uncertainty else None
        self.memory = Memory(config.memory, config.latent) if config.memory else None
        classes = max(1, len(config.classes))
        self.prior = (
            CodeField(config.code_shape, classes)
            if config.code == "map"
            else GaussianMixture(config.latent, config.mixture, classes)
        )
        for parameter in (*self.to_code.parameters(), *self.decoder.head[0].parameters()):
            nn.init.zeros_(parameter)
        channels_last(self, dims)

    @classmethod
    def abilities(cls, config: ModelConfig) -> frozenset[Ability]:
        """All reconstruct and restore; what has a code encodes, decodes and samples, too."""
        coded: set[Ability] = set() if getattr(config, "skips", False) else {"encodes", "decodes", "samples"}
        return frozenset[Ability]({"reconstructs", "restores"}) | coded

    # -- codes -----------------------------------------------------------------------------------

    def encode(self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None) -> Point:
        """The code (b, latent, *positions), which is certain.

        Raises:
            CapabilityError: the config has skips.
        """
        self._require_code("encode")
        linear = self.linear_in(to_blocks(x - self.template, self.scan_block))
        learned = self.to_code(to_blocks(self.encoder(x, cond), self.feature_block))
        return Point((linear.float() + learned.float()).movedim(-1, 1))

    def decode(self, z: Float[Tensor, "b *code"], cond: Tensor | None = None) -> Distribution:
        """The scan of a code: p(x | z), one Gaussian a voxel, where there is uncertainty; else one point.

        Raises:
            CapabilityError: the config has skips.
        """
        self._require_code("decode")
        rows = z.movedim(1, -1)
        return self._decoded(rows if self.memory is None else self.memory(rows)[0], cond)

    def _decoded(self, rows: Float[Tensor, "b *positions latent"], cond: Tensor | None) -> Distribution:
        """The scan of codes that come out of the memory, where there is one."""
        linear = from_blocks(self.linear_out(rows), self.scan_block)
        learned = self.decoder(from_blocks(self.from_code(rows), self.feature_block), cond).float()
        channels = self.config.channels
        mean = self.template + linear + learned[:, :channels]
        if self.log_variance is None:
            return Point(mean)
        log_variance = self.log_variance.reshape(1, -1, *[1] * self.config.dims) + learned[:, channels:]
        return likelihood("gaussian", mean, 0.5 * log_variance)

    def _require_code(self, verb: str) -> None:
        if self.config.skips:
            raise CapabilityError(
                f"This autoencoder cannot {verb}: with skips it has no code that tells a scan. Train it with "
                "model.skips=false, or use it to reconstruct."
            )

    # -- training --------------------------------------------------------------------------------

    def forward(self, batch: Batch, player: str = "model") -> Loss:
        """How far the output is from the scan, when noise was added to what goes in."""
        x, cond, config = batch.x, batch.cond, self.config
        noisy = x + foreground_noise(x, config.noise, config.coarseness) if config.noise else x
        if config.skips:
            error = self._error(Point(self._denoised(noisy, cond)), x)
            return Loss(error, {"error": error})
        rows = self.encode(noisy, cond).mean.movedim(1, -1)
        if self.memory is None:
            error = self._error(self._decoded(rows, cond), x)
            return Loss(error, {"error": error})
        read, address = self.memory(rows)
        error = self._error(self._decoded(read, cond), x)
        entropy = address_entropy(address)
        return Loss(error + _ENTROPY * x[0].numel() * entropy, {"error": error, "address entropy": entropy})

    def _error(self, output: Distribution, x: Float[Tensor, "b c *space"]) -> Float[Tensor, " b"]:
        """What the loss says of an output, summed over voxels and channels."""
        if self.config.uncertainty:
            return -output.log_prob(x)
        difference = output.mean - x
        match self.config.loss:
            case "l2":
                return difference.square().flatten(1).sum(1)
            case "l1":
                return difference.abs().flatten(1).sum(1)
            case "ssim":
                return x[0].numel() * (1 - ssim_map(output.mean, x)).flatten(1).mean(1)

    def _denoised(self, x: Float[Tensor, "b c *space"], cond: Tensor | None) -> Float[Tensor, "b c *space"]:
        """The scan less the noise that the U-Net sees in it."""
        config, device = self.config, x.device
        told = condition_table(cond, len(x), classes=len(config.classes), numbers=config.condition_width, device=device)
        return x + self.unet(x, torch.zeros(len(x), device=device), told).float()

    @torch.no_grad()
    def initialise(self, batch: Batch) -> None:
        """Start from principal components of the scans (of their blocks, for a map), in closed form."""
        if self.config.skips:
            return
        mean = batch.x.mean(0, keepdim=True)
        rows = to_blocks(batch.x - mean, self.scan_block).flatten(0, -2)
        pca = principal_components(rows, self.config.latent)
        spread = pca.variances.sqrt()[:, None]
        self.template.copy_(mean)
        self.linear_in.weight.copy_(pca.directions / spread)
        self.linear_out.weight.copy_((pca.directions * spread).T)
        self.linear_in.bias.zero_()
        self.linear_out.bias.zero_()
        codes = self.encode(batch.x, batch.cond).mean.movedim(1, -1)
        if self.memory is not None:
            # Codes that are there, in an order of their own; as often as need be.
            flat, items = codes.flatten(0, -2), self.memory.items
            order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))
            items.copy_(flat[order.repeat(len(items) // len(flat) + 1)[: len(items)].to(flat.device)])
        if self.log_variance is not None:
            error = (self._decoded(codes, batch.cond).mean - batch.x).square()
            self.log_variance.copy_(error.movedim(1, 0).flatten(1).mean(1).clamp(min=1e-5).log())

    @torch.no_grad()
    def finalise(self, batches: Iterable[Batch]) -> None:
        """Fit what sampling draws codes from."""
        if self.config.skips:
            return
        codes, conds = [], []
        for batch in batches:
            codes.append(self.encode(batch.x, batch.cond).mean)
            known = class_indices(self.config, batch.cond)
            conds.append(torch.zeros(len(batch.x), dtype=torch.long) if known is None else known.cpu())
        every, cond = torch.cat(codes), torch.cat(conds)
        if isinstance(self.prior, CodeField):
            self.prior.fit(every, torch.zeros_like(every), cond)
        else:
            self.prior.fit(every.flatten(1), cond, seed=0)

    @torch.no_grad()
    def health(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Code dimensions that vary over scans: by more than a hundredth of the most lively one's variance.

        Burda et al. 2016's statistic, relative because the scale of an autoencoder's codes is free. With a memory,
        also how many of its items any scan is made of.
        """
        if self.config.skips:
            return {}
        codes = torch.cat([self.encode(batch.x, batch.cond).mean for batch in batches])
        variance = activity(codes)
        active = (variance > 0.01 * variance.max()) & (variance > 1e-8)
        told = {"active_units": float(active.sum()), "units": float(len(active))}
        if self.memory is not None:
            used = self.memory.address(codes.movedim(1, -1)).flatten(0, -2).amax(0) > 0
            told |= {"memory_used": float(used.sum()), "memory": float(len(used))}
        return told

    # -- abilities -------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, n: int, *, seed: int, cond: Tensor | None = None) -> Float[Tensor, "n c *space"]:
        """`n` scans, decoded from codes that the fitted mixture (or field) draws.

        Raises:
            CapabilityError: the config has skips.
        """
        self._require_code("sample")
        size = _MICRO_BATCH[self.config.dims]

        def draw(first: int, told: Tensor | None) -> Tensor:
            codes = self.prior.sample(size, seed=seed, first=first, cond=class_indices(self.config, told))
            return self.decode(codes.reshape(size, *self.config.code_shape).to(self.device), told).mean

        return self.in_micro_batches(n, size, draw, cond)

    @torch.no_grad()
    def reconstruct(self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None) -> Float[Tensor, "b c *space"]:
        """The scan as it comes out; no noise is added."""
        if self.config.skips:
            return self._denoised(x, cond)
        return self.decode(self.encode(x, cond).mean, cond).mean

    @torch.no_grad()
    def restore(
        self, x: Float[Tensor, "b c *space"], *, strength: float = 1.0, seed: int = 0, cond: Tensor | None = None
    ) -> Float[Tensor, "b c *space"]:
        """The healthy twin: the denoised scan, or what a vector or a memory can tell of it.

        A code map without memory can describe a lesion it has never seen; there the code is first drawn to the
        principal components of the training codes, as in the VAE. Between 0 and 1, `strength` is a share of the way
        (from the scan; from the reconstruction, for such a map). Nothing is random here, so `seed` has no effect.
        """
        if self.config.skips or self.config.memory or not isinstance(self.prior, CodeField):
            return x + strength * (self.reconstruct(x, cond) - x)
        code = self.encode(x, cond).mean
        healthy = self.prior.projected(code, class_indices(self.config, cond))
        return self.decode(code + strength * (healthy - code), cond).mean

    @torch.no_grad()
    def uncertainty_map(
        self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None
    ) -> Float[Tensor, "b c *space"]:
        """Standard deviation that is predicted for the error at each voxel, on grey values.

        Raises:
            CapabilityError: the config has no uncertainty.
        """
        if not self.config.uncertainty:
            raise CapabilityError("This autoencoder predicts no uncertainty. Train one with model.uncertainty=true.")
        return self.decode(self.encode(x, cond).mean, cond).stddev


__all__ = ["Autoencoder"]
