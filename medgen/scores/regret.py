"""Likelihood regret: how much better a VAE could have read a scan than its encoder did."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.distributions import Independent, Normal

from medgen.data.dataset import Batch
from medgen.errors import CapabilityError
from medgen.models.abilities import Ability
from medgen.models.base import can
from medgen.scores.base import Found, Known, Models, Score, best_class
from medgen.seeds import derived_seed, seeded_noise

# Draws of the code by which a bound is told before and after.
_DRAWS = 8


class Regret(Score):
    """What the evidence lower bound gains when q(z | x) is fitted to the scan itself, nats a voxel and channel.

        max over (mean, sd) of ELBO(x; N(mean, sd^2))  -  ELBO(x; q(z | x))

    The encoder reads scans like the training scans nearly as well as can be; of others it makes less than the decoder
    could. Xiao et al. 2020, "Likelihood regret: an out-of-distribution detection score for variational auto-encoder",
    equation 7. Takes `steps` gradients a scan.

    Args:
        do: 'regret'.
        steps: of Adam.
        rate: its learning rate, in standard deviations of the prior.
    """

    do: Literal["regret"] = "regret"
    steps: int = Field(default=50, ge=1)
    rate: float = Field(default=0.02, gt=0)

    @property
    def needs(self) -> tuple[Ability, ...]:
        """A bound; besides, a code and the way back from it."""
        return ("bounds_density",)

    def check(self, models: Models) -> None:
        """Refuse models that are no variational autoencoders.

        Raises:
            CapabilityError: the model has no bound, no code, or does not tell what a code costs.
        """
        super().check(models)
        model = models[self.of]
        if not (can(model, "encodes") and can(model, "decodes") and hasattr(model, "rate")):
            raise CapabilityError(
                f"The score 'regret' fits a posterior over codes, as vae and hvae have; {model.config.kind} has none."
            )

    def __call__(self, models: Models, batch: Batch, known: Known) -> Found:
        """The regret of the class that suits each scan best."""
        model: Any = models[self.of]
        return best_class(model, batch.to(model.device), lambda told: self._found(model, told))

    def _found(self, model: Any, batch: Batch) -> Found:
        x, cond = batch.x, batch.cond
        with torch.no_grad():
            first = model.encode(x, cond)
        start = first.mean, first.stddev.clamp(min=1e-6).log()
        parameters = [part.detach().clone().requires_grad_() for part in start]
        optimiser = torch.optim.Adam(parameters, self.rate)
        with torch.enable_grad():
            for step in range(self.steps):
                total = -_bound(model, x, cond, parameters, draw=_DRAWS + step).sum()
                for parameter, slope in zip(parameters, torch.autograd.grad(total, parameters), strict=True):
                    parameter.grad = slope
                optimiser.step()
        with torch.no_grad():
            after, before = (
                torch.stack([_bound(model, x, cond, each, draw=draw) for draw in range(_DRAWS)]).mean(0)
                for each in (parameters, start)
            )
        return Found((after - before)[:, None] / x[0].numel())


def _bound(model: Any, x: Tensor, cond: Tensor | None, told: Any, *, draw: int) -> Float[Tensor, " b"]:
    """The evidence lower bound under N(mean, exp(log sd)^2) by one draw, whose noise is the same for all scans."""
    mean, log_spread = told
    posterior = Independent(Normal(mean, log_spread.exp(), validate_args=False), mean.ndim - 1)
    z = mean + log_spread.exp() * seeded_noise((1, *mean.shape[1:]), seed=derived_seed(0, draw)).to(mean)
    return model.decode(z, cond).log_prob(x) - model.rate(posterior, z, cond)


__all__ = ["Regret"]
