"""Is a generated scan a copy of somebody? The ratio of its distances to the nearest two patients, in three spaces.

    r = d1 / d2

d1 is the distance to the nearest training patient, d2 to the second nearest. A new scan is about as far from one
patient as from the next (r near 1); a copy, blurred, noised, shifted, mirrored or mixed, is far nearer to its original
(r near 0). The spaces are those of `medgen.metrics.spaces`: voxels, registered, and features. Each has its own
threshold, set for each dataset between scans of held-out patients and planted copies, so that of held-out scans at
most 1 % fall below any of them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from medgen.errors import DataError
from medgen.metrics.spaces import SPACES, FeatureSpace, RegisteredSpace, Space, VoxelSpace, owners, shrunk
from medgen.seeds import derived_seed

_MOST_HELD_OUT_FLAGGED, _LEAST_COPIES_CAUGHT = 0.01, 0.95
COPIES = ("blurred", "noised", "shifted", "flipped", "mixed", "scaled")
# Scans compared at a time, and parts of the held-out scans that are left out in turn.
_BLOCK, _FOLDS = 64, 10
# Held-out scans that show what the rarest hundredth is like.
_ENOUGH = 300
# A voxel-wise r that only the same scan has, stored twice.
_SAME = 0.01

# In each space, of scans that are as many within one such table only.
Ratios = dict[str, Float[np.ndarray, "_"]]


@dataclass(frozen=True)
class Nearest:
    """The training scan that a scan is nearest to.

    Args:
        r: d1 / d2 in each space; near 0 for a copy, near 1 for a new scan.
        distance: d1 in each space, in its own unit.
        nearest: index of the training scan, in the space of the smallest r.
    """

    r: dict[str, float]
    distance: dict[str, float]
    nearest: int


@dataclass(frozen=True)
class CopyTest:
    """How well the ratios tell copies from new scans on one dataset.

    Args:
        thresholds: a scan with r below it, in any space, is taken for a copy; 0 where the space tells none.
        held_out_flagged: share of held-out scans taken for copies.
        left_out_flagged: the same with thresholds that were set without the scans in question: what to expect of new
            scans; with few held-out scans it is much more.
        copies_caught: share of planted copies taken for copies, for each kind.
        held_out: how many held-out scans that was measured on.
        leaked: how many more are no other than a training scan, and were left aside.
        reliable: the first share is at most 1 %, and 95 % of every kind are caught.
    """

    thresholds: dict[str, float]
    held_out_flagged: float
    left_out_flagged: float
    copies_caught: dict[str, float]
    held_out: int
    leaked: int
    reliable: bool

    @classmethod
    def untested(cls) -> "CopyTest":
        """What there is without held-out scans: r = 0.5 in the registered space."""
        return cls(dict.fromkeys(SPACES, 0.0) | {"registered": 0.5}, 0.0, 0.0, {}, 0, 0, False)

    @property
    def threshold(self) -> float:
        """That of the registered space."""
        return self.thresholds["registered"]

    @property
    def silent(self) -> tuple[str, ...]:
        """The spaces that tell no copies from new scans here, and have no vote."""
        return tuple(space for space, threshold in self.thresholds.items() if threshold == 0)

    def is_copy(self, nearest: Nearest) -> bool:
        """Whether r is below the threshold of any space."""
        return any(nearest.r[space] < threshold for space, threshold in self.thresholds.items())

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self)


class CopyDetector:
    """Compares scans with the training scans.

    Args:
        train: prepared training scans (n, c, *space) on about [0, 1].
        patients: whose they are; r compares different patients, and identical scans are one patient's.

    Raises:
        DataError: fewer than two patients.

    >>> train = torch.rand(5, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    >>> found = CopyDetector(train, list("abcde")).nearest(train[3:4] * 0.9 + 0.02)[0]
    >>> found.nearest, found.r["registered"] < 0.1
    (3, True)
    """

    def __init__(self, train: Float[Tensor, "n c *space"], patients: Sequence[str]) -> None:
        self.dims = train.ndim - 2
        self._owner = owners(train, patients)
        if int(self._owner.max()) < 1:
            raise DataError("Telling copies needs different scans of at least two training patients; found one.")
        self._train = train
        small = shrunk(train)
        self._spaces: dict[str, Space] = {
            "voxel": VoxelSpace(small), "registered": RegisteredSpace(small), "feature": FeatureSpace(small),
        }  # fmt: skip

    def nearest(self, scans: Float[Tensor, "n c *space"]) -> list[Nearest]:
        """The nearest training scan of each scan, and r in all spaces."""
        return [one for n in range(0, len(scans), _BLOCK) for one in self._nearest(shrunk(scans[n : n + _BLOCK]))]

    def ratios(self, scans: Float[Tensor, "n c *space"]) -> Ratios:
        """r of each scan in each space."""
        found = self.nearest(scans)
        return {space: np.asarray([one.r[space] for one in found]) for space in self._spaces}

    def _nearest(self, small: Float[Tensor, "n c *space"]) -> list[Nearest]:
        r, first, index = [], [], []
        for space in self._spaces.values():
            distances = space.distances(small).double()
            by_patient = torch.full((*distances.shape[:2], int(self._owner.max()) + 1), torch.inf, dtype=torch.float64)
            by_patient.scatter_reduce_(2, self._owner.expand_as(distances), distances, "amin")
            two = by_patient.topk(2, largest=False).values
            # Of several views the one counts in which the scan looks most like a copy.
            ratio, view = (two[..., 0] / two[..., 1].clamp(min=1e-8)).min(0)
            each = torch.arange(len(small))
            r.append(ratio)
            first.append(two[view, each, 0])
            index.append(distances.argmin(2)[view, each])
        ratios, nearest = torch.stack(r), torch.stack(first)
        chosen = torch.stack(index).gather(0, ratios.argmin(0, keepdim=True))[0].tolist()
        names = tuple(self._spaces)
        return [
            Nearest(dict(zip(names, r, strict=True)), dict(zip(names, d, strict=True)), n)
            for r, d, n in zip(ratios.T.tolist(), nearest.T.tolist(), chosen, strict=True)
        ]

    def calibrate(self, held_out: Float[Tensor, "n c *space"], *, copies: int = 20, seed: int = 0) -> CopyTest:
        """Set the thresholds between held-out scans and copies planted from training scans.

        Args:
            held_out: scans of patients the model never saw; with none, the test is `CopyTest.untested`.
            copies: planted copies of each kind.
            seed: of the planting.
        """
        new = self.ratios(held_out)
        # One that is a training scan, in two splits by mistake, says nothing of new scans.
        known = new["voxel"] < _SAME
        new = {space: r[~known] for space, r in new.items()}
        count = int((~known).sum())
        if not count:
            return replace(CopyTest.untested(), leaked=int(known.sum()))
        planted = {kind: self.ratios(self._planted(kind, copies, seed)) for kind in COPIES}
        thresholds = _thresholds(new, planted)
        caught = {kind: float(_below(r, thresholds).mean()) for kind, r in planted.items()}
        flagged = float(_below(new, thresholds).mean())
        good = flagged <= _MOST_HELD_OUT_FLAGGED and min(caught.values()) >= _LEAST_COPIES_CAUGHT
        left_out = _left_out(new, planted, seed)
        return CopyTest(thresholds, flagged, left_out, caught, count, int(known.sum()), bool(good))

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
        if kind == "scaled":
            return _scaled(scans, 1.05)
        others = [torch.nonzero(self._owner != self._owner[index]).flatten() for index in chosen]
        picked = [other[int(torch.randint(len(other), (1,), generator=generator))] for other in others]
        return 0.7 * scans + 0.3 * self._train[torch.stack(picked)].float()


def _thresholds(new: Ratios, planted: dict[str, Ratios]) -> dict[str, float]:
    """As strict as the held-out scans allow: above most copies, below nearly all new scans.

    The ceilings are the k-th smallest r of held-out scans in each space, with k as large as leaves the share of
    held-out scans below any of them at most 1 %; few scans do not show their rarest hundredth, so below 300 of them a
    ceiling is no higher than where an exponential tail, fitted below the median, has it. A space votes if 95 % of some
    kind of copies are below its ceiling. One factor takes all ceilings down: halfway to the copies, if there is a gap.
    """
    count = len(next(iter(new.values())))
    ceilings = {space: float(r.min()) for space, r in new.items()}
    for k in range(1, int(_MOST_HELD_OUT_FLAGGED * count) + 1):
        higher = {space: float(np.sort(r)[k]) for space, r in new.items()}
        if _below(new, higher).mean() > _MOST_HELD_OUT_FLAGGED:
            break
        ceilings = higher
    if count < _ENOUGH:
        ceilings = {space: max(0.0, min(ceiling, _tail(new[space]))) for space, ceiling in ceilings.items()}
    caught = {s: [float((r[s] < ceiling).mean()) for r in planted.values()] for s, ceiling in ceilings.items()}
    voting = [space for space, shares in caught.items() if max(shares) >= _LEAST_COPIES_CAUGHT]
    # Where none can vote, the one that catches most does what it can.
    voting = voting or [max(caught, key=lambda space: np.mean(caught[space]))]
    parts = [np.min([r[s] / max(ceilings[s], 1e-8) for s in voting], axis=0) for r in planted.values()]
    copies = max(float(np.quantile(part, _LEAST_COPIES_CAUGHT, method="higher")) for part in parts)
    factor = (copies + 1) / 2 if copies < 1 else 1.0
    return {space: factor * ceiling * (space in voting) for space, ceiling in ceilings.items()}


def _tail(r: Float[np.ndarray, "_"]) -> float:
    """Where the share of one space, a third of 1 %, would be lower, were distances below the median exponential."""
    middle = float(np.median(r))
    below = r[r < middle]
    mean = float(middle - below.mean()) if len(below) else 0.0
    return middle - mean * float(np.log(0.5 * len(SPACES) / _MOST_HELD_OUT_FLAGGED))


def _left_out(new: Ratios, planted: dict[str, Ratios], seed: int) -> float:
    """Share of held-out scans flagged by thresholds set without them, in 10 folds."""
    count = len(next(iter(new.values())))
    if count < 2:
        return float("nan")
    fold = np.random.default_rng(derived_seed(seed, len(COPIES))).permutation(count) % _FOLDS
    flagged = np.zeros(count, dtype=bool)
    for part in range(min(_FOLDS, count)):
        without = {space: r[fold != part] for space, r in new.items()}
        flagged[fold == part] = _below(new, _thresholds(without, planted))[fold == part]
    return float(flagged.mean())


def _below(ratios: Ratios, thresholds: dict[str, float]) -> Bool[np.ndarray, "_"]:
    """Which scans have r below the threshold of any space."""
    return np.any([ratios[space] < threshold for space, threshold in thresholds.items()], axis=0)


def _blurred(scans: Float[Tensor, "n c *space"], sigma: float) -> Float[Tensor, "n c *space"]:
    from scipy.ndimage import gaussian_filter

    return torch.from_numpy(gaussian_filter(scans.numpy(), sigma, axes=tuple(range(2, scans.ndim)), mode="nearest"))


def _scaled(scans: Float[Tensor, "n c *space"], factor: float) -> Float[Tensor, "n c *space"]:
    """Enlarged about the middle, cropped to what they were."""
    from torch.nn import functional

    dims = scans.ndim - 2
    turn = torch.cat([torch.eye(dims) / factor, torch.zeros(dims, 1)], 1).expand(len(scans), -1, -1)
    where = functional.affine_grid(turn, list(scans.shape), align_corners=False)
    return functional.grid_sample(scans, where, padding_mode="border", align_corners=False)


__all__ = ["COPIES", "CopyDetector", "CopyTest", "Nearest"]
