"""Distributions over codes, fitted to what an encoder made of the training scans."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from medgen.seeds import derived_seed, seeded_noise


class CodeField(nn.Module):
    """A Gaussian over codes whose covariance is that of the training codes, tapered in space.

    A code map has far more numbers than there are training scans. Its sample covariance is therefore
    multiplied, elementwise, by a taper rho that falls with distance (Houtekamer & Mitchell 2001, "A
    sequential ensemble Kalman filter", equation 6), which amounts to

        z = m + sum_r g_r * c_r + s * e,    g_r ~ GP(0, rho),    e ~ N(0, 1)

    with c_r the scaled principal components of the training codes (the covariance is all that is
    kept: nobody's code is stored) and one smooth random field g_r a component. Distant places mix
    the components differently, so there are many more distinct samples than training scans, and no
    sample follows one of them throughout. A vector code has no places: g_r is one number.

    Before `fit` it is the standard normal.

    Args:
        code_shape: (latent,) of a vector or (latent, *coarse) of a map.
        classes: how many classes, each with its own Gaussian; at least 1.
        rank: principal components kept; the variance beyond them goes into s.
        reach: standard deviation of the taper's kernel in code positions.
    """

    mean: Tensor
    components: Tensor
    variance: Tensor

    def __init__(self, code_shape: tuple[int, ...], classes: int = 1, *, rank: int = 32, reach: float = 2.0) -> None:
        super().__init__()
        self.code_shape = tuple(code_shape)
        self.register_buffer("mean", torch.zeros(classes, *code_shape))
        self.register_buffer("components", torch.zeros(classes, rank, *code_shape))
        self.register_buffer("variance", torch.ones(classes, *code_shape))
        self._smoothers = [_unit_smoother(n, reach) for n in self.code_shape[1:]]

    def fit(self, codes: Float[Tensor, "n *code"], spreads: Float[Tensor, "n *code"], cond: Int[Tensor, " n"]) -> None:
        """Set mean, components and residual variance from posterior means and variances."""
        for index in range(len(self.mean)):
            chosen = cond == index
            if int(chosen.sum()) < 2:
                chosen = torch.ones_like(chosen)  # too few of this class to know their spread
            mean = codes[chosen].mean(0)
            centred = (codes[chosen] - mean).flatten(1)
            pca = principal_components(centred, self.components.shape[1])
            # No more than the codes' own spread: weak components have theirs raised above the residual.
            spread = (centred @ pca.directions.T).square().sum(0) / max(1, len(centred) - 1)
            components = pca.directions * torch.minimum(spread, pca.variances).sqrt()[:, None]
            left = (centred.square().sum(0) / max(1, len(centred) - 1) - components.square().sum(0)).clamp(min=0)
            self.mean[index] = codes[cond == index].mean(0) if (cond == index).any() else mean
            self.components[index] = components.reshape(-1, *self.code_shape)
            self.variance[index] = left.reshape(self.code_shape) + spreads[chosen].mean(0)

    def sample(self, n: int, *, seed: int, first: int = 0, cond: Tensor | None = None) -> Float[Tensor, "n *code"]:
        """`n` codes; row i depends on (seed, first + i) and its class alone."""
        device = self.mean.device
        index = torch.zeros(n, dtype=torch.long) if cond is None else cond.cpu()
        rank, space = self.components.shape[1], self.code_shape[1:]
        weights = seeded_noise((n, rank, 1, *space), seed=derived_seed(seed, 1), first=first)
        for axis, smoother in enumerate(self._smoothers):
            weights = (weights.movedim(3 + axis, -1) @ smoother.T).movedim(-1, 3 + axis)
        noise = seeded_noise((n, *self.code_shape), seed=derived_seed(seed, 2), first=first).to(device)
        varied = (weights.to(device).reshape(n, rank, *([1, *space] if space else [1])) * self.components[index]).sum(1)
        return self.mean[index] + varied + self.variance[index].sqrt() * noise

    def projected(
        self, codes: Float[Tensor, "n *code"], cond: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n *code"]:
        """The nearest codes that mix the training codes everywhere alike: mean plus whole components.

        What belongs to one place only, such as a lesion, is in no component and goes.
        """
        index = torch.zeros(len(codes), dtype=torch.long) if cond is None else cond.cpu()
        mean, basis = self.mean[index], self.components[index].flatten(2)
        directions = basis / basis.norm(dim=2, keepdim=True).clamp(min=1e-8)
        weights = torch.einsum("nrd,nd->nr", directions, (codes - mean).flatten(1))
        return mean + torch.einsum("nr,nrd->nd", weights, directions).reshape(codes.shape)


class PrincipalComponents(NamedTuple):
    """Orthonormal `directions` (r, d), their `variances` (r,), and the mean variance beyond them."""

    directions: Tensor
    variances: Tensor
    residual: Tensor


def principal_components(rows: Float[Tensor, "n d"], rank: int) -> PrincipalComponents:
    """The leading `rank` principal components of centred `rows`; missing ones have variance near 0.

    Works on the smaller of the two Gram matrices, in double precision.
    """
    n, width = rows.shape
    scaled = rows / max(1, n - 1) ** 0.5
    if n < width:
        values, vectors = torch.linalg.eigh((scaled @ scaled.T).double())
        kept = vectors.flip(1)[:, :rank].T.to(rows.dtype) @ scaled
        # What has no variance has no direction either, only rounding errors that would look like one.
        told = values.flip(0)[:rank] > 1e-6 * values[-1]
        directions = torch.nn.functional.normalize(kept, dim=1, eps=1e-20) * told[:, None].to(rows.dtype)
    else:
        values, vectors = torch.linalg.eigh((scaled.T @ scaled).double())
        directions = vectors.flip(1)[:, :rank].T.to(rows.dtype)
    variances = values.flip(0)[:rank].clamp(min=1e-10).to(rows.dtype)
    missing = rank - len(directions)
    if missing > 0:
        directions = torch.cat([directions, torch.zeros(missing, width, dtype=rows.dtype, device=rows.device)])
        variances = torch.cat([variances, variances.new_full((missing,), 1e-10)])
    left = scaled.square().sum() - variances.sum()
    residual = (left / max(1, width - rank)).clamp(min=1e-8).to(rows.dtype)
    return PrincipalComponents(directions, variances.clamp(min=2 * float(residual)), residual)


def _unit_smoother(n: int, reach: float) -> Float[Tensor, "n n"]:
    """Rows of a Gaussian kernel with unit norm: white noise in, smooth unit-variance noise out."""
    place = torch.arange(n, dtype=torch.float32)
    kernel = torch.exp(-0.5 * ((place[:, None] - place[None, :]) / reach) ** 2)
    return kernel / kernel.norm(dim=1, keepdim=True)


__all__ = ["CodeField", "PrincipalComponents", "principal_components"]
