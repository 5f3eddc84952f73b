"""Divergences between distributions, in nats."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Independent


def kl_to_standard_normal(posterior: Independent) -> Float[Tensor, "b *latent"]:
    """KL(q || N(0, 1)) of a factorised Gaussian posterior, per latent dimension, nats.

    KL = (mu^2 + sigma^2 - 1) / 2 - log sigma (Kingma & Welling 2014, appendix B).
    """
    base = posterior.base_dist
    return 0.5 * (base.loc.square() + base.scale.square() - 1) - base.scale.log()


def with_free_bits(kl: Float[Tensor, "b *latent"], free_bits: float) -> Float[Tensor, " b"]:
    """Sum over latent dimensions where each costs at least `free_bits` nats.

    Dimensions below the floor get no gradient towards collapse (Kingma et al. 2016, IAF, eq. 15).
    """
    return torch.clamp(kl, min=free_bits).flatten(1).sum(1)


__all__ = ["kl_to_standard_normal", "with_free_bits"]
