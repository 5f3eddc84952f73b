"""Voxel after voxel, each given the voxels just before it: a mixture of Gaussians over small causal patches.

    p(x) = prod_i p(x_i | neighbours of i that come before it in raster order)

A Gaussian mixture is fitted to patches (neighbours, their mean, place, voxel); each factor is that mixture's own
conditional, which is a mixture of Gaussians again, with weights and means that depend on the neighbours (Domke et
al. 2008, "Who killed the directed model?"; Theis et al. 2012, "Mixtures of conditional Gaussian scale mixtures
applied to multiscale image representations"). So the density is exact, is told voxel by voxel, and a scan can be drawn.

Neighbours enter as whole grey values and less their mean, as does the voxel itself: brightness needs no components
of its own.
"""

from itertools import product
from math import prod

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from medgen.prob.dequantisation import quantised
from medgen.prob.mixtures import GaussianMixture, drawn
from medgen.seeds import derived_seed, seeded_noise

# Numbers of patches in memory at a time.
_NUMBERS = 2**24


class PatchMixture(nn.Module):
    """p(x | y) as a product of conditionals of one mixture a class over causal patches.

    Args:
        shape: voxels along each axis.
        channels: values a voxel, which are modelled together.
        radius: how far neighbours are from the voxel, at most, along each axis.
        components: Gaussians of a class's mixture.
        position: whether a voxel's place is part of its patch.
        bits: grey levels of `bits` bits; 0 for continuous data.
        classes: how many classes; at least 1.

    Example:
        >>> density = PatchMixture((8, 8), 1, radius=2, components=3)
        >>> density.fit(torch.rand(20, 1, 8, 8), patches=500)
        >>> density.log_prob_map(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 1, 8, 8])
    """

    fill: Tensor

    def __init__(
        self, shape: tuple[int, ...], channels: int, *, radius: int, components: int, position: bool = True,
        bits: int = 8, classes: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.shape, self.channels, self.radius, self.position, self.bits = shape, channels, radius, position, bits
        self.offsets = _before(len(shape), radius)
        self.lead = (len(self.offsets) + 1) * channels + (len(shape) if position else 0)
        self.mixture = GaussianMixture(self.lead + channels, components, classes)
        self.register_buffer("fill", torch.full((channels,), 0.5))

    # -- fitting ---------------------------------------------------------------------------------

    @torch.no_grad()
    def fit(
        self, x: Float[Tensor, "n c *space"], cond: Int[Tensor, " n"] | None = None, *, patches: int, seed: int = 0
    ) -> None:
        """Expectation maximisation on `patches` patches a class, from anywhere in the scans.

        Args:
            x: dequantised scans.
            cond: each scan's class; not needed for one class.
            patches: how many.
            seed: which patches, and where the maximisation starts.
        """
        self.fill.copy_(x.mean([0, *range(2, x.ndim)]).to(self.fill))
        x, classes = x.cpu(), len(self.mixture.weights)
        cond = torch.zeros(len(x), dtype=torch.long) if cond is None or classes == 1 else cond.cpu()
        generator = torch.Generator().manual_seed(derived_seed(seed, 8))
        padded, rows, told = self._padded(x), [], []
        for index in range(classes):
            own = (cond == index).nonzero()[:, 0]
            own = own if len(own) else torch.arange(len(x))
            scan, place = _places(len(own), prod(self.shape), patches, generator)
            lead, mean = self._told(padded, own[scan], place)
            voxels = padded[own[scan], :, place].double() - mean
            rows.append(torch.cat([lead, voxels], 1).float())
            told.append(torch.full((len(scan),), index))
        self.mixture.fit(torch.cat(rows), torch.cat(told), seed=seed, ridge=1e-6)
        counts = torch.bincount(cond, minlength=classes)[:classes] + 1e-3
        self.mixture.frequency.copy_(counts / counts.sum())

    # -- density -----------------------------------------------------------------------------------

    @torch.no_grad()
    def log_prob_map(
        self, x: Float[Tensor, "b c *space"], cond: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b 1 *space"]:
        """log p(x_i | voxels before) of dequantised scans, nats, in double precision; without a class, exactly too."""
        voxels, classes = prod(self.shape), len(self.mixture.weights)
        known = cond is not None and classes > 1
        padded = self._padded(x)
        found = torch.zeros(len(x), 1 if known else classes, voxels, dtype=torch.float64, device=x.device)
        step = max(1, _NUMBERS // (self.lead * len(x)))
        for first in range(0, voxels, step):
            place = torch.arange(first, min(first + step, voxels), device=x.device)
            scan = torch.arange(len(x), device=x.device).repeat_interleave(len(place))
            places = place.repeat(len(x))
            for index in range(found.shape[1]):
                told = cond[scan] if known and cond is not None else torch.full_like(scan, index)
                density = self._log_conditional(padded, scan, places, told)
                found[:, index, first : first + step] = density.reshape(len(x), -1)
        if found.shape[1] > 1:
            # Without a class: what is said of a voxel once the voxels before it have told which class it may be.
            prior = self.mixture.frequency.double().log()[:, None].expand(len(x), -1, 1)
            reached = torch.cat([prior, prior + found.cumsum(2)], 2).logsumexp(1)
            found = reached.diff(dim=1)[:, None]
        return found.reshape(len(x), 1, *self.shape)

    def _log_conditional(self, padded: Tensor, scan: Tensor, place: Tensor, cond: Tensor) -> Float[Tensor, " m"]:
        """log p(voxel | voxels before, class) of voxels at `place` of scans `scan`."""
        lead, mean = self._told(padded, scan, place)
        rows = torch.cat([lead, padded[scan, :, place].double() - mean], 1)
        before, whole = self.mixture.joints(rows, self.lead, cond)
        return whole.flatten(1).logsumexp(1) - before.flatten(1).logsumexp(1)

    # -- drawing -----------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self, n: int, *, seed: int, first: int = 0, cond: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n c *space"]:
        """`n` scans; row i depends on (seed, first + i) and its class alone, if `n` is always the same."""
        index = self.mixture.drawn_classes(n, seed=seed, first=first) if cond is None else cond.cpu()
        index = index % len(self.mixture.weights)
        numbers = prod(self.shape) * (self.channels + 1)
        noise = seeded_noise((n, numbers), seed=derived_seed(seed, 9), first=first)
        start = self.fill.new_zeros(n, self.channels, *self.shape)
        everywhere = torch.ones(self.shape, dtype=torch.bool)
        return self._swept(start, everywhere, index, noise, seed)[0]

    @torch.no_grad()
    def inpaint(
        self, x: Float[Tensor, "c *space"], hole: Bool[Tensor, "*space"], *, seed: int,
        cond: Int[Tensor, " 1"] | None = None, particles: int = 32,
    ) -> Float[Tensor, "c *space"]:  # fmt: skip
        """One scan with the voxels in `hole` drawn from about p(hole | rest).

        Drawn in raster order a voxel knows those before it alone. So many `particles` are drawn at once, those that
        make the known voxels after them likely are multiplied, the others die, and one of those left is returned
        (Gordon et al. 1993, "Novel approach to nonlinear/non-Gaussian Bayesian state estimation").
        """
        index = self.mixture.drawn_classes(particles, seed=seed) if cond is None else cond.cpu().expand(particles)
        numbers = prod(self.shape) * (self.channels + 1)
        noise = seeded_noise((particles, numbers), seed=derived_seed(seed, 10))
        start = torch.where(hole, 0.0, x)[None].expand(particles, *x.shape)
        swept, weights = self._swept(start, hole.cpu(), index % len(self.mixture.weights), noise, seed)
        chance = torch.special.ndtr(seeded_noise((1,), seed=derived_seed(seed, 12)).double())
        return swept[int(drawn(weights.softmax(0)[None], chance))]

    def _swept(
        self, x: Float[Tensor, "n c *space"], hole: Bool[Tensor, "*space"], index: Tensor, noise: Tensor, seed: int
    ) -> tuple[Float[Tensor, "n c *space"], Float[Tensor, " n"]]:
        """Scans with the voxels in `hole` drawn front by front, and log weights of the scans by what is known.

        Voxel (i, j, k) needs none with a greater (r + 1)^2 i + (r + 1) j + k, so those of equal sum are drawn together:
        64 x 64 x 64 voxels with r = 1 are 442 fronts, not 262144 steps.
        """
        padded = self._padded(x).clone()
        noise = noise.reshape(len(x), -1, self.channels + 1).to(padded)
        conditional = _Conditional(self.mixture, self.lead, index)
        weights = torch.zeros(len(x), dtype=torch.float64)
        affected = torch.nn.functional.pad(hole.flatten(), (0, 1))
        for number, place in enumerate(_fronts(self.shape, self.radius)):
            place = place.to(padded.device)
            inside = affected[place.cpu()]
            drawn_here, known = place[inside], place[~inside]
            if len(drawn_here):
                scan = torch.arange(len(x), device=padded.device).repeat_interleave(len(drawn_here))
                places = drawn_here.repeat(len(x))
                lead, mean = self._told(padded, scan, places)
                values = mean + conditional.draw(lead, scan, noise[scan, places])
                padded[scan, :, places] = values.to(padded)
            if len(known) and len(weights) > 1 and not bool(hole.all()):
                neighbours = self._neighbours(known)
                known = known[affected[neighbours.cpu()].any(1)]
                if not len(known):
                    continue
                scan = torch.arange(len(x), device=padded.device).repeat_interleave(len(known))
                places = known.repeat(len(x))
                density = self._log_conditional(padded, scan, places, index.to(scan.device)[scan])
                weights = weights + density.reshape(len(x), -1).sum(1).cpu()
                chances = weights.softmax(0)
                if float(1 / chances.square().sum()) < len(x) / 2:
                    u = torch.special.ndtr(seeded_noise((1,), seed=derived_seed(seed, 11, number)).double())
                    ladder = (torch.arange(len(x), dtype=torch.float64) + u) / len(x)
                    kept = drawn(chances.expand(len(x), -1), ladder)
                    padded, index, weights = padded[kept.to(padded.device)], index[kept], torch.zeros_like(weights)
                    conditional = _Conditional(self.mixture, self.lead, index)
        return padded[..., :-1].reshape(x.shape), weights

    # -- patches -----------------------------------------------------------------------------------

    def _padded(self, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c voxels_and_one"]:
        """Voxels in raster order, and one that stands for those that are not there."""
        fill = self.fill.to(x).reshape(1, -1, 1).expand(len(x), -1, 1)
        return torch.cat([x.flatten(2), fill], 2)

    def _told(
        self, padded: Tensor, scan: Tensor, place: Tensor
    ) -> tuple[Float[Tensor, "m lead"], Float[Tensor, "m c"]]:
        """What is known of voxels at `place` of scans `scan`: neighbours less their mean, and place; and that mean."""
        near = padded[scan[:, None], :, self._neighbours(place)].double()
        if self.bits:
            # Middle of the grey level, whatever noise is in it.
            near = (quantised(near, self.bits) * (2**self.bits - 1) + 0.5) / 2**self.bits
        mean = near.mean(1)
        told = [(near - mean[:, None]).flatten(1), mean]
        if self.position:
            told.append(torch.stack([2 * at / max(1, n - 1) - 1 for at, n in self._at(place)], 1).to(near))
        return torch.cat(told, 1), mean

    def _at(self, place: Tensor) -> list[tuple[Tensor, int]]:
        """Each axis's index of places in raster order, with the axis's length."""
        found = []
        for n in reversed(self.shape):
            found.append((place % n, n))
            place = place // n
        return found[::-1]

    def _neighbours(self, place: Int[Tensor, " m"]) -> Int[Tensor, "m neighbours"]:
        """Where the voxels before each place are, in raster order.

        One that is beyond the edge is replaced by the nearest inside; where that is not before the voxel, by the voxel
        just before it; and for the first voxel by the last column of `_padded`.
        """
        at = self._at(place)
        found = torch.zeros(len(place), len(self.offsets), dtype=torch.long, device=place.device)
        last, stride = torch.full_like(place, prod(self.shape)), prod(self.shape)
        for axis, (index, n) in enumerate(at):
            stride //= n
            offset = torch.tensor([o[axis] for o in self.offsets], device=place.device)
            found += (index[:, None] + offset).clamp(0, n - 1) * stride
            last = torch.where(index > 0, place - stride, last)
        return torch.where(found < place[:, None], found, last[:, None])


class _Conditional:
    """p(voxel | what is known of it), ready to be drawn from, for scans of classes `index`."""

    def __init__(self, mixture: GaussianMixture, lead: int, index: Int[Tensor, " n"]) -> None:
        self.lead = lead
        self.parts = []
        for y in index.unique().tolist():
            used = mixture.weights[y].nonzero()[:, 0]
            factors, means = mixture.factors[y, used].double(), mixture.means[y, used].double()
            # Turning the known numbers: L^-1 (t - m), all components at once.
            eye = torch.eye(lead, dtype=torch.float64, device=factors.device).expand(len(used), -1, -1)
            turn = torch.linalg.solve_triangular(factors[:, :lead, :lead], eye, upper=False)
            shift = (turn @ means[:, :lead, None])[..., 0]
            scale = mixture.weights[y, used].double().log() - factors[:, range(lead), range(lead)].log().sum(1)
            rest = factors[:, lead:]
            self.parts.append(((index == y).to(factors.device), turn, shift, scale, rest, means[:, lead:]))

    def draw(
        self, told: Float[Tensor, "m lead"], scan: Int[Tensor, " m"], noise: Float[Tensor, "m c_and_one"]
    ) -> Float[Tensor, "m c"]:
        """A voxel for each row, from standard normal `noise`."""
        found = told.new_zeros(len(told), noise.shape[1] - 1)
        for own, turn, shift, scale, rest, means in self.parts:
            chosen = own[scan].nonzero()[:, 0]
            turned = torch.einsum("kij,mj->mki", turn, told[chosen]) - shift
            shares = (scale - 0.5 * turned.square().sum(2)).softmax(1)
            which = drawn(shares, torch.special.ndtr(noise[chosen, -1].double()))
            code = torch.cat([turned[range(len(which)), which], noise[chosen, :-1].double()], 1)
            found[chosen] = means[which] + (rest[which] @ code[..., None])[..., 0]
        return found


def _before(dims: int, radius: int) -> list[tuple[int, ...]]:
    """Offsets within `radius` that come before the voxel in raster order."""
    box = product(range(-radius, radius + 1), repeat=dims)
    return [offset for offset in box if offset < (0,) * dims]


def _places(scans: int, voxels: int, most: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which scans and voxels `most` patches are about, or all there are."""
    if scans * voxels <= most:
        return torch.arange(scans).repeat_interleave(voxels), torch.arange(voxels).repeat(scans)
    scan = torch.randint(scans, (most,), generator=generator)
    return scan, torch.randint(voxels, (most,), generator=generator)


def _fronts(shape: tuple[int, ...], radius: int) -> list[Tensor]:
    """Places in raster order, in groups that need none of their own or of later groups."""
    sums = torch.zeros(1, dtype=torch.long)
    for axis, n in enumerate(shape):
        step = (radius + 1) ** (len(shape) - 1 - axis)
        sums = (sums[:, None] + step * torch.arange(n)).flatten()
    order = torch.argsort(sums, stable=True)
    return list(order.split(torch.bincount(sums)[torch.bincount(sums) > 0].tolist()))


__all__ = ["PatchMixture"]
