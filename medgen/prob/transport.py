"""Which noise goes with which scan."""

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def optimal_assignment(
    noise: Float[Tensor, "b *event"], scans: Float[Tensor, "b *event"], cond: Float[Tensor, "b numbers"] | None = None
) -> Int[Tensor, " b"]:
    """For each scan the row of noise it goes with, so that squared distances add up to the least.

    Only scans of equal condition exchange noise; else noise would tell of the condition, and sampling, which draws
    it regardless, would be wrong (Cheng & Schwing 2025, "The curse of conditions").
    """
    cost = torch.cdist(scans.flatten(1), noise.flatten(1)).square()
    if cond is not None:
        same = (cond[:, None] == cond[None]).all(-1)
        cost = torch.where(same, cost, (len(cost) + 1) * cost.max() + 1)
    return torch.as_tensor(linear_sum_assignment(cost.cpu().double().numpy())[1], device=noise.device)


__all__ = ["optimal_assignment"]
