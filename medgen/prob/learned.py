"""Distributions over codes that are trained with what makes the codes: flows, mixtures and the VampPrior."""

from math import log, pi
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag
from torch import Tensor, nn
from torch.distributions import Independent
from zuko.flows import NSF

from medgen.prob.priors import principal_components
from medgen.seeds import derived_seed, seeded_noise


class FlowPrior(BaseModel):
    """p(z) as a flow.

    Args:
        kind: 'flow'; may be left out.
        steps: transforms of a vector (autoregressive splines), couplings of a map.
        width: features inside them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["flow"] = "flow"
    steps: int = Field(default=3, ge=1, le=64)
    width: int = Field(default=64, ge=1)


class VampPrior(BaseModel):
    """p(z) as the mixture of posteriors q(z | u_k) of learned pseudo-inputs (Tomczak & Welling 2018).

    Pseudo-inputs begin as random mixtures of what the scans have in common; nobody's scan is copied.

    Args:
        kind: 'vamp'.
        components: how many pseudo-inputs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["vamp"] = "vamp"
    components: int = Field(default=64, ge=1)


class MixturePrior(BaseModel):
    """p(z) as a mixture of factorised Gaussians.

    Args:
        kind: 'mixture'.
        components: how many.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["mixture"] = "mixture"
    components: int = Field(default=32, ge=1)


def _prior_kind(value: Any) -> str:
    """A prior without a kind is a flow."""
    return value.get("kind", "flow") if isinstance(value, dict) else getattr(value, "kind", "flow")


PriorConfig = Annotated[
    Annotated[FlowPrior, Tag("flow")] | Annotated[VampPrior, Tag("vamp")] | Annotated[MixturePrior, Tag("mixture")],
    Discriminator(_prior_kind),
]


class CodeSpline(nn.Module):
    """A neural spline flow over code vectors, autoregressive, told the condition (Durkan et al. 2019; zuko's).

    Args:
        size: numbers of a code.
        steps: transforms.
        width: features inside them.
        classes: of the numbers of a scan's condition, how many are classes.
        conditions: numbers of a scan's condition; 0 for none.
    """

    def __init__(self, size: int, *, steps: int, width: int, classes: int = 0, conditions: int = 0) -> None:
        super().__init__()
        self.classes, self.conditions = classes, conditions
        # Its masks need numbers: on the meta device, where bundles are checked, they cannot be made.
        with torch.device("cpu"):
            self.flow = NSF(size, context=conditions, transforms=steps, hidden_features=(width, width))

    def log_prob(self, z: Float[Tensor, "b size"], cond: Tensor | None = None) -> Float[Tensor, " b"]:
        """log p(z | y), nats."""
        with torch.autocast(z.device.type, enabled=False):
            return self.flow(self._told(cond, z)).log_prob(z)

    def draw(self, noise: Float[Tensor, "b size"], cond: Tensor | None = None) -> Float[Tensor, "b size"]:
        """Codes behind standard normal noise."""
        return self.flow(self._told(cond, noise)).transform.inv(noise)

    def _told(self, cond: Tensor | None, z: Tensor) -> Tensor | None:
        if not self.conditions:
            return None
        if cond is not None and cond.ndim == 2:
            return cond.to(z)
        told = z.new_zeros(len(z), self.conditions)
        if self.classes:  # of no known class: equally of each
            one = nn.functional.one_hot(cond, self.classes).to(z) if cond is not None else 1 / self.classes
            told[:, : self.classes] = one
        return told


class CodeMixture(nn.Module):
    """A mixture of factorised Gaussians over codes, whose weights may depend on what is known of a scan.

        p(z | y) = sum_k w_k(y) N(z; m_k, s_k^2),    w(y) = softmax(b + A y)

    The Gaussians are its own parameters (Jiang et al. 2017, "Variational deep embedding", equation 1), or given: the
    posteriors q(z | u_k) of learned pseudo-inputs make it the VampPrior (Tomczak & Welling 2018, "VAE with a
    VampPrior", equation 9), with equal weights at first.

    Args:
        size: numbers of a code.
        components: how many Gaussians.
        conditions: numbers of a scan's condition; 0 for none.
        given: whether the Gaussians are given with every call.

    Example:
        >>> CodeMixture(4, 10).log_prob(torch.zeros(3, 4)).shape
        torch.Size([3])
    """

    def __init__(self, size: int, components: int, *, conditions: int = 0, given: bool = False) -> None:
        super().__init__()
        self.means = None if given else nn.Parameter(torch.zeros(components, size))
        self.log_scales = None if given else nn.Parameter(torch.zeros(components, size))
        self.logits = nn.Parameter(torch.zeros(components))
        self.told = nn.Parameter(torch.zeros(conditions, components)) if conditions else None

    def start(self, codes: Float[Tensor, "n size"]) -> None:
        """Begin as Gaussians of the codes' spread whose means are drawn from the codes' mean and spread."""
        assert self.means is not None
        assert self.log_scales is not None
        mean, spread = codes.mean(0), codes.std(0, correction=0).clamp(min=1e-2)
        noise = seeded_noise(tuple(self.means.shape), seed=derived_seed(0, 3)).to(codes)
        with torch.no_grad():
            self.means.copy_(mean + spread * noise)
            self.log_scales.copy_(spread.log().expand_as(self.log_scales))

    def log_weights(self, cond: Tensor | None, count: int) -> Float[Tensor, "b k"]:
        """log w_k of `count` scans; nothing known of them leaves b alone."""
        logits = self.logits.expand(count, -1)
        if self.told is not None and cond is not None:
            logits = logits + (self.told[cond] if cond.ndim == 1 else cond.to(self.told) @ self.told)
        return logits.log_softmax(1)

    def log_prob(
        self, z: Float[Tensor, "b size"], cond: Tensor | None = None, given: Independent | None = None
    ) -> Float[Tensor, " b"]:
        """log p(z | y), nats.

        Args:
            z: codes.
            cond: class indices (b,), or rows (b, conditions).
            given: the Gaussians (k, size), where they are not the mixture's own.
        """
        means, scales = self._gaussians(given)
        away = (z[:, None] - means) / scales
        inside = -0.5 * away.square().sum(2) - scales.log().sum(1) - 0.5 * z.shape[1] * log(2 * pi)
        return (inside + self.log_weights(cond, len(z))).logsumexp(1)

    def draw(
        self,
        uniform: Float[Tensor, " n"],
        noise: Float[Tensor, "n size"],
        cond: Tensor | None = None,
        given: Independent | None = None,
    ) -> Float[Tensor, "n size"]:
        """The codes of noise on (0, 1), which chooses the Gaussian, and of standard normal noise."""
        means, scales = self._gaussians(given)
        below = self.log_weights(cond, len(noise)).exp().cumsum(1)
        chosen = (uniform[:, None].to(below) > below).sum(1).clamp(max=len(means) - 1)
        return means[chosen] + scales[chosen] * noise.to(means)

    def _gaussians(self, given: Independent | None) -> tuple[Float[Tensor, "k size"], Float[Tensor, "k size"]]:
        if given is not None:
            return given.mean.flatten(1), given.stddev.flatten(1)
        assert self.means is not None
        assert self.log_scales is not None
        return self.means, self.log_scales.clamp(-7, 3).exp()


def pseudo_inputs(scans: Float[Tensor, "n c *space"], count: int) -> Float[Tensor, "count c *space"]:
    """Scans of nobody to begin with: the mean plus Gaussian weights times the leading principal components.

    Means of many scans and random mixtures of what they share, so that nothing of one person's is kept by
    construction; each component's weight has the variance that the scans have along it.
    """
    mean = scans.mean(0, keepdim=True)
    pca = principal_components((scans - mean).flatten(1), max(1, min(32, len(scans) // 4)))
    weights = seeded_noise((count, len(pca.variances)), seed=derived_seed(0, 4)).to(scans) * pca.variances.sqrt()
    return mean + (weights @ pca.directions).reshape(count, *scans.shape[1:])


__all__ = [
    "CodeMixture", "CodeSpline", "FlowPrior", "MixturePrior", "PriorConfig", "VampPrior", "pseudo_inputs",
]  # fmt: skip
