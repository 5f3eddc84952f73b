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
    def fit(
        self, rows: Float[Tensor, "n d"], cond: Int[Tensor, " n"] | None = None, *, seed: int, ridge: float = 1e-3
    ) -> None:
        """Fit every class's mixture to its rows; few rows get fewer components, one component a shrunk covariance.

        A class with fewer than two rows takes the spread of all rows about its own mean.

        Args:
            rows: what to fit.
            cond: each row's class; not needed for one class.
            seed: where the expectation maximisation starts.
            ridge: added to the variances, as a part of each number's variance over all rows.
        """
        classes = len(self.weights)
        cond = torch.zeros(len(rows), dtype=torch.long) if cond is None or classes == 1 else cond
        rows, cond = rows.detach().cpu().double(), cond.cpu()
        counts = torch.bincount(cond, minlength=classes)[:classes].double()
        self.frequency.copy_((counts + 1e-3) / (counts + 1e-3).sum())
        for index in range(classes):
            own = rows[cond == index]
            weights, means, factors = _fitted(own if len(own) > 1 else rows, self.weights.shape[1], seed, ridge)
            if len(own) == 1:
                means = means - (weights[:, None] * means).sum(0) + own
            self.put(index, weights, means, factors)

    def put(self, index: int, weights: Tensor, means: Tensor, factors: Tensor) -> None:
        """Make these the Gaussians of one class: weights (k,), means (k, d) and Cholesky factors (k, d, d)."""
        self.weights[index] = 0.0
        self.weights[index, : len(weights)] = weights.to(self.weights)
        self.means[index, : len(weights)] = means.to(self.weights)
        self.factors[index, : len(weights)] = factors.to(self.weights)

    def leading(self, size: int) -> "GaussianMixture":
        """The mixture of the first `size` numbers alone."""
        found = GaussianMixture(size, self.weights.shape[1], len(self.weights)).to(self.means)
        found.frequency.copy_(self.frequency)
        for index in range(len(self.weights)):
            found.put(index, self.weights[index], self.means[index, :, :size], self.factors[index, :, :size, :size])
        return found

    def joint(self, rows: Float[Tensor, "n d"], cond: Int[Tensor, " n"] | None = None) -> Float[Tensor, "n classes k"]:
        """log p(z, y, k), nats, in double precision; a given class is certain, so the others have minus infinity."""
        return self.joints(rows, 0, cond)[1]

    def joints(
        self, rows: Float[Tensor, "n d"], lead: int, cond: Int[Tensor, " n"] | None = None
    ) -> tuple[Float[Tensor, "n classes k"], Float[Tensor, "n classes k"]]:
        """`joint` of the first `lead` numbers alone, and of all; what remains between them is p(rest | lead)."""
        rows = _precise(rows)
        first, whole = (rows.new_full((len(rows), *self.weights.shape), -torch.inf) for _ in range(2))
        known = cond is not None and len(self.weights) > 1
        for index, weights in enumerate(self.weights.tolist()):
            chosen = (cond == index).nonzero()[:, 0] if known else torch.arange(len(rows), device=rows.device)
            prior = 0.0 if known else log(float(self.frequency[index]))
            for number, weight in enumerate(weights):
                if weight > 0 and len(chosen):
                    mean, factor = self.means[index, number].to(rows), self.factors[index, number].to(rows)
                    density = _log_normals(rows[chosen], mean, factor, lead)
                    first[chosen, index, number] = density[0] + log(weight) + prior
                    whole[chosen, index, number] = density[1] + log(weight) + prior
        return first, whole

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
        noise = seeded_noise((n, self.means.shape[2] + 1), seed=derived_seed(seed, 3), first=first)
        index = self.drawn_classes(n, seed=seed, first=first) if cond is None else cond.cpu() % len(self.weights)
        component = drawn(self.weights.cpu()[index], torch.special.ndtr(noise[:, -1].double()))
        return self.place(index, component, noise[:, :-1])

    @torch.no_grad()
    def drawn_classes(self, n: int, *, seed: int, first: int = 0) -> Int[Tensor, " n"]:
        """Classes by their frequency; the i-th depends on (seed, first + i) alone."""
        noise = seeded_noise((n, 1), seed=derived_seed(seed, 5), first=first)[:, 0]
        return drawn(self.frequency.cpu().expand(n, -1), torch.special.ndtr(noise.double()))

    def place(
        self, index: Int[Tensor, " n"], component: Int[Tensor, " n"], noise: Float[Tensor, "n d"]
    ) -> Float[Tensor, "n d"]:
        """m + L e: where standard normal `noise` comes to lie in each row's class and component."""
        means, factors, noise = self.means.cpu().double(), self.factors.cpu(), noise.cpu().double()
        chosen = zip(index.tolist(), component.tolist(), noise, strict=True)
        # One row at a time: a product of many rows may be rounded differently from that of few.
        return torch.stack([means[y, k] + factors[y, k].double() @ e for y, k, e in chosen]).to(self.means)


