"""P(grey value | parameters): what a network's output says about one whole number, voxel by voxel.

    categorical:       P(v) = softmax(l)_v, a number for every grey value (van den Oord et al. 2016, "Pixel recurrent
                       neural networks", section 2.2); nothing is known of grey values being ordered
    logistic mixture:  P(v) = sum_k w_k [F((v + w/2 - m_k) / s_k) - F((v - w/2 - m_k) / s_k)], F the sigmoid, the two
                       edge bins taking the tails (Salimans et al. 2017, "PixelCNN++", equation 2)

Either sums to one over the 2^bits grey values, exactly. Grey values are told on [0, 1].
"""

from dataclasses import dataclass
from math import log
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from medgen.prob.likelihoods import DiscretisedLogistic

LevelsName = Literal["logistic-mixture", "categorical"]


@dataclass(frozen=True)
class GreyValues:
    """A distribution over grey values from a network's output.

    Args:
        kind: 'logistic-mixture' or 'categorical'.
        bits: there are 2^bits grey values.
        components: logistics in the mixture.

    Example:
        >>> grey = GreyValues("logistic-mixture", bits=8, components=3)
        >>> grey.log_prob(torch.zeros(2, grey.width, 5, 5), torch.rand(2, 5, 5)).shape
        torch.Size([2, 5, 5])
    """

    kind: LevelsName
    bits: int
    components: int = 10

    @property
    def levels(self) -> int:
        """How many grey values there are."""
        return 2**self.bits

    @property
    def width(self) -> int:
        """How many numbers a voxel's distribution takes."""
        return self.levels if self.kind == "categorical" else 3 * self.components

    def start(self, x: Float[Tensor, "n m"]) -> Float[Tensor, "width m"]:
        """Where outputs best begin for `m` places, of which `n` grey values are known: about their spread."""
        if self.kind == "categorical":
            counts = torch.bincount((x.clamp(0, 1) * (self.levels - 1)).round().long().flatten(), minlength=self.levels)
            chances = (counts + 1.0) / (counts + 1.0).sum()
            return chances.log()[:, None].expand(-1, x.shape[1]).to(x)
        mean, sd = x.mean(0), x.var(0, correction=0).sqrt() + 2 / self.levels
        apart = torch.special.ndtri((torch.arange(self.components) + 0.5) / self.components).to(x)
        means = mean + apart[:, None] * sd
        return torch.cat([torch.zeros_like(means), means, (sd / self.components).log().expand_as(means)])

    def log_prob(
        self, output: Float[Tensor, "b width *where"], x: Float[Tensor, "b *where"]
    ) -> Float[Tensor, "b *where"]:
        """Log probability of the grey values nearest to `x`, nats."""
        output = output.float()
        if self.kind == "categorical":
            chosen = (x.clamp(0, 1) * (self.levels - 1)).round().long()
            return torch.log_softmax(output, 1).gather(1, chosen[:, None])[:, 0]
        weights, means, log_scales = self._parts(output)
        each = DiscretisedLogistic(means, log_scales.exp(), self.levels).log_prob(x[:, None])
        return torch.logsumexp(torch.log_softmax(weights, 1) + each, 1)

    def draw(
        self, output: Float[Tensor, "b width *where"], u: Float[Tensor, "b 2 *where"]
    ) -> Float[Tensor, "b *where"]:
        """Grey values on [0, 1] from uniform noise on (0, 1)."""
        output = output.float()
        logits = output if self.kind == "categorical" else output[:, : self.components]
        below = torch.softmax(logits.double(), 1).cumsum(1)
        chosen = (below < u[:, :1]).sum(1, keepdim=True).clamp(max=logits.shape[1] - 1)
        if self.kind == "categorical":
            return chosen[:, 0].to(output) / (self.levels - 1)
        _, means, log_scales = self._parts(output)
        mean, scale = means.gather(1, chosen)[:, 0], log_scales.gather(1, chosen)[:, 0].exp()
        drawn = (mean + scale * torch.logit(u[:, 1].double()).to(mean)).clamp(0, 1)
        return torch.round(drawn * (self.levels - 1)) / (self.levels - 1)

    def _parts(self, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights, means, log_scales = output.split(self.components, 1)
        # Narrower than this a logistic is as certain of one grey value as numbers can tell.
        return weights, means, log_scales.clamp(min=-self.bits * log(2) - 2.5, max=5.0)


__all__ = ["GreyValues", "LevelsName"]
