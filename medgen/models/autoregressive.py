"""Autoregressive densities: one grey value after another, in two and three dimensions, each exactly.

    log P(x) = sum_i log P(x_i | x_1, ..., x_{i-1})

over voxels in raster order (the last axis fastest) and the channels of a voxel in turn. Training sees all voxels at
once, as the networks are masked; sampling takes a step a voxel, of which each network repeats as little as it can.

    gated         gated PixelCNN (van den Oord et al. 2016b, "Conditional image generation with PixelCNN decoders")
    pixelcnnpp    residual stacks with halvings, skips and dropout (Salimans et al. 2017, "PixelCNN++")
    rowlstm       a recurrence over rows or slices (van den Oord et al. 2016a, "Pixel recurrent neural networks")
    wavenet       stacks with dilated causal convolutions over rows or slices (van den Oord et al. 2016c, "WaveNet")
    masked-mlp    a masked perceptron (Germain et al. 2015, "MADE"); with a binary code c of its own

        log P(x) >= E_q(c|x) [ log P(x | c) + log P(c) ] + H(q(c | x))

    both P autoregressive (Gregor et al. 2014, "Deep autoregressive networks"), with straight-through gradients
    (Bengio et al. 2013, "Estimating or propagating gradients through stochastic neurons"). That is a bound.

Grey values are whole numbers, and so are the probabilities' arguments: bits a dimension are -log_prob / (dims * log 2).
"""

from itertools import product
from math import prod
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent
from torch.nn import functional

from medgen.data.dataset import Batch
from medgen.errors import CapabilityError, DataError
from medgen.models.abilities import Ability
from medgen.models.base import ConditionedConfig, Loss, Model, ModelConfig, conditional
from medgen.nets.blocks import ConditionBias
from medgen.nets.causal import CausalStack, Style
from medgen.nets.conditioner import Guide
from medgen.nets.masked import MaskedMLP
from medgen.nets.raster import RasterMLP, RasterNet
from medgen.nets.rowlstm import RowLSTM
from medgen.nets.told import require_context
from medgen.prob.dequantisation import grey
from medgen.prob.levels import GreyValues, LevelsName
from medgen.seeds import derived_seed, seeded_noise, voxel_uniform

# Scans sampled together.
_MICRO_BATCH = {2: 16, 3: 4}
# Channels of the feature map that convolutions are told besides the scan.
_GUIDE = 16


