"""Where a generator may begin: with the mean and the principal components of the training scans."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

# Directions that fewer than so many scans tell are not trusted.
_SCANS_A_DIRECTION = 2


class PrincipalStart(nn.Module):
    """The linear part of a generator: probabilistic principal components, class by class.

        G(z, y) = m_y + U L_y z + net(z, y)

    U are directions of the scans about their class means, L_y the Cholesky factor of the class's covariance in them
    (Tipping & Bishop 1999; here classes share U). It stays as it was fitted: what it lacks is for the network.

    Args:
        shape: (c, *space).
        code: numbers of z; directions beyond what scans tell stay 0.
        classes: how many; 0 counts as one.
    """

    mean: Tensor
    directions: Tensor
    factors: Tensor

    def __init__(self, shape: tuple[int, ...], code: int, classes: int) -> None:
        super().__init__()
        self.shape, count = shape, max(1, classes)
        self.register_buffer("mean", torch.zeros(count, *shape))
        self.register_buffer("directions", torch.zeros(code, *shape))
        self.register_buffer("factors", torch.eye(code).repeat(count, 1, 1))

    def forward(self, code: Float[Tensor, "b k"], weights: Float[Tensor, "b classes"]) -> Float[Tensor, "b c *space"]:
        """Scans on the scale -1 to 1; `weights` say of which class each is."""
        mean = (weights @ self.mean.flatten(1)).reshape(-1, *self.shape)
        placed = torch.einsum("by,ykj,bj->bk", weights, self.factors, code)
        return mean + (placed @ self.directions.flatten(1)).reshape(-1, *self.shape)

    @torch.no_grad()
    def fit(self, x: Float[Tensor, "n c *space"], classes: Tensor) -> None:
        """In closed form from scans on the scale -1 to 1 and their class indices (n,)."""
        overall, centred = x.mean(0), x.clone()
        for index in range(len(self.mean)):
            chosen = classes == index
            self.mean[index] = x[chosen].mean(0) if bool(chosen.any()) else overall
            centred[chosen] -= self.mean[index]
        rows = centred.flatten(1)
        count = max(1, min(len(self.directions), len(rows) // _SCANS_A_DIRECTION, rows.shape[1]))
        _, sizes, directions = torch.linalg.svd(rows, full_matrices=False)
        spread = (sizes[:count] / max(1, len(rows) - 1) ** 0.5).clamp(min=1e-6)
        self.directions.zero_()
        self.directions[:count] = (directions[:count] * spread[:, None]).reshape(-1, *self.shape)
        placed = rows @ directions[:count].T / spread
        for index in range(len(self.mean)):
            own = placed[classes == index]
            if len(own) > 2 * count:  # else the covariance of all
                self.factors[index, :count, :count] = torch.linalg.cholesky(
                    own.T.cov() + 1e-4 * torch.eye(count).to(own)
                )


__all__ = ["PrincipalStart"]
