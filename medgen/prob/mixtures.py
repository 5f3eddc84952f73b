"""Gaussian mixtures with full covariances, fitted by expectation maximisation.

    p(z | y) = sum_k w_yk N(z; m_yk, L_yk L_yk')

Every class y has its own components; without a class p(z) = sum_y f_y p(z | y), f_y the class's share of the rows
it was fitted to (Dempster et al. 1977, "Maximum likelihood from incomplete data via the EM algorithm").
"""

import warnings
from math import log, pi

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from medgen.seeds import derived_seed, seeded_noise

# Rows a component needs for each number of its mean, so that its covariance means something.
_ROWS_A_NUMBER = 2
# What is added to the variances, as a part of each number's variance over all rows.
_RIDGE = 1e-3


class GaussianMixture(nn.Module):
    """A mixture of Gaussians over vectors, one mixture a class; before `fit` the standard normal.

    Args:
        size: numbers of a vector.
        components: Gaussians a class, at most.
        classes: how many classes; at least 1.

    Example:
        >>> mixture = GaussianMixture(3, components=2)
        >>> mixture.fit(torch.randn(100, 3), seed=0)
        >>> mixture.log_prob(mixture.sample(5, seed=1)).shape
        torch.Size([5])
    """

    weights: Tensor
    means: Tensor
    factors: Tensor
    frequency: Tensor

    def __init__(self, size: int, components: int, classes: int = 1) -> None:
        super().__init__()
        weights = torch.zeros(classes, components)
        weights[:, 0] = 1.0
        self.register_buffer("weights", weights)
        self.register_buffer("means", torch.zeros(classes, components, size))
        self.register_buffer("factors", torch.eye(size).repeat(classes, components, 1, 1))
        self.register_buffer("frequency", torch.full((classes,), 1 / classes))

    @torch.no_grad()
    def fit(self, rows: Float[Tensor, "n d"], cond: Int[Tensor, " n"] | None = None, *, seed: int) -> None:
        """Fit every class's mixture to its rows; few rows get fewer components, one component a shrunk covariance.

        A class with fewer than two rows takes the spread of all rows about its own mean.

        Args:
            rows: what to fit.
            cond: each row's class; not needed for one class.
            seed: where the expectation maximisation starts.
        """
        classes = len(self.weights)
        cond = torch.zeros(len(rows), dtype=torch.long) if cond is None or classes == 1 else cond
        rows, cond = rows.detach().cpu().double(), cond.cpu()
        counts = torch.bincount(cond, minlength=classes)[:classes].double()
        self.frequency.copy_((counts + 1e-3) / (counts + 1e-3).sum())
        for index in range(classes):
            own = rows[cond == index]
            weights, means, factors = _fitted(own if len(own) > 1 else rows, self.weights.shape[1], seed)
            if len(own) == 1:
                means = means - (weights[:, None] * means).sum(0) + own
            self.weights[index] = 0.0
            self.weights[index, : len(weights)] = weights.to(self.weights)
            self.means[index, : len(weights)] = means.to(self.weights)
            self.factors[index, : len(weights)] = factors.to(self.weights)

    def joint(self, rows: Float[Tensor, "n d"], cond: Int[Tensor, " n"] | None = None) -> Float[Tensor, "n classes k"]:
        """log p(z, y, k), nats, in double precision; a given class is certain, so the others have minus infinity."""
        rows = _precise(rows)
        found = rows.new_full((len(rows), *self.weights.shape), -torch.inf)
        known = cond is not None and len(self.weights) > 1
        for index, (weights, means, factors) in enumerate(zip(self.weights, self.means, self.factors, strict=True)):
            chosen = (cond == index).nonzero()[:, 0] if known else torch.arange(len(rows), device=rows.device)
            prior = 0.0 if known else float(self.frequency[index].double().log())
            for number, weight in enumerate(weights.tolist()):
                if weight > 0 and len(chosen):
                    density = _log_normal(rows[chosen], means[number].to(rows), factors[number].to(rows))
                    found[chosen, index, number] = density + log(weight) + prior
        return found

    def log_prob(self, rows: Float[Tensor, "n d"], cond: Int[Tensor, " n"] | None = None) -> Float[Tensor, " n"]:
        """log p(z | y), or log p(z) without a class, nats."""
        return self.joint(rows, cond).flatten(1).logsumexp(1).float()

    def responsibilities(
        self, rows: Float[Tensor, "n d"], cond: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n classes k"]:
        """The chance that a row comes of each class and component; a row's chances sum to 1."""
        joint = self.joint(rows, cond)
        return joint.flatten(1).softmax(1).reshape(joint.shape).float()

    @torch.no_grad()
    def sample(
        self, n: int, *, seed: int, first: int = 0, cond: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n d"]:
        """`n` vectors; row i depends on (seed, first + i) and its class alone."""
        size, components = self.means.shape[2], self.weights.shape[1]
        noise = seeded_noise((n, size + 1), seed=derived_seed(seed, 3), first=first).double()
        chance = torch.special.ndtr(noise[:, -1])
        classes = len(self.weights)
        if cond is None or classes == 1:
            shares = (self.frequency[:, None] * self.weights).flatten()[None].expand(n, -1)
        else:
            shares = nn.functional.one_hot(cond.cpu(), classes)[..., None] * self.weights.cpu()
            shares = shares.flatten(1)
        reached = shares.cpu().double().cumsum(1)
        chosen = (reached < chance[:, None] * reached[:, -1:]).sum(1).clamp(max=classes * components - 1)
        means, factors = self.means.flatten(0, 1).cpu().double(), self.factors.flatten(0, 1).cpu().double()
        # One row at a time: a product of many rows may be rounded differently from that of few.
        drawn = [means[k] + factors[k] @ noise[i, :-1] for i, k in enumerate(chosen.tolist())]
        return torch.stack(drawn).to(self.means)


def _log_normal(rows: Tensor, mean: Tensor, factor: Tensor) -> Float[Tensor, " n"]:
    """log N(rows; mean, L L')."""
    turned = torch.linalg.solve_triangular(factor, (rows - mean).T, upper=False)
    size = rows.shape[1]
    return -0.5 * turned.square().sum(0) - factor.diagonal().log().sum() - 0.5 * size * log(2 * pi)


def _precise(rows: Tensor) -> Tensor:
    """In double precision, where the device has it."""
    return rows if rows.device.type == "mps" else rows.double()


def _fitted(rows: Float[Tensor, "n d"], most: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (k,), means (k, d) and Cholesky factors (k, d, d) of at most so many Gaussians."""
    n, size = rows.shape
    centre = rows.mean(0) if n else rows.new_zeros(size)
    spread = rows.std(0, correction=0) if n > 1 else rows.new_ones(size)
    # A number that never varies is not infinitely certain.
    spread = spread.clamp(min=max(1e-3 * float(spread.max()), 1e-6))
    scaled = (rows - centre) / spread
    count = min(most, n // (_ROWS_A_NUMBER * (size + 1)), len(scaled.unique(dim=0)))
    if count < 2:
        weights, means, covariances = rows.new_ones(1), rows.new_zeros(1, size), _shrunk(scaled)[None]
    else:
        weights, means, covariances = _maximised(scaled, count, seed)
    factors = torch.linalg.cholesky(covariances)
    return weights, centre + means * spread, factors * spread[:, None]


def _shrunk(scaled: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    """One covariance, drawn towards the identity by as much as so few rows need.

    Ledoit & Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices".
    """
    from sklearn.covariance import ledoit_wolf

    size = scaled.shape[1]
    least = _RIDGE * torch.eye(size, dtype=scaled.dtype)
    if len(scaled) < 2 or not bool(scaled.any()):
        return torch.eye(size, dtype=scaled.dtype)
    return torch.from_numpy(ledoit_wolf(scaled.numpy(), assume_centered=True)[0]) + least


def _maximised(scaled: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """scikit-learn's expectation maximisation from k-means, with a stronger ridge where a component collapses."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture as Fitter

    for ridge in (_RIDGE, 10 * _RIDGE, 100 * _RIDGE, 1.0):
        fitter = Fitter(count, reg_covar=ridge, max_iter=200, random_state=derived_seed(seed, 4) % 2**32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            try:
                fitter.fit(scaled.numpy())
            except ValueError:  # a covariance that is not positive definite
                continue
        weights, means = torch.from_numpy(fitter.weights_), torch.from_numpy(fitter.means_)
        return weights, means, torch.from_numpy(fitter.covariances_)
    return scaled.new_ones(1), scaled.new_zeros(1, scaled.shape[1]), _shrunk(scaled)[None]


__all__ = ["GaussianMixture"]