class Autoregressive(Model):
    """An autoregressive density; every variation is a field of its config.

    Example:
        >>> model = Autoregressive(Autoregressive.Config(shape=(6, 6), width=8, depth=2))
        >>> model.sample(3, seed=0).shape
        torch.Size([3, 1, 6, 6])
    """

    class Config(ConditionedConfig):
        """An autoregressive density.

        Args:
            kind: 'autoregressive'.
            network: 'gated', 'pixelcnnpp', 'rowlstm', 'wavenet' or 'masked-mlp'.
            output: 'logistic-mixture', or 'categorical' (a number a grey value; with one bit a Bernoulli).
            components: logistics in a mixture.
            width: features a stack, of a row's state, or hidden units.
            depth: blocks a stack (with levels: each way, a level), LSTM or hidden layers.
            kernel: width of convolutions.
            levels: halvings of the stacks of 'pixelcnnpp', 'gated' and 'wavenet'.
            dropout: part of the features dropped in training.
            position: learn a feature vector for each place, at most so many along an axis, interpolated between; for
                scans that lie alike. 0 for none; a masked MLP knows places anyway.
            binary_code: stochastic binary units of a 'masked-mlp'; 0 for none. With them the density is a bound.
            bits: grey values are whole numbers of so many bits.
            candidates: fillings of a hole that are drawn, of which one is kept by how the rest of the scan follows.
        """

        kind: Literal["autoregressive"] = "autoregressive"
        network: Literal["gated", "pixelcnnpp", "rowlstm", "wavenet", "masked-mlp"] = "gated"
        output: LevelsName = "logistic-mixture"
        components: int = Field(default=5, ge=1, le=100)
        width: int = Field(default=32, ge=1)
        depth: int = Field(default=6, ge=1, le=64)
        kernel: int = Field(default=3, ge=3, le=15)
        levels: int = Field(default=0, ge=0, le=8)
        dropout: float = Field(default=0.0, ge=0, lt=1)
        position: int = Field(default=0, ge=0, le=256)
        binary_code: int = Field(default=0, ge=0)
        bits: int = Field(default=8, ge=1, le=16)
        candidates: int = Field(default=8, ge=1, le=256)

        @model_validator(mode="after")
        def _fits(self) -> "Autoregressive.Config":
            if self.kernel % 2 == 0:
                raise ValueError(f"kernel must be odd, not {self.kernel}")
            if self.binary_code and self.network != "masked-mlp":
                raise ValueError(f"binary_code is for the network 'masked-mlp', not {self.network!r}")
            if self.output == "categorical" and self.bits > 8:
                raise ValueError(f"a categorical output takes 8 bits at most, not {self.bits}; use a logistic-mixture")
            return self

    config: "Autoregressive.Config"

    def __init__(self, config: "Autoregressive.Config") -> None:
        super().__init__()
        self.config = config
        self.grey = GreyValues(config.output, config.bits, config.components)
        self.net = _network(config, self.grey.width)
        self.code = _Code(config) if config.binary_code else None

    @classmethod
    def abilities(cls, config: ModelConfig) -> frozenset[Ability]:
        """Samples, maps its density, exact or (with a binary code) a bound, and fills holes."""
        assert isinstance(config, Autoregressive.Config)
        if config.binary_code:
            return conditional(config, {"samples", "encodes", "bounds_density", "maps_density"})
        return conditional(config, {"samples", "scores_density", "maps_density", "inpaints"})

    # -- training ------------------------------------------------------------------------------------

    def initialise(self, batch: Batch) -> None:
        """Outputs begin at how grey values are spread; those of a masked MLP at how they are at each voxel."""
        if isinstance(self.net, RasterMLP):
            rows = batch.x.flatten(2).transpose(1, 2).flatten(1)
            self.net.start(self.grey.start(rows))
        else:
            self.net.start(self.grey.start(batch.x.transpose(1, -1).flatten(0, -2)))

    def forward(self, batch: Batch, player: str = "model") -> Loss:
        """The negative log probability, or with a code that of its bound, nats a scan."""
        x = self._rounded(batch.x)
        if self.code is None:
            found = self._voxels(x, batch.cond, batch.context, None)
            return Loss(-found, {"voxels": -found})
        chances = self.code.encode(x, batch.cond)
        code = self.code.straight_through(chances, torch.rand_like(chances))
        distortion = -self._voxels(x, batch.cond, batch.context, code)
        rate = self.code.rate(chances, code, batch.cond)
        return Loss(distortion + rate, {"distortion": distortion, "rate": rate})

    def _voxels(
        self, x: Tensor, cond: Tensor | None, context: Tensor | None, code: Tensor | None
    ) -> Float[Tensor, " b"]:
        return self._channels(x, cond, context, code).flatten(1).sum(1)

    def _channels(
        self, x: Tensor, cond: Tensor | None, context: Tensor | None, code: Tensor | None
    ) -> Float[Tensor, "b c *space"]:
        """log P of every channel of every voxel, given what is before it."""
        known = {} if code is None else {"code": code}
        output = self.net(x, cond, context, **known)
        return self.grey.log_prob(output.flatten(0, 1), x.flatten(0, 1)).reshape(x.shape)

    def _rounded(self, x: Tensor) -> Tensor:
        """Scans of this config's size, in whole grey values on [0, 1].

        Raises:
            DataError: they are of another size.
        """
        expected, found = (self.config.channels, *self.config.shape), tuple(x.shape[1:])
        if found != expected:
            raise DataError(f"This model takes scans {expected}, channels first; found {found}. Crop or pad them.")
        return grey(x, self.config.bits) / (self.grey.levels - 1)

    # -- density -------------------------------------------------------------------------------------

    def log_prob(
        self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None, context: Tensor | None = None
    ) -> Float[Tensor, " b"]:
        """The exact log probability of the scan's grey values, nats.

        Raises:
            CapabilityError: there is a binary code, so that there is a bound (`elbo`) only.
        """
        if self.code is not None:
            raise CapabilityError("With a binary code an autoregressive model bounds its density: ask for elbo(x).")
        return self.log_prob_map(x, cond, context).flatten(1).sum(1)

    def elbo(
        self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None, context: Tensor | None = None
    ) -> Float[Tensor, " b"]:
        """A lower bound of the log probability, nats, by one draw of the code, with the same noise every time.

        Raises:
            CapabilityError: there is no binary code, so that there is an exact density (`log_prob`).
        """
        if self.code is None:
            raise CapabilityError("Without a binary code this density is exact: ask for log_prob(x).")
        return self.log_prob_map(x, cond, context).flatten(1).sum(1)

    @torch.no_grad()
    def log_prob_map(
        self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None, context: Tensor | None = None
    ) -> Float[Tensor, "b 1 *space"]:
        """log P of each voxel given those before it, nats; what a code costs is shared by all."""
        require_context(context, self.config.context, self.config.shape)
        x = self._rounded(x)
        if self.code is None:
            return self._channels(x, cond, context, None).sum(1, keepdim=True)
        chances = self.code.encode(x, cond)
        u = voxel_uniform((chances.shape[1],), seed=0).to(chances)
        code = (u < chances).to(chances)
        rate = self.code.rate(chances, code, cond).reshape(-1, *[1] * (x.ndim - 1))
        return self._channels(x, cond, context, code).sum(1, keepdim=True) - rate / prod(self.config.shape)

    def encode(self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None) -> Independent:
        """q(c | x), independent bits.

        Raises:
            CapabilityError: there is no binary code.
        """
        if self.code is None:
            raise CapabilityError("This autoregressive model has no code. Set model.binary_code, of a 'masked-mlp'.")
        return Independent(Bernoulli(self.code.encode(self._rounded(x), cond), validate_args=False), 1)

    # -- sampling ------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self, n: int, *, seed: int, cond: Tensor | None = None, context: Tensor | None = None
    ) -> Float[Tensor, "n c *space"]:
        """`n` scans, voxel after voxel."""
        config, device = self.config, self.device
        require_context(context, config.context, config.shape)
        size = _MICRO_BATCH[config.dims]

        def draw(first: int, told: Tensor | None, seen: Tensor | None) -> Tensor:
            known = {}
            if self.code is not None:
                bits = _uniform((size, config.binary_code, 1), seed, 2, first).to(device)
                known["code"] = self.code.sample(bits, told)
            walk = self.net.walk(config.shape, size, told, seen, **known)
            x = torch.zeros(size, config.channels, *config.shape, device=device)
            return self._walked(walk, x, _uniform((size, 2, *x.shape[1:]), seed, 1, first).to(device))

        return self.in_micro_batches(n, size, draw, cond, context)

    def _walked(self, walk: Any, x: Tensor, u: Tensor, hole: Tensor | None = None) -> Tensor:
        """`x` with its voxels drawn in turn, from `u` (b, 2, c, *space); those of `hole` (*space) alone where given."""
        begin, end = 0, x.shape[2]
        if hole is not None:
            rows = hole.flatten(1).any(1).nonzero().flatten().tolist()
            begin, end = rows[0], rows[-1] + 1
            walk.fill(x)
        for index in product(range(begin, end), *[range(size) for size in x.shape[3:]]):
            here = (slice(None), slice(None), *index)
            values = x[here]
            if hole is None or bool(hole[index]):
                for k in range(x.shape[1]):
                    output = walk.at(index, values[:, :k])
                    values[:, k] = self.grey.draw(output, u[(slice(None), slice(None), k, *index)])
            else:
                walk.at(index, values[:, :0])
            walk.put(index, values)
        return x

    @torch.no_grad()
    def inpaint(
        self, x: Float[Tensor, "b c *space"], hole: Bool[Tensor, "b 1 *space"], *, seed: int,
        cond: Tensor | None = None, context: Tensor | None = None,
    ) -> Float[Tensor, "b c *space"]:  # fmt: skip
        """`x` with the voxels of `hole` drawn given those before them, chosen by how well those after them follow.

        Of `candidates` fillings drawn in raster order one is kept, with chances in proportion to the probability of
        the known voxels given what is before each (sampling-importance-resampling, Rubin 1988): from p(hole | rest)
        itself as candidates grow in number. The other voxels are returned as they are.

        Raises:
            CapabilityError: there is a binary code, whose posterior under a hole is not known.
        """
        if self.code is not None:
            raise CapabilityError("With a binary code an autoregressive model fills no holes. Set model.binary_code=0.")
        require_context(context, self.config.context, self.config.shape)
        levels, count, filled = self._rounded(x), self.config.candidates, x.clone()
        for i in range(len(x)):
            where = hole[i, 0]
            if not bool(where.any()):
                continue
            known = torch.where(where, 0, levels[i])
            told = [None if g is None else g[i : i + 1].expand(count, *g.shape[1:]) for g in (cond, context)]
            # Everything behind the hole's first row is told anew as the walk goes on.
            u = _uniform((count, 2, *levels.shape[1:]), derived_seed(seed, i), 3, 0).to(x.device)
            walk = self.net.walk(self.config.shape, count, told[0], told[1])
            drawn = self._walked(walk, known.expand(count, *known.shape).clone(), u, where.cpu())
            after = (self._channels(drawn, told[0], told[1], None) * ~where).flatten(1).sum(1)
            pick = _uniform((1, 1), derived_seed(seed, i), 4, 0).to(x.device)
            chosen = int((after.double().softmax(0).cumsum(0) < pick[0]).sum().clamp(max=count - 1))
            filled[i] = torch.where(where, drawn[chosen], x[i])
        return filled


