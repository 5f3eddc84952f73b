"""Where a generator may begin: with draws of a Gaussian mixture of the training scans."""

from math import prod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from medgen.prob.mixtures import drawn
from medgen.prob.subspace import SubspaceMixture

# Principal components for each number of the code, and numbers that all of them may have together.
_COMPONENTS, _MOST_NUMBERS = 4, 2**23
# Variance of rounding to one of 256 grey levels, on the scale -1 to 1.
_ROUNDING = (2 / 255) ** 2 / 12


class MixtureStart(nn.Module):
    """The part of a generator that is fitted in closed form (`medgen.prob.subspace`) and stays as it is.

        G(z, y) = x + net(z, y, x),    x = m + U' (m_yk + L_yk z)

    with component k of class y drawn first. What a mixture of Gaussians cannot know is for the network to add, which
    sees x; without any training, scans are draws of the mixture.

    Args:
        shape: (c, *space).
        code: numbers of z that are the scan's code; further ones are detail.
        classes: how many; 0 counts as one.
        mixtures: Gaussians a class.
    """

    def __init__(self, shape: tuple[int, ...], code: int, classes: int, mixtures: int) -> None:
        super().__init__()
        self.shape, size = shape, prod(shape)
        rank = min(size, max(code, min(_COMPONENTS * code, _MOST_NUMBERS // size)))
        self.density = SubspaceMixture(size, rank=rank, components=mixtures, lead=code, classes=max(1, classes))
        self.code = min(code, rank)
        # Normal numbers besides the code: of the other components, and one that chooses the Gaussian.
        self.draws = rank - self.code + 1

    def forward(
        self, code: Float[Tensor, "b k"], detail: Float[Tensor, "b m"], classes: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c *space"]:
        """Scans on the scale -1 to 1; without numbers in `detail` of the likeliest Gaussian and without detail."""
        density, mixture = self.density, self.density.mixture
        detail = detail if detail.shape[1] else detail.new_zeros(len(code), self.draws)
        weights = mixture.weights[classes]
        chance = torch.special.ndtr(detail[:, -1].double())
        component = drawn(weights, chance) if detail[:, -1].any() else weights.argmax(1)
        noise = torch.cat([code[:, : self.code], detail[:, :-1]], 1)
        turned = torch.einsum("bij,bj->bi", mixture.factors[classes, component], noise)
        placed = mixture.means[classes, component] + turned
        return (density.centre + placed @ density.directions).reshape(-1, *self.shape)

    @torch.no_grad()
    def fit(self, x: Float[Tensor, "n c *space"], classes: Int[Tensor, " n"]) -> None:
        """To scans on the scale -1 to 1 and their classes."""
        self.density.fit(x.flatten(1), classes, noise=_ROUNDING)


__all__ = ["MixtureStart"]
