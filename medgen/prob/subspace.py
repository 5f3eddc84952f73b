"""A Gaussian mixture over principal components, with isotropic noise beyond them: a density over the whole space.

    x = m + U' z + n,    z ~ sum_k w_k N(m_k, C_k),    n ~ N(0, s^2) in the complement of the rows of U

so that log p(x) = log p(z) + log N(n; 0, s^2 I) exactly, as U turns space without stretching it (Tipping & Bishop
1999, "Mixtures of probabilistic principal component analysers", with one U for all). A mixture needs many scans for
each number; so it is over the `lead` first components only, and the others are Gaussian given those.
"""

from collections.abc import Iterator
from math import pi
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from medgen.prob.mixtures import GaussianMixture, drawn
from medgen.seeds import derived_seed, seeded_noise

ShrinkageName = Literal["ridge", "ledoit-wolf", "none"]
# Numbers of a scan that are in double precision at a time.
_COLUMNS = 2**16
_LEAST_VARIANCE = 1e-8


class SubspaceMixture(nn.Module):
    """p(x | y) with common principal components, and a mixture and a noise for each class.

    Before `fit` it is a wide Gaussian about one half.

    Args:
        size: numbers of a scan.
        rank: principal components kept; the variance beyond them is spread evenly.
        components: Gaussians of a class's mixture.
        lead: principal components that the mixture is over.
        classes: how many classes; at least 1.

    Example:
        >>> density = SubspaceMixture(50, rank=8, components=2, lead=3)
        >>> density.fit(torch.rand(200, 50))
        >>> density.log_prob(torch.rand(4, 50)).shape
        torch.Size([4])
    """

    centre: Tensor
    directions: Tensor
    residual: Tensor
    spread: Tensor

    def __init__(self, size: int, *, rank: int, components: int, lead: int, classes: int = 1) -> None:
        super().__init__()
        rank = min(rank, size)
        self.lead = min(lead, rank)
        self.mixture = GaussianMixture(rank, components, classes)
        self.mixture.factors.mul_((1 / 12) ** 0.5)
        self.register_buffer("centre", torch.full((size,), 0.5))
        self.register_buffer("directions", torch.zeros(rank, size))
        self.register_buffer("residual", torch.full((classes,), 1 / 12))
        self.register_buffer("spread", torch.full((size,), (1 / 12) ** 0.5))

    # -- fitting ---------------------------------------------------------------------------------

    @torch.no_grad()
    def fit(
        self, rows: Float[Tensor, "n d"], cond: Int[Tensor, " n"] | None = None, *,
        shrinkage: ShrinkageName = "ridge", ridge: float | None = None, noise: float = 0.0, seed: int = 0,
    ) -> None:  # fmt: skip
        """Set everything from scans.

        Args:
            rows: the scans.
            cond: each scan's class; not needed for one class.
            shrinkage: of a class's covariance: 'ridge' adds to its diagonal, 'ledoit-wolf' draws it towards a
                multiple of the identity (Ledoit & Wolf 2004), 'none' takes it as it is.
            ridge: what is added, as a part of a number's mean variance; None: by the likelihood of a tenth of the
                scans under the rest.
            noise: variance that is added in any case, such as that of dequantisation.
            seed: where the expectation maximisation starts.
        """
        classes = len(self.residual)
        rows, noise = rows.detach().cpu(), max(noise, _LEAST_VARIANCE)
        cond = torch.zeros(len(rows), dtype=torch.long) if cond is None or classes == 1 else cond.cpu()
        centre = rows.mean(0)
        directions = _directions(rows - centre, len(self.directions))
        self.centre.copy_(centre)
        self.directions.zero_()
        self.directions[: len(directions)] = directions.to(self.directions)
        codes, left = self._coded(rows)
        codes, lead = codes[:, : len(directions)], min(self.lead, len(directions))
        counts = torch.bincount(cond, minlength=classes)[:classes].double()
        self.mixture.frequency.copy_((counts + 1e-3) / (counts + 1e-3).sum())
        start = GaussianMixture(lead, self.mixture.weights.shape[1])
        for index in range(classes):
            own = cond == index
            chosen = own if int(own.sum()) > 1 else torch.ones_like(own)  # too few of this class to know their spread
            spectrum = _Spectrum(codes[chosen], left[chosen], rows.shape[1])
            extra, kept = spectrum.shrinkage(shrinkage, ridge)
            mean = codes[own].mean(0) if bool(own.any()) else spectrum.mean
            covariance = kept * spectrum.covariance + (extra + noise) * torch.eye(len(mean), dtype=mean.dtype)
            residual = kept * spectrum.residual + extra + noise
            weights, means, leads = mean.new_ones(1), mean[None, :lead], None
            if len(start.weights[0]) > 1 and lead and int(own.sum()) > 1:
                start.fit(codes[own, :lead].float(), seed=seed)
                if float(start.weights[0, 0]) < 1:
                    told = start.weights[0] > 0
                    weights, means, leads = start.weights[0, told], start.means[0, told], start.factors[0, told]
                    leads = leads.double() @ leads.double().mT + (extra + noise) * torch.eye(lead)
            self._put(index, weights, means, leads, (mean, covariance, residual))
        self._measure_spread(rows, codes[:, :lead], noise)

    def _put(
        self, index: int, weights: Tensor, means: Tensor, leads: Tensor | None, gaussian: tuple[Tensor, Tensor, float]
    ) -> None:
        """A class's mixture: Gaussians of the leading components, and of the others given those as in `gaussian`."""
        mean, covariance, residual = gaussian
        found, lead, rank = len(mean), means.shape[1], len(self.directions)
        whole = torch.linalg.cholesky(covariance)
        count = len(weights)
        # Directions that the scans do not have belong to the noise beyond.
        factors = (residual**0.5 * torch.eye(rank, dtype=torch.float64)).repeat(count, 1, 1)
        centres = torch.zeros(count, rank, dtype=torch.float64)
        factors[:, :found, :found] = whole
        centres[:, :lead], centres[:, lead:found] = means, mean[lead:]
        if leads is not None:
            # The regression of the others on the leading ones: B = L_21 L_11^-1.
            slope = torch.linalg.solve_triangular(whole[:lead, :lead], whole[lead:, :lead], upper=False, left=False)
            factors[:, :lead, :lead] = torch.linalg.cholesky(leads)
            factors[:, lead:found, :lead] = slope @ factors[:, :lead, :lead]
            centres[:, lead:found] += (means.double() - mean[:lead]) @ slope.T
        self.mixture.put(index, weights, centres, factors)
        self.residual[index] = residual

    def _measure_spread(self, rows: Tensor, codes: Tensor, noise: float) -> None:
        """The standard deviation of what the leading components leave of each number."""
        for part in self._columns():
            left = rows[:, part].double() - self.centre[part].cpu().double()
            left -= codes @ self.directions[: codes.shape[1], part].cpu().double()
            self.spread[part] = (left.square().mean(0) + noise).sqrt().to(self.spread)

    # -- density -----------------------------------------------------------------------------------

    def log_prob(self, x: Float[Tensor, "n d"], cond: Int[Tensor, " n"] | None = None) -> Float[Tensor, " n"]:
        """log p(x | y), or log p(x) without a class, nats, in double precision."""
        codes, left = self._coded(x)
        residual = self.residual.to(codes)
        beyond = x.shape[1] - len(self.directions)
        noise = -0.5 * (left[:, None] / residual + beyond * (2 * pi * residual).log())
        return (self.mixture.joint(codes, cond) + noise[..., None]).flatten(1).logsumexp(1)

    def codes(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n lead"]:
        """The leading principal components."""
        return self._coded(x)[0][:, : self.lead].to(x.dtype)

    def expected(self, codes: Float[Tensor, "n lead"]) -> Float[Tensor, "n d"]:
        """The point of the leading components' space with these codes."""
        return self.centre + codes.to(self.centre) @ self.directions[: self.lead]

    @torch.no_grad()
    def typical(self, codes: Float[Tensor, "n lead"], cond: Int[Tensor, " n"] | None = None) -> Float[Tensor, "n lead"]:
        """Codes drawn to where the mixture has its mass.

        z - m_k is shortened to the length it mostly has, sqrt(lead) in units of C_k, where it is longer; the
        Gaussians' answers are weighed by how likely the code is theirs.
        """
        mixture = self.mixture.leading(self.lead)
        shares = mixture.responsibilities(codes, cond)
        found = torch.zeros_like(codes)
        for index in range(shares.shape[1]):
            for k in mixture.weights[index].nonzero()[:, 0].tolist():
                off = codes - mixture.means[index, k]
                length = torch.linalg.solve_triangular(mixture.factors[index, k], off.T, upper=False).norm(dim=0)
                nearer = mixture.means[index, k] + (self.lead**0.5 / length.clamp(min=1e-6)).clamp(max=1)[:, None] * off
                found += shares[:, index, k, None] * nearer
        return found

    @torch.no_grad()
    def sample(
        self, n: int, *, seed: int, first: int = 0, cond: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n d"]:
        """`n` scans; row i depends on (seed, first + i) and its class alone, if `n` is always the same."""
        index = self.mixture.drawn_classes(n, seed=seed, first=first) if cond is None else cond.cpu()
        index = index % len(self.residual)
        codes = self.mixture.sample(n, seed=seed, first=first, cond=index)
        return self._around(codes, index, seeded_noise((n, len(self.centre)), seed=derived_seed(seed, 6), first=first))

    def _around(self, codes: Tensor, index: Tensor, noise: Tensor) -> Float[Tensor, "n d"]:
        """Scans with these codes, and `noise` beyond the principal components."""
        scale = self.residual.sqrt()[index.to(self.residual.device), None]
        noise = scale * noise.to(self.centre)
        return self.centre + noise + (codes.to(noise) - noise @ self.directions.T) @ self.directions

    # -- in-painting -------------------------------------------------------------------------------

    @torch.no_grad()
    def inpaint(
        self, x: Float[Tensor, " d"], hole: Bool[Tensor, " d"], *, seed: int, cond: Int[Tensor, " 1"] | None = None
    ) -> Float[Tensor, " d"]:
        """One scan with the numbers in `hole` drawn from p(hole | rest), exactly.

        A component has the covariance s^2 I + U' M U with M = C - s^2 I. With U_o the columns that are known,
        G = U_o U_o' and a = U_o (x_o - m_o), the matrix inversion lemma gives

            (x_o - m_o)' S_oo^-1 (x_o - m_o) = (|x_o - m_o|^2 - a' M A^-1 a) / s^2,   A = s^2 I + G M
            E[x_h | x_o] = m_h + U_h' M A^-1 a

        These decide which component it is; then a joint draw is moved by what its known numbers are off
        (Matheron's rule; Hoffman & Ribak 1991, "Constrained realizations of Gaussian random fields").
        """
        known = ~hole
        seen, told = self.directions[:, known].double(), (x - self.centre)[known].double()
        gram = seen @ seen.T
        parts, places = [], []
        for index in range(len(self.residual)) if cond is None else [int(cond) % len(self.residual)]:
            s2 = self.residual[index].double()
            for k in self.mixture.weights[index].nonzero()[:, 0].tolist():
                moved, system = self._system(index, k, gram)
                off = told - self.mixture.means[index, k].double() @ seen
                a = seen @ off
                solved = moved @ torch.linalg.solve(system, a)
                size = torch.linalg.slogdet(system)[1] + (len(off) - len(gram)) * s2.log()
                density = -0.5 * ((off @ off - a @ solved) / s2 + size) + self.mixture.weights[index, k].double().log()
                parts.append(density + self.mixture.frequency[index].double().log())
                places.append((index, k))
        noise = seeded_noise((1, len(gram) + len(x) + 1), seed=derived_seed(seed, 7))
        chance = torch.special.ndtr(noise[:, -1].double())
        index, k = places[int(drawn(torch.stack(parts).softmax(0)[None].cpu(), chance))]
        which = torch.tensor([index])
        codes = self.mixture.place(which, torch.tensor([k]), noise[:, : len(gram)])
        joint = self._around(codes, which, noise[:, len(gram) : -1])[0]
        moved, system = self._system(index, k, gram)
        shift = moved @ torch.linalg.solve(system, seen @ (x - joint)[known].double())
        return torch.where(hole, joint + (shift @ self.directions.double()).to(x), x)

    def _system(self, index: int, k: int, gram: Tensor) -> tuple[Tensor, Tensor]:
        """M = C - s^2 I of a component, and A = s^2 I + G M."""
        factor, s2 = self.mixture.factors[index, k].double(), self.residual[index].double()
        eye = torch.eye(len(factor), dtype=torch.float64, device=factor.device)
        moved = factor @ factor.T - s2 * eye
        return moved, s2 * eye + gram @ moved

    # -- parts -------------------------------------------------------------------------------------

    def _columns(self) -> Iterator[slice]:
        for first in range(0, len(self.centre), _COLUMNS):
            yield slice(first, first + _COLUMNS)

    def _coded(self, x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n rank"], Float[Tensor, " n"]]:
        """Principal components z, and the squared length of what is beyond them; a block of columns at a time."""
        place = x.device

        def off(part: slice) -> Tensor:
            return x[:, part].double() - self.centre[part].to(place).double()

        def turned(part: slice) -> Tensor:
            return self.directions[:, part].to(place).double()

        codes = torch.stack([off(part) @ turned(part).T for part in self._columns()]).sum(0)
        left = [(off(part) - codes @ turned(part)).square().sum(1) for part in self._columns()]
        return codes, torch.stack(left).sum(0)


class _Spectrum:
    """The covariance of a class, as that of its principal components and a variance beyond.

    Args:
        codes: (n, r) principal components.
        left: (n,) squared length beyond them.
        size: numbers of a scan.
    """

    def __init__(self, codes: Tensor, left: Tensor, size: int) -> None:
        self.codes, self.left, self.size = codes, left, size
        self.mean = codes.mean(0)
        centred = codes - self.mean
        self.covariance = centred.T @ centred / len(codes)
        self.beyond = size - codes.shape[1]
        self.residual = float(left.mean()) / max(1, self.beyond)
        self.average = float(self.covariance.diagonal().sum() + left.mean()) / size
        self.squared = centred.square().sum(1) + left

    def shrinkage(self, kind: ShrinkageName, ridge: float | None) -> tuple[float, float]:
        """What is added to every variance, and what the covariance is multiplied by before."""
        if kind == "none" or self.average <= 0:
            return 0.0, 1.0
        if kind == "ridge":
            return (self._best_ridge() if ridge is None else ridge * self.average), 1.0
        n = len(self.codes)
        squares = float(self.covariance.square().sum() + self.beyond * self.residual**2)
        away = squares - self.size * self.average**2
        error = float(self.squared.square().sum()) / n**2 - squares / n
        part = min(error, away) / away if away > 0 else 1.0
        return part * self.average, 1 - part

    def _best_ridge(self) -> float:
        """The ridge under which every tenth scan is likeliest when the covariance is that of the others."""
        held = torch.arange(len(self.codes)) % 10 == 9
        held[-1] = True
        if len(held) < 3:
            return 1e-3 * self.average
        mean = self.codes[~held].mean(0)
        centred = self.codes[~held] - mean
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        energy = ((self.codes[held] - mean) @ vectors).square().mean(0)
        beyond, left = float(self.left[~held].mean()) / max(1, self.beyond), float(self.left[held].mean())
        ridges = self.average * torch.logspace(-6, 1, 57, dtype=torch.float64)
        variances = values.clamp(min=0)[None] + ridges[:, None]
        loss = (energy / variances + variances.log()).sum(1)
        loss += left / (beyond + ridges) + self.beyond * (beyond + ridges).log()
        return float(ridges[int(loss.argmin())])


def _directions(centred: Float[Tensor, "n d"], rank: int) -> Float[Tensor, "r d"]:
    """Orthonormal leading principal directions of centred rows, no more than have variance.

    From the smaller of the two Gram matrices, in double precision a block of columns at a time.
    """
    n, size = centred.shape
    if n < size:
        gram = torch.zeros(n, n, dtype=torch.float64)
        for part in centred.split(_COLUMNS, 1):
            gram += part.double() @ part.double().T
        values, vectors = torch.linalg.eigh(gram)
    else:
        values, vectors = torch.linalg.eigh(centred.double().T @ centred.double())
    kept = (values.flip(0)[: min(rank, n - 1)] > 1e-9 * values[-1].clamp(min=1e-12)).sum()
    vectors = vectors.flip(1)[:, : int(kept)]
    if n >= size:
        return vectors.T
    found = torch.cat([(vectors.T @ part.double()).float() for part in centred.split(_COLUMNS, 1)], 1)
    if not len(found):
        return found
    gram = torch.zeros(len(found), len(found), dtype=torch.float64)
    for part in found.split(_COLUMNS, 1):
        gram += part.double() @ part.double().T
    factor = torch.linalg.cholesky(gram)
    parts = [torch.linalg.solve_triangular(factor, p.double(), upper=False).float() for p in found.split(_COLUMNS, 1)]
    return torch.cat(parts, 1)


__all__ = ["ShrinkageName", "SubspaceMixture"]
