"""Three ways to say how far a scan is from others: by voxels, by what is left after turning and shifting, by features.

All are of scans averaged down, so that a thousand comparisons take seconds; identity survives that.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from medgen.metrics.hog import hog_rows
from medgen.metrics.radiomics import radiomics

SPACES = ("voxel", "registered", "feature")
# Longest edge at which scans are compared, by how many axes of space they have.
_EDGE = {2: 32, 3: 24}
_COMPONENTS = 64
# Numbers held at a time while scans are shifted.
_AT_ONCE = 2**23

Scans = Float[Tensor, "n c *space"]
# One matrix for each way of looking, of which the nearest counts.
Distances = Float[Tensor, "views n m"]


class Space(Protocol):
    """What can say how far scans are from those it was built with."""

    def distances(self, small: Scans) -> Distances:
        """Of each of n scans to each of m."""
        ...


def shrunk(scans: Scans) -> Float[Tensor, "n c *smaller"]:
    """Scans averaged down, axis by axis, to at most 32 pixels or 24 voxels.

    >>> tuple(shrunk(torch.zeros(2, 1, 28, 100)).shape), tuple(shrunk(torch.zeros(1, 1, 36, 50, 35)).shape)
    ((2, 1, 28, 25), (1, 1, 18, 17, 18))
    """
    flat = scans.ndim == 4
    factors = [-(-n // _EDGE[2 if flat else 3]) for n in scans.shape[2:]]
    if max(factors) == 1:
        return scans.float()
    return (functional.avg_pool2d if flat else functional.avg_pool3d)(scans.float(), factors, ceil_mode=True)


class VoxelSpace:
    """Euclidean distance of voxels: finds what was copied as it is, or blurred, noised or mixed.

    Args:
        small: scans to compare with, as `shrunk` makes them.
    """

    def __init__(self, small: Scans) -> None:
        # In double precision, and about the mean, nothing of a copy's small distance is lost in the subtraction.
        rows = small.flatten(1).double()
        self._mean = rows.mean(0)
        self.rows = rows - self._mean

    def distances(self, small: Scans) -> Distances:
        """sqrt(sum (x - a)^2)."""
        return euclidean(small.flatten(1).double() - self._mean, self.rows)[None]


class FeatureSpace:
    """Euclidean distance of features: what edges and textures a scan has.

    Histograms of oriented gradients and radiomics are standardised, then turned onto at most 64 principal components of
    the scans it was built with.

    Args:
        small: scans to compare with, as `shrunk` makes them.
    """

    def __init__(self, small: Scans) -> None:
        rows = _features(small)
        self._mean, spread = rows.mean(0), rows.std(0, correction=0)
        # A feature that all scans share tells nobody from anybody, and of another scan would outweigh all others.
        self._scale = torch.where(spread > 1e-6, 1 / spread.clamp(min=1e-6), 0.0)
        _, _, turn = torch.linalg.svd((rows - self._mean) * self._scale, full_matrices=False)
        self._turn = turn[:_COMPONENTS].T
        self.rows = self._turned(rows)

    def distances(self, small: Scans) -> Distances:
        """sqrt(sum (f(x) - f(a))^2)."""
        return euclidean(self._turned(_features(small)), self.rows)[None]

    def _turned(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        # Far beyond what any real scan has, how far says nothing more.
        return ((rows - self._mean) * self._scale).clamp(-10, 10) @ self._turn


class RegisteredSpace:
    """What makes a scan its owner's, at the best small shift and mirror image, in two filtered views.

        d(x, a) = sqrt(2 - 2 rho),   rho = max over shifts s, mirrors f of cos( P (s f H x - H m), P (H a - H m) )

    m is the mean of the scans it was built with; P takes away what contrast or blur of the mean could explain. The
    views H are smooth (finds blurred and noised copies) and whitened (every spatial frequency counts alike; finds
    mixtures).

    Args:
        small: scans to compare with, as `shrunk` makes them.
    """

    def __init__(self, small: Scans) -> None:
        self._views = (_View(small, smooth=1.5, whiten=0.0), _View(small, smooth=0.5, whiten=0.5))

    def distances(self, small: Scans) -> Distances:
        """d of each view."""
        return torch.stack([view.distances(small) for view in self._views])


class _View:
    """Scans through one filter, to be correlated with others at every shift.

    Args:
        small: scans (n, c, *space).
        smooth: standard deviation of the low-pass, voxels.
        whiten: 0 leaves the spectrum of deviations as it is, 0.5 makes it flat (above a floor).
    """

    def __init__(self, small: Scans, *, smooth: float, whiten: float) -> None:
        self._space = tuple(range(2, small.ndim))
        self._shape = small.shape[2:]
        self._reach = [min(max(1, n // 8), n - 1) for n in self._shape]
        mean = small.mean(0, keepdim=True)
        power = self._transform(small - mean).abs().square().mean((0, 1))
        self._filter = self._gaussian(smooth) / (power / power.max().clamp(min=1e-20) + 1e-3) ** whiten
        self._filter.view(-1)[0] = 0  # brightness is nobody's
        middle = self._filtered(mean)
        blurred = [self._inverse(self._transform(middle) * self._gaussian(s)) for s in (0.7, 1.5, 3.0)]
        nuisance = torch.cat([middle, *[one - middle for one in blurred]]).flatten(1)
        basis = torch.linalg.qr(nuisance.T.double()).Q.T.to(small.dtype)
        self._mean = middle.flatten(1)
        deviations = self._filtered(small).flatten(1) - self._mean
        deviations = deviations - (deviations @ basis.T) @ basis
        deviations = deviations / deviations.norm(dim=1, keepdim=True).clamp(min=1e-8)
        self._count = len(deviations)
        # Deviations are free of the basis, so x needs not be: its inner products with both are taken at once.
        self._against = torch.cat([deviations, basis]).T.contiguous()

    def distances(self, small: Scans) -> Float[Tensor, "n m"]:
        """To every scan, at the best small shift and mirror image."""
        wide = prod(2 * n + 1 for n in self._reach) * max(self._against.shape)
        size = max(1, _AT_ONCE // wide)
        parts = [self._nearest(self._filtered(small[n : n + size])) for n in range(0, len(small), size)]
        best = torch.cat(parts) if parts else torch.empty(0, self._count)
        return (2 - 2 * best.clamp(-1, 1)).clamp(min=0).sqrt()

    def _nearest(self, x: Scans) -> Float[Tensor, "n m"]:
        best = torch.full((len(x), self._count), -1.0)
        for turned in _mirrored(x):
            shifted = _shifted(turned, self._reach) - self._mean
            found = shifted @ self._against
            explained = found[..., self._count :].square().sum(-1)
            length = (torch.linalg.vector_norm(shifted, dim=-1).square() - explained).clamp(min=1e-8).sqrt()
            best = torch.maximum(best, (found[..., : self._count] / length[..., None]).amax(1))
        return best

    def _filtered(self, values: Tensor) -> Tensor:
        return self._inverse(self._transform(values) * self._filter)

    def _transform(self, values: Tensor) -> Tensor:
        return torch.fft.rfftn(values, dim=self._space)

    def _inverse(self, spectrum: Tensor) -> Tensor:
        return torch.fft.irfftn(spectrum, s=self._shape, dim=self._space)

    def _gaussian(self, sigma: float) -> Tensor:
        squared = torch.zeros(1)
        for axis, n in enumerate(self._shape):
            frequency = torch.fft.rfftfreq(n) if axis == len(self._shape) - 1 else torch.fft.fftfreq(n)
            squared = squared[..., None] + frequency.square() if axis else frequency.square()
        return torch.exp(-2 * torch.pi**2 * sigma**2 * squared)


def euclidean(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """Distances of all rows to all rows, by their inner products."""
    squared = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    return squared.clamp(min=0).sqrt()


def owners(scans: Scans, patients: Sequence[str]) -> Int[Tensor, " n"]:
    """A number for each patient; patients with an identical scan get one number.

    >>> owners(torch.tensor([[[[0.0]]], [[[1.0]]], [[[0.0]]]]), ["a", "b", "c"]).tolist()
    [0, 1, 0]
    """
    first: dict[bytes, str] = {}
    leader = {patient: patient for patient in patients}

    def top(patient: str) -> str:
        while leader[patient] != patient:
            patient = leader[patient]
        return patient

    for scan, patient in zip(scans, patients, strict=True):
        leader[top(patient)] = top(first.setdefault(scan.numpy().tobytes(), patient))
    numbers = {name: n for n, name in enumerate(sorted({top(patient) for patient in patients}))}
    return torch.tensor([numbers[top(patient)] for patient in patients])


def _features(small: Scans) -> Float[Tensor, "n d"]:
    return torch.from_numpy(np.concatenate([hog_rows(small), radiomics(small)], 1).astype(np.float64))


def _mirrored(x: Scans) -> Iterator[Scans]:
    yield x
    for axis in range(2, x.ndim):
        yield x.flip(axis)


def _shifted(x: Scans, reach: Sequence[int]) -> Float[Tensor, "n shifts voxels"]:
    """Each scan at all shifts of up to `reach` voxels along each axis, wrapped around."""
    windows = functional.pad(x, [n for one in reversed(reach) for n in (one, one)], mode="circular")
    for axis, size in enumerate(x.shape[2:], start=2):
        # The places where a window begins stay at `axis`; what is in it becomes the last axis.
        windows = windows.unfold(axis, size, 1)
    dims = x.ndim - 2
    return windows.movedim(1, 1 + dims).reshape(len(x), prod(2 * one + 1 for one in reach), -1)


__all__ = ["SPACES", "FeatureSpace", "RegisteredSpace", "Space", "VoxelSpace", "euclidean", "owners", "shrunk"]
