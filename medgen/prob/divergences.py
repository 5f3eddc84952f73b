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


def mmd(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float[Tensor, ""]:
    """Squared maximum mean discrepancy between two samples, between 0 and 2; 0 where they are the same.

        MMD^2 = mean k(a, a') + mean k(b, b') - 2 mean k(a, b),    k(u, v) = exp(-|u - v|^2 / (2 d))

    Gretton et al. 2012, "A kernel two-sample test", equation 5; the kernel's width is that of N(0, 1) in d dimensions.
    """

    def likeness(u: Tensor, v: Tensor) -> Tensor:
        away = (u[:, None] - v[None]).square().sum(2)
        return torch.exp(-away / (2 * u.shape[1])).mean()

    return likeness(a, a) + likeness(b, b) - 2 * likeness(a, b)


def activity(codes: Float[Tensor, "n latent *positions"]) -> Float[Tensor, " latent"]:
    """Variance over scans of posterior means, the mean of it over positions; a unit above 0.01 is active.

    Burda et al. 2016, "Importance weighted autoencoders", section 5.2.

    Args:
        codes: posterior means of n scans.
    """
    if len(codes) < 2:
        return codes.new_zeros(codes.shape[1])
    return codes.flatten(2).var(0).mean(1) if codes.ndim > 2 else codes.var(0)


__all__ = ["activity", "kl_to_standard_normal", "mmd", "with_free_bits"]
