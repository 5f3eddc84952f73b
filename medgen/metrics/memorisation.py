"""Is a generated scan a copy of somebody? The ratio of its distances to the nearest two patients.

    r = d1 / d2

d1 is the distance to the nearest training patient, d2 to the second nearest. A new scan is about as far
from one patient as from the next (r near 1); a copy, blurred, noised, shifted, mirrored or mixed, is far
nearer to its original (r near 0). Compared is what makes a scan its owner's: the filtered deviation from
the mean training scan, without what contrast or blur of the mean could explain:

    d(x, a) = sqrt(2 - 2 rho),   rho = max over shifts s, mirrors f of cos( P H (s f x - m), P H (a - m) )

in two views H, of which the smaller r counts: smooth (finds blurred and noised copies) and whitened (every
spatial frequency counts alike; finds mixtures). The threshold is set for each dataset, between scans of
held-out patients (at most 1 % below) and planted copies (at least 95 % below).
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from medgen.errors import DataError
from medgen.seeds import derived_seed

# Longest edge at which scans are compared; identity survives, seconds do not.
_EDGE = 48
_MOST_HELD_OUT_FLAGGED, _LEAST_COPIES_CAUGHT = 0.01, 0.95
COPIES = ("blurred", "noised", "shifted", "flipped", "mixed")


@dataclass(frozen=True)
class CopyTest:
    """How well the ratio tells copies from new scans on one dataset.

    Args:
        threshold: a generated scan with r below it is taken for a copy.
        held_out_flagged: share of held-out scans below it.
        copies_caught: share of planted copies below it, for each kind.
        held_out: how many held-out scans there were.
        reliable: both shares are as good as demanded.
    """

    threshold: float
    held_out_flagged: float
    copies_caught: dict[str, float]
    held_out: int
    reliable: bool

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self)


class CopyDetector:
    """Compares scans with the training scans.

    Args:
        train: prepared training scans (n, c, *space).
        patients: whose they are; r compares different patients, and identical scans are one patient's.

    Raises:
        DataError: fewer than two patients.
    """

    def __init__(self, train: Float[Tensor, "n c *space"], patients: Sequence[str]) -> None:
        self.dims = train.ndim - 2
        self._owner = _owners(train, patients)
        if int(self._owner.max()) < 1:
            raise DataError("Telling copies needs different scans of at least two training patients; found one.")
        self._train = train
        small = _small(train)
        self._views = (_View(small, smooth=1.5, whiten=0.0), _View(small, smooth=0.5, whiten=0.5))

    def ratios(self, scans: Float[Tensor, "n c *space"]) -> Float[np.ndarray, " n"]:
        """r of each scan."""
        return np.asarray([self.nearest(scan)[0] for scan in scans])

    def nearest(self, scan: Float[Tensor, "c *space"]) -> tuple[float, int]:
        """r of one scan, and the index of the nearest training scan."""
        small, found = _small(scan[None]), []
        for view in self._views:
            distances = view.distances(small)
            by_patient = torch.full((int(self._owner.max()) + 1,), torch.inf)
            by_patient.scatter_reduce_(0, self._owner, distances, "amin")
            first, second = torch.topk(by_patient, 2, largest=False).values
            found.append((float(first / second.clamp(min=1e-8)), int(distances.argmin())))
        return min(found)

    def calibrate(self, held_out: Float[Tensor, "n c *space"], *, copies: int = 20, seed: int = 0) -> CopyTest:
        """Set the threshold between held-out scans and copies planted from training scans.

        Args:
            held_out: scans of patients the model never saw.
            copies: planted copies of each kind.
            seed: of the planting.
        """
        new = self.ratios(held_out)
        planted = {kind: self.ratios(self._planted(kind, copies, seed)) for kind in COPIES}
        # As strict as the held-out scans allow: above most copies, below nearly all new scans.
        highest = float(np.quantile(new, _MOST_HELD_OUT_FLAGGED, method="lower"))
        lowest = float(max(np.quantile(r, _LEAST_COPIES_CAUGHT, method="higher") for r in planted.values()))
        threshold = (highest + lowest) / 2 if lowest < highest else highest
        caught = {kind: float((r < threshold).mean()) for kind, r in planted.items()}
        flagged = float((new < threshold).mean())
        good = flagged <= _MOST_HELD_OUT_FLAGGED and min(caught.values()) >= _LEAST_COPIES_CAUGHT
        return CopyTest(threshold, flagged, caught, len(new), bool(good))

    def _planted(self, kind: str, count: int, seed: int) -> Float[Tensor, "n c *space"]:
        generator = torch.Generator().manual_seed(derived_seed(seed, COPIES.index(kind)))
        chosen = torch.randint(len(self._train), (count,), generator=generator)
        scans = self._train[chosen].float()
        if kind == "blurred":
            return _blurred(scans, 1.5)
        if kind == "noised":
            spread = scans.flatten(1).std(1).reshape(-1, *[1] * (self.dims + 1))
            return scans + 0.3 * spread * torch.randn(scans.shape, generator=generator)
        if kind == "shifted":
            return torch.roll(scans, [2] * self.dims, list(range(2, 2 + self.dims)))
        if kind == "flipped":
            return scans.flip(2)
        others = [torch.nonzero(self._owner != self._owner[index]).flatten() for index in chosen]
        picked = [other[int(torch.randint(len(other), (1,), generator=generator))] for other in others]
        return 0.7 * scans + 0.3 * self._train[torch.stack(picked)].float()


class _View:
    """Training scans through one filter, ready to be correlated with others at every shift.

    Args:
        small: training scans (n, c, *space).
        smooth: standard deviation of the low-pass, voxels.
        whiten: 0 leaves the spectrum of deviations as it is, 0.5 makes it flat (above a floor).
    """

    def __init__(self, small: Float[Tensor, "n c *space"], *, smooth: float, whiten: float) -> None:
        self._space = tuple(range(2, small.ndim))
        self._shape = small.shape[2:]
        mean = small.mean(0, keepdim=True)
        power = self._transform(small - mean).abs().square().mean((0, 1))
        self._filter = self._gaussian(smooth) / (power / power.max() + 1e-3) ** whiten
        self._filter.view(-1)[0] = 0  # brightness is nobody's
        self._mean = self._filtered(mean)
        blurred = [self._inverse(self._transform(self._mean) * self._gaussian(s)) for s in (0.7, 1.5, 3.0)]
        nuisance = torch.cat([self._mean, *[one - self._mean for one in blurred]])
        basis = torch.linalg.qr(nuisance.flatten(1).T.double()).Q.T.to(small.dtype)
        deviations = (self._filtered(small) - self._mean).flatten(1)
        deviations = (deviations - (deviations @ basis.T) @ basis).reshape(small.shape)
        self._norms = deviations.flatten(1).norm(dim=1).clamp(min=1e-8)
        # Inner products with x - m at a shift are those with x less those with m.
        self._known = torch.cat([self._mean, basis.reshape(nuisance.shape)])
        self._spectra, self._known_spectra = self._transform(deviations), self._transform(self._known)
        self._inner = (deviations * self._mean).flatten(1).sum(1)
        self._known_inner = (self._known * self._mean).flatten(1).sum(1)

    def distances(self, small: Float[Tensor, "1 c *space"]) -> Float[Tensor, " n"]:
        """To every training scan, at the best small shift and mirror image."""
        x = self._filtered(small)
        near = (slice(None), *_small_shifts(self._shape))
        best = torch.full((len(self._norms),), -1.0)
        for turned in _mirrored(x):
            spectrum = self._transform(turned).conj()
            known = self._correlation(spectrum * self._known_spectra)[near]
            explained = known[1:] - self._known_inner[1:, None]
            length = x.square().sum() + self._known_inner[0] - 2 * known[0] - explained.square().sum(0)
            length = length.clamp(min=1e-8).sqrt()
            for first in range(0, len(best), 256):
                part = slice(first, first + 256)
                inner = self._correlation(spectrum * self._spectra[part])[near] - self._inner[part, None]
                best[part] = torch.maximum(best[part], (inner / (length * self._norms[part, None])).amax(1))
        return (2 - 2 * best.clamp(-1, 1)).clamp(min=0).sqrt()

    def _filtered(self, values: Tensor) -> Tensor:
        return self._inverse(self._transform(values) * self._filter)

    def _transform(self, values: Tensor) -> Tensor:
        return torch.fft.rfftn(values, dim=self._space)

    def _inverse(self, spectrum: Tensor) -> Tensor:
        return torch.fft.irfftn(spectrum, s=self._shape, dim=self._space)

    def _correlation(self, spectra: Tensor) -> Float[Tensor, "k *space"]:
        """The correlation theorem: inner products at every shift, summed over channels."""
        return torch.fft.irfftn(spectra.sum(1), s=self._shape, dim=tuple(axis - 1 for axis in self._space))

    def _gaussian(self, sigma: float) -> Tensor:
        squared = torch.zeros(1)
        for axis, n in enumerate(self._shape):
            frequency = torch.fft.rfftfreq(n) if axis == len(self._shape) - 1 else torch.fft.fftfreq(n)
            squared = squared[..., None] + frequency.square() if axis else frequency.square()
        return torch.exp(-2 * torch.pi**2 * sigma**2 * squared)


def _owners(train: Tensor, patients: Sequence[str]) -> Int[Tensor, " n"]:
    """A number for each patient; patients with an identical scan get one number."""
    first: dict[bytes, str] = {}
    leader = {patient: patient for patient in patients}

    def top(patient: str) -> str:
        while leader[patient] != patient:
            patient = leader[patient]
        return patient

    for scan, patient in zip(train, patients, strict=True):
        leader[top(patient)] = top(first.setdefault(scan.numpy().tobytes(), patient))
    names = sorted({top(patient) for patient in patients})
    return torch.tensor([names.index(top(patient)) for patient in patients])


def _small(scans: Float[Tensor, "n c *space"]) -> Float[Tensor, "n c *smaller"]:
    """Averaged down to at most `_EDGE` voxels along an axis."""
    factor = max(1, -(-max(scans.shape[2:]) // _EDGE))
    pool = functional.avg_pool2d if scans.ndim == 4 else functional.avg_pool3d
    return pool(scans.float(), factor, ceil_mode=True) if factor > 1 else scans.float()


def _mirrored(x: Tensor) -> Iterator[Tensor]:
    yield x
    for axis in range(2, x.ndim):
        yield x.flip(axis)


def _blurred(scans: Float[Tensor, "n c *space"], sigma: float) -> Float[Tensor, "n c *space"]:
    from scipy.ndimage import gaussian_filter

    return torch.from_numpy(gaussian_filter(scans.numpy(), sigma, axes=tuple(range(2, scans.ndim)), mode="nearest"))


def _small_shifts(space: Sequence[int]) -> tuple[Tensor, ...]:
    """Indices of all shifts of up to an eighth of each axis, wrapped around zero."""
    offsets = [torch.arange(-max(1, n // 8), max(1, n // 8) + 1) % n for n in space]
    return tuple(grid.flatten() for grid in torch.meshgrid(*offsets, indexing="ij"))


__all__ = ["COPIES", "CopyDetector", "CopyTest"]