def drawn(shares: Float[Tensor, "n k"], chance: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Which of k is chosen with these shares (in any unit) by a uniform number in (0, 1)."""
    reached = shares.double().cumsum(1)
    return (reached <= chance[:, None].double() * reached[:, -1:]).sum(1).clamp(max=shares.shape[1] - 1)


def _log_normals(rows: Tensor, mean: Tensor, factor: Tensor, lead: int) -> tuple[Tensor, Tensor]:
    """log N(rows; mean, L L') of the first `lead` numbers, and of all."""
    turned = torch.linalg.solve_triangular(factor, (rows - mean).T, upper=False)
    parts = -0.5 * (turned.square() + log(2 * pi)) - factor.diagonal().log()[:, None]
    first = parts[:lead].sum(0)
    return first, first + parts[lead:].sum(0)


def _precise(rows: Tensor) -> Tensor:
    """In double precision, where the device has it."""
    return rows if rows.device.type == "mps" else rows.double()


def _fitted(rows: Float[Tensor, "n d"], most: int, seed: int, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (k,), means (k, d) and Cholesky factors (k, d, d) of at most so many Gaussians."""
    n, size = rows.shape
    centre = rows.mean(0) if n else rows.new_zeros(size)
    spread = rows.std(0, correction=0) if n > 1 else rows.new_ones(size)
    # A number that never varies is not infinitely certain.
    spread = spread.clamp(min=max(1e-3 * float(spread.max()), 1e-6))
    scaled = (rows - centre) / spread
    count = min(most, n // (_ROWS_A_NUMBER * (size + 1)), len(scaled.unique(dim=0)))
    if count < 2:
        weights, means, covariances = rows.new_ones(1), rows.new_zeros(1, size), _shrunk(scaled, ridge)[None]
    else:
        weights, means, covariances = _maximised(scaled, count, seed, ridge)
    factors = torch.linalg.cholesky(covariances)
    return weights, centre + means * spread, factors * spread[:, None]


def _shrunk(scaled: Float[Tensor, "n d"], ridge: float) -> Float[Tensor, "d d"]:
    """One covariance, drawn towards the identity by as much as so few rows need.

    Ledoit & Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices".
    """
    from sklearn.covariance import ledoit_wolf

    size = scaled.shape[1]
    least = ridge * torch.eye(size, dtype=scaled.dtype)
    if len(scaled) < 2 or not bool(scaled.any()):
        return torch.eye(size, dtype=scaled.dtype)
    return torch.from_numpy(ledoit_wolf(scaled.numpy(), assume_centered=True)[0]) + least


def _maximised(scaled: Tensor, count: int, seed: int, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """scikit-learn's expectation maximisation from k-means, with a stronger ridge where a component collapses."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture as Fitter

    for least in (ridge, 10 * ridge, 100 * ridge, 1.0):
        fitter = Fitter(count, reg_covar=least, max_iter=200, random_state=derived_seed(seed, 4) % 2**32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            try:
                fitter.fit(scaled.numpy())
            except ValueError:  # a covariance that is not positive definite
                continue
        weights, means = torch.from_numpy(fitter.weights_), torch.from_numpy(fitter.means_)
        return weights, means, torch.from_numpy(fitter.covariances_)
    return scaled.new_ones(1), scaled.new_zeros(1, scaled.shape[1]), _shrunk(scaled, ridge)[None]


__all__ = ["GaussianMixture", "drawn"]