class _Code(nn.Module):
    """A binary code: q(c | x), independent bits; p(c), autoregressive."""

    def __init__(self, config: Autoregressive.Config) -> None:
        super().__init__()
        voxels, bits, numbers = config.channels * prod(config.shape), config.binary_code, config.condition_width
        self.enter = nn.Linear(voxels, config.width)
        self.condition = ConditionBias(numbers, config.width)
        self.leave = nn.Sequential(nn.SiLU(), nn.Linear(config.width, bits))
        self.prior = MaskedMLP(bits, 1, config.width, 1, conditions=numbers)

    def encode(self, x: Tensor, cond: Tensor | None) -> Float[Tensor, "b bits"]:
        """The chance of a 1."""
        hidden = self.condition(self.enter(2 * x.flatten(1) - 1), cond)
        return torch.sigmoid(self.leave(hidden).float()).clamp(1e-4, 1 - 1e-4)

    def straight_through(self, chances: Tensor, u: Tensor) -> Float[Tensor, "b bits"]:
        """Bits drawn, whose gradient is that of their chances."""
        return (u < chances).to(chances) + chances - chances.detach()

    def rate(self, chances: Tensor, code: Tensor, cond: Tensor | None) -> Float[Tensor, " b"]:
        """What a code costs, nats: -log p(c) - H(q), the entropy in closed form."""
        entropy = functional.binary_cross_entropy(chances, chances, reduction="none").sum(1)
        logits = self.prior(2 * code - 1, cond)[..., 0].float()
        log_prior = code * functional.logsigmoid(logits) + (1 - code) * functional.logsigmoid(-logits)
        return -log_prior.sum(1) - entropy

    def sample(self, u: Float[Tensor, "b bits 1"], cond: Tensor | None) -> Float[Tensor, "b bits"]:
        """Codes from p(c)."""
        code, walk = torch.zeros(u.shape[:2], device=u.device), self.prior.walk(len(u), cond)
        for place in range(code.shape[1]):
            code[:, place] = (u[:, place] < torch.sigmoid(walk.at(place))).float()[:, 0]
            walk.put(place, 2 * code[:, place] - 1)
        return code


