"""p(x | z): what a decoder's output says about the voxels, as a distribution over (c, *space)."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, Independent, Laplace, Normal, constraints
from torch.nn import functional

from medgen.prob.dequantisation import rounded

LikelihoodName = Literal["gaussian", "laplace", "bernoulli", "discretised-logistic"]
# Below this the density of a constant region would grow without bound.
_LEAST_LOG_SCALE = -6.0


class DiscretisedLogistic(Distribution):
    """Logistic noise seen through rounding to `levels` grey values on [0, 1], in nats per voxel.

    P(x) = F(x + w/2) - F(x - w/2) with bin width w = 1 / (levels - 1), the two edge bins taking
    the tails (Salimans et al. 2017, PixelCNN++, equation 2).

    Args:
        mean: (b, c, *space), on [0, 1].
        scale: broadcastable to mean, positive.
        levels: grey values, 256 for 8 bit.
    """

    arg_constraints = {"mean": constraints.real, "scale": constraints.positive}  # noqa: RUF012  # pyright: ignore[reportAssignmentType]
    support = constraints.unit_interval  # pyright: ignore[reportAssignmentType]

    def __init__(self, mean: Tensor, scale: Tensor, levels: int = 256) -> None:
        self._mean, self.scale, self.levels = mean, scale.expand_as(mean), levels
        super().__init__(mean.shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """The centre of the logistic."""
        return self._mean

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of the grey value nearest to `value`, elementwise, nats."""
        half = 0.5 / (self.levels - 1)
        value = rounded(value.clamp(0, 1) * (self.levels - 1)) / (self.levels - 1)
        upper = (value + half - self._mean) / self.scale
        lower = (value - half - self._mean) / self.scale
        lowest = functional.logsigmoid(upper)
        highest = functional.logsigmoid(-lower)
        # log(F(u) - F(l)) without cancellation: log F(u) + log F(-l) + log(1 - exp(l - u)).
        inner = lowest + highest + torch.log(-torch.expm1(lower - upper))
        return torch.where(value < half, lowest, torch.where(value > 1 - half, highest, inner))

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """A grey value, on [0, 1]."""
        uniform = torch.rand(self._extended_shape(sample_shape)).clamp(1e-6, 1 - 1e-6).to(self._mean)
        drawn = (self._mean + self.scale * torch.logit(uniform)).clamp(0, 1)
        return torch.round(drawn * (self.levels - 1)) / (self.levels - 1)


def likelihood(
    kind: LikelihoodName,
    output: Float[Tensor, "b c *space"],
    log_scale: Float[Tensor, " c"] | Float[Tensor, "b c *space"],
) -> Independent:
    """p(x | z) of a decoder's `output`, one event an image, log density in nats.

    Args:
        kind: which noise.
        output: the decoder's last layer; the mean (Bernoulli: the logit).
        log_scale: a learned log sigma for each channel (Rybkin et al. 2021, "Simple and effective VAE
            training with calibrated decoders"), or each voxel; Bernoulli has none.
    """
    event_dims = output.ndim - 1
    scale = log_scale.clamp(min=_LEAST_LOG_SCALE).exp()
    scale = scale.reshape(1, -1, *[1] * (event_dims - 1)) if scale.ndim == 1 else scale
    if kind == "bernoulli":
        return Independent(Bernoulli(logits=output, validate_args=False), event_dims, validate_args=False)
    noise = {"gaussian": Normal, "laplace": Laplace}.get(kind)
    if noise:
        return Independent(noise(output, scale.expand_as(output), validate_args=False), event_dims, validate_args=False)
    return Independent(DiscretisedLogistic(output, scale), event_dims, validate_args=False)


def best_log_scale(kind: LikelihoodName, x: Float[Tensor, "b c *space"], mean: Tensor) -> Float[Tensor, " c"]:
    """The log scale per channel that maximises the likelihood of `x` about `mean`, in closed form.

    Gaussian: the root mean square error; Laplace: the mean absolute error; logistic: the scale of
    equal variance, rms * sqrt(3) / pi.
    """
    error = (x - mean).movedim(1, 0).flatten(1)
    if kind == "laplace":
        return error.abs().mean(1).clamp(min=1e-6).log()
    rms = error.square().mean(1).sqrt().clamp(min=1e-6)
    return (rms * (3**0.5 / torch.pi) if kind == "discretised-logistic" else rms).log()


__all__ = ["DiscretisedLogistic", "LikelihoodName", "best_log_scale", "likelihood"]
