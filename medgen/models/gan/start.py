"""Where a generator may begin: with draws of a Gaussian mixture of the training scans."""

from math import prod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from medgen.prob.mixtures import drawn
from medgen.prob.subspace import SubspaceMixture

# Principal components for each number of the code, and numbers that all of them may have together.
_COMPONENTS, _MOST_NUMBERS = 4, 2**23
# Bands of components that are stretched alike, by their first component, and scans a component that tell how much.
_BANDS, _SCANS_A_COMPONENT = (0, 4, 16, 64, 128), 2
# Variance of rounding to one of 256 grey levels, on the scale -1 to 1.
_ROUNDING = (2 / 255) ** 2 / 12


class MixtureStart(nn.Module):
    """The part of a generator that is fitted in closed form (`medgen.prob.subspace`) and stays as it is.

        G(z, y) = x + net(z, y, x),    x = m + U' (m_yk + L_yk s z)

    with component k of class y drawn first, and s a random stretch of each band of components, log-normal: scans
    differ in contrast and sharpness more than a Gaussian lets them (a Gaussian scale mixture; Wainwright & Simoncelli
    2000). What such a mixture cannot know is for the network to add, which sees x; without any training, scans are
    draws of the mixture.

    Args:
        shape: (c, *space).
        code: numbers of z that are the scan's code; further ones are detail.
        classes: how many; 0 counts as one.
        mixtures: Gaussians a class.
    """

    band: Tensor
    stretch: Tensor
    stretches: Tensor

    def __init__(self, shape: tuple[int, ...], code: int, classes: int, mixtures: int) -> None:
        super().__init__()
        self.shape, size = shape, prod(shape)
        rank = min(size, max(code, min(_COMPONENTS * code, _MOST_NUMBERS // size)))
        self.density = SubspaceMixture(size, rank=rank, components=mixtures, lead=code, classes=max(1, classes))
        self.code, count = min(code, rank), max(1, classes)
        # Normal numbers besides the code: of the other components, those of the stretch, and one that chooses k.
        band = (torch.arange(rank)[:, None] >= torch.tensor(_BANDS)).sum(1) - 1
        self.register_buffer("band", band, persistent=False)
        bands = sum(first < rank for first in _BANDS)
        self.register_buffer("stretch", torch.zeros(count, bands))
        self.register_buffer("stretches", torch.zeros(count, bands, bands))
        self.draws = rank - self.code + bands + 1

    def forward(
        self, code: Float[Tensor, "b k"], detail: Float[Tensor, "b m"], classes: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c *space"]:
        """Scans on the scale -1 to 1; without numbers in `detail` of the likeliest Gaussian and without detail."""
        density, mixture = self.density, self.density.mixture
        detail = detail if detail.shape[1] else detail.new_zeros(len(code), self.draws)
        weights = mixture.weights[classes]
        chance = torch.special.ndtr(detail[:, -1].double())
        component = drawn(weights, chance) if detail[:, -1].any() else weights.argmax(1)
        normal = detail[:, self.band.shape[0] - self.code : -1]
        stretch = self.stretch[classes] + torch.einsum("bij,bj->bi", self.stretches[classes], normal)
        noise = torch.cat([code[:, : self.code], detail[:, : self.band.shape[0] - self.code]], 1)
        noise = noise * stretch.exp()[:, self.band]
        turned = torch.einsum("bij,bj->bi", mixture.factors[classes, component], noise)
        placed = mixture.means[classes, component] + turned
        return (density.centre + placed @ density.directions).reshape(-1, *self.shape)

    @torch.no_grad()
    def fit(self, x: Float[Tensor, "n c *space"], classes: Int[Tensor, " n"]) -> None:
        """To scans on the scale -1 to 1 and their classes."""
        rows, mixture = x.flatten(1), self.density.mixture
        self.density.fit(rows, classes, noise=_ROUNDING)
        codes = (rows - self.density.centre) @ self.density.directions.T
        component = mixture.joint(codes, classes if len(self.stretch) > 1 else None).amax(1).argmax(1)
        for index in range(len(self.stretch)):
            chosen = (classes == index).nonzero()[:, 0] if len(self.stretch) > 1 else torch.arange(len(rows))
            if len(chosen) > _SCANS_A_COMPONENT * len(self.band):
                self._measure_stretch(index, codes[chosen], component[chosen])

    def _measure_stretch(self, index: int, codes: Float[Tensor, "n d"], component: Int[Tensor, " n"]) -> None:
        """How much a class's scans differ in the energy of each band, beyond what normal numbers do."""
        mixture = self.density.mixture
        white = torch.empty_like(codes)
        for k in component.unique().tolist():
            own = component == k
            centred = (codes[own] - mixture.means[index, k]).T
            white[own] = torch.linalg.solve_triangular(mixture.factors[index, k], centred, upper=False).T
        sizes = torch.bincount(self.band)
        energy = torch.zeros(len(codes), len(sizes)).to(codes).index_add_(1, self.band, white.square()) / sizes
        log_energy = energy.clamp(min=1e-6).log()
        # The logarithm of a mean of n squared normal numbers varies by 2 / n of its own.
        values, vectors = torch.linalg.eigh(torch.atleast_2d(log_energy.T.cov()) - torch.diag(2 / sizes))
        covariance = vectors * values.clamp(min=0) @ vectors.T / 4
        self.stretches[index] = vectors * values.clamp(min=0).sqrt() / 2
        # The mean of squares stays what it was.
        self.stretch[index] = energy.mean(0).log() / 2 - covariance.diagonal()


__all__ = ["MixtureStart"]