# -- parts -----------------------------------------------------------------------------------------


def _network(config: Autoregressive.Config, outside: int) -> RasterMLP | RasterNet:
    dims, channels, width, depth = config.dims, config.channels, config.width, config.depth
    numbers, context = config.condition_width, config.context
    if config.network == "masked-mlp":
        return RasterMLP(
            (channels, *config.shape), outside, width, depth, conditions=numbers, told=config.binary_code,
            context=context, dropout=config.dropout,
        )  # fmt: skip
    guide = None
    if numbers or context or config.position:
        guide = Guide(dims, _GUIDE, numbers=numbers, seen=context, extent=config.shape, places=config.position)
    given, entering = _GUIDE if guide else 0, RasterNet.inside(dims, channels)
    leaving = outside if channels == 1 else width
    if config.network == "rowlstm":
        more = {"kernel": config.kernel, "given": given, "dropout": config.dropout}
        body = RowLSTM(dims, entering, leaving, width, depth, **more)
    else:
        doubling = tuple(2**k for k in range(16) if 2**k < config.shape[0])
        style = Style(
            "resnet" if config.network == "pixelcnnpp" else "gated", config.kernel, config.dropout, config.levels,
            dilations=(doubling or (1,)) if config.network == "wavenet" else (1,),
        )  # fmt: skip
        body = CausalStack(dims, entering, leaving, width, depth, given=given, style=style)
    return RasterNet(body, guide, channels=channels, outside=outside, width=width)


def _uniform(shape: tuple[int, ...], seed: int, stream: int, first: int) -> Tensor:
    """Noise on (0, 1), whose row i depends on (seed, stream, first + i) alone."""
    return torch.special.ndtr(seeded_noise(shape, seed=derived_seed(seed, stream), first=first).double())


__all__ = ["Autoregressive"]
