"""A memory of prototype codes: what is not like any of them cannot be put together from them.

Gong et al. 2019, "Memorizing normality to detect anomaly: memory-augmented deep autoencoder for unsupervised anomaly
detection".
"""

from math import log

import torch
from jaxtyping import Float
from torch import Tensor, nn

# Sharpness of the addresses at the start: the softmax of bare cosines cannot tell one item from its neighbours.
_SHARPNESS = 10.0


class Memory(nn.Module):
    """Replaces a code by a sparse mixture of `items` learned ones.

        w_i = softmax_i( s cos(z, m_i) ),    v_i = w_i where w_i > 1 / items, else 0,    z' = sum_i v_i m_i / sum_i v_i

    Equations 3 to 7, with the least threshold of the paper and a learned sharpness s in place of 1.

    Args:
        items: how many codes are kept.
        size: numbers of a code.

    Example:
        >>> memory = Memory(items=20, size=4)
        >>> read, address = memory(torch.randn(3, 4))
        >>> bool((address.sum(-1) - 1).abs().max() < 1e-5)
        True
    """

    def __init__(self, items: int, size: int) -> None:
        super().__init__()
        self.items = nn.Parameter(torch.randn(items, size))
        self.log_sharpness = nn.Parameter(torch.tensor(log(_SHARPNESS)))

    def forward(self, codes: Float[Tensor, "*rows d"]) -> tuple[Float[Tensor, "*rows d"], Float[Tensor, "*rows items"]]:
        """What the memory makes of the codes, and the share of each item in it; shares sum to 1."""
        address = self.address(codes)
        return address @ self.items, address

    def address(self, codes: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows items"]:
        """The share of each item; most are exactly 0."""
        near = nn.functional.normalize(codes, dim=-1) @ nn.functional.normalize(self.items, dim=-1).T
        weights = (self.log_sharpness.exp() * near).softmax(-1)
        # The largest is never below the mean; it stays where all are equal.
        least = torch.minimum(torch.tensor(1 / weights.shape[-1]).to(weights), weights.amax(-1, keepdim=True))
        kept = weights * (weights >= least)
        return kept / kept.sum(-1, keepdim=True)


def address_entropy(address: Float[Tensor, "b *positions items"]) -> Float[Tensor, " b"]:
    """Entropy of the addresses, nats, mean over positions; the smaller, the sparser (equation 9)."""
    held = -(address * address.clamp(min=1e-12).log()).sum(-1)
    return held.flatten(1).mean(1) if held.ndim > 1 else held


__all__ = ["Memory", "address_entropy"]
