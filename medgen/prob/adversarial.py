"""Adversarial losses: what a critic pays for its verdicts, what a generator pays for the critic's.

Verdicts r of real and g of generated scans are (b, p): one number a scan, or one a patch. Losses are (b,), the mean
over patches.

| name | critic | generator |
|---|---|---|
| non-saturating (Goodfellow et al. 2014) | s(-r) + s(g) | s(-g) |
| least-squares (Mao et al. 2017) | ((r - 1)^2 + g^2) / 2 | (g - 1)^2 / 2 |
| wasserstein (Arjovsky et al. 2017) | g - r | -g |
| hinge (Lim & Ye 2017) | max(0, 1 - r) + max(0, 1 + g) | -g |
| energy (Zhao et al. 2017), verdicts are energies | r + max(0, m - g) | g |
| relativistic pairing (Jolicoeur-Martineau 2019; Huang et al. 2024) | s(g - r) | s(r - g) |

with s(t) = log(1 + exp(t)).
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

AdversarialName = Literal["non-saturating", "least-squares", "wasserstein", "hinge", "energy", "relativistic"]


def critic_loss(
    kind: AdversarialName, real: Float[Tensor, "b p"], generated: Float[Tensor, "b p"], *, margin: float = 1.0
) -> Float[Tensor, " b"]:
    """What the critic pays.

    Args:
        kind: which loss.
        real, generated: verdicts.
        margin: m, up to which energies of generated scans are pushed.

    >>> critic_loss("hinge", torch.tensor([[2.0]]), torch.tensor([[-0.5]]))
    tensor([0.5000])
    """
    softplus = functional.softplus
    parts = {
        "non-saturating": lambda: softplus(-real) + softplus(generated),
        "least-squares": lambda: ((real - 1).square() + generated.square()) / 2,
        "wasserstein": lambda: generated - real,
        "hinge": lambda: functional.relu(1 - real) + functional.relu(1 + generated),
        "energy": lambda: real + functional.relu(margin - generated),
        "relativistic": lambda: softplus(generated - real),
    }
    return parts[kind]().mean(1)


def generator_loss(
    kind: AdversarialName, real: Float[Tensor, "b p"], generated: Float[Tensor, "b p"]
) -> Float[Tensor, " b"]:
    """What the generator pays; `real` counts in a relativistic loss only."""
    softplus = functional.softplus
    parts = {
        "non-saturating": lambda: softplus(-generated),
        "least-squares": lambda: (generated - 1).square() / 2,
        "wasserstein": lambda: -generated,
        "hinge": lambda: -generated,
        "energy": lambda: generated,
        "relativistic": lambda: softplus(real - generated),
    }
    return parts[kind]().mean(1)


def slope(judged: Callable[[list[Tensor]], Float[Tensor, "b p"]], scans: Sequence[Tensor]) -> Float[Tensor, " b"]:
    """|grad D(x)|^2 of each scan, differentiable: R1 on real scans, R2 on generated ones (Mescheder et al. 2018).

    Args:
        judged: from scans (at every size) to verdicts; the sum over patches is differentiated.
        scans: at every size (b, c, *space).
    """
    at = [scan.detach().float().requires_grad_() for scan in scans]
    found = torch.autograd.grad(judged(at).sum(), at, create_graph=True)
    return torch.stack([one.flatten(1).square().sum(1) for one in found]).sum(0)


def interpolated(real: Sequence[Tensor], generated: Sequence[Tensor]) -> list[Tensor]:
    """A random place between each pair of scans, the same at every size (Gulrajani et al. 2017, section 4)."""
    share = torch.rand(len(real[0]), device=real[0].device)
    between = []
    for one, other in zip(real, generated, strict=True):
        weight = share.reshape(-1, *[1] * (one.ndim - 1))
        between.append(torch.lerp(one, other, weight))
    return between


def alike(features: Float[Tensor, "b w"]) -> Float[Tensor, ""]:
    """The mean squared cosine of two scans' codes, which is to be low (Zhao et al. 2017, equation 5)."""
    unit = functional.normalize(features.float(), dim=1)
    count = len(unit)
    return ((unit @ unit.T).square().sum() - count) / max(1, count * (count - 1))


__all__ = ["AdversarialName", "alike", "critic_loss", "generator_loss", "interpolated", "slope"]
