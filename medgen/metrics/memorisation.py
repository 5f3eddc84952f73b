"""Is a generated scan a copy of somebody? The ratio of its distances to the nearest two patients.

    r = d1 / d2

d1 is the distance to the nearest training patient, d2 to the second nearest. A new scan is about as far
from one patient as from the next (r near 1); a copy, blurred, noised, shifted, mirrored or mixed, is far
nearer to its original (r near 0). The distance is between deviations from the mean training scan and
allows for shifts and mirror images:

    d(x, a) = sqrt(2 - 2 rho),   rho = max over shifts s, mirrors f of cos( s f x - m, a - m )

The threshold is set for each dataset, between scans of held-out patients (at most 1 % above) and
planted copies (at least 95 % below).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from medgen.errors import DataError
from medgen.seeds import derived_seed

# Longest edge at which scans are compared; identity survives, seconds do not.
_EDGE = {2: 48, 3: 32}
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
        patients: whose they are; r compares different patients.

    Raises:
        DataError: fewer than two patients.
    """

    def __init__(self, train: Float[Tensor, "n c *space"], patients: Sequence[str]) -> None:
        self.dims = train.ndim - 2
        names = sorted(set(patients))
        if len(names) < 2:
            raise DataError("Telling copies needs scans of at least two training patients; found one.")
        self._owner = torch.tensor([names.index(patient) for patient in patients])
        self._shape = train.shape[1:]
        self._train = train
        small = self._shrunk(train)
        self._mean = small.mean(0, keepdim=True)
        deviations = small - self._mean
        self._norms = deviations.flatten(1).norm(dim=1).clamp(min=1e-8)
        self._inner = (deviations * self._mean).flatten(1).sum(1)
        self._spectra = self._transform(deviations)
        self._mean_spectrum = self._transform(self._mean)

    # -- the ratio -----------------------------------------------------------------------------

    def ratios(self, scans: Float[Tensor, "n c *space"]) -> Float[np.ndarray, " n"]:
        """r of each scan."""
        return np.asarray([self.nearest(scan)[0] for scan in scans])

    def nearest(self, scan: Float[Tensor, "c *space"]) -> tuple[float, int]:
        """r of one scan, and the index of the nearest training scan."""
        distances = self._distances(scan)
        by_patient = torch.full((int(self._owner.max()) + 1,), torch.inf)
        by_patient.scatter_reduce_(0, self._owner, distances, "amin")
        first, second = torch.sort(by_patient).values[:2]
        return float(first / second.clamp(min=1e-8)), int(distances.argmin())

    def _distances(self, scan: Float[Tensor, "c *space"]) -> Float[Tensor, " n"]:
        small = self._shrunk(scan[None])
        best = torch.full((len(self._owner),), -1.0)
        for flips in product((False, True), repeat=self.dims):
            axes = [2 + axis for axis, flip in enumerate(flips) if flip]
            turned = self._transform(small.flip(axes) if axes else small).conj()
            # Correlation theorem: one inverse transform gives the inner product at every shift.
            with_mean = self._correlation(turned * self._mean_spectrum)
            norm = (small.square().sum() + self._mean.square().sum() - 2 * with_mean).clamp(min=1e-8).sqrt()
            near = _small_shifts(norm.shape[1:], self.dims)
            for first in range(0, len(self._owner), 256):
                part = slice(first, first + 256)
                inner = self._correlation(turned * self._spectra[part])
                shape = (-1, *[1] * self.dims)
                cosine = (inner - self._inner[part].reshape(shape)) / (norm * self._norms[part].reshape(shape))
                best[part] = torch.maximum(best[part], cosine[(slice(None), *near)].amax(1))
        return (2 - 2 * best.clamp(-1, 1)).clamp(min=0).sqrt()

    def _transform(self, values: Tensor) -> Tensor:
        return torch.fft.rfftn(values, dim=tuple(range(2, 2 + self.dims)))

    def _correlation(self, product_of_spectra: Tensor) -> Tensor:
        space = self._mean.shape[2:]
        return torch.fft.irfftn(product_of_spectra.sum(1), s=space, dim=tuple(range(1, 1 + self.dims)))

    def _shrunk(self, scans: Tensor) -> Tensor:
        factor = max(1, -(-max(scans.shape[2:]) // _EDGE[self.dims]))
        pool = functional.avg_pool2d if self.dims == 2 else functional.avg_pool3d
        return pool(scans.float(), factor, ceil_mode=True) if factor > 1 else scans.float()

    # -- its threshold -------------------------------------------------------------------------

    def calibrate(self, held_out: Float[Tensor, "n c *space"], *, copies: int = 20, seed: int = 0) -> CopyTest:
        """Set the threshold between held-out scans and copies planted from training scans.

        Args:
            held_out: scans of patients the model never saw.
            copies: planted copies of each kind.
            seed: of the planting.
        """
        new = self.ratios(held_out)
        planted = {kind: self.ratios(self._planted(kind, copies, seed)) for kind in COPIES}
        pooled = np.concatenate(list(planted.values()))
        # As strict as the held-out scans allow: above most copies, below nearly all new scans.
        highest = float(np.quantile(new, _MOST_HELD_OUT_FLAGGED, method="lower"))
        lowest = float(max(np.quantile(r, _LEAST_COPIES_CAUGHT, method="higher") for r in planted.values()))
        threshold = (highest + lowest) / 2 if lowest < highest else highest
        caught = {kind: float((r < threshold).mean()) for kind, r in planted.items()}
        flagged = float((new < threshold).mean())
        good = flagged <= _MOST_HELD_OUT_FLAGGED and float((pooled < threshold).mean()) >= _LEAST_COPIES_CAUGHT
        return CopyTest(threshold, flagged, caught, len(new), bool(good))

    def _planted(self, kind: str, count: int, seed: int) -> Float[Tensor, "n c *space"]:
        generator = torch.Generator().manual_seed(derived_seed(seed, COPIES.index(kind)))
        chosen = torch.randint(len(self._train), (count,), generator=generator)
        scans = self._train[chosen].float()
        space = list(range(2, 2 + self.dims))
        if kind == "blurred":
            return torch.stack([_blurred(scan, 1.5) for scan in scans])
        if kind == "noised":
            spread = scans.flatten(1).std(1).reshape(-1, *[1] * (self.dims + 1))
            return scans + 0.3 * spread * torch.randn(scans.shape, generator=generator)
        if kind == "shifted":
            return torch.roll(scans, [2] * self.dims, space)
        if kind == "flipped":
            return scans.flip(2)
        other = _other_patients(chosen, self._owner, generator)
        return 0.7 * scans + 0.3 * self._train[other].float()


def _other_patients(chosen: Tensor, owner: Tensor, generator: torch.Generator) -> Tensor:
    """For each chosen scan, a random one of another patient."""
    picked = []
    for index in chosen:
        others = torch.nonzero(owner != owner[index]).flatten()
        picked.append(others[int(torch.randint(len(others), (1,), generator=generator))])
    return torch.stack(picked)


def _blurred(scan: Float[Tensor, "c *space"], sigma: float) -> Float[Tensor, "c *space"]:
    from scipy.ndimage import gaussian_filter

    axes = tuple(range(1, scan.ndim))
    return torch.from_numpy(gaussian_filter(scan.numpy(), sigma, axes=axes, mode="nearest"))


def _small_shifts(space: Sequence[int], dims: int) -> tuple[Tensor, ...]:
    """Indices of all shifts of up to an eighth of each axis, wrapped around zero."""
    reach = [max(1, n // 8) for n in space]
    offsets = [torch.arange(-r, r + 1) % n for r, n in zip(reach, space, strict=True)]
    grids = torch.meshgrid(*offsets, indexing="ij")
    return tuple(grid.flatten() for grid in grids)


__all__ = ["COPIES", "CopyDetector", "CopyTest"]
